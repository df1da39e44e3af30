// Package front turns connections into exchanges: an HTTP/1.1 server with the strictness and the endings that a proxy owes both
// sides, and on the same port HTTP/2 by prior knowledge, and both of them over TLS.
//
// fasthttp parses the heads and carries the messages. The connection's loop is ours, because a proxy needs what fasthttp's server keeps to
// itself: messages that two parsers could read in two ways are refused and the connection is closed; a request body
// that breaks off is an error and not an end; an unread body never becomes the next request; whether a body is wanted (100-continue) is the
// function's to say, and what else it says before its answer (103) is passed on; trailers go both ways; a client that leaves is noticed while its
// request waits; an answer that was cut short ends as a reset; an idle connection holds no buffers.
//
// Connections of HTTP/2 are package h2's; h2.go turns their streams into the same exchanges.
package front

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

// Config has the limits of the client's side. The zero value of each field means its default.
type Config struct {
	HeaderTimeout  time.Duration // total time for a request's head, and for a new connection's first byte; 10 s
	IdleTimeout    time.Duration // an idle connection is closed after this, or up to a quarter later; 120 s
	BodyIdle       time.Duration // between two bytes of a request's body in HTTP/1; 60 s
	WriteIdle      time.Duration // a client must take some bytes of an answer within this; 60 s
	MaxHeaderBytes int           // of a request's head in HTTP/1; 16 KiB; more is answered with 431
	MaxHeaderLines int           // fields of a request's head; 256; more is answered with 431
	MaxConns       int           // connections at once; 65,536; more are closed at once
	MaxStreams     int           // streams at once on an HTTP/2 connection; 250
	TLS            *tls.Config   // nil = TLS is not spoken; else it shares each port with plain HTTP
	MaxHandshakes  int           // TLS handshakes at once; 1,024; one more ends the oldest
	Handshake      func(error)   // told how each TLS handshake ended; nil = nobody asks
	Observer       hop.Observer  // is told of every exchange; nil = nobody
	Log            *slog.Logger
}

// Server serves HTTP/1.1 and HTTP/2 on listeners. Make one with New.
type Server struct {
	cfg Config
	h   hop.Handler

	readers sync.Pool // of *bufio.Reader, MaxHeaderBytes each

	handshakes handshakes

	sweeping atomic.Bool // the sweeper will run, or runs
	stopping atomic.Bool
	idleEnd  atomic.Pointer[time.Time] // connections without a request are closed then; set before stopping is
	mu       sync.Mutex                // guards what follows
	lns      map[net.Listener]struct{}
	conns    seats
	sweeper  *time.Timer    // nil until the first request
	serving  sync.WaitGroup // listeners and connections; grows only under mu, by a listener that it counts or while not stopping
}

// New returns a server that hands every exchange to h.
func New(cfg Config, h hop.Handler) *Server {
	duration := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	number := func(n *int, v int) {
		if *n <= 0 {
			*n = v
		}
	}
	duration(&cfg.HeaderTimeout, 10*time.Second)
	duration(&cfg.IdleTimeout, 120*time.Second)
	duration(&cfg.BodyIdle, 60*time.Second)
	duration(&cfg.WriteIdle, 60*time.Second)
	number(&cfg.MaxHeaderBytes, 16<<10)
	number(&cfg.MaxHeaderLines, 256)
	number(&cfg.MaxConns, 1<<16)
	number(&cfg.MaxStreams, 250)
	number(&cfg.MaxHandshakes, 1024)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, h: h, lns: make(map[net.Listener]struct{})}
	s.handshakes.max = cfg.MaxHandshakes
	return s
}

// ErrClosed is returned by Serve after Shutdown was called.
var ErrClosed = errors.New("front: server is shut down")

// Serve accepts connections until Shutdown, then returns nil. It may be called for several listeners.
func (s *Server) Serve(ln net.Listener) error {
	s.mu.Lock()
	if s.stopping.Load() {
		s.mu.Unlock()
		ln.Close()
		return ErrClosed
	}
	s.lns[ln] = struct{}{}
	s.serving.Add(1)
	s.mu.Unlock()
	defer s.serving.Done()
	var pause time.Duration
	for {
		nc, err := ln.Accept()
		switch {
		case err == nil:
			pause = 0
			s.accept(nc)
		case s.stopping.Load():
			return nil
		case temporary(err):
			// Out of descriptors, most likely: those that we have will be given back.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.cfg.Log.Warn("cannot accept", "error", err)
			time.Sleep(pause)
		default:
			return err
		}
	}
}

func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

func (s *Server) accept(nc net.Conn) {
	c := newConn(s, nc)
	s.mu.Lock()
	if s.stopping.Load() && s.idleEnd.Load().IsZero() || s.conns.taken >= s.cfg.MaxConns {
		s.mu.Unlock()
		nc.Close()
		return
	}
	s.conns.take(c)
	s.serving.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.serving.Done()
		c.serve()
		c.Close()
		s.forget(c)
	}()
}

func (s *Server) forget(c *clientConn) {
	s.mu.Lock()
	s.conns.leave(c)
	s.mu.Unlock()
}

// Shutdown stops accepting, says "Connection: close" and GOAWAY on what is under way, and returns when all exchanges and upgraded
// connections have ended. Connections without a request are closed. When ctx ends first, what is left is reset and ctx's cause is returned.
func (s *Server) Shutdown(ctx context.Context) error { return s.stop(ctx, time.Time{}) }

// Retire is Shutdown for a server whose listeners' sockets another process goes on with. A client that finds its connection closed when it
// sends its next request would see a failure where there is none; so connections without a request have grace to send one more, which is
// answered with "Connection: close".
func (s *Server) Retire(ctx context.Context, grace time.Duration) error {
	return s.stop(ctx, time.Now().Add(grace))
}

func (s *Server) stop(ctx context.Context, idleEnd time.Time) error {
	s.mu.Lock()
	s.idleEnd.Store(&idleEnd)
	s.stopping.Store(true)
	for ln := range s.lns {
		ln.Close()
	}
	for seat := range s.conns.all {
		seat.c.wake()
		if seat.c.h2 != nil {
			seat.c.h2.Drain()
		}
	}
	s.mu.Unlock()
	if idleEnd.IsZero() {
		s.handshakes.end()
	}

	served := make(chan struct{})
	go func() { s.serving.Wait(); close(served) }()
	select {
	case <-served:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for seat := range s.conns.all {
		seat.c.kill()
	}
	s.mu.Unlock()
	return context.Cause(ctx)
}

// observe tells the observer that x is over.
func (s *Server) observe(x *hop.Exchange) {
	if s.cfg.Observer != nil {
		s.cfg.Observer.End(x)
	}
}

// run is what every exchange goes through, whatever brought it.
func (s *Server) run(x *hop.Exchange, small *[]byte) {
	h := &x.Req.Header
	given := h.PeekCanonical(headerID)
	x.ID = requestID(given)
	known := string(given) == x.ID
	err := s.check(h)
	if err == nil {
		err = originForm(h)
	}
	if err == nil {
		if !known {
			h.SetCanonical(headerID, []byte(x.ID))
		}
		if s.cfg.Observer != nil {
			s.cfg.Observer.Begin(x)
		}
		err = readSmall(x, small)
	}
	if err == nil {
		err = s.h.Serve(x)
	}
	if err != nil {
		Render(x, err)
		x.Finish()
	}
	x.Resp.Header.SetCanonical(headerID, []byte(x.ID))
}

var headerID = []byte("X-Request-Id")
