package ctsync

import (
	"fmt"
	"net/netip"
	"time"
)

// Port is the UDP port on both sides unless the configuration says otherwise.
const Port = 3781

// Config is what a side needs to know. Both sides need the same key and port.
type Config struct {
	Device      string     // the peer is reached through this device only
	Local, Peer netip.Addr // IPv4
	Port        int        // 0 = Port
	Key         []byte     // signs all datagrams; none = they are believed as they come
	// Virtual are addresses that move between the two: connections to them are replicated though they are the router's own.
	Virtual []netip.Addr
	// Thread is called once on the thread that does all the work, to give it its priority. May be nil.
	Thread func()
}

// Validate fills in what is left out and reports what is wrong.
func (c *Config) Validate() error {
	if c.Port == 0 {
		c.Port = Port
	}
	switch {
	case c.Device == "":
		return fmt.Errorf("sync: no device")
	case !c.Local.Is4() || !c.Peer.Is4() || c.Local == c.Peer:
		return fmt.Errorf("sync: needs two different IPv4 addresses, not %s and %s", c.Local, c.Peer)
	case c.Port < 1 || c.Port > 65535:
		return fmt.Errorf("sync: port %d", c.Port)
	}
	return nil
}

// State is what a side knows.
type State struct {
	Full    bool      // everything that the peer had is here
	Heard   time.Time // of the peer, last; zero: never
	Term    uint64    // the highest that the peer or we named
	Entries int       // of our table, all that the kernel counts; at most a second old
	Stats   Stats
}
