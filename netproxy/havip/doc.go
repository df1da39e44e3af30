// Package havip keeps a set of IPv4 addresses on exactly one of two routers, and moves them within tens of milliseconds when that one
// fails, with the connections that go through it. It takes the place of keepalived and conntrackd, and speaks the same VRRPv3
// (RFC 5798), so that a pair of it and keepalived works, though without the replication of connections.
//
// Engine is the rules: it is told what happens and what time it is, and says what to do. Run does it: one thread with real-time
// priority that sends and hears adverts, watches the devices, moves the addresses, and announces them by gratuitous ARP. Package
// ctsync replicates connections beside it. docs/netproxy.md says what happens when.
package havip
