// Package slots gives a node its way into the networks of tenants: the tunnels' end, a pool of slots for instances, and the Gateways
// of the store, which say where each subnet's tunnels lead. It is an instance.Networks.
package slots

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/tunnel"
	"github.com/thawrun/thaw/netproxy/worker"
)

// Config is what a node needs to know of its networks.
type Config struct {
	Device  string // towards the gateways
	Address string // the node's own there; "" = the first IPv4 address of Device
	Prefix  string // of the addresses of the instances here: no other node's
	Driver  string // of tunnels; "" = tunnel.Ebpf. The gateways' must speak the same
	Ready   int    // slots that wait; 0 = worker's default
	Pin     string // folder of a file system of type bpf; "" = below /sys/fs/bpf
	Log     *slog.Logger
}

// Node is one. Make it with Open.
type Node struct {
	log    *slog.Logger
	where  gateway.Worker
	tunnel tunnel.Worker
	pool   *worker.Pool

	mu       sync.Mutex
	gateways map[[2]string]*api.Gateway
	failed   bool // the last change is not in force
}

// bpfFolder is where the kernel's file system of that type is by custom.
const bpfFolder = "/sys/fs/bpf"

// Open makes the tunnels' end and an empty pool, in the network namespace of the calling thread. Instances that a predecessor attached
// are found again.
func Open(cfg Config) (*Node, error) {
	t, p, err := cfg.parts()
	if err != nil {
		return nil, err
	}
	if t.Pin == "" {
		if err := tunnel.MountPins(bpfFolder); err != nil {
			return nil, err
		}
		t.Pin = filepath.Join(bpfFolder, "thaw", cfg.Device)
	}
	n := &Node{log: cfg.Log, where: gateway.Worker{Outer: t.Local, Prefix: p.Prefix}, gateways: map[[2]string]*api.Gateway{}}
	if n.tunnel, err = tunnel.OpenWorker(t); err != nil {
		return nil, err
	}
	p.Tunnel = n.tunnel
	if n.pool, err = worker.Open(p); err != nil {
		return nil, errors.Join(err, n.tunnel.Close())
	}
	return n, nil
}

// parts makes of the configuration those of the parts.
func (c *Config) parts() (tunnel.Config, worker.Config, error) {
	t := tunnel.Config{Driver: tunnel.Driver(c.Driver), Device: c.Device, Pin: c.Pin}
	if t.Driver == "" {
		t.Driver = tunnel.Ebpf
	}
	prefix, err := netip.ParsePrefix(c.Prefix)
	if err != nil {
		return t, worker.Config{}, fmt.Errorf("prefix of the instances here: %w", err)
	}
	dev, err := net.InterfaceByName(c.Device)
	if err != nil {
		return t, worker.Config{}, fmt.Errorf("device %q towards the gateways: %w", c.Device, err)
	}
	if c.Address != "" {
		t.Local, err = netip.ParseAddr(c.Address)
	} else {
		t.Local, err = firstIPv4(dev)
	}
	if err != nil {
		return t, worker.Config{}, fmt.Errorf("address of this node on %s: %w", c.Device, err)
	}
	return t, worker.Config{Prefix: prefix, MTU: dev.MTU - t.Driver.Overhead(), Ready: c.Ready, Log: c.Log}, nil
}

func firstIPv4(dev *net.Interface) (netip.Addr, error) {
	addrs, err := dev.Addrs()
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			return p.Addr(), nil
		}
	}
	return netip.Addr{}, errors.New("it has no IPv4 address")
}

// Where is where the gateways find the instances here.
func (n *Node) Where() gateway.Worker { return n.where }

// Attach is instance.Networks'.
func (n *Node) Attach(namespace, subnet string) (*os.File, error) {
	return n.pool.Attach(namespace, subnet)
}

// Close lets go of it. Attached instances keep their networks.
func (n *Node) Close() error { return errors.Join(n.pool.Close(), n.tunnel.Close()) }

// Run keeps slots ready and follows the Gateways of the store until ctx ends. synced is called once it has been told of all that there were.
func (n *Node) Run(ctx context.Context, store *objects.Store, synced func()) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.pool.Run(ctx) })
	g.Go(func() error {
		return store.Follow(ctx, api.Gateways, objects.Follower{
			Set: func(o api.Object) { n.change(o.(*api.Gateway), true) }, Remove: func(o api.Object) { n.change(o.(*api.Gateway), false) },
			Synced: synced, Log: n.log,
		})
	})
	g.Go(func() error { n.retry(ctx); return nil })
	return g.Wait()
}

func (n *Node) change(g *api.Gateway, there bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := [2]string{g.Namespace, g.Name}
	if n.gateways[key] = g; !there {
		delete(n.gateways, key)
	}
	n.applyLocked()
}

// retry tries again what the kernel refused.
func (n *Node) retry(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.mu.Lock()
		if n.failed {
			n.applyLocked()
		}
		n.mu.Unlock()
	}
}

func (n *Node) applyLocked() {
	var list []worker.Subnet
	for _, g := range n.gateways {
		if s, ok := subnetOf(g); ok {
			list = append(list, s)
		}
	}
	err := n.pool.SetSubnets(list)
	if n.failed = err != nil; n.failed {
		n.log.Warn("tunnels are not what they should be", "err", err)
	}
}

// subnetOf is what a Gateway says to a node, if it says enough already.
func subnetOf(g *api.Gateway) (worker.Subnet, bool) {
	key, id := tunnel.Key(g.Status.Key), uint32(g.Status.ID)
	outer, err := netip.ParseAddr(g.Status.Address)
	if err != nil || key == 0 || int64(key) != g.Status.Key || id == 0 || int64(id) != g.Status.ID {
		return worker.Subnet{}, false
	}
	pairs := []tunnel.Pair{{ID: id, Outer: outer, Draining: g.Status.State == api.PairDraining}}
	for _, p := range g.Status.Pairs[min(1, len(g.Status.Pairs)):] {
		outer, err := netip.ParseAddr(p.Address)
		if err != nil || p.State != api.PairActive && p.State != api.PairDraining {
			continue // it is not there yet
		}
		pairs = append(pairs, tunnel.Pair{ID: uint32(p.ID), Outer: outer, Draining: p.State == api.PairDraining})
	}
	return worker.Subnet{Namespace: g.Namespace, Name: g.Spec.Subnet, Key: key, Pairs: pairs}, true
}

// Measure puts the node's slots and tunnels into the metrics.
func (n *Node) Measure(m metric.Meter) error {
	slots, _ := m.Int64ObservableGauge("thaw.network.slots", metric.WithUnit("{slot}"), metric.WithDescription("Slots of this node in networks of tenants, and addresses without one."))
	attached, _ := m.Int64ObservableCounter("thaw.network.attached", metric.WithUnit("{instance}"), metric.WithDescription("Instances that were attached to a network."))
	packets, _ := m.Int64ObservableCounter("thaw.network.packets", metric.WithUnit("{packet}"), metric.WithDescription("Packets through tunnels; those that the kernel carries as one are one."))
	size, _ := m.Int64ObservableCounter("thaw.network.size", metric.WithUnit("By"), metric.WithDescription("Their bytes, without outer headers."))
	drops, _ := m.Int64ObservableCounter("thaw.network.drops", metric.WithUnit("{packet}"), metric.WithDescription("Packets that were not let through."))
	_, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		p := n.pool.Stats()
		for state, v := range map[string]int{"ready": p.Ready, "used": p.Used, "free": p.Free} {
			o.ObserveInt64(slots, int64(v), metric.WithAttributes(attribute.String("state", state)))
		}
		o.ObserveInt64(attached, int64(p.Attached-p.Cold), metric.WithAttributes(attribute.String("slot", "ready")))
		o.ObserveInt64(attached, int64(p.Cold), metric.WithAttributes(attribute.String("slot", "made")))
		t, err := n.tunnel.Stats()
		if err != nil {
			return err
		}
		for direction, c := range map[string]tunnel.Counter{"out": t.Out, "in": t.In} {
			o.ObserveInt64(packets, int64(c.Packets), metric.WithAttributes(attribute.String("direction", direction)))
			o.ObserveInt64(size, int64(c.Bytes), metric.WithAttributes(attribute.String("direction", direction)))
		}
		for reason, v := range t.Drops {
			o.ObserveInt64(drops, int64(v), metric.WithAttributes(attribute.String("reason", string(reason))))
		}
		return nil
	}, slots, attached, packets, size, drops)
	return err
}
