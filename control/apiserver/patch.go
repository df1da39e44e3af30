package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/state"
)

// Bounds of a JSON patch.
const (
	maxPatchOps  = 10000 // as Kubernetes
	maxPatchCopy = 100   // each copy may double the document
)

// patch changes a stored object: merge patch (RFC 7386), JSON patch (RFC 6902), or apply, which creates the object if it is not there
// and otherwise merges. Strategic merge patch is for built-in kinds of Kubernetes only; clients fall back on 415, as for custom resources.
func (s *Server) patch(ctx context.Context, w http.ResponseWriter, r *http.Request, t target, query url.Values) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	opts, err := parseWriteOptions("PatchOptions", query)
	if err != nil {
		return err
	}
	data, err := readBody(w, r, s.maxBody)
	if err != nil {
		return err
	}
	mediaType, err := contentType(r, typeJSONPatch, typeMergePatch, typeApplyPatch)
	if err != nil {
		return err
	}
	data, err = toJSON(data, mediaType, s.maxBody)
	if err != nil {
		return err
	}
	var apply func(doc []byte) ([]byte, error)
	switch mediaType {
	case typeJSONPatch:
		ops, err := parseJSONPatch(data)
		if err != nil {
			return err
		}
		apply = func(doc []byte) ([]byte, error) { return applyJSONPatch(doc, ops, api.MaxObjectBytes) }
	case typeApplyPatch:
		if query.Get("fieldManager") == "" {
			return invalidNamed("PatchOptions", "meta.k8s.io", "", api.Errors{{Type: api.FieldValueRequired, Field: "fieldManager", Detail: "Required value: is required for apply patch"}})
		}
		// Its own type and place must be right before it is merged into anything.
		only := opts
		if only.validation == "Warn" {
			only.validation = "Ignore" // said once, for the merged object
		}
		o, _, err := decode(t.kind, data, only)
		if err != nil {
			return err
		}
		if o.Meta().Name == "" {
			return badRequest("metadata.name must be set for an apply patch")
		}
		if err := place(o, t); err != nil {
			return err
		}
		done, err := s.applyNew(ctx, w, r, f, t, opts, data)
		if done || err != nil {
			return err
		}
		apply = func(doc []byte) ([]byte, error) { return mergePatch(doc, data) }
	default:
		if !isObject(data) {
			return badRequest("a merge patch must be a JSON object")
		}
		apply = func(doc []byte) ([]byte, error) { return mergePatch(doc, data) }
	}
	return s.rewrite(ctx, w, r, f, t, opts, func(old api.Object) (api.Object, []string, error) {
		doc, err := json.Marshal(old)
		if err != nil {
			return nil, nil, fmt.Errorf("write %s: %w", t.kind.Kind, err)
		}
		patched, err := apply(doc)
		if err != nil {
			return nil, nil, err
		}
		o, warnings, err := decode(t.kind, patched, opts)
		if err != nil {
			return nil, nil, err
		}
		if o.Meta().ResourceVersion == old.Meta().ResourceVersion && !namesRevision(data, mediaType) {
			o.Meta().ResourceVersion = "" // came from the stored object: not a precondition
		}
		return o, warnings, nil
	})
}

// applyNew creates the object of an apply patch if there is none. done says that the answer is written.
func (s *Server) applyNew(ctx context.Context, w http.ResponseWriter, r *http.Request, f form, t target, opts writeOptions, data []byte) (done bool, err error) {
	_, err = s.store.Get(ctx, t.kind, t.namespace, t.name)
	if err == nil {
		return false, nil
	}
	if !errors.Is(err, state.ErrNotFound) && !errors.Is(err, objects.ErrBadName) { // a name that cannot be is told as such below
		return false, fromStore(err, t.kind, t.name)
	}
	// A merge into nothing drops the nulls, as the merge into something would.
	if data, err = mergePatch([]byte("{}"), data); err != nil {
		return false, err
	}
	o, warnings, err := decode(t.kind, data, opts)
	if err != nil {
		return false, err
	}
	if o.Meta().ResourceVersion != "" || o.Meta().UID != "" {
		return false, notFound(t.kind, t.name) // a patch of one certain object, which is gone
	}
	if err := place(o, t); err != nil {
		return false, err
	}
	created, more, err := s.insert(ctx, t.kind, o, opts)
	var se *statusError
	if errors.As(err, &se) && se.s.Reason == reasonAlreadyExists {
		return false, nil // made by somebody else meanwhile: merge
	}
	warn(w.Header(), append(warnings, more...))
	if err != nil {
		return false, err
	}
	return true, s.answer(w, r, f, t.kind, http.StatusCreated, created)
}

// namesRevision says that a patch itself carries a resource version, which is then compared.
func namesRevision(patch []byte, mediaType string) bool {
	if mediaType == typeJSONPatch {
		return false // what it changes shows in the patched object; a test op compares by itself
	}
	var p struct {
		Metadata struct {
			ResourceVersion *string `json:"resourceVersion"`
		} `json:"metadata"`
	}
	return json.Unmarshal(patch, &p) == nil && p.Metadata.ResourceVersion != nil
}

func isObject(data []byte) bool {
	for _, c := range data {
		switch c {
		case ' ', '\t', '\r', '\n':
		default:
			return c == '{'
		}
	}
	return false
}

func mergePatch(doc, patch []byte) (out []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			out, err = nil, badRequest("the merge patch cannot be applied: %v", p)
		}
	}()
	out, err = jsonpatch.MergePatch(doc, patch)
	if err != nil {
		return nil, badRequest("the merge patch cannot be applied: %v", err)
	}
	return out, nil
}

// parseJSONPatch reads the operations and refuses what cannot be one.
func parseJSONPatch(data []byte) (jsonpatch.Patch, error) {
	ops, err := jsonpatch.DecodePatch(data)
	if err != nil {
		return nil, badRequest("the JSON patch cannot be read: %v", err)
	}
	if len(ops) > maxPatchOps {
		return nil, fail(http.StatusRequestEntityTooLarge, reasonTooLarge, "The allowed maximum operations in a JSON patch is %d, got %d", maxPatchOps, len(ops))
	}
	copies := 0
	for i, op := range ops {
		kind := op.Kind()
		switch kind {
		case "add", "replace", "test", "remove", "move", "copy":
		default:
			return nil, badRequest("operation %d of the JSON patch is none of add, remove, replace, move, copy, test", i)
		}
		if _, err := op.Path(); err != nil {
			return nil, badRequest("operation %d of the JSON patch has no path", i)
		}
		if _, err := op.From(); err != nil && (kind == "move" || kind == "copy") {
			return nil, badRequest("operation %d of the JSON patch has no from", i)
		}
		if _, ok := op["value"]; !ok && (kind == "add" || kind == "replace") {
			return nil, badRequest("operation %d of the JSON patch has no value", i)
		}
		if kind == "copy" {
			copies++
		}
	}
	if copies > maxPatchCopy {
		return nil, fail(http.StatusRequestEntityTooLarge, reasonTooLarge, "The allowed maximum of copy operations in a JSON patch is %d, got %d", maxPatchCopy, copies)
	}
	return ops, nil
}

// applyJSONPatch applies the operations up to each copy and looks at the size then, so that forty copies of a document into itself end
// at the limit and not in all the memory there is. (The library has a limit too, but as a variable of the whole process.)
func applyJSONPatch(doc []byte, ops jsonpatch.Patch, limit int) (out []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			out, err = nil, badRequest("the JSON patch cannot be applied: %v", p)
		}
	}()
	for len(ops) > 0 {
		n := 0
		for n < len(ops) && ops[n].Kind() != "copy" {
			n++
		}
		n = min(n+1, len(ops))
		doc, err = ops[:n].Apply(doc)
		if err != nil {
			return nil, fail(http.StatusUnprocessableEntity, reasonInvalid, "the server rejected our request due to an error in our request: the JSON patch cannot be applied: %v", err)
		}
		if len(doc) > limit {
			return nil, fail(http.StatusRequestEntityTooLarge, reasonTooLarge, "the JSON patch makes the object too large: the limit is %d bytes", limit)
		}
		ops = ops[n:]
	}
	return doc, nil
}
