package apiserver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/state"
)

func TestSelectors(t *testing.T) {
	have := map[string]string{"app": "x", "tier": "", "n": "5", "example.com/a.b_c": "v-1"}
	for s, want := range map[string]bool{
		"": true, "app": true, "!app": false, "!none": true, " ! none ": true, "none": false,
		"app=x": true, "app==x": true, "app = x": true, "app=y": false, "app!=x": false, "app!=y": true, "none!=x": true, "none=x": false,
		"tier=": true, "tier!=": false, "tier": true, "app=": false,
		"app in (x)": true, "app in (y, x )": true, "app in(y)": false, "none in (x)": false, "none in ()": false, "tier in ()": true, "tier in (a,)": true,
		"app notin (y)": true, "app notin (x,y)": false, "none notin (x)": true,
		"n>4": true, "n>5": false, "n<6": true, "n<5": false, "app>1": false, "none>1": false,
		"example.com/a.b_c=v-1": true, "app=x,n=5,!none,tier": true, "app=x,n=6": false, "app in (x,y),n in (5)": true,
		"in in (in)": false, "in": false, "notin notin (notin)": true,
	} {
		sel, err := parseSelector(s, "")
		if err != nil {
			t.Errorf("%q: %v", s, err)
			continue
		}
		if got := sel.matches(&api.ObjectMeta{Labels: have}); got != want {
			t.Errorf("%q matches: %v, want %v", s, got, want)
		}
	}
	for _, s := range []string{
		"=x", "app=x y", "app=x,", ",app", "app,,n", "app in", "app in x", "app in (x", "app in (x y)", "app xin (x)", "app=(x)", "app=!x", "!app=x", "!", "! ",
		"a/b/c", "/a", "a/", "-a", "a-", "app=-x", "app=" + strings.Repeat("x", 64), strings.Repeat("x", 64), "n>x", "n>", "app=ü", "über", "app~x", "EXAMPLE.com/a", "a\x00",
	} {
		if sel, err := parseSelector(s, ""); err == nil {
			t.Errorf("%q is taken as %+v", s, sel)
		}
	}
	m := &api.ObjectMeta{Name: "a,b=c", Namespace: "ns"}
	for s, want := range map[string]bool{
		"": true, "metadata.namespace=ns": true, "metadata.namespace==ns": true, "metadata.namespace!=ns": false, `metadata.name=a\,b\=c`: true,
		"metadata.name=a": false, "metadata.name!=a,metadata.namespace=ns": true, "metadata.name=": false, ",": true,
	} {
		sel, err := parseSelector("", s)
		if err != nil || sel.matches(m) != want {
			t.Errorf("%q matches: %v, %v", s, sel.matches(m), err)
		}
	}
	for _, s := range []string{"metadata.name", "spec.x=1", "=x", "metadata.name=a=b", `metadata.name=a\`, `metadata.name=\x`, "metadata.name!x", "metadata.name>1"} {
		if sel, err := parseSelector("", s); err == nil {
			t.Errorf("%q is taken as %+v", s, sel)
		}
	}
	if _, err := parseSelector(strings.Repeat("a,", maxSelectorBytes/2)+"a", ""); err == nil {
		t.Error("a selector over the bound is taken")
	}
}

// FuzzSelector: whatever is taken means the same when it is written out and read again.
func FuzzSelector(f *testing.F) {
	for _, s := range []string{"", "a=b", "a in (b,c),!d", "x.y/z notin ()", "a>1,b<2", "a==b,c!=d", " a , b "} {
		f.Add(s, "metadata.name=a", "a", "b")
	}
	f.Add("", `metadata.name=a\,b`, "", "")
	f.Fuzz(func(t *testing.T, labels, fields, key, value string) {
		sel, err := parseSelector(labels, fields)
		if err != nil {
			var s *statusError
			if !errors.As(err, &s) || s.s.Code != 400 {
				t.Fatalf("%v", err)
			}
			return
		}
		var text []string
		for _, r := range sel.labels {
			switch r.op {
			case "exists":
				text = append(text, r.key)
			case "!":
				text = append(text, "!"+r.key)
			case ">", "<":
				text = append(text, r.key+r.op+r.values[0])
			default:
				text = append(text, r.key+" "+r.op+" ("+strings.Join(r.values, ",")+")")
			}
		}
		again, err := parseSelector(strings.Join(text, ","), fields)
		if err != nil {
			t.Fatalf("%q written as %q: %v", labels, text, err)
		}
		for _, m := range []*api.ObjectMeta{{Name: key, Namespace: value}, {Name: value, Labels: map[string]string{key: value}}} {
			if sel.matches(m) != again.matches(m) {
				t.Fatalf("%q and %q differ on %+v", labels, text, m)
			}
		}
	})
}

// FuzzPatch: no patch makes the server panic, grow without bound, or yield something that is no JSON.
func FuzzPatch(f *testing.F) {
	doc := []byte(service("hello"))
	for _, s := range []string{
		`{"spec":null}`, `{}`, `{"a":{"b":[1,{"c":null}]}}`, `[]`, `null`, `"x"`,
		`[{"op":"add","path":"/spec/-","value":1}]`, `[{"op":"copy","from":"","path":"/a"}]`, `[{"op":"move","from":"/spec","path":"/spec/template"}]`,
		`[{"op":"test","path":"","value":{}}]`, `[{"op":"remove","path":""}]`, `[{"op":"replace","path":"/spec/template/spec/containers/-1","value":null}]`, `[null,{}]`,
		`[{"op":"add","path":"/a/01","value":{}},{"op":"remove","path":"/~2"}]`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, patch []byte) {
		data, err := toJSON(patch, typeMergePatch, 1<<20)
		if err != nil {
			return
		}
		check := func(out []byte, err error) {
			var s *statusError
			if err != nil {
				if !errors.As(err, &s) || s.s.Code >= 500 {
					t.Fatalf("%v", err)
				}
				return
			}
			if !json.Valid(out) || len(out) > 2<<20 {
				t.Fatalf("%d bytes: %.200s", len(out), out)
			}
			decode(api.Services, out, writeOptions{validation: "Warn"})
		}
		check(mergePatch(doc, data))
		if ops, err := parseJSONPatch(data); err == nil {
			check(applyJSONPatch(doc, ops, 1<<20))
		}
	})
}

// FuzzBody: what is taken as a body is well-formed JSON in UTF-8 of bounded size, in which no key comes twice.
func FuzzBody(f *testing.F) {
	for _, s := range []string{`{"a":{"b":1,"c":[{"a":1},{"a":2}]}}`, `{"a":1,"a":2}`, "a: &x [1]\nb: *x\n", "---\na: 1\n---\nb: 1\n", "a:\n  - b\n", "\xff", "!!binary x", "<<: {a: 1}", "? [a]\n: b", "1: 2", "a: .nan"} {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	f.Fuzz(func(t *testing.T, body []byte, asYAML bool) {
		typ := typeJSON
		if asYAML {
			typ = typeYAML
		}
		out, err := toJSON(body, typ, 1<<16)
		if err != nil {
			if statusOf(err).Code >= 500 {
				t.Fatalf("%v", err)
			}
			return
		}
		if !json.Valid(out) || !utf8.Valid(out) || asYAML && len(out) > 1<<16 {
			t.Fatalf("%q became %q", body, out)
		}
		if found := duplicateKeys(out); len(found) > 0 {
			t.Fatalf("%q has %v twice", out, found)
		}
	})
}

// FuzzPath: no path makes a key that is not an object's, and none is a fault of the server.
func FuzzPath(f *testing.F) {
	for _, p := range []string{services, services + "/a", services + "/a/status", "/apis/serving.knative.dev/v1/services", "/api/v1/namespaces/x/events", "/openapi/v2", "/", "//", "/a%2fb/%2e%2e",
		"/apis/serving.knative.dev/v1/namespaces/../services/a", "/apis/serving.knative.dev/v1/namespaces/a%2Fb/services/c", services + "/%00", services + "/\xff", "/apis/thaw.run/v1alpha1/x", "/metrics/x"} {
		f.Add("GET", p, "limit=1")
		f.Add("PATCH", p, "fieldManager=x")
	}
	f.Fuzz(func(t *testing.T, method, path, query string) {
		u, err := url.ParseRequestURI(path)
		if err != nil || u.Host != "" {
			return
		}
		u.RawQuery = strings.ReplaceAll(query, "watch", "w")
		st := state.Memory()
		defer st.Close()
		s, err := New(Config{Store: objects.New(st, time.Now), Token: testToken})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		body := service("a")
		parts := strings.Split(strings.Trim(u.Path, "/"), "/")
		body = strings.Replace(body, `"name":"a"`, fmt.Sprintf(`"name":%q`, strings.ToValidUTF8(parts[len(parts)-1], "")), 1)
		r := (&http.Request{Method: method, URL: u, Header: http.Header{"Authorization": {"Bearer " + testToken}, "Content-Type": {typeApplyPatch}},
			Body: http.NoBody, Host: "x"}).WithContext(t.Context())
		if method != "GET" {
			r.Body = struct {
				*bytes.Reader
				nopCloser
			}{bytes.NewReader([]byte(body)), nopCloser{}}
			r.ContentLength = int64(len(body))
			if method == "POST" || method == "PUT" {
				r.Header.Set("Content-Type", typeJSON)
			}
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if w.Code >= 500 {
			t.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
		}
		kvs, _, err := st.List(context.Background(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range kvs {
			if p := strings.Split(kv.Key, "/"); len(p) != 7 || p[1] != "thaw" || p[2] != "objects" || !isDNSLabel(p[5]) || !isSubdomain(p[6]) {
				t.Fatalf("%s %s made the key %q", method, path, kv.Key)
			}
		}
	})
}

type nopCloser struct{}

func (nopCloser) Close() error { return nil }

// FuzzProto: the name in a protobuf body is found or refused, and always UTF-8.
func FuzzProto(f *testing.F) {
	f.Add([]byte("k8s\x00\n\x0f\n\x02v1\x12\tNamespace\x12\x0b\n\x07\n\x05fresh\x12\x00\x1a\x00\x1a\x00\"\x00"))
	f.Add([]byte("k8s\x00\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		name, err := namespaceNameProto(data)
		if err == nil && !utf8.ValidString(name) {
			t.Fatalf("%q", name)
		}
	})
}
