package sim

import "math"

// Oracle is the instance-seconds of somebody who knows the future: no request waits, and an idle instance is kept only if
// that is cheaper than to stop it and to start it again.
func Oracle(t *Trace, o Options) float64 {
	if o.StartScale == 0 {
		o.StartScale = 1
	}
	w := newWorld(t, o)
	levels := make([]oracle, len(w.fns))
	for len(w.events.heap) > 0 {
		e := w.events.pop()
		w.now = e.at
		w.inForce()
		f := &w.fns[e.fn]
		switch e.kind {
		case arrives:
			a := f.pending
			to := w.route(int(e.fn), a.key)
			w.fetch(int(e.fn))
			w.serveNow(levels, to, a)
		case called:
			w.serveNow(levels, w.route(int(e.fn), e.key), arrival{e.at, e.key})
		case ends:
			f.running--
			levels[e.fn].fall(w, f)
		}
	}
	total := 0.0
	for i := range levels {
		total += levels[i].seconds
	}
	return total
}

// oracle is one function's levels: when each was last left, and what they cost.
type oracle struct {
	left    []float64
	level   int
	seconds float64
	since   float64
}

func (w *world) serveNow(levels []oracle, i int, a arrival) {
	f := &w.fns[i]
	f.running++
	levels[i].rise(w, f)
	d := f.service(a.key)
	w.events.push(event{at: w.now + d, kind: ends, fn: int32(i)})
	w.calling(i, a, d)
}

// busy adds what the running instances cost since the last change.
func (o *oracle) busy(w *world) {
	from := math.Max(o.since, w.trace.EvalFrom)
	to := math.Min(w.now, w.trace.Horizon)
	o.seconds += float64(o.level) * math.Max(0, to-from)
	o.since = w.now
}

func (o *oracle) rise(w *world, f *fn) {
	o.busy(w)
	for o.level*f.Concurrency < f.running {
		start := f.Start * w.options.StartScale
		cost := start
		if o.level < len(o.left) {
			cost = math.Min(start, w.now-o.left[o.level])
		} else {
			o.left = append(o.left, 0)
		}
		if w.now >= w.trace.EvalFrom && w.now <= w.trace.Horizon {
			o.seconds += cost
		}
		o.level++
	}
}

func (o *oracle) fall(w *world, f *fn) {
	o.busy(w)
	for (o.level-1)*f.Concurrency >= f.running && o.level > 0 {
		o.level--
		o.left[o.level] = w.now
	}
}
