package demonet

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
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// insideEnv marks the process that has network and mounts of its own: when it ends, nothing is left.
const insideEnv = "THAW_DEMO_NET_INSIDE"

// Run runs the demonstration. It needs root.
func Run(ctx context.Context, cfg Config) error {
	if os.Getenv(insideEnv) == "" {
		return outside(ctx, cfg)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts of our own: %w", err)
	}
	d := &demo{Config: cfg}
	defer d.close()
	return d.run(ctx)
}

func outside(ctx context.Context, cfg Config) error {
	if os.Geteuid() != 0 {
		return errors.New("thaw demo net makes network namespaces and loads programs into the kernel: run it as root")
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdout, cmd.Stderr = cfg.Out, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	return cmd.Run()
}

const (
	server   = "10.0.0.100"
	outerVIP = "10.1.0.1"
	patience = 20 * time.Second
)

type demo struct {
	Config
	dir    string
	closes []func()
	ports  int
}

func (d *demo) close() {
	for i := len(d.closes) - 1; i >= 0; i-- {
		d.closes[i]()
	}
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.Out, format+"\n", args...) }

// host is a namespace that plays a machine.
type host struct {
	ns   *link.Namespace
	conn *link.Conn
}

func (d *demo) host() (*host, error) {
	ns, err := link.NewNamespace()
	if err != nil {
		return nil, err
	}
	c, err := ns.Open()
	if err != nil {
		ns.Close()
		return nil, err
	}
	d.closes = append(d.closes, func() { c.Close(); ns.Close() })
	return &host{ns, c}, c.SetUp("lo", true)
}

// network is a switch: a host with a bridge.
func (d *demo) network() (*host, error) {
	h, err := d.host()
	if err == nil {
		err = h.conn.AddBridge("br")
	}
	return h, err
}

// plug connects a host by a device, and returns the switch's port.
func (d *demo) plug(sw, h *host, device, addr string) (string, error) {
	d.ports++
	port := fmt.Sprint("port", d.ports)
	if err := link.Cable(link.End{In: h.ns, Name: device}, link.End{In: sw.ns, Name: port}); err != nil {
		return port, err
	}
	if err := errors.Join(sw.conn.SetUp(port, true), sw.conn.Enslave(port, "br"), h.conn.SetUp(device, true)); err != nil || addr == "" {
		return port, err
	}
	dev, err := h.conn.Device(device)
	if err != nil {
		return port, err
	}
	return port, h.conn.SetAddress(dev.Index, netip.MustParsePrefix(addr), 0)
}

// echo answers lines with the tenant's name and the address that it sees.
func (d *demo) echo(h *host, tenant string) error {
	var l net.Listener
	err := h.ns.Do(func() (err error) { l, err = net.Listen("tcp4", server+":7"); return err })
	if err != nil {
		return err
	}
	d.closes = append(d.closes, func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				from, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				for r := bufio.NewScanner(c); r.Scan(); {
					fmt.Fprintf(c, "%s's server, which sees %s\n", tenant, from)
				}
			}()
		}
	}()
	return nil
}

// ask opens a connection to the server's address, and returns it with the answer.
func ask(h *host) (net.Conn, string, error) {
	var c net.Conn
	err := h.ns.Do(func() (err error) {
		c, err = (&net.Dialer{FallbackDelay: -1, Timeout: 5 * time.Second}).Dial("tcp4", server+":7")
		return err
	})
	if err != nil {
		return nil, "", err
	}
	answer, err := again(c)
	return c, answer, err
}

func again(c net.Conn) (string, error) {
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, "?\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}

// node is a gateway's machine.
type node struct {
	*host
	name  string
	cfg   gateway.Config
	ports []func(up bool) error // cables
}

func (n *node) status() (s gateway.Status, err error) {
	c, err := net.DialTimeout("unix", n.cfg.Status, time.Second)
	if err != nil {
		return s, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Second))
	return s, json.NewDecoder(c).Decode(&s)
}

func (d *demo) wait(ctx context.Context, what string, f func() bool) error {
	for deadline := time.Now().Add(patience); !f(); {
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s: %s", patience, what)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// start runs a node as a process of its own, as in production.
func (d *demo) start(n *node) error {
	b, err := json.Marshal(n.cfg)
	if err != nil {
		return err
	}
	path := filepath.Join(d.dir, n.name+".json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", "gateway", "--config", path, "--log-level", "error")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.ns.Do(cmd.Start); err != nil {
		return err
	}
	d.closes = append(d.closes, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		// What a node leaves for its next process would keep the folder from being removed.
		held, _ := os.ReadDir(n.cfg.Namespace)
		for _, e := range held {
			_ = link.Unname(filepath.Join(n.cfg.Namespace, e.Name()))
		}
		_ = unix.Unmount(n.cfg.Pin, unix.MNT_DETACH)
	})
	return nil
}

func (d *demo) run(ctx context.Context) (err error) {
	if d.dir, err = os.MkdirTemp("", "thaw-demo-net-"); err != nil {
		return err
	}
	d.closes = append(d.closes, func() { os.RemoveAll(d.dir) })
	under, err := d.network()
	if err != nil {
		return err
	}
	sync, err := d.network()
	if err != nil {
		return err
	}
	d.say("Two workers, two gateway nodes, two tenants, both with 10.0.0.0/24 and a server at %s. Each is a network namespace.", server)
	nodes := make([]*node, 2)
	for i := range nodes {
		h, err := d.host()
		if err != nil {
			return err
		}
		n := &node{host: h, name: string(rune('a' + i))}
		base := filepath.Join(d.dir, n.name)
		n.cfg = gateway.Config{
			Name: n.name, Device: "under", Pin: base + "p", Outer: []netip.Prefix{netip.MustParsePrefix(outerVIP + "/24")}, Priority: 200 - 100*i,
			Advert: gateway.Duration(10 * time.Millisecond), Sync: fmt.Sprintf("sync,10.9.0.%d,10.9.0.%d", 1+i, 2-i), Status: base, Namespace: base + "n",
			WorkerSet: []gateway.Worker{
				{Outer: netip.MustParseAddr("10.1.0.11"), Prefix: netip.MustParsePrefix("100.64.0.0/22")},
				{Outer: netip.MustParseAddr("10.1.0.12"), Prefix: netip.MustParsePrefix("100.64.4.0/22")},
			},
		}
		for _, c := range []struct {
			sw           *host
			device, addr string
		}{{under, "under", fmt.Sprintf("10.1.0.%d/24", 2+i)}, {sync, "sync", fmt.Sprintf("10.9.0.%d/24", 1+i)}} {
			port, err := d.plug(c.sw, h, c.device, c.addr)
			if err != nil {
				return err
			}
			n.ports = append(n.ports, func(up bool) error { return c.sw.conn.SetUp(port, up) })
		}
		nodes[i] = n
	}
	tenants := []string{"ann", "bob"}
	vpcs := make([]*host, 2)
	for i, tenant := range tenants {
		if vpcs[i], err = d.tenant(i, tenant, nodes); err != nil {
			return err
		}
	}
	for _, n := range nodes {
		if err := d.start(n); err != nil {
			return err
		}
	}
	fns := make([]*slot, 2)
	for i := range fns {
		if fns[i], err = d.worker(under, i); err != nil {
			return err
		}
	}
	a, b := nodes[0], nodes[1]
	err = d.wait(ctx, "both gateways are ready", func() bool {
		sa, err1 := a.status()
		sb, err2 := b.status()
		return err1 == nil && err2 == nil && sa.Role == havip.Master && sb.Role == havip.Backup && sb.Full && len(sa.Pairs) == 2 && len(sb.Pairs) == 2
	})
	if err != nil {
		return err
	}
	d.say("Gateway a has the addresses, b the same connections. A function of each tenant asks %s:", server)
	conns := make([]net.Conn, 2)
	for i, f := range fns {
		if err := f.attach(); err != nil {
			return err
		}
		c, answer, err := ask(f.host)
		if err != nil {
			return fmt.Errorf("%s's function: %w", tenants[i], err)
		}
		d.closes = append(d.closes, func() { c.Close() })
		conns[i] = c
		d.say("  %s's function: answered by %s", tenants[i], answer)
	}
	if err := d.failover(ctx, a, b, tenants, conns); err != nil {
		return err
	}
	return d.compare(ctx, fns[0], vpcs[0])
}

// tenant makes a network with a server, and a pair into it.
func (d *demo) tenant(i int, name string, nodes []*node) (*host, error) {
	vpc, err := d.network()
	if err != nil {
		return nil, err
	}
	srv, err := d.host()
	if err != nil {
		return nil, err
	}
	if _, err := d.plug(vpc, srv, "eth0", server+"/24"); err != nil {
		return nil, err
	}
	for _, n := range nodes {
		bridge, up := "br-"+name, "up-"+name
		port, err := d.plug(vpc, n.host, up, "")
		if err != nil {
			return nil, err
		}
		if err := errors.Join(n.conn.AddBridge(bridge), n.conn.Enslave(up, bridge)); err != nil {
			return nil, err
		}
		n.ports = append(n.ports, func(up bool) error { return vpc.conn.SetUp(port, up) })
		n.cfg.Pairs = append(n.cfg.Pairs, gateway.Pair{
			Name: name, ID: uint32(i + 1), VPC: tunnel.Key(101 + i), Subnet: netip.MustParsePrefix("10.0.0.0/24"),
			HAVIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(10 + i)})}, Network: gateway.Network{Bridge: bridge},
		})
	}
	return vpc, d.echo(srv, name)
}

// slot is an instance's place on a worker, connected but attached to no VPC yet.
type slot struct {
	*host
	worker tunnel.Worker
	slot   tunnel.Slot
	vpc    tunnel.Key
}

func (s *slot) attach() error { return s.worker.Attach(s.slot, s.vpc) }

// worker makes a worker with a slot.
func (d *demo) worker(under *host, i int) (*slot, error) {
	w, err := d.host()
	if err != nil {
		return nil, err
	}
	own := netip.AddrFrom4([4]byte{10, 1, 0, byte(11 + i)})
	if _, err := d.plug(under, w, "under", own.String()+"/24"); err != nil {
		return nil, err
	}
	s := &slot{vpc: tunnel.Key(101 + i)}
	err = w.ns.Do(func() error {
		s.worker, err = tunnel.OpenWorker(tunnel.Config{Device: "under", Local: own})
		return err
	})
	if err != nil {
		return nil, err
	}
	d.closes = append(d.closes, func() { s.worker.Close() })
	if s.host, err = d.host(); err != nil {
		return nil, err
	}
	inner := netip.AddrFrom4([4]byte{100, 64, byte(4 * i), 5})
	if s.slot, err = instance(w, s.host, inner); err != nil {
		return nil, err
	}
	pairs := []tunnel.Pair{{ID: uint32(i + 1), Outer: netip.MustParseAddr(outerVIP)}}
	return s, errors.Join(s.worker.Plug(s.slot.Device), s.worker.SetPairs(s.vpc, pairs))
}

// instance connects an instance to its node, with an address and a way out.
func instance(w, h *host, inner netip.Addr) (tunnel.Slot, error) {
	if err := link.Cable(link.End{In: w.ns, Name: "slot0"}, link.End{In: h.ns, Name: "eth0"}); err != nil {
		return tunnel.Slot{}, err
	}
	if err := errors.Join(w.conn.SetUp("slot0", true), h.conn.SetUp("eth0", true), h.conn.SetMTU("eth0", 1472)); err != nil {
		return tunnel.Slot{}, err
	}
	end, err := w.conn.Device("slot0")
	if err != nil {
		return tunnel.Slot{}, err
	}
	dev, err := h.conn.Device("eth0")
	if err != nil {
		return tunnel.Slot{}, err
	}
	gw := netip.MustParseAddr("169.254.1.1")
	return tunnel.Slot{Device: end.Index, Inner: inner}, errors.Join(
		h.conn.SetAddress(dev.Index, netip.PrefixFrom(inner, 32), 0),
		h.conn.SetRoute(link.Route{To: netip.PrefixFrom(gw, 32), Device: "eth0"}), h.conn.SetNeighbor(dev.Index, gw, end.MAC),
		h.conn.SetRoute(link.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: gw, Device: "eth0"}))
}

// failover pulls all cables of the master while both tenants' connections talk.
func (d *demo) failover(ctx context.Context, a, b *node, tenants []string, conns []net.Conn) error {
	type report struct {
		longest time.Duration
		n       int
		err     error
	}
	done := make(chan struct{})
	reports := make([]chan report, len(conns))
	for i, c := range conns {
		reports[i] = make(chan report, 1)
		go func() {
			var r report
			for {
				select {
				case <-done:
					reports[i] <- r
					return
				case <-time.After(5 * time.Millisecond):
				}
				began := time.Now()
				if _, r.err = again(c); r.err != nil {
					<-done
					reports[i] <- r
					return
				}
				r.n++
				r.longest = max(r.longest, time.Since(began))
			}
		}()
	}
	time.Sleep(500 * time.Millisecond)
	d.say("\nBoth connections talk 200 times a second. All cables of gateway a are pulled.")
	began := time.Now()
	for _, p := range a.ports {
		if err := p(false); err != nil {
			close(done)
			return err
		}
	}
	err := d.wait(ctx, "b has taken over", func() bool { s, err := b.status(); return err == nil && s.Role == havip.Master })
	d.say("  %3d ms: gateway b is master", time.Since(began).Milliseconds())
	if err == nil {
		time.Sleep(time.Second)
	}
	close(done)
	for i := range reports {
		r := <-reports[i]
		if r.err != nil {
			err = errors.Join(err, fmt.Errorf("%s's connection broke: %w", tenants[i], r.err))
			continue
		}
		d.say("  %s's connection lives: %d answers, the longest wait was %d ms", tenants[i], r.n, r.longest.Milliseconds())
	}
	return err
}

// compare shows what an instance waits for, by three ways into the tenant's network.
func (d *demo) compare(ctx context.Context, s *slot, vpc *host) error {
	d.say("\nWhat an instance waits for until its first answer, if the cloud takes %s to make a NIC:", d.Delay)
	if err := s.worker.Detach(s.slot); err != nil {
		return err
	}
	began := time.Now()
	if err := s.attach(); err != nil {
		return err
	}
	attached := time.Since(began)
	c, _, err := ask(s.host)
	if err != nil {
		return err
	}
	c.Close()
	d.row("a slot of the tunnel", attached, time.Since(began), "no address of the subnet, no NIC")

	enis := &gateway.MeteredENIs{ENIProvider: gateway.Bridges{Host: vpc.ns}, Delay: d.Delay}
	nic := func(h *host, id uint32, addr string) error {
		if err := enis.Ensure(ctx, gateway.ENI{ID: id, Network: gateway.Network{Bridge: "br"}, In: h.ns}); err != nil {
			return err
		}
		dev, err := h.conn.Device("eni")
		if err != nil {
			return err
		}
		return errors.Join(h.conn.SetUp("eni", true), h.conn.SetAddress(dev.Index, netip.MustParsePrefix(addr), 0))
	}
	own, err := d.host()
	if err != nil {
		return err
	}
	began = time.Now()
	if err := nic(own, 901, "10.0.0.201/24"); err != nil {
		return err
	}
	attached = time.Since(began)
	if c, _, err = ask(own); err != nil {
		return err
	}
	c.Close()
	d.row("a NIC for each instance", attached, time.Since(began), "an address and a NIC each")

	// The first instance of a node waits for the node's NIC; it has an address of the subnet, for which the node answers.
	w, err := d.host()
	if err != nil {
		return err
	}
	h, err := d.host()
	if err != nil {
		return err
	}
	inner := netip.MustParseAddr("10.0.0.203")
	began = time.Now()
	if err := nic(w, 902, "10.0.0.202/24"); err != nil {
		return err
	}
	if _, err := instance(w, h, inner); err != nil {
		return err
	}
	err = errors.Join(w.ns.Sysctl("net/ipv4/ip_forward", "1"), w.ns.Sysctl("net/ipv4/conf/eni/proxy_arp", "1"),
		w.conn.SetRoute(link.Route{To: netip.PrefixFrom(inner, 32), Device: "slot0"}))
	if err != nil {
		return err
	}
	attached = time.Since(began)
	if c, _, err = ask(h); err != nil {
		return err
	}
	c.Close()
	d.row("a NIC for each node, its first instance", attached, time.Since(began), "an address each, a NIC for each node")
	return nil
}

func (d *demo) row(way string, attached, answered time.Duration, cost string) {
	ms := func(t time.Duration) float64 { return float64(t.Microseconds()) / 1000 }
	d.say("  %-40s attached after %9.3f ms, answered after %9.3f ms; %s", way, ms(attached), ms(answered), cost)
}
