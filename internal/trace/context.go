package trace

import (
	"encoding/hex"
	"math/rand/v2"
)

// ID is the id of a trace; zero = none.
type ID [16]byte

// SpanID is the id of a span; zero = none.
type SpanID [8]byte

// String writes the id as W3C does; "" for none.
func (id ID) String() string {
	if id == (ID{}) {
		return ""
	}
	return hex.EncodeToString(id[:])
}

// String writes the id as W3C does; "" for none.
func (id SpanID) String() string {
	if id == (SpanID{}) {
		return ""
	}
	return hex.EncodeToString(id[:])
}

// Context is what a request carries of its trace through one process. The zero value is a request without a trace.
type Context struct {
	ID      ID     // known for every request that brought a valid traceparent, sampled or not
	Parent  SpanID // the caller's span; zero = the trace begins here
	Span    SpanID // the request's time in this process; set when sampled
	Forward SpanID // its being sent on, which is what the next process sees as its parent; set when sampled
	Flags   byte   // as the next process is told them
	Sampled bool
	State   string // tracestate for the exporter; set when sampled
}

const (
	flagSampled = 1
	flagRandom  = 2 // W3C level 2: the id is random; said on, never by ourselves
)

// Length is that of a traceparent of version 00 in bytes.
const Length = 55

// Parse reads a traceparent field. What is not valid by W3C's word is no trace at all: ok is false and the field must not be passed on.
// A version that is newer than 00 is read as far as 00 goes, as the specification wants.
func Parse(b []byte) (c Context, ok bool) {
	if len(b) < Length || b[2] != '-' || b[35] != '-' || b[52] != '-' {
		return Context{}, false
	}
	var version, flags [1]byte
	if !unhex(version[:], b[:2]) || !unhex(c.ID[:], b[3:35]) || !unhex(c.Parent[:], b[36:52]) || !unhex(flags[:], b[53:55]) {
		return Context{}, false
	}
	switch {
	case version[0] == 0xff, c.ID == (ID{}), c.Parent == (SpanID{}):
		return Context{}, false
	case version[0] == 0 && len(b) != Length, len(b) > Length && b[Length] != '-':
		return Context{}, false
	}
	c.Flags = flags[0]
	c.Sampled = c.Flags&flagSampled != 0
	return c, true
}

// digits are the values of hexadecimal digits, lower case only: W3C forbids the other. Anything else has high bits.
var digits = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xff
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()

func unhex(dst, src []byte) bool {
	bad := byte(0)
	for i := range dst {
		hi, lo := digits[src[2*i]], digits[src[2*i+1]]
		bad |= hi | lo
		dst[i] = hi<<4 | lo
	}
	return bad < 16
}

// AppendParent writes the traceparent that the next process gets.
func (c *Context) AppendParent(dst []byte) []byte {
	dst = append(dst, "00-"...)
	dst = append(hex.AppendEncode(dst, c.ID[:]), '-')
	dst = append(hex.AppendEncode(dst, c.Forward[:]), '-')
	return hex.AppendEncode(dst, []byte{c.Flags})
}

// NewSpanID returns a random id.
func NewSpanID() (id SpanID) {
	put(id[:], nonzero())
	return id
}

// nonzero is a random number; 0 would be no id.
func nonzero() uint64 {
	for {
		if n := rand.Uint64(); n != 0 {
			return n
		}
	}
}

// put writes n big-endian.
func put(b []byte, n uint64) {
	for i := range 8 {
		b[i] = byte(n >> (56 - 8*i))
	}
}
