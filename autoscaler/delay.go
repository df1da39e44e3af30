package autoscaler

import "time"

// delaySlot is the width of a slot of a Delay, and the distance of two ticks.
const delaySlot = 2 * time.Second

// Delay is the largest number recorded over a sliding time, in slots of two seconds: scale-down-delay's memory, and that of
// what events asked for. It is a queue of falling numbers in a ring, so that recording is constant on average and nothing is
// allocated after NewDelay. The caller of Decide owns it. Not safe for concurrent use.
type Delay struct {
	origin time.Time
	ring   []delayEntry
	head   int // oldest and largest entry
	length int
}

type delayEntry struct {
	slot  int64
	value int
}

// NewDelay makes a sliding maximum over d, rounded up to whole slots; nil when d is zero, which Decide takes as no delay.
func NewDelay(origin time.Time, d time.Duration) *Delay {
	if d <= 0 {
		return nil
	}
	n := int((d + delaySlot - 1) / delaySlot)
	return &Delay{origin: origin, ring: make([]delayEntry, n)}
}

// Record adds v at now. Time does not run backwards: an earlier now counts as the newest slot.
func (d *Delay) Record(now time.Time, v int) {
	slot := floorDiv(now.Sub(d.origin), delaySlot)
	if d.length > 0 {
		slot = max(slot, d.at(d.length-1).slot)
	}
	d.expire(slot)
	for d.length > 0 && d.at(d.length-1).value <= v { // never the maximum again
		d.length--
	}
	if d.length > 0 && d.at(d.length-1).slot == slot { // a larger number of the same slot outlives this one
		return
	}
	d.length++
	*d.at(d.length - 1) = delayEntry{slot, v}
}

// Max is the largest number recorded within the time before now, 0 when there is none.
func (d *Delay) Max(now time.Time) int {
	d.expire(floorDiv(now.Sub(d.origin), delaySlot))
	if d.length == 0 {
		return 0
	}
	return d.at(0).value
}

// expire drops the entries that are as old as the ring is long.
func (d *Delay) expire(slot int64) {
	for d.length > 0 && slot-d.at(0).slot >= int64(len(d.ring)) {
		d.head = (d.head + 1) % len(d.ring)
		d.length--
	}
}

func (d *Delay) at(i int) *delayEntry { return &d.ring[(d.head+i)%len(d.ring)] }
