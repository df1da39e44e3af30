package autoscaler

import (
	"math/bits"
	"time"
)

// The wheel turns once in 10.24 s. What is due later than that stays where it is for some turns.
const (
	wheelSlots = 1024
	wheelSlot  = 10 * time.Millisecond
)

// wheel is a timer wheel: revisions by when the loop looks at them again. To set, move and take out are constant, however many there
// are, and nothing is looked at before its slot. The time of a revision is rounded up to a slot: never early. Not safe for concurrent
// use.
type wheel struct {
	origin  time.Time
	slots   [wheelSlots][]*revision
	used    [wheelSlots / 64]uint64 // bit s: slot s is not empty
	passed  int64                   // all slots up to this one have been looked at
	count   int
	touched int64 // see touch
}

// timer is a revision's place in the wheel.
type timer struct {
	at   int64 // slot number since the origin; 0 = not in the wheel
	spot int   // in the slot's list
}

func newWheel(origin time.Time) *wheel { return &wheel{origin: origin} }

// set has r looked at again at t or up to a slot later; the zero time takes it out. r must be awake, or not in the wheel.
func (w *wheel) set(r *revision, t time.Time) {
	if r.active == nil {
		return
	}
	at := int64(0)
	if !t.IsZero() {
		at = max(w.passed+1, int64((t.Sub(w.origin)+wheelSlot-1)/wheelSlot))
	}
	if at == r.timer.at {
		return
	}
	w.remove(r)
	if at == 0 {
		return
	}
	s := at % wheelSlots
	r.timer = timer{at: at, spot: len(w.slots[s])}
	w.slots[s] = append(w.slots[s], r)
	w.used[s/64] |= 1 << (s % 64)
	w.count++
}

func (w *wheel) remove(r *revision) {
	if r.timer.at == 0 {
		return
	}
	s := r.timer.at % wheelSlots
	list := w.slots[s]
	last := len(list) - 1
	list[r.timer.spot] = list[last]
	list[r.timer.spot].timer.spot = r.timer.spot
	list[last] = nil
	w.slots[s] = list[:last]
	if last == 0 {
		w.used[s/64] &^= 1 << (s % 64)
	}
	r.timer = timer{}
	w.count--
}

// due takes out and hands over every revision whose time has come, slot after slot. f may set timers again.
func (w *wheel) due(now time.Time, f func(*revision)) {
	until := int64(now.Sub(w.origin) / wheelSlot)
	if until-w.passed > wheelSlots { // the process stood still: one whole turn sees everything
		w.passed = until - wheelSlots
	}
	for w.passed < until {
		w.passed++
		s := w.passed % wheelSlots
		if w.used[s/64]&(1<<(s%64)) == 0 {
			continue
		}
		w.touched += touch(w.slots[s])
		for i := 0; i < len(w.slots[s]); {
			r := w.slots[s][i]
			if r.timer.at > until { // of a later turn
				i++
				continue
			}
			w.remove(r) // puts another one at i
			f(r)
		}
	}
}

// next is when there may be something due; false when the wheel is empty. It may be a turn too early, never too late.
func (w *wheel) next() (time.Time, bool) {
	if w.count == 0 {
		return time.Time{}, false
	}
	first := (w.passed + 1) % wheelSlots
	for i := range int64(len(w.used) + 1) {
		word := (first/64 + i) % int64(len(w.used))
		set := w.used[word]
		if i == 0 {
			set &= ^uint64(0) << (first % 64)
		}
		if set != 0 {
			s := word*64 + int64(bits.TrailingZeros64(set))
			ahead := (s - first + wheelSlots) % wheelSlots
			return w.origin.Add(time.Duration(w.passed+1+ahead) * wheelSlot), true
		}
	}
	return time.Time{}, false
}
