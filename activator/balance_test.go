package activator

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/hop"
)

// Each instance is asked once, the good one serves, and one that has refused again and again is not asked any more, which the
// metrics say. When all are out they are asked anyway.
func TestRefusedGoesElsewhere(t *testing.T) {
	for _, concurrency := range []int64{0, 5} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer synctest.Wait()
			defer cancel()
			reader := metric.NewManualReader()
			w := newWorld(t, Config{Meter: metric.NewMeterProvider(metric.WithReader(reader)).Meter("")}, concurrency, nil)
			go w.Run(ctx)
			down := map[string]bool{"a": true, "b": true}
			asked := map[string]int{}
			w.serve = func(in endpoints.Instance, x *hop.Exchange) error {
				asked[in.ID]++
				if down[in.ID] {
					return fmt.Errorf("%w: connection refused", hop.ErrNotSent)
				}
				return nil
			}
			w.instances(int(concurrency), nil, map[string]endpoints.State{"a": endpoints.Ready, "b": endpoints.Ready, "c": endpoints.Ready})
			var open []*hop.Exchange // kept open, so that the ones that are down look best
			for i := range 12 {
				if i%4 == 0 {
					for _, x := range open {
						x.Finish()
					}
					open = open[:0]
				}
				x := exchange()
				if err := w.Serve(x); err != nil {
					t.Fatal(err)
				}
				open = append(open, x)
			}
			if asked["a"] > 3 || asked["b"] > 3 || asked["a"]+asked["b"] == 0 || asked["c"] != 12 {
				t.Errorf("asked %v, want a and b at most three times each", asked)
			}
			for _, x := range open {
				x.Finish()
			}
			w.instances(int(concurrency), nil, map[string]endpoints.State{"a": endpoints.Ready})
			down["a"] = false
			if err := w.Serve(exchange()); err != nil {
				t.Errorf("the last one is out and not asked: %v", err)
			}
			var got metricdata.ResourceMetrics
			if err := reader.Collect(ctx, &got); err != nil {
				t.Fatal(err)
			}
			if n := count(got, "thaw.activator.ejections"); n < 1 || n > 2 {
				t.Errorf("%d ejections", n)
			}
			if n := count(got, "thaw.activator.redispatches"); n != int64(asked["a"]-1+asked["b"]) {
				t.Errorf("%d redispatches, asked %v", n, asked)
			}
		})
	}
}

func count(m metricdata.ResourceMetrics, name string) (n int64) {
	for _, s := range m.ScopeMetrics {
		for _, m := range s.Metrics {
			if sum, ok := m.Data.(metricdata.Sum[int64]); ok && m.Name == name {
				for _, p := range sum.DataPoints {
					n += p.Value
				}
			}
		}
	}
	return n
}

// A request that none takes waits no longer than its limit, and rests between its rounds.
func TestRefusedByAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		w := newWorld(t, Config{MaxWait: 20 * time.Second}, 1, nil)
		go w.Run(ctx)
		asked := 0
		w.serve = func(endpoints.Instance, *hop.Exchange) error { asked++; return hop.ErrNotSent }
		w.instances(1, nil, map[string]endpoints.State{"a": endpoints.Ready, "b": endpoints.Ready})
		err := w.Serve(exchange())
		if status(err) != 504 || asked < 10 || asked > 60 {
			t.Errorf("asked %d times in 20 s: %v", asked, err)
		}
	})
}

// An answer of the function, whatever it is, and any error but "not sent" end a request: nothing is repeated.
func TestAnsweredIsNotRepeated(t *testing.T) {
	w := newWorld(t, Config{}, 1, nil)
	asked := 0
	w.serve = func(_ endpoints.Instance, x *hop.Exchange) error {
		asked++
		x.Resp.SetStatusCode(503)
		x.Resp.Header.Set("X-Thaw-Error", hop.ReasonQueueFull) // as a function would say that wants to be asked twice
		return nil
	}
	w.instances(1, nil, map[string]endpoints.State{"a": endpoints.Ready, "b": endpoints.Ready})
	if err := w.Serve(exchange()); err != nil || asked != 1 {
		t.Errorf("asked %d times, %v", asked, err)
	}
}

func names(n int) map[string]endpoints.State {
	m := map[string]endpoints.State{}
	for i := range n {
		m[fmt.Sprint("i", i)] = endpoints.Ready
	}
	return m
}

// sticking returns which instance serves a request with a header field, and the cookie that it was given.
func (w *world) sticking(t *testing.T, field, value string) (instance, cookie string) {
	t.Helper()
	w.serve = func(in endpoints.Instance, x *hop.Exchange) error { instance = in.ID; return nil }
	x := exchange()
	if field != "" {
		x.Req.Header.Set(field, value)
	}
	if err := w.Serve(x); err != nil {
		t.Fatal(err)
	}
	cookie = string(x.Resp.Header.Peek("Set-Cookie"))
	x.Finish()
	return instance, cookie
}

func TestStickyByHeader(t *testing.T) {
	for annotation, sticks := range map[string]bool{"header:X-User": true, "": false} {
		w := newWorld(t, Config{}, 0, map[string]string{"route.thaw.run/sticky": annotation})
		w.instances(0, nil, names(10))
		seen := map[string]bool{}
		for user := range 30 {
			first, cookie := w.sticking(t, "X-User", fmt.Sprint("u", user))
			for range 10 {
				if again, _ := w.sticking(t, "X-User", fmt.Sprint("u", user)); sticks && again != first {
					t.Fatalf("%q: user %d went from %s to %s", annotation, user, first, again)
				} else if !sticks {
					seen[again] = true
				}
			}
			seen[first] = true
			if cookie != "" {
				t.Fatalf("%q: a cookie nobody asked for", annotation)
			}
		}
		if len(seen) < 8 {
			t.Errorf("%q: 30 users over %d of 10 instances", annotation, len(seen))
		}
	}
}

// The cookie is given once, leads to the same instance while that is there, and when it goes only its own clients move.
func TestStickyByCookie(t *testing.T) {
	w := newWorld(t, Config{}, 0, map[string]string{"route.thaw.run/sticky": "cookie"})
	w.instances(0, nil, names(10))
	home := map[string]string{}
	for range 200 {
		in, cookie := w.sticking(t, "", "")
		value, rest, _ := strings.Cut(strings.TrimPrefix(cookie, "thaw-sticky="), ";")
		if len(value) != 16 || rest != " path=/; HttpOnly; SameSite=Lax" || strings.Contains(cookie, in) {
			t.Fatalf("cookie %q for %s", cookie, in)
		}
		home[value] = in
	}
	if len(home) != 200 {
		t.Error("two clients, one value")
	}
	stay := names(10)
	delete(stay, "i3")
	for _, step := range []map[string]endpoints.State{names(10), stay, names(10)} {
		w.instances(0, nil, step)
		for value, want := range home {
			in, cookie := w.sticking(t, "Cookie", "a=b; thaw-sticky="+value+"; c=d")
			if cookie != "" {
				t.Fatalf("given a second one: %q", cookie)
			}
			if _, there := step[want]; there && in != want || !there && in == want {
				t.Fatalf("%s belongs to %s, went to %s", value, want, in)
			}
		}
	}
	for _, bad := range []string{"", "x", "0123456789ABCDEF", strings.Repeat("0", 1000)} {
		if _, cookie := w.sticking(t, "Cookie", "thaw-sticky="+bad); cookie == "" {
			t.Errorf("value %.20q taken for ours", bad)
		}
	}
}

// A revision's own bounds go before the activator's, which bound all revisions together.
func TestBoundsByAnnotation(t *testing.T) {
	for _, c := range []struct {
		name        string
		cfg         Config
		annotations map[string]string
		body        int64
		held        int
		says        string
		wait        time.Duration
	}{
		{"default", Config{MaxWaiting: 7}, nil, 0, 7, "queue of default/fn-00001 is full", 300 * time.Second},
		{"count", Config{MaxWaiting: 7}, map[string]string{"queue.thaw.run/max-requests": "3"}, 0, 3, "queue of default/fn-00001 is full", 300 * time.Second},
		{"bytes", Config{}, map[string]string{"queue.thaw.run/max-bytes": "16Ki"}, 8 << 10, 2, "queue of default/fn-00001 is full", 300 * time.Second},
		{"age", Config{MaxWaiting: 2}, map[string]string{"queue.thaw.run/max-wait": "2s"}, 0, 2, "is full", 2 * time.Second},
		{"total count", Config{MaxWaitingTotal: 4}, map[string]string{"queue.thaw.run/max-requests": "100"}, 0, 4, "all revisions together", 300 * time.Second},
		{"total bytes", Config{MaxBytesTotal: 24 << 10}, nil, 8 << 10, 3, "all revisions together", 300 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer synctest.Wait()
				defer cancel()
				w := newWorld(t, c.cfg, 1, c.annotations)
				go w.Run(ctx)
				late := make(chan time.Duration, c.held)
				begin := time.Now()
				for range c.held {
					go func() {
						x := exchange()
						x.BodySize = c.body
						var e *hop.Error
						if err := w.Serve(x); !errors.As(err, &e) || e.Status != 504 || e.Reason != hop.ReasonWaited || e.RetryAfter == 0 {
							t.Errorf("held: %v", err)
						}
						late <- time.Since(begin)
					}()
				}
				synctest.Wait()
				x := exchange()
				x.BodySize = c.body
				var e *hop.Error
				if err := w.Serve(x); !errors.As(err, &e) || e.Status != 503 || e.Reason != hop.ReasonQueueFull || e.RetryAfter == 0 || !strings.Contains(e.Message, c.says) {
					t.Errorf("one more than %d: %v", c.held, err)
				}
				for range c.held {
					if d := <-late; d < c.wait || d > c.wait+2*sweepEvery {
						t.Errorf("waited %v, limit %v", d, c.wait)
					}
				}
			})
		})
	}
}

func TestDefaultTotals(t *testing.T) {
	for _, c := range []struct {
		memory  int64
		waiting int
		bytes   int64
	}{{math.MaxInt64, 100_000, 256 << 20}, {512 << 20, 10_082, 128 << 20}, {64 << 20, 1260, 16 << 20}, {1 << 20, 100, 1 << 20}} {
		if waiting, bytes := DefaultTotals(c.memory); waiting != c.waiting || bytes != c.bytes {
			t.Errorf("%d MiB: %d requests, %d bytes, want %d and %d", c.memory>>20, waiting, bytes, c.waiting, c.bytes)
		}
	}
}

// What a peak took is given back: after 20,000 held requests the process is as small as before.
func TestMemoryAfterPeak(t *testing.T) {
	w := newWorld(t, Config{MaxWaiting: 20_000, MaxBytes: 1 << 30}, 1, nil)
	w.serve = func(_ endpoints.Instance, x *hop.Exchange) error { x.Finish(); return nil }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go w.Run(ctx)
	before, peak := inUse(), uint64(0)
	for range 2 {
		w.mu.Lock()
		w.demands = nil // the test's own record
		w.mu.Unlock()
		var wg sync.WaitGroup
		for range 20_000 {
			wg.Go(func() {
				if err := w.Serve(exchange()); err != nil {
					t.Error(err)
				}
			})
		}
		for waiting := 0; waiting < 20_000; waiting, _ = w.Load(id) {
			runtime.Gosched()
		}
		peak = inUse()
		w.instances(1, nil, ready)
		wg.Wait()
		w.instances(1, nil, nil)
	}
	w.mu.Lock()
	w.demands = nil
	w.mu.Unlock()
	after := inUse()
	t.Logf("before %d KiB, peak %d KiB, after %d KiB", before>>10, peak>>10, after>>10)
	if peak < before+20<<20 {
		t.Errorf("the peak is none: %d KiB", (peak-before)>>10)
	}
	if after > before+(peak-before)/10 {
		t.Errorf("of a peak of %d KiB %d KiB stay", (peak-before)>>10, (after-before)>>10)
	}
}

// inUse is what lives: heap and stacks.
func inUse() uint64 {
	runtime.GC()
	runtime.GC() // what pools held after the first
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
