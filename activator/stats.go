package activator

import (
	"strconv"
	"time"

	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/hop"
)

// integral is the sum of concurrency over time since the last report.
type integral struct {
	now      int       // requests inside
	since    time.Time // of the last change
	area     float64   // request-seconds
	begun    int       // requests that began
	reported time.Time // end of the last period
	seen     bool      // there was something in the last period
}

func (i *integral) add(n int, t time.Time) {
	if !i.since.IsZero() {
		i.area += float64(i.now) * t.Sub(i.since).Seconds()
	}
	i.now += n
	i.since = t
}

// begin counts a request that waits or is passed on after waiting.
func (r *revision) begin() {
	r.mu.Lock()
	r.load.add(1, time.Now())
	r.load.begun++
	r.mu.Unlock()
}

func (r *revision) end() {
	r.mu.Lock()
	r.load.add(-1, time.Now())
	r.mu.Unlock()
}

// Finish makes the revision a hop.Finisher: an answer is complete.
func (r *revision) Finish(*hop.Exchange) { r.end() }

// Report cuts a report for each revision that was busy since the last one. Once a revision has gone quiet there is one report of zero,
// then none.
func (a *Activator) Report(now time.Time) []endpoints.Stat {
	var out []endpoints.Stat
	a.revisions.Range(func(_, v any) bool {
		r := v.(*revision)
		r.mu.Lock()
		defer r.mu.Unlock()
		l := &r.load
		if l.now == 0 && l.begun == 0 && !l.seen {
			l.reported = now
			return true
		}
		l.add(0, now)
		period := now.Sub(l.reported).Seconds()
		if l.reported.IsZero() || period <= 0 {
			period = 1
		}
		l.seen = l.now > 0 || l.begun > 0
		out = append(out, endpoints.Stat{Revision: r.id, Source: a.cfg.Name, Activator: true, Time: now, Concurrency: l.area / period, Requests: float64(l.begun)})
		l.area, l.begun, l.reported = 0, 0, now
		return true
	})
	return out
}

// Phases of a request that waited for the start of its instance; they follow each other and add up to the whole.
type Phases struct {
	Decide time.Duration // arrival to the autoscaler's decision; 0 when the instance was ordered before
	Place  time.Duration // to the choice of node and slot
	Code   time.Duration // to the code being there
	Net    time.Duration // to the network being attached
	Create time.Duration // to the start of its process
	Ready  time.Duration // to its listening: the function's own time
	Queue  time.Duration // from then until the request was sent: turn in the queue and hand-over
	App    time.Duration // to the answer's first byte: the function's own time
}

// PhasesOf splits the time of a cold request. Steps that lie before its arrival count as nothing.
func PhasesOf(x *hop.Exchange, first time.Time) (p Phases) {
	at := x.Arrived
	step := func(d *time.Duration, t time.Time) {
		if t.After(at) {
			*d, at = t.Sub(at), t
		}
	}
	s := x.Start
	step(&p.Decide, s.Decided)
	step(&p.Place, s.Placed)
	step(&p.Code, s.Code)
	step(&p.Net, s.Net)
	step(&p.Create, s.Exec)
	step(&p.Ready, s.Ready)
	step(&p.Queue, x.Sent)
	step(&p.App, first)
	return p
}

// Platform is what the platform took: everything but the function's own start and work.
func (p Phases) Platform() time.Duration {
	return p.Decide + p.Place + p.Code + p.Net + p.Create + p.Queue
}

// waterfall writes the phases as a Server-Timing field (W3C), milliseconds.
func waterfall(x *hop.Exchange, first time.Time) string {
	p := PhasesOf(x, first)
	b := make([]byte, 0, 192)
	for i, f := range []struct {
		name string
		d    time.Duration
	}{{"queue", p.Queue}, {"decide", p.Decide}, {"place", p.Place}, {"code", p.Code}, {"net", p.Net}, {"create", p.Create}, {"ready", p.Ready}, {"app", p.App}} {
		if i > 0 {
			b = append(b, ", "...)
		}
		b = append(append(b, f.name...), ";dur="...)
		b = strconv.AppendFloat(b, float64(f.d.Microseconds())/1000, 'f', 3, 64)
	}
	return string(b)
}
