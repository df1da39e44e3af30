package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

func TestMain(m *testing.M) { os.Exit(linktest.Main(m)) }

const key = 7

// node is a worker and a gateway with the tenant's server behind it.
type node struct {
	t       testing.TB
	ns      *link.Namespace
	conn    *link.Conn
	cfg     Config
	tunnels tunnel.Config
	pool    *Pool
	tunnel  tunnel.Worker
	stop    func() // ends the pool as a crash would: slots that have an instance stay
}

func newNode(t testing.TB, prefix string, ready int) *node {
	t.Helper()
	n := &node{t: t, ns: linktest.New(t)}
	under, gw, server := linktest.NewSwitch(t), linktest.New(t), linktest.New(t)
	under.Plug(t, n.ns, "under", "192.0.2.1/24")
	under.Plug(t, gw, "under", "192.0.2.11/24")
	linktest.Cable(t, link.End{In: gw, Name: "tenant"}, link.End{In: server, Name: "eth0"})
	linktest.Up(t, server, "eth0", "10.0.0.10/24")
	n.conn = linktest.Open(t, n.ns)

	// The server is in the tenant's namespace itself.
	c := linktest.Open(t, server)
	eth0, err := c.Device("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		c.SetNeighbor(eth0.Index, netip.MustParseAddr("10.0.0.1"), gatewayMAC),
		c.SetRoute(link.Route{To: netip.MustParsePrefix("100.64.0.0/10"), Via: netip.MustParseAddr("10.0.0.1"), Device: "eth0", MTU: 1472}),
	); err != nil {
		t.Fatal(err)
	}
	var m tunnel.Member
	if err := gw.Do(func() (err error) { m, err = tunnel.OpenMember(tunnel.Config{Device: "under"}); return err }); err != nil {
		if errors.Is(err, tunnel.ErrUnsupported) || errors.Is(err, unix.EPERM) {
			t.Skip("not on this machine: ", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	host, err := linktest.Open(t, gw).Device("tenant")
	if err != nil {
		t.Fatal(err)
	}
	vip := netip.MustParseAddr("192.0.2.11")
	if err := errors.Join(
		m.AddTenant(tunnel.Tenant{VPC: key, Local: vip, Host: host.Index}),
		m.SetWorkers(key, []tunnel.Peer{{Outer: netip.MustParseAddr("192.0.2.1"), Prefix: netip.MustParsePrefix(prefix)}}),
	); err != nil {
		t.Fatal(err)
	}
	serve(t, server)

	n.tunnels = tunnel.Config{Device: "under", Local: netip.MustParseAddr("192.0.2.1"), Pin: pins(t)}
	n.cfg = Config{Prefix: netip.MustParsePrefix(prefix), MTU: 1472, Ready: ready}
	n.start()
	t.Cleanup(func() { n.stop() })
	return n
}

// start opens tunnel and pool, as an agent does.
func (n *node) start() {
	n.t.Helper()
	err := n.ns.Do(func() (err error) {
		if n.tunnel, err = tunnel.OpenWorker(n.tunnels); err != nil {
			return err
		}
		n.cfg.Tunnel = n.tunnel
		n.pool, err = Open(n.cfg)
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.pool.SetSubnets([]Subnet{{"default", "blue/web", key, []tunnel.Pair{{ID: 1, Outer: netip.MustParseAddr("192.0.2.11")}}}}); err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.pool.Run(ctx) }()
	pool, tun := n.pool, n.tunnel
	n.stop = sync.OnceFunc(func() {
		cancel()
		<-done
		if err := errors.Join(pool.Close(), tun.Close()); err != nil {
			n.t.Error(err)
		}
	})
}

// until waits for a state of the pool.
func (n *node) until(what string, ok func(Stats) bool) {
	n.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(n.pool.Stats()); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatalf("no %s: %+v", what, n.pool.Stats())
		}
	}
}

func (n *node) attach() *os.File {
	n.t.Helper()
	f, err := n.pool.Attach("default", "blue/web")
	if err != nil {
		n.t.Fatal(err)
	}
	return f
}

// slots are the node's ends that there are.
func (n *node) slots() []string {
	names, err := n.conn.Devices(prefix)
	if err != nil {
		n.t.Fatal(err)
	}
	return names
}

func pins(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), tunnel.MountPins(dir)); err != nil {
		t.Skip("cannot mount a file system of type bpf here: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return filepath.Join(dir, "worker")
}

// serve echoes UDP and TCP on port 7.
func serve(t testing.TB, ns *link.Namespace) {
	t.Helper()
	var pc net.PacketConn
	var l net.Listener
	if err := ns.Do(func() (err error) {
		if pc, err = net.ListenPacket("udp4", "0.0.0.0:7"); err != nil {
			return err
		}
		l, err = net.Listen("tcp4", "0.0.0.0:7")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close(); l.Close() })
	go func() {
		b := make([]byte, 2000)
		for {
			k, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(b[:k], from)
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 2000)
				for {
					k, err := c.Read(b)
					if err != nil {
						return
					}
					if _, err := c.Write(b[:k]); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// inSlot runs f on a thread in a slot's namespace.
func inSlot(ns *os.File, f func() error) error { return link.DoIn(ns, f) }

func dial(network string, ns *os.File) (c net.Conn, err error) {
	err = inSlot(ns, func() (err error) {
		switch network {
		case "udp4":
			c, err = net.DialUDP(network, nil, &net.UDPAddr{IP: net.IPv4(10, 0, 0, 10), Port: 7})
		default:
			c, err = net.DialTCP(network, nil, &net.TCPAddr{IP: net.IPv4(10, 0, 0, 10), Port: 7})
		}
		return err
	})
	return c, err
}

// ask wants the answer to one packet: no repetition, a fresh slot must not lose anything.
func ask(c net.Conn, what string) error {
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte(what)); err != nil {
		return err
	}
	b := make([]byte, 100)
	k, err := c.Read(b)
	if err == nil && string(b[:k]) != what {
		err = fmt.Errorf("answer %q", b[:k])
	}
	return err
}

func TestSlotReachesTheServerAtOnce(t *testing.T) {
	n := newNode(t, "100.64.0.0/24", 2)
	n.until("two ready", func(s Stats) bool { return s.Ready == 2 })
	for i := range 4 { // the last ones perhaps cold
		ns := n.attach()
		defer ns.Close()
		c, err := dial([]string{"udp4", "tcp4"}[i%2], ns)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := ask(c, "x"); err != nil {
			t.Error(err)
		}
	}
	if s := n.pool.Stats(); s.Used != 4 || s.Attached != 4 {
		t.Errorf("%+v", s)
	}
	// The control: a namespace of another kind reaches nothing.
	other := linktest.New(t)
	f, err := other.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := dial("tcp4", f); err == nil {
		t.Error("a namespace without a slot reaches the server")
	}
	if _, err := n.pool.Attach("default", "blue/none"); !errors.Is(err, ErrUnknown) {
		t.Errorf("unknown subnet: %v", err)
	}
	if _, err := n.pool.Attach("other", "blue/web"); !errors.Is(err, ErrUnknown) {
		t.Errorf("another's subnet: %v", err)
	}
}

// TestExhaustedPrefix: a clear error, and when an instance ends the next one has its address.
func TestExhaustedPrefix(t *testing.T) {
	n := newNode(t, "100.64.0.0/29", 2) // 6 addresses
	var held []*os.File
	for range 4 {
		held = append(held, n.attach())
	}
	n.until("the last two", func(s Stats) bool { return s.Ready == 2 && s.Free == 0 })
	held = append(held, n.attach(), n.attach())
	if _, err := n.pool.Attach("default", "blue/web"); !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "100.64.0.0/29") {
		t.Errorf("the seventh: %v", err)
	}
	held[0].Close()
	n.until("a slot again", func(s Stats) bool { return s.Ready == 1 })
	ns := n.attach()
	defer ns.Close()
	for _, f := range held[1:] {
		f.Close()
	}
	c, err := dial("tcp4", ns)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := ask(c, "again"); err != nil {
		t.Error(err)
	}
}

// TestThousandLeaveNothing: instances come and go, and nothing of them is left in the kernel.
func TestThousandLeaveNothing(t *testing.T) {
	n := newNode(t, "100.64.0.0/20", 64)
	total := 1000
	if testing.Short() {
		total = 100
	}
	var closing []time.Duration
	for done := 0; done < total; {
		var batch []*os.File
		for range min(100, total-done) {
			batch = append(batch, n.attach())
		}
		done += len(batch)
		for _, f := range batch {
			began := time.Now()
			f.Close()
			closing = append(closing, time.Since(began))
		}
	}
	n.until("end of all slots in use", func(s Stats) bool { return s.Used == 0 && s.Ready == 64 })
	if got := len(n.slots()); got != 64 {
		t.Errorf("%d devices for 64 slots", got)
	}
	slots, err := n.tunnel.Slots()
	if err != nil || len(slots) != 0 {
		t.Errorf("%d slots are attached, %v", len(slots), err)
	}
	if s := n.pool.Stats(); s.Free != 4094-64 || s.Attached != uint64(total) {
		t.Errorf("%+v", s)
	}
	n.stop()
	for deadline := time.Now().Add(20 * time.Second); len(n.slots()) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d devices are left", len(n.slots()))
		}
	}
	t.Logf("giving back took the caller %v at most", maxOf(closing))
}

func maxOf(d []time.Duration) (m time.Duration) {
	for _, x := range d {
		m = max(m, x)
	}
	return m
}

// TestRestartDoesNotTouchTraffic: a connection goes on while the agent is gone and after it is back; what ended meanwhile is found, and
// what is there is taken over. The control, without pinned maps, is TestCloseEndsTraffic in netproxy/tunnel.
func TestRestartDoesNotTouchTraffic(t *testing.T) {
	n := newNode(t, "100.64.0.0/24", 4)
	kept, ended := n.attach(), n.attach()
	defer kept.Close()
	c, err := dial("tcp4", kept)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := stream(c)
	s.await(t, 100)
	n.stop()
	s.await(t, 100)
	ended.Close()
	for deadline := time.Now().Add(20 * time.Second); len(n.slots()) > 1; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("devices %v are left", n.slots())
		}
	}
	n.start()
	s.await(t, 100)
	if s := n.pool.Stats(); s.Used != 1 {
		t.Errorf("%+v, want the one slot that is in use", s)
	}
	if slots, err := n.tunnel.Slots(); err != nil || len(slots) != 1 {
		t.Errorf("attached are %v, %v", slots, err)
	}
	t.Logf("%d echoes on one connection, the longest took %v", s.echoes.Load(), time.Duration(s.longest.Load()))
	c.Close() // it holds the namespace too
	<-s.ended
	kept.Close()
	n.until("end of the slot", func(s Stats) bool { return s.Used == 0 })
}

// echoes is a connection that echoes without a pause, until it is closed.
type echoes struct {
	echoes, longest atomic.Int64
	ended           chan struct{}
}

func stream(c net.Conn) *echoes {
	s := &echoes{ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		for {
			began := time.Now()
			if ask(c, "x") != nil {
				return
			}
			s.echoes.Add(1)
			s.longest.Store(max(s.longest.Load(), int64(time.Since(began))))
		}
	}()
	return s
}

// await waits for some more echoes.
func (s *echoes) await(t *testing.T, n int64) {
	t.Helper()
	want := s.echoes.Load() + n
	for deadline := time.Now().Add(20 * time.Second); s.echoes.Load() < want; time.Sleep(time.Millisecond) {
		select {
		case <-s.ended:
			t.Fatal("the connection has broken")
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("the connection stands still")
		}
	}
}

// TestSealed: without the tunnel's program nothing comes out of a slot, neither to the node nor through it; without the rule it would.
func TestSealed(t *testing.T) {
	n := newNode(t, "100.64.0.0/24", 1)
	ns := n.attach()
	defer ns.Close()
	linktest.Sysctl(t, n.ns, "net/ipv4/ip_forward", "1")
	var c *net.UDPConn
	if err := inSlot(ns, func() (err error) {
		c, err = net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	inner := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap() // not the first one if the pool was just making that
	name := hostName(inner)
	d, err := n.conn.Device(name)
	if err != nil {
		t.Fatal(err)
	}
	// The node would answer, if it were let: it has a way back, and nothing filters by source.
	linktest.Sysctl(t, n.ns, "net/ipv4/conf/all/rp_filter", "0")
	linktest.Sysctl(t, n.ns, "net/ipv4/conf/"+name+"/rp_filter", "0")
	if err := errors.Join(
		n.conn.SetRoute(link.Route{To: netip.PrefixFrom(inner, 32), Device: name}),
		n.conn.SetMAC(name, gatewayMAC),
	); err != nil {
		t.Fatal(err)
	}
	var pc net.PacketConn
	if err := n.ns.Do(func() (err error) { pc, err = net.ListenPacket("udp4", "192.0.2.1:7"); return err }); err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	arrives := func(within time.Duration) bool {
		b := make([]byte, 10)
		for deadline := time.Now().Add(within); time.Now().Before(deadline); {
			_, _ = c.Write([]byte("x"))
			_ = pc.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if _, _, err := pc.ReadFrom(b); err == nil {
				return true
			}
		}
		return false
	}
	if arrives(300 * time.Millisecond) {
		t.Error("the node hears a slot although the program is there")
	}
	if err := n.conn.RemoveIngress(link.Ingress{Device: d.Index, Priority: 100}); err != nil {
		t.Fatal(err)
	}
	if arrives(300 * time.Millisecond) {
		t.Error("the node hears a slot whose program is gone")
	}
	if err := unseal(n.ns); err != nil {
		t.Fatal(err)
	}
	if !arrives(5 * time.Second) {
		t.Error("control: without program and rule the node hears nothing either, so the test shows nothing")
	}
	if err := seal(n.ns); err != nil { // for the end
		t.Fatal(err)
	}
}
