// Package hop is what every part on the path of a request speaks: the Exchange (one request and its answer) and the
// Handler (one step of the path). Router, activator and queue-proxy are Handlers; cmd stacks them in one process, or puts
// a connection between them. Fronts (package front) turn bytes into Exchanges, package forward turns them into bytes again.
//
// A Handler either answers (returns nil; the answer is in Resp, its body possibly still streaming) or returns an error and
// has given back everything it took. Whoever holds something until the answer is complete, a slot for example, registers
// a Finisher after the next step has answered; finishers run innermost first, at the latest when the last byte is out.
package hop

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/trace"
)

// Handler is one step on a request's path.
type Handler interface {
	// Serve answers x and returns nil, or returns why it could not: an *Error that the front renders, or ErrBusy or
	// ErrNotSent, after which the same Exchange may be served elsewhere because no byte of it reached a function.
	Serve(x *Exchange) error
}

// HandlerFunc lets a function be a Handler.
type HandlerFunc func(x *Exchange) error

// Serve calls f.
func (f HandlerFunc) Serve(x *Exchange) error { return f(x) }

// Observer is told of every exchange by the front: telemetry of any kind, which no step on the way has to know.
type Observer interface {
	// Begin is called before the first step, once the request is known to be well-formed. It may change its fields.
	Begin(x *Exchange)
	// End is called when the answer is written or has broken off, with all that the steps have left in x; nothing of x may be kept. It is
	// called for what was refused before Begin too: then Req is nil if there was no well-formed head.
	End(x *Exchange)
}

// Finisher is told once that the answer is complete, or never will be.
type Finisher interface{ Finish(x *Exchange) }

// SmallBody is the size, in bytes, up to which a request's body of known length is read before the first step runs (Req.Body then has it), so that
// no slot waits for a slow client and the request can go to another instance. Larger ones and those that the function
// has still to ask for (100-continue) are streams.
const SmallBody = 8 << 10

// ErrBusy says that a queue-proxy is full; the body has not been read.
var ErrBusy = errors.New("instance is at its concurrency limit and its queue is full")

// ErrNotSent says that an instance could not be reached and that no byte of the request got there.
var ErrNotSent = errors.New("instance could not be reached")

// Reasons for answers that the platform gives itself, sent as X-Thaw-Error.
const (
	ReasonBadRequest    = "bad_request"     // 400
	ReasonTLSRequired   = "tls_required"    // 403, an upgrade without TLS where TLS is demanded
	ReasonNoService     = "no_service"      // 404
	ReasonNoRevision    = "no_revision"     // 404, the route names a revision without code or that is gone
	ReasonMethod        = "method_refused"  // 405, CONNECT
	ReasonHeaderTooBig  = "header_too_big"  // 431
	ReasonClientGone    = "client_gone"     // 499, logged only
	ReasonUnreachable   = "unreachable"     // 502, no byte of the request reached an instance
	ReasonInstanceBroke = "instance_broke"  // 502, the instance died or spoke no HTTP
	ReasonQueueFull     = "queue_full"      // 503, a bound of count or bytes is reached
	ReasonCannotStart   = "cannot_start"    // 503, no instance gets ready; the message has the function's last words
	ReasonDraining      = "draining"        // 503, this process is going away
	ReasonWaited        = "waited_too_long" // 504, no free slot in time
	ReasonTimeout       = "timeout"         // 504, the function did not answer in time
)

// Error is an answer that the platform gives in place of the function.
type Error struct {
	Status     int
	Reason     string        // one of the Reason constants
	Message    string        // one line: what failed and why
	RetryAfter time.Duration // 0 = waiting does not help
}

func (e *Error) Error() string { return fmt.Sprintf("%d %s: %s", e.Status, e.Reason, e.Message) }

// Client is what a step may ask about the other end.
type Client interface {
	// Gone says whether the client has closed its connection; it does not block and may be called at any time until
	// the exchange is finished, from any goroutine.
	Gone() bool
	// Abort ends a read of the request's body that is under way or to come, with an error. The connection is not used again.
	Abort()
	// Reset makes the connection end as an error (TCP reset) when it is closed: the answer was cut short.
	Reset()
}

// Exchange is one request and its answer on its way through the steps. It belongs to one goroutine at a time and must
// not be kept after it is finished.
type Exchange struct {
	Req  *fasthttp.Request
	Resp *fasthttp.Response

	// Set by the front.
	ID         string // X-Request-Id
	Arrived    time.Time
	RemoteAddr net.Addr
	TLS        bool
	HTTP10     bool // the client knows no chunks
	HTTP2      bool // x is a stream of HTTP/2
	Client     Client
	BodySize   int64   // bytes that the request's body will have; -1 = not known, 0 = none
	ReqTrailer []Field // of the request; there once its body has been read to its end
	In, Out    int64   // bytes of the bodies as read from and written to the client so far, upgraded connections not counted
	Cut        bool    // the answer broke off after its head
	Trace      trace.Context

	// Set by the router.
	Namespace string
	Service   string
	Revision  api.RevisionID
	Tag       string
	Limits    api.Timeouts // of the route; the revision's own hold too

	// Set by the activator: the request went through its queue, and how it was served when it had to wait.
	Proxied     bool
	QueuedAt    time.Time             // began to wait for a slot, here or in the queue-proxy
	Queued      time.Duration         // waited for a slot
	Cold        bool                  // waited for the start of the instance that served it
	Start       endpoints.StartTimes  // of that instance
	Instance    string                // set by the queue-proxy that had it last
	Sent        time.Time             // the head of the request was handed to the function
	BodyDone    bool                  // set by forward: the request body was read to its end
	Hijack      func(client net.Conn) // set by forward for an upgraded connection; the front calls it after the answer's head
	RespTrailer []Field               // set by forward before the answer's body ends
	Small       []byte                // forward's room for an answer's body that came with its head; Resp has it
	state       atomic.Uint32         // 0 open, 1 finished
	finish      [8]Finisher           // run in order of registration
	nfinish     int
}

// OnFinish registers f. When the exchange is finished already, f is called at once.
func (x *Exchange) OnFinish(f Finisher) {
	if x.state.Load() == 1 {
		f.Finish(x)
		return
	}
	x.finish[x.nfinish] = f
	x.nfinish++
}

// Finish runs the finishers, once. Forward calls it when the last byte of the answer has come from the instance, the
// front calls it in any case before it forgets the exchange.
func (x *Exchange) Finish() {
	if !x.state.CompareAndSwap(0, 1) {
		return
	}
	for i := range x.nfinish {
		x.finish[i].Finish(x)
		x.finish[i] = nil
	}
	x.nfinish = 0
}

// Finished says whether Finish has been called.
func (x *Exchange) Finished() bool { return x.state.Load() == 1 }

// Reset makes x ready for the next exchange. Only fronts call it.
func (x *Exchange) Reset() {
	x.Req, x.Resp, x.RemoteAddr, x.Client, x.Hijack = nil, nil, nil, nil, nil
	x.ID, x.Namespace, x.Service, x.Revision, x.Tag = "", "", "", "", ""
	x.Arrived, x.Sent, x.TLS, x.HTTP10, x.HTTP2, x.BodySize = time.Time{}, time.Time{}, false, false, false, 0
	x.In, x.Out, x.Cut, x.Trace, x.Instance, x.QueuedAt = 0, 0, false, trace.Context{}, "", time.Time{}
	x.Proxied, x.Queued, x.Cold, x.BodyDone, x.Start = false, 0, false, false, endpoints.StartTimes{}
	x.Limits = api.Timeouts{}
	x.ReqTrailer, x.RespTrailer = x.ReqTrailer[:0], x.RespTrailer[:0]
	x.nfinish = 0
	x.state.Store(0)
}
