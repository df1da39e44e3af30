// Package replica runs one of several autoscalers that share the revisions among them: `thaw autoscaler --etcd …`. It reads the
// revisions from the shared state, takes its share of the shards by leases, and decides for the reporters (activators and node
// agents) that are connected to it.
package replica

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"time"

	"go.opentelemetry.io/otel/metric"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/autoscaler/remote"
	"github.com/thawrun/thaw/cmd/thaw/scaling"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/owners"
	"github.com/thawrun/thaw/internal/state"
)

// Group is the name under which replicas share the shards out.
const Group = "autoscaler"

// Config is one replica. Store and Name are required.
type Config struct {
	Store     state.Store
	Name      string // unique among the replicas
	Listen    string // address for reporters; port 0 = any
	Advertise string // host that they reach it at; "" = that of Listen
	Scaling   autoscaler.Config
	Log       *slog.Logger
	Meter     metric.Meter

	// Follow, when set, calls apply with each new configuration until ctx ends.
	Follow func(ctx context.Context, apply func(autoscaler.Config)) error
}

// Run takes part until ctx ends, and then gives its shards to the others. ready is called with the address once reporters can come.
func Run(ctx context.Context, c Config, ready func(addr string)) error {
	ln, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("autoscaler: %w", err)
	}
	addr := ln.Addr().String()
	if c.Advertise != "" {
		_, port, _ := net.SplitHostPort(addr)
		addr = net.JoinHostPort(c.Advertise, port)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	known := newLearnt(c.Store, c.Log)
	c.Scaling.Logger, c.Scaling.Meter, c.Scaling.Keep = c.Log, c.Meter, &autoscaler.Keep{Part: part, Save: known.save}
	server := remote.NewServer(c.Log, c.Meter)
	if c.Scaling.Predictive {
		server.Learn()
	}
	scaler := autoscaler.New(c.Scaling, server)
	server.SetDecider(scaler)
	server.SetExplain(func(id api.RevisionID, frozen int) []byte {
		st, ok := scaler.Status(id)
		if !ok {
			return nil
		}
		text, _ := json.Marshal(scaling.Of(st, frozen, st.Waiting, st.Running, time.Now())) // numbers and texts
		return text
	})

	// What decides ends after the shards were given away, so that none is given away while it is still decided about.
	below, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, groupCtx := errgroup.WithContext(below)
	group.Go(func() error { return scaler.Run(groupCtx) })
	group.Go(func() error { return known.run(groupCtx) })
	group.Go(func() error {
		return server.Serve(groupCtx, func(g *grpc.Server) error { return g.Serve(ln) })
	})
	if c.Follow != nil {
		group.Go(func() error {
			return c.Follow(groupCtx, func(n autoscaler.Config) {
				scaler.Configure(n)
				server.Again()
				if n.Predictive {
					server.Learn()
				}
			})
		})
	}
	group.Go(func() error { return followNodes(groupCtx, c.Store, server.SetNodes) })
	group.Go(func() error {
		return objects.New(c.Store, time.Now).Follow(groupCtx, api.Revisions, objects.Follower{
			Set:    func(o api.Object) { server.SetRevision(o.(*api.Revision)) },
			Remove: func(o api.Object) { server.RemoveRevision(o.(*api.Revision).ID()) },
			Log:    c.Log,
		})
	})
	group.Go(func() error {
		defer stop()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(groupCtx, cancel)()
		return owners.Run(ctx, owners.Config{Store: c.Store, Group: Group, Name: c.Name, Addr: addr, Log: c.Log, Changed: func(shard int, epoch int64) {
			if epoch != 0 {
				if b := known.load(ctx, shard); b != nil {
					scaler.Remember(b)
				}
			}
			server.Own(shard, epoch)
		}})
	})
	ready(addr)
	err = group.Wait()
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWait)
	defer cancel()
	known.flush(last)
	return err
}

// lastWait bounds how long the end waits until what was learnt is written.
const lastWait = 2 * time.Second
