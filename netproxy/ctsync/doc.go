// Package ctsync keeps the connection tables of two routers the same, so that one can go on where the other stops: it replicates the
// events of the kernel's connection tracking (conntrack) to a peer, and enters there what the peer says.
//
// Each side is two streams. Its own events leave in numbered datagrams; a gap is answered by asking for the rest again, and what can
// no longer be sent again, by a full copy. Besides, a side copies the peer's whole table ("pull") when it starts, when the peer does, and
// every minute, and then takes away what the peer does not have, if the peer is the one in charge. A copy is acknowledged as it goes,
// so that it never outruns the side that enters it.
//
// Replicated are IPv4 entries for TCP, UDP and ICMP with addresses, translations of source and destination (NAT), zone, mark, status, time-out and
// the state of TCP. Not replicated: labels, helpers and what they expect, offsets of sequence numbers, counters, and entries whose
// original source or destination is an address of the router itself.
//
// Sync is one goroutine with a thread of its own. replica holds the rules and knows neither sockets nor clocks.
package ctsync
