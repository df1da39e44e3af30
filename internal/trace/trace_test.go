package trace

import (
	"context"
	"encoding/hex"
	"errors"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const (
	id     = "4bf92f3577b34da6a3ce929d0e0e4736"
	parent = "00f067aa0ba902b7"
	good   = "00-" + id + "-" + parent + "-01"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		name, in    string
		ok, sampled bool
	}{
		{"sampled", good, true, true},
		{"not sampled", "00-" + id + "-" + parent + "-00", true, false},
		{"other flags", "00-" + id + "-" + parent + "-fe", true, false},
		{"newer version", "cc-" + id + "-" + parent + "-01", true, true},
		{"newer version with more", "cc-" + id + "-" + parent + "-01-what-comes-later", true, true},
		{"newer version with more, no dash", "cc-" + id + "-" + parent + "-01.what", false, false},
		{"more in version 00", good + "-more", false, false},
		{"dash at the end", good + "-", false, false},
		{"version ff", "ff-" + id + "-" + parent + "-01", false, false},
		{"no trace", "00-" + strings.Repeat("0", 32) + "-" + parent + "-01", false, false},
		{"no parent", "00-" + id + "-" + strings.Repeat("0", 16) + "-01", false, false},
		{"upper case", "00-" + strings.ToUpper(id) + "-" + parent + "-01", false, false},
		{"no hex", "00-" + id[:31] + "g-" + parent + "-01", false, false},
		{"flags no hex", "00-" + id + "-" + parent + "-0x", false, false},
		{"version no hex", ".0-" + id + "-" + parent + "-01", false, false},
		{"short", good[:54], false, false},
		{"empty", "", false, false},
		{"other separators", strings.ReplaceAll(good, "-", "_"), false, false},
		{"two in one line", good + "," + good, false, false},
	} {
		got, ok := Parse([]byte(c.in))
		if ok != c.ok || got.Sampled != c.sampled {
			t.Errorf("%s: ok %v sampled %v", c.name, ok, got.Sampled)
		}
		if ok && (got.ID.String() != id || got.Parent.String() != parent) {
			t.Errorf("%s: %s %s", c.name, got.ID, got.Parent)
		}
		if !ok && got != (Context{}) {
			t.Errorf("%s: something of a bad field is left: %+v", c.name, got)
		}
	}
}

func TestContinue(t *testing.T) {
	c, _ := Parse([]byte("cc-" + id + "-" + parent + "-ff-more"))
	c = c.Continue()
	want := "00-" + id + "-" + c.Forward.String() + "-03" // a newer version's unknown flags are not ours to repeat
	if got := string(c.AppendParent(nil)); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if c.Forward == c.Span || c.Forward.String() == parent {
		t.Error("span ids are not new")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("cc-" + id + "-" + parent + "-01-more"))
	f.Add([]byte("00--"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, ok := Parse(b)
		if !ok {
			if c != (Context{}) {
				t.Fatalf("%q is bad and leaves %+v", b, c)
			}
			return
		}
		if c.ID == (ID{}) || c.Parent == (SpanID{}) {
			t.Fatalf("%q: accepted without ids", b)
		}
		if hex.EncodeToString(c.ID[:]) != string(b[3:35]) || hex.EncodeToString(c.Parent[:]) != string(b[36:52]) {
			t.Fatalf("%q read as %+v", b, c)
		}
		c = c.Continue()
		again, ok := Parse(c.AppendParent(nil))
		if !ok || again.ID != c.ID || again.Parent != c.Forward || !again.Sampled {
			t.Fatalf("%q goes out as %q", b, c.AppendParent(nil))
		}
	})
}

// kept is an exporter that keeps what it gets, or fails, or blocks.
type kept struct {
	mu    sync.Mutex
	spans []Span
	calls int
	fail  error
	block chan struct{}
}

func (k *kept) Export(_ context.Context, spans []Span) error {
	if k.block != nil {
		<-k.block
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls++
	if k.fail != nil {
		return k.fail
	}
	k.spans = append(k.spans, spans...)
	return nil
}

func newTracer(t testing.TB, cfg Config) *Tracer {
	t.Helper()
	tr, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestSample(t *testing.T) {
	for _, ratio := range []float64{0, 0.25, 1} {
		tr := newTracer(t, Config{Ratio: ratio, Exporter: &kept{}})
		const n = 40_000
		sampled := 0
		for range n {
			c := tr.Sample()
			if !c.Sampled {
				if c != (Context{}) {
					t.Fatal("not sampled, but not nothing")
				}
				continue
			}
			sampled++
			if p, ok := Parse(c.AppendParent(nil)); !ok || !p.Sampled || c.Parent != (SpanID{}) {
				t.Fatalf("bad new trace %+v", c)
			}
		}
		// Five standard deviations: one failure in two million runs.
		if math.Abs(float64(sampled)-ratio*n) > 5*math.Sqrt(n*ratio*(1-ratio)) {
			t.Errorf("ratio %v: %d of %d", ratio, sampled, n)
		}
	}
}

func TestBadConfig(t *testing.T) {
	for _, ratio := range []float64{-0.1, 1.1, math.NaN()} {
		if _, err := New(Config{Ratio: ratio, Exporter: &kept{}}); err == nil {
			t.Errorf("ratio %v accepted", ratio)
		}
	}
	if _, err := New(Config{}); err == nil {
		t.Error("no exporter accepted")
	}
	for in, want := range map[string]string{
		"http://a:4318": "http://a:4318/v1/traces", "https://a/": "https://a/v1/traces", "http://a/x/y": "http://a/x/y",
		"a:4318": "", "": "", "grpc://a:4317": "", "http://": "", "http://a/?x=1": "",
	} {
		got, err := Endpoint(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

// Spans leave after Every, at once when a batch is full, and at the end.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &kept{}
		tr := newTracer(t, Config{Exporter: k, MaxBatch: 10, MaxQueue: 100})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- tr.Run(ctx) }()
		have := func(spans, calls int) {
			t.Helper()
			synctest.Wait()
			k.mu.Lock()
			defer k.mu.Unlock()
			if len(k.spans) != spans || k.calls != calls {
				t.Errorf("%d spans in %d calls, want %d in %d", len(k.spans), k.calls, spans, calls)
			}
		}
		tr.Add(Span{}, Span{})
		have(0, 0)
		time.Sleep(time.Second)
		have(2, 1)
		tr.Add(make([]Span, 25)...)
		have(27, 4)
		tr.Add(Span{})
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		have(28, 5)
	})
}

// An exporter that hangs costs at most a full queue: what comes then is dropped and counted, and nobody waits.
func TestStuckExporter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &kept{block: make(chan struct{})}
		tr := newTracer(t, Config{Exporter: k, MaxBatch: 10, MaxQueue: 20})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- tr.Run(ctx) }()
		tr.Add(make([]Span, 10)...) // taken by Run, which hangs
		synctest.Wait()
		for range 7 {
			tr.Add(make([]Span, 4)...)
		}
		if _, dropped, _ := tr.Counts(); dropped != 8 {
			t.Errorf("%d dropped, want 8", dropped)
		}
		close(k.block)
		cancel()
		<-done
		if exported, _, _ := tr.Counts(); exported != 30 {
			t.Errorf("%d exported, want 30", exported)
		}
	})
}

func TestFailingExporter(t *testing.T) {
	tr := newTracer(t, Config{Exporter: &kept{fail: errors.New("no")}})
	tr.Add(Span{}, Span{})
	tr.flush(t.Context())
	if exported, _, failed := tr.Counts(); exported != 0 || failed != 2 {
		t.Errorf("%d exported, %d failed", exported, failed)
	}
	var b strings.Builder
	if err := tr.WriteMetrics(&b); err != nil || !strings.Contains(b.String(), `{outcome="export_failed"} 2`) {
		t.Errorf("%v\n%s", err, &b)
	}
}
