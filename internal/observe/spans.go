package observe

import (
	"bytes"
	"strings"
	"time"

	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/trace"
)

var (
	headerParent = []byte("Traceparent")
	headerState  = []byte("Tracestate")
)

// begin reads x's traceparent, or decides whether a trace begins here. What the next process gets is ours only when x is sampled; what is not
// valid is never passed on, and neither is a tracestate that belongs to it.
func begin(t *trace.Tracer, x *hop.Exchange) {
	h := &x.Req.Header
	v := h.PeekCanonical(headerParent)
	if len(v) == 0 {
		x.Trace = t.Sample()
	} else if c, ok := trace.Parse(v); !ok || c.Sampled && len(h.PeekAll("Traceparent")) != 1 {
		h.DelBytes(headerParent)
		h.DelBytes(headerState)
		x.Trace = t.Sample()
	} else if x.Trace = c; c.Sampled {
		x.Trace = c.Continue()
		x.Trace.State = state(h.PeekAll("Tracestate"))
	}
	if !x.Trace.Sampled {
		return
	}
	if x.Trace.Parent == (trace.SpanID{}) {
		h.DelBytes(headerState)
	}
	h.SetCanonical(headerParent, x.Trace.AppendParent(make([]byte, 0, trace.Length)))
}

// maxState is how much of tracestate is exported (W3C lets us drop it from here on); it is passed on in any case.
const maxState = 512

// state is tracestate for the exporter, which wants text.
func state(lines [][]byte) string {
	all := bytes.Join(lines, []byte{','})
	if len(all) > maxState {
		return ""
	}
	for _, c := range all {
		if c < ' ' || c >= 0x7f {
			return ""
		}
	}
	return string(all)
}

// spans are the steps of a sampled request as x tells of them:
//
//	router.route            all of it, in this process
//	├─ queue.wait           it waited for a free slot
//	│  └─ instance.start    which it did because the instance was being started
//	└─ forward              the function had it; what the function sees as its parent
func (o *Observer) spans(x *hop.Exchange, now time.Time) []trace.Span {
	out := make([]trace.Span, 1, 4)
	c := &x.Trace
	status := x.Resp.StatusCode()
	failed := status >= 500 || x.Cut
	out[0] = trace.Span{Trace: c.ID, ID: c.Span, Parent: c.Parent, State: c.State, Name: o.span, Kind: trace.Server, Start: x.Arrived, End: now, Failed: failed, Attrs: about(x, status)}
	if x.Queued > 0 {
		wait := trace.Span{Trace: c.ID, ID: trace.NewSpanID(), Parent: c.Span, State: c.State, Name: "queue.wait", Kind: trace.Internal,
			Start: x.QueuedAt, End: x.QueuedAt.Add(x.Queued), Attrs: where(x)}
		out = append(out, wait)
		if x.Cold {
			out = append(out, started(x, wait.ID))
		}
	}
	if !x.Sent.IsZero() {
		out = append(out, trace.Span{Trace: c.ID, ID: c.Forward, Parent: c.Span, State: c.State, Name: "forward", Kind: trace.Client, Start: x.Sent, End: now, Failed: failed,
			Attrs: append(where(x), trace.Attr{Key: "http.response.status_code", Number: int64(status)})})
	}
	return out
}

// started is the start of the instance that x waited for. It may have begun before x came.
func started(x *hop.Exchange, parent trace.SpanID) trace.Span {
	s := trace.Span{Trace: x.Trace.ID, ID: trace.NewSpanID(), Parent: parent, State: x.Trace.State, Name: "instance.start", Kind: trace.Internal, End: x.Start.Ready,
		Attrs: where(x)}
	for _, e := range []trace.Event{{Name: "decided", At: x.Start.Decided}, {Name: "placed", At: x.Start.Placed}, {Name: "code", At: x.Start.Code}, {Name: "net", At: x.Start.Net}, {Name: "exec", At: x.Start.Exec}} {
		if e.At.IsZero() {
			continue
		}
		if s.Start.IsZero() || e.At.Before(s.Start) {
			s.Start = e.At
		}
		s.Events = append(s.Events, e)
	}
	if s.Start.IsZero() {
		s.Start = s.End
	}
	return s
}

// where says whom a step was about.
func where(x *hop.Exchange) []trace.Attr {
	out := make([]trace.Attr, 0, 3)
	return text(text(out, "thaw.revision", string(x.Revision)), "thaw.instance", x.Instance)
}

// about is what the whole request's span says.
func about(x *hop.Exchange, status int) []trace.Attr {
	out := make([]trace.Attr, 0, 12)
	if x.Req != nil {
		h := &x.Req.Header
		path, _, _ := bytes.Cut(h.RequestURI(), []byte{'?'})
		out = said(out, "http.request.method", h.Method())
		out = said(out, "server.address", h.Host())
		out = said(out, "url.path", path) // without the query, which may hold what nobody should keep
		out = said(out, "user_agent.original", h.UserAgent())
	}
	out = append(out, trace.Attr{Key: "http.response.status_code", Number: int64(status)})
	out = said(out, "error.type", x.Resp.Header.Peek("X-Thaw-Error"))
	out = text(out, "thaw.request_id", x.ID)
	out = text(out, "thaw.namespace", x.Namespace)
	out = text(out, "thaw.service", x.Service)
	return text(text(out, "thaw.revision", string(x.Revision)), "thaw.instance", x.Instance)
}

func text(list []trace.Attr, key, v string) []trace.Attr {
	if v == "" {
		return list
	}
	return append(list, trace.Attr{Key: key, Text: v})
}

// maxText bounds what a client can make us keep.
const maxText = 256

// said is text of the client's: bounded, and valid UTF-8 whatever it was, or the collector would refuse the whole batch.
func said(list []trace.Attr, key string, v []byte) []trace.Attr {
	return text(list, key, strings.ToValidUTF8(string(v[:min(len(v), maxText)]), "\ufffd"))
}
