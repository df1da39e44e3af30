package planner

// shift is an announced step of a roll-out, kept at the function that will get the share.
type shift struct {
	at     float64
	from   ID
	weight float32
	own    int // instances that the function needed for itself when it was told
}

const (
	// shiftHold is how long what was started for a shift stays when its requests do not come, seconds.
	shiftHold = 60
	// shiftSpan is the age up to which the old version's levels count as its present load, seconds.
	shiftSpan = 60
)

// Shift announces that from time at on the share weight (0 to 1) of the requests that from has now goes to to, beside those that to
// has already. It returns how many instances to needs for that by the load of the last minute. Told again before its time, it replaces
// what was told of to before. What was learnt about from is passed on when all of it goes, because to is the same function with other code.
func (p *Planner) Shift(now, at float64, from, to ID, weight float64) int {
	f, g := &p.fns[from], &p.fns[to]
	g.shift = &shift{at: at, from: from, weight: float32(weight), own: g.share(now, 1)}
	need := g.shift.own + f.share(now, g.shift.weight)
	if g.start == 0 {
		g.start = f.start
	}
	if g.service == 0 {
		g.service = f.service
	}
	if len(g.levels) > 0 || weight < 1 {
		return need
	}
	g.levels = append(g.levels, f.levels...)
	for i := range g.levels {
		g.levels[i].regret, g.levels[i].choice, g.levels[i].planned = [2]float32{}, byAge, false
	}
	return need
}

// shifted raises a decision to what an announced shift needs.
func (d *Decision) shifted(p *Planner, f *function, now float64) {
	s := f.shift
	if s == nil {
		return
	}
	if now >= s.at+shiftHold {
		f.shift = nil
		return
	}
	if begin := s.at - f.lead(); now < begin {
		d.Wake = min(d.Wake, begin)
		return
	}
	d.Wake = min(d.Wake, s.at+shiftHold)
	if n := s.own + p.fns[s.from].share(now, s.weight); n > d.Target {
		d.Target, d.Why = n, WhyShift
	}
}

// share is how many instances a share of the present load needs.
func (f *function) share(now float64, weight float32) int {
	n := 0
	for k := range f.levels {
		if l := &f.levels[k]; l.seen >= 0 && now-l.seen < shiftSpan {
			n = k + 1
		}
	}
	return int(float32(n)*weight + 0.99)
}
