package autoscaler

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"math"
	"os"
	"testing"
	"time"
)

// goldenLine is a line of kpa-decisions.jsonl: a case with the inputs of its policy and the policy itself, or a step of the
// case last begun with the reports before it and the decision after it.
type goldenLine struct {
	Type string `json:"type"`
	Case int    `json:"case"`

	ConfigMap            map[string]string `json:"config_map"`
	Annotations          map[string]string `json:"annotations"`
	ContainerConcurrency int               `json:"container_concurrency"`
	Unreachable          bool              `json:"unreachable"`
	ReadyAtStart         int               `json:"ready_at_start"`
	Spec                 *goldenSpec       `json:"spec"`

	T         float64      `json:"t"`
	Stats     []goldenStat `json:"stats"`
	Ready     int          `json:"ready"`
	Eval      bool         `json:"eval"`
	NoData    bool         `json:"no_data"`
	Stable    float64      `json:"stable"`
	Panic     float64      `json:"panic"`
	Valid     bool         `json:"valid"`
	Desired   int          `json:"desired"`
	EBC       int          `json:"ebc"`
	PanicMode bool         `json:"panic_mode"`
}

type goldenStat struct {
	At float64 `json:"at"`
	C  float64 `json:"c"`
	PC float64 `json:"pc"`
	R  float64 `json:"r"`
	PR float64 `json:"pr"`
}

type goldenSpec struct {
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

func specOf(p Policy) goldenSpec {
	return goldenSpec{
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
		MinScale:            p.minScale(),
		MaxScale:            p.MaxScale,
	}
}

// goldenRun replays one case: the pure core with the windows that a caller would own.
type goldenRun struct {
	policy        Policy
	stable, panic *Window
	memory        Memory
}

// t0 is an even whole second, as the cases assume.
var t0 = time.Unix(1_700_000_000, 0)

func at(t float64) time.Time { return t0.Add(time.Duration(math.Round(t * 1e9))) }

func newGoldenRun(t *testing.T, l *goldenLine) *goldenRun {
	t.Helper()
	config, err := ParseConfig(l.ConfigMap)
	if err != nil {
		t.Fatalf("case %d: %v", l.Case, err)
	}
	p, err := PolicyFor(config, l.Annotations, l.ContainerConcurrency)
	if err != nil {
		t.Fatalf("case %d: %v", l.Case, err)
	}
	p.Reachable = !l.Unreachable
	return &goldenRun{
		policy: p,
		stable: NewWindow(t0, p.StableWindow, p.Aggregation),
		panic:  NewWindow(t0, p.PanicWindow, p.Aggregation),
		memory: NewMemory(t0, t0, p, l.ReadyAtStart),
	}
}

func (g *goldenRun) record(s goldenStat) {
	v := s.C - s.PC
	if g.policy.Metric == RPS {
		v = s.R - s.PR
	}
	g.stable.Record(at(s.At), v)
	g.panic.Record(at(s.At), v)
}

func (g *goldenRun) load(now time.Time, ready int) Load {
	return Load{
		Ready:    ready,
		Stable:   g.stable.Average(now),
		Panic:    g.panic.Average(now),
		Measured: !g.stable.Empty(now),
	}
}

// TestGolden compares with what Knative's own autoscaler answered: every policy, average and decision.
func TestGolden(t *testing.T) {
	f, err := os.Open("testdata/kpa-decisions.jsonl.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	in := bufio.NewScanner(z)
	in.Buffer(nil, 1<<20)

	var run *goldenRun
	cases, decisions, wrong := 0, 0, 0
	for in.Scan() {
		l := &goldenLine{}
		if err := json.Unmarshal(in.Bytes(), l); err != nil {
			t.Fatal(err)
		}
		if l.Type == "case" {
			cases++
			run = newGoldenRun(t, l)
			if got := specOf(run.policy); got != *l.Spec {
				t.Errorf("case %d: policy\n got %+v\nwant %+v", l.Case, got, *l.Spec)
			}
			continue
		}
		for _, s := range l.Stats {
			run.record(s)
		}
		if !l.Eval {
			continue
		}
		decisions++
		now := at(l.T)
		load := run.load(now, l.Ready)
		var d Decision
		d, run.memory = Decide(now, run.policy, load, run.memory)

		same := d.Valid == l.Valid && load.Measured == !l.NoData && d.PanicMode == l.PanicMode
		if l.Valid {
			same = same && math.Abs(load.Stable-l.Stable) <= 1e-9 && math.Abs(load.Panic-l.Panic) <= 1e-9 &&
				d.Desired == l.Desired && d.ExcessBurstCapacity == l.EBC
		}
		if !same {
			if wrong++; wrong <= 20 {
				t.Errorf("case %d t=%v:\n got %+v load %+v\nwant stable %v panic %v valid %v desired %d ebc %d panic mode %v",
					l.Case, l.T, d, load, l.Stable, l.Panic, l.Valid, l.Desired, l.EBC, l.PanicMode)
			}
		}
	}
	if err := in.Err(); err != nil {
		t.Fatal(err)
	}
	if cases != 80 || decisions != 7200 {
		t.Errorf("compared %d cases and %d decisions, the file has 80 and 7200", cases, decisions)
	}
	t.Logf("%d cases, %d decisions, %d different", cases, decisions, wrong)
}
