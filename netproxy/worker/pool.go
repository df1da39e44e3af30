package worker

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/thawrun/thaw/netproxy/tunnel"
)

// What callers branch on.
var (
	// ErrUnknown says that this node has not been told of a subnet.
	ErrUnknown = errors.New("subnet is not known on this node")
	// ErrExhausted says that all addresses of the node's prefix are in use.
	ErrExhausted = errors.New("all addresses of the node's prefix are in use")
)

// Config is what a pool needs to know.
type Config struct {
	Tunnel tunnel.Worker // is used, not closed
	Prefix netip.Prefix  // of the instances' addresses, of this node alone; IPv4, at least 4 addresses
	MTU    int           // inside, bytes: that between the nodes less the driver's overhead
	Ready  int           // slots that wait for instances: twice the largest burst. 0 = 64
	Log    *slog.Logger  // nil = nothing
}

func (c *Config) validate() error {
	if c.Ready == 0 {
		c.Ready = 64
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch p := c.Prefix; {
	case c.Tunnel == nil:
		return errors.New("worker: no tunnel")
	case !p.Addr().Is4() || p != p.Masked() || p.Bits() > 30 || p.Bits() < 12:
		return fmt.Errorf("worker: prefix %v: want an IPv4 network of /12 to /30", p)
	case c.MTU < 576 || c.MTU > 65535:
		return fmt.Errorf("worker: MTU %d: want 576 to 65535", c.MTU)
	case c.Ready < 0:
		return fmt.Errorf("worker: %d slots ready", c.Ready)
	}
	return nil
}

// Subnet is one that instances can be attached to.
type Subnet struct {
	Namespace string // of objects
	Name      string // VPC/SUBNET
	Key       tunnel.Key
	Pairs     []tunnel.Pair
}

// Stats is the state of a pool.
type Stats struct {
	Ready    int    // slots that wait
	Used     int    // slots with an instance, or whose device is not gone yet
	Free     int    // addresses without a slot
	Attached uint64 // since the start
	Cold     uint64 // of those, made while an instance waited: the pool was empty
}
