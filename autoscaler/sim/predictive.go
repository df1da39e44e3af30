package sim

import (
	"math"

	"github.com/thawrun/thaw/autoscaler/planner"
)

// predictive plays the planner. It starts one instance for a first request at once (the platform does), and everything else by the planner's
// targets, once a second.
type predictive struct {
	config  planner.Config
	planner *planner.Planner
	targets []int
	wakes   wakes
	moved   map[[2]int]float64 // shares that shifts have moved so far, by from and to
	load    planner.Load       // reused
	orders  []Order2
}

const plannerInterval = 1

// NewPredictive is the planner as a policy; c must be valid.
func NewPredictive(c planner.Config) Policy { return &predictive{config: c} }

func (p *predictive) Hello(h *Hello) Ready {
	p.planner = planner.New(p.config)
	p.targets = make([]int, len(h.Functions))
	p.wakes = newWakes(len(h.Functions))
	p.moved = map[[2]int]float64{}
	for _, f := range h.Functions {
		p.planner.Add(float64(f.Concurrency)) // numbers the functions as h does
	}
	return Ready{Type: "ready", Name: "predictive", Interval: plannerInterval, OnDemand: OnDemandZero}
}

func (p *predictive) Tick(t *Tick) []Order2 {
	p.orders = p.orders[:0]
	for _, s := range t.Shifts {
		p.planner.Shift(t.T, s.At, planner.ID(s.From), planner.ID(s.To), p.part(s))
		p.wakes.set(s.To, t.T)
	}
	for _, c := range t.Calls {
		p.planner.Call(t.T, planner.ID(c[0]), planner.ID(c[1]), c[2])
	}
	for i := range t.Functions {
		l := &t.Functions[i]
		p.targets[l.I] = l.Target
		p.planner.Observe(t.T, planner.ID(l.I), p.of(l))
		p.wakes.set(l.I, t.T)
	}
	for _, id := range p.planner.Called() {
		p.wakes.set(int(id), t.T)
	}
	for i, ok := p.wakes.pop(t.T); ok; i, ok = p.wakes.pop(t.T) {
		d := p.planner.Decide(t.T, planner.ID(i))
		if d.Target != p.targets[i] {
			p.targets[i] = d.Target
			p.orders = append(p.orders, Order2{i, d.Target})
		}
		p.wakes.set(i, max(d.Wake, t.T+0.001))
	}
	return p.orders
}

// part is the share of what from has now that a shift takes: its weight is of all the requests that from had before the roll-out.
func (p *predictive) part(s Shift) float64 {
	key := [2]int{s.From, s.To}
	before := p.moved[key]
	p.moved[key] = s.Weight
	if before >= 1 || s.Weight <= before {
		return 0
	}
	return (s.Weight - before) / (1 - before)
}

// of turns milliseconds into seconds.
func (p *predictive) of(l *Load) *planner.Load {
	p.load = planner.Load{
		Seconds: l.Concurrency, Arrivals: l.Arrivals, Done: l.Done, Queued: l.Queued, Running: l.Running,
		Service: l.Service / 1000, Starts: p.load.Starts[:0],
	}
	for _, ms := range l.Starts {
		p.load.Starts = append(p.load.Starts, ms/1000)
	}
	return &p.load
}

// wakes is a heap of functions by the time at which they are to be decided again; each is in it once at most.
type wakes struct {
	at    []float64 // of each function; +Inf = not in the heap
	heap  []int32
	place []int32 // in the heap
}

func newWakes(n int) wakes {
	w := wakes{at: make([]float64, n), place: make([]int32, n)}
	for i := range w.at {
		w.at[i], w.place[i] = math.Inf(1), -1
	}
	return w
}

// set moves a function to a time.
func (w *wakes) set(i int, at float64) {
	w.at[i] = at
	switch {
	case w.place[i] < 0 && math.IsInf(at, 1):
		return
	case w.place[i] < 0:
		w.place[i] = int32(len(w.heap))
		w.heap = append(w.heap, int32(i))
	}
	w.up(int(w.place[i]))
	w.down(int(w.place[i]))
}

// pop takes the next function whose time has come.
func (w *wakes) pop(now float64) (int, bool) {
	if len(w.heap) == 0 || w.at[w.heap[0]] > now {
		return 0, false
	}
	i := int(w.heap[0])
	last := len(w.heap) - 1
	w.swap(0, last)
	w.heap, w.place[i] = w.heap[:last], -1
	w.down(0)
	return i, true
}

// less orders by time, then by number, so that a replay gives the same answers.
func (w *wakes) less(a, b int) bool {
	i, j := w.heap[a], w.heap[b]
	return w.at[i] < w.at[j] || w.at[i] == w.at[j] && i < j
}

func (w *wakes) swap(a, b int) {
	w.heap[a], w.heap[b] = w.heap[b], w.heap[a]
	w.place[w.heap[a]], w.place[w.heap[b]] = int32(a), int32(b)
}

func (w *wakes) up(n int) {
	for n > 0 && w.less(n, (n-1)/2) {
		w.swap(n, (n-1)/2)
		n = (n - 1) / 2
	}
}

func (w *wakes) down(n int) {
	for {
		child := 2*n + 1
		if child >= len(w.heap) {
			return
		}
		if child+1 < len(w.heap) && w.less(child+1, child) {
			child++
		}
		if !w.less(child, n) {
			return
		}
		w.swap(n, child)
		n = child
	}
}
