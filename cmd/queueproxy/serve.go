package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/observe"
	"github.com/thawrun/thaw/internal/probe"
	"github.com/thawrun/thaw/internal/sock"
	"github.com/thawrun/thaw/internal/trace"
	"github.com/thawrun/thaw/internal/trace/otlplean"
	"github.com/thawrun/thaw/queueproxy"
)

const (
	reportEvery  = time.Second
	readyTimeout = 10 * time.Second // of an aggressive probe, as Knative's queue-proxy
)

// server is the running sidecar: the front with requests, and up to three small ones for those who look after it.
type server struct {
	// static after start
	c       *config
	log     *slog.Logger
	proxy   *queueproxy.Proxy
	front   *front.Server
	watch   *observe.Observer
	ln      net.Listener
	side    []*sideServer
	started time.Time

	stopping   atomic.Bool   // probes fail, answers say Connection: close
	terminated chan struct{} // closed by SIGTERM
	drained    chan struct{} // closed when the last request is out
	latest     atomic.Pointer[endpoints.Stat]
}

type sideServer struct {
	name string
	ln   net.Listener
	http *http.Server
}

// start opens everything, so that what cannot be opened is an error before anything is served.
func start(c *config, log *slog.Logger) (_ *server, err error) {
	s := &server{c: c, log: log, started: time.Now(), terminated: make(chan struct{}), drained: make(chan struct{})}
	s.latest.Store(&endpoints.Stat{Revision: c.proxy().Revision, Source: c.instance, Time: s.started})
	sidecar := &queueproxy.Sidecar{Stopping: s.stopping.Load}
	if c.probe != nil {
		prober, err := probe.New(c.probe, c.upstream, probe.Options{})
		if err != nil {
			return nil, err
		}
		sidecar.Ready = ready(prober)
	}
	s.proxy = queueproxy.New(c.proxy(), forward.New(forward.Config{
		Addr: c.upstream, Protocol: c.protocol, Total: c.total, ResponseStart: c.responseStart, Idle: c.idle, DialTimeout: forward.LoneDialTimeout,
	}))
	sidecar.Proxy = s.proxy
	watch := c.observe
	watch.Span, watch.Service, watch.Version, watch.Log = "queueproxy.serve", "thaw-queueproxy", version, log
	watch.Exporter = func(url string, resource []trace.Attr) trace.Exporter { return otlplean.New(url, resource) }
	if s.watch, err = observe.New(watch); err != nil {
		return nil, err
	}
	s.front = front.New(front.Config{Observer: s.watch.Front(), Log: log}, sidecar)

	defer func() {
		if err != nil {
			s.closeListeners()
		}
	}()
	if s.ln, err = sock.Listen(c.listen); err != nil {
		return nil, fmt.Errorf("cannot serve requests: %w", err)
	}
	for _, side := range []struct {
		name, addr string
		handler    http.Handler
	}{{"admin", c.admin, s.adminHandler()}, {"stats", c.stats, s.statsHandler()}, {"metrics", c.metrics, s.metricsHandler()}} {
		if side.addr == "" {
			continue
		}
		ln, err := net.Listen("tcp", side.addr)
		if err != nil {
			return nil, fmt.Errorf("cannot open the %s port: %w", side.name, err)
		}
		s.side = append(s.side, &sideServer{side.name, ln, &http.Server{
			Handler: side.handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
			ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		}})
	}
	for _, note := range c.notes {
		log.Warn("has no effect", "setting", note)
	}
	return s, nil
}

func (s *server) closeListeners() {
	if s.ln != nil {
		s.ln.Close()
	}
	for _, side := range s.side {
		side.ln.Close()
	}
}

// ready asks the function as Knative's queue-proxy does: without a period for up to ten seconds, else once.
func ready(p *probe.Prober) func(context.Context) error {
	return func(ctx context.Context) error {
		if !p.Aggressive() {
			return p.Once(ctx)
		}
		ctx, cancel := context.WithTimeout(ctx, readyTimeout)
		defer cancel()
		return p.WaitReady(ctx)
	}
}

// readyLine says on one line where everything is.
func (s *server) readyLine() string {
	b := &strings.Builder{}
	fmt.Fprintf(b, "queueproxy ready listen=%s upstream=%s concurrency=%d", s.ln.Addr(), s.c.upstream, s.c.concurrency)
	for _, side := range s.side {
		fmt.Fprintf(b, " %s=%s", side.name, side.ln.Addr())
	}
	return b.String()
}

// run serves until ctx ends, drains, and returns when all is over. An error means that something broke, or that the drain was cut.
func (s *server) run(ctx context.Context) error {
	broken := make(chan error, 1+len(s.side)) // room for all: nobody has to listen any more
	var serving, reporting sync.WaitGroup
	serving.Go(func() {
		if err := s.front.Serve(s.ln); err != nil {
			broken <- fmt.Errorf("serving requests: %w", err)
		}
	})
	for _, side := range s.side {
		serving.Go(func() {
			if err := side.http.Serve(side.ln); !errors.Is(err, http.ErrServerClosed) {
				broken <- fmt.Errorf("serving the %s port: %w", side.name, err)
			}
		})
	}
	end := make(chan struct{})
	reporting.Go(func() { s.report(end) })
	watching, unwatch := context.WithCancel(context.Background())
	reporting.Go(func() { _ = s.watch.Run(watching) }) // what it could not write it has said

	var err error
	select {
	case <-ctx.Done():
		s.log.Info("drain begins", "inside", s.proxy.InFlight())
	case err = <-broken:
	}
	close(s.terminated)
	err = errors.Join(err, s.drain())
	close(s.drained) // answers /wait-for-drain, whose server ends last
	close(end)
	unwatch()
	reporting.Wait()
	hurry, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, side := range s.side {
		if side.http.Shutdown(hurry) != nil {
			side.http.Close()
		}
	}
	serving.Wait()
	return err
}

// drain lets the last request out: not ready, quiet, accept nothing, wait.
func (s *server) drain() error {
	s.stopping.Store(true)
	ctx := context.Background()
	if s.c.drainTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.c.drainTimeout, fmt.Errorf("the drain took longer than %v", s.c.drainTimeout))
		defer cancel()
	}
	s.quiet(ctx)
	// The front finishes what has arrived and closes the connections; only then would the proxy refuse, when there is nobody left.
	err := s.front.Shutdown(ctx)
	err = errors.Join(err, s.proxy.Drain(ctx))
	s.proxy.Close()
	return err
}

// quiet returns when no request has come for the time that was asked for. Those who send requests learn of a drain with some delay.
func (s *server) quiet(ctx context.Context) {
	if s.c.drainQuiet <= 0 {
		return
	}
	step := max(time.Millisecond, s.c.drainQuiet/20)
	last, since := s.proxy.Total(), time.Now()
	for t := time.NewTicker(step); ; {
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case now := <-t.C:
			if n := s.proxy.Total(); n != last {
				last, since = n, now
			} else if now.Sub(since) >= s.c.drainQuiet {
				t.Stop()
				return
			}
		}
	}
}

// report cuts the statistics each second, and once more at the end.
func (s *server) report(end <-chan struct{}) {
	t := time.NewTicker(reportEvery)
	defer t.Stop()
	cut := func(now time.Time) {
		stat := s.proxy.Report(now)
		s.latest.Store(&stat)
	}
	for {
		select {
		case now := <-t.C:
			cut(now)
		case <-end:
			cut(time.Now())
			return
		}
	}
}
