package autoscaler

import (
	"container/heap"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// Scaler makes a revision have n instances. It is called on the autoscaler's loop without any lock held and must return
// quickly: note the number and do the work elsewhere. decided is the moment of the decision, for the waterfall.
type Scaler interface {
	Scale(id api.RevisionID, n int, decided time.Time)
}

// maxPendingStats bounds the reports of one revision that wait for the loop. A second's worth is one for each instance and
// activator; the bound is met only if the loop stands still.
const maxPendingStats = 8192

// What is kept of revisions that nobody has named yet: for so many, and a demand for so long.
const (
	maxEarly    = 10000
	earlyDemand = 30 * time.Second
)

// Autoscaler decides how many instances each revision should have. Its methods may be called from any goroutine, from
// Scaler and Subscribe callbacks too; they do not block. Nothing happens before Run.
type Autoscaler struct {
	// Static after New.
	config  Config
	scaler  Scaler
	log     *slog.Logger
	metrics *metrics
	origin  time.Time // seconds are counted from here, monotonic

	wake chan struct{} // capacity 1: the inbox is not empty

	mu          sync.Mutex // guards the fields up to the next blank line; never held while calling out
	inbox       map[api.RevisionID]*message
	statuses    map[api.RevisionID]Status
	subscribers []func(api.RevisionID, Status)

	// Owned by Run.
	revisions map[api.RevisionID]*revision
	policies  policies
	early     map[api.RevisionID]*message // of revisions that SetRevision has not named yet
	schedule  schedule
}

// message is what arrived about one revision since the loop last looked. Later news replace earlier ones; reports add up.
type message struct {
	removed  bool // before set
	set      *api.Revision
	snapshot *endpoints.Snapshot
	demand   endpoints.Demand
	demanded bool
	stats    []endpoints.Stat
}

// New makes an autoscaler; c must be valid (Config.Validate). Zero Tick and nil Logger and Meter mean the defaults.
func New(c Config, s Scaler) *Autoscaler {
	if c.Tick <= 0 {
		c.Tick = delaySlot
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	now := time.Now()
	a := &Autoscaler{
		config:    c,
		scaler:    s,
		log:       c.Logger,
		origin:    now.Add(-time.Duration(now.UnixNano() % int64(delaySlot))), // an even second, as Knative's slots have it
		wake:      make(chan struct{}, 1),
		inbox:     make(map[api.RevisionID]*message),
		statuses:  make(map[api.RevisionID]Status),
		revisions: make(map[api.RevisionID]*revision),
		policies:  make(policies),
		early:     make(map[api.RevisionID]*message),
	}
	a.metrics = newMetrics(c.Meter, a.snapshot)
	return a
}

// SetRevision tells of a new revision or of a change of its labels, annotations or conditions. A revision that is new and
// not yet healthy gets its initial scale at once.
func (a *Autoscaler) SetRevision(rev *api.Revision) {
	a.post(rev.ID(), func(m *message) { m.set = rev })
}

// RemoveRevision forgets a revision and orders zero instances of it.
func (a *Autoscaler) RemoveRevision(id api.RevisionID) {
	a.post(id, func(m *message) { *m = message{removed: true} })
}

// Observe tells which instances a revision has. Snapshots of one revision must come in order.
func (a *Autoscaler) Observe(s *endpoints.Snapshot) {
	a.post(s.Revision, func(m *message) { m.snapshot = s })
}

// Demand tells the true length of a revision's queue. It does not block; of several that arrive at once the last counts.
func (a *Autoscaler) Demand(d endpoints.Demand) {
	a.post(d.Revision, func(m *message) { m.demand, m.demanded = d, true })
}

// Report adds load reports of any revisions; the slice is not kept.
func (a *Autoscaler) Report(stats []endpoints.Stat) {
	for _, s := range stats {
		a.post(s.Revision, func(m *message) {
			if len(m.stats) < maxPendingStats {
				m.stats = append(m.stats, s)
			}
		})
	}
}

// Status is the present state of a revision's scaling; false when the revision is not known.
func (a *Autoscaler) Status(id api.RevisionID) (Status, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s, ok := a.statuses[id]
	return s, ok
}

// Subscribe has f called on the loop after each change that people may want to see; changes of averages alone do not count.
// f must return quickly. It is not told of the present state (ask Status) and cannot be taken back.
func (a *Autoscaler) Subscribe(f func(api.RevisionID, Status)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.subscribers = append(slices.Clip(a.subscribers), f) // the loop may be reading the old slice
}

// post changes the message about a revision and wakes the loop.
func (a *Autoscaler) post(id api.RevisionID, change func(*message)) {
	a.mu.Lock()
	m := a.inbox[id]
	if m == nil {
		m = &message{}
		a.inbox[id] = m
	}
	change(m)
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// Run decides until ctx is done and returns nil then. It starts no goroutine. Instances are left as they are: whoever
// runs next goes on from them.
func (a *Autoscaler) Run(ctx context.Context) error {
	defer a.metrics.close()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.wake:
		case <-timer.C:
		}
		a.drain()
		a.due(time.Now())
		if next := a.schedule.next(); !next.IsZero() {
			timer.Reset(time.Until(next))
		} else {
			timer.Reset(time.Hour) // nothing to do: a wake-up ends the wait
		}
	}
}

// drain works on everything that arrived.
func (a *Autoscaler) drain() {
	a.mu.Lock()
	if len(a.inbox) == 0 {
		a.mu.Unlock()
		return
	}
	inbox := a.inbox
	a.inbox = make(map[api.RevisionID]*message, min(len(inbox), 64))
	a.mu.Unlock()
	now := time.Now()
	for id, m := range inbox {
		a.receive(now, id, m)
	}
}

// due ticks and wakes the revisions whose time has come.
func (a *Autoscaler) due(now time.Time) {
	for len(a.schedule) > 0 && !a.schedule[0].at.After(now) {
		r := a.schedule[0]
		if !r.busy() { // a stable window at zero is over
			r.asleep()
			a.at(r, time.Time{})
			continue
		}
		tick := !r.nextTick.IsZero() && !now.Before(r.nextTick)
		if tick {
			a.tick(now, r)
		}
		a.settle(now, r)
	}
}

func (a *Autoscaler) tick(now time.Time, r *revision) {
	r.nextTick = r.nextTick.Add(a.config.Tick)
	if r.nextTick.Before(now) { // the process stood still; missed ticks are not made up for
		r.nextTick = now.Add(a.config.Tick)
	}
	r.decide(now)
	r.prune(now)
	a.metrics.decided("tick")
	if a.log.Enabled(context.Background(), slog.LevelDebug) {
		a.log.Debug("autoscaler decided", "revision", string(r.id), "valid", r.decision.Valid, "desired", r.decision.Desired,
			"stable", r.load.Stable, "panic", r.load.Panic, "ready", r.ready, "panic_mode", r.decision.PanicMode,
			"excess_burst_capacity", r.decision.ExcessBurstCapacity, "why", r.decision.Why.String())
	}
	if r.live() != r.ordered && r.ordered != unknown && !r.adopted && now.Sub(r.told) >= a.config.Tick && !r.backOff(now) {
		a.tell(now, r) // orders may get lost, instances may die: say it again until it is so
	}
}

// receive works on what arrived about one revision, in the order in which it matters: existence, instances, load, demand.
func (a *Autoscaler) receive(now time.Time, id api.RevisionID, m *message) {
	if m.removed {
		a.remove(now, id)
	}
	r := a.revisions[id]
	if r == nil {
		if r, m = a.admit(id, m); r == nil {
			return
		}
	}
	look := m.set != nil && a.set(now, r, m.set)
	if m.snapshot != nil {
		a.observe(now, r, m.snapshot)
		look = true
	}
	if len(m.stats) > 0 && a.report(now, r, m.stats) {
		look = true
	}
	if m.demanded && a.demand(now, r, m.demand) {
		look = true
	}
	if look {
		a.settle(now, r)
	}
}

// admit makes the revision that m names, or keeps m until one is named: instances may be found and requests may arrive
// before the word of the revision gets here.
func (a *Autoscaler) admit(id api.RevisionID, m *message) (*revision, *message) {
	old := a.early[id]
	if old != nil {
		if m.snapshot == nil {
			m.snapshot = old.snapshot
		}
		if !m.demanded {
			m.demand, m.demanded = old.demand, old.demanded
		}
	}
	if m.set == nil {
		if (m.snapshot != nil || m.demanded) && (old != nil || len(a.early) < maxEarly) {
			m.stats, m.removed = nil, false
			a.early[id] = m
		}
		return nil, nil
	}
	delete(a.early, id)
	if time.Since(m.demand.At) > earlyDemand {
		m.demanded = false
	}
	r := newRevision(id)
	a.revisions[id] = r
	return r, m
}

func (a *Autoscaler) remove(now time.Time, id api.RevisionID) {
	delete(a.early, id)
	if r := a.revisions[id]; r != nil {
		a.at(r, time.Time{})
		delete(a.revisions, id)
	}
	a.mu.Lock()
	delete(a.statuses, id)
	a.mu.Unlock()
	a.log.Info("autoscaler forgot a revision", "revision", string(id))
	a.scaler.Scale(id, 0, now)
}

func (a *Autoscaler) set(now time.Time, r *revision, rev *api.Revision) bool {
	changed, err := r.apply(now, a.origin, a.config, a.policies, rev)
	if err != nil && changed {
		a.log.Warn("autoscaler left wrong annotations out", "revision", string(r.id), "error", err)
	}
	return changed
}

func (a *Autoscaler) observe(now time.Time, r *revision, s *endpoints.Snapshot) {
	failed := r.failure != nil
	lost := r.observe(now, a.origin, s)
	if lost && !r.backOff(now) {
		a.tell(now, r)
	}
	// Starts work again: those who waited while they did not are answered for now, if the word of them is not old.
	if failed && r.failure == nil && r.ready > 0 && now.Sub(r.demand.At) <= a.config.Tick {
		a.demand(now, r, r.demand)
	}
}

// report counts reports and says whether they woke a revision that wanted nothing: that does not wait for the tick.
func (a *Autoscaler) report(now time.Time, r *revision, stats []endpoints.Stat) bool {
	r.awake(now, a.origin, a.config.Tick)
	load := 0.0
	for _, s := range stats {
		v, why := r.report(now, s)
		if why != taken {
			a.metrics.refused(why)
		}
		load += v
	}
	if load > 0 && r.kpa <= 0 && r.life.Activity == Inactive {
		r.decide(now)
		a.metrics.decided("report")
		return true
	}
	if !r.busy() && r.at.IsZero() { // a late report of zeros: forget it again
		a.at(r, now.Add(r.policy.StableWindow+time.Second))
	}
	return false
}

// demand acts on the length of a queue: never down, only up.
func (a *Autoscaler) demand(now time.Time, r *revision, d endpoints.Demand) bool {
	need := r.seek(now, d)
	if need == 0 {
		return false
	}
	r.awake(now, a.origin, a.config.Tick)
	r.asked.Record(now, need)
	if need <= r.ordered && r.life.Activity != Inactive { // the common case of a busy revision: nothing changes
		return false
	}
	a.metrics.decided("event")
	return true
}

// settle orders what follows from load, events and instances, plans the next look and publishes the status.
func (a *Autoscaler) settle(now time.Time, r *revision) {
	if n := r.settle(now); n != unknown && n != r.ordered {
		a.order(now, r, n)
	}
	a.plan(now, r)
	a.publish(r.status(now))
}

func (a *Autoscaler) order(now time.Time, r *revision, n int) {
	before := r.ordered
	r.ordered = n
	if n == 0 {
		r.kpa = 0 // an older answer for which no data came since must not bring instances back
	}
	if before == unknown && n == 0 {
		return // nothing was ordered, nothing is there
	}
	a.logScale(now, r, max(0, before), n)
	a.metrics.scaled(max(0, before), n)
	a.tell(now, r)
}

func (a *Autoscaler) logScale(now time.Time, r *revision, from, to int) {
	args := []any{"revision", string(r.id), "from", from, "to", to, "ready", r.ready, "starting", r.starting}
	if now.Sub(r.demand.At) <= a.config.Tick { // an older one says nothing about now
		args = append(args, "waiting", r.demand.Waiting, "running", r.demand.Running)
	}
	a.log.Info("autoscaler scales", append(args, "why", r.verdict.Why.String())...)
}

func (a *Autoscaler) tell(now time.Time, r *revision) {
	r.told = now
	a.scaler.Scale(r.id, r.ordered, now)
}

// plan sets when the loop looks at r again: at its tick or its verdict's time; at zero once more, to forget its windows.
func (a *Autoscaler) plan(now time.Time, r *revision) {
	switch {
	case r.busy():
		r.awake(now, a.origin, a.config.Tick)
		if r.nextTick.Before(now) {
			r.nextTick = now.Add(a.config.Tick)
		}
		a.at(r, earlier(r.nextTick, r.verdict.Wake))
	case r.stable != nil:
		a.at(r, now.Add(r.policy.StableWindow+time.Second))
	default:
		a.at(r, time.Time{})
	}
}

// at moves r in the schedule; the zero time takes it out.
func (a *Autoscaler) at(r *revision, t time.Time) {
	r.at = t
	switch {
	case t.IsZero() && r.index >= 0:
		heap.Remove(&a.schedule, r.index)
	case t.IsZero():
	case r.index >= 0:
		heap.Fix(&a.schedule, r.index)
	default:
		heap.Push(&a.schedule, r)
	}
}

// publish makes s readable and tells the subscribers if it is news.
func (a *Autoscaler) publish(s Status) {
	a.mu.Lock()
	old, known := a.statuses[s.Revision]
	a.statuses[s.Revision] = s
	subscribers := a.subscribers
	a.mu.Unlock()
	if known && !s.differs(old) {
		return
	}
	for _, f := range subscribers {
		f(s.Revision, s)
	}
}

// snapshot is all statuses, for the metrics.
func (a *Autoscaler) snapshot() []Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := make([]Status, 0, len(a.statuses))
	for _, s := range a.statuses {
		all = append(all, s)
	}
	return all
}

// schedule is a heap of the revisions that have something to do, the earliest first.
type schedule []*revision

func (s schedule) next() time.Time {
	if len(s) == 0 {
		return time.Time{}
	}
	return s[0].at
}

func (s schedule) Len() int           { return len(s) }
func (s schedule) Less(i, j int) bool { return s[i].at.Before(s[j].at) }

func (s schedule) Swap(i, j int) {
	s[i], s[j] = s[j], s[i]
	s[i].index, s[j].index = i, j
}

// Push is for container/heap.
func (s *schedule) Push(x any) {
	r := x.(*revision)
	r.index = len(*s)
	*s = append(*s, r)
}

// Pop is for container/heap.
func (s *schedule) Pop() any {
	old := *s
	r := old[len(old)-1]
	old[len(old)-1] = nil
	*s = old[:len(old)-1]
	r.index = -1
	return r
}
