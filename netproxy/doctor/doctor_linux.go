package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// tryTimeout bounds the start of a process in a namespace of its own.
const tryTimeout = 10 * time.Second

// bench is where things are tried: two namespaces with a cable between them, in which nothing of the machine is.
type bench struct {
	here, there *link.Namespace
	conn        *link.Conn // of here
	err         error      // why there is none
}

const cableName = "try0"

func newBench() (b *bench) {
	b = &bench{}
	if b.here, b.err = link.NewNamespace(); b.err != nil {
		return b
	}
	if b.there, b.err = link.NewNamespace(); b.err != nil {
		return b
	}
	b.conn, b.err = b.here.Open()
	return b
}

func (b *bench) close() {
	if b.conn != nil {
		b.conn.Close()
	}
	for _, ns := range []*link.Namespace{b.here, b.there} {
		if ns != nil {
			ns.Close() // and with it every device in it
		}
	}
}

// Examine tries everything. nothing is a command that ends at once without an error: it is started in a new user namespace.
func Examine(nothing ...string) (Report, error) {
	b := newBench()
	defer b.close()
	cable := errors.New("there is no cable to try it on")
	if b.err == nil {
		cable = b.cable()
	}
	on := func(f func() error) func() error {
		return func() error {
			if cable != nil {
				return fmt.Errorf("not tried without a veth: %w", cable)
			}
			return f()
		}
	}
	var r Report
	for _, t := range []struct {
		what, use string
		try       func() error
	}{
		{"veth", "everything", func() error { return cable }},
		{"bridge", "subnets with a bridge", func() error { return b.conn.AddBridge("br0") }},
		{"vlan", "subnets with a VLAN", on(func() error { return b.conn.AddVLAN(cableName, 7, link.End{In: b.here, Name: "vlan0"}) })},
		{"macvlan", "subnets with a macvlan", on(func() error { return b.conn.AddMACVLAN(cableName, link.End{In: b.here, Name: "mac0"}) })},
		{"nftables", "source addresses, isolation of functions", b.nftables},
		{"conntrack netlink", "connections that survive their gateway", func() error { return b.here.Do(conntrack) }},
		{"bpf", "driver ebpf", on(b.bpf)},
		{"clsact", "driver ebpf", on(b.clsact)},
		{"bpffs", "tunnels that outlive their process", bpffs},
		{"gre", "driver kernel-gre", b.tunnel("gre")},
		{"ipip", "driver kernel-ipip", b.tunnel("ipip")},
		{"vxlan", "driver vxlan", b.tunnel("vxlan")},
	} {
		r.Features = append(r.Features, finding(t.what, t.use, b.err, t.try))
	}
	r.Features = append(r.Features, finding("user namespaces", "tests without root", nil, func() error { return userNamespace(nothing) }))
	for _, d := range tunnel.Drivers() {
		f := finding("", "", b.err, func() error { return driver(d) })
		r.Drivers = append(r.Drivers, Driver{d, f.State, f.Why, d.Overhead()})
		if f.State == Works && r.Chosen == "" {
			r.Chosen = d
		}
	}
	var err error
	r.Paths, err = paths(r.Chosen)
	return r, err
}

// finding tries one thing, unless there is nowhere to try it.
func finding(what, use string, nowhere error, try func() error) Finding {
	f := Finding{What: what, For: use, State: Works}
	err := nowhere
	if err == nil {
		err = try()
	}
	switch {
	case err == nil:
	case nowhere != nil || errors.Is(err, os.ErrPermission):
		f.State, f.Why = NotTried, fmt.Sprintf("needs root: %v", err)
	default:
		f.State, f.Why = Missing, err.Error()
	}
	return f
}

func (b *bench) cable() error {
	if err := link.Cable(link.End{In: b.here, Name: cableName}, link.End{In: b.there, Name: cableName}); err != nil {
		return err
	}
	return b.conn.SetUp(cableName, true)
}

func (b *bench) nftables() error {
	c, err := b.here.Rules()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "try"})
	c.AddChain(&nftables.Chain{Name: "snat", Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	return c.Flush()
}

// conntrack asks for the table of connections of the calling thread's namespace.
func conntrack() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		return err
	}
	// A header of 16 bytes (length, type, flags, sequence, sender), then family, version and resource.
	const dump, get = unix.NLM_F_REQUEST | unix.NLM_F_DUMP, 1 // IPCTNL_MSG_CT_GET
	msg := []byte{20, 0, 0, 0, get, unix.NFNL_SUBSYS_CTNETLINK, dump & 0xff, dump >> 8, 1, 0, 0, 0, 0, 0, 0, 0, unix.AF_INET, 0, 0, 0}
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	switch {
	case err != nil:
		return err
	case n >= 20 && buf[4] == unix.NLMSG_ERROR:
		return unix.Errno(-int32(uint32(buf[16]) | uint32(buf[17])<<8 | uint32(buf[18])<<16 | uint32(buf[19])<<24))
	}
	return nil
}

// program loads one that lets everything pass.
func program() (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}})
}

func (b *bench) bpf() error {
	p, err := program()
	if err != nil {
		return err
	}
	return p.Close()
}

func (b *bench) clsact() error {
	p, err := program()
	if err != nil {
		return err
	}
	defer p.Close()
	d, err := b.conn.Device(cableName)
	if err != nil {
		return err
	}
	in := link.Ingress{Device: d.Index, Name: "try", Priority: 1, Program: p.FD()}
	return errors.Join(b.conn.SetIngress(in), b.conn.RemoveIngress(in))
}

func bpffs() error {
	dir, err := os.MkdirTemp("", "thaw-doctor-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	return unix.Unmount(dir, 0)
}

func (b *bench) tunnel(kind string) func() error {
	return func() error {
		_, err := b.conn.AddTunnel("try-"+kind, kind, 4789)
		return err
	}
}

// driver opens a worker's end of it, on a bench of its own: devices of two drivers can be in each other's way.
func driver(d tunnel.Driver) error {
	b := newBench()
	defer b.close()
	if b.err != nil {
		return b.err
	}
	if err := b.cable(); err != nil {
		return err
	}
	return b.here.Do(func() error {
		w, err := tunnel.OpenWorker(tunnel.Config{Driver: d, Device: cableName, Local: netip.MustParseAddr("192.0.2.1"), Flows: 64})
		if err != nil {
			return err
		}
		return w.Close()
	})
}

func userNamespace(nothing []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), tryTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, nothing[0], nothing[1:]...)
	id := []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, UidMappings: id,
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}}
	return cmd.Run()
}
