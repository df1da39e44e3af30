package planner

import "math/bits"

// hazards are the chances that a pause ends in each bin, given that it lasted until there. Each bin learns from the pauses
// that reached it only, so a thousand short pauses do not wash out what was learnt about long ones.
type hazards struct {
	p [bins]uint16 // in 1/one
	n [bins]uint8  // pauses seen, up to full
}

const (
	one  = 1 << 16
	full = 255
)

const (
	memory      = 128 // pauses that a hazard remembers
	priorWeight = 2   // pauses that the prior counts as
)

// odds are hazards that are shared: what to expect where nothing was seen yet.
type odds [bins]float32

// at is the hazard of a bin.
func (h *hazards) at(i int, prior *odds) float32 {
	if h.n[i] == 0 {
		return prior[i]
	}
	return float32(h.p[i]) / one
}

// learn notes a pause that reached bin last, and ended there if ended. Bin bins stands for all that is longer.
func (h *hazards) learn(last int, ended bool, prior *odds) {
	for i := 0; i <= last && i < bins; i++ {
		hit := float32(0)
		if i == last {
			if !ended {
				return // it might have ended later in this bin: nobody knows
			}
			hit = 1
		}
		p := h.at(i, prior)
		p += (hit - p) / (min(float32(h.n[i])+priorWeight, memory) + 1)
		h.p[i] = uint16(min(max(p*one+0.5, 0), one-1))
		if h.n[i] < full {
			h.n[i]++
		}
	}
}

// prior is what the functions teach each other: odds from the first pauses of each, so that none counts more than another.
type prior struct {
	odds odds
	seen [bins]float32
}

const (
	priorPauses = 20   // of each level that the prior learns from
	priorStart  = 20   // pauses that the built-in odds count as
	priorMemory = 3000 // pauses that the prior remembers
	// builtIn is the hazard of every bin before anything was learnt. Bins grow by a fifth, so this is a pause that is as likely to end
	// within any factor of four: no time scale is preferred.
	builtIn = 0.12
)

func newPrior() prior {
	var p prior
	for i := range p.odds {
		p.odds[i], p.seen[i] = builtIn, priorStart
	}
	return p
}

func (p *prior) learn(last int) {
	for i := 0; i <= last && i < bins; i++ {
		hit := float32(0)
		if i == last {
			hit = 1
		}
		p.seen[i] = min(p.seen[i]+1, priorMemory)
		p.odds[i] += (hit - p.odds[i]) / p.seen[i]
	}
}

// warmth says for each bin, as a bit, whether to have an instance in it.
type warmth uint64

func (w warmth) at(bin int) bool { return bin < bins && w>>uint(bin)&1 == 1 }

// change is the first bin after bin whose answer differs from its own; bins if there is none.
func (w warmth) change(bin int) int {
	rest := w >> uint(bin)
	if rest&1 == 1 {
		rest = ^rest
	}
	if rest == 0 {
		return bins
	}
	return min(bins, bin+bits.TrailingZeros64(uint64(rest)))
}

// price is what things cost, in idle seconds.
type price struct {
	miss  float32 // no instance is there when the pause ends
	start float32 // an instance is started ahead of that
}

// plan is the cheapest way through a pause, by backward induction: at each age, is it cheaper to have an instance from here
// on, or to have none?
func (h *hazards) plan(prior *odds, pr price) warmth {
	var stay, begin warmth
	warm, cold := float32(0), float32(0) // cost from the next bin on, with and without an instance; nothing beyond the last
	for i := bins - 1; i >= 0; i-- {
		p := h.at(i, prior)
		hold := (edges[i+1]-edges[i])*(1-p/2) + (1-p)*warm
		none := p*pr.miss + (1-p)*cold
		warm, cold = hold, none
		if hold <= none {
			stay |= 1 << i
		} else {
			warm = none
		}
		if pr.start+hold < none {
			begin |= 1 << i
			cold = pr.start + hold
		}
	}
	var w warmth
	has := warmth(1) // a pause begins with the instance that was needed
	for i := range bins {
		has = (has&(stay>>i) | ^has&(begin>>i)) & 1
		w |= has << i
	}
	return w
}

// cost is what the plan cost in a pause that ended at age, in bin last.
func (w warmth) cost(age float32, last int, pr price) float32 {
	total := float32(0)
	for i := 0; i <= last && i < bins; i++ {
		if !w.at(i) {
			continue
		}
		if i > 0 && !w.at(i-1) {
			total += pr.start
		}
		total += min(age, edges[i+1]) - edges[i]
	}
	if !w.at(last) {
		total += pr.miss
	}
	return total
}
