package sim

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	goodHead      = `{"name":"t","unit_s":60,"horizon_s":600,"eval_from_s":60,"cold_sigma":0.4}`
	goodFunctions = "function,app,trigger,concurrency,batch,cold_p50_ms,dur_p0_ms,dur_p1_ms,dur_p25_ms,dur_p50_ms,dur_p75_ms,dur_p99_ms,dur_p100_ms\n" +
		"f,a,timer,1,1,606,1,2,3,4,5,6,7\ng,a,http,2,4,606,1,2,3,4,5,6,7\n"
	goodCounts = "function,t,invocations\nf,0,3\nf,5,1\ng,2,40\n"
	goodCalls  = "caller,callee,probability,at_fraction\nf,g,0.5,0.9\n"
	goodShifts = "t,from,to,weight\n100,f,g,0.1\n"
)

// write makes the files of a trace and returns its path.
func write(t *testing.T, head, functions, counts, calls, shifts string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "t")
	for suffix, text := range map[string]string{".json": head, ".functions.csv": functions, ".invocations.csv": counts, ".calls.csv": calls, ".shifts.csv": shifts} {
		if text == "" {
			continue
		}
		if err := os.WriteFile(path+suffix, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestLoadTrace(t *testing.T) {
	tr, err := LoadTrace(write(t, goodHead, goodFunctions, goodCounts, goodCalls, goodShifts))
	if err != nil {
		t.Fatal(err)
	}
	if len(tr.Functions) != 2 || tr.Functions[1].Batch != 4 || !tr.Functions[0].Timer || tr.Functions[0].Start != 0.606 || len(tr.Counts[0]) != 2 || len(tr.Calls) != 1 || len(tr.Shifts) != 1 {
		t.Errorf("%+v", tr)
	}
	play(t, tr, "kpa", Options{})
	if _, err := LoadTrace(write(t, goodHead, goodFunctions, goodCounts, "", "")); err != nil {
		t.Errorf("without calls and shifts: %v", err)
	}
}

func TestBadTraces(t *testing.T) {
	replace := func(s, old, new string) string {
		if !strings.Contains(s, old) {
			t.Fatalf("%q is not in %q", old, s)
		}
		return strings.Replace(s, old, new, 1)
	}
	type files struct{ head, functions, counts, calls, shifts string }
	for name, c := range map[string]struct {
		files
		says string
	}{
		"head":            {files{head: "{"}, "t.json"},
		"horizon":         {files{head: replace(goodHead, `600`, `-1`)}, "horizon_s"},
		"unit":            {files{head: replace(goodHead, `"unit_s":60`, `"unit_s":0`)}, "unit_s"},
		"eval":            {files{head: replace(goodHead, `"eval_from_s":60`, `"eval_from_s":600`)}, "eval_from_s"},
		"sigma":           {files{head: replace(goodHead, `0.4`, `-1`)}, "cold_sigma"},
		"columns":         {files{functions: replace(goodFunctions, "batch", "bunch")}, "columns"},
		"empty":           {files{functions: " "}, "columns"},
		"number":          {files{functions: replace(goodFunctions, "606", "x")}, "line 2: cold_p50_ms"},
		"NaN":             {files{functions: replace(goodFunctions, "606", "NaN")}, "line 2"},
		"order":           {files{functions: replace(goodFunctions, "1,2,3,4", "1,2,3,2")}, "percentile"},
		"concurrency":     {files{functions: replace(goodFunctions, "g,a,http,2", "g,a,http,0")}, "line 3: concurrency"},
		"same name":       {files{functions: replace(goodFunctions, "g,a", "f,a")}, "line 3: function"},
		"count of nobody": {files{counts: replace(goodCounts, "g,2", "h,2")}, "line 4: function is \"h\""},
		"slot":            {files{counts: replace(goodCounts, "f,5", "f,10")}, "[0, 9]"},
		"negative count":  {files{counts: replace(goodCounts, "g,2,40", "g,2,-40")}, "line 4"},
		"slot twice":      {files{counts: replace(goodCounts, "f,5", "f,0")}, "slot 0 twice"},
		"short row":       {files{counts: goodCounts + "f\n"}, "line 5"},
		"call":            {files{calls: replace(goodCalls, "0.5", "1.5")}, "probability"},
		"ring":            {files{calls: goodCalls + "g,f,1,1\n"}, "calls itself"},
		"shift":           {files{shifts: replace(goodShifts, "0.1", "2")}, "weight"},
	} {
		or := func(s, otherwise string) string {
			if s == "" {
				return otherwise
			}
			return s
		}
		_, err := LoadTrace(write(t, or(c.head, goodHead), or(c.functions, goodFunctions), or(c.counts, goodCounts), or(c.calls, goodCalls), or(c.shifts, goodShifts)))
		if !errors.Is(err, ErrTrace) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %v, want one that says %q", name, err, c.says)
		}
	}
	if _, err := LoadTrace(filepath.Join(t.TempDir(), "nothing")); err == nil || !strings.Contains(err.Error(), "columns t,requests") {
		t.Errorf("no file: %v", err)
	}
}

func TestSeries(t *testing.T) {
	tr, err := ReadSeries("s", strings.NewReader("t,requests,duration_ms,concurrency\n0,5,250,10\n60,0,,\n120,7,,\n300,1,,\n"))
	if err != nil {
		t.Fatal(err)
	}
	if tr.Unit != 60 || tr.Horizon != 360 || len(tr.Counts[0]) != 3 || tr.Counts[0][2] != (Count{5, 1}) || tr.Functions[0].Concurrency != 10 || tr.Functions[0].Service[3] != 0.25 {
		t.Errorf("%+v", tr)
	}
	for in, says := range map[string]string{
		"":                              "head line",
		"a,b\n1,2\n2,3\n":               `no column "t"`,
		"t,requests\n1,2\n":             "two rows",
		"t,requests\n1,2\n1,3\n":        "line 3: t",
		"t,requests\n1,2\nx,3\n":        "line 3: t",
		"t,requests\n1,2\n2,-3\n":       "line 3: requests",
		"t,requests\n1,2\n2,1.5\n":      "line 3: requests",
		"t,requests\n0,2\n99999999,3\n": "line 3: t",
	} {
		if _, err := ReadSeries("s", strings.NewReader(in)); !errors.Is(err, ErrTrace) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: error %v, want one that says %q", in, err, says)
		}
	}
}

func FuzzReadSeries(f *testing.F) {
	f.Add("t,requests,duration_ms,start_ms,concurrency\n0,5,250,100,10\n1,3,,,\n")
	f.Fuzz(func(t *testing.T, in string) {
		tr, err := ReadSeries("s", strings.NewReader(in))
		if err == nil && (tr.Unit <= 0 || tr.Horizon < tr.Unit || len(tr.Functions) != 1) {
			t.Fatalf("%+v", tr)
		}
	})
}

func FuzzFiles(f *testing.F) {
	f.Add(goodFunctions, goodCounts)
	f.Fuzz(func(t *testing.T, functions, counts string) {
		tr, err := LoadTrace(write(t, goodHead, functions+" ", counts+" ", "", ""))
		if err == nil && len(tr.Functions) == 0 {
			t.Fatal("a trace without functions")
		}
	})
}
