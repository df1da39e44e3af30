package api

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"
)

// Bounds of the annotations under autoscaling.knative.dev/.
const (
	MinScalingTarget = 0.01
	MinScalingWindow = 6 * time.Second
	MaxScalingWindow = time.Hour // also of scale-down-delay and of the retention period
)

// scaling checks the annotations of the autoscaler on a template or a revision; r is at the annotations.
func (v validator) scaling(r report, ann map[string]string) {
	v.scalingClass(r, ann)
	v.scalingBounds(r, ann)
	v.scalingFloats(r, ann)
	v.scalingDurations(r, ann)
	if key, value, ok := findScaling(ann, ScalingMetric); ok && value != ScalingMetricConcurrency && value != ScalingMetricRPS {
		r.at(key).invalid(value)
	}
	if key, value, ok := findScaling(ann, ScalingMetricAggregation); ok {
		switch value {
		case "", ScalingAggregationLinear, ScalingAggregationWeights, ScalingAggregationWeightsAlt:
		default:
			r.at(key).invalid(value)
		}
	}
}

func (v validator) scalingClass(r report, ann map[string]string) {
	if key, value, ok := findScaling(ann, ScalingClass); ok && value != ScalingClassKPA {
		r.at(key).unsupported(value, fmt.Sprintf("the only class is %s", ScalingClassKPA))
	}
}

func (v validator) scalingBounds(r report, ann map[string]string) {
	low, _ := v.scalingInt(r, ann, ScalingMin, 0)
	high, hasHigh := v.scalingInt(r, ann, ScalingMax, 0)
	if high != 0 && high < low {
		detail := fmt.Sprintf("max-scale=%d is less than min-scale=%d", high, low)
		for _, s := range []string{ScalingMax, ScalingMin} {
			key, _, _ := findScaling(ann, s)
			r.at(key).generic(detail)
		}
	}
	if limit := v.limits.MaxScale; limit > 0 && hasHigh {
		key, _, _ := findScaling(ann, ScalingMax)
		if high > limit {
			r.at(key).bounds(high, 1, limit)
		} else if high == 0 {
			r.at(key).generic(fmt.Sprintf("max-scale=0 (unlimited), must be less than %d", limit))
		}
	}
	// Zero is allowed here: see the table of differences in docs/api-support.md.
	v.scalingInt(r, ann, ScalingInitial, 0)
	if activation, ok := v.scalingInt(r, ann, ScalingActivation, 2); ok && high != 0 && high < activation {
		key, _, _ := findScaling(ann, ScalingActivation)
		r.at(key).generic(fmt.Sprintf("max-scale=%d is less than activation-scale=%d", high, activation))
	}
}

// scalingInt reads a count of at least low; what is wrong is reported and reads as absent.
func (v validator) scalingInt(r report, ann map[string]string, suffix string, low int64) (int64, bool) {
	key, value, ok := findScaling(ann, suffix)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseInt(value, 10, 32)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && n < low:
		r.at(key).bounds(shorten(value), low, math.MaxInt32)
	case err != nil:
		r.at(key).invalid(value)
	default:
		return n, true
	}
	return 0, false
}

func (v validator) scalingFloats(r report, ann map[string]string) {
	v.scalingPercent(r, ann, ScalingPanicWindow, 1, 100)
	v.scalingPercent(r, ann, ScalingPanicThreshold, 110, 1000)
	v.scalingPercent(r, ann, ScalingTargetUtilization, 1, 100)
	if key, value, ok := findScaling(ann, ScalingTarget); ok {
		if f, ok := finite(value); !ok {
			r.at(key).invalid(value)
		} else if f < MinScalingTarget {
			r.at(key).generic(fmt.Sprintf("target %s should be at least %g", value, MinScalingTarget))
		}
	}
	if key, value, ok := findScaling(ann, ScalingTargetBurst); ok {
		if f, ok := finite(value); !ok || f < 0 && f != -1 {
			r.at(key).invalid(value)
		}
	}
}

func (v validator) scalingPercent(r report, ann map[string]string, suffix string, low, high float64) {
	key, value, ok := findScaling(ann, suffix)
	if !ok {
		return
	}
	if f, ok := finite(value); !ok {
		r.at(key).invalid(value)
	} else if f < low || f > high {
		r.at(key).bounds(value, low, high)
	}
}

// finite parses a number. ParseFloat alone would take "NaN" and "Inf", which pass every comparison.
func finite(s string) (float64, bool) {
	f, err := strconv.ParseFloat(s, 64)
	return f, err == nil && !math.IsNaN(f) && !math.IsInf(f, 0)
}

func (v validator) scalingDurations(r report, ann map[string]string) {
	v.scalingDuration(r, ann, ScalingWindow, MinScalingWindow, true)
	v.scalingDuration(r, ann, ScalingDownDelay, 0, true)
	v.scalingDuration(r, ann, ScalingRetention, 0, false)
}

func (v validator) scalingDuration(r report, ann map[string]string, suffix string, low time.Duration, whole bool) {
	key, value, ok := findScaling(ann, suffix)
	if !ok {
		return
	}
	switch d, err := time.ParseDuration(value); {
	case err != nil:
		r.at(key).invalid(value)
	case d < low || d > MaxScalingWindow:
		r.at(key).bounds(value, low, MaxScalingWindow)
	case whole && d.Truncate(time.Second) != d:
		r.at(key).generic("must be specified with at most second precision")
	}
}
