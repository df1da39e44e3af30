package link

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Ingress is a program (eBPF, of type sched_cls) that every packet passes which comes into a device, before anything else of the
// kernel sees it.
type Ingress struct {
	Device   int    // index
	Name     string // for people
	Priority uint16 // of several programs on one device; lower ones run first
	Program  int    // descriptor
}

// SetIngress puts the program there, or in the place of the one with its priority: no packet passes between the two. It stays as long
// as the device.
func (c *Conn) SetIngress(in Ingress) error {
	q := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: in.Device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := c.h.QdiscAdd(q); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact on device %d: %w", in.Device, err)
	}
	f := in.filter()
	f.Fd, f.Name, f.DirectAction = in.Program, in.Name, true
	if err := c.h.FilterReplace(f); err != nil {
		return fmt.Errorf("program %s on device %d: %w", in.Name, in.Device, err)
	}
	return nil
}

// RemoveIngress takes the program with the priority of in off its device. It is no error if there is none.
func (c *Conn) RemoveIngress(in Ingress) error {
	err := c.h.FilterDel(in.filter())
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) { // EINVAL: no clsact
		return fmt.Errorf("program off device %d: %w", in.Device, err)
	}
	return nil
}

func (in Ingress) filter() *netlink.BpfFilter {
	return &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
		LinkIndex: in.Device, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: in.Priority,
	}}
}

// AddTunnel makes a tunnel device, switched on, that is told the other end with each packet, and returns its index. kind is gre, ipip, or
// vxlan, which uses the UDP port; one that is there already is taken. errors.ErrUnsupported: the kernel has none of that kind.
func (c *Conn) AddTunnel(name, kind string, port int) (int, error) {
	attrs := netlink.LinkAttrs{Name: name}
	var l netlink.Link
	switch kind {
	case "gre":
		l = &netlink.Gretun{LinkAttrs: attrs, FlowBased: true, Local: net.IPv4zero} // for the library: GRE over IPv4
	case "ipip":
		l = &netlink.Iptun{LinkAttrs: attrs, FlowBased: true}
	case "vxlan":
		l = &netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, Port: port}
	default:
		return 0, fmt.Errorf("tunnel device of kind %q: %w", kind, errors.ErrUnsupported)
	}
	switch err := c.h.LinkAdd(l); {
	case errors.Is(err, unix.EOPNOTSUPP):
		return 0, fmt.Errorf("tunnel device of kind %s: %w (the kernel lacks the module)", kind, errors.ErrUnsupported)
	case err != nil && !errors.Is(err, unix.EEXIST):
		return 0, fmt.Errorf("tunnel device of kind %s: %w", kind, err)
	}
	there, err := c.h.LinkByName(name)
	if err != nil {
		return 0, deviceError(name, err)
	}
	if there.Type() != l.Type() {
		return 0, fmt.Errorf("device %s is of kind %s, not %s", name, there.Type(), kind)
	}
	return there.Attrs().Index, c.SetUp(name, true)
}
