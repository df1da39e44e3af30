package apiserver

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/thawrun/thaw/api"
)

func TestDiscovery(t *testing.T) {
	r := newRig(t)
	for _, path := range list(r.must(200, "GET", "/", "")["paths"]) {
		if a := r.do("GET", str(path), ""); a.code != 200 && path != "/metrics" {
			t.Errorf("%v is listed and answers %d", path, a.code)
		}
	}
	v := r.must(200, "GET", "/apis", "")
	if v["kind"] != "APIGroupList" || at(v, "groups", 0, "name") != "serving.knative.dev" || at(v, "groups", 0, "preferredVersion", "groupVersion") != "serving.knative.dev/v1" || len(list(at(v, "groups", 0, "versions"))) != 2 {
		t.Errorf("%v", v)
	}
	v = r.must(200, "GET", "/apis/serving.knative.dev/", "")
	if v["kind"] != "APIGroup" || at(v, "versions", 1, "version") != "v1beta1" {
		t.Errorf("%v", v)
	}
	if v = r.must(200, "GET", "/api", ""); v["kind"] != "APIVersions" || at(v, "versions", 0) != "v1" {
		t.Errorf("%v", v)
	}
	v = r.must(200, "GET", "/apis/serving.knative.dev/v1", "")
	for _, k := range api.Kinds {
		v := r.must(200, "GET", "/apis/"+k.APIVersion, "")
		i := slices.IndexFunc(list(v["resources"]), func(x any) bool { return at(x, "name") == k.Plural })
		if i < 0 {
			t.Errorf("%s is not discovered", k.Plural)
			continue
		}
		x := at(v, "resources", i)
		if at(x, "kind") != k.Kind || at(x, "namespaced") != true || at(x, "singularName") != k.Singular || len(list(at(x, "shortNames"))) != len(k.ShortNames) || !slices.Contains(list(at(x, "verbs")), any("watch")) {
			t.Errorf("%v", x)
		}
	}
	// The aggregated form says the same.
	a := r.do("GET", "/apis", "", "Accept: application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json")
	if ct := a.header.Get("Content-Type"); ct != "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList" {
		t.Errorf("content type %s", ct)
	}
	agg := a.json(t)
	var plain, aggregated []string
	for _, x := range list(v["resources"]) {
		plain = append(plain, str(at(x, "name")))
	}
	for _, x := range list(at(agg, "items", 0, "versions", 0, "resources")) {
		aggregated = append(aggregated, str(at(x, "resource")))
		for _, sub := range list(at(x, "subresources")) {
			aggregated = append(aggregated, str(at(x, "resource"))+"/"+str(at(sub, "subresource")))
		}
		if at(x, "responseKind", "kind") == nil || at(x, "scope") != "Namespaced" {
			t.Errorf("%v", x)
		}
	}
	if !slices.Equal(plain, aggregated) {
		t.Errorf("plain %v\naggregated %v", plain, aggregated)
	}
	for _, path := range []string{"/apis/apps", "/apis/serving.knative.dev/v9", "/api/v2", "/openapi/v4", "/metrics", "/apis/serving.knative.dev/v1/namespaces"} {
		r.refused(404, reasonNotFound, "GET", path, "")
	}
	r.refused(405, reasonMethodNotAllowed, "POST", "/apis", "{}")
	// Documents are not sent again to who has them.
	a = r.do("GET", "/openapi/v3", "")
	if b := r.do("GET", "/openapi/v3", "", "If-None-Match: "+a.header.Get("ETag")); b.code != 304 || len(b.body) != 0 {
		t.Errorf("%d, %d bytes", b.code, len(b.body))
	}
}

// TestOpenAPIDescribesEveryField: what a kind writes as JSON, with everything set, is described by its schema.
func TestOpenAPIDescribesEveryField(t *testing.T) {
	r := newRig(t)
	index := r.must(200, "GET", "/openapi/v3", "")
	for _, k := range append([]*api.Kind{namespaceKind}, api.Kinds...) {
		path := "apis/" + k.APIVersion
		if k == namespaceKind {
			path = "api/v1"
		}
		url := str(at(index, "paths", path, "serverRelativeURL"))
		a := r.do("GET", url, "")
		if a.code != 200 || a.header.Get("Cache-Control") != "public, immutable" {
			t.Fatalf("%s: %d %s", url, a.code, a.header.Get("Cache-Control"))
		}
		doc := a.json(t)
		schemas := at(doc, "components", "schemas").(map[string]any)
		root := schemaPrefix + k.Kind
		if got := at(schemas[root], gvkExtension, 0, "kind"); got != k.Kind {
			t.Fatalf("%s: %v", root, got)
		}
		if k != namespaceKind {
			full := reflect.New(reflect.TypeOf(k.New()).Elem())
			fill(full.Elem(), 0)
			data, err := json.Marshal(full.Interface())
			if err != nil {
				t.Fatal(err)
			}
			var tree any
			json.Unmarshal(data, &tree)
			n := described(t, schemas, map[string]any{"$ref": "#/components/schemas/" + root}, tree, k.Kind)
			if n < 20 {
				t.Errorf("%s: only %d fields looked at", k.Kind, n)
			}
		}
		// What kubectl looks for before it leaves validation to the server.
		found := false
		for _, item := range at(doc, "paths").(map[string]any) {
			op := at(item, "patch")
			if at(op, gvkExtension, "kind") != k.Kind || at(op, gvkExtension, "version") != version(k) || at(op, gvkExtension, "group") != group(k) {
				continue
			}
			for _, p := range list(at(op, "parameters")) {
				found = found || at(p, "name") == "fieldValidation" && at(p, "in") == "query"
			}
		}
		if !found {
			t.Errorf("%s: no patch with fieldValidation", k.Kind)
		}
	}
}

// fill sets everything to something.
func fill(v reflect.Value, depth int) {
	if depth > 20 {
		return
	}
	switch v.Interface().(type) {
	case json.RawMessage:
		v.SetBytes([]byte(`{"a":1}`))
		return
	case api.Time:
		v.Set(reflect.ValueOf(api.Time{Time: v.Interface().(api.Time).Time.AddDate(2000, 0, 0)}))
		return
	case api.IntOrString:
		v.Set(reflect.ValueOf(api.IntOrString{Int: 1}))
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), depth+1)
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				fill(v.Field(i), depth+1)
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), depth+1)
	case reflect.Map:
		e := reflect.New(v.Type().Elem()).Elem()
		fill(e, depth+1)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf("k").Convert(v.Type().Key()), e)
	case reflect.String:
		v.SetString("s")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(1)
	}
}

// described checks a value against a schema and counts the fields.
func described(t *testing.T, schemas map[string]any, schema any, v any, path string) int {
	t.Helper()
	if ref := str(at(schema, "$ref")); ref != "" {
		name := ref[strings.LastIndexByte(ref, '/')+1:]
		if schemas[name] == nil {
			t.Errorf("%s: no schema %s", path, name)
			return 0
		}
		schema = schemas[name]
	}
	typ := at(schema, "type")
	if typ == nil {
		if at(schema, "x-kubernetes-preserve-unknown-fields") != true && at(schema, "x-kubernetes-int-or-string") != true {
			t.Errorf("%s: a schema that says nothing: %v", path, schema)
		}
		return 1
	}
	n := 1
	wrong := func() { t.Errorf("%s: %v is described as %v", path, v, schema) }
	switch v := v.(type) {
	case map[string]any:
		if typ != "object" {
			wrong()
		}
		for key, x := range v {
			sub := at(schema, "properties", key)
			if more := at(schema, "additionalProperties"); sub == nil && more != nil {
				sub = more
			}
			if sub == nil {
				t.Errorf("%s.%s is not described", path, key)
				continue
			}
			n += described(t, schemas, sub, x, path+"."+key)
		}
	case []any:
		if typ != "array" {
			wrong()
		}
		for _, x := range v {
			n += described(t, schemas, at(schema, "items"), x, path+"[]")
		}
	case string:
		if typ != "string" {
			wrong()
		}
	case float64:
		if typ != "integer" {
			wrong()
		}
	case bool:
		if typ != "boolean" {
			wrong()
		}
	}
	return n
}

// TestOpenAPIV2 reads the protobuf form back field by field and compares it with the JSON form.
func TestOpenAPIV2(t *testing.T) {
	r := newRig(t)
	asJSON := r.must(200, "GET", "/openapi/v2", "")
	if asJSON["swagger"] != "2.0" {
		t.Errorf("swagger %v", asJSON["swagger"])
	}
	a := r.do("GET", "/openapi/v2", "", "Accept: "+openapiV2Proto)
	if a.code != 200 || a.header.Get("Content-Type") != openapiV2ProtoSent {
		t.Fatalf("%d %s", a.code, a.header.Get("Content-Type"))
	}
	r.refused(406, reasonNotAcceptable, "GET", "/openapi/v2", "", "Accept: text/html")

	doc := protoFields(t, a.body)
	if string(doc[1][0]) != "2.0" {
		t.Errorf("swagger %q", doc[1])
	}
	paths := namedFields(t, protoFields(t, doc[8][0])[2])
	definitions := namedFields(t, protoFields(t, doc[9][0])[1])
	wantPaths, wantDefinitions := asJSON["paths"].(map[string]any), asJSON["definitions"].(map[string]any)
	if len(paths) != len(wantPaths) || len(definitions) != len(wantDefinitions) {
		t.Fatalf("%d paths of %d, %d definitions of %d", len(paths), len(wantPaths), len(definitions), len(wantDefinitions))
	}
	for name, def := range definitions {
		schema := protoFields(t, def)
		if got := string(protoFields(t, schema[22][0])[1][0]); got != str(at(wantDefinitions[name], "type")) {
			t.Errorf("%s: type %s", name, got)
		}
		properties := namedFields(t, protoFields(t, schema[25][0])[1])
		for key, want := range at(wantDefinitions[name], "properties").(map[string]any) {
			p, ok := properties[key]
			if !ok {
				t.Errorf("%s.%s is missing", name, key)
				continue
			}
			fields := protoFields(t, p)
			if ref := at(want, "$ref"); ref != nil && (len(fields[1]) != 1 || string(fields[1][0]) != ref) {
				t.Errorf("%s.%s: reference %q, want %v", name, key, fields[1], ref)
			}
			if typ := at(want, "type"); typ != nil && string(protoFields(t, fields[22][0])[1][0]) != typ {
				t.Errorf("%s.%s: type %q, want %v", name, key, fields[22], typ)
			}
			if len(fields[23]) > 0 != (at(want, "items") != nil) || len(fields[21]) > 0 != (at(want, "additionalProperties") != nil) {
				t.Errorf("%s.%s: items or additionalProperties", name, key)
			}
		}
	}
	for path, item := range paths {
		for method, field := range map[string]protowire.Number{"get": 2, "put": 3, "post": 4, "delete": 5, "patch": 8} {
			want := at(wantPaths[path], method)
			ops := protoFields(t, item)[field]
			if (want == nil) != (len(ops) == 0) {
				t.Errorf("%s %s", method, path)
			}
			if want == nil {
				continue
			}
			op := protoFields(t, ops[0])
			var names []string
			for _, p := range op[8] {
				parameter := protoFields(t, protoFields(t, p)[1][0])
				if body := parameter[1]; body != nil {
					names = append(names, string(protoFields(t, body[0])[2][0]))
					continue
				}
				query := protoFields(t, protoFields(t, parameter[2][0])[3][0])
				names = append(names, string(query[4][0]))
				if string(query[2][0]) != "query" || string(query[6][0]) != "string" {
					t.Errorf("%s %s: parameter %q", method, path, query)
				}
			}
			var wantNames []string
			for _, p := range list(at(want, "parameters")) {
				wantNames = append(wantNames, str(at(p, "name")))
			}
			if !slices.Equal(names, wantNames) {
				t.Errorf("%s %s: parameters %v, want %v", method, path, names, wantNames)
			}
			ext := namedFields(t, op[13])
			var id gvk
			if err := json.Unmarshal(protoFields(t, ext[gvkExtension])[2][0], &id); err != nil || id.Kind != at(want, gvkExtension, "kind") {
				t.Errorf("%s %s: kind %v, %v", method, path, id, err)
			}
		}
	}
}

// protoFields splits a message into its length-delimited fields; others count as empty.
func protoFields(t *testing.T, m []byte) map[protowire.Number][][]byte {
	t.Helper()
	out := map[protowire.Number][][]byte{}
	for len(m) > 0 {
		number, typ, n := protowire.ConsumeTag(m)
		if n < 0 {
			t.Fatal(protowire.ParseError(n))
		}
		m = m[n:]
		var v []byte
		if typ == protowire.BytesType {
			v, n = protowire.ConsumeBytes(m)
		} else {
			n = protowire.ConsumeFieldValue(number, typ, m)
		}
		if n < 0 {
			t.Fatal(protowire.ParseError(n))
		}
		out[number] = append(out[number], v)
		m = m[n:]
	}
	return out
}

// namedFields reads a list of names (1) and values (2).
func namedFields(t *testing.T, list [][]byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, n := range list {
		f := protoFields(t, n)
		out[string(f[1][0])] = f[2][0]
	}
	return out
}
