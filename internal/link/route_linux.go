package link

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Route is a way to a destination: through a gateway, a device, or both.
type Route struct {
	To     netip.Prefix
	Via    netip.Addr // zero: To is on the device's own link
	Device string     // "": where Via is
	MTU    int        // 0: that of the device
}

// SetRoute adds a route to the main table, or replaces that to the same destination.
func (c *Conn) SetRoute(r Route) error {
	k := &netlink.Route{Dst: &net.IPNet{IP: r.To.Addr().AsSlice(), Mask: net.CIDRMask(r.To.Bits(), r.To.Addr().BitLen())}, MTU: r.MTU}
	if r.Via.IsValid() {
		k.Gw = r.Via.AsSlice()
	} else {
		k.Scope = netlink.SCOPE_LINK
	}
	if r.Device != "" {
		l, err := c.h.LinkByName(r.Device)
		if err != nil {
			return deviceError(r.Device, err)
		}
		k.LinkIndex = l.Attrs().Index
	}
	if err := c.h.RouteReplace(k); err != nil {
		return fmt.Errorf("route to %s: %w", r.To, err)
	}
	return nil
}
