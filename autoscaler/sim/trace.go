package sim

import (
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Bounds of a trace, so that a wrong file ends in an error and not in a full memory.
const (
	maxFunctions   = 1_000_000
	maxRows        = 50_000_000
	maxHorizon     = 366 * 86400 // seconds
	maxPerSlot     = 10_000_000  // requests
	maxConcurrency = 100_000
	maxSeconds     = 86400 // of a service or start time
)

// ErrTrace is wrapped by every error about what a trace contains.
var ErrTrace = errors.New("bad trace")

// Trace is a series of requests of several functions.
type Trace struct {
	Name       string
	Unit       float64 // seconds that one slot lasts
	Horizon    float64 // seconds that the trace lasts
	EvalFrom   float64 // metrics count from here, seconds
	StartSigma float64 // of the lognormal start time
	Functions  []Function
	Counts     [][]Count // of each function, by time
	Calls      []Edge
	Shifts     []Shift // by time
}

// Function is one function of a trace.
type Function struct {
	Name        string
	App         string
	Timer       bool       // requests come at even distances within a slot
	Concurrency int        // hard limit of one instance
	Batch       float64    // mean number of requests that come together
	Start       float64    // median start time, seconds
	Service     [7]float64 // percentiles 0, 1, 25, 50, 75, 99, 100 of the service time, seconds
}

// Count is the number of requests in one slot.
type Count struct{ Slot, N int }

// Edge says that a run of Caller calls Callee, with a probability, when a share of its service time is over.
type Edge struct {
	Caller, Callee int
	Probability    float64
	At             float64
}

// Load reads a trace: PATH/NAME when path is a prefix for which PATH.functions.csv exists, else a plain CSV time series.
func LoadTrace(path string) (*Trace, error) {
	prefix := strings.TrimSuffix(path, ".json")
	if _, err := os.Stat(prefix + ".functions.csv"); err == nil {
		return loadFiles(prefix)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open trace: %w (a trace is NAME.json, NAME.functions.csv, NAME.invocations.csv, or one CSV file with the columns t,requests)", err)
	}
	defer f.Close()
	return ReadSeries(strings.TrimSuffix(filepath.Base(path), filepath.Ext(path)), f)
}

func loadFiles(prefix string) (*Trace, error) {
	t := &Trace{}
	if err := t.readHead(prefix + ".json"); err != nil {
		return nil, err
	}
	index := make(map[string]int)
	steps := []struct {
		suffix   string
		optional bool
		columns  []string
		row      func(r row) error
	}{
		{".functions.csv", false, functionColumns, func(r row) error { return t.addFunction(r, index) }},
		{".invocations.csv", false, []string{"function", "t", "invocations"}, func(r row) error { return t.addCount(r, index) }},
		{".calls.csv", true, []string{"caller", "callee", "probability", "at_fraction"}, func(r row) error { return t.addCall(r, index) }},
		{".shifts.csv", true, []string{"t", "from", "to", "weight"}, func(r row) error { return t.addShift(r, index) }},
	}
	for _, s := range steps {
		f, err := os.Open(prefix + s.suffix)
		if s.optional && errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open trace: %w", err)
		}
		err = table(f, s.columns, func(r row, _ map[string]int) error { return s.row(r) })
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s%s: %w", prefix, s.suffix, err)
		}
	}
	return t, t.finish()
}

func (t *Trace) readHead(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("open trace: %w", err)
	}
	var h struct {
		Name     string  `json:"name"`
		Unit     float64 `json:"unit_s"`
		Horizon  float64 `json:"horizon_s"`
		EvalFrom float64 `json:"eval_from_s"`
		Sigma    float64 `json:"cold_sigma"`
	}
	if err := json.Unmarshal(data, &h); err != nil {
		return fmt.Errorf("%s: %w: %v", path, ErrTrace, err)
	}
	t.Name, t.Unit, t.Horizon, t.EvalFrom, t.StartSigma = h.Name, h.Unit, h.Horizon, h.EvalFrom, h.Sigma
	if err := t.checkHead(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (t *Trace) checkHead() error {
	switch {
	case !(t.Horizon > 0) || t.Horizon > maxHorizon:
		return fmt.Errorf("%w: horizon_s is %v, must be above 0 and at most %d", ErrTrace, t.Horizon, maxHorizon)
	case !(t.Unit > 0) || t.Unit > t.Horizon:
		return fmt.Errorf("%w: unit_s is %v, must be above 0 and at most horizon_s", ErrTrace, t.Unit)
	case !(t.EvalFrom >= 0) || t.EvalFrom >= t.Horizon:
		return fmt.Errorf("%w: eval_from_s is %v, must be in [0, horizon_s)", ErrTrace, t.EvalFrom)
	case !(t.StartSigma >= 0) || t.StartSigma > 5:
		return fmt.Errorf("%w: cold_sigma is %v, must be in [0, 5]", ErrTrace, t.StartSigma)
	}
	return nil
}

var functionColumns = []string{"function", "app", "trigger", "concurrency", "batch", "cold_p50_ms",
	"dur_p0_ms", "dur_p1_ms", "dur_p25_ms", "dur_p50_ms", "dur_p75_ms", "dur_p99_ms", "dur_p100_ms"}

func (t *Trace) addFunction(r row, index map[string]int) error {
	f := Function{Name: r.text(0), App: r.text(1), Timer: r.text(2) == "timer"}
	f.Concurrency = r.int(3, 1, maxConcurrency)
	f.Batch = r.float(4, 1, maxPerSlot)
	f.Start = r.float(5, 0, maxSeconds*1000) / 1000
	for i := range f.Service {
		f.Service[i] = r.float(6+i, 0, maxSeconds*1000) / 1000
		if i > 0 && f.Service[i] < f.Service[i-1] {
			r.fail(6+i, "must not be less than the percentile before it")
		}
	}
	if _, twice := index[f.Name]; twice || f.Name == "" {
		r.fail(0, "must be a name of its own")
	}
	if len(t.Functions) >= maxFunctions {
		return fmt.Errorf("%w: more than %d functions", ErrTrace, maxFunctions)
	}
	index[f.Name] = len(t.Functions)
	t.Functions = append(t.Functions, f)
	t.Counts = append(t.Counts, nil)
	return *r.err
}

func (t *Trace) addCount(r row, index map[string]int) error {
	f := r.function(0, index)
	c := Count{r.int(1, 0, int(math.Ceil(t.Horizon/t.Unit))-1), r.int(2, 0, maxPerSlot)}
	if *r.err == nil && c.N > 0 {
		t.Counts[f] = append(t.Counts[f], c)
	}
	return *r.err
}

func (t *Trace) addCall(r row, index map[string]int) error {
	t.Calls = append(t.Calls, Edge{r.function(0, index), r.function(1, index), r.float(2, 0, 1), r.float(3, 0, 1)})
	return *r.err
}

func (t *Trace) addShift(r row, index map[string]int) error {
	t.Shifts = append(t.Shifts, Shift{r.float(0, 0, maxHorizon), r.function(1, index), r.function(2, index), r.float(3, 0, 1)})
	return *r.err
}

// finish sorts and checks what single rows cannot show.
func (t *Trace) finish() error {
	if len(t.Functions) == 0 {
		return fmt.Errorf("%w: no functions", ErrTrace)
	}
	for i, c := range t.Counts {
		slices.SortStableFunc(c, func(a, b Count) int { return a.Slot - b.Slot })
		for j := 1; j < len(c); j++ {
			if c[j].Slot == c[j-1].Slot {
				return fmt.Errorf("%w: function %s has slot %d twice", ErrTrace, t.Functions[i].Name, c[j].Slot)
			}
		}
	}
	slices.SortStableFunc(t.Shifts, func(a, b Shift) int {
		switch {
		case a.At < b.At:
			return -1
		case a.At > b.At:
			return 1
		}
		return 0
	})
	return t.checkCycles()
}

// checkCycles refuses functions that call each other in a ring: with probability 1 such a run would never end.
func (t *Trace) checkCycles() error {
	const seen, done = 1, 2
	next := make([][]int, len(t.Functions))
	for _, c := range t.Calls {
		next[c.Caller] = append(next[c.Caller], c.Callee)
	}
	state := make([]uint8, len(t.Functions))
	var visit func(f int) error
	visit = func(f int) error {
		if state[f] == seen {
			return fmt.Errorf("%w: function %s calls itself, directly or through others", ErrTrace, t.Functions[f].Name)
		}
		if state[f] == done {
			return nil
		}
		state[f] = seen
		for _, g := range next[f] {
			if err := visit(g); err != nil {
				return err
			}
		}
		state[f] = done
		return nil
	}
	for f := range t.Functions {
		if err := visit(f); err != nil {
			return err
		}
	}
	return nil
}

// ReadSeries reads a plain time series: CSV with a head line and the columns t (seconds, rising) and requests (since the
// row before), optionally duration_ms, start_ms and concurrency, of which the first row counts. It is one function.
func ReadSeries(name string, in io.Reader) (*Trace, error) {
	t := &Trace{Name: name, StartSigma: 0.4}
	f := Function{Name: name, App: name, Concurrency: 1, Batch: 1, Start: 1}
	times, counts := []float64(nil), []int(nil)
	err := table(in, nil, func(r row, column map[string]int) error {
		if len(times) == 0 {
			for _, name := range []string{"t", "requests"} {
				if _, ok := column[name]; !ok {
					return fmt.Errorf("%w: line 1: no column %q; a time series has t and requests", ErrTrace, name)
				}
			}
			duration := 100.0
			optional := func(name string, low, high float64, set func(float64)) {
				if c, ok := column[name]; ok {
					set(r.float(c, low, high))
				}
			}
			optional("duration_ms", 0, maxSeconds*1000, func(v float64) { duration = v })
			optional("start_ms", 0, maxSeconds*1000, func(v float64) { f.Start = v / 1000 })
			optional("concurrency", 1, maxConcurrency, func(v float64) { f.Concurrency = int(v) })
			for i := range f.Service {
				f.Service[i] = duration / 1000
			}
		}
		at, n := r.float(column["t"], 0, maxHorizon), r.int(column["requests"], 0, maxPerSlot)
		if len(times) > 0 && at <= times[len(times)-1] {
			r.fail(column["t"], "must be later than the row before")
		}
		times, counts = append(times, at), append(counts, n)
		return *r.err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(times) < 2 {
		return nil, fmt.Errorf("%s: %w: a time series needs two rows or more", name, ErrTrace)
	}
	return t.fromSeries(f, times, counts)
}

// fromSeries takes the smallest distance of two rows as the slot; rows that are further apart leave slots without requests.
func (t *Trace) fromSeries(f Function, times []float64, counts []int) (*Trace, error) {
	t.Unit = times[1] - times[0]
	for i := 1; i < len(times); i++ {
		t.Unit = math.Min(t.Unit, times[i]-times[i-1])
	}
	t.Horizon = times[len(times)-1] - times[0] + t.Unit
	var list []Count
	for i, n := range counts {
		if n > 0 {
			list = append(list, Count{int((times[i]-times[0])/t.Unit + 0.5), n})
		}
	}
	t.Functions, t.Counts = []Function{f}, [][]Count{list}
	if err := t.checkHead(); err != nil {
		return nil, err
	}
	return t, t.finish()
}

// row is one line of a CSV file; the first thing wrong with it is kept.
type row struct {
	fields  []string
	columns []string
	line    int
	err     *error
}

func (r row) fail(column int, want string) {
	if *r.err == nil {
		*r.err = fmt.Errorf("%w: line %d: %s is %q: %s", ErrTrace, r.line, r.columns[column], clip(r.fields[column]), want)
	}
}

// clip keeps a field short enough for an error message.
func clip(s string) string {
	if len(s) > 60 {
		return s[:60] + "…"
	}
	return s
}

func (r row) text(column int) string { return r.fields[column] }

func (r row) float(column int, low, high float64) float64 {
	v, err := strconv.ParseFloat(strings.TrimSpace(r.fields[column]), 64)
	if err != nil || !(v >= low) || v > high {
		r.fail(column, fmt.Sprintf("must be a number in [%v, %v]", low, high))
		return low
	}
	return v
}

func (r row) int(column, low, high int) int {
	v, err := strconv.Atoi(strings.TrimSpace(r.fields[column]))
	if err != nil || v < low || v > high {
		r.fail(column, fmt.Sprintf("must be a whole number in [%d, %d]", low, high))
		return low
	}
	return v
}

func (r row) function(column int, index map[string]int) int {
	f, ok := index[r.fields[column]]
	if !ok {
		r.fail(column, "is not in the list of functions")
	}
	return f
}

// table reads a CSV file with a head line, which must name exactly the columns if they are given.
func table(in io.Reader, columns []string, each func(r row, column map[string]int) error) error {
	c := csv.NewReader(in)
	c.ReuseRecord = true
	head, err := c.Read()
	if err != nil {
		return fmt.Errorf("%w: line 1: no head line: %v", ErrTrace, err)
	}
	head = slices.Clone(head) // the reader's own is used again
	column := make(map[string]int)
	for i, name := range head {
		head[i] = strings.TrimSpace(name)
		column[head[i]] = i
	}
	if columns != nil && !slices.Equal(head, columns) {
		return fmt.Errorf("%w: line 1: the columns are %s, must be %s", ErrTrace, clip(strings.Join(head, ",")), strings.Join(columns, ","))
	}
	for line := 2; ; line++ {
		fields, err := c.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %v", ErrTrace, err)
		}
		if line > maxRows {
			return fmt.Errorf("%w: more than %d lines", ErrTrace, maxRows)
		}
		var wrong error
		if err := each(row{fields: fields, columns: head, line: line, err: &wrong}, column); err != nil {
			return err
		}
	}
}

// Only is the part of the trace that belongs to the applications for which keep says so. Functions of one owner stay together: calls and
// shifts lead to functions of the same application.
func (t *Trace) Only(keep func(app string) bool) *Trace {
	part := *t
	part.Functions, part.Counts, part.Calls, part.Shifts = nil, nil, nil, nil
	place := make([]int, len(t.Functions))
	for i, f := range t.Functions {
		place[i] = -1
		if keep(f.App) {
			place[i] = len(part.Functions)
			part.Functions = append(part.Functions, f)
			part.Counts = append(part.Counts, t.Counts[i])
		}
	}
	for _, c := range t.Calls {
		if c.Caller, c.Callee = place[c.Caller], place[c.Callee]; c.Caller >= 0 && c.Callee >= 0 {
			part.Calls = append(part.Calls, c)
		}
	}
	for _, s := range t.Shifts {
		if s.From, s.To = place[s.From], place[s.To]; s.From >= 0 && s.To >= 0 {
			part.Shifts = append(part.Shifts, s)
		}
	}
	return &part
}
