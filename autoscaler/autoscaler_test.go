package autoscaler

import (
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

func annotated(pairs ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m["autoscaling.knative.dev/"+pairs[i]] = pairs[i+1]
	}
	return m
}

// A burst at zero is sized once, from the queue, at the moment of the event; what follows neither adds nor takes away.
func TestBurstAtZero(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.until(seconds(5.3))
		w.expect()
		w.demand(1000, 0)
		w.expect(order{at: seconds(5.3), n: 143})
		for range 100 { // the queue is still there; the instances are on their way
			w.demand(1000, 0)
		}
		w.load = 1000
		w.until(seconds(7))
		w.demand(0, 1000)
		w.until(seconds(10))
		w.load = 0
		w.until(seconds(60))
		w.expect()
		if s := w.status(); s.Ready != 143 || s.Desired != 143 || !s.Active() {
			t.Errorf("%+v", s)
		}
	})
}

func TestDecisionWithinAMillisecond(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.a.Demand(endpoints.Demand{Revision: w.rev.ID(), Waiting: 1, At: time.Now()})
		time.Sleep(time.Millisecond)
		w.expect(order{at: 0, n: 1})
	})
}

// A short burst keeps what it asked for during one stable window, so that the next one finds it: up once, down slowly, no
// flapping.
func TestShortBurstsDoNotFlap(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		for burst := range 12 { // one each 10 s, over in 200 ms, so that its average over a second is a fifth
			w.until(seconds(float64(10 * burst)))
			w.demand(1000, 0)
			w.until(seconds(float64(10*burst) + 0.95))
			w.load = 200
			w.until(seconds(float64(10*burst) + 1))
			w.load = 0
		}
		w.until(seconds(120))
		w.expect(order{at: 0, n: 143})
		w.until(seconds(300))
		down, last := w.orders, 143
		for _, o := range down {
			if o.n >= last {
				t.Errorf("up again: %v", down)
			}
			last = o.n
		}
		if last != 0 {
			t.Errorf("ends with %d", last)
		}
	})
}

// The exact times to zero with the default windows. One request at 0; its instance is ready at 0.1 and reports zeros from
// the second second on.
func TestToZero(t *testing.T) {
	for _, c := range []struct {
		name        string
		annotations map[string]string
		inactive    time.Duration
		zero        time.Duration
	}{
		// The load of second 0 leaves the stable window with the tick at 60 s, which decides on zero. The instance has been active
		// since 0.1 s, so it becomes inactive at 60.1 s. One instance cannot take the burst of 211: it has been in proxy mode all
		// along, and the grace period is over already.
		{"default", nil, seconds(60.1), seconds(60.1)},
		// With 0 the instance is served directly until it is inactive; then the grace period of 30 s begins.
		{"burst capacity 0", annotated("target-burst-capacity", "0"), seconds(60.1), seconds(90.1)},
		{"burst capacity -1", annotated("target-burst-capacity", "-1"), seconds(60.1), seconds(60.1)},
		{"burst capacity 5", annotated("target-burst-capacity", "5"), seconds(60.1), seconds(90.1)},
		// Retention is a hard lower bound, whatever the mode.
		{"retention", annotated("scale-to-zero-pod-retention-period", "45s"), seconds(60.1), seconds(105.1)},
		{"retention shorter than the grace", annotated("scale-to-zero-pod-retention-period", "5s", "target-burst-capacity", "0"), seconds(60.1), seconds(90.1)},
		// In proxy mode since the revision was made: the grace period counts from there.
		{"short window", annotated("window", "6s", "target-burst-capacity", "-1"), seconds(6.1), seconds(30)},
	} {
		t.Run(c.name, func(t *testing.T) {
			inWorld(t, DefaultConfig(), healthy(testRevision("r", c.annotations, 10)), func(w *world) {
				var inactive atomic.Int64
				w.a.Subscribe(func(_ api.RevisionID, s Status) {
					if s.Activity == Inactive && time.Since(w.began) > 0 {
						inactive.CompareAndSwap(0, int64(time.Since(w.began)))
					}
				})
				w.set(w.rev)
				w.demand(1, 0)
				w.load = 1
				w.until(seconds(1.0))
				w.load = 0
				w.until(seconds(200))
				w.expect(order{at: 0, n: 1}, order{at: c.zero, n: 0})
				if got := time.Duration(inactive.Load()); got != c.inactive {
					t.Errorf("inactive at %v, want %v", got, c.inactive)
				}
				if s := w.status(); s.Desired != 0 || s.Ordered != 0 || s.Mode != Proxy || s.Active() {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// A request in the grace period keeps the instance.
func TestDemandInTheGracePeriod(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("target-burst-capacity", "0"), 10)), func(w *world) {
		w.set(w.rev)
		w.demand(1, 0)
		w.until(seconds(80))
		if s := w.status(); s.Activity != Inactive || s.Ready != 1 || s.Desired != 0 || s.Mode != Proxy {
			t.Errorf("%+v", s)
		}
		w.demand(0, 1)
		if s := w.status(); s.Activity != Active || s.Mode != Serve || s.Desired != 1 {
			t.Errorf("%+v", s)
		}
		w.until(seconds(139))
		w.expect(order{at: 0, n: 1})
		w.until(seconds(300))
		if n := len(w.orders); n != 1 || w.orders[0].n != 0 || w.orders[0].at < seconds(80+60+30) {
			t.Errorf("%v", w.orders)
		}
	})
}

func TestModeFollowsBurstCapacity(t *testing.T) {
	for _, c := range []struct {
		burst string
		load  float64
		mode  Mode
	}{
		{"-1", 5, Proxy}, {"0", 5, Serve}, {"7", 2, Serve}, {"7", 7, Proxy}, {"211", 5, Proxy},
	} {
		inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("target-burst-capacity", c.burst, "target", "10", "max-scale", "1"), 0)), func(w *world) {
			w.set(w.rev)
			if s := w.status(); s.Mode != Proxy || s.Activity != Inactive {
				t.Errorf("at zero: %+v", s)
			}
			w.demand(1, 0)
			w.load = c.load
			w.until(seconds(20))
			if s := w.status(); s.Mode != c.mode {
				t.Errorf("burst capacity %s, load %v: %v with %d", c.burst, c.load, s.Mode, s.ExcessBurstCapacity)
			}
		})
	}
}

func TestInitialScale(t *testing.T) {
	t.Run("one by default", func(t *testing.T) {
		inWorld(t, DefaultConfig(), testRevision("r", nil, 10), func(w *world) {
			w.set(w.rev)
			w.expect(order{at: 0, n: 1})
			w.set(healthy(w.rev))
			w.until(seconds(59))
			w.expect()
			w.until(seconds(100))
			if len(w.orders) != 1 || w.orders[0].n != 0 {
				t.Errorf("%v", w.orders)
			}
		})
	})
	t.Run("three until reached", func(t *testing.T) {
		inWorld(t, DefaultConfig(), testRevision("r", annotated("initial-scale", "3"), 10), func(w *world) {
			w.set(w.rev)
			w.load = 1
			w.until(seconds(1))
			w.expect(order{at: 0, n: 3})
			w.until(seconds(10))
			w.expect(order{at: seconds(2), n: 1}) // reached; the load needs one
		})
	})
	t.Run("zero", func(t *testing.T) {
		inWorld(t, DefaultConfig(), testRevision("r", annotated("initial-scale", "0"), 10), func(w *world) {
			w.set(w.rev)
			w.until(seconds(10))
			w.expect()
			if s := w.status(); s.Activity != Inactive || s.Desired != 0 {
				t.Errorf("%+v", s)
			}
			w.demand(1, 0)
			w.expect(order{at: seconds(10), n: 1})
		})
	})
	t.Run("already healthy", func(t *testing.T) {
		inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("initial-scale", "3"), 10)), func(w *world) {
			w.set(w.rev)
			w.until(seconds(10))
			w.expect()
		})
	})
	t.Run("not above max", func(t *testing.T) {
		inWorld(t, DefaultConfig(), testRevision("r", annotated("initial-scale", "5", "max-scale", "2"), 10), func(w *world) {
			w.set(w.rev)
			w.until(seconds(1))
			w.expect(order{at: 0, n: 2})
			if s := w.status(); !s.Active() {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("given up", func(t *testing.T) {
		inWorld(t, DefaultConfig(), testRevision("r", nil, 10), func(w *world) {
			w.startup = 0
			w.set(w.rev)
			w.until(seconds(629))
			w.expect(order{at: 0, n: 1})
			w.until(seconds(631))
			w.expect(order{at: seconds(630), n: 0})
			w.until(seconds(700))
			w.expect()
		})
	})
}

func TestMinAndMaxScale(t *testing.T) {
	inWorld(t, DefaultConfig(), testRevision("r", annotated("min-scale", "2", "max-scale", "5"), 10), func(w *world) {
		w.set(w.rev)
		w.until(seconds(1))
		w.expect(order{at: 0, n: 2})
		w.demand(1000, 0)
		w.expect(order{at: seconds(1), n: 5})
		w.until(seconds(200))
		if n := w.orders[len(w.orders)-1].n; n != 2 {
			t.Errorf("ends at %d, want min-scale", n)
		}
		w.orders = nil
		w.set(reserve(w.rev)) // the last route has left: min-scale is ignored
		w.until(seconds(300))
		w.expect(order{at: seconds(200), n: 1}, order{at: seconds(202), n: 0}) // what the last decision asked for, then the next one
		w.set(w.rev)                                                           // a route leads to it again
		w.expect(order{at: seconds(300), n: 2})
	})
}

func TestActivationScale(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("activation-scale", "5"), 10)), func(w *world) {
		w.set(w.rev)
		w.demand(1, 0)
		w.load = 1
		w.until(seconds(30))
		w.expect(order{at: 0, n: 5})
	})
}

// Silence is not zero: without reports everything stays, however long.
func TestSilenceIsNotZero(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.demand(30, 0)
		w.load = 30
		w.until(seconds(10))
		w.silent = true
		w.until(seconds(600))
		w.expect(order{at: 0, n: 5})
		w.silent, w.load = false, 0
		w.until(seconds(900))
		if n := len(w.orders); n == 0 || w.orders[n-1].n != 0 {
			t.Errorf("%v", w.orders)
		}
	})
}

// A restarted process finds instances: none is taken away before reports came and a stable window has passed.
func TestRestartProtection(t *testing.T) {
	for _, ready := range []int{1, 8} {
		inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
			w.silent = true
			w.ready, w.desired = ready, ready
			w.observe() // before the revision is known
			w.set(w.rev)
			if s := w.status(); s.Ready != ready || s.Desired != ready || !s.Active() {
				t.Errorf("%+v", s)
			}
			w.until(seconds(120))
			for _, o := range w.orders {
				if o.n != ready {
					t.Errorf("%d found, ordered %v without any report", ready, w.orders)
				}
			}
			w.orders = nil
			w.silent = false
			w.until(seconds(125))
			if ready > 1 { // a single one may go with the first report of nothing, as in Knative
				w.expectNoneBelow(ready, seconds(125))
			}
			w.until(seconds(400))
			if n := len(w.orders); n == 0 || w.orders[n-1].n != 0 {
				t.Errorf("%v", w.orders)
			}
		})
	}
	t.Run("panic", func(t *testing.T) {
		inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
			w.ready, w.desired = 8, 8
			w.set(w.rev)
			w.observe()
			w.until(seconds(4))
			if s := w.status(); !s.PanicMode {
				t.Errorf("%+v", s)
			}
			w.until(seconds(60))
			w.expectNoneBelow(8, seconds(60))
			w.until(seconds(62))
			if s := w.status(); s.PanicMode || s.Desired != 4 {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("min-scale waits for them", func(t *testing.T) {
		inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("min-scale", "2"), 10)), func(w *world) {
			w.set(w.rev)
			w.until(seconds(1))
			w.expect()
			w.ready, w.desired = 4, 4
			w.observe()
			w.until(seconds(10))
			w.expectNoneBelow(4, seconds(10))
		})
		inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("min-scale", "2"), 10)), func(w *world) {
			w.set(w.rev)
			w.until(seconds(5))
			w.expect(order{at: seconds(2), n: 2}) // nobody found any
		})
	})
}

func (w *world) expectNoneBelow(n int, upTo time.Duration) {
	w.t.Helper()
	for _, o := range w.orders {
		if o.n < n && o.at <= upTo {
			w.t.Errorf("ordered %v", w.orders)
		}
	}
}

// In a crash loop one instance tries on; demands do not multiply it. When it gets ready, the queue is answered in full.
func TestCrashBackOff(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.failure = &endpoints.Failure{Reason: "ExitCode1", Count: 3, At: time.Now(), Until: time.Now().Add(20 * time.Second)}
		w.set(w.rev)
		w.observe()
		for range 100 {
			w.demand(1000, 0)
		}
		w.expect(order{at: 0, n: 1})
		if s := w.status(); !s.Why.Has(WhyBackOff) {
			t.Errorf("why %v", s.Why)
		}
		for i := range 50 {
			w.until(time.Duration(i) * 200 * time.Millisecond)
			w.demand(1000, 0)
		}
		w.expect()
		w.demand(1000, 0)
		w.failure, w.ready, w.starts = nil, 1, nil
		w.observe()
		w.wait()
		w.expect(order{at: seconds(9.8), n: 143})
	})
}

// The averages see the same load as the events and are held back in the same way.
func TestCrashHoldsTheTickBack(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.failure = &endpoints.Failure{Reason: "ExitCode1", Count: 3, At: time.Now(), Until: time.Now().Add(time.Hour)}
		w.set(w.rev)
		w.observe()
		w.demand(1000, 0)
		w.load = 1000
		w.until(seconds(20))
		w.expect(order{at: 0, n: 1})
		if s := w.status(); !s.PanicMode || !s.Why.Has(WhyBackOff) {
			t.Errorf("%+v", s)
		}
		w.failure, w.ready = nil, 1
		w.observe()
		w.wait()
		w.expect(order{at: seconds(20), n: 143})
	})
}

// Without a failure the same demands order everything at once: the control of the test above.
func TestNoBackOff(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.demand(1000, 0)
		w.expect(order{at: 0, n: 143})
	})
}

// When starts fail and nobody asks any more, trying ends after a stable window.
func TestHopeless(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.failure = &endpoints.Failure{Reason: "ExitCode1", Count: 1, At: time.Now(), Until: time.Now().Add(time.Hour)}
		w.set(w.rev)
		w.observe()
		w.demand(1, 0)
		w.load = 1
		w.until(seconds(10))
		w.load = 0
		w.until(seconds(69))
		w.expect(order{at: 0, n: 1})
		w.until(seconds(80))
		if len(w.orders) != 1 || w.orders[0].n != 0 {
			t.Errorf("%v", w.orders)
		}
		w.orders = nil
		w.failure = nil
		w.observe()
		w.until(seconds(200))
		w.expect() // the old decision does not come back
		w.demand(1, 0)
		w.expect(order{at: seconds(200), n: 1})
	})
}

// Instances that got lost are ordered again, at once and with each tick until they are there.
func TestLostInstances(t *testing.T) {
	inWorld(t, DefaultConfig(), testRevision("r", annotated("min-scale", "3"), 10), func(w *world) {
		w.set(w.rev)
		w.until(seconds(5.05))
		w.expect(order{at: 0, n: 3})
		w.ready = 1
		w.observe()
		w.wait()
		w.expect(order{at: seconds(5.05), n: 3})
		if w.until(seconds(6)); w.ready != 3 {
			t.Errorf("%d ready", w.ready)
		}
	})
}

func TestRemoveRevision(t *testing.T) {
	inWorld(t, DefaultConfig(), testRevision("r", nil, 10), func(w *world) {
		w.set(w.rev)
		w.until(seconds(3))
		w.expect(order{at: 0, n: 1})
		w.a.RemoveRevision(w.rev.ID())
		w.expect(order{at: seconds(3), n: 0})
		if _, ok := w.a.Status(w.rev.ID()); ok {
			t.Error("there is a status still")
		}
		w.silent = true
		w.until(seconds(100))
		w.demand(1, 0) // nobody is there to serve it
		w.expect()
		w.set(w.rev) // the same name again
		w.until(seconds(101))
		w.expect(order{at: seconds(100), n: 1})
	})
}

// An activator may know a revision before the autoscaler does.
func TestDemandBeforeRevision(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.demand(20, 0)
		w.until(seconds(1))
		w.expect()
		w.set(w.rev)
		w.expect(order{at: seconds(1), n: 3})
	})
}

// Without events the first request asks for one instance and the averages do the rest, as in Knative.
func TestEventDrivenOff(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", map[string]string{AnnotationEventDriven: "false"}, 10)), func(w *world) {
		w.set(w.rev)
		w.until(seconds(1))
		w.demand(1000, 0)
		w.load = 1000
		w.expect(order{at: seconds(1), n: 1})
		w.until(seconds(4))
		w.expect(order{at: seconds(3), n: 143})
	})
}

// A report for a revision at zero does not wait for a tick: an activator without an event stream works too.
func TestReportWakes(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.load = 20
		w.until(seconds(1))
		w.expect(order{at: seconds(1), n: 3})
	})
}

// A warm revision whose requests all have slots is left to the averages, unless the moment's load would be a panic.
func TestWarmDemand(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 0)), func(w *world) { // target 70
		w.set(w.rev)
		w.demand(1, 0)
		w.until(seconds(5))
		w.expect(order{at: 0, n: 1})
		w.demand(0, 69)
		w.expect()
		w.demand(0, 140)
		w.expect(order{at: seconds(5), n: 2})
		w.until(seconds(6))
		w.demand(0, 200) // three for two ready ones: no panic
		w.expect()
		w.demand(1, 200)
		w.expect(order{at: seconds(6), n: 3})
	})
}

func TestNonsenseReports(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.demand(7, 0)
		w.load = 7
		w.until(seconds(30))
		before := w.status()
		now := time.Now()
		bad := func(s endpoints.Stat) endpoints.Stat { s.Revision = w.rev.ID(); return s }
		w.a.Report([]endpoints.Stat{
			bad(endpoints.Stat{Source: "x", Time: now, Concurrency: math.NaN()}),
			bad(endpoints.Stat{Source: "x", Time: now, Concurrency: math.Inf(1)}),
			bad(endpoints.Stat{Source: "x", Time: now, Concurrency: -100}),
			bad(endpoints.Stat{Source: "x", Time: now, Concurrency: 1, ProxiedConcurrency: math.NaN()}),
			bad(endpoints.Stat{Source: "x", Time: now.Add(time.Hour), Concurrency: 1e6}),
			bad(endpoints.Stat{Source: "x", Time: now.Add(-time.Hour), Concurrency: 1e6}),
			bad(endpoints.Stat{Source: "0", Time: now.Add(-time.Millisecond), Concurrency: 1e6}), // again
			bad(endpoints.Stat{Source: "0", Time: now.Add(-10 * time.Second), Concurrency: 1e6}), // out of order
			{Revision: "default/other", Source: "x", Time: now, Concurrency: 1e6},
		})
		w.until(seconds(40))
		if after := w.status(); after.Stable != before.Stable || after.Desired != before.Desired {
			t.Errorf("before %+v\nafter %+v", before, after)
		}
		w.expect(order{at: 0, n: 1})
	})
}

// Proxied requests count once: the activator has counted them.
func TestProxiedCountsOnce(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.silent = true
		w.demand(1, 0)
		for s := range 20 {
			w.until(seconds(float64(s)))
			now := time.Now()
			w.a.Report([]endpoints.Stat{
				{Revision: w.rev.ID(), Source: "activator", Activator: true, Time: now, Concurrency: 6},
				{Revision: w.rev.ID(), Source: "0", Time: now, Concurrency: 7, ProxiedConcurrency: 6},
			})
		}
		w.until(seconds(21))
		if s := w.status(); s.Stable != 7 || s.Desired != 1 {
			t.Errorf("%+v", s)
		}
	})
}

func TestSubscribeTellsChangesOnly(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		var mu sync.Mutex
		var told []Status
		w.a.Subscribe(func(_ api.RevisionID, s Status) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, s)
		})
		w.set(w.rev)
		w.demand(5, 0)
		w.load = 5
		w.until(seconds(3))
		mu.Lock()
		n := len(told)
		mu.Unlock()
		w.until(seconds(30))
		mu.Lock()
		defer mu.Unlock()
		if n == 0 || n > 6 || len(told) != n {
			t.Errorf("told %d times, then %d", n, len(told)-n)
		}
		if last := told[n-1]; !last.Active() || last.Ready != 1 || last.Desired != 1 {
			t.Errorf("%+v", last)
		}
	})
}

// Idle revisions have no timer and no windows; one that was used gives everything back.
func TestIdleCostsNothing(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		for i := range 1000 {
			w.a.SetRevision(healthy(testRevision(string(rune('a'+i%26))+string(rune('a'+i/26%26))+string(rune('a'+i/676)), nil, 10)))
		}
		w.set(w.rev)
		w.demand(3, 0)
		w.load = 1
		w.until(seconds(1))
		w.load = 0
		w.until(seconds(300))
		w.stop() // what follows belongs to the loop
		if n := w.a.wheel.count; n != 0 {
			t.Errorf("%d revisions are scheduled", n)
		}
		for id, r := range w.a.revisions {
			if r.active != nil {
				t.Errorf("%s holds windows", id)
			}
		}
		w.expect(order{at: 0, n: 1}, order{at: seconds(60.1), n: 0})
	})
}

// BenchmarkIdle is the memory of an idle revision.
func BenchmarkIdle(b *testing.B) {
	const n = 1000
	rev := healthy(testRevision("r", nil, 10))
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		a := New(DefaultConfig(), nil)
		for i := range n {
			r := *rev
			r.Name = string(rune(i)) + "-00001"
			a.SetRevision(&r)
		}
		a.drain()
		if a.wheel.count != 0 {
			b.Fatal("idle revisions are scheduled")
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/revision")
		runtime.KeepAlive(a)
	}
}
