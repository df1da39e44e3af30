package activator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/hop"
)

const id api.RevisionID = "default/fn-00001"

// world is an activator with instances that a test controls.
type world struct {
	*Activator
	mu      sync.Mutex
	demands []endpoints.Demand
	serve   func(in endpoints.Instance, x *hop.Exchange) error
	seq     uint64
}

func newWorld(t *testing.T, cfg Config, concurrency int64, annotations map[string]string) *world {
	t.Helper()
	w := &world{}
	w.serve = func(endpoints.Instance, *hop.Exchange) error { return nil }
	cfg.Instance = func(in endpoints.Instance) hop.Handler {
		return hop.HandlerFunc(func(x *hop.Exchange) error { x.Sent = time.Now(); return w.serve(in, x) })
	}
	cfg.Demand = func(d endpoints.Demand) {
		w.mu.Lock()
		w.demands = append(w.demands, d)
		w.mu.Unlock()
	}
	var err error
	if w.Activator, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	rev := &api.Revision{Spec: api.RevisionSpec{ContainerConcurrency: &concurrency}}
	rev.Namespace, rev.Name, rev.Annotations = "default", "fn-00001", annotations
	w.SetRevision(rev)
	return w
}

func (w *world) told() []endpoints.Demand {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.demands
}

// instances pushes a snapshot: names and states.
func (w *world) instances(capacity int, failure *endpoints.Failure, states map[string]endpoints.State) {
	w.seq++
	s := &endpoints.Snapshot{Revision: id, Sequence: w.seq, Failure: failure}
	for name, st := range states {
		s.Instances = append(s.Instances, endpoints.Instance{ID: name, Revision: id, State: st, Capacity: capacity,
			Start: endpoints.StartTimes{Ready: time.Now()}})
	}
	w.SetEndpoints(s)
}

var ready = map[string]endpoints.State{"a": endpoints.Ready}

// client is a hop.Client whose leaving a test decides.
type client struct{ gone atomic.Bool }

func (c *client) Gone() bool { return c.gone.Load() }
func (c *client) Abort()     {}
func (c *client) Reset()     {}

func exchange() *hop.Exchange {
	return &hop.Exchange{Req: &fasthttp.Request{}, Resp: &fasthttp.Response{}, Revision: id, Arrived: time.Now(), Client: &client{}, RemoteAddr: &net.TCPAddr{}}
}

func status(err error) int {
	var e *hop.Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

func TestUnknownRevision(t *testing.T) {
	w := newWorld(t, Config{}, 1, nil)
	x := exchange()
	x.Revision = "default/other"
	if err := w.Serve(x); status(err) != 404 {
		t.Error(err)
	}
}

// A burst at zero: every demand tells the true length, in order of arrival all are served by the one slot that appears, none is
// bound to an instance before.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{}, 1, nil)
		var order []string
		w.serve = func(in endpoints.Instance, x *hop.Exchange) error {
			time.Sleep(time.Millisecond) // the function's work, in virtual time
			order = append(order, x.ID)
			x.Finish() // the whole answer is there
			return nil
		}
		const n = 100
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Microsecond)
				x := exchange()
				x.ID = fmt.Sprint(i)
				if err := w.Serve(x); err != nil {
					t.Errorf("%d: %v", i, err)
				}
				if x.Queued <= 0 || !x.Proxied || !x.Cold {
					t.Errorf("%d: queued %v, proxied %v, cold %v", i, x.Queued, x.Proxied, x.Cold)
				}
				if !strings.Contains(string(x.Resp.Header.Peek("Server-Timing")), "ready;dur=") {
					t.Errorf("%d: no waterfall", i)
				}
			})
		}
		time.Sleep(time.Second)
		if waiting, running := w.Load(id); waiting != n || running != 0 {
			t.Fatalf("waiting %d, running %d", waiting, running)
		}
		if last := w.told()[len(w.told())-1]; last.Waiting != n || last.Revision != id {
			t.Errorf("last demand %+v", last)
		}
		w.instances(1, nil, map[string]endpoints.State{"a": endpoints.Starting})
		synctest.Wait()
		if len(order) > 0 {
			t.Fatal("served by an instance that was not ready")
		}
		w.instances(1, nil, ready)
		wg.Wait()
		for i, v := range order {
			if v != fmt.Sprint(i) {
				t.Fatalf("served as number %d: %s", i, v)
			}
		}
	})
}

// What provably was not sent goes elsewhere, at the head of the queue; everything else is never repeated.
func TestOnlyTheUnsentIsRepeated(t *testing.T) {
	for _, c := range []struct {
		err   error
		tries int32
	}{{hop.ErrNotSent, 2}, {fmt.Errorf("wrapped: %w", hop.ErrBusy), 2}, {&hop.Error{Status: 502}, 1}, {errors.New("anything else"), 1}} {
		w := newWorld(t, Config{}, 1, nil)
		w.instances(1, nil, ready)
		var tries atomic.Int32
		w.serve = func(endpoints.Instance, *hop.Exchange) error {
			if tries.Add(1) == 1 {
				return c.err
			}
			return nil
		}
		err := w.Serve(exchange())
		if tries.Load() != c.tries || (err == nil) != (c.tries == 2) {
			t.Errorf("%v: %d tries, %v", c.err, tries.Load(), err)
		}
	}
}

// An instance that is gone is not asked for ever: the request waits until a better one comes.
func TestRefusingInstanceIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld(t, Config{}, 1, nil)
		done := make(chan error)
		go func() { done <- w.Run(ctx) }()
		var dead atomic.Int32
		w.serve = func(in endpoints.Instance, x *hop.Exchange) error {
			if in.ID == "dead" {
				dead.Add(1)
				return hop.ErrNotSent
			}
			return nil
		}
		w.instances(1, nil, map[string]endpoints.State{"dead": endpoints.Ready})
		served := make(chan error)
		go func() { served <- w.Serve(exchange()) }()
		time.Sleep(10 * time.Second)
		if n := dead.Load(); n < 3 || n > 40 {
			t.Errorf("asked %d times in 10 s: it must be tried again now and then, and not in a spin", n)
		}
		w.instances(1, nil, map[string]endpoints.State{"dead": endpoints.Ready, "good": endpoints.Ready})
		if err := <-served; err != nil {
			t.Error(err)
		}
		cancel()
		<-done
	})
}

func TestEndsOfWaiting(t *testing.T) {
	failure := &endpoints.Failure{Reason: "ExitCode3", Message: "no database"}
	for _, c := range []struct {
		name   string
		happen func(w *world, c *client)
		status int
		says   string
	}{
		{"too long", func(w *world, c *client) { time.Sleep(2 * time.Minute) }, 504, "within 1m0s"},
		{"client leaves", func(w *world, c *client) { c.gone.Store(true) }, 499, "left"},
		{"revision deleted", func(w *world, c *client) { w.RemoveRevision(id) }, 404, "deleted"},
		{"no instance can start", func(w *world, c *client) { w.instances(1, failure, nil) }, 503, "ExitCode3: no database"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				w := newWorld(t, Config{MaxWait: time.Minute}, 1, nil)
				go w.Run(ctx)
				x := exchange()
				served := make(chan error, 1)
				go func() { served <- w.Serve(x) }()
				synctest.Wait()
				begin := time.Now()
				c.happen(w, x.Client.(*client))
				err := <-served
				if status(err) != c.status || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%v", err)
				}
				if d := time.Since(begin); c.status == 499 && d > 100*time.Millisecond {
					t.Errorf("noticed after %v", d)
				}
				waiting, running := w.Load(id)
				if n, bytes := w.budget.Held(); waiting+running+n != 0 || bytes != 0 {
					t.Errorf("left behind: %d waiting, %d running, %d and %d bytes in the budget", waiting, running, n, bytes)
				}
				cancel()
				synctest.Wait()
			})
		})
	}
}

// What kills an instance that was ready takes along only the requests inside it: those that wait are served by its
// replacement, through a short back-off too. Neither does the memory of a failure end a wait after its back-off: the agent
// shows it until an instance is ready again. Only a revision that breaks again and again is given up on.
func TestInstanceBreaks(t *testing.T) {
	for _, c := range []struct {
		name   string
		after  time.Duration // until the next start, from now on
		served bool
		status int
	}{
		{"killed once", 0, true, 0},
		{"killed three times", 200 * time.Millisecond, true, 0},
		{"broken by habit", 2 * time.Second, true, 503},
		{"first start fails", 0, false, 0},
		{"second start fails", 100 * time.Millisecond, false, 503},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				w := newWorld(t, Config{}, 1, nil)
				go w.Run(ctx)
				w.instances(1, nil, ready)
				w.serve = func(_ endpoints.Instance, x *hop.Exchange) error { time.Sleep(time.Hour); x.Finish(); return nil }
				go w.Serve(exchange()) // takes the one slot
				synctest.Wait()
				w.serve = func(_ endpoints.Instance, x *hop.Exchange) error { x.Finish(); return nil }
				held, later := make(chan error, 1), make(chan error, 1)
				go func() { held <- w.Serve(exchange()) }()
				synctest.Wait()
				f := &endpoints.Failure{Reason: "Signal9", Until: time.Now().Add(c.after), Served: c.served}
				w.instances(1, f, nil)
				go func() { later <- w.Serve(exchange()) }()
				synctest.Wait()
				time.Sleep(c.after)
				w.instances(1, f, nil) // as when the autoscaler changes what is desired
				w.instances(1, f, map[string]endpoints.State{"b": endpoints.Starting})
				w.instances(1, nil, map[string]endpoints.State{"b": endpoints.Ready})
				if err := <-held; status(err) != c.status {
					t.Errorf("held when it broke: %v", err)
				}
				if err := <-later; status(err) != c.status {
					t.Errorf("came while it was down: %v", err)
				}
				time.Sleep(2 * time.Hour)
				cancel()
				synctest.Wait()
			})
		})
	}
}

// A retry that is under way is worth waiting for: only when nothing is being started are the held requests failed. In a
// back-off new requests fail at once; after it one may try again.
func TestBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld(t, Config{}, 1, nil)
		go w.Run(ctx)
		f := &endpoints.Failure{Reason: "ExitCode1", Message: "x", Until: time.Now().Add(10 * time.Second)}
		served := make(chan error, 1)
		go func() { served <- w.Serve(exchange()) }()
		synctest.Wait()
		w.instances(1, f, map[string]endpoints.State{"b": endpoints.Starting})
		synctest.Wait()
		if waiting, _ := w.Load(id); waiting != 1 {
			t.Fatal("failed although another start is under way")
		}
		w.instances(1, f, nil)
		if err := <-served; status(err) != 503 {
			t.Error(err)
		}
		var e *hop.Error
		if err := w.Serve(exchange()); !errors.As(err, &e) || e.Reason != hop.ReasonCannotStart || e.RetryAfter != 10*time.Second {
			t.Errorf("in the back-off: %v", err)
		}
		time.Sleep(11 * time.Second)
		before := len(w.told())
		go func() { served <- w.Serve(exchange()) }()
		synctest.Wait()
		if len(w.told()) == before {
			t.Error("after the back-off nobody was told of the demand")
		}
		w.instances(1, nil, ready)
		if err := <-served; err != nil {
			t.Error(err)
		}
		cancel()
		synctest.Wait()
	})
}

func TestBoundsOfTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld(t, Config{MaxWaiting: 5}, 1, nil)
		go w.Run(ctx)
		var refused, served atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				err := w.Serve(exchange())
				var e *hop.Error
				switch {
				case err == nil:
					served.Add(1)
				case errors.As(err, &e) && e.Status == 503 && e.Reason == hop.ReasonQueueFull && e.RetryAfter > 0:
					refused.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if refused.Load() != 3 {
			t.Errorf("%d refused at once, want 3", refused.Load())
		}
		w.serve = func(_ endpoints.Instance, x *hop.Exchange) error { x.Finish(); return nil }
		w.instances(1, nil, ready)
		wg.Wait()
		if served.Load() != 5 {
			t.Errorf("%d served, want 5", served.Load())
		}
		cancel()
		synctest.Wait()
	})
}

// Only what waited, or all with a burst capacity of -1, is counted here; the average is exact.
func TestReports(t *testing.T) {
	for _, c := range []struct {
		annotations map[string]string
		want        float64
	}{{nil, 0}, {map[string]string{"autoscaling.knative.dev/target-burst-capacity": "-1"}, 2}} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, Config{}, 0, c.annotations)
			w.instances(0, nil, ready)
			w.Report(time.Now())
			x, y := exchange(), exchange()
			for _, e := range []*hop.Exchange{x, y} {
				if err := w.Serve(e); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Second)
			got := 0.0
			for _, s := range w.Report(time.Now()) {
				got += s.Concurrency
			}
			if got != c.want {
				t.Errorf("%v: average %v, want %v", c.annotations, got, c.want)
			}
			x.Finish()
			y.Finish()
			time.Sleep(time.Second)
			w.Report(time.Now())
			time.Sleep(time.Second)
			for _, s := range w.Report(time.Now()) {
				if s.Concurrency != 0 {
					t.Errorf("after the end: %+v", s)
				}
			}
			if r := w.Report(time.Now().Add(time.Second)); len(r) != 0 {
				t.Errorf("a quiet revision reports %v", r)
			}
		})
	}
}

// A request that finds a slot costs no allocation here.
func TestNoAllocations(t *testing.T) {
	w := newWorld(t, Config{}, 10, nil)
	w.serve = func(endpoints.Instance, *hop.Exchange) error { return nil }
	w.instances(10, nil, ready)
	x := exchange()
	if n := testing.AllocsPerRun(1000, func() {
		x.Reset()
		x.Revision = id
		if err := w.Serve(x); err != nil {
			t.Fatal(err)
		}
		x.Finish()
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// Older snapshots, which a slow path may deliver late, change nothing.
func TestOldSnapshot(t *testing.T) {
	w := newWorld(t, Config{}, 1, nil)
	w.instances(1, nil, ready)
	w.SetEndpoints(&endpoints.Snapshot{Revision: id, Sequence: 0})
	if err := w.Serve(exchange()); err != nil {
		t.Error(err)
	}
}

// An agent that is started again may have another address: its instances, which have lived on, are asked there.
func TestMovedInstance(t *testing.T) {
	w := newWorld(t, Config{}, 1, nil)
	var asked string
	w.serve = func(in endpoints.Instance, _ *hop.Exchange) error { asked = in.Addr; return nil }
	for i, at := range []string{"10.0.0.1:1", "10.0.0.1:2"} {
		w.SetEndpoints(&endpoints.Snapshot{Revision: id, Sequence: uint64(i + 1), Instances: []endpoints.Instance{{ID: "a", Addr: at, Revision: id, State: endpoints.Ready, Capacity: 1}}})
		x := exchange()
		if err := w.Serve(x); err != nil || asked != at {
			t.Errorf("asked at %s, not %s (%v)", asked, at, err)
		}
		x.Finish()
	}
}
