package link

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace that lives as long as it is open and something is in it.
type Namespace struct{ h netns.NsHandle }

// NewNamespace makes one. It stays without a name: nothing is left of it when the process ends.
func NewNamespace() (*Namespace, error) {
	var n Namespace
	err := aside(func() error {
		h, err := netns.New()
		n.h = h
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("new network namespace: %w", err)
	}
	return &n, nil
}

// aside runs f on a thread of its own, which is in no other goroutine's way and is thrown away unless it is back where it was.
func aside(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		own, err := netns.Get()
		if err != nil {
			done <- err
			return
		}
		defer own.Close()
		err = f()
		if back := netns.Set(own); back == nil {
			runtime.UnlockOSThread() // else the runtime ends this thread with the goroutine
		}
		done <- err
	}()
	return <-done
}

// Do runs f on a thread that is in the namespace: sockets that it makes and processes that it starts belong there.
func (n *Namespace) Do(f func() error) error {
	return aside(func() error {
		if err := netns.Set(n.h); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// Open connects to the kernel about this namespace.
func (n *Namespace) Open() (*Conn, error) {
	h, err := netlink.NewHandleAt(n.h, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	return &Conn{h}, nil
}

// Fd is the open descriptor of the namespace.
func (n *Namespace) Fd() int { return int(n.h) }

// File returns a descriptor of the namespace of its own, to be closed by the caller.
func (n *Namespace) File() (*os.File, error) {
	c, err := n.Clone()
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(c.h), "network namespace"), nil
}

// Clone opens it once more, for who may still work in it when n is closed.
func (n *Namespace) Clone() (*Namespace, error) {
	fd, err := unix.FcntlInt(uintptr(n.h), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("descriptor of a network namespace: %w", err)
	}
	return &Namespace{netns.NsHandle(fd)}, nil
}

// Close lets go of the namespace; its devices go with it when nobody else holds it. Nothing may be under way in it.
func (n *Namespace) Close() error { return n.h.Close() }

// Sysctl writes a setting of the namespace, such as "net/ipv4/ip_forward".
func (n *Namespace) Sysctl(name, value string) error {
	return n.Do(func() error {
		return patiently(func() error {
			if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
				return fmt.Errorf("sysctl: %w", err)
			}
			return nil
		})
	})
}

// patiently runs f without real-time priority, if the thread has one. The kernel tries some settings (forwarding among them) again and
// again, without sleep, until nobody holds the lock of network configuration: with such a priority, whoever holds it may never get to run.
func patiently(f func() error) error {
	was, err := unix.SchedGetAttr(0, 0)
	if err != nil || was.Policy != unix.SCHED_FIFO {
		return f()
	}
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}, 0); err != nil {
		return f()
	}
	return errors.Join(f(), unix.SchedSetAttr(0, was, 0))
}

// End is one end of a cable.
type End struct {
	In   *Namespace
	Name string
}

// Cable puts a pair of veth devices into two namespaces, switched off.
func Cable(a, b End) error {
	c, err := a.In.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: a.Name}, PeerName: b.Name, PeerNamespace: netlink.NsFd(b.In.h)}
	if err := c.h.LinkAdd(v); err != nil {
		return fmt.Errorf("veth %s - %s: %w", a.Name, b.Name, err)
	}
	return nil
}

// AddBridge makes a bridge, switched on, which forwards at once.
func (c *Conn) AddBridge(name string) error {
	if err := c.h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
		return fmt.Errorf("bridge %s: %w", name, err)
	}
	return c.SetUp(name, true)
}

// Enslave makes a device a port of a bridge.
func (c *Conn) Enslave(port, bridge string) error {
	p, err := c.h.LinkByName(port)
	if err != nil {
		return deviceError(port, err)
	}
	b, err := c.h.LinkByName(bridge)
	if err != nil {
		return deviceError(bridge, err)
	}
	if err := c.h.LinkSetMaster(p, b); err != nil {
		return fmt.Errorf("%s into bridge %s: %w", port, bridge, err)
	}
	return nil
}

// Release takes a port from its bridge.
func (c *Conn) Release(port string) error {
	p, err := c.h.LinkByName(port)
	if err != nil {
		return deviceError(port, err)
	}
	if err := c.h.LinkSetNoMaster(p); err != nil {
		return fmt.Errorf("%s from its bridge: %w", port, err)
	}
	return nil
}

// SetUp switches a device on or off.
func (c *Conn) SetUp(name string, up bool) error {
	l, err := c.h.LinkByName(name)
	if err != nil {
		return deviceError(name, err)
	}
	set := c.h.LinkSetDown
	if up {
		set = c.h.LinkSetUp
	}
	if err := set(l); err != nil {
		return fmt.Errorf("switch %s: %w", name, err)
	}
	return nil
}

// DoIn is Namespace.Do for a namespace that somebody else has opened.
func DoIn(ns *os.File, f func() error) error {
	n := Namespace{netns.NsHandle(ns.Fd())}
	return n.Do(f)
}
