package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoDevice says that no device has the name or index asked for.
var ErrNoDevice = errors.New("no such network device")

// Device is the state of a network device when it was asked for.
type Device struct {
	Index int
	Name  string
	MAC   [6]byte // zero for devices without one
	Up    bool    // switched on and with carrier
	MTU   int
	On    bool // switched on, whether there is a carrier or not
}

// Conn is a connection to the kernel that stays in the namespace in which it was opened, wherever its caller goes. One goroutine at
// a time may use it.
type Conn struct{ h *netlink.Handle }

// Open connects to the namespace of the calling thread.
func Open() (*Conn, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	return &Conn{h}, nil
}

// Close ends the connection.
func (c *Conn) Close() { c.h.Close() }

// Device returns the device of that name, or ErrNoDevice.
func (c *Conn) Device(name string) (Device, error) {
	l, err := c.h.LinkByName(name)
	if err != nil {
		return Device{}, deviceError(name, err)
	}
	return device(l), nil
}

func deviceError(name string, err error) error {
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
		return fmt.Errorf("%w: %q", ErrNoDevice, name)
	}
	return fmt.Errorf("device %q: %w", name, err)
}

func device(l netlink.Link) Device {
	a := l.Attrs()
	d := Device{Index: a.Index, Name: a.Name, MTU: a.MTU, Up: isUp(a.RawFlags), On: a.RawFlags&unix.IFF_UP != 0}
	copy(d.MAC[:], a.HardwareAddr)
	return d
}

// Addresses returns the IPv4 addresses of a device, or of all devices for index 0, in the kernel's order.
func (c *Conn) Addresses(index int) ([]netip.Prefix, error) {
	var l netlink.Link
	if index != 0 {
		l = &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: index}}
	}
	list, err := whole(func() ([]netlink.Addr, error) { return c.h.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("addresses: %w", err)
	}
	prefixes := make([]netip.Prefix, 0, len(list))
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP.To4()); ok {
			bits, _ := a.Mask.Size()
			prefixes = append(prefixes, netip.PrefixFrom(addr, bits))
		}
	}
	return prefixes, nil
}

func kernelAddress(p netip.Prefix) *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
}

// SetAddress gives a device an address, or prolongs its lease. The kernel takes the address away by itself when lease (whole seconds)
// is over; 0 means never.
func (c *Conn) SetAddress(index int, p netip.Prefix, lease time.Duration) error {
	a := kernelAddress(p)
	a.ValidLft, a.PreferedLft = int(lease/time.Second), int(lease/time.Second)
	if err := c.h.AddrReplace(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: index}}, a); err != nil {
		return fmt.Errorf("set address %s: %w", p, err)
	}
	return nil
}

// DeleteAddress takes an address from a device; one that is not there is no error.
func (c *Conn) DeleteAddress(index int, p netip.Prefix) error {
	err := c.h.AddrDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: index}}, kernelAddress(p))
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("delete address %s: %w", p, err)
	}
	return nil
}

// Watch returns a descriptor that becomes readable whenever the state of some device changes, for ReadWatch. It never blocks, and the
// caller closes it.
func Watch() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("watch devices: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_LINK - 1)}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("watch devices: %w", err)
	}
	return fd, nil
}

// ReadWatch reads what is there and tells of each device whether it is up (as Device.Up), in order. It asks the kernel nothing, so it
// does not wait for others who change devices. lost: there was more than could be kept, ask for the devices that matter.
// buf needs 32 KiB to hold any message.
func ReadWatch(fd int, buf []byte, f func(index int, up bool)) (lost bool) {
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		switch {
		case err == unix.ENOBUFS:
			lost = true
			continue
		case err == unix.EINTR:
			continue
		case err != nil:
			return lost
		}
		msgs, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil { // longer than buf
			lost = true
		}
		for _, m := range msgs {
			if len(m.Data) < unix.SizeofIfInfomsg || m.Header.Type != unix.RTM_NEWLINK && m.Header.Type != unix.RTM_DELLINK {
				continue
			}
			index, flags := binary.NativeEndian.Uint32(m.Data[4:]), binary.NativeEndian.Uint32(m.Data[8:])
			f(int(index), m.Header.Type == unix.RTM_NEWLINK && isUp(flags))
		}
	}
}

func isUp(flags uint32) bool { return flags&unix.IFF_UP != 0 && flags&unix.IFF_RUNNING != 0 }
