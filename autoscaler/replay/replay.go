// Package replay puts recorded decisions of Knative's autoscaler to the autoscaler's pure core and compares: every policy, every
// average, every decision. It is what `thaw autoscaler replay` and the test over the recorded file run.
//
// A recording has one JSON object on each line: a case (configuration, annotations and the policy that they gave), or a step of the case
// last begun (reports, ready instances, and with "eval" the decision that was made then). It may be compressed with gzip.
package replay

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/thawrun/thaw/autoscaler"
)

// Bounds of a recording.
const (
	maxLine    = 16 << 20 // bytes; a step with 100,000 reports
	maxSeconds = 1e9      // of t and at: what a Duration holds with room to spare
)

// tolerance is how far two averages may lie apart: they are rounded to six decimals.
const tolerance = 1e-9

// ErrFormat is wrapped by errors about lines that are no part of a recording.
var ErrFormat = errors.New("not a recording of decisions")

// Result is what Compare has counted.
type Result struct {
	Cases     int
	Decisions int
	Different int // policies and decisions that were not equal
}

// Same says that something was compared and all of it was equal.
func (r Result) Same() bool { return r.Cases > 0 && r.Decisions > 0 && r.Different == 0 }

// Difference is a policy or decision that was not equal.
type Difference struct {
	Case  int
	T     float64 // seconds since the beginning of the case; NaN: the policy
	What  string  // the name of the field in the recording
	Got   any
	Want  any
	Count int // differences of this case so far, this one included
}

func (d Difference) String() string {
	where := fmt.Sprintf("t=%v", d.T)
	if math.IsNaN(d.T) {
		where = "spec"
	}
	return fmt.Sprintf("case %d %s: %s is %v, recorded %v", d.Case, where, d.What, d.Got, d.Want)
}

// Compare reads a recording and reports each difference as it is found: at most one for each policy and decision. Decisions after
// a difference are compared all the same, with the memory that our own ones left. The error is about reading; what was counted
// before it stands in the result.
func Compare(r io.Reader, report func(Difference)) (Result, error) {
	r, err := uncompressed(r)
	if err != nil {
		return Result{}, err
	}
	in := bufio.NewScanner(r)
	in.Buffer(nil, maxLine)
	c := comparison{report: report}
	for n := 1; in.Scan(); n++ {
		if len(strings.TrimSpace(in.Text())) == 0 {
			continue
		}
		if err := c.line(in.Bytes()); err != nil {
			return c.result, fmt.Errorf("line %d: %w", n, err)
		}
	}
	if err := in.Err(); err != nil {
		return c.result, fmt.Errorf("after %d decisions: %w", c.result.Decisions, err)
	}
	return c.result, nil
}

// uncompressed looks for gzip's first two bytes.
func uncompressed(r io.Reader) (io.Reader, error) {
	b := bufio.NewReader(r)
	if magic, _ := b.Peek(2); string(magic) != "\x1f\x8b" { // an error is the scanner's to find again
		return b, nil
	}
	z, err := gzip.NewReader(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return z, nil
}

// line is one line of a recording. What has to be there in a step that was evaluated is a pointer.
type line struct {
	Type string `json:"type"`
	Case int    `json:"case"`

	ConfigMap            map[string]string `json:"config_map"`
	Annotations          map[string]string `json:"annotations"`
	ContainerConcurrency int               `json:"container_concurrency"`
	Unreachable          bool              `json:"unreachable"`
	ReadyAtStart         int               `json:"ready_at_start"`
	Spec                 *spec             `json:"spec"`

	T         float64  `json:"t"`
	Stats     []stat   `json:"stats"`
	Ready     int      `json:"ready"`
	Eval      bool     `json:"eval"`
	NoData    bool     `json:"no_data"`
	Stable    *float64 `json:"stable"`
	Panic     *float64 `json:"panic"`
	Valid     *bool    `json:"valid"`
	Desired   *int     `json:"desired"`
	EBC       *int     `json:"ebc"`
	PanicMode bool     `json:"panic_mode"`
}

// stat is a report: average concurrency and requests of a second, and their proxied parts.
type stat struct {
	At float64 `json:"at"`
	C  float64 `json:"c"`
	PC float64 `json:"pc"`
	R  float64 `json:"r"`
	PR float64 `json:"pr"`
}

// spec is a resolved policy.
type spec struct {
	Metric              string  `json:"metric"`
	Target              float64 `json:"target"`
	Total               float64 `json:"total"`
	TargetBurstCapacity float64 `json:"target_burst_capacity"`
	PanicThreshold      float64 `json:"panic_threshold"`
	StableWindow        float64 `json:"stable_window_s"`
	PanicWindow         float64 `json:"panic_window_s"`
	MaxScaleUpRate      float64 `json:"max_scale_up_rate"`
	MaxScaleDownRate    float64 `json:"max_scale_down_rate"`
	ScaleDownDelay      float64 `json:"scale_down_delay_s"`
	ActivationScale     int     `json:"activation_scale"`
	InitialScale        int     `json:"initial_scale"`
	Reachable           bool    `json:"reachable"`
	MinScale            int     `json:"min_scale"`
	MaxScale            int     `json:"max_scale"`
}

func specOf(p autoscaler.Policy) spec {
	return spec{
		Metric:              p.Metric.String(),
		Target:              p.Target,
		Total:               p.Total,
		TargetBurstCapacity: p.TargetBurstCapacity,
		PanicThreshold:      p.PanicThreshold,
		StableWindow:        p.StableWindow.Seconds(),
		PanicWindow:         p.PanicWindow.Seconds(),
		MaxScaleUpRate:      p.MaxScaleUpRate,
		MaxScaleDownRate:    p.MaxScaleDownRate,
		ScaleDownDelay:      p.ScaleDownDelay.Seconds(),
		ActivationScale:     p.ActivationScale,
		InitialScale:        p.InitialScale,
		Reachable:           p.Reachable,
		MinScale:            p.LeastScale(),
		MaxScale:            p.MaxScale,
	}
}

// differs compares floats up to rounding, everything else exactly.
func (s spec) differs(o spec) bool {
	a, b := s, o
	for _, f := range [][2]*float64{{&a.Target, &b.Target}, {&a.Total, &b.Total}, {&a.TargetBurstCapacity, &b.TargetBurstCapacity}, {&a.PanicThreshold, &b.PanicThreshold}} {
		if near(*f[0], *f[1]) {
			*f[0] = *f[1]
		}
	}
	return a != b
}

// comparison is one recording being read.
type comparison struct {
	report func(Difference)
	result Result

	// The present case: the pure core with the windows that a caller owns.
	number        int
	begun         bool
	policy        autoscaler.Policy
	stable, panic *autoscaler.Window
	memory        autoscaler.Memory
	different     int
}

// origin is an even whole second, as the steps assume.
var origin = time.Unix(1_700_000_000, 0)

func at(t float64) (time.Time, error) {
	if !(math.Abs(t) <= maxSeconds) {
		return time.Time{}, fmt.Errorf("%w: a time of %v s is out of range", ErrFormat, t)
	}
	return origin.Add(time.Duration(math.Round(t * 1e9))), nil
}

func near(a, b float64) bool { return math.Abs(a-b) <= tolerance }

func (c *comparison) line(b []byte) error {
	var l line
	if err := json.Unmarshal(b, &l); err != nil {
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	switch l.Type {
	case "case":
		return c.begin(&l)
	case "step":
		return c.step(&l)
	}
	return fmt.Errorf("%w: type %q; there are case and step", ErrFormat, l.Type)
}

func (c *comparison) begin(l *line) error {
	if l.Spec == nil {
		return fmt.Errorf("%w: case %d has no spec to compare with", ErrFormat, l.Case)
	}
	config, err := autoscaler.ParseConfig(l.ConfigMap)
	if err != nil {
		return fmt.Errorf("case %d: %w", l.Case, err)
	}
	p, err := autoscaler.PolicyFor(config, l.Annotations, l.ContainerConcurrency)
	if err != nil {
		return fmt.Errorf("case %d: %w", l.Case, err)
	}
	p.Reachable = !l.Unreachable
	c.result.Cases++
	c.number, c.begun, c.different = l.Case, true, 0
	c.policy = p
	c.stable = autoscaler.NewWindow(origin, p.StableWindow, p.Aggregation)
	c.panic = autoscaler.NewWindow(origin, p.PanicWindow, p.Aggregation)
	c.memory = autoscaler.NewMemory(origin, origin, p, l.ReadyAtStart)
	if got := specOf(p); got.differs(*l.Spec) {
		c.differ(math.NaN(), "spec", fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", *l.Spec))
	}
	return nil
}

func (c *comparison) step(l *line) error {
	if !c.begun || l.Case != c.number {
		return fmt.Errorf("%w: a step of case %d outside of it", ErrFormat, l.Case)
	}
	now, err := at(l.T)
	if err != nil {
		return err
	}
	for _, s := range l.Stats {
		if err := c.record(s); err != nil {
			return err
		}
	}
	if !l.Eval {
		return nil
	}
	if err := l.complete(); err != nil {
		return err
	}
	load := autoscaler.Load{
		Ready:    l.Ready,
		Stable:   c.stable.Average(now),
		Panic:    c.panic.Average(now),
		Measured: !c.stable.Empty(now),
	}
	var d autoscaler.Decision
	d, c.memory = autoscaler.Decide(now, c.policy, load, c.memory)
	c.result.Decisions++
	c.compare(l, load, d)
	return nil
}

func (c *comparison) record(s stat) error {
	when, err := at(s.At)
	if err != nil {
		return err
	}
	v := s.C - s.PC
	if c.policy.Metric == autoscaler.RPS {
		v = s.R - s.PR
	}
	c.stable.Record(when, v)
	c.panic.Record(when, v)
	return nil
}

// complete says what an evaluated step lacks: a missing output must not pass as equal.
func (l *line) complete() error {
	for _, f := range []struct {
		name    string
		missing bool
	}{
		{"valid", l.Valid == nil},
		{"stable", l.Stable == nil && l.hasAnswer()},
		{"panic", l.Panic == nil && l.hasAnswer()},
		{"desired", l.Desired == nil && l.hasAnswer()},
		{"ebc", l.EBC == nil && l.hasAnswer()},
	} {
		if f.missing {
			return fmt.Errorf("%w: case %d t=%v is evaluated but has no %q", ErrFormat, l.Case, l.T, f.name)
		}
	}
	return nil
}

func (l *line) hasAnswer() bool { return l.Valid != nil && *l.Valid }

// compare reports the first output that differs.
func (c *comparison) compare(l *line, load autoscaler.Load, d autoscaler.Decision) {
	type output struct {
		what      string
		got, want any
		same      bool
	}
	outputs := []output{
		{"valid", d.Valid, *l.Valid, d.Valid == *l.Valid},
		{"no_data", !load.Measured, l.NoData, load.Measured != l.NoData},
		{"panic_mode", d.PanicMode, l.PanicMode, d.PanicMode == l.PanicMode},
	}
	if l.hasAnswer() {
		outputs = append(outputs,
			output{"stable", load.Stable, *l.Stable, near(load.Stable, *l.Stable)},
			output{"panic", load.Panic, *l.Panic, near(load.Panic, *l.Panic)},
			output{"desired", d.Desired, *l.Desired, d.Desired == *l.Desired},
			output{"ebc", d.ExcessBurstCapacity, *l.EBC, d.ExcessBurstCapacity == *l.EBC})
	}
	for _, o := range outputs {
		if !o.same {
			c.differ(l.T, o.what, o.got, o.want)
			return
		}
	}
}

func (c *comparison) differ(t float64, what string, got, want any) {
	c.result.Different++
	c.different++
	c.report(Difference{Case: c.number, T: t, What: what, Got: got, Want: want, Count: c.different})
}
