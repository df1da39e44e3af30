package knative

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

// replicas is how many instances of a revision are ready, as the autoscaler sees it.
func replicas(th *harness.Thaw, revision string) int {
	n, _, _, _ := th.Scale(revision)
	return n
}

// test/e2e/initscale/initial_scale_test.go. Zero is allowed by default (listed difference).
func TestInitScaleZero(t *testing.T) {
	th := shared(t)
	s := create(t, th, service("init-zero", scaling("initial-scale", "0")))
	if s.Status.LatestReadyRevisionName != "init-zero-00001" || len(pids(th, "init-zero-00001")) != 0 {
		t.Errorf("status %+v, processes %v", s.Status, pids(th, "init-zero-00001"))
	}
	if c := condition[*api.Revision](t, th, "init-zero-00001", "Active", "False"); c.Reason != "NoTraffic" || c.Severity != "Info" {
		t.Errorf("%+v", c)
	}
	if got := see(t, th, "init-zero"); got.Env["K_REVISION"] != "init-zero-00001" {
		t.Errorf("%v", got.Env)
	}
	condition[*api.Revision](t, th, "init-zero-00001", "Active", "True")
}

func TestInitScalePositive(t *testing.T) {
	th := shared(t)
	create(t, th, service("init-one"))
	if n := len(pids(th, "init-one-00001")); n != 1 {
		t.Errorf("%d instances at Ready, want 1", n)
	}
	create(t, th, service("init-three", scaling("initial-scale", "3")))
	if n := len(pids(th, "init-three-00001")); n != 3 {
		t.Errorf("%d instances at Ready, want 3", n)
	}
	// It holds for the start only.
	harness.Eventually(t, 2*patient, "nothing is left of three idle instances", func() bool { return len(pids(th, "init-three-00001")) == 0 })
}

// test/e2e/minscale_readiness_test.go: ready means that as many run, they stay, and an older revision's go.
func TestMinScaleReadiness(t *testing.T) {
	th := shared(t)
	create(t, th, service("min", scaling("min-scale", "3")))
	if n := len(pids(th, "min-00001")); n != 3 {
		t.Errorf("%d instances at Ready, want 3", n)
	}
	update(t, th, "min", env("V", "2"))
	if n := len(pids(th, "min-00002")); n != 3 {
		t.Errorf("%d instances of the new revision at Ready, want 3", n)
	}
	harness.Eventually(t, 2*patient, "the old revision has no instances", func() bool { return len(pids(th, "min-00001")) == 0 })
	if n := replicas(th, "min-00002"); n != 3 {
		t.Errorf("%d instances of the new revision stayed, want 3", n)
	}
	harness.Eventually(t, patient, "the status tells the numbers", func() bool {
		st := get[*api.Revision](t, th, "min-00002").Status
		return st.ActualReplicas != nil && *st.ActualReplicas == 3 && st.DesiredReplicas != nil && *st.DesiredReplicas == 3
	})
}

// test/e2e/autoscale_test.go (TestActivationScale): one request from zero starts that many.
func TestActivationScale(t *testing.T) {
	th := shared(t)
	create(t, th, service("activation", scaling("initial-scale", "0"), scaling("activation-scale", "3")))
	see(t, th, "activation")
	harness.Eventually(t, patient, "three instances for one request", func() bool { return len(pids(th, "activation-00001")) == 3 })
}

// max-scale holds whatever comes.
func TestMaxScale(t *testing.T) {
	th := shared(t)
	create(t, th, service("max", image("checker"), func(s *api.Service) { s.Spec.Template.Spec.ContainerConcurrency = ptr(int64(1)) }, scaling("initial-scale", "0"), scaling("max-scale", "2")))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if a := th.Get("max", "/?sleep=50"); a.Status != 200 {
				t.Errorf("%v", a)
			}
		})
	}
	for range 40 {
		if n := len(pids(th, "max-00001")); n > 2 {
			t.Errorf("%d instances", n)
		}
		time.Sleep(10 * time.Millisecond)
	}
	wg.Wait()
}

// Zero instances are no failure: Service, Configuration, Route and Revision stay Ready, and the next request is answered.
func TestScaleToZeroKeepsReady(t *testing.T) {
	th := shared(t)
	create(t, th, service("tozero"))
	first := see(t, th, "tozero")
	if c := condition[*api.Revision](t, th, "tozero-00001", "Active", "False"); c.Reason != "NoTraffic" {
		t.Errorf("%+v", c)
	}
	harness.Eventually(t, patient, "no process is left", func() bool { return len(pids(th, "tozero-00001")) == 0 })
	condition[*api.Revision](t, th, "tozero-00001", "Ready", "True")
	condition[*api.Configuration](t, th, "tozero", "Ready", "True")
	condition[*api.Route](t, th, "tozero", "Ready", "True")
	condition[*api.Service](t, th, "tozero", "Ready", "True")
	if got := see(t, th, "tozero"); got.instance() == first.instance() {
		t.Error("the same instance answers")
	}
}

// inFlight starts a request of 3 s and returns when the function has it, and a function that waits for the answer.
func inFlight(t *testing.T, th *harness.Thaw, host, revision string) (wait func() harness.Answer) {
	t.Helper()
	answers := make(chan harness.Answer, 1)
	go func() { answers <- th.Get(host, "/?sleep=3000") }()
	harness.Eventually(t, patient, "the request is with the function", func() bool {
		s, err := th.Client.Scale(t.Context(), ns, revision)
		if err != nil {
			t.Fatal(err)
		}
		return s["running"] == 1.0
	})
	return func() harness.Answer { return <-answers }
}

// test/e2e/destroypod_test.go: a request of 3 s ends well although its service is deleted, and then the instance ends.
func TestDestroyInFlight(t *testing.T) {
	th := shared(t)
	create(t, th, service("destroyed", image("checker")))
	wait := inFlight(t, th, "destroyed", "destroyed-00001")
	if err := th.Client.Delete(t.Context(), api.Services, ns, "destroyed"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, patient, "the revision is gone", func() bool {
		_, err := th.Client.Get(t.Context(), api.Revisions, ns, "destroyed-00001")
		return errors.Is(err, client.ErrNotFound)
	})
	if a := wait(); a.Status != 200 || a.Err != nil || a.Took < 3*time.Second {
		t.Errorf("%v after %v", a, a.Took)
	}
	harness.Eventually(t, patient, "the instance is gone", func() bool { return len(pids(th, "destroyed-00001")) == 0 })
}

// The same when a new revision takes over and the old one goes to zero.
func TestScaleInInFlight(t *testing.T) {
	th := shared(t)
	create(t, th, service("scalein", image("checker"), scaling("min-scale", "3")))
	wait := inFlight(t, th, "scalein", "scalein-00001")
	update(t, th, "scalein", env("V", "2"), scaling("min-scale", "0"))
	if a := th.Get("scalein", "/"); a.Status != 200 || a.Header.Get("X-Checker-In-Flight") != "1" {
		t.Errorf("the new revision: %v", a)
	}
	if a := wait(); a.Status != 200 || a.Err != nil || a.Took < 3*time.Second {
		t.Errorf("%v after %v", a, a.Took)
	}
	harness.Eventually(t, 2*patient, "the old instances are gone", func() bool { return len(pids(th, "scalein-00001")) == 0 })
}

// test/e2e/rollout_test.go with a short duration: meanwhile both serve, the share of the new one only grows, and no request fails.
func TestRollout(t *testing.T) {
	th := shared(t)
	create(t, th, service("rollout", env("V", "1"), func(s *api.Service) { s.Annotations = map[string]string{"serving.knative.dev/rollout-duration": "4s"} }))
	replace(t, th, "rollout", env("V", "2"))
	begin := time.Now()
	var last int64
	var steps []string
	harness.Eventually(t, 2*patient, "all is on the new revision", func() bool {
		see(t, th, "rollout") // fails if it is not 200
		r := get[*api.Route](t, th, "rollout")
		var share, sum int64
		for _, x := range r.Status.Traffic {
			if x.Percent != nil {
				sum += *x.Percent
				if x.RevisionName == "rollout-00002" {
					share += *x.Percent
				}
			}
		}
		if share < last || sum != 100 {
			t.Errorf("share of the new revision went from %d to %d, sum %d", last, share, sum)
		}
		if share > last {
			steps = append(steps, fmt.Sprint(share))
			if c := r.Status.Conditions.Get("IngressReady"); share < 100 && (c == nil || c.Status != "Unknown" || c.Reason != "RolloutInProgress") {
				t.Errorf("at %d %%: %+v", share, c)
			}
		}
		last = share
		return share == 100
	})
	if len(steps) < 3 || steps[0] != "1" || time.Since(begin) < 3*time.Second {
		t.Errorf("steps %v in %v", steps, time.Since(begin))
	}
	ready[*api.Service](t, th, "rollout")
	if got := see(t, th, "rollout").Env["V"]; got != "2" {
		t.Errorf("V is %s", got)
	}
}

// test/e2e/tagheader/tag_header_based_routing_test.go. It is always on (in Knative a feature that is off by default).
func TestTagHeaderBasedRouting(t *testing.T) {
	th := shared(t)
	create(t, th, service("tagged", env("V", "1")))
	update(t, th, "tagged", env("V", "2"), traffic(target("tagged-00001", 100, "one"), target("latest", 0, "two")))
	for tag, want := range map[string]string{"one": "tagged-00001", "two": "tagged-00002", "nothing-of-that-name": "tagged-00001", "": "tagged-00001"} {
		for range 20 {
			if got := see(t, th, "tagged", "Knative-Serving-Tag", tag); got.Env["K_REVISION"] != want {
				t.Fatalf("tag %q leads to %s, want %s", tag, got.Env["K_REVISION"], want)
			}
		}
	}
	// On a tag's own host the header changes nothing.
	if got := see(t, th, "one-tagged", "Knative-Serving-Tag", "two"); got.Env["K_REVISION"] != "tagged-00001" {
		t.Errorf("tag host: %s", got.Env["K_REVISION"])
	}
}

// test/e2e/activator_test.go: concurrency 1, at most 10 instances, 100 requests at once from zero: all are answered.
func TestActivatorOverload(t *testing.T) {
	th := shared(t)
	create(t, th, service("overload", image("checker"), func(s *api.Service) { s.Spec.Template.Spec.ContainerConcurrency = ptr(int64(1)) }, scaling("initial-scale", "0"), scaling("max-scale", "10")))
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if a := th.Get("overload", "/?sleep=100"); a.Status != 200 || a.Header.Get("X-Checker-Max-In-Flight") != "1" {
				t.Errorf("%v at %v", a, time.Now().UTC())
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		for line := range strings.Lines(th.Log()) {
			if strings.Contains(line, "overload-00001") {
				t.Log(line)
			}
		}
	}
}

// scale is what the autoscaler says of a revision.
func scale(t *testing.T, th *harness.Thaw, revision string) client.Scale {
	t.Helper()
	s, err := th.Client.Scale(t.Context(), ns, revision)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// load keeps n requests inside a service until stop, and counts those that fail or take more than a second longer than they should.
func load(th *harness.Thaw, host string, n int) (stop func() (all, failed, slow int)) {
	done := make(chan struct{})
	var mu sync.Mutex
	var running sync.WaitGroup
	var all, failed, slow int
	for range n {
		running.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				a := th.Get(host, "/?sleep=300")
				mu.Lock()
				all++
				if a.Status != 200 || a.Err != nil {
					failed++
				} else if a.Took > 300*time.Millisecond+patient/4 {
					slow++
				}
				mu.Unlock()
			}
		})
	}
	return func() (int, int, int) {
		close(done)
		running.Wait()
		return all, failed, slow
	}
}

// test/e2e/autoscale_test.go (TestTargetBurstCapacity): with TBC 7 and target 10, 7 requests inside leave the activator in the path; 12 make two
// instances, whose capacity takes it out. Unlike there, the changes of the path drop and delay nothing.
func TestTargetBurstCapacity(t *testing.T) {
	th := shared(t)
	// Three of six seconds: reports come each second, and a window of one would lie between two of them now and then.
	create(t, th, service("tbc", image("checker"), scaling("target-burst-capacity", "7"), scaling("target", "10"), scaling("target-utilization-percentage", "70"), scaling("max-scale", "2"),
		scaling("panic-window-percentage", "50")))
	few := load(th, "tbc", 6) // not 7: that is the target itself, and a thousandth more is another instance
	seen := map[string]any{}
	defer func() {
		if t.Failed() {
			t.Logf("last seen: %v", seen)
		}
	}()
	harness.Eventually(t, patient, "6 inside: through the activator", func() bool {
		s := scale(t, th, "tbc-00001")
		seen = s
		return s["ready"] == 1.0 && s["mode"] == "proxy" && s["panicWindow"].(float64) > 4
	})
	more := load(th, "tbc", 6)
	harness.Eventually(t, 2*patient, "12 inside: two instances", func() bool { return scale(t, th, "tbc-00001")["ready"] == 2.0 })
	all, failed, slow := more()
	a, f, s := few()
	all, failed, slow = all+a, failed+f, slow+s
	few = load(th, "tbc", 2) // two instances have 20, less 7 and the load: straight to them after serve-delay
	harness.Eventually(t, 2*patient, "out of the path", func() bool { return scale(t, th, "tbc-00001")["mode"] == "serve" })
	a, f, s = few()
	all, failed, slow = all+a, failed+f, slow+s
	if all < 20 || failed > 0 || slow > 0 {
		t.Errorf("of %d requests %d failed and %d were slow", all, failed, slow)
	}
	harness.Eventually(t, 2*patient, "in the path again when nothing is left", func() bool {
		s := scale(t, th, "tbc-00001")
		return s["ready"] == 0.0 && s["mode"] == "proxy"
	})
}

// test/e2e/autoscale_test.go (TestTargetBurstCapacityMinusOne, TestTargetBurstCapacityZero): always, and only from zero.
func TestTargetBurstCapacitySwitches(t *testing.T) {
	th := shared(t)
	for _, c := range []struct{ name, burst, mode string }{{"always", "-1", "proxy"}, {"never", "0", "serve"}} {
		create(t, th, service(c.name, image("checker"), scaling("target-burst-capacity", c.burst), scaling("initial-scale", "0")))
		if m := scale(t, th, c.name+"-00001")["mode"]; m != "proxy" {
			t.Errorf("%s at zero: %v", c.name, m)
		}
		stop := load(th, c.name, 2)
		harness.Eventually(t, patient, "the mode with an instance", func() bool {
			s := scale(t, th, c.name+"-00001")
			return s["ready"].(float64) > 0 && s["mode"] == c.mode
		})
		if all, failed, _ := stop(); all == 0 || failed > 0 {
			t.Errorf("%s: %d of %d failed", c.name, failed, all)
		}
	}
}

// test/e2e/autoscale_test.go (TestAutoscaleUpDownUp, both aggregations): 0, 1, more under load, 0, and up again.
func TestUpDownUp(t *testing.T) {
	th := shared(t)
	for _, algorithm := range []string{"linear", "weighted-exponential"} {
		t.Run(algorithm, func(t *testing.T) {
			th := th.For(t)
			name := "updown-" + algorithm[:3]
			create(t, th, service(name, image("checker"), scaling("metric-aggregation-algorithm", algorithm), scaling("target", "2"), scaling("target-utilization-percentage", "100"), scaling("max-scale", "3")))
			for range 2 {
				stop := load(th, name, 8)
				harness.Eventually(t, patient, "three instances for eight requests at a target of two", func() bool { return replicas(th, name+"-00001") == 3 })
				if all, failed, _ := stop(); all == 0 || failed > 0 {
					t.Errorf("%d of %d failed", failed, all)
				}
				harness.Eventually(t, 2*patient, "zero", func() bool { return len(pids(th, name+"-00001")) == 0 })
			}
		})
	}
}

// test/e2e/autoscale_test.go (TestRPSBasedAutoscaleUpCountPods): the rate decides.
func TestRPS(t *testing.T) {
	th := shared(t)
	create(t, th, service("rps", image("checker"), scaling("metric", "rps"), scaling("target", "5"), scaling("target-utilization-percentage", "100"), scaling("max-scale", "3")))
	stop := load(th, "rps", 6) // up to 20 a second
	harness.Eventually(t, patient, "three instances", func() bool { return replicas(th, "rps-00001") == 3 })
	if all, failed, _ := stop(); failed > 0 {
		t.Errorf("%d of %d failed", failed, all)
	}
}

// test/e2e/autoscale_test.go (TestFastScaleToZero): TBC -1 and the shortest window: empty within the grace period and 15 s.
func TestFastScaleToZero(t *testing.T) {
	th := shared(t)
	create(t, th, service("fast", scaling("target-burst-capacity", "-1"), scaling("window", "6s")))
	see(t, th, "fast")
	begin := time.Now()
	harness.Eventually(t, 45*time.Second, "empty within grace and 15 s", func() bool { return len(pids(th, "fast-00001")) == 0 })
	t.Logf("empty after %v", time.Since(begin).Round(time.Second))
}

// The planner decides where it is asked for; what it has learnt is in the status in words.
func TestPredictive(t *testing.T) {
	th := shared(t)
	create(t, th, service("foresight", annotated("autoscaling.thaw.run/planner", "predictive"), scaling("initial-scale", "0"), scaling("max-scale", "2")))
	see(t, th, "foresight")
	harness.Eventually(t, patient, "the planner says what it expects", func() bool {
		for _, text := range scale(t, th, "foresight-00001")["explain"].([]any) {
			if strings.HasPrefix(text.(string), "Planner: 1 wanted") {
				return true
			}
		}
		return false
	})
}
