package ctsync

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"hash"
)

// A datagram is a header, a body, and with a key the first 16 bytes of the HMAC-SHA256 of both:
//
//	 0  "THCS", version (1), type, flags, 0
//	 8  session of the sender: when it began to count, ns since 1970
//	16  session of the receiver as the sender knows it, 0 = not yet
//	24  term
//	32  a, b: two numbers that depend on the type
//	48  body: changes of 48 bytes; for the first datagram of a copy a number before them
const (
	headerSize  = 48
	macSize     = 16
	maxDatagram = 1400 // fits every link, and one more header around it
	perDatagram = (maxDatagram - headerSize - macSize - 8) / changeSize

	// Types, and what a and b are.
	typeHeartbeat = 1 // a: number that the next events will have; b: number of the events expected from the peer
	typeEvents    = 2 // a: number
	typeAgain     = 3 // a: first number to send again
	typePull      = 4 // a: nonce. Asks for a copy of the table
	typeCopy      = 5 // a: nonce; b: index. Index 0 has the number of the next events before its entries
	typeCopyEnd   = 6 // a: nonce; b: index
	typeCopyAck   = 7 // a: nonce; b: index expected next

	flagMaster = 1
)

var magic = [4]byte{'T', 'H', 'C', 'S'}

// datagram is a datagram taken apart.
type datagram struct {
	kind, flags uint8
	session, to uint64
	term        uint64
	a, b        uint64
	base        uint64 // of a copy's index 0
	body        []byte // whole changes
}

// sealer signs and checks; without a key it does nothing. One goroutine may use it.
type sealer struct {
	mac hash.Hash
	sum []byte
}

func newSealer(key []byte) *sealer {
	if len(key) == 0 {
		return &sealer{}
	}
	return &sealer{mac: hmac.New(sha256.New, key)}
}

func (s *sealer) tag(b []byte) []byte {
	s.mac.Reset()
	s.mac.Write(b)
	s.sum = s.mac.Sum(s.sum[:0])
	return s.sum[:macSize]
}

func (s *sealer) seal(b []byte) []byte {
	if s.mac == nil {
		return b
	}
	return append(b, s.tag(b)...)
}

// open checks the seal and takes it off.
func (s *sealer) open(b []byte) ([]byte, bool) {
	if s.mac == nil {
		return b, true
	}
	if len(b) < macSize {
		return nil, false
	}
	body, tag := b[:len(b)-macSize], b[len(b)-macSize:]
	return body, subtle.ConstantTimeCompare(s.tag(body), tag) == 1
}

func (d *datagram) appendHeader(b []byte) []byte {
	b = append(append(b, magic[:]...), 1, d.kind, d.flags, 0)
	for _, v := range [...]uint64{d.session, d.to, d.term, d.a, d.b} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	if d.kind == typeCopy && d.b == 0 {
		b = binary.BigEndian.AppendUint64(b, d.base)
	}
	return b
}

// parse reads a datagram whose seal was right; false for what is malformed.
func parse(b []byte) (d datagram, ok bool) {
	if len(b) < headerSize || len(b) > maxDatagram || [4]byte(b[:4]) != magic || b[4] != 1 || b[7] != 0 {
		return d, false
	}
	d.kind, d.flags = b[5], b[6]
	for i, v := range [...]*uint64{&d.session, &d.to, &d.term, &d.a, &d.b} {
		*v = binary.BigEndian.Uint64(b[8+8*i:])
	}
	d.body = b[headerSize:]
	switch d.kind {
	case typeCopy:
		if d.b == 0 {
			if len(d.body) < 8 {
				return d, false
			}
			d.base, d.body = binary.BigEndian.Uint64(d.body), d.body[8:]
		}
	case typeEvents:
	case typeHeartbeat, typeAgain, typePull, typeCopyEnd, typeCopyAck:
		if len(d.body) != 0 {
			return d, false
		}
	default:
		return d, false
	}
	return d, len(d.body)%changeSize == 0 && d.flags <= flagMaster
}

// changes reads a body, all of it or nothing.
func changes(buf []Change, body []byte) ([]Change, bool) {
	for ; len(body) > 0; body = body[changeSize:] {
		c, ok := parseChange(body)
		if !ok {
			return nil, false
		}
		buf = append(buf, c)
	}
	return buf, true
}
