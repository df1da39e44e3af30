package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/activator"
	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler/remote"
	"github.com/thawrun/thaw/cmd/thaw/side"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/feed"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/state"
)

// ActivatorConfig is one activator.
type ActivatorConfig struct {
	Common
	MaxWait time.Duration // of a held request; 0 = 300 s
}

// inbound is the activator at the border of its process: routers say in headers which revision a request is for.
type inbound struct {
	act *activator.Activator
}

// unknownFor is how long a request may wait for its revision to become known here: its router has heard of it first.
const unknownFor = 2 * time.Second

// Serve answers x.
func (a *inbound) Serve(x *hop.Exchange) error {
	h := &x.Req.Header
	x.Namespace = string(h.Peek("Knative-Serving-Namespace"))
	x.Revision = api.MakeRevisionID(x.Namespace, string(h.Peek("Knative-Serving-Revision")))
	err := a.act.Serve(x)
	var e *hop.Error
	for begin := time.Now(); errors.As(err, &e) && e.Reason == hop.ReasonNoRevision && time.Since(begin) < unknownFor; {
		time.Sleep(10 * time.Millisecond)
		err = a.act.Serve(x)
	}
	switch {
	case errors.Is(err, hop.ErrNotSent):
		return &hop.Error{Status: 502, Reason: hop.ReasonUnreachable, Message: fmt.Sprintf("no instance of %s can be reached", x.Revision)}
	case errors.Is(err, hop.ErrBusy):
		return errQueueFull
	}
	return err
}

// Activator runs until ctx ends, then lets those who wait finish.
func Activator(ctx context.Context, cfg ActivatorConfig, ready func(listen, metrics string)) error {
	if err := cfg.fill(); err != nil {
		return err
	}
	watch, metrics, requests, err := cfg.telemetry("activator.hold", "thaw-activator")
	if err != nil {
		return err
	}
	ln, err := listen("--listen", cfg.Listen, false)
	if err != nil {
		return err
	}
	defer ln.Close()
	addr, err := cfg.advertised(ln)
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
	scaler := remote.NewClient(remote.ClientConfig{Name: cfg.Name, Log: cfg.Log})
	act, err := activator.New(activator.Config{
		Instance: to.handler, Demand: scaler.Demand, MaxWait: cfg.MaxWait, Name: cfg.Name, Log: cfg.Log, Meter: metrics.Meter("activator"),
	})
	if err != nil {
		return err
	}
	var stopping atomic.Bool
	aside, metricsAddr, err := cfg.sideways(side.New(metrics, func() bool { return !stopping.Load() }))
	if err != nil {
		return err
	}
	instances := feed.NewClient(feed.ClientConfig{Name: cfg.Name, Told: act.SetEndpoints, Log: cfg.Log})
	known := newSynced(1)
	fr := front.New(front.Config{Observer: watch.Front(), Log: cfg.Log}, &inbound{act})
	return run(ctx, parts{
		"observer":    watch.Run,
		"metrics":     aside,
		"queues":      act.Run,
		"instances":   instances.Run,
		"agents":      members(store, groupAgents, instances.SetAgents),
		"streams":     scaler.Run,
		"autoscalers": members(store, autoscalers, scaler.SetMembers),
		"reports":     every(time.Second, func(now time.Time) { report(scaler, act.Report(now)) }),
		"revisions": revisions(objects.New(store, time.Now), cfg.Log, func(rev *api.Revision) {
			requests.Add(rev.ID(), rev.Labels[api.LabelService])
			act.SetRevision(rev)
			instances.Again(rev.ID())
		}, func(id api.RevisionID) {
			act.RemoveRevision(id)
			requests.Remove(id)
		}, known.one),
	}, func(ctx context.Context) error {
		known.wait(ctx)
		member, leave := context.WithCancel(ctx)
		defer leave()
		joined := make(chan error, 1)
		go func() { joined <- cfg.join(store, groupActivators, addr)(member) }()
		defer func() { leave(); <-joined }()
		ready(ln.Addr().String(), metricsAddr)
		defer context.AfterFunc(ctx, func() { stopping.Store(true) })()
		return serveFront(ctx, fr, cfg.Drain, ln)
	})
}

// every calls f in a steady rhythm.
func every(period time.Duration, f func(time.Time)) func(context.Context) error {
	return func(ctx context.Context) error {
		tick := time.NewTicker(period)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case now := <-tick.C:
				f(now)
			}
		}
	}
}

func report(to *remote.Client, stats []endpoints.Stat) {
	if len(stats) > 0 {
		to.Report(stats)
	}
}
