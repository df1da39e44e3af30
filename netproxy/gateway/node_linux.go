package gateway

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/ctsync"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

const (
	hostPrefix = "gwn" // of a cable's end on the node
	// Addresses of the cable, the same for everyone: what comes out of it at the node's end goes into a tunnel, whatever it is.
	cableNode, cableTenant = "169.254.1.1", "169.254.1.2"
	silentAddress          = "169.254.1.3" // of an ENI, for as long as it has no HAVIP
	// checkEvery is how often quotas and loads are looked at.
	checkEvery = time.Second
	// drainPoll is how often a pair that drains is counted, and farewell how long what is left at its end is answered with resets.
	drainPoll, farewell = 500 * time.Millisecond, time.Second
)

// ErrNoPair says that the node has no such pair.
var ErrNoPair = errors.New("no such pair")

// Node has one half of each of its pairs.
type Node struct {
	cfg    Config
	host   *link.Namespace
	tunnel tunnel.Member
	enis   ENIProvider
	ha     *havip.Member
	key    []byte
	mtu    int // of the tunnels, bytes of IP
	log    *slog.Logger

	busy sync.Map // uint32 to *sync.Mutex: one Ensure or Remove of a pair at a time, for as long as its provider takes

	working sync.WaitGroup // calls that use what Run closes at its end; grows only under mu, while not ended

	mu    sync.Mutex
	ended bool             // Run is about to return
	pairs map[uint32]*half // those that are complete; nil when Run has returned

	cpu cpuSample // of watch
}

// half is a pair's half on this node.
type half struct {
	ns   *link.Namespace
	done chan struct{} // closed when it is removed

	// Guarded by Node.mu once it is among the pairs.
	Pair
	gate    gate
	drained bool    // it drains, and nothing is left
	last    *sample // nil: not measured yet
}

// Parts are what a node works with.
type Parts struct {
	Tunnel tunnel.Member
	ENIs   ENIProvider
	Log    *slog.Logger
	Out    io.Writer // a line for each change of role
}

// NewNode opens what the node needs in the network namespace of the calling thread, and does nothing yet. Run has to be called once. The
// configuration is a valid one; its pairs come with Set.
func NewNode(cfg Config, with Parts) (*Node, error) {
	n := &Node{cfg: cfg, tunnel: with.Tunnel, enis: with.ENIs, log: with.Log, pairs: map[uint32]*half{}}
	if err := n.open(with.Out); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *Node) open(out io.Writer) (err error) {
	if n.cfg.KeyFile != "" {
		if n.key, err = os.ReadFile(n.cfg.KeyFile); err != nil {
			return fmt.Errorf("key: %w", err)
		}
	}
	if n.host, err = link.Current(); err != nil {
		return err
	}
	c, err := n.host.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	d, err := c.Device(n.cfg.Device)
	if err != nil {
		return err
	}
	n.mtu = d.MTU - tunnel.Driver(n.cfg.Driver).Overhead()
	sync, err := havip.ParseSync(n.cfg.Sync)
	if err != nil {
		return err
	}
	sync.Port = ctsync.Port
	hc := havip.Config{
		Router: n.cfg.Router, Priority: n.cfg.Priority, Advert: time.Duration(n.cfg.Advert), Settle: time.Duration(n.cfg.Settle),
		Sync: sync, Replicate: true, Key: n.key, Out: out,
	}
	for _, p := range n.cfg.Outer {
		hc.VIPs = append(hc.VIPs, havip.VIP{Prefix: p, Device: n.cfg.Device})
	}
	n.ha, err = havip.NewMember(hc)
	return err
}

func (n *Node) close() {
	if n.host != nil {
		n.host.Close()
	}
}

// Run keeps the addresses until ctx ends, and hands them over then. Namespaces, rules, NICs and tunnels stay: a node that comes
// back adopts them, and Set or Remove take away what is not wanted.
func (n *Node) Run(ctx context.Context) error {
	defer n.close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.ha.Run(ctx) })
	g.Go(func() error { n.watch(ctx); return nil })
	if n.cfg.Status != "" {
		g.Go(func() error { return n.serveStatus(ctx) })
	}
	err := g.Wait()
	n.mu.Lock()
	n.ended = true
	n.mu.Unlock()
	n.working.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, h := range n.pairs {
		h.ns.Close()
	}
	n.pairs = nil
	return err
}

// begin says that somebody works on pairs, and has to tell working when that is over; an error when Run is about to return.
func (n *Node) begin() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ended {
		return errEnded
	}
	n.working.Add(1)
	return nil
}

var errEnded = errors.New("the node has ended")

// Set makes the node's pairs those of the list: others are removed, namespaces that an earlier process left included. It goes on
// after an error, and returns all of them.
func (n *Node) Set(ctx context.Context, pairs []Pair, workers []tunnel.Peer) error {
	want := map[uint32]bool{}
	for _, p := range pairs {
		want[p.ID] = true
	}
	var errs []error
	left, err := namespaces(n.cfg.Namespace)
	if err != nil {
		errs = append(errs, err)
	}
	for _, id := range left {
		if !want[id] {
			errs = append(errs, n.Remove(ctx, id))
		}
	}
	results := make([]error, len(pairs))
	var g errgroup.Group
	g.SetLimit(8)
	for i := range pairs {
		g.Go(func() error {
			results[i] = n.Ensure(ctx, pairs[i], workers)
			return nil
		})
	}
	_ = g.Wait() // one that fails does not keep the others
	return errors.Join(append(errs, results...)...)
}

// lock is held by who makes or removes a pair.
func (n *Node) lock(id uint32) *sync.Mutex {
	m, _ := n.busy.LoadOrStore(id, new(sync.Mutex))
	return m.(*sync.Mutex)
}

// Ensure makes this node's half of a pair, and says which workers use it. It may be repeated: the same again changes nothing, and what
// can change without touching connections does. When it fails for a pair that is new, nothing of it is left.
func (n *Node) Ensure(ctx context.Context, p Pair, workers []tunnel.Peer) error {
	if err := n.begin(); err != nil {
		return fmt.Errorf("pair %s: %w", p.Name, err)
	}
	defer n.working.Done()
	l := n.lock(p.ID)
	l.Lock()
	defer l.Unlock()
	n.mu.Lock()
	h, there := n.pairs[p.ID]
	n.mu.Unlock()
	if there && (h.VPC != p.VPC || h.Outer != p.Outer || h.Network != p.Network) {
		if err := n.remove(ctx, h); err != nil { // it is another pair under the same number
			return fmt.Errorf("pair %s: %w", p.Name, err)
		}
		there = false
	}
	if !there {
		ns, _, err := link.Named(namespacePath(n.cfg.Namespace, p.ID))
		if err != nil {
			return fmt.Errorf("pair %s: %w", p.Name, err)
		}
		h = &half{Pair: p, ns: ns, done: make(chan struct{})}
	}
	g, err := n.ensure(ctx, h, p, workers, there)
	if err != nil {
		err = fmt.Errorf("pair %s: %w", p.Name, err)
		if !there {
			err = errors.Join(err, n.remove(context.WithoutCancel(ctx), h))
		}
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h.Pair, h.gate, h.drained = p, g, h.drained && g == gateDraining
	n.pairs[p.ID] = h
	return nil
}

func hostDevice(id uint32) string { return hostPrefix + strconv.FormatUint(uint64(id), 10) }

// ensure makes what is missing. The rules come first: nothing passes before they are there.
func (n *Node) ensure(ctx context.Context, h *half, p Pair, workers []tunnel.Peer, joined bool) (g gate, err error) {
	if err := setSysctls(h.ns); err != nil {
		return g, err
	}
	if err := setRules(h.ns, &p, n.mtu); err != nil {
		return g, err
	}
	g = gateOpen
	if p.Draining {
		g = gateDraining
	}
	if err := setGate(h.ns, g); err != nil {
		return g, err
	}
	host, err := n.cable(h, p)
	if err != nil {
		return g, err
	}
	if err := n.enis.Ensure(ctx, ENI{p.ID, p.Network, h.ns}); err != nil {
		return g, fmt.Errorf("ENI: %w", err)
	}
	if err := n.plumb(h, p); err != nil {
		return g, err
	}
	if err := n.tunnel.AddTenant(tunnel.Tenant{VPC: p.VPC, Local: p.Outer, Host: host}); err != nil {
		return g, err
	}
	if err := n.tunnel.SetWorkers(p.VPC, workers); err != nil {
		return g, err
	}
	if joined && slices.Equal(p.HAVIPs, h.HAVIPs) && maps.Equal(p.EIPs, h.EIPs) {
		return g, nil
	}
	if joined {
		n.ha.Leave(site(p.ID))
	}
	return g, n.ha.Join(n.site(h, p))
}

func site(id uint32) string { return "pair-" + strconv.FormatUint(uint64(id), 10) }

// site is the pair's addresses and connections, which follow the node's role.
func (n *Node) site(h *half, p Pair) havip.Site {
	s := havip.Site{Name: site(p.ID), In: h.ns, Replicate: n.cfg.Replicate == nil || *n.cfg.Replicate, Port: p.syncPort()}
	for _, a := range p.HAVIPs {
		s.VIPs = append(s.VIPs, havip.VIP{Prefix: netip.PrefixFrom(a, 32), Device: eniDevice})
	}
	for _, a := range p.EIPs {
		s.VIPs = append(s.VIPs, havip.VIP{Prefix: netip.PrefixFrom(a, 32), Device: eniDevice})
	}
	if len(n.key) > 0 { // what is said about one pair must not be played to another
		mac := hmac.New(sha256.New, n.key)
		mac.Write([]byte(s.Name))
		s.Key = mac.Sum(nil)
	}
	return s
}

// setSysctls is what the namespace's stack has to be like.
func setSysctls(in *link.Namespace) error {
	for _, s := range []struct{ name, value string }{
		{"net/ipv4/ip_forward", "1"},
		{"net/ipv6/conf/all/disable_ipv6", "1"},
		{"net/ipv6/conf/default/disable_ipv6", "1"},
		// Strict: what comes in has to have an address that is behind the device it comes by.
		{"net/ipv4/conf/all/rp_filter", "1"},
		{"net/ipv4/conf/default/rp_filter", "1"},
		// An address is answered for on its own device only, and asked with there.
		{"net/ipv4/conf/all/arp_ignore", "1"},
		{"net/ipv4/conf/all/arp_announce", "2"},
		{"net/ipv4/conf/all/accept_redirects", "0"},
		{"net/ipv4/conf/default/accept_redirects", "0"},
		{"net/ipv4/conf/all/send_redirects", "0"},
		{"net/ipv4/conf/default/send_redirects", "0"},
		// A connection without an entry is not given a new port; and the windows that the other member saw are not replicated.
		{"net/netfilter/nf_conntrack_tcp_loose", "0"},
		{"net/netfilter/nf_conntrack_tcp_be_liberal", "1"},
	} {
		if err := in.Sysctl(s.name, s.value); err != nil && !(strings.HasPrefix(s.name, "net/ipv6") && errors.Is(err, os.ErrNotExist)) {
			return err
		}
	}
	return nil
}

// cable lays the cable between node and namespace, or finds it, and returns the index of the node's end. Only the tunnel looks at that end:
// should its program be gone, nothing passes, because the node itself does not forward there.
func (n *Node) cable(h *half, p Pair) (index int, err error) {
	c, err := n.host.Open()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	in, err := h.ns.Open()
	if err != nil {
		return 0, err
	}
	defer in.Close()
	name := hostDevice(p.ID)
	if there, err := has(h.ns, nodeDevice); err != nil {
		return 0, err
	} else if !there {
		if err := c.DeleteDevice(name); err != nil { // an end whose namespace has just gone
			return 0, err
		}
		if err := link.Cable(link.End{In: n.host, Name: name}, link.End{In: h.ns, Name: nodeDevice}); err != nil {
			return 0, err
		}
	}
	for _, s := range []struct{ what, value string }{{"forwarding", "0"}, {"rp_filter", "0"}, {"arp_ignore", "8"}} {
		if err := n.host.Sysctl("net/ipv4/conf/"+name+"/"+s.what, s.value); err != nil {
			return 0, err
		}
	}
	if err := n.host.Sysctl("net/ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	host, err := c.Device(name)
	if err != nil {
		return 0, err
	}
	dev, err := in.Device(nodeDevice)
	if err != nil {
		return 0, err
	}
	tenant := netip.PrefixFrom(netip.MustParseAddr(cableTenant), 32)
	if err := errors.Join(in.SetUp("lo", true), c.SetUp(name, true), in.SetUp(nodeDevice, true), in.SetAddress(dev.Index, tenant, 0)); err != nil {
		return 0, err
	}
	gw := netip.MustParseAddr(cableNode)
	if err := in.SetRoute(link.Route{To: netip.PrefixFrom(gw, 32), Device: nodeDevice}); err != nil {
		return 0, err
	}
	if err := in.SetNeighbor(dev.Index, gw, host.MAC); err != nil {
		return 0, err
	}
	// With the MTU of the tunnel: a server whose packets are too long is told so, rather than hearing nothing.
	return host.Index, in.SetRoute(link.Route{To: n.cfg.Instances, Via: gw, Device: nodeDevice, MTU: n.mtu})
}

// plumb switches the ENI on and sets the ways out of it.
func (n *Node) plumb(h *half, p Pair) error {
	c, err := h.ns.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetUp(eniDevice, true); err != nil {
		return err
	}
	d, err := c.Device(eniDevice)
	if err != nil {
		return err
	}
	if err := c.SetSilentAddress(d.Index, netip.PrefixFrom(netip.MustParseAddr(silentAddress), 32)); err != nil {
		return err
	}
	// The route does not come and go with the addresses: a member forwards what it knows from the first moment.
	if err := c.SetRoute(link.Route{To: p.Subnet, Device: eniDevice}); err != nil {
		return err
	}
	if p.NextHop.IsValid() {
		return c.SetRoute(link.Route{To: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Via: p.NextHop, Device: eniDevice})
	}
	return nil
}

// Remove takes this node's half of a pair away, with its connections; one that is not there is no error. Something that fails
// does not keep the rest, and it may be repeated.
func (n *Node) Remove(ctx context.Context, id uint32) error {
	if err := n.begin(); err != nil {
		return fmt.Errorf("pair %d: %w", id, err)
	}
	defer n.working.Done()
	l := n.lock(id)
	l.Lock()
	defer l.Unlock()
	n.mu.Lock()
	h, there := n.pairs[id]
	n.mu.Unlock()
	if !there {
		if held, err := namespaces(n.cfg.Namespace); err != nil || !slices.Contains(held, id) {
			return err
		}
		// Left by an earlier process. Which VPC it was is known by the tunnel alone.
		ns, _, err := link.Named(namespacePath(n.cfg.Namespace, id))
		if err != nil {
			return err
		}
		h = &half{Pair: Pair{Name: site(id), ID: id}, ns: ns, done: make(chan struct{})}
		h.adopt(n)
	}
	if err := n.remove(ctx, h); err != nil {
		return fmt.Errorf("pair %s: %w", h.Name, err)
	}
	return nil
}

// adopt finds out what a half was that an earlier process left: its tenant from the tunnel, its network from where its ENI ends.
func (h *half) adopt(n *Node) {
	c, err := n.host.Open()
	if err != nil {
		return
	}
	defer c.Close()
	if d, err := c.Device(hostDevice(h.ID)); err == nil {
		list, _ := n.tunnel.Tenants()
		for _, t := range list {
			if t.Host == d.Index {
				h.VPC, h.Outer = t.VPC, t.Local
			}
		}
	}
	if _, err := c.Device(port(h.ID)); err == nil {
		h.Network.Bridge = "?" // Delete asks only which kind it is
	} else {
		h.Network.Device = "?"
	}
}

func (n *Node) remove(ctx context.Context, h *half) error {
	n.ha.Leave(site(h.ID))
	var errs []error
	if h.VPC != 0 {
		errs = append(errs, n.tunnel.RemoveTenant(h.VPC, h.Outer))
		others := false
		n.mu.Lock()
		for _, o := range n.pairs {
			others = others || o.ID != h.ID && o.VPC == h.VPC
		}
		n.mu.Unlock()
		if !others {
			errs = append(errs, n.tunnel.SetWorkers(h.VPC, nil))
		}
	}
	errs = append(errs, n.enis.Delete(ctx, ENI{h.ID, h.Network, h.ns}))
	// The other end goes with it. Later than the namespace it would go by itself, but a pair of the same number may be made before that.
	errs = append(errs, remove(n.host, hostDevice(h.ID)))
	if err := errors.Join(errs...); err != nil {
		return err // the namespace is what a repeated Remove finds it by
	}
	n.mu.Lock()
	delete(n.pairs, h.ID)
	close(h.done)
	h.ns.Close()
	n.mu.Unlock()
	return link.Unname(namespacePath(n.cfg.Namespace, h.ID))
}

// Drain empties a pair for its removal: new connections are refused from now on (workers are told before not to bring any), and
// it returns when none is left that carries something, or when ctx ends; what is left then is ended with resets for a moment. The
// pair is there until Remove.
func (n *Node) Drain(ctx context.Context, id uint32) (left int, err error) {
	h, err := n.setGate(id, gateDraining)
	if err != nil {
		return 0, err
	}
	n.mu.Lock()
	if n.pairs[id] != h {
		n.mu.Unlock()
		return 0, fmt.Errorf("%w: %d", ErrNoPair, id)
	}
	name := h.Name
	ns, err := h.ns.Clone() // it may be removed while it is counted
	n.mu.Unlock()
	if err != nil {
		return 0, fmt.Errorf("pair %s: %w", name, err)
	}
	defer ns.Close()
	poll := time.NewTicker(drainPoll)
	defer poll.Stop()
	for {
		c, err := ctsync.Survey(ns)
		if err != nil {
			return left, fmt.Errorf("pair %s: %w", name, err)
		}
		if left = c.Live; left == 0 {
			n.mu.Lock()
			h.drained = h.gate == gateDraining
			n.mu.Unlock()
			return 0, nil
		}
		select {
		case <-h.done:
			return left, fmt.Errorf("%w: it was removed meanwhile", ErrNoPair)
		case <-poll.C:
		case <-ctx.Done():
			if _, err := n.setGate(id, gateClosed); err != nil {
				return left, err
			}
			time.Sleep(farewell)
			return left, nil
		}
	}
}

// setGate says what a pair does with connections.
func (n *Node) setGate(id uint32, g gate) (*half, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.pairs[id]
	if h == nil {
		return nil, fmt.Errorf("%w: %d", ErrNoPair, id)
	}
	if h.gate != g {
		if err := setGate(h.ns, g); err != nil {
			return nil, fmt.Errorf("pair %s: %w", h.Name, err)
		}
		h.gate = g
	}
	return h, nil
}
