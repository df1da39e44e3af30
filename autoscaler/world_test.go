package autoscaler

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// order is one call of the Scaler.
type order struct {
	at time.Duration // since the world began
	id api.RevisionID
	n  int
}

func (o order) String() string { return fmt.Sprintf("%v:%d", o.at, o.n) }

// world is an agent with one revision, an activator and a clock, inside a synctest bubble. It belongs to the test's goroutine;
// the loop's calls of Scale go into told, from where wait takes them.
type world struct {
	mu   sync.Mutex
	told []order

	t      *testing.T
	stop   func() // ends the loop; once is enough
	a      *Autoscaler
	began  time.Time
	rev    *api.Revision
	orders []order

	startup time.Duration // from order to ready; 0 = never ready by itself
	ready   int
	starts  []time.Time // of the instances that are starting
	desired int
	failure *endpoints.Failure
	load    float64 // concurrent requests: reported by the instances when there are any, else by the activator
	silent  bool    // no reports
	seq     uint64
}

func testRevision(name string, annotations map[string]string, hardLimit int64) *api.Revision {
	rev := &api.Revision{}
	rev.Namespace, rev.Name = "default", name
	rev.Annotations = annotations
	rev.Labels = map[string]string{api.LabelRoutingState: api.RoutingStateActive, api.LabelService: "hello"}
	rev.Spec.ContainerConcurrency = &hardLimit
	return rev
}

func healthy(rev *api.Revision) *api.Revision {
	c := *rev
	c.Status.Conditions = nil
	c.Status.Conditions.Set(time.Now(), api.ConditionContainerHealthy, api.True, "", "")
	return &c
}

func reserve(rev *api.Revision) *api.Revision {
	c := *rev
	c.Labels = map[string]string{api.LabelRoutingState: api.RoutingStateReserve}
	return &c
}

func (w *world) Scale(id api.RevisionID, n int, decided time.Time) {
	if d := time.Since(decided); d < 0 || d > time.Millisecond {
		w.t.Errorf("decided %v ago", d)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told = append(w.told, order{time.Since(w.began), id, n})
}

// wait lets the loop finish and carries its orders out, until there are no more.
func (w *world) wait() {
	for {
		synctest.Wait()
		w.mu.Lock()
		told := w.told
		w.told = nil
		w.mu.Unlock()
		if len(told) == 0 {
			return
		}
		for _, o := range told {
			w.orders = append(w.orders, o)
			w.carryOut(o)
		}
	}
}

func (w *world) carryOut(o order) {
	if o.id != w.rev.ID() {
		return
	}
	w.desired = o.n
	for w.ready+len(w.starts) < o.n && w.failure == nil {
		w.starts = append(w.starts, time.Now())
	}
	w.starts = w.starts[:max(0, min(len(w.starts), o.n-w.ready))]
	w.ready = min(w.ready, o.n)
	w.observe()
}

func (w *world) observe() {
	w.seq++
	s := &endpoints.Snapshot{Revision: w.rev.ID(), Sequence: w.seq, Desired: w.desired, Failure: w.failure}
	for i := range w.ready + len(w.starts) {
		state := endpoints.Ready
		if i >= w.ready {
			state = endpoints.Starting
		}
		s.Instances = append(s.Instances, endpoints.Instance{ID: fmt.Sprint(i), Revision: s.Revision, State: state})
	}
	w.a.Observe(s)
}

// inWorld runs test in a bubble with a running autoscaler.
func inWorld(t *testing.T, c Config, rev *api.Revision, test func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, rev: rev, startup: 100 * time.Millisecond}
		w.a = New(c, w)
		w.began = time.Now()
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- w.a.Run(ctx) }()
		w.stop = sync.OnceFunc(func() {
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		test(w)
		w.stop()
	})
}

// until lets time pass to d after the beginning, in steps of 50 ms: instances get ready, reports go out each second.
func (w *world) until(d time.Duration) {
	const step = 50 * time.Millisecond
	w.wait()
	for time.Since(w.began) < d {
		time.Sleep(step)
		w.wait()
		w.start()
		if time.Since(w.began)%time.Second == 0 {
			w.report()
		}
		w.wait()
	}
}

func (w *world) start() {
	changed := false
	for w.startup > 0 && len(w.starts) > 0 && time.Since(w.starts[0]) >= w.startup {
		w.starts = w.starts[1:]
		w.ready++
		changed = true
	}
	if changed {
		w.observe()
	}
}

// report sends what instances measured, or what the activator holds while there is none. It reports the second just passed.
func (w *world) report() {
	if w.silent {
		return
	}
	when := time.Now().Add(-time.Millisecond)
	if w.ready == 0 {
		if w.load > 0 {
			w.a.Report([]endpoints.Stat{{Revision: w.rev.ID(), Source: "activator", Activator: true, Time: when, Concurrency: w.load}})
		}
		return
	}
	var stats []endpoints.Stat
	for i := range w.ready {
		stats = append(stats, endpoints.Stat{Revision: w.rev.ID(), Source: fmt.Sprint(i), Time: when, Concurrency: w.load / float64(w.ready), Requests: w.load / float64(w.ready)})
	}
	w.a.Report(stats)
}

func (w *world) demand(waiting, running int) {
	w.a.Demand(endpoints.Demand{Revision: w.rev.ID(), Waiting: waiting, Running: running, At: time.Now()})
	w.wait()
}

func (w *world) set(rev *api.Revision) {
	w.a.SetRevision(rev)
	w.wait()
}

func (w *world) status() Status {
	s, ok := w.a.Status(w.rev.ID())
	if !ok {
		w.t.Fatal("no status")
	}
	return s
}

// expect compares all orders since the last expect.
func (w *world) expect(want ...order) {
	w.t.Helper()
	w.wait()
	got := w.orders
	w.orders = nil
	same := len(got) == len(want)
	for i := range min(len(got), len(want)) {
		same = same && got[i].at == want[i].at && got[i].n == want[i].n
	}
	if !same {
		w.t.Errorf("orders %v, want %v", got, want)
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
