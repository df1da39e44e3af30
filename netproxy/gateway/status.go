package gateway

import (
	"github.com/thawrun/thaw/netproxy/ctsync"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// Status is what a node answers at its status socket.
type Status struct {
	Name    string        `json:"name"`
	Role    havip.Role    `json:"role"`
	Reason  string        `json:"reason"`
	Term    uint64        `json:"term"`
	Full    bool          `json:"full"`
	Refused uint64        `json:"refused"` // adverts that were malformed, unsigned or old
	Pairs   []PairStatus  `json:"pairs"`
	ENIs    uint64        `json:"eniCalls"`         // of the ENI provider, since the node began
	Tunnel  *tunnel.Stats `json:"tunnel,omitempty"` // what the tunnels carried and dropped
}

// PairStatus is what is known of one half of a pair.
type PairStatus struct {
	Name        string            `json:"name"`
	ID          uint32            `json:"id"`
	Gate        string            `json:"gate"`              // open, full (of the quota), draining, closed
	Drained     bool              `json:"drained,omitempty"` // it drains, and no connection is left
	Link        bool              `json:"link"`              // of the ENI
	Full        bool              `json:"full"`              // the table is, as far as the peer's is known
	InStep      bool              `json:"inStep"`            // and the peer, which replicates it, is heard
	Connections int               `json:"connections"`
	NoPort      uint64            `json:"noPort"` // connections that found no free port of a HAVIP
	Packets     map[string]uint64 `json:"packets"`
	Load        Load              `json:"load"`
	Replication *ctsync.Stats     `json:"replication,omitempty"`
}
