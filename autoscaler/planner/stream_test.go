package planner

import (
	"math"
	"math/rand/v2"
	"testing"
)

// The reserve of a steady stream stays, however much the rate of the last minute and the start times scatter: each change is a start for
// nothing.
func TestReserveIsSteady(t *testing.T) {
	starts := rand.New(rand.NewPCG(7, 8))
	for _, c := range []struct {
		name  string
		start func(n int) float64
	}{
		{"starts of one second", func(int) float64 { return 1 }},
		{"starts of half a second to two", func(int) float64 { return 0.5 * math.Pow(4, starts.Float64()) }},
	} {
		p := New(DefaultConfig())
		f := p.Add(1)
		rng := rand.New(rand.NewPCG(5, 6))
		changes, last := 0, 0
		for i := range 6000 {
			n := poisson(rng, 20)
			l := Load{Seconds: []float64{4}, Arrivals: n, Done: n, Running: poisson(rng, 4), Service: 0.2}
			if i%20 == 0 {
				l.Starts = []float64{c.start(i / 20)}
			}
			p.Observe(float64(i+1), f, &l)
			p.Decide(float64(i+1), f)
			if s := p.fns[f].stream; s.spread != last {
				if i > 600 {
					changes++
				}
				last = s.spread
			}
		}
		t.Logf("%s: %d changes in an hour and a half, %d instances at the end", c.name, changes, last)
		if changes > 40 || last < 6 || last > 12 {
			t.Errorf("%s: the reserve changed %d times, and is %d at the end", c.name, changes, last)
		}
	}
}

// What is inside beyond the mean lasts a little: at the same rate it can be worth one more instance, and never fewer. Where it is not
// known the mean counts.
func TestReserveSeesWhatIsInside(t *testing.T) {
	more := 0
	for rate := 5.0; rate < 40; rate += 0.05 {
		n := [3]int{}
		for i, inside := range []int{0, 1, 16} {
			s := stream{rate: rate, recent: rate, service: 0.2, inside: inside}
			n[i] = s.reserve(DefaultValue, 1, 1)
		}
		if n[1] > n[0] || n[0] > n[2] || n[2] > n[0]+1 {
			t.Fatalf("%.2f requests a second: %d instances with 1 inside, %d with 16, %d where it is not known", rate, n[1], n[2], n[0])
		}
		if n[2] > n[1] {
			more++
		}
	}
	if more < 100 {
		t.Errorf("16 inside made a difference to 1 at %d of 700 rates", more)
	}
}

// An instance is let go for good when the load has fallen by more than the band, and not before.
func TestReserveLetsGo(t *testing.T) {
	at := func(s *stream, rate float64) int {
		s.rate, s.recent = rate, rate
		return s.reserve(DefaultValue, 1, 1)
	}
	s := &stream{service: 0.2}
	n, rate := at(s, 20), 20.0
	for ; at(s, rate) == n; rate += 0.01 {
	}
	for _, back := range []float64{0.005, 0.01, 0.015} {
		if got := at(s, rate*(1-back)); got != n+1 {
			t.Errorf("%d instances when the load is %v %% below what they are worth it from, %d before", got, back*100, n+1)
		}
	}
	if got := at(s, rate*(1-0.03)); got != n {
		t.Errorf("%d instances when the load is 3 %% lower, want %d", got, n)
	}
}
