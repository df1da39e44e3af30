package front

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// A head that is accepted is, as it is passed on, exactly one request to another parser, for the same method and host.
func FuzzHead(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST http://b:80/p?q HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", "GET / HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n", "OPTIONS * HTTP/1.1\r\nhost: a\r\nCookie: a=\"b\"; c\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", "GET  / HTTP/1.1\nHost: [::1]:8\n\n", "G\tT / HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	s := New(Config{}, nil)
	f.Fuzz(func(t *testing.T, in []byte) {
		var h fasthttp.RequestHeader
		if h.Read(bufio.NewReaderSize(bytes.NewReader(in), 16<<10)) != nil {
			return
		}
		if s.check(&h) != nil || originForm(&h) != nil {
			return
		}
		h.SetProtocol("HTTP/1.1")
		h.SetNoDefaultContentType(true)
		if len(h.Host()) == 0 {
			h.SetHost("upstream")
		}
		head, _ := hop.Filter(h.AppendBytes(nil))
		head = append(head, "\r\nREST"...)
		br := bufio.NewReader(bytes.NewReader(head))
		r, err := http.ReadRequest(br)
		if err != nil {
			// net/http wants more of a target (escapes, say) than a proxy may.
			if target := string(h.RequestURI()); strings.Contains(err.Error(), "invalid URI") || strings.Contains(err.Error(), "parse ") || strings.Contains(err.Error(), target) && !strings.ContainsFunc(target, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
				return
			}
			t.Fatalf("%q was passed on as %q: %v", in, head, err)
		}
		rest, _ := io.ReadAll(br)
		if string(rest) != "REST" || r.Method != string(h.Method()) || r.Host != string(h.Host()) || len(r.TransferEncoding) > 0 || r.ContentLength > 0 {
			t.Fatalf("%q was passed on as %q, which is %s for %q, then %q", in, head, r.Method, r.Host, rest)
		}
	})
}

// Only the whole preface is one, in whatever pieces it comes, and looking takes nothing.
func FuzzPreface(f *testing.F) {
	f.Add(string(preface))
	f.Add(string(preface[:23]))
	f.Add("PRI * HTTP/1.1\r\n\r\n")
	f.Add("POST / HTTP/1.1\r\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, in string) {
		c := &clientConn{br: bufio.NewReader(iotest.OneByteReader(strings.NewReader(in)))}
		if got, want := c.speaksH2(), strings.HasPrefix(in, string(preface)); got != want {
			t.Errorf("%v, want %v", got, want)
		}
		rest, err := io.ReadAll(c.br)
		if err != nil || string(rest) != in {
			t.Errorf("%q is left, %v", rest, err)
		}
	})
}
