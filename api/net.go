package api

import (
	"encoding/binary"
	"net/netip"
	"strings"
)

// NetV1alpha1 is the version of the objects that describe tenants' networks.
const NetV1alpha1 = NetGroup + "/v1alpha1"

// VPC is a tenant's private network: what is inside one never meets what is inside another, whatever the addresses. It belongs to
// a namespace, as the functions do that may join it.
type VPC struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       VPCSpec   `json:"spec,omitzero"`
	Status     VPCStatus `json:"status,omitzero"`
}

// VPCSpec bounds the addresses of a VPC.
type VPCSpec struct {
	CIDRs []string `json:"cidrs,omitempty"` // IPv4 ranges that its subnets lie in; empty = any
}

// VPCStatus is the state of a VPC.
type VPCStatus struct {
	Status  `json:",inline"`
	Subnets []string `json:"subnets,omitempty"` // names, sorted
}

// Subnet is a part of a VPC that functions reach through one pair of gateways.
type Subnet struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       SubnetSpec   `json:"spec,omitzero"`
	Status     SubnetStatus `json:"status,omitzero"`
}

// SubnetSpec never changes: what it says is built into the gateways and known to the tenant's firewalls.
type SubnetSpec struct {
	VPC     string   `json:"vpc,omitempty"`     // name of a VPC in the same namespace
	CIDR    string   `json:"cidr,omitempty"`    // its addresses, as 10.0.1.0/24
	Gateway string   `json:"gateway,omitempty"` // the tenant's own router, to what lies outside CIDR; empty = nothing outside is reached
	ENI     ENI      `json:"eni,omitzero"`
	HAVIPs  []string `json:"havips,omitempty"` // addresses in CIDR that functions are seen under; empty = the highest free one
	// Pairs is how many pairs of gateways there may be when there is much to carry; 0 = 1. The HAVIPs are dealt out to them: each has at least one.
	Pairs int32 `json:"pairs,omitempty"`
}

// ENI is how a gateway gets into the subnet: by a bridge of its node, or by a NIC of its node, with a VLAN or a macvlan device on it.
type ENI struct {
	Bridge  string `json:"bridge,omitempty"`
	Device  string `json:"device,omitempty"`
	VLAN    int32  `json:"vlan,omitempty"`
	Macvlan bool   `json:"macvlan,omitempty"`
}

// SubnetStatus is the state of a subnet.
type SubnetStatus struct {
	Status  `json:",inline"`
	Key     int64    `json:"key,omitempty"`     // what its packets carry in tunnels: 1 to 2^32-1, of no other subnet; 0 = none yet
	HAVIPs  []string `json:"havips,omitempty"`  // addresses that functions are seen under
	Gateway string   `json:"gateway,omitempty"` // name of its Gateway; empty = no function needs one
}

// Gateway is a pair of gateways between functions and one subnet: two members, of which one carries the traffic and the other
// has a copy of its connections. The platform makes one with the first function of a subnet.
type Gateway struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       GatewaySpec   `json:"spec,omitzero"`
	Status     GatewayStatus `json:"status,omitzero"`
}

// GatewaySpec never changes.
type GatewaySpec struct {
	Subnet string   `json:"subnet,omitempty"` // VPC/SUBNET, of the same namespace
	Nodes  []string `json:"nodes,omitempty"`  // names of the two nodes of its members; empty = the platform chooses
}

// GatewayStatus is the state of a pair.
type GatewayStatus struct {
	Status    `json:",inline"`
	ID        int64           `json:"id,omitempty"`        // of no other pair; 0 = none yet
	Key       int64           `json:"key,omitempty"`       // of its subnet
	Address   string          `json:"address,omitempty"`   // on the underlay; tunnels lead there, it moves between the members as HAVIPs do
	HAVIPs    []string        `json:"havips,omitempty"`    // in the subnet
	State     string          `json:"state,omitempty"`     // one of the Pair constants
	Driver    string          `json:"driver,omitempty"`    // of the tunnels
	MTU       int64           `json:"mtu,omitempty"`       // of functions, bytes
	Members   []GatewayMember `json:"members,omitempty"`   // two
	Pairs     []GatewayPair   `json:"pairs,omitempty"`     // where the subnet may have several: all there are; the first is the one that ID and Members are about
	IdleSince *Time           `json:"idleSince,omitempty"` // when the last function of the subnet went; absent = there are some
}

// GatewayPair is one of several pairs.
type GatewayPair struct {
	ID      int64    `json:"id,omitempty"`
	Address string   `json:"address,omitempty"` // on the underlay
	HAVIPs  []string `json:"havips,omitempty"`
	State   string   `json:"state,omitempty"` // one of the Pair constants
}

// GatewayMember is one half of a pair.
type GatewayMember struct {
	Node    string `json:"node,omitempty"`
	State   string `json:"state,omitempty"` // one of the Pair constants
	Role    string `json:"role,omitempty"`  // RoleMaster or RoleBackup; empty = not known
	Message string `json:"message,omitempty"`
}

// States of a pair and of its members.
const (
	PairCreating = "creating" // being made, or not what it should be
	PairActive   = "active"   // complete: it carries traffic, or can take it over at once
	PairDraining = "draining" // takes no new flows
)

// Roles of a member.
const (
	RoleMaster = "master"
	RoleBackup = "backup"
)

// ElasticIP is a public address that one HAVIP is translated to, and from, outside the subnet: the tenant's servers of other networks
// see functions under it.
type ElasticIP struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       ElasticIPSpec   `json:"spec,omitzero"`
	Status     ElasticIPStatus `json:"status,omitzero"`
}

// ElasticIPSpec binds an address to a subnet.
type ElasticIPSpec struct {
	Address string `json:"address,omitempty"` // IPv4; never changes
	Subnet  string `json:"subnet,omitempty"`  // VPC/SUBNET, of the same namespace; empty = bound to nothing
	HAVIP   string `json:"havip,omitempty"`   // of the subnet; empty = its first
}

// ElasticIPStatus is the state of an elastic IP.
type ElasticIPStatus struct {
	Status `json:",inline"`
	HAVIP  string `json:"havip,omitempty"` // what it is bound to; empty = nothing
}

// Ways of a function to the world outside of its VPC: the values of AnnotationEgress.
const (
	EgressNone   = "none"
	EgressShared = "shared" // the node's address, shared with other tenants
	EgressFixed  = "fixed"  // the ElasticIP of its subnet
)

// SplitSubnet splits VPC/SUBNET. ok is false when s is not that.
func SplitSubnet(s string) (vpc, subnet string, ok bool) {
	vpc, subnet, _ = strings.Cut(s, "/")
	ok = checkDNS1035(vpc) == nil && checkDNS1035(subnet) == nil
	return vpc, subnet, ok
}

// Subnet is the subnet that the revision's functions join; ok is false when they join none.
func (r *Revision) Subnet() (vpc, subnet string, ok bool) {
	return SplitSubnet(r.Annotations[AnnotationSubnet])
}

// Egress is the revision's way to the world outside: one of the Egress constants.
func (r *Revision) Egress() string {
	if v := r.Annotations[AnnotationEgress]; v != "" {
		return v
	}
	return EgressNone
}

// Ref is VPC/SUBNET, as annotations and other objects name the subnet.
func (s *Subnet) Ref() string { return s.Spec.VPC + "/" + s.Name }

// Master is the node of the member that carries the traffic; "" when there is none, or not one.
func (g *Gateway) Master() (node string) {
	for _, m := range g.Status.Members {
		if m.Role == RoleMaster {
			if node != "" {
				return ""
			}
			node = m.Node
		}
	}
	return node
}

// parseCIDR reads an IPv4 network in its one spelling: no bits beside the mask, at least four addresses.
func parseCIDR(s string) (p netip.Prefix, wrong string) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || !p.Addr().Is4():
		return p, "expected an IPv4 network such as 10.0.1.0/24"
	case p.Masked() != p:
		return p, "its address has bits beside the mask: did you mean " + p.Masked().String() + "?"
	case p.Bits() < 8 || p.Bits() > 30:
		return p, "a network has a mask of 8 to 30 bits"
	}
	for _, r := range reservedNetworks {
		if r.network.Overlaps(p) {
			return p, "it overlaps with " + r.network.String() + ", " + r.use
		}
	}
	return p, ""
}

// reservedNetworks can be no network of a tenant: a packet to such an address would not leave the function, or not come back to it.
var reservedNetworks = []struct {
	network netip.Prefix
	use     string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "which has no hosts"},
	{netip.MustParsePrefix("100.64.0.0/10"), "which functions themselves have their addresses from"},
	{netip.MustParsePrefix("127.0.0.0/8"), "which is each machine itself"},
	{netip.MustParsePrefix("169.254.0.0/16"), "which is each link itself"},
	{netip.MustParsePrefix("224.0.0.0/3"), "which is multicast or reserved"},
}

// parseHost reads an address of a host in a network: neither its first nor its last one.
func parseHost(s string, network netip.Prefix) (a netip.Addr, wrong string) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil || !a.Is4():
		return a, "expected an IPv4 address"
	case !network.Contains(a):
		return a, "it lies outside " + network.String()
	case a == network.Addr():
		return a, "it is the network address of " + network.String()
	case a == lastAddr(network):
		return a, "it is the broadcast address of " + network.String()
	}
	return a, ""
}

// lastAddr is the broadcast address of an IPv4 network.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	n := binary.BigEndian.Uint32(b[:]) | uint32(1<<(32-p.Bits())-1)
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}
