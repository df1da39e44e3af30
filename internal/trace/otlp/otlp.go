// Package otlp exports spans over OTLP/HTTP with OpenTelemetry's own client, which knows retries, compression, TLS and the OTEL_EXPORTER_OTLP_*
// variables of the environment (headers, certificates). It leads to gRPC and is for cmd/thaw only; the queue-proxy has otlplean.
package otlp

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/thawrun/thaw/internal/trace"
)

// Exporter is a trace.Exporter. Make one with New.
type Exporter struct {
	client   uploader
	resource *resourcepb.Resource
}

// uploader is what we want of otlptrace.Client.
type uploader interface {
	UploadTraces(ctx context.Context, spans []*tracepb.ResourceSpans) error
}

// retry fits into the time that a tracer gives to one export.
var retry = otlptracehttp.RetryConfig{Enabled: true, InitialInterval: time.Second, MaxInterval: 3 * time.Second, MaxElapsedTime: 10 * time.Second}

// New returns an exporter to a URL that trace.Endpoint returned. resource says what this process is (service.name and so on). It opens no
// connection.
func New(url string, resource []trace.Attr) *Exporter {
	return &Exporter{
		client: otlptracehttp.NewClient(otlptracehttp.WithEndpointURL(url), otlptracehttp.WithCompression(otlptracehttp.GzipCompression),
			otlptracehttp.WithRetry(retry)),
		resource: &resourcepb.Resource{Attributes: attrs(resource)},
	}
}

// Export sends spans in one request, repeated by the client while the collector says that it is only busy and ctx lasts.
func (e *Exporter) Export(ctx context.Context, spans []trace.Span) error {
	out := make([]*tracepb.Span, len(spans))
	for i := range spans {
		out[i] = span(&spans[i])
	}
	err := e.client.UploadTraces(ctx, []*tracepb.ResourceSpans{{
		Resource:   e.resource,
		ScopeSpans: []*tracepb.ScopeSpans{{Scope: &commonpb.InstrumentationScope{Name: trace.Scope}, Spans: out}},
	}})
	if err != nil {
		return fmt.Errorf("OTLP: %w", err)
	}
	return nil
}

func span(s *trace.Span) *tracepb.Span {
	out := &tracepb.Span{
		TraceId: s.Trace[:], SpanId: s.ID[:], TraceState: s.State, Name: s.Name, Kind: tracepb.Span_SpanKind(s.Kind),
		StartTimeUnixNano: uint64(s.Start.UnixNano()), EndTimeUnixNano: uint64(s.End.UnixNano()), Attributes: attrs(s.Attrs),
	}
	if s.Parent != (trace.SpanID{}) {
		out.ParentSpanId = s.Parent[:]
	}
	for _, e := range s.Events {
		out.Events = append(out.Events, &tracepb.Span_Event{Name: e.Name, TimeUnixNano: uint64(e.At.UnixNano())})
	}
	if s.Failed {
		out.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}
	}
	return out
}

func attrs(in []trace.Attr) []*commonpb.KeyValue {
	out := make([]*commonpb.KeyValue, len(in))
	for i, a := range in {
		v := &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: a.Text}}
		if a.Text == "" {
			v.Value = &commonpb.AnyValue_IntValue{IntValue: a.Number}
		}
		out[i] = &commonpb.KeyValue{Key: a.Key, Value: v}
	}
	return out
}
