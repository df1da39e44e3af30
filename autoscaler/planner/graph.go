package planner

import "slices"

// edge is a call that a function makes.
type edge struct {
	callee ID
	share  float32 // calls for each request of the caller
	later  float32 // part of them that came after the second of the request
}

const (
	// maxEdges is how many callees of a function are remembered; the one with the smallest share gives way.
	maxEdges = 8
	// maxDepth is how many calls ahead is looked.
	maxDepth = 4
	// How much one request changes a share, and one call the part that comes later.
	shareWeight, laterWeight = 0.05, 0.1
	// callSlack is how long beyond the caller's mean times a call may take to come, seconds.
	callSlack = 2
)

// Call notes that caller called callee n times since the last observation. Tell it before the Observe of the same time.
func (p *Planner) Call(now float64, caller, callee ID, n int) {
	f := &p.fns[caller]
	i := slices.IndexFunc(f.edges, func(e edge) bool { return e.callee == callee })
	if i < 0 {
		i = f.addEdge(callee)
	}
	e := &f.edges[i]
	e.share += shareWeight * float32(min(n, 20))
	later := float32(0)
	if f.asked > 0 && now-f.asked < f.delay() {
		later = 1
	}
	e.later += laterWeight * (later - e.later)
}

// delay is how long after a request its calls are waited for.
func (f *function) delay() float64 { return float64(f.service) + callSlack }

func (f *function) addEdge(callee ID) int {
	if len(f.edges) < maxEdges {
		f.edges = append(f.edges, edge{callee: callee})
		return len(f.edges) - 1
	}
	least := 0
	for i := range f.edges {
		if f.edges[i].share < f.edges[least].share {
			least = i
		}
	}
	f.edges[least] = edge{callee: callee}
	return least
}

// expect tells the callees of f that calls are coming: f has just had requests. When f's requests wait for an instance that is worth
// knowing in any case; otherwise only if the calls tend to come later than the requests.
func (p *Planner) expect(now float64, f *function, l *Load) {
	f.asked = now
	delay := f.delay()
	if l.Queued > 0 {
		delay += f.startTime()
	}
	requests := float32(max(1, l.Queued+l.Running))
	for i := range f.edges {
		e := &f.edges[i]
		for range min(l.Arrivals, 20) { // each request without a call lowers the share; Call raises it
			e.share -= shareWeight * e.share
		}
		chance := e.share
		if l.Queued == 0 {
			chance *= e.later
		}
		p.warn(now, e.callee, requests*min(chance, 1), delay, maxDepth)
	}
}

// Waiting notes that so many requests of a function wait for an instance or run: those that it calls are told at once, and not with the
// next Observe.
func (p *Planner) Waiting(now float64, id ID, requests int) {
	f := &p.fns[id]
	for i := range f.edges {
		e := &f.edges[i]
		p.warn(now, e.callee, float32(requests)*min(e.share, 1), f.delay()+f.startTime(), maxDepth)
	}
}

// warn notes that so many calls of a function are expected within delay, and of those that it calls.
func (p *Planner) warn(now float64, callee ID, calls float32, delay float64, depth int) {
	g := &p.fns[callee]
	window := delay + g.lead()
	if !g.used || float64(calls)*p.config.Value < window+p.config.StartCost {
		return
	}
	if now >= g.until {
		g.expected, g.calls = now, 0
		p.called = append(p.called, callee)
	}
	g.until = max(g.until, now+window)
	g.calls = max(g.calls, int16(max(1, min(calls*min(g.service, 1)+0.5, maxCalls))))
	if depth == 1 {
		return
	}
	for _, e := range g.edges {
		p.warn(now, e.callee, calls*min(e.share, 1), delay+g.startTime()+g.delay(), depth-1)
	}
}

// Called returns the functions of which calls have come to be expected since it was last asked: decide about them now. The slice
// is valid until the next Observe.
func (p *Planner) Called() []ID {
	list := p.called
	p.called = p.called[:0]
	return list
}

// maxCalls bounds the instances that are started for calls that have not come yet.
const maxCalls = 20

// called raises a decision to what expected calls need.
func (d *Decision) called(f *function, now float64) {
	if now >= f.until {
		return
	}
	d.Wake = min(d.Wake, f.until)
	if int(f.calls) > d.Target {
		d.Target, d.Why = int(f.calls), WhyCall
	}
}
