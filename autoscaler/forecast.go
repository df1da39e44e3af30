package autoscaler

import (
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math"
	"slices"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler/planner"
	"github.com/thawrun/thaw/internal/endpoints"
)

// eventMemoryPredictive is how long a queue's number holds for a revision that the planner decides about: until the planner has seen
// the load itself. For others it is the stable window, because the averages forget a short burst at once.
const eventMemoryPredictive = 2 * delaySlot

func (p Policy) eventMemory() time.Duration {
	if p.Predictive {
		return eventMemoryPredictive
	}
	return p.StableWindow
}

// forecast is a revision's place in the planner. It is kept while the revision sleeps.
type forecast struct {
	id       planner.ID
	service  string
	limit    float64
	decision planner.Decision
	second   int64   // the last one that the planner was told of, since the windows' origin
	arrivals float64 // since then
	starts   []float64
	last     time.Time // of the newest start in starts, or before
	at       time.Time // when the planner wants to be asked again; zero = no need
	index    int       // in plans.sleepers, -1 = not there
	shift    *Announced
}

// want is the planner's target. Silence is not zero: without reports the planner knows no more than anybody.
func (f *forecast) want(r *revision) (int, Why) {
	if !r.load.Measured && r.live() > 0 && r.watched {
		return max(f.decision.Target, r.live()), WhyNoData
	}
	return f.decision.Target, WhyPlanner
}

// wake is when the planner wants to be asked, for one that may be nil.
func (f *forecast) wake() time.Time {
	if f == nil {
		return time.Time{}
	}
	return f.at
}

// started notes how long the instances took that have got ready.
func (f *forecast) started(s *endpoints.Snapshot) {
	newest := f.last
	for i := range s.Instances {
		t := s.Instances[i].Start
		if t.Ready.After(f.last) && !t.Decided.IsZero() && t.Ready.After(t.Decided) && len(f.starts) < 64 {
			f.starts = append(f.starts, t.Ready.Sub(t.Decided).Seconds())
			if t.Ready.After(newest) {
				newest = t.Ready
			}
		}
	}
	f.last = newest
}

// outlook is what the planner expects, for people.
func (f *forecast) outlook(now time.Time) string {
	text := fmt.Sprintf("%d wanted (%s).", f.decision.Target, f.decision.Why)
	if f.at.After(now) {
		text += fmt.Sprintf(" If nothing happens, it looks again at %s.", f.at.UTC().Format("15:04:05"))
	}
	return text
}

// plans is the planner with its time and its memory. It belongs to the loop.
type plans struct {
	planner  *planner.Planner
	byID     []*revision               // by planner.ID
	newest   map[string]*forecast      // of each service: what a new revision of it begins with
	learnt   map[api.RevisionID][]byte // of revisions that the planner does not decide about, yet or any more
	sleepers sleepers
	load     planner.Load // reused
	keep     *Keep        // nil = nothing is kept
	saved    time.Time
	changed  map[int]bool // parts of which something was learnt since
}

func plannerConfig(c Config) planner.Config {
	p := planner.DefaultConfig()
	if c.PlannerValue > 0 {
		p.Value = c.PlannerValue
	}
	return p
}

func newPlans(c Config) plans {
	p := plans{planner: planner.New(plannerConfig(c)), newest: map[string]*forecast{}, saved: time.Now()}
	if c.Keep == nil {
		return p
	}
	p.keep, p.changed, p.learnt = c.Keep, map[int]bool{}, map[api.RevisionID][]byte{}
	p.remember(c.Logger, c.Keep.Learnt, nil)
	return p
}

// remember adds what was saved before, but for revisions that are decided about: of these more is known.
func (p *plans) remember(log *slog.Logger, b []byte, revisions map[api.RevisionID]*revision) {
	if p.keep == nil {
		return
	}
	prior, functions, err := readLearnt(b)
	if err == nil && len(prior) > 0 && len(p.byID) == 0 { // else there is one already, learnt from more
		err = p.planner.RestorePrior(prior)
	}
	if err != nil {
		log.Warn("autoscaler cannot read what was learnt before; it is learnt again", "error", err)
		return
	}
	for id, one := range functions {
		if r := revisions[id]; r == nil || r.forecast == nil {
			p.learnt[id] = one
		}
	}
}

func (p *plans) part(id api.RevisionID) int {
	if p.keep.Part == nil {
		return 0
	}
	return p.keep.Part(id)
}

// leave keeps what is known of a revision that somebody else decides about from now on, until it is saved.
func (p *plans) leave(r *revision) {
	if p.keep != nil && r.forecast != nil {
		p.learnt[r.id] = p.planner.AppendSnapshot(nil, r.forecast.id)
	}
}

// unix is the planner's time: it goes on after a restart.
func unix(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

// admit gives a revision to the planner, or takes it away, as its policy wishes.
func (p *plans) admit(now time.Time, log *slog.Logger, r *revision, service string) {
	limit := r.policy.Total
	switch {
	case !r.policy.Predictive:
		p.remove(r)
		return
	case r.forecast != nil && r.forecast.limit == limit:
		return
	}
	p.remove(r)
	f := &forecast{id: p.planner.Add(limit), service: service, limit: limit, second: math.MinInt64, index: -1, last: now}
	from := p.learnt[r.id]
	if old := p.newest[service]; len(from) == 0 && old != nil { // the same function with other code or settings
		from = p.planner.AppendSnapshot(nil, old.id)
	}
	delete(p.learnt, r.id)
	if len(from) > 0 {
		if err := p.planner.Restore(unix(now), f.id, from); err != nil {
			log.Warn("autoscaler cannot use what was learnt of a revision; it is learnt again", "revision", string(r.id), "error", err)
		}
	}
	r.forecast, p.newest[service] = f, f
	for len(p.byID) <= int(f.id) {
		p.byID = append(p.byID, nil)
	}
	p.byID[f.id] = r
	if r.active == nil { // a sleeping one may have something ahead of it
		p.look(now, r)
		p.plan(r)
	}
}

func (p *plans) remove(r *revision) {
	f := r.forecast
	if f == nil {
		return
	}
	p.sleepers.remove(r)
	if p.newest[f.service] == f {
		delete(p.newest, f.service)
	}
	p.planner.Remove(f.id)
	p.byID[f.id] = nil
	r.forecast = nil
}

// decide tells the planner what happened since it was asked last, and asks it.
func (p *plans) decide(now time.Time, r *revision) {
	f := r.forecast
	if f == nil {
		return
	}
	l := &p.load
	l.Seconds, f.second = r.stable.recent(now, f.second, l.Seconds[:0])
	l.Arrivals = int(math.Round(f.arrivals))
	l.Done = l.Arrivals
	l.Queued, l.Running, l.Service = 0, 0, 0
	if now.Sub(r.demand.At) <= delaySlot {
		l.Queued, l.Running = max(0, r.demand.Waiting), max(0, r.demand.Running)
	}
	inside := 0.0
	for _, v := range l.Seconds {
		inside += v
	}
	if f.arrivals > 0 {
		l.Service = inside / f.arrivals // Little's law
	}
	l.Starts = f.starts
	if len(l.Seconds) > 0 && r.load.Measured {
		p.planner.Observe(unix(now), f.id, l)
		if inside > 0 && p.keep != nil {
			p.changed[p.part(r.id)] = true
		}
		f.arrivals, f.starts = 0, f.starts[:0]
	}
	p.look(now, r)
}

// look asks the planner about r, which is not among the sleepers after that: its place there would be of another time.
func (p *plans) look(now time.Time, r *revision) {
	p.sleepers.remove(r)
	f := r.forecast
	f.decision = p.planner.Decide(unix(now), f.id)
	f.at = time.Time{}
	if w := f.decision.Wake - unix(now); w < 1e8 { // three years: never
		f.at = now.Add(time.Duration(max(0.01, w) * 1e9))
	}
}

// plan has a sleeping revision woken when the planner wants to be asked.
func (p *plans) plan(r *revision) {
	if r.forecast != nil && r.active == nil && !r.forecast.at.IsZero() && r.forecast.index < 0 {
		heap.Push(&p.sleepers, r)
	}
}

func (p *plans) next() (time.Time, bool) {
	if len(p.sleepers) == 0 {
		return time.Time{}, false
	}
	return p.sleepers[0].forecast.at, true
}

// due is a revision whose time has come, no longer among the sleepers; nil = none.
func (p *plans) due(now time.Time) *revision {
	if len(p.sleepers) == 0 || p.sleepers[0].forecast.at.After(now) {
		return nil
	}
	return heap.Pop(&p.sleepers).(*revision)
}

// sleepers is a heap of sleeping revisions by when the planner wants to be asked about them.
type sleepers []*revision

func (s sleepers) Len() int           { return len(s) }
func (s sleepers) Less(i, j int) bool { return s[i].forecast.at.Before(s[j].forecast.at) }

func (s sleepers) Swap(i, j int) {
	s[i], s[j] = s[j], s[i]
	s[i].forecast.index, s[j].forecast.index = i, j
}

// Push is for container/heap.
func (s *sleepers) Push(x any) {
	r := x.(*revision)
	r.forecast.index = len(*s)
	*s = append(*s, r)
}

// Pop is for container/heap.
func (s *sleepers) Pop() any {
	last := len(*s) - 1
	r := (*s)[last]
	(*s)[last] = nil
	*s = (*s)[:last]
	r.forecast.index = -1
	return r
}

func (s *sleepers) remove(r *revision) {
	if r.forecast.index >= 0 {
		heap.Remove(s, r.forecast.index)
	}
}

// saveEvery is the distance of two savings.
const saveEvery = time.Minute

// save hands over what was learnt, when it is time or at the end.
func (p *plans) save(now time.Time, revisions map[api.RevisionID]*revision, end bool) {
	if p.keep == nil || len(p.changed) == 0 || !end && now.Sub(p.saved) < saveEvery {
		return
	}
	head := []byte{learntVersion}
	prior := p.planner.AppendPrior(nil)
	head = binary.LittleEndian.AppendUint32(head, uint32(len(prior)))
	head = append(head, prior...)
	parts := map[int][]byte{}
	add := func(id api.RevisionID, one func([]byte) []byte) {
		part := p.part(id)
		if !p.changed[part] {
			return
		}
		b := parts[part]
		if b == nil {
			b = slices.Clip(head)
		}
		b = binary.LittleEndian.AppendUint16(b, uint16(len(id)))
		b = append(b, id...)
		at := len(b)
		b = one(append(b, 0, 0))
		binary.LittleEndian.PutUint16(b[at:], uint16(len(b)-at-2))
		parts[part] = b
	}
	for id, r := range revisions {
		if r.forecast != nil {
			add(id, func(b []byte) []byte { return p.planner.AppendSnapshot(b, r.forecast.id) })
		}
	}
	for id, one := range p.learnt {
		add(id, func(b []byte) []byte { return append(b, one...) })
	}
	for part, b := range parts {
		p.keep.Save(part, binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b)))
	}
	p.saved = now
	clear(p.changed)
}

const learntVersion = 1

// errLearnt is wrapped by errors about what was learnt before.
var errLearnt = errors.New("not what an autoscaler has learnt, or damaged")

// readLearnt reads what save wrote: version (1 byte), length (4) and bytes of the prior, then for each revision length (2) and name,
// length (2) and bytes; at the end the checksum (CRC-32, 4) of everything before it. Little-endian.
func readLearnt(b []byte) (prior []byte, functions map[api.RevisionID][]byte, err error) {
	if len(b) == 0 {
		return nil, nil, nil
	}
	if len(b) < 9 || b[0] != learntVersion {
		return nil, nil, fmt.Errorf("%w: %d bytes", errLearnt, len(b))
	}
	b, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if crc32.ChecksumIEEE(b) != sum {
		return nil, nil, fmt.Errorf("%w: the checksum is wrong", errLearnt)
	}
	rest := b[1:]
	take := func(n int) []byte {
		if err != nil || n > len(rest) {
			err = fmt.Errorf("%w: it ends too early", errLearnt)
			return nil
		}
		part := rest[:n:n]
		rest = rest[n:]
		return part
	}
	prior = take(int(binary.LittleEndian.Uint32(take(4))))
	functions = map[api.RevisionID][]byte{}
	for err == nil && len(rest) > 0 {
		var field [2][]byte
		for i := range field {
			if size := take(2); err == nil {
				field[i] = take(int(binary.LittleEndian.Uint16(size)))
			}
		}
		if err == nil {
			functions[api.RevisionID(field[0])] = field[1]
		}
	}
	if err != nil {
		return nil, nil, err
	}
	return prior, functions, nil
}
