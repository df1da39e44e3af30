package apiserver

import (
	"cmp"
	"encoding/json"
	"reflect"
	"slices"
	"strings"

	"github.com/thawrun/thaw/api"
)

// The OpenAPI documents are made from the Go types of package api by reflection, so they cannot fall behind. kubectl reads
// them to learn which query parameters a patch takes (then the server validates) and for explain; an old kubectl validates with v2.
const (
	openapiV2Proto     = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
	openapiV2ProtoSent = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
	gvkExtension       = "x-kubernetes-group-version-kind"
	schemaPrefix       = "run.thaw.api."
)

// tree is a JSON object in the making.
type tree = map[string]any

// gvk names a kind as the extension does.
type gvk struct {
	Group   string `json:"group"`
	Kind    string `json:"kind"`
	Version string `json:"version"`
}

// operation is one method of one path.
type operation struct {
	path, method, action string
	kind                 gvk
	query                []string
	consumes             []string // media types of the body; none = no body
	answer               string   // schema of the answer
	body                 string   // schema of the body
}

// specification is one group version: what both forms of OpenAPI are made from.
type specification struct {
	title      string
	operations []operation
	types      map[string]reflect.Type // Go types to describe, by schema name
	kinds      map[string]gvk          // of those that are kinds
	lists      map[string]string       // schema of a list -> schema of its items
}

func (d *documents) addOpenAPI(put func(map[string]document, string, string, any) error, version string) error {
	index := tree{}
	add := func(path string, s *specification) error {
		at := "/openapi/v3/" + path
		if err := put(d.plain, at, typeJSON, s.v3(version)); err != nil {
			return err
		}
		index[path] = tree{"serverRelativeURL": at + "?hash=" + strings.Trim(d.plain[at].etag, `"`)}
		return nil
	}
	all := newSpecification("Thaw")
	versions := map[string]*specification{}
	for _, k := range api.Kinds {
		s := versions[k.APIVersion]
		if s == nil {
			s = newSpecification("Thaw " + k.APIVersion)
			versions[k.APIVersion] = s
		}
		s.addKind(k)
		all.addKind(k)
	}
	core := newSpecification("Thaw core")
	core.addNamespaces()
	all.addNamespaces()
	versions["v1"] = core
	for gv, s := range versions {
		path := "apis/" + gv
		if gv == "v1" {
			path = "api/v1"
		}
		if err := add(path, s); err != nil {
			return err
		}
	}
	if err := put(d.plain, "/openapi/v3", typeJSON, tree{"paths": index}); err != nil {
		return err
	}
	v2 := all.v2(version)
	if err := put(d.openapiV2, typeJSON, typeJSON, v2); err != nil {
		return err
	}
	// The encoder walks plain JSON values, whatever Go types made them.
	var plain tree
	if err := json.Unmarshal(d.openapiV2[typeJSON].body, &plain); err != nil {
		return err
	}
	d.openapiV2[openapiV2Proto] = newDocument(openapiV2ProtoSent, encodeSwagger(plain))
	return nil
}

func newSpecification(title string) *specification {
	return &specification{title: title, types: map[string]reflect.Type{}, kinds: map[string]gvk{}, lists: map[string]string{}}
}

func schemaName(t reflect.Type) string { return schemaPrefix + t.Name() }

// Query parameters by what they belong to.
var (
	readQuery   = []string{"pretty"}
	listQuery   = []string{"allowWatchBookmarks", "continue", "fieldSelector", "labelSelector", "limit", "pretty", "resourceVersion", "resourceVersionMatch", "sendInitialEvents", "timeoutSeconds", "watch"}
	writeQuery  = []string{"dryRun", "fieldManager", "fieldValidation", "pretty"}
	patchQuery  = []string{"dryRun", "fieldManager", "fieldValidation", "force", "pretty"}
	deleteQuery = []string{"dryRun", "gracePeriodSeconds", "orphanDependents", "pretty", "propagationPolicy"}
	writeTypes  = []string{typeJSON, typeYAML}
	patchTypes  = []string{typeJSONPatch, typeMergePatch, typeApplyPatch}
)

func (s *specification) addKind(k *api.Kind) {
	t := reflect.TypeOf(k.New()).Elem()
	name := schemaName(t)
	id := gvk{group(k), k.Kind, version(k)}
	s.types[name] = t
	s.kinds[name] = id
	s.lists[name+"List"] = name
	all := "/apis/" + k.APIVersion + "/" + k.Plural
	collection := "/apis/" + k.APIVersion + "/namespaces/{namespace}/" + k.Plural
	one := collection + "/{name}"
	s.operations = append(s.operations,
		operation{all, "get", "list", id, listQuery, nil, name + "List", ""},
		operation{collection, "get", "list", id, listQuery, nil, name + "List", ""},
		operation{collection, "post", "post", id, writeQuery, writeTypes, name, name},
		operation{collection, "delete", "deletecollection", id, deleteQuery, nil, name + "List", ""},
		operation{one, "get", "get", id, readQuery, nil, name, ""},
		operation{one, "put", "put", id, writeQuery, writeTypes, name, name},
		operation{one, "patch", "patch", id, patchQuery, patchTypes, name, ""},
		operation{one, "delete", "delete", id, deleteQuery, nil, schemaName(reflect.TypeFor[status]()), ""},
		operation{one + "/status", "get", "get", id, readQuery, nil, name, ""},
	)
	s.types[schemaName(reflect.TypeFor[status]())] = reflect.TypeFor[status]()
}

func (s *specification) addNamespaces() {
	id := gvk{"", "Namespace", "v1"}
	t := reflect.TypeFor[namespace]()
	name := schemaPrefix + "Namespace"
	s.types[name] = t
	s.kinds[name] = id
	s.lists[name+"List"] = name
	s.operations = append(s.operations,
		operation{"/api/v1/namespaces", "get", "list", id, listQuery, nil, name + "List", ""},
		operation{"/api/v1/namespaces", "post", "post", id, writeQuery, writeTypes, name, name},
		operation{"/api/v1/namespaces/{name}", "get", "get", id, readQuery, nil, name, ""},
		operation{"/api/v1/namespaces/{name}", "put", "put", id, writeQuery, writeTypes, name, name},
		operation{"/api/v1/namespaces/{name}", "patch", "patch", id, patchQuery, patchTypes, name, ""},
	)
}

// operationID is unique for each operation.
func (o operation) operationID() string {
	var b strings.Builder
	b.WriteString(o.action)
	for part := range strings.FieldsFuncSeq(o.path, func(r rune) bool { return strings.ContainsRune("/{}.", r) }) {
		b.WriteString(strings.ToUpper(part[:1]) + part[1:])
	}
	return b.String()
}

func pathParameters(path string) []string {
	var out []string
	for part := range strings.SplitSeq(path, "/") {
		if strings.HasPrefix(part, "{") {
			out = append(out, strings.Trim(part, "{}"))
		}
	}
	return out
}

// v3 is the OpenAPI 3.0 document.
func (s *specification) v3(version string) any {
	m := &schemaMaker{prefix: "#/components/schemas/", defs: tree{}}
	paths := tree{}
	text := tree{"type": "string", "uniqueItems": true}
	for _, o := range s.operations {
		item, ok := paths[o.path].(tree)
		if !ok {
			item = tree{}
			var params []any
			for _, p := range pathParameters(o.path) {
				params = append(params, tree{"name": p, "in": "path", "required": true, "schema": text})
			}
			if params != nil {
				item["parameters"] = params
			}
			paths[o.path] = item
		}
		var params []any
		for _, q := range o.query {
			params = append(params, tree{"name": q, "in": "query", "schema": text})
		}
		op := tree{
			"operationId": o.operationID(), "parameters": params, gvkExtension: o.kind, "x-kubernetes-action": o.action,
			"responses": tree{"200": tree{"description": "OK", "content": tree{typeJSON: tree{"schema": m.ref(o.answer)}}}},
		}
		if o.consumes != nil {
			content := tree{}
			for _, t := range o.consumes {
				content[t] = tree{"schema": m.bodySchema(o.body)}
			}
			op["requestBody"] = tree{"content": content, "required": true}
		}
		item[o.method] = op
	}
	s.describe(m)
	return tree{"openapi": "3.0.0", "info": tree{"title": s.title, "version": version}, "paths": paths, "components": tree{"schemas": m.defs}}
}

// v2 is the Swagger 2.0 document.
func (s *specification) v2(version string) any {
	m := &schemaMaker{prefix: "#/definitions/", defs: tree{}}
	paths := tree{}
	for _, o := range s.operations {
		item, ok := paths[o.path].(tree)
		if !ok {
			item = tree{}
			var params []any
			for _, p := range pathParameters(o.path) {
				params = append(params, tree{"name": p, "in": "path", "required": true, "type": "string", "uniqueItems": true})
			}
			if params != nil {
				item["parameters"] = params
			}
			paths[o.path] = item
		}
		var params []any
		if o.consumes != nil {
			params = append(params, tree{"name": "body", "in": "body", "required": true, "schema": m.bodySchema(o.body)})
		}
		for _, q := range o.query {
			params = append(params, tree{"name": q, "in": "query", "type": "string", "uniqueItems": true})
		}
		op := tree{
			"operationId": o.operationID(), "parameters": params, gvkExtension: o.kind, "x-kubernetes-action": o.action,
			"produces": []string{typeJSON}, "responses": tree{"200": tree{"description": "OK", "schema": m.ref(o.answer)}},
		}
		if o.consumes != nil {
			op["consumes"] = o.consumes
		}
		item[o.method] = op
	}
	s.describe(m)
	return tree{"swagger": "2.0", "info": tree{"title": s.title, "version": version}, "paths": paths, "definitions": m.defs}
}

// describe adds the schemas of all types.
func (s *specification) describe(m *schemaMaker) {
	for name, t := range s.types {
		m.define(name, t)
		if id, ok := s.kinds[name]; ok {
			def := m.defs[name].(tree)
			def[gvkExtension] = []gvk{id}
		}
	}
	for list, item := range s.lists {
		id := s.kinds[item]
		id.Kind += "List"
		m.defs[list] = tree{"type": "object", "required": []string{"items"}, gvkExtension: []gvk{id}, "properties": tree{
			"apiVersion": tree{"type": "string"}, "kind": tree{"type": "string"},
			"metadata": m.of(reflect.TypeFor[listMeta]()),
			"items":    tree{"type": "array", "items": m.ref(item)},
		}}
	}
}

// schemaMaker turns Go types into schemas, each struct once.
type schemaMaker struct {
	prefix string
	defs   tree
}

func (m *schemaMaker) ref(name string) tree { return tree{"$ref": m.prefix + name} }

func (m *schemaMaker) bodySchema(name string) tree {
	if name == "" {
		return tree{"type": "object"} // a patch
	}
	return m.ref(name)
}

func (m *schemaMaker) of(t reflect.Type) tree {
	switch t {
	case reflect.TypeFor[json.RawMessage]():
		return tree{"x-kubernetes-preserve-unknown-fields": true}
	case reflect.TypeFor[api.Time]():
		return tree{"type": "string", "format": "date-time"}
	case reflect.TypeFor[api.Quantity](), reflect.TypeFor[api.IntOrString]():
		return tree{"x-kubernetes-int-or-string": true}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return m.of(t.Elem())
	case reflect.String:
		return tree{"type": "string"}
	case reflect.Bool:
		return tree{"type": "boolean"}
	case reflect.Int32:
		return tree{"type": "integer", "format": "int32"}
	case reflect.Int, reflect.Int64:
		return tree{"type": "integer", "format": "int64"}
	case reflect.Slice:
		return tree{"type": "array", "items": m.of(t.Elem())}
	case reflect.Map:
		return tree{"type": "object", "additionalProperties": m.of(t.Elem())}
	case reflect.Struct:
		if t.Name() == "" {
			return tree{"type": "object"}
		}
		name := schemaName(t)
		m.define(name, t)
		return m.ref(name)
	}
	return tree{"x-kubernetes-preserve-unknown-fields": true}
}

func (m *schemaMaker) define(name string, t reflect.Type) {
	if _, ok := m.defs[name]; ok {
		return
	}
	properties := tree{}
	m.defs[name] = tree{"type": "object", "properties": properties} // before its fields: types may contain themselves
	m.fields(properties, t)
}

// fields follows encoding/json: an embedded struct without a name of its own lends its fields.
func (m *schemaMaker) fields(properties tree, t reflect.Type) {
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case f.Anonymous && name == "":
			m.fields(properties, f.Type)
		case f.IsExported():
			properties[cmp.Or(name, f.Name)] = m.of(f.Type)
		}
	}
}

// sortedKeys makes encodings of maps the same each time.
func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
