package tunnel

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/thawrun/thaw/internal/link"
)

// Priorities of the programs on a device towards the other nodes, which may be both a worker's and a member's.
const (
	workerPriority = 100
	memberPriority = 101
)

// vxlanPort is IANA's, not the older one that Linux takes when it is not told any.
const vxlanPort = 4789

// device returns the device that tunnel packets leave by and come in at: the one towards the other nodes, unless the driver has one of
// the kernel's for the tunnel.
func device(c *link.Conn, cfg Config) (int, error) {
	d, err := c.Device(cfg.Device)
	if err != nil {
		return 0, fmt.Errorf("tunnel: %w", err)
	}
	if !cfg.Driver.device() {
		return d.Index, nil
	}
	kind := map[Driver]string{KernelGRE: "gre", KernelIPIP: "ipip", VXLAN: "vxlan"}[cfg.Driver]
	index, err := c.AddTunnel("thaw-"+kind, kind, vxlanPort)
	if errors.Is(err, errors.ErrUnsupported) {
		err = fmt.Errorf("%w: %w", err, ErrUnsupported)
	}
	if err != nil {
		return 0, fmt.Errorf("tunnel: %w", err)
	}
	return index, nil
}

// programs are those of one end: on the device where tunnel packets come in, and on cables.
type programs struct{ uplink, cable *ebpf.Program }

func (p *programs) close() {
	for _, x := range []*ebpf.Program{p.uplink, p.cable} {
		if x != nil {
			x.Close()
		}
	}
}
