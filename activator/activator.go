// Package activator holds requests of revisions that have no free slot and hands them out as slots come free.
//
// One queue per revision, in order of arrival, bounded in count, bytes and age. A request belongs to the revision until a slot
// is free, never to a busy instance. Each change of a queue is told to the autoscaler at once, with the true length:
// one event may start many instances, no request starts one by itself. Where the caller can reach free slots directly, a request that finds
// one passes without queueing and without being counted here.
//
// The package knows no etcd and no processes: endpoints come as snapshots, instances are hop.Handlers that cmd provides.
package activator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/breaker"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/hop"
)

// Config has the bounds and what the activator talks to. Zero means the default.
type Config struct {
	MaxWaiting      int           // requests held per revision; 10,000
	MaxBytes        int64         // bytes held per revision; 64 MiB
	MaxWait         time.Duration // how long a request may wait for a slot; 300 s. It is not charged to the function's time-outs.
	MaxWaitingTotal int           // requests held in all; see DefaultTotals
	MaxBytesTotal   int64         // bytes held in all; see DefaultTotals
	// SlowStart is how long an instance that has just become ready is given less than its share while others are warm; 5 s, below 0 = no such time.
	SlowStart time.Duration

	// Instance returns the way to an instance: its queue-proxy in this process, or a connection to it. Required.
	Instance func(endpoints.Instance) hop.Handler
	// Demand is told the state of a queue at each change; it must not block. Required.
	Demand func(endpoints.Demand)

	Name  string // source of the reports; "activator"
	Log   *slog.Logger
	Meter metric.Meter
}

// sweepEvery is how often waiting clients are looked after: also the time within which one that left is noticed.
const sweepEvery = 50 * time.Millisecond

// Activator is a hop.Handler. Make one with New, keep its queues swept with Run.
type Activator struct {
	cfg    Config
	budget *breaker.Budget
	m      metrics

	revisions sync.Map // api.RevisionID -> *revision
	wake      chan struct{}
	draining  atomic.Bool
}

// revision is the queue of one revision. Everything but the breaker is atomic or guarded by mu.
type revision struct {
	id       api.RevisionID
	b        *breaker.Breaker
	always   bool // target burst capacity -1: every request is counted here
	sticky   api.Sticky
	maxWait  time.Duration
	hasReady atomic.Bool
	starting atomic.Bool
	failure  atomic.Pointer[endpoints.Failure]

	mu       sync.Mutex
	sequence uint64
	load     integral
}

// target is what a breaker.Target carries.
type target struct {
	instance endpoints.Instance
	handler  hop.Handler
}

// New returns an activator without revisions. It starts nothing.
func New(cfg Config) (*Activator, error) {
	if cfg.Instance == nil || cfg.Demand == nil {
		return nil, errors.New("activator: Config.Instance and Config.Demand are required")
	}
	if cfg.MaxWaiting <= 0 {
		cfg.MaxWaiting = 10_000
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = 64 << 20
	}
	waiting, bytes := DefaultTotals(memoryLimit())
	if cfg.MaxWaitingTotal <= 0 {
		cfg.MaxWaitingTotal = waiting
	}
	if cfg.MaxBytesTotal <= 0 {
		cfg.MaxBytesTotal = bytes
	}
	if cfg.SlowStart == 0 {
		cfg.SlowStart = 5 * time.Second
	}
	if cfg.MaxWait <= 0 {
		cfg.MaxWait = 300 * time.Second
	}
	if cfg.Name == "" {
		cfg.Name = "activator"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Meter == nil {
		cfg.Meter = noop.Meter{}
	}
	a := &Activator{cfg: cfg, budget: &breaker.Budget{MaxWaiting: cfg.MaxWaitingTotal, MaxBytes: cfg.MaxBytesTotal}, wake: make(chan struct{}, 1)}
	var err error
	a.m, err = newMetrics(cfg.Meter, a)
	return a, err
}

// SetRevision makes a revision known, or takes over a change of its settings.
func (a *Activator) SetRevision(rev *api.Revision) {
	tbc, _ := api.ScalingAnnotation(rev.Annotations, "target-burst-capacity")
	r := &revision{id: rev.ID(), always: tbc == "-1", sticky: rev.Sticky(), maxWait: a.cfg.MaxWait}
	bounds := breaker.Config{MaxWaiting: a.cfg.MaxWaiting, MaxBytes: a.cfg.MaxBytes, Budget: a.budget, SlowStart: max(0, a.cfg.SlowStart)}
	requests, bytes, wait := rev.QueueBounds()
	if requests > 0 {
		bounds.MaxWaiting = requests
	}
	if bytes > 0 {
		bounds.MaxBytes = bytes
	}
	if wait > 0 {
		r.maxWait = wait
	}
	if d, ok := rev.SlowStart(); ok {
		bounds.SlowStart = d
	}
	r.b = breaker.New(bounds)
	a.revisions.LoadOrStore(r.id, r) // a revision is immutable: the first one stands
}

// RemoveRevision forgets a revision; requests that wait for it are answered with 404.
func (a *Activator) RemoveRevision(id api.RevisionID) {
	if v, ok := a.revisions.LoadAndDelete(id); ok {
		v.(*revision).b.Close(&hop.Error{Status: 404, Reason: hop.ReasonNoRevision, Message: fmt.Sprintf("revision %s was deleted", id)})
	}
}

// SetEndpoints takes over a snapshot of a revision's instances. Older snapshots than the last are ignored.
func (a *Activator) SetEndpoints(s *endpoints.Snapshot) {
	v, ok := a.revisions.Load(s.Revision)
	if !ok {
		return
	}
	r := v.(*revision)
	r.mu.Lock()
	defer r.mu.Unlock()
	if s.Sequence < r.sequence {
		return
	}
	r.sequence = s.Sequence
	specs := make([]breaker.Spec, 0, len(s.Instances))
	starting := false
	for _, in := range s.Instances {
		switch in.State {
		case endpoints.Ready:
			specs = append(specs, breaker.Spec{ID: in.ID, At: in.Addr, Limit: in.Capacity, Value: &target{in, a.cfg.Instance(in)}, Since: in.Start.Ready})
		case endpoints.Starting:
			starting = true
		}
	}
	r.failure.Store(s.Failure)
	r.starting.Store(starting)
	r.hasReady.Store(len(specs) > 0)
	r.b.Set(specs)
	if len(specs) == 0 && !starting && hopeless(s.Failure, time.Now()) {
		if n := r.b.Fail(cannotStart(s.Failure, time.Now())); n > 0 {
			a.cfg.Log.Warn("held requests failed: no instance can start", "revision", r.id, "requests", n, "reason", s.Failure.Reason)
		}
	}
}

// patience is how long requests are held through the back-off of an instance that broke after it had been ready.
const patience = time.Second

// hopeless says that waiting for an instance makes no sense: nothing runs, nothing is being started, and what failed is not
// tried again at once. After a failed start that is so as soon as there is a back-off, because the next start may fail
// too. An instance that had been ready takes only the requests inside it along: those that wait are for its replacement,
// unless breaking has become its habit.
func hopeless(f *endpoints.Failure, now time.Time) bool {
	switch {
	case f == nil:
		return false
	case f.Until.IsZero():
		return true
	case f.Served:
		return f.Until.Sub(now) >= patience
	}
	return f.Until.After(now)
}

func cannotStart(f *endpoints.Failure, now time.Time) *hop.Error {
	return &hop.Error{
		Status: 503, Reason: hop.ReasonCannotStart,
		Message:    fmt.Sprintf("no instance gets ready: %s: %s", f.Reason, f.Message),
		RetryAfter: max(time.Second, f.Until.Sub(now)),
	}
}

// Serve finds a free slot for x, waiting for one if need be, and passes x on to its instance.
func (a *Activator) Serve(x *hop.Exchange) error {
	v, ok := a.revisions.Load(x.Revision)
	if !ok {
		return &hop.Error{Status: 404, Reason: hop.ReasonNoRevision, Message: fmt.Sprintf("revision %s is not known here", x.Revision)}
	}
	r := v.(*revision)
	if r.sticky == (api.Sticky{}) {
		return a.serve(r, x, 0)
	}
	key, fresh := keyOf(r.sticky, x)
	err := a.serve(r, x, key)
	if err == nil && fresh != "" {
		setCookie(x, fresh)
	}
	return err
}

// serve is Serve for a request with a key to choose its instance by; 0 = none.
func (a *Activator) serve(r *revision, x *hop.Exchange, key uint64) error {
	t := r.b.TryKey(key)
	if t == nil {
		return a.hold(r, x, key)
	}
	if r.always {
		return a.counted(r, x, t, key, nil)
	}
	err := t.Value.(*target).handler.Serve(x)
	if err == nil {
		x.OnFinish(t)
		return nil
	}
	if retryable(err) {
		return a.again(r, x, t, key, nil, err)
	}
	r.b.Release(t)
	return err
}

// TryServe passes x on if there is an instance that takes it at once, and says so. False: nothing was done with x, which has to wait for its turn
// wherever its revision's queue is. For those that know the instances and hold no requests: revisions that are always counted are not
// served in this way.
func (a *Activator) TryServe(x *hop.Exchange) (bool, error) {
	v, ok := a.revisions.Load(x.Revision)
	if !ok {
		return false, nil
	}
	r := v.(*revision)
	if r.always {
		return false, nil
	}
	var key uint64
	fresh := ""
	if r.sticky != (api.Sticky{}) {
		key, fresh = keyOf(r.sticky, x)
	}
	t := r.b.TryKey(key)
	if t == nil {
		return false, nil
	}
	err := t.Value.(*target).handler.Serve(x)
	switch {
	case err == nil:
		x.OnFinish(t)
		if fresh != "" {
			setCookie(x, fresh)
		}
		return true, nil
	case retryable(err):
		if r.b.Refused(t, time.Now(), errors.Is(err, hop.ErrBusy)) {
			a.m.ejected(r.id)
			a.cfg.Log.Warn("instance ejected: it does not accept requests", "revision", r.id, "instance", t.ID, "error", err)
		}
		a.nudge() // somebody has to look when it may come back
		return false, nil
	}
	r.b.Release(t)
	return true, err
}

func retryable(err error) bool { return errors.Is(err, hop.ErrNotSent) || errors.Is(err, hop.ErrBusy) }

// hold is the way of a request that finds no free slot.
func (a *Activator) hold(r *revision, x *hop.Exchange, key uint64) error {
	if f := r.failure.Load(); f != nil && !f.Until.IsZero() && !r.hasReady.Load() && !r.starting.Load() {
		if now := time.Now(); hopeless(f, now) {
			return cannotStart(f, now)
		}
	}
	if a.draining.Load() {
		return &hop.Error{Status: 503, Reason: hop.ReasonDraining, Message: "this activator is going away", RetryAfter: time.Second}
	}
	w := newWaiter(x, key)
	if err := r.b.Enqueue(w); err != nil {
		return a.refused(r, err)
	}
	r.begin()
	t, err := a.wait(r, x, w)
	if err != nil {
		r.end()
		return err
	}
	return a.counted(r, x, t, key, w)
}

func newWaiter(x *hop.Exchange, key uint64) *breaker.Waiter {
	w := breaker.NewWaiter(x.Client, held(x), time.Now())
	w.Key = key
	return w
}

// wait tells the autoscaler and waits for w's turn.
func (a *Activator) wait(r *revision, x *hop.Exchange, w *breaker.Waiter) (*breaker.Target, error) {
	a.announce(r, x.Arrived)
	a.nudge()
	t, err := r.b.Wait(w, 0)
	x.QueuedAt, x.Queued = w.Since, time.Since(w.Since)
	if err != nil {
		return nil, a.refused(r, err)
	}
	return t, nil
}

// nudge lets Run look through the queues.
func (a *Activator) nudge() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *Activator) announce(r *revision, at time.Time) {
	waiting, running := r.b.Load()
	a.cfg.Demand(endpoints.Demand{Revision: r.id, Waiting: waiting, Running: running, At: at})
}

// counted passes on a request that this activator counts until it is answered. w is nil when it has not waited and the counting has not begun.
func (a *Activator) counted(r *revision, x *hop.Exchange, t *breaker.Target, key uint64, w *breaker.Waiter) error {
	if w == nil {
		r.begin()
	}
	x.Proxied = true
	tg := t.Value.(*target)
	err := tg.handler.Serve(x)
	switch {
	case err == nil:
		if w != nil {
			a.note(x, tg.instance)
		}
		x.OnFinish(t)
		x.OnFinish(r)
		return nil
	case retryable(err):
		return a.again(r, x, t, key, w, err)
	}
	r.b.Release(t)
	r.end()
	return err
}

// again puts a request whose bytes did not reach t back to the head of the queue, for another instance; why says that t was full, or could not
// be reached.
func (a *Activator) again(r *revision, x *hop.Exchange, t *breaker.Target, key uint64, w *breaker.Waiter, why error) error {
	if w == nil {
		w = newWaiter(x, key)
		if !x.Proxied {
			r.begin()
		}
	}
	a.m.again.Add(context.Background(), 1)
	ejected, err := r.b.Requeue(w, t, time.Now(), errors.Is(why, hop.ErrBusy))
	if ejected {
		a.m.ejected(r.id)
		a.cfg.Log.Warn("instance ejected: it does not accept requests", "revision", r.id, "instance", t.ID, "error", why)
	}
	if err != nil {
		r.end()
		return a.refused(r, err)
	}
	next, err := a.wait(r, x, w)
	if err != nil {
		r.end()
		return err
	}
	return a.counted(r, x, next, key, w)
}

// note completes what is known of a request that waited.
func (a *Activator) note(x *hop.Exchange, in endpoints.Instance) {
	x.Start = in.Start
	x.Cold = in.Start.Ready.After(x.Arrived)
	if x.Cold {
		a.m.cold(x)
		x.Resp.Header.Add("Server-Timing", waterfall(x, time.Now()))
	}
}

// refused is the one place where the end of a wait becomes an answer.
func (a *Activator) refused(r *revision, err error) error {
	var e *hop.Error
	switch {
	case errors.Is(err, breaker.ErrFullTotal):
		e = &hop.Error{Status: 503, Reason: hop.ReasonQueueFull, Message: "the queues of all revisions together are full", RetryAfter: time.Second}
	case errors.Is(err, breaker.ErrFull):
		e = &hop.Error{Status: 503, Reason: hop.ReasonQueueFull, Message: fmt.Sprintf("queue of %s is full", r.id), RetryAfter: time.Second}
	case errors.Is(err, breaker.ErrTimeout):
		e = &hop.Error{Status: 504, Reason: hop.ReasonWaited, Message: fmt.Sprintf("no free slot of %s within %v%s", r.id, r.maxWait, r.why()), RetryAfter: time.Second}
	case errors.Is(err, breaker.ErrGone):
		e = &hop.Error{Status: 499, Reason: hop.ReasonClientGone, Message: "client left while waiting"}
	case errors.As(err, &e):
	default:
		return err
	}
	a.m.refused(e.Reason)
	return e
}

func (r *revision) why() string {
	if f := r.failure.Load(); f != nil {
		return ": " + f.Reason + ": " + f.Message
	}
	return ""
}

// held is what x keeps in memory while it waits: its head and the part of the body that is there.
func held(x *hop.Exchange) int64 {
	return int64(len(x.Req.Header.RawHeaders())) + min(max(x.BodySize, 0), 8<<10)
}

// Run looks after the queues until ctx ends: old waits end, clients that left free their place.
func (a *Activator) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.wake:
		}
		tick := time.NewTicker(sweepEvery)
		for busy := true; busy; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return nil
			case now := <-tick.C:
				busy = false
				a.revisions.Range(func(_, v any) bool {
					if r := v.(*revision); r.b.Sweep(now, r.maxWait) {
						busy = true
					}
					return true
				})
			}
		}
		tick.Stop()
	}
}

// Drain refuses new waits; those that wait go on. It returns when none is left, or ctx ends.
func (a *Activator) Drain(ctx context.Context) error {
	a.draining.Store(true)
	for {
		waiting := 0
		a.revisions.Range(func(_, v any) bool {
			n, _ := v.(*revision).b.Load()
			waiting += n
			return true
		})
		if waiting == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(sweepEvery):
		}
	}
}

// Load returns how many requests of a revision wait, and how many hold a slot.
func (a *Activator) Load(id api.RevisionID) (waiting, running int) {
	if v, ok := a.revisions.Load(id); ok {
		return v.(*revision).b.Load()
	}
	return 0, 0
}
