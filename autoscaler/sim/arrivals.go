package sim

import (
	"math"
	"slices"
)

// arrival is one request before it is served.
type arrival struct {
	at  float64
	key uint64 // all that is random about it follows from this
}

// arrivals places the requests of one function, slot by slot.
type arrivals struct {
	f      *Function
	unit   float64
	counts []Count
	key    uint64
	buffer []arrival // of the slot at hand
	next   int       // in buffer
}

// batchGap is the distance of two requests of a batch, seconds.
const batchGap = 0.02

func (a *arrivals) pop() (arrival, bool) {
	for a.next == len(a.buffer) {
		if len(a.counts) == 0 {
			return arrival{}, false
		}
		a.fill(a.counts[0])
		a.counts = a.counts[1:]
	}
	r := a.buffer[a.next]
	a.next++
	return r, true
}

// fill places a slot's requests: those of timers evenly with the function's own phase, batches together, others anywhere.
// The last slot's requests of a batch may reach into the next slot; that slot's buffer is merged by sorting within it only, and
// the engine takes what comes late in order of arrival.
func (a *arrivals) fill(c Count) {
	a.buffer, a.next = a.buffer[:0], 0
	start := float64(c.Slot) * a.unit
	key := mix(a.key, uint64(c.Slot))
	group, left := 0.0, 0
	for i := range c.N {
		k := mix(key, uint64(i))
		var at float64
		switch {
		case a.f.Timer:
			at = start + (float64(i)+unit(a.key))*a.unit/float64(c.N)
		case a.f.Batch > 1:
			if left == 0 {
				group, left = start+unit(mix(k, 3))*a.unit, a.batch(k)
			}
			at = math.Min(group, start+a.unit-1e-6)
			group += batchGap
			left--
		default:
			at = start + unit(mix(k, 3))*a.unit
		}
		a.buffer = append(a.buffer, arrival{at, k})
	}
	slices.SortFunc(a.buffer, func(x, y arrival) int {
		if x.at < y.at {
			return -1
		}
		return 1
	})
}

// batch is the length of one group: geometric with the function's mean.
func (a *arrivals) batch(k uint64) int {
	p := 1 / a.f.Batch
	return 1 + int(math.Log(1-unit(mix(k, 4)))/math.Log(1-p))
}

// shares are the quantiles that Function.Service holds.
var shares = [7]float64{0, 0.01, 0.25, 0.5, 0.75, 0.99, 1}

// service draws a request's service time: piecewise linear through the percentiles.
func (f *Function) service(key uint64) float64 {
	u := unit(mix(key, 5))
	for i := 1; i < len(shares); i++ {
		if u <= shares[i] {
			w := (u - shares[i-1]) / (shares[i] - shares[i-1])
			return f.Service[i-1] + w*(f.Service[i]-f.Service[i-1])
		}
	}
	return f.Service[len(shares)-1]
}
