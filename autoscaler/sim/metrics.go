package sim

import (
	"math"
	"slices"
)

// Result is what a run cost and what its requests met, from the trace's EvalFrom on.
type Result struct {
	Trace  string `json:"trace"`
	Policy string `json:"policy"`

	Requests            int     `json:"requests"`
	ColdRate            float64 `json:"cold_rate"`             // share served by an instance that became ready after they came
	WaitRate            float64 `json:"wait_rate"`             // share with any wait
	ColdRateActive60    float64 `json:"cold_rate_active_60s"`  // of those whose function had another one in the last 60 s
	ColdRateActive600   float64 `json:"cold_rate_active_600s"` // in the last 600 s
	FnColdMean          float64 `json:"fn_cold_mean"`          // over functions, each counting the same
	FnColdP50           float64 `json:"fn_cold_p50"`
	FnColdP75           float64 `json:"fn_cold_p75"`
	WaitMean            float64 `json:"wait_mean_ms"`
	WaitP50             float64 `json:"wait_p50_ms"`
	WaitP99             float64 `json:"wait_p99_ms"`
	WaitP999            float64 `json:"wait_p999_ms"`
	InstanceSeconds     float64 `json:"instance_seconds"` // of all instances, from the order to the end
	BusyInstanceSeconds float64 `json:"busy_instance_seconds"`
	OverProvisioning    float64 `json:"over_provisioning"` // instance seconds / busy ones - 1
	InstanceStarts      int     `json:"instance_starts"`
	PeakInstances       int     `json:"peak_instances"`
	DecisionMicros      float64 `json:"us_per_decision"`     // time of the policy's answers for each function listed, in this process
	VsOracle            float64 `json:"vs_oracle,omitempty"` // instance seconds / Oracle's; 0 = not computed

	Cold        int        `json:"cold"`
	Waited      int        `json:"waited"`
	Active60    int        `json:"active_60s"` // requests that ColdRateActive60 is a share of
	Cold60      int        `json:"cold_active_60s"`
	PerFunction []FnResult `json:"-"`
	Plot        *series    `json:"-"`
}

// FnResult is one function's part.
type FnResult struct {
	Name            string
	App             string
	Requests, Cold  int
	InstanceSeconds float64
	Starts          int
	Timer           bool
}

// tally counts while the run goes on.
type tally struct {
	requests, cold, waited int
	active60, cold60       int
	active600, cold600     int
	waits                  waits
	instanceSeconds        float64
	busySeconds            float64
	starts, live, peak     int
	plot                   *series
}

// fnTally is the part of it that belongs to a function.
type fnTally struct {
	last            float64 // arrival
	any             bool
	requests, cold  int
	instanceSeconds float64
	starts          int
	previous        ringGap
}

// ringGap is kept per waiting request: how long the function had had no arrival when it came. Requests are served in order of arrival,
// so a queue beside the queue is enough.
type ringGap struct {
	gaps []float64
	head int
}

func (r *ringGap) push(g float64) {
	if r.head == len(r.gaps) {
		r.gaps, r.head = r.gaps[:0], 0
	}
	r.gaps = append(r.gaps, g)
}

func (r *ringGap) pop() float64 {
	g := r.gaps[r.head]
	r.head++
	return g
}

func (t *tally) arrive(w *world, f *fn, a arrival) {
	gap := math.Inf(1)
	if f.tally.any {
		gap = w.now - f.tally.last
	}
	f.tally.last, f.tally.any = w.now, true
	f.tally.previous.push(gap)
	if t.plot != nil {
		t.plot.arrive(w.now)
	}
}

func (t *tally) serve(w *world, f *fn, a arrival, in *instance) {
	gap := f.tally.previous.pop()
	if t.plot != nil && in.readyAt > a.at {
		t.plot.cold(w.now)
	}
	if a.at < w.trace.EvalFrom {
		return
	}
	wait := w.now - a.at
	t.requests++
	f.tally.requests++
	t.waits.add(wait)
	if wait > 0 {
		t.waited++
	}
	cold := 0
	if in.readyAt > a.at {
		cold = 1
	}
	t.cold += cold
	f.tally.cold += cold
	if gap <= 60 {
		t.active60++
		t.cold60 += cold
	}
	if gap <= 600 {
		t.active600++
		t.cold600 += cold
	}
}

func (t *tally) start(w *world, f *fn) {
	t.live++
	if w.now >= w.trace.EvalFrom {
		t.starts++
		f.tally.starts++
		t.peak = max(t.peak, t.live)
	}
	if t.plot != nil {
		t.plot.instances(w.now, t.live)
	}
}

func (t *tally) busy(w *world, in *instance) {
	t.busySeconds += max(0, w.now-math.Max(in.busyAt, w.trace.EvalFrom))
}

func (t *tally) stop(w *world, f *fn, in *instance) {
	t.live--
	lived := max(0, w.now-math.Max(in.ordered, w.trace.EvalFrom))
	t.instanceSeconds += lived
	f.tally.instanceSeconds += lived
	if t.plot != nil {
		t.plot.instances(w.now, t.live)
	}
}

func (t *tally) result(w *world, policy string) *Result {
	r := &Result{
		Trace: w.trace.Name, Policy: policy,
		Requests: t.requests, Cold: t.cold, Waited: t.waited, Active60: t.active60, Cold60: t.cold60,
		ColdRate: ratio(t.cold, t.requests), WaitRate: ratio(t.waited, t.requests),
		ColdRateActive60: ratio(t.cold60, t.active60), ColdRateActive600: ratio(t.cold600, t.active600),
		WaitMean: t.waits.mean() * 1000, WaitP50: t.waits.quantile(0.5) * 1000,
		WaitP99: t.waits.quantile(0.99) * 1000, WaitP999: t.waits.quantile(0.999) * 1000,
		InstanceSeconds: t.instanceSeconds, BusyInstanceSeconds: t.busySeconds,
		InstanceStarts: t.starts, PeakInstances: t.peak, Plot: t.plot,
	}
	if w.listed > 0 {
		r.DecisionMicros = float64(w.deciding.Nanoseconds()) / 1000 / float64(w.listed)
	}
	if t.busySeconds > 0 {
		r.OverProvisioning = t.instanceSeconds/t.busySeconds - 1
	}
	var rates []float64
	for i := range w.fns {
		f := &w.fns[i]
		r.PerFunction = append(r.PerFunction, FnResult{Name: f.Name, App: f.App, Requests: f.tally.requests, Cold: f.tally.cold,
			InstanceSeconds: f.tally.instanceSeconds, Starts: f.tally.starts, Timer: f.Timer})
		if f.tally.requests > 0 {
			rates = append(rates, ratio(f.tally.cold, f.tally.requests))
			r.FnColdMean += rates[len(rates)-1]
		}
	}
	if len(rates) > 0 {
		r.FnColdMean /= float64(len(rates))
		slices.Sort(rates)
		r.FnColdP50, r.FnColdP75 = quantile(rates, 0.5), quantile(rates, 0.75)
	}
	return r
}

func ratio(a, b int) float64 {
	if b == 0 {
		return 0
	}
	return float64(a) / float64(b)
}

// quantile is the smallest value that at least the share q is not above.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}

// waits is the distribution of waits. Most are zero, so only the others are kept.
type waits struct {
	zero   int
	sum    float64
	above  []float64
	sorted bool
}

func (w *waits) add(v float64) {
	if v <= 0 {
		w.zero++
		return
	}
	w.sum += v
	w.above = append(w.above, v)
	w.sorted = false
}

func (w *waits) mean() float64 {
	if n := w.zero + len(w.above); n > 0 {
		return w.sum / float64(n)
	}
	return 0
}

func (w *waits) quantile(q float64) float64 {
	if !w.sorted {
		slices.Sort(w.above)
		w.sorted = true
	}
	i := int(math.Ceil(q*float64(w.zero+len(w.above)))) - 1 - w.zero
	if i < 0 || len(w.above) == 0 {
		return 0
	}
	return w.above[i]
}

// Add makes r the sum of itself and another run: counts, rates and times, but no percentiles.
func (r *Result) Add(o *Result) {
	r.Requests += o.Requests
	r.Cold += o.Cold
	r.Waited += o.Waited
	r.Active60 += o.Active60
	r.Cold60 += o.Cold60
	r.InstanceSeconds += o.InstanceSeconds
	r.BusyInstanceSeconds += o.BusyInstanceSeconds
	r.InstanceStarts += o.InstanceStarts
	r.ColdRate, r.WaitRate = ratio(r.Cold, r.Requests), ratio(r.Waited, r.Requests)
	r.ColdRateActive60 = ratio(r.Cold60, r.Active60)
}
