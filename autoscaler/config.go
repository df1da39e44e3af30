package autoscaler

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler/planner"
)

// Who decides: values of the key planner and of AnnotationPlanner.
const (
	PlannerKPA        = "kpa"        // Knative's rules
	PlannerPredictive = "predictive" // the planner
)

// Limits of keys and annotations, as Knative has them.
const (
	windowMin          = 6 * time.Second
	windowMax          = time.Hour
	targetMin          = 0.01
	panicWindowMin     = 1.0
	panicWindowMax     = 100.0
	panicThresholdMin  = 110.0
	panicThresholdMax  = 1000.0
	defaultUtilization = 0.7
	startRateMin       = 0.01
	maxInt32           = math.MaxInt32
)

// ErrConfig is wrapped by every error that ParseConfig and Validate return.
var ErrConfig = errors.New("autoscaler configuration")

// ErrAnnotation is wrapped by every error that PolicyFor returns.
var ErrAnnotation = errors.New("autoscaling annotation")

// Config is what holds for all revisions. DefaultConfig gives it; ParseConfig reads it from Knative's config-autoscaler keys. The key
// stands beside each field.
type Config struct {
	ContainerConcurrencyTarget         float64       // container-concurrency-target-default: total when a revision has no limit of its own, requests
	ContainerConcurrencyTargetFraction float64       // container-concurrency-target-percentage / 100, (0, 1]
	RPSTarget                          float64       // requests-per-second-target-default: total for metric rps, requests a second
	RPSTargetFraction                  float64       // 0.7, no key
	TargetBurstCapacity                float64       // target-burst-capacity, requests; -1 always through the activator, 0 only from zero
	StableWindow                       time.Duration // stable-window, 6 s to 1 h, whole seconds
	PanicWindowPercentage              float64       // panic-window-percentage, 1 to 100
	PanicThresholdPercentage           float64       // panic-threshold-percentage, 110 to 1000
	MaxScaleUpRate                     float64       // max-scale-up-rate, more than 1
	MaxScaleDownRate                   float64       // max-scale-down-rate, more than 1
	EnableScaleToZero                  bool          // enable-scale-to-zero
	ScaleToZeroGracePeriod             time.Duration // scale-to-zero-grace-period, at least 6 s
	ScaleToZeroPodRetentionPeriod      time.Duration // scale-to-zero-pod-retention-period
	ScaleDownDelay                     time.Duration // scale-down-delay, whole seconds
	ActivatorCapacity                  float64       // activator-capacity, at least 1 request
	InitialScale                       int           // initial-scale
	AllowZeroInitialScale              bool          // allow-zero-initial-scale; true here, false in Knative
	MinScale                           int           // min-scale
	MaxScale                           int           // max-scale, 0 = no limit
	MaxScaleLimit                      int           // max-scale-limit, 0 = none
	ProgressDeadline                   time.Duration // progress-deadline (in Knative a key of config-deployment): an instance should be ready by then

	// EventDriven (key event-driven, annotation autoscaling.thaw.run/event-driven) lets a demand of the activator be sized
	// and acted on at once. False is Knative's way: a demand at zero asks for one instance, the rest comes with the tick.
	EventDriven bool

	// Predictive (key planner: kpa or predictive, annotation autoscaling.thaw.run/planner) is who decides about revisions that do not say.
	Predictive bool

	// PlannerValue (key planner-value) is how many idle seconds of an instance one avoided cold start is worth to the planner.
	PlannerValue float64

	// ServeDelay (key serve-delay) is how long the excess burst capacity must have been there, without a break, before a revision with a
	// target burst capacity above 0 changes from proxy to serve mode. The way back takes no time. 0 is Knative's way: the mode follows the
	// sign of each decision.
	ServeDelay time.Duration

	StartRate  float64 // start-rate: instances a second that one revision may start, once StartBurst is used up; 0 = no limit
	StartBurst float64 // start-burst: instances that one revision may start at once, at least 1

	// SilenceIsZero (key silence-is-zero) takes missing reports for no load at target-burst-capacity -1, as Knative does: there the
	// instances are not asked then. Here they report at every setting, so that silence never means that there is nothing.
	SilenceIsZero bool

	Tick         time.Duration // distance of two decisions about a revision with instances or load; 2 s
	AdoptionWait time.Duration // how long min-scale of a known revision waits for instances to be found after a start; 2 s

	Keep *Keep // of what the planner learns; nil = it is lost with the process

	Logger *slog.Logger // nil = no log
	Meter  metric.Meter // nil = no metrics
}

// Keep is how what the planner has learnt outlives the process. What cannot be read is reported in the log and learnt again.
type Keep struct {
	Learnt []byte // what Save was given last; more can be given by Remember

	// Part says to which part a revision belongs: parts are saved one by one. nil = all belong to part 0.
	Part func(api.RevisionID) int
	// Save is given what was learnt of a part. It is called on the loop, each minute in which something was learnt about the part, and
	// at the end of Run.
	Save func(part int, learnt []byte)
}

// DefaultConfig is Knative's, except that an initial scale of zero is allowed.
func DefaultConfig() Config {
	return Config{
		ContainerConcurrencyTarget:         100,
		ContainerConcurrencyTargetFraction: defaultUtilization,
		RPSTarget:                          200,
		RPSTargetFraction:                  defaultUtilization,
		TargetBurstCapacity:                211,
		StableWindow:                       60 * time.Second,
		PanicWindowPercentage:              10,
		PanicThresholdPercentage:           200,
		MaxScaleUpRate:                     1000,
		MaxScaleDownRate:                   2,
		EnableScaleToZero:                  true,
		ScaleToZeroGracePeriod:             30 * time.Second,
		ActivatorCapacity:                  100,
		InitialScale:                       1,
		AllowZeroInitialScale:              true,
		ProgressDeadline:                   600 * time.Second,
		EventDriven:                        true,
		PlannerValue:                       planner.DefaultValue,
		ServeDelay:                         6 * time.Second,
		StartRate:                          100,
		StartBurst:                         1000,
		Tick:                               delaySlot,
		AdoptionWait:                       2 * time.Second,
	}
}

// key is one key of config-autoscaler and the field it fills.
type key struct {
	name string
	set  func(c *Config, v string) error
}

func floatKey(name string, field func(*Config) *float64) key {
	return key{name, func(c *Config, v string) (err error) { *field(c), err = parseFloat(v); return }}
}

func intKey(name string, field func(*Config) *int) key {
	return key{name, func(c *Config, v string) (err error) { *field(c), err = parseInt(v); return }}
}

func durationKey(name string, field func(*Config) *time.Duration) key {
	return key{name, func(c *Config, v string) (err error) { *field(c), err = time.ParseDuration(v); return }}
}

func boolKey(name string, field func(*Config) *bool) key {
	return key{name, func(c *Config, v string) (err error) { *field(c), err = strconv.ParseBool(strings.ToLower(v)); return }}
}

func keys() []key {
	return []key{
		floatKey("container-concurrency-target-default", func(c *Config) *float64 { return &c.ContainerConcurrencyTarget }),
		{"container-concurrency-target-percentage", setFraction},
		floatKey("requests-per-second-target-default", func(c *Config) *float64 { return &c.RPSTarget }),
		floatKey("target-burst-capacity", func(c *Config) *float64 { return &c.TargetBurstCapacity }),
		durationKey("stable-window", func(c *Config) *time.Duration { return &c.StableWindow }),
		floatKey("panic-window-percentage", func(c *Config) *float64 { return &c.PanicWindowPercentage }),
		floatKey("panic-threshold-percentage", func(c *Config) *float64 { return &c.PanicThresholdPercentage }),
		floatKey("max-scale-up-rate", func(c *Config) *float64 { return &c.MaxScaleUpRate }),
		floatKey("max-scale-down-rate", func(c *Config) *float64 { return &c.MaxScaleDownRate }),
		boolKey("enable-scale-to-zero", func(c *Config) *bool { return &c.EnableScaleToZero }),
		durationKey("scale-to-zero-grace-period", func(c *Config) *time.Duration { return &c.ScaleToZeroGracePeriod }),
		durationKey("scale-to-zero-pod-retention-period", func(c *Config) *time.Duration { return &c.ScaleToZeroPodRetentionPeriod }),
		durationKey("scale-down-delay", func(c *Config) *time.Duration { return &c.ScaleDownDelay }),
		floatKey("activator-capacity", func(c *Config) *float64 { return &c.ActivatorCapacity }),
		intKey("initial-scale", func(c *Config) *int { return &c.InitialScale }),
		boolKey("allow-zero-initial-scale", func(c *Config) *bool { return &c.AllowZeroInitialScale }),
		intKey("min-scale", func(c *Config) *int { return &c.MinScale }),
		intKey("max-scale", func(c *Config) *int { return &c.MaxScale }),
		intKey("max-scale-limit", func(c *Config) *int { return &c.MaxScaleLimit }),
		durationKey("progress-deadline", func(c *Config) *time.Duration { return &c.ProgressDeadline }),
		boolKey("event-driven", func(c *Config) *bool { return &c.EventDriven }),
		{"planner", setPlanner},
		floatKey("planner-value", func(c *Config) *float64 { return &c.PlannerValue }),
		durationKey("serve-delay", func(c *Config) *time.Duration { return &c.ServeDelay }),
		floatKey("start-rate", func(c *Config) *float64 { return &c.StartRate }),
		floatKey("start-burst", func(c *Config) *float64 { return &c.StartBurst }),
		boolKey("silence-is-zero", func(c *Config) *bool { return &c.SilenceIsZero }),
		{"pod-autoscaler-class", setClass},
	}
}

// setFraction takes percent, and fractions up to 1 for old files, as Knative does.
func setFraction(c *Config, v string) error {
	f, err := parseFloat(v)
	if f > 1 {
		f /= 100
	}
	c.ContainerConcurrencyTargetFraction = f
	return err
}

func setPlanner(c *Config, v string) error {
	if v != PlannerKPA && v != PlannerPredictive {
		return fmt.Errorf("must be %s or %s", PlannerKPA, PlannerPredictive)
	}
	c.Predictive = v == PlannerPredictive
	return nil
}

func setClass(_ *Config, v string) error {
	if v != "kpa.autoscaling.knative.dev" {
		return fmt.Errorf("class %q is not supported; there is only kpa.autoscaling.knative.dev", v)
	}
	return nil
}

// ParseConfig reads keys shaped like Knative's config-autoscaler over the defaults. Keys that begin with an underscore (_example) are
// skipped; an unknown key is an error, because a setting that is silently dropped costs somebody a day. All errors are reported
// together, each with its key, and wrap ErrConfig.
func ParseConfig(data map[string]string) (Config, error) {
	c := DefaultConfig()
	known := map[string]key{}
	for _, k := range keys() {
		known[k.name] = k
	}
	names := make([]string, 0, len(data))
	for name := range data {
		names = append(names, name)
	}
	slices.Sort(names) // errors in the same order each time

	var errs []error
	for _, name := range names {
		if strings.HasPrefix(name, "_") {
			continue
		}
		k, ok := known[name]
		if !ok {
			errs = append(errs, fmt.Errorf("%w: unknown key %q", ErrConfig, name))
			continue
		}
		if err := k.set(&c, strings.TrimSpace(data[name])); err != nil {
			errs = append(errs, fmt.Errorf("%w: %s = %q: %w", ErrConfig, name, data[name], err))
		}
	}
	if len(errs) > 0 {
		return DefaultConfig(), errors.Join(errs...)
	}
	if err := c.Validate(); err != nil {
		return DefaultConfig(), err
	}
	return c, nil
}

// Validate checks Knative's ranges and says everything that is wrong, each error with the key and the range.
func (c Config) Validate() error {
	var errs []error
	check := func(ok bool, key string, v any, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%w: %s = %v: must be %s", ErrConfig, key, v, want))
		}
	}
	check(c.ContainerConcurrencyTargetFraction > 0 && c.ContainerConcurrencyTargetFraction <= 1,
		"container-concurrency-target-percentage", c.ContainerConcurrencyTargetFraction*100, "in (0, 100]")
	target := c.ContainerConcurrencyTarget * c.ContainerConcurrencyTargetFraction
	check(target >= targetMin, "container-concurrency-target-default", c.ContainerConcurrencyTarget,
		fmt.Sprintf("such that its product with container-concurrency-target-percentage is at least %v", targetMin))
	check(c.RPSTarget >= targetMin, "requests-per-second-target-default", c.RPSTarget, fmt.Sprintf("at least %v", targetMin))
	check(c.RPSTargetFraction > 0 && c.RPSTargetFraction <= 1, "RPSTargetFraction", c.RPSTargetFraction, "in (0, 1]")
	check(c.TargetBurstCapacity >= 0 || c.TargetBurstCapacity == -1, "target-burst-capacity", c.TargetBurstCapacity, "at least 0, or -1 for no limit")
	check(c.StableWindow >= windowMin && c.StableWindow <= windowMax && wholeSeconds(c.StableWindow),
		"stable-window", c.StableWindow, fmt.Sprintf("in [%v, %v] and whole seconds", windowMin, windowMax))
	check(c.PanicWindowPercentage >= panicWindowMin && c.PanicWindowPercentage <= panicWindowMax,
		"panic-window-percentage", c.PanicWindowPercentage, fmt.Sprintf("in [%v, %v]", panicWindowMin, panicWindowMax))
	check(c.PanicThresholdPercentage >= panicThresholdMin && c.PanicThresholdPercentage <= panicThresholdMax,
		"panic-threshold-percentage", c.PanicThresholdPercentage, fmt.Sprintf("in [%v, %v]", panicThresholdMin, panicThresholdMax))
	check(c.MaxScaleUpRate > 1, "max-scale-up-rate", c.MaxScaleUpRate, "greater than 1")
	check(c.MaxScaleDownRate > 1, "max-scale-down-rate", c.MaxScaleDownRate, "greater than 1")
	check(c.ScaleToZeroGracePeriod >= windowMin, "scale-to-zero-grace-period", c.ScaleToZeroGracePeriod, fmt.Sprintf("at least %v", windowMin))
	check(c.ScaleToZeroPodRetentionPeriod >= 0, "scale-to-zero-pod-retention-period", c.ScaleToZeroPodRetentionPeriod, "at least 0s")
	check(c.ScaleDownDelay >= 0 && c.ScaleDownDelay <= windowMax && wholeSeconds(c.ScaleDownDelay),
		"scale-down-delay", c.ScaleDownDelay, fmt.Sprintf("in [0s, %v] and whole seconds", windowMax))
	check(c.ActivatorCapacity >= 1, "activator-capacity", c.ActivatorCapacity, "at least 1")
	check(c.InitialScale > 0 || c.InitialScale == 0 && c.AllowZeroInitialScale,
		"initial-scale", c.InitialScale, "at least 1, or 0 with allow-zero-initial-scale")
	check(c.MinScale >= 0 && (c.MaxScale <= 0 || c.MinScale <= c.MaxScale), "min-scale", c.MinScale, "in [0, max-scale]")
	check(c.MaxScaleLimit >= 0, "max-scale-limit", c.MaxScaleLimit, "at least 0")
	check(c.MaxScale >= 0 && (c.MaxScaleLimit <= 0 || c.MaxScale >= 1 && c.MaxScale <= c.MaxScaleLimit),
		"max-scale", c.MaxScale, "at least 0, and in [1, max-scale-limit] when that is set")
	check(c.PlannerValue > 0 && c.PlannerValue <= planner.MaxValue, "planner-value", c.PlannerValue, fmt.Sprintf("in (0, %v]", float64(planner.MaxValue)))
	check(c.ServeDelay >= 0 && c.ServeDelay <= windowMax, "serve-delay", c.ServeDelay, fmt.Sprintf("in [0s, %v]", windowMax))
	check(c.StartRate == 0 || c.StartRate >= startRateMin, "start-rate", c.StartRate, fmt.Sprintf("at least %v, or 0 for no limit", startRateMin))
	check(c.StartBurst >= 1, "start-burst", c.StartBurst, "at least 1")
	check(c.ProgressDeadline > 0, "progress-deadline", c.ProgressDeadline, "more than 0s")
	check(c.Tick > 0, "Tick", c.Tick, "more than 0s")
	check(c.AdoptionWait >= 0, "AdoptionWait", c.AdoptionWait, "at least 0s")
	return errors.Join(errs...)
}

func wholeSeconds(d time.Duration) bool { return d%time.Second == 0 }

// parseFloat refuses what is no amount of anything.
func parseFloat(v string) (float64, error) {
	f, err := strconv.ParseFloat(v, 64)
	if err != nil {
		return 0, err
	}
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return 0, errors.New("not a finite number")
	}
	return f, nil
}

// parseInt takes what an int32 holds.
func parseInt(v string) (int, error) {
	n, err := strconv.ParseInt(v, 10, 32)
	return int(n), err
}
