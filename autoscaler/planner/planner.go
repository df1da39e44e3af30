package planner

import (
	"cmp"
	"fmt"
	"math"
	"slices"
)

// Config is how the planner weighs things.
type Config struct {
	// Value is how many seconds of an idle instance one avoided cold start is worth: the one knob. 0 < Value <= MaxValue.
	// Each second of idling that is expected to avoid less than 1/Value cold starts is saved.
	Value float64
	// StartCost is what starting an instance costs beyond the time that it takes, in idle seconds; 0 to MaxValue. It keeps the
	// planner from stopping and starting an instance for a few seconds' gain.
	StartCost float64
}

// The settings that people choose from, and the bound of both numbers.
const (
	DefaultValue = 530 // half a percent of cold starts where Knative's rules have three, at 1.3 times their instance time
	ThriftyValue = 120 // fewer cold starts than Knative's rules, and less instance time
	MaxValue     = 1e6

	defaultStartCost = 30
)

// DefaultConfig is Config with the default value.
func DefaultConfig() Config { return Config{Value: DefaultValue, StartCost: defaultStartCost} }

// Validate says what is wrong with c.
func (c Config) Validate() error {
	if !(c.Value > 0) || c.Value > MaxValue {
		return fmt.Errorf("planner: value is %v idle seconds for one cold start: must be above 0 and at most %v", c.Value, float64(MaxValue))
	}
	if !(c.StartCost >= 0) || c.StartCost > MaxValue {
		return fmt.Errorf("planner: start cost is %v idle seconds: must be in [0, %v]", c.StartCost, float64(MaxValue))
	}
	return nil
}

// ID names a function of a Planner. Numbers of removed functions are used again.
type ID int32

// Load is what one function did since the last observation.
type Load struct {
	Seconds  []float64 // mean requests running and queued in each second, oldest first; not negative
	Arrivals int       // requests that came
	Done     int       // requests that ended
	Queued   int       // now
	Running  int       // now
	Service  float64   // mean service time of those that ended, seconds; 0 = none ended
	Starts   []float64 // seconds from order to ready, of the instances that became ready
}

// Decision is how many instances there should be from now on.
type Decision struct {
	Target int
	Wake   float64 // ask again then, even if nothing happens; +Inf = no need
	Why    Why
}

const (
	// maxLevels bounds the state of a function; beyond it a target follows the load alone.
	maxLevels = 1000
	// idleLevels and idleEdges are how many levels and callees an idle function remembers.
	idleLevels, idleEdges = 2, 2
	// idleAfter is how long a function is without a need before it is idle, seconds.
	idleAfter = 3600

	// slack is the part of an instance by which a second's mean may exceed what there is: a queue of that length drains by itself
	// before another instance could start.
	slack = 0.1

	// A start takes about startGuess until one was seen; a start ahead is given startMargin times the mean.
	startGuess, startMargin = 1.0, 1.5
)

// Planner holds what was learnt.
type Planner struct {
	config    Config
	fns       []function
	free      []ID
	called    []ID  // calls have come to be expected since Called was asked
	first, up prior // of first levels, and of those above
}

// function is one function's state.
type function struct {
	levels []level
	edges  []edge // whom it calls
	stream *stream
	shift  *shift

	limit   float32 // requests that one instance takes
	start   float32 // mean start time, seconds; 0 = none seen
	service float32 // mean service time, seconds
	burst   float32 // mean requests of the second that begins a spell

	expected float64 // since when calls to it are expected; 0 = they are not
	until    float64 // until when
	calls    int16   // instances that they need
	asked    float64 // end of the last second with a request
	used     bool
}

// New makes a planner; c must be valid.
func New(c Config) *Planner {
	return &Planner{config: c, first: newPrior(), up: newPrior()}
}

// Configure weighs things by c, which must be valid, from the next pause of each level on.
func (p *Planner) Configure(c Config) { p.config = c }

// Add makes a function whose instances take limit requests at a time (the target of one instance; at least 0.01).
func (p *Planner) Add(limit float64) ID {
	f := function{limit: float32(max(limit, 0.01)), burst: 1, used: true}
	if n := len(p.free); n > 0 {
		id := p.free[n-1]
		p.free = p.free[:n-1]
		p.fns[id] = f
		return id
	}
	p.fns = append(p.fns, f)
	return ID(len(p.fns) - 1)
}

// Remove forgets a function. Callers that knew it may keep its number for a while; its successor there will not be called by them, so
// that this is unlearnt.
func (p *Planner) Remove(id ID) {
	if !p.fns[id].used {
		return
	}
	p.fns[id] = function{}
	p.free = append(p.free, id)
}

// Observe takes what a function did up to now. Values that are not finite or out of range are left out.
func (p *Planner) Observe(now float64, id ID, l *Load) {
	f := &p.fns[id]
	for _, s := range l.Starts {
		if s >= 0 && s <= MaxValue {
			f.start = follow(f.start, float32(s), 0.2)
		}
	}
	if l.Service > 0 && l.Service <= MaxValue {
		f.service = follow(f.service, float32(l.Service), 0.1)
	}
	last := 0
	for i, c := range l.Seconds {
		last = f.need(c)
		if i == len(l.Seconds)-1 && last == 0 && l.Arrivals > 0 {
			last = 1 // came and went within a millisecond
		}
		if last > 0 {
			p.needed(f, now-float64(len(l.Seconds)-1-i), last, l)
		}
	}
	p.streams(f, last, l)
	if l.Arrivals > 0 && len(f.edges) > 0 {
		p.expect(now, f, l)
	}
}

// follow is an exponential mean that begins with its first value.
func follow(mean, v, weight float32) float32 {
	if mean == 0 {
		return v
	}
	return mean + weight*(v-mean)
}

// need is how many instances a mean concurrency needs.
func (f *function) need(c float64) int {
	if !(c > 0) { // nor not a number
		return 0
	}
	return max(1, int(math.Min(math.Ceil(c/float64(f.limit)-slack), maxLevels)))
}

// needed notes that the second that ended at t needed n instances.
func (p *Planner) needed(f *function, t float64, n int, l *Load) {
	f.grow(n)
	if t-f.levels[0].seen > 1 {
		f.burst = max(1, f.burst+0.2*(min(float32(l.Arrivals), 20)-f.burst))
	}
	for k := range n {
		expected := 0.0
		if k < int(f.calls) {
			expected = f.expected
		}
		f.levels[k].need(t, expected, p.price(f, k), p.prior(k), f.lead())
	}
}

// grow makes levels up to n.
func (f *function) grow(n int) {
	for k := len(f.levels); k < n; k++ {
		f.levels = append(f.levels, level{seen: -1})
	}
}

func (p *Planner) prior(k int) *prior {
	if k == 0 {
		return &p.first
	}
	return &p.up
}

func (f *function) startTime() float64 {
	if f.start == 0 {
		return startGuess
	}
	return float64(f.start)
}

// lead is how long before an instance is needed it is started.
func (f *function) lead() float64 { return startMargin * f.startTime() }

// price of level k. To be found without the first instance costs a cold start for each request that comes at once.
func (p *Planner) price(f *function, k int) price {
	start := float32(f.startTime() + p.config.StartCost)
	requests := float32(1)
	if k == 0 {
		requests = f.burst
	}
	return price{miss: requests*float32(p.config.Value) + start, start: start}
}

// Decide says how many instances a function should have.
func (p *Planner) Decide(now float64, id ID) Decision {
	f := &p.fns[id]
	d := Decision{Wake: math.Inf(1)}
	recent := 0 // levels that are needed for the second second now, whatever is forecast
	for k := range f.levels {
		l := &f.levels[k]
		if l.seen < 0 {
			continue
		}
		on, until := l.warm(now, p.price(f, k), &p.prior(k).odds, f.lead())
		d.Wake = min(d.Wake, until)
		if !on {
			continue
		}
		d.Target++
		d.Why |= l.why(now)
		if now-l.seen < minHold && l.spell >= 1 { // a single second is over before another instance has started
			recent = k + 1
		}
	}
	d.stream(p, f, recent)
	d.called(f, now)
	d.shifted(p, f, now)
	f.rest(now, &d)
	return d
}

// rest gives back what an idle function does not need, and says when to come for that.
func (f *function) rest(now float64, d *Decision) {
	if f.stream == nil && len(f.levels) <= idleLevels && len(f.edges) <= idleEdges || len(f.levels) == 0 {
		return
	}
	if at := f.levels[0].seen + idleAfter; now < at || d.Target > 0 {
		d.Wake = min(d.Wake, max(at, now+idleAfter/60))
		return
	}
	f.stream = nil
	f.levels = append(make([]level, 0, idleLevels), f.levels[:min(idleLevels, len(f.levels))]...)
	slices.SortFunc(f.edges, func(a, b edge) int { return cmp.Compare(b.share, a.share) })
	f.edges = append([]edge(nil), f.edges[:min(idleEdges, len(f.edges))]...)
}

// streams feeds the stream forecaster; need is what the last second needed.
func (p *Planner) streams(f *function, need int, l *Load) {
	if f.stream == nil {
		if l.Arrivals < streamRate*len(l.Seconds) {
			return
		}
		f.stream = &stream{}
	}
	f.stream.observe(l)
	wait := float32(p.config.Value * min(1, f.stream.service/f.startTime()))
	f.stream.judge(need, wait)
}

// stream puts the spread of a stream in the place of the levels, where that has paid.
func (d *Decision) stream(p *Planner, f *function, recent int) {
	s := f.stream
	if s == nil || s.rate < streamRate {
		return
	}
	s.levels = d.Target
	s.spread = max(recent, s.reserve(p.config.Value, f.startTime(), float64(f.limit)))
	if s.on {
		d.Target, d.Why = s.spread, WhyStream
	}
}
