package autoscaler

import (
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// maxCalls bounds the calls that wait for the loop; what is beyond it is learnt another time.
const maxCalls = 10_000

// Calls tells the planner who has called whom; the slice is not kept. It counts for revisions that the planner decides about.
func (a *Autoscaler) Calls(calls []endpoints.Call) {
	a.mu.Lock()
	a.calls = append(a.calls, calls[:min(len(calls), maxCalls-len(a.calls))]...)
	a.mu.Unlock()
	a.nudge()
}

func (p *plans) called(now time.Time, calls []endpoints.Call, revisions map[api.RevisionID]*revision) {
	for _, c := range calls {
		caller, callee := revisions[c.Caller], revisions[c.Callee]
		if c.N > 0 && caller != nil && callee != nil && caller.forecast != nil && callee.forecast != nil {
			p.planner.Call(unix(now), caller.forecast.id, callee.forecast.id, c.N)
		}
	}
}

// Announced is a shift of traffic that was announced, at the revision that gets it.
type Announced struct {
	From   api.RevisionID
	Weight float64   // share of From's requests, in (0, 1]
	Need   int       // instances that the revision needs for these and its own, by the load of the last minute
	At     time.Time // when it was told last
}

// announcedFor is how long an announcement counts: who announces says it again until the shift is made.
const announcedFor = 5 * time.Second

// shift is the word of an announcement.
type shift struct {
	from   api.RevisionID
	weight float64
}

// Shift announces that the share weight (0 to 1) of the requests of one revision is about to go to another one, and says whether that has
// the instances for it. The caller asks again every few hundred milliseconds, and shifts when the answer is true or its patience ends.
// True too when there is nothing to wait for: the planner does not decide about both, or the last start failed.
func (a *Autoscaler) Shift(from, to api.RevisionID, weight float64) (ready bool) {
	a.mu.Lock()
	source, target := a.revisions[from], a.revisions[to]
	if !(weight > 0 && weight <= 1) || source == nil || target == nil || source.shown == nil || target.shown == nil ||
		!source.shown.Policy.Predictive || !target.shown.Policy.Predictive || target.shown.Failure != nil {
		a.mu.Unlock()
		return true
	}
	s := target.shown
	n := s.Announced
	ready = n != nil && n.From == from && n.Weight == weight && time.Since(n.At) < announcedFor && s.Ready >= s.Policy.cap(n.Need)
	a.messageLocked(to).shift = &shift{from, weight}
	a.mu.Unlock()
	a.nudge()
	return ready
}

// cap is n within max-scale.
func (p *Policy) cap(n int) int {
	if p.MaxScale > 0 {
		return min(n, p.MaxScale)
	}
	return n
}

// shift lets the planner prepare for an announcement.
func (a *Autoscaler) shift(now time.Time, r *revision, s *shift) bool {
	from := a.revisions[s.from]
	if r.forecast == nil || from == nil || from.forecast == nil {
		return false
	}
	need := a.plans.planner.Shift(unix(now), unix(now), from.forecast.id, r.forecast.id, s.weight)
	r.forecast.shift = &Announced{From: s.from, Weight: s.weight, Need: need, At: now}
	r.awake(now, a.origin, a.config.Tick)
	a.plans.look(now, r)
	return true
}
