package api

import (
	"fmt"
	"strings"
	"testing"
)

func testVPC(name string, cidrs ...string) *VPC {
	return &VPC{ObjectMeta: ObjectMeta{Namespace: "default", Name: name}, Spec: VPCSpec{CIDRs: cidrs}}
}

func testSubnet(vpc, name, cidr string, havips ...string) *Subnet {
	return &Subnet{ObjectMeta: ObjectMeta{Namespace: "default", Name: name}, Spec: SubnetSpec{VPC: vpc, CIDR: cidr, ENI: ENI{Bridge: "br0"}, HAVIPs: havips}}
}

func testEIP(name, address, subnet, havip string) *ElasticIP {
	return &ElasticIP{ObjectMeta: ObjectMeta{Namespace: "default", Name: name}, Spec: ElasticIPSpec{Address: address, Subnet: subnet, HAVIP: havip}}
}

func testGateway(name, subnet string, nodes ...string) *Gateway {
	return &Gateway{ObjectMeta: ObjectMeta{Namespace: "default", Name: name}, Spec: GatewaySpec{Subnet: subnet, Nodes: nodes}}
}

// Each wrong field of an object has one clear error; "" = nothing is wrong.
func TestNetValidation(t *testing.T) {
	with := func(change func(*SubnetSpec)) *Subnet {
		s := testSubnet("v", "s", "10.0.1.0/24")
		change(&s.Spec)
		return s
	}
	eni := func(e ENI) *Subnet { return with(func(s *SubnetSpec) { s.ENI = e }) }
	for _, c := range []struct {
		o    Object
		want string
	}{
		{testVPC("v"), ""},
		{testVPC("v", "10.0.0.0/16", "192.168.0.0/24"), ""},
		{testVPC("V"), `not a DNS 1035 label`},
		{testVPC("v", "10.0.0.0"), `invalid value: 10.0.0.0: spec.cidrs[0] (expected an IPv4 network such as 10.0.1.0/24)`},
		{testVPC("v", "fd00::/64"), `invalid value: fd00::/64: spec.cidrs[0] (expected an IPv4 network such as 10.0.1.0/24)`},
		{testVPC("v", "10.0.0.0/8", "10.1.0.0/16"), `invalid value: 10.1.0.0/16: spec.cidrs[1] (it overlaps with 10.0.0.0/8)`},
		{testVPC("v", strings.Split(strings.Repeat("10.0.0.0/8,", 16)+"11.0.0.0/8", ",")...), `at most 16 are taken: spec.cidrs`},
		{testVPC("v", "100.100.0.0/16"), `invalid value: 100.100.0.0/16: spec.cidrs[0] (it overlaps with 100.64.0.0/10, which functions themselves have their addresses from)`},

		{testSubnet("v", "s", "10.0.1.0/24", "10.0.1.9", "10.0.1.10"), ""},
		{with(func(s *SubnetSpec) { s.HAVIPs, s.Pairs = []string{"10.0.1.9", "10.0.1.10"}, 2 }), ""},
		{with(func(s *SubnetSpec) { s.HAVIPs, s.Pairs = []string{"10.0.1.9", "10.0.1.10"}, 3 }), `invalid value: 3: spec.pairs (each pair needs an address of its own in havips)`},
		{with(func(s *SubnetSpec) { s.Pairs = 9 }), `invalid value: 9: spec.pairs (expected 0 to 8)`},
		{with(func(s *SubnetSpec) { s.Pairs = -1 }), `invalid value: -1: spec.pairs (expected 0 to 8)`},
		{testSubnet("", "s", "10.0.1.0/24"), `missing field(s): spec.vpc`},
		{testSubnet("a/b", "s", "10.0.1.0/24"), `invalid value: a/b: spec.vpc`},
		{testSubnet("v", "s", ""), `missing field(s): spec.cidr`},
		{testSubnet("v", "s", "10.0.1.0/33"), `invalid value: 10.0.1.0/33: spec.cidr (expected an IPv4 network such as 10.0.1.0/24)`},
		{testSubnet("v", "s", "10.0.1.5/24"), `invalid value: 10.0.1.5/24: spec.cidr (its address has bits beside the mask: did you mean 10.0.1.0/24?)`},
		{testSubnet("v", "s", "10.0.1.0/31"), `invalid value: 10.0.1.0/31: spec.cidr (a network has a mask of 8 to 30 bits)`},
		{testSubnet("v", "s", "0.0.0.0/0"), `invalid value: 0.0.0.0/0: spec.cidr (a network has a mask of 8 to 30 bits)`},
		{testSubnet("v", "s", "127.0.1.0/24"), `invalid value: 127.0.1.0/24: spec.cidr (it overlaps with 127.0.0.0/8, which is each machine itself)`},
		{testSubnet("v", "s", "10.0.1.0/24", "10.0.2.1"), `invalid value: 10.0.2.1: spec.havips[0] (it lies outside 10.0.1.0/24)`},
		{testSubnet("v", "s", "10.0.1.0/24", "10.0.1.0"), `invalid value: 10.0.1.0: spec.havips[0] (it is the network address of 10.0.1.0/24)`},
		{testSubnet("v", "s", "10.0.1.0/24", "10.0.1.1", "10.0.1.255"), `invalid value: 10.0.1.255: spec.havips[1] (it is the broadcast address of 10.0.1.0/24)`},
		{testSubnet("v", "s", "10.0.1.0/24", "10.0.1.1", "10.0.1.1"), `invalid value: 10.0.1.1: spec.havips[1] (it is there twice)`},
		{testSubnet("v", "s", "10.0.1.0/24", "x"), `invalid value: x: spec.havips[0] (expected an IPv4 address)`},
		{with(func(s *SubnetSpec) { s.Gateway = "10.0.1.1" }), ""},
		{with(func(s *SubnetSpec) { s.Gateway = "10.0.2.1" }), `invalid value: 10.0.2.1: spec.gateway (it lies outside 10.0.1.0/24)`},
		{with(func(s *SubnetSpec) { s.Gateway = "10.0.1.1"; s.HAVIPs = []string{"10.0.1.1"} }), `invalid value: 10.0.1.1: spec.havips[0] (it is the address of spec.gateway)`},
		{eni(ENI{}), `expected exactly one, got neither: spec.eni.bridge, spec.eni.device`},
		{eni(ENI{Bridge: "a", Device: "b"}), `expected exactly one, got both: spec.eni.bridge, spec.eni.device`},
		{eni(ENI{Bridge: "a/b"}), `invalid value: a/b: spec.eni.bridge (the name of a network device has 1 to 15 letters, digits, '-', '_' and '.')`},
		{eni(ENI{Bridge: "a23456789012345x"}), `invalid value: a23456789012345x: spec.eni.bridge`},
		{eni(ENI{Bridge: "a", VLAN: 3}), `must not set the field(s): spec.eni.vlan`},
		{eni(ENI{Device: "eth1", VLAN: 3}), ""},
		{eni(ENI{Device: "eth1", Macvlan: true}), ""},
		{eni(ENI{Device: "eth1"}), `expected exactly one, got neither: spec.eni.macvlan, spec.eni.vlan`},
		{eni(ENI{Device: "eth1", VLAN: 3, Macvlan: true}), `expected exactly one, got both: spec.eni.macvlan, spec.eni.vlan`},
		{eni(ENI{Device: "eth1", VLAN: 4095}), `expected 1 <= 4095 <= 4094: spec.eni.vlan`},

		{testGateway("g", "v/s"), ""},
		{testGateway("g", "v/s", "a", "b"), ""},
		{testGateway("g", ""), `missing field(s): spec.subnet`},
		{testGateway("g", "s"), `invalid value: s: spec.subnet (expected VPC/SUBNET, the names of a VPC and of a subnet in it)`},
		{testGateway("g", "v/s", "a"), `expected the names of two nodes, or none: spec.nodes`},
		{testGateway("g", "v/s", "a", "a"), `expected two nodes: on one node a pair falls with it: spec.nodes`},

		{testEIP("e", "203.0.113.7", "", ""), ""},
		{testEIP("e", "203.0.113.7", "v/s", "10.0.1.9"), ""},
		{testEIP("e", "", "", ""), `missing field(s): spec.address`},
		{testEIP("e", "224.0.0.1", "", ""), `invalid value: 224.0.0.1: spec.address (expected the IPv4 address of a host)`},
		{testEIP("e", "203.0.113.7", "", "10.0.1.9"), `invalid value: 10.0.1.9: spec.havip (spec.subnet must name the subnet that it belongs to)`},
	} {
		SetDefaults(c.o)
		got := Validate(c.o, nil, DefaultLimits).Error()
		if (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
			t.Errorf("%+v\ngot  %q\nwant %q", specOf(c.o), got, c.want)
		}
	}
}

func TestNetSpecsStay(t *testing.T) {
	for _, c := range []struct {
		now, old Object
		want     string
	}{
		{testSubnet("v", "s", "10.0.1.0/24"), testSubnet("v", "s", "10.0.1.0/24"), ""},
		{testSubnet("v", "s", "10.0.1.0/25"), testSubnet("v", "s", "10.0.1.0/24"), `Immutable fields changed (-old +new): spec (spec.cidr: -"10.0.1.0/24" +"10.0.1.0/25")`},
		{testGateway("g", "v/s"), testGateway("g", "v/t"), `Immutable fields changed`},
		{testEIP("e", "203.0.113.7", "v/s", ""), testEIP("e", "203.0.113.7", "", ""), ""},
		{testEIP("e", "203.0.113.7", "", ""), testEIP("e", "203.0.113.8", "", ""), `Immutable fields changed`},
		{testVPC("v", "10.0.0.0/8"), testVPC("v"), ""},
	} {
		if got := Validate(c.now, c.old, DefaultLimits).Error(); (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestNetAnnotations(t *testing.T) {
	for _, c := range []struct{ annotations, want string }{
		{"subnet=v/s", ""},
		{"subnet=v/s egress=fixed", ""},
		{"egress=shared", ""},
		{"egress=fixed", "the address belongs to a subnet"},
		{"subnet=v", "expected VPC/SUBNET"},
		{"subnet=v/s/t", "expected VPC/SUBNET"},
		{"subnet=", "expected VPC/SUBNET"},
		{"egress=all", "expected none or shared or fixed"},
		{"subnett=v/s", "there is no such annotation"},
	} {
		o := &Configuration{ObjectMeta: ObjectMeta{Namespace: "default", Name: "c"}}
		o.Spec.Template.Spec.Containers = []Container{{Image: "dev.local/x"}}
		o.Spec.Template.Annotations = map[string]string{}
		for a := range strings.FieldsSeq(c.annotations) {
			k, v, _ := strings.Cut(a, "=")
			o.Spec.Template.Annotations[NetGroup+"/"+k] = v
		}
		SetDefaults(o)
		if got := Validate(o, nil, DefaultLimits).Error(); (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.annotations, got, c.want)
		}
	}
}

func TestNeighbours(t *testing.T) {
	n := &Neighbours{}
	other := testVPC("elsewhere")
	other.Namespace = "other"
	used := &Revision{ObjectMeta: ObjectMeta{Namespace: "default", Name: "f-00001", Annotations: map[string]string{AnnotationSubnet: "v/s", AnnotationEgress: EgressFixed}}}
	owned := testGateway("s", "v/s")
	owned.OwnerReferences = []OwnerReference{{Kind: "Subnet", Name: "s"}}
	for _, o := range []Object{testVPC("v", "10.0.0.0/16"), testVPC("w"), other, testSubnet("v", "s", "10.0.1.0/24", "10.0.1.9", "10.0.1.10"), testSubnet("w", "x", "10.0.1.0/24"),
		owned, testEIP("e", "203.0.113.7", "v/s", ""), used} {
		n.Add(o)
	}
	for _, c := range []struct {
		o    Object
		want string
	}{
		{testSubnet("v", "t", "10.0.2.0/24"), ""},
		{testSubnet("v", "s", "10.0.1.0/24"), ""}, // itself
		{testSubnet("w", "t", "10.0.2.0/24"), ""},
		{testSubnet("v", "t", "10.0.1.128/25"), `invalid value: 10.0.1.128/25: spec.cidr (it overlaps with 10.0.1.0/24 of subnet s in the same VPC)`},
		{testSubnet("v", "t", "10.1.0.0/24"), `invalid value: 10.1.0.0/24: spec.cidr (VPC v has [10.0.0.0/16])`},
		{testSubnet("elsewhere", "t", "10.0.2.0/24"), `invalid value: elsewhere: spec.vpc (there is no such VPC in namespace default: create it first)`},
		{testVPC("v", "10.0.0.0/8"), ""},
		{testVPC("v", "10.2.0.0/16"), `subnet s has 10.0.1.0/24, which would lie outside: spec.cidrs`},
		{testGateway("g", "w/x"), ""},
		{testGateway("g", "w/s"), `invalid value: w/s: spec.subnet (there is no such subnet in namespace default: create it first)`},
		{testGateway("g", "v/s"), `invalid value: v/s: spec.subnet (it has the gateway s already: one pair carries all of a subnet's addresses)`},
		{testEIP("f", "203.0.113.8", "v/s", "10.0.1.10"), ""},
		{testEIP("f", "203.0.113.8", "v/s", ""), `invalid value: v/s: spec.subnet (the elastic IP e is bound to its address 10.0.1.9)`},
		{testEIP("f", "203.0.113.8", "v/s", "10.0.1.11"), `invalid value: 10.0.1.11: spec.havip (subnet v/s has [10.0.1.9 10.0.1.10])`},
		{testEIP("f", "203.0.113.7", "", ""), `invalid value: 203.0.113.7: spec.address (elastic IP e of namespace default has it)`},
		{testEIP("f", "203.0.113.8", "v/t", ""), `there is no such subnet`},
	} {
		if got := n.Conflicts(c.o).Error(); got != c.want && (c.want == "" || !strings.Contains(got, c.want)) {
			t.Errorf("%s %s: got %q, want %q", KindOf(c.o).Kind, c.o.Meta().Name, got, c.want)
		}
	}
	for _, c := range []struct {
		o    Object
		want string
	}{
		{n.VPCs[0], "[subnet s]"},
		{n.Subnets[0], "[elasticip e revision f-00001]"},
		{n.Subnets[1], "[]"},
		{owned, "[revision f-00001]"},
		{n.ElasticIPs[0], "[revision f-00001]"},
		{other, "[]"},
	} {
		if got := fmt.Sprint(n.Users(c.o)); got != c.want {
			t.Errorf("users of %s %s: %s, want %s", KindOf(c.o).Kind, c.o.Meta().Name, got, c.want)
		}
	}
}

func TestAllocateHAVIPs(t *testing.T) {
	router := testSubnet("v", "s", "10.0.1.0/30")
	router.Spec.Gateway = "10.0.1.2"
	for _, c := range []struct {
		s    *Subnet
		want string
	}{
		{testSubnet("v", "s", "10.0.1.0/24"), "[10.0.1.254]"},
		{testSubnet("v", "s", "10.0.0.0/8"), "[10.255.255.254]"},
		{router, "[10.0.1.1]"},
		{testSubnet("v", "s", "10.0.1.0/24", "10.0.1.7", "10.0.1.8"), "[10.0.1.7 10.0.1.8]"},
		{testSubnet("v", "s", "x"), "[]"},
	} {
		if got := fmt.Sprint(c.s.AllocateHAVIPs()); got != c.want {
			t.Errorf("%+v: %s, want %s", c.s.Spec, got, c.want)
		}
	}
}

// FuzzNet: whatever a network or an address is said to be, what is accepted can be worked with.
func FuzzNet(f *testing.F) {
	for _, s := range []string{"10.0.1.0/24", "10.0.1.0/30", "0.0.0.0/8", "255.255.255.252/30", "10.0.1.0/024", "::ffff:10.0.1.0/120", "fe80::1%eth0/64"} {
		f.Add(s, "10.0.1.9", "v/s", "eth0")
	}
	f.Fuzz(func(t *testing.T, cidr, address, ref, device string) {
		s := testSubnet("v", "s", cidr, address)
		s.Spec.ENI = ENI{Bridge: device}
		SplitSubnet(ref)
		n := &Neighbours{}
		n.Add(testVPC("v", cidr))
		if len(Validate(s, nil, DefaultLimits)) > 0 {
			return
		}
		if errs := n.Conflicts(s); len(errs) > 0 {
			t.Errorf("%s lies outside itself: %v", cidr, errs)
		}
		n.Add(s)
		u := testSubnet("v", "u", cidr)
		if len(n.Conflicts(u)) == 0 {
			t.Errorf("%s does not overlap with itself", cidr)
		}
		s.Spec.HAVIPs = s.AllocateHAVIPs()
		u.Spec.HAVIPs = u.AllocateHAVIPs()
		for _, o := range []*Subnet{s, u} {
			if errs := Validate(o, nil, DefaultLimits); len(errs) > 0 {
				t.Errorf("%s: what was allocated is refused: %v", cidr, errs)
			}
		}
	})
}
