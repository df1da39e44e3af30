package reconcile

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"pgregory.net/rapid"
)

// TestRolloutSchedule has the steps that Knative's code computes for these inputs.
func TestRolloutSchedule(t *testing.T) {
	for _, c := range []struct {
		percent  int
		took     time.Duration // until the first percent was served
		duration time.Duration
		size     int
		interval time.Duration
	}{
		{100, 900 * time.Millisecond, 60 * time.Second, 2, time.Second},
		{100, time.Second, 120 * time.Second, 1, 1202 * time.Millisecond},
		{100, 5 * time.Second, 60 * time.Second, 9, 5 * time.Second},
		{50, 2 * time.Second, 30 * time.Second, 4, 2 * time.Second},
		{100, 90 * time.Second, 60 * time.Second, 99, time.Second}, // slower than the whole duration: one step
		{2, 0, 60 * time.Second, 1, 59 * time.Second},
	} {
		start := time.Unix(1000, 0)
		s := share{Percent: c.percent, Parts: []part{{"old", c.percent - 1}, {"new", 1}}, Start: start.UnixNano()}
		now := start.Add(c.took)
		s.schedule(c.duration, now)
		interval := time.Duration(s.Interval).Round(time.Millisecond)
		if s.Size != c.size || interval != c.interval || s.Next != now.UnixNano()+s.Interval {
			t.Errorf("%d %% in %v, first served after %v: steps of %d %% each %v, want %d and %v", c.percent, c.duration, c.took, s.Size, interval, c.size, c.interval)
		}
		before := s
		s.schedule(c.duration, now.Add(time.Hour))
		if s.Next != before.Next {
			t.Error("scheduled twice")
		}
	}
}

func partsString(s share) string {
	out := ""
	for _, p := range s.Parts {
		out += fmt.Sprintf("%s=%d ", p.Revision, p.Percent)
	}
	return out
}

// A story with three revisions: each step drains the newest of the old ones.
func TestRolloutSteps(t *testing.T) {
	now := time.Unix(1000, 0)
	const d = 60 * time.Second
	goal := share{Configuration: "c", Percent: 100}
	check := func(s share, want string) {
		t.Helper()
		if got := partsString(s); got != want {
			t.Errorf("parts %q, want %q", got, want)
		}
	}
	s := roll(nil, goal, "a", d, now)
	check(s, "a=100 ") // nothing was served: nothing to be careful about
	s = roll(&s, goal, "b", d, now)
	check(s, "a=99 b=1 ")
	s = roll(&s, goal, "b", d, now.Add(time.Hour))
	check(s, "a=99 b=1 ") // not scheduled: the first percent is not served yet
	s.schedule(d, now)
	s = roll(&s, goal, "b", d, now.Add(999*time.Millisecond))
	check(s, "a=99 b=1 ")
	now = now.Add(time.Second)
	s = roll(&s, goal, "b", d, now)
	check(s, "a=97 b=3 ")
	s = roll(&s, goal, "b", d, now)
	check(s, "a=97 b=3 ") // one step, however often it is asked
	s = roll(&s, goal, "c", d, now)
	check(s, "a=97 b=2 c=1 ")
	s.schedule(d, now)
	now = now.Add(time.Second)
	s = roll(&s, goal, "c", d, now)
	check(s, "a=97 c=3 ")
	now = now.Add(time.Second)
	s = roll(&s, goal, "c", d, now)
	check(s, "a=95 c=5 ")
	back := roll(&s, goal, "a", d, now)
	check(back, "c=5 a=95 ") // back to a named older one: it keeps what it has
	now = now.Add(24 * time.Hour)
	s = roll(&s, goal, "c", d, now)
	check(s, "a=93 c=7 ") // the clock jumped forward: still one step
	s = roll(&s, goal, "c", d, now.Add(-48*time.Hour))
	check(s, "a=93 c=7 ") // backward: none, and
	s = roll(&s, goal, "c", d, now.Add(-48*time.Hour+time.Second))
	check(s, "a=91 c=9 ") // the next one does not wait for two days
	s = roll(&s, share{Configuration: "c", Percent: 50}, "c", d, now.Add(-48*time.Hour))
	check(s, "a=41 c=9 ")
	s = roll(&s, share{Configuration: "c", Percent: 60}, "c", d, now.Add(-48*time.Hour))
	check(s, "a=41 c=19 ")
	s = roll(&s, share{Configuration: "c", Percent: 60}, "c", 0, now)
	check(s, "c=60 ") // without a duration: at once
	one := roll(&share{Percent: 1, Parts: []part{{"a", 1}}}, share{Percent: 1}, "b", d, now)
	check(one, "b=1 ")
}

// Whatever happens in whatever order, the parts are positive and sum to the target's percentage, the latest is last, and a
// rollout that is left alone ends.
func TestRolloutSums(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1000, 0)
		var prev *share
		latest, percent := "r0", 100
		duration := time.Duration(rapid.IntRange(0, 300).Draw(t, "duration")) * time.Second
		look := func() {
			s := roll(prev, share{Configuration: "c", Percent: percent}, latest, duration, now)
			sum := 0
			for _, p := range s.Parts {
				sum += p.Percent
				if p.Percent <= 0 && percent > 0 {
					t.Fatalf("empty part in %v", s)
				}
			}
			if sum != percent || s.Parts[len(s.Parts)-1].Revision != latest {
				t.Fatalf("%v for %d %% to %s", s, percent, latest)
			}
			s.schedule(duration, now.Add(time.Duration(rapid.IntRange(0, 3000).Draw(t, "ready"))*time.Millisecond))
			if again := parseRollout(rollout{[]share{s}}.String()); percent > 0 && !slices.Equal(again.Configurations[0].Parts, s.Parts) {
				t.Fatalf("%v is not read back", s)
			}
			prev = &s
		}
		for range rapid.IntRange(1, 40).Draw(t, "events") {
			switch rapid.IntRange(0, 4).Draw(t, "event") {
			case 0:
				latest = fmt.Sprintf("r%d", rapid.IntRange(0, 5).Draw(t, "revision"))
			case 1:
				percent = rapid.IntRange(0, 100).Draw(t, "percent")
			default:
				now = now.Add(time.Duration(rapid.IntRange(-5000, 60000).Draw(t, "ms")) * time.Millisecond)
			}
			look()
		}
		for range 120 {
			now = now.Add(5 * time.Minute)
			look()
		}
		if prev.moving() {
			t.Fatalf("never ends: %v", *prev)
		}
	})
}

// FuzzParseRollout: whatever stands in the annotation, what is read is either nothing or sums up.
func FuzzParseRollout(f *testing.F) {
	f.Add(`{"configurations":[{"configurationName":"c","percent":100,"revisions":[{"revisionName":"a","percent":99},{"revisionName":"b","percent":1}],"startTime":5}]}`)
	f.Add(`{"configurations":[{"percent":100,"revisions":[{"revisionName":"a","percent":-1},{"revisionName":"b","percent":101}]}]}`)
	f.Add(`[`)
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range parseRollout(text).Configurations {
			next := roll(&s, share{Percent: 100}, "new", time.Minute, time.Unix(1e9, 0))
			sum := 0
			for _, p := range next.Parts {
				sum += p.Percent
			}
			if sum != 100 {
				t.Errorf("%q leads to %v", text, next)
			}
		}
	})
}

// test/e2e/rollout_test.go and pkg/reconciler/route: a rollout as objects, table and status show it.
func TestGradualRollout(t *testing.T) {
	inHouse(t, func(h *house) {
		slow := func(s *api.Service) {
			s.Annotations = map[string]string{api.AnnotationRolloutDuration: "60s"}
		}
		h.create(service("hello", "one", slow))
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantHost("hello.default.localhost", "hello-00001=100")

		began := time.Now()
		h.update("hello", image("two"))
		h.wantHost("hello.default.localhost", "hello-00001=99 hello-00002=1")
		s := h.service("hello")
		h.wantTraffic(s.Status.Traffic, "latest:hello-00001=99", "latest:hello-00002=1")
		h.wantCondition(h.route("hello"), "IngressReady", "Unknown RolloutInProgress")
		h.wantCondition(h.route("hello"), "AllTrafficAssigned", "True")
		h.wantCondition(s, "Ready", "Unknown RolloutInProgress")
		h.wantCondition(s, "ConfigurationsReady", "True")
		if got := h.revision("hello-00001").Labels[api.LabelRoutingState]; got != "active" {
			t.Errorf("the old revision is %s while it serves", got)
		}
		h.sleep(10 * time.Second)
		h.wantHost("hello.default.localhost", "hello-00001=79 hello-00002=21")

		// A restart in the middle goes on from where it was, and at its pace.
		h.stop()
		h.start(Config{})
		h.wantHost("hello.default.localhost", "hello-00001=79 hello-00002=21")
		h.sleep(5 * time.Second)
		h.wantHost("hello.default.localhost", "hello-00001=69 hello-00002=31")

		for h.sleep(time.Second); !h.service("hello").Status.Conditions.IsTrue("Ready"); h.sleep(time.Second) {
			if time.Since(began) > 2*time.Minute {
				t.Fatalf("not done after %v: %v", time.Since(began), h.p)
			}
		}
		if d := time.Since(began); d < 45*time.Second || d > 62*time.Second {
			t.Errorf("took %v", d)
		}
		h.wantTraffic(h.service("hello").Status.Traffic, "latest:hello-00002=100")
		h.wantHost("hello.default.localhost", "hello-00002=100")
		if a := h.route("hello").Status.Annotations; a != nil {
			t.Errorf("state is left: %v", a)
		}
		if got := h.revision("hello-00001").Labels[api.LabelRoutingState]; got != "reserve" {
			t.Errorf("the old revision is %s", got)
		}
	})
}

// Taking the annotation away in the middle ends the rollout; a pinned target never rolls.
func TestRolloutAborted(t *testing.T) {
	inHouseWith(t, Config{RolloutDuration: time.Minute}, func(h *house) {
		h.create(service("hello", "one"))
		h.update("hello", image("two"))
		h.wantHost("hello.default.localhost", "hello-00001=99 hello-00002=1")
		h.update("hello", func(s *api.Service) { s.Annotations = map[string]string{api.AnnotationRolloutDuration: "0s"} })
		h.wantHost("hello.default.localhost", "hello-00002=100")
		h.update("hello", func(s *api.Service) { s.Annotations = nil })
		h.update("hello", traffic("hello-00001=60", "latest=40#new"))
		h.wantHost("hello.default.localhost", "hello-00001=60 hello-00002=40 new:hello-00002")
		h.update("hello", image("three"))
		h.wantHost("hello.default.localhost", "hello-00001=60 hello-00002=39 hello-00003=1 new:hello-00003")
		h.wantHost("new-hello.default.localhost", "hello-00003=100 tag:new")
	})
}
