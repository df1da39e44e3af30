package autoscaler

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestDefaultConfigIsValid(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
	c, err := ParseConfig(nil)
	if err != nil || c != DefaultConfig() {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestParseConfig(t *testing.T) {
	c, err := ParseConfig(map[string]string{
		"_example": "anything",
		"container-concurrency-target-percentage": "60",
		"container-concurrency-target-default":    "50.5",
		"requests-per-second-target-default":      "150",
		"target-burst-capacity":                   "-1",
		"stable-window":                           "30s",
		"panic-window-percentage":                 "20",
		"panic-threshold-percentage":              "300",
		"max-scale-up-rate":                       "10",
		"max-scale-down-rate":                     "1.5",
		"enable-scale-to-zero":                    "False",
		"scale-to-zero-grace-period":              "6s",
		"scale-to-zero-pod-retention-period":      "1m3s",
		"scale-down-delay":                        "15m",
		"activator-capacity":                      "42",
		"initial-scale":                           "2",
		"allow-zero-initial-scale":                "false",
		"min-scale":                               "1",
		"max-scale":                               "7",
		"max-scale-limit":                         "9",
		"progress-deadline":                       "120s",
		"event-driven":                            "false",
		"silence-is-zero":                         "true",
		"planner":                                 "predictive",
		"planner-value":                           "99",
		"serve-delay":                             "2500ms",
		"start-rate":                              "7.5",
		"start-burst":                             "30",
		"pod-autoscaler-class":                    "kpa.autoscaling.knative.dev",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		ContainerConcurrencyTarget: 50.5, ContainerConcurrencyTargetFraction: 0.6, RPSTarget: 150, RPSTargetFraction: 0.7,
		TargetBurstCapacity: -1, StableWindow: 30 * time.Second, PanicWindowPercentage: 20, PanicThresholdPercentage: 300,
		MaxScaleUpRate: 10, MaxScaleDownRate: 1.5, ScaleToZeroGracePeriod: 6 * time.Second,
		ScaleToZeroPodRetentionPeriod: 63 * time.Second, ScaleDownDelay: 15 * time.Minute, ActivatorCapacity: 42,
		InitialScale: 2, MinScale: 1, MaxScale: 7, MaxScaleLimit: 9, ProgressDeadline: 2 * time.Minute,
		Predictive: true, PlannerValue: 99, ServeDelay: 2500 * time.Millisecond, StartRate: 7.5, StartBurst: 30, SilenceIsZero: true, Tick: 2 * time.Second, AdoptionWait: 2 * time.Second,
	}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Error(diff)
	}
}

func TestParseConfigFraction(t *testing.T) {
	for in, want := range map[string]float64{"0.5": 0.5, "1": 1, "1.5": 0.015, "100": 1} {
		c, err := ParseConfig(map[string]string{"container-concurrency-target-percentage": in})
		if err != nil || math.Abs(c.ContainerConcurrencyTargetFraction-want) > 1e-12 {
			t.Errorf("%s: %v, %v", in, c.ContainerConcurrencyTargetFraction, err)
		}
	}
}

func TestParseConfigErrors(t *testing.T) {
	for _, c := range []struct{ pairs, want string }{
		{"stable-window=5s", "stable-window = 5s: must be in [6s, 1h0m0s] and whole seconds"},
		{"stable-window=61m", "stable-window = 1h1m0s"},
		{"stable-window=6500ms", "stable-window = 6.5s"},
		{"stable-window=60", `stable-window = "60"`},
		{"panic-window-percentage=0.5", "panic-window-percentage = 0.5: must be in [1, 100]"},
		{"panic-window-percentage=101", "panic-window-percentage"},
		{"panic-threshold-percentage=109", "panic-threshold-percentage = 109: must be in [110, 1000]"},
		{"panic-threshold-percentage=1001", "panic-threshold-percentage"},
		{"max-scale-up-rate=1", "max-scale-up-rate = 1: must be greater than 1"},
		{"max-scale-down-rate=1", "max-scale-down-rate"},
		{"max-scale-down-rate=NaN", "max-scale-down-rate"},
		{"target-burst-capacity=-2", "target-burst-capacity = -2: must be at least 0, or -1"},
		{"container-concurrency-target-percentage=0", "container-concurrency-target-percentage"},
		{"container-concurrency-target-percentage=101", "container-concurrency-target-percentage"},
		{"container-concurrency-target-default=0.001", "container-concurrency-target-default"},
		{"requests-per-second-target-default=0", "requests-per-second-target-default"},
		{"scale-to-zero-grace-period=5s", "scale-to-zero-grace-period"},
		{"scale-to-zero-pod-retention-period=-1s", "scale-to-zero-pod-retention-period"},
		{"scale-down-delay=-1s", "scale-down-delay"},
		{"scale-down-delay=1500ms", "scale-down-delay"},
		{"activator-capacity=0.9", "activator-capacity"},
		{"initial-scale=-1", "initial-scale"},
		{"initial-scale=0 allow-zero-initial-scale=false", "initial-scale = 0: must be at least 1"},
		{"min-scale=-1", "min-scale"},
		{"min-scale=5 max-scale=3", "min-scale = 5: must be in [0, max-scale]"},
		{"max-scale=-1", "max-scale"},
		{"max-scale-limit=-1", "max-scale-limit"},
		{"max-scale-limit=5", "max-scale = 0"},
		{"max-scale-limit=5 max-scale=6", "max-scale = 6"},
		{"max-scale=3000000000", "max-scale"},
		{"enable-scale-to-zero=maybe", "enable-scale-to-zero"},
		{"pod-autoscaler-class=hpa.autoscaling.knative.dev", "not supported"},
		{"planner=oracle", `planner = "oracle"`},
		{"planner-value=0", "planner-value = 0: must be in (0, 1e+06]"},
		{"planner-value=NaN", "planner-value"},
		{"serve-delay=-1s", "serve-delay = -1s: must be in [0s, 1h0m0s]"},
		{"serve-delay=61m", "serve-delay"},
		{"start-rate=-1", "start-rate = -1: must be at least 0.01, or 0"},
		{"start-rate=0.001", "start-rate"},
		{"start-burst=0", "start-burst = 0: must be at least 1"},
		{"stable-windows=60s", `unknown key "stable-windows"`},
	} {
		data := map[string]string{}
		for pair := range strings.FieldsSeq(c.pairs) {
			k, v, _ := strings.Cut(pair, "=")
			data[k] = v
		}
		got, err := ParseConfig(data)
		if err == nil || !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %q, want %q in it", c.pairs, err, c.want)
		}
		if got != DefaultConfig() {
			t.Errorf("%s: not the defaults after an error", c.pairs)
		}
	}
	_, err := ParseConfig(map[string]string{"nope": "1", "stable-window": "x", "min-scale": "y"})
	if n := strings.Count(err.Error(), "\n"); n != 2 {
		t.Errorf("three mistakes give %q", err)
	}
}

func TestPolicyForErrors(t *testing.T) {
	limited := DefaultConfig()
	limited.MaxScale, limited.MaxScaleLimit, limited.AllowZeroInitialScale = 10, 20, false
	for _, c := range []struct{ suffix, value, want string }{
		{"target", "0.001", "at least 0.01"},
		{"target", "lots", "at least 0.01"},
		{"target-utilization-percentage", "0.5", "[1, 100]"},
		{"target-utilization-percentage", "101", "[1, 100]"},
		{"target-burst-capacity", "-2", "or -1"},
		{"target-burst-capacity", "Inf", "or -1"},
		{"window", "5s", "[6s, 1h0m0s]"},
		{"window", "6.5s", "whole seconds"},
		{"panic-window-percentage", "0", "[1, 100]"},
		{"panicWindowPercentage", "0", "[1, 100]"},
		{"panic-threshold-percentage", "100", "[110, 1000]"},
		{"scale-down-delay", "2h", "[0s, 1h0m0s]"},
		{"scale-to-zero-pod-retention-period", "-1s", "[0s, 1h0m0s]"},
		{"activation-scale", "1", "[2, 2147483647]"},
		{"initial-scale", "0", "[1, 2147483647]"},
		{"min-scale", "-1", "[0, 2147483647]"},
		{"min-scale", "11", "more than max-scale 10"},
		{"max-scale", "21", "max-scale-limit 20"},
		{"max-scale", "0", "max-scale-limit 20"},
		{"metric", "cpu", "concurrency or rps"},
		{"metric-aggregation-algorithm", "median", "linear or weighted-exponential"},
		{"class", "hpa.autoscaling.knative.dev", "is supported"},
	} {
		clean, _ := PolicyFor(limited, nil, 10)
		p, err := PolicyFor(limited, annotated(c.suffix, c.value), 10)
		if err == nil || !errors.Is(err, ErrAnnotation) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s=%s: error %q, want %q in it", c.suffix, c.value, err, c.want)
		}
		p.MinScale, p.MaxScale = clean.MinScale, clean.MaxScale // these are cut to the limit instead
		if p != clean {
			t.Errorf("%s=%s: changes the policy:\n%s", c.suffix, c.value, cmp.Diff(clean, p))
		}
	}
	if p, _ := PolicyFor(limited, annotated("max-scale", "21", "min-scale", "30"), 10); p.MaxScale != 20 || p.MinScale != 20 {
		t.Errorf("max %d, min %d", p.MaxScale, p.MinScale)
	}
}

func TestPolicyForBothSpellings(t *testing.T) {
	kebab := annotated("min-scale", "2", "max-scale", "9", "initial-scale", "3", "activation-scale", "4", "scale-down-delay", "5s",
		"target-burst-capacity", "7", "panic-window-percentage", "50", "panic-threshold-percentage", "150",
		"target-utilization-percentage", "80", "scale-to-zero-pod-retention-period", "9s", "metric-aggregation-algorithm", "weighted-exponential")
	camel := annotated("minScale", "2", "maxScale", "9", "initialScale", "3", "activationScale", "4", "scaleDownDelay", "5s",
		"targetBurstCapacity", "7", "panicWindowPercentage", "50", "panicThresholdPercentage", "150",
		"targetUtilizationPercentage", "80", "scaleToZeroPodRetentionPeriod", "9s", "metricAggregationAlgorithm", "weighted-exponential")
	a, errA := PolicyFor(DefaultConfig(), kebab, 0)
	b, errB := PolicyFor(DefaultConfig(), camel, 0)
	if errA != nil || errB != nil || a != b {
		t.Errorf("%v %v\n%s", errA, errB, cmp.Diff(a, b))
	}
	if plain, _ := PolicyFor(DefaultConfig(), nil, 0); a == plain {
		t.Error("annotations change nothing")
	}
}

func FuzzPolicyFor(f *testing.F) {
	for _, k := range []string{"window", "target", "panic-window-percentage", "scale-down-delay", "max-scale", "target-utilization-percentage"} {
		f.Add(k, "1", 0)
		f.Add(k, "60s", 10)
		f.Add(k, "NaN", 1)
		f.Add(k, "-1e308", 1000)
	}
	f.Fuzz(func(t *testing.T, suffix, value string, limit int) {
		p, _ := PolicyFor(DefaultConfig(), annotated(suffix, value), limit)
		if !(p.Target >= 0.01) || !(p.EventTarget >= 0.01) || p.StableWindow < 6*time.Second || p.PanicWindow < time.Second ||
			p.PanicWindow > p.StableWindow || p.MinScale < 0 || p.MaxScale < 0 || p.MaxScale > 0 && p.MinScale > p.MaxScale {
			t.Errorf("%s=%q: %+v", suffix, value, p)
		}
	})
}

func FuzzParseConfig(f *testing.F) {
	f.Add("stable-window", "60s")
	f.Add("max-scale-up-rate", "1e309")
	f.Add("min-scale", "-1")
	f.Fuzz(func(t *testing.T, key, value string) {
		c, err := ParseConfig(map[string]string{key: value})
		if err == nil && c.Validate() != nil {
			t.Errorf("%s=%q gives an invalid config", key, value)
		}
	})
}
