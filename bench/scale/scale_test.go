// Package scale measures how far the deciding parts reach, with a runtime that does nothing: decisions a second, a million functions,
// a million instances, ten thousand first requests in one second. `make bench-scale` runs all of it and says so when a figure is missed.
package scale

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/autoscaler/planner"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/placement"
)

// share is the part of the full size that is measured: 1, or less for a quick look (THAW_BENCH_SHARE=0.01).
var share = func() float64 {
	var v float64
	if _, err := fmt.Sscan(os.Getenv("THAW_BENCH_SHARE"), &v); err != nil || v <= 0 || v > 1 {
		return 1
	}
	return v
}()

func sized(n int) int { return max(1, int(float64(n)*share)) }

// limit fails the benchmark if a figure of the full size is missed.
func limit(b *testing.B, what string, got, atMost float64) {
	b.Helper()
	if share == 1 && got > atMost {
		b.Errorf("%s is %.4g, want at most %.4g", what, got, atMost)
	}
}

// cpu is the processor time that this process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func revision(i int) *api.Revision {
	r := &api.Revision{ObjectMeta: api.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("fn-%07d-00001", i)}}
	hard := int64(10)
	r.Spec.ContainerConcurrency = &hard
	r.Status.Conditions.Set(time.Now(), api.ConditionContainerHealthy, api.True, "", "")
	return r
}

// fleet is a running autoscaler with n functions that it knows.
type fleet struct {
	*autoscaler.Autoscaler
	ids []api.RevisionID
}

func newFleet(b *testing.B, n int, c autoscaler.Config, s autoscaler.Scaler) *fleet {
	b.Helper()
	f := &fleet{Autoscaler: autoscaler.New(c, s), ids: make([]api.RevisionID, n)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = f.Run(ctx) }()
	b.Cleanup(func() { cancel(); <-done })
	for i := range n {
		rev := revision(i)
		f.ids[i] = rev.ID()
		f.SetRevision(rev)
		if i%5000 == 4999 || i == n-1 { // in portions, so that what is measured is not the making
			for _, id := range f.ids[i/5000*5000 : i+1] {
				for _, ok := f.Status(id); !ok; _, ok = f.Status(id) {
					time.Sleep(100 * time.Microsecond)
				}
			}
		}
	}
	return f
}

type scalerFunc func(id api.RevisionID, n int, decided time.Time)

func (f scalerFunc) Scale(id api.RevisionID, n int, decided time.Time) { f(id, n, decided) }

// BenchmarkDecisions is a decision with everything that belongs to it: both averages, Knative's rules, and the planner's forecast for the
// same function, over 10,000 functions in turn. ns/op is processor time on one core.
func BenchmarkDecisions(b *testing.B) {
	type fn struct {
		stable, panic *autoscaler.Window
		memory        autoscaler.Memory
		id            planner.ID
	}
	origin := time.Unix(1_700_000_000, 0)
	p, err := autoscaler.PolicyFor(autoscaler.DefaultConfig(), nil, 10)
	if err != nil {
		b.Fatal(err)
	}
	plan := planner.New(planner.DefaultConfig())
	fns := make([]fn, sized(10_000))
	now := origin
	for i := range fns {
		fns[i] = fn{
			stable: autoscaler.NewWindow(origin, p.StableWindow, p.Aggregation), panic: autoscaler.NewWindow(origin, p.PanicWindow, p.Aggregation),
			memory: autoscaler.NewMemory(origin, origin, p, 0), id: plan.Add(p.Target),
		}
	}
	for s := range 90 { // a minute and a half of load, different for each
		now = origin.Add(time.Duration(s) * time.Second)
		for i := range fns {
			load := float64((i*7+s*(1+i%5))%40) / 2
			fns[i].stable.Record(now, load)
			fns[i].panic.Record(now, load)
			plan.Observe(float64(now.Unix()), fns[i].id, &planner.Load{Seconds: []float64{load}, Arrivals: int(load), Done: int(load), Running: int(load)})
		}
	}
	at, sum := float64(now.Unix()), 0
	b.ReportAllocs()
	began := cpu()
	i := 0
	for b.Loop() {
		f := &fns[i%len(fns)]
		var d autoscaler.Decision
		d, f.memory = autoscaler.Decide(now, p, autoscaler.Load{Ready: 2, Stable: f.stable.Average(now), Panic: f.panic.Average(now), Measured: true}, f.memory)
		sum += max(d.Desired, plan.Decide(at, f.id).Target)
		i++
	}
	each := float64(cpu()-began) / float64(b.N)
	b.ReportMetric(1e9/each, "decisions/core-s")
	if sum == 0 {
		b.Error("nothing was decided")
	}
	if b.N > 10_000 {
		limit(b, "ns of processor time for a decision", each, 1000)
	}
}

// BenchmarkMillion has a million functions, of which 50,000 are active: each of these reports each second, and each is decided about each
// second. Which ones they are, and in which order they report, has nothing to do with the order in which they were made.
func BenchmarkMillion(b *testing.B) {
	const seconds = 10
	c := autoscaler.DefaultConfig()
	c.Tick = time.Second
	n, active := sized(1_000_000), sized(50_000)
	f := newFleet(b, n, c, scalerFunc(func(api.RevisionID, int, time.Time) {}))
	random := rand.New(rand.NewPCG(1, 2))
	random.Shuffle(n, func(i, j int) { f.ids[i], f.ids[j] = f.ids[j], f.ids[i] })
	for _, i := range random.Perm(active) {
		f.Observe(&endpoints.Snapshot{Revision: f.ids[i], Instances: []endpoints.Instance{{ID: "0", State: endpoints.Ready}}})
	}
	reports := make([]endpoints.Stat, active)
	report := func(now time.Time) {
		for i := range reports {
			reports[i] = endpoints.Stat{Revision: f.ids[i], Source: "0", Time: now, Concurrency: 3}
		}
		for part := range slices.Chunk(reports, 500) { // as from 100 nodes
			f.Report(part)
		}
	}
	report(time.Now())
	time.Sleep(2 * time.Second)
	debug.FreeOSMemory()
	var m runtime.MemStats
	for b.Loop() {
		began, wall := cpu(), time.Now()
		tick := time.NewTicker(time.Second)
		for range seconds {
			report(<-tick.C)
		}
		tick.Stop()
		used := float64(cpu()-began) / float64(time.Since(wall))
		runtime.ReadMemStats(&m)
		b.ReportMetric(100*used, "%core")
		b.ReportMetric(float64(m.Sys-m.HeapReleased)/1e6, "MB")
		b.Logf("%.1f %% of a core, %.0f MB", 100*used, float64(m.Sys-m.HeapReleased)/1e6)
		limit(b, "share of a core", used, 0.10)
		limit(b, "memory in MB", float64(m.Sys-m.HeapReleased)/1e6, 1000)
	}
	for _, i := range []int{0, active - 1} {
		if s, _ := f.Status(f.ids[i]); s.Stable <= 0 || time.Since(s.Decided) > 3*time.Second {
			b.Errorf("function %d was not decided about: %+v", i, s)
		}
	}
}

// nodes is a runtime that starts nothing: an instance is placed by the real table, and ready when its turn has come.
type nodes struct {
	table  *placement.Table
	scaler *autoscaler.Autoscaler
	wake   chan struct{}

	mu      sync.Mutex
	wanted  map[api.RevisionID]int
	where   map[api.RevisionID][]string
	serial  uint64
	started int
	refused int
}

func (r *nodes) Scale(id api.RevisionID, n int, _ time.Time) {
	r.mu.Lock()
	r.wanted[id] = n
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *nodes) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		}
		r.mu.Lock()
		wanted := r.wanted
		r.wanted = map[api.RevisionID]int{}
		r.mu.Unlock()
		for id, n := range wanted {
			r.start(id, n)
		}
	}
}

// start places what is missing and says so: starting, then ready.
func (r *nodes) start(id api.RevisionID, n int) {
	at := r.where[id]
	before := len(at)
	for len(at) < n {
		node, err := r.table.Place(time.Now(), 1)
		if err != nil {
			r.refused++
			break
		}
		at = append(at, node)
	}
	r.where[id] = at
	for _, s := range []endpoints.State{endpoints.Starting, endpoints.Ready} {
		r.serial++
		snap := &endpoints.Snapshot{Revision: id, Sequence: r.serial, Desired: n, Instances: make([]endpoints.Instance, len(at))}
		for i, node := range at {
			snap.Instances[i] = endpoints.Instance{ID: node, Revision: id, State: endpoints.Ready, Capacity: 10}
			if i >= before {
				snap.Instances[i].State = s
			}
		}
		r.scaler.Observe(snap)
	}
	r.mu.Lock()
	r.started += len(at) - before
	r.mu.Unlock()
}

// BenchmarkInstances starts a million instances of 10,000 functions on 1,000 nodes: a demand, a decision, a placement and two snapshots
// each time, until every function has its hundred.
func BenchmarkInstances(b *testing.B) {
	functions, each := sized(10_000), 100
	for b.Loop() {
		r := &nodes{table: placement.New(placement.Spread), wake: make(chan struct{}, 1), wanted: map[api.RevisionID]int{}, where: map[api.RevisionID][]string{}}
		for i := range max(10, sized(1000)) {
			if err := r.table.Add(placement.Node{Name: fmt.Sprintf("node-%04d", i), Units: 1100, StartRate: 10_000, StartBurst: 1000}); err != nil {
				b.Fatal(err)
			}
		}
		f := newFleet(b, functions, autoscaler.DefaultConfig(), r)
		r.scaler = f.Autoscaler
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { r.run(ctx) })

		began, used := time.Now(), cpu()
		for _, id := range f.ids {
			f.Demand(endpoints.Demand{Revision: id, Waiting: each * 7, At: time.Now()})
		}
		count := func() (int, int) { r.mu.Lock(); defer r.mu.Unlock(); return r.started, r.refused }
		for n, _ := count(); n < functions*each; n, _ = count() {
			if time.Since(began) > 5*time.Minute {
				b.Fatalf("only %d of %d instances", n, functions*each)
			}
			time.Sleep(time.Millisecond)
		}
		took := time.Since(began)
		n, refused := count()
		used = cpu() - used
		for _, id := range []api.RevisionID{f.ids[0], f.ids[functions-1]} {
			for s, _ := f.Status(id); s.Ready != each; s, _ = f.Status(id) {
				if time.Since(began) > 5*time.Minute {
					b.Fatalf("%s has %d ready", id, s.Ready)
				}
				time.Sleep(time.Millisecond)
			}
		}
		cancel()
		running.Wait()
		most, least := 0, math.MaxInt
		for i := range max(10, sized(1000)) {
			free := r.table.Free(fmt.Sprintf("node-%04d", i))
			most, least = max(most, free), min(least, free)
		}
		b.ReportMetric(float64(n)/took.Seconds(), "starts/s")
		b.ReportMetric(float64(used.Nanoseconds())/float64(n), "cpu-ns/start")
		b.ReportMetric(float64(refused), "refused")
		if n != functions*each || most-least > 1 {
			b.Errorf("%d instances, nodes have %d to %d free", n, least, most)
		}
		limit(b, "1/(starts a second)", took.Seconds()/float64(n), 1.0/10_000)
	}
}

// BenchmarkFirstRequests wakes 10,000 sleeping functions within one second, at random moments, and takes the time from the word of the
// request to the order of a start.
func BenchmarkFirstRequests(b *testing.B) {
	debug.FreeOSMemory() // what an earlier benchmark has left is not this one's
	for b.Loop() {
		n := sized(10_000)
		var mu sync.Mutex
		asked, took := map[api.RevisionID]time.Time{}, make([]time.Duration, 0, n)
		done := make(chan struct{})
		f := newFleet(b, sized(100_000), autoscaler.DefaultConfig(), scalerFunc(func(id api.RevisionID, _ int, _ time.Time) {
			now := time.Now()
			mu.Lock()
			defer mu.Unlock()
			if at, ok := asked[id]; ok {
				delete(asked, id)
				if took = append(took, now.Sub(at)); len(took) == n {
					close(done)
				}
			}
		}))
		random := rand.New(rand.NewPCG(1, 2))
		moments := make([]time.Duration, n)
		for i := range moments {
			moments[i] = time.Duration(random.Int64N(int64(time.Second)))
		}
		slices.Sort(moments)
		var late []time.Duration // how late this machine wakes a sleeper: the noise in what is measured
		began := time.Now()
		for i, at := range moments {
			if d := at - time.Since(began); d > 0 {
				time.Sleep(d)
				late = append(late, time.Since(began)-at)
			}
			id := f.ids[i*len(f.ids)/n]
			mu.Lock()
			asked[id] = time.Now()
			mu.Unlock()
			f.Demand(endpoints.Demand{Revision: id, Waiting: 1, At: time.Now()})
		}
		select {
		case <-done:
		case <-time.After(time.Minute):
			b.Fatalf("only %d of %d were started", len(took), n)
		}
		slices.Sort(took)
		ms := func(q float64) float64 {
			return float64(took[min(n-1, int(q*float64(n)))].Microseconds()) / 1000
		}
		slices.Sort(late)
		noise := float64(late[int(0.99*float64(len(late)-1))].Microseconds()) / 1000
		b.ReportMetric(noise, "p99-wakeup-ms")
		b.Logf("request to order: p50 %.3f ms, p99 %.3f ms; sleepers are woken late by %.3f ms (p99)", ms(0.5), ms(0.99), noise)
		b.ReportMetric(ms(0.5), "p50-ms")
		b.ReportMetric(ms(0.99), "p99-ms")
		b.ReportMetric(ms(1), "max-ms")
		limit(b, "p99 in ms", ms(0.99), 50)
	}
}
