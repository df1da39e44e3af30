// Package otlplean exports spans over OTLP/HTTP with nothing but net/http and protobuf's wire primitives: OpenTelemetry's client leads to gRPC, which
// would make the queue-proxy, of which every instance has one, four times the size. It does not compress and knows no environment; what
// cannot be delivered at once is tried once more and then lost, which the tracer counts.
package otlplean

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/thawrun/thaw/internal/trace"
)

// Exporter is a trace.Exporter. Make one with New.
type Exporter struct {
	url      string
	resource []trace.Attr
	client   http.Client
	buf      []byte
}

// New returns an exporter to a URL that trace.Endpoint returned. resource says what this process is. It opens no connection.
func New(url string, resource []trace.Attr) *Exporter {
	return &Exporter{url: url, resource: resource, client: http.Client{
		Transport:     &http.Transport{MaxIdleConns: 1, IdleConnTimeout: 30 * time.Second},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// pause before the second try.
const pause = time.Second

// Export sends spans in one request.
func (e *Exporter) Export(ctx context.Context, spans []trace.Span) error {
	e.buf = appendRequest(e.buf[:0], e.resource, spans)
	again, err := e.post(ctx)
	if !again {
		return err
	}
	select {
	case <-ctx.Done():
		return err
	case <-time.After(pause):
	}
	_, err = e.post(ctx)
	return err
}

// post says whether it is worth trying again.
func (e *Exporter) post(ctx context.Context) (again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.url, bytes.NewReader(e.buf))
	if err != nil {
		return false, fmt.Errorf("OTLP: %w", err)
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	resp, err := e.client.Do(req)
	if err != nil {
		return ctx.Err() == nil, fmt.Errorf("OTLP: %w", err)
	}
	defer resp.Body.Close()
	said, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
	switch resp.StatusCode {
	case http.StatusOK, http.StatusAccepted, http.StatusNoContent:
		return false, nil
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		again = true
	}
	return again, fmt.Errorf("OTLP: %s answers %s: %q", e.url, resp.Status, said)
}

// Field numbers of opentelemetry.proto.{collector.trace,trace,resource,common}.v1, which are stable.
const (
	requestResourceSpans = 1

	resourceSpansResource, resourceSpansScopes = 1, 2
	resourceAttributes                         = 1
	scopeSpansScope, scopeSpansSpans           = 1, 2
	scopeName                                  = 1

	spanTrace, spanID, spanState, spanParent, spanName, spanKind = 1, 2, 3, 4, 5, 6
	spanStart, spanEnd, spanAttributes, spanEvents, spanStatus   = 7, 8, 9, 11, 15
	eventTime, eventName                                         = 1, 2
	statusCode, statusCodeError                                  = 3, 2

	keyValueKey, keyValueValue  = 1, 2
	anyValueString, anyValueInt = 1, 3
)

func appendRequest(b []byte, resource []trace.Attr, spans []trace.Span) []byte {
	return message(b, requestResourceSpans, func(b []byte) []byte {
		b = message(b, resourceSpansResource, func(b []byte) []byte { return attrs(b, resourceAttributes, resource) })
		return message(b, resourceSpansScopes, func(b []byte) []byte {
			b = message(b, scopeSpansScope, func(b []byte) []byte { return text(b, scopeName, trace.Scope) })
			for i := range spans {
				b = message(b, scopeSpansSpans, func(b []byte) []byte { return span(b, &spans[i]) })
			}
			return b
		})
	})
}

func span(b []byte, s *trace.Span) []byte {
	b = raw(b, spanTrace, s.Trace[:])
	b = raw(b, spanID, s.ID[:])
	b = text(b, spanState, s.State)
	if s.Parent != (trace.SpanID{}) {
		b = raw(b, spanParent, s.Parent[:])
	}
	b = text(b, spanName, s.Name)
	b = number(b, spanKind, int64(s.Kind))
	b = moment(b, spanStart, s.Start)
	b = moment(b, spanEnd, s.End)
	b = attrs(b, spanAttributes, s.Attrs)
	for _, e := range s.Events {
		b = message(b, spanEvents, func(b []byte) []byte { return text(moment(b, eventTime, e.At), eventName, e.Name) })
	}
	if s.Failed {
		b = message(b, spanStatus, func(b []byte) []byte { return number(b, statusCode, statusCodeError) })
	}
	return b
}

func attrs(b []byte, field protowire.Number, list []trace.Attr) []byte {
	for _, a := range list {
		b = message(b, field, func(b []byte) []byte {
			b = text(b, keyValueKey, a.Key)
			return message(b, keyValueValue, func(b []byte) []byte {
				if a.Text != "" {
					return text(b, anyValueString, a.Text)
				}
				return number(b, anyValueInt, a.Number)
			})
		})
	}
	return b
}

// message appends a field whose value is what fill appends.
func message(b []byte, field protowire.Number, fill func([]byte) []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), fill(nil))
}

func raw(b []byte, field protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), v)
}

func text(b []byte, field protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), v)
}

func number(b []byte, field protowire.Number, v int64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), uint64(v))
}

func moment(b []byte, field protowire.Number, t time.Time) []byte {
	return protowire.AppendFixed64(protowire.AppendTag(b, field, protowire.Fixed64Type), uint64(t.UnixNano()))
}
