package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// What the maps hold. Addresses and keys on the wire (wire) are in network order, other numbers in the machine's. The programs know
// the offsets of the fields.
type (
	wire [4]byte

	// slots: what may come out of a device, and where it belongs. pair is where new flows go, 0 = nowhere.
	slotKey struct {
		Device uint32
		Source wire
	}
	slotValue struct{ VPC, Pair uint32 }

	// inner: where what a pair sends belongs.
	innerKey struct {
		VPC  uint32
		Addr wire
	}

	// pairs, by ID. Sum is the part of the outer header's checksum that is the same for all packets.
	pairValue struct {
		VPC      uint32
		Outer    wire
		Wire     wire
		Sum      uint32
		Draining uint32
	}

	// peers: who may send as which VPC.
	peerKey struct{ Wire, Outer wire }

	// flows: the pair of each.
	flowKey struct {
		Device   uint32
		Src, Dst wire
		Ports    wire
		Proto    uint32
	}

	// tenants: for whom a tunnel packet is. There is an entry without a key for each address, so that everything for it is known to be
	// ours (with IPIP it is the same one).
	tenantKey   struct{ Wire, Local wire }
	tenantValue struct{ VPC, Device uint32 }

	// hosts: whose packets come out of a device, and what the headers around them are.
	hostValue struct {
		VPC   uint32
		Local wire
		Wire  wire
		Sum   uint32
	}

	// workers: the outer address of the worker that has an inner one, by longest prefix. Bits counts those of VPC too.
	workerKey struct {
		Bits uint32
		VPC  uint32
		Addr wire
	}

	// counters: for each processor, out of the namespace, into it, then by reason.
	counterValue struct{ Packets, Bytes uint64 }
)

const (
	countOut = iota
	countIn
	countDrops
)

// reasons by their number in the programs.
var reasons = []Reason{NotIPv4, Spoofed, NoPair, NoWorker, NoInstance, UnknownPeer, Fragment, Malformed, Congested, Failed}

func number(r Reason) int32 {
	for i, x := range reasons {
		if x == r {
			return int32(countDrops + i)
		}
	}
	panic("tunnel: reason without a number: " + string(r))
}

func wireAddr(a netip.Addr) wire { return a.As4() }

func (w wire) addr() netip.Addr { return netip.AddrFrom4(w) }

// wireKey is a VPC's key as the driver has it on the wire.
func (d Driver) wireKey(k Key) (w wire) {
	if d != EbpfIPIP && d != KernelIPIP {
		binary.BigEndian.PutUint32(w[:], uint32(k))
	}
	return w
}

func (d Driver) checkKey(k Key) error {
	if k == 0 || d == VXLAN && k >= 1<<24 {
		return fmt.Errorf("key %d of a VPC with driver %s: %w", k, d, ErrInvalid)
	}
	return nil
}

// Sizes of maps. None can be passed by what one node does: there are at most 8,192 sandboxes.
const (
	maxSlots   = 1 << 14
	maxPairs   = 1 << 12
	maxTenants = 1 << 13
	maxWorkers = 1 << 17 // prefixes, over all VPCs
)

// mapOf is a map from what key is to what value is.
func mapOf(kind ebpf.MapType, name string, key, value any, entries int) *ebpf.MapSpec {
	return &ebpf.MapSpec{Name: name, Type: kind, KeySize: uint32(binary.Size(key)), ValueSize: uint32(binary.Size(value)), MaxEntries: uint32(entries)}
}

func counters(name string) *ebpf.MapSpec {
	return mapOf(ebpf.PerCPUArray, name, uint32(0), counterValue{}, countDrops+len(reasons))
}

// mapSet makes maps, or takes those that a predecessor left.
type mapSet struct {
	pin  string
	all  []*ebpf.Map
	errs []error
}

func (m *mapSet) open(spec *ebpf.MapSpec) *ebpf.Map {
	if m.pin != "" {
		spec.Pinning = ebpf.PinByName
	}
	x, err := ebpf.NewMapWithOptions(spec, ebpf.MapOptions{PinPath: m.pin})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		err = fmt.Errorf("%w; another version of thaw made it: end all instances of this node, then remove the folder", err)
	}
	if err != nil {
		m.errs = append(m.errs, fmt.Errorf("map %s: %w", filepath.Join(m.pin, spec.Name), err))
		return nil
	}
	m.all = append(m.all, x)
	return x
}

func (m *mapSet) close() {
	for _, x := range m.all {
		x.Close()
	}
}

// openMaps prepares a folder for maps.
func openMaps(pin string) (*mapSet, error) {
	if err := rlimit.RemoveMemlock(); err != nil { // counts before Linux 5.11
		return nil, fmt.Errorf("tunnel: %w: %w", err, ErrUnsupported)
	}
	if pin != "" {
		if err := os.MkdirAll(pin, 0o700); err != nil {
			return nil, fmt.Errorf("tunnel: %w", err)
		}
		if !isBPF(pin) {
			return nil, fmt.Errorf("tunnel: %w: %s is not on a file system of type bpf", ErrInvalid, pin)
		}
	}
	return &mapSet{pin: pin}, nil
}

func isBPF(dir string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC
}

// MountPins makes dir a file system for Config.Pin, unless it is one.
func MountPins(dir string) error {
	if isBPF(dir) {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("tunnel: mount %s: %w", dir, err)
	}
	return nil
}

// stats reads counters.
func stats(m *ebpf.Map) (Stats, error) {
	s := Stats{Drops: map[Reason]uint64{}}
	for i := range countDrops + len(reasons) {
		var each []counterValue
		if err := m.Lookup(uint32(i), &each); err != nil {
			return s, fmt.Errorf("tunnel counters: %w", err)
		}
		var sum Counter
		for _, c := range each {
			sum.Packets += c.Packets
			sum.Bytes += c.Bytes
		}
		switch i {
		case countOut:
			s.Out = sum
		case countIn:
			s.In = sum
		default:
			s.Drops[reasons[i-countDrops]] = sum.Packets
		}
	}
	return s, nil
}

// each calls f with all entries of a map.
func each[K, V any](m *ebpf.Map, f func(K, V)) error {
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		f(k, v)
	}
	return it.Err()
}

// drop deletes an entry, if it is there.
func drop(m *ebpf.Map, key any) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}
