package conformance

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

func withRouter(p *path) bool { return p.router }
func held(p *path) bool       { return p.held }

func TestHTTP1(t *testing.T) {
	t.Parallel()
	cases := http1Cases()
	overPaths(t, func(t *testing.T, p *path) {
		for _, c := range cases {
			runCase(t, p, c)
		}
	})
}

func http1Cases() []testCase {
	return slices.Concat(methods(), messages(), interims(), upgrades(), streams(), truncations(), headers(), bodies(), leaving())
}

// expect makes a case of one exchange: the function's view of the request must contain the lines of sees and none of those of not; the client's view of the
// answer likewise.
type expect struct {
	request, reply string
	sees, not      []string // at the function, in head, trailer or body
	gets, gets0    []string // at the client: there, not there
}

func (x expect) run(e *env) {
	if x.reply == "" {
		x.reply = ok
	}
	got, answer := e.exchange(x.request, x.reply)
	atFunction, atClient := got.head+got.body+"\r\n"+got.trailer, answer.head+answer.body+"\r\n"+answer.trailer
	for _, s := range x.sees {
		if !strings.Contains(atFunction, s) {
			e.Errorf("the function does not see %q in %q", s, atFunction)
		}
	}
	for _, s := range x.not {
		if strings.Contains(strings.ToLower(atFunction), strings.ToLower(s)) {
			e.Errorf("the function sees %q in %q", s, atFunction)
		}
	}
	for _, s := range x.gets {
		if !strings.Contains(atClient, s) {
			e.Errorf("the client does not get %q in %q", s, atClient)
		}
	}
	for _, s := range x.gets0 {
		if strings.Contains(strings.ToLower(atClient), strings.ToLower(s)) {
			e.Errorf("the client gets %q in %q", s, atClient)
		}
	}
}

func methods() (cc []testCase) {
	for _, m := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "M-SEARCH"} {
		cc = append(cc, testCase{name: "method-" + m, run: expect{request: m + " /a HTTP/1.1\r\nHost: x\r\n\r\n", sees: []string{m + " /a HTTP/1.1\r\n"}}.run})
	}
	for name, reply := range map[string]string{
		"head":              "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
		"head-chunked":      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"head-without-size": "HTTP/1.1 200 OK\r\nX-A: b\r\n\r\n",
	} {
		cc = append(cc, testCase{name: name, run: func(e *env) {
			e.calls(reply)
			c := e.dial()
			c.send("HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
			head := c.next()
			if name == "head" && value(head, "Content-Length") != "10" {
				e.Errorf("Content-Length of a HEAD is gone: %q", head)
			}
			if value(head, "Connection") == "close" {
				c.ends()
				return
			}
			e.calls(ok)
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "ok")
		}})
	}
	for name, reply := range map[string]string{
		"204":                  "HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n",
		"304":                  "HTTP/1.1 304 Not Modified\r\nEtag: \"a\"\r\n\r\n",
		"304-with-length":      "HTTP/1.1 304 Not Modified\r\nEtag: \"a\"\r\nContent-Length: 10\r\n\r\n",
		"200-with-length-zero": "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
	} {
		cc = append(cc, testCase{name: name, run: func(e *env) {
			e.calls(reply)
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			head := c.next()
			if !strings.HasPrefix(head, reply[:12]) {
				e.Errorf("%q", head)
			}
			if name == "204" && (value(head, "Content-Length") != "" || value(head, "Transfer-Encoding") != "") {
				e.Errorf("a 204 with a body's header: %q", head)
			}
			e.calls(ok)
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "ok")
		}})
	}
	for _, s := range []string{"200 Fine", "299 Odd", "418 I'm a teapot", "404 Not Found", "500 Internal Server Error", "503 Service Unavailable", "599 Worse", "301 Moved Permanently"} {
		cc = append(cc, testCase{name: "status-" + s[:3], run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", reply: "HTTP/1.1 " + s + "\r\nLocation: /x\r\nContent-Length: 3\r\n\r\nabc",
			gets: []string{"HTTP/1.1 " + s + "\r\n", "Location: /x\r\n", "\r\n\r\nabc"}}.run})
	}
	target := func(name, method, target, at string, host string) {
		cc = append(cc, testCase{name: name, run: expect{request: method + " " + target + " HTTP/1.1\r\nHost: x\r\n\r\n", sees: []string{method + " " + at + " HTTP/1.1\r\n", "Host: " + host + "\r\n"}}.run})
	}
	target("absolute-form", "GET", "http://Other.example:81/a?b=c", "/a?b=c", "Other.example:81")
	target("absolute-form-https", "GET", "https://other.example/a", "/a", "other.example")
	target("absolute-form-no-path", "GET", "http://other.example", "/", "other.example")
	target("absolute-form-query", "GET", "http://other.example?q", "/?q", "other.example")
	target("options-star", "OPTIONS", "*", "*", "x")
	for i, p := range []string{"//a/../b/./c//", "/%2e%2e/%2F%00", "/?", "/?a=b&c=%20%zz;d+e&&=&", "/a;b=c,d:e@f!g$h'(i)*j", "/%E2%82%AC", "/?x=http://y/?z#f", "/a%", "/..", "/a|b{c}^`\"<d>\\e", "/" + strings.Repeat("long/", 1500)} {
		target(fmt.Sprintf("target-verbatim-%d", i), "GET", p, p, "x")
	}
	return cc
}

func messages() []testCase {
	return []testCase{
		{name: "keep-alive", run: func(e *env) {
			e.calls(ok)
			c := e.dial()
			for range 5 {
				c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				c.want(200, "ok")
			}
		}},
		{name: "pipelining", run: func(e *env) {
			e.fn.handle(func(c *call) {
				body, _, _ := c.body()
				path := strings.Fields(c.head)[1] + body
				c.send(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(path), path))
			})
			c := e.dial()
			var all strings.Builder
			for i := range 50 {
				if i%3 == 0 {
					fmt.Fprintf(&all, "POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody", i)
				} else {
					fmt.Fprintf(&all, "GET /%d HTTP/1.1\r\nHost: x\r\n\r\n", i)
				}
			}
			c.send(all.String())
			for i := range 50 {
				body := ""
				if i%3 == 0 {
					body = "body"
				}
				c.want(200, fmt.Sprintf("/%d%s", i, body))
			}
		}},
		{name: "pipelining-with-chunks", run: func(e *env) {
			ch := e.calls(ok)
			c := e.dial()
			c.send("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n")
			first := c.want(200, "ok")
			if m := get(e, ch, "first"); m.body != "abc" {
				e.Errorf("first body %q", m.body)
			}
			if value(first.head, "Connection") == "close" {
				return // allowed: an answer that overtakes the end of its upload closes, and the client asks again elsewhere
			}
			c.want(200, "ok")
			if m := get(e, ch, "second"); !strings.HasPrefix(m.head, "GET /b ") {
				e.Errorf("second %q", m.head)
			}
		}},
		{name: "byte-by-byte", run: func(e *env) {
			e.calls(ok)
			c := e.dial()
			for _, b := range []byte("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab") {
				c.send(string(b))
			}
			c.want(200, "ok")
		}},
		{name: "leading-crlf", run: func(e *env) {
			e.calls(ok)
			c := e.dial()
			c.send("\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "ok")
		}},
		{name: "client-says-close", run: func(e *env) {
			e.calls(ok)
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			if m := c.want(200, "ok"); value(m.head, "Connection") != "close" {
				e.Errorf("%q", m.head)
			}
			c.ends()
		}},
		{name: "function-says-close", run: func(e *env) {
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
				c.end()
			})
			c := e.dial()
			for range 3 {
				c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				if m := c.want(200, "ok"); value(m.head, "Connection") != "" {
					e.Errorf("the function's connection is the client's business: %q", m.head)
				}
			}
		}},
		{name: "http10", run: func(e *env) {
			ch := e.calls(ok)
			c := e.dial()
			c.send("GET / HTTP/1.0\r\nHost: x\r\n\r\n")
			c.want(200, "ok")
			c.ends()
			if m := get(e, ch, "request"); !strings.Contains(m.head, " HTTP/1.1\r\n") {
				e.Errorf("%q", m.head)
			}
		}},
		{name: "http10-keep-alive", run: func(e *env) {
			e.calls(ok)
			c := e.dial()
			for range 2 {
				c.send("GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
				if m := c.want(200, "ok"); !strings.EqualFold(value(m.head, "Connection"), "keep-alive") {
					e.Fatalf("%q", m.head)
				}
			}
		}},
		{name: "http10-client-no-chunks", run: func(e *env) {
			e.calls("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n")
			c := e.dial()
			c.send("GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
			if m := c.want(200, "abcdef"); value(m.head, "Transfer-Encoding") != "" {
				e.Errorf("chunks for HTTP/1.0: %q", m.head)
			}
			c.ends()
		}},
		{name: "http10-post", run: expect{request: "POST / HTTP/1.0\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", sees: []string{"\r\n\r\nhello"}}.run},
		{name: "function-http10", run: func(e *env) {
			e.fn.handle(func(c *call) { c.send("HTTP/1.0 200 OK\r\n\r\nuntil close"); c.end() })
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "until close")
		}},
		{name: "answer-until-close", run: func(e *env) {
			e.fn.handle(func(c *call) { c.send("HTTP/1.1 200 OK\r\n\r\n"); c.send("until close"); c.end() })
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "until close")
			e.calls(ok)
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "ok")
		}},
		{name: "post-without-body", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", sees: []string{"Content-Length: 0\r\n"}}.run},
		{name: "get-with-body", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", sees: []string{"\r\n\r\nabc"}}.run},
		{name: "delete-with-body", run: expect{request: "DELETE / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", sees: []string{"\r\n\r\nabc"}}.run},
		{name: "get-chunked", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", sees: []string{"\r\n\r\nabc"}}.run},
		{name: "chunked-request", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n", sees: []string{"\r\n\r\nabc0123456789\r\n"}, not: []string{"content-length"}}.run},
		{name: "chunked-request-empty", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", sees: []string{"\r\n\r\n\r\n"}}.run},
		{name: "te-mixed-case", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\ntransfer-encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", sees: []string{"\r\n\r\nabc"}}.run},
		{name: "chunked-answer", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", reply: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", gets: []string{"\r\n\r\nabcde\r\n"}, gets0: []string{"content-length"}}.run},
		{name: "chunked-answer-empty", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", reply: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", gets: []string{"HTTP/1.1 200"}}.run},
		{name: "chunk-extension-request", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b;c=\"d\"\r\nabc\r\n0;z\r\n\r\n", sees: []string{"\r\n\r\nabc\r\n"}}.run},
		{name: "chunk-extension-answer", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", reply: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0;z\r\n\r\n", gets: []string{"\r\n\r\nabc\r\n"}}.run},
		{name: "chunk-size-leading-zeros", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0003\r\nabc\r\n000\r\n\r\n", sees: []string{"\r\n\r\nabc\r\n"}}.run},
		{name: "chunks-one-byte-each", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1\r\nz\r\n", 1000) + "0\r\n\r\n", sees: []string{strings.Repeat("z", 1000)}}.run},
		{name: "trailer-request", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 42\r\n\r\n", sees: []string{"\r\n\r\nabc\r\nX-Sum: 42\r\n", "Trailer: X-Sum\r\n"}}.run},
		{name: "trailer-request-undeclared", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 42\r\nX-Sum: 43\r\n\r\n", sees: []string{"\r\nX-Sum: 42\r\nX-Sum: 43\r\n"}}.run},
		{name: "trailer-request-forbidden", run: expect{request: "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 42\r\nContent-Length: 3\r\nHost: evil\r\nAuthorization: evil\r\nTransfer-Encoding: evil\r\n\r\n", sees: []string{"X-Sum: 42\r\n"}, not: []string{"content-length", "evil"}}.run},
		{name: "trailer-answer", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\nTE: trailers\r\n\r\n", reply: "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 42\r\n\r\n", sees: []string{"Te: trailers\r\n"}, gets: []string{"\r\n\r\nabc\r\nX-Sum: 42\r\n", "Trailer: X-Sum\r\n"}}.run},
		{name: "trailer-answer-undeclared", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", reply: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 42\r\n\r\n", gets: []string{"\r\n\r\nabc\r\nX-Sum: 42\r\n"}}.run},
		{name: "trailer-answer-forbidden", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", reply: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 42\r\nContent-Length: 3\r\nSet-Cookie: evil\r\n\r\n", gets: []string{"X-Sum: 42\r\n"}, gets0: []string{"content-length", "evil"}}.run},
		{name: "half-close-get", run: func(e *env) {
			e.fn.handle(func(c *call) { time.Sleep(150 * time.Millisecond); c.send(ok) }) // longer than any look after the client
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.closeWrite()
			c.want(200, "ok")
			c.ends()
		}},
		{name: "half-close-post", run: func(e *env) {
			ch := e.calls(ok)
			c := e.dial()
			c.send("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
			c.closeWrite()
			c.want(200, "ok")
			if m := get(e, ch, "request"); m.body != "abc" {
				e.Errorf("%q", m.body)
			}
		}},
		{name: "half-close-pipelined", run: func(e *env) {
			e.calls(ok)
			c := e.dial()
			c.send(strings.Repeat("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 3))
			c.closeWrite()
			for range 3 {
				c.want(200, "ok")
			}
			c.ends()
		}},
		{name: "unread-body-is-no-request", run: func(e *env) {
			e.fn.handle(func(c *call) { c.send("HTTP/1.1 403 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); c.end() })
			c := e.dial()
			rest := "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
			c.send(fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", 20000+len(rest)) + strings.Repeat("a", 20000))
			head, err := readHead(c.br)
			if err == nil && !strings.HasPrefix(head, "HTTP/1.1 403") && !strings.HasPrefix(head, "HTTP/1.1 502") {
				e.Errorf("%q", head)
			}
			io.WriteString(c, rest)
			if n := e.reached(); n != 1 {
				e.Errorf("%d requests reached the function", n)
			}
		}},
		{name: "stale-keep-alive-get", run: stale("GET / HTTP/1.1\r\nHost: x\r\n\r\n")},
		{name: "stale-keep-alive-post", run: stale("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")},
		{name: "stale-keep-alive-chunked", run: stale("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")},
		{name: "never-sent-twice", run: func(e *env) {
			e.fn.handle(func(c *call) { c.body(); c.end() }) // takes the request and dies
			c := e.dial()
			c.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
			if m := c.answer(); m.status() != 502 {
				e.Errorf("%q", m.head)
			}
			if n := e.reached(); n != 1 {
				e.Errorf("the function got the request %d times", n)
			}
		}},
		{name: "never-sent-twice-get", run: func(e *env) {
			e.fn.handle(func(c *call) { c.end() })
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			if m := c.answer(); m.status() != 502 {
				e.Errorf("%q", m.head)
			}
			if n := e.reached(); n != 1 {
				e.Errorf("the function got the request %d times", n)
			}
		}},
		{name: "good-get-among-500-half-sent", run: func(e *env) {
			for i := range 500 {
				c := e.dial()
				if i%2 == 0 {
					c.send("GET /half HTTP/1.1\r\nHost: x\r\nX-A: ")
				} else {
					c.send("POST /half HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
				}
			}
			e.free()
			ch := e.calls(ok)
			c := e.dial()
			begin := time.Now()
			c.send("GET /good HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "ok")
			if took := time.Since(begin); took > time.Second { // generous: the machine runs other tests too
				e.Errorf("a good GET took %v", took)
			}
			if m := get(e, ch, "the good one"); !strings.HasPrefix(m.head, "GET /good ") {
				e.Errorf("a half-sent request reached the function: %q", m.head)
			}
		}},
	}
}

// stale lets the function close a kept connection without a word; the next request must not notice.
func stale(request string) func(e *env) {
	return func(e *env) {
		closed := make(chan struct{}, 8)
		e.fn.handle(func(c *call) { c.body(); c.send(ok); c.end(); c.Close(); closed <- struct{}{} })
		c := e.dial()
		for range 3 {
			c.send(request)
			m := c.want(200, "ok")
			get(e, closed, "end of the connection")
			if value(m.head, "Connection") == "close" {
				c = e.dial() // see pipelining-with-chunks
			}
		}
	}
}

func interims() []testCase {
	const expecting = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
	return []testCase{
		{name: "continue-from-function", run: func(e *env) {
			bodies := make(chan string, 1)
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 100 Continue\r\n\r\n")
				b, _, _ := c.body()
				bodies <- b
				c.send(ok)
			})
			c := e.dial()
			c.send(expecting)
			if head := c.next(); !strings.HasPrefix(head, "HTTP/1.1 100 ") {
				e.Fatalf("%q", head)
			}
			c.send("hello")
			c.want(200, "ok")
			if b := get(e, bodies, "body"); b != "hello" {
				e.Errorf("%q", b)
			}
		}},
		{name: "continue-refused", run: func(e *env) {
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
				c.end()
			})
			c := e.dial()
			c.send(expecting)
			if head := c.next(); !strings.HasPrefix(head, "HTTP/1.1 401 ") {
				e.Errorf("%q before the refusal", head)
			}
		}},
		{name: "continue-refused-no-next-request", run: func(e *env) {
			e.fn.handle(func(c *call) { c.send("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"); c.end() })
			c := e.dial()
			c.send(strings.Replace(expecting, ": 5", ": 36", 1))
			c.next()
			io.WriteString(c, "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n..")
			c.ends()
			if n := e.reached(); n != 1 {
				e.Errorf("%d requests", n)
			}
		}},
		{name: "continue-body-sent-at-once", run: func(e *env) {
			e.fn.handle(func(c *call) { c.send("HTTP/1.1 100 Continue\r\n\r\n"); c.body(); c.send(ok) })
			c := e.dial()
			c.send(expecting + "hello")
			if head := c.next(); !strings.HasPrefix(head, "HTTP/1.1 100 ") {
				e.Fatalf("%q", head)
			}
			c.want(200, "ok")
		}},
		{name: "continue-function-without-100", run: func(e *env) {
			e.fn.handle(func(c *call) { c.body(); c.send(ok) }) // knows no 100-continue
			c := e.dial()
			c.send(expecting)
			time.Sleep(50 * time.Millisecond) // such a client's own patience
			c.send("hello")
			c.want(200, "ok")
		}},
		{name: "continue-large-body", run: func(e *env) {
			size := make(chan int, 1)
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 100 Continue\r\n\r\n")
				b, _, _ := c.body()
				size <- len(b)
				c.send(ok)
			})
			c := e.dial()
			c.send(strings.Replace(expecting, ": 5", ": 100000", 1))
			c.next()
			c.send(strings.Repeat("a", 100000))
			c.want(200, "ok")
			if n := get(e, size, "size"); n != 100000 {
				e.Errorf("%d", n)
			}
		}},
		{name: "early-hints", run: func(e *env) {
			e.calls("HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" + ok)
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			if head := c.next(); !strings.HasPrefix(head, "HTTP/1.1 103 ") || value(head, "Link") != "</a.css>" {
				e.Fatalf("%q", head)
			}
			c.want(200, "ok")
		}},
		{name: "early-hints-come-early", run: func(e *env) {
			got := make(chan struct{})
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </b.css>\r\n\r\n")
				select {
				case <-got:
				case <-time.After(limit):
				}
				c.send(ok)
			})
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			for _, l := range []string{"</a.css>", "</b.css>"} {
				if head := c.next(); value(head, "Link") != l {
					e.Errorf("%q", head)
				}
			}
			close(got)
			c.want(200, "ok")
		}},
		{name: "early-hints-not-for-http10", run: func(e *env) {
			e.calls("HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" + ok)
			c := e.dial()
			c.send("GET / HTTP/1.0\r\nHost: x\r\n\r\n")
			if head := c.headOf(); !strings.HasPrefix(head, "HTTP/1.1 200 ") {
				e.Errorf("%q", head)
			}
		}},
		{name: "endless-interim-answers", run: func(e *env) {
			e.fn.handle(func(c *call) {
				for range 10000 {
					if c.send("HTTP/1.1 103 Early Hints\r\n\r\n") != nil {
						break
					}
				}
				c.end()
			})
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			for n := 0; ; n++ {
				head := c.next()
				if strings.HasPrefix(head, "HTTP/1.1 502 ") {
					return
				}
				if n > 1000 {
					e.Fatalf("interim answers without end")
				}
			}
		}},
	}
}

func upgrades() []testCase {
	const ask = "GET /chat HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
	const agree = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
	// after reads what the client gets until the end.
	rest := func(e *env, c *client, want string) {
		b, err := io.ReadAll(c.br)
		if err != nil || string(b) != want {
			e.Errorf("got %.100q (%d bytes), %v; want %.100q", b, len(b), err, want)
		}
	}
	// serve agrees and then hands over.
	serve := func(e *env, then func(c *call)) <-chan string {
		heads := make(chan string, 1)
		e.fn.handle(func(c *call) {
			heads <- c.head
			then(c)
			c.end()
		})
		return heads
	}
	exact := func(r io.Reader, n int) string {
		b := make([]byte, n)
		k, _ := io.ReadFull(r, b)
		return string(b[:k])
	}
	big := strings.Repeat("0123456789abcdef", 1<<16)
	return []testCase{
		{name: "upgrade-echo", run: func(e *env) {
			heads := serve(e, func(c *call) { c.send(agree); io.Copy(c, c.br) })
			c := e.dial()
			c.send(ask)
			head := c.next()
			if !strings.HasPrefix(head, "HTTP/1.1 101 ") || value(head, "Upgrade") != "websocket" || !strings.EqualFold(value(head, "Connection"), "upgrade") || value(head, "Sec-Websocket-Accept") == "" {
				e.Fatalf("%q", head)
			}
			if at := get(e, heads, "head"); value(at, "Upgrade") != "websocket" || !strings.EqualFold(value(at, "Connection"), "upgrade") || value(at, "Sec-Websocket-Key") != "dGhlIHNhbXBsZSBub25jZQ==" {
				e.Errorf("at the function: %q", at)
			}
			for i := range 10 {
				msg := fmt.Sprintf("\x81\x05msg %d\x00\xff", i)
				c.send(msg)
				if got := exact(c.br, len(msg)); got != msg {
					e.Fatalf("%q", got)
				}
			}
			c.closeWrite()
			rest(e, c, "")
		}},
		{name: "upgrade-1MiB", run: func(e *env) {
			serve(e, func(c *call) { c.send(agree); io.Copy(c, c.br) })
			c := e.dial()
			c.send(ask)
			c.next()
			go func() { io.WriteString(c, big); c.closeWrite() }()
			rest(e, c, big)
		}},
		{name: "upgrade-early-data", run: func(e *env) {
			serve(e, func(c *call) { c.send(agree); io.Copy(c, c.br) })
			c := e.dial()
			c.send(ask + "early")
			c.next()
			c.send("late")
			c.closeWrite()
			rest(e, c, "earlylate")
		}},
		{name: "upgrade-early-answer", run: func(e *env) {
			serve(e, func(c *call) { c.send(agree + "hello at once") })
			c := e.dial()
			c.send(ask)
			c.next()
			rest(e, c, "hello at once")
		}},
		{name: "upgrade-client-half-closes", run: func(e *env) {
			serve(e, func(c *call) {
				c.send(agree)
				b, _ := io.ReadAll(c.br)
				c.send("after the end: " + string(b))
			})
			c := e.dial()
			c.send(ask)
			c.next()
			c.send("abc")
			c.closeWrite()
			rest(e, c, "after the end: abc")
		}},
		{name: "upgrade-early-data-and-half-close", run: func(e *env) {
			serve(e, func(c *call) {
				c.send(agree)
				b, _ := io.ReadAll(c.br)
				c.send("after the end: " + string(b))
			})
			c := e.dial()
			c.send(ask + "abc")
			c.closeWrite()
			c.next()
			rest(e, c, "after the end: abc")
		}},
		{name: "upgrade-function-half-closes", run: func(e *env) {
			got := make(chan string, 1)
			serve(e, func(c *call) {
				c.send(agree + "bye")
				c.Conn.(*net.TCPConn).CloseWrite()
				b, _ := io.ReadAll(c.br)
				got <- string(b)
			})
			c := e.dial()
			c.send(ask)
			c.next()
			rest(e, c, "bye")
			c.send("still heard")
			c.closeWrite()
			if s := get(e, got, "rest"); s != "still heard" {
				e.Errorf("%q", s)
			}
		}},
		{name: "upgrade-client-dies", run: func(e *env) {
			gone := make(chan struct{})
			serve(e, func(c *call) { c.send(agree); io.Copy(io.Discard, c.br); close(gone) })
			c := e.dial()
			c.send(ask)
			c.next()
			c.Conn.(*net.TCPConn).SetLinger(0)
			c.Close()
			get(e, gone, "the function sees the end")
		}},
		{name: "upgrade-function-dies", run: func(e *env) {
			serve(e, func(c *call) { c.send(agree); c.reset() })
			c := e.dial()
			c.send(ask)
			c.next()
			c.ends()
		}},
		{name: "upgrade-other-protocol", run: func(e *env) {
			heads := serve(e, func(c *call) {
				c.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: foo/2\r\n\r\n")
				io.Copy(c, c.br)
			})
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\nconnection: upgrade\r\nupgrade: foo/2\r\n\r\nabc")
			if head := c.next(); value(head, "Upgrade") != "foo/2" {
				e.Fatalf("%q", head)
			}
			if at := get(e, heads, "head"); value(at, "Upgrade") != "foo/2" {
				e.Errorf("%q", at)
			}
			c.closeWrite()
			rest(e, c, "abc")
		}},
		{name: "upgrade-refused", run: func(e *env) {
			e.calls("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
			c := e.dial()
			c.send(ask)
			c.want(403, "no")
			e.calls(ok)
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "ok")
		}},
		{name: "upgrade-ignored", run: func(e *env) {
			e.calls(ok)
			c := e.dial()
			c.send(ask)
			c.want(200, "ok")
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.want(200, "ok")
		}},
		{name: "upgrade-required", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", reply: "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno", gets: []string{"HTTP/1.1 426 "}}.run},
		{name: "upgrade-nobody-asked", run: func(e *env) {
			serve(e, func(c *call) { c.send(agree); io.Copy(io.Discard, c.br) })
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			if m := c.answer(); m.status() != 502 {
				e.Errorf("%q", m.head)
			}
		}},
		{name: "upgrade-without-connection", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n", not: []string{"upgrade"}}.run},
		{name: "upgrade-h2c-stripped", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n", not: []string{"h2c", "http2-settings", "upgrade"}}.run},
		{name: "upgrade-h2c-lower-case", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: H2C\r\nhttp2-settings: AAMAAABk\r\n\r\n", not: []string{"h2c", "http2-settings"}}.run},
		{name: "upgrade-h2c-in-list", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: websocket, h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n", not: []string{"h2c", "http2-settings"}}.run},
		{name: "upgrade-h2c-second-line", run: expect{request: "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n\r\n", not: []string{"h2c"}}.run},
	}
}

func streams() []testCase {
	return []testCase{
		{name: "full-duplex", run: func(e *env) {
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
				for {
					data, err := readChunk(c.br)
					if err != nil {
						c.end()
						return
					}
					if data == "" {
						c.br.ReadString('\n')
						c.send("0\r\n\r\n")
						return
					}
					c.send(fmt.Sprintf("%x\r\n%s\r\n", len(data), data))
				}
			})
			c := e.dial()
			c.send("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
			c.next()
			for i := range 20 {
				msg := fmt.Sprintf("ping %d", i)
				c.send(fmt.Sprintf("%x\r\n%s\r\n", len(msg), msg))
				if got, err := readChunk(c.br); got != msg {
					e.Fatalf("%q, %v", got, err)
				}
			}
			c.send("0\r\n\r\n")
			if got, err := readChunk(c.br); got != "" || err != nil {
				e.Errorf("end: %q, %v", got, err)
			}
		}},
		{name: "answer-before-body-ends", run: func(e *env) {
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nearly")
				c.body()
				c.end()
			})
			c := e.dial()
			c.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("a", 1000))
			c.want(200, "early")
		}},
		{name: "sse", run: func(e *env) {
			step := make(chan struct{})
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n")
				for i := range 10 {
					msg := fmt.Sprintf("data: %d\n\n", i)
					c.send(fmt.Sprintf("%x\r\n%s\r\n", len(msg), msg))
					select {
					case <-step:
					case <-time.After(limit):
						c.end()
						return
					}
				}
				c.send("0\r\n\r\n")
			})
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
			if head := c.next(); value(head, "Content-Type") != "text/event-stream" {
				e.Errorf("%q", head)
			}
			for i := range 10 {
				if got, err := readChunk(c.br); got != fmt.Sprintf("data: %d\n\n", i) {
					e.Fatalf("%q, %v", got, err)
				}
				step <- struct{}{}
			}
			if got, err := readChunk(c.br); got != "" || err != nil {
				e.Errorf("end: %q, %v", got, err)
			}
		}},
		{name: "slow-answer-of-known-length", run: byteByByte("HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n", false)},
		{name: "slow-answer-until-close", run: byteByByte("HTTP/1.1 200 OK\r\n\r\n", true)},
		{name: "slow-upload", run: func(e *env) {
			seen := make(chan byte)
			e.fn.handle(func(c *call) {
				for range 40 {
					b, err := c.br.ReadByte()
					if err != nil {
						c.end()
						return
					}
					seen <- b
				}
				io.CopyN(io.Discard, c.br, 20000-40)
				c.send(ok)
			})
			c := e.dial()
			c.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n\r\n")
			for i := range 40 {
				c.send(string(rune('a' + i%26)))
				if b := get(e, seen, "byte"); b != byte('a'+i%26) {
					e.Fatalf("%q", b)
				}
			}
			c.send(strings.Repeat("z", 20000-40))
			c.want(200, "ok")
		}},
		{name: "head-comes-before-body", run: func(e *env) {
			got := make(chan struct{})
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
				select {
				case <-got:
				case <-time.After(limit):
				}
				c.send("0\r\n\r\n")
			})
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.next()
			close(got)
			readChunk(c.br)
		}},
	}
}

// byteByByte lets the function send one byte after the client has the one before.
func byteByByte(head string, untilClose bool) func(e *env) {
	return func(e *env) {
		step := make(chan struct{})
		e.fn.handle(func(c *call) {
			c.send(head)
			for range 40 {
				c.send("x")
				select {
				case <-step:
				case <-time.After(limit):
					c.end()
					return
				}
			}
			c.closed = untilClose
		})
		c := e.dial()
		c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		chunked := value(c.next(), "Transfer-Encoding") != ""
		for range 40 {
			if chunked {
				if s, err := readChunk(c.br); s != "x" {
					e.Fatalf("%q, %v", s, err)
				}
			} else if b, err := c.br.ReadByte(); b != 'x' {
				e.Fatalf("%q, %v", b, err)
			}
			step <- struct{}{}
		}
	}
}

func truncations() (cc []testCase) {
	// Answers that break off: the client must see that it does not have all.
	for name, reply := range map[string]string{
		"answer-cut-length":            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
		"answer-cut-length-no-body":    "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
		"answer-cut-at-chunk-boundary": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
		"answer-cut-in-chunk":          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf",
		"answer-cut-in-chunk-size":     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n1",
		"answer-cut-before-last-crlf":  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
		"answer-cut-in-trailer":        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\nX-A: b",
		"answer-cut-no-chunk":          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"answer-cut-large":             "HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + strings.Repeat("a", 100000),
		"answer-bad-chunk":             "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalfzz\r\n",
	} {
		for _, version := range []string{"1.1", "1.0"} {
			for _, reset := range []bool{false, true} {
				if version == "1.0" && reset {
					continue
				}
				full := fmt.Sprintf("%s-http%s", name, strings.ReplaceAll(version, ".", ""))
				if reset {
					full += "-reset"
				}
				cc = append(cc, testCase{name: full, run: func(e *env) {
					e.fn.handle(func(c *call) {
						c.send(reply)
						if reset {
							c.reset()
						}
						c.end()
					})
					c := e.dial()
					c.send("GET / HTTP/" + version + "\r\nHost: x\r\n\r\n")
					head, err := readHead(c.br)
					if err != nil {
						return // nothing at all is honest too
					}
					m := &message{head: head}
					if m.status() >= 500 {
						return
					}
					if err := m.read(c.br, true); err == nil {
						e.Errorf("half an answer looks whole: %q %.100q", m.head, m.body)
					}
				}})
			}
		}
	}
	for name, reply := range map[string]string{
		"answer-none":            "",
		"answer-half-head":       "HTTP/1.1 200 OK\r\nX-A",
		"answer-garbage":         "\x00\x01\x02garbage\r\n\r\n",
		"answer-no-http":         "220 smtp ready\r\n\r\n",
		"answer-status-000":      "HTTP/1.1 000 OK\r\nContent-Length: 5\r\n\r\nhello",
		"answer-status-20":       "HTTP/1.1 20 OK\r\nContent-Length: 5\r\n\r\nhello",
		"answer-status-2000":     "HTTP/1.1 2000 OK\r\nContent-Length: 5\r\n\r\nhello",
		"answer-http-2.0":        "HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
		"answer-head-too-big":    "HTTP/1.1 200 OK\r\nX-A: " + strings.Repeat("a", 100<<10) + "\r\n\r\n",
		"answer-bad-length":      "HTTP/1.1 200 OK\r\nContent-Length: x5\r\n\r\nhello",
		"answer-negative-length": "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
		"answer-bad-header":      "HTTP/1.1 200 OK\r\nX A\x00: b\r\nContent-Length: 0\r\n\r\n",
		"answer-two-lengths":     "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nhelloxx",
		"answer-length-and-te":   "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
	} {
		cc = append(cc, testCase{name: name, run: func(e *env) {
			e.fn.handle(func(c *call) { c.send(reply); c.end() })
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			m := c.answer()
			if name == "answer-length-and-te" && m.status() == 200 && m.body == "hello" && value(m.head, "Content-Length") == "" {
				return // RFC 9112 6.3: the chunks win
			}
			if m.status() != 502 || value(m.head, "X-Thaw-Error") == "" && !e.p.router {
				e.Errorf("%q %q", m.head, m.body)
			}
			if n := e.reached(); n != 1 {
				e.Errorf("reached the function %d times", n)
			}
		}})
	}
	// Uploads that break off: the function must see that it does not have all.
	for name, request := range map[string]string{
		"upload-cut-large-length":  "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + strings.Repeat("a", 100000),
		"upload-cut-9KiB":          "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n" + strings.Repeat("a", 8999),
		"upload-cut-large-chunked": "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n186a0\r\n" + strings.Repeat("a", 100000) + "\r\n",
		"upload-cut-expecting":     "POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\nhalf",
	} {
		for _, how := range []string{"fin", "reset", "close"} {
			cc = append(cc, testCase{name: name + "-" + how, run: func(e *env) {
				errs := make(chan error, 4)
				e.fn.handle(func(c *call) {
					_, _, err := c.body()
					errs <- err
					if err == nil {
						c.send(ok)
					}
					c.end()
				})
				c := e.dial()
				c.send(request)
				e.free()
				switch how {
				case "fin":
					c.closeWrite()
					if head, err := readHead(c.br); err == nil && !strings.HasPrefix(head, "HTTP/1.1 4") {
						e.Errorf("%q", head)
					}
				case "reset":
					c.Conn.(*net.TCPConn).SetLinger(0)
					c.Close()
				case "close":
					c.Close()
				}
				// It may not have reached the function at all, when the client was seen to leave before its slot.
				select {
				case err := <-errs:
					if err == nil {
						e.Errorf("half an upload looked whole to the function")
					}
				case <-time.After(300 * time.Millisecond):
					if e.reached() > 0 {
						if err := get(e, errs, "the function sees the end of the upload"); err == nil {
							e.Errorf("half an upload looked whole to the function")
						}
					}
				}
			}})
		}
	}
	return cc
}

func headers() []testCase {
	get := func(lines string) string { return "GET / HTTP/1.1\r\nHost: x\r\n" + lines + "\r\n" }
	reply := func(lines string) string {
		return "HTTP/1.1 200 OK\r\n" + lines + "Content-Length: 2\r\n\r\nok"
	}
	order := func(e *env, side, head, name string, want ...string) {
		if got := values(head, name); !slices.Equal(got, want) {
			e.Errorf("%s: %s is %q, want %q", side, name, got, want)
		}
	}
	return []testCase{
		{name: "hop-by-hop-request", run: expect{request: get("Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\nTE: gzip\r\nX-Kept: yes\r\n"),
			sees: []string{"X-Kept: yes\r\n"}, not: []string{"keep-alive", "proxy-", "\r\nte:"}}.run},
		{name: "hop-by-hop-request-lower-case", run: expect{request: get("connection: keep-alive\r\nkeep-alive: timeout=5\r\nproxy-connection: keep-alive\r\nproxy-authorization: Basic eA==\r\nte: gzip\r\n"),
			not: []string{"keep-alive", "proxy-", "\r\nte:"}}.run},
		{name: "connection-named-request", run: expect{request: get("X-One: 1\r\nConnection: X-One, x-two\r\nX-Two: 2\r\nX-Three: 3\r\n"),
			sees: []string{"X-Three: 3\r\n"}, not: []string{"x-one", "x-two"}}.run},
		{name: "connection-named-request-two-lines", run: expect{request: get("Connection: X-One\r\nX-One: 1\r\nX-Two: 2\r\nConnection: X-Two\r\nX-Three: 3\r\n"),
			sees: []string{"X-Three: 3\r\n"}, not: []string{"x-one", "x-two"}}.run},
		{name: "connection-named-with-close", run: expect{request: get("Connection: close, X-One\r\nX-One: 1\r\nX-Three: 3\r\n"),
			sees: []string{"X-Three: 3\r\n"}, not: []string{"x-one"}}.run},
		{name: "connection-cannot-name-host", run: expect{request: get("Connection: Host, Content-Type, X-Forwarded-For\r\nContent-Type: a/b\r\nX-Three: 3\r\n"),
			sees: []string{"Host: x\r\n", "Content-Type: a/b\r\n", "X-Three: 3\r\n"}}.run},
		{name: "hop-by-hop-answer", run: expect{request: get(""), reply: reply("Connection: X-One\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\nProxy-Connection: close\r\nX-One: 1\r\nUpgrade: h2c\r\nX-Kept: yes\r\n"),
			gets: []string{"X-Kept: yes\r\n"}, gets0: []string{"keep-alive", "proxy-", "x-one", "upgrade", "h2c"}}.run},
		{name: "hop-by-hop-answer-lower-case", run: expect{request: get(""), reply: reply("connection: x-one, Keep-Alive\r\nkeep-alive: timeout=5\r\nproxy-authenticate: Basic\r\nx-one: 1\r\nx-kept: yes\r\n"),
			gets: []string{": yes\r\n"}, gets0: []string{"keep-alive", "proxy-", "x-one"}}.run},
		{name: "connection-named-answer-with-close", run: func(e *env) {
			e.fn.handle(func(c *call) {
				c.send(reply("Connection: close\r\nConnection: X-One\r\nX-One: 1\r\nX-Kept: yes\r\n"))
				c.end()
			})
			c := e.dial()
			c.send(get(""))
			if m := c.want(200, "ok"); value(m.head, "X-One") != "" || value(m.head, "X-Kept") != "yes" {
				e.Errorf("%q", m.head)
			}
		}},
		{name: "internal-dropped", run: expect{request: get("K-Network-Hash: evil\r\nK-Passthrough-Lb: evil\r\nK-Proxy-Request: evil\r\nKnative-Serving-Revision: evil\r\nKnative-Serving-Namespace: evil\r\nX-Kept: yes\r\n"),
			sees: []string{"X-Kept: yes\r\n"}, not: []string{"evil"}}.run},
		{name: "internal-dropped-any-case", run: expect{request: get("k-network-hash: evil\r\nK-PASSTHROUGH-LB: evil\r\nk-proxy-REQUEST: evil\r\nknative-serving-revision: evil\r\nKNATIVE-SERVING-NAMESPACE: evil\r\nX-Kept: yes\r\n"),
			sees: []string{"X-Kept: yes\r\n"}, not: []string{"evil"}}.run},
		{name: "internal-host-from-outside", only: withRouter, run: expect{request: get("K-Original-Host: evil\r\n"), sees: []string{"Host: x\r\n"}, not: []string{"evil"}}.run},
		{name: "function-cannot-speak-for-the-platform", only: withRouter, run: expect{request: get(""), reply: reply("X-Thaw-Error: evil\r\n"), gets0: []string{"x-thaw-error"}}.run},
		{name: "forwarded-for", only: withRouter, run: expect{request: get("X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n"), sees: []string{"X-Forwarded-For: 1.2.3.4, 127.0.0.1", "X-Forwarded-Host: x\r\n", "Forwarded: for="}}.run},
		{name: "request-id-kept", run: expect{request: get("X-Request-Id: abc-123\r\n"), sees: []string{"X-Request-Id: abc-123\r\n"}, gets: []string{"X-Request-Id: abc-123\r\n"}}.run},
		{name: "request-id-made", run: expect{request: get(""), sees: []string{"X-Request-Id: "}, gets: []string{"X-Request-Id: "}}.run},
		{name: "host-verbatim", run: expect{request: "GET / HTTP/1.1\r\nHost: Foo.Example.COM:8080\r\n\r\n", sees: []string{"Host: Foo.Example.COM:8080\r\n"}}.run},
		{name: "host-ipv6", run: expect{request: "GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", sees: []string{"Host: [::1]:8080\r\n"}}.run},
		{name: "large-headers", run: expect{request: get("X-Big: " + strings.Repeat("a", 12<<10) + "\r\n"), reply: reply("X-Big: " + strings.Repeat("b", 12<<10) + "\r\n"),
			sees: []string{"X-Big: " + strings.Repeat("a", 12<<10) + "\r\n"}, gets: []string{"X-Big: " + strings.Repeat("b", 12<<10) + "\r\n"}}.run},
		{name: "many-headers", run: expect{request: get(strings.Repeat("X-Many: a\r\n", 200)), reply: reply(strings.Repeat("X-Many: a\r\n", 200)),
			sees: []string{strings.Repeat("X-Many: a\r\n", 200)}, gets: []string{strings.Repeat("X-Many: a\r\n", 200)}}.run},
		{name: "repeated-headers-in-order", run: func(e *env) {
			got, answer := e.exchange(get("X-A: 1\r\nX-B: b\r\nX-A: 2\r\nK-Network-Hash: x\r\nX-A: 3\r\nX-C: c\r\nX-A: 1\r\n"), reply("X-A: 1\r\nX-B: b\r\nX-A: 2\r\nKeep-Alive: x\r\nX-A: 3\r\n"))
			order(e, "function", got.head, "X-A", "1", "2", "3", "1")
			order(e, "client", answer.head, "X-A", "1", "2", "3")
		}},
		{name: "repeated-headers-after-forwarded", run: func(e *env) {
			got, _ := e.exchange(get("X-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\nX-Forwarded-For: 5.6.7.8\r\nK-Proxy-Request: x\r\nX-A: 1\r\nX-A: 2\r\nX-B: 3\r\nX-A: 4\r\n"), ok)
			order(e, "function", got.head, "X-A", "1", "2", "4")
		}},
		{name: "set-cookie-lines", run: func(e *env) {
			_, answer := e.exchange(get(""), reply("Set-Cookie: b=2; Path=/; HttpOnly\r\nSet-Cookie: a=1; Expires=Wed, 21 Oct 2015 07:28:00 GMT\r\nSet-Cookie: b=3; SameSite=Lax; Partitioned\r\nSet-Cookie: \"odd\"=\"q\"; X=;;\r\n"))
			order(e, "client", answer.head, "Set-Cookie", "b=2; Path=/; HttpOnly", "a=1; Expires=Wed, 21 Oct 2015 07:28:00 GMT", "b=3; SameSite=Lax; Partitioned", "\"odd\"=\"q\"; X=;;")
		}},
		{name: "cookie-verbatim", run: func(e *env) {
			got, _ := e.exchange(get("Cookie: a=\"b c\"; d=e;;f; g==h; a=2;i\r\n"), ok)
			order(e, "function", got.head, "Cookie", "a=\"b c\"; d=e;;f; g==h; a=2;i")
		}},
		{name: "cookie-two-lines", run: func(e *env) {
			got, _ := e.exchange(get("Cookie: a=1\r\nCookie: b=2\r\n"), ok)
			if s := strings.Join(values(got.head, "Cookie"), "; "); s != "a=1; b=2" {
				e.Errorf("%q", s)
			}
		}},
		{name: "value-utf8-and-latin1", run: expect{request: get("X-A: h\xc3\xa9\xe9\r\n"), reply: reply("X-B: h\xc3\xa9\xe9\r\n"), sees: []string{"X-A: h\xc3\xa9\xe9\r\n"}, gets: []string{"X-B: h\xc3\xa9\xe9\r\n"}}.run},
		{name: "value-empty", run: expect{request: get("X-A:\r\nX-B: b\r\n"), reply: reply("X-C:\r\n"), sees: []string{"X-A: \r\n", "X-B: b\r\n"}, gets: []string{"X-C: \r\n"}}.run},
		{name: "value-tabs-and-spaces", run: expect{request: get("X-A: \t a \t b \t \r\n"), sees: []string{"a \t b"}}.run},
		{name: "value-with-colons-and-quotes", run: expect{request: get("X-A: a:b: \"c\\\"d\", 'e'\r\n"), sees: []string{"X-A: a:b: \"c\\\"d\", 'e'\r\n"}}.run},
		{name: "name-with-odd-token-bytes", run: expect{request: get("X_a.b!c#d$e%f&g'h*i+j^k`l|m~n: v\r\n"), sees: []string{": v\r\n"}}.run},
		{name: "nothing-made-up", run: expect{request: get(""), reply: reply(""), not: []string{"user-agent", "accept", "content-type", "content-length"}, gets0: []string{"content-type", "server:", "date:"}}.run},
		{name: "user-agent-and-accept-kept", run: expect{request: get("User-Agent: odd/1 (x)\r\nAccept-Encoding: br\r\nAuthorization: Bearer x\r\nOrigin: null\r\nRange: bytes=0-1\r\n"),
			sees: []string{"User-Agent: odd/1 (x)\r\n", "Accept-Encoding: br\r\n", "Authorization: Bearer x\r\n", "Origin: null\r\n", "Range: bytes=0-1\r\n"}}.run},
		{name: "server-and-date-kept", run: expect{request: get(""), reply: reply("Server: odd\r\nDate: Wed, 21 Oct 2015 07:28:00 GMT\r\nContent-Type: a/b; c=d\r\nContent-Encoding: gzip\r\nVary: a, b\r\nEtag: W/\"x\"\r\n"),
			gets: []string{"Server: odd\r\n", "Date: Wed, 21 Oct 2015 07:28:00 GMT\r\n", "Content-Type: a/b; c=d\r\n", "Content-Encoding: gzip\r\n", "Vary: a, b\r\n", "Etag: W/\"x\"\r\n"}}.run},
		{name: "w3c-trace-context-kept", run: expect{request: get("Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nTracestate: a=b\r\nBaggage: c=d\r\n"),
			sees: []string{"Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n", "Tracestate: a=b\r\n", "Baggage: c=d\r\n"}}.run},
	}
}

// random are bytes that no compression or pattern could hide a mistake in; made once for all.
var random = func() string {
	b := make([]byte, 8<<20)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return string(b)
}()

func bodies() (cc []testCase) {
	for _, size := range []int{1, 8 << 10, 8<<10 + 1, 64 << 10, 8 << 20} {
		for _, way := range []string{"length", "chunked"} {
			cc = append(cc, testCase{name: fmt.Sprintf("body-%d-%s", size, way), run: func(e *env) {
				data := random[:size]
				frame := func(w io.Writer, first string) {
					bw := bufio.NewWriterSize(w, 48<<10)
					if way == "length" {
						fmt.Fprintf(bw, "%sContent-Length: %d\r\n\r\n%s", first, size, data)
					} else {
						bw.WriteString(first + "Transfer-Encoding: chunked\r\n\r\n")
						for rest, n := data, 1; len(rest) > 0; n = min(n*3+1, 100_000) {
							k := min(n, len(rest))
							fmt.Fprintf(bw, "%x\r\n%s\r\n", k, rest[:k])
							rest = rest[k:]
						}
						bw.WriteString("0\r\n\r\n")
					}
					bw.Flush()
				}
				sums := make(chan [32]byte, 1)
				e.fn.handle(func(c *call) {
					h := sha256.New()
					b, _, err := c.bodyTo(h)
					if err != nil || b != int64(size) {
						e.Errorf("the function got %d bytes: %v", b, err)
					}
					sums <- [32]byte(h.Sum(nil))
					frame(c, "HTTP/1.1 200 OK\r\n")
				})
				c := e.dial()
				frame(c, "POST / HTTP/1.1\r\nHost: x\r\n")
				a := &message{head: c.next()}
				h := sha256.New()
				n, err := copyBody(h, c.br, a.head)
				want := sha256.Sum256([]byte(data))
				if err != nil || n != int64(size) || !bytes.Equal(h.Sum(nil), want[:]) {
					e.Fatalf("the client got %d bytes: %v", n, err)
				}
				if s := get(e, sums, "checksum"); s != want {
					e.Errorf("other bytes at the function")
				}
			}})
		}
	}
	return cc
}

// bodyTo copies a request's body, however long.
func (c *call) bodyTo(w io.Writer) (int64, string, error) {
	n, err := copyBody(w, c.br, c.head)
	return n, "", err
}

func copyBody(w io.Writer, br *bufio.Reader, head string) (total int64, err error) {
	if l := value(head, "Content-Length"); l != "" {
		var n int64
		fmt.Sscan(l, &n)
		return io.CopyN(w, br, n)
	}
	for {
		data, err := readChunk(br)
		k, _ := io.WriteString(w, data)
		total += int64(k)
		if err != nil {
			return total, err
		}
		if data == "" {
			_, err = br.ReadString('\n')
			return total, err
		}
	}
}

// cancelWithin is what is promised, 100 ms a hop, with room for a busy machine.
const cancelWithin = 400 * time.Millisecond

func leaving() []testCase {
	// next is a good request after one that was left: it shows that the slot is free.
	next := func(e *env) {
		e.calls(ok)
		c := e.dial()
		c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		c.want(200, "ok")
	}
	// The function must always see that the client has left, and see it in time in one of five tries: the machine has other work too.
	during := func(request string, reset bool, reply string) func(e *env) {
		once := func(e *env) (took time.Duration) {
			inside, gone := make(chan struct{}, 1), make(chan time.Time, 1)
			e.fn.handle(func(c *call) {
				c.send(reply)
				inside <- struct{}{}
				io.Copy(io.Discard, c.br)
				gone <- time.Now()
				c.end()
			})
			c := e.dial()
			c.send(request)
			get(e, inside, "the request at the function")
			if reply != "" {
				c.next()
			}
			left := time.Now()
			if reset {
				c.Conn.(*net.TCPConn).SetLinger(0)
			}
			c.Close()
			return get(e, gone, "the client's leaving at the function").Sub(left)
		}
		return func(e *env) {
			took := once(e)
			for try := 1; try < 5 && took > cancelWithin; try++ {
				took = min(took, once(e))
			}
			if took > cancelWithin {
				e.Errorf("the function saw the cancel only after %v", took)
			}
			next(e)
		}
	}
	return []testCase{
		{name: "client-leaves-running-close", run: during("GET / HTTP/1.1\r\nHost: x\r\n\r\n", false, "")},
		{name: "client-leaves-running-reset", run: during("GET / HTTP/1.1\r\nHost: x\r\n\r\n", true, "")},
		{name: "client-leaves-running-post", run: during("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", true, "")},
		{name: "client-leaves-uploading", run: during("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nabc", true, "")},
		{name: "client-leaves-quiet-stream", run: during("GET / HTTP/1.1\r\nHost: x\r\n\r\n", true, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")},
		{name: "client-leaves-quiet-stream-close", run: during("GET / HTTP/1.1\r\nHost: x\r\n\r\n", false, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")},
		{name: "client-leaves-busy-stream", run: func(e *env) {
			gone := make(chan struct{})
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
				for c.send("3\r\nabc\r\n") == nil {
					time.Sleep(time.Millisecond)
				}
				close(gone)
				c.end()
			})
			c := e.dial()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.next()
			c.Conn.(*net.TCPConn).SetLinger(0)
			c.Close()
			get(e, gone, "the function sees the cancel")
			next(e)
		}},
		{name: "client-leaves-waiting", only: held, run: func(e *env) {
			c := e.dial()
			c.send("GET /left HTTP/1.1\r\nHost: x\r\n\r\n")
			c.Conn.(*net.TCPConn).SetLinger(0)
			c.Close()
			ch := e.calls(ok)
			d := e.dial()
			d.send("GET /stayed HTTP/1.1\r\nHost: x\r\n\r\n")
			d.want(200, "ok")
			// The one that left may have been let in before it was noticed; it must not keep the slot.
			for strings.HasPrefix(get(e, ch, "request").head, "GET /left ") {
			}
		}},
	}
}
