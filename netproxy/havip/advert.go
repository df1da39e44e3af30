package havip

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Advert is what the one in charge says again and again.
type Advert struct {
	Router   uint8 // VRID: tells several pairs on a link apart
	Priority uint8 // 0: the sender gives up
	Interval time.Duration
	Addrs    []netip.Addr
	// Term and Count are sent, and count, only between members with a key. Term rises by one with each take-over; Count with each
	// advert, from the time of day (ns) when the sender began, so that an old advert cannot be played again.
	Term, Count uint64
}

var (
	errShort    = errors.New("cut off")
	errNotVRRP  = errors.New("no VRRPv3 advert")
	errChecksum = errors.New("wrong checksum")
	errUnsigned = errors.New("no signature, or a wrong one")
)

const (
	vrrpHeader = 8
	sealMark   = 0x54484157 // "THAW"
	sealSize   = 4 + 8 + 8 + 16
	maxAddrs   = 16
	// MaxInterval is what fits in the 12 bits of the packet.
	MaxInterval = 4095 * 10 * time.Millisecond
)

// Append writes the packet (RFC 5798, section 5.1) as it follows the IP header. With a key it has a trailer that other implementations
// do not look at: a mark, term, count, and the first 16 bytes of an HMAC-SHA256 over source address and packet, whose checksum
// counts as 0 for that.
func (a *Advert) Append(b []byte, from, to netip.Addr, key []byte) []byte {
	at := len(b)
	b = append(b, 3<<4|1, a.Router, a.Priority, byte(len(a.Addrs)))
	b = binary.BigEndian.AppendUint16(b, uint16(a.Interval/(10*time.Millisecond))&0xfff)
	b = append(b, 0, 0)
	for _, addr := range a.Addrs {
		v := addr.As4()
		b = append(b, v[:]...)
	}
	if len(key) > 0 {
		b = binary.BigEndian.AppendUint32(b, sealMark)
		b = binary.BigEndian.AppendUint64(b, a.Term)
		b = binary.BigEndian.AppendUint64(b, a.Count)
		b = append(b, tag(b[at:], from, key)...)
	}
	binary.BigEndian.PutUint16(b[at+6:], checksum(b[at:], from, to))
	return b
}

func tag(b []byte, from netip.Addr, key []byte) []byte {
	mac := hmac.New(sha256.New, key)
	addr := from.As4()
	mac.Write(addr[:])
	mac.Write(b)
	return mac.Sum(nil)[:16]
}

// checksum is that of the packet with the pseudo-header of IPv4 (RFC 5798, section 5.2.8).
func checksum(b []byte, from, to netip.Addr) uint16 {
	src, dst := from.As4(), to.As4()
	sum := uint32(protocolVRRP) + uint32(len(b))
	for _, part := range [][]byte{src[:], dst[:], b} {
		for ; len(part) > 1; part = part[2:] {
			sum += uint32(part[0])<<8 | uint32(part[1])
		}
		if len(part) == 1 {
			sum += uint32(part[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

const protocolVRRP = 112

// ParseAdvert reads an advert. With a key, only a signed one is believed; without, trailers are not looked at. Addrs has room for
// the addresses and is overwritten.
func ParseAdvert(b []byte, from, to netip.Addr, key []byte, addrs []netip.Addr) (a Advert, err error) {
	if len(b) < vrrpHeader {
		return a, errShort
	}
	if b[0] != 3<<4|1 {
		return a, errNotVRRP
	}
	n := int(b[3])
	if n > maxAddrs {
		return a, fmt.Errorf("%d addresses, at most %d are read", n, maxAddrs)
	}
	if len(b) < vrrpHeader+4*n {
		return a, errShort
	}
	if checksum(b, from, to) != 0 {
		return a, errChecksum
	}
	a = Advert{Router: b[1], Priority: b[2], Interval: time.Duration(binary.BigEndian.Uint16(b[4:])&0xfff) * 10 * time.Millisecond, Addrs: addrs[:0]}
	if a.Interval == 0 {
		return a, errNotVRRP
	}
	for i := range n {
		a.Addrs = append(a.Addrs, netip.AddrFrom4([4]byte(b[vrrpHeader+4*i:])))
	}
	if len(key) == 0 {
		return a, nil
	}
	trailer := b[vrrpHeader+4*n:]
	if len(trailer) != sealSize || binary.BigEndian.Uint32(trailer) != sealMark {
		return a, errUnsigned
	}
	clean := append([]byte(nil), b[:len(b)-16]...)
	clean[6], clean[7] = 0, 0
	if !hmac.Equal(tag(clean, from, key), b[len(b)-16:]) {
		return a, errUnsigned
	}
	a.Term, a.Count = binary.BigEndian.Uint64(trailer[4:]), binary.BigEndian.Uint64(trailer[12:])
	return a, nil
}
