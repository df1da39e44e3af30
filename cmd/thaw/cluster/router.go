package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/activator"
	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/autoscaler/remote"
	"github.com/thawrun/thaw/cmd/thaw/side"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/internal/calls"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/feed"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/ingress"
	"github.com/thawrun/thaw/internal/meter"
	"github.com/thawrun/thaw/internal/observe"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/internal/telemetry"
	"github.com/thawrun/thaw/internal/trace"
	"github.com/thawrun/thaw/internal/trace/otlp"
	"github.com/thawrun/thaw/router"
)

// RouterConfig is one router.
type RouterConfig struct {
	Common
	TLS    ingress.Options
	Domain string // public hosts end in it; as control has it
	Shared bool   // other routers may listen on the same addresses (SO_REUSEPORT)
}

// step is what comes after a router: an instance, if the revision has no limit and one takes it at once, else the owning activator.
type step struct {
	near *activator.Activator // knows only revisions without a limit
	far  *activators
}

// Serve passes x on.
func (s *step) Serve(x *hop.Exchange) error {
	hop.Remove(&x.Req.Header, headerInstance, headerLimits) // nobody outside may say this
	if served, err := s.near.TryServe(x); served {
		return err
	}
	x.Req.Header.Del(headerInstance)
	return s.far.Serve(x)
}

// behind is how long a request for a host that is not known here may wait: a route is ready as soon as that is written, and routers hear of it a
// moment later.
const behind = 500 * time.Millisecond

// patient is a router that lets such a request wait.
type patient struct{ *router.Router }

// Serve routes x.
func (p patient) Serve(x *hop.Exchange) error {
	err := p.Router.Serve(x)
	var e *hop.Error
	for begin := time.Now(); errors.As(err, &e) && e.Reason == hop.ReasonNoService && time.Since(begin) < behind; {
		time.Sleep(10 * time.Millisecond)
		err = p.Router.Serve(x) // it has left x as it was
	}
	return err
}

// direct says whether routers may send a revision's requests to its instances themselves.
func direct(rev *api.Revision) bool {
	tbc, _ := api.ScalingAnnotation(rev.Annotations, "target-burst-capacity")
	return rev.Concurrency() == 0 && tbc != "-1"
}

// Router runs until ctx ends, then drains. ready is called once it serves.
func Router(ctx context.Context, cfg RouterConfig, ready func(listen, metrics string)) error {
	if err := cfg.fill(); err != nil {
		return err
	}
	watch, metrics, requests, err := cfg.telemetry("router.route", "thaw-router")
	if err != nil {
		return err
	}
	store, err := state.Open(ctx, cfg.Etcd)
	if err != nil {
		return err
	}
	defer store.Close()
	var to ways
	defer to.close()
	far := &activators{}
	defer far.close()
	near, err := activator.New(activator.Config{
		Instance: to.handler, Demand: func(endpoints.Demand) {}, Name: cfg.Name, Log: cfg.Log, Meter: metrics.Meter("router"),
	})
	if err != nil {
		return err
	}
	var tracker calls.Tracker
	var routers atomic.Int64 // how many there are
	scaler := remote.NewClient(remote.ClientConfig{Name: cfg.Name, Learn: tracker.On, Log: cfg.Log})
	r, err := router.New(router.Config{Next: tracker.Handler(&step{near, far}), Log: cfg.Log})
	if err != nil {
		return err
	}
	in, err := ingress.Open(cfg.TLS, patient{r}, r.Public, cfg.Log, metrics.Meter("tls"))
	if err != nil {
		return err
	}
	var lns []net.Listener
	for _, l := range []struct{ flag, addr string }{{"--listen", cfg.Listen}, {"--tls-listen", cfg.TLS.Listen}} {
		if l.addr == "" {
			continue
		}
		ln, err := listen(l.flag, l.addr, cfg.Shared)
		if err != nil {
			return err
		}
		defer ln.Close()
		lns = append(lns, ln)
	}
	var stopping atomic.Bool
	aside, metricsAddr, err := cfg.sideways(side.New(metrics, func() bool { return !stopping.Load() }))
	if err != nil {
		return err
	}
	tables := reconcile.NewTables(reconcile.Config{Domain: cfg.Domain}, r.SetTable)
	instances := feed.NewClient(feed.ClientConfig{Name: cfg.Name, Told: near.SetEndpoints, Log: cfg.Log})
	objs := objects.New(store, time.Now)
	known := newSynced(3)
	fr := front.New(in.Front(front.Config{Observer: watch.Front(), Log: cfg.Log}), in)
	return run(ctx, parts{
		"observer":    watch.Run,
		"tls":         in.Run,
		"metrics":     aside,
		"ejections":   near.Run,
		"instances":   instances.Run,
		"agents":      members(store, groupAgents, instances.SetAgents),
		"activators":  members(store, groupActivators, far.set),
		"routes":      followRoutes(objs, tables, cfg.Common, known),
		"tables":      tables.Run,
		"router":      cfg.join(store, groupRouters, lns[0].Addr().String()),
		"routers":     members(store, groupRouters, func(all map[string]string) { routers.Store(int64(len(all))) }),
		"streams":     scaler.Run,
		"autoscalers": members(store, autoscalers, scaler.SetMembers),
		"calls":       every(time.Second, func(time.Time) { called(scaler, &tracker, int(routers.Load())) }),
		"revisions": revisions(objs, cfg.Log, func(rev *api.Revision) {
			if rev.Annotations[api.AnnotationPlanner] == autoscaler.PlannerPredictive {
				tracker.On()
			}
			requests.Add(rev.ID(), rev.Labels[api.LabelService])
			if direct(rev) {
				near.SetRevision(rev)
				instances.Again(rev.ID())
			}
		}, func(id api.RevisionID) {
			near.RemoveRevision(id)
			requests.Remove(id)
		}, known.one),
	}, func(ctx context.Context) error {
		known.wait(ctx)
		tables.Publish()
		ready(lns[0].Addr().String(), metricsAddr)
		defer context.AfterFunc(ctx, func() { stopping.Store(true) })()
		return serveFront(ctx, fr, cfg.Drain, lns...)
	})
}

// called tells who has called whom. Caller and called one are seen together when both requests came through this router: with several of
// them, each stands for all.
func called(to *remote.Client, by *calls.Tracker, routers int) {
	var all []endpoints.Call
	for p, n := range by.Take() {
		all = append(all, endpoints.Call{Caller: p.Caller, Callee: p.Callee, N: n * max(1, routers)})
	}
	if len(all) > 0 {
		to.Calls(all)
	}
}

// followRoutes keeps tables up to date; known hears twice.
func followRoutes(objs *objects.Store, tables *reconcile.Tables, c Common, known *synced) func(context.Context) error {
	var mu sync.Mutex // tables takes one call at a time
	locked := func(f func()) { mu.Lock(); defer mu.Unlock(); f() }
	return func(ctx context.Context) error {
		both := parts{
			"routes": func(ctx context.Context) error {
				return objs.Follow(ctx, api.Routes, objects.Follower{
					Set:    func(o api.Object) { locked(func() { tables.SetRoute(o.(*api.Route)) }) },
					Remove: func(o api.Object) { locked(func() { tables.RemoveRoute(o.(*api.Route)) }) },
					Synced: known.one, Log: c.Log,
				})
			},
		}
		return run(ctx, both, func(ctx context.Context) error {
			return objs.Follow(ctx, api.DomainMappings, objects.Follower{
				Set:    func(o api.Object) { locked(func() { tables.SetMapping(o.(*api.DomainMapping)) }) },
				Remove: func(o api.Object) { locked(func() { tables.RemoveMapping(o.(*api.DomainMapping)) }) },
				Synced: known.one, Log: c.Log,
			})
		})
	}
}

// telemetry makes what counts and records.
func (c *Common) telemetry(span, service string) (*observe.Observer, *telemetry.Metrics, *meter.Requests, error) {
	o := c.Observe
	o.Requests, o.Span, o.Service, o.Version, o.Log = &meter.Requests{}, span, service, c.Version, c.Log
	o.Exporter = func(url string, resource []trace.Attr) trace.Exporter { return otlp.New(url, resource) }
	watch, err := observe.New(o)
	if err != nil {
		return nil, nil, nil, err
	}
	metrics, err := telemetry.New(watch.WriteMetrics)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("metrics: %w", err)
	}
	return watch, metrics, o.Requests, nil
}
