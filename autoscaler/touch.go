package autoscaler

// What the loop needs of a revision lies in some twenty places of memory, and of a million revisions none is in the processor's cache when its
// turn comes. Asked for one after another, as the work goes, each place is waited for; asked for together, ahead of the work and for
// several hundred revisions in a row, the processor waits for all of them at once. With 50,000 active ones that is a third of all time.

// touch reads a word of every place that a report or a tick will need of the revisions. The sum is of no use; it only keeps the reads.
func touch(list []*revision) (sum int64) {
	for _, r := range list {
		if r.active != nil {
			sum += int64(r.ready) + int64(r.life.Activity) + r.stable.last
		}
	}
	for _, r := range list {
		a := r.active
		if a == nil {
			continue
		}
		sum += a.panic.last + int64(len(a.sources.list)) + int64(a.memory.PanicPeak) + int64(a.decision.Desired) + int64(a.asked.length) +
			int64(a.demand.Waiting) + a.timer.at + int64(a.own.Desired) + int64(a.own.Activators) + int64(a.own.Why) + int64(a.own.Wake.Nanosecond())
	}
	for _, r := range list {
		a := r.active
		if a == nil {
			continue
		}
		if a.stable.last > 0 {
			sum += int64(a.stable.buckets[a.stable.index(a.stable.last)]) + int64(a.panic.buckets[0])
		}
		if len(a.sources.list) > 0 {
			sum += a.sources.list[0].last
		}
	}
	return sum
}
