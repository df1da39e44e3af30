package gateway

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

const (
	firstRetry, lastRetry = time.Second, 30 * time.Second
	drainDeadline         = 15 * time.Minute
)

// Serve runs a node in the network namespace of the calling thread until ctx ends. A configuration that cannot be used at first is its
// error, one that comes later is logged and changes nothing. What cannot be made (a bridge that is not there yet) is logged and tried again.
func Serve(ctx context.Context, o Options) error {
	cfg, err := o.Load()
	if err != nil {
		return err
	}
	host, err := link.Current()
	if err != nil {
		return err
	}
	defer host.Close()
	if cfg.Pin != "" {
		if err := tunnel.MountPins(cfg.Pin); err != nil {
			return err
		}
	}
	t, err := tunnel.OpenMember(tunnel.Config{Driver: tunnel.Driver(cfg.Driver), Device: cfg.Device, Pin: cfg.Pin})
	if err != nil {
		return err
	}
	enis := &MeteredENIs{ENIProvider: LocalENIs(host, cfg.Namespace), Delay: time.Duration(cfg.ENIDelay)}
	n, err := NewNode(cfg, Parts{Tunnel: t, ENIs: enis, Log: o.Log, Out: o.Out})
	if err != nil {
		return errors.Join(err, t.Close())
	}
	if o.Measure != nil {
		o.Measure(n.Status)
	}
	g, ctx := errgroup.WithContext(ctx)
	// Only a node that has joined all its pairs may take over from the other one: it has to copy what belongs to each of them.
	joined := make(chan struct{})
	g.Go(func() error { <-joined; return n.Run(ctx) })
	g.Go(func() error { n.follow(ctx, o, cfg, sync.OnceFunc(func() { close(joined) })); return nil })
	return errors.Join(g.Wait(), t.Close())
}

// follow makes the pairs what the configuration says; joined is called when that was tried for the first time.
func (n *Node) follow(ctx context.Context, o Options, cfg Config, joined func()) {
	var draining sync.WaitGroup
	defer draining.Wait()
	drains := map[uint32]bool{}
	retry, ready := firstRetry, false
	for {
		err := n.Set(ctx, cfg.Pairs, cfg.Workers)
		joined()
		if ctx.Err() != nil {
			return
		}
		wait := (<-chan time.Time)(nil)
		if err != nil {
			o.Log.Error("some pairs are not what they should be; trying again", "in", retry, "error", err)
			wait = time.After(retry)
			retry = min(2*retry, lastRetry)
		} else {
			retry = firstRetry
			if !ready && o.Ready != nil {
				o.Ready(len(cfg.Pairs))
			}
			ready = true
		}
		for _, p := range cfg.Pairs {
			if begun := drains[p.ID]; p.Draining && !begun && err == nil {
				draining.Go(func() { n.drain(ctx, p) })
			}
			drains[p.ID] = p.Draining && err == nil
		}
		select {
		case <-ctx.Done():
			return
		case <-wait:
		case <-o.Again:
			if next, err := n.reread(o, cfg); err != nil {
				o.Log.Error("the new configuration is not used", "error", err)
			} else {
				cfg = next
			}
		}
	}
}

// reread reads the configuration anew. What concerns the node itself needs a restart.
func (n *Node) reread(o Options, old Config) (Config, error) {
	cfg, err := o.Load()
	if err != nil {
		return cfg, err
	}
	if cfg.node() != old.node() {
		return cfg, errors.New("other fields than workers and pairs have changed: restart for those")
	}
	return cfg, nil
}

// node is what cannot change while it runs.
func (c Config) node() string {
	c.Workers, c.WorkerSet, c.Pairs = nil, nil, nil
	replicate := c.Replicate == nil || *c.Replicate
	c.Replicate = nil
	return fmt.Sprint(c, replicate)
}

func (n *Node) drain(ctx context.Context, p Pair) {
	limit, stop := context.WithTimeout(ctx, drainDeadline)
	defer stop()
	left, err := n.Drain(limit, p.ID)
	switch {
	case ctx.Err() != nil || errors.Is(err, ErrNoPair):
	case err != nil:
		n.log.Error("drain", "pair", p.Name, "error", err)
	default:
		n.log.Info("pair is drained and may be removed", "pair", p.Name, "ended", left)
	}
}
