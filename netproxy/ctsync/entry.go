package ctsync

import (
	"encoding/binary"
	"math"
	"net/netip"
)

// Protocols that are replicated.
const (
	icmp = 1
	tcp  = 6
	udp  = 17
)

// Bits of Entry.Status, as in the kernel (enum ip_conntrack_status).
const (
	seenReply = 1 << 1
	assured   = 1 << 2
	confirmed = 1 << 3
	// replicated are the bits that mean the same on another machine. The others say what this kernel has done with an entry, are
	// refused by the peer's, or follow from the addresses.
	replicated = seenReply | assured
)

// Tuple is one direction of a connection. For ICMP, SPort is the identifier, and DPort has type and code.
type Tuple struct {
	Src, Dst     [4]byte
	SPort, DPort uint16
}

// inverse is the direction back of a connection that nobody translates.
func (t Tuple) inverse(proto uint8) Tuple {
	r := Tuple{Src: t.Dst, Dst: t.Src, SPort: t.DPort, DPort: t.SPort}
	if proto == icmp {
		r.SPort, r.DPort = t.SPort, uint16(icmpAnswer(uint8(t.DPort>>8)))<<8|t.DPort&0xff
	}
	return r
}

// icmpAnswer is the type that answers a query and the other way round, as in nf_conntrack_proto_icmp.c.
func icmpAnswer(kind uint8) uint8 {
	switch kind {
	case 8, 0: // echo
		return 8 - kind
	case 13, 15, 17: // timestamp, information, address mask
		return kind + 1
	case 14, 16, 18:
		return kind - 1
	}
	return kind
}

// TCPState is what connection tracking knows of a TCP connection.
type TCPState struct {
	Known                   bool  // false: the event did not say
	State                   uint8 // enum tcp_conntrack
	WScaleOrig, WScaleReply uint8
	FlagsOrig, FlagsReply   uint8
}

// Key is what tells entries of one table apart.
type Key struct {
	Zone  uint16
	Proto uint8
	Orig  Tuple
}

// Entry is one connection.
type Entry struct {
	Key
	Reply   Tuple
	Status  uint32
	Timeout uint32 // seconds
	Mark    uint32
	TCP     TCPState
}

// Kind says what happened to an entry.
type Kind uint8

const (
	Create  Kind = 1 // there was none before
	Update  Kind = 2
	Destroy Kind = 3
	Copy    Kind = 4 // the entry as it is, in a copy of the table

	// Never on the wire.
	offer   Kind = 5 // see table.apply
	replace Kind = 6 // a Create whose addresses and ports other entries have: those go
)

// Change is an event of a table.
type Change struct {
	Kind Kind
	Entry
}

// changeSize is the size of a change on the wire.
const changeSize = 48

func (t Tuple) append(b []byte) []byte {
	b = append(append(b, t.Src[:]...), t.Dst[:]...)
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, t.SPort), t.DPort)
}

func tuple(b []byte) (t Tuple) {
	copy(t.Src[:], b)
	copy(t.Dst[:], b[4:])
	t.SPort, t.DPort = binary.BigEndian.Uint16(b[8:]), binary.BigEndian.Uint16(b[10:])
	return t
}

// append writes a change in changeSize bytes: kind, protocol, zone, original and reply tuple, status, time-out, mark, 1 if the state of TCP is
// known, state, window scales, flags, two bytes of zero.
func (c *Change) append(b []byte) []byte {
	b = append(b, byte(c.Kind), c.Proto)
	b = binary.BigEndian.AppendUint16(b, c.Zone)
	b = c.Reply.append(c.Orig.append(b))
	b = binary.BigEndian.AppendUint32(b, c.Status)
	b = binary.BigEndian.AppendUint32(b, c.Timeout)
	b = binary.BigEndian.AppendUint32(b, c.Mark)
	known := byte(0)
	if c.TCP.Known {
		known = 1
	}
	return append(b, known, c.TCP.State, c.TCP.WScaleOrig, c.TCP.WScaleReply, c.TCP.FlagsOrig, c.TCP.FlagsReply, 0, 0)
}

// parseChange reads what append wrote; false for what could not have been written by it.
func parseChange(b []byte) (c Change, ok bool) {
	if len(b) < changeSize {
		return c, false
	}
	c.Kind, c.Proto, c.Zone = Kind(b[0]), b[1], binary.BigEndian.Uint16(b[2:])
	c.Orig, c.Reply = tuple(b[4:]), tuple(b[16:])
	c.Status, c.Timeout, c.Mark = binary.BigEndian.Uint32(b[28:]), binary.BigEndian.Uint32(b[32:]), binary.BigEndian.Uint32(b[36:])
	c.TCP = TCPState{b[40] == 1, b[41], b[42], b[43], b[44], b[45]}
	ok = c.Kind >= Create && c.Kind <= Copy && (c.Proto == tcp || c.Proto == udp || c.Proto == icmp) &&
		b[40] <= 1 && b[46] == 0 && b[47] == 0 && c.Timeout <= math.MaxInt32 &&
		c.TCP.State <= maxTCPState && c.TCP.WScaleOrig <= 14 && c.TCP.WScaleReply <= 14
	return c, ok
}

const (
	maxTCPState    = 9 // TCP_CONNTRACK_SYN_SENT2
	tcpEstablished = 3
)

// local says whether an entry is a conversation with the router itself, which is nobody else's business.
func (e *Entry) local(own map[[4]byte]bool) bool {
	return own[e.Orig.Src] || own[e.Orig.Dst] || e.Orig.Src[0] == 127 || netip.AddrFrom4(e.Orig.Dst).IsMulticast()
}
