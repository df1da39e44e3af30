package planner

import "math"

// stream forecasts a function whose requests come often and independently of each other. What matters there is not when the
// last one came but the spread of how many are inside at once, which is Poisson around rate x service time.
type stream struct {
	rate    float64 // requests a second, over slowWindow
	recent  float64 // over fastWindow: shows a rise sooner
	scatter float64 // variance of the requests of an observation in relation to their mean, over scatterWindow; Poisson has 1
	service float64 // mean service time, seconds
	served  float64 // requests that service is the mean of
	start   float64 // mean start time, seconds
	started float64 // starts that start is the mean of
	inside  int     // requests running and queued now; 0 = not known either
	held    int     // instances that the spread was last found to be worth
	age     float64 // seconds observed, up to slowWindow
	need    int     // instances that the last second needed
	levels  int     // what the levels wanted for it
	spread  int     // what the stream wanted for it
	regret  [2]float32
	on      bool // the stream is followed
}

const (
	slowWindow, fastWindow = 60, 20 // seconds
	// scatterWindow is in seconds. Streams that scatter more than maxScatter come in bursts, whose reserve Poisson's spread underrates.
	scatterWindow, maxScatter = 300, 1.5
	// servedMemory is how many requests the service time is averaged over: many, because the rate moves and this does not.
	servedMemory = 30_000
	// startMemory is how many starts the start time is averaged over here: the mean of the last few would move the worth of a wait by a tenth
	// with each start, and the reserve with it.
	startMemory = 100
	// lasting is the share of what is inside beyond the mean that will still be inside when another instance has started.
	lasting = 0.02
	// holdBand is by what share the load must fall below the one from which an instance was worth it, until it is let go.
	holdBand = 0.02
	// streamRate is the rate, requests a second, from which a stream is thought of at all.
	streamRate = 1
	// streamMemory is how many seconds the costs of both ways are averaged over.
	streamMemory = 900
	// tolerance is how many times as much as the levels the stream may have cost to be followed. Above 1, because the levels' cost is taken
	// at whole seconds, within which they let requests wait.
	tolerance = 1.2
	// waitShare turns a wait into a part of a cold start: waiting for a slot is less than waiting for an instance of the same length.
	waitShare = 0.355
	// spreadShare is the power with which more instances shorten a wait: the next one of k to end is sooner than one of one.
	spreadShare = 1.4
)

func (s *stream) observe(l *Load) {
	n := float64(len(l.Seconds))
	if n == 0 {
		return
	}
	s.age = min(s.age+n, slowWindow)
	rate := float64(l.Arrivals) / n
	if mean := s.rate * n; mean > 0 {
		off := float64(l.Arrivals) - mean
		s.scatter += n / (scatterWindow + n) * (off*off/mean - s.scatter)
	}
	s.rate += n / (slowWindow + n) * (rate - s.rate)
	s.recent += n / (fastWindow + n) * (rate - s.recent)
	s.inside = max(0, l.Queued) + max(0, l.Running)
	for _, v := range l.Starts {
		if v >= 0 && v <= MaxValue {
			s.started = min(s.started+1, startMemory)
			s.start += (v - s.start) / s.started
		}
	}
	if l.Done > 0 && l.Service > 0 && l.Service <= MaxValue {
		s.served = min(s.served+float64(l.Done), servedMemory)
		s.service += (l.Service - s.service) * min(1, float64(l.Done)/s.served)
	}
}

// reserve is how many instances the spread is worth. start is the start time as long as the stream has seen none.
func (s *stream) reserve(value, start, limit float64) int {
	rate := max(s.rate, s.recent-2*math.Sqrt(s.recent/fastWindow)) // a rise beyond chance
	load := rate * s.service
	if s.inside > 0 {
		load = max(0, load+lasting*(float64(s.inside)-load))
	}
	load /= limit
	if s.started > 0 {
		start = s.start
	}
	worth := value * waitShare * rate * min(1, s.service/max(start, 0.01))
	n := worthwhile(load, worth)
	if n < s.held { // not started and stopped again each time that the rate, which is only known roughly, passes a bound
		n = max(n, min(s.held, worthwhile(load*(1+holdBand), worth)))
	}
	s.held = n
	return n
}

// spreads is k to the power of spreadShare, which is asked for at each decision.
var spreads = func() (s [maxLevels]float64) {
	for k := range s {
		s[k] = math.Pow(float64(k), spreadShare)
	}
	return s
}()

// worthwhile is how many instances a load is worth: one more as long as those requests that would find all of them busy would wait
// for more than it costs.
func worthwhile(load, worth float64) int {
	p := math.Exp(-load)
	n := 1
	for k := 1; k < maxLevels; k++ {
		p *= load / float64(k)
		if float64(k) > load && worth*p < spreads[k] {
			return n
		}
		n = k + 1
	}
	return n
}

// judge lets both ways pay for the second that ended: for instances that were not needed, and for those that were missing.
func (s *stream) judge(need int, miss float32) {
	wait := miss
	for i, had := range [2]int{s.levels, s.spread} {
		cost := float32(max(0, had-need)) + wait*float32(max(0, need-max(had, s.need)))
		s.regret[i] += (cost - s.regret[i]) / streamMemory
	}
	s.need = need
	most := tolerance * s.regret[0]
	if !s.on {
		most *= hysteresis
	}
	s.on = s.regret[1] < most
	if s.age < slowWindow || s.rate < streamRate || s.scatter > maxScatter { // the first: the rate is not known yet
		s.on = false
	}
}
