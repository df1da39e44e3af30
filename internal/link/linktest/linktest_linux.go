package linktest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
)

const inside = "THAW_LINKTEST_INSIDE"

// Main runs the tests of a package in namespaces of their own, by starting the test binary again: nothing that they do can reach
// the machine's network. For root these are network and mounts, so that its rights, such as real-time scheduling, stay; for others
// there is a user namespace around them. Where the kernel refuses, tests run as they are, and New skips those that need more.
// Use it as os.Exit(linktest.Main(m)).
func Main(m *testing.M) int {
	if os.Getenv(inside) != "" {
		return m.Run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// A test binary that is killed for its time limit takes what it started with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	err := cmd.Start()
	if err != nil {
		fmt.Fprintln(os.Stderr, "linktest: no namespaces of our own:", err)
		return m.Run()
	}
	var exit *exec.ExitError
	if err = cmd.Wait(); errors.As(err, &exit) {
		if code := exit.ExitCode(); code > 0 {
			return code
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "linktest:", err)
		return 1
	}
	return 0
}

// New makes a namespace with its loopback on, and closes it with the test. It skips the test where namespaces are not to be had.
func New(t testing.TB) *link.Namespace {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("needs network namespaces of its own, which were refused (see the line of linktest above)")
	}
	ns, err := link.NewNamespace()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	Up(t, ns, "lo")
	return ns
}

// Open connects to a namespace for the time of the test.
func Open(t testing.TB, ns *link.Namespace) *link.Conn {
	t.Helper()
	c, err := ns.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// Up switches a device on and gives it addresses.
func Up(t testing.TB, ns *link.Namespace, device string, addrs ...string) {
	t.Helper()
	c, err := ns.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetUp(device, true); err != nil {
		t.Fatal(err)
	}
	d, err := c.Device(device)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if err := c.SetAddress(d.Index, netip.MustParsePrefix(a), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// Cable connects two namespaces; both ends are switched on.
func Cable(t testing.TB, a, b link.End) {
	t.Helper()
	if err := link.Cable(a, b); err != nil {
		t.Fatal(err)
	}
	Up(t, a.In, a.Name)
	Up(t, b.In, b.Name)
}

// Switch is a namespace with a bridge: plugging a device in gives the other end of its cable the name of the port.
type Switch struct {
	ns    *link.Namespace
	conn  *link.Conn
	ports int
}

// NewSwitch makes one.
func NewSwitch(t testing.TB) *Switch {
	t.Helper()
	s := &Switch{ns: New(t)}
	s.conn = Open(t, s.ns)
	if err := s.conn.AddBridge("br"); err != nil {
		t.Fatal(err)
	}
	return s
}

// Port is where a namespace is plugged in.
type Port struct {
	t    testing.TB
	s    *Switch
	name string
}

// Plug connects a namespace by a device of the given name with addresses.
func (s *Switch) Plug(t testing.TB, ns *link.Namespace, device string, addrs ...string) *Port {
	t.Helper()
	s.ports++
	p := &Port{t, s, fmt.Sprint("port", s.ports)}
	Cable(t, link.End{In: ns, Name: device}, link.End{In: s.ns, Name: p.name})
	p.Forward(true)
	Up(t, ns, device, addrs...)
	return p
}

// Cable pulls the cable (false) or puts it back (true): both ends lose their carrier.
func (p *Port) Cable(in bool) {
	if err := p.s.conn.SetUp(p.name, in); err != nil {
		p.t.Error(err)
	}
}

// Forward says whether the switch forwards what comes over the cable and what belongs there, as some do only a while after there is a
// carrier.
func (p *Port) Forward(on bool) {
	var err error
	if on {
		err = p.s.conn.Enslave(p.name, "br")
	} else {
		err = p.s.conn.Release(p.name)
	}
	if err != nil {
		p.t.Error(err)
	}
}

// Route adds a route.
func Route(t testing.TB, ns *link.Namespace, to, via string) {
	t.Helper()
	if err := Open(t, ns).SetRoute(link.Route{To: netip.MustParsePrefix(to), Via: netip.MustParseAddr(via)}); err != nil {
		t.Fatal(err)
	}
}

// Sysctl writes a setting of a namespace.
func Sysctl(t testing.TB, ns *link.Namespace, name, value string) {
	t.Helper()
	if err := ns.Sysctl(name, value); err != nil {
		t.Skip("needs a writable /proc/sys/net:", err)
	}
}
