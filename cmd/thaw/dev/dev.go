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
	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/activator"
	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/control/apiserver"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/instance"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/internal/bundle"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/internal/telemetry"
	"github.com/thawrun/thaw/queueproxy"
	"github.com/thawrun/thaw/router"
)

// Config is what `thaw dev` can be told. Dir is required.
type Config struct {
	Listen      string        // ingress; "127.0.0.1:8080"
	API         string        // API server; "127.0.0.1:8081"
	Dir         string        // data folder: state, token, packages, logs, instances
	Domain      string        // public hosts end in it; "localhost"
	AllowRemote bool          // Listen and API may be other than loopback addresses
	ImagesFile  string        // YAML map of image references to local code; "" = none
	Autoscaler  string        // YAML file with Knative's config-autoscaler keys; "" = defaults
	Etcd        []string      // external etcd; empty = embedded in Dir
	EtcdConfig  state.Config  // TLS files and password for Etcd
	MaxTimeout  time.Duration // max-revision-timeout-seconds; 0 = 600 s
	MaxWait     time.Duration // of a held request; 0 = 300 s
	Drain       time.Duration // requests may take this long to end after SIGTERM; 0 = 15 s
	GC          reconcile.GC  // zero = Knative's defaults
	Version     string
	Log         *slog.Logger

	// Scaling, when set, replaces Autoscaler: for tests and the demo, which cannot wait a minute.
	Scaling *autoscaler.Config
}

// Server is a running dev. Start makes one.
type Server struct {
	Ingress, API string // addresses as bound
	Token        string

	cfg    Config
	cancel context.CancelFunc
	done   chan struct{}
	err    error // set before done is closed

	ingress, apiListener net.Listener

	metrics *telemetry.Metrics
	store   state.Store
	agent   *instance.Agent
	scaler  *autoscaler.Autoscaler
	act     *activator.Activator
	router  *router.Router
	recs    *reconcile.Reconcilers
	api     *apiserver.Server
	proxies proxies
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
	for _, l := range []struct{ flag, addr string }{{"--listen", c.Listen}, {"--api", c.API}} {
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
	if s.ingress, err = net.Listen("tcp", s.cfg.Listen); err != nil {
		return fmt.Errorf("ingress: %w (another thaw running? choose another address with --listen)", err)
	}
	undo.add(func() { s.ingress.Close() })
	if s.apiListener, err = net.Listen("tcp", s.cfg.API); err != nil {
		return fmt.Errorf("API: %w (another thaw running? choose another address with --api)", err)
	}
	undo.add(func() { s.apiListener.Close() })
	s.Ingress, s.API = s.ingress.Addr().String(), s.apiListener.Addr().String()
	return nil
}

// open takes possession of the data folder: the agent's lock first, which keeps a second process from doing any harm.
func (s *Server) open(ctx context.Context, undo *cleanups) (err error) {
	cfg := &s.cfg
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	images, err := loadImages(ctx, *cfg)
	if err != nil {
		return err
	}
	s.agent, err = instance.New(instance.Config{Dir: cfg.Dir, Log: cfg.Log.With("part", "agent"), Images: images, Sidecar: s.proxies.open, Shutdown: cfg.Drain + 5*time.Second})
	if err != nil {
		return err
	}
	if s.Token, err = apiserver.LoadOrCreateToken(filepath.Join(cfg.Dir, "token")); err != nil {
		return err
	}
	if s.store, err = openState(ctx, *cfg); err != nil {
		return err
	}
	undo.add(func() { s.store.Close() })
	s.metrics, err = telemetry.New(func(w io.Writer) error { return queueproxy.WriteMetrics(w, s.proxies.all()) })
	return err
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
	s.scaler = autoscaler.New(scaling, s.agent)
	s.act, err = activator.New(activator.Config{
		Instance: s.proxies.handler, Demand: s.scaler.Demand, MaxWait: cfg.MaxWait, Log: log("activator"), Meter: s.metrics.Meter("activator"),
	})
	if err != nil {
		return err
	}
	if s.router, err = router.New(router.Config{Next: s.act, Log: log("router"), Meter: s.metrics.Meter("router")}); err != nil {
		return err
	}

	objs := objects.New(s.store, time.Now)
	_, port, _ := net.SplitHostPort(s.Ingress)
	urlPort, _ := strconv.Atoi(port)
	rec := reconcile.Config{Domain: cfg.Domain, URLPort: urlPort, GC: cfg.GC, Log: log("reconcile")}
	if err := rec.Validate(); err != nil {
		return err
	}
	s.recs = reconcile.New(rec, objs, &platform{s.router, s.act, s.scaler, s.agent}, s.agent)

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
	for name, run := range map[string]func(context.Context) error{
		"agent": s.agent.Run, "autoscaler": s.scaler.Run, "activator": s.act.Run, "reconcilers": s.recs.Run, "reports": s.report,
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

	fr := front.New(front.Config{Log: s.cfg.Log.With("part", "front")}, s.router)
	serve, serveCtx := errgroup.WithContext(ctx)
	serve.Go(func() error { return fr.Serve(s.ingress) })
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

// report sends what activator and queue-proxies have counted to the autoscaler, each second.
func (s *Server) report(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			stats := s.act.Report(now)
			for _, p := range s.proxies.all() {
				stats = append(stats, p.Report(now))
			}
			if len(stats) > 0 {
				s.scaler.Report(stats)
			}
		}
	}
}

// platform is what the reconcilers tell the rest. The activator hears of a revision first and of its end last, so that no
// request meets a revision that is routed but unknown.
type platform struct {
	router *router.Router
	act    *activator.Activator
	scaler *autoscaler.Autoscaler
	agent  *instance.Agent
}

func (p *platform) SetRoutes(t *routes.Table) { p.router.SetTable(t) }

func (p *platform) SetRevision(rev *api.Revision) {
	p.act.SetRevision(rev)
	p.agent.SetRevision(rev)
	p.scaler.SetRevision(rev)
}

func (p *platform) RemoveRevision(id api.RevisionID) {
	p.scaler.RemoveRevision(id)
	p.agent.RemoveRevision(id)
	p.act.RemoveRevision(id)
}

// proxies are the queue-proxies in front of this node's instances.
type proxies struct {
	mu sync.RWMutex
	m  map[string]*proxy
}

type proxy struct {
	*queueproxy.Proxy
	id string
	of *proxies
}

// Close ends the proxy and forgets it.
func (p *proxy) Close() {
	p.Proxy.Close()
	p.of.mu.Lock()
	delete(p.of.m, p.id)
	p.of.mu.Unlock()
}

// open makes the queue-proxy of an instance that was just started or adopted.
func (ps *proxies) open(in endpoints.Instance, rev *api.Revision) instance.Sidecar {
	total, start, idle := rev.Timeouts()
	p := &proxy{id: in.ID, of: ps, Proxy: queueproxy.New(queueproxy.Config{
		Revision: in.Revision, Instance: in.ID, Concurrency: rev.Concurrency(), RefuseProxied: true,
	}, forward.New(forward.Config{Addr: in.Addr, Protocol: rev.Protocol(), Total: total, ResponseStart: start, Idle: idle}))}
	ps.mu.Lock()
	if ps.m == nil {
		ps.m = make(map[string]*proxy)
	}
	ps.m[in.ID] = p
	ps.mu.Unlock()
	return p
}

// handler is the way to an instance. One that is gone meanwhile cannot be reached, which sends the request elsewhere.
func (ps *proxies) handler(in endpoints.Instance) hop.Handler {
	ps.mu.RLock()
	p := ps.m[in.ID]
	ps.mu.RUnlock()
	if p == nil {
		return hop.HandlerFunc(func(*hop.Exchange) error { return hop.ErrNotSent })
	}
	return p.Proxy
}

func (ps *proxies) all() []*queueproxy.Proxy {
	ps.mu.RLock()
	defer ps.mu.RUnlock()
	out := make([]*queueproxy.Proxy, 0, len(ps.m))
	for _, p := range ps.m {
		out = append(out, p.Proxy)
	}
	return out
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

func loadScaling(cfg Config) (autoscaler.Config, error) {
	if cfg.Scaling != nil {
		return *cfg.Scaling, cfg.Scaling.Validate()
	}
	if cfg.Autoscaler == "" {
		return autoscaler.DefaultConfig(), nil
	}
	b, err := os.ReadFile(cfg.Autoscaler)
	if err != nil {
		return autoscaler.Config{}, fmt.Errorf("autoscaler configuration: %w", err)
	}
	// Either the bare map or a ConfigMap around it, as Knative ships it.
	var cm struct {
		Data map[string]string `json:"data"`
	}
	if err := yaml.Unmarshal(b, &cm); err == nil && cm.Data != nil {
		return autoscaler.ParseConfig(cm.Data)
	}
	data := map[string]string{}
	if err := yaml.Unmarshal(b, &data); err != nil {
		return autoscaler.Config{}, fmt.Errorf("autoscaler configuration %s: a map of keys to strings is needed: %w", cfg.Autoscaler, err)
	}
	return autoscaler.ParseConfig(data)
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
