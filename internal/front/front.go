// Package front turns connections into exchanges: an HTTP/1.1 server with the strictness and the endings that a proxy owes both
// sides, and on the same port HTTP/2 by prior knowledge.
//
// fasthttp parses the heads and carries the messages. The connection's loop is ours, because a proxy needs what fasthttp's server keeps to
// itself: messages that two parsers could read in two ways are refused and the connection is closed; a request body
// that breaks off is an error and not an end; an unread body never becomes the next request; whether a body is wanted (100-continue) is the
// function's to say, and what else it says before its answer (103) is passed on; trailers go both ways; a client that leaves is noticed while its
// request waits; an answer that was cut short ends as a reset; an idle connection holds no buffers.
//
// HTTP/2 is net/http's; h2.go translates its streams into the same exchanges.
package front

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
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
	Log            *slog.Logger
}

// Server serves HTTP/1.1 and HTTP/2 on listeners. Make one with New.
type Server struct {
	cfg Config
	h   hop.Handler

	h2      *http.Server
	h2conns handover

	stopping atomic.Bool
	mu       sync.Mutex // guards what follows
	lns      map[net.Listener]struct{}
	conns    map[*clientConn]struct{}
	serving  sync.WaitGroup // connections of HTTP/1; grows only under mu and while not stopping
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
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, h: h, lns: make(map[net.Listener]struct{}), conns: make(map[*clientConn]struct{})}
	s.h2conns = handover{conns: make(chan net.Conn), closed: make(chan struct{})}
	s.h2 = s.newH2()
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
	if len(s.lns) == 0 {
		s.h2conns.serving.Go(func() { _ = s.h2.Serve(&s.h2conns) })
	}
	s.lns[ln] = struct{}{}
	s.mu.Unlock()
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
	if s.stopping.Load() || len(s.conns) >= s.cfg.MaxConns {
		s.mu.Unlock()
		nc.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.serving.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.serving.Done()
		if c.serve() {
			return // it is HTTP/2's now, and forgotten when that closes it
		}
		c.Close()
		s.forget(c)
	}()
}

func (s *Server) forget(c *clientConn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
}

// Shutdown stops accepting, says "Connection: close" and GOAWAY on what is under way, and returns when all exchanges and upgraded
// connections have ended. When ctx ends first, what is left is reset and ctx's cause is returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopping.Store(true)
	for ln := range s.lns {
		ln.Close()
	}
	for c := range s.conns {
		c.wake()
	}
	s.mu.Unlock()

	h1 := make(chan struct{})
	go func() { s.serving.Wait(); close(h1) }()
	err := s.h2.Shutdown(ctx)
	select {
	case <-h1:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		err = context.Cause(ctx)
		s.mu.Lock()
		for c := range s.conns {
			c.Reset()
			c.Close()
		}
		s.mu.Unlock()
		s.h2.Close()
	}
	s.h2conns.serving.Wait()
	return err
}

// run is what every exchange goes through, whatever brought it.
func (s *Server) run(x *hop.Exchange, small *[]byte) {
	h := &x.Req.Header
	x.ID = requestID(h.Peek("X-Request-Id"))
	err := s.check(h)
	if err == nil {
		err = originForm(h)
	}
	if err == nil {
		h.Set("X-Request-Id", x.ID)
		err = readSmall(x, small)
	}
	if err == nil {
		err = s.h.Serve(x)
	}
	if err != nil {
		Render(x, err)
		x.Finish()
	}
	x.Resp.Header.Set("X-Request-Id", x.ID)
}
