package queueproxy

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// dumb keeps every request and computes averages from the definition.
type dumb struct{ spans []span }

type span struct {
	proxied    bool
	undone     bool
	reported   bool
	begin, end time.Time // end zero = inside
}

// area is what the requests have spent inside between a and b.
func (d *dumb) area(a, b time.Time, proxied bool) (area time.Duration) {
	for _, s := range d.spans {
		if proxied && !s.proxied {
			continue
		}
		from, to := s.begin, s.end
		if to.IsZero() || to.After(b) {
			to = b
		}
		if from.Before(a) {
			from = a
		}
		area += max(0, to.Sub(from))
	}
	return area
}

// fresh counts the requests that no report has had.
func (d *dumb) fresh() (all, proxied float64) {
	for i := range d.spans {
		s := &d.spans[i]
		if s.reported || s.undone {
			continue
		}
		s.reported = true
		all++
		if s.proxied {
			proxied++
		}
	}
	return all, proxied
}

// The two additions per event say the same as the definition, for any sequence of events, reports at any distance, and undone requests.
func TestLoadAgainstDefinition(t *testing.T) {
	type op struct{ kind, arg int }
	gen := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) op {
		return op{rapid.IntRange(0, 5).Draw(t, "kind"), rapid.IntRange(0, 1_000_000).Draw(t, "arg")}
	}), 1, 150)
	rapid.Check(t, func(rt *rapid.T) {
		ops := gen.Draw(rt, "ops")
		var complaint string
		synctest.Test(t, func(t *testing.T) { complaint = compare(ops) })
		if complaint != "" {
			rt.Fatal(complaint)
		}
	})
}

func compare[O ~struct{ kind, arg int }](ops []O) string {
	var l load
	l.init(time.Now())
	// As after weeks of load: the sums are about to overflow.
	l.all.sum = math.MaxInt64 - 1000
	l.all.lastArea = l.all.sum
	var d dumb
	last := time.Now()
	for _, o := range ops {
		o := struct{ kind, arg int }(o)
		now := time.Now()
		switch o.kind {
		case 0, 1:
			l.begin(o.kind == 1)
			d.spans = append(d.spans, span{proxied: o.kind == 1, begin: now})
		case 2, 3:
			var inside []*span
			for i := range d.spans {
				if d.spans[i].end.IsZero() {
					inside = append(inside, &d.spans[i])
				}
			}
			if len(inside) > 0 {
				s := inside[o.arg%len(inside)]
				s.end = now
				s.undone = o.kind == 3 && !s.reported
				l.end(s.proxied, s.undone)
			}
		case 4:
			time.Sleep(time.Duration(o.arg) * time.Microsecond)
		case 5:
			got, period := l.report(now), now.Sub(last)
			if period == 0 {
				if got.Concurrency != 0 || got.Requests != 0 {
					return fmt.Sprintf("a report over no time: %+v", got)
				}
				continue
			}
			want := got
			want.Concurrency = float64(d.area(last, now, false)) / float64(period)
			want.ProxiedConcurrency = float64(d.area(last, now, true)) / float64(period)
			want.Requests, want.ProxiedRequests = d.fresh()
			if got != want {
				return fmt.Sprintf("got  %+v\nwant %+v", got, want)
			}
			last = now
		}
	}
	return ""
}

// With real concurrency and reports in between, the reports add up to what the requests themselves have measured: at least the time
// between their two calls, at most the time around them.
func TestLoadConcurrent(t *testing.T) {
	var l load
	base := time.Now()
	l.init(base)
	var inner, outer, n total
	stop := make(chan struct{})
	var wg, reporter sync.WaitGroup
	var area, requests float64
	reporter.Go(func() {
		last := base
		cut := func() {
			now := time.Now()
			s := l.report(now)
			area += s.Concurrency * float64(now.Sub(last))
			requests += s.Requests
			last = now
		}
		for {
			select {
			case <-stop:
				cut()
				return
			case <-time.After(500 * time.Microsecond):
				cut()
			}
		}
	})
	for range 16 {
		wg.Go(func() {
			for range 500 {
				t0 := time.Now()
				l.begin(false)
				t1 := time.Now()
				if rand.IntN(4) == 0 {
					time.Sleep(20 * time.Microsecond)
				}
				t2 := time.Now()
				l.end(false, false)
				inner.add(int64(t2.Sub(t1)))
				outer.add(int64(time.Since(t0)))
				n.add(1)
			}
		})
	}
	wg.Wait()
	close(stop)
	reporter.Wait()
	const tolerance = 1e5 // ns: events whose time and lock fall on different sides of a report are clamped at 0
	if area < float64(inner.v)-tolerance || area > float64(outer.v)+tolerance {
		t.Errorf("reports add up to %v, the requests have measured %v to %v", time.Duration(area), time.Duration(inner.v), time.Duration(outer.v))
	}
	if requests != float64(n.v) || l.inFlight() != 0 {
		t.Errorf("%v of %d requests reported, %d inside", requests, n.v, l.inFlight())
	}
}

// total is a sum under a lock.
type total struct {
	mu sync.Mutex
	v  int64
}

func (s *total) add(n int64) { s.mu.Lock(); s.v += n; s.mu.Unlock() }
