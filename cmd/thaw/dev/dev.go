// Package dev runs all parts of Thaw in one process: `thaw dev`. It is the place where the parts meet; each knows only the few
// methods that it declares itself.
//
//	router -> activator -> queue-proxy -> forward -> function        requests (one process, proxied once)
//	activator -> autoscaler -> agent                                 demand, decisions
//	agent -> activator, autoscaler, reconcilers                      snapshots of instances
//	API server -> etcd -> reconcilers -> router, autoscaler, agent   desired state
package dev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/activator"
	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/cmd/thaw/pairs"
	"github.com/thawrun/thaw/cmd/thaw/proxies"
	"github.com/thawrun/thaw/control/apiserver"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/instance"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/internal/bundle"
	"github.com/thawrun/thaw/internal/calls"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/ingress"
	"github.com/thawrun/thaw/internal/meter"
	"github.com/thawrun/thaw/internal/observe"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/sock"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/internal/telemetry"
	"github.com/thawrun/thaw/internal/trace"
	"github.com/thawrun/thaw/internal/trace/otlp"
	"github.com/thawrun/thaw/queueproxy"
	"github.com/thawrun/thaw/router"
)

// Config is what `thaw dev` can be told. Dir is required.
type Config struct {
	Listen      string // ingress; "127.0.0.1:8080"
	API         string // API server; "127.0.0.1:8081"
	Dir         string // data folder: state, token, packages, logs, instances
	Domain      string // public hosts end in it; "localhost"
	TLS         ingress.Options
	AllowRemote bool          // Listen and API may be other than loopback addresses
	ImagesFile  string        // YAML map of image references to local code; "" = none
	Autoscaler  string        // YAML file with Knative's config-autoscaler keys; "" = defaults
	Store       string        // URL of a package store; "" = the folder store/ in Dir
	PackageMiB  int64         // bound of unpacked packages; 0 = 10 GiB
	Etcd        []string      // external etcd; empty = embedded in Dir
	EtcdConfig  state.Config  // TLS files and password for Etcd
	MaxTimeout  time.Duration // max-revision-timeout-seconds; 0 = 600 s
	MaxWait     time.Duration // of a held request; 0 = 300 s
	Held        Held          // bounds of held requests
	Provider    string        // what runs functions: "process", "sandbox", "auto"; "" = "auto"
	Capacity    int           // units of instances that this machine takes; 0 = what it has
	Share       []string      // folders that functions in sandboxes may read
	FrozenFor   time.Duration // how long an idle instance is kept frozen; 0 = it ends at once
	FrozenMax   int           // how many are; 0 = 500
	FrozenMiB   int64         // memory that they may take; 0 = a tenth of the machine's
	Networks    bool          // functions may join tenants' networks; needs root
	Drain       time.Duration // requests may take this long to end after SIGTERM; 0 = 15 s
	GC          reconcile.GC  // zero = Knative's defaults
	Version     string
	Log         *slog.Logger

	Observe observe.Config // access log and traces; what dev itself knows of it is filled in

	// Scaling, when set, replaces Autoscaler: for tests and the demo, which cannot wait a minute.
	Scaling *autoscaler.Config
}

// Held bounds the requests that are held for want of a free slot; 0 = the activator's default.
type Held struct {
	Requests, RequestsTotal int   // of one revision, of all
	Bytes, BytesTotal       int64 // what they hold in memory
}

// Server is a running dev. Start makes one.
type Server struct {
	Ingress, API string // addresses as bound
	Token        string

	cfg    Config
	cancel context.CancelFunc
	done   chan struct{}
	err    error // set before done is closed

	ingress, apiListener, tlsListener net.Listener // tlsListener: nil = none

	metrics *telemetry.Metrics
	watch   *observe.Observer
	store   state.Store
	agent   *instance.Agent
	scaler  *autoscaler.Autoscaler
	act     *activator.Activator
	router  *router.Router
	tls     *ingress.Ingress
	recs    *reconcile.Reconcilers
	api     *apiserver.Server
	proxies proxies.Set
	images  code.Images
	objects *objects.Store
	network *pairs.Machine // nil = none

	requests meter.Requests
	calls    calls.Tracker
	platform *platform
}

// Wait returns when the server has ended, with why.
func (s *Server) Wait() error { <-s.done; return s.err }

// Stop ends the server: requests finish, instances are stopped. It returns when all is done.
func (s *Server) Stop() error { s.cancel(); return s.Wait() }

// Status tells how a revision scales.
func (s *Server) Status(id api.RevisionID) (autoscaler.Status, bool) { return s.scaler.Status(id) }

func (c *Config) fill() error {
	if c.Dir == "" {
		return errors.New("dev: a data folder is needed")
	}
	set := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	set(&c.Listen, "127.0.0.1:8080")
	set(&c.API, "127.0.0.1:8081")
	set(&c.Domain, "localhost")
	if c.Drain <= 0 {
		c.Drain = 15 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	for _, l := range []struct{ flag, addr string }{{"--listen", c.Listen}, {"--api", c.API}, {"--tls-listen", c.TLS.Listen}} {
		if l.addr == "" {
			continue // only the last one can be
		}
		if err := apiserver.CheckListen(l.addr, c.AllowRemote); err != nil {
			return fmt.Errorf("%s: %w", l.flag, err)
		}
	}
	return nil
}

// Start brings everything up and returns when requests can be served. The server ends with ctx, or by Stop.
func Start(ctx context.Context, cfg Config) (_ *Server, err error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, done: make(chan struct{})}
	var undo cleanups
	defer func() {
		if err != nil {
			undo.run()
		}
	}()
	for _, step := range []func(context.Context, *cleanups) error{s.listen, s.open, s.connect, s.run} {
		if err := step(ctx, &undo); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// listen binds the addresses; nothing is accepted yet.
func (s *Server) listen(_ context.Context, undo *cleanups) (err error) {
	if s.ingress, err = sock.Listen(s.cfg.Listen); err != nil {
		return fmt.Errorf("ingress: %w (another thaw running? choose another address with --listen)", err)
	}
	undo.add(func() { s.ingress.Close() })
	if s.apiListener, err = net.Listen("tcp", s.cfg.API); err != nil {
		return fmt.Errorf("API: %w (another thaw running? choose another address with --api)", err)
	}
	undo.add(func() { s.apiListener.Close() })
	if s.cfg.TLS.Listen != "" {
		if s.tlsListener, err = sock.Listen(s.cfg.TLS.Listen); err != nil {
			return fmt.Errorf("TLS: %w (choose another address with --tls-listen)", err)
		}
		undo.add(func() { s.tlsListener.Close() })
	}
	s.Ingress, s.API = s.ingress.Addr().String(), s.apiListener.Addr().String()
	return nil
}

// open takes possession of the data folder: the agent's lock first, which keeps a second process from doing any harm.
func (s *Server) open(ctx context.Context, undo *cleanups) (err error) {
	cfg := &s.cfg
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	if s.images, err = loadImages(ctx, *cfg); err != nil {
		return err
	}
	packages, err := openStore(cfg.Store)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var networks instance.Networks
	dir, err := filepath.EvalSymlinks(cfg.Dir) // what outlives this process is found by its name
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	tenants := pairs.Config{Dir: filepath.Join(dir, "networks"), Program: self, Log: cfg.Log.With("part", "networks")}
	if cfg.Networks {
		s.network = pairs.New(tenants)
		networks = s.network
	}
	s.agent, err = instance.New(instance.Config{
		Networks: networks,
		Dir:      cfg.Dir, Log: cfg.Log.With("part", "agent"), Images: s.images, Store: packages, PackageBytes: cfg.PackageMiB << 20,
		Sidecar: s.proxies.Open, Shutdown: cfg.Drain + 5*time.Second, Provider: cfg.Provider, Share: cfg.Share,
		Units:     cfg.Capacity,
		FrozenFor: cfg.FrozenFor, FrozenMax: cfg.FrozenMax, FrozenBytes: cfg.FrozenMiB << 20,
	})
	if err != nil {
		return err
	}
	if s.network == nil {
		pairs.Sweep(tenants)
	} else {
		if err := s.network.Open(); err != nil {
			return fmt.Errorf("--networks: %w", err)
		}
		undo.add(s.network.Close)
	}
	if s.Token, err = apiserver.LoadOrCreateToken(filepath.Join(cfg.Dir, "token")); err != nil {
		return err
	}
	if s.store, err = openState(ctx, *cfg); err != nil {
		return err
	}
	undo.add(func() { s.store.Close() })
	if s.watch, err = s.observer(); err != nil {
		return err
	}
	s.metrics, err = telemetry.New(func(w io.Writer) error {
		return errors.Join(s.watch.WriteMetrics(w), queueproxy.WriteMetrics(w, s.proxies.All()))
	})
	if err != nil {
		return err
	}
	return s.agent.Measure(s.metrics.Meter("instance"))
}

func (s *Server) observer() (*observe.Observer, error) {
	c := s.cfg.Observe
	c.Requests, c.Span, c.Service, c.Version, c.Log = &s.requests, "router.route", "thaw-dev", s.cfg.Version, s.cfg.Log.With("part", "observe")
	c.Exporter = func(url string, resource []trace.Attr) trace.Exporter { return otlp.New(url, resource) }
	return observe.New(c)
}

// connect makes the parts and tells each of the others what it needs of them.
func (s *Server) connect(context.Context, *cleanups) error {
	cfg := &s.cfg
	log := func(part string) *slog.Logger { return cfg.Log.With("part", part) }
	scaling, err := loadScaling(*cfg)
	if err != nil {
		return err
	}
	scaling.Logger, scaling.Meter = log("autoscaler"), s.metrics.Meter("autoscaler")
	scaling.Keep = keepLearnt(cfg.Dir, scaling.Logger)
	s.scaler = autoscaler.New(scaling, s.agent)
	s.act, err = activator.New(activator.Config{
		Instance: s.proxies.Handler, Demand: s.scaler.Demand, MaxWait: cfg.MaxWait,
		MaxWaiting: cfg.Held.Requests, MaxWaitingTotal: cfg.Held.RequestsTotal, MaxBytes: cfg.Held.Bytes, MaxBytesTotal: cfg.Held.BytesTotal, Log: log("activator"), Meter: s.metrics.Meter("activator"),
	})
	if err != nil {
		return err
	}
	if scaling.Predictive {
		s.calls.On()
	}
	if s.router, err = router.New(router.Config{Next: s.calls.Handler(s.act), Log: log("router")}); err != nil {
		return err
	}

	cfg.TLS.Dir = filepath.Join(cfg.Dir, "tls")
	if s.tls, err = ingress.Open(cfg.TLS, s.router, s.router.Public, log("tls"), s.metrics.Meter("tls")); err != nil {
		return err
	}

	objs := objects.New(s.store, time.Now)
	s.objects = objs
	_, port, _ := net.SplitHostPort(s.Ingress)
	urlPort, _ := strconv.Atoi(port)
	rec := reconcile.Config{Domain: cfg.Domain, URLPort: urlPort, GC: cfg.GC, Log: log("reconcile"), Prepare: s.scaler.Shift}
	if err := rec.Validate(); err != nil {
		return err
	}
	if s.network != nil {
		rec.Network, rec.MaxPairs = s.network, pairs.LastFirst
	}
	s.platform = &platform{router: s.router, act: s.act, scaler: s.scaler, agent: s.agent, requests: &s.requests, calls: &s.calls, revisions: map[api.RevisionID]*api.Revision{}}
	s.recs = reconcile.New(rec, objs, s.platform, s.agent)

	// The activator first: what it is told decides about requests that wait now.
	s.agent.Subscribe(func(sn *endpoints.Snapshot) {
		s.act.SetEndpoints(sn)
		s.scaler.Observe(sn)
		s.recs.ObserveInstances(sn)
	})
	s.scaler.Subscribe(func(id api.RevisionID, st autoscaler.Status) { s.recs.ObserveScale(id, st.Desired, st.Active()) })

	limits := api.DefaultLimits
	if cfg.MaxTimeout > 0 {
		limits.MaxTimeoutSeconds = int64(cfg.MaxTimeout / time.Second)
	}
	s.api, err = apiserver.New(apiserver.Config{
		Store: objs, Token: s.Token, Limits: limits, Metrics: s.metrics, Version: cfg.Version, Log: log("api"),
		Extra: map[string]http.Handler{extraPrefix: s.extra()},
	})
	return err
}

// run starts the parts in two groups: what serves ends first and drains, what it leans on ends after that. It returns
// when the route table is complete and connections are accepted.
func (s *Server) run(ctx context.Context, _ *cleanups) error {
	ctx, s.cancel = context.WithCancel(ctx)
	below, stopBelow := context.WithCancel(context.WithoutCancel(ctx))
	lean, leanCtx := errgroup.WithContext(below)
	networks := func(context.Context) error { return nil }
	if s.network != nil {
		networks = func(ctx context.Context) error { return s.network.Run(ctx, s.objects) }
	}
	for name, run := range map[string]func(context.Context) error{
		"networks": networks,
		"agent":    s.agent.Run, "autoscaler": s.scaler.Run, "activator": s.act.Run, "reconcilers": s.recs.Run, "reports": s.report, "certificates": s.tls.Run,
		"packages": s.sweepPackages, "observer": s.watch.Run, "autoscaler configuration": s.followScaling,
	} {
		lean.Go(func() error {
			err := run(leanCtx)
			if err == nil || leanCtx.Err() != nil && errors.Is(err, context.Canceled) {
				return nil // it was told to end
			}
			return fmt.Errorf("%s: %w", name, err)
		})
	}
	select {
	case <-s.recs.Synced():
	case <-leanCtx.Done():
	case <-ctx.Done():
	}
	if ctx.Err() != nil || leanCtx.Err() != nil {
		stopBelow()
		s.cancel()
		return errors.Join(lean.Wait(), ctx.Err())
	}

	fr := front.New(s.tls.Front(front.Config{Observer: s.watch.Front(), Log: s.cfg.Log.With("part", "front")}), s.tls)
	serve, serveCtx := errgroup.WithContext(ctx)
	for _, ln := range []net.Listener{s.ingress, s.tlsListener} {
		if ln == nil {
			continue
		}
		serve.Go(func() error {
			if err := fr.Serve(ln); !errors.Is(err, front.ErrClosed) { // the end came first
				return err
			}
			return nil
		})
	}
	serve.Go(func() error { return s.api.Serve(serveCtx, s.apiListener) })
	serve.Go(func() error {
		select {
		case <-serveCtx.Done():
		case <-leanCtx.Done():
			s.cancel()
		}
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Drain)
		defer cancel()
		return fr.Shutdown(drain)
	})
	go func() {
		defer close(s.done)
		err := serve.Wait()
		stopBelow()
		s.err = errors.Join(err, lean.Wait(), s.store.Close(), s.metrics.Shutdown(context.WithoutCancel(ctx)))
		s.cancel()
	}()
	return nil
}

// report sends what activator and queue-proxies have counted to the autoscaler, each second, and who has called whom.
func (s *Server) report(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			stats := s.act.Report(now)
			for _, p := range s.proxies.All() {
				stats = append(stats, p.Report(now))
			}
			if len(stats) > 0 {
				s.scaler.Report(stats)
			}
			var called []endpoints.Call
			for p, n := range s.calls.Take() {
				called = append(called, endpoints.Call{Caller: p.Caller, Callee: p.Callee, N: n})
			}
			if len(called) > 0 {
				s.scaler.Calls(called)
			}
		}
	}
}

// platform is what the reconcilers tell the rest. The activator hears of a revision first and of its end last, so that no
// request meets a revision that is routed but unknown.
type platform struct {
	router   *router.Router
	act      *activator.Activator
	scaler   *autoscaler.Autoscaler
	agent    *instance.Agent
	requests *meter.Requests
	calls    *calls.Tracker

	mu        sync.Mutex // held while the autoscaler is told of revisions, so that it hears of each in order
	revisions map[api.RevisionID]*api.Revision
}

func (p *platform) SetRoutes(t *routes.Table) { p.router.SetTable(t) }

func (p *platform) SetRevision(rev *api.Revision) {
	if rev.Annotations[api.AnnotationPlanner] == autoscaler.PlannerPredictive {
		p.calls.On()
	}
	p.requests.Add(rev.ID(), rev.Labels[api.LabelService])
	p.act.SetRevision(rev)
	p.agent.SetRevision(rev)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.revisions[rev.ID()] = rev
	p.scaler.SetRevision(rev)
}

// configure gives the autoscaler another configuration.
func (p *platform) configure(c autoscaler.Config) {
	if c.Predictive {
		p.calls.On()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.scaler.Configure(c)
	for _, rev := range p.revisions {
		p.scaler.SetRevision(rev)
	}
}

func (p *platform) RemoveRevision(id api.RevisionID) {
	p.mu.Lock()
	delete(p.revisions, id)
	p.scaler.RemoveRevision(id)
	p.mu.Unlock()
	p.agent.RemoveRevision(id)
	p.act.RemoveRevision(id)
	p.requests.Remove(id)
}

// loadImages reads the map of images; Go main packages in it are built once, below the data folder.
func loadImages(ctx context.Context, cfg Config) (code.Images, error) {
	if cfg.ImagesFile == "" {
		return nil, nil
	}
	images, err := code.LoadImages(cfg.ImagesFile)
	if err != nil {
		return nil, err
	}
	built, err := bundle.Programs(ctx, images, filepath.Join(cfg.Dir, "built"), io.Discard)
	return code.Images(built), err
}

func openState(ctx context.Context, cfg Config) (state.Store, error) {
	c := cfg.EtcdConfig
	c.Log = cfg.Log.With("part", "state")
	if len(cfg.Etcd) > 0 {
		c.Endpoints = cfg.Etcd
	} else {
		c.Dir = filepath.Join(cfg.Dir, "etcd")
	}
	return state.Open(ctx, c)
}

// cleanups undo what a failed start has made, last first.
type cleanups []func()

func (c *cleanups) add(f func()) { *c = append(*c, f) }

func (c *cleanups) run() {
	for i := len(*c) - 1; i >= 0; i-- {
		(*c)[i]()
	}
}
