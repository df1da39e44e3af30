package autoscaler

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// plainWindow is a Window that keeps everything ever recorded and counts it anew each time.
type plainWindow struct {
	n       int64
	seconds map[int64]float64
	first   int64
	last    int64
	any     bool
}

func (w *plainWindow) record(s int64, v float64) {
	switch {
	case !w.any || s-w.last >= w.n:
		w.seconds, w.first, w.last, w.any = map[int64]float64{}, s, s, true
	case s <= w.last-w.n:
		return
	}
	w.first, w.last = min(w.first, s), max(w.last, s)
	w.seconds[s] += v
}

func (w *plainWindow) average(now int64, a Aggregation) float64 {
	if !w.any || now-w.last >= w.n {
		return 0
	}
	now = max(now, w.last)
	if a == WeightedExponential {
		c := math.Max(0.2, 1-math.Pow(0.0001, 1/float64(w.n)))
		sum := 0.0
		for s := now - w.n + 1; s <= w.last; s++ {
			sum += w.seconds[s] * c * math.Pow(1-c, float64(now-s))
		}
		return sum
	}
	sum := 0.0
	for s := now - w.n + 1; s <= w.last; s++ {
		sum += w.seconds[s]
	}
	return sum / math.Min(float64(w.last-w.first+1), float64(w.n-(now-w.last)))
}

func TestWindowAgainstPlain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(1, 80).Draw(t, "seconds")
		a := Linear
		if rapid.Bool().Draw(t, "weighted") {
			a = WeightedExponential
		}
		w := NewWindow(t0, time.Duration(n)*time.Second, a)
		p := &plainWindow{n: n}
		now := rapid.Int64Range(-100, 100).Draw(t, "start")
		for range rapid.IntRange(1, 120).Draw(t, "steps") {
			now += rapid.SampledFrom([]int64{0, 0, 1, 1, 1, 2, 5, n - 1, n, n + 1}).Draw(t, "pass")
			if rapid.IntRange(0, 4).Draw(t, "write") > 0 {
				s := now - rapid.SampledFrom([]int64{0, 0, 0, 1, 3, n - 1, n, n + 2}).Draw(t, "late")
				v := float64(rapid.IntRange(0, 1_000_000).Draw(t, "milli")) / 1000
				w.Record(at(float64(s)+0.25), v)
				p.record(s, v)
			}
			got, want := w.Average(at(float64(now)+0.9)), p.average(now, a)
			if math.Abs(got-want) > 1.1e-6*math.Max(1, want*1e-3) {
				t.Fatalf("second %d: average %v, want %v", now, got, want)
			}
			if got, want := w.Empty(at(float64(now))), !p.any || now-p.last > n; got != want {
				t.Fatalf("second %d: empty %v, want %v", now, got, want)
			}
		}
	})
}

func TestWindowCoefficient(t *testing.T) {
	for n, want := range map[int]float64{60: 0.2, 42: 0.2, 6: 0.7845} {
		if got := coefficient(n); math.Abs(got-want) > 1e-4 {
			t.Errorf("coefficient of %d s is %v, want %v", n, got, want)
		}
	}
}

func TestWindowRefusesNonsense(t *testing.T) {
	w := NewWindow(t0, time.Minute, Linear)
	for _, v := range []float64{math.NaN(), math.Inf(1), math.Inf(-1)} {
		if w.Record(t0, v) {
			t.Errorf("%v was taken", v)
		}
	}
	if !w.Empty(t0) {
		t.Error("the window holds something")
	}
}

func TestWindowSumDoesNotDrift(t *testing.T) {
	w := NewWindow(t0, time.Minute, Linear)
	for s := range 3 * 3600 {
		w.Record(at(float64(s)), 1e9/3)
		w.Record(at(float64(s)), 0.1)
	}
	for s := range 60 {
		w.Record(at(float64(3*3600+s)), 0)
	}
	if got := w.Average(at(3*3600 + 59)); got != 0 {
		t.Errorf("a minute of zeros averages %v", got)
	}
}

func TestWindowResized(t *testing.T) {
	w := NewWindow(t0, 10*time.Second, Linear)
	for s := range 15 {
		w.Record(at(float64(s)), float64(s))
	}
	if got := w.resized(4*time.Second, Linear).Average(at(14)); got != 12.5 { // 11 12 13 14
		t.Errorf("4 s average %v, want 12.5", got)
	}
	if got := w.resized(20*time.Second, Linear).Average(at(14)); got != 9.5 { // 5 to 14
		t.Errorf("20 s average %v, want 9.5", got)
	}
}

func TestDelayAgainstPlain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		length := time.Duration(rapid.IntRange(1, 60).Draw(t, "seconds")) * time.Second
		d := NewDelay(t0, length)
		slots := int64((length + delaySlot - 1) / delaySlot)
		type entry struct {
			slot  int64
			value int
		}
		var all []entry
		now := 0.0
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			now += rapid.SampledFrom([]float64{0, 0.5, 1, 2, 3, 10}).Draw(t, "pass")
			slot := int64(now / 2)
			if rapid.Bool().Draw(t, "write") {
				v := rapid.IntRange(0, 20).Draw(t, "value")
				d.Record(at(now), v)
				all = append(all, entry{slot, v})
			}
			want := 0
			for _, e := range all {
				if slot-e.slot < slots {
					want = max(want, e.value)
				}
			}
			if got := d.Max(at(now)); got != want {
				t.Fatalf("at %vs: %d, want %d", now, got, want)
			}
		}
	})
}
