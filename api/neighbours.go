package api

import (
	"fmt"
	"slices"
)

// Neighbours are the objects that a VPC, Subnet, Gateway or ElasticIP has to get on with: those of its namespace, and the elastic IPs
// of all of them.
type Neighbours struct {
	VPCs       []*VPC
	Subnets    []*Subnet
	Gateways   []*Gateway
	ElasticIPs []*ElasticIP
	Revisions  []*Revision
}

// Add puts o where it belongs; what is no neighbour is left out.
func (n *Neighbours) Add(o Object) {
	switch o := o.(type) {
	case *VPC:
		n.VPCs = append(n.VPCs, o)
	case *Subnet:
		n.Subnets = append(n.Subnets, o)
	case *Gateway:
		n.Gateways = append(n.Gateways, o)
	case *ElasticIP:
		n.ElasticIPs = append(n.ElasticIPs, o)
	case *Revision:
		n.Revisions = append(n.Revisions, o)
	}
}

// NeighbourKinds are the kinds that Neighbours holds.
var NeighbourKinds = []*Kind{VPCs, Subnets, Gateways, ElasticIPs, Revisions}

// Conflicts returns what keeps o, which Validate has found nothing wrong with, from standing beside its neighbours. It may be among
// them in an older form.
func (n *Neighbours) Conflicts(o Object) Errors {
	var errs Errors
	r := report{errs: &errs}.at("spec")
	switch o := o.(type) {
	case *VPC:
		n.vpc(r, o)
	case *Subnet:
		n.subnet(r, o)
	case *Gateway:
		n.gateway(r, o)
	case *ElasticIP:
		n.elasticIP(r, o)
	}
	return errs.tidy()
}

func (n *Neighbours) vpc(r report, o *VPC) {
	for _, s := range n.Subnets {
		if s.Namespace == o.Namespace && s.Spec.VPC == o.Name && !within(s.Spec.CIDR, o.Spec.CIDRs) {
			r.at("cidrs").generic(fmt.Sprintf("subnet %s has %s, which would lie outside", s.Name, s.Spec.CIDR))
		}
	}
}

func (n *Neighbours) subnet(r report, o *Subnet) {
	vpc := n.VPC(o.Namespace, o.Spec.VPC)
	if vpc == nil {
		r.at("vpc").invalidWhy(o.Spec.VPC, fmt.Sprintf("there is no such VPC in namespace %s: create it first", o.Namespace))
		return
	}
	if !within(o.Spec.CIDR, vpc.Spec.CIDRs) {
		r.at("cidr").invalidWhy(o.Spec.CIDR, fmt.Sprintf("VPC %s has %v", vpc.Name, vpc.Spec.CIDRs))
	}
	if other := n.Overlap(o, func(*Subnet) bool { return true }); other != nil {
		r.at("cidr").invalidWhy(o.Spec.CIDR, fmt.Sprintf("it overlaps with %s of subnet %s in the same VPC", other.Spec.CIDR, other.Name))
	}
}

// Overlap returns another subnet of o's VPC that shares addresses with it and that counts; nil if there is none.
func (n *Neighbours) Overlap(o *Subnet, counts func(*Subnet) bool) *Subnet {
	network, wrong := parseCIDR(o.Spec.CIDR)
	if wrong != "" {
		return nil
	}
	for _, s := range n.Subnets {
		if s.Namespace != o.Namespace || s.Name == o.Name || s.Spec.VPC != o.Spec.VPC || !counts(s) {
			continue
		}
		if p, wrong := parseCIDR(s.Spec.CIDR); wrong == "" && p.Overlaps(network) {
			return s
		}
	}
	return nil
}

func (n *Neighbours) gateway(r report, o *Gateway) {
	s := n.Subnet(o.Namespace, o.Spec.Subnet)
	if s == nil {
		r.at("subnet").invalidWhy(o.Spec.Subnet, noSubnet(o.Namespace))
		return
	}
	for _, g := range n.Gateways {
		if g.Namespace == o.Namespace && g.Spec.Subnet == o.Spec.Subnet && g.Name != o.Name {
			r.at("subnet").invalidWhy(o.Spec.Subnet, "it has the gateway "+g.Name+" already: one pair carries all of a subnet's addresses")
			return
		}
	}
}

func noSubnet(namespace string) string {
	return fmt.Sprintf("there is no such subnet in namespace %s: create it first", namespace)
}

func (n *Neighbours) elasticIP(r report, o *ElasticIP) {
	for _, e := range n.ElasticIPs {
		if e.Spec.Address == o.Spec.Address && (e.Name != o.Name || e.Namespace != o.Namespace) {
			r.at("address").invalidWhy(o.Spec.Address, fmt.Sprintf("elastic IP %s of namespace %s has it", e.Name, e.Namespace))
			return
		}
	}
	if o.Spec.Subnet == "" {
		return
	}
	s := n.Subnet(o.Namespace, o.Spec.Subnet)
	if s == nil {
		r.at("subnet").invalidWhy(o.Spec.Subnet, noSubnet(o.Namespace))
		return
	}
	known := s.Status.HAVIPs
	if len(known) == 0 {
		known = s.Spec.HAVIPs
	}
	if o.Spec.HAVIP != "" && !slices.Contains(known, o.Spec.HAVIP) {
		r.at("havip").invalidWhy(o.Spec.HAVIP, fmt.Sprintf("subnet %s has %v", o.Spec.Subnet, known))
		return
	}
	for _, e := range n.ElasticIPs {
		if e.Name != o.Name && e.Namespace == o.Namespace && e.Spec.Subnet == o.Spec.Subnet && bound(e, known) == bound(o, known) {
			r.at("subnet").invalidWhy(o.Spec.Subnet, "the elastic IP "+e.Name+" is bound to its address "+bound(o, known))
			return
		}
	}
}

// bound is the HAVIP that an elastic IP of a subnet with these HAVIPs is bound to; "" if they are not known yet.
func bound(e *ElasticIP, havips []string) string {
	if e.Spec.HAVIP != "" || len(havips) == 0 {
		return e.Spec.HAVIP
	}
	return havips[0]
}

// VPC finds a VPC; nil if there is none.
func (n *Neighbours) VPC(namespace, name string) *VPC {
	for _, v := range n.VPCs {
		if v.Namespace == namespace && v.Name == name {
			return v
		}
	}
	return nil
}

// Subnet finds a subnet by VPC/SUBNET; nil if there is none.
func (n *Neighbours) Subnet(namespace, ref string) *Subnet {
	for _, s := range n.Subnets {
		if s.Namespace == namespace && s.Ref() == ref {
			return s
		}
	}
	return nil
}

// Users names the objects that cannot do without o, as "subnet a" and "revision b", sorted; none when it may go.
func (n *Neighbours) Users(o Object) []string {
	var users []string
	add := func(k *Kind, u Object) {
		if u.Meta().Namespace == o.Meta().Namespace {
			users = append(users, k.Singular+" "+u.Meta().Name)
		}
	}
	revisions := func(ref string, uses func(*Revision) bool) {
		for _, r := range n.Revisions {
			if r.Annotations[AnnotationSubnet] == ref && uses(r) {
				add(Revisions, r)
			}
		}
	}
	any := func(*Revision) bool { return true }
	switch o := o.(type) {
	case *VPC:
		for _, s := range n.Subnets {
			if s.Spec.VPC == o.Name {
				add(Subnets, s)
			}
		}
	case *Subnet:
		revisions(o.Ref(), any)
		for _, e := range n.ElasticIPs {
			if e.Spec.Subnet == o.Ref() {
				add(ElasticIPs, e)
			}
		}
		for _, g := range n.Gateways {
			if g.Spec.Subnet == o.Ref() && len(g.OwnerReferences) == 0 { // the platform's own one goes with the subnet
				add(Gateways, g)
			}
		}
	case *Gateway:
		revisions(o.Spec.Subnet, any)
	case *ElasticIP:
		if o.Spec.Subnet != "" {
			revisions(o.Spec.Subnet, func(r *Revision) bool { return r.Egress() == EgressFixed })
		}
	}
	slices.Sort(users)
	return users
}

// within says whether a network lies in one of some, or there are none.
func within(network string, in []string) bool {
	p, wrong := parseCIDR(network)
	if wrong != "" || len(in) == 0 {
		return wrong == ""
	}
	return slices.ContainsFunc(in, func(s string) bool {
		q, wrong := parseCIDR(s)
		return wrong == "" && q.Bits() <= p.Bits() && q.Contains(p.Addr())
	})
}

// AllocateHAVIPs returns the addresses that functions in the subnet are seen under: those that its spec names, else its highest
// one that is not its router's. nil when its CIDR cannot be read.
func (s *Subnet) AllocateHAVIPs() []string {
	if len(s.Spec.HAVIPs) > 0 {
		return slices.Clone(s.Spec.HAVIPs)
	}
	network, wrong := parseCIDR(s.Spec.CIDR)
	if wrong != "" {
		return nil
	}
	a := lastAddr(network).Prev()
	if a.String() == s.Spec.Gateway {
		a = a.Prev() // a network has two hosts at least
	}
	return []string{a.String()}
}
