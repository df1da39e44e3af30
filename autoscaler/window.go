package autoscaler

import (
	"math"
	"time"
)

// Aggregation is how a window turns seconds into one number.
type Aggregation uint8

// The aggregations of annotation metric-aggregation-algorithm.
const (
	Linear              Aggregation = iota // every second counts the same
	WeightedExponential                    // the newest second counts most
)

func (a Aggregation) String() string {
	if a == WeightedExponential {
		return "weighted-exponential"
	}
	return "linear"
}

// none is the first and last second of a window that holds nothing.
const none = math.MinInt64

// Window averages values over the last n seconds. Values recorded in the same second add up, so that the reports of several
// sources make one load. Silence is not zero: the seconds after the newest value are left out of sum and divisor, until a
// whole window of them has passed; then the window starts afresh with its next value, averaging only what it has seen since.
// Gaps between two values count as zero.
//
// Seconds are counted from an origin, not read from the wall clock: with a monotonic origin a jump of the clock changes
// nothing. A Window is not safe for concurrent use.
type Window struct {
	origin      time.Time
	aggregation Aggregation
	buckets     []float64 // second s is at s mod len; seconds in (last-len, last] are held
	first       int64     // oldest second with a value since the last silent window; none = nothing held
	last        int64     // newest second with a value
	sum         float64   // of all buckets
	summed      int64     // second at which sum was last made from the buckets
	coefficient float64   // weight of the newest second (WeightedExponential)
}

// NewWindow makes a window of the given length, in whole seconds and at least one, whose seconds begin at origin.
func NewWindow(origin time.Time, length time.Duration, a Aggregation) *Window {
	w := windowOver(origin, make([]float64, wholeWindow(length)), a)
	return &w
}

// newWindows makes the two windows of a policy, side by side in memory: both are read and written at each report.
func newWindows(origin time.Time, p Policy) (stable, panic Window) {
	n := wholeWindow(p.StableWindow)
	buckets := make([]float64, n+wholeWindow(p.PanicWindow))
	return windowOver(origin, buckets[:n:n], p.Aggregation), windowOver(origin, buckets[n:], p.Aggregation)
}

func windowOver(origin time.Time, buckets []float64, a Aggregation) Window {
	return Window{origin: origin, aggregation: a, buckets: buckets, first: none, last: none, coefficient: coefficient(len(buckets))}
}

func wholeWindow(length time.Duration) int { return max(1, int(length/time.Second)) }

// coefficient is Knative's smoothing factor: chosen so that the n seconds together carry 99.99 % of the weight, but never
// below 0.2, so that long windows still follow the load (from 42 s on, about the last 20 s count).
func coefficient(n int) float64 {
	return math.Max(0.2, 1-math.Pow(0.0001, 1/float64(n)))
}

// Record adds v to the second of at and says whether it was taken: values that are not finite, or a window older than the
// newest value, are refused.
func (w *Window) Record(at time.Time, v float64) bool {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return false
	}
	s, n := w.second(at), int64(len(w.buckets))
	switch {
	case w.last == none || s-w.last >= n:
		w.restart(s)
	case s > w.last:
		w.advance(s)
	case s <= w.last-n:
		return false
	case s < w.first:
		w.first = s
	}
	w.buckets[w.index(s)] += v
	w.sum += v
	return true
}

// restart forgets everything and begins at second s.
func (w *Window) restart(s int64) {
	clear(w.buckets)
	w.sum, w.summed, w.first, w.last = 0, s, s, s
}

// advance makes s the newest second; the seconds on the way there had no value. The sum is kept by adding and subtracting, in
// Knative's order, because averages that lie exactly between two millionths round by what floats left behind; once an hour it is
// made anew, so that this never grows to a millionth itself.
func (w *Window) advance(s int64) {
	for t := w.last + 1; t <= s; t++ {
		i := w.index(t)
		w.sum -= w.buckets[i]
		w.buckets[i] = 0
	}
	w.last = s
	if s-w.summed < 3600 {
		return
	}
	w.sum, w.summed = 0, s
	for _, v := range w.buckets {
		w.sum += v
	}
}

// recent appends the values of the whole seconds after since up to now, oldest first and at most as many as the window holds. It returns
// the last of these seconds.
func (w *Window) recent(now time.Time, since int64, to []float64) ([]float64, int64) {
	last := w.second(now) - 1
	for s := max(since+1, last-int64(len(w.buckets))+1); s <= last; s++ {
		v := 0.0
		if s <= w.last && s > w.last-int64(len(w.buckets)) {
			v = w.buckets[w.index(s)]
		}
		to = append(to, v)
	}
	return to, max(last, since)
}

// settled is the time up to which reports can have come: a decision that falls between the end of a second and the report about it would
// else take that second for a silent one. With weights that is four fifths of the load, in each decision, if ticks and reports are so
// out of step; linear averages leave silent seconds out by themselves.
func (w *Window) settled(now time.Time) time.Time {
	if w.aggregation == WeightedExponential && w.last != none && w.second(now) == w.last+1 {
		return w.origin.Add(time.Duration(w.last)*time.Second + time.Second - 1)
	}
	return now
}

// Empty says that nothing was recorded for longer than the window before now: the average means "not known", not zero.
func (w *Window) Empty(now time.Time) bool {
	return w.last == none || w.second(now)-w.last > int64(len(w.buckets))
}

// Average is the load over the window that ends with now: rounded to six decimals when linear. It is zero from one window of
// silence on; ask Empty whether that zero means anything.
func (w *Window) Average(now time.Time) float64 {
	if w.last == none {
		return 0
	}
	silent := max(0, w.second(now)-w.last)
	if silent >= int64(len(w.buckets)) {
		return 0
	}
	if w.aggregation == WeightedExponential {
		return w.weighted(silent)
	}
	return w.linear(silent)
}

// linear divides what is left of the window's sum by the seconds that are left, or by the seconds seen if they are fewer.
func (w *Window) linear(silent int64) float64 {
	n := int64(len(w.buckets))
	sum := w.sum
	for t := w.last - n + 1; t <= w.last-n+silent; t++ { // these fell out while nothing was recorded
		sum -= w.buckets[w.index(t)]
	}
	divisor := min(w.last-w.first+1, n-silent)
	return round6(sum / float64(divisor))
}

// weighted sums c(1-c)^k times the k-th newest second. Without normalization: a window that has not seen its whole length
// yet reads low, as Knative's does.
func (w *Window) weighted(silent int64) float64 {
	weight := w.coefficient * math.Pow(1-w.coefficient, float64(silent))
	sum := 0.0
	for k := range int64(len(w.buckets)) - silent {
		if weight < 1e-18 { // nothing that a float64 sum would notice
			break
		}
		sum += weight * w.buckets[w.index(w.last-k)]
		weight *= 1 - w.coefficient
	}
	return sum
}

// resized is a window of another length or aggregation with the same values, as far as they fit.
func (w *Window) resized(length time.Duration, a Aggregation) *Window {
	next := NewWindow(w.origin, length, a)
	if w.last == none {
		return next
	}
	for s := max(w.first, w.last-int64(len(w.buckets))+1); s <= w.last; s++ {
		next.Record(w.origin.Add(time.Duration(s)*time.Second), w.buckets[w.index(s)])
	}
	return next
}

func (w *Window) second(t time.Time) int64 { return floorDiv(t.Sub(w.origin), time.Second) }

func (w *Window) index(s int64) int {
	n := int64(len(w.buckets))
	return int(((s % n) + n) % n) // seconds before the origin are negative
}

func floorDiv(d, unit time.Duration) int64 {
	q := d / unit
	if d%unit < 0 {
		q--
	}
	return int64(q)
}

// round6 rounds to six decimals, so that what floats leave behind does not become an instance when divided and rounded up.
func round6(v float64) float64 { return math.Round(v*1e6) / 1e6 }
