package planner

import "math"

// level is what is known of one level of a function.
type level struct {
	hazards
	plan    warmth  // for the present pause, if planned
	seen    float64 // end of the last second that needed it; below 0 = never
	spell   float32 // seconds before seen at which the last spell of needs began
	period  float32 // of the timer, seconds; 0 = none suspected
	next    float32 // age at which on changes, if planned
	regret  [2]float32
	hits    uint8 // how often in a row the timer was right, up to timerFull
	choice  uint8 // forecaster that is followed
	planned bool
	on      bool // there is to be an instance until next, if planned
}

// onset is the end of the first second of the last spell.
func (l *level) onset() float64 { return l.seen - float64(l.spell) }

// The forecasters of a level.
const (
	byAge = iota
	byTimer
)

const (
	// regretMemory is how many pauses a forecaster's cost is averaged over.
	regretMemory = 10
	// hysteresis: another forecaster must be better by this factor to take over.
	hysteresis = 0.9

	timerSure = 3  // hits before a timer is believed
	timerFull = 10 // hits that count
	timerTail = 2  // seconds that a timer may be late
	// timerSlack is how far an interval may be off: a second of the reports' own grain on either side, and clocks that drift.
	timerSlack, timerDrift = 1.5, 0.004
)

// need notes that the second that ended at t needed the level. expected is since when the need was known from calls; 0 = it was not.
func (l *level) need(t, expected float64, pr price, prior *prior, lead float64) {
	pause := t - l.seen
	if l.seen >= 0 && pause <= 1 {
		if pause > 0 { // reports may come twice or late
			l.spell += float32(pause)
			l.seen, l.planned = t, false
		}
		return
	}
	if l.seen >= 0 {
		last := binOf(pause)
		if l.planned {
			l.judge(pause, last, pr, lead)
		}
		if l.n[0] < priorPauses {
			prior.learn(last)
		}
		if expected > l.seen && t-expected >= lead { // whoever called gave notice in time: nothing had to be kept for this
			l.learn(binOf(expected-l.seen), false, &prior.odds)
		} else {
			l.learn(last, true, &prior.odds)
		}
		l.tick(t - l.onset())
	}
	l.seen, l.spell, l.planned = t, 0, false
}

// tick follows the distance of two onsets.
func (l *level) tick(interval float64) {
	off := interval - float64(l.period)
	if l.period > 0 && math.Abs(off) < timerSlack+timerDrift*interval {
		l.hits = min(l.hits+1, timerFull)
		l.period += 0.3 * float32(off)
		return
	}
	if l.hits > 2 { // one irregular request does not end a timer
		l.hits -= 2
		return
	}
	l.hits, l.period = 0, float32(interval)
}

// judge lets both forecasters pay for the pause that has just ended, and follows the cheaper one.
func (l *level) judge(pause float64, last int, pr price, lead float64) {
	costs := [2]float32{byAge: l.plan.cost(float32(pause), last, pr)}
	if l.period > 0 {
		costs[byTimer] = l.timerCost(pause+float64(l.spell), pr, lead)
		l.regret[byTimer] += (costs[byTimer] - l.regret[byTimer]) / regretMemory
	}
	l.regret[byAge] += (costs[byAge] - l.regret[byAge]) / regretMemory
	other := 1 - l.choice
	if l.regret[other] < hysteresis*l.regret[l.choice] {
		l.choice = other
	}
	if l.hits < timerSure {
		l.choice = byAge
	}
}

// timerWindow is when, after an onset, the timer has the level warm.
func (l *level) timerWindow(lead float64) (from, to float64) {
	return float64(l.period) - lead - timerSlack, float64(l.period) + timerTail + timerDrift*float64(l.period)
}

// timerCost is what the timer cost in a spell and a pause that lasted for interval from onset to onset.
func (l *level) timerCost(interval float64, pr price, lead float64) float32 {
	from, to := l.timerWindow(lead)
	switch {
	case interval < from:
		return pr.miss
	case interval <= to:
		return pr.start + float32(interval-from)
	}
	return pr.start + float32(to-from) + pr.miss
}

// warm says whether to have the level's instance at now, and until when that stands (+Inf: for good).
func (l *level) warm(now float64, pr price, prior *odds, lead float64) (on bool, until float64) {
	age := now - l.seen
	if age < minHold {
		return true, l.seen + minHold
	}
	if !l.planned {
		l.plan, l.planned, l.next = l.hazards.plan(prior, pr), true, 0
	}
	if age >= float64(l.next) {
		next := 0.0
		if l.choice == byTimer {
			l.on, next = l.timed(age, lead)
		} else {
			l.on, next = l.aged(age, lead)
		}
		l.next = float32(next)
		for float64(l.next) < next { // never before its time, or it would be asked again in vain
			l.next = math.Nextafter32(l.next, float32(math.Inf(1)))
		}
	}
	return l.on, l.seen + float64(l.next)
}

// timed follows the timer; ages count from the end of the last spell.
func (l *level) timed(age, lead float64) (on bool, next float64) {
	from, to := l.timerWindow(lead)
	from, to = from-float64(l.spell), to-float64(l.spell)
	switch {
	case age < from:
		return false, from
	case age < to:
		return true, to
	}
	return false, math.Inf(1)
}

// aged follows the plan; what begins within lead begins now, so that the instance is ready when its bin comes.
func (l *level) aged(age, lead float64) (on bool, until float64) {
	bin := binOf(age)
	if bin == bins {
		return false, math.Inf(1)
	}
	next := l.plan.change(bin)
	if l.plan.at(bin) {
		return true, float64(edges[next])
	}
	if next == bins {
		return false, math.Inf(1)
	}
	if begin := float64(edges[next]) - lead; begin > age {
		return false, begin
	}
	return true, float64(edges[l.plan.change(next)])
}
