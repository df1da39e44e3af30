package apiserver

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
)

func TestCreateFillsWhatTheServerOwns(t *testing.T) {
	r := newRig(t)
	body := service("hello", func(s map[string]any) {
		s["metadata"].(map[string]any)["uid"] = "mine"
		s["metadata"].(map[string]any)["generation"] = 77
		s["metadata"].(map[string]any)["creationTimestamp"] = "2001-01-01T00:00:00Z"
		s["metadata"].(map[string]any)["finalizers"] = []any{"a/b"}
		s["metadata"].(map[string]any)["managedFields"] = []any{map[string]any{"manager": "kubectl"}}
		s["metadata"].(map[string]any)["annotations"] = map[string]any{api.AnnotationCreator: "root"}
		s["status"] = map[string]any{"url": "http://lie", "latestReadyRevisionName": "lie"}
	})
	a := r.do("POST", services+"?fieldValidation=Strict", body)
	if a.code != http.StatusCreated {
		t.Fatalf("got %d %s", a.code, a.body)
	}
	v := a.json(t)
	if uid := str(at(v, "metadata", "uid")); uid == "mine" || len(uid) != 36 {
		t.Errorf("uid %q", uid)
	}
	for path, want := range map[string]any{"generation": 1.0, "namespace": "default", "finalizers": nil, "deletionTimestamp": nil} {
		if got := at(v, "metadata", path); got != want {
			t.Errorf("metadata.%s = %v, want %v", path, got, want)
		}
	}
	if ts := str(at(v, "metadata", "creationTimestamp")); ts == "" || strings.HasPrefix(ts, "2001") {
		t.Errorf("creationTimestamp %q", ts)
	}
	if v["status"] != nil {
		t.Errorf("a client wrote the status: %v", v["status"])
	}
	for _, key := range []string{api.AnnotationCreator, api.AnnotationLastModifier} {
		if got := at(v, "metadata", "annotations", key); got != "thaw" {
			t.Errorf("%s = %v", key, got)
		}
	}
	if at(v, "spec", "template", "spec", "timeoutSeconds") != 300.0 {
		t.Errorf("not defaulted: %v", v["spec"])
	}
	if w := a.header.Values("Warning"); len(w) != 1 || !strings.Contains(w[0], "metadata.finalizers") {
		t.Errorf("warnings %q", w)
	}
	// The very same object is what a read shows.
	if got := r.must(200, "GET", services+"/hello", ""); fmt.Sprint(got) != fmt.Sprint(v) {
		t.Errorf("read %v\nwrote %v", got, v)
	}
}

func TestCreateGeneratesNames(t *testing.T) {
	r := newRig(t)
	seen := map[string]bool{}
	for range 20 {
		v := r.must(201, "POST", services, service("x", func(s map[string]any) {
			s["metadata"] = map[string]any{"generateName": "job-"}
		}))
		name := str(at(v, "metadata", "name"))
		if !strings.HasPrefix(name, "job-") || len(name) != len("job-")+generatedSuffix || seen[name] {
			t.Fatalf("generated name %q", name)
		}
		seen[name] = true
	}
	long := strings.Repeat("a", 80)
	if n := generateName(long); len(n) != 63 {
		t.Errorf("generateName of 80 characters has %d", len(n))
	}
}

func TestDryRunStoresNothing(t *testing.T) {
	r := newRig(t)
	v := r.must(201, "POST", services+"?dryRun=All", service("hello"))
	if at(v, "metadata", "uid") == nil || at(v, "metadata", "generation") != 1.0 || at(v, "metadata", "resourceVersion") != nil {
		t.Errorf("metadata of a dry run: %v", v["metadata"])
	}
	r.refused(404, reasonNotFound, "GET", services+"/hello", "")
	r.refused(404, reasonNotFound, "PATCH", services+"/hello?dryRun=All", `{}`, "Content-Type: application/merge-patch+json")
	r.must(201, "PATCH", services+"/hello?dryRun=All&fieldManager=x", service("hello"), "Content-Type: application/apply-patch+yaml")
	r.refused(404, reasonNotFound, "GET", services+"/hello", "")

	before := r.must(201, "POST", services, service("hello"))
	v = r.must(200, "PATCH", services+"/hello?dryRun=All", `{"spec":{"template":{"spec":{"timeoutSeconds":9}}}}`, "Content-Type: application/merge-patch+json")
	if at(v, "metadata", "generation") != 2.0 || at(v, "spec", "template", "spec", "timeoutSeconds") != 9.0 {
		t.Errorf("dry run shows %v", v)
	}
	r.refused(409, reasonAlreadyExists, "POST", services+"?dryRun=All", service("hello"))
	r.must(200, "DELETE", services+"/hello?dryRun=All", "")
	r.must(200, "DELETE", services+"/hello", `{"dryRun":["All"]}`)
	if after := r.must(200, "GET", services+"/hello", ""); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("a dry run changed the object\nbefore %v\nafter %v", before, after)
	}
}

func TestReplace(t *testing.T) {
	r := newRig(t)
	first := r.must(201, "POST", services, service("hello"))
	settle(t, r.store)
	now := r.must(200, "GET", services+"/hello", "")
	put := func(change func(m, tree map[string]any)) answer {
		data, _ := json.Marshal(now)
		var v map[string]any
		json.Unmarshal(data, &v)
		change(v["metadata"].(map[string]any), v)
		data, _ = json.Marshal(v)
		return r.do("PUT", services+"/hello", string(data))
	}

	// A stale resource version and another object's uid are refused.
	a := put(func(m, _ map[string]any) { m["resourceVersion"] = at(first, "metadata", "resourceVersion") })
	if s := a.status(t); a.code != 409 || s.Reason != reasonConflict || s.Message != `Operation cannot be fulfilled on services.serving.knative.dev "hello": the object has been modified; please apply your changes to the latest version and try again` {
		t.Errorf("stale: %d %s", a.code, a.body)
	}
	a = put(func(m, _ map[string]any) { m["uid"] = "00000000-0000-0000-0000-000000000000" })
	if s := a.status(t); a.code != 409 || !strings.Contains(s.Message, "Precondition failed: UID in precondition") {
		t.Errorf("other uid: %d %s", a.code, a.body)
	}
	a = put(func(m, _ map[string]any) { m["name"] = "other" })
	if s := a.status(t); a.code != 400 || s.Message != "the name of the object (other) does not match the name on the URL (hello)" {
		t.Errorf("other name: %d %s", a.code, a.body)
	}
	a = put(func(m, _ map[string]any) { m["namespace"] = "other" })
	if s := a.status(t); a.code != 400 || !strings.HasPrefix(s.Message, "the namespace of the provided object does not match") {
		t.Errorf("other namespace: %d %s", a.code, a.body)
	}

	// What the server owns stays, whatever the client sends; the status too.
	a = put(func(m, v map[string]any) {
		m["generation"], m["creationTimestamp"] = 99, "2001-01-01T00:00:00Z"
		delete(m, "annotations")
		m["labels"] = map[string]any{"a": "b"}
		v["status"] = map[string]any{"url": "http://lie"}
	})
	v := a.json(t)
	if a.code != 200 || at(v, "metadata", "generation") != 1.0 || at(v, "metadata", "creationTimestamp") != at(now, "metadata", "creationTimestamp") ||
		at(v, "status", "url") != at(now, "status", "url") || at(v, "metadata", "labels", "a") != "b" ||
		at(v, "metadata", "annotations", api.AnnotationCreator) != "thaw" {
		t.Errorf("replace: %d %s", a.code, a.body)
	}
	if at(v, "metadata", "resourceVersion") == at(now, "metadata", "resourceVersion") {
		t.Error("the resource version did not move")
	}
	// The same again: nothing to write, so the resource version stays.
	now = v
	if a = put(func(_, _ map[string]any) {}); at(a.json(t), "metadata", "resourceVersion") != at(v, "metadata", "resourceVersion") {
		t.Errorf("a write that changes nothing moved the resource version: %s", a.body)
	}
	// Without a resource version the object is replaced whatever it is; a new spec is a new generation.
	a = put(func(m, v map[string]any) {
		delete(m, "resourceVersion")
		v["spec"].(map[string]any)["template"].(map[string]any)["spec"].(map[string]any)["timeoutSeconds"] = 17
	})
	if v = a.json(t); a.code != 200 || at(v, "metadata", "generation") != 2.0 {
		t.Errorf("unconditional: %d %s", a.code, a.body)
	}
	r.refused(404, reasonNotFound, "PUT", services+"/none", service("none"))
	// YAML is taken, and given when asked for.
	a = r.do("PUT", services+"/hello", "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: hello}\nspec: {template: {spec: {containers: [{image: dev.local/y}]}}}\n",
		"Content-Type: application/yaml", "Accept: application/yaml")
	if a.code != 200 || a.header.Get("Content-Type") != "application/yaml" || !strings.Contains(string(a.body), "image: dev.local/y") {
		t.Errorf("YAML: %d %s", a.code, a.body)
	}
}

// TestLastModifierFollowsTheSpec: the platform makes objects without a creator; the annotations follow changes of the spec only.
func TestLastModifierFollowsTheSpec(t *testing.T) {
	r := newRig(t)
	o := &api.Configuration{ObjectMeta: api.ObjectMeta{Name: "c", Namespace: "default"}}
	o.Spec.Template.Spec.Containers = []api.Container{{Image: "dev.local/c"}}
	api.SetDefaults(o)
	if _, err := r.store.Create(t.Context(), api.Configurations, o); err != nil {
		t.Fatal(err)
	}
	const path = "/apis/serving.knative.dev/v1/namespaces/default/configurations/c"
	merge := "Content-Type: application/merge-patch+json"
	v := r.must(200, "PATCH", path, `{"metadata":{"labels":{"a":"b"},"annotations":{"serving.knative.dev/creator":"eve","serving.knative.dev/lastModifier":"eve"}}}`, merge)
	if ann := at(v, "metadata", "annotations"); ann != nil {
		t.Errorf("annotations after a change of labels: %v", ann)
	}
	v = r.must(200, "PATCH", path, `{"spec":{"template":{"spec":{"timeoutSeconds":7}}}}`, merge)
	if at(v, "metadata", "annotations", api.AnnotationLastModifier) != "thaw" || at(v, "metadata", "annotations", api.AnnotationCreator) != nil {
		t.Errorf("annotations after a change of the spec: %v", at(v, "metadata", "annotations"))
	}
}

func TestRevisionSpecIsImmutable(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", services, service("hello"))
	settle(t, r.store)
	const path = "/apis/serving.knative.dev/v1/namespaces/default/revisions/hello-00001"
	merge := "Content-Type: application/merge-patch+json"
	s := r.refused(422, reasonInvalid, "PATCH", path, `{"spec":{"timeoutSeconds":7}}`, merge)
	if s.Details.Kind != "Revision" || len(s.Details.Causes) == 0 || !strings.HasPrefix(s.Message, `Revision.serving.knative.dev "hello-00001" is invalid: `) {
		t.Errorf("refusal %+v", s)
	}
	r.must(200, "PATCH", path, `{"metadata":{"labels":{"mine":"yes"}}}`, merge)
	v := r.must(200, "PATCH", path, `{"status":{"conditions":null}}`, merge)
	if at(v, "status", "conditions") == nil {
		t.Error("a client removed the conditions")
	}
	for _, method := range []string{"PUT", "PATCH", "POST", "DELETE"} {
		r.refused(405, reasonMethodNotAllowed, method, path+"/status", `{}`)
	}
	if v = r.must(200, "GET", path+"/status", ""); at(v, "metadata", "name") != "hello-00001" {
		t.Errorf("GET status: %v", v)
	}
	r.refused(404, reasonNotFound, "GET", path+"/scale", "")
}

func TestPatch(t *testing.T) {
	merge, ops, apply := "Content-Type: application/merge-patch+json", "Content-Type: application/json-patch+json", "Content-Type: application/apply-patch+yaml"
	r := newRig(t)
	r.must(201, "POST", services, service("hello", labels("keep", "1", "drop", "1")))

	v := r.must(200, "PATCH", services+"/hello", `{"metadata":{"labels":{"drop":null,"new":"2"}}}`, merge)
	if got := fmt.Sprint(at(v, "metadata", "labels")); got != "map[keep:1 new:2]" {
		t.Errorf("labels after a merge patch: %s", got)
	}
	v = r.must(200, "PATCH", services+"/hello", `[
		{"op":"test","path":"/metadata/labels/keep","value":"1"},
		{"op":"add","path":"/metadata/annotations/a~1b","value":"c"},
		{"op":"copy","from":"/metadata/labels/keep","path":"/metadata/labels/copied"},
		{"op":"remove","path":"/metadata/labels/new"},
		{"op":"replace","path":"/spec/template/spec/timeoutSeconds","value":25}]`, ops)
	if at(v, "metadata", "annotations", "a/b") != "c" || fmt.Sprint(at(v, "metadata", "labels")) != "map[copied:1 keep:1]" ||
		at(v, "spec", "template", "spec", "timeoutSeconds") != 25.0 || at(v, "metadata", "generation") != 2.0 {
		t.Errorf("after a JSON patch: %v", v)
	}

	// A failed test changes nothing, not even what came before it.
	r.refused(422, reasonInvalid, "PATCH", services+"/hello", `[{"op":"remove","path":"/metadata/labels/keep"},{"op":"test","path":"/metadata/name","value":"x"}]`, ops)
	if w := r.must(200, "GET", services+"/hello", ""); fmt.Sprint(w) != fmt.Sprint(v) {
		t.Errorf("a refused patch changed the object: %v", w)
	}

	// A patch that names a resource version is compared with it.
	old := str(at(v, "metadata", "resourceVersion"))
	r.must(200, "PATCH", services+"/hello", `{"metadata":{"resourceVersion":"`+old+`","labels":{"x":"1"}}}`, merge)
	r.refused(409, reasonConflict, "PATCH", services+"/hello", `{"metadata":{"resourceVersion":"`+old+`","labels":{"x":"2"}}}`, merge)
	r.refused(409, reasonConflict, "PATCH", services+"/hello", `[{"op":"replace","path":"/metadata/resourceVersion","value":"`+old+`"}]`, ops)
	r.refused(409, reasonConflict, "PATCH", services+"/hello", `{"metadata":{"uid":"other"}}`, merge)
	r.refused(400, reasonBadRequest, "PATCH", services+"/hello", `{"metadata":{"name":"other"}}`, merge)
	r.refused(400, reasonBadRequest, "PATCH", services+"/hello", `{"kind":"Route"}`, merge)
	r.refused(404, reasonNotFound, "PATCH", services+"/none", `{}`, merge)

	// Apply creates what is not there, and merges into what is.
	yaml := "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata:\n  name: second\n  labels: {a: b, gone: null}\nspec:\n  template:\n    spec:\n      containers:\n      - image: dev.local/two\n"
	v = r.must(201, "PATCH", services+"/second?fieldManager=me&force=true", yaml, apply)
	if fmt.Sprint(at(v, "metadata", "labels")) != "map[a:b]" {
		t.Errorf("applied %v", v)
	}
	v = r.must(200, "PATCH", services+"/second?fieldManager=me", `{"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":"second","annotations":{"n":"o"}}}`, apply)
	if at(v, "metadata", "labels", "a") != "b" || at(v, "metadata", "annotations", "n") != "o" || at(v, "spec", "template", "spec", "containers", 0, "image") != "dev.local/two" {
		t.Errorf("merged %v", v)
	}
	r.refused(422, reasonInvalid, "PATCH", services+"/second", yaml, apply)                                                // no field manager
	r.refused(400, reasonBadRequest, "PATCH", services+"/third?fieldManager=me", yaml, apply)                              // another name
	r.refused(400, reasonBadRequest, "PATCH", services+"/second?fieldManager=me", `{"metadata":{"name":"second"}}`, apply) // no kind
	r.refused(404, reasonNotFound, "PATCH", services+"/third?fieldManager=me",
		`{"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":"third","uid":"x"}}`, apply)
}

// TestPatchesAreNotLost: patches that name no resource version are applied over and over until they hold.
func TestPatchesAreNotLost(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", services, service("hello"))
	const n = 6 // below writeTries: each round lets one through, so none may fail
	var wg sync.WaitGroup
	codes := make([]int, n)
	for i := range n {
		wg.Go(func() {
			codes[i] = r.do("PATCH", services+"/hello", fmt.Sprintf(`{"metadata":{"labels":{"l%d":"x"}}}`, i), "Content-Type: application/merge-patch+json").code
		})
	}
	wg.Wait()
	v := r.must(200, "GET", services+"/hello", "")
	if got := len(at(v, "metadata", "labels").(map[string]any)); got != n {
		t.Errorf("%d of %d patches are there; codes %v", got, n, codes)
	}
	// The control: replacements that all name the same resource version, of which one can win.
	rv := str(at(v, "metadata", "resourceVersion"))
	for i := range n {
		wg.Go(func() {
			codes[i] = r.do("PATCH", services+"/hello", fmt.Sprintf(`{"metadata":{"resourceVersion":%q,"labels":{"l0":"%d"}}}`, rv, i), "Content-Type: application/merge-patch+json").code
		})
	}
	wg.Wait()
	won := 0
	for _, c := range codes {
		switch c {
		case 200:
			won++
		case 409:
		default:
			t.Errorf("code %d", c)
		}
	}
	if won != 1 {
		t.Errorf("%d of the patches with the same resource version won, want 1: %v", won, codes)
	}
}

func TestDelete(t *testing.T) {
	r := newRig(t)
	v := r.must(201, "POST", services, service("hello"))
	uid, rv := str(at(v, "metadata", "uid")), str(at(v, "metadata", "resourceVersion"))
	r.refused(409, reasonConflict, "DELETE", services+"/hello", `{"preconditions":{"uid":"other"}}`)
	r.refused(409, reasonConflict, "DELETE", services+"/hello", `{"preconditions":{"resourceVersion":"1234"}}`)
	r.refused(422, reasonInvalid, "DELETE", services+"/hello?propagationPolicy=Orphan", "")
	r.refused(422, reasonInvalid, "DELETE", services+"/hello", `{"propagationPolicy":"Sideways"}`)
	r.refused(422, reasonInvalid, "DELETE", services+"/hello", `{"orphanDependents":true}`)
	r.refused(400, reasonBadRequest, "DELETE", services+"/hello", `{"kind":"Service"}`)
	r.refused(400, reasonBadRequest, "DELETE", services+"/hello", `{"preconditions":7}`)
	r.refused(415, reasonUnsupportedMedia, "DELETE", services+"/hello", `x=y`, "Content-Type: application/x-www-form-urlencoded")
	a := r.do("DELETE", services+"/hello", `{"kind":"DeleteOptions","apiVersion":"v1","propagationPolicy":"Foreground","preconditions":{"uid":"`+uid+`","resourceVersion":"`+rv+`"}}`)
	s := a.status(t)
	if a.code != 200 || s.Status != "Success" || s.Details.UID != uid || s.Details.Name != "hello" || s.Details.Kind != "services" || s.Details.Group != "serving.knative.dev" {
		t.Errorf("delete: %d %s", a.code, a.body)
	}
	e := r.refused(404, reasonNotFound, "DELETE", services+"/hello", "")
	if e.Details == nil || e.Details.Kind != "services" || e.Message != `services.serving.knative.dev "hello" not found` {
		t.Errorf("second delete: %+v", e)
	}
}

func TestDeleteCollection(t *testing.T) {
	r := newRig(t)
	for _, n := range []string{"a", "b", "c"} {
		r.must(201, "POST", services, service(n, labels("app", n)))
	}
	r.must(201, "POST", strings.Replace(services, "default", "other", 1), service("a", labels("app", "a")))
	v := r.must(200, "DELETE", services+"?labelSelector=app+in+(a,b)&dryRun=All", "")
	if got := summaryOf(v); got != "ServiceList [a b]" {
		t.Errorf("dry run: %s", got)
	}
	v = r.must(200, "DELETE", services+"?labelSelector=app+in+(a,b)", "")
	if got := summaryOf(v); got != "ServiceList [a b]" {
		t.Errorf("deleted: %s", got)
	}
	if got := summaryOf(r.must(200, "GET", "/apis/serving.knative.dev/v1/services", "")); got != "ServiceList [c a]" {
		t.Errorf("left: %s", got)
	}
	r.refused(405, reasonMethodNotAllowed, "DELETE", "/apis/serving.knative.dev/v1/services", "")
}

func TestFieldValidation(t *testing.T) {
	r := newRig(t)
	odd := func(name string) string {
		return service(name, func(s map[string]any) {
			s["spec"].(map[string]any)["foo"] = 1
			s["metadata"].(map[string]any)["selfLink"] = "/x" // a cluster drops it without a word
		})
	}
	s := r.refused(400, reasonBadRequest, "POST", services+"?fieldValidation=Strict", odd("a"))
	if want := `Service in version "v1" cannot be handled as a Service: strict decoding error: unknown field "spec.foo"`; s.Message != want {
		t.Errorf("strict: %q, want %q", s.Message, want)
	}
	for query, want := range map[string]int{"": 1, "?fieldValidation=Warn": 1, "?fieldValidation=Ignore": 0} {
		name := "svc" + fmt.Sprint(len(query))
		a := r.do("POST", services+query, odd(name))
		w := a.header.Values("Warning")
		if a.code != 201 || len(w) != want || want == 1 && w[0] != `299 - "unknown field \"spec.foo\""` {
			t.Errorf("%q: %d %q", query, a.code, w)
		}
	}
	r.refused(422, reasonInvalid, "POST", services+"?fieldValidation=Loud", odd("b"))
	a := r.do("PATCH", services+"/svc0", `{"spec":{"bar":1}}`, "Content-Type: application/merge-patch+json")
	if w := a.header.Values("Warning"); a.code != 200 || len(w) != 1 || w[0] != `299 - "unknown field \"spec.bar\""` {
		t.Errorf("patch: %d %q", a.code, w)
	}
	r.refused(400, reasonBadRequest, "PATCH", services+"/svc0?fieldValidation=Strict", `{"spec":{"bar":1}}`, "Content-Type: application/merge-patch+json")
}

// TestUnsupportedFieldsAreWarnedOf: what is accepted without effect is said, even when unknown fields are ignored.
func TestUnsupportedFieldsAreWarnedOf(t *testing.T) {
	r := newRig(t)
	body := service("a", func(s map[string]any) {
		c := at(s, "spec", "template", "spec", "containers", 0).(map[string]any)
		c["env"] = []any{map[string]any{"name": "SECRET", "valueFrom": map[string]any{"secretKeyRef": map[string]any{"name": "s", "key": "k"}}}}
	})
	a := r.do("POST", services+"?fieldValidation=Ignore", body)
	w := strings.Join(a.header.Values("Warning"), "\n")
	if a.code != 201 || !strings.Contains(w, "valueFrom") {
		t.Errorf("%d, warnings %q", a.code, w)
	}
	if a := r.do("POST", services, service("b")); len(a.header.Values("Warning")) != 0 {
		t.Errorf("a plain service is warned of: %q", a.header.Values("Warning"))
	}
}

func TestWarningsAreBounded(t *testing.T) {
	h := http.Header{}
	warn(h, []string{"say \"hi\" \\ to\nall\x00", "say \"hi\" \\ to\nall\x00", "über", "\xff"})
	if got := h.Values("Warning"); len(got) != 2 || got[0] != `299 - "say \"hi\" \\ toall"` || got[1] != `299 - "über"` {
		t.Errorf("%q", got)
	}
	h = http.Header{}
	var many []string
	for i := range 1000 {
		many = append(many, fmt.Sprintf("%d %s", i, strings.Repeat("ö", 500)))
	}
	warn(h, many)
	total := 0
	for _, v := range h.Values("Warning") {
		total += len(v)
		if !strings.HasSuffix(v, `…"`) || len(v) > maxWarningBytes+20 {
			t.Errorf("not cut: %d bytes %q", len(v), v[len(v)-10:])
		}
	}
	if total > maxTotalWarningBytes || total < maxTotalWarningBytes/2 {
		t.Errorf("%d bytes of warnings", total)
	}
}

// TestWriteRace: an object that changes between a read and a write that names no revision is written on top of the change; one
// that is deleted meanwhile is not made again.
func TestWriteRace(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", services, service("hello"))
	settle(t, r.store)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			o, err := r.store.Get(t.Context(), api.Services, "default", "hello")
			if err != nil {
				return
			}
			api.StatusOf(o).Annotations = map[string]string{"n": fmt.Sprint(i)}
			r.store.UpdateStatus(t.Context(), api.Services, o)
			time.Sleep(time.Duration(rand.IntN(400)) * time.Microsecond) // without any room between two changes nobody else would ever win
		}
	})
	ok := 0
	for i := range 20 {
		a := r.do("PATCH", services+"/hello", fmt.Sprintf(`{"metadata":{"labels":{"i":"%d"}}}`, i), "Content-Type: application/merge-patch+json")
		switch a.code {
		case 200:
			ok++
		case 409: // a fair answer under constant change; it must not be the rule
		default:
			t.Errorf("%d %s", a.code, a.body)
		}
	}
	close(stop)
	wg.Wait()
	if ok == 0 {
		t.Error("no patch got through")
	}
	v := r.must(200, "GET", services+"/hello", "")
	if at(v, "status", "annotations", "n") == nil || at(v, "status", "url") == nil {
		t.Errorf("a patch of labels lost the status: %v", v["status"])
	}
}
