package front

import (
	"bufio"
	"bytes"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/thawrun/thaw/internal/h2"
	"github.com/thawrun/thaw/internal/hop"
)

// silent is a connection that has said all it will, and takes everything.
type silent struct {
	net.Conn
	in bytes.Reader
}

func (c *silent) Read(p []byte) (int, error)       { return c.in.Read(p) }
func (c *silent) Write(p []byte) (int, error)      { return len(p), nil }
func (c *silent) SetReadDeadline(time.Time) error  { return nil }
func (c *silent) SetWriteDeadline(time.Time) error { return nil }
func (c *silent) SetDeadline(time.Time) error      { return nil }

// headOf is the head that a stream with these fields is handed out with; nil = it was refused.
func headOf(kv ...string) (head []byte) {
	var block, wire bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for i := 0; i < len(kv); i += 2 {
		enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	fr := http2.NewFramer(&wire, nil)
	fr.WriteSettings()
	b := block.Bytes()
	first := b[:min(len(b), 16<<10)]
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: first, EndStream: true, EndHeaders: len(first) == len(b)})
	for b = b[len(first):]; len(b) > 0; b = b[len(first):] {
		first = b[:min(len(b), 16<<10)]
		fr.WriteContinuation(1, len(first) == len(b), first)
	}
	nc := &silent{}
	nc.in.Reset(wire.Bytes())
	c := h2.New(nc, bufio.NewReaderSize(nc, 16<<10), h2.Config{MaxStreams: 1, HeaderBytes: h2HeaderBytes, Handle: func(s *h2.Stream) {
		if !s.TooBig {
			head = s.Head
		}
	}})
	c.Run()
	c.Wait()
	return head
}

// Whatever a stream has for method, target, host, fields and trailer, it is refused or is one request of HTTP/1.1 with the method, target,
// host and values that the stream had, and nothing besides.
func FuzzStream(f *testing.F) {
	f.Add("GET", "/", "a", "x-a", "b", "")
	f.Add("POST", "/a b", "a:80", "x-a", "b\r\nX-B: c", "Sum")
	f.Add("GET / HTTP/1.1\r\nX: y", "/", "a", "transfer-encoding", "chunked", "")
	f.Add("OPTIONS", "*", "[::1]:8", "content-length", "5", "Content-Length")
	f.Add("CONNECT", "", "a", "cookie", "a=b", "X, Y")
	f.Add("GET", "http://b/", "a/b", "X A", " \t", "")
	f.Add("GET", "/", "a", "connection", "x-a", "")
	f.Add("GET", "/", "a", ":path", "/b", "")
	f.Add("GET", "/", "a", "host", "b", "")
	s := New(Config{}, nil)
	f.Fuzz(func(t *testing.T, method, target, host, name, value, trailer string) {
		kv := []string{":method", method, ":scheme", "http", ":authority", host, ":path", target}
		if method == "CONNECT" && target == "" {
			kv = []string{":method", method, ":authority", host}
		}
		kv = append(kv, name, value)
		if trailer != "" {
			kv = append(kv, "trailer", trailer)
		}
		text := headOf(kv...)
		if text == nil {
			return
		}
		w := &streamWork{Stream: &h2.Stream{}, br: bufio.NewReaderSize(nil, 4<<10)}
		if w.parse(text) != nil || s.check(&w.req.Header) != nil || originForm(&w.req.Header) != nil {
			return
		}
		h := &w.req.Header
		h.SetProtocol("HTTP/1.1")
		h.SetNoDefaultContentType(true)
		if len(h.Host()) == 0 {
			h.SetHost("upstream")
		}
		head, conn := hop.Filter(h.AppendBytes(nil))
		br := bufio.NewReader(bytes.NewReader(append(head, "\r\nREST"...)))
		line, _ := br.ReadString('\n')
		if string(h.Method()) != method || !strings.HasPrefix(line, method+" ") || strings.Count(line, " ") != 2 {
			t.Fatalf("%q %q became %q", method, target, line)
		}
		if string(h.RequestURI()) != target {
			t.Fatalf("%q became %q", target, h.RequestURI())
		}
		var fields []string
		for {
			line, err := br.ReadString('\n')
			if err != nil {
				t.Fatalf("%q: no end of the head", head)
			}
			if line == "\r\n" {
				break
			}
			name, _, ok := strings.Cut(line, ":")
			if !ok || !strings.HasSuffix(line, "\r\n") {
				t.Fatalf("%q: no field: %q", head, line)
			}
			fields = append(fields, name)
		}
		if rest, _ := br.Peek(5); string(rest) != "REST" {
			t.Fatalf("%q is followed by %q", head, rest)
		}
		if len(fields) > 2 { // Host, and the one
			t.Fatalf("%q: %q became %q", name, value, fields)
		}
		for _, k := range fields {
			if hop.ConnectionOnly([]byte(k)) {
				t.Fatalf("%q is passed on", k)
			}
		}
		if trailer != "" && name != "trailer" && !strings.EqualFold(strings.TrimSpace(conn.Announced), strings.TrimSpace(trailer)) && strings.Trim(trailer, " ,\t") == trailer && !strings.Contains(trailer, ",") {
			t.Fatalf("trailer %q was announced as %q", trailer, conn.Announced)
		}
		var other fasthttp.RequestHeader
		if err := other.Read(bufio.NewReader(bytes.NewReader(append(head, "\r\n"...)))); err != nil {
			t.Fatalf("%q: %v", head, err)
		}
	})
}
