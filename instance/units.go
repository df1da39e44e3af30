package instance

import (
	"github.com/thawrun/thaw/instance/sandbox"
	"github.com/thawrun/thaw/internal/placement"
)

// unknownUnits is how many units a machine has whose memory is not known.
const unknownUnits = 1000

// unitsHere works out how many units of instances this machine takes, and says what bounds it.
func (a *Agent) unitsHere() (n int, bound string) {
	node := machineResources()
	if node.Memory == 0 {
		node.Memory = unknownUnits * placement.UnitMemory
	}
	node.Ports, node.Addresses = int64(a.cfg.LastPort-a.cfg.FirstPort+1), sandbox.MaxSandboxes
	return unitsOf(node, a.caps.OwnNetwork)
}

// unitsOf is unitsHere for a node. A tenth of its memory is not for instances: below that memory counts as short.
func unitsOf(node placement.Resources, ownNetwork bool) (n int, bound string) {
	node.Memory -= node.Memory / leastAvailable
	if n, bound = placement.Units(node, unit(ownNetwork)); bound == "" {
		bound = "what can be counted"
	}
	return max(n, 1), bound
}

// unit is what goes with the memory of one unit: the threads of an idle program, our descriptors (socket, process, network), and a
// port or, for those with a network of their own, a range of user ids.
func unit(ownNetwork bool) placement.Resources {
	one := placement.Resources{Memory: placement.UnitMemory, Pids: 8, Descriptors: 4}
	if ownNetwork {
		one.Addresses = 1
	} else {
		one.Ports = 1
	}
	return one
}
