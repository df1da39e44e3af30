package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
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

const nodeEnv = "THAW_GATEWAY_NODE"

// TestMain is also the program of a node: tests start this binary again in a node's namespace.
func TestMain(m *testing.M) {
	if path := os.Getenv(nodeEnv); path != "" {
		os.Exit(nodeMain(path))
	}
	os.Exit(linktest.Main(m))
}

func nodeMain(path string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	hup, again := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(hup, syscall.SIGHUP)
	go func() {
		for range hup {
			again <- struct{}{}
		}
	}()
	err := Serve(ctx, Options{
		Load: func() (Config, error) {
			b, err := os.ReadFile(path)
			if err != nil {
				return Config{}, err
			}
			return Parse(b)
		},
		Again: again, Ready: func(pairs int) { fmt.Println("ready", pairs) },
		Log: slog.New(slog.NewTextHandler(os.Stdout, nil)), Out: os.Stdout,
	})
	if err != nil {
		fmt.Println("failed:", err)
		return 1
	}
	return 0
}

// lab is a worker, two gateway nodes, and as many VPCs as a test makes.
type lab struct {
	t           testing.TB
	under, sync *linktest.Switch
	workerNS    *link.Namespace
	worker      tunnel.Worker
	a, b        *node
	slots       int
}

type node struct {
	t           testing.TB
	name        string
	ns          *link.Namespace
	conn        *link.Conn
	cfg         Config
	path        string
	under, sync *linktest.Port
	vpcs        map[string]*linktest.Port // cables to VPCs, by bridge
	cmd         *exec.Cmd
	ended       chan struct{}
	mu          sync.Mutex
	lines       []string
}

const (
	outerVIP   = "10.1.0.1"
	serverAddr = "10.0.0.100"
)

func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{t: t, workerNS: linktest.New(t), under: linktest.NewSwitch(t), sync: linktest.NewSwitch(t)}
	dir, err := os.MkdirTemp("", "gw") // short: the path of a socket has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l.under.Plug(t, l.workerNS, "under", "10.1.0.11/24")
	err = l.workerNS.Do(func() error {
		l.worker, err = tunnel.OpenWorker(tunnel.Config{Device: "under", Local: addr("10.1.0.11")})
		return err
	})
	if errors.Is(err, tunnel.ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		t.Skip("needs tunnels:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.worker.Close() })
	for i, x := range []**node{&l.a, &l.b} {
		n := &node{t: t, name: string(rune('a' + i)), ns: linktest.New(t), vpcs: map[string]*linktest.Port{}}
		n.conn = linktest.Open(t, n.ns)
		n.under = l.under.Plug(t, n.ns, "under", fmt.Sprintf("10.1.0.%d/24", 2+i))
		n.sync = l.sync.Plug(t, n.ns, "sync", fmt.Sprintf("10.9.0.%d/24", 1+i))
		base := filepath.Join(dir, n.name)
		n.path = base + ".json"
		pin := base + "p"
		if err := tunnel.MountPins(pin); err != nil {
			t.Skip("needs a file system for maps of the kernel:", err)
		}
		t.Cleanup(func() { _ = syscall.Unmount(pin, syscall.MNT_DETACH) })
		advert := 10 * time.Millisecond
		if raceDetector || !realtimeAllowed() {
			advert *= 10 // members that are not on time move the addresses without need
		}
		n.cfg = Config{
			Name: n.name, Device: "under", Pin: pin, Outer: []netip.Prefix{netip.MustParsePrefix(outerVIP + "/24")}, Priority: 200 - 100*i,
			Advert: Duration(advert), Settle: Duration(300 * time.Millisecond), Sync: fmt.Sprintf("sync,10.9.0.%d,10.9.0.%d", 1+i, 2-i),
			Status: base, Namespace: base + "n", WorkerSet: []Worker{{addr("10.1.0.11"), netip.MustParsePrefix("100.64.0.0/22")}},
		}
		t.Cleanup(func() { n.clean() })
		*x = n
	}
	return l
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// clean takes away what a node leaves for its next process.
func (n *node) clean() {
	list, _ := namespaces(n.cfg.Namespace)
	for _, id := range list {
		if err := link.Unname(namespacePath(n.cfg.Namespace, id)); err != nil {
			n.t.Error(err)
		}
	}
}

// vpc is a tenant's network with a server.
type vpc struct {
	l      *lab
	id     int
	sw     *linktest.Switch
	server *link.Namespace
	pair   Pair
}

// vpc makes a network with the same addresses as all others, connects the nodes, and writes a pair for it into their configurations.
func (l *lab) vpc(id int, change ...func(*Pair)) *vpc {
	l.t.Helper()
	v := &vpc{l: l, id: id, sw: linktest.NewSwitch(l.t), server: linktest.New(l.t)}
	v.sw.Plug(l.t, v.server, "eth0", serverAddr+"/24")
	bridge := fmt.Sprint("br", id)
	v.pair = Pair{
		Name: fmt.Sprint("vpc", id), ID: uint32(id), VPC: tunnel.Key(1000 + id), Subnet: netip.MustParsePrefix("10.0.0.0/24"),
		HAVIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(110 + id)})}, Network: Network{Bridge: bridge},
	}
	for _, f := range change {
		f(&v.pair)
	}
	for _, n := range []*node{l.a, l.b} {
		if err := n.conn.AddBridge(bridge); err != nil {
			l.t.Fatal(err)
		}
		up := fmt.Sprint("up", id)
		n.vpcs[bridge] = v.sw.Plug(l.t, n.ns, up)
		if err := n.conn.Enslave(up, bridge); err != nil {
			l.t.Fatal(err)
		}
		n.cfg.Pairs = append(n.cfg.Pairs, v.pair)
	}
	if err := l.worker.SetPairs(v.pair.VPC, []tunnel.Pair{{ID: v.pair.ID, Outer: addr(outerVIP)}}); err != nil {
		l.t.Fatal(err)
	}
	v.serve(v.server, serverAddr, 7)
	return v
}

// serve answers each message on a port (UDP and TCP) with the VPC, the address that it came from, and its beginning.
func (v *vpc) serve(ns *link.Namespace, at string, port int) {
	t := v.l.t
	t.Helper()
	var pc net.PacketConn
	var ln net.Listener
	err := ns.Do(func() (err error) {
		if pc, err = net.ListenPacket("udp4", fmt.Sprint(at, ":", port)); err != nil {
			return err
		}
		ln, err = net.Listen("tcp4", fmt.Sprint(at, ":", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close(); ln.Close() })
	answer := func(from net.Addr, msg string) string {
		host, _, _ := net.SplitHostPort(from.String())
		return fmt.Sprintf("vpc%d %s %.100s\n", v.id, host, strings.TrimSpace(msg))
	}
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo([]byte(answer(from, string(buf[:n]))), from)
		}
	}()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for r := bufio.NewReader(c); ; {
					line, err := r.ReadString('\n')
					if err != nil {
						return
					}
					_, _ = io.WriteString(c, answer(c.RemoteAddr(), line))
				}
			}()
		}
	}()
}

// function is an instance's namespace, attached to a VPC.
func (l *lab) function(v *vpc, inner string) *link.Namespace {
	l.t.Helper()
	l.slots++
	ns, name := linktest.New(l.t), fmt.Sprint("slot", l.slots)
	linktest.Cable(l.t, link.End{In: l.workerNS, Name: name}, link.End{In: ns, Name: "eth0"})
	worker, c := linktest.Open(l.t, l.workerNS), linktest.Open(l.t, ns)
	host, err := worker.Device(name)
	if err != nil {
		l.t.Fatal(err)
	}
	dev, err := c.Device("eth0")
	if err != nil {
		l.t.Fatal(err)
	}
	gw := netip.MustParsePrefix("169.254.1.1/32")
	err = errors.Join(
		c.SetMTU("eth0", 1472), c.SetAddress(dev.Index, netip.PrefixFrom(addr(inner), 32), 0), c.SetRoute(link.Route{To: gw, Device: "eth0"}),
		c.SetNeighbor(dev.Index, gw.Addr(), host.MAC), c.SetRoute(link.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: gw.Addr(), Device: "eth0"}),
		l.worker.Plug(host.Index), l.worker.Attach(tunnel.Slot{Device: host.Index, Inner: addr(inner)}, v.pair.VPC),
	)
	if err != nil {
		l.t.Fatal(err)
	}
	return ns
}

func (n *node) write() {
	n.t.Helper()
	b, err := json.Marshal(n.cfg)
	if err == nil {
		err = os.WriteFile(n.path, b, 0o600)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// start runs a node until the test ends.
func (n *node) start() {
	n.t.Helper()
	n.write()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), nodeEnv+"="+n.path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.ns.Do(cmd.Start); err != nil {
		n.t.Fatal(err)
	}
	n.cmd, n.ended = cmd, make(chan struct{})
	ended := n.ended
	n.mu.Lock()
	n.lines = nil
	n.mu.Unlock()
	go func() {
		defer close(ended)
		for s := bufio.NewScanner(out); s.Scan(); {
			n.mu.Lock()
			n.lines = append(n.lines, s.Text())
			n.mu.Unlock()
			if testing.Verbose() {
				fmt.Printf("%s %s: %s\n", time.Now().Format("05.000"), n.name, s.Text())
			}
		}
		_ = cmd.Wait()
	}()
	n.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = cmd.Process.Kill()
		<-ended
	})
}

// said says whether a line of the node's contains something.
func (n *node) said(what string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.lines, func(s string) bool { return strings.Contains(s, what) })
}

func (n *node) signal(s syscall.Signal) {
	n.t.Helper()
	if err := n.cmd.Process.Signal(s); err != nil {
		n.t.Error(err)
	}
}

// cables pulls all cables (false) or puts them back.
func (n *node) cables(in bool) {
	n.under.Cable(in)
	n.sync.Cable(in)
	for _, p := range n.vpcs {
		p.Cable(in)
	}
}

func (n *node) ask() (s Status, err error) {
	c, err := net.DialTimeout("unix", n.cfg.Status, time.Second)
	if err != nil {
		return s, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	return s, json.NewDecoder(c).Decode(&s)
}

func (n *node) is(r havip.Role) bool {
	s, err := n.ask()
	return err == nil && s.Role == r
}

// pair returns the status of one of the node's pairs.
func (n *node) pair(id uint32) PairStatus {
	s, err := n.ask()
	if err != nil {
		n.t.Helper()
		n.t.Fatal(err)
	}
	for _, p := range s.Pairs {
		if p.ID == id {
			return p
		}
	}
	n.t.Helper()
	n.t.Fatalf("no pair %d", id)
	return PairStatus{}
}

func eventually(t testing.TB, d time.Duration, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

// alone starts the first node only.
func (l *lab) alone() {
	l.t.Helper()
	l.a.start()
	stuck := time.AfterFunc(25*time.Second, func() { _ = l.a.cmd.Process.Signal(syscall.SIGQUIT) }) // says where
	defer stuck.Stop()
	eventually(l.t, 30*time.Second, "a is ready and master", func() bool { return l.a.said("ready") && l.a.is(havip.Master) })
}

// up starts both, and waits until a is master and b could take over.
func (l *lab) up() {
	l.t.Helper()
	l.a.start()
	l.b.start()
	l.settled()
}

func (l *lab) settled() {
	l.t.Helper()
	eventually(l.t, 30*time.Second, "a is master, and b could take over", func() bool {
		a, err1 := l.a.ask()
		b, err2 := l.b.ask()
		full := func(s Status) bool {
			return len(s.Pairs) == len(l.a.cfg.Pairs) && !slices.ContainsFunc(s.Pairs, func(p PairStatus) bool { return !p.InStep || !p.Link })
		}
		return err1 == nil && err2 == nil && a.Role == havip.Master && b.Role == havip.Backup && b.Full && full(a) && full(b)
	})
}

func dial(ns *link.Namespace, network, to string, patience time.Duration) (c net.Conn, err error) {
	err = ns.Do(func() (err error) {
		d := net.Dialer{FallbackDelay: -1, Timeout: patience}
		c, err = d.Dial(network, to)
		return err
	})
	return c, err
}

// say sends a message and returns the answer.
func say(c net.Conn, msg string, patience time.Duration) (string, error) {
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, msg+"\n"); err != nil {
		return "", err
	}
	buf := make([]byte, 2048)
	n, err := c.Read(buf)
	return strings.TrimSpace(string(buf[:n])), err
}

// open makes n connections from a function to the VPC's server.
func (v *vpc) open(fn *link.Namespace, n int) []net.Conn {
	v.l.t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := dial(fn, "tcp4", serverAddr+":7", 10*time.Second)
		if err != nil {
			v.l.t.Fatalf("connection %d: %v", i, err)
		}
		v.l.t.Cleanup(func() { c.Close() })
		if _, err := say(c, "first", 10*time.Second); err != nil {
			v.l.t.Fatalf("connection %d: %v", i, err)
		}
		conns[i] = c
	}
	return conns
}

// kept counts the connections on which the server answers as before.
func (v *vpc) kept(conns []net.Conn, patience time.Duration) (n int) {
	want := fmt.Sprintf("vpc%d %s again", v.id, v.pair.HAVIPs[0])
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() {
			if got, err := say(c, "again", patience); err == nil && got == want {
				mu.Lock()
				n++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return n
}
