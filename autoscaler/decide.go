package autoscaler

import (
	"math"
	"time"
)

// Load is what Decide looks at: the averages of the revision's metric and the instances that share it.
type Load struct {
	Ready    int     // instances that take requests; starting and draining ones do not count
	Stable   float64 // average over the stable window: concurrent requests, or requests a second
	Panic    float64 // the same over the panic window
	Measured bool    // false: no report within the stable window. Silence is not zero
}

// Memory is what one decision leaves for the next one of the same revision.
type Memory struct {
	PanicAt   time.Time // last decision at which the panic threshold was reached; zero = not in panic mode
	PanicPeak int       // most instances wanted since panic mode began
	Delay     *Delay    // sliding maximum for scale-down-delay, changed in place and owned by the caller; nil = no delay
}

// NewMemory is the memory before the first decision about a revision that has ready instances. With more than one it
// begins in panic mode with that number as the floor: whoever just started has no history and must not scale down on it.
func NewMemory(now, origin time.Time, p Policy, ready int) Memory {
	m := Memory{Delay: NewDelay(origin, p.ScaleDownDelay)}
	if ready > 1 {
		m.PanicAt, m.PanicPeak = now, ready
	}
	return m
}

// Panicking says whether the revision is in panic mode.
func (m Memory) Panicking() bool { return !m.PanicAt.IsZero() }

// Decision is how many instances the load asks for, before any bound.
type Decision struct {
	Valid               bool // false: nothing is known, whatever was decided before stays
	Desired             int  // instances, before min-scale, max-scale and the rules for zero
	ExcessBurstCapacity int  // free capacity minus target burst capacity, in the metric's unit; negative: through the activator
	PanicMode           bool
	Why                 Why
}

// Decide is Knative's KPA. It is deterministic and touches nothing but the slots of m.Delay; m is what the last call
// returned. The order of the steps is part of the contract: a different order gives different numbers.
func Decide(now time.Time, p Policy, l Load, m Memory) (Decision, Memory) {
	if !l.known() {
		return Decision{PanicMode: m.Panicking(), Why: WhyNoData}, m
	}
	ready := math.Max(1, float64(l.Ready)) // zero instances grow as one would
	lim := limitsOf(&p, ready)
	stable := lim.want(&p, l.Stable)
	panicked := lim.want(&p, l.Panic)

	m = m.panic(now, &p, panicked.unlimited/ready)
	desired, why, m := m.choose(stable, panicked)
	desired, why = m.delay(now, &p, desired, why)
	return Decision{
		Valid:               true,
		Desired:             desired,
		ExcessBurstCapacity: excessBurstCapacity(&p, l),
		PanicMode:           m.Panicking(),
		Why:                 why,
	}, m
}

func (l Load) known() bool {
	return l.Measured && l.Stable >= 0 && l.Panic >= 0 && !math.IsInf(l.Stable, 0) && !math.IsInf(l.Panic, 0) // NaN fails
}

// limits are how far one decision may go from the ready instances.
type limits struct{ down, up float64 }

// limitsOf rounds up and down away from the ready instances, so that a rate close to 1 still moves by one. A revision that
// no route leads to may fall to zero in one step.
func limitsOf(p *Policy, ready float64) limits {
	lim := limits{up: math.Ceil(p.MaxScaleUpRate * ready)}
	if p.Reachable {
		lim.down = math.Floor(ready / p.MaxScaleDownRate)
	}
	return lim
}

// want is what one window asks for.
type want struct {
	unlimited float64 // before any limit: what panic mode and activation-scale look at
	instances int
	why       Why
}

func (lim limits) want(p *Policy, load float64) want {
	w := want{unlimited: math.Ceil(load / p.Target)}
	n := w.unlimited
	if n < lim.down {
		n, w.why = lim.down, WhyDownRate
	}
	if n > lim.up {
		n, w.why = lim.up, WhyUpRate
	}
	w.instances = toInt(n)
	if w.unlimited > 0 && w.instances < p.ActivationScale {
		w.instances, w.why = p.ActivationScale, WhyActivationScale
	}
	return w
}

// panic enters panic mode when over (instances wanted for each ready one) reaches the threshold, renews it while it does, and
// leaves it at the first decision strictly later than a stable window after that, when the surge has left its mark in the stable
// average.
func (m Memory) panic(now time.Time, p *Policy, over float64) Memory {
	switch {
	case over >= p.PanicThreshold:
		m.PanicAt = now
	case m.Panicking() && m.PanicAt.Add(p.StableWindow).Before(now):
		m.PanicAt, m.PanicPeak = time.Time{}, 0
	}
	return m
}

// choose takes the stable window's answer; in panic mode the larger one of both, and never less than since panic mode began.
func (m Memory) choose(stable, panicked want) (int, Why, Memory) {
	if !m.Panicking() {
		return stable.instances, WhyStable | stable.why, m
	}
	n, why := stable.instances, WhyStable|stable.why
	if panicked.instances > n {
		n, why = panicked.instances, WhyPanic|panicked.why
	}
	if n < m.PanicPeak {
		return m.PanicPeak, WhyPanicHold, m
	}
	m.PanicPeak = n
	return n, why, m
}

// delay holds the largest number of the last scale-down-delay; a revision that no route leads to is not held.
func (m Memory) delay(now time.Time, p *Policy, n int, why Why) (int, Why) {
	if m.Delay == nil || !p.Reachable {
		return n, why
	}
	m.Delay.Record(now, n)
	if held := m.Delay.Max(now); held > n {
		return held, WhyScaleDownDelay
	}
	return n, why
}

// excessBurstCapacity uses the whole capacity of the ready instances (not the utilized part): how much more they could take
// at this moment, less the burst that must be survivable. 0 and -1 are switches, not amounts.
func excessBurstCapacity(p *Policy, l Load) int {
	if p.TargetBurstCapacity <= 0 {
		return int(p.TargetBurstCapacity)
	}
	return toInt(math.Floor(float64(l.Ready)*p.Total - p.TargetBurstCapacity - l.Panic))
}

// Activators is how many activators Knative would put in front of the revision: enough for the capacity of the ready instances
// and the burst, and two at least so that one can die.
func Activators(p Policy, ready int) int {
	const least = 2
	if p.TargetBurstCapacity == 0 {
		return least
	}
	capacity := float64(ready)*p.Total + math.Max(0, p.TargetBurstCapacity)
	return max(least, toInt(math.Ceil(capacity/p.ActivatorCapacity)))
}

// Need is the size of an event: how many instances a queue of waiting requests and those running already would fill at the
// target. More instances than requests would be of no use to them, so a target below 1 (utilization of a hard limit of 1)
// does not start two instances for one request. max-scale-up-rate and activation-scale hold as they do in Decide. 0 when there is
// nothing to do.
func Need(p Policy, waiting, running, ready int) int {
	requests := max(0, waiting) + max(0, running)
	if requests == 0 {
		return 0
	}
	n := math.Min(math.Ceil(float64(requests)/p.EventTarget), float64(requests))
	n = math.Min(n, limitsOf(&p, math.Max(1, float64(ready))).up)
	return max(1, toInt(n), p.ActivationScale)
}

// toInt cuts to what an int32 holds: scales are int32 in the API.
func toInt(v float64) int {
	return int(math.Max(math.MinInt32, math.Min(v, math.MaxInt32)))
}
