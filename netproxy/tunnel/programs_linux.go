package tunnel

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// The programs are put together here, one instruction after another, because they are short and without loops: nobody needs a C compiler, and there
// is no object file to be trusted. Registers: R6 the packet's context, R7 to R9 what a program says; helpers destroy R0 to R5.

// Offsets in struct __sk_buff.
const (
	skbLen      = 0
	skbProtocol = 16
	skbVLAN     = 20 // vlan_present
	skbIfindex  = 40
)

// What a program answers.
const (
	tcNext = -1 // TC_ACT_UNSPEC: not ours, ask the next filter
	tcDrop = 2  // TC_ACT_SHOT
)

// Flags of helpers.
const (
	roomMAC     = 1 // BPF_ADJ_ROOM_MAC: between the Ethernet header and what follows
	fixedGSO    = 1 << 0
	encapIPv4   = 1 << 1
	encapGRE    = 1 << 3
	zeroCsum    = 1 << 1 // BPF_F_ZERO_CSUM_TX: no checksum in UDP or GRE
	dontFrag    = 1 << 2 // BPF_F_DONT_FRAGMENT
	tunnelKeyOf = 44     // size of struct bpf_tunnel_key, with the local address (Linux 6.0)
)

// Places on the stack.
const (
	atInner = -24  // 20 bytes: the inner IPv4 header
	atKey   = -48  // 24 bytes: key of a map
	atValue = -56  // 4 bytes: value, or another key
	atOuter = -88  // 28 bytes: the outer header, with GRE
	atMeta  = -136 // 44 bytes: struct bpf_tunnel_key
)

const (
	ethLen  = 14
	ipLen   = 20
	ttl     = 64
	protoIP = 4
	gre     = 47
)

// code is a program that is being written.
type code struct {
	asm.Instructions
	driver Driver
	counts *ebpf.Map
	label  string // of the next instruction
	n      int    // labels made
}

func (c *code) add(list ...asm.Instruction) {
	for _, i := range list {
		if c.label != "" {
			i, c.label = i.WithSymbol(c.label), ""
		}
		c.Instructions = append(c.Instructions, i)
	}
}

// at names the next instruction.
func (c *code) at(label string) {
	if c.label != "" { // two names for one place
		c.add(asm.Ja.Label(label))
	}
	c.label = label
}

func (c *code) fresh() string { c.n++; return fmt.Sprint("l", c.n) }

func (c *code) start() { c.add(asm.Mov.Reg(asm.R6, asm.R1)) }

// loadPacket copies bytes of the packet to the stack and goes to short if there are not so many. off < 0: the offset is in R2.
func (c *code) loadPacket(off int32, to, n int16, short string) {
	if off >= 0 {
		c.add(asm.Mov.Imm(asm.R2, off))
	}
	c.add(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, int32(to)),
		asm.Mov.Imm(asm.R4, int32(n)),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, short),
	)
}

// lookup finds the value of the key at a place of the stack: R0.
func (c *code) lookup(m *ebpf.Map, key int16, miss string) {
	c.add(
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(key)),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, miss),
	)
}

// copy copies 4 bytes of the stack.
func (c *code) copy(from, to int16) {
	c.add(asm.LoadMem(asm.R2, asm.RFP, from, asm.Word), asm.StoreMem(asm.RFP, to, asm.R2, asm.Word))
}

// ipv4 goes on only if the header at a place of the stack is one that a receiver would take. R2 is its length in words.
func (c *code) ipv4(at int16, otherwise string) {
	c.add(
		asm.LoadMem(asm.R2, asm.RFP, at, asm.Byte),
		asm.Mov.Reg(asm.R3, asm.R2), asm.And.Imm(asm.R3, 0xf0), asm.JNE.Imm(asm.R3, 0x40, otherwise),
		asm.And.Imm(asm.R2, 0x0f), asm.JLT.Imm(asm.R2, 5, otherwise),
	)
}

// count adds the packet and its length in R8 to a counter. R9 has the counter's number.
func (c *code) count() {
	done := c.fresh()
	c.add(asm.StoreMem(asm.RFP, atValue, asm.R9, asm.Word))
	c.lookup(c.counts, atValue, done)
	c.add(
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord), asm.Add.Imm(asm.R1, 1), asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R0, 8, asm.DWord), asm.Add.Reg(asm.R1, asm.R8), asm.StoreMem(asm.R0, 8, asm.R1, asm.DWord),
	)
	c.at(done)
}

// end ends a program: with a block for each way out that it has taken.
func (c *code) end() asm.Instructions {
	taken := map[string]bool{"drop": true}
	for _, i := range c.Instructions {
		taken[i.Reference()] = true
	}
	if taken["pass"] {
		c.at("pass")
		c.add(asm.Mov.Imm(asm.R0, tcNext), asm.Return())
	}
	for _, r := range reasons {
		if taken[string(r)] {
			c.at(string(r))
			c.add(asm.Mov.Imm(asm.R9, number(r)), asm.Ja.Label("drop"))
		}
	}
	c.at("drop")
	c.add(asm.LoadMem(asm.R8, asm.R6, skbLen, asm.Word))
	c.count()
	c.add(asm.Mov.Imm(asm.R0, tcDrop), asm.Return())
	return c.Instructions
}

// onlyIPv4 goes on with plain IPv4 out of a device, without a VLAN tag.
func (c *code) onlyIPv4(otherwise string) {
	c.add(
		asm.LoadMem(asm.R2, asm.R6, skbProtocol, asm.Word), asm.JNE.Imm(asm.R2, int32(swap16(unix.ETH_P_IP)), otherwise),
		asm.LoadMem(asm.R2, asm.R6, skbVLAN, asm.Word), asm.JNE.Imm(asm.R2, 0, otherwise),
	)
}

// swap16 is a number as the machine reads it that is in network order.
func swap16(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}

func word(w wire) int32 { return int32(binary.NativeEndian.Uint32(w[:])) }

func word4(a, b, c, d byte) int32 { return word(wire{a, b, c, d}) }

// network turns a register from the machine's order into the network's, or back.
func network(r asm.Register) asm.Instruction { return asm.HostTo(asm.BE, r, asm.Word) }

// checksumOf is the sum of the parts of an outer header that are the same for all packets of a tunnel: all but type of service
// and length. The order of bytes does not matter as long as it is always the same one.
func (d Driver) checksumOf(local, remote wire) (sum uint32) {
	h := [16]byte{2: 0x40, 4: ttl, 5: d.protocol()} // from the identification on; DF
	copy(h[8:], local[:])
	copy(h[12:], remote[:])
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.NativeEndian.Uint16(h[i:]))
	}
	return sum
}

func (d Driver) protocol() byte {
	if d == EbpfIPIP {
		return protoIP
	}
	return gre
}

// device says whether a device of the kernel writes the outer header.
func (d Driver) device() bool { return d != Ebpf && d != EbpfIPIP }

// encap puts the packet into its tunnel and sends it out of device. On the stack: atOuter has the outer source, destination and key at their
// places in the header, atInner has the inner header, R8 the sum.
func (c *code) encap(device int) {
	c.add(asm.LoadMem(asm.R7, asm.R6, skbLen, asm.Word), asm.Sub.Imm(asm.R7, ethLen)) // survives as the length inside
	if c.driver.device() {
		c.encapByDevice(device)
		return
	}
	over := int32(c.driver.Overhead())
	const total = atOuter + 2
	c.add(
		asm.StoreImm(asm.RFP, atOuter, 0x45, asm.Byte),
		asm.LoadMem(asm.R2, asm.RFP, atInner+1, asm.Byte), asm.StoreMem(asm.RFP, atOuter+1, asm.R2, asm.Byte), // DSCP and ECN
		asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, over),
		asm.JGT.Imm(asm.R2, 0xffff, string(Failed)),
		asm.HostTo(asm.BE, asm.R2, asm.Half), asm.StoreMem(asm.RFP, total, asm.R2, asm.Half),
		asm.StoreImm(asm.RFP, atOuter+4, int64(word4(0, 0, 0x40, 0)), asm.Word), // no identification, DF
		asm.StoreImm(asm.RFP, atOuter+8, int64(ttl), asm.Byte),
		asm.StoreImm(asm.RFP, atOuter+9, int64(c.driver.protocol()), asm.Byte),
		// The checksum: what changes from packet to packet on top of the sum.
		asm.Add.Reg(asm.R8, asm.R2),
		asm.LoadMem(asm.R2, asm.RFP, atOuter, asm.Half), asm.Add.Reg(asm.R8, asm.R2),
		asm.Mov.Reg(asm.R2, asm.R8), asm.RSh.Imm(asm.R2, 16), asm.And.Imm(asm.R8, 0xffff), asm.Add.Reg(asm.R8, asm.R2),
		asm.Mov.Reg(asm.R2, asm.R8), asm.RSh.Imm(asm.R2, 16), asm.And.Imm(asm.R8, 0xffff), asm.Add.Reg(asm.R8, asm.R2),
		asm.Xor.Imm(asm.R8, 0xffff), asm.StoreMem(asm.RFP, atOuter+10, asm.R8, asm.Half),
	)
	flags := int32(fixedGSO | encapIPv4)
	if c.driver == Ebpf {
		flags |= encapGRE
		c.add(asm.StoreImm(asm.RFP, atOuter+20, int64(word4(0x20, 0, 0x08, 0)), asm.Word)) // a key follows; IPv4 inside
	}
	c.add(
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, over), asm.Mov.Imm(asm.R3, roomMAC), asm.Mov.Imm(asm.R4, flags),
		asm.FnSkbAdjustRoom.Call(), asm.JNE.Imm(asm.R0, 0, string(Failed)),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, ethLen), asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, atOuter),
		asm.Mov.Imm(asm.R4, over), asm.Mov.Imm(asm.R5, 0),
		asm.FnSkbStoreBytes.Call(), asm.JNE.Imm(asm.R0, 0, string(Failed)),
		asm.Mov.Reg(asm.R8, asm.R7), asm.Mov.Imm(asm.R9, countOut),
	)
	c.count()
	c.add(
		asm.Mov.Imm(asm.R1, int32(device)), asm.Mov.Imm(asm.R2, 0), asm.Mov.Imm(asm.R3, 0), asm.Mov.Imm(asm.R4, 0),
		asm.FnRedirectNeigh.Call(), asm.Return(),
	)
}

// tunnelFields are the key, source and destination of the outer header, and where struct bpf_tunnel_key has them for a packet that
// leaves (remote is the destination) and for one that came in (remote is the source).
var tunnelFields = []struct{ outer, remote, local int16 }{{24, 0, 0}, {16, 4, 28}, {12, 28, 4}}

// encapByDevice tells the kernel's tunnel device where the packet goes.
func (c *code) encapByDevice(device int) {
	for at := int16(0); at < tunnelKeyOf; at += 4 {
		c.add(asm.StoreImm(asm.RFP, atMeta+at, 0, asm.Word))
	}
	for _, f := range tunnelFields {
		c.add(asm.LoadMem(asm.R2, asm.RFP, atOuter+f.outer, asm.Word), network(asm.R2), asm.StoreMem(asm.RFP, atMeta+f.remote, asm.R2, asm.Word))
	}
	c.add(
		asm.LoadMem(asm.R2, asm.RFP, atInner+1, asm.Byte), asm.StoreMem(asm.RFP, atMeta+20, asm.R2, asm.Byte),
		asm.StoreImm(asm.RFP, atMeta+21, int64(ttl), asm.Byte),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, atMeta),
		asm.Mov.Imm(asm.R3, tunnelKeyOf), asm.Mov.Imm(asm.R4, zeroCsum|dontFrag),
		asm.FnSkbSetTunnelKey.Call(), asm.JNE.Imm(asm.R0, 0, string(Failed)),
		asm.Mov.Reg(asm.R8, asm.R7), asm.Mov.Imm(asm.R9, countOut),
	)
	c.count()
	c.add(asm.Mov.Imm(asm.R1, int32(device)), asm.Mov.Imm(asm.R2, 0), asm.FnRedirect.Call(), asm.Return())
}

// outer takes apart what came in by a tunnel: atOuter gets the outer header with the key, atInner the inner one. It goes to pass with
// what is no tunnel packet, and to bad with the number of the reason in R9. mine, if it is not zero, is the only address that counts.
func (c *code) outer(mine netip.Addr, bad string) {
	if c.driver.device() {
		c.outerOfDevice(bad)
		return
	}
	c.add(asm.LoadMem(asm.R2, asm.R6, skbProtocol, asm.Word), asm.JNE.Imm(asm.R2, int32(swap16(unix.ETH_P_IP)), "pass"))
	c.loadPacket(ethLen, atOuter, ipLen, "pass")
	c.add(asm.LoadMem(asm.R2, asm.RFP, atOuter+9, asm.Byte), asm.JNE.Imm(asm.R2, int32(c.driver.protocol()), "pass"))
	if mine.IsValid() {
		c.add(asm.LoadMem(asm.R2, asm.RFP, atOuter+16, asm.Word), asm.JNE.Imm32(asm.R2, word(wireAddr(mine)), "pass"))
	}
	c.add(
		asm.Mov.Imm(asm.R9, number(Malformed)),
		asm.LoadMem(asm.R2, asm.RFP, atOuter, asm.Byte), asm.JNE.Imm(asm.R2, 0x45, bad),
		asm.Mov.Imm(asm.R9, number(Fragment)),
		asm.LoadMem(asm.R2, asm.RFP, atOuter+6, asm.Half), asm.And.Imm(asm.R2, int32(swap16(0x3fff))), asm.JNE.Imm(asm.R2, 0, bad),
		asm.Mov.Imm(asm.R9, number(Malformed)),
	)
	if c.driver == Ebpf {
		c.loadPacket(ethLen+ipLen, atOuter+20, 8, bad)
		c.add(asm.LoadMem(asm.R2, asm.RFP, atOuter+20, asm.Word), asm.JNE.Imm32(asm.R2, word4(0x20, 0, 0x08, 0), bad))
	} else {
		c.add(asm.StoreImm(asm.RFP, atOuter+24, 0, asm.Word))
	}
	c.loadPacket(ethLen+int32(c.driver.Overhead()), atInner, ipLen, bad)
	c.ipv4(atInner, bad)
}

// outerOfDevice asks for what the kernel's tunnel device took off, and writes it where outer would have found it.
func (c *code) outerOfDevice(bad string) {
	c.add(
		asm.Mov.Imm(asm.R9, number(Malformed)),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, atMeta),
		asm.Mov.Imm(asm.R3, tunnelKeyOf), asm.Mov.Imm(asm.R4, 0),
		asm.FnSkbGetTunnelKey.Call(), asm.JNE.Imm(asm.R0, 0, string(Malformed)),
	)
	for _, f := range tunnelFields {
		c.add(asm.LoadMem(asm.R2, asm.RFP, atMeta+f.local, asm.Word), network(asm.R2), asm.StoreMem(asm.RFP, atOuter+f.outer, asm.R2, asm.Word))
	}
	if c.driver == KernelIPIP {
		c.add(asm.StoreImm(asm.RFP, atOuter+24, 0, asm.Word))
	}
	c.onlyIPv4(bad)
	c.loadPacket(c.driver.innerAt(), atInner, ipLen, bad)
	c.ipv4(atInner, bad)
}

// innerAt is where the inner header is when a tunnel device hands a packet over: only VXLAN carries an Ethernet header.
func (d Driver) innerAt() int32 {
	if d == VXLAN {
		return ethLen
	}
	return 0
}

// deliver takes the tunnel's headers off and puts the packet into the namespace at the other end of the cable whose index is in R8.
func (c *code) deliver() {
	if c.driver.device() {
		if c.driver == VXLAN { // the addresses in its Ethernet header are nobody's
			c.add(asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, 0), asm.FnSkbChangeType.Call())
		}
	} else {
		c.add(
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, -int32(c.driver.Overhead())), asm.Mov.Imm(asm.R3, roomMAC), asm.Mov.Imm(asm.R4, fixedGSO),
			asm.FnSkbAdjustRoom.Call(), asm.JNE.Imm(asm.R0, 0, string(Failed)),
			asm.LoadMem(asm.R2, asm.RFP, atOuter+1, asm.Byte), asm.And.Imm(asm.R2, 3), asm.JNE.Imm(asm.R2, 3, "uncongested"),
			asm.Mov.Reg(asm.R1, asm.R6), asm.FnSkbEcnSetCe.Call(), asm.JEq.Imm(asm.R0, 0, string(Congested)),
		)
		c.at("uncongested")
	}
	c.add(
		asm.Mov.Reg(asm.R7, asm.R8),
		asm.LoadMem(asm.R8, asm.R6, skbLen, asm.Word), asm.Mov.Imm(asm.R9, countIn),
	)
	if !c.driver.device() || c.driver == VXLAN {
		c.add(asm.Sub.Imm(asm.R8, ethLen))
	}
	c.count()
	c.add(asm.Mov.Reg(asm.R1, asm.R7), asm.Mov.Imm(asm.R2, 0), asm.FnRedirectPeer.Call(), asm.Return())
}

// fromInstance is the program on the node's end of an instance's cable.
func fromInstance(d Driver, m *workerMaps, local netip.Addr, device int, noFlows bool) asm.Instructions {
	c := &code{driver: d, counts: m.counters}
	c.start()
	c.onlyIPv4(string(NotIPv4))
	c.loadPacket(ethLen, atInner, ipLen, string(Malformed))
	c.ipv4(atInner, string(Malformed))
	c.add(asm.LSh.Imm(asm.R2, 2), asm.Add.Imm(asm.R2, ethLen), asm.Mov.Reg(asm.R9, asm.R2)) // where the ports are
	// Whose is it?
	c.add(asm.LoadMem(asm.R2, asm.R6, skbIfindex, asm.Word), asm.StoreMem(asm.RFP, atKey, asm.R2, asm.Word))
	c.copy(atInner+12, atKey+4)
	c.lookup(m.slots, atKey, string(Spoofed))
	c.add(asm.LoadMem(asm.R7, asm.R0, 0, asm.Word), asm.LoadMem(asm.R8, asm.R0, 4, asm.Word))
	// Which flow? That of a fragment, or of what has no ports, is all between the two addresses.
	c.copy(atInner+16, atKey+8)
	c.add(
		asm.StoreImm(asm.RFP, atKey+12, 0, asm.Word),
		asm.LoadMem(asm.R3, asm.RFP, atInner+9, asm.Byte), asm.StoreMem(asm.RFP, atKey+16, asm.R3, asm.Word),
		asm.LoadMem(asm.R2, asm.RFP, atInner+6, asm.Half), asm.And.Imm(asm.R2, int32(swap16(0x3fff))), asm.JNE.Imm(asm.R2, 0, "portless"),
		asm.JEq.Imm(asm.R3, unix.IPPROTO_TCP, "ports"), asm.JNE.Imm(asm.R3, unix.IPPROTO_UDP, "portless"),
	)
	c.at("ports")
	c.add(asm.Mov.Reg(asm.R2, asm.R9))
	c.loadPacket(-1, atKey+12, 4, string(Malformed))
	c.at("portless")
	// An old flow's pair, as long as it is one of the VPC's; else the one for new flows, which is then this flow's.
	if !noFlows {
		c.lookup(m.flows, atKey, "new")
		c.add(asm.LoadMem(asm.R2, asm.R0, 0, asm.Word), asm.StoreMem(asm.RFP, atValue, asm.R2, asm.Word))
		c.lookup(m.pairs, atValue, "new")
		c.add(asm.LoadMem(asm.R2, asm.R0, 0, asm.Word), asm.JEq.Reg(asm.R2, asm.R7, "pair"))
	}
	c.at("new")
	c.add(asm.StoreMem(asm.RFP, atValue, asm.R8, asm.Word))
	c.lookup(m.pairs, atValue, string(NoPair))
	c.add(asm.LoadMem(asm.R2, asm.R0, 0, asm.Word), asm.JNE.Reg(asm.R2, asm.R7, string(NoPair)), asm.Mov.Reg(asm.R9, asm.R0))
	if !noFlows {
		c.add(
			asm.LoadMapPtr(asm.R1, m.flows.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, atKey), asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, atValue), asm.Mov.Imm(asm.R4, 0),
			asm.FnMapUpdateElem.Call(), // a flow that finds no room is carried all the same
		)
	}
	c.add(asm.Mov.Reg(asm.R0, asm.R9))
	c.at("pair")
	c.add(
		asm.StoreImm(asm.RFP, atOuter+12, int64(word(wireAddr(local))), asm.Word),
		asm.LoadMem(asm.R2, asm.R0, 4, asm.Word), asm.StoreMem(asm.RFP, atOuter+16, asm.R2, asm.Word),
		asm.LoadMem(asm.R2, asm.R0, 8, asm.Word), asm.StoreMem(asm.RFP, atOuter+24, asm.R2, asm.Word),
		asm.LoadMem(asm.R8, asm.R0, 12, asm.Word),
	)
	c.encap(device)
	return c.end()
}

// fromPair is the program on a worker's device towards the other nodes, or on its tunnel device.
func fromPair(d Driver, m *workerMaps, local netip.Addr) asm.Instructions {
	c := &code{driver: d, counts: m.counters}
	c.start()
	c.outer(local, "drop")
	c.copy(atOuter+24, atKey)
	c.copy(atOuter+12, atKey+4)
	c.lookup(m.peers, atKey, string(UnknownPeer))
	c.add(asm.LoadMem(asm.R2, asm.R0, 0, asm.Word), asm.StoreMem(asm.RFP, atKey, asm.R2, asm.Word))
	c.copy(atInner+16, atKey+4)
	c.lookup(m.inner, atKey, string(NoInstance))
	c.add(asm.LoadMem(asm.R8, asm.R0, 0, asm.Word))
	c.deliver()
	return c.end()
}

// fromWorker is the program on a member's device towards the other nodes, or on its tunnel device.
func fromWorker(d Driver, m *memberMaps) asm.Instructions {
	c := &code{driver: d, counts: m.counters}
	c.start()
	c.outer(netip.Addr{}, "ours?")
	c.copy(atOuter+24, atKey)
	c.copy(atOuter+16, atKey+4)
	c.add(asm.Mov.Imm(asm.R9, number(UnknownPeer)))
	c.lookup(m.tenants, atKey, "ours?")
	c.add(
		asm.LoadMem(asm.R2, asm.R0, 0, asm.Word), asm.JEq.Imm(asm.R2, 0, "drop"), // the entry without a key
		asm.LoadMem(asm.R8, asm.R0, 4, asm.Word),
		asm.StoreMem(asm.RFP, atKey+4, asm.R2, asm.Word),
		asm.StoreImm(asm.RFP, atKey, 64, asm.Word),
	)
	c.copy(atInner+12, atKey+8)
	c.lookup(m.workers, atKey, string(Spoofed))
	c.add(
		asm.LoadMem(asm.R2, asm.R0, 0, asm.Word), asm.LoadMem(asm.R3, asm.RFP, atOuter+12, asm.Word),
		asm.JNE.Reg(asm.R2, asm.R3, string(Spoofed)),
	)
	c.deliver()
	// Something is wrong with it: is the address one of ours at all?
	c.at("ours?")
	c.add(asm.StoreImm(asm.RFP, atKey, 0, asm.Word))
	c.copy(atOuter+16, atKey+4)
	c.lookup(m.tenants, atKey, "pass")
	c.add(asm.Ja.Label("drop"))
	return c.end()
}

// fromTenant is the program on the node's end of the cable into a tenant's namespace.
func fromTenant(d Driver, m *memberMaps, device int) asm.Instructions {
	c := &code{driver: d, counts: m.counters}
	c.start()
	c.onlyIPv4(string(NotIPv4))
	c.loadPacket(ethLen, atInner, ipLen, string(Malformed))
	c.ipv4(atInner, string(Malformed))
	c.add(asm.LoadMem(asm.R2, asm.R6, skbIfindex, asm.Word), asm.StoreMem(asm.RFP, atKey, asm.R2, asm.Word))
	c.lookup(m.hosts, atKey, string(UnknownPeer))
	c.add(
		asm.LoadMem(asm.R2, asm.R0, 4, asm.Word), asm.StoreMem(asm.RFP, atOuter+12, asm.R2, asm.Word),
		asm.LoadMem(asm.R2, asm.R0, 8, asm.Word), asm.StoreMem(asm.RFP, atOuter+24, asm.R2, asm.Word),
		asm.LoadMem(asm.R8, asm.R0, 12, asm.Word),
		asm.StoreImm(asm.RFP, atKey, 64, asm.Word),
		asm.LoadMem(asm.R2, asm.R0, 0, asm.Word), asm.StoreMem(asm.RFP, atKey+4, asm.R2, asm.Word),
	)
	c.copy(atInner+16, atKey+8)
	c.lookup(m.workers, atKey, string(NoWorker))
	c.add(
		asm.LoadMem(asm.R2, asm.R0, 0, asm.Word), asm.StoreMem(asm.RFP, atOuter+16, asm.R2, asm.Word),
		// The worker's address is the part of the sum that is not the tenant's.
		asm.Mov.Reg(asm.R3, asm.R2), asm.RSh.Imm32(asm.R3, 16), asm.And.Imm(asm.R2, 0xffff), asm.Add.Reg(asm.R8, asm.R2), asm.Add.Reg(asm.R8, asm.R3),
	)
	c.encap(device)
	return c.end()
}

// load gives a program to the kernel, whose verifier judges it.
func load(name string, list asm.Instructions) (*ebpf.Program, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: list})
	if err != nil {
		return nil, fmt.Errorf("tunnel: program %s: %w", name, err)
	}
	return p, nil
}
