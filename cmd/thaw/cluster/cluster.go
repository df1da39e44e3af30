// Package cluster runs the parts of Thaw as processes of their own, on one machine or on several: `thaw control`, `thaw router --etcd`, `thaw
// activator --etcd`, `thaw agent` (and `thaw autoscaler`, package replica). It is to them what package dev is to all in one process.
//
//	client -> router -> queue-proxy of an instance (agent)            revisions without a limit, while an instance takes them
//	client -> router -> owning activator -> queue-proxy (agent)       all others, and cold ones
//	activator, agent -> owning autoscaler -> agent                    demand and load, orders        (streams, autoscaler/remote)
//	router, control  -> owning autoscaler                             who calls whom, shifts of traffic
//	agent -> router, activator, control                               snapshots of instances         (streams, internal/feed)
//	API server -> etcd -> everybody                                   desired state, membership      (watches)
//
// No etcd write lies between a request and the start of its instance, and everybody goes on with what is known while etcd does not answer.
// A revision with a limit has one logical queue: all routers send its requests to the activator that owns its shard, so that its
// slots are handed out in one place. Who is reachable here is not asked who it is: these processes belong on a network of their own.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/cmd/thaw/replica"
	"github.com/thawrun/thaw/cmd/thaw/side"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/observe"
	"github.com/thawrun/thaw/internal/owners"
	"github.com/thawrun/thaw/internal/sock"
	"github.com/thawrun/thaw/internal/state"
)

// Groups of processes that find each other through the shared state, beside replica.Group.
const (
	groupRouters    = "router"    // with the listening address; they are only counted
	groupActivators = "activator" // with the address for requests
	groupAgents     = "agent"     // with the address of the feed
	groupSides      = "agent-side"
)

// Headers between the hops of the platform. From outside they are dropped.
const (
	headerInstance = "X-Thaw-Instance" // id of the instance that a request is for, to its agent
	headerLimits   = "X-Thaw-Limits"   // the route's time-outs: total, response start, idle; Go durations separated by commas
)

// Common is what all roles are told. Etcd and Name are required.
type Common struct {
	Etcd      state.Config
	Name      string // unique among the processes of its role
	Listen    string // address for requests; of control, of the API
	Advertise string // host that others reach this process at; "" = that of the listening address
	Metrics   string // address of /metrics, /healthz and /readyz; "" = none
	Drain     time.Duration
	Version   string
	Observe   observe.Config
	Log       *slog.Logger
}

func (c *Common) fill() error {
	if c.Name == "" {
		return errors.New("--name: name this process, in a way that no other one of its role has")
	}
	if len(c.Etcd.Endpoints) == 0 {
		return errors.New("--etcd: name the etcd that the processes share")
	}
	if c.Drain <= 0 {
		c.Drain = 15 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Etcd.Log = c.Log.With("part", "state")
	return nil
}

// advertised is where others reach a listener.
func (c *Common) advertised(ln net.Listener) (string, error) {
	host, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		return "", err
	}
	if c.Advertise != "" {
		return net.JoinHostPort(c.Advertise, port), nil
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		return "", fmt.Errorf("others cannot connect to %s: name this machine with --advertise", ln.Addr())
	}
	return net.JoinHostPort(host, port), nil
}

// parts are functions that run together, by name.
type parts map[string]func(context.Context) error

// run runs what a role leans on until serve has returned, and serve until ctx ends or one of the others breaks.
func run(ctx context.Context, lean parts, serve func(context.Context) error) error {
	below, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, gctx := errgroup.WithContext(below)
	for name, f := range lean {
		g.Go(func() error {
			if err := f(gctx); err != nil && gctx.Err() == nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	g.Go(func() error {
		defer stop()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(gctx, cancel)()
		return serve(ctx)
	})
	return g.Wait()
}

// serveFront serves requests until ctx ends, and then lets those under way finish.
func serveFront(ctx context.Context, fr *front.Server, drain time.Duration, lns ...net.Listener) error {
	g, gctx := errgroup.WithContext(ctx)
	for _, ln := range lns {
		g.Go(func() error {
			if err := fr.Serve(ln); !errors.Is(err, front.ErrClosed) {
				return err
			}
			return nil
		})
	}
	g.Go(func() error {
		<-gctx.Done()
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer cancel()
		return fr.Shutdown(last)
	})
	return g.Wait()
}

// listen binds an address for requests.
func listen(flag, addr string, shared bool) (net.Listener, error) {
	bind := sock.Listen
	if shared {
		bind = sock.ListenShared
	}
	ln, err := bind(addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	return ln, nil
}

// sideways serves metrics and health, if there is an address for them.
func (c *Common) sideways(s *side.Server) (func(context.Context) error, string, error) {
	if c.Metrics == "" {
		return func(ctx context.Context) error { <-ctx.Done(); return nil }, "", nil
	}
	ln, err := net.Listen("tcp", c.Metrics)
	if err != nil {
		return nil, "", fmt.Errorf("--metrics: %w", err)
	}
	return func(ctx context.Context) error {
		defer context.AfterFunc(ctx, s.Close)()
		return s.Serve(ln)
	}, ln.Addr().String(), nil
}

// join makes the process known to the others as a member of a group.
func (c *Common) join(store state.Store, group, addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		return owners.Join(ctx, store, group, c.Name, addr, 0, c.Log)
	}
}

// members tells of the members of a group.
func members(store state.Store, group string, told func(map[string]string)) func(context.Context) error {
	return func(ctx context.Context) error { return owners.Members(ctx, store, group, told) }
}

// autoscalers are the replicas that share the decisions.
const autoscalers = replica.Group

// synced collects what has to be known before a process serves.
type synced struct {
	mu   sync.Mutex
	left int
	all  chan struct{} // closed when nothing is left
}

func newSynced(n int) *synced { return &synced{left: n, all: make(chan struct{})} }

func (s *synced) one() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left--; s.left == 0 {
		close(s.all)
	}
}

// wait returns when everything is known, or ctx has ended.
func (s *synced) wait(ctx context.Context) {
	select {
	case <-s.all:
	case <-ctx.Done():
	}
}

// revisions follows the revisions whose instances may be started.
func revisions(objs *objects.Store, log *slog.Logger, set func(*api.Revision), remove func(api.RevisionID), done func()) func(context.Context) error {
	return func(ctx context.Context) error {
		return objs.Follow(ctx, api.Revisions, objects.Follower{
			Set: func(o api.Object) {
				if rev := o.(*api.Revision); reconcile.Startable(rev) {
					set(rev)
				}
			},
			Remove: func(o api.Object) { remove(o.(*api.Revision).ID()) },
			Synced: done, Log: log,
		})
	}
}

// unreachable is a way that leads nowhere.
var unreachable = hop.HandlerFunc(func(*hop.Exchange) error { return hop.ErrNotSent })
