package gateway

import (
	"math/rand/v2"
	"testing"
	"time"
)

// scaled runs Scale each second and returns the number of pairs at the end, and the greatest change of a step.
func scaled(load func(at time.Duration, pairs int) Load, d time.Duration) (pairs, step int) {
	now := time.Unix(1000, 0)
	var m Memory
	pairs = 1
	for at := time.Duration(0); at <= d; at += time.Second {
		loads := make([]Load, pairs)
		for i := range loads {
			loads[i] = load(at, pairs)
		}
		var s Scaling
		s, m = Scale(now.Add(at), Policy{}, loads, m)
		step = max(step, s.Pairs-pairs, pairs-s.Pairs)
		pairs = s.Pairs
	}
	return pairs, step
}

func TestScale(t *testing.T) {
	for _, c := range []struct {
		name string
		load func(time.Duration, int) Load
		d    time.Duration
		want int
	}{
		{"hot for less than 30 s", func(time.Duration, int) Load { return Load{Bits: 0.8} }, 29 * time.Second, 1},
		{"hot for 30 s", func(time.Duration, int) Load { return Load{Bits: 0.8} }, 31 * time.Second, 2},
		{"interrupted", func(at time.Duration, _ int) Load {
			return Load{Bits: map[bool]float64{true: 0.5, false: 0.8}[at%(20*time.Second) == 0]}
		}, time.Hour, 1},
		{"ports alone", func(time.Duration, int) Load { return Load{Ports: 0.71} }, 31 * time.Second, 2},
		{"CPU alone", func(time.Duration, int) Load { return Load{CPU: 0.71} }, 31 * time.Second, 2},
		{"packets alone", func(time.Duration, int) Load { return Load{Packets: 0.71} }, 31 * time.Second, 2},
		{"connections alone", func(time.Duration, int) Load { return Load{Table: 0.71} }, 31 * time.Second, 2},
		{"shared by those who come", func(_ time.Duration, n int) Load { return Load{Bits: 2.5 / float64(n)} }, time.Hour, 4},
		{"no more than the most", func(time.Duration, int) Load { return Load{Bits: 1} }, time.Hour, 8},
		{"never less than one", func(time.Duration, int) Load { return Load{} }, time.Hour, 1},
		{"gone after a while", func(at time.Duration, n int) Load {
			if at < 5*time.Minute {
				return Load{Bits: 2.5 / float64(n)}
			}
			return Load{Bits: 0.1 / float64(n)}
		}, time.Hour, 1},
		{"not gone yet", func(at time.Duration, n int) Load {
			if at < 5*time.Minute {
				return Load{Bits: 2.5 / float64(n)}
			}
			return Load{}
		}, 14*time.Minute + 50*time.Second, 4},
	} {
		if got, step := scaled(c.load, c.d); got != c.want || step > 1 {
			t.Errorf("%s: %d pairs, want %d; greatest step %d", c.name, got, c.want, step)
		}
	}
}

// TestScaleSettles: whatever steady load there is, the number of pairs comes to rest, and stays.
func TestScaleSettles(t *testing.T) {
	for range 40 {
		total := rand.Float64() * 6
		load := func(_ time.Duration, n int) Load { return Load{Bits: total / float64(n)} }
		a, _ := scaled(load, 3*time.Hour)
		b, _ := scaled(load, 3*time.Hour+17*time.Minute)
		if a != b {
			t.Errorf("a load of %.2f pairs: %d pairs, and later %d", total, a, b)
		}
		if v := total / float64(a); v > 0.7 && a < 8 {
			t.Errorf("a load of %.2f pairs has %d", total, a)
		}
	}
}
