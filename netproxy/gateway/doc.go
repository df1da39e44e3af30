// Package gateway is a member of gateway pairs on one node: the foot that a tenant's functions have in the tenant's network.
//
// Each pair has a network namespace on each of its two nodes, with a cable to the node, through which the tunnels of package tunnel
// come, and a NIC in the tenant's subnet (ENI), which an ENIProvider makes. What a function sends leaves with the pair's own address in the
// subnet (HAVIP) as its source. The HAVIPs of all pairs, and the addresses that tunnels lead to, are on that one of the two
// nodes which package havip says is master, and package ctsync keeps the connection tables of each pair the same on both.
//
// Ensure and Remove are the control path: they take tens of milliseconds, or as long as a provider needs, and no instance waits for
// them. Namespaces outlive the process, so that a restart adopts what is there without touching traffic.
//
// Scale decides when a subnet needs another pair, or one less; Drain empties one without breaking its connections.
package gateway
