package gateway

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// TestManyVPCs: a hundred tenants with the same subnet, the same server, the same function and the same ports. Each function reaches its own
// tenant's server, under its own tenant's HAVIP. TestOneNamespaceMixesTenants is the control.
func TestManyVPCs(t *testing.T) {
	const tenants = 100
	l := newLab(t)
	// One node is enough for this, and its network is made here rather than with a switch and a namespace for each.
	l.b = nil
	var vpcs []*vpc
	var fns []*link.Namespace
	for i := range tenants {
		v := l.smallVPC(i + 1)
		vpcs = append(vpcs, v)
		fns = append(fns, l.function(v, "100.64.0.10"))
	}
	l.alone()
	var wg sync.WaitGroup
	for i, v := range vpcs {
		wg.Go(func() {
			for _, network := range []string{"tcp4", "udp4"} {
				c, err := dialFrom(fns[i], network, "100.64.0.10:5555", serverAddr+":7")
				if err != nil {
					t.Errorf("VPC %d: %v", v.id, err)
					return
				}
				defer c.Close()
				want := fmt.Sprintf("vpc%d %s whose", v.id, v.pair.HAVIPs[0])
				if got, err := say(c, "whose", 10*time.Second); err != nil || got != want {
					t.Errorf("VPC %d, %s: %q, %v, want %q", v.id, network, got, err, want)
				}
			}
		})
	}
	wg.Wait()
	if s, err := l.a.ask(); err != nil || s.ENIs != tenants {
		t.Errorf("the provider was called %d times, once for each tenant is %d: %v", s.ENIs, tenants, err)
	}
}

// smallVPC is a network whose only host is a server on the one node's bridge.
func (l *lab) smallVPC(id int) *vpc {
	l.t.Helper()
	v := &vpc{l: l, id: id, server: linktest.New(l.t)}
	bridge, up := fmt.Sprint("br", id), fmt.Sprint("up", id)
	v.pair = Pair{
		Name: fmt.Sprint("vpc", id), ID: uint32(id), VPC: tunnel.Key(1000 + id), Subnet: netip.MustParsePrefix("10.0.0.0/24"),
		HAVIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(110 + id)})}, Network: Network{Bridge: bridge},
	}
	if err := l.a.conn.AddBridge(bridge); err != nil {
		l.t.Fatal(err)
	}
	linktest.Cable(l.t, link.End{In: l.a.ns, Name: up}, link.End{In: v.server, Name: "eth0"})
	linktest.Up(l.t, v.server, "eth0", serverAddr+"/24")
	if err := l.a.conn.Enslave(up, bridge); err != nil {
		l.t.Fatal(err)
	}
	l.a.cfg.Pairs = append(l.a.cfg.Pairs, v.pair)
	if err := l.worker.SetPairs(v.pair.VPC, []tunnel.Pair{{ID: v.pair.ID, Outer: addr(outerVIP)}}); err != nil {
		l.t.Fatal(err)
	}
	v.serve(v.server, serverAddr, 7)
	return v
}

func dialFrom(ns *link.Namespace, network, from, to string) (c net.Conn, err error) {
	err = ns.Do(func() (err error) {
		d := net.Dialer{FallbackDelay: -1, Timeout: 10 * time.Second}
		if network == "tcp4" {
			d.LocalAddr, err = net.ResolveTCPAddr(network, from)
		} else {
			d.LocalAddr, err = net.ResolveUDPAddr(network, from)
		}
		if err == nil {
			c, err = d.Dial(network, to)
		}
		return err
	})
	return c, err
}

// TestOneNamespaceMixesTenants is the control of TestManyVPCs: tenants in one namespace, told apart by the device that they come by and a
// routing table for each, but with one table of connections. Who comes second leaves as the first.
func TestOneNamespaceMixesTenants(t *testing.T) {
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs ip of iproute2 for its routing rules")
	}
	gw := linktest.New(t)
	l := &lab{t: t}
	linktest.Sysctl(t, gw, "net/ipv4/ip_forward", "1")
	linktest.Sysctl(t, gw, "net/ipv4/conf/all/rp_filter", "0")
	wrong := 0
	for i := 1; i <= 2; i++ {
		v := &vpc{l: l, id: i, server: linktest.New(t)}
		fn, in, out := linktest.New(t), fmt.Sprint("in", i), fmt.Sprint("out", i)
		linktest.Cable(t, link.End{In: gw, Name: out}, link.End{In: v.server, Name: "eth0"})
		linktest.Cable(t, link.End{In: gw, Name: in}, link.End{In: fn, Name: "eth0"})
		linktest.Up(t, v.server, "eth0", serverAddr+"/24")
		linktest.Up(t, fn, "eth0", "100.64.0.10/24")
		linktest.Route(t, fn, "0.0.0.0/0", "100.64.0.1")
		v.serve(v.server, serverAddr, 7)
		havip := fmt.Sprintf("10.0.0.%d", 110+i)
		script := fmt.Sprintf(`set -e
ip addr add 100.64.0.1/32 dev %[1]s
ip addr add %[3]s/32 dev %[2]s
sysctl -qw net.ipv4.conf.%[1]s.rp_filter=0 net.ipv4.conf.%[2]s.rp_filter=0
ip route add 10.0.0.0/24 dev %[2]s table %[4]d
ip route add 100.64.0.0/24 dev %[1]s table %[4]d
ip rule add iif %[1]s table %[4]d
ip rule add iif %[2]s table %[4]d
ip route add 10.0.0.0/24 dev %[2]s metric %[4]d
nft add table ip t
nft add chain ip t post '{ type nat hook postrouting priority 100; }'
nft add rule ip t post oifname %[2]s snat to %[3]s fully-random
`, in, out, havip, 100+i)
		if err := gw.Do(func() error {
			b, err := exec.Command("sh", "-c", script).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, b)
			}
			return nil
		}); err != nil {
			t.Skip("needs iproute2 and nft:", err)
		}
		c, err := dialFrom(fn, "udp4", "100.64.0.10:5555", serverAddr+":7")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got, err := say(c, "whose", time.Second); err != nil || got != fmt.Sprintf("vpc%d %s whose", i, havip) {
			wrong++
			t.Logf("tenant %d: %q, %v", i, got, err)
		}
	}
	if wrong == 0 {
		t.Error("both tenants were served rightly without namespaces of their own: TestManyVPCs shows nothing")
	}
}

// TestQuotas: what one instance or tenant has used up is nobody else's loss.
func TestQuotas(t *testing.T) {
	l := newLab(t)
	one := l.vpc(1, func(p *Pair) { p.PerSource, p.Flows = 20, 50 })
	two := l.vpc(2)
	greedy, modest, other := l.function(one, "100.64.0.10"), l.function(one, "100.64.0.11"), l.function(two, "100.64.0.10")
	l.alone()
	conns := one.open(greedy, 20)
	_, err := dial(greedy, "tcp4", serverAddr+":7", 5*time.Second)
	if err == nil || !strings.Contains(err.Error(), "no route to host") {
		t.Errorf("connection 21 of an instance that may have 20: %v", err)
	}
	conns = append(conns, one.open(modest, 10)...)
	if n := one.kept(conns, 5*time.Second); n != 30 {
		t.Errorf("%d of 30 connections work", n)
	}
	if s := l.a.pair(1); s.Packets[countQuota] == 0 {
		t.Errorf("what was refused is not counted: %+v", s)
	}
	// The tenant's own: UDP counts too.
	for i := range 4 {
		fn := l.function(one, fmt.Sprint("100.64.0.", 20+i))
		for range 10 {
			if c, err := dial(fn, "udp4", serverAddr+":7", time.Second); err == nil {
				_, _ = say(c, "x", 100*time.Millisecond)
				c.Close()
			}
		}
	}
	eventually(t, 10*time.Second, "the tenant's quota is used up", func() bool { return l.a.pair(1).Gate == string(gateFull) })
	if _, err := dial(l.function(one, "100.64.0.30"), "tcp4", serverAddr+":7", 5*time.Second); err == nil || !strings.Contains(err.Error(), "no route to host") {
		t.Errorf("a connection over the tenant's quota: %v", err)
	}
	if n := one.kept(conns, 5*time.Second); n != 30 {
		t.Errorf("%d of 30 connections work, which were there before", n)
	}
	if n := two.kept(two.open(other, 30), 5*time.Second); n != 30 {
		t.Errorf("the other tenant: %d of 30 connections", n)
	}
}

// TestPortsUsedUp: the connection that finds no port fails and is counted; other destinations are not concerned.
func TestPortsUsedUp(t *testing.T) {
	l := newLab(t)
	v := l.vpc(1, func(p *Pair) { p.Ports = Ports{40000, 40009} })
	fn := l.function(v, "100.64.0.10")
	v.serve(v.server, serverAddr, 8)
	l.alone()
	conns := v.open(fn, 10)
	if c, err := dial(fn, "tcp4", serverAddr+":7", 1500*time.Millisecond); err == nil {
		t.Errorf("an eleventh connection over ten ports: %s", c.LocalAddr())
	}
	c, err := dial(fn, "tcp4", serverAddr+":8", 5*time.Second)
	if err != nil {
		t.Errorf("another port of the server: %v", err)
	} else {
		c.Close()
	}
	if n := v.kept(conns, 5*time.Second); n != 10 {
		t.Errorf("%d of 10 connections work", n)
	}
	eventually(t, 10*time.Second, "it is counted, and the load says so", func() bool {
		s := l.a.pair(1)
		return s.NoPort > 0 && s.Load.Ports >= 1
	})
	eventually(t, 10*time.Second, "it is said", func() bool { return l.a.said("found no free port") })
}

// TestSeveralHAVIPs: instances are spread over the addresses, and each keeps to one.
func TestSeveralHAVIPs(t *testing.T) {
	l := newLab(t)
	v := l.vpc(1, func(p *Pair) {
		p.HAVIPs = []netip.Addr{addr("10.0.0.111"), addr("10.0.0.112"), addr("10.0.0.113")}
	})
	l.alone()
	used := map[string]bool{}
	for i := range 12 {
		fn := l.function(v, fmt.Sprint("100.64.0.", 10+i))
		var own string
		for range 3 {
			c, err := dial(fn, "tcp4", serverAddr+":7", 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			got, err := say(c, "x", 5*time.Second)
			c.Close()
			if err != nil || own != "" && got != own {
				t.Errorf("instance %d: %q after %q, %v", i, got, own, err)
			}
			own = got
		}
		used[own] = true
	}
	if len(used) != 3 {
		t.Errorf("12 instances use %d of 3 addresses", len(used))
	}
}

// TestDrain: a pair that drains keeps its connections, refuses new ones at once, and is empty when they have ended.
func TestDrain(t *testing.T) {
	l := newLab(t)
	v := l.vpc(1)
	fn := l.function(v, "100.64.0.10")
	l.alone()
	conns := v.open(fn, 5)
	l.a.cfg.Pairs[0].Draining = true
	l.a.write()
	l.a.signal(syscall.SIGHUP)
	eventually(t, 10*time.Second, "the pair drains", func() bool { return l.a.pair(1).Gate == string(gateDraining) })
	if _, err := dial(fn, "tcp4", serverAddr+":7", 5*time.Second); err == nil || !strings.Contains(err.Error(), "no route to host") {
		t.Errorf("a new connection: %v", err)
	}
	if n := v.kept(conns, 5*time.Second); n != 5 {
		t.Errorf("%d of 5 connections were kept", n)
	}
	if l.a.said("is drained") {
		t.Error("drained with connections that work")
	}
	for _, c := range conns {
		c.Close()
	}
	eventually(t, 20*time.Second, "it is empty", func() bool { return l.a.said("is drained") })
}

// TestFixedEgress: beyond the subnet the world sees the EIP, before and after a failover, on the same connection; within it the HAVIP.
func TestFixedEgress(t *testing.T) {
	l := newLab(t)
	v := l.vpc(1, func(p *Pair) {
		p.NextHop = addr("10.0.0.1")
		p.EIPs = map[netip.Addr]netip.Addr{p.HAVIPs[0]: addr("192.0.2.10")}
	})
	fn := l.function(v, "100.64.0.10")
	// The way to the world: a router that has the EIP on the subnet's link, and a server behind it, over a narrow cable.
	router, world := linktest.New(t), linktest.New(t)
	v.sw.Plug(t, router, "eth0", "10.0.0.1/24")
	linktest.Cable(t, link.End{In: router, Name: "eth1"}, link.End{In: world, Name: "eth0"})
	linktest.Up(t, router, "eth1", "198.51.100.1/24")
	linktest.Up(t, world, "eth0", "198.51.100.7/24")
	linktest.Route(t, world, "0.0.0.0/0", "198.51.100.1")
	linktest.Sysctl(t, router, "net/ipv4/ip_forward", "1")
	rc := linktest.Open(t, router)
	if err := rc.SetRoute(link.Route{To: netip.MustParsePrefix("192.0.2.10/32"), Device: "eth0"}); err != nil {
		t.Fatal(err)
	}
	if err := rc.SetMTU("eth1", 1300); err != nil {
		t.Fatal(err)
	}
	v.serve(world, "198.51.100.7", 7)
	l.up()
	far, err := dial(fn, "tcp4", "198.51.100.7:7", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	near := v.open(fn, 1)
	check := func(when string) {
		t.Helper()
		if got, err := say(far, when, 8*time.Second); err != nil || got != "vpc1 192.0.2.10 "+when {
			t.Errorf("%s: %q, %v", when, got, err)
		}
		if n := v.kept(near, 8*time.Second); n != 1 {
			t.Errorf("%s: the connection within the subnet is not kept, or not under the HAVIP", when)
		}
	}
	check("before")
	// An error about a packet names it: its addresses are translated back as well. Without that this hangs.
	if got, err := say(far, strings.Repeat("x", 1400), 8*time.Second); err != nil || !strings.Contains(got, "xxx") {
		t.Errorf("a packet too long for the way: %.20q, %v", got, err)
	}
	l.replicated()
	l.a.cables(false)
	eventually(t, 10*time.Second, "b is master", func() bool { return l.b.is(havip.Master) })
	check("after")
}

// TestCards: ENIs on a network card, as a VLAN and as a macvlan.
func TestCards(t *testing.T) {
	for name, n := range map[string]Network{"macvlan": {Device: "up1", Shared: true}, "vlan": {Device: "up1", VLAN: 12}} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			v := l.vpc(1, func(p *Pair) { p.Network.Bridge = "br1" })
			fn := l.function(v, "100.64.0.10")
			for _, x := range []*node{l.a, l.b} {
				x.cfg.Pairs[0].Network = n
				if err := x.conn.Release("up1"); err != nil {
					t.Fatal(err)
				}
			}
			if n.VLAN != 0 { // the server is in the VLAN
				c := linktest.Open(t, v.server)
				d, err := c.Device("eth0")
				if err != nil {
					t.Fatal(err)
				}
				if err := c.DeleteAddress(d.Index, netip.MustParsePrefix(serverAddr+"/24")); err != nil {
					t.Fatal(err)
				}
				if err := c.AddVLAN("eth0", n.VLAN, link.End{In: v.server, Name: "eth0.v"}); err != nil {
					t.Skip("needs VLAN devices:", err)
				}
				linktest.Up(t, v.server, "eth0.v", serverAddr+"/24")
			}
			l.up()
			conns := v.open(fn, 10)
			l.replicated()
			l.a.cables(false)
			eventually(t, 10*time.Second, "b is master", func() bool { return l.b.is(havip.Master) })
			if n := v.kept(conns, 8*time.Second); n != 10 {
				t.Errorf("%d of 10 connections were kept", n)
			}
			l.a.cables(true)
			l.settled()
			l.a.cfg.Pairs = nil
			l.a.write()
			l.a.signal(syscall.SIGHUP)
			eventually(t, 10*time.Second, "the pair is gone", func() bool { s, err := l.a.ask(); return err == nil && len(s.Pairs) == 0 })
		})
	}
}

// TestNoENIOnTheDataPath: instances come and go under load, and the provider is not called.
func TestNoENIOnTheDataPath(t *testing.T) {
	l := newLab(t)
	v := l.vpc(1)
	l.up()
	before, err := l.a.ask()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		fn := l.function(v, fmt.Sprint("100.64.0.", 10+i))
		for _, c := range v.open(fn, 5) {
			c.Close()
		}
	}
	after, err := l.a.ask()
	if err != nil || after.ENIs != before.ENIs || before.ENIs == 0 {
		t.Errorf("the provider was called %d times before and %d after, %v", before.ENIs, after.ENIs, err)
	}
}
