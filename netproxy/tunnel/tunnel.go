package tunnel

import (
	"errors"
	"net/netip"
)

// What callers branch on.
var (
	// ErrUnsupported says that this machine lacks something that the driver needs; the text says what.
	ErrUnsupported = errors.New("not supported here")
	// ErrInvalid says that an argument makes no sense; nothing was changed.
	ErrInvalid = errors.New("invalid")
)

// Key is a VPC on the wire: the key of GRE (32 bits) or the network identifier of VXLAN (24 bits). Never 0.
type Key uint32

// Driver is a way to carry packets. Both ends of a tunnel must use ones that speak the same.
type Driver string

// The drivers, in the order of preference.
const (
	Ebpf       Driver = "ebpf"        // GRE with key, by a program alone: needs no module
	EbpfIPIP   Driver = "ebpf-ipip"   // IP in IP, by a program alone. It has no key: a pair's outer address must belong to one VPC
	KernelGRE  Driver = "kernel-gre"  // GRE with key, by the kernel's device; needs the modules gre and ip_gre
	KernelIPIP Driver = "kernel-ipip" // IP in IP, by the kernel's device; needs the module ipip
	VXLAN      Driver = "vxlan"       // for networks that pass only UDP and TCP; needs the module vxlan
)

// Drivers are all there are, in the order of preference.
func Drivers() []Driver { return []Driver{Ebpf, KernelGRE, VXLAN, EbpfIPIP, KernelIPIP} }

// Overhead is what the driver adds to each packet, in bytes: the MTU inside is that of the network between the nodes less this.
func (d Driver) Overhead() int {
	switch d {
	case Ebpf, KernelGRE:
		return 28 // IPv4, GRE, key
	case EbpfIPIP, KernelIPIP:
		return 20
	case VXLAN:
		return 50 // IPv4, UDP, VXLAN, Ethernet
	}
	return 0
}

// Config is what both ends need to know.
type Config struct {
	Driver Driver // "" = Ebpf
	Device string // towards the other nodes: an Ethernet-like device of this namespace

	// Local is the node's own address there. On a worker it is where pairs send answers to, and nothing for another
	// address is looked at. A member leaves it out: each of its tenants has an address of its own.
	Local netip.Addr

	// Pin is a folder in which the kernel keeps the state from one process to the next. It is made if it is not there, and must be
	// on a file system of type bpf, which MountPins can mount. "" = the state ends with the process and the devices.
	Pin string

	// Flows is the size of a worker's table of flows, which keeps old flows on their pair when pairs come and go: twice as
	// many as are expected. The least recently used entry makes room. 0 = 65,536 (about 6 MiB).
	Flows int

	// forgetful leaves the table of flows out, as a control in tests.
	forgetful bool
}

// Pair is a gateway pair as a worker sees it.
type Pair struct {
	ID       uint32     // of this pair for good, never 0
	Outer    netip.Addr // its address on the network between the nodes, IPv4, which moves between its two members
	Draining bool       // takes no new flows
}

// Slot is where an instance is plugged in: the node's end of a cable into its namespace.
type Slot struct {
	Device int        // index of the node's end
	Inner  netip.Addr // IPv4, the only address that may come out of it
}

// Worker is the end of the tunnels on a node that runs instances. All methods may be called at the same time by several goroutines.
type Worker interface {
	// Plug makes the tunnel look at what comes out of a device, from now on and as long as the device exists. Until Attach nothing that
	// comes out of it goes anywhere. It takes the kernel's lock of network configuration: call it ahead of time.
	Plug(device int) error

	// SetPairs says which pairs a VPC has. The same again changes nothing. New flows of an instance go to the pair that it
	// falls to by rendezvous among those that are not draining; flows that are there stay on their pair for as long as that is listed.
	// None: the VPC's instances reach nothing.
	SetPairs(vpc Key, pairs []Pair) error

	// Attach connects a slot with a VPC, of which no pair need be known yet; two writes to maps. A slot that is attached already
	// is moved.
	Attach(slot Slot, vpc Key) error

	// Detach disconnects a slot; one that is not attached is no error. The device may be gone already.
	Detach(slot Slot) error

	// Slots returns what is attached, with the VPC of each; after a restart also what the last process attached.
	Slots() (map[Slot]Key, error)

	Stats() (Stats, error)

	// Close lets go of the tunnels. Traffic goes on if there is a Pin, and ends otherwise.
	Close() error
}

// Tenant is one pair's half on a gateway node. The pair's address tells pairs of one VPC apart.
type Tenant struct {
	VPC   Key
	Local netip.Addr // the pair's address on the network between the nodes, wherever it is at the moment
	Host  int        // index of the node's end of the cable into the tenant's namespace
}

// Peer is a worker as a member sees it.
type Peer struct {
	Outer  netip.Addr   // IPv4
	Prefix netip.Prefix // of the addresses of its instances, IPv4
}

// Member is the end of the tunnels on a gateway node. All methods may be called at the same time by several goroutines.
//
// What the tenant's namespace sends to a worker's prefix must come out of the cable: it needs a route for them into it, with an
// MTU that leaves room for Driver.Overhead, and a neighbour entry (any hardware address will do).
type Member interface {
	// AddTenant connects the cable with the VPC. The same again changes nothing; with another Host the tenant is moved there.
	AddTenant(Tenant) error

	// RemoveTenant takes it away; one that is not there is no error. Its devices are the caller's.
	RemoveTenant(vpc Key, local netip.Addr) error

	// Tenants returns those that are there; after a restart also those of the last process.
	Tenants() ([]Tenant, error)

	// SetWorkers says which workers may send for a VPC from which prefixes, and where answers to those go. It replaces what was
	// said before; none forgets the VPC.
	SetWorkers(vpc Key, workers []Peer) error

	Stats() (Stats, error)

	// Close lets go of the tunnels. Traffic goes on if there is a Pin, and ends otherwise.
	Close() error
}

// Counter counts packets and their bytes without outer headers; several segments that the kernel carries as one packet are one.
type Counter struct{ Packets, Bytes uint64 }

// Stats is what an end has carried and dropped since its maps were made.
type Stats struct {
	Out, In Counter           // into tunnels, and out of them
	Drops   map[Reason]uint64 // packets, all reasons with their counts
}

// Reason is why a packet was dropped.
type Reason string

// The reasons.
const (
	NotIPv4     Reason = "not_ipv4"     // ARP, IPv6 and others out of an instance or a tenant
	Spoofed     Reason = "spoofed"      // an inner source address that is not the sender's
	NoPair      Reason = "no_pair"      // the VPC has no pair
	NoWorker    Reason = "no_worker"    // no worker has the address that a tenant answers to
	NoInstance  Reason = "no_instance"  // no instance of this node has the address
	UnknownPeer Reason = "unknown_peer" // from somebody who is no pair of the VPC, or with a key that nobody has
	Fragment    Reason = "fragment"     // of a tunnel packet: the key is in the first one alone
	Malformed   Reason = "malformed"    // too short, GRE with other flags than the key, options in the outer header, not IPv4 inside
	Congested   Reason = "congested"    // was marked by the network on the way, but its sender does not know such marks (RFC 6040)
	Failed      Reason = "failed"       // the kernel could not change the packet
)
