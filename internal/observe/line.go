package observe

import (
	"bytes"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/accesslog"
	"github.com/thawrun/thaw/internal/hop"
)

var entries = sync.Pool{New: func() any { return new(accesslog.Entry) }}

// line writes x into the access log.
func (o *Observer) line(x *hop.Exchange, now time.Time) {
	e := entries.Get().(*accesslog.Entry)
	namespace, revision := x.Revision.Split()
	if x.Namespace != "" {
		namespace = x.Namespace
	}
	*e = accesslog.Entry{
		Time: x.Arrived, RequestID: x.ID, TLS: x.TLS, Client: address(x.RemoteAddr), Status: x.Resp.StatusCode(), Reason: x.Resp.Header.Peek("X-Thaw-Error"), Cut: x.Cut,
		In: x.In, Out: x.Out, Duration: now.Sub(x.Arrived), Waited: x.Queued, Cold: x.Cold,
		Namespace: namespace, Service: x.Service, Revision: revision, Instance: x.Instance, Trace: x.Trace.ID.String(),
	}
	if x.Req != nil {
		h := &x.Req.Header
		e.Method, e.Host, e.UserAgent, e.Referer, e.Protocol = h.Method(), h.Host(), h.UserAgent(), h.Referer(), protocol(x)
		e.Path, e.Query, _ = bytes.Cut(h.RequestURI(), []byte{'?'})
	}
	o.log.Write(e)
	*e = accesslog.Entry{} // it points into x
	entries.Put(e)
}

func protocol(x *hop.Exchange) string {
	switch {
	case x.HTTP2:
		return "HTTP/2"
	case x.HTTP10:
		return "HTTP/1.0"
	}
	return "HTTP/1.1"
}

// address is the peer's; the zero value when it has none.
func address(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := t.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
