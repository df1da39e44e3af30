package planner

import "math"

// bins is how many intervals of age there are. Their edges grow by a constant factor, because what matters about an age is its
// order of magnitude: whether an idle function comes back after 5 or 6 seconds, or after 50 or 60 minutes.
const bins = 48

// minHold is the age up to which every level stays: shorter pauses are the rule within a burst, and a start costs more.
const minHold = 2 // seconds

// edges[i] is where bin i begins, seconds; the last bin ends at edges[bins]. What lives longer is taken as gone for good.
var edges = func() (e [bins + 1]float32) {
	const first, last = minHold, 4 * 3600
	for i := range e {
		e[i] = float32(first * math.Pow(last/first, float64(i)/bins))
	}
	return e
}()

// binOf is the bin of an age; bins when it is beyond the last one, -1 below the first.
func binOf(age float64) int {
	low, high := -1, bins // edges[low] <= age < edges[high], with -1 and bins outside
	for high-low > 1 {
		if mid := (low + high) / 2; float64(edges[mid]) <= age {
			low = mid
		} else {
			high = mid
		}
	}
	if low == bins-1 && age >= float64(edges[bins]) {
		return bins
	}
	return low
}
