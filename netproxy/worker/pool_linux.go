package worker

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// Pool keeps slots. Make one with Open, in the namespace that the tunnel is in, and Run it.
type Pool struct {
	cfg   Config
	host  *link.Namespace
	watch int // descriptor of link.Watch
	wake  chan struct{}

	making sync.Mutex // held by who makes a slot: the kernel has one lock for all of it anyway. Never taken under mu

	mu      sync.Mutex
	ready   []*slot
	used    map[int]tunnel.Slot // by device
	free    []netip.Addr        // the longest unused first: the other end may still know flows of an address
	subnets map[subnetName]Subnet
	stats   Stats // Attached and Cold
	closed  bool
}

type subnetName struct{ namespace, name string }

// slot is one that waits.
type slot struct {
	tunnel.Slot
	ns *os.File
}

// Inside a slot.
const device = "eth0"

var (
	gateway    = netip.MustParseAddr("169.254.1.1") // the same for all: nobody has it
	gatewayMAC = [6]byte{2, 0, 0, 0, 0, 1}          // nobody's either: what is sent there the tunnel takes
)

// prefix begins the names of the node's ends, and by that they are known to the rule that lets nothing out of them.
const prefix = "thaw-"

func hostName(a netip.Addr) string { return prefix + hex.EncodeToString(a.AsSlice()) }

// Open makes a pool in the namespace of the calling thread. Slots of a predecessor that have an instance are found by what the tunnel
// still has.
func Open(cfg Config) (_ *Pool, err error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	p := &Pool{cfg: cfg, watch: -1, wake: make(chan struct{}, 1), used: map[int]tunnel.Slot{}, subnets: map[subnetName]Subnet{}}
	defer func() {
		if err != nil {
			p.release()
		}
	}()
	if p.host, err = link.Current(); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	if err := seal(p.host); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	if p.watch, err = link.Watch(); err != nil { // before it is looked who is there
		return nil, fmt.Errorf("worker: %w", err)
	}
	if err := p.recover(); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	return p, nil
}

// recover takes over the slots of a predecessor.
func (p *Pool) recover() error {
	attached, err := p.cfg.Tunnel.Slots()
	if err != nil {
		return err
	}
	c, err := p.host.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	taken := map[netip.Addr]bool{}
	for s := range attached {
		d, err := c.Device(hostName(s.Inner))
		switch {
		case err == nil && d.Index == s.Device:
			p.used[s.Device], taken[s.Inner] = s, true
		case err == nil || errors.Is(err, link.ErrNoDevice):
			if err := p.cfg.Tunnel.Detach(s); err != nil {
				return err
			}
		default:
			return err
		}
	}
	// Neither the first nor the last one, which mean the network itself elsewhere.
	for a := p.cfg.Prefix.Addr().Next(); p.cfg.Prefix.Contains(a.Next()); a = a.Next() {
		if !taken[a] {
			p.free = append(p.free, a)
		}
	}
	return nil
}

func (p *Pool) release() {
	if p.watch >= 0 {
		unix.Close(p.watch)
	}
	if p.host != nil {
		p.host.Close()
	}
}

// Close lets go of the slots that wait. Those with an instance stay as they are. Call it after Run has returned.
func (p *Pool) Close() error {
	p.making.Lock()
	defer p.making.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	for _, s := range p.ready {
		s.ns.Close()
	}
	p.ready = nil
	var err error
	if len(p.used) == 0 {
		err = unseal(p.host)
	}
	p.release()
	return err
}

// Stats counts.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Ready, s.Used, s.Free = len(p.ready), len(p.used), len(p.free)
	return s
}

// SetSubnets says which subnets there are and which pairs they have. It replaces what was said before. Instances of a subnet that is
// not listed any more reach nothing.
func (p *Pool) SetSubnets(list []Subnet) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	want, pairs := map[subnetName]Subnet{}, map[tunnel.Key][]tunnel.Pair{}
	for _, s := range list {
		want[subnetName{s.Namespace, s.Name}] = s
		pairs[s.Key] = s.Pairs
	}
	var err error
	for _, s := range p.subnets {
		if _, keep := pairs[s.Key]; !keep {
			err = errors.Join(err, p.cfg.Tunnel.SetPairs(s.Key, nil))
		}
	}
	for key, list := range pairs {
		err = errors.Join(err, p.cfg.Tunnel.SetPairs(key, list))
	}
	p.subnets = want
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	return nil
}

// Attach returns the namespace of a slot in a subnet, for one instance. The caller closes it.
func (p *Pool) Attach(namespace, subnet string) (*os.File, error) {
	p.mu.Lock()
	s, known := p.subnets[subnetName{namespace, subnet}]
	var x *slot
	if n := len(p.ready); known && n > 0 {
		x = p.ready[n-1]
		p.ready = p.ready[:n-1]
		p.used[x.Device] = x.Slot
	}
	p.mu.Unlock()
	if !known {
		return nil, fmt.Errorf("subnet %s of namespace %s: %w", subnet, namespace, ErrUnknown)
	}
	p.look()
	cold := x == nil
	if cold {
		var err error
		if x, err = p.make(true); err != nil {
			return nil, err
		}
	}
	if err := p.cfg.Tunnel.Attach(x.Slot, s.Key); err != nil {
		x.ns.Close() // its device goes, and by that the rest
		return nil, err
	}
	p.mu.Lock()
	p.stats.Attached++
	if cold {
		p.stats.Cold++
	}
	p.mu.Unlock()
	return x.ns, nil
}

func (p *Pool) look() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run keeps slots ready and gives back those whose device is gone, until ctx ends.
func (p *Pool) Run(ctx context.Context) error {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		p.sweep(ctx)
	}()
	defer func() { <-gone }()
	for {
		p.mu.Lock()
		lack := len(p.ready) < p.cfg.Ready && len(p.free) > 0
		p.mu.Unlock()
		if lack {
			x, err := p.make(false)
			if err == nil {
				p.mu.Lock()
				p.ready = append(p.ready, x)
				p.mu.Unlock()
				if ctx.Err() != nil {
					return nil
				}
				continue
			}
			if !errors.Is(err, ErrExhausted) {
				p.cfg.Log.Warn("no slot for an instance can be made ahead", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
			p.breathe(ctx)
		case <-time.After(time.Second): // after a failure
		}
	}
}

// breathe waits a moment if there is enough for it: the instance that has just got a slot needs the processor more.
func (p *Pool) breathe(ctx context.Context) {
	p.mu.Lock()
	enough := len(p.ready) > p.cfg.Ready/2
	p.mu.Unlock()
	if enough {
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// make makes a slot; use: for an instance that waits.
func (p *Pool) make(use bool) (*slot, error) {
	p.making.Lock()
	defer p.making.Unlock()
	for {
		p.mu.Lock()
		if len(p.free) == 0 || p.closed {
			p.mu.Unlock()
			return nil, fmt.Errorf("%w (%v)", ErrExhausted, p.cfg.Prefix)
		}
		a := p.free[0]
		p.free = p.free[1:]
		p.mu.Unlock()
		x, err := p.build(a)
		p.mu.Lock()
		switch {
		case err == nil && use:
			p.used[x.Device] = x.Slot
		case err != nil:
			p.free = append(p.free, a)
		}
		n := len(p.free)
		p.mu.Unlock()
		if errors.Is(err, unix.EEXIST) && n > 1 {
			continue // the kernel is not done with a predecessor's slot of that address yet
		}
		if err != nil {
			return nil, fmt.Errorf("slot for an instance: %w", err)
		}
		return x, nil
	}
}

// build makes the namespace, the cable, and what is inside.
func (p *Pool) build(a netip.Addr) (_ *slot, err error) {
	ns, err := link.NewNamespace()
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	name := hostName(a)
	if err := link.Cable(link.End{In: p.host, Name: name}, link.End{In: ns, Name: device}); err != nil {
		return nil, err
	}
	host, err := p.host.Open()
	if err != nil {
		return nil, err
	}
	defer host.Close()
	d, err := host.Device(name)
	if err != nil {
		return nil, err
	}
	// The program is there before anything can come out. The inner end is switched on last: it can send at once then, while the
	// first end of a cable that is switched on hears of its carrier later and loses what is sent before.
	if err := errors.Join(p.cfg.Tunnel.Plug(d.Index), host.SetUp(name, true)); err != nil {
		return nil, err
	}
	if err := p.furnish(ns, a); err != nil {
		return nil, err
	}
	f, err := ns.File()
	if err != nil {
		return nil, err
	}
	return &slot{tunnel.Slot{Device: d.Index, Inner: a}, f}, nil
}

// furnish makes the inside of a slot.
func (p *Pool) furnish(ns *link.Namespace, a netip.Addr) error {
	c, err := ns.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	d, err := c.Device(device)
	if err != nil {
		return err
	}
	steps := []func() error{
		func() error { return ns.Sysctl("net/ipv4/ip_unprivileged_port_start", "0") }, // as in a sandbox of its own
		func() error { return c.SetUp("lo", true) },
		func() error { return c.SetMTU(device, p.cfg.MTU) },
		func() error { return c.SetAddress(d.Index, netip.PrefixFrom(a, 32), 0) },
		func() error { return c.SetUp(device, true) },
		func() error { return c.SetNeighbor(d.Index, gateway, gatewayMAC) },
		func() error { return c.SetRoute(link.Route{To: netip.PrefixFrom(gateway, 32), Device: device}) },
		func() error {
			return c.SetRoute(link.Route{To: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Via: gateway, Device: device})
		},
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// sweep gives back slots whose devices are gone, until ctx ends.
func (p *Pool) sweep(ctx context.Context) {
	buf := make([]byte, 32<<10)
	for ctx.Err() == nil {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(p.watch), Events: unix.POLLIN}}, 200) // so long may it take to end
		var down []int
		lost := link.ReadWatch(p.watch, buf, func(index int, up bool) {
			if !up {
				down = append(down, index)
			}
		})
		if lost || len(down) > 0 {
			p.giveBack(down, lost)
		}
	}
}

// giveBack looks which of the devices, or of all, are gone.
func (p *Pool) giveBack(down []int, all bool) {
	p.mu.Lock()
	var candidates []tunnel.Slot
	for index, s := range p.used {
		if all || slices.Contains(down, index) {
			candidates = append(candidates, s)
		}
	}
	p.mu.Unlock()
	if len(candidates) == 0 {
		return
	}
	c, err := p.host.Open()
	if err != nil {
		p.cfg.Log.Warn("slots cannot be looked at", "err", err)
		return
	}
	defer c.Close()
	for _, s := range candidates {
		d, err := c.Device(hostName(s.Inner))
		if err == nil && d.Index == s.Device || err != nil && !errors.Is(err, link.ErrNoDevice) {
			continue
		}
		if err := p.cfg.Tunnel.Detach(s); err != nil {
			p.cfg.Log.Warn("a slot cannot be detached", "address", s.Inner, "err", err)
			continue
		}
		p.mu.Lock()
		delete(p.used, s.Device)
		p.free = append(p.free, s.Inner)
		p.mu.Unlock()
		p.look()
	}
}
