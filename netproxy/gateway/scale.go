package gateway

import (
	"fmt"
	"time"
)

// Load is how much of what a pair can do it does, each from 0 to 1.
type Load struct {
	Bits, Packets float64 // a second, of Capacity
	CPU           float64 // time of the busiest processor in soft interrupts, where packets are forwarded
	Table         float64 // connections, of the quota
	Ports         float64 // used for the busiest destination, of those that there are
}

// Worst is the greatest part, and which it is.
func (l Load) Worst() (float64, string) {
	worst, name := l.Bits, "bits"
	for _, o := range []struct {
		v    float64
		name string
	}{{l.Packets, "packets"}, {l.CPU, "CPU"}, {l.Table, "connections"}, {l.Ports, "ports"}} {
		if o.v > worst {
			worst, name = o.v, o.name
		}
	}
	return worst, name
}

// Policy says when the number of a subnet's pairs changes, by one at a time.
type Policy struct {
	Out, In           float64       // above and below which part of the load; zero = 0.7 and 0.3
	OutAfter, InAfter time.Duration // for how long; zero = 30 s and 10 min
	Most              int           // pairs; 0 = 8
}

// Memory is what Scale wants to know next time. Zero at first.
type Memory struct {
	Hot, Cold time.Time // since when the load is above, and below; zero: it is not
}

// Scaling is a decision.
type Scaling struct {
	Pairs int // to have
	Why   string
}

// Scale decides how many pairs a subnet should have, by the loads of those that take new connections. It is pure. What counts is the
// busiest pair; with none it says one. A pair less must not make the others hot: with two that are just below In the
// one left is at most at twice In, so In has to be less than half of Out.
func Scale(now time.Time, p Policy, pairs []Load, m Memory) (Scaling, Memory) {
	set(&p.Out, 0.7)
	set(&p.In, 0.3)
	set(&p.OutAfter, 30*time.Second)
	set(&p.InAfter, 10*time.Minute)
	set(&p.Most, 8)
	n := len(pairs)
	if n == 0 {
		return Scaling{1, "a subnet in use has a pair"}, Memory{}
	}
	var worst float64
	var what string
	for _, l := range pairs {
		if v, name := l.Worst(); what == "" || v > worst {
			worst, what = v, name
		}
	}
	m.Hot = since(now, m.Hot, worst > p.Out)
	m.Cold = since(now, m.Cold, worst < p.In)
	switch {
	case !m.Hot.IsZero() && now.Sub(m.Hot) >= p.OutAfter && n < p.Most:
		return Scaling{n + 1, fmt.Sprintf("%s at %.0f %% for %s", what, worst*100, now.Sub(m.Hot))}, Memory{}
	case !m.Cold.IsZero() && now.Sub(m.Cold) >= p.InAfter && n > 1:
		return Scaling{n - 1, fmt.Sprintf("%s at %.0f %% for %s", what, worst*100, now.Sub(m.Cold))}, Memory{}
	case !m.Hot.IsZero() && n >= p.Most:
		return Scaling{n, fmt.Sprintf("%s at %.0f %%, but there may be no more than %d pairs", what, worst*100, p.Most)}, m
	}
	return Scaling{n, fmt.Sprintf("%s at %.0f %%", what, worst*100)}, m
}

// since is when a condition began that is true now; zero if it is not.
func since(now, before time.Time, is bool) time.Time {
	switch {
	case !is:
		return time.Time{}
	case before.IsZero():
		return now
	}
	return before
}
