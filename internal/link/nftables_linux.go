package link

import (
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// rulesPatience bounds each exchange with nftables.
const rulesPatience = 10 * time.Second

// Rules speaks to the namespace's nftables. The library waits for an answer to each message of a batch, and a kernel that has no nftables, or no
// table of that kind, gives one for all: without a bound that is for ever.
func (n *Namespace) Rules() (*nftables.Conn, error) {
	bounded := func(c *netlink.Conn) error { return c.SetReadDeadline(time.Now().Add(rulesPatience)) }
	c, err := nftables.New(nftables.WithNetNSFd(n.Fd()), nftables.WithSockOptions(bounded))
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	return c, nil
}
