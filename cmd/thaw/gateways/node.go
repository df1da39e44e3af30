package gateways

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

const (
	lease   = 2 * time.Second // a node that is silent for so long has left
	lookOut = 250 * time.Millisecond
)

// node is one of a group at work.
type node struct {
	store state.Store
	log   *slog.Logger
	cfg   gateway.Config // as the file has it
	again chan struct{}  // the pairs or the workers have changed

	mu      sync.Mutex
	pairs   []gateway.Pair
	refused map[uint32]string // pairs that this node cannot have, and why
	workers []gateway.Worker
}

// Serve is gateway.Serve with the pairs and the workers of the store in place of those of the configuration, which must have none.
func Serve(ctx context.Context, store state.Store, o gateway.Options) error {
	load, hangup, measure := o.Load, o.Again, o.Measure
	cfg, err := load()
	if err != nil {
		return err
	}
	switch {
	case cfg.Name == "" || strings.Contains(cfg.Name, "/"):
		return errors.New("name: give the node one that no other node has, without a slash")
	case len(cfg.Pairs)+len(cfg.WorkerSet) > 0:
		return errors.New("pairs and workers of a node that follows an etcd are told there: leave them out of the file")
	}
	n := &node{store: store, log: o.Log, cfg: cfg, again: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(ctx)
	var known sync.WaitGroup // an empty list of pairs takes away what an earlier process has made: nothing is done before it is known
	known.Add(2)
	for prefix, told := range map[string]func(map[string][]byte){pairsRoot + n.group() + "/": n.setPairs, workersRoot: n.setWorkers} {
		first := sync.OnceFunc(known.Done)
		g.Go(func() error {
			return follow(gctx, store, prefix, func(all map[string][]byte) { told(all); first(); n.changed() })
		})
	}
	g.Go(func() error { // SIGHUP reads the file again
		for {
			select {
			case <-gctx.Done():
				return nil
			case <-hangup:
				n.changed()
			}
		}
	})
	g.Go(func() error {
		defer cancel()
		all := make(chan struct{})
		go func() { known.Wait(); close(all) }()
		select {
		case <-gctx.Done():
			return nil
		case <-all:
		}
		o.Load = func() (gateway.Config, error) {
			cfg, err := load()
			if err != nil {
				return cfg, err
			}
			return n.filled(cfg)
		}
		o.Again = n.again
		o.Measure = func(status func() (gateway.Status, error)) {
			g.Go(func() error { n.report(gctx, status); return nil })
			if measure != nil {
				measure(status)
			}
		}
		return gateway.Serve(gctx, o)
	})
	return g.Wait()
}

func (n *node) group() string { return n.cfg.Outer[0].Addr().String() }

func (n *node) changed() {
	select {
	case n.again <- struct{}{}:
	default:
	}
}

// filled is a configuration with the pairs and workers that are known.
func (n *node) filled(cfg gateway.Config) (gateway.Config, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	cfg.Pairs, cfg.WorkerSet = slices.Clone(n.pairs), slices.Clone(n.workers)
	return cfg, cfg.Validate()
}

// setPairs takes over what the pairs of the group are to be. One that cannot be is left out: it must not keep the others from changing.
func (n *node) setPairs(all map[string][]byte) {
	var pairs []gateway.Pair
	refused := map[uint32]string{}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		var p reconcile.Pair
		if err := json.Unmarshal(all[key], &p); err != nil {
			n.log.Error("a pair in the state cannot be read", "pair", key, "error", err)
			continue
		}
		alone := n.cfg
		alone.Pairs = []gateway.Pair{PairOf(p)}
		if err := alone.Validate(); err != nil {
			n.log.Error("a pair cannot be made here", "error", err)
			refused[p.ID] = err.Error()
			continue
		}
		pairs = append(pairs, PairOf(p))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pairs, n.refused = pairs, refused
}

// PairOf is the configuration of a pair on the nodes of a group.
func PairOf(p reconcile.Pair) gateway.Pair {
	return gateway.Pair{
		Name: p.Namespace + "/" + p.Name, ID: p.ID, VPC: tunnel.Key(p.Key), Subnet: p.CIDR, HAVIPs: p.HAVIPs, NextHop: p.Router, EIPs: p.Public,
		Network: gateway.Network{Bridge: p.ENI.Bridge, Device: p.ENI.Device, VLAN: int(p.ENI.VLAN), Shared: p.ENI.Macvlan},
	}
}

// setWorkers takes over where the instances are. Of two nodes that claim the same addresses, against Join, the first by name has them.
func (n *node) setWorkers(all map[string][]byte) {
	var workers []gateway.Worker
	for _, name := range slices.Sorted(maps.Keys(all)) {
		var w gateway.Worker
		if err := json.Unmarshal(all[name], &w); err != nil {
			n.log.Error("a worker in the state cannot be read", "worker", name, "error", err)
			continue
		}
		alone := n.cfg
		alone.WorkerSet = []gateway.Worker{w}
		err := alone.Validate()
		if i := slices.IndexFunc(workers, func(o gateway.Worker) bool { return o.Prefix.Overlaps(w.Prefix) }); i >= 0 {
			err = errors.Join(err, fmt.Errorf("its prefix %s overlaps %s of another", w.Prefix, workers[i].Prefix))
		}
		if err != nil {
			n.log.Error("a worker is left out", "worker", name, "error", err)
			continue
		}
		workers = append(workers, w)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.workers = workers
}

// report writes what the node has, under a lease, until ctx ends.
func (n *node) report(ctx context.Context, status func() (gateway.Status, error)) {
	key := nodesRoot + n.group() + "/" + n.cfg.Name
	var session state.Session
	var last []byte
	tick := time.NewTicker(lookOut)
	defer tick.Stop()
	for {
		value, err := json.Marshal(n.record(status))
		if err == nil && session == nil {
			last = nil
			session, err = n.store.Session(context.WithoutCancel(ctx), lease) // the end of ctx gives it back in order
		}
		if err == nil && !bytes.Equal(value, last) {
			if _, err = session.Put(ctx, key, value, state.Any); err == nil {
				last = value
			}
		}
		if err != nil && ctx.Err() == nil {
			n.log.Warn("the other nodes cannot be told of this one", "error", err)
		}
		lost := (<-chan struct{})(nil)
		if session != nil {
			lost = session.Done()
		}
		select {
		case <-ctx.Done():
			if session != nil {
				_ = session.Close() // what it misses runs out by itself
			}
			return
		case <-lost:
			session = nil
		case <-tick.C:
		}
	}
}

func (n *node) record(status func() (gateway.Status, error)) record {
	driver := tunnel.Driver(n.cfg.Driver)
	r := record{Name: n.cfg.Name, Driver: string(driver), Pairs: []half{}}
	if dev, err := net.InterfaceByName(n.cfg.Device); err == nil {
		r.MTU = dev.MTU - driver.Overhead()
	}
	if s, err := status(); err == nil {
		r.Role = string(s.Role)
		for _, p := range s.Pairs {
			h := half{ID: p.ID, Active: p.Link}
			if !p.Link {
				h.Message = "its link into the subnet is down"
			}
			r.Pairs = append(r.Pairs, h)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(n.refused)) {
		r.Pairs = append(r.Pairs, half{ID: id, Message: n.refused[id]})
	}
	return r
}

// Join says where the instances of a node are: its address between the nodes, and the addresses of its instances, which must not be
// another live node's (alive). The entry of one that is gone gives way.
func Join(ctx context.Context, store state.Store, name string, w gateway.Worker, alive func(context.Context) (map[string]string, error)) error {
	kvs, _, err := store.List(ctx, workersRoot)
	if err != nil {
		return err
	}
	live, err := alive(ctx)
	if err != nil {
		return err
	}
	for _, kv := range kvs {
		other := strings.TrimPrefix(kv.Key, workersRoot)
		var o gateway.Worker
		if other == name || json.Unmarshal(kv.Value, &o) != nil || !overlaps(o.Prefix, w.Prefix) {
			continue
		}
		if _, there := live[other]; there {
			return fmt.Errorf("the addresses %s of the instances here overlap %s of the node %s: give one of them another prefix", w.Prefix, o.Prefix, other)
		}
		if _, err := store.Delete(ctx, kv.Key, kv.Revision); err != nil && !errors.Is(err, state.ErrNotFound) {
			return fmt.Errorf("addresses of %s, which is gone: %w", other, err)
		}
	}
	value, err := json.Marshal(w)
	if err == nil {
		_, err = store.Put(ctx, workersRoot+name, value, state.Any)
	}
	return err
}

func overlaps(a, b netip.Prefix) bool { return a.IsValid() && b.IsValid() && a.Overlaps(b) }
