// Package front turns connections into exchanges: an HTTP/1.1 server on fasthttp with the strictness and the endings that a
// proxy owes both sides.
//
// What fasthttp leaves to its user is done here: messages that two parsers could read in two ways are refused and the
// connection is closed; a request body that breaks off is an error and not an end; an unread body never becomes the next
// request; a client that leaves is noticed while its request waits; an answer that was cut short ends as a reset;
// upgraded connections count until they end.
package front

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// Config has the limits of the client's side. The zero value of each field means its default.
type Config struct {
	HeaderTimeout  time.Duration // total time for a request's head, and for a new connection's first byte; 10 s
	IdleTimeout    time.Duration // an idle connection is closed after this; 120 s
	BodyIdle       time.Duration // between two bytes of a request's body; 60 s
	WriteIdle      time.Duration // a client must take some bytes of an answer within this; 60 s
	MaxHeaderBytes int           // of a request's head; 16 KiB; more is answered with 431
	MaxConns       int           // connections at once; 65,536
	Log            *slog.Logger
}

// Server serves HTTP/1.1 on listeners. Make one with New.
type Server struct {
	cfg Config
	h   hop.Handler
	fs  *fasthttp.Server

	mu       sync.Mutex
	hijacked map[*clientConn]struct{}
	upgrades sync.WaitGroup
}

// New returns a server that hands every exchange to h.
func New(cfg Config, h hop.Handler) *Server {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&cfg.HeaderTimeout, 10*time.Second)
	def(&cfg.IdleTimeout, 120*time.Second)
	def(&cfg.BodyIdle, 60*time.Second)
	def(&cfg.WriteIdle, 60*time.Second)
	if cfg.MaxHeaderBytes <= 0 {
		cfg.MaxHeaderBytes = 16 << 10
	}
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = 1 << 16
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, h: h, hijacked: make(map[*clientConn]struct{})}
	s.fs = &fasthttp.Server{
		Handler:                      s.handle,
		ErrorHandler:                 s.refuse,
		ReadTimeout:                  cfg.HeaderTimeout,
		IdleTimeout:                  cfg.IdleTimeout,
		ReadBufferSize:               cfg.MaxHeaderBytes,
		Concurrency:                  cfg.MaxConns,
		MaxRequestBodySize:           math.MaxInt, // bodies stream; what may be held is the activator's to bound
		StreamRequestBody:            true,
		DisablePreParseMultipartForm: true,
		NoDefaultServerHeader:        true,
		NoDefaultDate:                true,
		NoDefaultContentType:         true,
		CloseOnShutdown:              true,
		Logger:                       quiet{},
	}
	return s
}

// quiet drops fasthttp's own log lines: they are about clients that misbehave, and are counted elsewhere.
type quiet struct{}

func (quiet) Printf(string, ...any) {}

// Serve accepts connections until Shutdown, then returns nil.
func (s *Server) Serve(ln net.Listener) error { return s.fs.Serve(&listener{ln, s}) }

// Shutdown stops accepting, says "Connection: close" on what is under way, and returns when all exchanges and upgraded
// connections have ended. When ctx ends first, what is left is reset and ctx's cause is returned.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.fs.ShutdownWithContext(ctx)
	done := make(chan struct{})
	go func() { s.upgrades.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		s.mu.Lock()
		for c := range s.hijacked {
			c.Reset()
			c.Conn.Close()
		}
		s.mu.Unlock()
		<-done
		err = context.Cause(ctx)
	}
	return err
}

var exchanges = sync.Pool{New: func() any { return new(hop.Exchange) }}

func (s *Server) handle(ctx *fasthttp.RequestCtx) {
	c := ctx.Conn().(*clientConn)
	c.begin()
	x := exchanges.Get().(*hop.Exchange)
	x.Req, x.Resp, x.Client, x.RemoteAddr, x.Arrived = &ctx.Request, &ctx.Response, c, c.RemoteAddr(), time.Now()
	x.TLS, x.HTTP10 = ctx.IsTLS(), !x.Req.Header.IsHTTP11()
	if x.Req.IsBodyStream() {
		x.BodySize = int64(x.Req.Header.ContentLength())
		c.bodyIdle.Store(int64(s.cfg.BodyIdle))
	}
	x.ID = requestID(x.Req.Header.Peek("X-Request-Id"))
	x.Req.Header.Set("X-Request-Id", x.ID)

	err := check(&x.Req.Header)
	if err == nil {
		err = originForm(&x.Req.Header)
	}
	if err == nil {
		err = s.h.Serve(x)
	}
	if err != nil {
		Render(x, err)
		x.Finish()
	}
	x.Resp.Header.Set("X-Request-Id", x.ID)
	if x.BodySize == 0 || x.BodyDone {
		c.bodyIdle.Store(0)
	} else {
		// What is left of the body would be taken for the next request.
		x.Resp.SetConnectionClose()
		c.linger.Store(true)
	}
	if x.Hijack != nil {
		s.upgrade(ctx, c, x)
		return
	}
	if x.Resp.IsBodyStream() && x.Resp.Header.ContentLength() < 0 && x.HTTP10 && !x.Resp.SkipBody {
		s.untilClose(ctx, x)
		return
	}
	if x.Finished() {
		x.Reset()
		exchanges.Put(x)
	}
	// Else the answer is still streaming and finishes x; such exchanges are left to the garbage collector.
}

// upgrade lets the bytes flow after the 101 went out.
func (s *Server) upgrade(ctx *fasthttp.RequestCtx, c *clientConn, x *hop.Exchange) {
	s.mu.Lock()
	s.hijacked[c] = struct{}{}
	s.upgrades.Add(1)
	s.mu.Unlock()
	flow := x.Hijack
	ctx.Hijack(func(hc net.Conn) {
		defer func() {
			x.Finish()
			s.mu.Lock()
			delete(s.hijacked, c)
			s.mu.Unlock()
			s.upgrades.Done()
		}()
		c.SetDeadline(time.Time{})
		flow(&upgraded{Conn: hc, c: c})
	})
}

// untilClose answers a client that knows no chunks: the end of the connection is the end of the body, and a reset is
// its breaking off.
func (s *Server) untilClose(ctx *fasthttp.RequestCtx, x *hop.Exchange) {
	resp := &ctx.Response
	resp.Header.Del("Transfer-Encoding")
	head := append([]byte("HTTP/1.1 "), strconv.Itoa(resp.StatusCode())...)
	head = append(append(append(head, ' '), fasthttp.StatusMessage(resp.StatusCode())...), "\r\nConnection: close\r\n"...)
	for k, v := range resp.Header.All() {
		if string(k) != "Transfer-Encoding" && string(k) != "Content-Length" && string(k) != "Connection" {
			head = append(append(append(append(head, k...), ": "...), v...), "\r\n"...)
		}
	}
	head = append(head, "\r\n"...)
	ctx.HijackSetNoResponse(true)
	ctx.Hijack(func(c net.Conn) {
		c.SetWriteDeadline(time.Time{})
		if _, err := c.Write(head); err == nil {
			_ = ctx.Response.BodyWriteTo(c)
		}
		_ = ctx.Response.CloseBodyStream()
		x.Finish()
	})
}

// Render turns an error into the platform's own answer. What is no *hop.Error is a step's refusal that nobody took over.
func Render(x *hop.Exchange, err error) {
	var e *hop.Error
	switch {
	case errors.As(err, &e):
	case errors.Is(err, hop.ErrBusy):
		e = &hop.Error{Status: 503, Reason: hop.ReasonQueueFull, Message: "pending request queue full", RetryAfter: time.Second}
	default:
		e = &hop.Error{Status: 502, Reason: hop.ReasonInstanceBroke, Message: err.Error()}
	}
	writeError(x.Resp, e)
}

func writeError(r *fasthttp.Response, e *hop.Error) {
	r.Reset()
	r.SetStatusCode(e.Status)
	r.Header.Set("Content-Type", "text/plain; charset=utf-8")
	r.Header.Set("X-Content-Type-Options", "nosniff")
	r.Header.Set("X-Thaw-Error", e.Reason)
	if e.RetryAfter > 0 {
		r.Header.Set("Retry-After", strconv.Itoa(int(math.Ceil(e.RetryAfter.Seconds()))))
	}
	if e.Status == 400 || e.Status == 405 || e.Status == 431 || e.Status == 505 {
		r.SetConnectionClose()
	}
	r.SetBodyString(oneLine(e.Message) + "\n")
}

// oneLine keeps what a function said from writing more than its line.
func oneLine(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c < ' ' || c == 0x7f {
			b[i] = ' '
		}
	}
	return string(b)
}

// refuse answers what fasthttp could not read.
func (s *Server) refuse(ctx *fasthttp.RequestCtx, err error) {
	e := &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "malformed request"}
	var small *fasthttp.ErrSmallBuffer
	var nerr net.Error
	switch {
	case errors.As(err, &small):
		e = &hop.Error{Status: 431, Reason: hop.ReasonHeaderTooBig, Message: "request header exceeds " + strconv.Itoa(s.cfg.MaxHeaderBytes) + " bytes"}
	case errors.As(err, &nerr) && nerr.Timeout():
		e = &hop.Error{Status: 408, Reason: hop.ReasonBadRequest, Message: "request head did not come within " + s.cfg.HeaderTimeout.String()}
	}
	writeError(&ctx.Response, e)
	ctx.Response.SetConnectionClose()
	if c, ok := ctx.Conn().(*clientConn); ok {
		c.linger.Store(true)
	}
}

// requestID keeps a sane id of the caller's and makes one otherwise.
func requestID(given []byte) string {
	if n := len(given); n > 0 && n <= 128 {
		ok := true
		for _, c := range given {
			if c <= ' ' || c >= 0x7f || c == '"' || c == '\\' {
				ok = false
				break
			}
		}
		if ok {
			return string(given)
		}
	}
	var b [16]byte
	for i := 0; i < 16; i += 8 {
		v := rand.Uint64()
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return hex.EncodeToString(b[:])
}
