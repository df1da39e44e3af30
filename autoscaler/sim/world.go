package sim

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"
)

// Options change how a trace is played.
type Options struct {
	Seed         uint64
	StartScale   float64 // start times are multiplied by this; 0 = 1
	MaxInstances int     // of one function; 0 = 1000
	Plot         bool    // keep what Plot draws
}

// shiftNotice is how long before a shift the policy is told, seconds.
const shiftNotice = 10

// Run plays the trace against the policy on a virtual clock.
func Run(ctx context.Context, t *Trace, p Policy, o Options) (*Result, error) {
	if o.StartScale == 0 {
		o.StartScale = 1
	}
	if o.MaxInstances == 0 {
		o.MaxInstances = 1000
	}
	w := newWorld(t, o)
	ready := p.Hello(w.hello())
	if ready.Interval < 1 || ready.Interval > 60 {
		return nil, fmt.Errorf("policy %q wants a tick every %d s: must be 1 to 60", ready.Name, ready.Interval)
	}
	if ready.OnDemand != OnDemandAll && ready.OnDemand != OnDemandZero && ready.OnDemand != "" {
		return nil, fmt.Errorf("policy %q wants on_demand %q: must be %q or %q", ready.Name, ready.OnDemand, OnDemandZero, OnDemandAll)
	}
	w.all = ready.OnDemand == OnDemandAll
	step := float64(ready.Interval)
	for now := step; now <= t.Horizon; now += step {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		w.advance(now)
		tick := w.tick(now)
		w.listed += len(tick.Functions)
		begin := time.Now()
		orders := p.Tick(tick)
		w.deciding += time.Since(begin)
		if err := w.apply(orders, ready.Name); err != nil {
			return nil, err
		}
	}
	w.advance(t.Horizon)
	return w.finish(ready.Name), nil
}

// world is the simulated platform.
type world struct {
	trace   *Trace
	options Options
	all     bool // on demand
	now     float64
	events  events
	fns     []fn
	active  []int // functions that the next tick lists, in no order
	runs    slab  // running requests
	tickAt  float64
	calls   map[Call3]int // with count 0, to the count
	shifts  []Shift       // not announced yet
	due     []Shift       // not in force yet

	tally    tally
	listed   int           // functions in all ticks
	deciding time.Duration // by the policy
	report   Tick          // reused
	buffer   []float64     // of the report
}

// fn is one function's part of the world.
type fn struct {
	*Function
	key       uint64
	source    arrivals
	pending   arrival
	edges     []Edge  // calls that it makes
	divert    []Shift // in force, by target
	queue     fifo
	instances []*instance
	running   int
	target    int
	started   uint64 // instances ever
	ready     int
	starting  int
	draining  int
	listed    bool

	// Since the last tick.
	from     float64 // of the integral
	seconds  []float64
	peak     int
	arrivals int
	done     int
	served   float64 // service times, sum, seconds
	starts   []float64

	tally fnTally
}

type state uint8

const (
	starting state = iota
	ready
	draining
	gone
)

type instance struct {
	state   state
	running int
	ordered float64
	readyAt float64
	busyAt  float64 // since when it has been busy
}

func newWorld(t *Trace, o Options) *world {
	w := &world{
		trace:   t,
		options: o,
		fns:     make([]fn, len(t.Functions)),
		calls:   make(map[Call3]int),
		shifts:  t.Shifts,
		due:     t.Shifts,
	}
	for i := range w.fns {
		f := &w.fns[i]
		f.Function = &t.Functions[i]
		f.key = mix(keyOf(f.Name), o.Seed)
		f.source = arrivals{f: f.Function, unit: t.Unit, counts: t.Counts[i], key: f.key}
		w.fetch(i)
	}
	for _, c := range t.Calls {
		w.fns[c.Caller].edges = append(w.fns[c.Caller].edges, c)
	}
	if o.Plot {
		w.tally.plot = newSeries(t.Horizon)
	}
	return w
}

func (w *world) hello() *Hello {
	h := &Hello{Type: "hello", Version: Version, Horizon: w.trace.Horizon, MaxInstances: w.options.MaxInstances}
	for i, f := range w.trace.Functions {
		h.Functions = append(h.Functions, HelloFunction{i, f.Name, f.App, f.Concurrency})
	}
	return h
}

// fetch schedules the next arrival of a function.
func (w *world) fetch(i int) {
	f := &w.fns[i]
	a, ok := f.source.pop()
	if !ok {
		return
	}
	f.pending = a
	w.events.push(event{at: a.at, kind: arrives, fn: int32(i)})
}

// advance plays everything up to and including now.
func (w *world) advance(now float64) {
	for len(w.events.heap) > 0 && w.events.heap[0].at <= now {
		e := w.events.pop()
		w.now = math.Max(w.now, e.at)
		w.inForce()
		f := &w.fns[e.fn]
		switch e.kind {
		case arrives:
			a := f.pending
			to := w.route(int(e.fn), a.key)
			w.fetch(int(e.fn))
			w.arrive(to, a)
		case called:
			w.call(int(e.from), int(e.fn), arrival{e.at, e.key})
		case becomesReady:
			w.becomeReady(int(e.fn), e.instance)
		case ends:
			w.end(int(e.fn), e.run)
		}
	}
	w.now = now
	w.inForce()
}

// inForce lets shifts begin.
func (w *world) inForce() {
	for len(w.due) > 0 && w.due[0].At <= w.now {
		s := w.due[0]
		w.due = w.due[1:]
		f := &w.fns[s.From]
		i := slices.IndexFunc(f.divert, func(d Shift) bool { return d.To == s.To })
		if i < 0 {
			f.divert = append(f.divert, s)
			continue
		}
		f.divert[i] = s
	}
}

// route says which function a request goes to under the shifts in force.
func (w *world) route(i int, key uint64) int {
	u := unit(mix(key, 6))
	for _, s := range w.fns[i].divert {
		if u < s.Weight {
			return s.To
		}
		u -= s.Weight
	}
	return i
}

func (w *world) call(caller, callee int, a arrival) {
	w.calls[Call3{caller, callee}]++
	w.arrive(w.route(callee, a.key), a)
}

func (w *world) arrive(i int, a arrival) {
	f := &w.fns[i]
	w.touch(i)
	w.integrate(f)
	f.arrivals++
	w.tally.arrive(w, f, a)
	f.queue.push(a)
	w.dispatch(i)
	f.peak = max(f.peak, f.queue.len()+f.running)
	w.demand(i)
}

// demand is what the platform does on its own when requests wait.
func (w *world) demand(i int) {
	f := &w.fns[i]
	n := f.ready + f.starting
	switch {
	case f.queue.len() == 0:
		return
	case w.all:
		for f.queue.len() > f.starting*f.Concurrency && n < w.options.MaxInstances {
			w.start(i)
			n++
		}
	case n == 0:
		w.start(i)
		n++
	}
	f.target = max(f.target, n)
}

// dispatch gives waiting requests to free slots.
func (w *world) dispatch(i int) {
	f := &w.fns[i]
	for f.queue.len() > 0 {
		in := f.free()
		if in == nil {
			return
		}
		w.serve(i, in, f.queue.pop())
	}
}

// free is the instance that takes the next request: the oldest with a free slot, or the least loaded when instances take many.
func (f *fn) free() *instance {
	if f.ready == 0 {
		return nil
	}
	var best *instance
	for _, in := range f.instances {
		if in.state != ready || in.running >= f.Concurrency {
			continue
		}
		if f.Concurrency <= 3 {
			return in
		}
		if best == nil || in.running < best.running {
			best = in
		}
	}
	return best
}

func (w *world) serve(i int, in *instance, a arrival) {
	f := &w.fns[i]
	d := f.service(a.key)
	if in.running == 0 {
		in.busyAt = w.now
	}
	in.running++
	f.running++
	w.tally.serve(w, f, a, in)
	w.events.push(event{at: w.now + d, kind: ends, fn: int32(i), run: w.runs.add(run{in, d})})
	w.calling(i, a, d)
}

// calling schedules the calls that a run of d seconds makes.
func (w *world) calling(i int, a arrival, d float64) {
	for n, e := range w.fns[i].edges {
		k := mix(a.key, uint64(100+n))
		if unit(k) < e.Probability {
			w.events.push(event{at: w.now + d*e.At, kind: called, fn: int32(e.Callee), from: int32(i), key: k})
		}
	}
}

func (w *world) end(i int, slot int32) {
	f := &w.fns[i]
	r := w.runs.take(slot)
	w.integrate(f)
	f.done++
	f.served += r.service
	f.running--
	r.in.running--
	if r.in.running == 0 {
		w.tally.busy(w, r.in)
		if r.in.state == draining {
			w.remove(f, r.in)
		}
	}
	w.dispatch(i)
}

func (w *world) start(i int) {
	f := &w.fns[i]
	w.touch(i)
	in := &instance{state: starting, ordered: w.now}
	f.instances = append(f.instances, in)
	f.starting++
	f.started++
	took := f.Start * w.options.StartScale * math.Exp(w.trace.StartSigma*normal(mix(f.key^0xc01d, f.started)))
	w.tally.start(w, f)
	w.events.push(event{at: w.now + took, kind: becomesReady, fn: int32(i), instance: in})
}

func (w *world) becomeReady(i int, in *instance) {
	if in.state != starting {
		return
	}
	f := &w.fns[i]
	in.state, in.readyAt = ready, w.now
	f.starting--
	f.ready++
	f.starts = append(f.starts, (in.readyAt-in.ordered)*1000)
	w.dispatch(i)
}

// apply sets targets.
func (w *world) apply(orders []Order2, policy string) error {
	for _, o := range orders {
		if o[0] < 0 || o[0] >= len(w.fns) || o[1] < 0 {
			return fmt.Errorf("policy %q orders %d instances of function %d: there are functions 0 to %d, and instances from 0", policy, o[1], o[0], len(w.fns)-1)
		}
		w.scale(o[0], min(o[1], w.options.MaxInstances))
	}
	return nil
}

func (w *world) scale(i, n int) {
	f := &w.fns[i]
	if f.queue.len() > 0 {
		n = max(n, 1)
	}
	if w.all {
		n = max(n, min(w.options.MaxInstances, (f.running+f.queue.len()+f.Concurrency-1)/f.Concurrency))
	}
	f.target = n
	for f.ready+f.starting < n {
		w.start(i)
	}
	for f.ready+f.starting > n {
		w.stop(f, f.victim())
	}
}

// victim is the next instance to go: starting ones, idle ones, then the one with fewest requests; the youngest among equals.
func (f *fn) victim() *instance {
	var best *instance
	for _, in := range slices.Backward(f.instances) {
		switch {
		case in.state == starting:
			return in
		case in.state == ready && (best == nil || in.running < best.running):
			best = in
		}
	}
	return best
}

func (w *world) stop(f *fn, in *instance) {
	if in.state == starting {
		f.starting--
		w.remove(f, in)
		return
	}
	f.ready--
	if in.running > 0 {
		in.state = draining
		f.draining++
		return
	}
	w.remove(f, in)
}

func (w *world) remove(f *fn, in *instance) {
	if in.state == draining {
		f.draining--
	}
	in.state = gone
	w.tally.stop(w, f, in)
	i := slices.Index(f.instances, in)
	f.instances = slices.Delete(f.instances, i, i+1)
}

// touch lists the function in the next tick.
func (w *world) touch(i int) {
	f := &w.fns[i]
	if !f.listed {
		f.listed = true
		f.from = w.now
		w.active = append(w.active, i)
	}
}

// integrate adds what ran and waited since the last change to the seconds.
func (w *world) integrate(f *fn) {
	if level := float64(f.running + f.queue.len()); level > 0 {
		for at := f.from; at < w.now; {
			second := int(at - w.tickAt + 1e-9)
			end := math.Min(w.now, w.tickAt+float64(second+1))
			for len(f.seconds) <= second {
				f.seconds = append(f.seconds, 0)
			}
			f.seconds[second] += level * (end - at)
			at = end
		}
	}
	f.from = w.now
}

// tick makes the report of the time since the last one.
func (w *world) tick(now float64) *Tick {
	t := &w.report
	t.Type, t.T, t.Functions, t.Calls, t.Shifts = "tick", now, t.Functions[:0], t.Calls[:0], t.Shifts[:0]
	seconds := int(now - w.tickAt + 0.5)
	w.buffer = w.buffer[:0]
	slices.Sort(w.active)
	kept := w.active[:0]
	for _, i := range w.active {
		f := &w.fns[i]
		w.integrate(f)
		t.Functions = append(t.Functions, w.load(i, seconds))
		f.seconds, f.arrivals, f.done, f.served, f.starts = f.seconds[:0], 0, 0, 0, f.starts[:0]
		f.peak = f.running + f.queue.len()
		f.listed = len(f.instances) > 0 || f.peak > 0
		if f.listed {
			kept = append(kept, i)
		}
	}
	w.active = kept
	w.tickAt = now
	for c, n := range w.calls {
		t.Calls = append(t.Calls, Call3{c[0], c[1], n})
	}
	slices.SortFunc(t.Calls, func(a, b Call3) int { return slices.Compare(a[:], b[:]) })
	clear(w.calls)
	for len(w.shifts) > 0 && w.shifts[0].At <= now+shiftNotice {
		t.Shifts = append(t.Shifts, w.shifts[0])
		w.shifts = w.shifts[1:]
	}
	return t
}

func (w *world) load(i, seconds int) Load {
	f := &w.fns[i]
	from := len(w.buffer)
	w.buffer = append(w.buffer, f.seconds...)
	for len(w.buffer) < from+seconds {
		w.buffer = append(w.buffer, 0)
	}
	starts := len(w.buffer)
	w.buffer = append(w.buffer, f.starts...)
	l := Load{
		I: i, Concurrency: w.buffer[from : from+seconds : from+seconds], Starts: w.buffer[starts:len(w.buffer):len(w.buffer)],
		Peak: f.peak, Arrivals: f.arrivals, Done: f.done, Queued: f.queue.len(), Running: f.running,
		Ready: f.ready, Starting: f.starting, Draining: f.draining, Target: f.target,
	}
	if f.done > 0 {
		l.Service = f.served / float64(f.done) * 1000
	}
	return l
}

// finish ends what still runs and computes the metrics.
func (w *world) finish(policy string) *Result {
	for i := range w.fns {
		f := &w.fns[i]
		for _, in := range f.instances {
			if in.running > 0 {
				w.tally.busy(w, in)
			}
			w.tally.stop(w, f, in)
		}
	}
	return w.tally.result(w, policy)
}
