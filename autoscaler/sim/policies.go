package sim

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/autoscaler/planner"
)

// ParsePolicy makes a policy from the words that people write:
//
//	kpa                     Knative's autoscaler with default settings
//	predictive[:VALUE]      the planner; VALUE is the idle seconds that one avoided cold start is worth
//	keep-alive:DURATION     as many instances as were needed at once within the last DURATION
//	histogram               keep-alive and prewarming by each function's own idle times, 5th and 99th percentile
func ParsePolicy(s string) (Policy, error) {
	name, value, has := strings.Cut(s, ":")
	switch {
	case name == "kpa" && !has:
		return NewKPA(), nil
	case name == "histogram" && !has:
		return newHistogram(), nil
	case name == "keep-alive" && has:
		d, err := time.ParseDuration(value)
		if err != nil || d < time.Second || d > maxSeconds*time.Second {
			return nil, fmt.Errorf("policy %q: the time must be a duration in [1s, 24h], as in keep-alive:600s", clip(s))
		}
		return newKeepAlive(d.Seconds()), nil
	case name == "predictive":
		c := planner.DefaultConfig()
		if has {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return nil, fmt.Errorf("policy %q: the value must be a number of idle seconds, as in predictive:%v", clip(s), c.Value)
			}
			c.Value = v
		}
		if err := c.Validate(); err != nil {
			return nil, fmt.Errorf("policy %q: %w", clip(s), err)
		}
		return NewPredictive(c), nil
	}
	return nil, fmt.Errorf("policy %q is not known: use kpa, predictive[:VALUE], keep-alive:DURATION or histogram", clip(s))
}

// simple is what the two policies for comparison share: they look at each function's need and idle time once a second.
type simple struct {
	name   string
	fns    []simpleFn
	wakes  wakes
	orders []Order2
	decide func(f *simpleFn, now float64) (n int, wake float64)
}

type simpleFn struct {
	limit  int
	target int
	last   float64 // second of the last need; -1 = none yet
	peaks  []peak  // falling numbers of instances needed, each until something larger or its end (keepAlive)
	idle   [histogramBins + 1]int
	seen   int
}

type peak struct {
	until float64
	n     int
}

func (s *simple) Hello(h *Hello) Ready {
	s.fns = make([]simpleFn, len(h.Functions))
	s.wakes = newWakes(len(h.Functions))
	for i, f := range h.Functions {
		s.fns[i].limit, s.fns[i].last = f.Concurrency, -1
	}
	return Ready{Type: "ready", Name: s.name, Interval: 1, OnDemand: OnDemandZero}
}

func (s *simple) Tick(t *Tick) []Order2 {
	s.orders = s.orders[:0]
	for i := range t.Functions {
		l := &t.Functions[i]
		f := &s.fns[l.I]
		f.target = l.Target
		if n := (max(l.Peak, l.Queued+l.Running) + f.limit - 1) / f.limit; n > 0 {
			f.need(t.T, n)
		}
		s.wakes.set(l.I, t.T)
	}
	for i, ok := s.wakes.pop(t.T); ok; i, ok = s.wakes.pop(t.T) {
		f := &s.fns[i]
		n, wake := s.decide(f, t.T)
		if n != f.target {
			f.target = n
			s.orders = append(s.orders, Order2{i, n})
		}
		s.wakes.set(i, math.Max(wake, t.T+0.001))
	}
	return s.orders
}

// need notes that n instances are needed at now.
func (f *simpleFn) need(now float64, n int) {
	if gap := now - f.last; f.last >= 0 && gap > 1 {
		f.idle[min(int(gap/60), histogramBins)]++
		f.seen++
	}
	f.last = now
	for len(f.peaks) > 0 && f.peaks[len(f.peaks)-1].n <= n {
		f.peaks = f.peaks[:len(f.peaks)-1]
	}
	f.peaks = append(f.peaks, peak{now, n})
}

// after is how many instances were needed at once within the last seconds, and until when that holds.
func (f *simpleFn) after(now, seconds float64) (int, float64) {
	for len(f.peaks) > 0 && now >= f.peaks[0].until+seconds {
		f.peaks = append(f.peaks[:0], f.peaks[1:]...)
	}
	if len(f.peaks) == 0 {
		return 0, math.Inf(1)
	}
	return f.peaks[0].n, f.peaks[0].until + seconds
}

func newKeepAlive(seconds float64) Policy {
	return &simple{name: "keep-alive", decide: func(f *simpleFn, now float64) (int, float64) { return f.after(now, seconds) }}
}

// histogramBins is how many minutes of idle time are told apart; longer ones are all the same.
const histogramBins = 240

// newHistogram is the policy of Shahrad et al. (USENIX ATC 2020) in outline: after a request an instance goes, comes back before the 5th
// percentile of idle times, and stays until the 99th; without enough idle times to go by it stays for ten minutes.
func newHistogram() Policy {
	const enough, otherwise = 10, 600
	return &simple{name: "histogram", decide: func(f *simpleFn, now float64) (int, float64) {
		if f.last < 0 {
			return 0, math.Inf(1)
		}
		if f.seen < enough || f.idle[histogramBins]*2 > f.seen {
			return f.after(now, otherwise)
		}
		from, to := float64(f.percentile(0.05))*60, float64(f.percentile(0.99)+1)*60
		idle := now - f.last
		switch {
		case from < 60 || idle >= to: // no time to go and come back
			return f.after(now, to)
		case idle < 2:
			n, _ := f.after(now, to)
			return n, f.last + 2
		case idle < from-5:
			return 0, f.last + from - 5
		}
		n, _ := f.after(now, to)
		return max(1, n), f.last + to
	}}
}

// percentile is the bin that holds the share q of the idle times.
func (f *simpleFn) percentile(q float64) int {
	sum := 0
	for i, n := range f.idle {
		if sum += n; float64(sum) >= q*float64(f.seen) {
			return i
		}
	}
	return histogramBins
}
