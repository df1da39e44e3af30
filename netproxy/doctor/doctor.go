// Package doctor finds out what a machine can do for tenants' networks, by trying each thing in network namespaces that it makes and throws
// away. What it cannot try it says so: nothing is guessed from versions or lists of modules.
package doctor

import (
	"net"

	"github.com/thawrun/thaw/netproxy/tunnel"
)

// State is the outcome of one try.
type State string

// The outcomes.
const (
	Works    State = "works"
	Missing  State = "missing"
	NotTried State = "not tried"
)

// Finding is one thing that was tried.
type Finding struct {
	What  string `json:"what"`
	For   string `json:"for"` // what needs it
	State State  `json:"state"`
	Why   string `json:"why,omitempty"` // when it does not work
}

// Driver is a driver of tunnels.
type Driver struct {
	Name     tunnel.Driver `json:"name"`
	State    State         `json:"state"`
	Why      string        `json:"why,omitempty"`
	Overhead int           `json:"overhead"` // bytes of each packet
}

// Path is what packets of functions can be long if tunnels go by a device.
type Path struct {
	Device string `json:"device"`
	MTU    int    `json:"mtu"`    // of the device, bytes
	Inside int    `json:"inside"` // of functions, with the chosen driver
	MSS    int    `json:"mss"`    // of their TCP connections
}

// Report is all of it.
type Report struct {
	Features []Finding     `json:"features"`
	Drivers  []Driver      `json:"drivers"`          // in the order of preference
	Chosen   tunnel.Driver `json:"chosen,omitempty"` // the first that works; "" = none
	Paths    []Path        `json:"paths"`
}

// tcpHeaders are what IPv4 and TCP without options take of a packet.
const tcpHeaders = 40

// paths are the devices that tunnels can go by. Without a driver that works they are measured with the preferred one.
func paths(chosen tunnel.Driver) ([]Path, error) {
	if chosen == "" {
		chosen = tunnel.Drivers()[0]
	}
	devices, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var all []Path
	for _, d := range devices {
		if d.Flags&net.FlagLoopback != 0 || d.Flags&net.FlagUp == 0 || len(d.HardwareAddr) == 0 {
			continue
		}
		inside := d.MTU - chosen.Overhead()
		all = append(all, Path{d.Name, d.MTU, inside, inside - tcpHeaders})
	}
	return all, nil
}
