package gateway

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const good = `
name: a
device: eth0
outer: [10.1.0.1/24]
priority: 200
advert: 10ms
sync: eth2,10.9.0.1,10.9.0.2
workers:
- {outer: 10.1.0.11, prefix: 100.64.0.0/22}
- {outer: 10.1.0.12, prefix: 100.64.4.0/22}
pairs:
- name: shop
  id: 7
  vpc: 101
  subnet: 10.0.0.0/24
  havips: [10.0.0.10]
  router: 10.0.0.1
  eni: {bridge: br-shop}
`

func TestParse(t *testing.T) {
	c, err := Parse([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	p := c.Pairs[0]
	if time.Duration(c.Advert) != 10*time.Millisecond || len(c.Workers) != 2 || p.Outer.String() != "10.1.0.1" || p.Ports != (Ports{1024, 65535}) || p.Flows != 65_536 {
		t.Errorf("%+v", c)
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(b)
	if diff := cmp.Diff(c, again, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); err != nil || diff != "" {
		t.Errorf("what was written is read as something else: %v %s", err, diff)
	}
}

// TestParseRefuses: each mistake is one error that says where and what.
func TestParseRefuses(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{"device: eth0", "", "device: name the device"},
		{"device: eth0", "devices: eth0", `unknown field "devices"`},
		{"priority: 200", "priority: 20", "priority 20: 32 to 254"},
		{"advert: 10ms", "advert: soon", `invalid duration "soon"`},
		{"advert: 10ms", "driver: carrier-pigeon", `driver "carrier-pigeon"`},
		{"[10.1.0.1/24]", "[]", "outer: 0 addresses"},
		{"[10.1.0.1/24]", "[fd00::1/64]", "fd00::1/64 is not IPv4"},
		{"sync: eth2,10.9.0.1,10.9.0.2", "sync: eth2", "is not DEV,LOCAL,PEER"},
		{"prefix: 100.64.4.0/22", "prefix: 10.64.4.0/22", "worker 1: prefix 10.64.4.0/22 is not within 100.64.0.0/10"},
		{"prefix: 100.64.4.0/22", "prefix: 100.64.2.0/23", "workers 0 and 1: prefixes 100.64.0.0/22 and 100.64.2.0/23 overlap"},
		{"id: 7", "id: 0", `pair "shop": id 0: 1 to 50000`},
		{"vpc: 101", "", `pair "shop": vpc: the key`},
		{"subnet: 10.0.0.0/24", "subnet: 10.0.0.0", "10.0.0.0"},
		{"subnet: 10.0.0.0/24", "subnet: 10.0.0.7/24", "subnet 10.0.0.7/24: an IPv4 prefix"},
		{"subnet: 10.0.0.0/24", "subnet: 100.64.0.0/24", "subnet 100.64.0.0/24 overlaps the instances' 100.64.0.0/10"},
		{"[10.0.0.10]", "[10.0.1.10]", "havip 10.0.1.10 cannot be an address of a host in 10.0.0.0/24"},
		{"[10.0.0.10]", "[10.0.0.0]", "havip 10.0.0.0 cannot be"},
		{"[10.0.0.10]", "[10.0.0.255]", "havip 10.0.0.255 cannot be"},
		{"[10.0.0.10]", "[10.0.0.10, 10.0.0.10]", "havip 10.0.0.10 is there twice"},
		{"[10.0.0.10]", "[]", "havips: 0 addresses"},
		{"router: 10.0.0.1", "router: 10.0.0.10", "router 10.0.0.10 cannot be another host"},
		{"router: 10.0.0.1", "eips: {10.0.0.11: 192.0.2.1}", "eip 192.0.2.1: 10.0.0.11 is none of the havips"},
		{"router: 10.0.0.1", "ports: {first: 9, last: 8}", "ports 9 to 8"},
		{"router: 10.0.0.1", "instanceFlows: 100000", "instanceFlows 100000: 1 to the tenant's 65536"},
		{"router: 10.0.0.1", "outer: 10.1.0.9", "outer 10.1.0.9 is none of the node's"},
		{"{bridge: br-shop}", "{}", "eni: name a bridge, or a device"},
		{"{bridge: br-shop}", "{bridge: b, device: eth3}", "eni: name a bridge, or a device"},
		{"{bridge: br-shop}", "{device: eth3}", "a device needs a vlan, or macvlan: true"},
		{"{bridge: br-shop}", "{device: eth3, vlan: 5000}", "vlan 5000: 1 to 4094"},
		{"{bridge: br-shop}", "{bridge: b, vlan: 5}", "vlan and macvlan are for a device"},
		{"pairs:", "pairs:\n- {name: shop, id: 8, vpc: 102, subnet: 10.0.0.0/24, havips: [10.0.0.10], eni: {bridge: b}}", `pair "shop" is there twice`},
		{"pairs:", "pairs:\n- {name: x, id: 7, vpc: 102, subnet: 10.0.0.0/24, havips: [10.0.0.10], eni: {bridge: b}}", "id 7 is another pair's too"},
		{"pairs:", "pairs:\n- {name: x, id: 8, vpc: 101, subnet: 10.0.0.0/24, havips: [10.0.0.11], eni: {bridge: b}}", "VPC 101 has another pair at 10.1.0.1"},
	} {
		if !strings.Contains(good, c.old) {
			t.Fatalf("the test replaces %q, which is not there", c.old)
		}
		_, err := Parse([]byte(strings.Replace(good, c.old, c.new, 1)))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q in the place of %q: got %v, want %q", c.new, c.old, err, c.want)
		} else if n := strings.Count(err.Error(), "\n"); n > 0 {
			t.Errorf("%q in the place of %q: %d errors: %v", c.new, c.old, n+1, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte(`{"outer":["10.1.0.1/24"],"pairs":[{"eips":{"":""}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(again); err != nil {
			t.Fatalf("what is valid is refused when it is written and read: %v\n%s", err, again)
		}
	})
}
