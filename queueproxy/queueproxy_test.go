package queueproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// exchange is one without a front.
func exchange() *hop.Exchange {
	return &hop.Exchange{Req: &fasthttp.Request{}, Resp: &fasthttp.Response{}, Arrived: time.Now()}
}

// function is what a proxy hands requests to: it counts those inside and remembers the most.
type function struct {
	run    func(x *hop.Exchange) error
	inside atomic.Int32
	most   atomic.Int32
	calls  atomic.Int32
}

func (f *function) Serve(x *hop.Exchange) error {
	f.calls.Add(1)
	n := f.inside.Add(1)
	for m := f.most.Load(); n > m && !f.most.CompareAndSwap(m, n); m = f.most.Load() {
	}
	var err error
	if f.run != nil {
		err = f.run(x)
	}
	if err != nil {
		f.inside.Add(-1)
		return err
	}
	x.OnFinish(finished{f})
	return nil
}

type finished struct{ f *function }

func (f finished) Finish(*hop.Exchange) { f.f.inside.Add(-1) }

// client is one who may leave; nothing else is asked of it here.
type client struct {
	hop.Client
	gone atomic.Bool
}

func (c *client) Gone() bool { return c.gone.Load() }

// Whatever the requests do (answer at once, stream, fail, find the function gone), the function never has more than its limit inside.
func TestLimitIsNeverPassed(t *testing.T) {
	for _, limit := range []int{1, 3, 10} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			f := &function{run: func(x *hop.Exchange) error {
				if rand.IntN(5) == 0 {
					return hop.ErrNotSent
				}
				return nil
			}}
			p := New(Config{Instance: "i", Concurrency: limit, Queue: 1000}, f)
			var wg sync.WaitGroup
			for range 8 * limit {
				wg.Go(func() {
					for range 300 {
						x := exchange()
						if err := p.Serve(x); err != nil {
							continue
						}
						if rand.IntN(3) == 0 {
							time.Sleep(50 * time.Microsecond)
						}
						x.Finish()
						x.Finish() // the front's own call after forward's
					}
				})
			}
			wg.Wait()
			if m := f.most.Load(); int(m) > limit || m == 0 { // how many there can be without a limit: TestNoLimit
				t.Fatalf("%d at once, the limit is %d", m, limit)
			}
			if p.InFlight() != 0 || p.Waiting() != 0 {
				t.Fatalf("%d inside, %d waiting at the end", p.InFlight(), p.Waiting())
			}
			if f.calls.Load() != int32(8*limit*300) {
				t.Fatalf("%d calls", f.calls.Load())
			}
		})
	}
}

// fill makes the limit and the queue of p full and returns how to let go.
func fill(t *testing.T, p *Proxy, limit, queue int) (release func()) {
	var inside []*hop.Exchange
	for range limit {
		x := exchange()
		if err := p.Serve(x); err != nil {
			t.Fatal(err)
		}
		inside = append(inside, x)
	}
	var wg sync.WaitGroup
	for range queue {
		wg.Go(func() {
			x := exchange()
			if err := p.Serve(x); err != nil {
				t.Error(err)
			}
			x.Finish()
		})
	}
	synctest.Wait()
	return func() {
		for _, x := range inside {
			x.Finish()
		}
		wg.Wait()
	}
}

func TestOverflow(t *testing.T) {
	for _, c := range []struct {
		name    string
		cfg     Config
		queue   int
		proxied bool
		busy    bool
	}{
		{"default queue", Config{Concurrency: 2}, 20, false, false},
		{"given queue", Config{Concurrency: 2, Queue: 3}, 3, false, false},
		{"no queue", Config{Concurrency: 2, Queue: -1}, 0, false, false},
		{"activator", Config{Concurrency: 2, Queue: 3}, 3, true, true},
		{"activator, nobody waits", Config{Concurrency: 2, RefuseProxied: true}, 0, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := New(c.cfg, &function{})
				release := fill(t, p, c.cfg.Concurrency, c.queue)
				before := p.Report(time.Now().Add(time.Nanosecond)).Requests
				x := exchange()
				x.Proxied = c.proxied
				x.Req.Header.Set("K-Network-Hash", "1")
				began := time.Now()
				err := p.Serve(x)
				if time.Since(began) != 0 {
					t.Errorf("refused after %v, want at once", time.Since(began))
				}
				var e *hop.Error
				switch {
				case c.busy && err != hop.ErrBusy:
					t.Errorf("got %v, want ErrBusy", err)
				case !c.busy && (!errors.As(err, &e) || e.Status != 503 || e.Reason != hop.ReasonQueueFull || e.Message != "pending request queue full" || e.RetryAfter <= 0):
					t.Errorf("got %v", err)
				}
				if x.Req.Header.Peek("K-Network-Hash") == nil {
					t.Error("a refused request was touched")
				}
				if p.InFlight() != c.cfg.Concurrency+c.queue {
					t.Errorf("%d inside", p.InFlight())
				}
				time.Sleep(time.Second)
				// A refusal is demand and counts, except when the request goes back to where it is counted already.
				if n := p.Report(time.Now()).Requests; (n == 1) == c.busy {
					t.Errorf("%v requests counted before, %v for the refused one", before, n)
				}
				release()
				if p.InFlight() != 0 {
					t.Errorf("%d inside at the end", p.InFlight())
				}
				p.Close()
			})
		})
	}
}

func TestNoLimit(t *testing.T) {
	f := &function{}
	p := New(Config{Instance: "i"}, f)
	var all []*hop.Exchange
	for range 500 {
		x := exchange()
		if err := p.Serve(x); err != nil {
			t.Fatal(err)
		}
		all = append(all, x)
	}
	if p.InFlight() != 500 || p.Waiting() != 0 || f.most.Load() != 500 {
		t.Fatalf("%d inside (function: %d), %d waiting", p.InFlight(), f.most.Load(), p.Waiting())
	}
	for _, x := range all {
		x.Finish()
	}
	if err := p.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Those who wait are served in order of arrival.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var order []string
		p := New(Config{Concurrency: 1, Queue: 100}, &function{run: func(x *hop.Exchange) error {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, x.ID)
			return nil
		}})
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				x := exchange()
				x.ID = fmt.Sprint(i)
				if err := p.Serve(x); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Millisecond)
				x.Finish()
			})
			synctest.Wait()
		}
		wg.Wait()
		for i, id := range order {
			if id != fmt.Sprint(i) {
				t.Fatalf("order %v", order)
			}
		}
		p.Close()
	})
}

func TestWaitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Config{Concurrency: 1, MaxWait: 3 * time.Second}, &function{})
		inside := exchange()
		if err := p.Serve(inside); err != nil {
			t.Fatal(err)
		}

		// too long
		began := time.Now()
		err := p.Serve(exchange())
		var e *hop.Error
		if d := time.Since(began); !errors.As(err, &e) || e.Status != 504 || e.Reason != hop.ReasonWaited || d < 3*time.Second || d > 3050*time.Millisecond {
			t.Fatalf("%v after %v", err, d)
		}

		// the client leaves: its place is free within 100 ms, and the next in line is not affected
		leaver := &client{}
		var wg sync.WaitGroup
		wg.Go(func() {
			x := exchange()
			x.Client = leaver
			began := time.Now()
			err := p.Serve(x)
			if d := time.Since(began); !errors.As(err, &e) || e.Reason != hop.ReasonClientGone || d < time.Second || d > 1100*time.Millisecond {
				t.Errorf("%v after %v", err, d)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			x := exchange()
			x.Client = &client{}
			if err := p.Serve(x); err != nil {
				t.Error(err)
			}
			x.Finish()
		})
		time.Sleep(time.Second)
		leaver.gone.Store(true)
		time.Sleep(time.Second)
		if p.Waiting() != 1 {
			t.Errorf("%d waiting", p.Waiting())
		}
		inside.Finish()
		wg.Wait()

		// nobody waits: the timer stops by itself, or the bubble would not end without Close
		time.Sleep(time.Minute)
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.armed {
			t.Error("the queue is looked through though nobody waits")
		}
	})
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &function{}
		p := New(Config{Instance: "one", Concurrency: 1}, f)
		inside := exchange()
		if err := p.Serve(inside); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() { // waits when the drain begins
			x := exchange()
			if err := p.Serve(x); err != nil {
				t.Error(err)
			}
			time.Sleep(3 * time.Second)
			x.Finish()
		})
		synctest.Wait()

		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := p.Drain(short)
		if !errors.Is(err, context.DeadlineExceeded) || err.Error() != "drain of instance one: 2 requests left: context deadline exceeded" {
			t.Fatal(err)
		}
		if err := p.Serve(exchange()); err != hop.ErrNotSent || !p.Draining() {
			t.Fatalf("%v, draining %v", err, p.Draining())
		}
		began := time.Now()
		time.AfterFunc(2*time.Second, inside.Finish)
		if err := p.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d != 5*time.Second || f.inside.Load() != 0 {
			t.Fatalf("drained after %v with %d inside, want 5s and none", d, f.inside.Load())
		}
		wg.Wait()

		p.Resume()
		x := exchange()
		if err := p.Serve(x); err != nil {
			t.Fatal(err)
		}
		x.Finish()
		p.Close()
		if err := p.Serve(exchange()); err != hop.ErrNotSent {
			t.Fatal(err)
		}
	})
}

// Close ends the waits, as something that may be tried elsewhere, and closes the next step.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &closer{}
		p := New(Config{Concurrency: 1}, n)
		if err := p.Serve(exchange()); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				if err := p.Serve(exchange()); err != hop.ErrNotSent {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		p.Close()
		wg.Wait()
		if !n.closed {
			t.Error("the next step is still open")
		}
	})
}

type closer struct{ closed bool }

func (c *closer) Serve(*hop.Exchange) error { return nil }
func (c *closer) Close()                    { c.closed = true }

// A drain loses nothing that was accepted, whenever it comes. The control is Close alone, which loses those who wait.
func TestDrainUnderLoad(t *testing.T) {
	load := func(end func(p *Proxy)) (accepted, answered, elsewhere int) {
		f := &function{}
		p := New(Config{Concurrency: 2, Queue: 1000}, f)
		var a, e atomic.Int32
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				for range 200 {
					x := exchange()
					if err := p.Serve(x); err != nil {
						e.Add(1)
						continue
					}
					time.Sleep(time.Duration(rand.IntN(100)) * time.Microsecond)
					x.Finish()
					a.Add(1)
				}
			})
		}
		for p.load.allBegan() < 500 {
			time.Sleep(100 * time.Microsecond)
		}
		end(p)
		wg.Wait()
		return int(p.load.allBegan()), int(a.Load()), int(e.Load())
	}
	accepted, answered, elsewhere := load(func(p *Proxy) {
		if err := p.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		if n := p.InFlight(); n != 0 {
			t.Errorf("%d inside after the drain", n)
		}
		p.Close()
	})
	if accepted != answered || answered+elsewhere != 4000 || elsewhere == 0 {
		t.Errorf("%d accepted, %d answered, %d sent elsewhere of 4000", accepted, answered, elsewhere)
	}
	accepted, answered, _ = load((*Proxy).Close)
	if accepted == answered {
		t.Errorf("control: closing without a drain lost none of %d, so this test shows nothing", accepted)
	}
}

func (l *load) allBegan() uint64 { n, _ := l.totals(); return n }

// One request costs no allocation, with or without a limit, parsed as the front does it.
func TestNoAllocation(t *testing.T) {
	next := hop.HandlerFunc(func(*hop.Exchange) error { return nil })
	text := strings.NewReader("GET / HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nCookie: a=b; c=\"d\"\r\nX-Forwarded-For: 1.2.3.4, ::1\r\n" +
		"X-Forwarded-Proto: https\r\nK-Network-Hash: 1\r\nTraceparent: 00-1-2-3\r\n\r\n")
	in := bufio.NewReader(text)
	for _, limit := range []int{0, 10} {
		p := New(Config{Concurrency: limit}, next)
		x := exchange()
		n := testing.AllocsPerRun(1000, func() {
			req, resp := x.Req, x.Resp
			x.Reset()
			x.Req, x.Resp, x.Arrived = req, resp, time.Now()
			text.Seek(0, io.SeekStart)
			in.Reset(text)
			if err := req.Header.Read(in); err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Knative-Serving-Revision", "r")
			req.Header.Set("Knative-Serving-Namespace", "n")
			if err := p.Serve(x); err != nil {
				t.Fatal(err)
			}
			x.Finish()
		})
		if n > 0 {
			t.Errorf("limit %d: %v allocations a request", limit, n)
		}
		if got := x.Req.Header.Peek("Forwarded"); string(got) != `for=1.2.3.4;proto=https, for="[::1]"` {
			t.Errorf("Forwarded: %s", got)
		}
	}
}

func BenchmarkServe(b *testing.B) {
	next := hop.HandlerFunc(func(*hop.Exchange) error { return nil })
	p := New(Config{Concurrency: 10}, next)
	x := exchange()
	req, resp := x.Req, x.Resp
	text := "GET / HTTP/1.1\r\nHost: h\r\n"
	for _, h := range []string{"Accept", "Accept-Encoding", "Accept-Language", "Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Request-Id", "Traceparent"} {
		text += h + ": some value\r\n"
	}
	if err := req.Header.Read(bufio.NewReader(strings.NewReader(text + "\r\n"))); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		x.Reset()
		x.Req, x.Resp, x.Arrived = req, resp, time.Now()
		req.Header.Set("Knative-Serving-Revision", "r")
		req.Header.Set("Knative-Serving-Namespace", "n")
		p.Serve(x)
		x.Finish()
	}
}
