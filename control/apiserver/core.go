package apiserver

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/thawrun/thaw/api"
)

// namespaceKind names namespaces in errors and documents. They are not stored: a namespace exists once it is named.
var namespaceKind = &api.Kind{Kind: "Namespace", APIVersion: "v1", Plural: "namespaces", Singular: "namespace", ShortNames: []string{"ns"}}

// namespace is Kubernetes' v1 Namespace.
type namespace struct {
	Kind       string          `json:"kind"`
	APIVersion string          `json:"apiVersion"`
	Metadata   api.ObjectMeta  `json:"metadata"`
	Status     namespaceStatus `json:"status"`
}

type namespaceStatus struct {
	Phase string `json:"phase"`
}

func newNamespace(name string) namespace {
	return namespace{"Namespace", "v1", api.ObjectMeta{
		Name: name, UID: "namespace-" + name, ResourceVersion: "1",
		Labels: map[string]string{"kubernetes.io/metadata.name": name},
	}, namespaceStatus{"Active"}}
}

// core answers /api/v1/...: namespaces, and events, of which there are none. It is what kubectl needs to get along.
func (s *Server) core(w http.ResponseWriter, r *http.Request, parts []string, query url.Values) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.patience(query))
	defer cancel()
	switch {
	case parts[0] == "namespaces" && len(parts) == 1:
		return s.namespaceCollection(ctx, w, r, f, query)
	case parts[0] == "namespaces" && len(parts) == 2:
		return s.namespace(ctx, w, r, f, parts[1])
	case len(parts) == 1 && parts[0] == "events", len(parts) == 3 && parts[0] == "namespaces" && parts[2] == "events":
		return s.events(ctx, w, r, f, query)
	}
	return noSuchPath()
}

func (s *Server) namespaceCollection(ctx context.Context, w http.ResponseWriter, r *http.Request, f form, query url.Values) error {
	switch r.Method {
	case http.MethodGet:
		if isWatch(r, query) {
			return methodNotAllowed(w, "GET (without watch)", "POST")
		}
	case http.MethodPost:
		return s.nameNamespace(w, r, f, query)
	default:
		return methodNotAllowed(w, "GET", "POST")
	}
	sel, err := parseSelector(query.Get("labelSelector"), query.Get("fieldSelector"))
	if err != nil {
		return err
	}
	names, rev, err := s.namespaces(ctx)
	if err != nil {
		return err
	}
	items := make([]namespace, 0, len(names))
	for _, n := range names {
		if ns := newNamespace(n); sel.matches(&ns.Metadata) {
			items = append(items, ns)
		}
	}
	meta := listMeta{ResourceVersion: formatRevision(rev)}
	if f.table {
		respond(w, r, f, http.StatusOK, namespaceTable(meta, items))
		return nil
	}
	respond(w, r, f, http.StatusOK, map[string]any{"kind": "NamespaceList", "apiVersion": "v1", "metadata": meta, "items": items})
	return nil
}

func namespaceTable(meta listMeta, items []namespace) *table {
	t := &table{Kind: "Table", APIVersion: "meta.k8s.io/v1", Metadata: meta, Rows: []tableRow{},
		Columns: []tableColumn{nameColumn.tableColumn, {Name: "Status", Type: "string", Description: "Active: a namespace exists once it is named."}}}
	for _, ns := range items {
		t.Rows = append(t.Rows, tableRow{Cells: []any{ns.Metadata.Name, ns.Status.Phase}, Object: partial{"PartialObjectMetadata", "meta.k8s.io/v1", &ns.Metadata}})
	}
	return t
}

const namespaceWarning = "a namespace exists once it is named: nothing of this object is stored"

// nameNamespace answers a creation, so that files that begin with a Namespace can be applied.
func (s *Server) nameNamespace(w http.ResponseWriter, r *http.Request, f form, query url.Values) error {
	if _, err := parseWriteOptions("CreateOptions", query); err != nil {
		return err
	}
	name, err := s.namedIn(w, r)
	if err != nil {
		return err
	}
	if err := checkNamespace(name); err != nil {
		return err
	}
	warn(w.Header(), []string{namespaceWarning})
	respond(w, r, form{yaml: f.yaml}, http.StatusCreated, newNamespace(name))
	return nil
}

func checkNamespace(name string) error {
	if isDNSLabel(name) {
		return nil
	}
	return invalidNamed("Namespace", "", clip(name, 100), api.Errors{{Type: api.FieldValueInvalid, Field: "metadata.name",
		Detail: "invalid value: " + clip(name, 100), Why: "not a DNS 1123 label of at most 63 lower case letters, digits and dashes"}})
}

func (s *Server) namespace(_ context.Context, w http.ResponseWriter, r *http.Request, f form, name string) error {
	if !isDNSLabel(name) {
		return notFound(namespaceKind, name)
	}
	switch r.Method {
	case http.MethodGet:
	case http.MethodPut, http.MethodPatch: // an apply of a Namespace that "is there"
		if _, err := readBody(w, r, s.maxBody); err != nil {
			return err
		}
		warn(w.Header(), []string{namespaceWarning})
	case http.MethodDelete:
		w.Header().Set("Allow", "GET, PUT, PATCH")
		return fail(http.StatusMethodNotAllowed, reasonMethodNotAllowed,
			"a namespace cannot be deleted: it ends with the last object in it; delete those (kubectl delete ksvc --all -n %s)", name).about(namespaceKind, name)
	default:
		return methodNotAllowed(w, "GET", "PUT", "PATCH")
	}
	ns := newNamespace(name)
	if f.table {
		respond(w, r, f, http.StatusOK, namespaceTable(listMeta{ResourceVersion: "1"}, []namespace{ns}))
		return nil
	}
	respond(w, r, f, http.StatusOK, ns)
	return nil
}

// events answers that there are none: kubectl describe asks.
func (s *Server) events(ctx context.Context, w http.ResponseWriter, r *http.Request, f form, query url.Values) error {
	if r.Method != http.MethodGet {
		return methodNotAllowed(w, "GET")
	}
	if isWatch(r, query) {
		return s.watchNothing(w, r, query)
	}
	rev, err := s.revision(ctx)
	if err != nil {
		return fromStore(err, api.Services, "")
	}
	meta := listMeta{ResourceVersion: formatRevision(rev)}
	if f.table {
		respond(w, r, f, http.StatusOK, &table{Kind: "Table", APIVersion: "meta.k8s.io/v1", Metadata: meta, Rows: []tableRow{},
			Columns: []tableColumn{nameColumn.tableColumn}})
		return nil
	}
	respond(w, r, f, http.StatusOK, map[string]any{"kind": "EventList", "apiVersion": "v1", "metadata": meta, "items": []any{}})
	return nil
}

// namedIn reads the name out of the Namespace that a request carries.
func (s *Server) namedIn(w http.ResponseWriter, r *http.Request) (string, error) {
	data, err := readBody(w, r, s.maxBody)
	if err != nil {
		return "", err
	}
	mediaType, err := contentType(r, typeJSON, typeYAML, typeProtobuf)
	if err != nil {
		return "", err
	}
	if mediaType == typeProtobuf {
		return namespaceNameProto(data)
	}
	if data, err = toJSON(data, mediaType, s.maxBody); err != nil {
		return "", err
	}
	return namespaceName(data)
}

// typeProtobuf is how kubectl sends built-in kinds, Namespace among them: "k8s\0", then runtime.Unknown{1: TypeMeta, 2: raw}.
const typeProtobuf = "application/vnd.kubernetes.protobuf"

// namespaceNameProto finds raw (2) -> metadata (1) -> name (1).
func namespaceNameProto(data []byte) (string, error) {
	rest, ok := bytes.CutPrefix(data, []byte("k8s\x00"))
	for _, field := range []protowire.Number{2, 1, 1} {
		if !ok {
			break
		}
		rest, ok = protoField(rest, field)
	}
	if !ok || !utf8.Valid(rest) {
		return "", badRequest("the body of the request is not a Namespace in Kubernetes' protobuf form")
	}
	return string(rest), nil
}

// protoField returns the bytes of a length-delimited field of a message.
func protoField(m []byte, field protowire.Number) ([]byte, bool) {
	for len(m) > 0 {
		number, typ, n := protowire.ConsumeTag(m)
		if n < 0 {
			return nil, false
		}
		m = m[n:]
		if number == field && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(m)
			return v, n >= 0
		}
		if n = protowire.ConsumeFieldValue(number, typ, m); n < 0 {
			return nil, false
		}
		m = m[n:]
	}
	return nil, false
}

// namespaceName reads the name of a Namespace.
func namespaceName(data []byte) (string, error) {
	var o struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Name string `json:"name"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(data, &o); err != nil {
		return "", badRequest("Namespace cannot be read: %v", err)
	}
	if o.Kind != "Namespace" {
		return "", badRequest("the object provided is unrecognized here: it is a %s, and this path takes a Namespace", clip(o.Kind, 100))
	}
	return o.Metadata.Name, nil
}
