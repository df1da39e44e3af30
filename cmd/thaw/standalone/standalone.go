// Package standalone runs a single hop in front of fixed addresses, without etcd and without instances of its own:
// `thaw router --static` and `thaw activator --static`. They are useful by themselves, and they are what the price of a
// hop is measured on.
package standalone

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/activator"
	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/cmd/thaw/side"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/handover"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/ingress"
	"github.com/thawrun/thaw/internal/meter"
	"github.com/thawrun/thaw/internal/observe"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/telemetry"
	"github.com/thawrun/thaw/internal/trace"
	"github.com/thawrun/thaw/internal/trace/otlp"
	"github.com/thawrun/thaw/router"
)

// Config describes a hop.
type Config struct {
	Listen      string
	TLS         ingress.Options // its Listen is one more address
	Handover    string          // path of the unix socket by which a successor takes the listening sockets over; "" = none
	Static      []string        // HOST=ADDR, with Activator also HOST=ADDR,ADDR; "*" as HOST stands for every host that is not named
	Protocol    string          // what the addresses speak: "h2c" (HTTP/2 with prior knowledge), "h1" or "" (HTTP/1.1), "auto" (see forward.Config)
	Hops        bool            // the addresses are hops of the platform: what they refuse goes elsewhere, or is answered as they said it
	Activator   bool            // hold requests in a queue per host, else pass them on at once
	Concurrency int             // with Activator: requests at once per address; 0 = no limit
	Queue       int             // with Activator: requests that may wait per host; 0 = 10,000
	MaxWait     time.Duration
	Drain       time.Duration // how long requests may take to end after ctx, or after a successor's word; 0 = 15 s
	Metrics     string        // address of /metrics, /healthz and /readyz; "" = none
	Observe     observe.Config
	Version     string
	Log         *slog.Logger
}

// namespace of the revisions that stand for fixed addresses.
const namespace = "static"

// graceShare is the part of Drain for which connections without a request may send one more when a successor has taken over.
const graceShare = 3

// parse turns HOST=ADDR into a route table and the addresses by revision.
func parse(static []string) (*routes.Table, map[api.RevisionID][]string, error) {
	if len(static) == 0 {
		return nil, nil, errors.New("no address: name at least one with --static HOST=ADDR, or *=ADDR for all hosts")
	}
	table := &routes.Table{Hosts: make(map[string]*routes.Route)}
	addrs := make(map[api.RevisionID][]string)
	for _, s := range static {
		host, list, ok := strings.Cut(s, "=")
		to := strings.Split(list, ",")
		for _, addr := range to {
			if _, port, err := net.SplitHostPort(addr); !ok || host == "" || err != nil || port == "" {
				return nil, nil, fmt.Errorf("--static %q: want HOST=ADDR:PORT, for example hello.example.com=127.0.0.1:9000 or *=127.0.0.1:9000", s)
			}
		}
		host = strings.ToLower(host)
		if table.Hosts[host] != nil {
			return nil, nil, fmt.Errorf("--static %q: the host is named twice", s)
		}
		id := api.MakeRevisionID(namespace, host)
		addrs[id] = to
		table.Hosts[host] = &routes.Route{Namespace: namespace, Service: host, Targets: []routes.Target{{Revision: id, Percent: 100}}}
	}
	return table, addrs, nil
}

// forwards is the step that knows the ways of each revision; it takes the first.
type forwards map[api.RevisionID][]way

type way struct {
	*forward.Forward
	addr string
}

// Serve passes x on to the address of its revision.
func (f forwards) Serve(x *hop.Exchange) error {
	return f[x.Revision][0].Serve(x)
}

// Serve passes x on to the address.
func (w way) Serve(x *hop.Exchange) error {
	x.Instance = w.addr
	return w.Forward.Serve(x)
}

// find is the way to an instance, whose id is its address.
func (f forwards) find(in endpoints.Instance) hop.Handler {
	for _, w := range f[in.Revision] {
		if w.addr == in.ID {
			return w
		}
	}
	return hop.HandlerFunc(func(*hop.Exchange) error { return hop.ErrNotSent })
}

// telemetry makes what counts and records.
func (cfg *Config) telemetry(addrs map[api.RevisionID][]string) (*observe.Observer, *telemetry.Metrics, error) {
	c := cfg.Observe
	c.Requests, c.Span, c.Service, c.Version, c.Log = &meter.Requests{}, "router.route", "thaw-router", cfg.Version, cfg.Log
	if cfg.Activator {
		c.Service = "thaw-activator"
	}
	for id := range addrs {
		_, host := id.Split()
		c.Requests.Add(id, host)
	}
	c.Exporter = func(url string, resource []trace.Attr) trace.Exporter { return otlp.New(url, resource) }
	watch, err := observe.New(c)
	if err != nil {
		return nil, nil, err
	}
	metrics, err := telemetry.New(watch.WriteMetrics)
	return watch, metrics, err
}

// server is a running hop.
type server struct {
	cfg     Config
	metrics *telemetry.Metrics
	watch   *observe.Observer
	to      forwards
	act     *activator.Activator // nil = none
	in      *ingress.Ingress
	sockets *handover.Sockets
	front   *front.Server
	side    *side.Server // nil = none

	stopping atomic.Bool
}

// Run serves until ctx ends or a successor has taken over, then drains. ready is called once it listens, with the addresses of requests and of
// metrics ("" = none).
func Run(ctx context.Context, cfg Config, ready func(listen, metrics string)) error {
	if cfg.Drain <= 0 {
		cfg.Drain = 15 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &server{cfg: cfg}
	defer s.close()
	if err := s.connect(); err != nil {
		return err
	}
	addrs := []string{cfg.Listen}
	for _, a := range []string{cfg.TLS.Listen, cfg.Metrics} {
		if a != "" {
			addrs = append(addrs, a)
		}
	}
	var err error
	if s.sockets, err = handover.Open(cfg.Handover, addrs, cfg.Log); err != nil {
		return err
	}
	return s.run(ctx, ready)
}

// connect makes the steps.
func (s *server) connect() error {
	cfg := &s.cfg
	table, addrs, err := parse(cfg.Static)
	if err != nil {
		return err
	}
	switch cfg.Protocol {
	case "", "h1", "auto", api.ProtocolH2C:
	default:
		return fmt.Errorf("--upstream-protocol %q: expected h1, h2c or auto", cfg.Protocol)
	}
	if s.watch, s.metrics, err = cfg.telemetry(addrs); err != nil {
		return err
	}
	s.to = make(forwards, len(addrs))
	for id, list := range addrs {
		if len(list) > 1 && !cfg.Activator {
			_, host := id.Split()
			return fmt.Errorf("--static: %s has %d addresses: a router alone has no load to balance by, thaw activator has", host, len(list))
		}
		dial := time.Duration(0)
		if !cfg.Activator {
			dial = forward.LoneDialTimeout
		}
		for _, addr := range list {
			s.to[id] = append(s.to[id], way{forward.New(forward.Config{Addr: addr, Protocol: cfg.Protocol, Hop: cfg.Hops, DialTimeout: dial}), addr})
		}
	}
	var next hop.Handler = s.to
	if cfg.Activator {
		if err := s.activate(addrs); err != nil {
			return err
		}
		next = s.act
	}
	r, err := router.New(router.Config{Next: next, Log: cfg.Log})
	if err != nil {
		return err
	}
	r.SetTable(table)
	if s.in, err = ingress.Open(cfg.TLS, r, r.Public, cfg.Log, s.metrics.Meter("tls")); err != nil {
		return err
	}
	s.front = front.New(s.in.Front(front.Config{Observer: s.watch.Front(), Log: cfg.Log}), s.in)
	return nil
}

func (s *server) activate(addrs map[api.RevisionID][]string) (err error) {
	s.act, err = activator.New(activator.Config{
		MaxWaiting: s.cfg.Queue, MaxWait: s.cfg.MaxWait, Log: s.cfg.Log, Meter: s.metrics.Meter("activator"),
		Demand:   func(endpoints.Demand) {}, // nobody could start more
		Instance: s.to.find,
	})
	if err != nil {
		return err
	}
	for id, list := range addrs {
		rev := &api.Revision{}
		rev.Namespace, rev.Name = id.Split()
		n := int64(s.cfg.Concurrency)
		rev.Spec.ContainerConcurrency = &n
		s.act.SetRevision(rev)
		known := &endpoints.Snapshot{Revision: id, Sequence: 1}
		for _, addr := range list {
			known.Instances = append(known.Instances, endpoints.Instance{ID: addr, Revision: id, State: endpoints.Ready, Addr: addr, Capacity: s.cfg.Concurrency})
		}
		s.act.SetEndpoints(known)
	}
	return nil
}

// run serves on the sockets. A predecessor is told when all of them are served.
func (s *server) run(ctx context.Context, ready func(listen, metrics string)) error {
	group, groupCtx := errgroup.WithContext(context.WithoutCancel(ctx))
	below, stopBelow := context.WithCancel(groupCtx)
	defer stopBelow()
	group.Go(func() error { return s.watch.Run(below) })
	group.Go(func() error { return s.in.Run(below) })
	if s.act != nil {
		group.Go(func() error { return s.act.Run(below) })
	}
	public, metricsAddr := s.sockets.Listeners, ""
	if s.cfg.Metrics != "" {
		last := len(public) - 1
		metricsAddr = public[last].Addr().String()
		s.serveSide(group, public[last])
		public = public[:last]
	}
	for _, ln := range public {
		group.Go(func() error {
			if err := s.front.Serve(ln); !errors.Is(err, front.ErrClosed) { // the end came first
				return err
			}
			return nil
		})
	}
	group.Go(func() error {
		defer stopBelow()
		return s.wait(ctx, groupCtx)
	})
	if err := s.sockets.Ready(); err != nil {
		group.Go(func() error { return err })
	} else {
		ready(public[0].Addr().String(), metricsAddr)
	}
	return group.Wait()
}

// wait returns after the drain that the end of a context or a successor begins.
func (s *server) wait(ctx, groupCtx context.Context) error {
	taken := false
	select {
	case <-ctx.Done():
	case <-groupCtx.Done():
	case <-s.sockets.Taken():
		taken = true
	}
	s.stopping.Store(true)
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Drain)
	defer cancel()
	if s.side != nil {
		defer s.side.Close()
	}
	if !taken {
		return s.front.Shutdown(drain)
	}
	s.cfg.Log.Info("another process has taken over; this one ends with its last request")
	if s.side != nil {
		s.side.Shutdown(drain) // probes are the successor's to answer
	}
	return s.front.Retire(drain, s.cfg.Drain/graceShare)
}

// serveSide serves those who look after the process.
func (s *server) serveSide(group *errgroup.Group, ln net.Listener) {
	s.side = side.New(s.metrics, func() bool { return !s.stopping.Load() })
	group.Go(func() error { return s.side.Serve(ln) })
}

// close gives back what was opened, in whatever state.
func (s *server) close() {
	if s.sockets != nil {
		s.sockets.Close()
	}
	for _, list := range s.to {
		for _, w := range list {
			w.Close()
		}
	}
}
