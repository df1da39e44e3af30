package autoscaler

import (
	"bytes"
	"errors"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
)

func planned(pairs ...string) map[string]string {
	m := annotated(pairs...)
	m[AnnotationPlanner] = "predictive"
	return m
}

// rounds lets a request of half a second come each three minutes and counts how many of the last n found no instance.
func rounds(w *world, all, n int) (cold int, instanceSeconds float64) {
	const period = 3 * time.Minute
	next := time.Since(w.began) + period
	for i := range all {
		for time.Since(w.began) < next {
			w.until(min(next, time.Since(w.began)+time.Second))
			if i >= all-n {
				instanceSeconds += float64(w.ready + len(w.starts))
			}
		}
		if i >= all-n && w.ready == 0 {
			cold++
		}
		w.demand(1, 0)
		w.load = 0.5
		w.until(next + time.Second)
		w.load = 0
		next += period
	}
	return cold, instanceSeconds
}

// A function that is called each three minutes is started ahead of its call once that is known; under Knative's rules, which look back
// over a minute, each call is cold.
func TestPredictivePeriodic(t *testing.T) {
	var cold [2]int
	var cost [2]float64
	for i, annotations := range []map[string]string{planned(), annotated()} {
		inWorld(t, DefaultConfig(), healthy(testRevision("r", annotations, 10)), func(w *world) {
			w.set(w.rev)
			cold[i], cost[i] = rounds(w, 25, 10)
			if s := w.status(); (s.Outlook == "") != (i == 1) {
				t.Errorf("outlook %q", s.Outlook)
			}
		})
	}
	if cold[0] > 1 || cold[1] != 10 {
		t.Errorf("cold: predictive %d, kpa %d of 10", cold[0], cold[1])
	}
	t.Logf("10 calls: cold %d at %.0f instance-seconds (kpa: %d at %.0f)", cold[0], cost[0], cold[1], cost[1])
}

// What was learnt outlives the process, or is learnt again when it is damaged.
func TestLearntIsKept(t *testing.T) {
	var kept []byte
	c := DefaultConfig()
	c.Keep = &Keep{Save: func(_ int, b []byte) { kept = bytes.Clone(b) }}
	inWorld(t, c, healthy(testRevision("r", planned(), 10)), func(w *world) {
		w.set(w.rev)
		rounds(w, 25, 0)
	})
	if len(kept) == 0 {
		t.Fatal("nothing was saved")
	}
	c.Keep = &Keep{Learnt: kept, Save: func(int, []byte) {}}
	var takeOver []byte
	learnt := func(c Config, name string) (cold int, cost float64) {
		inWorld(t, c, healthy(testRevision(name, planned(), 10)), func(w *world) {
			time.Sleep(80 * time.Minute) // each bubble begins with the same year: it is later now
			w.began = time.Now()
			if takeOver != nil {
				w.a.Remember(takeOver)
			}
			w.set(w.rev)
			w.demand(1, 0)
			w.load = 0.5
			w.until(seconds(1))
			w.load = 0
			cold, cost = rounds(w, 3, 3)
		})
		return cold, cost
	}
	cold, cost := learnt(c, "r")
	if cold > 1 || cost > 100 {
		t.Errorf("%d of 3 calls are cold after a restart, at %.0f instance-seconds", cold, cost)
	}
	// The same for one that is told of it when it takes a revision over.
	handed := c
	handed.Keep = &Keep{Save: func(int, []byte) {}}
	takeOver = kept
	if cold, cost := learnt(handed, "r"); cold > 1 || cost > 100 {
		t.Errorf("%d of 3 calls are cold after a take-over, at %.0f instance-seconds", cold, cost)
	}
	takeOver = nil
	kept[len(kept)/2] ^= 1
	if cold, cost := learnt(c, "r"); cold < 2 && cost < 200 { // it is no error: it is learnt again
		t.Errorf("%d cold at %.0f instance-seconds although what was learnt is damaged: this test does not test it", cold, cost)
	}
}

// A queue, bounds and silence count as they do without the planner.
func TestPredictiveKeepsTheRules(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", planned("max-scale", "4", "min-scale", "1"), 10)), func(w *world) {
		w.set(w.rev)
		w.until(seconds(3))
		w.expect(order{at: seconds(2), n: 1})
		w.demand(1000, 0)
		w.expect(order{at: seconds(3), n: 4})
		w.load = 40
		w.until(seconds(30))
		w.expect()
		w.silent = true
		w.until(seconds(400))
		w.expect() // nothing is known, nothing is taken away
		w.silent, w.load = false, 0
		w.until(seconds(3000))
		if n := w.orders[len(w.orders)-1].n; n != 1 {
			t.Errorf("ends with %d, want min-scale", n)
		}
	})
}

func TestPlannerAnnotation(t *testing.T) {
	for value, want := range map[string]bool{"predictive": true, "kpa": false, "other": false} {
		p, err := PolicyFor(DefaultConfig(), map[string]string{AnnotationPlanner: value}, 10)
		if p.Predictive != want || errors.Is(err, ErrAnnotation) != (value == "other") {
			t.Errorf("%s: %v %v", value, p.Predictive, err)
		}
	}
	if p, err := PolicyFor(DefaultConfig(), planned("metric", "rps"), 10); p.Predictive || err == nil || !strings.Contains(err.Error(), "metric concurrency only") {
		t.Errorf("rps: %v %v", p.Predictive, err)
	}
	c := DefaultConfig()
	c.Predictive = true
	if p, _ := PolicyFor(c, map[string]string{AnnotationPlanner: "kpa"}, 10); p.Predictive {
		t.Error("the annotation does not win")
	}
}

func FuzzReadLearnt(f *testing.F) {
	p := newPlans(Config{Keep: &Keep{Save: func(_ int, b []byte) { f.Add(b) }}})
	p.changed[0] = true
	r := newRevision("default/r-00001")
	r.policy = &Policy{Predictive: true, Total: 10}
	r.active = &active{}
	p.admit(t0, nil, r, "r")
	p.save(t0, map[api.RevisionID]*revision{r.id: r}, true)
	f.Add([]byte{learntVersion, 255, 255, 255, 255, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		prior, functions, err := readLearnt(b)
		if err != nil && (prior != nil || functions != nil) {
			t.Error("an error and an answer")
		}
		for _, one := range functions {
			id := p.planner.Add(10)
			_ = p.planner.Restore(unix(t0), id, one)
			if d := p.planner.Decide(unix(t0), id); d.Target < 0 || math.IsNaN(d.Wake) {
				t.Errorf("%+v", d)
			}
			p.planner.Remove(id)
		}
		_ = p.planner.RestorePrior(prior)
	})
}

// What was learnt is saved in parts, each with what belongs to it and only when something was learnt of it; what is known of a revision that was
// given away is saved once more, and of a removed one not.
func TestLearntInParts(t *testing.T) {
	saved := map[int][]api.RevisionID{}
	p := newPlans(Config{Keep: &Keep{
		Part: func(id api.RevisionID) int { return int(id[len(id)-1] - '0') },
		Save: func(part int, b []byte) {
			_, functions, err := readLearnt(b)
			if err != nil {
				t.Error(err)
			}
			saved[part] = slices.Sorted(maps.Keys(functions))
		},
	}})
	revisions := map[api.RevisionID]*revision{}
	for _, id := range []api.RevisionID{"n/a0", "n/b1", "n/c1", "n/d2"} {
		r := newRevision(id)
		r.policy = &Policy{Predictive: true, Total: 10}
		p.admit(t0, slog.New(slog.DiscardHandler), r, string(id))
		revisions[id] = r
	}
	check := func(what string, want map[int][]api.RevisionID) {
		t.Helper()
		clear(saved)
		p.save(t0, revisions, true)
		if !maps.EqualFunc(saved, want, slices.Equal) {
			t.Errorf("%s: saved %v, want %v", what, saved, want)
		}
	}
	p.changed[0], p.changed[1] = true, true
	check("two parts", map[int][]api.RevisionID{0: {"n/a0"}, 1: {"n/b1", "n/c1"}})
	check("nothing new", nil)
	p.leave(revisions["n/b1"])
	p.remove(revisions["n/b1"])
	p.remove(revisions["n/c1"])
	p.changed[1] = true
	check("one given away, one removed", map[int][]api.RevisionID{1: {"n/b1"}})
}
