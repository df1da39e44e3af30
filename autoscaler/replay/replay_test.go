package replay

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
)

const recording = "testdata/kpa-decisions.jsonl.gz"

func plain(t testing.TB) []byte {
	t.Helper()
	f, err := os.Open(recording)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestGolden compares with what Knative's own autoscaler answered: every policy, average and decision.
func TestGolden(t *testing.T) {
	f, err := os.Open(recording)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	compressed, err := Compare(f, func(d Difference) {
		if d.Count <= 3 {
			t.Error(d)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Result{Cases: 80, Decisions: 7200}); compressed != want || !compressed.Same() {
		t.Errorf("compared %+v, want %+v", compressed, want)
	}
	again, err := Compare(bytes.NewReader(plain(t)), func(Difference) {})
	if err != nil || again != compressed {
		t.Errorf("without compression: %+v, %v", again, err)
	}
}

// TestNotices changes one output after another, and each has to be found where it is: the control of TestGolden.
func TestNotices(t *testing.T) {
	lines := bytes.SplitAfter(plain(t), []byte("\n"))
	for _, c := range []struct{ what, old, to string }{
		{"desired", `"desired":\d+`, `"desired":4711`},
		{"ebc", `"ebc":-?\d+`, `"ebc":4711`},
		{"stable", `"stable":[0-9.]+`, `"stable":4711.000001`},
		{"panic", `"panic":[0-9.]+`, `"panic":4711.000001`},
		{"panic_mode", `"panic_mode":false`, `"panic_mode":true`},
		{"valid", `"valid":true`, `"valid":false`},
		{"no_data", `"eval":true,"stable"`, `"eval":true,"no_data":true,"stable"`},
		{"spec", `"panic_window_s":\d+`, `"panic_window_s":59`},
	} {
		old := regexp.MustCompile(c.old)
		changed := 0
		var out []byte
		for i, l := range lines {
			if i%97 == 0 && old.Match(l) {
				l = old.ReplaceAll(l, []byte(c.to))
				changed++
			} else if c.what == "spec" && bytes.Contains(l, []byte(`"case":7,`)) && old.Match(l) {
				l = old.ReplaceAll(l, []byte(c.to))
				changed++
			}
			out = append(out, l...)
		}
		var found []string
		res, err := Compare(bytes.NewReader(out), func(d Difference) { found = append(found, d.What) })
		if err != nil || changed == 0 || res.Different != changed || res.Same() {
			t.Errorf("%s: changed %d, result %+v, %v", c.what, changed, res, err)
		}
		for _, f := range found {
			if f != c.what {
				t.Errorf("%s: found %v", c.what, found)
				break
			}
		}
	}
}

const aCase = `{"type":"case","case":1,"config_map":{},"annotations":{},"container_concurrency":10,"ready_at_start":0,"spec":{"metric":"concurrency","target":7,"total":10,"target_burst_capacity":211,"panic_threshold":2,"stable_window_s":60,"panic_window_s":6,"max_scale_up_rate":1000,"max_scale_down_rate":2,"scale_down_delay_s":0,"activation_scale":0,"initial_scale":1,"reachable":true,"min_scale":0,"max_scale":0}}
`

func TestBadRecordings(t *testing.T) {
	step := `{"type":"step","case":1,"t":0,"stats":[{"at":0,"c":5}],"ready":0,"eval":true,"stable":5,"panic":5,"valid":true,"desired":1,"ebc":-216,"panic_mode":false}`
	res, err := Compare(strings.NewReader(aCase+step), func(d Difference) { t.Error(d) })
	if err != nil || !res.Same() {
		t.Fatalf("the sound one: %+v, %v", res, err)
	}
	for _, c := range []struct{ name, text, want string }{
		{"no JSON", "hello", "line 1: "},
		{"another type", `{"type":"other"}`, `type "other"`},
		{"no case", step, "outside"},
		{"no spec", `{"type":"case","case":1}`, "no spec"},
		{"no desired", aCase + strings.Replace(step, `"desired":1,`, "", 1), `no "desired"`},
		{"no valid", aCase + strings.Replace(step, `"valid":true,`, "", 1), `no "valid"`},
		{"time", aCase + strings.Replace(step, `"t":0`, `"t":1e300`, 1), "out of range"},
		{"time of a report", aCase + strings.Replace(step, `"at":0`, `"at":-1e12`, 1), "out of range"},
		{"bad key", strings.Replace(aCase, `"config_map":{}`, `"config_map":{"stable-window":"1s"}`, 1), "stable-window"},
		{"bad annotation", strings.Replace(aCase, `"annotations":{}`, `"annotations":{"autoscaling.knative.dev/window":"1s"}`, 1), "window"},
		{"cut off", "\x1f\x8b\x08", ""},
	} {
		_, err := Compare(strings.NewReader(c.text), func(Difference) {})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q in it", c.name, err, c.want)
		}
	}
	cut := new(bytes.Buffer)
	z := gzip.NewWriter(cut)
	_, _ = z.Write([]byte(aCase + step))
	_ = z.Close()
	if _, err := Compare(bytes.NewReader(cut.Bytes()[:cut.Len()-9]), func(Difference) {}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("half a file: %v", err)
	}
	for _, text := range []string{"", "\n\n", aCase} {
		if res, err := Compare(strings.NewReader(text), func(Difference) {}); err != nil || res.Same() {
			t.Errorf("%q counts as equal: %+v, %v", text, res, err)
		}
	}
}

func FuzzCompare(f *testing.F) {
	f.Add([]byte(aCase + `{"type":"step","case":1,"t":2,"stats":[{"at":1e8,"c":1e308},{"at":-3,"c":1e308}],"ready":-5,"eval":true,"valid":false}`))
	f.Add([]byte(aCase))
	f.Fuzz(func(t *testing.T, b []byte) {
		found := 0
		res, _ := Compare(bytes.NewReader(b), func(Difference) { found++ })
		if found != res.Different {
			t.Errorf("reported %d, counted %d", found, res.Different)
		}
	})
}
