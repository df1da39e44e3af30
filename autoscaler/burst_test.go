package autoscaler

import (
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/endpoints"
)

// A budget of starts cuts a burst: so many at once, the rest at the rate. Without it all is ordered at once.
func TestStartRate(t *testing.T) {
	c := DefaultConfig()
	c.StartRate, c.StartBurst = 10, 20
	inWorld(t, c, healthy(testRevision("r", nil, 10)), func(w *world) {
		w.startup = 10 * time.Minute // nothing gets ready: only the budget counts
		w.set(w.rev)
		w.demand(350, 0) // 50
		w.expect(order{at: 0, n: 20})
		if s := w.status(); !s.Why.Has(WhyStartRate | WhyEvent) {
			t.Errorf("why %v", s.Why)
		}
		w.until(seconds(2))
		if n := w.desired; n < 38 || n > 41 {
			t.Errorf("%d ordered after 2 s, want 40", n)
		}
		w.until(seconds(4))
		if n := w.desired; n != 50 || w.status().Why.Has(WhyStartRate) {
			t.Errorf("%d ordered in the end, want 50 (%v)", n, w.status().Why)
		}
		last := 0
		for _, o := range w.orders {
			if o.n < last || o.at > seconds(3.2) {
				t.Errorf("orders %v", w.orders)
			}
			last = o.n
		}
		w.until(seconds(30)) // the budget fills up again while nothing is started
		w.orders = nil
		w.demand(490, 0)
		w.expect(order{at: seconds(30), n: 70})
	})
	c.StartRate = 0
	inWorld(t, c, healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.demand(350, 0)
		w.expect(order{at: 0, n: 50})
	})
}

// Instances that take long to start are not started again and again: not by the demands of a queue that does not get shorter, not by
// the ticks, not by a panic.
func TestSlowStarters(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.startup = 45 * time.Second
		w.set(w.rev)
		w.load = 70
		for i := range 400 {
			w.until(time.Duration(i) * 100 * time.Millisecond)
			w.demand(70, 0)
		}
		w.expect(order{at: 0, n: 10})
		w.until(seconds(44))
		if s := w.status(); s.Ready != 0 || s.Starting != 10 || s.Desired != 10 {
			t.Errorf("%+v", s)
		}
		w.until(seconds(60))
		if s := w.status(); s.Ready != 10 || s.Desired != 10 {
			t.Errorf("%+v", s)
		}
		w.expect()
	})
}

// A load around the border changes the mode once; with serve-delay 0 it changes with the decisions. Proxy mode comes at once.
func TestModeHasHysteresis(t *testing.T) {
	changes := func(delay time.Duration) (n int, last Status) {
		c := DefaultConfig()
		c.ServeDelay = delay
		// 20 requests' room, 10 of them for a burst: the border is at a panic average of 10.
		inWorld(t, c, healthy(testRevision("r", annotated("target-burst-capacity", "10", "target", "20", "max-scale", "1", "panic-window-percentage", "5"), 0)), func(w *world) {
			w.set(w.rev)
			w.load = 10
			w.demand(10, 0)
			before := w.status().Mode
			for i := range 60 {
				w.load = 8
				if i/4%2 == 1 {
					w.load = 13
				}
				w.until(seconds(float64(i)))
				if m := w.status().Mode; m != before {
					n, before = n+1, m
				}
			}
			w.load = 8
			w.until(seconds(80))
			last = w.status()
		})
		return n, last
	}
	if n, last := changes(6 * time.Second); n > 1 || last.Mode != Serve {
		t.Errorf("%d changes, then %v", n, last.Mode)
	}
	if n, _ := changes(0); n < 5 {
		t.Errorf("only %d changes without a delay: this test does not test it", n)
	}
}

// At a target burst capacity of 0 the mode follows the instances at once: there is no border that a load could be around.
func TestModeAtZeroDoesNotWait(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("target-burst-capacity", "0"), 10)), func(w *world) {
		w.set(w.rev)
		w.demand(1, 0)
		w.until(seconds(0.2))
		if m := w.status().Mode; m != Serve {
			t.Errorf("%v with a ready instance", m)
		}
	})
}

// Reports of instances that are gone, or never were, count for nothing; those of activators do.
func TestReportsOfStrangers(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.demand(70, 0)
		w.load = 70
		w.until(seconds(10))
		before := w.status()
		for i := range 30 { // an instance that nobody knows goes on reporting
			w.until(seconds(10 + float64(i)))
			w.a.Report([]endpoints.Stat{{Revision: w.rev.ID(), Source: "gone", Time: time.Now(), Concurrency: 1000}})
		}
		if after := w.status(); after.Stable != before.Stable || after.Desired != before.Desired {
			t.Errorf("before %+v\nafter %+v", before, after)
		}
		w.a.Report([]endpoints.Stat{{Revision: w.rev.ID(), Source: "activator-2", Activator: true, Time: time.Now(), Concurrency: 1000}})
		w.until(seconds(43))
		if after := w.status(); after.Stable == before.Stable {
			t.Error("an activator's report was not counted")
		}
	})
}

// Ticks just before the report of a second see the load all the same; with the averages as Knative takes them they see a fifth.
func TestWeightedOutOfStep(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("metric-aggregation-algorithm", "weighted-exponential", "window", "6s", "target-burst-capacity", "0"), 10)), func(w *world) {
		w.set(w.rev)
		w.until(seconds(0.9)) // ticks fall on 0.9 s; the report about a second comes a tenth after them
		w.demand(20, 0)
		w.load = 20
		w.until(seconds(40))
		if s := w.status(); s.Desired != 3 || s.Stable < 19 {
			t.Errorf("desired %d of a load of %v", s.Desired, s.Stable)
		}
		w.stop()
		r := w.a.revisions[w.rev.ID()]
		if v := r.stable.Average(r.stable.origin.Add(time.Duration(r.stable.last+1) * time.Second)); v > 10 {
			t.Errorf("Knative's average is %v: this test does not test it", v)
		}
	})
}
