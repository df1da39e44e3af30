package queueproxy

import (
	"bytes"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// Headers that the parts of the platform send each other, in the form that the front gives all names.
const (
	headerRevision     = "Knative-Serving-Revision"
	headerNamespace    = "Knative-Serving-Namespace"
	headerProxy        = "K-Proxy-Request" // "activator": the request came through an activator's queue
	headerPassthrough  = "K-Passthrough-Lb"
	headerOriginalHost = "K-Original-Host" // the client's Host, where a hop had to put its own
	headerProbe        = "K-Network-Probe"
	prefixNetwork      = "K-Network-" // probes and configuration hashes
	headerForwarded    = "Forwarded"
	headerForwardedFor = "X-Forwarded-For"
	headerForwardHost  = "X-Forwarded-Host"
	headerForwardProto = "X-Forwarded-Proto"
	activator          = "activator"

	maxInternal = 16 // internal headers in one request
)

// clean makes h what the function may see: internal headers are removed, the client's Host is restored, and a Forwarded header is
// made from X-Forwarded-* if there is none. It returns false, having changed nothing, when there are more internal headers than any of our hops
// would send: removing thousands one by one would be work for an attacker's pleasure. Nothing is allocated in the common cases.
//
// fasthttp's iterators are avoided for a request that was parsed: they take cookies apart and put them together again without their
// quotes, and the function should get them as they came.
func clean(h *fasthttp.RequestHeader) bool {
	var (
		names [maxInternal][]byte
		n     int
		tail  = true // no other line comes after the first internal one
	)
	for line := range hop.RawLines(h) {
		name, _, _ := bytes.Cut(line, colon)
		if !internal(name) {
			tail = tail && n == 0
			continue
		}
		if n == len(names) {
			return false
		}
		names[n] = name
		n++
	}
	// What follows changes h; only now may it be changed.
	if len(h.Peek(headerForwarded)) == 0 {
		var scratch [256]byte
		f := forwarded{host: h.Peek(headerForwardHost), proto: h.Peek(headerForwardProto), nodes: h.PeekAll(headerForwardedFor)}
		if line := f.append(scratch[:0]); line != nil {
			h.SetBytesV(headerForwarded, line)
		}
	}
	if origin := h.Peek(headerOriginalHost); len(origin) > 0 {
		h.SetHostBytes(origin)
	}
	var again hop.Repeated
	if !tail {
		again = hop.RepeatedFields(h, internal)
	}
	// First what a hop of this process has added, which is at the end and no part of the lines.
	h.Del(headerNamespace)
	h.Del(headerRevision)
	h.Del(headerOriginalHost)
	h.Del(headerProxy)
	for i := n - 1; i >= 0; i-- {
		h.DelBytes(names[i])
	}
	again.Restore(h)
	return true
}

var colon = []byte{':'}

// internal says whether a header is the platform's own, whatever the case of its name.
func internal(k []byte) bool {
	if len(k) < 2 || k[0]|0x20 != 'k' {
		return false // nearly all
	}
	return fold(k, headerRevision) || fold(k, headerNamespace) || fold(k, headerProxy) || fold(k, headerPassthrough) || fold(k, headerOriginalHost) ||
		len(k) > len(prefixNetwork) && fold(k[:len(prefixNetwork)], prefixNetwork)
}

// forwarded gathers what X-Forwarded-* headers say, for the Forwarded header of RFC 7239.
type forwarded struct {
	nodes       [][]byte // X-Forwarded-For lines
	host, proto []byte
}

// append writes the header's value: the first node with host and proto, then the other nodes, as Knative's queue-proxy does:
// "1.2.3.4, ::1" over https is `for=1.2.3.4;proto=https, for="[::1]"`. A value that is no token is quoted, as the RFC wants. It returns nil when nothing
// sensible is left.
func (f *forwarded) append(b []byte) []byte {
	first := true
	for _, line := range f.nodes {
		for len(line) > 0 {
			var node []byte
			if i := bytes.IndexByte(line, ','); i >= 0 {
				node, line = line[:i], line[i+1:]
			} else {
				node, line = line, nil
			}
			if node = bytes.TrimSpace(node); !plain(node) {
				continue
			}
			if !first {
				b = append(b, ", "...)
			}
			b = appendNode(append(b, "for="...), node)
			if first {
				b = f.appendRest(b)
			}
			first = false
		}
	}
	if first {
		b = f.appendRest(b)
	}
	if len(b) == 0 {
		return nil
	}
	return b
}

// appendRest adds host and proto to the first element.
func (f *forwarded) appendRest(b []byte) []byte {
	for _, e := range [...]struct {
		name  string
		value []byte
	}{{"host=", bytes.TrimSpace(f.host)}, {"proto=", bytes.TrimSpace(f.proto)}} {
		if !plain(e.value) {
			continue
		}
		if len(b) > 0 {
			b = append(b, ';')
		}
		b = appendValue(append(b, e.name...), e.value)
	}
	return b
}

// plain says whether v can stand in a Forwarded element at all: not empty, visible ASCII, nothing that would end a quoted string.
func plain(v []byte) bool {
	for _, c := range v {
		if c <= ' ' || c >= 0x7f || c == '"' || c == '\\' {
			return false
		}
	}
	return len(v) > 0
}

// appendNode writes an address; one of IPv6 is bracketed, with or without having been so before.
func appendNode(b, node []byte) []byte {
	if bytes.Count(node, []byte{':'}) < 2 || node[0] == '[' {
		return appendValue(b, node)
	}
	b = append(b, `"[`...)
	b = append(b, node...)
	return append(b, `]"`...)
}

func appendValue(b, v []byte) []byte {
	for _, c := range v {
		if !token(c) {
			b = append(b, '"')
			b = append(b, v...)
			return append(b, '"')
		}
	}
	return append(b, v...)
}

// token says whether c may stand in a token of RFC 9110.
func token(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), c) >= 0
}

// fold compares a name without regard to ASCII case.
func fold(k []byte, name string) bool {
	if len(k) != len(name) {
		return false
	}
	for i := range len(name) {
		a, b := k[i], name[i]
		if a == b {
			continue
		}
		if a|0x20 != b|0x20 || a|0x20 < 'a' || a|0x20 > 'z' {
			return false
		}
	}
	return true
}
