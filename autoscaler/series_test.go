package autoscaler

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestSeries replays three whole courses of load with default settings, containerConcurrency 10: 5 concurrent requests for 30 s, 100
// for 30 s, then none; instances follow the decision at once. Written as time:desired(excess burst capacity), changes only.
func TestSeries(t *testing.T) {
	for _, c := range []struct {
		name, want  string
		config      map[string]string
		annotations map[string]string
	}{
		{
			name: "linear",
			want: "0:1(-216) 30:3(-222) 32:8(-234) 34:13(-216) 36:15(-181) 94:7(-61) 96:6(-141) 98:5(-151) 104:4(-161) 108:3(-171) 112:2(-181) 116:1(-191) 120:0(-201)",
		},
		{
			name:        "weighted",
			want:        "0:1(-215) 30:12(-281) 32:15(-191) 92:7(-61) 94:3(-141) 96:1(-181) 120:0(-201)",
			annotations: map[string]string{"autoscaling.knative.dev/metric-aggregation-algorithm": "weighted-exponential"},
		},
		{
			name:   "slow up",
			want:   "0:1(-216) 30:2(-222) 32:4(-244) 34:8(-256) 36:15(-231) 96:7(-61) 98:5(-141) 104:4 108:3 112:2 116:1 120:0(-201)",
			config: map[string]string{"max-scale-up-rate": "2"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			config, err := ParseConfig(c.config)
			if err != nil {
				t.Fatal(err)
			}
			p, err := PolicyFor(config, c.annotations, 10)
			if err != nil {
				t.Fatal(err)
			}
			if p.Target != 7 || p.Total != 10 {
				t.Fatalf("target %v of %v, want 7 of 10", p.Target, p.Total)
			}
			got := course(p, 130)
			if !matches(got, c.want) {
				t.Errorf("\n got %s\nwant %s", got, c.want)
			}
		})
	}
}

// matches compares word by word; a wanted word without a burst capacity leaves that open.
func matches(got, want string) bool {
	g, w := strings.Fields(got), strings.Fields(want)
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] && !strings.HasPrefix(g[i], w[i]+"(") {
			return false
		}
	}
	return len(g) == len(w)
}

func course(p Policy, seconds int) string {
	stable, panicked := NewWindow(t0, p.StableWindow, p.Aggregation), NewWindow(t0, p.PanicWindow, p.Aggregation)
	m := NewMemory(t0, t0, p, 0)
	ready, last := 0, -1
	var b strings.Builder
	for s := range seconds {
		now := t0.Add(time.Duration(s) * time.Second)
		load := 0.0
		switch {
		case s < 30:
			load = 5
		case s < 60:
			load = 100
		}
		stable.Record(now, load)
		panicked.Record(now, load)
		if s%2 != 0 {
			continue
		}
		var d Decision
		d, m = Decide(now, p, Load{Ready: ready, Stable: stable.Average(now), Panic: panicked.Average(now), Measured: true}, m)
		if d.Desired != last {
			fmt.Fprintf(&b, "%d:%d(%d) ", s, d.Desired, d.ExcessBurstCapacity)
		}
		last, ready = d.Desired, d.Desired
	}
	return strings.TrimSpace(b.String())
}
