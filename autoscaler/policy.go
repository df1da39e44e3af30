package autoscaler

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/thawrun/thaw/api"
)

// Metric is what a revision's load is measured in.
type Metric uint8

// The metrics of annotation metric.
const (
	Concurrency Metric = iota // requests inside at the same time
	RPS                       // requests a second
)

func (m Metric) String() string {
	if m == RPS {
		return "rps"
	}
	return "concurrency"
}

// AnnotationEventDriven switches the event-driven first decision of one revision: "true" or "false".
const AnnotationEventDriven = "autoscaling.thaw.run/event-driven"

// AnnotationPlanner chooses what decides about one revision: "kpa", or "predictive" (Policy.Predictive).
const AnnotationPlanner = api.AnnotationPlanner

// Policy is everything Decide and Settle need to know of one revision's wishes, resolved from keys and annotations.
type Policy struct {
	Metric              Metric
	Aggregation         Aggregation
	Target              float64       // load that one instance should carry: max(0.01, Total x utilization)
	Total               float64       // load that one instance can carry
	EventTarget         float64       // requests that one instance should carry; Target unless the metric is RPS
	TargetBurstCapacity float64       // -1 always through the activator, 0 only from zero, else requests
	StableWindow        time.Duration // whole seconds
	PanicWindow         time.Duration // whole seconds, at least one
	PanicThreshold      float64       // instances wanted for each ready one at which panic mode begins
	MaxScaleUpRate      float64
	MaxScaleDownRate    float64
	ScaleDownDelay      time.Duration
	ActivationScale     int // 0 = none, else at least 2
	InitialScale        int
	MinScale            int
	MaxScale            int  // 0 = no limit
	Reachable           bool // a route leads to the revision, or may soon

	EnableScaleToZero bool
	GracePeriod       time.Duration
	Retention         time.Duration // of the last instance
	ProgressDeadline  time.Duration
	ActivatorCapacity float64
	ServeDelay        time.Duration // how long the excess burst capacity has to be there before the activator may be left out
	StartRate         float64       // instances a second that may be started, once StartBurst is used up; 0 = no limit
	StartBurst        float64       // instances that may be started at once
	HardLimit         int           // containerConcurrency, 0 = none
	EventDriven       bool
	SilenceIsZero     bool

	// Predictive lets the planner decide what a revision keeps and starts ahead, in place of the windows' averages and the waits on
	// the way to zero. Queues are answered as before, and bounds hold.
	Predictive bool
}

// PolicyFor resolves what holds for a revision: annotations under autoscaling.knative.dev/ (both spellings), then c. The result is
// reachable; Reachable is the caller's to change. A wrong annotation is left out, as if it were not there, and reported in the error,
// which wraps ErrAnnotation once for each: the policy can be used in any case.
func PolicyFor(c Config, annotations map[string]string, containerConcurrency int) (Policy, error) {
	a := reader{annotations: annotations}
	p := Policy{
		TargetBurstCapacity: a.float(api.ScalingTargetBurst, c.TargetBurstCapacity, burstRange),
		StableWindow:        a.duration(api.ScalingWindow, c.StableWindow, windowMin, windowMax),
		PanicThreshold:      a.float(api.ScalingPanicThreshold, c.PanicThresholdPercentage, within(panicThresholdMin, panicThresholdMax)) / 100,
		MaxScaleUpRate:      c.MaxScaleUpRate,
		MaxScaleDownRate:    c.MaxScaleDownRate,
		ScaleDownDelay:      a.duration(api.ScalingDownDelay, c.ScaleDownDelay, 0, windowMax),
		ActivationScale:     a.int(api.ScalingActivation, 0, 2, maxInt32),
		InitialScale:        a.initialScale(c),
		Reachable:           true,
		EnableScaleToZero:   c.EnableScaleToZero,
		GracePeriod:         c.ScaleToZeroGracePeriod,
		Retention:           a.retention(c.ScaleToZeroPodRetentionPeriod),
		ProgressDeadline:    a.progressDeadline(c.ProgressDeadline),
		ActivatorCapacity:   c.ActivatorCapacity,
		ServeDelay:          c.ServeDelay,
		StartRate:           c.StartRate,
		StartBurst:          c.StartBurst,
		HardLimit:           max(0, containerConcurrency),
		EventDriven:         a.eventDriven(c.EventDriven),
	}
	p.SilenceIsZero = c.SilenceIsZero && p.TargetBurstCapacity == -1
	p.PanicWindow = panicWindow(p.StableWindow, a.float(api.ScalingPanicWindow, c.PanicWindowPercentage, within(panicWindowMin, panicWindowMax)))
	p.Metric, p.Aggregation = a.metric(), a.aggregation()
	a.target(&p, c)
	a.bounds(&p, c)
	a.planner(&p, c)
	a.class()
	return p, errors.Join(a.errs...)
}

// LeastScale is min-scale where it counts: a revision that no route leads to needs nothing kept warm.
func (p *Policy) LeastScale() int {
	if !p.Reachable {
		return 0
	}
	return p.MinScale
}

// panicWindow is a share of the stable window in whole seconds, at least one: a bucket is a second.
func panicWindow(stable time.Duration, percentage float64) time.Duration {
	return max(time.Second, time.Duration(float64(stable)*percentage/100).Round(time.Second))
}

// reader resolves annotations and collects what is wrong with them.
type reader struct {
	annotations map[string]string
	errs        []error
}

func (a *reader) wrong(suffix, value, want string) {
	a.errs = append(a.errs, fmt.Errorf("%w %s/%s = %q: %s", ErrAnnotation, api.AutoscalingGroup, suffix, value, want))
}

// span is a range of floats. Its words are made when they are needed: policies are resolved by the million.
type span struct {
	ok   func(float64) bool
	text func() string
}

func within(low, high float64) span {
	return span{func(v float64) bool { return v >= low && v <= high }, func() string { return fmt.Sprintf("must be a number in [%v, %v]", low, high) }}
}

var (
	burstRange  = span{func(v float64) bool { return v >= 0 || v == -1 }, func() string { return "must be a number of at least 0, or -1" }}
	targetRange = span{func(v float64) bool { return v >= targetMin }, func() string { return fmt.Sprintf("must be a number of at least %v", targetMin) }}
)

func (a *reader) float(suffix string, otherwise float64, s span) float64 {
	v, ok := api.ScalingAnnotation(a.annotations, suffix)
	if !ok {
		return otherwise
	}
	f, err := parseFloat(v)
	if err != nil || !s.ok(f) {
		a.wrong(suffix, v, s.text())
		return otherwise
	}
	return f
}

func (a *reader) int(suffix string, otherwise, low, high int) int {
	v, ok := api.ScalingAnnotation(a.annotations, suffix)
	if !ok {
		return otherwise
	}
	n, err := parseInt(v)
	if err != nil || n < low || n > high {
		a.wrong(suffix, v, fmt.Sprintf("must be a whole number in [%d, %d]", low, high))
		return otherwise
	}
	return n
}

// duration takes whole seconds.
func (a *reader) duration(suffix string, otherwise, low, high time.Duration) time.Duration {
	v, ok := api.ScalingAnnotation(a.annotations, suffix)
	if !ok {
		return otherwise
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < low || d > high || !wholeSeconds(d) {
		a.wrong(suffix, v, fmt.Sprintf("must be a duration in [%v, %v] and whole seconds", low, high))
		return otherwise
	}
	return d
}

// retention is the one duration that may have parts of seconds.
func (a *reader) retention(otherwise time.Duration) time.Duration {
	v, ok := api.ScalingAnnotation(a.annotations, api.ScalingRetention)
	if !ok {
		return otherwise
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < 0 || d > windowMax {
		a.wrong(api.ScalingRetention, v, fmt.Sprintf("must be a duration in [0s, %v]", windowMax))
		return otherwise
	}
	return d
}

func (a *reader) progressDeadline(otherwise time.Duration) time.Duration {
	v, ok := a.annotations[api.AnnotationProgressDeadline]
	if !ok {
		return otherwise
	}
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 {
		a.errs = append(a.errs, fmt.Errorf("%w %s = %q: must be a positive duration", ErrAnnotation, api.AnnotationProgressDeadline, v))
		return otherwise
	}
	return d
}

func (a *reader) eventDriven(otherwise bool) bool {
	v, ok := a.annotations[AnnotationEventDriven]
	if !ok {
		return otherwise
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		a.errs = append(a.errs, fmt.Errorf("%w %s = %q: must be true or false", ErrAnnotation, AnnotationEventDriven, v))
		return otherwise
	}
	return b
}

// planner resolves who decides. The planner counts requests at the same time, so it has nothing to say about a rate.
func (a *reader) planner(p *Policy, c Config) {
	p.Predictive = c.Predictive && p.Metric == Concurrency
	v, ok := a.annotations[AnnotationPlanner]
	switch {
	case !ok:
	case v == PlannerKPA:
		p.Predictive = false
	case v != PlannerPredictive:
		a.errs = append(a.errs, fmt.Errorf("%w %s = %q: must be %s or %s", ErrAnnotation, AnnotationPlanner, v, PlannerKPA, PlannerPredictive))
	case p.Metric != Concurrency:
		a.errs = append(a.errs, fmt.Errorf("%w %s = %q: it works with metric concurrency only", ErrAnnotation, AnnotationPlanner, v))
	default:
		p.Predictive = true
	}
}

func (a *reader) metric() Metric {
	switch v, ok := api.ScalingAnnotation(a.annotations, api.ScalingMetric); {
	case ok && v == api.ScalingMetricRPS:
		return RPS
	case ok && v != api.ScalingMetricConcurrency:
		a.wrong(api.ScalingMetric, v, "must be concurrency or rps")
	}
	return Concurrency
}

func (a *reader) aggregation() Aggregation {
	switch v, _ := api.ScalingAnnotation(a.annotations, api.ScalingMetricAggregation); v {
	case "", api.ScalingAggregationLinear:
	case api.ScalingAggregationWeights, "weightedExponential": // Knative takes both spellings
		return WeightedExponential
	default:
		a.wrong(api.ScalingMetricAggregation, v, "must be linear or weighted-exponential")
	}
	return Linear
}

func (a *reader) class() {
	if v, ok := api.ScalingAnnotation(a.annotations, api.ScalingClass); ok && v != api.ScalingClassKPA {
		a.wrong(api.ScalingClass, v, "only "+api.ScalingClassKPA+" is supported")
	}
}

// target resolves what an instance can carry and what it should: the annotation replaces the total, but no instance is
// asked to hold more requests than its hard limit lets in.
func (a *reader) target(p *Policy, c Config) {
	capacity := c.ContainerConcurrencyTarget
	if p.HardLimit > 0 {
		capacity = float64(p.HardLimit)
	}
	utilization := c.ContainerConcurrencyTargetFraction
	p.Total = capacity
	if p.Metric == RPS {
		p.Total, utilization = c.RPSTarget, c.RPSTargetFraction
	}
	if v := a.float(api.ScalingTarget, 0, targetRange); v > 0 {
		p.Total = v
		if p.Metric == Concurrency && p.HardLimit > 0 {
			p.Total = math.Min(v, float64(p.HardLimit))
		}
	}
	if v := a.float(api.ScalingTargetUtilization, 0, within(1, 100)); v > 0 {
		utilization = v / 100
	}
	p.Target = math.Max(targetMin, p.Total*utilization)

	// A queue is counted in requests, whatever the metric: for rps its size says nothing about a rate, so an event is sized by
	// how many requests an instance should hold.
	p.EventTarget = p.Target
	if p.Metric == RPS {
		p.EventTarget = math.Max(targetMin, capacity*utilization)
	}
}

func (a *reader) initialScale(c Config) int {
	low := 1
	if c.AllowZeroInitialScale {
		low = 0
	}
	return a.int(api.ScalingInitial, c.InitialScale, low, maxInt32)
}

// bounds resolves min and max. max-scale-limit holds whatever the annotation says; it also holds for "no limit".
func (a *reader) bounds(p *Policy, c Config) {
	p.MinScale = a.int(api.ScalingMin, c.MinScale, 0, maxInt32)
	p.MaxScale = a.int(api.ScalingMax, c.MaxScale, 0, maxInt32)
	if limit := c.MaxScaleLimit; limit > 0 && (p.MaxScale == 0 || p.MaxScale > limit) {
		v, _ := api.ScalingAnnotation(a.annotations, api.ScalingMax)
		a.wrong(api.ScalingMax, v, fmt.Sprintf("must be in [1, max-scale-limit %d]", limit))
		p.MaxScale = limit
	}
	if p.MaxScale > 0 && p.MinScale > p.MaxScale {
		v, _ := api.ScalingAnnotation(a.annotations, api.ScalingMin)
		a.wrong(api.ScalingMin, v, fmt.Sprintf("is more than max-scale %d", p.MaxScale))
		p.MinScale = p.MaxScale
	}
}
