package havip

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
)

const memberEnv = "THAW_HAVIP_MEMBER"

var spun int

// TestMain is also the program of a member: tests start this binary again in a router's namespace.
func TestMain(m *testing.M) {
	switch conf := os.Getenv(memberEnv); conf {
	case "":
		os.Exit(linktest.Main(m))
	case "busy":
		for n := 0; ; n++ { // as busy as can be
			spun = n
		}
	case "witness":
		fmt.Println(witness().Nanoseconds())
	default:
		os.Exit(memberMain(conf))
	}
}

// witness does nothing with a member's priority, on each processor, until its standard input ends. It returns for how long a processor had no time for
// it: a kernel that does not interrupt its own work, or a machine under this one, keeps the highest priority waiting too.
func witness() time.Duration {
	prepareProcess()
	var worst atomic.Int64
	var ended atomic.Bool
	var all sync.WaitGroup
	for cpu := range runtime.NumCPU() {
		all.Go(func() {
			runtime.LockOSThread() // and end this thread
			var one unix.CPUSet
			one.Set(cpu)
			_ = unix.SchedSetaffinity(0, &one) // one that is not ours to use is watched from another
			_ = realtime(advertPriority)
			const nap = time.Millisecond
			for last := time.Now(); !ended.Load(); {
				ts := unix.NsecToTimespec(int64(nap))
				_ = unix.Nanosleep(&ts, nil)
				now := time.Now()
				for late := int64(now.Sub(last) - nap); ; {
					if most := worst.Load(); late <= most || worst.CompareAndSwap(most, late) {
						break
					}
				}
				last = now
			}
		})
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	ended.Store(true)
	all.Wait()
	return time.Duration(worst.Load())
}

// watched returns how often f says that a role changed with nothing wrong. What happened while the machine itself stood still for some adverts says
// nothing of the members: then it is tried again.
func (l *lab) watched(f func() int32) (changes int32) {
	l.t.Helper()
	var gap time.Duration
	for range 10 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), memberEnv+"=witness")
		in, err := cmd.StdinPipe()
		if err != nil {
			l.t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			l.t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			l.t.Fatal(err)
		}
		var nanoseconds int64
		says := bufio.NewReader(out)
		_, err = says.ReadString('\n')
		changes = f()
		in.Close()
		if _, scan := fmt.Fscan(says, &nanoseconds); scan != nil || err != nil {
			l.t.Fatal("the witness:", err, scan)
		}
		_ = cmd.Wait()
		if gap = time.Duration(nanoseconds); changes == 0 || gap < 2*tenMs {
			return changes
		}
		l.t.Logf("%d changes of role while a processor stood still for %v", changes, gap)
		l.settled()
	}
	l.t.Logf("the machine stands still all the time, last for %v", gap)
	return changes
}

func memberMain(conf string) int {
	var cfg Config
	if err := json.Unmarshal([]byte(conf), &cfg); err != nil {
		fmt.Println("config:", err)
		return 2
	}
	cfg.Out = os.Stdout
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := Run(ctx, cfg); err != nil {
		fmt.Println("failed:", err)
		return 1
	}
	return 0
}

// lab is two routers between a client and a server: the client's gateway and the address that it is translated to move together.
type lab struct {
	t              testing.TB
	client, server *link.Namespace
	a, b           *router
}

const (
	gateway = "10.1.0.1" // on the client's side
	havip   = "10.2.0.10"
	target  = "10.2.0.100"
)

type router struct {
	t                testing.TB
	name             string
	ns               *link.Namespace
	conn             *link.Conn
	cfg              Config
	under, eni, sync *linktest.Port
	member           *exec.Cmd
	mu               sync.Mutex
	role             string // last line's
	changes          atomic.Int32
	status           string
	ended            chan struct{}
}

type labOptions struct {
	advert    time.Duration
	replicate bool
	key       string
	portKept  bool // SNAT that keeps the port: what a lab must not do
	stay      bool
}

func newLab(t testing.TB, o labOptions) *lab {
	t.Helper()
	if !onTime() {
		o.advert *= 10 // members that are not on time move the addresses without need
	}
	l := &lab{t: t, client: linktest.New(t), server: linktest.New(t)}
	under, eni, repl := linktest.NewSwitch(t), linktest.NewSwitch(t), linktest.NewSwitch(t)
	under.Plug(t, l.client, "eth0", "10.1.0.100/24")
	linktest.Route(t, l.client, "0.0.0.0/0", gateway)
	eni.Plug(t, l.server, "eth0", target+"/24")
	dir, err := os.MkdirTemp("", "ha") // short: the path of a socket has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for i, r := range []**router{&l.a, &l.b} {
		x := &router{t: t, name: string(rune('a' + i)), ns: linktest.New(t)}
		x.conn = linktest.Open(t, x.ns)
		linktest.Sysctl(t, x.ns, "net/ipv4/ip_forward", "1")
		x.under = under.Plug(t, x.ns, "under", fmt.Sprintf("10.1.0.%d/24", 2+i))
		x.eni = eni.Plug(t, x.ns, "eni", fmt.Sprintf("10.2.0.%d/24", 2+i))
		x.sync = repl.Plug(t, x.ns, "sync", fmt.Sprintf("10.9.0.%d/24", 1+i))
		snat(t, x.ns, "eni", havip, !o.portKept)
		linktest.Sysctl(t, x.ns, "net/netfilter/nf_conntrack_tcp_loose", "0")
		x.status = filepath.Join(dir, x.name)
		x.cfg = Config{
			Router: 51, Priority: 200 - 100*i, Advert: o.advert, Stay: o.stay, Replicate: o.replicate, Settle: 500 * time.Millisecond, Key: []byte(o.key), Status: x.status,
			VIPs: []VIP{{netip.MustParsePrefix(gateway + "/24"), "under"}, {netip.MustParsePrefix(havip + "/24"), "eni"}},
			Sync: Sync{Device: "sync", Local: netip.AddrFrom4([4]byte{10, 9, 0, byte(1 + i)}), Peer: netip.AddrFrom4([4]byte{10, 9, 0, byte(2 - i)})},
		}
		*r = x
	}
	return l
}

// snat translates what leaves through a device to an address, with random ports: a router that does not know a connection gives it
// another port. With ports kept, two routers would agree without having talked.
func snat(t testing.TB, ns *link.Namespace, device, to string, random bool) {
	t.Helper()
	c, err := nftables.New(nftables.WithNetNSFd(ns.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "lab"})
	chain := c.AddChain(&nftables.Chain{
		Name: "post", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	name := make([]byte, 16)
	copy(name, device)
	addr := netip.MustParseAddr(to).As4()
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
		&expr.Immediate{Register: 1, Data: addr[:]},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: 2, RegAddrMin: 1, FullyRandom: random},
	}})
	if err := c.Flush(); err != nil {
		t.Skip("needs nftables with NAT:", err)
	}
}

// start runs a member in a router's namespace until the test ends.
func (r *router) start() {
	r.t.Helper()
	if r.ended != nil { // as whoever supervises a process does
		select {
		case <-r.ended:
		case <-time.After(20 * time.Second):
			r.t.Fatalf("the member %s does not end", r.name)
		}
	}
	conf, err := json.Marshal(r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), memberEnv+"="+string(conf))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.ns.Do(cmd.Start); err != nil {
		r.t.Fatal(err)
	}
	r.member, r.ended = cmd, make(chan struct{})
	ended := r.ended
	r.mu.Lock()
	r.role = ""
	r.mu.Unlock()
	go func() {
		defer close(ended)
		for s := bufio.NewScanner(out); s.Scan(); {
			if _, role, ok := strings.Cut(s.Text(), "role="); ok {
				r.mu.Lock()
				r.role, _, _ = strings.Cut(role, " ")
				r.mu.Unlock()
				r.changes.Add(1)
			}
			if testing.Verbose() && os.Getenv("THAW_BENCH_HAVIP") == "" || strings.HasPrefix(s.Text(), "failed") {
				fmt.Printf("%s %s: %s\n", time.Now().Format("05.000"), r.name, s.Text())
			}
		}
		_ = cmd.Wait()
	}()
	r.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = cmd.Process.Kill()
		<-ended
	})
}

func (r *router) signal(s syscall.Signal) {
	r.t.Helper()
	if err := r.member.Process.Signal(s); err != nil {
		r.t.Error(err)
	}
}

func (r *router) cables(in bool) {
	for _, p := range []*linktest.Port{r.under, r.eni, r.sync} {
		p.Cable(in)
	}
}

func (r *router) is(role Role) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.role == string(role)
}

// master says whether the router is in charge: by what its member said, or by its address where another program runs.
func (r *router) master() bool {
	if r.member == nil {
		return r.has(havip)
	}
	return r.is(Master)
}

// has says whether the router has the address now.
func (r *router) has(addr string) bool {
	list, err := r.conn.Addresses(0)
	if err != nil {
		r.t.Fatal(err)
	}
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Addr().String() == addr })
}

// ask reads a member's status.
func (r *router) ask() (s Status, err error) {
	c, err := net.DialTimeout("unix", r.status, time.Second)
	if err != nil {
		return s, err
	}
	defer c.Close()
	return s, json.NewDecoder(c).Decode(&s)
}

// plugBare gives a router a device without an address.
func plugBare(t testing.TB, r *router, device string) {
	t.Helper()
	linktest.NewSwitch(t).Plug(t, r.ns, device)
}

// flushTable empties the connection table of the calling thread's namespace: a request to delete that names no entry.
func flushTable() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const deleteEntries, ack = 1<<8 | 2, 4
	req := []byte{20, 0, 0, 0, deleteEntries & 0xff, deleteEntries >> 8, 1 | ack, 0, 1, 0, 0, 0, 0, 0, 0, 0, unix.AF_INET, 0, 0, 0}
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err == nil && (n < 20 || buf[16]|buf[17]|buf[18]|buf[19] != 0) {
		return fmt.Errorf("flush conntrack: %x", buf[:n])
	}
	return err
}

func within(t testing.TB, d time.Duration, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

// up starts both members and waits until a is master and b could take over.
func (l *lab) up() {
	l.t.Helper()
	l.a.start()
	l.b.start()
	l.settled()
}

func (l *lab) settled() {
	l.t.Helper()
	defer l.tell()
	within(l.t, 20*time.Second, "a is master and b a backup with a full table", func() bool {
		if !l.a.is(Master) || !l.b.is(Backup) {
			return false
		}
		sa, err1 := l.a.ask()
		sb, err2 := l.b.ask()
		return err1 == nil && err2 == nil && sa.Role == Master && sb.Role == Backup && sa.Full && sb.Full
	})
}

// tell says what both members say of themselves when the test has failed.
func (l *lab) tell() {
	if !l.t.Failed() {
		return
	}
	for _, r := range []*router{l.a, l.b} {
		s, err := r.ask()
		b, _ := json.Marshal(s)
		l.t.Logf("%s has %d entries, says %s %v", r.name, r.entries(), b, err)
	}
}

// oneHolder waits until exactly one router has the address, on both sides: for the 3 s that are promised, and longer beside other tests.
func (l *lab) oneHolder() {
	l.t.Helper()
	d := 3 * time.Second
	if slack() > 0 {
		d = 15 * time.Second
	}
	for _, addr := range []string{gateway, havip} {
		within(l.t, d, "exactly one router has "+addr, func() bool { return l.a.has(addr) != l.b.has(addr) })
	}
}

// serve echoes UDP and TCP in the server's namespace until the test ends.
func (l *lab) serve() {
	l.t.Helper()
	var pc net.PacketConn
	var ln net.Listener
	err := l.server.Do(func() (err error) {
		if pc, err = net.ListenPacket("udp4", target+":7"); err != nil {
			return err
		}
		ln, err = net.Listen("tcp4", target+":7")
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { pc.Close(); ln.Close() })
	go func() {
		buf := make([]byte, 64)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(buf[:n], from)
		}
	}()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
}

func (l *lab) dial(network string) (net.Conn, error) {
	var c net.Conn
	err := l.client.Do(func() (err error) {
		d := net.Dialer{FallbackDelay: -1, Timeout: 10 * time.Second}
		c, err = d.Dial(network, target+":7")
		return err
	})
	return c, err
}

// prober sends an echo request each millisecond and counts what does not come back: lost echoes are milliseconds of outage.
type prober struct {
	c     net.Conn
	mu    sync.Mutex
	sent  []time.Time
	back  []bool
	done  chan struct{}
	group sync.WaitGroup
}

func (l *lab) probe() *prober {
	l.t.Helper()
	c, err := l.dial("udp4")
	if err != nil {
		l.t.Fatal(err)
	}
	p := &prober{c: c, done: make(chan struct{})}
	p.group.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for n := uint32(0); ; n++ {
			select {
			case <-p.done:
				return
			case now := <-tick.C:
				p.mu.Lock()
				p.sent, p.back = append(p.sent, now), append(p.back, false)
				p.mu.Unlock()
				_, _ = c.Write([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
			}
		}
	})
	p.group.Go(func() {
		buf := make([]byte, 64)
		for {
			n, err := c.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil || n != 4 {
				continue // an ICMP error of a router
			}
			i := int(buf[0])<<24 | int(buf[1])<<16 | int(buf[2])<<8 | int(buf[3])
			p.mu.Lock()
			p.back[i] = true
			p.mu.Unlock()
		}
	})
	l.t.Cleanup(p.stop)
	return p
}

func (p *prober) stop() {
	select {
	case <-p.done:
		return
	default:
	}
	close(p.done)
	p.c.Close()
	p.group.Wait()
}

// lost counts the echoes lost of those sent since a time, not looking at the last 300 ms, which may be under way; sent says how many.
func (p *prober) lost(since time.Time) (lost, sent int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	until := time.Now().Add(-300 * time.Millisecond)
	for i, at := range p.sent {
		if at.Before(since) || at.After(until) {
			continue
		}
		sent++
		if !p.back[i] {
			lost++
		}
	}
	return lost, sent
}

// flows is a set of TCP connections, each of which echoes now and then.
type flows struct {
	conns []net.Conn
	stall atomic.Int64 // longest wait for an echo, ns
	dead  atomic.Int32
	done  chan struct{}
	group sync.WaitGroup
}

// open makes n connections at once; talk says whether they echo from now on.
func (l *lab) open(n int) []net.Conn {
	l.t.Helper()
	conns := make([]net.Conn, n)
	var group sync.WaitGroup
	for w := range 8 {
		group.Go(func() {
			for i := w; i < n; i += 8 {
				c, err := l.dial("tcp4")
				if err != nil {
					l.t.Errorf("connection %d: %v", i, err)
					return
				}
				conns[i] = c
				l.t.Cleanup(func() { c.Close() })
			}
		})
	}
	group.Wait()
	if l.t.Failed() {
		l.t.FailNow()
	}
	return conns
}

// echo says whether a connection still works: what is written comes back within the patience.
func echo(c net.Conn, patience time.Duration) bool {
	_ = c.SetDeadline(time.Now().Add(patience))
	msg := []byte("a message of one connection")
	if _, err := c.Write(msg); err != nil {
		return false
	}
	back := make([]byte, len(msg))
	_, err := io.ReadFull(c, back)
	return err == nil && string(back) == string(msg)
}

// kept counts the connections that still work.
func kept(conns []net.Conn, patience time.Duration) int {
	var n atomic.Int32
	var group sync.WaitGroup
	for _, c := range conns {
		group.Go(func() {
			if echo(c, patience) {
				n.Add(1)
			}
		})
	}
	group.Wait()
	return int(n.Load())
}

// talk lets connections echo every 25 ms until stop.
func talk(conns []net.Conn) *flows {
	f := &flows{conns: conns, done: make(chan struct{})}
	for i, c := range conns {
		f.group.Go(func() {
			select {
			case <-f.done:
				return
			case <-time.After(time.Duration(i%25) * time.Millisecond):
			}
			tick := time.NewTicker(25 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-f.done:
					return
				case <-tick.C:
				}
				began := time.Now()
				if !echo(c, 8*time.Second) {
					f.dead.Add(1)
					return
				}
				for took := time.Since(began).Nanoseconds(); ; {
					old := f.stall.Load()
					if took <= old || f.stall.CompareAndSwap(old, took) {
						break
					}
				}
			}
		})
	}
	return f
}

// stop ends the talk and returns how many connections have lived through it, and the longest wait.
func (f *flows) stop() (alive int, stall time.Duration) {
	close(f.done)
	f.group.Wait()
	return len(f.conns) - int(f.dead.Load()), time.Duration(f.stall.Load())
}
