package tracetest_test

import (
	"context"
	"net"
	"net/http"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/thawrun/thaw/internal/trace"
	"github.com/thawrun/thaw/internal/trace/otlp"
	"github.com/thawrun/thaw/internal/trace/otlplean"
	"github.com/thawrun/thaw/internal/trace/tracetest"
)

var exporters = map[string]func(url string, resource []trace.Attr) trace.Exporter{
	"otlp":     func(u string, r []trace.Attr) trace.Exporter { return otlp.New(u, r) },
	"otlplean": func(u string, r []trace.Attr) trace.Exporter { return otlplean.New(u, r) },
}

func endpoint(t *testing.T, url string) string {
	t.Helper()
	u, err := trace.Endpoint(url)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// Both exporters say the same, and what OpenTelemetry's types read is what was meant.
func TestExport(t *testing.T) {
	at := time.Unix(1_700_000_000, 123456789)
	spans := []trace.Span{
		{Trace: trace.ID{1, 15: 2}, ID: trace.SpanID{3}, Name: "root", Kind: trace.Server, Start: at, End: at.Add(time.Second)},
		{Trace: trace.ID{1, 15: 2}, ID: trace.SpanID{4}, Parent: trace.SpanID{3}, State: "a=1,b=2", Name: "child", Kind: trace.Client, Start: at, End: at, Failed: true,
			Attrs:  []trace.Attr{{Key: "text", Text: "ü\n"}, {Key: "number", Number: -5}, {Key: "zero"}},
			Events: []trace.Event{{Name: "one", At: at}, {Name: "two", At: at}}},
	}
	resource := []trace.Attr{{Key: "service.name", Text: "thaw"}}
	want := []tracetest.Span{
		{Trace: "01000000000000000000000000000002", ID: "0300000000000000", Name: "root", Kind: tracepb.Span_SPAN_KIND_SERVER, Start: at, End: at.Add(time.Second),
			Attrs: map[string]any{}, Resource: map[string]any{"service.name": "thaw"}},
		{Trace: "01000000000000000000000000000002", ID: "0400000000000000", Parent: "0300000000000000", State: "a=1,b=2", Name: "child", Kind: tracepb.Span_SPAN_KIND_CLIENT,
			Start: at, End: at, Failed: true, Attrs: map[string]any{"text": "ü\n", "number": int64(-5), "zero": int64(0)}, Events: []string{"one", "two"},
			Resource: map[string]any{"service.name": "thaw"}},
	}
	for name, export := range exporters {
		t.Run(name, func(t *testing.T) {
			c := tracetest.New(t)
			e := export(endpoint(t, c.URL), resource)
			for range 2 { // buffers are used again
				if err := e.Export(t.Context(), spans); err != nil {
					t.Fatal(err)
				}
			}
			got := c.Spans()
			if len(got) != 4 || !reflect.DeepEqual(got[:2], want) || !reflect.DeepEqual(got[2:], want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}

// A collector that is busy once gets the spans the second time; one that refuses is not asked again; one that is not there is an error.
func TestFailures(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "http://" + ln.Addr().String()
	ln.Close()
	one := []trace.Span{{Trace: trace.ID{1}, ID: trace.SpanID{1}, Name: "x", Start: time.Now(), End: time.Now()}}
	for name, export := range exporters {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var calls atomic.Int32
			c := tracetest.New(t)
			c.Answer = func() int {
				if calls.Add(1) == 1 {
					return http.StatusServiceUnavailable
				}
				return http.StatusOK
			}
			if err := export(endpoint(t, c.URL), nil).Export(t.Context(), one); err != nil || len(c.Spans()) != 1 {
				t.Errorf("busy once: %v, %d spans", err, len(c.Spans()))
			}
			calls.Store(0)
			c.Answer = func() int { calls.Add(1); return http.StatusForbidden }
			if err := export(endpoint(t, c.URL), nil).Export(t.Context(), one); err == nil || !strings.Contains(err.Error(), "403") || calls.Load() != 1 {
				t.Errorf("refused: %v after %d calls", err, calls.Load())
			}
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if err := export(endpoint(t, nobody), nil).Export(ctx, one); err == nil {
				t.Error("nobody there, and no error")
			}
		})
	}
}
