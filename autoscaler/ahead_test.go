package autoscaler

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// several is an agent with several revisions, whose instances are ready a second after they are ordered.
type several struct {
	a      *Autoscaler
	want   map[api.RevisionID]int
	ready  map[api.RevisionID]int
	due    map[api.RevisionID]time.Time // when what is wanted is ready
	load   map[api.RevisionID]float64
	came   map[api.RevisionID]float64   // requests since the last report
	orders map[api.RevisionID]time.Time // of the last order that was not 0
	told   chan order
}

func (s *several) Scale(id api.RevisionID, n int, _ time.Time) { s.told <- order{id: id, n: n} }

// settle carries out what was ordered.
func (s *several) settle() {
	for {
		synctest.Wait()
		select {
		case o := <-s.told:
			if o.n > s.want[o.id] {
				s.due[o.id], s.orders[o.id] = time.Now().Add(time.Second), time.Now()
			}
			s.want[o.id], s.ready[o.id] = o.n, min(s.ready[o.id], o.n)
			s.observe(o.id)
		default:
			return
		}
	}
}

func (s *several) observe(id api.RevisionID) {
	snap := &endpoints.Snapshot{Revision: id, Desired: s.want[id]}
	for i := range s.want[id] {
		in := endpoints.Instance{ID: fmt.Sprint(i), State: endpoints.Ready}
		if i >= s.ready[id] {
			in.State = endpoints.Starting
		}
		snap.Instances = append(snap.Instances, in)
	}
	s.a.Observe(snap)
}

// pass lets a whole number of seconds go by.
func (s *several) pass(seconds int) {
	for range seconds {
		s.settle()
		time.Sleep(time.Second)
		for id, at := range s.due {
			if !time.Now().Before(at) {
				s.ready[id] = s.want[id]
				delete(s.due, id)
				s.observe(id)
			}
		}
		for id, n := range s.ready {
			for i := range n {
				s.a.Report([]endpoints.Stat{{Revision: id, Source: fmt.Sprint(i), Time: time.Now().Add(-time.Millisecond), Concurrency: s.load[id] / float64(n), Requests: s.came[id] / float64(n)}})
			}
			if n > 0 {
				s.came[id] = 0
			}
		}
		s.settle()
	}
}

// ask is a request that comes now and stays for a second; it says whether an instance was ready for it.
func (s *several) ask(id api.RevisionID) (warm bool) {
	s.settle()
	if warm = s.ready[id] > 0; !warm {
		s.a.Demand(endpoints.Demand{Revision: id, Waiting: 1, At: time.Now()})
		s.settle()
	}
	s.load[id], s.came[id] = 1, 1
	return warm
}

func inSeveral(t *testing.T, c Config, revs []*api.Revision, test func(s *several)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &several{want: map[api.RevisionID]int{}, ready: map[api.RevisionID]int{}, due: map[api.RevisionID]time.Time{},
			load: map[api.RevisionID]float64{}, came: map[api.RevisionID]float64{}, orders: map[api.RevisionID]time.Time{}, told: make(chan order, 1000)}
		s.a = New(c, s)
		done := make(chan error)
		ctx, stop := context.WithCancel(t.Context())
		go func() { done <- s.a.Run(ctx) }()
		for _, rev := range revs {
			s.a.SetRevision(healthy(rev))
			s.a.Observe(&endpoints.Snapshot{Revision: rev.ID()})
		}
		test(s)
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A function that another one calls is started at the moment at which the other one has to be started for a request, not when the call
// comes. Where nobody tells of calls, each is cold.
func TestCalleeStartsWithCaller(t *testing.T) {
	c := DefaultConfig()
	c.PlannerValue = 60 // so low that nothing is kept for long
	for _, tell := range []bool{true, false} {
		caller, callee := testRevision("caller", planned(), 10), testRevision("callee", planned(), 10)
		inSeveral(t, c, []*api.Revision{caller, callee}, func(s *several) {
			random := rand.New(rand.NewPCG(5, 6))
			warm, together := 0, 0
			for i := range 30 {
				begin := time.Now()
				s.ask(caller.ID())
				if at, ok := s.orders[callee.ID()]; ok && at.Equal(begin) && i >= 20 {
					together++
				}
				s.pass(2)
				if s.ask(callee.ID()) && i >= 20 {
					warm++
				}
				if tell {
					s.a.Calls([]endpoints.Call{{Caller: caller.ID(), Callee: callee.ID(), N: 1}})
				}
				s.pass(2)
				s.load[caller.ID()], s.load[callee.ID()] = 0, 0
				s.pass(400 + random.IntN(2000))
			}
			if tell && (warm < 9 || together < 9) || !tell && warm > 2 {
				t.Errorf("told of calls: %v; of 10 calls %d found an instance, %d of these started with the caller's", tell, warm, together)
			}
		})
	}
}

// Before traffic is shifted, the revision that gets it has the instances for it. Knative's rules know of no shift.
func TestShiftIsPrepared(t *testing.T) {
	for _, annotations := range []map[string]string{planned(), annotated()} {
		before, next := testRevision("r-00001", annotations, 10), testRevision("r-00002", annotations, 10)
		inSeveral(t, DefaultConfig(), []*api.Revision{before, next}, func(s *several) {
			s.a.Demand(endpoints.Demand{Revision: before.ID(), Waiting: 75, At: time.Now()})
			s.load[before.ID()] = 75
			s.pass(90)
			had := s.ready[next.ID()]
			asked := 0
			for !s.a.Shift(before.ID(), next.ID(), 0.5) {
				if asked++; asked > 30 {
					t.Fatal("never ready")
				}
				s.pass(1)
			}
			predictive := annotations[AnnotationPlanner] == PlannerPredictive
			if now := s.ready[next.ID()]; predictive && (asked == 0 || had != 0 || now < 4) || !predictive && (asked != 0 || now != had) {
				t.Errorf("predictive: %v; %d instances before, %d when all was ready, asked %d times", predictive, had, now, asked)
			}
			if s.a.Shift(before.ID(), "default/nobody", 0.5) != true || !s.a.Shift(before.ID(), next.ID(), 0) || !s.a.Shift(before.ID(), next.ID(), 7) {
				t.Error("waits for what cannot be")
			}
			s.load[before.ID()] = 0
			s.pass(4 * 3600)
			if n := s.want[next.ID()]; n > 1 {
				t.Errorf("%d instances are left hours after a shift that brought nothing", n)
			}
		})
	}
}

// Another configuration counts for a revision from when it is told of again, and for its own annotations never.
func TestConfigure(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.demand(20, 0)
		w.load = 20
		w.until(seconds(10))
		w.expect(order{at: 0, n: 3})
		c := DefaultConfig()
		c.ContainerConcurrencyTargetFraction, c.MinScale = 0.5, 2
		w.a.Configure(c)
		w.until(seconds(12.1))
		w.expect() // not told of again
		w.set(w.rev)
		w.until(seconds(20))
		if s := w.status(); s.Desired != 4 || s.Policy.Target != 5 || s.Policy.MinScale != 2 {
			t.Errorf("%d instances, policy %+v", s.Desired, *s.Policy)
		}
		own := testRevision("r", annotated("target-utilization-percentage", "100", "min-scale", "1"), 10)
		w.set(healthy(own))
		w.until(seconds(100))
		if s := w.status(); s.Desired != 2 || s.Policy.Target != 10 || s.Policy.MinScale != 1 {
			t.Errorf("%d instances, policy %+v", s.Desired, *s.Policy)
		}
	})
}
