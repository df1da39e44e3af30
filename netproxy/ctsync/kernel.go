package ctsync

import "encoding/binary"

// Numbers of the kernel's interface (linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, nf_conntrack_tcp.h).
const (
	subsysConntrack = 1
	msgNew          = subsysConntrack << 8
	msgGet          = subsysConntrack<<8 | 1
	msgDelete       = subsysConntrack<<8 | 2

	ctaTupleOrig, ctaTupleReply, ctaStatus, ctaProtoinfo = 1, 2, 3, 4
	ctaNATSrc, ctaTimeout, ctaMark, ctaNATDst, ctaZone   = 6, 7, 8, 13, 18

	ctaTupleIP, ctaTupleProto = 1, 2
	ctaIPSrc, ctaIPDst        = 1, 2

	ctaProtoNum, ctaProtoSrcPort, ctaProtoDstPort      = 1, 2, 3
	ctaProtoICMPID, ctaProtoICMPType, ctaProtoICMPCode = 4, 5, 6

	ctaProtoinfoTCP                               = 1
	ctaTCPState, ctaTCPWScaleOrig                 = 1, 2
	ctaTCPWScaleReply, ctaTCPFlagsOrig            = 3, 4
	ctaTCPFlagsReply                              = 5
	ctaNATMinIP, ctaNATMaxIP, ctaNATProto         = 1, 2, 3
	ctaProtoNATPortMin, ctaProtoNATPortMax        = 1, 2
	nested, attrTypeMask                          = 0x8000, 0x3fff
	flagRequest, flagCreate, flagExcl             = 0x1, 0x400, 0x200
	flagDump                                      = 0x300
	typeNoop, typeError, typeDone                 = 1, 2, 3
	nlmsgHeader, nfgenHeader, attrHeader          = 16, 4, 4
	afInet                                        = 2
	tcpFlagBeLiberal                              = 0x08
	minTimeout                             uint32 = 180 // see request.state
)

// native is the byte order of netlink headers and lengths. What runs here is little endian, as are all platforms that we build for.
var native = binary.LittleEndian

// message is one message of a netlink datagram.
type message struct {
	kind   uint16
	flags  uint16
	seq    uint32
	portID uint32
	body   []byte
}

// nextMessage splits the first message off a datagram; false when nothing whole is left.
func nextMessage(b []byte) (m message, rest []byte, ok bool) {
	if len(b) < nlmsgHeader {
		return m, nil, false
	}
	n := int(native.Uint32(b))
	if n < nlmsgHeader || n > len(b) {
		return m, nil, false
	}
	m = message{native.Uint16(b[4:]), native.Uint16(b[6:]), native.Uint32(b[8:]), native.Uint32(b[12:]), b[nlmsgHeader:n]}
	return m, b[min((n+3)&^3, len(b)):], true
}

// attributes calls f for each attribute; false if they are cut off.
func attributes(b []byte, f func(kind uint16, v []byte)) bool {
	for len(b) >= attrHeader {
		n := int(native.Uint16(b))
		if n < attrHeader || n > len(b) {
			return false
		}
		f(native.Uint16(b[2:])&attrTypeMask, b[attrHeader:n])
		b = b[min((n+3)&^3, len(b)):]
	}
	return len(b) == 0
}

// parseEvent reads a message of the kernel about an entry; false for what is not replicated.
func parseEvent(m message) (c Change, ok bool) {
	switch {
	case m.kind == msgDelete:
		c.Kind = Destroy
	case m.kind == msgNew && m.flags&flagCreate != 0:
		c.Kind = Create
	case m.kind == msgNew:
		c.Kind = Update
	default:
		return c, false
	}
	if len(m.body) < nfgenHeader || m.body[0] != afInet {
		return c, false
	}
	var orig, reply bool
	ok = attributes(m.body[nfgenHeader:], func(kind uint16, v []byte) {
		switch {
		case kind == ctaTupleOrig:
			c.Orig, c.Proto, orig = parseTuple(v)
		case kind == ctaTupleReply:
			c.Reply, _, reply = parseTuple(v)
		case kind == ctaProtoinfo:
			c.TCP = parseProtoinfo(v)
		case kind == ctaZone && len(v) == 2:
			c.Zone = binary.BigEndian.Uint16(v)
		case len(v) != 4:
		case kind == ctaStatus:
			c.Status = binary.BigEndian.Uint32(v) & replicated
		case kind == ctaTimeout:
			c.Timeout = binary.BigEndian.Uint32(v)
		case kind == ctaMark:
			c.Mark = binary.BigEndian.Uint32(v)
		}
	})
	return c, ok && orig && reply
}

func parseTuple(b []byte) (t Tuple, proto uint8, ok bool) {
	ports := 0
	whole := attributes(b, func(kind uint16, v []byte) {
		attributes(v, func(k uint16, v []byte) {
			switch {
			case kind == ctaTupleIP && k == ctaIPSrc && len(v) == 4:
				copy(t.Src[:], v)
				ports |= 1
			case kind == ctaTupleIP && k == ctaIPDst && len(v) == 4:
				copy(t.Dst[:], v)
				ports |= 2
			case kind != ctaTupleProto:
			case k == ctaProtoNum && len(v) == 1:
				proto = v[0]
			case (k == ctaProtoSrcPort || k == ctaProtoICMPID) && len(v) == 2:
				t.SPort = binary.BigEndian.Uint16(v)
				ports |= 4
			case k == ctaProtoDstPort && len(v) == 2:
				t.DPort = binary.BigEndian.Uint16(v)
				ports |= 8
			case k == ctaProtoICMPType && len(v) == 1:
				t.DPort |= uint16(v[0]) << 8
				ports |= 8
			case k == ctaProtoICMPCode && len(v) == 1:
				t.DPort |= uint16(v[0])
			}
		})
	})
	return t, proto, whole && ports == 15 && (proto == tcp || proto == udp || proto == icmp)
}

func parseProtoinfo(b []byte) (s TCPState) {
	attributes(b, func(kind uint16, v []byte) {
		if kind != ctaProtoinfoTCP {
			return
		}
		attributes(v, func(k uint16, v []byte) {
			switch {
			case k == ctaTCPState && len(v) == 1:
				s.State, s.Known = v[0], true
			case k == ctaTCPWScaleOrig && len(v) == 1:
				s.WScaleOrig = v[0]
			case k == ctaTCPWScaleReply && len(v) == 1:
				s.WScaleReply = v[0]
			case k == ctaTCPFlagsOrig && len(v) == 2:
				s.FlagsOrig = v[0]
			case k == ctaTCPFlagsReply && len(v) == 2:
				s.FlagsReply = v[0]
			}
		})
	})
	return s
}

// request is a buffer of netlink messages about conntrack.
type request []byte

// begin starts a message and returns where, for end.
func (r *request) begin(kind, flags uint16, seq uint32) int {
	at := len(*r)
	*r = native.AppendUint32(*r, 0)
	*r = native.AppendUint16(*r, kind)
	*r = native.AppendUint16(*r, flagRequest|flags)
	*r = native.AppendUint32(*r, seq)
	*r = native.AppendUint32(*r, 0)
	*r = append(*r, afInet, 0, 0, 0)
	return at
}

func (r *request) end(at int) { native.PutUint32((*r)[at:], uint32(len(*r)-at)) }

func (r *request) attr(kind uint16, v ...byte) {
	*r = native.AppendUint16(*r, uint16(attrHeader+len(v)))
	*r = native.AppendUint16(*r, kind)
	*r = append(*r, v...)
	for len(*r)%4 != 0 {
		*r = append(*r, 0)
	}
}

func (r *request) attr32(kind uint16, v uint32) {
	r.attr(kind, binary.BigEndian.AppendUint32(nil, v)...)
}

func (r *request) nest(kind uint16) int {
	at := len(*r)
	*r = native.AppendUint16(*r, 0)
	*r = native.AppendUint16(*r, kind|nested)
	return at
}

func (r *request) close(at int) { native.PutUint16((*r)[at:], uint16(len(*r)-at)) }

func (r *request) port(kind uint16, p uint16) { r.attr(kind, byte(p>>8), byte(p)) }

func (r *request) tuple(kind uint16, t Tuple, proto uint8) {
	all := r.nest(kind)
	ip := r.nest(ctaTupleIP)
	r.attr(ctaIPSrc, t.Src[:]...)
	r.attr(ctaIPDst, t.Dst[:]...)
	r.close(ip)
	p := r.nest(ctaTupleProto)
	r.attr(ctaProtoNum, proto)
	if proto == icmp {
		r.port(ctaProtoICMPID, t.SPort)
		r.attr(ctaProtoICMPType, byte(t.DPort>>8))
		r.attr(ctaProtoICMPCode, byte(t.DPort))
	} else {
		r.port(ctaProtoSrcPort, t.SPort)
		r.port(ctaProtoDstPort, t.DPort)
	}
	r.close(p)
	r.close(all)
}

func (r *request) zone(z uint16) {
	if z != 0 {
		r.port(ctaZone, z)
	}
}

// nat asks for a translation to exactly one address and port. For ICMP the identifier takes the place of the port.
func (r *request) nat(kind uint16, addr [4]byte, port uint16) {
	at := r.nest(kind)
	r.attr(ctaNATMinIP, addr[:]...)
	r.attr(ctaNATMaxIP, addr[:]...)
	p := r.nest(ctaNATProto)
	r.port(ctaProtoNATPortMin, port)
	r.port(ctaProtoNATPortMax, port)
	r.close(p)
	r.close(at)
}

// state writes what a new and a changed entry have in common. Status has to have the confirmed bit, which every entry in a table has:
// taking it away is refused. TCP entries do not insist on windows, because the sequence numbers that were seen are not replicated.
func (r *request) state(e *Entry) {
	r.attr32(ctaStatus, e.Status&replicated|confirmed)
	// Packets of UDP and ICMP prolong an entry without an event. The peer's stays until it hears of the end or the next copy.
	timeout := e.Timeout
	if e.Proto != tcp {
		timeout = max(timeout, minTimeout)
	}
	r.attr32(ctaTimeout, timeout)
	r.attr32(ctaMark, e.Mark)
	if e.Proto != tcp || !e.TCP.Known {
		return
	}
	info := r.nest(ctaProtoinfo)
	t := r.nest(ctaProtoinfoTCP)
	r.attr(ctaTCPState, e.TCP.State)
	r.attr(ctaTCPWScaleOrig, e.TCP.WScaleOrig)
	r.attr(ctaTCPWScaleReply, e.TCP.WScaleReply)
	orig, reply := e.TCP.FlagsOrig|tcpFlagBeLiberal, e.TCP.FlagsReply|tcpFlagBeLiberal
	r.attr(ctaTCPFlagsOrig, orig, orig) // flags and which of them count
	r.attr(ctaTCPFlagsReply, reply, reply)
	r.close(t)
	r.close(info)
}

// create enters a connection that is not there. The kernel makes translations from what is asked for, not from the status bits; the
// reply direction is given as if nothing were translated.
func (r *request) create(e *Entry, seq uint32) {
	at := r.begin(msgNew, flagCreate|flagExcl, seq)
	plain := e.Orig.inverse(e.Proto)
	r.tuple(ctaTupleOrig, e.Orig, e.Proto)
	r.tuple(ctaTupleReply, plain, e.Proto)
	r.zone(e.Zone)
	known := *e
	if known.Proto == tcp && !known.TCP.Known && known.Status&assured != 0 {
		known.TCP = TCPState{Known: true, State: tcpEstablished}
	}
	r.state(&known)
	// Where the answers go is the translated source; where they come from, the translated destination.
	source, dest := e.Reply.DPort, e.Reply.SPort
	if e.Proto == icmp {
		source, dest = e.Reply.SPort, e.Reply.SPort
	}
	if e.Reply.Dst != plain.Dst || (e.Proto != icmp && e.Reply.DPort != plain.DPort) || (e.Proto == icmp && e.Reply.SPort != plain.SPort) {
		r.nat(ctaNATSrc, e.Reply.Dst, source)
	}
	if e.Reply.Src != plain.Src || (e.Proto != icmp && e.Reply.SPort != plain.SPort) {
		r.nat(ctaNATDst, e.Reply.Src, dest)
	}
	r.end(at)
}

// update changes an entry that is there. It must not name translations, which are refused for those.
func (r *request) update(e *Entry, seq uint32) {
	at := r.begin(msgNew, 0, seq)
	r.tuple(ctaTupleOrig, e.Orig, e.Proto)
	r.zone(e.Zone)
	r.state(e)
	r.end(at)
}

// remove takes the entry away that has a tuple as its original or reply direction.
func (r *request) remove(k Key, direction uint16, t Tuple, seq uint32) {
	at := r.begin(msgDelete, 0, seq)
	r.tuple(direction, t, k.Proto)
	r.zone(k.Zone)
	r.end(at)
}

// dump asks for all entries.
func (r *request) dump(seq uint32) {
	r.end(r.begin(msgGet, flagDump, seq))
}
