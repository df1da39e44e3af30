package hop

import (
	"bytes"
	"iter"
	"net"

	"github.com/valyala/fasthttp"
)

// Field is a line of a trailer.
type Field struct{ Name, Value string }

// AppendLine writes the field as a line.
func (f Field) AppendLine(dst []byte) []byte {
	return append(append(append(append(dst, f.Name...), ": "...), f.Value...), "\r\n"...)
}

// InterimWriter is a Client that can pass on answers that come before the answer (1xx).
type InterimWriter interface {
	// Interim sends h, whose status is 100 to 199 and not 101. It must not be called once the answer itself has begun. What the client's
	// protocol cannot carry is dropped without an error.
	Interim(h *fasthttp.ResponseHeader) error
}

// Watcher is a Client that tells when the other end has left.
type Watcher interface {
	// Watch makes c be cancelled when the client is found to have left, until Unwatch. There is one at a time.
	Watch(c Canceller)
	// Unwatch says whether c has been spared; it will be from now on.
	Unwatch() bool
}

// Canceller is work for a client.
type Canceller interface {
	// Cancel ends the work; it is called at most once, does not block, and not after Unwatch has returned.
	Cancel()
}

// Splicer is what takes a body of known length straight from another socket, without a copy in this process.
type Splicer interface {
	// CanSplice says whether Splice can be called: what stands under it may be no socket, or the body be framed.
	CanSplice() bool
	// Splice takes up to n bytes from src and returns how many it took. It may take fewer, with an error: os.ErrDeadlineExceeded is src's,
	// and then none has been lost. Without an error fewer mean that src has ended.
	Splice(src *net.TCPConn, n int64) (int64, error)
}

// Spliced is a request's body that can go straight into another socket, without a copy in this process.
type Spliced interface {
	// CanSplice says whether SpliceTo can be called now: something may have been read ahead, what stands under it be no socket, or the body be framed.
	CanSplice() bool
	// SpliceTo moves up to n bytes of what is left to dst and returns how many it moved. source says that an error is the body's, and none of dst's;
	// io.ErrUnexpectedEOF is one. Without an error it has moved at least one byte.
	SpliceTo(dst *net.TCPConn, n int64) (moved int64, source bool, err error)
}

// ConnectionOnly says whether a header field belongs to one connection and is never passed on (RFC 9110 7.6.1, and the ones of old that
// proxies honour), whatever the case of its name. Among them are those that frame a message: whoever writes one frames it anew.
func ConnectionOnly(name []byte) bool {
	if len(name) < 2 {
		return false
	}
	switch name[0] | 0x20 {
	case 'c':
		return is(name, "connection") || is(name, "content-length")
	case 'h':
		return is(name, "http2-settings")
	case 'k':
		return is(name, "keep-alive")
	case 'p':
		return is(name, "proxy-connection") || is(name, "proxy-authenticate") || is(name, "proxy-authorization")
	case 't':
		return is(name, "te") || is(name, "trailer") || is(name, "transfer-encoding")
	case 'u':
		return is(name, "upgrade")
	}
	return false
}

func is(b []byte, lower string) bool {
	return len(b) == len(lower) && bytes.EqualFold(b, []byte(lower))
}

// Connection is what a message's lines said about the connection that it came on.
type Connection struct {
	Close     bool   // Connection: close
	KeepAlive bool   // Connection: keep-alive
	Upgrade   string // the protocol to switch to; "" unless Connection lists it
	Trailers  bool   // Te: trailers
	Announced string // Trailer, the names that will come after the body

	asks     bool // Connection lists upgrade
	protocol []byte
	named    [][]byte
}

// Read takes in one line; it says whether the line is for the connection only, apart from those that Connection names.
func (c *Connection) Read(name, value []byte) bool {
	if !ConnectionOnly(name) {
		return false
	}
	switch name[0] | 0x20 {
	case 'c':
		if len(name) == len("connection") {
			c.list(value)
		}
	case 't':
		switch len(name) {
		case len("te"):
			for v := range elements(value) {
				c.Trailers = c.Trailers || is(v, "trailers")
			}
		case len("trailer"):
			if c.Announced != "" {
				c.Announced += ", "
			}
			c.Announced += string(value)
		}
	case 'u':
		c.protocol = append(c.protocol[:0:0], value...)
	}
	if c.asks {
		c.Upgrade = string(c.protocol)
	}
	return true
}

func (c *Connection) list(value []byte) {
	for v := range elements(value) {
		switch {
		case is(v, "close"):
			c.Close = true
		case is(v, "keep-alive"):
			c.KeepAlive = true
		case is(v, "upgrade"):
			c.asks = true
		case !kept(v):
			c.named = append(c.named, bytes.Clone(v))
		}
	}
}

// kept are fields that a sender cannot have removed by naming them in Connection: they frame or route the message, or say where it came
// from, and a hop before this one may have written them.
func kept(name []byte) bool {
	switch {
	case ConnectionOnly(name), is(name, "host"), is(name, "content-type"), is(name, "x-request-id"), is(name, "forwarded"):
		return true
	}
	for _, prefix := range []string{"x-forwarded-", "knative-", "k-"} {
		if len(name) > len(prefix) && is(name[:len(prefix)], prefix) {
			return true
		}
	}
	return false
}

func elements(list []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for len(list) > 0 {
			v := list
			if i := bytes.IndexByte(list, ','); i >= 0 {
				v, list = list[:i], list[i+1:]
			} else {
				list = nil
			}
			if v = bytes.Trim(v, " \t"); len(v) > 0 && !yield(v) {
				return
			}
		}
	}
}

// Filter removes from a serialised head, in place, what belongs to the connection it came on, and the empty line at its end; the first
// line stays. The order of what stays is kept, which removing fields from fasthttp's header would not do.
func Filter(head []byte) ([]byte, Connection) {
	var c Connection
	head = keep(head, func(name, value []byte) bool {
		return !ConnectionOnly(name) || !c.Read(name, bytes.Trim(value, " \t\r\n"))
	})
	if len(c.named) > 0 {
		head = keep(head, func(name, _ []byte) bool {
			for _, v := range c.named {
				if len(v) == len(name) && bytes.EqualFold(v, name) {
					return false
				}
			}
			return true
		})
	}
	return head, c
}

// keep leaves the lines whose name and value, with the spaces around it, are wanted.
func keep(head []byte, want func(name, value []byte) bool) []byte {
	out := bytes.IndexByte(head, '\n') + 1
	for in := out; in < len(head); {
		end := len(head)
		if i := bytes.IndexByte(head[in:], '\n'); i >= 0 {
			end = in + i + 1
		}
		line := head[in:end]
		colon := bytes.IndexByte(line, ':')
		if colon > 0 && want(line[:colon], line[colon+1:]) {
			if out != in {
				copy(head[out:], line)
			}
			out += len(line)
		}
		in = end
	}
	return head[:out]
}

// Lines yields the fields of a serialised head after its first line.
func Lines(head string) iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		next := func() (line string, ok bool) {
			for i := range len(head) {
				if head[i] == '\n' {
					line, head = head[:i], head[i+1:]
					if i > 0 && line[i-1] == '\r' {
						line = line[:i-1]
					}
					return line, true
				}
			}
			return "", false
		}
		next()
		for {
			line, ok := next()
			if !ok {
				return
			}
			for i := range len(line) {
				if line[i] == ':' {
					v := line[i+1:]
					if len(v) > 0 && v[0] == ' ' {
						v = v[1:]
					}
					if !yield(line[:i], v) {
						return
					}
					break
				}
			}
		}
	}
}

// trailerNever are fields that a trailer cannot have (RFC 9110 6.5.1: framing, routing, authentication, content) besides
// those of ConnectionOnly. A recipient ignores them, and so does everybody after us if we do.
var trailerNever = map[string]bool{
	"Host": true, "Content-Encoding": true, "Content-Type": true, "Content-Range": true, "Authorization": true, "Cookie": true, "Set-Cookie": true,
	"Expect": true, "Max-Forwards": true, "Range": true, "Location": true, "Www-Authenticate": true, "Cache-Control": true, "Age": true,
	"X-Request-Id": true, "X-Thaw-Error": true, "Forwarded": true, "X-Forwarded-For": true, "X-Forwarded-Host": true, "X-Forwarded-Proto": true, "X-Real-Ip": true,
}

// TrailerAllowed says whether a field, in canonical form, may be in a trailer.
func TrailerAllowed(name string) bool { return !trailerNever[name] && !ConnectionOnly([]byte(name)) }
