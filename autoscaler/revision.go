package autoscaler

import (
	"math"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// clockSkew is how far in the future a report may lie: clocks of two machines differ.
const clockSkew = time.Second

// revision is the state of one revision. It belongs to the loop. What makes it heavy (windows, sources) exists only while
// there is load or an instance, and for one stable window after that.
type revision struct {
	id      api.RevisionID
	service string
	policy  *Policy // shared by all revisions that wish the same
	healthy bool

	// The decision of the load.
	stable, panic *Window
	sources       map[string]time.Time // of the last report of each
	memory        Memory
	load          Load
	decision      Decision
	kpa           int // last valid answer of Decide, -1 before the first
	nextTick      time.Time

	// The answer to events.
	asked  *Delay           // what they asked for, over a stable window
	demand endpoints.Demand // the last one
	sought time.Time        // when somebody last wanted something
	capped bool             // the last event was cut by a back-off

	// What comes of both.
	life    Life
	verdict Verdict
	ordered int       // -1 = nothing was ordered yet
	told    time.Time // when the Scaler was last called

	// What there is.
	ready    int
	starting int
	failure  *endpoints.Failure
	adopted  bool      // instances were found at start, and no report has come yet
	wait     time.Time // order nothing before this, unless a snapshot or a demand comes

	at    time.Time // when the loop looks again; zero = never
	index int       // in the schedule, -1 = not there
}

func newRevision(id api.RevisionID) *revision {
	return &revision{id: id, kpa: unknown, ordered: unknown, index: -1}
}

func (r *revision) live() int { return r.ready + r.starting }

// awake makes what is needed while there is load or an instance.
func (r *revision) awake(now, origin time.Time, tick time.Duration) {
	if r.stable != nil {
		return
	}
	p := r.policy
	r.stable = NewWindow(origin, p.StableWindow, p.Aggregation)
	r.panic = NewWindow(origin, p.PanicWindow, p.Aggregation)
	r.asked = NewDelay(origin, p.StableWindow)
	r.sources = make(map[string]time.Time)
	if r.memory.Delay == nil {
		r.memory.Delay = NewDelay(origin, p.ScaleDownDelay)
	}
	r.nextTick = now.Add(tick)
}

// asleep forgets what awake made. Nothing is lost: it is called after a stable window without load, when every window
// would start afresh.
func (r *revision) asleep() {
	r.stable, r.panic, r.asked, r.sources = nil, nil, nil, nil
	r.memory = Memory{}
	r.load, r.nextTick = Load{}, time.Time{}
}

// busy says whether the revision needs ticks.
func (r *revision) busy() bool {
	return r.live() > 0 || r.ordered > 0 || r.life.Activity != Inactive
}

// policies has one copy of each policy that is in use: most revisions have the same.
type policies map[Policy]*Policy

// maxPolicies bounds policies; beyond it begins anew, and what is in use stays with its users.
const maxPolicies = 256

func (ps policies) of(p Policy) *Policy {
	if known := ps[p]; known != nil {
		return known
	}
	if len(ps) >= maxPolicies {
		clear(ps)
	}
	own := p // only this one escapes
	ps[p] = &own
	return &own
}

// apply takes the annotations, labels and conditions of rev; it says whether anything changed and what is wrong with them.
func (r *revision) apply(now, origin time.Time, c Config, known policies, rev *api.Revision) (bool, error) {
	p, err := PolicyFor(c, rev.Annotations, rev.Concurrency())
	p.Reachable = rev.Labels[api.LabelRoutingState] != api.RoutingStateReserve
	healthy := rev.Status.Conditions.IsTrue(api.ConditionContainerHealthy)
	r.service = rev.ServiceName()

	if r.life.Since.IsZero() { // new here
		r.policy, r.healthy = known.of(p), healthy
		r.life = NewLife(now, p, healthy)
		r.decision.ExcessBurstCapacity = initialExcessBurstCapacity(p)
		if floor, _ := p.floor(r.life); healthy && floor > 0 {
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
	if r.stable == nil {
		return
	}
	if p.Metric != r.policy.Metric { // values of another unit
		r.stable = NewWindow(origin, p.StableWindow, p.Aggregation)
		r.panic = NewWindow(origin, p.PanicWindow, p.Aggregation)
	} else if p.StableWindow != r.policy.StableWindow || p.PanicWindow != r.policy.PanicWindow || p.Aggregation != r.policy.Aggregation {
		r.stable = r.stable.resized(p.StableWindow, p.Aggregation)
		r.panic = r.panic.resized(p.PanicWindow, p.Aggregation)
	}
	if p.StableWindow != r.policy.StableWindow {
		r.asked = NewDelay(origin, p.StableWindow)
	}
	if p.ScaleDownDelay != r.policy.ScaleDownDelay {
		r.memory.Delay = NewDelay(origin, p.ScaleDownDelay)
	}
}

// refusal is why a report was not counted, for the metric.
type refusal string

const (
	taken       refusal = ""
	refusedBad  refusal = "value"  // not finite or negative
	refusedLate refusal = "late"   // older than the stable window
	refusedSoon refusal = "future" // more than a second ahead
	refusedTwin refusal = "repeat" // not newer than the last one of its source
)

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
	if s.Source != "" && !s.Time.IsZero() {
		if last, ok := r.sources[s.Source]; ok && !when.After(last) {
			return 0, refusedTwin
		}
		r.sources[s.Source] = when
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
	return v, taken
}

// prune forgets sources that have been silent for longer than a report may be late: instances come and go.
func (r *revision) prune(now time.Time) {
	if len(r.sources) <= 2*r.live()+16 {
		return
	}
	for source, last := range r.sources {
		if now.Sub(last) > r.policy.StableWindow {
			delete(r.sources, source)
		}
	}
}

// value is a report's load in the policy's metric without what an activator has counted already.
func (r *revision) value(s endpoints.Stat) (float64, bool) {
	total, proxied := s.Concurrency, s.ProxiedConcurrency
	if r.policy.Metric == RPS {
		total, proxied = s.Requests, s.ProxiedRequests
	}
	if !(total >= 0) || !(proxied >= 0) || math.IsInf(total, 0) || math.IsInf(proxied, 0) {
		return 0, false
	}
	return max(0, total-proxied), true
}

// decide is the tick's work.
func (r *revision) decide(now time.Time) {
	r.load = Load{
		Ready:    r.ready,
		Stable:   r.stable.Average(now),
		Panic:    r.panic.Average(now),
		Measured: r.policy.SilenceIsZero || !r.stable.Empty(now),
	}
	ebc := r.decision.ExcessBurstCapacity
	r.decision, r.memory = Decide(now, *r.policy, r.load, r.memory)
	if r.decision.Valid {
		r.kpa = r.decision.Desired
		return
	}
	r.decision.ExcessBurstCapacity = ebc // nothing is known, whatever was known stays
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
	return r.failure != nil && r.live() == 0 && now.Sub(r.sought) >= r.policy.StableWindow
}

// want is the larger one of what the load and the events ask for.
func (r *revision) want(now time.Time) (int, Why) {
	n, why := r.kpa, r.decision.Why
	if r.asked != nil {
		if m := r.asked.Max(now); m > max(0, n) {
			n, why = m, WhyEvent
		}
	}
	if r.capped {
		why |= WhyBackOff
	}
	return n, why
}

// settle asks Settle and returns how many instances to order, -1 for no change.
func (r *revision) settle(now time.Time) int {
	want, why := r.want(now)
	s := Standing{
		Ready:               r.ready,
		Starting:            r.starting,
		ExcessBurstCapacity: r.decision.ExcessBurstCapacity,
		Hopeless:            r.hopeless(now),
	}
	r.verdict, r.life = Settle(now, *r.policy, want, s, r.life)
	r.verdict.Why |= why
	n := r.verdict.Order
	if r.adopted && max(n, r.ordered) < r.live() {
		n, r.verdict.Why = r.live(), r.verdict.Why|WhyAdopted
	} else if r.adopted && n < r.ordered {
		n = unknown
	}
	if least := max(1, r.ordered); r.failing() && n > least {
		n, r.verdict.Why = least, r.verdict.Why|WhyBackOff
	}
	if now.Before(r.wait) {
		r.verdict.Wake = earlier(r.verdict.Wake, r.wait)
		return unknown
	}
	return n
}

// observe takes what there is; it says whether instances that were ordered are gone.
func (r *revision) observe(now, origin time.Time, s *endpoints.Snapshot) (lost bool) {
	before := r.live()
	r.ready, r.starting, r.failure = s.Count(endpoints.Ready), s.Count(endpoints.Starting), s.Failure
	r.wait = time.Time{}
	if r.ordered == unknown && r.live() > 0 {
		r.adopted = true
	}
	if r.live() == 0 {
		r.adopted = false // nothing is left to protect
	}
	if r.adopted {
		r.adopt(now, origin)
	}
	return r.ordered > 0 && r.live() < r.ordered && before >= r.ordered
}

// adopt protects instances that were there before this process: with more than one the first minute is a panic with their number as
// the floor, as after every start of Knative's autoscaler.
func (r *revision) adopt(now, origin time.Time) {
	if r.kpa == unknown && r.ready > r.memory.PanicPeak {
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

func (r *revision) status(now time.Time) Status {
	desired := r.verdict.Want
	if desired == unknown { // Knative keeps showing the old one
		desired = max(0, r.ordered)
	}
	return Status{
		Revision:            r.id,
		Desired:             desired,
		Ordered:             max(0, r.ordered),
		Ready:               r.ready,
		Starting:            r.starting,
		Metric:              r.policy.Metric,
		Stable:              r.load.Stable,
		Panic:               r.load.Panic,
		Target:              r.policy.Target,
		Measured:            r.load.Measured,
		PanicMode:           r.decision.PanicMode,
		ExcessBurstCapacity: r.decision.ExcessBurstCapacity,
		Mode:                r.life.Mode,
		Activators:          Activators(*r.policy, r.ready),
		Activity:            r.life.Activity,
		Reachable:           r.policy.Reachable,
		Why:                 r.verdict.Why,
		Decided:             now,
	}
}
