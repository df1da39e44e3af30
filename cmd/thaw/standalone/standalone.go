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
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/activator"
	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/router"
)

// Config describes a hop.
type Config struct {
	Listen      string
	Static      []string // HOST=ADDR; "*" as HOST stands for every host that is not named
	Activator   bool     // hold requests in a queue per host, else pass them on at once
	Concurrency int      // with Activator: requests at once per address; 0 = no limit
	Queue       int      // with Activator: requests that may wait per host; 0 = 10,000
	MaxWait     time.Duration
	Drain       time.Duration // how long requests may take to end after ctx; 0 = 15 s
	Log         *slog.Logger
}

// namespace of the revisions that stand for fixed addresses.
const namespace = "static"

// parse turns HOST=ADDR into a route table and the addresses by revision.
func parse(static []string) (*routes.Table, map[api.RevisionID]string, error) {
	if len(static) == 0 {
		return nil, nil, errors.New("no address: name at least one with --static HOST=ADDR, or *=ADDR for all hosts")
	}
	table := &routes.Table{Hosts: make(map[string]*routes.Route)}
	addrs := make(map[api.RevisionID]string)
	for _, s := range static {
		host, addr, ok := strings.Cut(s, "=")
		if _, port, err := net.SplitHostPort(addr); !ok || host == "" || err != nil || port == "" {
			return nil, nil, fmt.Errorf("--static %q: want HOST=ADDR:PORT, for example hello.example.com=127.0.0.1:9000 or *=127.0.0.1:9000", s)
		}
		host = strings.ToLower(host)
		if table.Hosts[host] != nil {
			return nil, nil, fmt.Errorf("--static %q: the host is named twice", s)
		}
		id := api.MakeRevisionID(namespace, host)
		addrs[id] = addr
		table.Hosts[host] = &routes.Route{Namespace: namespace, Service: host, Targets: []routes.Target{{Revision: id, Percent: 100}}}
	}
	return table, addrs, nil
}

// forwards is the step that knows one way per revision.
type forwards map[api.RevisionID]*forward.Forward

// Serve passes x on to the address of its revision.
func (f forwards) Serve(x *hop.Exchange) error { return f[x.Revision].Serve(x) }

// Run serves until ctx ends, then drains. ready is called with the address once it listens.
func Run(ctx context.Context, cfg Config, ready func(addr string)) error {
	if cfg.Drain <= 0 {
		cfg.Drain = 15 * time.Second
	}
	table, addrs, err := parse(cfg.Static)
	if err != nil {
		return err
	}
	to := make(forwards, len(addrs))
	for id, addr := range addrs {
		to[id] = forward.New(forward.Config{Addr: addr})
		defer to[id].Close()
	}
	var next hop.Handler = to
	group, groupCtx := errgroup.WithContext(context.WithoutCancel(ctx))
	below, stop := context.WithCancel(groupCtx)
	defer stop()
	if cfg.Activator {
		act, err := activator.New(activator.Config{
			MaxWaiting: cfg.Queue, MaxWait: cfg.MaxWait, Log: cfg.Log, Demand: func(endpoints.Demand) {}, // nobody could start more
			Instance: func(in endpoints.Instance) hop.Handler { return to[in.Revision] },
		})
		if err != nil {
			return err
		}
		for id, addr := range addrs {
			rev := &api.Revision{}
			rev.Namespace, rev.Name = id.Split()
			n := int64(cfg.Concurrency)
			rev.Spec.ContainerConcurrency = &n
			act.SetRevision(rev)
			act.SetEndpoints(&endpoints.Snapshot{Revision: id, Sequence: 1, Instances: []endpoints.Instance{{ID: addr, Revision: id, State: endpoints.Ready, Addr: addr, Capacity: cfg.Concurrency}}})
		}
		group.Go(func() error { return act.Run(below) })
		next = act
	}
	r, err := router.New(router.Config{Next: next, Log: cfg.Log})
	if err != nil {
		return err
	}
	r.SetTable(table)
	ln, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return err
	}
	fr := front.New(front.Config{Log: cfg.Log}, r)
	group.Go(func() error { return fr.Serve(ln) })
	group.Go(func() error {
		select {
		case <-ctx.Done():
		case <-groupCtx.Done():
		}
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.Drain)
		defer cancel()
		err := fr.Shutdown(drain)
		stop()
		return err
	})
	ready(ln.Addr().String())
	return group.Wait()
}
