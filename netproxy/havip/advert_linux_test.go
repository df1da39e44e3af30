package havip

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"
)

var (
	from = addr("10.1.0.2")
)

// TestAdvertBytes compares with a packet worked out by hand from RFC 5798: VRID 51, priority 200, one address, 1 s.
func TestAdvertBytes(t *testing.T) {
	a := Advert{Router: 51, Priority: 200, Interval: time.Second, Addrs: []netip.Addr{addr("10.1.0.1")}}
	// Pseudo-header (addresses, protocol 112, length 12), then the packet, in words of 16 bits.
	var sum uint32
	for _, w := range []uint32{0x0a01, 0x0002, 0xe000, 0x0012, 0x0070, 0x000c, 0x3133, 0xc801, 0x0064, 0x0a01, 0x0001} {
		sum += w
	}
	sum = ^(sum>>16 + sum&0xffff) & 0xffff
	want := []byte{0x31, 51, 200, 1, 0, 100, byte(sum >> 8), byte(sum), 10, 1, 0, 1}
	if got := a.Append(nil, from, group, nil); !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
}

func TestAdvertRoundTrip(t *testing.T) {
	for _, key := range [][]byte{nil, []byte("a secret of the two")} {
		a := Advert{Router: 7, Priority: 0, Interval: tenMs, Addrs: []netip.Addr{addr("10.1.0.1"), addr("10.2.0.10")}}
		if key != nil {
			a.Term, a.Count = 5, 1<<60
		}
		b := a.Append(nil, from, group, key)
		got, err := ParseAdvert(b, from, group, key, nil)
		if err != nil || got.Router != 7 || got.Priority != 0 || got.Interval != tenMs || !slices.Equal(got.Addrs, a.Addrs) || got.Term != a.Term || got.Count != a.Count {
			t.Errorf("%+v, %v", got, err)
		}
		for i := range b { // every bit counts
			c := slices.Clone(b)
			c[i] ^= 1
			if _, err := ParseAdvert(c, from, group, key, nil); err == nil {
				t.Errorf("byte %d changed, and nobody noticed", i)
			}
		}
		for n := range b {
			if _, err := ParseAdvert(b[:n], from, group, key, nil); err == nil {
				t.Errorf("cut off after %d bytes, and nobody noticed", n)
			}
		}
	}
}

func TestAdvertRefused(t *testing.T) {
	key := []byte("a secret of the two")
	a := Advert{Router: 7, Priority: 100, Interval: tenMs, Addrs: []netip.Addr{addr("10.1.0.1")}}
	for name, b := range map[string][]byte{
		"unsigned":        a.Append(nil, from, group, nil),
		"of another key":  a.Append(nil, from, group, []byte("another secret of it")),
		"of another host": a.Append(nil, addr("10.1.0.3"), group, key),
	} {
		if _, err := ParseAdvert(b, from, group, key, nil); !errors.Is(err, errUnsigned) && !errors.Is(err, errChecksum) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A pair without a key reads what one with a key sends, as keepalived would.
	if _, err := ParseAdvert(a.Append(nil, from, group, key), from, group, nil, nil); err != nil {
		t.Error(err)
	}
}

func TestUnwrap(t *testing.T) {
	good, _ := hex.DecodeString("45c000200000000000" + "00") // up to TTL
	packet := func(change func([]byte)) []byte {
		b := make([]byte, 24)
		copy(b, good)
		b[8] = 255
		copy(b[12:], from.AsSlice())
		copy(b[16:], group.AsSlice())
		change(b)
		return b
	}
	for name, c := range map[string]struct {
		change func([]byte)
		ok     bool
	}{
		"good":             {func([]byte) {}, true},
		"routed":           {func(b []byte) { b[8] = 254 }, false},
		"to us alone":      {func(b []byte) { copy(b[16:], from.AsSlice()) }, false},
		"our own":          {func(b []byte) { b[15] = 9 }, false},
		"IPv6":             {func(b []byte) { b[0] = 0x65 }, false},
		"header too long":  {func(b []byte) { b[0] = 0x4f }, false},
		"header too short": {func(b []byte) { b[0] = 0x41 }, false},
	} {
		if _, _, ok := unwrap(packet(c.change), addr("10.1.0.9")); ok != c.ok {
			t.Errorf("%s: %v", name, ok)
		}
	}
}

func FuzzAdvert(f *testing.F) {
	a := Advert{Router: 7, Priority: 100, Interval: tenMs, Addrs: []netip.Addr{addr("10.1.0.1")}}
	f.Add(a.Append(nil, from, group, nil))
	f.Add(a.Append(nil, from, group, []byte("a secret of the two")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, ok := unwrap(b, from); ok && len(b) < 20 {
			t.Error("unwrapped less than a header")
		}
		if _, err := ParseAdvert(b, from, group, []byte("a secret of the two"), nil); err == nil && len(b) < vrrpHeader+sealSize {
			t.Error("signed, but too short for that")
		}
		got, err := ParseAdvert(b, from, group, nil, nil)
		if err != nil {
			return
		}
		if got.Interval <= 0 || got.Interval > MaxInterval || len(got.Addrs) > maxAddrs {
			t.Errorf("%+v", got)
		}
		again, err := ParseAdvert(got.Append(nil, from, group, nil), from, group, nil, nil)
		if err != nil || again.Priority != got.Priority || !slices.Equal(again.Addrs, got.Addrs) {
			t.Errorf("%+v became %+v, %v", got, again, err)
		}
	})
}
