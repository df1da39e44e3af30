package knative

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thawrun/thaw/test/harness"
)

// body writes the YAML of a Service; the parts are lines of spec.
func body(name string, spec ...string) string {
	return fmt.Sprintf("apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata:\n  name: %s\nspec:\n  %s\n", name, strings.Join(spec, "\n  "))
}

const template = "template: {spec: {containers: [{image: dev.local/x}]}}"

// TestBadInput shows to the whole system what is wrong: what the API says, and what a person who used `thaw apply` sees. The long
// tables are beside the code that decides (api, control/apiserver).
func TestBadInput(t *testing.T) {
	th := shared(t)
	long := strings.Repeat("n", 300)
	const invalid = `Service.serving.knative.dev "bad" is invalid: `
	const cannot = `Service in version "v1" cannot be handled as a Service: `
	const apply = "application/apply-patch+yaml"
	for _, c := range []struct {
		name    string
		doc     string
		code    int
		reason  string
		message string
		exit    int    // of thaw apply
		person  string // what it prints, if that is not the message

		resource string // name in the path, if not bad
	}{
		{name: "wrong type", doc: body("bad", "template: {spec: {timeoutSeconds: '5', containers: [{image: dev.local/x}]}}"), code: 400, reason: "BadRequest",
			message: cannot + `spec.template.spec.timeoutSeconds: expected an integer, got the string "5"`, exit: 5},
		{name: "no list", doc: body("bad", "template: {spec: {containers: {image: dev.local/x}}}"), code: 400, reason: "BadRequest",
			message: cannot + `spec.template.spec.containers: expected a list, got an object`, exit: 5},
		{name: "range", doc: body("bad", "template: {spec: {containerConcurrency: 1001, containers: [{image: dev.local/x}]}}"), code: 422, reason: "Invalid",
			message: invalid + `expected 0 <= 1001 <= 1000: spec.template.spec.containerConcurrency`, exit: 5},
		{name: "percent sum", doc: body("bad", template, "traffic: [{latestRevision: true, percent: 60}, {revisionName: bad-00001, percent: 30}]"), code: 422, reason: "Invalid",
			message: invalid + `Traffic targets sum to 90, want 100: spec.traffic`, exit: 5},
		{name: "tag twice", doc: body("bad", template, "traffic: [{latestRevision: true, percent: 60, tag: a}, {revisionName: bad-00001, percent: 40, tag: a}]"), code: 422, reason: "Invalid",
			message: invalid + `Multiple definitions for "a": spec.traffic[0].tag, spec.traffic[1].tag`, exit: 5},
		{name: "reserved variable", doc: body("bad", "template: {spec: {containers: [{image: dev.local/x, env: [{name: K_SERVICE, value: mine}]}]}}"), code: 422, reason: "Invalid",
			message: invalid + `"K_SERVICE" is a reserved environment variable: spec.template.spec.containers[0].env[0].name`, exit: 5},
		{name: "annotation", doc: body("bad", "template: {metadata: {annotations: {autoscaling.knative.dev/min-scale: '-1'}}, spec: {containers: [{image: dev.local/x}]}}"), code: 422, reason: "Invalid",
			message: invalid + `expected 0 <= -1 <= 2147483647: spec.template.metadata.annotations.autoscaling.knative.dev/min-scale`, exit: 5},
		{name: "300 characters", doc: body(long, template), resource: long, code: 422, reason: "Invalid",
			message: `Service.serving.knative.dev "` + long + `" is invalid: not a DNS 1035 label: [must be no more than 63 characters]: metadata.name`, exit: 5},
		{name: "unknown kind", doc: "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: bad}\n", code: 400, reason: "BadRequest",
			message: "the object provided is unrecognized here: it is a Deployment of apps/v1, and this path takes a Service of serving.knative.dev/v1", exit: 1, person: "Deployment"},
		{name: "broken UTF-8", doc: body("bad", "template: {spec: {containers: [{image: \"dev.local/\xff\"}]}}"), code: 400, reason: "BadRequest",
			message: "the body of the request is not valid UTF-8", exit: 1, person: "UTF-8"},
		{name: "no YAML", doc: "a: [1\nb: 2\n", code: 400, reason: "BadRequest",
			message: "the body of the request is not valid YAML: line 1: did not find expected ',' or ']'", exit: 1, person: "line 1: did not find expected ',' or ']'"},
		{name: "a field twice", doc: body("bad", template, template), code: 400, reason: "BadRequest",
			message: `the body of the request is not valid YAML: unmarshal errors: line 7: key "template" already set in map`, exit: 1, person: `key "template" already set in map`},
		{name: "huge", doc: body("bad", "template: {spec: {containers: [{image: dev.local/x, args: ["+strings.Repeat("x", 4<<20)+"]}]}}"), code: 413, reason: "RequestEntityTooLarge",
			message: "the body of the request is too large: the limit is 3145728 bytes", exit: 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			resource := c.resource
			if resource == "" {
				resource = "bad"
			}
			code, status := request(t, th, "PATCH", "/apis/serving.knative.dev/v1/namespaces/default/services/"+resource+"?fieldManager=test", apply, c.doc)
			if code != c.code || status.Reason != c.reason || !strings.HasPrefix(status.Message, c.message) || status.Kind != "Status" || status.Code != c.code {
				t.Errorf("API: %d %+v\nwant %d %s %s", code, status, c.code, c.reason, c.message)
			}
			file := filepath.Join(t.TempDir(), "bad.yaml")
			if err := os.WriteFile(file, []byte(c.doc), 0o600); err != nil {
				t.Fatal(err)
			}
			exit, out, errs := th.Verb("", "apply", "-f", file)
			person := c.person
			if person == "" {
				person = c.message
			}
			if exit != c.exit || out != "" || !strings.HasPrefix(errs, "thaw: "+file) || !strings.Contains(errs, person) || len(errs) > 2000 {
				t.Errorf("thaw apply: exit code %d, %q, %.2000s\nwant %d, %s", exit, out, errs, c.exit, person)
			}
		})
	}
	t.Cleanup(func() { // nothing of all that was stored
		list, err := th.Client.Raw(t.Context(), http.MethodGet, "/apis/serving.knative.dev/v1/namespaces/default/services", "", nil)
		if err == nil && (bytes.Contains(list, []byte(`"name":"bad"`)) || bytes.Contains(list, []byte(long))) {
			t.Error("bad input was stored")
		}
	})
}

type statusObject struct {
	Kind, Status, Message, Reason string
	Code                          int
}

// request sends bytes to the API with the right token.
func request(t *testing.T, th *harness.Thaw, method, path, contentType, body string, header ...string) (int, statusObject) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+th.API+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Authorization", "Bearer "+th.Client.Token())
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var s statusObject
	if err := json.Unmarshal(b, &s); err != nil {
		t.Errorf("%d: %v in %.200q", resp.StatusCode, err, b)
	}
	return resp.StatusCode, s
}

// Without the token nothing is told and nothing is changed; health is for everybody.
func TestUnauthenticated(t *testing.T) {
	th := shared(t)
	for _, auth := range []string{"", "Bearer wrong", "Basic dGhhdzp3cm9uZw==", "Bearer", th.Client.Token()} {
		for _, c := range []struct{ method, path string }{
			{"GET", "/apis/serving.knative.dev/v1/services"}, {"POST", "/apis/serving.knative.dev/v1/namespaces/default/services"},
			{"GET", "/apis/thaw.run/v1alpha1/namespaces/default/logs"}, {"POST", "/apis/thaw.run/v1alpha1/packages"}, {"GET", "/nowhere"},
		} {
			code, s := request(t, th, c.method, c.path, "application/json", "{}", "Authorization", auth)
			if code != 401 || s.Reason != "Unauthorized" {
				t.Errorf("%q %s %s: %d %+v", auth, c.method, c.path, code, s)
			}
		}
	}
	resp, err := http.Get("http://" + th.API + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("/readyz: %d", resp.StatusCode)
	}
}

// TestMalformedHTTP: what the parser is not sure about reaches no function; it is answered and the connection is closed.
func TestMalformedHTTP(t *testing.T) {
	th := shared(t)
	create(t, th, service("http", image("checker")))
	const host = "Host: http.default.localhost\r\n"
	big := strings.Repeat("x", 200<<10)
	for name, c := range map[string]struct {
		request string
		status  int
	}{
		"no HTTP":                    {"hello\r\n\r\n", 400},
		"two lengths":                {"POST / HTTP/1.1\r\n" + host + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400},
		"length and chunks":          {"POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"length is negative":         {"POST / HTTP/1.1\r\n" + host + "Content-Length: -1\r\n\r\n", 400},
		"length is no number":        {"POST / HTTP/1.1\r\n" + host + "Content-Length: 1x\r\n\r\nx", 400},
		"two hosts":                  {"GET / HTTP/1.1\r\n" + host + "Host: other\r\n\r\n", 400},
		"blank before the colon":     {"GET / HTTP/1.1\r\n" + host + "X-A : 1\r\n\r\n", 400},
		"no colon":                   {"GET / HTTP/1.1\r\n" + host + "nonsense\r\n\r\n", 400},
		"continued line":             {"GET / HTTP/1.1\r\n" + host + "X-A: 1\r\n  2\r\n\r\n", 400},
		"NUL in a value":             {"GET / HTTP/1.1\r\n" + host + "X-A: a\x00b\r\n\r\n", 400},
		"chunked twice":              {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"another coding":             {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400},
		"chunks in HTTP/1.0":         {"POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"another version":            {"GET / HTTP/3.0\r\n" + host + "\r\n", 505},
		"CONNECT":                    {"CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\n", 405},
		"header of 200 KiB":          {"GET / HTTP/1.1\r\n" + host + "X-A: " + big + "\r\n\r\n", 431},
		"a smuggled second request":  {"POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /?crash=1 HTTP/1.1\r\n" + host + "\r\n", 400},
		"no host":                    {"GET / HTTP/1.1\r\n\r\n", 400},
		"chunk size that is no size": {"POST /?echo=1 HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", 400},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, closed := raw(t, th, c.request)
			if status != c.status || !closed || len(body) > 1000 {
				t.Errorf("%d %.200q, closed: %v; want %d", status, body, closed, c.status)
			}
		})
	}
	// The control: the same connection handling with a sound request.
	if status, body, closed := raw(t, th, "GET /report HTTP/1.1\r\n"+host+"\r\n"); status != 200 || closed {
		t.Errorf("a sound request: %d %q, closed: %v", status, body, closed)
	} else {
		var r struct{ Requests int }
		if json.Unmarshal([]byte(body), &r); r.Requests > 1 { // only the one whose head was sound and whose body was not may have come
			t.Errorf("%d malformed requests reached the function", r.Requests)
		}
	}
}
