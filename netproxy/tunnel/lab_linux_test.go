package tunnel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
)

func TestMain(m *testing.M) { os.Exit(linktest.Main(m)) }

// lab is one worker and some members on a switch. Tenants' servers have one and the same address, and so may be told apart only by who
// answers.
type lab struct {
	t      testing.TB
	cfg    Config // of the worker
	under  *linktest.Switch
	host   *link.Namespace // the worker's
	conn   *link.Conn
	worker Worker
	cables int
}

const (
	workerAt = "192.0.2.1"
	prefix   = "100.64.0.0/22"
	serverAt = "10.0.0.10" // in every VPC
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// newLab makes the worker; change, if not nil, changes its configuration.
func newLab(t testing.TB, d Driver, change func(*Config)) *lab {
	t.Helper()
	l := &lab{t: t, under: linktest.NewSwitch(t), host: linktest.New(t), cfg: Config{Driver: d, Device: "under", Local: addr(workerAt)}}
	if change != nil {
		change(&l.cfg)
	}
	l.conn = linktest.Open(t, l.host)
	l.under.Plug(t, l.host, "under", workerAt+"/24")
	l.open()
	return l
}

func (l *lab) open() {
	l.t.Helper()
	if err := l.host.Do(func() (err error) { l.worker, err = OpenWorker(l.cfg); return err }); err != nil {
		l.t.Fatal(skipUnsupported(l.t, err))
	}
	w := l.worker
	l.t.Cleanup(func() { w.Close() })
}

// skipUnsupported skips a test whose driver is not to be had; other errors come back.
func skipUnsupported(t testing.TB, err error) error {
	t.Helper()
	if errors.Is(err, ErrUnsupported) || errors.Is(err, unix.EPERM) {
		t.Skip("not on this machine: ", err)
	}
	return err
}

// gateway is a member on a node of its own.
type gateway struct {
	l      *lab
	ns     *link.Namespace
	conn   *link.Conn
	member Member
	at     netip.Addr
	cables int
}

func (l *lab) gateway(d Driver, at string) *gateway {
	l.t.Helper()
	g := &gateway{l: l, ns: linktest.New(l.t), at: addr(at)}
	g.conn = linktest.Open(l.t, g.ns)
	l.under.Plug(l.t, g.ns, "under", at+"/24")
	if err := g.ns.Do(func() (err error) { g.member, err = OpenMember(Config{Driver: d, Device: "under"}); return err }); err != nil {
		l.t.Fatal(skipUnsupported(l.t, err))
	}
	l.t.Cleanup(func() { g.member.Close() })
	return g
}

// tenant adds a VPC: a namespace that the gateway's cable leads to, and behind it a server, which may be another gateway's too.
// It forwards without translation: the server knows the way back to its instances.
func (g *gateway) tenant(vpc Key) *tenant {
	t := g.l.t
	t.Helper()
	g.cables++
	x := &tenant{t: t, ns: linktest.New(t), server: linktest.New(t)}
	host := fmt.Sprint("t", g.cables)
	linktest.Cable(t, link.End{In: g.ns, Name: host}, link.End{In: x.ns, Name: "tunnel"})
	linktest.Cable(t, link.End{In: x.ns, Name: "eni"}, link.End{In: x.server, Name: "eth0"})
	linktest.Up(t, x.ns, "tunnel", "169.254.1.2/30")
	linktest.Up(t, x.ns, "eni", "10.0.0.1/24")
	linktest.Up(t, x.server, "eth0", serverAt+"/24")
	linktest.Sysctl(t, x.ns, "net/ipv4/ip_forward", "1")
	linktest.Route(t, x.server, "0.0.0.0/0", "10.0.0.1")
	c := linktest.Open(t, x.ns)
	if err := c.SetRoute(link.Route{To: netip.MustParsePrefix("100.64.0.0/10"), Via: addr("169.254.1.1"), Device: "tunnel", MTU: 1500 - g.l.cfg.Driver.Overhead()}); err != nil {
		t.Fatal(err)
	}
	neighbour(t, x.ns, "tunnel", "169.254.1.1")
	d, err := g.conn.Device(host)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.member.AddTenant(Tenant{vpc, g.at, d.Index}); err != nil {
		t.Fatal(err)
	}
	if err := g.member.SetWorkers(vpc, []Peer{{addr(workerAt), netip.MustParsePrefix(prefix)}}); err != nil {
		t.Fatal(err)
	}
	return x
}

func neighbour(t testing.TB, ns *link.Namespace, device, at string) {
	t.Helper()
	c := linktest.Open(t, ns)
	d, err := c.Device(device)
	if err == nil {
		err = c.SetNeighbor(d.Index, addr(at), [6]byte{2, 0, 0, 0, 0, 1})
	}
	if err != nil {
		t.Fatal(err)
	}
}

type tenant struct {
	t          testing.TB
	ns, server *link.Namespace
}

// inst is an instance's namespace and where it is plugged in.
type inst struct {
	l    *lab
	ns   *link.Namespace
	slot Slot
}

// instance makes one with the n-th address of the worker's prefix, attached to no VPC.
func (l *lab) instance(n int) *inst {
	t := l.t
	t.Helper()
	l.cables++
	in := addr("100.64.0.0").As4()
	in[2], in[3] = byte(n>>8), byte(n)
	x := &inst{l: l, ns: linktest.New(t), slot: Slot{Inner: netip.AddrFrom4(in)}}
	name := fmt.Sprint("i", l.cables)
	linktest.Cable(t, link.End{In: l.host, Name: name}, link.End{In: x.ns, Name: "eth0"})
	linktest.Up(t, x.ns, "eth0", x.slot.Inner.String()+"/32")
	c := linktest.Open(t, x.ns)
	err := errors.Join(
		c.SetRoute(link.Route{To: netip.MustParsePrefix("169.254.1.1/32"), Device: "eth0"}),
		c.SetRoute(link.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: addr("169.254.1.1"), Device: "eth0", MTU: 1500 - l.cfg.Driver.Overhead()}),
	)
	if err != nil {
		t.Fatal(err)
	}
	neighbour(t, x.ns, "eth0", "169.254.1.1")
	d, err := l.conn.Device(name)
	if err != nil {
		t.Fatal(err)
	}
	x.slot.Device = d.Index
	if err := l.worker.Plug(d.Index); err != nil {
		t.Fatal(err)
	}
	return x
}

func (x *inst) attach(vpc Key) *inst {
	x.l.t.Helper()
	if err := x.l.worker.Attach(x.slot, vpc); err != nil {
		x.l.t.Fatal(err)
	}
	return x
}

func (l *lab) pairs(vpc Key, pairs ...Pair) {
	l.t.Helper()
	if err := l.worker.SetPairs(vpc, pairs); err != nil {
		l.t.Fatal(err)
	}
}

// in runs f in a namespace; a failure of f's is the test's.
func in(t testing.TB, ns *link.Namespace, f func() error) {
	t.Helper()
	if err := ns.Do(f); err != nil {
		t.Fatal(err)
	}
}

// echo answers UDP on port 7 with who it is before what was sent, and echoes TCP.
func echo(t testing.TB, ns *link.Namespace, who string) {
	t.Helper()
	var pc net.PacketConn
	var l net.Listener
	in(t, ns, func() (err error) {
		if pc, err = net.ListenPacket("udp4", "0.0.0.0:7"); err != nil {
			return err
		}
		l, err = net.Listen("tcp4", "0.0.0.0:7")
		return err
	})
	t.Cleanup(func() { pc.Close(); l.Close() })
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(append([]byte(who), b[:n]...), from)
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
}

// dialUDP makes a socket in a namespace; the address it sends from is local if that is not "".
func dialUDP(t testing.TB, ns *link.Namespace, local, to string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	in(t, ns, func() error {
		var from *net.UDPAddr
		if local != "" {
			from = net.UDPAddrFromAddrPort(netip.MustParseAddrPort(local))
		}
		var err error
		c, err = net.DialUDP("udp4", from, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// ask sends until there is an answer, for at most a time: the first packet of a fresh cable may be lost.
func ask(c *net.UDPConn, what string, patience time.Duration) (string, error) {
	b := make([]byte, 64<<10)
	for deadline := time.Now().Add(patience); ; {
		if _, err := c.Write([]byte(what)); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			return "", err
		}
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := c.Read(b)
		if err == nil {
			return string(b[:n]), nil
		}
		if time.Now().After(deadline) {
			return "", err
		}
	}
}

func dialTCP(t testing.TB, ns *link.Namespace, to string) *net.TCPConn {
	t.Helper()
	var c *net.TCPConn
	in(t, ns, func() (err error) {
		c, err = net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(to)))
		return err
	})
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}
