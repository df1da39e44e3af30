package api

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// Bounds of lists.
const (
	maxCIDRs  = 16 // of a VPC
	maxPairs  = 8  // of a subnet
	maxHAVIPs = 16 // of a subnet: each gives 64,512 ports to each address and port of the tenant's servers
)

func (v validator) vpc(r report, o *VPC) {
	v.metadata(r.at("metadata"), &o.ObjectMeta, false)
	r = r.at("spec").at("cidrs")
	if len(o.Spec.CIDRs) > maxCIDRs {
		r.generic(fmt.Sprintf("at most %d are taken", maxCIDRs))
		return
	}
	var seen []netip.Prefix
	for i, s := range o.Spec.CIDRs {
		p, wrong := parseCIDR(s)
		if wrong != "" {
			r.index("", i).invalidWhy(s, wrong)
			continue
		}
		if j := slices.IndexFunc(seen, p.Overlaps); j >= 0 {
			r.index("", i).invalidWhy(s, "it overlaps with "+seen[j].String())
		}
		seen = append(seen, p)
	}
}

func (v validator) subnet(r report, o, old *Subnet) {
	v.metadata(r.at("metadata"), &o.ObjectMeta, false)
	r = r.at("spec")
	if old != nil {
		v.unchanged(r, &o.Spec, &old.Spec)
		return // what is stored was measured then
	}
	v.nameOf(r.at("vpc"), o.Spec.VPC)
	v.eni(r.at("eni"), &o.Spec.ENI)
	if o.Spec.CIDR == "" {
		r.at("cidr").missing()
		return
	}
	network, wrong := parseCIDR(o.Spec.CIDR)
	if wrong != "" {
		r.at("cidr").invalidWhy(o.Spec.CIDR, wrong)
		return // the others are measured by it
	}
	if s := o.Spec.Gateway; s != "" {
		if _, wrong := parseHost(s, network); wrong != "" {
			r.at("gateway").invalidWhy(s, wrong)
		}
	}
	switch n := o.Spec.Pairs; {
	case n < 0 || n > maxPairs:
		r.at("pairs").invalidWhy(strconv.Itoa(int(n)), fmt.Sprintf("expected 0 to %d", maxPairs))
	case n > 1 && int(n) > len(o.Spec.HAVIPs):
		r.at("pairs").invalidWhy(strconv.Itoa(int(n)), "each pair needs an address of its own in havips")
	}
	if len(o.Spec.HAVIPs) > maxHAVIPs {
		r.at("havips").generic(fmt.Sprintf("at most %d are taken", maxHAVIPs))
		return
	}
	for i, s := range o.Spec.HAVIPs {
		at := r.index("havips", i)
		_, wrong := parseHost(s, network)
		switch {
		case wrong != "":
			at.invalidWhy(s, wrong)
		case s == o.Spec.Gateway:
			at.invalidWhy(s, "it is the address of spec.gateway")
		case slices.Contains(o.Spec.HAVIPs[:i], s):
			at.add(FieldValueDuplicate, "invalid value: "+s, "it is there twice")
		}
	}
}

// eni checks that there is one way in, and a complete one.
func (v validator) eni(r report, e *ENI) {
	switch {
	case e.Bridge == "" && e.Device == "":
		r.neither("bridge", "device")
		return
	case e.Bridge != "" && e.Device != "":
		r.both("bridge", "device")
		return
	case e.Bridge != "":
		v.device(r.at("bridge"), e.Bridge)
		for field, set := range map[string]bool{"vlan": e.VLAN != 0, "macvlan": e.Macvlan} {
			if set {
				r.at(field).forbidden() // of a device only
			}
		}
		return
	}
	v.device(r.at("device"), e.Device)
	switch {
	case e.VLAN != 0 && e.Macvlan:
		r.both("vlan", "macvlan")
	case e.VLAN == 0 && !e.Macvlan:
		r.neither("vlan", "macvlan")
	case e.VLAN < 0 || e.VLAN > 4094:
		r.at("vlan").bounds(e.VLAN, 1, 4094)
	}
}

// device checks the name of a network device: what Linux takes, and nothing that a path or a shell would see more in.
func (v validator) device(r report, s string) {
	ok := len(s) <= 15 && s != "." && s != ".."
	for i := range len(s) {
		c := s[i]
		ok = ok && ('a' <= c|0x20 && c|0x20 <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.')
	}
	if !ok {
		r.invalidWhy(s, "the name of a network device has 1 to 15 letters, digits, '-', '_' and '.'")
	}
}

func (v validator) gateway(r report, o, old *Gateway) {
	v.metadata(r.at("metadata"), &o.ObjectMeta, false)
	r = r.at("spec")
	if old != nil {
		v.unchanged(r, &o.Spec, &old.Spec)
		return
	}
	v.subnetRef(r.at("subnet"), o.Spec.Subnet, true)
	switch n := o.Spec.Nodes; {
	case len(n) == 0:
	case len(n) != 2:
		r.at("nodes").generic("expected the names of two nodes, or none")
	default:
		for i, s := range n {
			r.index("nodes", i).wrongs(s, checkSubdomain(s))
		}
		if n[0] == n[1] {
			r.at("nodes").generic("expected two nodes: on one node a pair falls with it")
		}
	}
}

func (v validator) elasticIP(r report, o, old *ElasticIP) {
	v.metadata(r.at("metadata"), &o.ObjectMeta, false)
	r = r.at("spec")
	switch a, err := netip.ParseAddr(o.Spec.Address); {
	case o.Spec.Address == "":
		r.at("address").missing()
	case err != nil || !a.Is4() || !a.IsGlobalUnicast():
		r.at("address").invalidWhy(o.Spec.Address, "expected the IPv4 address of a host")
	case old != nil && old.Spec.Address != o.Spec.Address:
		r.at("address").add(FieldValueForbidden, "Immutable fields changed (-old +new)", fmt.Sprintf("-%s +%s", old.Spec.Address, o.Spec.Address))
	}
	v.subnetRef(r.at("subnet"), o.Spec.Subnet, false)
	if s := o.Spec.HAVIP; s != "" {
		if a, err := netip.ParseAddr(s); err != nil || !a.Is4() {
			r.at("havip").invalidWhy(s, "expected an IPv4 address")
		} else if o.Spec.Subnet == "" {
			r.at("havip").invalidWhy(s, "spec.subnet must name the subnet that it belongs to")
		}
	}
}

// unchanged refuses every change of a spec.
func (v validator) unchanged(r report, now, old any) {
	if changed := differences(r.path, now, old); changed != "" {
		r.add(FieldValueForbidden, "Immutable fields changed (-old +new)", changed)
	}
}

// nameOf checks a field that names an object of the same namespace.
func (v validator) nameOf(r report, s string) {
	if s == "" {
		r.missing()
		return
	}
	r.wrongs(s, checkDNS1035(s))
}

func (v validator) subnetRef(r report, s string, required bool) {
	if s == "" {
		if required {
			r.missing()
		}
		return
	}
	if expected := checkSubnetRef(s, v.limits); expected != "" {
		r.invalidWhy(s, "expected "+expected)
	}
}
