package gateway

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/netproxy/ctsync"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// Config is a node and the pairs that it has a half of. The other node's differs in Name, Priority and Sync.
type Config struct {
	Name   string `json:"name,omitempty"`   // for people
	Device string `json:"device"`           // towards the workers; it has an address of its own
	Driver string `json:"driver,omitempty"` // of the tunnels; "" = ebpf
	Pin    string `json:"pin,omitempty"`    // folder (bpf) in which tunnels outlive the process

	// Outer are the addresses on Device that tunnels lead to, 1 to 16. They move between the two nodes.
	Outer     []netip.Prefix `json:"outer"`
	Router    int            `json:"vrid,omitempty"`   // tells node pairs on one network apart; 0 = 51
	Priority  int            `json:"priority"`         // 32 to 254: the higher one is master when both are well
	Advert    Duration       `json:"advert,omitempty"` // 0 = 20ms; the peer takes over after 3 to 4 of them
	Settle    Duration       `json:"settle,omitempty"` // 0 = 2s; see havip.Config
	Sync      string         `json:"sync"`             // DEV,LOCAL,PEER: the link to the other node
	Replicate *bool          `json:"replicate,omitempty"`
	KeyFile   string         `json:"keyFile,omitempty"` // secret of the two nodes
	Status    string         `json:"status,omitempty"`  // path of a Unix socket that answers with Status

	// Instances is what all workers' prefixes are part of; zero = 100.64.0.0/10. A tenant cannot have these addresses.
	Instances netip.Prefix  `json:"instances,omitzero"`
	Workers   []tunnel.Peer `json:"-"`
	WorkerSet []Worker      `json:"workers,omitempty"`
	Namespace string        `json:"namespaces,omitempty"` // folder that holds the tenants' namespaces; "" = /run/netns
	Capacity  Capacity      `json:"capacity,omitzero"`
	ENIDelay  Duration      `json:"eniDelay,omitempty"` // what a cloud would take to make or remove a NIC: for comparisons
	Pairs     []Pair        `json:"pairs"`
}

// Worker is a node with instances.
type Worker struct {
	Outer  netip.Addr   `json:"outer"`  // its address between the nodes
	Prefix netip.Prefix `json:"prefix"` // of its instances' addresses
}

// Capacity is what a node can carry for one pair, in one direction.
type Capacity struct {
	Bits    float64 `json:"bits,omitempty"`    // a second, 0 = 10e9
	Packets float64 `json:"packets,omitempty"` // a second, 0 = 1e6
}

// Pair is a gateway pair: the way of one VPC's functions into one subnet.
type Pair struct {
	Name string `json:"name"`
	// ID is unique among the pairs of the two nodes, 1 to 50,000, and the same on both: it names devices and a port of the replication.
	ID      uint32       `json:"id"`
	VPC     tunnel.Key   `json:"vpc"`
	Outer   netip.Addr   `json:"outer,omitzero"` // one of Config.Outer; zero = the first. Not the same for two pairs of a VPC
	Subnet  netip.Prefix `json:"subnet"`         // that the ENI is in
	HAVIPs  []netip.Addr `json:"havips"`         // 1 to 16. Each serves 64,512 connections to one address and port
	NextHop netip.Addr   `json:"router,omitzero"`
	Network Network      `json:"eni"`
	// EIPs take the place of HAVIPs (the keys) on packets to and from other networks than Subnet: fixed addresses for public egress. The
	// network behind the ENI has to lead them there; they are announced like HAVIPs.
	EIPs      map[netip.Addr]netip.Addr `json:"eips,omitempty"`
	Ports     Ports                     `json:"ports,omitzero"`
	Flows     int                       `json:"flows,omitempty"`         // the tenant's quota of connections, 0 = 65,536
	PerSource int                       `json:"instanceFlows,omitempty"` // that of one instance, 0 = 1,024
	Draining  bool                      `json:"draining,omitempty"`      // takes no new connections
}

// Network says which network an ENI is put into: exactly one of a bridge and a network card of the node.
type Network struct {
	Bridge string `json:"bridge,omitempty"`
	Device string `json:"device,omitempty"`
	VLAN   int    `json:"vlan,omitempty"`    // 1 to 4094, of Device
	Shared bool   `json:"macvlan,omitempty"` // Device itself, under a hardware address of the ENI's own
}

// Ports is a range; zero = 1024 to 65535.
type Ports struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}

func (p Ports) count() int { return int(p.Last) - int(p.First) + 1 }

// Duration is one that is written as 20ms or 1m30s.
type Duration time.Duration

// UnmarshalText reads what time.ParseDuration does.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// MarshalText writes it likewise.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

const (
	maxID        = 50_000
	maxPairs     = 10_000
	maxInstances = 65_536 // of which a tenant's connections are counted apart
	// An impaired member has a sixteenth of its priority (havip.Facts), which has to be less than that of a peer that is well.
	minPriority = 32
)

// Parse reads a configuration in YAML or JSON, at most 16 MiB, and fills in what is left out. Unknown fields are errors.
func Parse(b []byte) (Config, error) {
	var c Config
	if len(b) > 16<<20 {
		return c, errors.New("more than 16 MiB")
	}
	if err := yaml.UnmarshalStrict(b, &c); err != nil {
		return c, err
	}
	return c, c.Validate()
}

// Validate fills in what is left out and reports all that is wrong.
func (c *Config) Validate() error {
	c.defaults()
	var errs []error
	bad := func(is bool, format string, args ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	bad(c.Device == "", "device: name the device towards the workers")
	bad(c.Priority < minPriority || c.Priority > 254, "priority %d: %d to 254", c.Priority, minPriority)
	bad(c.Driver != "" && tunnel.Driver(c.Driver).Overhead() == 0, "driver %q: one of %v", c.Driver, tunnel.Drivers())
	bad(len(c.Outer) == 0 || len(c.Outer) > 16, "outer: %d addresses, 1 to 16 are needed, as ADDR/LEN", len(c.Outer))
	for _, p := range c.Outer {
		bad(!p.Addr().Is4(), "outer: %s is not IPv4", p)
	}
	if _, err := havip.ParseSync(c.Sync); err != nil {
		errs = append(errs, fmt.Errorf("sync: %w", err))
	}
	bad(!c.Instances.IsValid() || !c.Instances.Addr().Is4(), "instances: %s is not an IPv4 prefix", c.Instances)
	bad(len(c.Pairs) > maxPairs, "%d pairs: at most %d", len(c.Pairs), maxPairs)
	for i, w := range c.WorkerSet {
		bad(!w.Outer.Is4(), "worker %d: outer: an IPv4 address is needed", i)
		bad(!within(w.Prefix, c.Instances), "worker %d: prefix %s is not within %s", i, w.Prefix, c.Instances)
		for j, o := range c.WorkerSet[:min(i, 1000)] {
			bad(o.Prefix.Overlaps(w.Prefix), "workers %d and %d: prefixes %s and %s overlap", j, i, o.Prefix, w.Prefix)
		}
		c.Workers = append(c.Workers, tunnel.Peer{Outer: w.Outer, Prefix: w.Prefix})
	}
	names, ids, ends := map[string]bool{}, map[uint32]bool{}, map[tunnel.Tenant]bool{}
	for i := range c.Pairs {
		p := &c.Pairs[i]
		if err := p.validate(c); err != nil {
			errs = append(errs, fmt.Errorf("pair %q: %w", p.Name, err))
		}
		bad(names[p.Name], "pair %q is there twice", p.Name)
		bad(ids[p.ID], "pair %q: id %d is another pair's too", p.Name, p.ID)
		end := tunnel.Tenant{VPC: p.VPC, Local: p.Outer}
		bad(ends[end], "pair %q: VPC %d has another pair at %s: give one of them another outer address", p.Name, p.VPC, p.Outer)
		names[p.Name], ids[p.ID], ends[end] = true, true, true
	}
	return errors.Join(errs...)
}

func (c *Config) defaults() {
	set(&c.Router, 51)
	set(&c.Advert, Duration(20*time.Millisecond))
	set(&c.Settle, Duration(2*time.Second))
	set(&c.Namespace, "/run/netns")
	set(&c.Instances, netip.MustParsePrefix("100.64.0.0/10"))
	set(&c.Capacity.Bits, 10e9)
	set(&c.Capacity.Packets, 1e6)
	set(&c.Driver, string(tunnel.Ebpf))
	c.Workers = nil
	for i := range c.Pairs {
		p := &c.Pairs[i]
		set(&p.Ports, Ports{1024, 65535})
		set(&p.Flows, 65_536)
		set(&p.PerSource, 1024)
		if len(c.Outer) > 0 {
			set(&p.Outer, c.Outer[0].Addr())
		}
	}
}

// set gives what is zero a value.
func set[T comparable](at *T, v T) {
	var zero T
	if *at == zero {
		*at = v
	}
}

// within says whether a prefix is part of another one.
func within(p, all netip.Prefix) bool {
	return p.IsValid() && all.IsValid() && p.Bits() >= all.Bits() && all.Contains(p.Addr())
}

func (p *Pair) validate(c *Config) error {
	var errs []error
	bad := func(is bool, format string, args ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	bad(p.Name == "" || len(p.Name) > 253 || strings.ContainsAny(p.Name, "\n\x00"), "name: 1 to 253 characters")
	bad(p.ID == 0 || p.ID > maxID, "id %d: 1 to %d", p.ID, maxID)
	bad(p.VPC == 0, "vpc: the key is a number from 1")
	known := false
	for _, o := range c.Outer {
		known = known || o.Addr() == p.Outer
	}
	bad(!known && len(c.Outer) > 0, "outer %s is none of the node's", p.Outer)
	if !p.Subnet.IsValid() || !p.Subnet.Addr().Is4() || p.Subnet.Bits() > 30 || p.Subnet.Bits() == 0 || p.Subnet != p.Subnet.Masked() {
		return errors.Join(append(errs, fmt.Errorf("subnet %s: an IPv4 prefix such as 10.0.0.0/24", p.Subnet))...)
	}
	if c.Instances.IsValid() && p.Subnet.Overlaps(c.Instances) {
		return errors.Join(append(errs, fmt.Errorf("subnet %s overlaps the instances' %s", p.Subnet, c.Instances))...)
	}
	bad(len(p.HAVIPs) == 0 || len(p.HAVIPs) > 16, "havips: %d addresses, 1 to 16 are needed", len(p.HAVIPs))
	seen := map[netip.Addr]bool{}
	for _, a := range p.HAVIPs {
		bad(!usable(p.Subnet, a), "havip %s cannot be an address of a host in %s", a, p.Subnet)
		bad(seen[a], "havip %s is there twice", a)
		seen[a] = true
	}
	for havip, a := range p.EIPs {
		bad(!seen[havip], "eip %s: %s is none of the havips", a, havip)
	}
	for _, a := range p.EIPs {
		bad(!a.Is4(), "eip %s is not IPv4", a)
		bad(seen[a], "eip %s is there twice, or a havip", a)
		seen[a] = true
	}
	bad(p.NextHop.IsValid() && (!usable(p.Subnet, p.NextHop) || seen[p.NextHop]), "router %s cannot be another host in %s", p.NextHop, p.Subnet)
	bad(p.Ports.First < 1 || p.Ports.count() < 1, "ports %d to %d: an ascending range from 1", p.Ports.First, p.Ports.Last)
	bad(p.Flows < 1 || p.Flows > 1<<22, "flows %d: 1 to %d", p.Flows, 1<<22)
	bad(p.PerSource < 1 || p.PerSource > p.Flows, "instanceFlows %d: 1 to the tenant's %d", p.PerSource, p.Flows)
	errs = append(errs, p.Network.validate())
	return errors.Join(errs...)
}

func (n *Network) validate() error {
	switch {
	case (n.Bridge == "") == (n.Device == ""):
		return errors.New("eni: name a bridge, or a device with a vlan or macvlan")
	case n.Bridge != "" && (n.VLAN != 0 || n.Shared):
		return errors.New("eni: vlan and macvlan are for a device, not for a bridge")
	case n.Device != "" && (n.VLAN != 0) == n.Shared:
		return errors.New("eni: a device needs a vlan, or macvlan: true")
	case n.VLAN < 0 || n.VLAN > 4094:
		return fmt.Errorf("eni: vlan %d: 1 to 4094", n.VLAN)
	case len(n.Bridge)+len(n.Device) > 15:
		return errors.New("eni: names of devices have at most 15 characters")
	}
	return nil
}

// usable says whether a host of a subnet can have an address: not the first, nor the last.
func usable(subnet netip.Prefix, a netip.Addr) bool {
	return a.Is4() && subnet.Contains(a) && subnet.Contains(a.Prev()) && subnet.Contains(a.Next())
}

// syncPort is the port of a pair's replication.
func (p *Pair) syncPort() int { return ctsync.Port + int(p.ID) }
