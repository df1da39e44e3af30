// Package trace knows W3C's trace context, decides which requests are sampled, and takes spans out of the process in batches.
//
// A request that is not sampled costs a look for its traceparent and a random number, and nothing of it is changed. Spans of a sampled one
// are made when it is over, from what the Exchange says (package observe), and put into a bounded queue; when nobody takes them away fast
// enough they are dropped and counted. The package depends on nothing, so that the queue-proxy stays small; exporters are packages below it.
package trace

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// Kind says which side of a call a span is, with OTLP's numbers.
type Kind int32

// The kinds in use.
const (
	Internal Kind = 1
	Server   Kind = 2
	Client   Kind = 3
)

// Attr is an attribute: text, or a number when Text is empty.
type Attr struct {
	Key    string
	Text   string
	Number int64
}

// Event is a moment in a span.
type Event struct {
	Name string
	At   time.Time
}

// Span is one step of a sampled request. All text is valid UTF-8.
type Span struct {
	Trace      ID
	ID         SpanID
	Parent     SpanID // zero = root
	State      string // tracestate
	Name       string
	Kind       Kind
	Start, End time.Time
	Attrs      []Attr
	Events     []Event
	Failed     bool
}

// Exporter takes spans to where they are kept. It is called by one goroutine at a time and keeps nothing of the slice.
type Exporter interface {
	Export(ctx context.Context, spans []Span) error
}

// Config describes a Tracer. Zero means the default, where there is one.
type Config struct {
	// Ratio of the requests without a traceparent that are sampled, 0 to 1. Those with one are sampled when it says so.
	Ratio    float64
	Exporter Exporter      // required
	MaxQueue int           // spans that wait for the exporter; 4,096; more are dropped
	MaxBatch int           // spans that are exported without waiting for Every, and at most in one call; 512
	Every    time.Duration // 1 s
	Timeout  time.Duration // of one export; 10 s
	Log      *slog.Logger
}

// Tracer decides and collects. Make one with New; spans leave while Run runs.
type Tracer struct {
	cfg   Config
	bound uint64 // sampled if 63 random bits are below it

	full chan struct{} // a batch is there

	mu    sync.Mutex
	queue []Span // guarded by mu

	exported, dropped, failed atomic.Uint64
}

// New checks cfg. It starts nothing.
func New(cfg Config) (*Tracer, error) {
	if cfg.Exporter == nil {
		return nil, errors.New("trace: Config.Exporter is required")
	}
	if !(cfg.Ratio >= 0 && cfg.Ratio <= 1) {
		return nil, fmt.Errorf("trace ratio %v: want a number from 0 to 1", cfg.Ratio)
	}
	if cfg.MaxQueue <= 0 {
		cfg.MaxQueue = 4096
	}
	if cfg.MaxBatch <= 0 {
		cfg.MaxBatch = 512
	}
	if cfg.Every <= 0 {
		cfg.Every = time.Second
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Tracer{cfg: cfg, bound: uint64(cfg.Ratio * (1 << 63)), full: make(chan struct{}, 1)}, nil
}

// Sample decides about a request that brought no trace. The decision follows from the id in the way of OpenTelemetry's TraceIDRatioBased,
// so that others who sample by it agree.
func (t *Tracer) Sample() (c Context) {
	low := rand.Uint64()
	if low>>1 >= t.bound {
		return Context{}
	}
	binary.BigEndian.PutUint64(c.ID[:8], nonzero())
	binary.BigEndian.PutUint64(c.ID[8:], low)
	c.Sampled = true
	return c.Continue()
}

// Continue gives a sampled context the spans of this process.
func (c Context) Continue() Context {
	c.Span, c.Forward = NewSpanID(), NewSpanID()
	c.Flags = c.Flags&flagRandom | flagSampled
	return c
}

// Add takes the spans of a request that is over; all of them or, when there is no room, none.
func (t *Tracer) Add(spans ...Span) {
	t.mu.Lock()
	if len(t.queue)+len(spans) > t.cfg.MaxQueue {
		t.mu.Unlock()
		t.dropped.Add(uint64(len(spans)))
		return
	}
	t.queue = append(t.queue, spans...)
	full := len(t.queue) >= t.cfg.MaxBatch
	t.mu.Unlock()
	if full {
		select {
		case t.full <- struct{}{}:
		default:
		}
	}
}

// lastWords is how long the last export may take: a collector that is gone must not hold up a shutdown.
const lastWords = 2 * time.Second

// Run exports until ctx ends, and then what is left, for at most two seconds.
func (t *Tracer) Run(ctx context.Context) error {
	tick := time.NewTicker(t.cfg.Every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWords)
			defer cancel()
			t.flush(last)
			return nil
		case <-tick.C:
		case <-t.full:
		}
		t.flush(ctx)
	}
}

// flush exports what is there now.
func (t *Tracer) flush(ctx context.Context) {
	t.mu.Lock()
	queue := t.queue
	t.queue = make([]Span, 0, min(len(queue), t.cfg.MaxBatch))
	t.mu.Unlock()
	for len(queue) > 0 {
		n := min(len(queue), t.cfg.MaxBatch)
		t.export(ctx, queue[:n])
		queue = queue[n:]
	}
}

func (t *Tracer) export(ctx context.Context, batch []Span) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.Timeout)
	defer cancel()
	if err := t.cfg.Exporter.Export(ctx, batch); err != nil {
		t.failed.Add(uint64(len(batch)))
		t.cfg.Log.Warn("spans lost: cannot export", "spans", len(batch), "error", err)
		return
	}
	t.exported.Add(uint64(len(batch)))
}

// Counts returns how many spans were exported, dropped for want of room, and lost because the exporter failed.
func (t *Tracer) Counts() (exported, dropped, failed uint64) {
	return t.exported.Load(), t.dropped.Load(), t.failed.Load()
}

// WriteMetrics writes the counts in Prometheus' text format.
func (t *Tracer) WriteMetrics(w io.Writer) error {
	exported, dropped, failed := t.Counts()
	_, err := fmt.Fprintf(w, `# HELP thaw_trace_spans_total Spans of sampled requests, by what became of them.
# TYPE thaw_trace_spans_total counter
thaw_trace_spans_total{outcome="exported"} %d
thaw_trace_spans_total{outcome="queue_full"} %d
thaw_trace_spans_total{outcome="export_failed"} %d
`, exported, dropped, failed)
	return err
}
