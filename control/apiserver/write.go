package apiserver

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/state"
)

// Bounds of a write.
const (
	// writeTries bounds how often a write that names no resource version is tried over because somebody else was faster.
	writeTries = 8
	// maxGeneratedBase is what is kept of generateName: with the suffix it stays a DNS label.
	maxGeneratedBase = 63 - generatedSuffix
	generatedSuffix  = 5
	// maxUnknown bounds how many unknown fields are named in an answer.
	maxUnknown = 20
)

// writeOptions are the parts of a query that writes share.
type writeOptions struct {
	dryRun     bool
	validation string // Ignore, Warn or Strict
}

func parseWriteOptions(kind string, query url.Values) (writeOptions, error) {
	o := writeOptions{validation: "Warn"}
	for _, v := range query["dryRun"] {
		if v != "" && v != "All" {
			return o, invalidOptions(kind, "dryRun", v, "All")
		}
		o.dryRun = o.dryRun || v == "All"
	}
	switch v := query.Get("fieldValidation"); v {
	case "":
	case "Ignore", "Warn", "Strict":
		o.validation = v
	default:
		return o, invalidOptions(kind, "fieldValidation", v, "Ignore", "Warn", "Strict")
	}
	return o, nil
}

// serverFields are members of Kubernetes' metadata that objects exported from a cluster carry and that have no meaning here.
// They are dropped without a word, as a cluster drops them.
var serverFields = []string{"metadata.managedFields", "metadata.selfLink", "metadata.deletionGracePeriodSeconds"}

// decode reads one object of a kind. warnings are about fields it does not have; with Strict they are an error.
func decode(k *api.Kind, data []byte, opts writeOptions) (o api.Object, warnings []string, err error) {
	cannot := func(why error) error {
		return badRequest("%s in version %q cannot be handled as a %s: %v", k.Kind, version(k), k.Kind, why)
	}
	if len(data) > api.MaxObjectBytes {
		return nil, nil, fail(http.StatusRequestEntityTooLarge, reasonTooLarge, "the object is too large: it has %d bytes as JSON, and the limit is %d", len(data), api.MaxObjectBytes)
	}
	var typ struct {
		Kind       *string `json:"kind"`
		APIVersion *string `json:"apiVersion"`
	}
	if err := json.Unmarshal(data, &typ); err != nil {
		if _, _, better := api.Decode(k, data); better != nil {
			err = better
		}
		return nil, nil, cannot(err)
	}
	switch {
	case typ.Kind == nil || *typ.Kind == "":
		return nil, nil, badRequest("Object 'Kind' is missing in the body of the request")
	case typ.APIVersion == nil || *typ.APIVersion == "":
		return nil, nil, badRequest("Object 'apiVersion' is missing in the body of the request")
	case *typ.Kind != k.Kind || *typ.APIVersion != k.APIVersion:
		return nil, nil, badRequest("the object provided is unrecognized here: it is a %s of %s, and this path takes a %s of %s",
			clip(*typ.Kind, 100), clip(*typ.APIVersion, 100), k.Kind, k.APIVersion)
	}
	o, unknown, err := api.Decode(k, data)
	var errs api.Errors
	if errors.As(err, &errs) {
		return nil, nil, invalid(k, nameIn(data), errs)
	}
	if err != nil {
		return nil, nil, cannot(err)
	}
	for _, u := range unknown {
		if slices.ContainsFunc(serverFields, func(f string) bool { return u == f || strings.HasPrefix(u, f+"[") || strings.HasPrefix(u, f+".") }) {
			continue
		}
		warnings = append(warnings, fmt.Sprintf("unknown field %q", clip(u, 200)))
	}
	if n := len(warnings) - maxUnknown; n > 0 {
		warnings = append(warnings[:maxUnknown], fmt.Sprintf("and %d more", n))
	}
	switch {
	case opts.validation == "Ignore":
		warnings = nil
	case opts.validation == "Strict" && len(warnings) > 0:
		return nil, nil, cannot(fmt.Errorf("strict decoding error: %s", strings.Join(warnings, ", ")))
	}
	return o, warnings, nil
}

// nameIn is the name of an object that could not be decoded as a whole.
func nameIn(data []byte) string {
	var o struct {
		Metadata struct {
			Name         string `json:"name"`
			GenerateName string `json:"generateName"`
		} `json:"metadata"`
	}
	json.Unmarshal(data, &o)
	return clip(cmp.Or(o.Metadata.Name, o.Metadata.GenerateName), 253)
}

// place puts o where the path says, or says that the body contradicts the path.
func place(o api.Object, t target) error {
	m := o.Meta()
	if m.Namespace != "" && m.Namespace != t.namespace {
		return badRequest("the namespace of the provided object does not match the namespace sent on the request: %q and %q", clip(m.Namespace, 100), clip(t.namespace, 100))
	}
	if t.name != "" && m.Name != t.name {
		return badRequest("the name of the object (%s) does not match the name on the URL (%s)", clip(m.Name, 300), clip(t.name, 300))
	}
	m.Namespace = t.namespace
	if !isDNSLabel(t.namespace) {
		return invalid(api.KindOf(o), m.Name, api.Errors{{Type: api.FieldValueInvalid, Field: "metadata.namespace",
			Detail: fmt.Sprintf("invalid value: %s", clip(t.namespace, 100)), Why: "not a DNS 1123 label of at most 63 lower case letters, digits and dashes"}})
	}
	return nil
}

// create stores a new object.
func (s *Server) create(ctx context.Context, w http.ResponseWriter, r *http.Request, t target, query url.Values) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	opts, err := parseWriteOptions("CreateOptions", query)
	if err != nil {
		return err
	}
	data, err := s.body(w, r, typeJSON, typeYAML)
	if err != nil {
		return err
	}
	o, warnings, err := decode(t.kind, data, opts)
	if err != nil {
		return err
	}
	if o.Meta().ResourceVersion != "" {
		return badRequest("resourceVersion should not be set on objects to be created")
	}
	if err := place(o, t); err != nil {
		return err
	}
	created, more, err := s.insert(ctx, t.kind, o, opts)
	warn(w.Header(), append(warnings, more...))
	if err != nil {
		return err
	}
	return s.answer(w, r, f, t.kind, http.StatusCreated, created)
}

// body reads the request's body in one of the media types, as JSON.
func (s *Server) body(w http.ResponseWriter, r *http.Request, types ...string) ([]byte, error) {
	data, err := readBody(w, r, s.maxBody)
	if err != nil {
		return nil, err
	}
	mediaType, err := contentType(r, types...)
	if err != nil {
		return nil, err
	}
	return toJSON(data, mediaType, s.maxBody)
}

// insert admits and stores an object that is placed, and returns it with warnings.
func (s *Server) insert(ctx context.Context, k *api.Kind, o api.Object, opts writeOptions) (api.Object, []string, error) {
	m := o.Meta()
	generated := m.Name == "" && m.GenerateName != ""
	for try := 1; ; try++ {
		if generated {
			m.Name = generateName(m.GenerateName)
		}
		warnings, err := s.admit(o, nil)
		if err != nil {
			return nil, warnings, err
		}
		release, err := s.settle(ctx, o)
		if err != nil {
			return nil, warnings, err
		}
		var stored api.Object
		if opts.dryRun {
			stored, err = s.pretendCreate(ctx, k, o)
		} else {
			stored, err = s.store.Create(ctx, k, o)
		}
		release()
		if err == nil {
			return stored, warnings, nil
		}
		if generated && errors.Is(err, state.ErrExists) && try < writeTries {
			continue
		}
		return nil, warnings, fromStore(err, k, m.Name)
	}
}

// pretendCreate fills in what the store would.
func (s *Server) pretendCreate(ctx context.Context, k *api.Kind, o api.Object) (api.Object, error) {
	m := o.Meta()
	_, err := s.store.Get(ctx, k, m.Namespace, m.Name)
	if err == nil {
		return nil, state.ErrExists
	}
	if !errors.Is(err, state.ErrNotFound) {
		return nil, err
	}
	m.UID = newUID()
	m.CreationTimestamp = &api.Time{Time: s.now().UTC().Truncate(time.Second)}
	m.Generation = 1
	o.Type().Kind, o.Type().APIVersion = k.Kind, k.APIVersion
	return o, nil
}

// admit makes an object that came from outside what it has to be before it is stored, and says what is wrong with it. old is
// the stored object when o replaces it. Owned by the server: status, uid, generation, times, and who made and changed it.
func (s *Server) admit(o, old api.Object) (warnings []string, err error) {
	k, m := api.KindOf(o), o.Meta()
	o.Type().Kind, o.Type().APIVersion = k.Kind, k.APIVersion
	if len(m.Finalizers) > 0 && (old == nil || !slices.Equal(m.Finalizers, old.Meta().Finalizers)) {
		warnings = append(warnings, "metadata.finalizers is not honoured and not kept: objects are deleted at once")
	}
	m.Finalizers, m.DeletionTimestamp = nil, nil
	if old == nil {
		m.UID, m.Generation, m.CreationTimestamp = "", 0, nil
		setStatus(o, k.New())
	} else {
		was := old.Meta()
		m.UID, m.Generation, m.CreationTimestamp, m.GenerateName = was.UID, was.Generation, was.CreationTimestamp, was.GenerateName
		setStatus(o, old)
	}
	api.SetDefaults(o)
	if old != nil {
		if w := api.FreeName(o, old); w != "" {
			warnings = append(warnings, w)
		}
	}
	sign(o, old)
	if errs := api.Validate(o, old, s.limits); len(errs) > 0 {
		return warnings, invalid(k, m.Name, errs)
	}
	return append(warnings, api.Unsupported(o)...), nil
}

// sign writes who made an object and who changed its spec last. Revisions are stamped, not made by people: they get neither.
func sign(o, old api.Object) {
	if _, ok := o.(*api.Revision); ok {
		return
	}
	m := o.Meta()
	creator, modifier := User, User
	if old != nil {
		was := old.Meta().Annotations
		creator = was[api.AnnotationCreator]
		if api.EqualSpec(o, old) {
			modifier = was[api.AnnotationLastModifier]
		}
	}
	ann := maps.Clone(m.Annotations)
	if ann == nil {
		ann = map[string]string{}
	}
	for key, v := range map[string]string{api.AnnotationCreator: creator, api.AnnotationLastModifier: modifier} {
		if v == "" {
			delete(ann, key) // made by the platform itself
		} else {
			ann[key] = v
		}
	}
	if len(ann) == 0 {
		ann = nil
	}
	m.Annotations = ann
}

// setStatus gives o the status of from, which is of the same kind.
func setStatus(o, from api.Object) {
	reflect.ValueOf(o).Elem().FieldByName("Status").Set(reflect.ValueOf(from).Elem().FieldByName("Status"))
}

// replace stores a whole object in the place of another.
func (s *Server) replace(ctx context.Context, w http.ResponseWriter, r *http.Request, t target, query url.Values) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	opts, err := parseWriteOptions("UpdateOptions", query)
	if err != nil {
		return err
	}
	data, err := s.body(w, r, typeJSON, typeYAML)
	if err != nil {
		return err
	}
	if _, _, err := decode(t.kind, data, opts); err != nil {
		return err
	}
	return s.rewrite(ctx, w, r, f, t, opts, func(api.Object) (api.Object, []string, error) {
		return decode(t.kind, data, opts) // afresh each time: admission changes it
	})
}

// rewrite reads the stored object, lets change make its successor, and stores that, compared with what was read. If
// the successor names no resource version of its own and somebody else was faster, all of it is done again.
func (s *Server) rewrite(ctx context.Context, w http.ResponseWriter, r *http.Request, f form, t target, opts writeOptions,
	change func(old api.Object) (api.Object, []string, error)) error {
	for try := 1; ; try++ {
		old, err := s.store.Get(ctx, t.kind, t.namespace, t.name)
		if err != nil {
			return fromStore(err, t.kind, t.name)
		}
		o, warnings, err := change(old)
		if err != nil {
			return err
		}
		if err := place(o, t); err != nil {
			return err
		}
		was, m := old.Meta(), o.Meta()
		if m.UID != "" && m.UID != was.UID {
			return conflict(t.kind, t.name, fmt.Sprintf("Precondition failed: UID in precondition: %s, UID in object meta: %s", clip(m.UID, 100), was.UID))
		}
		if m.ResourceVersion != "" && m.ResourceVersion != was.ResourceVersion {
			return modified(t.kind, t.name)
		}
		m.ResourceVersion = was.ResourceVersion
		more, err := s.admit(o, old)
		warnings = append(warnings, more...)
		if err != nil {
			warn(w.Header(), warnings)
			return err
		}
		release, err := s.settle(ctx, o)
		if err != nil {
			warn(w.Header(), warnings)
			return err
		}
		if opts.dryRun {
			release()
			if !api.EqualSpec(o, old) {
				m.Generation++
			}
			warn(w.Header(), warnings)
			return s.answer(w, r, f, t.kind, http.StatusOK, o)
		}
		stored, err := s.store.Update(ctx, t.kind, o)
		release()
		if errors.Is(err, state.ErrConflict) && try < writeTries {
			continue // if the client named a resource version, the next round refuses it
		}
		if err != nil {
			return fromStore(err, t.kind, t.name)
		}
		warn(w.Header(), warnings)
		return s.answer(w, r, f, t.kind, http.StatusOK, stored)
	}
}

// deleteOptions are Kubernetes' DeleteOptions as far as they have a meaning here.
type deleteOptions struct {
	Kind              string   `json:"kind"`
	PropagationPolicy string   `json:"propagationPolicy"`
	OrphanDependents  *bool    `json:"orphanDependents"`
	DryRun            []string `json:"dryRun"`
	Preconditions     struct {
		UID             string `json:"uid"`
		ResourceVersion string `json:"resourceVersion"`
	} `json:"preconditions"`
}

// deleteOptions come in the body or in the query.
func (s *Server) deleteOptions(w http.ResponseWriter, r *http.Request, query url.Values) (deleteOptions, error) {
	var o deleteOptions
	data, err := readBody(w, r, s.maxBody)
	if err != nil {
		return o, err
	}
	if len(strings.TrimSpace(string(data))) > 0 {
		mediaType, err := contentType(r, typeJSON, typeYAML)
		if err != nil {
			return o, err
		}
		if data, err = toJSON(data, mediaType, s.maxBody); err != nil {
			return o, err
		}
		if err := json.Unmarshal(data, &o); err != nil {
			return o, badRequest("DeleteOptions cannot be read: %v", err)
		}
		if o.Kind != "" && o.Kind != "DeleteOptions" {
			return o, badRequest("the body of a deletion must be DeleteOptions, not %s", clip(o.Kind, 100))
		}
	}
	if v := query.Get("propagationPolicy"); v != "" {
		o.PropagationPolicy = v
	}
	if v := query.Get("orphanDependents"); v != "" {
		yes := isTrue(v)
		o.OrphanDependents = &yes
	}
	o.DryRun = append(o.DryRun, query["dryRun"]...)
	for _, v := range o.DryRun {
		if v != "" && v != "All" {
			return o, invalidOptions("DeleteOptions", "dryRun", v, "All")
		}
	}
	if o.OrphanDependents != nil && *o.OrphanDependents {
		o.PropagationPolicy = "Orphan"
	}
	switch o.PropagationPolicy {
	case "", "Background", "Foreground":
		return o, nil
	}
	// Orphan: what a service owns is remade from it and has no life of its own.
	return o, invalidOptions("DeleteOptions", "propagationPolicy", o.PropagationPolicy, "Background", "Foreground")
}

func (o deleteOptions) dry() bool { return slices.Contains(o.DryRun, "All") }

// delete removes one object at once; what it owns is collected afterwards, whatever the propagation policy.
func (s *Server) delete(ctx context.Context, w http.ResponseWriter, r *http.Request, t target, query url.Values) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	opts, err := s.deleteOptions(w, r, query)
	if err != nil {
		return err
	}
	o, err := s.remove(ctx, t.kind, t.namespace, t.name, opts)
	if err != nil {
		return err
	}
	ok := status{Kind: "Status", APIVersion: "v1", Status: "Success",
		Details: &statusDetails{Name: t.name, Group: group(t.kind), Kind: t.kind.Plural, UID: o.Meta().UID}}
	respond(w, r, form{yaml: f.yaml}, http.StatusOK, ok)
	return nil
}

func (s *Server) remove(ctx context.Context, k *api.Kind, namespace, name string, opts deleteOptions) (api.Object, error) {
	pre := opts.Preconditions
	release, err := s.unused(ctx, k, namespace, name)
	if err != nil {
		return nil, err
	}
	defer release()
	var o api.Object
	if opts.dry() || pre.UID != "" || pre.ResourceVersion != "" {
		if o, err = s.store.Get(ctx, k, namespace, name); err != nil {
			return nil, fromStore(err, k, name)
		}
		m := o.Meta()
		if pre.UID != "" && pre.UID != m.UID {
			return nil, conflict(k, name, fmt.Sprintf("the UID in the precondition (%s) does not match the UID in record (%s). The object might have been deleted and then recreated", clip(pre.UID, 100), m.UID))
		}
		if pre.ResourceVersion != "" && pre.ResourceVersion != m.ResourceVersion {
			return nil, conflict(k, name, fmt.Sprintf("the ResourceVersion in the precondition (%s) does not match the ResourceVersion in record (%s). The object might have been modified", clip(pre.ResourceVersion, 100), m.ResourceVersion))
		}
		if opts.dry() {
			return o, nil
		}
	}
	o, err = s.store.Delete(ctx, k, namespace, name, pre.UID, pre.ResourceVersion)
	return o, fromStore(err, k, name)
}

// deleteCollection removes all objects of a namespace that match, one by one, and answers the list of them.
func (s *Server) deleteCollection(ctx context.Context, w http.ResponseWriter, r *http.Request, t target, query url.Values) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	list, err := parseListOptions(query)
	if err != nil {
		return err
	}
	opts, err := s.deleteOptions(w, r, query)
	if err != nil {
		return err
	}
	items, meta, err := s.page(ctx, t, list)
	if err != nil {
		return err
	}
	gone := make([]api.Object, 0, len(items))
	for _, o := range items {
		each := opts
		each.Preconditions.UID = o.Meta().UID // not one of the same name that was made meanwhile
		removed, err := s.remove(ctx, t.kind, o.Meta().Namespace, o.Meta().Name, each)
		var se *statusError
		if errors.As(err, &se) && (se.s.Code == http.StatusNotFound || se.s.Code == http.StatusConflict && opts.Preconditions.UID == "" && !isNeighbour(t.kind)) { // one that is in use is to be told
			continue
		}
		if err != nil {
			return err
		}
		gone = append(gone, removed)
	}
	respond(w, r, form{yaml: f.yaml}, http.StatusOK, newList(t.kind, meta, gone))
	return nil
}

// generateName is base with five random characters, as Kubernetes makes them: no vowels and no 0, 1, 3, which read as others.
func generateName(base string) string {
	const letters = "bcdfghjklmnpqrstvwxz2456789"
	if len(base) > maxGeneratedBase {
		base = clipBytes(base, maxGeneratedBase)
	}
	var raw [generatedSuffix]byte
	rand.Read(raw[:])
	for i, b := range raw {
		raw[i] = letters[int(b)%len(letters)]
	}
	return base + string(raw[:])
}

// clipBytes cuts at a rune's border.
func clipBytes(s string, n int) string {
	return strings.ToValidUTF8(s[:n], "")
}

// newUID is a random (version 4) UUID.
func newUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
