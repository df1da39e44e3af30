// Package queueproxy is what stands in front of one instance of a function: it grants the instance's slots (the hard limit that
// nobody passes), keeps a bounded queue in front of them, cleans the request of what is not the function's business, counts, and drains.
//
// A Proxy is a hop.Handler. The node agent hosts one for each process or sandbox; cmd/queueproxy puts one, inside a Sidecar, beside a
// container. It promises: never more than Concurrency requests inside the function; those who wait are served in order of arrival; a
// drain ends with the last request and loses none. It does not speak HTTP itself (packages front and forward do) and does not
// know how an instance is started or stopped.
package queueproxy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/breaker"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/hop"
)

// Defaults of Config.
const (
	QueueFactor    = 10              // the queue holds QueueFactor x Concurrency requests
	DefaultMaxWait = 5 * time.Minute // Knative's default timeoutSeconds, which bounds the same wait there
)

// sweepEvery is how soon a waiting request whose client has left, or that has waited too long, gives up its place.
const sweepEvery = 50 * time.Millisecond

// retryAfter is the advice to those who are refused: a queue that is full now moves within a second or not at all.
const retryAfter = time.Second

// Config describes the instance behind a Proxy.
type Config struct {
	Revision    api.RevisionID
	Instance    string        // its id: the source of reports
	Concurrency int           // requests inside the function at once; 0 = no limit, and then there is no queue either
	Queue       int           // requests that may wait; 0 = QueueFactor x Concurrency, below 0 = none
	MaxWait     time.Duration // for a slot, to within 50 ms; 0 = DefaultMaxWait, below 0 = no limit
	// RefuseProxied makes requests that come from an activator (Exchange.Proxied) never wait here: without a free slot they are told ErrBusy at
	// once, so that the activator's queue gives them to whichever instance gets free first. False, they wait as others do.
	RefuseProxied bool
}

// queue returns how many requests may wait.
func (c *Config) queue() int {
	switch {
	case c.Queue < 0 || c.Concurrency <= 0:
		return 0
	case c.Queue > 0:
		return c.Queue
	}
	return QueueFactor * c.Concurrency
}

// Answers that are given often when it matters most: made once.
var (
	errQueueFull = &hop.Error{Status: 503, Reason: hop.ReasonQueueFull, Message: "pending request queue full", RetryAfter: retryAfter}
	errTooMany   = &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "too many K-Network-* headers"}
)

// Proxy stands in front of one instance. Its methods may be called concurrently.
type Proxy struct {
	// static after New
	cfg      Config
	next     hop.Handler
	breaker  *breaker.Breaker // nil = no limit
	slot     *breaker.Target
	maxWait  time.Duration
	errWaits *hop.Error

	load  load
	count counters

	mu     sync.Mutex // guards what follows, and the timer's use
	timer  *time.Timer
	armed  bool
	closed bool
}

// New returns a proxy that hands requests to next, which is the way into the function. It starts nothing.
func New(cfg Config, next hop.Handler) *Proxy {
	p := &Proxy{cfg: cfg, next: next, maxWait: cfg.MaxWait}
	p.load.init(time.Now())
	if p.maxWait == 0 {
		p.maxWait = DefaultMaxWait
	}
	p.maxWait = max(p.maxWait, 0) // the breaker's "no limit"
	p.errWaits = &hop.Error{Status: 504, Reason: hop.ReasonWaited, RetryAfter: retryAfter,
		Message: fmt.Sprintf("no free slot within %v: %d requests are inside the instance, as many as it may take", p.maxWait, cfg.Concurrency)}
	if cfg.Concurrency > 0 {
		p.breaker = breaker.New(breaker.Config{MaxWaiting: cfg.queue()})
		p.breaker.Set([]breaker.Spec{{ID: cfg.Instance, Limit: cfg.Concurrency}})
		p.slot = p.breaker.Try() // the one target, which every slot is of
		p.breaker.Release(p.slot)
	}
	return p
}

// Serve hands x to the function once it has a slot. It returns hop.ErrBusy (to an activator) or a 503 (to others) when the queue is full,
// hop.ErrNotSent when the proxy drains: in all three cases x has not been touched. The slot is held until x is finished.
func (p *Proxy) Serve(x *hop.Exchange) error {
	proxied := x.Proxied
	if !p.load.begin(proxied) {
		p.count.refused[refusedDraining].Add(1)
		return hop.ErrNotSent
	}
	if p.breaker != nil && p.breaker.Try() == nil {
		if err := p.wait(x); err != nil {
			// A request that goes back to its activator will come again, there or here: it has not begun yet.
			p.load.end(proxied, errors.Is(err, hop.ErrBusy))
			return err
		}
	}
	if !clean(&x.Req.Header) {
		p.release()
		p.load.end(proxied, false)
		p.count.refused[refusedBad].Add(1)
		return errTooMany
	}
	x.Revision, x.Instance = p.cfg.Revision, p.cfg.Instance
	if err := p.next.Serve(x); err != nil {
		p.release()
		p.load.end(proxied, false)
		p.count.failed.Add(1)
		return err
	}
	x.OnFinish(p)
	return nil
}

// Finish gives x's slot back. It makes a Proxy its own hop.Finisher, so that a request in progress costs no allocation here.
func (p *Proxy) Finish(x *hop.Exchange) {
	p.release()
	now := time.Now()
	p.load.endAt(now, x.Proxied, false)
	p.count.answered(x, now)
}

func (p *Proxy) release() {
	if p.breaker != nil {
		p.breaker.Release(p.slot)
	}
}

// wait takes a slot after a turn in the queue, or says why there is none.
func (p *Proxy) wait(x *hop.Exchange) error {
	if x.Proxied && p.cfg.RefuseProxied {
		p.count.refused[refusedBusy].Add(1)
		return hop.ErrBusy
	}
	w := breaker.NewWaiter(x.Client, 0, time.Now()) // 0 bytes: the body has not been read
	err := p.breaker.Enqueue(w)
	if err == nil {
		p.arm()
		_, err = p.breaker.Wait(w, 0)
		x.QueuedAt, x.Queued = w.Since, time.Since(w.Since)
		if err == nil {
			p.count.waited.Add(1)
			p.count.waitedNanos.Add(int64(x.Queued))
			return nil
		}
	}
	switch {
	case errors.Is(err, breaker.ErrFull) && x.Proxied:
		p.count.refused[refusedBusy].Add(1)
		return hop.ErrBusy
	case errors.Is(err, breaker.ErrFull):
		p.count.refused[refusedFull].Add(1)
		return errQueueFull
	case errors.Is(err, breaker.ErrTimeout):
		p.count.refused[refusedWaited].Add(1)
		return p.errWaits
	case errors.Is(err, breaker.ErrGone):
		p.count.refused[refusedGone].Add(1)
		return &hop.Error{Status: 499, Reason: hop.ReasonClientGone, Message: "the client left while its request waited for a slot"}
	}
	p.count.refused[refusedDraining].Add(1)
	return hop.ErrNotSent // closed
}

// arm makes sure that the queue is looked through soon. A timer and no goroutine: a proxy nobody waits in costs nothing, and there are
// thousands of them in an agent.
func (p *Proxy) arm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.armed || p.closed {
		return
	}
	p.armed = true
	if p.timer == nil {
		p.timer = time.AfterFunc(sweepEvery, p.sweep)
	} else {
		p.timer.Reset(sweepEvery)
	}
}

func (p *Proxy) sweep() {
	p.breaker.Sweep(time.Now(), p.maxWait)
	p.mu.Lock()
	p.armed = false
	p.mu.Unlock()
	// Only now: whoever found the timer armed had joined the queue before this look at it.
	if waiting, _ := p.breaker.Load(); waiting > 0 {
		p.arm()
	}
}

// InFlight returns how many requests are inside: running in the function and waiting for it.
func (p *Proxy) InFlight() int { return p.load.inFlight() }

// Waiting returns how many of them wait for a slot.
func (p *Proxy) Waiting() int {
	if p.breaker == nil {
		return 0
	}
	waiting, _ := p.breaker.Load()
	return waiting
}

// Total returns how many requests have been accepted since the start.
func (p *Proxy) Total() uint64 {
	all, _ := p.load.totals()
	return all
}

// Draining says whether new requests are refused.
func (p *Proxy) Draining() bool { return p.load.isDraining() }

// Drain refuses new requests from now on (hop.ErrNotSent: they may go elsewhere) and returns when the last one inside is finished, or when
// ctx ends; the error then says how many are left. Requests that already wait for a slot get one.
func (p *Proxy) Drain(ctx context.Context) error {
	select {
	case <-p.load.drain():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("drain of instance %s: %d requests left: %w", p.cfg.Instance, p.InFlight(), context.Cause(ctx))
	}
}

// Resume takes back a drain that did not end in Close: requests are accepted again. A Drain that still waits goes on until there is a moment
// without requests.
func (p *Proxy) Resume() { p.load.resume() }

// Close refuses everything from now on, those who wait included; what is inside the function is not touched. If the next step has
// a Close method it is called after that.
func (p *Proxy) Close() {
	p.load.drain()
	p.mu.Lock()
	p.closed = true
	if p.timer != nil {
		p.timer.Stop()
	}
	p.mu.Unlock()
	if p.breaker != nil {
		p.breaker.Close(breaker.ErrClosed)
	}
	switch c := p.next.(type) {
	case interface{ Close() }:
		c.Close()
	case interface{ Close() error }:
		c.Close() // nothing that could be done about it
	}
}

// Report cuts the statistics at now: averages and counts since the report before. There must be one caller only, normally each second;
// a report that covers no time is empty and leaves the period open.
func (p *Proxy) Report(now time.Time) endpoints.Stat {
	s := p.load.report(now)
	s.Revision, s.Source = p.cfg.Revision, p.cfg.Instance
	return s
}
