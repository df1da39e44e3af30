package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// thaw runs a command line and returns its exit code and what it printed.
func thaw(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	env := &verbs.Env{Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errs, Getenv: os.Getenv}
	root := newRootCommand(env)
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&errs)
	code = verbs.Main(t.Context(), root, env)
	return code, out.String(), errs.String()
}

// load is a time series of two hours with a burst every ten minutes.
func load(t *testing.T) string {
	var b strings.Builder
	b.WriteString("t,requests,duration_ms\n")
	for m := range 120 {
		n := "0"
		if m%10 == 0 {
			n = "30"
		}
		fmt.Fprintf(&b, "%d,%s,300\n", m*60, n)
	}
	path := filepath.Join(t.TempDir(), "load.csv")
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSimulate(t *testing.T) {
	trace := load(t)
	code, out, errs := thaw(t, "", "simulate", "--trace", trace, "--policy", "kpa", "--policy", "predictive", "--policy", "keep-alive:600s", "--oracle")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if code != 0 || len(lines) != 4 || !strings.Contains(lines[1], "kpa") || !strings.Contains(lines[3], "keep-alive:600s") {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	var results []struct {
		Policy   string  `json:"policy"`
		Requests int     `json:"requests"`
		Cold     float64 `json:"cold_rate"`
		Seconds  float64 `json:"instance_seconds"`
		VsOracle float64 `json:"vs_oracle"`
	}
	code, out, _ = thaw(t, "", "simulate", "--trace", trace, "-o", "json", "--oracle")
	if err := json.Unmarshal([]byte(out), &results); code != 0 || err != nil || len(results) != 2 {
		t.Fatalf("exit %d, %v\n%s", code, err, out)
	}
	for _, r := range results {
		if r.Requests != 360 || r.Seconds <= 0 || r.VsOracle < 0.9 {
			t.Errorf("%+v", r)
		}
	}
	svg := filepath.Join(t.TempDir(), "plot.svg")
	if code, _, errs := thaw(t, "", "simulate", "--trace", trace, "--policy", "predictive:120", "--svg", svg); code != 0 {
		t.Fatal(errs)
	}
	if b, err := os.ReadFile(svg); err != nil || !bytes.HasPrefix(b, []byte("<svg")) {
		t.Errorf("plot: %v, %.40s", err, b)
	}
}

func TestSimulateBadInput(t *testing.T) {
	trace := load(t)
	for _, c := range []struct {
		says string
		code int
		args []string
	}{
		{"no trace", verbs.ExitUsage, nil},
		{"magic", verbs.ExitUsage, []string{"--trace", trace, "--policy", "magic"}},
		{"[1s, 24h]", verbs.ExitUsage, []string{"--trace", trace, "--policy", "keep-alive:0s"}},
		{"only json", verbs.ExitUsage, []string{"--trace", trace, "-o", "yaml"}},
		{"--start-scale", verbs.ExitUsage, []string{"--trace", trace, "--start-scale", "NaN"}},
		{"one --trace", verbs.ExitUsage, []string{"--trace", trace, "--svg", "x.svg"}},
		{"columns t,requests", verbs.ExitFailed, []string{"--trace", trace + ".missing"}},
		{"column \"t\"", verbs.ExitFailed, []string{"--trace", "simulate_test.go"}},
		{"write plot", verbs.ExitFailed, []string{"--trace", trace, "--policy", "kpa", "--svg", "/nonexistent/x.svg"}},
	} {
		code, out, errs := thaw(t, "", append([]string{"simulate"}, c.args...)...)
		if code != c.code || !strings.Contains(errs, c.says) || out != "" {
			t.Errorf("%v: exit %d, want %d; %q%q, want %q", c.args, code, c.code, out, errs, c.says)
		}
	}
}

func TestAutoscalerSim(t *testing.T) {
	in := `{"type":"hello","version":1,"horizon_s":60,"max_instances":10,"functions":[{"i":0,"name":"f","app":"a","concurrency":2}]}
{"type":"tick","t":1,"f":[{"i":0,"c":[4.5],"m":6,"n":6,"q":4,"run":2,"r":1,"w":1}]}
{"type":"end"}
`
	want := `{"type":"ready","name":"predictive","interval_s":1,"on_demand":"zero"}
{"type":"scale","t":1,"d":[[0,3]]}
`
	if code, out, errs := thaw(t, in, "autoscaler", "sim"); code != 0 || out != want {
		t.Errorf("exit %d, %q\n%s", code, out, errs)
	}
	if code, _, errs := thaw(t, "{}\n", "autoscaler", "sim"); code != 1 || !strings.Contains(errs, "line 1") {
		t.Errorf("exit %d, %q", code, errs)
	}
	if code, _, errs := thaw(t, "", "autoscaler", "sim", "--policy", "magic"); code != verbs.ExitUsage || !strings.Contains(errs, "magic") {
		t.Errorf("exit %d, %q", code, errs)
	}
}
