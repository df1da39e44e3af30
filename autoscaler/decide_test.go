package autoscaler

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func policy(t testing.TB, annotations map[string]string, hardLimit int) Policy {
	t.Helper()
	p, err := PolicyFor(DefaultConfig(), annotations, hardLimit)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestDecideWhy(t *testing.T) {
	annotations := map[string]string{"autoscaling.knative.dev/activation-scale": "3"}
	p := policy(t, annotations, 10)
	for _, c := range []struct {
		name    string
		load    Load
		memory  Memory
		desired int
		why     Why
	}{
		{"no report", Load{Ready: 3}, Memory{}, 0, WhyNoData},
		{"not a number", Load{Ready: 3, Stable: math.NaN(), Measured: true}, Memory{}, 0, WhyNoData},
		{"negative", Load{Ready: 3, Panic: -1, Measured: true}, Memory{}, 0, WhyNoData},
		{"steady", Load{Ready: 5, Stable: 30, Panic: 30, Measured: true}, Memory{}, 5, WhyStable},
		{"falling fast", Load{Ready: 10, Stable: 1, Panic: 1, Measured: true}, Memory{}, 5, WhyStable | WhyDownRate},
		{"one request", Load{Ready: 1, Stable: 1, Panic: 1, Measured: true}, Memory{}, 3, WhyStable | WhyActivationScale},
		{"surge", Load{Ready: 5, Stable: 30, Panic: 100, Measured: true}, Memory{}, 15, WhyPanic},
		{"surge over", Load{Ready: 5, Stable: 30, Panic: 30, Measured: true}, Memory{PanicAt: t0, PanicPeak: 15}, 15, WhyPanicHold},
		{"nonsense load", Load{Ready: 1, Stable: 1e300, Panic: 1e300, Measured: true}, Memory{}, 1000, WhyStable | WhyUpRate},
	} {
		d, _ := Decide(t0.Add(time.Second), p, c.load, c.memory)
		if d.Desired != c.desired || d.Why != c.why {
			t.Errorf("%s: %d because of %q, want %d because of %q", c.name, d.Desired, d.Why, c.desired, c.why)
		}
	}
}

// TestDecideIsPure calls twice with the same arguments; a second delay buffer with the same content stands for the first.
func TestDecideIsPure(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, _ := PolicyFor(DefaultConfig(), map[string]string{"autoscaling.knative.dev/scale-down-delay": "10s"}, 10)
		a, b := NewMemory(t0, t0, p, 0), NewMemory(t0, t0, p, 0)
		now := t0
		for range 50 {
			now = now.Add(time.Duration(rapid.IntRange(0, 4000).Draw(t, "ms")) * time.Millisecond)
			l := Load{
				Ready:    rapid.IntRange(0, 50).Draw(t, "ready"),
				Stable:   rapid.Float64Range(0, 500).Draw(t, "stable"),
				Panic:    rapid.Float64Range(0, 500).Draw(t, "panic"),
				Measured: rapid.Bool().Draw(t, "measured"),
			}
			var d, e Decision
			d, a = Decide(now, p, l, a)
			e, b = Decide(now, p, l, b)
			if d != e {
				t.Fatalf("%+v and %+v", d, e)
			}
			if d.Valid && d.Desired < 0 {
				t.Fatalf("negative: %+v", d)
			}
		}
	})
}

func TestDecideDoesNotAllocate(t *testing.T) {
	p := policy(t, map[string]string{"autoscaling.knative.dev/scale-down-delay": "1m"}, 10)
	m := NewMemory(t0, t0, p, 0)
	stable, panicked := NewWindow(t0, p.StableWindow, p.Aggregation), NewWindow(t0, p.PanicWindow, p.Aggregation)
	i := 0
	step := func() {
		now := t0.Add(time.Duration(i) * time.Second)
		i++
		stable.Record(now, float64(i*7%100))
		panicked.Record(now, float64(i*7%100))
		_, m = Decide(now, p, Load{Ready: i % 9, Stable: stable.Average(now), Panic: panicked.Average(now), Measured: !stable.Empty(now)}, m)
	}
	for range 200 {
		step()
	}
	if n := testing.AllocsPerRun(1000, step); n != 0 {
		t.Errorf("%v allocations for each decision", n)
	}
}

func TestNeed(t *testing.T) {
	for _, c := range []struct {
		hardLimit, waiting, running, want int
		annotations                       map[string]string
		ready                             int
		rate                              float64
	}{
		{hardLimit: 10, waiting: 1000, want: 2, rate: 2},
		{hardLimit: 10, waiting: 1000, want: 6, rate: 2, ready: 3},
		{hardLimit: 10, waiting: 1000, want: 143},
		{hardLimit: 10, waiting: 1, want: 1},
		{hardLimit: 10, waiting: 5, running: 10, want: 3},
		{hardLimit: 0, waiting: 1000, want: 15},
		{hardLimit: 1, waiting: 1, want: 1}, // target 0.7, but one request cannot use two instances
		{hardLimit: 1, waiting: 10, want: 10},
		{hardLimit: 10, waiting: 0, running: 0, want: 0},
		{hardLimit: 10, waiting: -5, running: -1, want: 0},
		{hardLimit: 10, waiting: 1, want: 4, annotations: map[string]string{"autoscaling.knative.dev/activation-scale": "4"}},
		{hardLimit: 10, waiting: 100, want: 15, annotations: map[string]string{"autoscaling.knative.dev/metric": "rps"}},
		{hardLimit: 10, waiting: 100, want: 20, annotations: map[string]string{"autoscaling.knative.dev/target": "5", "autoscaling.knative.dev/target-utilization-percentage": "100"}},
	} {
		p := policy(t, c.annotations, c.hardLimit)
		if c.rate > 0 {
			p.MaxScaleUpRate = c.rate
		}
		if got := Need(p, c.waiting, c.running, c.ready); got != c.want {
			t.Errorf("limit %d, %d waiting, %d running, %v: %d, want %d", c.hardLimit, c.waiting, c.running, c.annotations, got, c.want)
		}
	}
}

func TestActivators(t *testing.T) {
	for _, c := range []struct {
		burst string
		ready int
		want  int
	}{
		{"0", 1000, 2}, {"211", 0, 3}, {"211", 1, 3}, {"-1", 1, 2}, {"-1", 100, 10}, {"70", 100, 11},
	} {
		p := policy(t, map[string]string{"autoscaling.knative.dev/target-burst-capacity": c.burst}, 10)
		if got := Activators(p, c.ready); got != c.want {
			t.Errorf("burst %s, %d ready: %d activators, want %d", c.burst, c.ready, got, c.want)
		}
	}
}

func TestWhyString(t *testing.T) {
	if got := (WhyPanic | WhyMaxScale).String(); got != "panic,max-scale" {
		t.Errorf("%q", got)
	}
	if got := Why(0).String(); got != "" {
		t.Errorf("%q", got)
	}
	for i := range whyWords {
		if Why(1<<i).String() != whyWords[i] {
			t.Errorf("bit %d is %q", i, Why(1<<i))
		}
	}
	if WhyUnknown != 1<<(len(whyWords)-1) {
		t.Error("there are more reasons than words")
	}
}

func BenchmarkDecide(b *testing.B) {
	p := policy(b, nil, 10)
	m := NewMemory(t0, t0, p, 0)
	now := t0
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(2 * time.Second)
		_, m = Decide(now, p, Load{Ready: 5, Stable: 33, Panic: 42, Measured: true}, m)
	}
}

// BenchmarkTick is a whole tick of a revision's load: two reports, both averages and the decision.
func BenchmarkTick(b *testing.B) {
	p := policy(b, nil, 10)
	m := NewMemory(t0, t0, p, 0)
	stable, panicked := NewWindow(t0, p.StableWindow, p.Aggregation), NewWindow(t0, p.PanicWindow, p.Aggregation)
	now := t0
	b.ReportAllocs()
	for b.Loop() {
		for range 2 {
			now = now.Add(time.Second)
			stable.Record(now, 35)
			panicked.Record(now, 35)
		}
		_, m = Decide(now, p, Load{Ready: 5, Stable: stable.Average(now), Panic: panicked.Average(now), Measured: !stable.Empty(now)}, m)
	}
}
