package reconcile

import (
	"slices"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// The tests in this file say about objects what Knative's own conformance and end-to-end tests assert about a cluster. Each
// is named after the one it mirrors.

// test/conformance/api/v1/service_test.go
func TestServiceCreateListAndDelete(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "exec:///bin/hello"))
		s := h.service("hello")
		for _, typ := range []string{"Ready", "ConfigurationsReady", "RoutesReady"} {
			h.wantCondition(s, typ, "True")
		}
		if s.Status.ObservedGeneration != 1 || s.Status.LatestCreatedRevisionName != "hello-00001" || s.Status.LatestReadyRevisionName != "hello-00001" {
			t.Errorf("status %+v", s.Status)
		}
		if s.Status.URL != "http://hello.default.localhost" || s.Status.Address.URL != "http://hello.default.svc.cluster.local" {
			t.Errorf("url %q, address %v", s.Status.URL, s.Status.Address)
		}
		h.wantTraffic(s.Status.Traffic, "latest:hello-00001=100")

		cfg, rt, rev := h.config("hello"), h.route("hello"), h.revision("hello-00001")
		if !owns(s, cfg) || !owns(s, rt) || !owns(cfg, rev) {
			t.Error("owners are wrong")
		}
		if rev.Labels["serving.knative.dev/service"] != "hello" || rev.Labels["serving.knative.dev/serviceUID"] != s.UID ||
			rev.Labels["serving.knative.dev/configuration"] != "hello" || rev.Labels["serving.knative.dev/configurationUID"] != cfg.UID ||
			rev.Labels["serving.knative.dev/configurationGeneration"] != "1" || rev.Labels["serving.knative.dev/routingState"] != "active" {
			t.Errorf("labels %v", rev.Labels)
		}
		if _, err := time.Parse(time.RFC3339, rev.Annotations["serving.knative.dev/routingStateModified"]); err != nil || rev.Annotations["serving.knative.dev/routes"] != "hello" {
			t.Errorf("annotations %v", rev.Annotations)
		}
		if cfg.Labels["serving.knative.dev/service"] != "hello" || rt.Labels["serving.knative.dev/service"] != "hello" {
			t.Errorf("labels %v and %v", cfg.Labels, rt.Labels)
		}
		if rt.Spec.Traffic[0].ConfigurationName != "hello" {
			t.Errorf("route spec %+v", rt.Spec)
		}
		for _, o := range []api.Object{cfg, rt, rev} {
			h.wantCondition(o, "Ready", "True")
			if api.StatusOf(o).ObservedGeneration != o.Meta().Generation {
				t.Errorf("%s: observed generation %d of %d", o.Type().Kind, api.StatusOf(o).ObservedGeneration, o.Meta().Generation)
			}
		}
		if len(rev.Status.ContainerStatuses) != 1 || rev.Status.ContainerStatuses[0].ImageDigest == "" {
			t.Errorf("container statuses %+v", rev.Status.ContainerStatuses)
		}

		h.delete(api.Services, "hello")
		h.missing(api.Configurations, "hello")
		h.missing(api.Routes, "hello")
		h.missing(api.Revisions, "hello-00001")
		h.wantHost("hello.default.localhost", "")
		if !slices.Equal(h.p.gone(), []api.RevisionID{"default/hello-00001"}) {
			t.Errorf("removed %v", h.p.gone())
		}
	})
}

func TestServiceCreateAndUpdate(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "one"))
		h.update("hello", image("two"))
		s := h.service("hello")
		h.wantCondition(s, "Ready", "True")
		h.wantTraffic(s.Status.Traffic, "latest:hello-00002=100")
		h.wantHost("hello.default.localhost", "hello-00002=100")

		// Annotations and labels of the template are part of it: a new revision. Those of the service are not.
		h.update("hello", annotated("example.com/x", "1"))
		if got := h.service("hello").Status.LatestReadyRevisionName; got != "hello-00003" {
			t.Errorf("latest is %s", got)
		}
		h.update("hello", func(s *api.Service) {
			s.Labels, s.Annotations = map[string]string{"team": "a"}, map[string]string{"example.com/y": "2"}
		})
		s = h.service("hello")
		h.wantCondition(s, "Ready", "True")
		if got := s.Status.LatestCreatedRevisionName; got != "hello-00003" || s.Generation != 3 {
			t.Errorf("metadata made revision %s, generation %d", got, s.Generation)
		}
		if rt := h.route("hello"); rt.Labels["team"] != "a" || rt.Annotations["example.com/y"] != "2" {
			t.Errorf("route has %v %v", rt.Labels, rt.Annotations)
		}
		if got := h.revision("hello-00001").Labels[api.LabelRoutingState]; got != "reserve" {
			t.Errorf("old revision is %s", got)
		}
	})
}

func TestServiceBYOName(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "one", named("hello-byo", "one")))
		h.wantTraffic(h.service("hello").Status.Traffic, "latest:hello-byo=100")

		// The same name with another spec: refused, and the old one goes on.
		h.update("hello", image("two"))
		s := h.service("hello")
		h.wantCondition(s, "Ready", "False")
		h.wantCondition(s, "ConfigurationsReady", `False RevisionFailed Revision creation failed with message: revisions.serving.knative.dev "hello-byo" already exists.`)
		h.wantCondition(s, "RoutesReady", "False RevisionNameTaken")
		h.wantHost("hello.default.localhost", "hello-byo=100")
		if got := h.revision("hello-byo").Spec.Containers[0].Image; got != "one" {
			t.Errorf("image is %s now", got)
		}

		// A new name heals it; the old name with its old spec rolls back.
		h.update("hello", named("hello-byo2", "two"))
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantHost("hello.default.localhost", "hello-byo2=100")
		h.update("hello", named("hello-byo", "one"))
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantTraffic(h.service("hello").Status.Traffic, "latest:hello-byo=100")
		h.wantHost("hello.default.localhost", "hello-byo=100")

		// And a broken next one must not bring the one in between back.
		h.img.set("three", "no such file")
		h.update("hello", named("hello-byo3", "three"))
		h.wantHost("hello.default.localhost", "hello-byo=100")
		if got := h.service("hello").Status.LatestReadyRevisionName; got != "hello-byo" {
			t.Errorf("latest ready is %s", got)
		}
	})
}

// TestServiceWithTrafficSplit is TestServiceWithTrafficSplit: latest, pinned, candidate, tagged with 0 %.
func TestServiceWithTrafficSplit(t *testing.T) {
	inHouse(t, func(h *house) {
		// 1. One revision, everything on latest, tagged.
		h.create(service("hello", "one", traffic("latest=100#latest")))
		s := h.service("hello")
		h.wantTraffic(s.Status.Traffic, "latest:hello-00001=100#latest")
		if got := s.Status.Traffic[0].URL; got != "http://latest-hello.default.localhost" {
			t.Errorf("tag url %q", got)
		}

		// 2. Pinned to the first: current and latest, 100 and 0.
		h.update("hello", traffic("hello-00001=100#current", "latest=0#latest"))
		s = h.service("hello")
		h.wantCondition(s, "Ready", "True")
		h.wantTraffic(s.Status.Traffic, "hello-00001=100#current", "latest:hello-00001=0#latest")

		// 3. A second revision: latest moves, the traffic does not.
		h.update("hello", image("two"))
		s = h.service("hello")
		h.wantCondition(s, "Ready", "True")
		h.wantTraffic(s.Status.Traffic, "hello-00001=100#current", "latest:hello-00002=0#latest")
		h.wantHost("hello.default.localhost", "hello-00001=100 current:hello-00001 latest:hello-00002")
		h.wantHost("current-hello.default.localhost", "hello-00001=100 tag:current")
		h.wantHost("latest-hello.default.localhost", "hello-00002=100 tag:latest")

		// 4. The second as candidate with 20 %.
		h.update("hello", traffic("hello-00001=80#current", "hello-00002=20#candidate", "latest=0#latest"))
		s = h.service("hello")
		h.wantTraffic(s.Status.Traffic, "hello-00001=80#current", "hello-00002=20#candidate", "latest:hello-00002=0#latest")
		h.wantHost("hello.default.localhost", "hello-00001=80 hello-00002=20 candidate:hello-00002 current:hello-00001 latest:hello-00002")
		h.wantHost("candidate-hello.default.localhost", "hello-00002=100 tag:candidate")

		// 5. A third: only the tag host of latest sees it.
		h.update("hello", image("three"))
		s = h.service("hello")
		h.wantCondition(s, "Ready", "True")
		h.wantTraffic(s.Status.Traffic, "hello-00001=80#current", "hello-00002=20#candidate", "latest:hello-00003=0#latest")
		h.wantHost("latest-hello.default.localhost", "hello-00003=100 tag:latest")

		// 6. The candidate wins; the tags that are gone have no host any more.
		h.update("hello", traffic("hello-00002=100"))
		h.wantTraffic(h.service("hello").Status.Traffic, "hello-00002=100")
		h.wantHost("hello.default.localhost", "hello-00002=100")
		h.wantHost("candidate-hello.default.localhost", "")
		h.wantHost("latest-hello.default.svc.cluster.local", "")
	})
}

// test/conformance/api/v1/generatename_test.go
func TestServiceGenerateName(t *testing.T) {
	inHouse(t, func(h *house) {
		s := service("", "one", func(s *api.Service) { s.GenerateName = "gen-" })
		n := h.create(s).Meta().Name
		h.wantCondition(h.service(n), "Ready", "True")
		h.wantHost(n+".default.localhost", n+"-00001=100")
	})
}

func TestRouteAndConfigGenerateName(t *testing.T) {
	inHouse(t, func(h *house) {
		cfg := &api.Configuration{ObjectMeta: api.ObjectMeta{Namespace: ns, GenerateName: "config-"}}
		cfg.Spec.Template.Spec.Containers = []api.Container{{Image: "one"}}
		api.SetDefaults(cfg)
		n := h.create(cfg).Meta().Name
		rt := &api.Route{ObjectMeta: api.ObjectMeta{Namespace: ns, GenerateName: "route-"}}
		rt.Spec.Traffic = targetsOf("latest=100")
		rt.Spec.Traffic[0].ConfigurationName = n
		api.SetDefaults(rt)
		rn := h.create(rt).Meta().Name
		h.wantCondition(h.route(rn), "Ready", "True")
		h.wantHost(rn+".default.localhost", n+"-00001=100")
		if l := h.revision(n + "-00001").Labels; l[api.LabelService] != "" || l[api.LabelConfiguration] != n {
			t.Errorf("labels %v", l)
		}
	})
}

// test/conformance/api/v1/errorcondition_test.go
func TestContainerErrorMsg(t *testing.T) {
	inHouse(t, func(h *house) {
		h.img.set("nope", "manifest unknown")
		h.create(service("hello", "nope"))
		const want = `Unable to fetch image "nope": manifest unknown`
		rev := h.revision("hello-00001")
		h.wantCondition(rev, "ContainerHealthy", "False ContainerMissing "+want)
		h.wantCondition(rev, "ResourcesAvailable", "False ContainerMissing "+want)
		h.wantCondition(rev, "Ready", "False ContainerMissing "+want)
		h.wantCondition(h.config("hello"), "Ready", `False RevisionFailed Revision "hello-00001" failed with message: `+want)
		h.wantCondition(h.route("hello"), "AllTrafficAssigned", `False RevisionMissing Configuration "hello" does not have any ready Revision.`)
		h.wantCondition(h.service("hello"), "Ready", "False RevisionFailed")
		h.wantHost("hello.default.localhost", "")
		if rev.Status.ContainerStatuses != nil || len(h.p.known()) != 0 {
			t.Errorf("statuses %v, platform %v", rev.Status.ContainerStatuses, h.p)
		}

		// It heals once the image is there, without anybody's help.
		h.img.set("nope", "")
		h.sleep(3 * time.Second)
		h.wantCondition(h.service("hello"), "Ready", "True")
	})
}

func TestContainerExitingMsg(t *testing.T) {
	inHouse(t, func(h *house) {
		h.p.setAuto(false)
		h.create(service("hello", "one"))
		fail := func(n int) {
			h.p.tell("default/hello-00001", 0, 1, &endpoints.Failure{Reason: "ExitCode5", Message: "exit status 5: could not read config", Count: n})
			h.sleep(0)
		}
		fail(1)
		fail(2)
		h.wantCondition(h.revision("hello-00001"), "Ready", "Unknown Deploying")
		h.wantCondition(h.revision("hello-00001"), "ContainerHealthy", "Unknown Deploying Container failed with: exit status 5: could not read config")
		fail(3)
		rev := h.revision("hello-00001")
		h.wantCondition(rev, "ContainerHealthy", "False ExitCode5 Container failed with: exit status 5: could not read config")
		h.wantCondition(rev, "Ready", "False ExitCode5")
		h.wantCondition(h.config("hello"), "Ready", `False RevisionFailed Revision "hello-00001" failed with message: Container failed with: exit status 5`)
		h.wantCondition(h.service("hello"), "ConfigurationsReady", `False RevisionFailed Revision "hello-00001" failed with message: `)
		h.wantHost("hello.default.localhost", "")

		// Not final: an instance that gets ready after all is the proof of the contrary.
		h.p.tell("default/hello-00001", 1, 1, nil)
		h.sleep(0)
		h.wantCondition(h.service("hello"), "Ready", "True")
	})
}

func TestContainerStartFailed(t *testing.T) { // no Knative test has it: a program that cannot be executed fails at once
	inHouse(t, func(h *house) {
		h.p.breakImage("one", endpoints.Failure{Reason: "StartFailed", Message: "fork/exec /bin/nope: no such file or directory", Count: 1})
		h.create(service("hello", "one"))
		h.wantCondition(h.revision("hello-00001"), "Ready", "False StartFailed Container failed with: fork/exec /bin/nope")
	})
}

// test/conformance/api/v1/blue_green_test.go
func TestBlueGreenRoute(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("bg", "blue", traffic("latest=100#blue")))
		h.update("bg", image("green"))
		h.update("bg", traffic("bg-00001=50#blue", "bg-00002=50#green"))
		s := h.service("bg")
		h.wantCondition(s, "Ready", "True")
		h.wantTraffic(s.Status.Traffic, "bg-00001=50#blue", "bg-00002=50#green")
		h.wantHost("bg.default.localhost", "bg-00001=50 bg-00002=50 blue:bg-00001 green:bg-00002")
		h.wantHost("blue-bg.default.localhost", "bg-00001=100 tag:blue")
		h.wantHost("green-bg.default.localhost", "bg-00002=100 tag:green")
		if u := s.Status.Traffic[1].URL; u != "http://green-bg.default.localhost" {
			t.Errorf("url %q", u)
		}
		for _, n := range []string{"bg-00001", "bg-00002"} {
			if got := h.revision(n).Labels[api.LabelRoutingState]; got != "active" {
				t.Errorf("%s is %s", n, got)
			}
		}
	})
}

// test/conformance/api/v1/route_test.go
func TestRouteCreation(t *testing.T) {
	inHouse(t, func(h *house) {
		rt := &api.Route{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: "way"}}
		rt.Spec.Traffic = targetsOf("latest=100")
		rt.Spec.Traffic[0].ConfigurationName = "code"
		api.SetDefaults(rt)
		h.create(rt)
		h.wantCondition(h.route("way"), "AllTrafficAssigned", `False ConfigurationMissing Configuration "code" referenced in traffic not found.`)
		h.wantCondition(h.route("way"), "IngressReady", "Unknown IngressNotConfigured")

		cfg := &api.Configuration{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: "code"}}
		cfg.Spec.Template.Spec.Containers = []api.Container{{Image: "one"}}
		api.SetDefaults(cfg)
		h.create(cfg)
		h.wantCondition(h.route("way"), "Ready", "True")
		h.wantTraffic(h.route("way").Status.Traffic, "latest:code-00001=100")
		h.wantHost("way.default.localhost", "code-00001=100")
		if got := h.revision("code-00001").Annotations["serving.knative.dev/routes"]; got != "way" {
			t.Errorf("routes annotation %q", got)
		}

		next := h.config("code")
		next.Spec.Template.Spec.Containers[0].Image = "two"
		if _, err := h.store.Update(h.ctx, api.Configurations, next); err != nil {
			t.Fatal(err)
		}
		h.sleep(0)
		h.wantTraffic(h.route("way").Status.Traffic, "latest:code-00002=100")
		h.wantCondition(h.route("way"), "Ready", "True")
	})
}

// pkg/reconciler/route: a target that is missing or not ready blocks the whole new assignment.
func TestRouteBlockedByUnreadyTarget(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "one"))
		h.update("hello", traffic("hello-00001=50", "hello-00009=50"))
		s := h.service("hello")
		h.wantCondition(s, "RoutesReady", `False RevisionMissing Revision "hello-00009" referenced in traffic not found.`)
		h.wantCondition(s, "ConfigurationsReady", "True")
		h.wantHost("hello.default.localhost", "hello-00001=100")

		h.p.setAuto(false)
		h.update("hello", func(s *api.Service) {
			image("two")(s)
			traffic("hello-00001=50", "hello-00002=50")(s)
		})
		h.wantCondition(h.route("hello"), "AllTrafficAssigned", `Unknown RevisionMissing Revision "hello-00002" is not yet ready.`)
		h.wantHost("hello.default.localhost", "hello-00001=100")
		h.p.tell("default/hello-00002", 1, 1, nil)
		h.sleep(0)
		h.wantHost("hello.default.localhost", "hello-00001=50 hello-00002=50")
		h.wantCondition(h.service("hello"), "Ready", "True")
	})
}

// test/conformance/api/v1/configuration_test.go
func TestUpdateConfigurationMetadata(t *testing.T) {
	inHouse(t, func(h *house) {
		cfg := &api.Configuration{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: "code"}}
		cfg.Spec.Template.Spec.Containers = []api.Container{{Image: "one"}}
		api.SetDefaults(cfg)
		h.create(cfg)
		next := h.config("code")
		next.Labels = map[string]string{"labelX": "abc"}
		next.Annotations = map[string]string{"annotationA": "123"}
		if _, err := h.store.Update(h.ctx, api.Configurations, next); err != nil {
			t.Fatal(err)
		}
		h.sleep(0)
		if got := h.names(api.Revisions); !slices.Equal(got, []string{"code-00001"}) {
			t.Errorf("revisions %v", got)
		}
		if rev := h.revision("code-00001"); rev.Labels["labelX"] != "" || rev.Annotations["annotationA"] != "" {
			t.Errorf("the revision got the configuration's own metadata: %v %v", rev.Labels, rev.Annotations)
		}
	})
}

// A bad revision never takes traffic from a good one.
func TestBadRevisionTakesNoTraffic(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "one"))
		h.p.breakImage("crash", endpoints.Failure{Reason: "ExitCode1", Message: "panic: no", Count: 3})
		h.update("hello", image("crash"))
		s := h.service("hello")
		h.wantCondition(s, "Ready", `False RevisionFailed Revision "hello-00002" failed with message: Container failed with: panic: no`)
		h.wantCondition(s, "RoutesReady", "True")
		if s.Status.LatestReadyRevisionName != "hello-00001" || s.Status.LatestCreatedRevisionName != "hello-00002" {
			t.Errorf("status %+v", s.Status.ConfigurationStatusFields)
		}
		h.wantTraffic(s.Status.Traffic, "latest:hello-00001=100")
		h.wantHost("hello.default.localhost", "hello-00001=100")
		h.update("hello", image("good"))
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantHost("hello.default.localhost", "hello-00003=100")
		if got := h.revision("hello-00002").Labels[api.LabelRoutingState]; got != "reserve" {
			t.Errorf("the bad revision, overtaken, is %s", got)
		}
	})
}

// An older revision that gets ready late does not take over from a newer one.
func TestLatestReadyGoesInOrder(t *testing.T) {
	inHouse(t, func(h *house) {
		h.p.setAuto(false)
		h.create(service("hello", "one"))
		h.update("hello", image("two"))
		h.p.tell("default/hello-00002", 1, 1, nil)
		h.sleep(0)
		h.wantHost("hello.default.localhost", "hello-00002=100")
		h.p.tell("default/hello-00001", 1, 1, nil)
		h.sleep(0)
		if got := h.service("hello").Status.LatestReadyRevisionName; got != "hello-00002" {
			t.Errorf("latest ready is %s", got)
		}
		h.wantHost("hello.default.localhost", "hello-00002=100")
	})
}

// test/e2e/initscale
func TestInitScaleZero(t *testing.T) {
	inHouse(t, func(h *house) {
		h.p.setAuto(false)
		h.create(service("hello", "one", annotated("autoscaling.knative.dev/initial-scale", "0")))
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantHost("hello.default.localhost", "hello-00001=100")
	})
}

// test/e2e/initial_scale_test.go and minscale_readiness_test.go
func TestInitScalePositive(t *testing.T) {
	for _, suffix := range []string{"initial-scale", "initialScale", "min-scale"} {
		t.Run(suffix, func(t *testing.T) {
			inHouse(t, func(h *house) {
				h.p.setAuto(false)
				h.create(service("hello", "one", annotated("autoscaling.knative.dev/"+suffix, "3")))
				h.p.tell("default/hello-00001", 2, 3, nil)
				h.sleep(0)
				h.wantCondition(h.revision("hello-00001"), "Ready", "Unknown Deploying")
				h.p.tell("default/hello-00001", 3, 3, nil)
				h.sleep(0)
				h.wantCondition(h.service("hello"), "Ready", "True")
			})
		})
	}
}

// pkg/reconciler/revision: the progress deadline.
func TestProgressDeadline(t *testing.T) {
	inHouse(t, func(h *house) {
		h.p.setAuto(false)
		h.create(service("slow", "one"))
		h.create(service("quick", "one", annotated("serving.knative.dev/progress-deadline", "30s")))
		h.sleep(31 * time.Second)
		h.wantCondition(h.revision("quick-00001"), "Ready", "False ProgressDeadlineExceeded Initial scale was never achieved")
		h.wantCondition(h.revision("slow-00001"), "Ready", "Unknown Deploying")
		h.p.tell("default/slow-00001", 0, 1, &endpoints.Failure{Reason: "ExitCode2", Message: "out of luck", Count: 1})
		h.sleep(600 * time.Second)
		h.wantCondition(h.revision("slow-00001"), "ContainerHealthy", "False ExitCode2 Container failed with: out of luck")
		h.wantCondition(h.revision("slow-00001"), "Ready", "False")
	})
}

// A revision that was ready is so for ever: neither zero instances nor later crashes change that.
func TestReadyStaysThroughScaleToZero(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "one"))
		h.p.tell("default/hello-00001", 0, 0, nil)
		h.r.ObserveScale("default/hello-00001", 0, false)
		h.sleep(2 * time.Second)
		rev := h.revision("hello-00001")
		h.wantCondition(rev, "Ready", "True")
		h.wantCondition(rev, "Active", "False NoTraffic The target is not receiving traffic.")
		if v := rev.Status.Conditions.Get("Active"); v.Severity != "Info" {
			t.Errorf("severity %q", v.Severity)
		}
		if *rev.Status.ActualReplicas != 0 || *rev.Status.DesiredReplicas != 0 {
			t.Errorf("replicas %v of %v", *rev.Status.ActualReplicas, *rev.Status.DesiredReplicas)
		}
		h.r.ObserveScale("default/hello-00001", 1, true)
		h.p.tell("default/hello-00001", 0, 1, &endpoints.Failure{Reason: "ExitCode1", Message: "bang", Count: 9})
		h.sleep(2 * time.Second)
		rev = h.revision("hello-00001")
		h.wantCondition(rev, "Ready", "True")
		h.wantCondition(rev, "Active", "Unknown ExitCode1 bang")
		h.wantHost("hello.default.localhost", "hello-00001=100")
		h.wantCondition(h.service("hello"), "Ready", "True")
	})
}

// test/conformance/api/v1beta1/domain_mapping_test.go and test/e2e/domainmapping
func TestDomainMapping(t *testing.T) {
	inHouseWith(t, Config{URLPort: 8080}, func(h *house) {
		dm := func(namespace, host, service string) *api.DomainMapping {
			m := &api.DomainMapping{ObjectMeta: api.ObjectMeta{Namespace: namespace, Name: host}}
			m.Spec.Ref = api.Reference{Kind: "Service", APIVersion: "serving.knative.dev/v1", Name: service, Namespace: namespace}
			return m
		}
		mapping := func(namespace, host string) *api.DomainMapping {
			o, err := h.store.Get(h.ctx, api.DomainMappings, namespace, host)
			if err != nil {
				t.Fatal(err)
			}
			return o.(*api.DomainMapping)
		}
		h.create(dm(ns, "www.example.com", "hello"))
		m := mapping(ns, "www.example.com")
		h.wantCondition(m, "ReferenceResolved", `False ResolveFailed services.serving.knative.dev "hello" not found`)
		h.wantCondition(m, "DomainClaimed", "True")
		h.wantCondition(m, "Ready", "False ResolveFailed")

		h.create(service("hello", "one", traffic("latest=100#now")))
		m = mapping(ns, "www.example.com")
		for _, typ := range []string{"CertificateProvisioned", "DomainClaimed", "IngressReady", "ReferenceResolved", "Ready"} {
			h.wantCondition(m, typ, "True")
		}
		h.wantCondition(m, "CertificateProvisioned", "True TLSNotEnabled")
		if m.Status.URL != "http://www.example.com:8080" || m.Status.ObservedGeneration != 1 {
			t.Errorf("status %+v", m.Status)
		}
		h.wantHost("www.example.com", "hello-00001=100 now:hello-00001")

		// A second namespace wants the same host: the first keeps it, and when it goes the second gets it.
		h.sleep(time.Minute)
		other := service("shop", "two")
		other.Namespace = "alpha" // before "default" by name, but later
		h.create(other)
		h.create(dm("alpha", "www.example.com", "shop"))
		h.wantCondition(mapping("alpha", "www.example.com"), "DomainClaimed", "False DomainAlreadyClaimed")
		h.wantCondition(mapping("alpha", "www.example.com"), "Ready", "False DomainAlreadyClaimed")
		h.wantHost("www.example.com", "hello-00001=100 now:hello-00001")
		h.delete(api.DomainMappings, "www.example.com")
		h.wantCondition(mapping("alpha", "www.example.com"), "Ready", "True")
		h.wantHost("www.example.com", "shop-00001=100")

		// A mapping follows its service.
		h.create(dm(ns, "hello.example.com", "hello"))
		h.update("hello", image("two"))
		h.wantHost("hello.example.com", "hello-00002=100 now:hello-00002")

		// A host of a route cannot be taken, in either order.
		h.create(dm(ns, "hello.default.localhost", "hello"))
		h.wantCondition(mapping(ns, "hello.default.localhost"), "DomainClaimed", "False DomainAlreadyClaimed")
		h.create(dm(ns, "late.default.localhost", "hello"))
		h.wantHost("late.default.localhost", "hello-00002=100 now:hello-00002")
		h.create(service("late", "three"))
		h.wantHost("late.default.localhost", "late-00001=100")
		h.wantCondition(mapping(ns, "late.default.localhost"), "DomainClaimed", "False DomainAlreadyClaimed")
		h.delete(api.Services, "late")
		h.wantHost("late.default.localhost", "hello-00002=100 now:hello-00002")
		h.wantCondition(mapping(ns, "late.default.localhost"), "Ready", "True")

		h.delete(api.Services, "hello")
		h.wantHost("hello.example.com", "")
		h.wantCondition(mapping(ns, "hello.example.com"), "ReferenceResolved", "False ResolveFailed")
	})
}

// test/e2e/subroutes_test.go and pkg/reconciler/route/visibility
func TestClusterLocalVisibility(t *testing.T) {
	inHouseWith(t, Config{URLPort: 8080}, func(h *house) {
		h.create(service("hello", "one", traffic("latest=100#now")))
		if got := h.service("hello").Status.URL; got != "http://hello.default.localhost:8080" {
			t.Errorf("url %q", got)
		}
		public := []string{"hello.default.localhost", "now-hello.default.localhost"}
		private := []string{"hello.default", "hello.default.svc", "hello.default.svc.cluster.local",
			"now-hello.default", "now-hello.default.svc", "now-hello.default.svc.cluster.local"}
		if got := h.p.hosts(); !slices.Equal(got, slices.Sorted(slices.Values(append(public, private...)))) {
			t.Errorf("hosts %v", got)
		}
		h.wantHost("hello.default.svc.cluster.local", "hello-00001=100 now:hello-00001")
		h.update("hello", func(s *api.Service) {
			s.Labels = map[string]string{"networking.knative.dev/visibility": "cluster-local"}
		})
		s := h.service("hello")
		h.wantCondition(s, "Ready", "True")
		if s.Status.URL != "http://hello.default.svc.cluster.local" || s.Status.Traffic[0].URL != "http://now-hello.default.svc.cluster.local" {
			t.Errorf("urls %q and %q", s.Status.URL, s.Status.Traffic[0].URL)
		}
		if got := h.p.hosts(); !slices.Equal(got, slices.Sorted(slices.Values(private))) {
			t.Errorf("hosts %v", got)
		}
		h.wantHost("hello.default", "hello-00001=100 now:hello-00001 local")
		h.update("hello", func(s *api.Service) { s.Labels = nil })
		h.wantHost("hello.default.localhost", "hello-00001=100 now:hello-00001")
	})
}

// pkg/reconciler/service: a configuration that is somebody else's.
func TestServiceWithForeignChildren(t *testing.T) {
	inHouse(t, func(h *house) {
		cfg := &api.Configuration{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: "hello"}}
		cfg.Spec.Template.Spec.Containers = []api.Container{{Image: "mine"}}
		api.SetDefaults(cfg)
		h.create(cfg)
		h.create(service("hello", "one"))
		h.wantCondition(h.service("hello"), "Ready", `False NotOwned There is an existing Configuration "hello" that we do not own.`)
		if got := h.config("hello").Spec.Template.Spec.Containers[0].Image; got != "mine" {
			t.Errorf("the image is %s now", got)
		}
		h.delete(api.Configurations, "hello")
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantHost("hello.default.localhost", "hello-00001=100")
	})
}

// Deleted and made again under the same name at once: nothing of the old one is left.
func TestServiceRecreate(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "one"))
		old := h.revision("hello-00001")
		if _, err := h.store.Delete(h.ctx, api.Services, ns, "hello", "", ""); err != nil {
			t.Fatal(err)
		}
		h.create(service("hello", "two"))
		s := h.service("hello")
		h.wantCondition(s, "Ready", "True")
		rev := h.revision("hello-00001")
		if rev.UID == old.UID || rev.Spec.Containers[0].Image != "two" || !owns(h.config("hello"), rev) {
			t.Errorf("revision %+v", rev)
		}
		h.wantHost("hello.default.localhost", "hello-00001=100")
		if got := h.p.revision("default/hello-00001"); got == nil || got.UID != rev.UID {
			t.Errorf("the platform has %v", got)
		}
	})
}
