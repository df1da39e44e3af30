package conformance

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
)

// bad is what must be refused or cut off, and must not reach the function in any form.
var bad = []struct {
	name, send string
	fin        bool // the client half-closes after it
	status     string
}{
	{name: "cl-and-te", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", status: "400"},
	{name: "cl-and-te-smuggled-get", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "te-and-cl", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", status: "400"},
	{name: "te-identity", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello"},
	{name: "te-identity-alone", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n"},
	{name: "te-gzip-chunked", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"},
	{name: "te-chunked-gzip", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"},
	{name: "te-chunked-twice", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
	{name: "te-chunked-chunked", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"},
	{name: "te-xchunked", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"},
	{name: "te-quoted", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n"},
	{name: "te-semicolon", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n"},
	{name: "te-empty", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n\r\n0\r\n\r\n"},
	{name: "te-vertical-tab", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"},
	{name: "te-space-before-colon", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n"},
	{name: "te-folded", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"},
	{name: "te-in-http10", send: "POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
	{name: "te-nul", send: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n"},
	{name: "cl-plus", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello", status: "400"},
	{name: "cl-minus", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\nhello", status: "400"},
	{name: "cl-two-numbers", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5 5\r\n\r\nhello", status: "400"},
	{name: "cl-hex", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\nhello", status: "400"},
	{name: "cl-overflow", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551621\r\n\r\nhello", status: "400"},
	{name: "cl-list", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\nhello", status: "400"},
	{name: "cl-two-values", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", status: "400"},
	{name: "cl-twice", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", status: "400"},
	{name: "cl-empty", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\nhello", status: "400"},
	{name: "cl-float", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5.0\r\n\r\nhello", status: "400"},
	{name: "cl-underscore", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1_0\r\n\r\nhellohello", status: "400"},
	{name: "cl-too-short-fin", send: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhel", fin: true},
	{name: "space-in-name", send: "GET / HTTP/1.1\r\nHost: x\r\nX A: b\r\n\r\n", status: "400"},
	{name: "nul-in-value", send: "GET / HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n", status: "400"},
	{name: "nul-in-name", send: "GET / HTTP/1.1\r\nHost: x\r\nX-\x00A: b\r\n\r\n", status: "400"},
	{name: "bare-cr-in-value", send: "GET / HTTP/1.1\r\nHost: x\r\nX-A: a\rX-B: b\r\n\r\n", status: "400"},
	{name: "bare-cr-as-line-end", send: "GET / HTTP/1.1\rHost: x\r\rX-A: b\r\n\r\n", status: "400"},
	{name: "no-colon", send: "GET / HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n", status: "400"},
	{name: "empty-name", send: "GET / HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n", status: "400"},
	{name: "space-before-colon", send: "GET / HTTP/1.1\r\nHost: x\r\nX-A : b\r\n\r\n", status: "400"},
	{name: "folded-first-line", send: "GET / HTTP/1.1\r\n X-A: b\r\nHost: x\r\n\r\n", status: "400"},
	{name: "folded-line", send: "GET / HTTP/1.1\r\nHost: x\r\nX-A: a\r\n b\r\n\r\n", status: "400"},
	{name: "control-in-name", send: "GET / HTTP/1.1\r\nHost: x\r\nX\x01A: b\r\n\r\n", status: "400"},
	{name: "control-in-value", send: "GET / HTTP/1.1\r\nHost: x\r\nX-A: a\x01b\r\n\r\n", status: "400"},
	{name: "quote-in-name", send: "GET / HTTP/1.1\r\nHost: x\r\nX\"A: b\r\n\r\n", status: "400"},
	{name: "non-ascii-name", send: "GET / HTTP/1.1\r\nHost: x\r\nX-\xc3\xa9: b\r\n\r\n", status: "400"},
	{name: "no-host", send: "GET / HTTP/1.1\r\nX-A: b\r\n\r\n", status: "400"},
	{name: "two-hosts", send: "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", status: "400"},
	{name: "same-host-twice", send: "GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", status: "400"},
	{name: "host-with-space", send: "GET / HTTP/1.1\r\nHost: x y\r\n\r\n", status: "400"},
	{name: "host-with-slash", send: "GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", status: "400"},
	{name: "host-with-at", send: "GET / HTTP/1.1\r\nHost: a@x\r\n\r\n", status: "400"},
	{name: "host-with-comma-list", send: "GET / HTTP/1.1\r\nHost: x\r\nHost : y\r\n\r\n", status: "400"},
	{name: "http-2.0", send: "GET / HTTP/2.0\r\nHost: x\r\n\r\n", status: "505"},
	{name: "http-1.2", send: "GET / HTTP/1.2\r\nHost: x\r\n\r\n", status: "505"},
	{name: "http-0.9", send: "GET /\r\n\r\n"},
	{name: "http-lower-case", send: "GET / http/1.1\r\nHost: x\r\n\r\n"},
	{name: "http-3-digits", send: "GET / HTTP/1.10\r\nHost: x\r\n\r\n"},
	{name: "version-missing-dot", send: "GET / HTTP/11\r\nHost: x\r\n\r\n"},
	{name: "two-spaces", send: "GET  / HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "space-in-target", send: "GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "nul-in-target", send: "GET /a\x00b HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "cr-in-target", send: "GET /a\rb HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "tab-in-request-line", send: "GET\t/\tHTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "target-without-slash", send: "GET foo HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "target-star-get", send: "GET * HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "target-other-scheme", send: "GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "target-no-host", send: "GET http:///a HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "target-userinfo", send: "GET http://a@b/ HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "method-with-brackets", send: "G(T / HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "method-empty", send: " / HTTP/1.1\r\nHost: x\r\n\r\n", status: "400"},
	{name: "connect", send: "CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n", status: "405"},
	{name: "header-17KiB", send: "GET / HTTP/1.1\r\nHost: x\r\nX-Big: " + strings.Repeat("a", 17<<10) + "\r\n\r\n", status: "431"},
	{name: "header-1MiB", send: "GET / HTTP/1.1\r\nHost: x\r\nX-Big: " + strings.Repeat("a", 1<<20) + "\r\n\r\n"},
	{name: "header-300-lines", send: "GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("A: b\r\n", 300) + "\r\n", status: "431"},
	{name: "header-10000-lines", send: "GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("A: b\r\n", 10000) + "\r\n"},
	{name: "target-20KiB", send: "GET /" + strings.Repeat("a", 20<<10) + " HTTP/1.1\r\nHost: x\r\n\r\n"},
	{name: "tls-hello", send: "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("\x00", 100) + "\r\n\r\n"},
	{name: "garbage", send: "\xff\xfe\xfd\r\n\r\n"},
	{name: "half-head-fin", send: "GET / HTTP/1.1\r\nHost: x\r\nX-A", fin: true},
	{name: "half-line-fin", send: "GE", fin: true},
	{name: "nothing-fin", send: "", fin: true},
	{name: "h2-preface-broken", send: "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"},
	{name: "h2-preface-then-nonsense", send: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense nonsense nonsense", fin: true},
}

// badBodies are refused too, but only while the body is read: a part may have reached the function, never as a whole request.
var badBodies = []struct {
	name, send string
	fin        bool
}{
	{"chunk-cut-at-boundary", "5\r\nhello\r\n", true},
	{"chunk-cut-in-data", "5\r\nhel", true},
	{"chunk-cut-in-size", "5\r\nhello\r\n1", true},
	{"last-chunk-without-crlf", "5\r\nhello\r\n0\r\n", true},
	{"trailer-cut", "5\r\nhello\r\n0\r\nX-A: b\r\n", true},
	{"chunk-size-negative", "-5\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-size-plus", "+5\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-size-0x", "0x5\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-size-empty", "\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-size-letters", "zz\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-size-overflow", "10000000000000005\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-size-leading-space", " 5\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-size-underscore", "0_5\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-lf-only", "5\nhello\n0\n\n", false},
	{"chunk-data-too-long", "5\r\nhellohello\r\n0\r\n\r\n", false},
	{"chunk-data-without-crlf", "5\r\nhello0\r\n\r\n", false},
	{"chunk-lf-in-extension", "5;a=\nb\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-cr-in-extension", "5;a=\rb\r\nhello\r\n0\r\n\r\n", false},
	{"chunk-extension-256KiB", "5;" + strings.Repeat("a", 256<<10) + "\r\nhello\r\n0\r\n\r\n", false},
	{"trailer-malformed", "5\r\nhello\r\n0\r\nX A: b\r\n\r\n", false},
	{"trailer-64KiB", "5\r\nhello\r\n0\r\nX-A: " + strings.Repeat("a", 64<<10) + "\r\n\r\n", false},
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	overPaths(t, func(t *testing.T, p *path) {
		for _, c := range badCases() {
			runCase(t, p, c)
		}
	})
}

func badCases() (cc []testCase) {
	for _, b := range bad {
		cc = append(cc, testCase{name: b.name, run: func(e *env) {
			c := e.dial()
			io.WriteString(c, b.send) // may fail: refused before all is sent
			if b.fin {
				c.closeWrite()
			}
			e.refused(c, b.status)
			if n := e.reached(); n > 0 {
				e.Errorf("%d requests reached the function", n)
			}
		}})
	}
	for _, b := range badBodies {
		cc = append(cc, testCase{name: b.name, run: func(e *env) {
			whole := make(chan string, 16)
			e.fn.handle(func(c *call) {
				body, _, err := c.body()
				if err != nil {
					whole <- ""
					c.end()
					return
				}
				whole <- fmt.Sprintf("%q %q", c.head, body)
				c.send(ok)
			})
			c := e.dial()
			io.WriteString(c, "POST /bad/"+b.name+" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"+b.send)
			if b.fin {
				c.closeWrite()
			}
			e.refused(c, "")
			// What of it reached the function, if anything, must have ended as an error there.
			for range e.reached() {
				if w := get(e, whole, "the function's end of the request"); w != "" {
					e.Errorf("reached the function as a whole request: %.300s", w)
				}
			}
		}})
	}
	return cc
}

// refused checks that the client gets a refusal or nothing, and that the connection ends.
func (e *env) refused(c *client, status string) {
	head, err := readHead(c.br)
	for strings.HasPrefix(head, "HTTP/1.1 102 ") {
		head, err = readHead(c.br)
	}
	if err != nil {
		if ne, isNet := err.(interface{ Timeout() bool }); isNet && ne.Timeout() {
			e.Errorf("neither answered nor closed")
		}
		if status != "" {
			e.Errorf("no answer, want %s: %v", status, err)
		}
		return // closed or an HTTP/2 error
	}
	m := &message{head: head}
	if s := m.status(); s < 400 || status != "" && fmt.Sprint(s) != status {
		e.Errorf("answer %q, want %s", head, status)
		return
	}
	if err := m.read(c.br, true); err != nil {
		e.Errorf("refusal broke off: %v", err)
	}
	c.SetReadDeadline(time.Now().Add(3 * time.Second))
	c.ends()
}
