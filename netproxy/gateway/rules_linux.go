package gateway

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
)

// gate says what a pair does with connections.
type gate string

const (
	gateOpen     gate = "open"
	gateFull     gate = "full"     // the tenant's quota is used up: new ones are refused
	gateDraining gate = "draining" // new ones are refused
	gateClosed   gate = "closed"   // all are refused, with a reset
)

// What the rules count, in packets.
const (
	countInbound = "inbound" // from the tenant's network, of no connection that a function began
	countInvalid = "invalid" // from a function, of no connection that is known
	countQuota   = "quota"   // refused: over the quota of the instance, or of the tenant
	countDrained = "drained" // refused: the pair is draining
	countLeak    = "leak"    // dropped: would have left with another source than the pair's own
)

var counters = []string{countInbound, countInvalid, countQuota, countDrained, countLeak}

const (
	tableName  = "thaw"
	nodeDevice = "node" // the cable to the node, in the tenant's namespace
	// Registers are shared by the rules below, each of which begins anew.
	reg, reg2 = 1, 2
	// Between defragmentation and conntrack, and after translation.
	beforeConntrack nftables.ChainPriority = -350
	afterNAT        nftables.ChainPriority = 300
)

// ruleset makes the rules of a pair. Everything is refused that is not said to pass.
type ruleset struct {
	c     *nftables.Conn
	table *nftables.Table
	pair  *Pair
	mtu   int    // of the tunnel, bytes of IP
	sets  uint32 // so far
}

// setRules puts the rules of a pair into its namespace, in one step, unless they are there already: counters, and what instances
// have used of their quotas, go on when nothing has changed.
func setRules(in *link.Namespace, p *Pair, mtu int) error {
	c, err := in.Rules()
	if err != nil {
		return fmt.Errorf("rules: %w", err)
	}
	stamp, err := stamp(p, mtu)
	if err != nil {
		return err
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return fmt.Errorf("rules: %w", err)
	}
	old := false
	for _, ch := range chains {
		if ch.Table.Name == tableName && ch.Name == stamp {
			return nil
		}
		old = old || ch.Table.Name == tableName
	}
	r := &ruleset{c: c, table: &nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName}, pair: p, mtu: mtu}
	if old {
		c.DelTable(r.table)
	}
	if err := r.all(stamp); err != nil {
		return fmt.Errorf("rules: %w", err)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("rules: %w", err)
	}
	return nil
}

// stamp names an empty chain by which rules are known again: of all that they are made from.
func stamp(p *Pair, mtu int) (string, error) {
	const version = 1 // of the rules below
	q := *p
	q.Draining, q.Name, q.Network, q.Flows = false, "", Network{}, 0 // not in them
	b, err := json.Marshal(q)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(b, " %d %d", mtu, version))
	return fmt.Sprintf("made-%x", sum[:8]), nil
}

func (r *ruleset) chain(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority, drop bool) *nftables.Chain {
	ch := &nftables.Chain{Name: name, Table: r.table}
	if hook != nil {
		policy := nftables.ChainPolicyAccept
		if drop {
			policy = nftables.ChainPolicyDrop
		}
		ch.Type, ch.Hooknum, ch.Priority, ch.Policy = kind, hook, &prio, &policy
	}
	return r.c.AddChain(ch)
}

func (r *ruleset) rule(ch *nftables.Chain, parts ...[]expr.Any) {
	r.c.AddRule(&nftables.Rule{Table: r.table, Chain: ch, Exprs: slices.Concat(parts...)})
}

// set adds a set with a name. Its number has to be its own in this step only; the library would give it one from a counter that it shares among
// all goroutines without a lock.
func (r *ruleset) set(s *nftables.Set, elements []nftables.SetElement) error {
	r.sets++
	s.ID = r.sets
	return r.c.AddSet(s, elements)
}

func (r *ruleset) all(stamp string) error {
	r.c.AddTable(r.table)
	r.chain(stamp, "", nil, 0, false)
	for _, name := range counters {
		r.c.AddObj(&nftables.CounterObj{Table: r.table, Name: name})
	}
	sources := &nftables.Set{Table: r.table, Name: "sources", KeyType: nftables.TypeIPAddr, Dynamic: true, Size: maxInstances}
	if err := r.set(sources, nil); err != nil {
		return err
	}
	const filter, nat = nftables.ChainTypeFilter, nftables.ChainTypeNAT
	passage := r.chain("gate", "", nil, 0, false)

	// Nothing in the namespace answers anybody. In particular there is no reset to a packet of a connection that the other member knows.
	input := r.chain("input", filter, nftables.ChainHookInput, 0, true)
	r.rule(input, count(countInbound))

	forward := r.chain("forward", filter, nftables.ChainHookForward, 0, true)
	r.rule(forward, device(expr.MetaKeyIIFNAME, nodeDevice), state(expr.CtStateBitINVALID), count(countInvalid), verdict(expr.VerdictDrop))
	r.rule(forward, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: passage.Name}})
	for _, dev := range []string{nodeDevice, eniDevice} {
		r.rule(forward, device(expr.MetaKeyIIFNAME, dev), clampMSS(r.mtu-40))
	}
	r.rule(forward, state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), verdict(expr.VerdictAccept))
	out := slices.Concat(device(expr.MetaKeyIIFNAME, nodeDevice), device(expr.MetaKeyOIFNAME, eniDevice), state(expr.CtStateBitNEW))
	r.rule(forward, out, source(), []expr.Any{&expr.Dynset{
		SrcRegKey: reg, SetName: sources.Name, SetID: sources.ID, Operation: uint32(unix.NFT_DYNSET_OP_ADD),
		// The flag turns it round: "at most" passes. Where the set is full the rule does not match, and the next one refuses.
		Exprs: []expr.Any{&expr.Connlimit{Count: uint32(r.pair.PerSource)}},
	}}, verdict(expr.VerdictAccept))
	r.rule(forward, out, count(countQuota), refuse())
	r.rule(forward, device(expr.MetaKeyIIFNAME, eniDevice), count(countInbound))

	post := r.chain("post", nat, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource, false)
	if err := r.translate(post); err != nil {
		return err
	}
	return r.fixed()
}

// translate gives what leaves a HAVIP as its source. Ports are random: two members that have not talked must not agree by chance.
// Never masquerade, which forgets its connections when the address goes.
func (r *ruleset) translate(ch *nftables.Chain) error {
	p := r.pair
	addr := []expr.Any{&expr.Immediate{Register: reg, Data: p.HAVIPs[0].AsSlice()}}
	if len(p.HAVIPs) > 1 { // an instance keeps to one of them
		m := &nftables.Set{Table: r.table, Name: "havips", IsMap: true, KeyType: nftables.TypeMark, DataType: nftables.TypeIPAddr}
		var list []nftables.SetElement
		for i, a := range p.HAVIPs {
			list = append(list, nftables.SetElement{Key: binary.NativeEndian.AppendUint32(nil, uint32(i)), Val: a.AsSlice()})
		}
		if err := r.set(m, list); err != nil {
			return err
		}
		addr = []expr.Any{
			&expr.Payload{DestRegister: reg2, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
			&expr.Hash{SourceRegister: reg2, DestRegister: reg, Length: 4, Modulus: uint32(len(p.HAVIPs)), Seed: 0x74686177, Type: expr.HashTypeJenkins},
			&expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
		}
	}
	const first, last = 2, 3
	r.rule(ch, device(expr.MetaKeyOIFNAME, eniDevice), addr, []expr.Any{
		&expr.Immediate{Register: first, Data: binary.BigEndian.AppendUint16(nil, p.Ports.First)},
		&expr.Immediate{Register: last, Data: binary.BigEndian.AppendUint16(nil, p.Ports.Last)},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg, RegProtoMin: first, RegProtoMax: last, FullyRandom: true, Specified: true},
	})
	return nil
}

// fixed puts EIPs in the place of HAVIPs outside of the subnet, without any state: the connection is one of the HAVIP's. Errors (ICMP)
// name the packet that they are about: there too.
func (r *ruleset) fixed() error {
	p := r.pair
	own := &nftables.Set{Table: r.table, Name: "own", KeyType: nftables.TypeIPAddr}
	var all []nftables.SetElement
	for _, a := range p.HAVIPs {
		all = append(all, nftables.SetElement{Key: a.AsSlice()})
	}
	if err := r.set(own, all); err != nil {
		return err
	}
	after := r.chain("after", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, afterNAT, false)
	r.rule(after, device(expr.MetaKeyOIFNAME, eniDevice), source(), []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: own.Name, SetID: own.ID, Invert: true}},
		count(countLeak), verdict(expr.VerdictDrop))
	if len(p.EIPs) == 0 {
		return nil
	}
	out := &nftables.Set{Table: r.table, Name: "eips", IsMap: true, KeyType: nftables.TypeIPAddr, DataType: nftables.TypeIPAddr}
	in := &nftables.Set{Table: r.table, Name: "eips_back", IsMap: true, KeyType: nftables.TypeIPAddr, DataType: nftables.TypeIPAddr}
	var there, back []nftables.SetElement
	for havip, eip := range p.EIPs {
		there = append(there, nftables.SetElement{Key: havip.AsSlice(), Val: eip.AsSlice()})
		back = append(back, nftables.SetElement{Key: eip.AsSlice(), Val: havip.AsSlice()})
	}
	for _, m := range []struct {
		set  *nftables.Set
		list []nftables.SetElement
	}{{out, there}, {in, back}} {
		if err := r.set(m.set, m.list); err != nil {
			return err
		}
	}
	r.rule(after, device(expr.MetaKeyOIFNAME, eniDevice), outside(p.Subnet), rewrite(out, expr.PayloadBaseNetworkHeader, 12, 10, 1))
	before := r.chain("before", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeConntrack, false)
	r.rule(before, device(expr.MetaKeyIIFNAME, eniDevice), rewrite(in, expr.PayloadBaseNetworkHeader, 16, 10, 1))
	const sourceInError, checksum = 8 + 12, 2
	for _, kind := range []byte{3, 11, 12} { // unreachable, time exceeded, parameter problem
		r.rule(before, device(expr.MetaKeyIIFNAME, eniDevice), icmp(kind), rewrite(in, expr.PayloadBaseTransportHeader, sourceInError, checksum, 0))
	}
	return nil
}

// setGate says what the pair does with connections from now on.
func setGate(in *link.Namespace, g gate) error {
	c, err := in.Rules()
	if err != nil {
		return fmt.Errorf("gate: %w", err)
	}
	r := &ruleset{c: c, table: &nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName}}
	ch := &nftables.Chain{Name: "gate", Table: r.table}
	c.FlushChain(ch)
	fromNode := device(expr.MetaKeyIIFNAME, nodeDevice)
	switch g {
	case gateFull:
		r.rule(ch, fromNode, state(expr.CtStateBitNEW), count(countQuota), refuse())
	case gateDraining:
		r.rule(ch, fromNode, state(expr.CtStateBitNEW), count(countDrained), refuse())
	case gateClosed:
		r.rule(ch, protocol(unix.IPPROTO_TCP), count(countDrained), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
		r.rule(ch, count(countDrained), refuse())
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("gate: %w", err)
	}
	return nil
}

// readCounters returns what the rules have counted, in packets.
func readCounters(in *link.Namespace) (map[string]uint64, error) {
	c, err := in.Rules()
	if err != nil {
		return nil, fmt.Errorf("counters: %w", err)
	}
	list, err := c.GetObjects(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName})
	if err != nil {
		return nil, fmt.Errorf("counters: %w", err)
	}
	m := map[string]uint64{}
	for _, o := range list {
		switch o := o.(type) {
		case *nftables.CounterObj:
			m[o.Name] = o.Packets
		case *nftables.NamedObj:
			if v, ok := o.Obj.(*expr.Counter); ok {
				m[o.Name] = v.Packets
			}
		}
	}
	return m, nil
}

// The parts of rules. Each uses registers for itself, and is done with them.

func device(key expr.MetaKey, name string) []expr.Any {
	b := []byte(name + strings.Repeat("\x00", unix.IFNAMSIZ-len(name)))
	return []expr.Any{&expr.Meta{Key: key, Register: reg}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: b}}
}

func state(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: make([]byte, 4)},
	}
}

func protocol(p byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{p}}}
}

func icmp(kind byte) []expr.Any {
	return append(protocol(unix.IPPROTO_ICMP),
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{kind}})
}

// source loads the source address into reg.
func source() []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}}
}

func outside(p netip.Prefix) []expr.Any {
	mask := binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-p.Bits()))
	return []expr.Any{
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: p.Masked().Addr().AsSlice()},
	}
}

// rewrite replaces an address that a map has, and mends the checksum; pseudo: that of TCP and UDP too, which covers addresses of the header.
func rewrite(m *nftables.Set, base expr.PayloadBase, offset, checksum, pseudo uint32) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: 4},
		&expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
		&expr.Payload{
			OperationType: expr.PayloadWrite, SourceRegister: reg, Base: base, Offset: offset, Len: 4,
			CsumType: expr.CsumTypeInet, CsumOffset: checksum, CsumFlags: pseudo,
		},
	}
}

// clampMSS lowers the largest segment that a SYN offers to what fits.
func clampMSS(most int) []expr.Any {
	const tcpFlags, syn, maxSegment = 13, 2, 2
	limit := binary.BigEndian.AppendUint16(nil, uint16(most))
	return append(protocol(unix.IPPROTO_TCP),
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 1, Mask: []byte{syn}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: []byte{0}},
		&expr.Exthdr{DestRegister: reg, Type: maxSegment, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
		&expr.Cmp{Op: expr.CmpOpGt, Register: reg, Data: limit},
		&expr.Immediate{Register: reg, Data: limit},
		&expr.Exthdr{SourceRegister: reg, Type: maxSegment, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt})
}

func count(name string) []expr.Any {
	return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}
}

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

// refuse tells the function at once ("no route to host"), which would wait for a time-out otherwise.
func refuse() []expr.Any {
	const adminProhibited = 13
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: adminProhibited}}
}
