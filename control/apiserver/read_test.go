package apiserver

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
)

func TestListSelectsAndPages(t *testing.T) {
	r := newRig(t)
	for i := range 7 {
		ns := []string{"default", "other"}[i%2]
		name := fmt.Sprintf("s%d", i)
		r.must(201, "POST", strings.Replace(services, "default", ns, 1), service(name, labels("n", fmt.Sprint(i), "even", fmt.Sprint(i%2 == 0))))
	}
	const all = "/apis/serving.knative.dev/v1/services"
	for query, want := range map[string]string{
		"":                          "[s0 s2 s4 s6 s1 s3 s5]", // by namespace, then name
		"?labelSelector=even=true":  "[s0 s2 s4 s6]",
		"?labelSelector=n+in+(1,2)": "[s2 s1]",
		"?labelSelector=!n":         "[]",
		"?labelSelector=n>4":        "[s6 s5]",
		"?fieldSelector=metadata.namespace=other":                     "[s1 s3 s5]",
		"?fieldSelector=metadata.name=s3,metadata.namespace!=default": "[s3]",
		"?resourceVersion=0": "[s0 s2 s4 s6 s1 s3 s5]",
		"?resourceVersion=1&resourceVersionMatch=NotOlderThan&limit=10": "[s0 s2 s4 s6 s1 s3 s5]",
	} {
		query = strings.ReplaceAll(query, ">", "%3E")
		if got := summaryOf(r.must(200, "GET", all+query, "")); got != "ServiceList "+want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}

	// Pages: every object once, all with the resource version of the first page, and objects made meanwhile do not shift them.
	var names []string
	next, rv, pages := "", "", 0
	for {
		v := r.must(200, "GET", all+"?limit=3&continue="+next, "")
		for _, i := range list(v["items"]) {
			names = append(names, str(at(i, "metadata", "name")))
		}
		if pages++; pages == 1 {
			rv = str(at(v, "metadata", "resourceVersion"))
			if at(v, "metadata", "remainingItemCount") != 4.0 {
				t.Errorf("remaining: %v", at(v, "metadata"))
			}
			r.must(201, "POST", services, service("s00")) // lies on the first page
		}
		if got := str(at(v, "metadata", "resourceVersion")); got != rv {
			t.Errorf("page %d has resource version %s, the first %s", pages, got, rv)
		}
		if next = str(at(v, "metadata", "continue")); next == "" {
			break
		}
	}
	if got := fmt.Sprint(names); got != "[s0 s2 s4 s6 s1 s3 s5]" || pages != 3 {
		t.Errorf("%d pages: %s", pages, got)
	}
	// A watch from the pages' resource version tells of what came between them.
	w := r.watch(all + "?watch=true&resourceVersion=" + rv)
	w.want(objects.Added, "s00")

	v := r.must(200, "GET", all+"?limit=1&labelSelector=even=true", "")
	if at(v, "metadata", "continue") == nil || at(v, "metadata", "remainingItemCount") != nil {
		t.Errorf("a selected page: %v", v["metadata"])
	}
}

func TestListOptionsThatAreWrong(t *testing.T) {
	r := newRig(t)
	for query, want := range map[string]struct {
		code   int
		reason string
		text   string
	}{
		"limit=x":                    {400, reasonBadRequest, `limit: "x" is not`},
		"limit=-1":                   {400, reasonBadRequest, `limit: "-1" is not`},
		"continue=x":                 {400, reasonBadRequest, "continue key is not valid"},
		"continue=eyJ2IjoieCJ9":      {400, reasonBadRequest, "continue key is not valid"},
		"resourceVersion=x":          {400, reasonBadRequest, "resourceVersion"},
		"resourceVersion=-5":         {400, reasonBadRequest, "resourceVersion"},
		"resourceVersionMatch=Exact": {400, reasonBadRequest, "needs a resourceVersion"},
		"resourceVersionMatch=Foo":   {400, reasonBadRequest, "neither"},
		"resourceVersion=0&resourceVersionMatch=Exact":                   {400, reasonBadRequest, "other than"},
		"resourceVersion=1&resourceVersionMatch=Exact":                   {410, reasonExpired, "only the newest"},
		"resourceVersion=999999":                                         {504, reasonTimeout, "Too large resource version"},
		"labelSelector=a%20b":                                            {400, reasonBadRequest, "unable to parse"},
		"fieldSelector=spec.x%3D1":                                       {400, reasonBadRequest, "field label not supported: spec.x"},
		"watch=true&timeoutSeconds=x":                                    {400, reasonBadRequest, "timeoutSeconds"},
		"watch=true&resourceVersion=999999":                              {504, reasonTimeout, "Too large resource version"},
		"watch=true&sendInitialEvents=true":                              {400, reasonBadRequest, "needs resourceVersionMatch"},
		"watch=true&resourceVersionMatch=NotOlderThan&resourceVersion=1": {400, reasonBadRequest, "is not allowed for a watch"},
		"includeObject=Half":                                             {422, reasonInvalid, "includeObject"},
		"a=%zz":                                                          {400, reasonBadRequest, "the query cannot be read"},
	} {
		if query == "resourceVersion=1&resourceVersionMatch=Exact" {
			r.must(201, "POST", services, service("one"))
		}
		s := r.refused(want.code, want.reason, "GET", services+"?"+query, "")
		if !strings.Contains(s.Message, want.text) {
			t.Errorf("%s: %q, want %q in it", query, s.Message, want.text)
		}
	}
	s := r.refused(504, reasonTimeout, "GET", services+"?resourceVersion=999999", "")
	if len(s.Details.Causes) != 1 || s.Details.Causes[0].Reason != "ResourceVersionTooLarge" || s.Details.RetryAfterSeconds != 1 {
		t.Errorf("%+v", s.Details)
	}
}

func TestTables(t *testing.T) {
	const accept = "Accept: application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
	r := newRig(t)
	r.must(201, "POST", services, service("hello"))
	r.must(201, "POST", "/apis/serving.knative.dev/v1beta1/namespaces/default/domainmappings",
		`{"apiVersion":"serving.knative.dev/v1beta1","kind":"DomainMapping","metadata":{"name":"a.example.com"},"spec":{"ref":{"kind":"Service","name":"hello","apiVersion":"serving.knative.dev/v1"}}}`)
	settle(t, r.store)
	for path, want := range map[string]string{
		"v1/namespaces/default/services":            "Table NAME,URL,LATESTCREATED,LATESTREADY,READY,REASON: [hello http://hello.default.localhost hello-00001 hello-00001 True <nil>]",
		"v1/services":                               "Table NAME,URL,LATESTCREATED,LATESTREADY,READY,REASON: [hello http://hello.default.localhost hello-00001 hello-00001 True <nil>]",
		"v1/namespaces/default/services/hello":      "Table NAME,URL,LATESTCREATED,LATESTREADY,READY,REASON: [hello http://hello.default.localhost hello-00001 hello-00001 True <nil>]",
		"v1/namespaces/default/configurations":      "Table NAME,LATESTCREATED,LATESTREADY,READY,REASON: [hello hello-00001 hello-00001 True <nil>]",
		"v1/namespaces/default/revisions":           "Table NAME,CONFIG NAME,GENERATION,READY,REASON,ACTUAL REPLICAS,DESIRED REPLICAS: [hello-00001 hello 1 True <nil> 1 1]",
		"v1/namespaces/default/routes":              "Table NAME,URL,READY,REASON: [hello http://hello.default.localhost True <nil>]",
		"v1beta1/namespaces/default/domainmappings": "Table NAME,URL,READY,REASON: [a.example.com http://a.example.com True <nil>]",
	} {
		v := r.must(200, "GET", "/apis/serving.knative.dev/"+path, "", accept)
		if got := summaryOf(v); got != want {
			t.Errorf("%s\n got %s\nwant %s", path, got, want)
		}
		o := at(v, "rows", 0, "object")
		if v["apiVersion"] != "meta.k8s.io/v1" || at(o, "kind") != "PartialObjectMetadata" || at(o, "metadata", "uid") == nil || at(o, "spec") != nil {
			t.Errorf("%s: row object %v", path, o)
		}
	}
	v := r.must(200, "GET", services+"?includeObject=Object", "", accept)
	if at(v, "rows", 0, "object", "kind") != "Service" || at(v, "rows", 0, "object", "spec") == nil {
		t.Errorf("includeObject=Object: %v", at(v, "rows", 0))
	}
	v = r.must(200, "GET", services+"?includeObject=None", "", accept)
	if at(v, "rows", 0, "object") != nil {
		t.Errorf("includeObject=None: %v", at(v, "rows", 0))
	}
	w := r.watch(services+"?watch=true", accept)
	e := w.next()
	if got := summaryOf(e["object"].(map[string]any)); !strings.HasPrefix(got, "Table NAME,URL") || e["type"] != "ADDED" {
		t.Errorf("event %v %s", e["type"], got)
	}
}

func TestAcceptHeaders(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", services, service("hello"))
	for accept, want := range map[string]string{
		"":                    "application/json",
		"*/*":                 "application/json",
		"application/*;q=0.5": "application/json",
		"application/vnd.kubernetes.protobuf, application/json":                         "application/json",
		"text/html,application/xhtml+xml,*/*":                                           "application/json",
		"application/yaml":                                                              "application/yaml",
		"application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json": "application/json",
	} {
		a := r.do("GET", services+"/hello", "", "Accept: "+accept)
		if got := a.header.Get("Content-Type"); a.code != 200 || got != want {
			t.Errorf("%q: %d %s", accept, a.code, got)
		}
	}
	for _, accept := range []string{"text/html", "application/vnd.kubernetes.protobuf", "application/json;as=Table;g=meta.k8s.io;v=v9", "application/json;q=0", ";;"} {
		s := r.refused(406, reasonNotAcceptable, "GET", services+"/hello", "", "Accept: "+accept)
		if !strings.Contains(s.Message, "application/json") {
			t.Errorf("%q: %s", accept, s.Message)
		}
	}
	a := r.do("GET", services+"/hello?pretty=true", "")
	if !strings.Contains(string(a.body), "\n  \"kind\": \"Service\"") {
		t.Errorf("pretty: %s", a.body)
	}
}

func TestWatchFromThere(t *testing.T) {
	r := newRig(t)
	first := r.must(201, "POST", services, service("a"))
	r.must(201, "POST", strings.Replace(services, "default", "other", 1), service("elsewhere"))

	empty, zero := r.watch(services+"?watch=true"), r.watch(services+"?watch=true&resourceVersion=0")
	empty.want("ADDED", "a")
	zero.want("ADDED", "a")
	since := r.watch(services + "?watch=1&resourceVersion=" + str(at(first, "metadata", "resourceVersion")))
	everywhere := r.watch("/apis/serving.knative.dev/v1/services?watch=true&resourceVersion=" + str(at(first, "metadata", "resourceVersion")))
	named := r.watch(services + "?watch=true&fieldSelector=metadata.name%3Db")

	r.must(201, "POST", services, service("b"))
	touch(t, r.store, api.Services, "a", "x")
	gone := r.must(200, "DELETE", services+"/a", "")
	everywhere.want("ADDED", "elsewhere")
	for _, w := range []*stream{empty, zero, since, everywhere} {
		b := w.want("ADDED", "b")
		w.want("MODIFIED", "a")
		d := w.want("DELETED", "a")
		was, _ := strconv.Atoi(str(at(b, "object", "metadata", "resourceVersion")))
		is, _ := strconv.Atoi(str(at(d, "object", "metadata", "resourceVersion")))
		if is != was+2 || at(d, "object", "metadata", "uid") != at(gone, "details", "uid") || at(d, "object", "kind") != "Service" {
			t.Errorf("resource versions %d, %d; deleted %v", was, is, d)
		}
	}
	named.want("ADDED", "b")
	touch(t, r.store, api.Services, "b", "x")
	named.want("MODIFIED", "b")
}

// TestWatchOfLabels: an object that stops to match a selector is deleted for the one who watches, one that begins to match is added.
func TestWatchOfLabels(t *testing.T) {
	r := newRig(t)
	merge := "Content-Type: application/merge-patch+json"
	label := func(name, value string) {
		r.must(200, "PATCH", services+"/"+name, `{"metadata":{"labels":{"app":`+value+`}}}`, merge)
	}
	r.must(201, "POST", services, service("in", labels("app", "x")))
	v := r.must(201, "POST", services, service("out", labels("app", "y")))
	from := str(at(v, "metadata", "resourceVersion"))
	r.must(201, "POST", services, service("never", labels("app", "z")))
	label("in", `"q"`) // after from: a client that listed at from has it, and must hear that it is gone

	w := r.watch(services + "?watch=true&labelSelector=app%3Dx&resourceVersion=" + from)
	w.want("DELETED", "in")
	label("out", `"x"`)
	w.want("ADDED", "out")
	label("never", `"zz"`) // says nothing to this watch
	touch(t, r.store, api.Services, "out", "x")
	w.want("MODIFIED", "out")
	label("out", `null`)
	w.want("DELETED", "out")
	label("in", `"x"`)
	w.want("ADDED", "in")
	r.must(200, "DELETE", services+"/in", "")
	w.want("DELETED", "in")
	r.must(200, "DELETE", services+"/never", "")
	r.must(201, "POST", services, service("last", labels("app", "x")))
	w.want("ADDED", "last")
}

func TestWatchEnds(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxWatches = 2 })
	start := time.Now()
	short := r.watch(services + "?watch=true&timeoutSeconds=1")
	short.ended()
	if d := time.Since(start); d < time.Second || d > patience {
		t.Errorf("a watch of one second lasted %v", d)
	}
	one, two := r.watch(services+"?watch=true"), r.watch("/api/v1/events?watch=true")
	s := r.refused(429, reasonTooManyRequests, "GET", services+"?watch=true", "")
	if s.Details.RetryAfterSeconds != 1 {
		t.Errorf("%+v", s.Details)
	}
	// A client that leaves frees its place.
	one.cancel()
	deadline := time.Now().Add(patience)
	for r.server.watches.n.Load() != 1 {
		if time.Now().After(deadline) {
			t.Fatal("the place of a client that left is not free")
		}
		time.Sleep(time.Millisecond)
	}
	three := r.watch(services + "?watch=true")
	r.server.Close()
	two.ended()
	three.ended()
	r.refused(503, reasonUnavailable, "GET", services+"?watch=true", "")
}

// TestWatchAfterCompaction: the history is gone, so the client is told to list again, in the stream, as client-go expects.
func TestWatchAfterCompaction(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", services, service("a"))
	for i := range 5 {
		touch(t, r.store, api.Services, "a", fmt.Sprint(i))
	}
	o, err := r.store.Get(t.Context(), api.Services, "default", "a")
	if err != nil {
		t.Fatal(err)
	}
	now, _ := strconv.ParseInt(o.Meta().ResourceVersion, 10, 64)
	// The control: before the compaction the same watch works.
	w := r.watch(services + "?watch=true&resourceVersion=2")
	w.want("MODIFIED", "a")
	if err := r.state.Compact(t.Context(), now); err != nil {
		t.Fatal(err)
	}
	w = r.watch(services + "?watch=true&resourceVersion=2")
	e := w.next()
	if e["type"] != "ERROR" || at(e, "object", "kind") != "Status" || at(e, "object", "code") != 410.0 || at(e, "object", "reason") != "Expired" {
		t.Errorf("event %v", e)
	}
	w.ended()
	fresh := r.must(200, "GET", services, "")
	w = r.watch(services + "?watch=true&resourceVersion=" + str(at(fresh, "metadata", "resourceVersion")))
	touch(t, r.store, api.Services, "a", "z")
	w.want("MODIFIED", "a")
}

func TestWatchInitialEvents(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", services, service("a"))
	w := r.watch(services + "?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&resourceVersion=0&allowWatchBookmarks=true")
	w.want("ADDED", "a")
	e := w.next()
	if e["type"] != "BOOKMARK" || at(e, "object", "metadata", "annotations", initialEventsEnd) != "true" || at(e, "object", "kind") != "Service" {
		t.Errorf("event %v", e)
	}
	r.must(201, "POST", services, service("b"))
	w.want("ADDED", "b")
	w = r.watch(services + "?watch=true&sendInitialEvents=false&resourceVersionMatch=NotOlderThan&resourceVersion=0")
	r.must(201, "POST", services, service("c"))
	w.want("ADDED", "c")
}

// TestBookmarks feeds marks of progress from the store: they reach only those who ask, and not each of them.
func TestBookmarks(t *testing.T) {
	for _, ask := range []bool{true, false} {
		r := newRig(t)
		r.state.progress = make(chan int64)
		query := "?watch=true"
		if ask {
			query += "&allowWatchBookmarks=true"
		}
		w := r.watch(services + query)
		for _, rev := range []int64{41, 42, 43} {
			r.state.progress <- rev
		}
		r.must(201, "POST", services, service("a"))
		if ask {
			e := w.next()
			if e["type"] != "BOOKMARK" || at(e, "object", "metadata", "resourceVersion") != "41" || at(e, "object", "spec") != nil {
				t.Errorf("event %v", e)
			}
		}
		w.want("ADDED", "a")
	}
}

func TestBookmarkForms(t *testing.T) {
	w := &watchWriter{w: &bodyRecorder{}, rc: http.NewResponseController(&bodyRecorder{}), kind: api.Services}
	if err := w.bookmark(42, false); err != nil {
		t.Fatal(err)
	}
	if got := w.w.(*bodyRecorder).String(); got != `{"type":"BOOKMARK","object":{"kind":"Service","apiVersion":"serving.knative.dev/v1","metadata":{"resourceVersion":"42","creationTimestamp":null}}}`+"\n" {
		t.Errorf("bookmark %s", got)
	}
	w.table = true
	if err := w.bookmark(43, false); err != nil {
		t.Fatal(err)
	}
	if got := w.w.(*bodyRecorder).String(); !strings.Contains(got, `"kind":"Table"`) || !strings.Contains(got, `"resourceVersion":"43"`) || !strings.Contains(got, `"rows":[]`) {
		t.Errorf("bookmark of a table %s", got)
	}
}

type bodyRecorder struct{ strings.Builder }

func (*bodyRecorder) Header() http.Header { return http.Header{} }
func (*bodyRecorder) WriteHeader(int)     {}

// TestWatchLastsAsLongAsAsked runs in a bubble, where half an hour takes no time.
func TestWatchLasts(t *testing.T) {
	for query, bounds := range map[string][2]time.Duration{
		"":                      {minWatch, 2 * minWatch},
		"timeoutSeconds=0":      {minWatch, 2 * minWatch},
		"timeoutSeconds=515":    {515 * time.Second, 515 * time.Second},
		"timeoutSeconds=999999": {24 * time.Hour, 24 * time.Hour},
	} {
		synctest.Test(t, func(t *testing.T) {
			q, _ := url.ParseQuery(query)
			o, err := parseWatchOptions(q)
			if err != nil {
				t.Fatal(err)
			}
			s := &Server{}
			s.closed, s.closeFunc = context.WithCancel(t.Context())
			start := time.Now()
			r, _ := http.NewRequestWithContext(t.Context(), "GET", "/", nil)
			if err := s.watchNothing(&bodyRecorder{}, r, url.Values{"timeoutSeconds": {fmt.Sprint(int(o.timeout / time.Second))}}); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(start); d < bounds[0]-time.Second || d > bounds[1] {
				t.Errorf("%q lasted %v, want %v", query, d, bounds)
			}
		})
	}
}

func TestNamespaces(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", strings.Replace(services, "default", "team", 1), service("a"))
	if got := summaryOf(r.must(200, "GET", "/api/v1/namespaces", "")); got != "NamespaceList [default team]" {
		t.Error(got)
	}
	if got := summaryOf(r.must(200, "GET", "/api/v1/namespaces?fieldSelector=metadata.name=team", "", "Accept: application/json;as=Table;v=v1;g=meta.k8s.io")); got != "Table NAME,STATUS: [team Active]" {
		t.Error(got)
	}
	v := r.must(200, "GET", "/api/v1/namespaces/anything", "")
	if at(v, "metadata", "name") != "anything" || at(v, "status", "phase") != "Active" {
		t.Errorf("%v", v)
	}
	r.refused(404, reasonNotFound, "GET", "/api/v1/namespaces/Not%20A%20Name", "")
	a := r.do("POST", "/api/v1/namespaces", `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"fresh"}}`)
	if a.code != 201 || len(a.header.Values("Warning")) != 1 {
		t.Errorf("%d %s", a.code, a.body)
	}
	// As kubectl create ns sends it.
	proto := "k8s\x00\n\x0f\n\x02v1\x12\tNamespace\x12\x0b\n\x07\n\x05fresh\x12\x00\x1a\x00\x1a\x00\"\x00"
	if v := r.must(201, "POST", "/api/v1/namespaces?fieldManager=kubectl-create", proto, "Content-Type: application/vnd.kubernetes.protobuf", "Accept: application/vnd.kubernetes.protobuf,application/json"); at(v, "metadata", "name") != "fresh" {
		t.Errorf("%v", v)
	}
	r.refused(400, reasonBadRequest, "POST", "/api/v1/namespaces", proto[:20], "Content-Type: application/vnd.kubernetes.protobuf")
	r.refused(422, reasonInvalid, "POST", "/api/v1/namespaces", `{"kind":"Namespace","metadata":{"name":"No Name"}}`)
	r.refused(400, reasonBadRequest, "POST", "/api/v1/namespaces", `{"kind":"Pod","metadata":{"name":"x"}}`)
	r.must(200, "PATCH", "/api/v1/namespaces/team", `{"metadata":{"labels":{"a":"b"}}}`, "Content-Type: application/strategic-merge-patch+json")
	s := r.refused(405, reasonMethodNotAllowed, "DELETE", "/api/v1/namespaces/team", "")
	if !strings.Contains(s.Message, "kubectl delete ksvc --all -n team") {
		t.Error(s.Message)
	}
	r.refused(404, reasonNotFound, "GET", "/api/v1/pods", "")
	r.refused(404, reasonNotFound, "GET", "/api/v1/namespaces/default/pods", "")
	for _, path := range []string{"/api/v1/events", "/api/v1/namespaces/default/events?fieldSelector=involvedObject.name=a"} {
		if got := summaryOf(r.must(200, "GET", path, "")); got != "EventList []" {
			t.Error(got)
		}
	}
	r.refused(405, reasonMethodNotAllowed, "POST", "/api/v1/events", "{}")
}
