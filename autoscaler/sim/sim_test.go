package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/thawrun/thaw/autoscaler/planner"
)

// synthetic is a small trace with what the real ones have: timers, rare and busy functions, batches, calls, and a roll-out.
func synthetic(hours int) *Trace {
	t := &Trace{Name: "synthetic", Unit: 60, Horizon: float64(hours) * 3600, EvalFrom: float64(hours) * 1200, StartSigma: 0.4}
	add := func(name string, f Function, count func(minute int, key uint64) int) int {
		f.Name, f.App = name, name
		f.Concurrency, f.Batch = max(1, f.Concurrency), max(1, f.Batch)
		if f.Start == 0 {
			f.Start = 1
		}
		if f.Service[6] == 0 {
			f.Service = [7]float64{0.05, 0.05, 0.1, 0.2, 0.4, 1, 2}
		}
		var list []Count
		if count != nil {
			for m := range hours * 60 {
				if n := count(m, mix(keyOf(name), uint64(m))); n > 0 {
					list = append(list, Count{m, n})
				}
			}
		}
		t.Functions, t.Counts = append(t.Functions, f), append(t.Counts, list)
		return len(t.Functions) - 1
	}
	add("timer", Function{Timer: true}, func(m int, _ uint64) int { return b2i(m%5 == 0) })
	add("hourly", Function{Timer: true, Service: [7]float64{20, 20, 20, 20, 20, 20, 20}}, func(m int, _ uint64) int { return b2i(m%60 == 7) })
	for _, name := range []string{"rare1", "rare2", "rare3", "rare4", "rare5", "rare6"} {
		share := 0.01 + 0.1*unit(keyOf(name))
		add(name, Function{}, func(_ int, k uint64) int { return b2i(unit(k) < share) })
	}
	for _, every := range []int{3, 10, 15, 20} {
		add(fmt.Sprintf("timer%d", every), Function{Timer: true}, func(m int, _ uint64) int { return b2i(m%every == 1) })
	}
	add("bursts", Function{Batch: 4}, func(_ int, k uint64) int { return 12 * b2i(unit(k) < 0.1) })
	add("busy", Function{}, func(m int, k uint64) int { return 60 + int(30*math.Sin(float64(m)/60)) + int(20*unit(k)) })
	add("many", Function{Concurrency: 10}, func(_ int, k uint64) int { return int(300 * unit(k)) })
	root := add("root", Function{}, func(_ int, k uint64) int { return b2i(unit(k) < 0.05) })
	callee := add("callee", Function{}, nil)
	t.Calls = []Edge{{root, callee, 0.9, 1}}
	old := add("old", Function{}, func(_ int, k uint64) int { return int(30 * unit(k)) })
	next := add("new", Function{}, nil)
	half := t.Horizon / 2
	t.Shifts = []Shift{{half, old, next, 0.1}, {half + 600, old, next, 1}}
	return t
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func play(t *testing.T, tr *Trace, policy string, o Options) *Result {
	t.Helper()
	p, err := ParsePolicy(policy)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Run(context.Background(), tr, p, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// The planner must be better than Knative's rules in cold starts without costing much more, and cheaper without being worse, here as on
// the traces that make bench-traces plays.
func TestSynthetic(t *testing.T) {
	tr := synthetic(6)
	kpa, def, thrifty := play(t, tr, "kpa", Options{}), play(t, tr, "predictive", Options{}), play(t, tr, "predictive:120", Options{})
	alive := play(t, tr, "keep-alive:600s", Options{})
	for _, r := range []*Result{kpa, def, thrifty, alive} {
		t.Logf("%-12s cold %.3f %% wait %.2f %% p99 %.0f ms, %.0f instance-seconds, %d starts", r.Policy, r.ColdRate*100, r.WaitRate*100, r.WaitP99, r.InstanceSeconds, r.InstanceStarts)
	}
	if def.ColdRate > kpa.ColdRate/3 || def.InstanceSeconds > 1.6*kpa.InstanceSeconds || def.WaitRate > kpa.WaitRate {
		t.Error("the default value is not much better than KPA")
	}
	if thrifty.ColdRate > kpa.ColdRate/2 || thrifty.InstanceSeconds > 0.95*kpa.InstanceSeconds {
		t.Error("the thrifty value is not cheaper than KPA")
	}
	if alive.InstanceSeconds < def.InstanceSeconds {
		t.Error("a ten-minute keep-alive is cheaper: the trace shows nothing")
	}
	if kpa.Requests < 20000 || kpa.Requests-def.Requests > 50 || def.Requests-kpa.Requests > 50 {
		t.Errorf("%d and %d requests: not the same trace", kpa.Requests, def.Requests)
	}
}

// No policy, however it decides, can do with less than the oracle, and all requests are accounted for.
func TestOracleIsLeast(t *testing.T) {
	tr := synthetic(2)
	least := Oracle(tr, Options{})
	for _, policy := range []string{"kpa", "predictive", "predictive:1", "keep-alive:1s", "histogram"} {
		r := play(t, tr, policy, Options{})
		if r.InstanceSeconds < 0.9*least { // waiting lets one do with a little less
			t.Errorf("%s: %.0f instance-seconds, the oracle %.0f", policy, r.InstanceSeconds, least)
		}
		if r.Cold > r.Waited || r.Waited > r.Requests || r.BusyInstanceSeconds > r.InstanceSeconds {
			t.Errorf("%s: %+v", policy, r)
		}
	}
}

// A run can be repeated to the last bit, and another seed gives another one.
func TestDeterministic(t *testing.T) {
	tr := synthetic(1)
	text := func(o Options) string {
		r := play(t, tr, "predictive", o)
		r.DecisionMicros = 0
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	a, b, c := text(Options{}), text(Options{}), text(Options{Seed: 1})
	if a != b {
		t.Errorf("two runs differ:\n%s\n%s", a, b)
	}
	if a == c {
		t.Error("another seed makes no difference")
	}
}

// stub is a policy that keeps fixed targets.
type stub struct {
	ready  Ready
	orders func(t *Tick) []Order2
}

func (s *stub) Hello(*Hello) Ready    { return s.ready }
func (s *stub) Tick(t *Tick) []Order2 { return s.orders(t) }

// The platform by hand: two requests 5 s apart that take 6 s each, and an instance takes 2 s to start.
func TestPlatform(t *testing.T) {
	tr := &Trace{Name: "two", Unit: 10, Horizon: 30, Functions: []Function{
		{Name: "f", App: "a", Timer: true, Concurrency: 1, Batch: 1, Start: 2, Service: [7]float64{6, 6, 6, 6, 6, 6, 6}},
	}, Counts: [][]Count{{{1, 2}}}}
	second := math.Ceil(10 + 5*unit(mix(keyOf("f"), 0))) // the tick after the first request
	type target struct {
		at float64
		n  int
	}
	for _, c := range []struct {
		name    string
		mode    string
		targets []target
		cold    int
		waited  int
		starts  int
		wait    float64 // sum, seconds
		live    float64 // instance-seconds
	}{
		// The first is served 2 s after it came, and ends 3 s after the second came, which gets its instance.
		{"zero", OnDemandZero, nil, 1, 2, 1, 2 + 3, 0},
		// The second starts an instance of its own, which is there after 2 s.
		{"all", OnDemandAll, nil, 2, 2, 2, 2 + 2, 0},
		{"warm", OnDemandZero, []target{{1, 2}}, 0, 0, 2, 0, 29 + 29},
		// Taken back while busy they finish what they have, and no more.
		{"drained", OnDemandZero, []target{{1, 2}, {19, 0}}, 0, 0, 2, 0, 0},
		// A target of zero does not stop the start that a request waits for.
		{"kept", OnDemandZero, []target{{second, 0}, {second + 1, 0}}, 1, 2, 1, 2 + 3, 0},
	} {
		p := &stub{Ready{Name: "stub", Interval: 1, OnDemand: c.mode}, func(k *Tick) (orders []Order2) {
			for _, o := range c.targets {
				if o.at == k.T {
					orders = append(orders, Order2{0, o.n})
				}
			}
			return orders
		}}
		r, err := Run(context.Background(), tr, p, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Requests != 2 || r.Cold != c.cold || r.Waited != c.waited || r.InstanceStarts != c.starts || math.Abs(r.WaitMean*2/1000-c.wait) > 1e-6 {
			t.Errorf("%s: %+v", c.name, *r)
		}
		if c.live > 0 && math.Abs(r.InstanceSeconds-c.live) > 1e-6 || c.name == "drained" && (r.InstanceSeconds < 2*18+2 || r.InstanceSeconds > 2*18+14) {
			t.Errorf("%s: %v instance-seconds", c.name, r.InstanceSeconds)
		}
	}
}

// What the policy is told adds up.
func TestTicks(t *testing.T) {
	tr := synthetic(1)
	arrivals, done, busy, calls := 0, 0, 0.0, 0
	shifts := 0
	last := 0.0
	p := &stub{Ready{Name: "stub", Interval: 3, OnDemand: OnDemandAll}, func(k *Tick) []Order2 {
		if k.T != last+3 {
			t.Fatalf("tick at %v after %v", k.T, last)
		}
		last = k.T
		shifts += len(k.Shifts)
		for _, s := range k.Shifts {
			if s.At < k.T-3 || s.At > k.T+shiftNotice {
				t.Errorf("at %v told of a shift at %v", k.T, s.At)
			}
		}
		for _, c := range k.Calls {
			calls += c[2]
		}
		for _, l := range k.Functions {
			if len(l.Concurrency) != 3 {
				t.Fatalf("%d seconds in a tick of 3", len(l.Concurrency))
			}
			sum := 0.0
			for _, c := range l.Concurrency {
				sum += c
				if c > float64(l.Peak)+1e-9 {
					t.Fatalf("mean %v above the peak %d", c, l.Peak)
				}
			}
			arrivals += l.Arrivals
			done += l.Done
			busy += sum
		}
		return nil
	}}
	r, err := Run(context.Background(), tr, p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if shifts != 2 || calls == 0 || arrivals < r.Requests || arrivals-done > 50 || busy < r.BusyInstanceSeconds {
		t.Errorf("%d shifts, %d calls, %d arrivals, %d done, %.0f request-seconds; result %+v", shifts, calls, arrivals, done, busy, r)
	}
}

func TestBadPolicies(t *testing.T) {
	tr := synthetic(1)
	for name, p := range map[string]Policy{
		"interval": &stub{Ready{Interval: 0}, nil},
		"mode":     &stub{Ready{Interval: 1, OnDemand: "some"}, nil},
		"function": &stub{Ready{Interval: 1}, func(*Tick) []Order2 { return []Order2{{99, 1}} }},
		"negative": &stub{Ready{Interval: 1}, func(*Tick) []Order2 { return []Order2{{0, -1}} }},
	} {
		if _, err := Run(context.Background(), tr, p, Options{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for _, s := range []string{"", "kpa:1", "keep-alive", "keep-alive:x", "keep-alive:1ms", "predictive:0", "predictive:-5", "predictive:NaN", "predictive:x", "magic"} {
		if _, err := ParsePolicy(s); err == nil {
			t.Errorf("policy %q: no error", s)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Run(ctx, tr, NewKPA(), Options{}); err == nil {
		t.Error("a cancelled run went on")
	}
}

func TestSVG(t *testing.T) {
	r := play(t, synthetic(1), "predictive", Options{Plot: true})
	var b bytes.Buffer
	if err := r.WriteSVG(&b); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(b.String(), "<polyline"); n != 3 || !strings.HasSuffix(b.String(), "</svg>\n") {
		t.Errorf("%d lines in the plot", n)
	}
	sum := 0.0
	for _, v := range r.Plot.live {
		sum += v
	}
	if sum < r.InstanceSeconds {
		t.Errorf("%v instance-seconds drawn, %v counted", sum, r.InstanceSeconds)
	}
	if err := play(t, synthetic(1), "kpa", Options{}).WriteSVG(&b); err == nil {
		t.Error("drew a run that kept nothing")
	}
}

// A million functions' worth of ticks would be dear if each listed function cost much.
func BenchmarkReplay(b *testing.B) {
	tr := synthetic(6)
	for b.Loop() {
		if _, err := Run(context.Background(), tr, NewPredictive(planner.DefaultConfig()), Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
