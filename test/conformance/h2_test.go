package conformance

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"testing"
	"time"
)

// TestHTTP2 sends requests by HTTP/2 with prior knowledge to a function that speaks HTTP/1.1.
func TestHTTP2(t *testing.T) {
	t.Parallel()
	overPaths(t, func(t *testing.T, p *path) {
		var protocols http.Protocols
		protocols.SetUnencryptedHTTP2(true)
		tr := &http.Transport{Protocols: &protocols, DisableCompression: true}
		t.Cleanup(tr.CloseIdleConnections)
		for _, c := range overHTTP2(tr) {
			runCase(t, p, c)
		}
	})
}

func overHTTP2(tr *http.Transport) []testCase {
	send := func(e *env, method, target string, body io.Reader, lines ...string) (*http.Response, error) {
		ctx, cancel := context.WithTimeout(e.t.Context(), limit)
		e.t.Cleanup(cancel)
		req, err := http.NewRequestWithContext(ctx, method, "http://"+e.p.addr+target, body)
		if err != nil {
			e.Fatalf("%v", err)
		}
		for i := 0; i < len(lines); i += 2 {
			if lines[i] == "Host" {
				req.Host = lines[i+1]
			} else {
				req.Header.Add(lines[i], lines[i+1])
			}
		}
		return tr.RoundTrip(req)
	}
	whole := func(e *env, resp *http.Response, err error) string {
		if err != nil {
			e.Fatalf("%v", err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			e.Fatalf("body: %v after %d bytes", err, len(b))
		}
		if resp.ProtoMajor != 2 {
			e.Errorf("answered by %s", resp.Proto)
		}
		return string(b)
	}
	cc := []testCase{
		{name: "h2-headers-both-ways", run: func(e *env) {
			ch := e.calls("HTTP/1.1 200 OK\r\nX-A: 1\r\nX-A: 2\r\nConnection: X-One\r\nX-One: 1\r\nKeep-Alive: x\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\nok")
			resp, err := send(e, "GET", "/a//b?c=%20;d", nil, "Host", "Foo.example:81", "X-A", "1", "X-A", "2", "K-Network-Hash", "evil", "Cookie", "a=\"b c\"; d=e")
			whole(e, resp, err)
			got := get(e, ch, "request")
			if !strings.HasPrefix(got.head, "GET /a//b?c=%20;d HTTP/1.1\r\n") || value(got.head, "Host") != "Foo.example:81" || value(got.head, "X-A") != "1|2" ||
				strings.Contains(got.head, "evil") || value(got.head, "Cookie") != "a=\"b c\"; d=e" {
				e.Errorf("at the function: %q", got.head)
			}
			if a := resp.Header["X-A"]; fmt.Sprint(a) != "[1 2]" || resp.Header.Get("X-One") != "" || resp.Header.Get("Keep-Alive") != "" || len(resp.Header["Set-Cookie"]) != 2 {
				e.Errorf("at the client: %v", resp.Header)
			}
		}},
		{name: "h2-post", run: func(e *env) {
			ch := e.calls(ok)
			resp, err := send(e, "POST", "/", strings.NewReader("hello"))
			if b := whole(e, resp, err); b != "ok" {
				e.Errorf("%q", b)
			}
			if m := get(e, ch, "request"); m.body != "hello" || value(m.head, "Content-Length") != "5" {
				e.Errorf("%q %q", m.head, m.body)
			}
		}},
		{name: "h2-post-unknown-length", run: func(e *env) {
			r, w := io.Pipe()
			e.fn.handle(func(c *call) {
				first, _ := readChunk(c.br)
				go func() { io.WriteString(w, "lo"); w.Close() }() // not before the first piece is here
				second, _ := readChunk(c.br)
				last, err := readChunk(c.br)
				if first+second+last != "hello" || last != "" || err != nil || value(c.head, "Transfer-Encoding") != "chunked" {
					e.Errorf("%q %q %q %q %v", c.head, first, second, last, err)
				}
				c.br.ReadString('\n')
				c.send(ok)
			})
			go io.WriteString(w, "hel")
			resp, err := send(e, "POST", "/", r)
			whole(e, resp, err)
		}},
		{name: "h2-post-unknown-length-small", run: func(e *env) { // it may be here whole before the function is called: then it has a length
			ch := e.calls(ok)
			resp, err := send(e, "POST", "/", io.MultiReader(strings.NewReader("hel"), strings.NewReader("lo")))
			whole(e, resp, err)
			if m := get(e, ch, "request"); m.body != "hello" || value(m.head, "Transfer-Encoding")+value(m.head, "Content-Length") != "chunked" && value(m.head, "Content-Length")+value(m.head, "Transfer-Encoding") != "5" {
				e.Errorf("%q %q", m.head, m.body)
			}
		}},
		{name: "h2-head", run: func(e *env) {
			e.calls("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
			resp, err := send(e, "HEAD", "/", nil)
			if b := whole(e, resp, err); b != "" || resp.Header.Get("Content-Length") != "10" {
				e.Errorf("%q %v", b, resp.Header)
			}
		}},
		{name: "h2-204", run: func(e *env) {
			e.calls("HTTP/1.1 204 No Content\r\n\r\n")
			resp, err := send(e, "GET", "/", nil)
			if whole(e, resp, err); resp.StatusCode != 204 {
				e.Errorf("%d", resp.StatusCode)
			}
		}},
		{name: "h2-304", run: func(e *env) {
			e.calls("HTTP/1.1 304 Not Modified\r\nEtag: x\r\n\r\n")
			resp, err := send(e, "GET", "/", nil)
			if whole(e, resp, err); resp.StatusCode != 304 {
				e.Errorf("%d", resp.StatusCode)
			}
		}},
		{name: "h2-trailers-both-ways", run: func(e *env) {
			ch := e.calls("HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 42\r\nX-More: 43\r\n\r\n")
			ctx, cancel := context.WithTimeout(e.t.Context(), limit)
			defer cancel()
			req, _ := http.NewRequestWithContext(ctx, "POST", "http://"+e.p.addr+"/", io.MultiReader(strings.NewReader("abc")))
			req.Trailer = http.Header{"X-Up": {"7"}}
			resp, err := tr.RoundTrip(req)
			if whole(e, resp, err); resp.Trailer.Get("X-Sum") != "42" || resp.Trailer.Get("X-More") != "43" {
				e.Errorf("answer's trailer: %v", resp.Trailer)
			}
			if m := get(e, ch, "request"); !strings.Contains(m.trailer, "X-Up: 7\r\n") {
				e.Errorf("request's trailer: %q in %q", m.trailer, m.head)
			}
		}},
		{name: "h2-early-hints", run: func(e *env) {
			e.calls("HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" + ok)
			hints := make(chan string, 4)
			ctx, cancel := context.WithTimeout(e.t.Context(), limit)
			defer cancel()
			ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
				hints <- fmt.Sprint(code, h.Get("Link"))
				return nil
			}})
			req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+e.p.addr+"/", nil)
			resp, err := tr.RoundTrip(req)
			whole(e, resp, err)
			if h := get(e, hints, "hint"); h != "103 </a.css>" && h != "103</a.css>" {
				e.Errorf("%q", h)
			}
		}},
		{name: "h2-full-duplex", run: func(e *env) {
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
				for {
					data, err := readChunk(c.br)
					if err != nil || data == "" {
						c.br.ReadString('\n')
						c.send("0\r\n\r\n")
						c.closed = err != nil
						return
					}
					c.send(fmt.Sprintf("%x\r\n%s\r\n", len(data), data))
				}
			})
			r, w := io.Pipe()
			resp, err := send(e, "POST", "/", r)
			if err != nil {
				e.Fatalf("%v", err)
			}
			buf := make([]byte, 64)
			for i := range 10 {
				msg := fmt.Sprintf("ping-%d", i)
				io.WriteString(w, msg)
				if _, err := io.ReadFull(resp.Body, buf[:len(msg)]); err != nil || string(buf[:len(msg)]) != msg {
					e.Fatalf("%q, %v", buf[:len(msg)], err)
				}
			}
			w.Close()
			whole(e, resp, nil)
		}},
		{name: "h2-truncated-answer", run: func(e *env) {
			e.fn.handle(func(c *call) {
				c.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
				c.end()
			})
			resp, err := send(e, "GET", "/", nil)
			if err == nil {
				if resp.StatusCode == 502 {
					return
				}
				if _, err = io.ReadAll(resp.Body); err == nil {
					e.Errorf("half an answer looks whole")
				}
			}
		}},
		{name: "h2-truncated-answer-length", run: func(e *env) {
			e.fn.handle(func(c *call) { c.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"); c.end() })
			resp, err := send(e, "GET", "/", nil)
			if err == nil && resp.StatusCode != 502 {
				if _, err = io.ReadAll(resp.Body); err == nil {
					e.Errorf("half an answer looks whole")
				}
			}
		}},
		{name: "h2-truncated-upload", run: func(e *env) {
			errs := make(chan error, 1)
			e.fn.handle(func(c *call) { _, _, err := c.body(); errs <- err; c.end() })
			resp, err := send(e, "POST", "/", io.MultiReader(strings.NewReader(strings.Repeat("a", 20000)), broken{}))
			if err == nil && resp.StatusCode < 400 {
				e.Errorf("%d", resp.StatusCode)
			}
			select {
			case err := <-errs:
				if err == nil {
					e.Errorf("half an upload looked whole")
				}
			case <-time.After(200 * time.Millisecond): // it may not have got there at all
			}
		}},
		{name: "h2-client-leaves-running", run: func(e *env) {
			inside, gone := make(chan struct{}), make(chan struct{})
			e.fn.handle(func(c *call) {
				close(inside)
				io.Copy(io.Discard, c.br)
				close(gone)
				c.end()
			})
			ctx, cancel := context.WithCancel(e.t.Context())
			req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+e.p.addr+"/", nil)
			done := make(chan error, 1)
			go func() { _, err := tr.RoundTrip(req); done <- err }()
			get(e, inside, "request")
			cancel()
			if err := get(e, done, "end"); !errors.Is(err, context.Canceled) {
				e.Errorf("%v", err)
			}
			select {
			case <-gone:
			case <-time.After(cancelWithin):
				e.Errorf("the function does not see that the client has left")
			}
		}},
		{name: "h2-connect", run: func(e *env) {
			ctx, cancel := context.WithTimeout(e.t.Context(), limit)
			defer cancel()
			req, _ := http.NewRequestWithContext(ctx, "CONNECT", "http://"+e.p.addr, nil)
			if resp, err := tr.RoundTrip(req); err == nil && resp.StatusCode < 400 {
				e.Errorf("%d", resp.StatusCode)
			}
			if n := e.reached(); n > 0 {
				e.Errorf("CONNECT reached the function")
			}
		}},
		{name: "h2-function-dies", run: func(e *env) {
			e.fn.handle(func(c *call) { c.reset() })
			resp, err := send(e, "GET", "/", nil)
			if whole(e, resp, err); resp.StatusCode != 502 {
				e.Errorf("%d", resp.StatusCode)
			}
		}},
		{name: "h2-answer-until-close", run: func(e *env) {
			e.fn.handle(func(c *call) { c.send("HTTP/1.1 200 OK\r\n\r\nuntil close"); c.end() })
			resp, err := send(e, "GET", "/", nil)
			if b := whole(e, resp, err); b != "until close" {
				e.Errorf("%q", b)
			}
		}},
		{name: "h2-many-streams", run: func(e *env) {
			e.calls(ok)
			e.fn.handle(nil)
			errs := make(chan error, 8)
			for range 8 {
				go func() {
					req, _ := http.NewRequest("GET", "http://"+e.p.addr+"/", nil)
					resp, err := tr.RoundTrip(req)
					if err == nil {
						b, _ := io.ReadAll(resp.Body)
						if string(b) != "ok" {
							err = fmt.Errorf("%d %q", resp.StatusCode, b)
						}
					}
					errs <- err
				}()
			}
			for range 8 {
				if err := get(e, errs, "answer"); err != nil {
					e.Errorf("%v", err)
				}
			}
		}},
	}
	for _, size := range []int{64 << 10, 8 << 20} {
		cc = append(cc, testCase{name: fmt.Sprintf("h2-body-%d", size), run: func(e *env) {
			sum := sha256.Sum256([]byte(random[:size]))
			sums := make(chan []byte, 1)
			e.fn.handle(func(c *call) {
				h := sha256.New()
				c.bodyTo(h)
				sums <- h.Sum(nil)
				c.send(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size))
				c.send(random[:size])
			})
			resp, err := send(e, "POST", "/", strings.NewReader(random[:size]))
			if b := whole(e, resp, err); b != random[:size] {
				e.Errorf("other bytes at the client")
			}
			if s := get(e, sums, "checksum"); !bytes.Equal(s, sum[:]) {
				e.Errorf("other bytes at the function")
			}
		}})
	}
	return cc
}

// broken is the end of a body whose sender gives up.
type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("sender gives up") }
