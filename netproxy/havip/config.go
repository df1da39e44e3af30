package havip

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"
)

// Config is one member of a pair.
type Config struct {
	Router   int           // VRID, 1 to 255; the same on both
	Priority int           // 1 to 254; the higher one is master when both are well
	Advert   time.Duration // 10 ms to 40.95 s, in steps of 10 ms
	Stay     bool          // do not take over from a living master of lower priority
	// Settle is how long all links have to be there before it does: a switch port may come up long before it forwards. 0 to 10 min.
	Settle    time.Duration
	VIPs      []VIP // at least one
	Sync      Sync
	Replicate bool   // connections; without it, they break when the addresses move
	Key       []byte // signs adverts and replication; none = both are believed as they come
	// Status is the path of a Unix socket at which each connection gets a line of JSON; "" = none.
	Status string
	Out    io.Writer // a line for each change of role
}

// VIP is an address that moves, and the device it belongs to.
type VIP struct {
	Prefix netip.Prefix
	Device string
}

// ParseVIP reads ADDR/LEN@DEV.
func ParseVIP(s string) (VIP, error) {
	addr, dev, ok := strings.Cut(s, "@")
	p, err := netip.ParsePrefix(addr)
	if !ok || err != nil || !p.Addr().Is4() || !deviceName(dev) {
		return VIP{}, fmt.Errorf("%q is not ADDR/LEN@DEV with an IPv4 address, such as 10.0.0.10/24@eth0", s)
	}
	return VIP{p, dev}, nil
}

// Sync is the link to the peer for replication.
type Sync struct {
	Device      string
	Local, Peer netip.Addr
	Port        int // UDP, 0 = ctsync.Port
}

// ParseSync reads DEV,LOCAL,PEER.
func ParseSync(s string) (Sync, error) {
	part := strings.Split(s, ",")
	if len(part) == 3 && deviceName(part[0]) {
		local, err1 := netip.ParseAddr(part[1])
		peer, err2 := netip.ParseAddr(part[2])
		if err1 == nil && err2 == nil && local.Is4() && peer.Is4() && local != peer {
			return Sync{Device: part[0], Local: local, Peer: peer}, nil
		}
	}
	return Sync{}, fmt.Errorf("%q is not DEV,LOCAL,PEER with two IPv4 addresses, such as eth2,10.9.0.1,10.9.0.2", s)
}

// deviceName says whether a network device can be called that (IFNAMSIZ is 16 with the zero at the end).
func deviceName(s string) bool {
	return s != "" && len(s) < 16 && !strings.ContainsAny(s, "/ \t\n")
}

// Validate reports all that is wrong.
func (c *Config) Validate() error {
	var errs []error
	bad := func(is bool, format string, args ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	bad(c.Router < 1 || c.Router > 255, "router id %d: 1 to 255", c.Router)
	bad(c.Priority < 1 || c.Priority > 254, "priority %d: 1 to 254", c.Priority)
	bad(c.Advert < 10*time.Millisecond || c.Advert > MaxInterval || c.Advert%(10*time.Millisecond) != 0,
		"advert interval %s: 10ms to %s in steps of 10ms", c.Advert, MaxInterval)
	bad(c.Settle < 0 || c.Settle > 10*time.Minute, "settling time %s: 0 to 10m", c.Settle)
	bad(len(c.VIPs) == 0, "no address: give at least one --vip")
	bad(len(c.VIPs) > maxAddrs, "%d addresses: at most %d", len(c.VIPs), maxAddrs)
	seen := map[netip.Addr]bool{}
	for _, v := range c.VIPs {
		bad(seen[v.Prefix.Addr()], "address %s is given twice", v.Prefix.Addr())
		seen[v.Prefix.Addr()] = true
	}
	bad(c.Replicate && c.Sync.Device == "", "no link for replication: give --sync, or --replicate=false")
	bad(len(c.Key) > 0 && len(c.Key) < 16, "the key has %d bytes: at least 16", len(c.Key))
	return errors.Join(errs...)
}
