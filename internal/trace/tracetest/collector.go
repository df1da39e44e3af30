// Package tracetest is an OTLP/HTTP collector for tests: it takes what exporters really send and decodes it with OpenTelemetry's own
// protobuf types.
package tracetest

import (
	"compress/gzip"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// Span is a span that was received.
type Span struct {
	Trace, ID, Parent, State, Name string // ids in hex; Parent "" = root
	Kind                           tracepb.Span_SpanKind
	Start, End                     time.Time
	Attrs                          map[string]any // string or int64
	Events                         []string
	Failed                         bool
	Resource                       map[string]any
}

// Collector is a running collector. URL has no path.
type Collector struct {
	URL string
	// Answer, when set, decides the status of an answer; not 200 = the spans are not taken.
	Answer func() int

	mu    sync.Mutex
	spans []Span
	more  chan struct{} // closed at the next change
}

// New starts a collector that lives as long as the test.
func New(t testing.TB) *Collector {
	c := &Collector{more: make(chan struct{})}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status := c.take(t, r); status != http.StatusOK {
			w.WriteHeader(status)
		}
	}))
	t.Cleanup(s.Close)
	c.URL = s.URL
	return c
}

func (c *Collector) take(t testing.TB, r *http.Request) int {
	if r.URL.Path != "/v1/traces" || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/x-protobuf" {
		t.Errorf("collector got %s %s %s", r.Method, r.URL.Path, r.Header.Get("Content-Type"))
		return http.StatusBadRequest
	}
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		var err error
		if body, err = gzip.NewReader(body); err != nil {
			t.Errorf("collector: %v", err)
			return http.StatusBadRequest
		}
	}
	b, err := io.ReadAll(body)
	req := &collectorpb.ExportTraceServiceRequest{}
	if err == nil {
		err = proto.Unmarshal(b, req)
	}
	if err != nil {
		t.Errorf("collector: %v", err)
		return http.StatusBadRequest
	}
	if c.Answer != nil {
		if status := c.Answer(); status != http.StatusOK {
			return status
		}
	}
	c.add(req)
	return http.StatusOK
}

func (c *Collector) add(req *collectorpb.ExportTraceServiceRequest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range req.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				span := Span{
					Trace: hex.EncodeToString(s.TraceId), ID: hex.EncodeToString(s.SpanId), Parent: hex.EncodeToString(s.ParentSpanId), State: s.TraceState,
					Name: s.Name, Kind: s.Kind, Start: time.Unix(0, int64(s.StartTimeUnixNano)), End: time.Unix(0, int64(s.EndTimeUnixNano)),
					Attrs: attrs(s.Attributes), Failed: s.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR, Resource: attrs(rs.Resource.GetAttributes()),
				}
				for _, e := range s.Events {
					span.Events = append(span.Events, e.Name)
				}
				c.spans = append(c.spans, span)
			}
		}
	}
	close(c.more)
	c.more = make(chan struct{})
}

func attrs(list []*commonpb.KeyValue) map[string]any {
	out := make(map[string]any)
	for _, kv := range list {
		switch v := kv.Value.Value.(type) {
		case *commonpb.AnyValue_StringValue:
			out[kv.Key] = v.StringValue
		case *commonpb.AnyValue_IntValue:
			out[kv.Key] = v.IntValue
		}
	}
	return out
}

// Spans returns what has come so far.
func (c *Collector) Spans() []Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Span(nil), c.spans...)
}

// Wait returns the spans once there are n; the test fails after 20 s.
func (c *Collector) Wait(t testing.TB, n int) []Span {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		c.mu.Lock()
		more, have := c.more, len(c.spans)
		c.mu.Unlock()
		if have >= n {
			return c.Spans()
		}
		select {
		case <-more:
		case <-late:
			t.Fatalf("%d spans within 20 s, want %d: %+v", have, n, c.Spans())
		}
	}
}
