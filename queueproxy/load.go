package queueproxy

import (
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/endpoints"
)

// load counts requests inside and integrates their number over time, exactly.
//
// The integral of the concurrency from 0 to t is the sum of what each request has spent inside until t. With the ends e and begins b
// of requests, that is sum(e) - sum(b) + inside x t: two additions per event, whatever the number of requests, and the order in
// which concurrent events take the lock does not matter, so that the clock is read outside of it. Times are nanoseconds since base; the products may
// overflow after weeks, but all arithmetic is modulo 2^64 and only differences over one period are ever used.
type load struct {
	base time.Time // static

	mu       sync.Mutex
	all      flow
	proxied  flow  // the part that an activator has counted too
	reported int64 // time of the last report
	draining bool
	idle     chan struct{} // closed when nobody is inside while draining; nil = no drain has begun
}

// flow is one kind of requests.
type flow struct {
	inside int64
	sum    int64  // sum of the ends minus sum of the begins
	began  uint64 // requests since the start
	// as of the last report
	lastArea  int64
	lastBegan uint64
}

func (f *flow) begin(t int64) { f.inside++; f.began++; f.sum -= t }
func (f *flow) end(t int64)   { f.inside--; f.sum += t }

// cut returns the average and the count since the last cut, period nanoseconds ago.
func (f *flow) cut(t, period int64) (average, requests float64) {
	area := f.sum + f.inside*t
	d, n := area-f.lastArea, f.began-f.lastBegan
	f.lastArea, f.lastBegan = area, f.began
	// An event may carry a time just before t and take the lock just after the report, or the other way round. What such a stray makes too
	// much or too little here is made good in the next report, but nobody wants to read -1e-9.
	return max(0, float64(d)/float64(period)), max(0, float64(int64(n)))
}

func (l *load) init(now time.Time) { l.base = now }

func (l *load) now() int64 { return int64(time.Since(l.base)) }

// begin counts a request in, unless the proxy drains.
func (l *load) begin(proxied bool) bool {
	t := l.now()
	l.mu.Lock()
	if l.draining {
		l.mu.Unlock()
		return false
	}
	l.all.begin(t)
	if proxied {
		l.proxied.begin(t)
	}
	l.mu.Unlock()
	return true
}

// end counts it out; with undo it is as if it had not begun, except for the time that it has spent inside.
func (l *load) end(proxied, undo bool) { l.endAt(time.Now(), proxied, undo) }

func (l *load) endAt(now time.Time, proxied, undo bool) {
	t := int64(now.Sub(l.base))
	l.mu.Lock()
	l.all.end(t)
	if proxied {
		l.proxied.end(t)
	}
	if undo {
		l.all.began--
		if proxied {
			l.proxied.began--
		}
	}
	if l.all.inside == 0 && l.idle != nil {
		close(l.idle)
		l.idle = nil
	}
	l.mu.Unlock()
}

// drained is what drain returns when nobody is inside.
var drained = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// drain refuses requests from now on and returns a channel that is closed when none is inside.
func (l *load) drain() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.draining = true
	if l.all.inside == 0 {
		return drained
	}
	if l.idle == nil {
		l.idle = make(chan struct{})
	}
	return l.idle
}

func (l *load) resume() {
	l.mu.Lock()
	l.draining = false
	l.mu.Unlock()
}

func (l *load) isDraining() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.draining
}

func (l *load) inFlight() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int(l.all.inside)
}

func (l *load) report(now time.Time) endpoints.Stat {
	t := int64(now.Sub(l.base))
	l.mu.Lock()
	defer l.mu.Unlock()
	s := endpoints.Stat{Time: now}
	period := t - l.reported
	if period <= 0 {
		return s
	}
	l.reported = t
	s.Concurrency, s.Requests = l.all.cut(t, period)
	s.ProxiedConcurrency, s.ProxiedRequests = l.proxied.cut(t, period)
	return s
}

// totals returns the requests begun since the start.
func (l *load) totals() (all, proxied uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.began, l.proxied.began
}
