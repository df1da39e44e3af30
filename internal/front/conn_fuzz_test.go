package front_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
)

// seen is a request as a handler got it.
type seen struct {
	method, body string
	whole        bool
}

// recorder is a Handler that reads each request to its end and keeps what came.
type recorder struct {
	mu  sync.Mutex
	all []seen
}

func (r *recorder) take() []seen {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.all
	r.all = nil
	return all
}

func (r *recorder) Serve(x *hop.Exchange) error {
	s := seen{method: string(x.Req.Header.Method()), whole: true}
	if x.Req.IsBodyStream() {
		b, err := io.ReadAll(x.Req.BodyStream())
		s.body, s.whole = string(b), err == nil
	} else {
		s.body = string(x.Req.Body())
	}
	r.mu.Lock()
	r.all = append(r.all, s)
	r.mu.Unlock()
	if !s.whole {
		return &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "broke off"}
	}
	x.Resp.SetBodyString("ok")
	return nil
}

// unixFront serves h on a Unix socket: a real descriptor as in production, and no port is used up by thousands of connections a second.
func unixFront(f *testing.F, h hop.Handler) (dial func(t *testing.T) *net.UnixConn) {
	path := filepath.Join(f.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		f.Fatal(err)
	}
	s := front.New(front.Config{}, h)
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	f.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		s.Shutdown(ctx)
		<-done
	})
	return func(t *testing.T) *net.UnixConn {
		nc, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		return nc
	}
}

// A connection's bytes: the requests that a handler gets are those that another parser sees in them, with the same bodies, as far as
// both accept them; one that breaks off is never whole.
func FuzzConnection(f *testing.F) {
	const get, post = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\n"
	for _, s := range []string{
		get, get + get + get, post + "Content-Length: 5\r\n\r\nhello" + get, post + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + get,
		post + "Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nX-A: b\r\n\r\n" + get, post + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		post + "Content-Length: 9\r\n\r\nhello", post + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get,
		post + "Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello", "GET / HTTP/1.0\r\n\r\n", "\r\n\r\n" + get, "GET / HTTP/1.1\nHost: a\n\n",
		post + "Content-Length: 10000\r\n\r\n" + strings.Repeat("x", 10000) + get, "OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + get,
		"GET http://b/c HTTP/1.1\r\nHost: a\r\n\r\n", "HEAD / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nmore",
	} {
		f.Add([]byte(s))
	}
	rec := &recorder{}
	dial := unixFront(f, rec)
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 || in[0] == 'P' && bytes.HasPrefix(in, []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")) {
			return // HTTP/2: another parser's
		}
		nc := dial(t)
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(5 * time.Second))
		go func() {
			nc.Write(in)
			nc.CloseWrite()
		}()
		if _, err := io.Copy(io.Discard, nc); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			t.Fatalf("%q: neither answered nor closed", in)
		}
		ours := rec.take()
		br := bufio.NewReader(bytes.NewReader(in))
		for i, o := range ours {
			for { // empty lines before a request are passed over, RFC 9112 2.2
				if b, err := br.Peek(1); err != nil || b[0] != '\r' && b[0] != '\n' {
					break
				}
				br.Discard(1)
			}
			r, err := http.ReadRequest(br)
			if err != nil {
				return // net/http wants more of a target than a proxy may; FuzzHead holds the heads
			}
			body, err := io.ReadAll(r.Body)
			if !o.whole && err == nil {
				return // we are stricter, about the ends of lines for example
			}
			if o.whole != (err == nil) {
				t.Fatalf("%q: request %d is whole: %v; another parser: %v", in, i, o.whole, err)
			}
			if o.method != r.Method || o.whole && o.body != string(body) {
				t.Fatalf("%q: request %d is %s %q; another parser: %s %q", in, i, o.method, o.body, r.Method, body)
			}
		}
	})
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// A function's bytes: what the client gets of them is well-formed, and whole only if another parser takes the function's for whole, with
// the same status and body.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", "HTTP/1.1 200 OK\r\n\r\nuntil close",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-A: b\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
		"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
		"HTTP/1.0 200 OK\r\n\r\nold", "HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "HTTP/1.1 200\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nConnection: close, x\r\nX: y\r\n\r\n",
		"garbage", "", "HTTP/1.1 200 OK\r\nX-A: a\x00b\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx", "HTTP/1.1 200 OK\nContent-Length: 1\n\nx",
		"HTTP/1.1 200 O\rK\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	up, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { up.Close() })
	answers := make(chan []byte, 1)
	go func() {
		for {
			nc, err := up.Accept()
			if err != nil {
				return
			}
			br := bufio.NewReader(nc)
			for line := ""; line != "\r\n" && err == nil; {
				line, err = br.ReadString('\n')
			}
			nc.Write(<-answers)
			nc.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, nc)
			nc.Close()
		}
	}()
	fw := forward.New(forward.Config{Addr: up.Addr().String(), IdleConn: time.Nanosecond, Total: 5 * time.Second})
	f.Cleanup(fw.Close)
	dial := unixFront(f, fw)
	f.Fuzz(func(t *testing.T, in []byte) {
		nc := dial(t)
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(8 * time.Second))
		answers <- in
		io.WriteString(nc, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		out, err := io.ReadAll(nc)
		if isTimeout(err) {
			t.Fatalf("%q: the client waits", in)
		}
		code, body, header, err := finalAnswer(out)
		switch {
		case errors.Is(err, io.ErrUnexpectedEOF) || err == io.EOF:
			return // the client knows that this is not all
		case err != nil:
			t.Fatalf("%q became %q, which is no answer: %v", in, out, err)
		case header.Get("X-Thaw-Error") != "":
			return
		}
		wantCode, wantBody, _, err := finalAnswer(in)
		if errors.Is(err, io.ErrUnexpectedEOF) || err == io.EOF {
			t.Fatalf("%q breaks off and was passed on as whole: %q", in, out)
		}
		if err == nil && (code != wantCode || body != wantBody) {
			t.Fatalf("%q became %q: %d %q; another parser: %d %q", in, out, code, body, wantCode, wantBody)
		}
	})
}

// finalAnswer reads a whole answer to a GET after those before it (1xx).
func finalAnswer(b []byte) (code int, body string, h http.Header, err error) {
	br := bufio.NewReader(bytes.NewReader(b))
	for {
		resp, err := http.ReadResponse(br, &http.Request{Method: "GET"})
		if err != nil {
			return 0, "", nil, err
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode >= 200 || resp.StatusCode == 101 {
			return resp.StatusCode, string(b), resp.Header, err
		}
	}
}
