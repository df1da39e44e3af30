package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// whole asks for a list until no change has come between: of one that was interrupted the kernel says that something may be missing.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range 100 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// Devices returns the names of the devices that begin with prefix.
func (c *Conn) Devices(prefix string) ([]string, error) {
	list, err := whole(c.h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("devices: %w", err)
	}
	var names []string
	for _, l := range list {
		if name := l.Attrs().Name; strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

// Traffic is what a device has counted since it was made.
type Traffic struct{ RxPackets, RxBytes, RxDropped, TxPackets, TxBytes, TxDropped uint64 }

// Traffic returns the counters of a device.
func (c *Conn) Traffic(name string) (Traffic, error) {
	l, err := c.h.LinkByName(name)
	if err != nil {
		return Traffic{}, deviceError(name, err)
	}
	s := l.Attrs().Statistics
	if s == nil {
		return Traffic{}, fmt.Errorf("device %q counts nothing", name)
	}
	return Traffic{s.RxPackets, s.RxBytes, s.RxDropped, s.TxPackets, s.TxBytes, s.TxDropped}, nil
}

// DeleteDevice takes a device away; one that is not there is no error. It takes some 30 ms, during which nobody else can change devices:
// let go of the namespace instead where that does as well.
func (c *Conn) DeleteDevice(name string) error {
	l, err := c.h.LinkByName(name)
	if err == nil {
		err = c.h.LinkDel(l)
	}
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); err != nil && !gone && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete device %q: %w", name, err)
	}
	return nil
}

// SetMTU sets the largest packet of a device, in bytes of IP.
func (c *Conn) SetMTU(name string, mtu int) error {
	l, err := c.h.LinkByName(name)
	if err != nil {
		return deviceError(name, err)
	}
	if err := c.h.LinkSetMTU(l, mtu); err != nil {
		return fmt.Errorf("MTU %d of %s: %w", mtu, name, err)
	}
	return nil
}

// SetMAC gives a device a hardware address.
func (c *Conn) SetMAC(name string, mac [6]byte) error {
	l, err := c.h.LinkByName(name)
	if err != nil {
		return deviceError(name, err)
	}
	if err := c.h.LinkSetHardwareAddr(l, mac[:]); err != nil {
		return fmt.Errorf("hardware address of %s: %w", name, err)
	}
	return nil
}

// SetNeighbor fixes the hardware address of a neighbour, which is then not asked for.
func (c *Conn) SetNeighbor(index int, addr netip.Addr, mac [6]byte) error {
	err := c.h.NeighSet(&netlink.Neigh{LinkIndex: index, IP: addr.AsSlice(), HardwareAddr: net.HardwareAddr(mac[:]), State: netlink.NUD_PERMANENT})
	if err != nil {
		return fmt.Errorf("neighbour %s: %w", addr, err)
	}
	return nil
}

// SetSilentAddress gives a device an address that nothing is sent from or asked with (scope host). A device that loses its last address
// loses its routes too; one with a silent address keeps them.
func (c *Conn) SetSilentAddress(index int, p netip.Prefix) error {
	a := kernelAddress(p)
	a.Scope = unix.RT_SCOPE_HOST
	if err := c.h.AddrReplace(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: index}}, a); err != nil {
		return fmt.Errorf("set address %s: %w", p, err)
	}
	return nil
}

// AddMACVLAN makes a device of a namespace which shares a network card of this one under a hardware address of its own. The two, and
// those of its kind, can talk to each other, but not to the card itself.
func (c *Conn) AddMACVLAN(card string, to End) error {
	return c.addOn(card, to, func(a netlink.LinkAttrs) netlink.Link {
		return &netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_BRIDGE}
	})
}

// AddVLAN makes a device of a namespace which is one VLAN (802.1Q) of a network card of this one. id is 1 to 4094.
func (c *Conn) AddVLAN(card string, id int, to End) error {
	return c.addOn(card, to, func(a netlink.LinkAttrs) netlink.Link {
		return &netlink.Vlan{LinkAttrs: a, VlanId: id, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}
	})
}

func (c *Conn) addOn(card string, to End, make func(netlink.LinkAttrs) netlink.Link) error {
	p, err := c.h.LinkByName(card)
	if err != nil {
		return deviceError(card, err)
	}
	a := netlink.NewLinkAttrs()
	a.Name, a.ParentIndex, a.Namespace = to.Name, p.Attrs().Index, netlink.NsFd(to.In.h)
	if err := c.h.LinkAdd(make(a)); err != nil {
		return fmt.Errorf("%s on %s: %w", to.Name, card, err)
	}
	return nil
}
