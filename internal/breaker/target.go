package breaker

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

// Target is one taker of requests. ID and Value are fixed; everything else belongs to its breaker.
type Target struct {
	ID    string
	Value any

	b     *Breaker
	at    string
	hash  uint64    // of ID
	since time.Time // when it became ready; zero = long ago

	// guarded by b.mu
	limit    int // 0 = no limit
	inflight int
	load     int // its order among b.ready, by weigh
	share    int // of what its like get, in 1/whole: less while it is fresh
	index    int // in b.ready; -1 = not in service (removed, or ejected)
	member   bool
	refusals
}

// whole is the share of a target that is not fresh.
const whole = 256

// Finish gives the slot back; it makes a Target a hop.Finisher, so that an answer in progress needs no closure.
func (t *Target) Finish(*hop.Exchange) { t.b.Release(t) }

// Spec describes a target for Set.
type Spec struct {
	ID    string
	At    string    // where it is: in another place it is another target
	Limit int       // requests at once; 0 = no limit
	Value any       // kept from the first Set that names the ID in this place
	Since time.Time // when it became ready, for the slow start; zero = long ago. Kept as Value is
}

func (b *Breaker) joinLocked(s Spec) {
	if b.targets == nil {
		b.targets = make(map[string]*Target)
	}
	t := &Target{ID: s.ID, at: s.At, Value: s.Value, b: b, hash: hashID(s.ID), since: s.Since, limit: s.Limit, share: whole, member: true, index: -1}
	t.weigh()
	b.targets[s.ID] = t
	heap.Push(&b.ready, t)
}

// leaveLocked takes t out; requests inside stay where they are.
func (b *Breaker) leaveLocked(t *Target) {
	t.member = false
	delete(b.targets, t.ID)
	if t.index >= 0 {
		heap.Remove(&b.ready, t.index)
	}
}

// full says that t takes nothing now.
func (t *Target) full() bool {
	return t.limit > 0 && t.inflight >= t.limit || t.trial == trialUnderWay
}

// weigh puts t in its order: with a limit by its free slots, without by what is inside, and behind all others when it is full. A fresh target looks
// as if it had fewer slots, or more inside; that only moves it back in the order, so that no request waits on its account.
func (t *Target) weigh() {
	switch {
	case t.full():
		t.load = math.MaxInt
	case t.limit > 0:
		t.load = t.inflight*whole - t.limit*t.share
	default:
		t.load = (t.inflight + 1) * whole * whole / t.share
	}
}

// fixLocked takes in that something about t has changed.
func (b *Breaker) fixLocked(t *Target) {
	t.weigh()
	if t.index >= 0 {
		heap.Fix(&b.ready, t.index)
	}
}

// takeLocked takes a slot for a request of a key (0 = none) that some targets have refused already.
func (b *Breaker) takeLocked(key uint64, tried []*Target) *Target {
	if b.ramping > 0 {
		b.rampLocked(time.Now(), false)
	}
	t := b.chooseLocked(key, tried)
	if t == nil || t.full() {
		return nil
	}
	t.inflight++
	b.running++
	if t.trial == trialNext {
		t.trial, t.until = trialUnderWay, time.Now().Add(trialTime)
		b.doubts = true
	}
	b.fixLocked(t)
	return t
}

// chooseLocked returns the best target, which may be full; nil = there is none.
func (b *Breaker) chooseLocked(key uint64, tried []*Target) *Target {
	switch {
	case len(b.ready) == 0:
		return b.anywayLocked(tried)
	case key != 0:
		return b.stickLocked(key, tried)
	case len(tried) > 0:
		return b.leastLocked(tried)
	case b.noLimit && len(b.ready) > 1:
		return b.twoLocked()
	}
	return b.ready[0]
}

// twoLocked returns the less loaded of two that are drawn. The least loaded of all would be chosen by every router at the same time.
func (b *Breaker) twoLocked() *Target {
	i := rand.IntN(len(b.ready))
	j := rand.IntN(len(b.ready) - 1)
	if j >= i {
		j++
	}
	t := b.ready[i]
	if b.ready[j].load < t.load {
		t = b.ready[j]
	}
	if t.full() { // being tried after an ejection
		return b.ready[0]
	}
	return t
}

func (b *Breaker) leastLocked(tried []*Target) (best *Target) {
	for _, t := range b.ready {
		if (best == nil || t.load < best.load) && !slices.Contains(tried, t) {
			best = t
		}
	}
	return best
}

const (
	rampSteps = 16         // in which a fresh target comes to its whole share
	leastPart = whole / 10 // what it begins with
)

// rampLocked sets the shares of fresh targets. Only a minority is spared: when most are fresh, as after a burst from zero, the few others would
// have to carry the load of all.
func (b *Breaker) rampLocked(now time.Time, changed bool) {
	window := b.cfg.SlowStart
	if window <= 0 || !changed && now.Sub(b.ramped) < window/rampSteps {
		return
	}
	b.ramped = now
	fresh := 0
	for _, t := range b.ready {
		if now.Sub(t.since) < window {
			fresh++
		}
	}
	if 2*fresh > len(b.ready) {
		fresh = 0
	}
	if fresh == 0 && b.ramping == 0 {
		return
	}
	b.ramping = fresh
	for _, t := range b.ready {
		t.share = whole
		if age := now.Sub(t.since); fresh > 0 && age < window {
			t.share = max(leastPart, int(whole*age/window))
		}
		t.weigh()
	}
	heap.Init(&b.ready)
}

// targetHeap has the target with the most free slots on top; without limits that is the one with the fewest requests.
type targetHeap []*Target

func (h targetHeap) Len() int           { return len(h) }
func (h targetHeap) Less(i, j int) bool { return h[i].load < h[j].load }
func (h targetHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *targetHeap) Push(x any) {
	t := x.(*Target)
	t.index = len(*h)
	*h = append(*h, t)
}
func (h *targetHeap) Pop() any {
	old := *h
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	t.index = -1
	return t
}
