package autoscaler

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// agentStub keeps the last order of each revision, as an agent does, and answers with a snapshot from inside the call.
type agentStub struct {
	a  *Autoscaler
	mu sync.Mutex
	n  map[api.RevisionID]int
}

func (s *agentStub) Scale(id api.RevisionID, n int, _ time.Time) {
	s.mu.Lock()
	s.n[id] = n
	s.mu.Unlock()
	snap := &endpoints.Snapshot{Revision: id, Desired: n}
	for i := range n {
		snap.Instances = append(snap.Instances, endpoints.Instance{ID: fmt.Sprint(i), State: endpoints.Ready})
	}
	s.a.Observe(snap) // calls back while the loop calls out: no lock may be held
}

// TestConcurrentUse has every method called from everywhere at once, on real time; the race detector judges.
func TestConcurrentUse(t *testing.T) {
	c := DefaultConfig()
	c.Tick = 2 * time.Millisecond
	stub := &agentStub{n: map[api.RevisionID]int{}}
	a := New(c, stub)
	stub.a = a
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()

	revisions := make([]*api.Revision, 20)
	for i := range revisions {
		revisions[i] = testRevision(fmt.Sprintf("r%d", i), nil, 10)
	}
	var told atomic.Int64
	a.Subscribe(func(id api.RevisionID, _ Status) { a.Status(id); told.Add(1) })
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for range 2000 {
				rev := revisions[r.IntN(len(revisions))]
				switch id := rev.ID(); r.IntN(6) {
				case 0:
					a.SetRevision(rev)
				case 1:
					a.Demand(endpoints.Demand{Revision: id, Waiting: r.IntN(100), At: time.Now()})
				case 2, 3:
					a.Report([]endpoints.Stat{{Revision: id, Source: fmt.Sprint(g), Time: time.Now(), Concurrency: r.Float64() * 50}})
				case 4:
					a.Status(id)
				case 5:
					if r.IntN(20) == 0 {
						a.RemoveRevision(id)
					} else {
						a.Subscribe(func(api.RevisionID, Status) {})
					}
				}
			}
		})
	}
	wg.Wait()
	for _, rev := range revisions {
		a.SetRevision(rev)
		a.Demand(endpoints.Demand{Revision: rev.ID(), Waiting: 70, At: time.Now()})
	}
	eventually(t, func() bool {
		stub.mu.Lock()
		defer stub.mu.Unlock()
		for _, rev := range revisions {
			if stub.n[rev.ID()] < 10 {
				return false
			}
		}
		return told.Load() > 0
	})
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("not within 10 s")
		}
		time.Sleep(time.Millisecond)
	}
}

// BenchmarkDemand is the way from a demand at zero to the order, through the running loop, with 10,000 known revisions.
func BenchmarkDemand(b *testing.B) {
	const n = 10_000
	orders := make(chan api.RevisionID, n)
	a := New(DefaultConfig(), scalerFunc(func(id api.RevisionID, n int) {
		if n > 0 {
			orders <- id
		}
	}))
	ids := make([]api.RevisionID, n)
	for i := range ids {
		rev := healthy(testRevision(fmt.Sprintf("r%05d", i), nil, 10))
		ids[i] = rev.ID()
		a.SetRevision(rev)
	}
	a.drain()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { _ = a.Run(ctx) }()
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		id := ids[i%n]
		if i >= n { // once round: make it new
			a.RemoveRevision(id)
			a.SetRevision(healthy(testRevision(string(id[len("default/"):]), nil, 10)))
		}
		i++
		a.Demand(endpoints.Demand{Revision: id, Waiting: 1, At: time.Now()})
		if got := <-orders; got != id {
			b.Fatal(got)
		}
	}
}

type scalerFunc func(api.RevisionID, int)

func (f scalerFunc) Scale(id api.RevisionID, n int, _ time.Time) { f(id, n) }

// BenchmarkActive is a second of n busy revisions: a report each, and half of them tick.
func BenchmarkActive(b *testing.B) {
	const n = 1000
	a := New(DefaultConfig(), scalerFunc(func(api.RevisionID, int) {}))
	var revs []*revision
	now := time.Now()
	for i := range n {
		rev := healthy(testRevision(fmt.Sprintf("r%05d", i), nil, 10))
		a.SetRevision(rev)
		a.Observe(&endpoints.Snapshot{Revision: rev.ID(), Instances: []endpoints.Instance{{ID: "0", State: endpoints.Ready}}})
	}
	a.drain()
	for _, r := range a.revisions {
		revs = append(revs, r)
	}
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(time.Second)
		for _, r := range revs {
			a.report(now, r, []endpoints.Stat{{Source: "0", Time: now, Concurrency: 5}})
		}
		a.due(now)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/revision-second")
}
