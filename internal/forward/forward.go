// Package forward is the last step of a path: it sends an Exchange to one address and brings back the answer, both bodies streaming,
// each byte passed on when it comes. It speaks HTTP/1.1, or HTTP/2 with prior knowledge to a function whose port says h2c.
//
// For HTTP/1.1 it is an upstream client of our own because the promises need one: a body that breaks off is never passed on as
// complete, in either direction; an answer may begin before the request's body has ended; what was provably not sent is told apart from
// everything else (hop.ErrNotSent) and nothing is ever sent twice by itself; time-outs begin when the function gets the
// request; a stream that is cut ends as a reset.
package forward

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/hop"
)

// LoneDialTimeout is the DialTimeout of those who know no other address: one that takes no connections for a while, because of too many at once or of a
// machine that is busy, is better waited for than given up.
const LoneDialTimeout = 10 * time.Second

// Config says where to and how long.
type Config struct {
	Addr          string        // host:port
	Protocol      string        // what the function speaks: "h2c"; "auto": h2c for requests that came over HTTP/2, if it takes it; else HTTP/1.1
	Hop           bool          // Addr is a hop of the platform, and none a function: its refusals (X-Thaw-Error) come back as errors
	Total         time.Duration // from the request's head sent to the last byte of the answer; 0 = no limit
	ResponseStart time.Duration // from the request's head sent to the answer's head; 0 = no limit
	Idle          time.Duration // between two bytes of the answer (from the request's end to the first one), or of an upgraded connection; 0 = no limit
	DialTimeout   time.Duration // 0 = 1 s
	Dial          Dialer        // nil = a net.Dialer
	MaxIdle       int           // connections kept for reuse; 0 = 256
	// IdleConn is how long an unused connection is kept; 0 = 4 s, less than what common servers wait (5 s and more),
	// so that it is we who close and no request meets a closing connection.
	IdleConn time.Duration
}

// Dialer opens a connection, as net.Dialer.DialContext does.
type Dialer func(ctx context.Context, network, addr string) (net.Conn, error)

// Forward sends requests to one address. Make one with New.
type Forward struct {
	cfg Config
	h2  *h2 // nil = HTTP/1.1

	learn *learner // with Protocol auto; else nil

	mu     sync.Mutex
	idle   []*conn // most recently used last
	closed bool
}

const (
	readerSize = 16 << 10 // bounds the head of an answer
	copySize   = 32 << 10
	maxInterim = 16 // 1xx answers before the real one
)

// New returns a Forward; it opens no connection.
func New(cfg Config) *Forward {
	if cfg.DialTimeout <= 0 {
		cfg.DialTimeout = time.Second
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: cfg.DialTimeout}).DialContext
	}
	if cfg.MaxIdle <= 0 {
		cfg.MaxIdle = 256
	}
	if cfg.IdleConn <= 0 {
		cfg.IdleConn = 4 * time.Second
	}
	f := &Forward{cfg: cfg}
	switch cfg.Protocol {
	case "h2c":
		f.h2 = newH2(f)
	case "auto":
		f.h2, f.learn = newH2(f), &learner{addr: cfg.Addr, wait: cfg.DialTimeout}
	}
	return f
}

// Close closes the idle connections and keeps no more; exchanges under way go on.
func (f *Forward) Close() {
	f.mu.Lock()
	idle := f.idle
	f.idle, f.closed = nil, true
	f.mu.Unlock()
	for _, c := range idle {
		c.Close()
	}
	if f.h2 != nil {
		f.h2.close()
	}
}

// Serve sends x and answers it. Errors: hop.ErrNotSent when no byte of the request can have reached the function,
// *hop.Error for everything else.
func (f *Forward) Serve(x *hop.Exchange) error {
	if f.cfg.Hop && x.Proxied {
		x.Req.Header.Set("K-Proxy-Request", "activator")
	}
	switch {
	case f.learn != nil:
		return f.serveAuto(x)
	case f.h2 != nil:
		return f.h2.serve(x)
	}
	return f.serveH1(x)
}

// limits are those of the function and of the route that x came by, whichever are shorter.
func (f *Forward) limits(x *hop.Exchange) api.Timeouts {
	return api.Timeouts{Total: f.cfg.Total, ResponseStart: f.cfg.ResponseStart, Idle: f.cfg.Idle}.And(x.Limits)
}

// startDeadline is when the answer must have begun. A function that has the whole request and is silent is idle, too; while the body is
// still on its way the silence may be the client's.
func (f *Forward) startDeadline(x *hop.Exchange) time.Time {
	l := f.limits(x)
	d := api.Timeouts{Total: l.Total}.And(api.Timeouts{Total: l.ResponseStart})
	if x.BodySize == 0 || inMemory(x) {
		d = d.And(api.Timeouts{Total: l.Idle})
	}
	if d.Total <= 0 {
		return time.Time{}
	}
	return x.Sent.Add(d.Total)
}

// totalEnd is when the answer must have ended; zero = no limit.
func (f *Forward) totalEnd(x *hop.Exchange) time.Time {
	if total := f.limits(x).Total; total > 0 {
		return x.Sent.Add(total)
	}
	return time.Time{}
}

// idleDeadline is when the next byte of the answer must have come; end is the total limit, zero = none. The zero time means no limit.
func (f *Forward) idleDeadline(x *hop.Exchange, end time.Time) time.Time {
	idle := f.limits(x).Idle
	if idle <= 0 {
		return end
	}
	t := time.Now().Add(idle)
	if !end.IsZero() && end.Before(t) {
		t = end
	}
	return t
}

// inMemory says whether x's body is small and known, so that it was read before the first step ran and goes out in one piece. One that the function
// has still to ask for (100-continue) is not.
func inMemory(x *hop.Exchange) bool { return x.BodySize > 0 && !x.Req.IsBodyStream() }

func clientBroke(err error) error {
	return &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "request body broke off: " + err.Error()}
}

func broke(err error) error {
	return &hop.Error{Status: 502, Reason: hop.ReasonInstanceBroke, Message: "instance broke off: " + err.Error()}
}

func tooLate(x *hop.Exchange) error {
	return &hop.Error{Status: 504, Reason: hop.ReasonTimeout, Message: fmt.Sprintf("no answer from the function within %v", time.Since(x.Sent).Round(time.Millisecond))}
}

func clientLeft() error {
	return &hop.Error{Status: 499, Reason: hop.ReasonClientGone, Message: "the client left before the function answered"}
}
