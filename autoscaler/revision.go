package autoscaler

import (
	"math"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// clockSkew is how far in the future a report may lie: clocks of two machines differ.
const clockSkew = time.Second

// maxLoad is the largest load that a report can hold. Sums of such numbers stay finite.
const maxLoad = 1e9

// revision is the state of one revision. It belongs to the loop, except for what a Status is read from. An idle one is this struct
// and no more: a million of them are a matter of memory only.
type revision struct {
	id      api.RevisionID
	policy  *Policy // shared by all revisions that wish the same
	healthy bool
	adopted bool // instances were found at start, and no report has come yet
	watched bool // a snapshot has come: which instances there are is known
	life    Life
	kpa     int // last valid answer of Decide, -1 before the first
	ebc     int // excess burst capacity of the last valid answer
	ordered int // -1 = nothing was ordered yet

	// What there is.
	ready    int
	starting int
	failure  *endpoints.Failure
	snapshot *endpoints.Snapshot // the last one with instances, nil = there are none

	shown *Status  // guarded by Autoscaler.mu; shared by idle revisions that look the same, else in active
	mail  *message // guarded by Autoscaler.mu: what the loop has not read yet; nil = nothing
	gone  bool     // removed, or forgotten

	forecast *forecast // nil = KPA decides

	*active // nil = idle: awake makes it
}

// active is what a revision has only while there is load or an instance, and for one stable window after that.
type active struct {
	// The decision of the load.
	stable, panic Window
	sources       sources
	memory        Memory
	load          Load
	decision      Decision
	nextTick      time.Time

	// The answer to events.
	asked  Delay            // what they asked for, over a stable window
	demand endpoints.Demand // the last one
	sought time.Time        // when somebody last wanted something
	capped bool             // the last event was cut by a back-off

	told   time.Time // when the Scaler was last called
	wait   time.Time // order nothing before this, unless a snapshot or a demand comes
	budget bucket    // of starts

	timer timer
	own   Status // guarded by Autoscaler.mu
}

func newRevision(id api.RevisionID) *revision {
	return &revision{id: id, kpa: unknown, ordered: unknown}
}

func (r *revision) live() int { return r.ready + r.starting }

// awake makes what is needed while there is load or an instance.
func (r *revision) awake(now, origin time.Time, tick time.Duration) {
	if r.active != nil {
		return
	}
	p := r.policy
	r.active = &active{
		asked:    *NewDelay(origin, p.eventMemory()),
		memory:   Memory{Delay: NewDelay(origin, p.ScaleDownDelay)},
		nextTick: now.Add(tick),
		budget:   bucket{tokens: p.StartBurst, at: now},
	}
	r.stable, r.panic = newWindows(origin, *p)
	r.known(r.snapshot)
}

// asleep forgets what awake made. Nothing is lost: it is called after a stable window without load, when every window
// would start afresh.
func (r *revision) asleep() { r.active = nil }

// busy says whether the revision needs ticks.
func (r *revision) busy() bool {
	return r.live() > 0 || r.ordered > 0 || r.life.Activity != Inactive
}

// shared has one copy of each value that is in use: most revisions have the same.
type shared[T comparable] map[T]*T

// maxShared bounds what is shared; beyond it begins anew, and what is in use stays with its users.
const maxShared = 256

func (m shared[T]) of(v T) *T {
	if known := m[v]; known != nil {
		return known
	}
	if len(m) >= maxShared {
		clear(m)
	}
	own := v // only this one escapes
	m[v] = &own
	return &own
}

// apply takes the annotations, labels and conditions of rev; it says whether anything changed and what is wrong with them.
func (r *revision) apply(now, origin time.Time, c Config, known shared[Policy], rev *api.Revision) (bool, error) {
	p, err := PolicyFor(c, rev.Annotations, rev.Concurrency())
	p.Reachable = rev.Labels[api.LabelRoutingState] != api.RoutingStateReserve
	healthy := rev.Status.Conditions.IsTrue(api.ConditionContainerHealthy)

	if r.life.Since.IsZero() { // new here
		r.policy, r.healthy = known.of(p), healthy
		r.life = NewLife(now, p, healthy)
		r.ebc = initialExcessBurstCapacity(p)
		if floor, _ := p.floor(r.life); healthy && floor > 0 {
			r.awake(now, origin, c.Tick)
			r.wait = now.Add(c.AdoptionWait)
		}
		return true, err
	}
	if p == *r.policy && healthy == r.healthy {
		return false, err
	}
	r.resize(origin, p)
	r.policy, r.healthy = known.of(p), healthy
	r.life.Reached = r.life.Reached || healthy
	return true, err
}

// resize fits windows and delay to a policy that differs from the present one.
func (r *revision) resize(origin time.Time, p Policy) {
	if r.active == nil {
		return
	}
	if p.Metric != r.policy.Metric { // values of another unit
		r.stable, r.panic = newWindows(origin, p)
	} else if p.StableWindow != r.policy.StableWindow || p.PanicWindow != r.policy.PanicWindow || p.Aggregation != r.policy.Aggregation {
		r.stable = *r.stable.resized(p.StableWindow, p.Aggregation)
		r.panic = *r.panic.resized(p.PanicWindow, p.Aggregation)
	}
	if p.eventMemory() != r.policy.eventMemory() {
		r.asked = *NewDelay(origin, p.eventMemory())
	}
	if p.ScaleDownDelay != r.policy.ScaleDownDelay {
		r.memory.Delay = NewDelay(origin, p.ScaleDownDelay)
	}
}

// refusal is why a report was not counted, for the metric.
type refusal string

const (
	taken       refusal = ""
	refusedBad  refusal = "value"  // not finite, negative, or beyond any load
	refusedLate refusal = "late"   // older than the stable window
	refusedSoon refusal = "future" // more than a second ahead
	refusedTwin refusal = "repeat" // not newer than the last one of its source
	refusedGone refusal = "source" // of no instance that the revision has
)

var refusals = [...]refusal{refusedBad, refusedLate, refusedSoon, refusedTwin, refusedGone}

// report counts one report; the windows must exist. It returns the load in it.
func (r *revision) report(now time.Time, s endpoints.Stat) (float64, refusal) {
	v, ok := r.value(s)
	if !ok {
		return 0, refusedBad
	}
	when := s.Time
	if when.IsZero() {
		when = now
	}
	switch {
	case when.After(now.Add(clockSkew)):
		return 0, refusedSoon
	case now.Sub(when) >= r.policy.StableWindow:
		return 0, refusedLate
	}
	if why := r.heard(s, when); why != taken {
		return 0, why
	}
	r.stable.Record(when, v)
	r.panic.Record(when, v)
	if r.adopted {
		r.adopted = false
		if r.memory.Panicking() { // the protection of a restart holds for a stable window with data
			r.memory.PanicAt = now
		}
	}
	if v > 0 {
		r.sought = now
	}
	if r.forecast != nil {
		r.forecast.arrivals += max(0, s.Requests-s.ProxiedRequests)
	}
	return v, taken
}

// heard notes who reported what time. Instances are those of the last snapshot: what a dead one says does not count. Activators come
// and go without a word.
func (r *revision) heard(s endpoints.Stat, when time.Time) refusal {
	if s.Source == "" {
		return taken
	}
	at := int64(when.Sub(r.stable.origin))
	from := r.sources.find(s.Source)
	switch {
	case from == nil && r.watched && !s.Activator:
		return refusedGone
	case from == nil:
		from = r.sources.add(s.Source, s.Activator)
	case at <= from.last && !s.Time.IsZero():
		return refusedTwin
	}
	from.last = max(at, from.last)
	return taken
}

// known makes the instances of a snapshot the ones that reports are taken from.
func (r *revision) known(s *endpoints.Snapshot) {
	if s != nil {
		for i := range s.Instances {
			from := r.sources.find(s.Instances[i].ID)
			if from == nil {
				from = r.sources.add(s.Instances[i].ID, false)
			}
			from.seen = true
		}
	}
	r.sources.keep(func(from *source) bool { return from.seen || from.activator })
	for i := range r.sources.list {
		r.sources.list[i].seen = false
	}
}

// prune forgets activators that have been silent for longer than a report may be late.
func (r *revision) prune(now time.Time) {
	if len(r.sources.list) <= 2*r.live()+16 {
		return
	}
	oldest := int64(now.Sub(r.stable.origin) - r.policy.StableWindow)
	r.sources.keep(func(from *source) bool { return from.last >= oldest || !from.activator && r.watched })
}

// value is a report's load in the policy's metric without what an activator has counted already.
func (r *revision) value(s endpoints.Stat) (float64, bool) {
	total, proxied := s.Concurrency, s.ProxiedConcurrency
	if r.policy.Metric == RPS {
		total, proxied = s.Requests, s.ProxiedRequests
	}
	if !(total >= 0 && total <= maxLoad) || !(proxied >= 0 && proxied <= maxLoad) { // NaN fails
		return 0, false
	}
	return max(0, total-proxied), true
}

// decide is the tick's work.
func (r *revision) decide(now time.Time) {
	at := r.stable.settled(now)
	r.load = Load{
		Ready:    r.ready,
		Stable:   r.stable.Average(at),
		Panic:    r.panic.Average(at),
		Measured: r.policy.SilenceIsZero || !r.stable.Empty(now),
	}
	r.decision, r.memory = Decide(now, *r.policy, r.load, r.memory)
	if r.decision.Valid { // else nothing is known, and whatever was known stays
		r.kpa, r.ebc = r.decision.Desired, r.decision.ExcessBurstCapacity
	}
}

// seek notes a demand and says how many instances it asks for; 0 = there is none.
func (r *revision) seek(now time.Time, d endpoints.Demand) int {
	r.demand, r.capped = d, false
	need := Need(*r.policy, d.Waiting, d.Running, r.ready)
	if need == 0 {
		return 0
	}
	r.sought, r.wait = now, time.Time{}
	switch {
	case !r.policy.EventDriven: // Knative: a first request asks for one instance
		return 1
	case r.failing():
		// Not remembered: the queue is refused while starts fail, and is not there any more when they succeed again.
		if least := max(1, r.ordered); need > least {
			need, r.capped = least, true
		}
	case d.Waiting <= 0 && r.ready > 0 && float64(need)/float64(r.ready) < r.policy.PanicThreshold:
		// Every request has its slot, and the load of one moment is less than what would start a panic: that is for the averages.
		return 1
	}
	return need
}

// failing says that the last start failed and nothing is ready: one instance (or what was ordered before) tries on, at the
// pace of its back-off; more of them would fail the same way. When one gets ready, the rest follows.
func (r *revision) failing() bool { return r.failure != nil && r.ready == 0 }

// hopeless says that starts fail and nobody has asked for a stable window: there is no one left to try for.
func (r *revision) hopeless(now time.Time) bool {
	return r.failure != nil && r.live() == 0 && (r.active == nil || now.Sub(r.sought) >= r.policy.StableWindow)
}

// want is the larger one of what the load and the events ask for.
func (r *revision) want(now time.Time) (int, Why) {
	if r.active == nil {
		return r.kpa, 0
	}
	n, why := r.kpa, r.decision.Why
	if r.forecast != nil {
		n, why = r.forecast.want(r)
	}
	if m := r.asked.Max(now); m > max(0, n) {
		n, why = m, WhyEvent
	}
	if r.capped {
		why |= WhyBackOff
	}
	return n, why
}

// settle asks Settle; the order in its answer is -1 for no change.
func (r *revision) settle(now time.Time) Verdict {
	want, why := r.want(now)
	var v Verdict
	v, r.life = Settle(now, *r.policy, want, Standing{
		Ready:               r.ready,
		Starting:            r.starting,
		ExcessBurstCapacity: r.ebc,
		Hopeless:            r.hopeless(now),
	}, r.life)
	v.Why |= why
	if r.adopted && max(v.Order, r.ordered) < r.live() {
		v.Order, v.Why = r.live(), v.Why|WhyAdopted
	} else if r.adopted && v.Order < r.ordered {
		v.Order = unknown
	}
	if least := max(1, r.ordered); r.failing() && v.Order > least {
		v.Order, v.Why = least, v.Why|WhyBackOff
	}
	if r.active == nil {
		return v
	}
	if now.Before(r.wait) {
		v.Order, v.Wake = unknown, earlier(v.Wake, r.wait)
		return v
	}
	return r.ration(now, v)
}

// ration cuts an order to the starts that the revision's budget has left; the rest is asked for again as the budget fills up.
func (r *revision) ration(now time.Time, v Verdict) Verdict {
	least := max(0, r.ordered, r.live()) // so many are there, or being started
	if r.policy.StartRate <= 0 || v.Order <= least {
		return v
	}
	granted, next := r.budget.take(now, v.Order-least, r.policy.StartRate, r.policy.StartBurst)
	if least+granted < v.Order {
		v.Order, v.Wake, v.Why = least+granted, earlier(v.Wake, next), v.Why|WhyStartRate
	}
	return v
}

// bucket is a token bucket.
type bucket struct {
	tokens float64
	at     time.Time // of the last change
}

// take grants up to n tokens at once; next is when there will be another one.
func (b *bucket) take(now time.Time, n int, rate, burst float64) (granted int, next time.Time) {
	if d := now.Sub(b.at); d > 0 {
		b.tokens = math.Min(burst, b.tokens+d.Seconds()*rate)
	}
	b.at = now
	granted = min(n, max(0, int(b.tokens)))
	b.tokens -= float64(granted)
	return granted, now.Add(time.Duration(math.Ceil(math.Max(0, 1-b.tokens) / rate * 1e9)))
}

// observe takes what there is; it says whether instances that were ordered are gone.
func (r *revision) observe(now, origin time.Time, tick time.Duration, s *endpoints.Snapshot) (lost bool) {
	before := r.live()
	r.ready, r.starting, r.failure = s.Count(endpoints.Ready), s.Count(endpoints.Starting), s.Failure
	first := !r.watched
	if r.forecast != nil {
		r.forecast.started(s)
	}
	r.watched, r.snapshot = true, nil
	if len(s.Instances) > 0 {
		r.snapshot = s
	}
	if r.active != nil {
		r.wait = time.Time{}
		r.known(s)
	}
	if (r.ordered == unknown || first) && r.live() > max(0, r.ordered) {
		r.adopted = true // an order that was given before is no judgement on instances that were not known of
	}
	if r.live() == 0 {
		r.adopted = false // nothing is left to protect
	}
	if r.adopted {
		r.awake(now, origin, tick)
		r.adopt(now, origin, first)
	}
	return r.ordered > 0 && r.live() < r.ordered && before >= r.ordered
}

// adopt protects instances that were there before this process: with more than one the first minute is a panic with their number as
// the floor, as after every start of Knative's autoscaler.
func (r *revision) adopt(now, origin time.Time, first bool) {
	if (r.kpa == unknown || first) && r.ready > r.memory.PanicPeak {
		r.memory = NewMemory(now, origin, *r.policy, r.ready)
	}
	if r.life.Activity == Inactive {
		r.life.Activity, r.life.Since = Activating, now
	}
}

// backOff says that no start may be made now.
func (r *revision) backOff(now time.Time) bool {
	return r.failure != nil && now.Before(r.failure.Until)
}

func (r *revision) status(now time.Time, v Verdict) Status {
	desired := v.Want
	if desired == unknown { // Knative keeps showing the old one
		desired = max(0, r.ordered)
	}
	s := Status{
		Revision:            r.id,
		Desired:             desired,
		Ordered:             max(0, r.ordered),
		Ready:               r.ready,
		Starting:            r.starting,
		Policy:              r.policy,
		ExcessBurstCapacity: r.ebc,
		Mode:                r.life.Mode,
		Activators:          Activators(*r.policy, r.ready),
		Activity:            r.life.Activity,
		Why:                 v.Why,
		Failure:             r.failure,
		Decided:             now,
	}
	if r.active != nil {
		s.Stable, s.Panic, s.Measured = r.load.Stable, r.load.Panic, r.load.Measured
		s.PanicMode = r.decision.PanicMode
		s.FromLoad, s.FromEvents = max(0, r.kpa), r.asked.Max(now)
		s.Waiting, s.Running, s.Asked = r.demand.Waiting, r.demand.Running, r.demand.At
		s.Wake = v.Wake
	}
	if r.forecast != nil {
		s.Outlook, s.Announced = r.forecast.outlook(now), r.forecast.shift
	}
	return s
}
