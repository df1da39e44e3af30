package h2

import (
	"bytes"
	"net/textproto"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
)

type kind int

const (
	isNothing kind = iota // of a stream that has been taken back: unpacked for hpack's sake
	isRequest
	isTrailer
)

// block is a head on its way in. What HTTP/2 does not allow (RFC 9113 8.1 to 8.3) makes it bad.
type block struct {
	dec    *hpack.Decoder
	limit  int
	kind   kind
	stream uint32
	end    bool
	parts  int
	bytes  int // packed
	size   int // unpacked

	tooBig bool
	bad    string // why it is malformed; "" = it is not
	text   []byte // an HTTP/1.1 head once it is whole

	method, scheme, authority, path, protocol, host string
	hasAuthority, hasHost, regular                  bool
	length                                          int64  // -1 = not said
	lines                                           []byte // of the fields
	cookies                                         []byte // RFC 9113 8.2.3: they may come in crumbs
	announced                                       []byte
	trailer                                         []hop.Field
}

func (b *block) reset() {
	*b = block{dec: b.dec, limit: b.limit, length: -1, text: b.text[:0], lines: b.lines[:0], cookies: b.cookies[:0], announced: b.announced[:0]}
}

func (b *block) malformed(why string) {
	if b.bad == "" {
		b.bad = why
	}
}

// field is given each field by the decoder.
func (b *block) field(f hpack.HeaderField) {
	if b.size += int(f.Size()); b.size > b.limit {
		b.tooBig = true
		b.dec.SetEmitEnabled(false)
		return
	}
	switch {
	case b.kind == isNothing || b.bad != "":
	case len(f.Name) > 0 && f.Name[0] == ':':
		b.pseudo(f.Name, f.Value)
	case !lowerToken(f.Name):
		b.malformed("field name")
	case !valid(f.Value):
		b.malformed("field value")
	default:
		b.regular = true
		b.line(f.Name, f.Value)
	}
}

func (b *block) pseudo(name, value string) {
	var to *string
	switch {
	case b.regular:
		b.malformed("pseudo field after others")
		return
	case b.kind != isRequest:
	case name == ":method":
		to = &b.method
	case name == ":scheme":
		to = &b.scheme
	case name == ":path":
		to = &b.path
	case name == ":authority":
		to = &b.authority
		if b.hasAuthority {
			to = nil
		}
		b.hasAuthority = true
	case name == ":protocol":
		to = &b.protocol
	}
	if to == nil || *to != "" || value == "" && name != ":authority" {
		b.malformed("pseudo field")
		return
	}
	*to = value
}

func (b *block) line(name, value string) {
	if b.kind == isTrailer {
		if k := textproto.CanonicalMIMEHeaderKey(name); hop.TrailerAllowed(k) {
			b.trailer = append(b.trailer, hop.Field{Name: k, Value: value})
		}
		return
	}
	switch name {
	case "content-length":
		n, err := strconv.ParseUint(value, 10, 63)
		if err != nil || !decimal(value) || b.length >= 0 {
			b.malformed("content-length")
		} else {
			b.length = int64(n)
		}
		return
	case "cookie":
		if len(b.cookies) > 0 {
			b.cookies = append(b.cookies, "; "...)
		}
		b.cookies = append(b.cookies, value...)
		return
	case "trailer":
		if len(b.announced) > 0 {
			b.announced = append(b.announced, ", "...)
		}
		b.announced = append(b.announced, value...)
		return
	case "te":
		if value != "trailers" {
			b.malformed("te")
		}
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade":
		b.malformed("a field of the connection's")
	case "http2-settings":
		return
	case "host":
		if b.hasHost {
			b.malformed("host")
		}
		b.host, b.hasHost = value, true
		return
	}
	b.lines = append(append(append(append(b.lines, name...), ": "...), value...), "\r\n"...)
}

// finish makes the head of HTTP/1.1 of a request that has come in whole.
func (b *block) finish() {
	if !b.hasAuthority {
		b.authority = b.host
	}
	path := b.path
	switch {
	case b.tooBig: // whatever it was, it is refused
		b.bad, b.method, path, b.authority = "", "GET", "/", ""
		b.lines, b.cookies, b.announced = b.lines[:0], b.cookies[:0], b.announced[:0]
	case b.method == "CONNECT":
		if b.authority == "" || b.path != "" || b.scheme != "" || b.protocol != "" {
			b.malformed("CONNECT")
		}
		path = "/" // refused for its method
	case b.method == "" || path == "" || b.scheme != "http" && b.scheme != "https" || b.protocol != "":
		b.malformed("pseudo fields")
	case path[0] != '/' && (path != "*" || b.method != "OPTIONS"):
		b.malformed("path")
	}
	if b.hasAuthority && b.hasHost && !strings.EqualFold(b.authority, b.host) {
		b.malformed("host is not the authority")
	}
	if !chunk.Token([]byte(b.method)) || !visible(path) || !visible(b.authority) && b.authority != "" {
		b.malformed("request line")
	}
	b.text = append(append(append(append(b.text, b.method...), ' '), path...), " HTTP/1.1\r\nHost: "...)
	b.text = append(append(b.text, b.authority...), "\r\n"...)
	b.text = append(b.text, b.lines...)
	if len(b.cookies) > 0 {
		b.text = append(append(append(b.text, "Cookie: "...), b.cookies...), "\r\n"...)
	}
	if len(b.announced) > 0 {
		b.text = append(append(append(b.text, "Trailer: "...), b.announced...), "\r\n"...)
	}
	b.text = append(b.text, "\r\n"...)
}

// visible says that s has no byte that would end or split a line.
func visible(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] == 0x7f {
			return false
		}
	}
	return len(s) > 0
}

func decimal(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return len(s) > 0
}

func lowerToken(name string) bool {
	for i := range len(name) {
		if c := name[i]; 'A' <= c && c <= 'Z' || !tokenByte[c] {
			return false
		}
	}
	return len(name) > 0
}

var tokenByte = func() (t [256]bool) {
	for i := range t {
		t[i] = chunk.Token([]byte{byte(i)})
	}
	return t
}()

func valid(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// Fields makes what WriteHead wants of the lines of a head of HTTP/1.1 without its first line and the empty one at its end; names become lower case. It is
// appended to dst.
func Fields(dst []hpack.HeaderField, lines []byte) []hpack.HeaderField {
	for in := 0; in < len(lines); {
		end := bytes.IndexByte(lines[in:], '\n')
		if end < 0 {
			break
		}
		for i := in; i < in+end && lines[i] != ':'; i++ {
			if c := lines[i]; 'A' <= c && c <= 'Z' {
				lines[i] = c + 'a' - 'A'
			}
		}
		in += end + 1
	}
	text := string(lines) // hpack keeps what is in its table
	for len(text) > 0 {
		line, rest, _ := strings.Cut(text, "\n")
		text = rest
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\r"), ":"); ok {
			value = strings.TrimPrefix(value, " ")
			dst = append(dst, Field(name, value))
		}
	}
	return dst
}

// Field is a field as hpack wants it. What tells requests apart, or is a secret, has no place in a table that others share.
func Field(name, value string) hpack.HeaderField {
	f := hpack.HeaderField{Name: name, Value: value}
	switch name {
	case "authorization", "cookie", "set-cookie", "x-request-id", "traceparent", "content-length", "etag", ":path":
		f.Sensitive = true
	}
	return f
}
