package autoscaler

import (
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

// Reserver is what a Scaler may be as well: it is told how large the steps are that a revision takes, so that what starts need can be made
// ahead. It is called as Scale is.
type Reserver interface {
	// Reserve says that n instances may be needed at once until then.
	Reserve(id api.RevisionID, n int, until time.Time)
}

// reserveFor is how long a step up is expected to come again: most loads that come in bursts do so within the quarter of an hour.
const reserveFor = 15 * time.Minute

// maxPendingStats bounds the reports of one revision that wait for the loop. A second's worth is one for each instance and
// activator; the bound is met only if the loop stands still.
const maxPendingStats = 8192

// Bounds of the inbox.
const (
	maxSpare = 1 << 15 // messages that are kept for the next news, and
	maxRoom  = 16      // the reports that one of them has room for: together some 60 MB at most, as a rule a tenth of that
	maxQueue = 1 << 16 // places of a queue that are kept when it is empty
	// portion is how many messages are worked on between two looks at the lock: few, so that nobody waits for it long and what was just
	// read is still in the processor's cache.
	portion = 256
)

// What is kept of revisions that nobody has named yet: for so many, and a demand for so long.
const (
	maxEarly    = 10000
	earlyDemand = 30 * time.Second
)

// Autoscaler decides how many instances each revision should have. Its methods may be called from any goroutine, from
// Scaler and Subscribe callbacks too; they do not block. Nothing happens before Run.
type Autoscaler struct {
	// Static after New.
	scaler  Scaler
	reserve func(api.RevisionID, int, time.Time) // nil = the scaler keeps nothing ready
	log     *slog.Logger
	metrics *metrics
	origin  time.Time // seconds are counted from here, monotonic

	wake chan struct{} // capacity 1: the inbox is not empty

	mu          sync.Mutex                  // guards the fields up to the next blank line; never held while calling out
	inbox       []*message                  // in the order in which they came; each is also in its revision's mail, or in strangers
	strangers   map[api.RevisionID]*message // about revisions that are not known
	spare       []*message                  // used up, for the next news
	calls       []endpoints.Call
	change      *Config                      // told by Configure
	remembered  [][]byte                     // told by Remember
	revisions   map[api.RevisionID]*revision // written by Run only, which therefore reads it without mu
	listed      map[*revision]struct{}       // that metrics speak of: awake, and not more than maxListed
	subscribers []func(api.RevisionID, Status)

	// Owned by Run.
	config   Config
	reading  []*message  // was the inbox, and will be again
	hands    []*revision // at hand, reused
	touched  int64       // see touch
	policies shared[Policy]
	looks    shared[Status]              // of idle revisions: a million of them look much the same
	early    map[api.RevisionID]*message // of revisions that SetRevision has not named yet
	wheel    *wheel
	plans    plans
}

// message is what arrived about one revision since the loop last looked. Later news replace earlier ones; reports add up.
type message struct {
	id       api.RevisionID
	revision *revision // nil = not known when the message came
	removed  bool      // before set
	silently bool      // removed: order nothing
	set      *api.Revision
	snapshot *endpoints.Snapshot
	demand   endpoints.Demand
	demanded bool
	shift    *shift
	stats    []endpoints.Stat
	few      [1]endpoints.Stat // room for stats: most revisions have one instance
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
		strangers: make(map[api.RevisionID]*message),
		revisions: make(map[api.RevisionID]*revision),
		listed:    make(map[*revision]struct{}),
		policies:  make(shared[Policy]),
		looks:     make(shared[Status]),
		early:     make(map[api.RevisionID]*message),
	}
	if r, ok := s.(Reserver); ok {
		a.reserve = r.Reserve
	}
	a.wheel = newWheel(a.origin)
	a.plans = newPlans(c)
	a.metrics = newMetrics(c.Meter, a.snapshot)
	return a
}

// Configure takes over the keys of another valid configuration. They count for a revision when it is told of again by SetRevision, which the
// caller does for all that there are. Tick, AdoptionWait, Keep, Logger and Meter stay as they are.
func (a *Autoscaler) Configure(c Config) {
	a.mu.Lock()
	a.change = &c
	a.mu.Unlock()
	a.nudge()
}

func (a *Autoscaler) configure(c Config) {
	old := a.config
	c.Tick, c.AdoptionWait, c.Keep, c.Logger, c.Meter = old.Tick, old.AdoptionWait, old.Keep, old.Logger, old.Meter
	a.config = c
	a.plans.planner.Configure(plannerConfig(c))
}

// Remember gives the planner what Keep.Save was given elsewhere or earlier. It counts for revisions that are told of afterwards; without a Keep it
// does nothing.
func (a *Autoscaler) Remember(learnt []byte) {
	a.mu.Lock()
	a.remembered = append(a.remembered, learnt)
	a.mu.Unlock()
	a.nudge()
}

// SetRevision tells of a new revision or of a change of its labels, annotations or conditions. A revision that is new and
// not yet healthy gets its initial scale at once.
func (a *Autoscaler) SetRevision(rev *api.Revision) {
	a.post(rev.ID(), func(m *message) { m.set = rev })
}

// RemoveRevision forgets a revision and orders zero instances of it.
func (a *Autoscaler) RemoveRevision(id api.RevisionID) {
	a.post(id, func(m *message) { m.forget(false) })
}

// Forget is for a revision that somebody else decides about from now on: it is forgotten and nothing is ordered. Told of it again by
// SetRevision, the autoscaler knows no more of it than after a start.
func (a *Autoscaler) Forget(id api.RevisionID) {
	a.post(id, func(m *message) { m.forget(true) })
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
	a.mu.Lock()
	var found [64]*revision // looked up together before any of them is needed: see touch
	for part := range slices.Chunk(stats, len(found)) {
		for i := range part {
			found[i] = a.revisions[part[i].Revision]
		}
		for i := range part {
			if m := a.mailLocked(part[i].Revision, found[i]); len(m.stats) < maxPendingStats {
				m.stats = append(m.stats, part[i])
			}
		}
	}
	a.mu.Unlock()
	a.nudge()
}

// Status is the present state of a revision's scaling; false when the revision is not known.
func (a *Autoscaler) Status(id api.RevisionID) (Status, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.revisions[id]
	if r == nil || r.shown == nil {
		return Status{}, false
	}
	return r.shown.of(id), true
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
	change(a.messageLocked(id))
	a.mu.Unlock()
	a.nudge()
}

// messageLocked is the message about a revision that waits for the loop.
func (a *Autoscaler) messageLocked(id api.RevisionID) *message {
	return a.mailLocked(id, a.revisions[id])
}

// mailLocked is messageLocked for who has looked the revision up; r is nil if it is not known.
func (a *Autoscaler) mailLocked(id api.RevisionID, r *revision) *message {
	if r != nil && r.mail != nil {
		return r.mail
	}
	if r == nil {
		if m := a.strangers[id]; m != nil {
			return m
		}
	}
	m := a.freshLocked()
	m.id, m.revision = id, r
	if r != nil {
		r.mail = m
	} else {
		a.strangers[id] = m
	}
	a.inbox = append(a.inbox, m)
	return m
}

func (a *Autoscaler) freshLocked() *message {
	n := len(a.spare)
	if n == 0 {
		m := &message{}
		m.stats = m.few[:0]
		return m
	}
	m := a.spare[n-1]
	a.spare = a.spare[:n-1]
	return m
}

// forget makes m the word of a removal: nothing that came before it counts.
func (m *message) forget(silently bool) {
	m.clear()
	m.removed, m.silently = true, silently
}

// clear takes all news out.
func (m *message) clear() {
	*m = message{id: m.id, revision: m.revision, stats: m.stats[:0]}
}

func (a *Autoscaler) nudge() {
	select {
	case a.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// Run decides until ctx is done and returns nil then. It starts no goroutine. Instances are left as they are: whoever
// runs next goes on from them.
func (a *Autoscaler) Run(ctx context.Context) error {
	defer a.metrics.close()
	defer func() { a.plans.save(time.Now(), a.revisions, true) }()
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
		a.ahead(time.Now())
		if next, ok := a.next(); ok {
			timer.Reset(time.Until(next))
		} else {
			timer.Reset(time.Hour) // nothing to do: a wake-up ends the wait
		}
	}
}

// drain works on everything that has arrived up to now, in portions. What comes meanwhile about a revision whose turn is yet to come is
// still added to its message.
func (a *Autoscaler) drain() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.change; c != nil {
		a.change = nil
		a.configure(*c)
	}
	if saved := a.remembered; len(saved) > 0 {
		a.remembered = nil
		a.mu.Unlock()
		for _, b := range saved {
			a.plans.remember(a.log, b, a.revisions)
		}
		a.mu.Lock()
	}
	if calls := a.calls; len(calls) > 0 {
		a.calls = nil
		a.mu.Unlock()
		a.plans.called(time.Now(), calls, a.revisions)
		a.mu.Lock()
	}
	a.inbox, a.reading = a.reading[:0], a.inbox
	for list := range slices.Chunk(a.reading, portion) {
		a.detachLocked(list)
		a.mu.Unlock()
		a.touched += touch(a.hands)
		now := time.Now()
		for i, m := range list {
			if a.receive(now, m) {
				list[i] = nil // what is kept for later is nobody else's
			}
		}
		a.mu.Lock()
		a.reuseLocked(list)
	}
	if clear(a.reading); cap(a.reading) > maxQueue {
		a.reading = nil
	}
}

// detachLocked makes later news go into other messages, and takes the revisions at hand.
func (a *Autoscaler) detachLocked(list []*message) {
	a.hands = a.hands[:0]
	for _, m := range list {
		if m.revision != nil {
			m.revision.mail = nil
			a.hands = append(a.hands, m.revision)
		} else {
			delete(a.strangers, m.id)
		}
	}
}

func (a *Autoscaler) reuseLocked(list []*message) {
	for _, m := range list {
		if m != nil && len(a.spare) < maxSpare && cap(m.stats) <= maxRoom {
			m.id, m.revision = "", nil
			m.clear()
			a.spare = append(a.spare, m)
		}
	}
}

// due ticks and wakes the revisions whose time has come.
func (a *Autoscaler) due(now time.Time) {
	a.wheel.due(now, func(r *revision) {
		if !r.busy() { // a stable window at zero is over
			a.sleep(r)
			return
		}
		if !r.nextTick.IsZero() && !now.Before(r.nextTick) {
			a.tick(now, r)
		}
		a.settle(now, r)
	})
}

// next is when there may be something due.
func (a *Autoscaler) next() (time.Time, bool) {
	next, ok := a.wheel.next()
	if ahead, forecast := a.plans.next(); forecast && (!ok || ahead.Before(next)) {
		return ahead, true
	}
	return next, ok
}

// ahead wakes sleeping revisions for which the planner expects something now, by their own habits or because they will be called.
func (a *Autoscaler) ahead(now time.Time) {
	for r := a.plans.due(now); r != nil; r = a.plans.due(now) {
		a.foresee(now, r)
	}
	for _, id := range a.plans.planner.Called() {
		if r := a.plans.byID[id]; r != nil {
			a.foresee(now, r)
		}
	}
	a.plans.save(now, a.revisions, false)
}

// foresee does what the planner wants of a revision now.
func (a *Autoscaler) foresee(now time.Time, r *revision) {
	a.plans.look(now, r)
	if r.active == nil && r.forecast.decision.Target == 0 {
		a.plans.plan(r)
		return
	}
	r.awake(now, a.origin, a.config.Tick)
	a.settle(now, r)
}

// sleep takes from an idle revision what only a busy one needs.
func (a *Autoscaler) sleep(r *revision) {
	a.mu.Lock()
	r.shown = a.looks.of(r.shown.of(""))
	delete(a.listed, r)
	a.mu.Unlock()
	r.asleep()
	a.plans.plan(r)
}

func (a *Autoscaler) tick(now time.Time, r *revision) {
	r.nextTick = r.nextTick.Add(a.config.Tick)
	if r.nextTick.Before(now) { // the process stood still; missed ticks are not made up for
		r.nextTick = now.Add(a.config.Tick)
	}
	r.decide(now)
	a.plans.decide(now, r)
	r.prune(now)
	a.metrics.decided("tick")
	if a.log.Enabled(context.Background(), slog.LevelDebug) {
		a.log.Debug("autoscaler decided", "revision", string(r.id), "valid", r.decision.Valid, "desired", r.decision.Desired,
			"stable", r.load.Stable, "panic", r.load.Panic, "ready", r.ready, "panic_mode", r.decision.PanicMode,
			"excess_burst_capacity", r.ebc, "why", r.decision.Why.String())
	}
	if r.live() != r.ordered && r.ordered != unknown && !r.adopted && now.Sub(r.told) >= a.config.Tick && !r.backOff(now) {
		a.tell(now, r) // orders may get lost, instances may die: say it again until it is so
	}
}

// receive works on what arrived about one revision, in the order in which it matters: existence, instances, load, demand. It says
// whether it keeps the message.
func (a *Autoscaler) receive(now time.Time, m *message) (kept bool) {
	if m.removed {
		a.remove(now, m.id, m.silently)
	}
	r := m.revision
	if r == nil || r.gone {
		r = a.revisions[m.id]
	}
	if r == nil {
		if r, m = a.admit(m); r == nil {
			return m != nil
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
	if m.shift != nil && a.shift(now, r, m.shift) {
		look = true
	}
	if look {
		a.settle(now, r)
	}
	return false
}

// admit makes the revision that m names, or keeps m until one is named: instances may be found and requests may arrive
// before the word of the revision gets here. The message is nil when it is not kept.
func (a *Autoscaler) admit(m *message) (*revision, *message) {
	id := m.id
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
			m.stats, m.removed, m.revision = nil, false, nil
			a.early[id] = m
			return nil, m
		}
		return nil, nil
	}
	delete(a.early, id)
	if time.Since(m.demand.At) > earlyDemand {
		m.demanded = false
	}
	r := newRevision(id)
	a.mu.Lock()
	a.revisions[id] = r
	a.mu.Unlock()
	return r, m
}

func (a *Autoscaler) remove(now time.Time, id api.RevisionID, silently bool) {
	delete(a.early, id)
	if r := a.revisions[id]; r != nil {
		a.wheel.set(r, time.Time{})
		if silently {
			a.plans.leave(r)
		}
		a.plans.remove(r)
		r.gone = true
	}
	a.mu.Lock()
	delete(a.listed, a.revisions[id])
	delete(a.revisions, id)
	a.mu.Unlock()
	if silently {
		return
	}
	delete(a.plans.learnt, id)
	a.log.Info("autoscaler forgot a revision", "revision", string(id))
	a.scaler.Scale(id, 0, now)
}

func (a *Autoscaler) set(now time.Time, r *revision, rev *api.Revision) bool {
	changed, err := r.apply(now, a.origin, a.config, a.policies, rev)
	a.plans.admit(now, a.log, r, rev.ServiceName())
	if err != nil && changed {
		a.log.Warn("autoscaler left wrong annotations out", "revision", string(r.id), "error", err)
	}
	return changed
}

func (a *Autoscaler) observe(now time.Time, r *revision, s *endpoints.Snapshot) {
	failed := r.failure != nil
	lost := r.observe(now, a.origin, a.config.Tick, s)
	if lost && !r.backOff(now) {
		r.awake(now, a.origin, a.config.Tick)
		a.tell(now, r)
	}
	// Starts work again: those who waited while they did not are answered for now, if the word of them is not old.
	if failed && r.failure == nil && r.ready > 0 && r.active != nil && now.Sub(r.demand.At) <= a.config.Tick {
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
	if !r.busy() && r.timer.at == 0 { // a late report of zeros: forget it again
		a.wheel.set(r, now.Add(r.policy.StableWindow+time.Second))
	}
	return false
}

// demand acts on the length of a queue: never down, only up.
func (a *Autoscaler) demand(now time.Time, r *revision, d endpoints.Demand) bool {
	if d.Waiting <= 0 && d.Running <= 0 && r.active == nil {
		return false
	}
	r.awake(now, a.origin, a.config.Tick)
	if r.forecast != nil && d.Waiting > 0 {
		a.plans.planner.Waiting(unix(now), r.forecast.id, d.Waiting+max(0, d.Running))
	}
	need := r.seek(now, d)
	if need == 0 {
		return false
	}
	r.asked.Record(now, need)
	if need <= r.ordered && r.life.Activity != Inactive { // the common case of a busy revision: nothing changes
		return false
	}
	a.metrics.decided("event")
	return true
}

// settle orders what follows from load, events and instances, plans the next look and publishes the status.
func (a *Autoscaler) settle(now time.Time, r *revision) {
	v := r.settle(now)
	if v.Order != unknown && v.Order != r.ordered {
		a.order(now, r, v)
	}
	a.plan(now, r, v)
	a.publish(r, r.status(now, v))
}

func (a *Autoscaler) order(now time.Time, r *revision, v Verdict) {
	before := r.ordered
	r.ordered = v.Order
	if v.Order == 0 {
		r.kpa = 0 // an older answer for which no data came since must not bring instances back
	}
	if before == unknown && v.Order == 0 {
		return // nothing was ordered, nothing is there
	}
	r.awake(now, a.origin, a.config.Tick)
	a.logScale(now, r, max(0, before), v)
	a.metrics.scaled(max(0, before), v.Order)
	a.tell(now, r)
	if step := v.Order - max(0, before); step > 0 && a.reserve != nil {
		a.reserve(r.id, step, now.Add(reserveFor))
	}
}

func (a *Autoscaler) logScale(now time.Time, r *revision, from int, v Verdict) {
	args := []any{"revision", string(r.id), "from", from, "to", v.Order, "ready", r.ready, "starting", r.starting}
	if now.Sub(r.demand.At) <= a.config.Tick { // an older one says nothing about now
		args = append(args, "waiting", r.demand.Waiting, "running", r.demand.Running)
	}
	a.log.Info("autoscaler scales", append(args, "why", v.Why.String())...)
}

func (a *Autoscaler) tell(now time.Time, r *revision) {
	r.told = now
	a.scaler.Scale(r.id, r.ordered, now)
}

// plan sets when the loop looks at r again: at its tick or its verdict's time; at zero once more, to forget its windows.
func (a *Autoscaler) plan(now time.Time, r *revision, v Verdict) {
	switch {
	case r.busy():
		r.awake(now, a.origin, a.config.Tick)
		if r.nextTick.Before(now) {
			r.nextTick = now.Add(a.config.Tick)
		}
		a.wheel.set(r, earlier(earlier(r.nextTick, v.Wake), r.forecast.wake()))
	case r.active != nil:
		a.wheel.set(r, now.Add(r.policy.StableWindow+time.Second))
	}
}

// publish makes s readable and tells the subscribers if it is news.
func (a *Autoscaler) publish(r *revision, s Status) {
	a.mu.Lock()
	news := r.shown == nil || s.differs(r.shown)
	if r.active != nil {
		if r.shown != &r.own && len(a.listed) < maxListed { // woken
			a.listed[r] = struct{}{}
		}
		r.own = s
		r.shown = &r.own
	} else {
		r.shown = a.looks.of(s.of(""))
	}
	subscribers := a.subscribers
	a.mu.Unlock()
	if !news {
		return
	}
	for _, f := range subscribers {
		f(s.Revision, s)
	}
}

// maxListed bounds the revisions that metrics speak of: a dozen lines of each.
const maxListed = 10_000

// snapshot is the statuses for the metrics, and how many revisions there are. Revisions at rest are not in it: of a million there may be
// that many, and they all say the same.
func (a *Autoscaler) snapshot() (listed []Status, known int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	listed = make([]Status, 0, len(a.listed))
	for r := range a.listed {
		listed = append(listed, r.shown.of(r.id))
	}
	return listed, len(a.revisions)
}
