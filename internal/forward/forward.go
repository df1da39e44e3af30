// Package forward is the last step of a path: it sends an Exchange to one address and brings back the answer, both bodies streaming,
// each byte passed on when it comes. It speaks HTTP/1.1, or HTTP/2 with prior knowledge to a function whose port says h2c.
//
// For HTTP/1.1 it is an upstream client of our own because the promises need one: a body that breaks off is never passed on as
// complete, in either direction; an answer may begin before the request's body has ended; what was provably not sent is told apart from
// everything else (hop.ErrNotSent) and nothing is ever sent twice by itself; time-outs begin when the function gets the
// request; a stream that is cut ends as a reset.
package forward

import (
	"fmt"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

// Config says where to and how long.
type Config struct {
	Addr          string        // host:port
	Protocol      string        // what the function speaks: "h2c", or else HTTP/1.1
	Total         time.Duration // from the request's head sent to the last byte of the answer; 0 = no limit
	ResponseStart time.Duration // from the request's head sent to the answer's head; 0 = no limit
	Idle          time.Duration // between two bytes of the answer, or of an upgraded connection; 0 = no limit
	DialTimeout   time.Duration // 0 = 1 s
	MaxIdle       int           // connections kept for reuse; 0 = 256
	// IdleConn is how long an unused connection is kept; 0 = 4 s, less than what common servers wait (5 s and more),
	// so that it is we who close and no request meets a closing connection.
	IdleConn time.Duration
}

// Forward sends requests to one address. Make one with New.
type Forward struct {
	cfg Config
	h2  *h2 // nil = HTTP/1.1

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
	if cfg.MaxIdle <= 0 {
		cfg.MaxIdle = 256
	}
	if cfg.IdleConn <= 0 {
		cfg.IdleConn = 4 * time.Second
	}
	f := &Forward{cfg: cfg}
	if cfg.Protocol == "h2c" {
		f.h2 = newH2(f)
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
	if f.h2 != nil {
		return f.h2.serve(x)
	}
	return f.serveH1(x)
}

// startDeadline is when the answer must have begun.
func (f *Forward) startDeadline(sent time.Time) (t time.Time) {
	if f.cfg.ResponseStart > 0 {
		t = sent.Add(f.cfg.ResponseStart)
	}
	if f.cfg.Total > 0 {
		if end := sent.Add(f.cfg.Total); t.IsZero() || end.Before(t) {
			t = end
		}
	}
	return t
}

// idleDeadline is when the next byte of the answer must have come; end is the total limit, zero = none. The zero time means no limit.
func (f *Forward) idleDeadline(end time.Time) time.Time {
	if f.cfg.Idle <= 0 {
		return end
	}
	t := time.Now().Add(f.cfg.Idle)
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
