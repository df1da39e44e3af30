package knative

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

// TestService is TestServiceCreateListAndDelete of test/conformance/api/v1/service_test.go.
func TestService(t *testing.T) {
	th := shared(t)
	s := create(t, th, service("crud"))
	if s.Status.URL != "http://crud.default.localhost:"+port(th) || s.Status.Address == nil || s.Status.Address.URL != "http://crud.default.svc.cluster.local" {
		t.Errorf("url %q, address %+v", s.Status.URL, s.Status.Address)
	}
	if s.Status.LatestReadyRevisionName != "crud-00001" || s.Status.LatestCreatedRevisionName != "crud-00001" || s.Status.ObservedGeneration != 1 {
		t.Errorf("status %+v", s.Status)
	}
	wantTraffic(t, s.Status.Traffic, "latest:crud-00001=100")
	for typ := range map[string]bool{"Ready": true, "ConfigurationsReady": true, "RoutesReady": true} {
		if c := s.Status.Conditions.Get(typ); c == nil || c.Status != "True" || c.LastTransitionTime.IsZero() {
			t.Errorf("%s: %+v", typ, c)
		}
	}
	// Configuration and Route have its name and belong to it; the revision names its configuration and has a digest.
	cfg, rt, rev := get[*api.Configuration](t, th, "crud"), get[*api.Route](t, th, "crud"), get[*api.Revision](t, th, "crud-00001")
	for kind, m := range map[string]*api.ObjectMeta{"configuration": cfg.Meta(), "route": rt.Meta()} {
		if len(m.OwnerReferences) != 1 || m.OwnerReferences[0].UID != s.UID || m.Labels[api.LabelService] != "crud" {
			t.Errorf("%s: owners %+v, labels %v", kind, m.OwnerReferences, m.Labels)
		}
	}
	if rev.Labels[api.LabelService] != "crud" || rev.Labels[api.LabelConfiguration] != "crud" || rev.Labels["serving.knative.dev/configurationGeneration"] != "1" {
		t.Errorf("labels of the revision: %v", rev.Labels)
	}
	if st := rev.Status.ContainerStatuses; len(st) != 1 || !strings.HasPrefix(st[0].ImageDigest, program("function")+"@sha256:") {
		t.Errorf("container statuses %+v", st)
	}
	list, _, err := th.Client.List(t.Context(), api.Services, ns, client.ListOptions{})
	if err != nil || !contains(list, "crud") {
		t.Errorf("list: %v, %d items", err, len(list))
	}
	if a := th.Get("crud", "/"); a.Status != 200 {
		t.Errorf("%v", a)
	}
	if err := th.Client.Delete(t.Context(), api.Services, ns, "crud"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, patient, "all that belonged to the service is gone", func() bool {
		for _, k := range []*api.Kind{api.Services, api.Configurations, api.Routes} {
			if _, err := th.Client.Get(t.Context(), k, ns, "crud"); !errors.Is(err, client.ErrNotFound) {
				return false
			}
		}
		_, err := th.Client.Get(t.Context(), api.Revisions, ns, "crud-00001")
		return errors.Is(err, client.ErrNotFound) && th.Get("crud", "/").Status == 404 && len(pids(th, "crud-00001")) == 0
	})
}

func port(th *harness.Thaw) string { return th.Ingress[strings.LastIndexByte(th.Ingress, ':')+1:] }

func contains(list []api.Object, name string) bool {
	for _, o := range list {
		if o.Meta().Name == name {
			return true
		}
	}
	return false
}

// TestServiceCreateAndUpdate: metadata of the service makes no revision, metadata or spec of the template does.
func TestServiceCreateAndUpdate(t *testing.T) {
	th := shared(t)
	create(t, th, service("upd", env("TARGET", "one")))
	if s := see(t, th, "upd"); s.Env["TARGET"] != "one" || s.Env["K_REVISION"] != "upd-00001" {
		t.Errorf("%v", s.Env)
	}
	s := update(t, th, "upd", func(s *api.Service) {
		s.Labels = map[string]string{"label-x": "abc"}
		s.Annotations["annotation-a"] = "123"
	})
	if s.Status.LatestCreatedRevisionName != "upd-00001" || s.Generation != 1 || s.Labels["label-x"] != "abc" || s.Annotations["annotation-a"] != "123" {
		t.Errorf("after a change of metadata: %+v", s)
	}
	s = update(t, th, "upd", annotated("example.com/a", "b"), func(s *api.Service) { s.Spec.Template.Labels = map[string]string{"label-y": "def"} })
	if s.Status.LatestReadyRevisionName != "upd-00002" {
		t.Errorf("after a change of the template's metadata: %+v", s.Status)
	}
	if r := get[*api.Revision](t, th, "upd-00002"); r.Labels["label-y"] != "def" || r.Annotations["example.com/a"] != "b" {
		t.Errorf("labels %v, annotations %v", r.Labels, r.Annotations)
	}
	s = update(t, th, "upd", env("TARGET", "two"))
	if s.Status.LatestReadyRevisionName != "upd-00003" {
		t.Errorf("after a change of the spec: %+v", s.Status)
	}
	wantTraffic(t, s.Status.Traffic, "latest:upd-00003=100")
	if got := see(t, th, "upd"); got.Env["TARGET"] != "two" || got.Env["K_REVISION"] != "upd-00003" {
		t.Errorf("%v", got.Env)
	}
}

// TestAnnotationPropagation: annotations of the service are those of its configuration and route, also when they go.
func TestAnnotationPropagation(t *testing.T) {
	th := shared(t)
	create(t, th, service("annot", func(s *api.Service) { s.Annotations = map[string]string{"testing": "a", "other": "b"} }))
	propagated := func(key, want string) {
		t.Helper()
		harness.Eventually(t, patient, fmt.Sprintf("annotation %s is %q everywhere", key, want), func() bool {
			return get[*api.Configuration](t, th, "annot").Annotations[key] == want && get[*api.Route](t, th, "annot").Annotations[key] == want
		})
	}
	propagated("testing", "a")
	s := get[*api.Service](t, th, "annot")
	if s.Annotations["serving.knative.dev/creator"] == "" || s.Annotations["serving.knative.dev/lastModifier"] == "" {
		t.Errorf("annotations %v", s.Annotations)
	}
	update(t, th, "annot", func(s *api.Service) { delete(s.Annotations, "testing"); s.Annotations["third"] = "c" })
	propagated("testing", "")
	propagated("other", "b")
	propagated("third", "c")
	if got := get[*api.Service](t, th, "annot").Status.LatestCreatedRevisionName; got != "annot-00001" {
		t.Errorf("annotations made revision %s", got)
	}
}

func TestServiceBYOName(t *testing.T) {
	th := shared(t)
	s := create(t, th, service("byo", named("byo-byoname"), env("V", "1")))
	if s.Status.LatestCreatedRevisionName != "byo-byoname" {
		t.Errorf("revision %s", s.Status.LatestCreatedRevisionName)
	}
	_, err := th.Client.Patch(t.Context(), api.Services, ns, "byo", client.JSONPatch, []byte(`[{"op":"replace","path":"/spec/template/spec/containers/0/env/0/value","value":"2"}]`))
	if !errors.Is(err, client.ErrInvalid) || !strings.Contains(err.Error(), "Saw the following changes without a name change") {
		t.Errorf("another template under the same name: %v", err)
	}
	if _, err := th.Client.Create(t.Context(), api.Services, service("byo-bad", named("other-name"))); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("a name without the service's prefix: %v", err)
	}
	s = update(t, th, "byo", named("byo-second"), env("V", "2"))
	if s.Status.LatestReadyRevisionName != "byo-second" || see(t, th, "byo").Env["K_REVISION"] != "byo-second" {
		t.Errorf("status %+v", s.Status)
	}
}

// test/conformance/api/v1/generatename_test.go
func TestServiceGenerateName(t *testing.T) {
	th := shared(t)
	s := create(t, th, service("", func(s *api.Service) { s.GenerateName = "generate-svc-" }))
	if !strings.HasPrefix(s.Name, "generate-svc-") || len(s.Name) != len("generate-svc-")+5 {
		t.Errorf("name %q", s.Name)
	}
	if got := see(t, th, s.Name); got.Env["K_SERVICE"] != s.Name {
		t.Errorf("K_SERVICE is %q", got.Env["K_SERVICE"])
	}
}

func TestServiceWithTrafficSplit(t *testing.T) {
	th := shared(t)
	url := func(tag string) string { return "http://" + tag + "-split.default.localhost:" + port(th) }
	tags := func(s *api.Service, want ...string) {
		t.Helper()
		for _, x := range s.Status.Traffic {
			if x.Tag != "" && x.URL != url(x.Tag) || x.Tag == "" && x.URL != "" {
				t.Errorf("tag %q has url %q", x.Tag, x.URL)
			}
		}
		for i := 0; i < len(want); i += 2 {
			if got := see(t, th, want[i]+"-split").Env["K_REVISION"]; got != want[i+1] {
				t.Errorf("tag %s leads to %s, want %s", want[i], got, want[i+1])
			}
		}
	}
	// 1. Everything on the latest.
	s := create(t, th, service("split", env("V", "1")))
	wantTraffic(t, s.Status.Traffic, "latest:split-00001=100")
	// 2. Pinned.
	s = update(t, th, "split", traffic(target("split-00001", 100, "current"), target("latest", 0, "latest")))
	wantTraffic(t, s.Status.Traffic, "split-00001=100#current", "latest:split-00001=0#latest")
	tags(s, "current", "split-00001", "latest", "split-00001")
	// 3. A second revision: only its tag leads there.
	s = update(t, th, "split", env("V", "2"))
	wantTraffic(t, s.Status.Traffic, "split-00001=100#current", "latest:split-00002=0#latest")
	tags(s, "current", "split-00001", "latest", "split-00002")
	for range 50 {
		if got := see(t, th, "split").Env["K_REVISION"]; got != "split-00001" {
			t.Fatalf("0 %% led to %s", got)
		}
	}
	// 4. It becomes the candidate for half of the traffic.
	s = update(t, th, "split", traffic(target("split-00001", 50, "current"), target("split-00002", 50, "candidate"), target("latest", 0, "latest")))
	wantTraffic(t, s.Status.Traffic, "split-00001=50#current", "split-00002=50#candidate", "latest:split-00002=0#latest")
	tags(s, "current", "split-00001", "candidate", "split-00002", "latest", "split-00002")
	// 5. A third: the pinned ones stay.
	s = update(t, th, "split", env("V", "3"))
	wantTraffic(t, s.Status.Traffic, "split-00001=50#current", "split-00002=50#candidate", "latest:split-00003=0#latest")
	tags(s, "current", "split-00001", "candidate", "split-00002", "latest", "split-00003")
	// 6. A tag that goes takes its host along.
	update(t, th, "split", traffic(target("latest", 100, "")))
	if a := th.Get("candidate-split", "/"); a.Status != 404 {
		t.Errorf("tag that is gone: %v", a)
	}
}

// TestBlueGreenRoute: 50/50, each side gets at least a quarter of 200 requests, the tags all of theirs.
func TestBlueGreenRoute(t *testing.T) {
	th := shared(t)
	create(t, th, service("bluegreen", image("checker"), env("V", "blue")))
	update(t, th, "bluegreen", env("V", "green"))
	update(t, th, "bluegreen", traffic(target("bluegreen-00001", 50, "blue"), target("bluegreen-00002", 50, "green")))
	for host, want := range map[string]map[string]int{
		"bluegreen":       {"bluegreen-00001": 50, "bluegreen-00002": 50},
		"blue-bluegreen":  {"bluegreen-00001": 200},
		"green-bluegreen": {"bluegreen-00002": 200},
	} {
		got := th.Count(200, host)
		for rev, least := range want {
			if got[rev] < least {
				t.Errorf("%s: %v", host, got)
			}
		}
	}
}

// A running service takes JSON patches and merge patches; a conflict and a failed test operation change nothing.
func TestServicePatch(t *testing.T) {
	th := shared(t)
	create(t, th, service("patched", env("TARGET", "one")))
	s := patch[*api.Service](t, th, "patched", client.JSONPatch, `[
		{"op":"test","path":"/spec/template/spec/containers/0/env/0/value","value":"one"},
		{"op":"replace","path":"/spec/template/spec/containers/0/env/0/value","value":"two"},
		{"op":"add","path":"/metadata/labels","value":{"a":"b"}}]`)
	if s.Generation != 2 || s.Labels["a"] != "b" {
		t.Errorf("after the JSON patch: generation %d, labels %v", s.Generation, s.Labels)
	}
	ready[*api.Service](t, th, "patched")
	if got := see(t, th, "patched"); got.Env["TARGET"] != "two" {
		t.Errorf("TARGET is %q", got.Env["TARGET"])
	}
	patch[*api.Service](t, th, "patched", client.MergePatch, `{"metadata":{"labels":{"a":null,"c":"d"}},"spec":{"template":{"spec":{"containerConcurrency":7}}}}`)
	s = ready[*api.Service](t, th, "patched")
	if s.Generation != 3 || s.Labels["c"] != "d" || s.Labels["a"] != "" || *s.Spec.Template.Spec.ContainerConcurrency != 7 || s.Status.LatestReadyRevisionName != "patched-00003" {
		t.Errorf("after the merge patch: %+v", s)
	}
	if got := see(t, th, "patched"); got.Env["TARGET"] != "two" {
		t.Errorf("the merge patch changed the environment: %v", got.Env)
	}
	_, err := th.Client.Patch(t.Context(), api.Services, ns, "patched", client.JSONPatch, []byte(`[{"op":"test","path":"/metadata/name","value":"x"},{"op":"remove","path":"/metadata/labels"}]`))
	if err == nil {
		t.Error("a patch whose test fails went through")
	}
	stale := get[*api.Service](t, th, "patched")
	patch[*api.Service](t, th, "patched", client.MergePatch, `{"metadata":{"labels":{"e":"f"}}}`)
	stale.Labels["e"] = "lost"
	if _, err := th.Client.Replace(t.Context(), api.Services, stale); !errors.Is(err, client.ErrConflict) {
		t.Errorf("replacing a stale object: %v", err)
	}
	if got := get[*api.Service](t, th, "patched"); got.Labels["e"] != "f" || got.Labels["c"] != "d" || got.Generation != 3 {
		t.Errorf("labels %v, generation %d", got.Labels, got.Generation)
	}
}

// TestSingleConcurrency: with containerConcurrency 1 and 5 clients the function never sees two requests at once.
func TestSingleConcurrency(t *testing.T) {
	th := shared(t)
	create(t, th, service("single", image("checker"), func(s *api.Service) { s.Spec.Template.Spec.ContainerConcurrency = ptr(int64(1)) }, scaling("max-scale", "2")))
	var wg sync.WaitGroup
	var answers atomic.Int32
	for range 5 {
		wg.Go(func() {
			for range 20 {
				a := th.Get("single", "/?sleep=5")
				var r struct{ MaxInFlight int }
				if err := json.Unmarshal([]byte(a.Body), &r); a.Status != 200 || err != nil || r.MaxInFlight != 1 {
					t.Errorf("%v", a)
					return
				}
				answers.Add(1)
			}
		})
	}
	wg.Wait()
	if n := answers.Load(); n != 100 {
		t.Errorf("%d of 100 answers", n)
	}
}

// TestContainerErrorMsg: code that is not there fails revision, configuration and service, each naming the cause.
func TestContainerErrorMsg(t *testing.T) {
	th := shared(t)
	for name, img := range map[string]string{"noimage": "example.com/not/there:v1", "noprogram": "exec:///nowhere/program"} {
		post(t, th, service(name, container(func(c *api.Container) { c.Image = img })))
		c := condition[*api.Service](t, th, name, "ConfigurationsReady", "False")
		if c.Reason != "RevisionFailed" || !strings.Contains(c.Message, `Unable to fetch image "`+img+`"`) {
			t.Errorf("service: %+v", c)
		}
		for _, typ := range []string{"Ready", "ContainerHealthy"} {
			if c := condition[*api.Revision](t, th, name+"-00001", typ, "False"); c.Reason != "ContainerMissing" || !strings.Contains(c.Message, img) {
				t.Errorf("revision: %+v", c)
			}
		}
		if c := condition[*api.Configuration](t, th, name, "Ready", "False"); c.Reason != "RevisionFailed" || !strings.Contains(c.Message, name+"-00001") {
			t.Errorf("configuration: %+v", c)
		}
		if c := condition[*api.Route](t, th, name, "Ready", "False"); c.Reason != "RevisionMissing" {
			t.Errorf("route: %+v", c)
		}
		if a := th.Get(name, "/"); a.Status != 404 {
			t.Errorf("request: %v", a)
		}
	}
}

// TestContainerExitingMsg: a program that exits fails its revision with its exit code and what it printed last, which is also in
// its log.
func TestContainerExitingMsg(t *testing.T) {
	th := shared(t)
	post(t, th, service("exiting", image("crasher")))
	const words = "crasher: cannot open the database"
	c := condition[*api.Revision](t, th, "exiting-00001", "ContainerHealthy", "False")
	if c.Reason != "ExitCode3" || !strings.Contains(c.Message, words) {
		t.Errorf("revision: %+v", c)
	}
	if c := condition[*api.Configuration](t, th, "exiting", "Ready", "False"); c.Reason != "RevisionFailed" || !strings.Contains(c.Message, words) {
		t.Errorf("configuration: %+v", c)
	}
	if c := condition[*api.Service](t, th, "exiting", "Ready", "False"); c.Reason != "RevisionFailed" || !strings.Contains(c.Message, words) {
		t.Errorf("service: %+v", c)
	}
	code, out, errs := th.Verb("", "logs", "exiting")
	if code != 0 || !strings.Contains(out, words) {
		t.Errorf("thaw logs: %d %q %q", code, out, errs)
	}
}
