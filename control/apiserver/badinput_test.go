package apiserver

import (
	"fmt"
	"strings"
	"testing"
)

// badInput is one body and the exact answer to it.
type badInput struct {
	name        string
	method      string // "" = POST
	path        string // "" = services of namespace default
	contentType string // "" = application/json
	body        string
	code        int
	reason      string
	message     string
}

// TestBadInput is the table of what clients get wrong. The messages about content are those of package api; they stand here to
// show that they arrive whole.
func TestBadInput(t *testing.T) {
	head := `{"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":"hello"},"spec":`
	spec := func(s string) string { return head + `{"template":{"spec":` + s + `}}}` }
	traffic := func(s string) string {
		return head + `{"template":{"spec":{"containers":[{"image":"dev.local/x"}]}},"traffic":[` + s + `]}}`
	}
	annotated := func(key, value string) string {
		return head + `{"template":{"metadata":{"annotations":{"` + key + `":"` + value + `"}},"spec":{"containers":[{"image":"dev.local/x"}]}}}}`
	}
	invalidHello := `Service.serving.knative.dev "hello" is invalid: `
	cannot := `Service in version "v1" cannot be handled as a Service: `
	yaml, merge, ops, apply := "application/yaml", "application/merge-patch+json", "application/json-patch+json", "application/apply-patch+yaml"
	long := strings.Repeat("n", 300)
	bomb := "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c <= 'i'; c++ {
		bomb += fmt.Sprintf("%c: &%c [%s]\n", c, c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c,", c-1), 10), ","))
	}
	table := []badInput{
		// Bodies that are no object at all.
		{name: "empty", body: "", code: 400, reason: "BadRequest", message: "the body of the request is empty"},
		{name: "blank", body: " \n", code: 400, reason: "BadRequest", message: "the body of the request is empty"},
		{name: "cut JSON", body: `{"kind":`, code: 400, reason: "BadRequest", message: "the body of the request is not valid JSON: unexpected end of JSON input"},
		{name: "YAML as JSON", body: "kind: Service\n", code: 400, reason: "BadRequest", message: "the body of the request is not valid JSON: invalid character 'k' looking for beginning of value"},
		{name: "two objects", body: service("a") + service("b"), code: 400, reason: "BadRequest", message: "the body of the request is not valid JSON: invalid character '{' after top-level value"},
		{name: "array", body: `[]`, code: 400, reason: "BadRequest", message: cannot + "expected an object of kind Service, got a list"},
		{name: "null", body: `null`, code: 400, reason: "BadRequest", message: "Object 'Kind' is missing in the body of the request"},
		{name: "broken UTF-8", body: strings.Replace(service("hello"), "hello", "h\xffllo", 1), code: 400, reason: "BadRequest", message: "the body of the request is not valid UTF-8"},
		{name: "broken UTF-8 in YAML", contentType: yaml, body: "kind: \xc3\x28\n", code: 400, reason: "BadRequest", message: "the body of the request is not valid UTF-8"},
		{name: "a field twice", body: `{"kind":"Service","apiVersion":"serving.knative.dev/v1","metadata":{"name":"a","name":"b"}}`, code: 400, reason: "BadRequest", message: "the body of the request has fields more than once: metadata.name"},
		{name: "deep", body: head + strings.Repeat(`{"template":`, 100) + "{}" + strings.Repeat("}", 101), code: 400, reason: "BadRequest", message: cannot + "the data is nested more than 64 deep"},
		{name: "deepest", body: strings.Repeat("[", 20000) + strings.Repeat("]", 20000), code: 400, reason: "BadRequest", message: "the body of the request is not valid JSON: invalid character '[' exceeded max depth"},

		// YAML.
		{name: "bad YAML", contentType: yaml, body: "a: [1\nb: 2\n", code: 400, reason: "BadRequest", message: "the body of the request is not valid YAML: line 1: did not find expected ',' or ']'"},
		{name: "tab in YAML", contentType: yaml, body: "a:\n\tb: 1\n", code: 400, reason: "BadRequest", message: "the body of the request is not valid YAML: line 2: found character that cannot start any token"},
		{name: "key twice in YAML", contentType: yaml, body: "kind: Service\nkind: Service\n", code: 400, reason: "BadRequest", message: `the body of the request is not valid YAML: unmarshal errors: line 2: key "kind" already set in map`},
		{name: "many YAML documents", contentType: yaml, body: "---\nkind: Service\n---\nkind: Service\n", code: 400, reason: "BadRequest", message: "the body of the request has several YAML documents; send them one by one"},
		{name: "alias bomb", contentType: yaml, body: bomb, code: 400, reason: "BadRequest", message: "the body of the request is not valid YAML: document contains excessive aliasing"},
		{name: "alias bomb in an apply patch", method: "PATCH", path: services + "/hello?fieldManager=x", contentType: apply, body: bomb, code: 400, reason: "BadRequest", message: "the body of the request is not valid YAML: document contains excessive aliasing"},
		{name: "alias to itself", contentType: yaml, body: "a: &a [*a]\n", code: 400, reason: "BadRequest", message: "the body of the request is not valid YAML: anchor 'a' value contains itself"},
		{name: "unknown alias", contentType: yaml, body: "a: *b\n", code: 400, reason: "BadRequest", message: "the body of the request is not valid YAML: unknown anchor 'b' referenced"},

		// Sizes and media types.
		{name: "too large", body: strings.Repeat(" ", 3<<20) + "{}", code: 413, reason: "RequestEntityTooLarge", message: "the body of the request is too large: the limit is 3145728 bytes"},
		{name: "too large object", body: service("hello", labels("a", strings.Repeat("x", 1<<20))), code: 413, reason: "RequestEntityTooLarge", message: "the object is too large: it has 1048752 bytes as JSON, and the limit is 1048576"},
		{name: "form", contentType: "application/x-www-form-urlencoded", body: "a=b", code: 415, reason: "UnsupportedMediaType", message: "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml"},
		{name: "protobuf", contentType: "application/vnd.kubernetes.protobuf", body: "k8s\x00", code: 415, reason: "UnsupportedMediaType", message: "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml"},
		{name: "broken media type", contentType: ";;", body: "{}", code: 415, reason: "UnsupportedMediaType", message: "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml"},

		// Kinds and places.
		{name: "no kind", body: `{"apiVersion":"serving.knative.dev/v1"}`, code: 400, reason: "BadRequest", message: "Object 'Kind' is missing in the body of the request"},
		{name: "no version", body: `{"kind":"Service"}`, code: 400, reason: "BadRequest", message: "Object 'apiVersion' is missing in the body of the request"},
		{name: "kind is a number", body: `{"kind":7}`, code: 400, reason: "BadRequest", message: cannot + "kind: expected a string, got the number 7"},
		{name: "another kind", body: `{"apiVersion":"serving.knative.dev/v1","kind":"Route"}`, code: 400, reason: "BadRequest", message: "the object provided is unrecognized here: it is a Route of serving.knative.dev/v1, and this path takes a Service of serving.knative.dev/v1"},
		{name: "a core Service", body: `{"apiVersion":"v1","kind":"Service"}`, code: 400, reason: "BadRequest", message: "the object provided is unrecognized here: it is a Service of v1, and this path takes a Service of serving.knative.dev/v1"},
		{name: "unknown resource", path: "/apis/serving.knative.dev/v1/namespaces/default/pods", body: "{}", code: 404, reason: "NotFound", message: "the server could not find the requested resource"},
		{name: "unknown version", path: "/apis/serving.knative.dev/v2/namespaces/default/services", body: "{}", code: 404, reason: "NotFound", message: "the server could not find the requested resource"},
		{name: "unknown group", path: "/apis/apps/v1/namespaces/default/deployments", body: "{}", code: 404, reason: "NotFound", message: "the server could not find the requested resource"},
		{name: "no namespace", path: "/apis/serving.knative.dev/v1/services", body: service("hello"), code: 405, reason: "MethodNotAllowed", message: "the server does not allow this method on the requested resource; it allows GET"},
		{name: "POST to an object", path: services + "/hello", body: service("hello"), code: 405, reason: "MethodNotAllowed", message: "the server does not allow this method on the requested resource; it allows GET, PUT, PATCH, DELETE"},
		{name: "bad namespace", path: "/apis/serving.knative.dev/v1/namespaces/No_Name/services", body: service("hello"), code: 422, reason: "Invalid", message: invalidHello + "invalid value: No_Name: metadata.namespace (not a DNS 1123 label of at most 63 lower case letters, digits and dashes)"},
		{name: "slash in a name", method: "GET", path: services + "/a%2fb", code: 400, reason: "BadRequest", message: `the path "` + services + `/a/b" has a part that cannot be a name`},
		{name: "dots", method: "GET", path: services + "/%2e%2e", code: 400, reason: "BadRequest", message: `the path "` + services + `/.." has a part that cannot be a name`},
		{name: "NUL in a name", method: "GET", path: services + "/a%00b", code: 400, reason: "BadRequest", message: `the path "` + services + `/ab" has a part that cannot be a name`},
		{name: "empty part", method: "GET", path: "/apis//v1/services", code: 400, reason: "BadRequest", message: `the path "/apis//v1/services" has a part that cannot be a name`},
		{name: "300 characters in a path", method: "GET", path: services + "/" + long, code: 404, reason: "NotFound", message: `services.serving.knative.dev "` + long + `" not found`},
		{name: "resource version on create", body: `{"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":"hello","resourceVersion":"1"}}`, code: 400, reason: "BadRequest", message: "resourceVersion should not be set on objects to be created"},

		// Names and metadata.
		{name: "no name", body: strings.Replace(service("hello"), `{"name":"hello"}`, "{}", 1), code: 422, reason: "Invalid"},
		{name: "300 characters", body: strings.Replace(service("hello"), `{"name":"hello"}`, `{"name":"`+long+`"}`, 1), code: 422, reason: "Invalid"},
		{name: "300 characters in an apply patch", method: "PATCH", path: services + "/" + long + "?fieldManager=x", contentType: apply, body: strings.Replace(service("hello"), `{"name":"hello"}`, `{"name":"`+long+`"}`, 1), code: 422, reason: "Invalid"},
		{name: "capital", body: strings.Replace(service("hello"), `{"name":"hello"}`, `{"name":"Hello"}`, 1), code: 422, reason: "Invalid"},
		{name: "labels of a number", body: strings.Replace(service("hello"), `{"name":"hello"}`, `{"name":"hello","labels":{"a":1}}`, 1), code: 400, reason: "BadRequest"},

		// Types.
		{name: "spec is a string", body: head + `"x"}`, code: 400, reason: "BadRequest"},
		{name: "containers is an object", body: spec(`{"containers":{}}`), code: 400, reason: "BadRequest"},
		{name: "image is a number", body: spec(`{"containers":[{"image":7}]}`), code: 400, reason: "BadRequest"},
		{name: "timeout is a string", body: spec(`{"containers":[{"image":"dev.local/x"}],"timeoutSeconds":"5"}`), code: 400, reason: "BadRequest"},
		{name: "timeout is a fraction", body: spec(`{"containers":[{"image":"dev.local/x"}],"timeoutSeconds":5.5}`), code: 400, reason: "BadRequest"},
		{name: "port is too large for its type", body: spec(`{"containers":[{"image":"dev.local/x","ports":[{"containerPort":99999999999}]}]}`), code: 400, reason: "BadRequest"},

		// Ranges and rules.
		{name: "no containers", body: spec(`{}`), code: 422, reason: "Invalid"},
		{name: "no image", body: spec(`{"containers":[{}]}`), code: 422, reason: "Invalid"},
		{name: "timeout over the limit", body: spec(`{"containers":[{"image":"dev.local/x"}],"timeoutSeconds":601}`), code: 422, reason: "Invalid"},
		{name: "negative concurrency", body: spec(`{"containers":[{"image":"dev.local/x"}],"containerConcurrency":-1}`), code: 422, reason: "Invalid"},
		{name: "port of the platform", body: spec(`{"containers":[{"image":"dev.local/x","ports":[{"containerPort":8012}]}]}`), code: 422, reason: "Invalid"},
		{name: "reserved variable", body: spec(`{"containers":[{"image":"dev.local/x","env":[{"name":"PORT","value":"1"}]}]}`), code: 422, reason: "Invalid"},
		{name: "forbidden field of pods", body: spec(`{"containers":[{"image":"dev.local/x","tty":true}]}`), code: 422, reason: "Invalid"},
		{name: "percent sum", body: traffic(`{"latestRevision":true,"percent":70},{"revisionName":"hello-00001","percent":20}`), code: 422, reason: "Invalid"},
		{name: "percent range", body: traffic(`{"latestRevision":true,"percent":101}`), code: 422, reason: "Invalid"},
		{name: "tag twice", body: traffic(`{"latestRevision":true,"percent":50,"tag":"a"},{"revisionName":"hello-00001","percent":50,"tag":"a"}`), code: 422, reason: "Invalid"},
		{name: "scale", body: annotated("autoscaling.knative.dev/min-scale", "-1"), code: 422, reason: "Invalid"},
		{name: "scales that contradict", body: annotated("autoscaling.knative.dev/window", "1s"), code: 422, reason: "Invalid"},

		// Patches.
		{name: "strategic merge patch", method: "PATCH", path: services + "/hello", contentType: "application/strategic-merge-patch+json", body: "{}", code: 415, reason: "UnsupportedMediaType", message: "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"},
		{name: "patch without a type", method: "PATCH", path: services + "/hello", body: "{}", code: 415, reason: "UnsupportedMediaType", message: "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"},
		{name: "merge patch is an array", method: "PATCH", path: services + "/hello", contentType: merge, body: "[]", code: 400, reason: "BadRequest", message: "a merge patch must be a JSON object"},
		{name: "merge patch that breaks a type", method: "PATCH", path: services + "/hello", contentType: merge, body: `{"spec":{"template":7}}`, code: 400, reason: "BadRequest"},
		{name: "JSON patch is an object", method: "PATCH", path: services + "/hello", contentType: ops, body: "{}", code: 400, reason: "BadRequest", message: "the JSON patch cannot be read: json: cannot unmarshal object into Go value of type jsonpatch.Patch"},
		{name: "unknown operation", method: "PATCH", path: services + "/hello", contentType: ops, body: `[{"op":"frob","path":"/a"}]`, code: 400, reason: "BadRequest", message: "operation 0 of the JSON patch is none of add, remove, replace, move, copy, test"},
		{name: "operation without a path", method: "PATCH", path: services + "/hello", contentType: ops, body: `[{"op":"add","value":1}]`, code: 400, reason: "BadRequest", message: "operation 0 of the JSON patch has no path"},
		{name: "operation without a value", method: "PATCH", path: services + "/hello", contentType: ops, body: `[{"op":"add","path":"/a"}]`, code: 400, reason: "BadRequest", message: "operation 0 of the JSON patch has no value"},
		{name: "operation without a from", method: "PATCH", path: services + "/hello", contentType: ops, body: `[{"op":"move","path":"/a"}]`, code: 400, reason: "BadRequest", message: "operation 0 of the JSON patch has no from"},
		{name: "operation is null", method: "PATCH", path: services + "/hello", contentType: ops, body: `[null]`, code: 400, reason: "BadRequest", message: "operation 0 of the JSON patch is none of add, remove, replace, move, copy, test"},
		{name: "path that is not there", method: "PATCH", path: services + "/hello", contentType: ops, body: `[{"op":"remove","path":"/spec/nothing"}]`, code: 422, reason: "Invalid", message: "the server rejected our request due to an error in our request: the JSON patch cannot be applied: error in remove for path: '/spec/nothing': Unable to remove nonexistent key: nothing: missing value"},
		{name: "copies that double", method: "PATCH", path: services + "/hello", contentType: ops, body: `[{"op":"add","path":"/m","value":["x"]},` + strings.Repeat(`{"op":"copy","from":"/m","path":"/m/-"},`, 60) + `{"op":"test","path":"/kind","value":"Service"}]`, code: 413, reason: "RequestEntityTooLarge", message: "the JSON patch makes the object too large: the limit is 1048576 bytes"},
		{name: "too many copies", method: "PATCH", path: services + "/hello", contentType: ops, body: "[" + strings.TrimSuffix(strings.Repeat(`{"op":"copy","from":"/kind","path":"/x"},`, 101), ",") + "]", code: 413, reason: "RequestEntityTooLarge", message: "The allowed maximum of copy operations in a JSON patch is 100, got 101"},
		{name: "too many operations", method: "PATCH", path: services + "/hello", contentType: ops, body: "[" + strings.TrimSuffix(strings.Repeat(`{"op":"remove","path":"/x"},`, 10001), ",") + "]", code: 413, reason: "RequestEntityTooLarge", message: "The allowed maximum operations in a JSON patch is 10000, got 10001"},
		{name: "apply without a manager", method: "PATCH", path: services + "/hello", contentType: apply, body: service("hello"), code: 422, reason: "Invalid", message: `PatchOptions.meta.k8s.io "" is invalid: Required value: is required for apply patch: fieldManager`},
	}
	r := newRig(t)
	r.must(201, "POST", services, service("hello"))
	before := summaryOf(r.must(200, "GET", "/apis/serving.knative.dev/v1/services", ""))
	var out strings.Builder
	for _, in := range table {
		t.Run(in.name, func(t *testing.T) {
			method, path, typ := in.method, in.path, in.contentType
			if method == "" {
				method = "POST"
			}
			if path == "" {
				path = services
			}
			if typ == "" {
				typ = "application/json"
			}
			rr := *r
			rr.t = t
			a := rr.do(method, path, in.body, "Content-Type: "+typ)
			s := a.status(t)
			if a.code != in.code || s.Code != in.code || s.Reason != in.reason || s.Status != "Failure" || s.APIVersion != "v1" {
				t.Errorf("got %d %s %q, want %d %s", a.code, s.Reason, s.Message, in.code, in.reason)
			}
			if in.message != "" && s.Message != in.message {
				t.Errorf("message\n got %s\nwant %s", s.Message, in.message)
			}
			if s.Reason == "Invalid" && in.message == "" {
				if s.Details == nil || len(s.Details.Causes) == 0 || s.Details.Causes[0].Field == "" || s.Details.Kind != "Service" {
					t.Errorf("no causes with fields: %+v", s.Details)
				}
			}
			if in.message == "" { // those of package api, for a person to read
				fmt.Fprintf(&out, "%s\n    %d %s %s\n", in.name, s.Code, s.Reason, clip(s.Message, 400))
				if s.Details != nil {
					for _, c := range s.Details.Causes {
						fmt.Fprintf(&out, "    %s %s: %s\n", c.Reason, c.Field, clip(c.Message, 300))
					}
				}
			}
		})
	}
	golden(t, "testdata/badinput.want", out.String())
	if after := summaryOf(r.must(200, "GET", "/apis/serving.knative.dev/v1/services", "")); after != before {
		t.Errorf("something was stored: %s, then %s", before, after)
	}
}
