package reconcile

import (
	"slices"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/routes"
)

// prepareEvery is how often is asked whether a revision is ready for its share.
const prepareEvery = 200 * time.Millisecond

// prepares are the routes whose change waits for instances.
type prepares struct {
	mu      sync.Mutex
	waiting map[name]preparing
}

type preparing struct {
	to    []routes.Target // what is waited for
	since time.Time
}

// shift moves a share of what a revision has to another one.
type shift struct {
	from, to routes.Target
	weight   float64 // of from's requests
}

// prepared says whether every revision that gets more of a route's requests than now has the instances for them, or was waited for
// long enough.
func (r *Reconcilers) prepared(n name, to *routes.Route, now time.Time) bool {
	was := r.table.main(n)
	if r.cfg.Prepare == nil || was == nil || to == nil {
		return true
	}
	ready := true
	for _, s := range shifts(was.Targets, to.Targets) {
		if !r.cfg.Prepare(s.from.Revision, s.to.Revision, s.weight) {
			ready = false
		}
	}
	return r.prepares.over(n, to.Targets, ready, now, r.cfg.PrepareWait)
}

// over notes since when a change waits, and says whether it waits no more.
func (p *prepares) over(n name, to []routes.Target, ready bool, now time.Time, patience time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	w, waits := p.waiting[n]
	if !waits || !slices.Equal(w.to, to) {
		w = preparing{to, now}
	}
	if ready || now.Sub(w.since) >= patience || now.Before(w.since) { // the last: the clock was set back
		delete(p.waiting, n)
		return true
	}
	if p.waiting == nil {
		p.waiting = map[name]preparing{}
	}
	p.waiting[n] = w
	return false
}

// shifts are what moves between two states of a route. What a revision gains is taken as coming from those that lose, in the order in
// which they stand, each giving what it has to give.
func shifts(was, to []routes.Target) (all []shift) {
	percent := func(list []routes.Target, t routes.Target) int {
		if i := slices.IndexFunc(list, func(o routes.Target) bool { return o.Revision == t.Revision }); i >= 0 {
			return list[i].Percent
		}
		return 0
	}
	losses := make([]int, len(was))
	for i, t := range was {
		losses[i] = max(0, t.Percent-percent(to, t))
	}
	for _, t := range to {
		gain := t.Percent - percent(was, t)
		for i := 0; i < len(was) && gain > 0; i++ {
			if part := min(gain, losses[i]); part > 0 {
				all = append(all, shift{was[i], t, float64(part) / float64(was[i].Percent)})
				gain, losses[i] = gain-part, losses[i]-part
			}
		}
	}
	return all
}
