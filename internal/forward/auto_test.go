package forward_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/forward"
)

// replaceable is a function at one address that can be replaced by another one there.
type replaceable struct {
	t    *testing.T
	addr string
	s    *httptest.Server

	conns atomic.Int32 // opened to the function of now
}

// become ends the function and starts another one at the same address.
func (r *replaceable) become(h1, h2 bool) {
	r.t.Helper()
	addr := "127.0.0.1:0"
	if r.s != nil {
		r.s.CloseClientConnections()
		r.s.Close()
		addr = r.addr
	}
	var ln net.Listener
	var err error
	for range 100 {
		if ln, err = net.Listen("tcp", addr); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.s = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { io.WriteString(w, q.Proto) }))
	r.s.Listener.Close()
	r.s.Listener = ln
	r.s.Config.Protocols = new(http.Protocols)
	r.s.Config.Protocols.SetHTTP1(h1)
	r.s.Config.Protocols.SetUnencryptedHTTP2(h2)
	r.s.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			r.conns.Add(1)
		}
	}
	r.s.Start()
	r.addr = ln.Addr().String()
}

// h2Client speaks HTTP/2 with prior knowledge.
func h2Client(t *testing.T) *http.Client {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &p}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

func ask(t *testing.T, c *http.Client, addr string) string {
	t.Helper()
	resp, err := c.Get("http://" + addr)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, b)
	}
	return string(b)
}

// settle sends one request: the first one to a new function may be lost, on a connection to the old one whose end had not been seen.
func settle(t *testing.T, c *http.Client, addr string) {
	t.Helper()
	resp, err := c.Get("http://" + addr)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 200 && resp.Header.Get("X-Thaw-Error") != "instance_broke" {
		t.Errorf("%d %q", resp.StatusCode, resp.Header.Get("X-Thaw-Error"))
	}
}

// Each request goes on as it came, as far as the function takes it; what that is is asked once, and again after the function was replaced.
func TestAuto(t *testing.T) {
	r := &replaceable{t: t}
	r.become(true, true)
	defer func() { r.s.CloseClientConnections(); r.s.Close() }()
	addr := serve(t, newForward(t, forward.Config{Addr: r.addr, Protocol: "auto"}))
	two := h2Client(t)
	for _, c := range []struct {
		name   string
		h1, h2 bool
		want   string // what a request over HTTP/2 arrives as
	}{
		{"both", true, true, "HTTP/2.0"},
		{"replaced by one of HTTP/1.1", true, false, "HTTP/1.1"},
		{"by one of both", true, true, "HTTP/2.0"},
		{"by one of h2c only", false, true, "HTTP/2.0"},
		{"and back", true, false, "HTTP/1.1"},
		{"by one of h2c only again", false, true, "HTTP/2.0"},
	} {
		r.conns.Store(0)
		r.become(c.h1, c.h2)
		settle(t, two, addr)
		for range 20 {
			if got := ask(t, two, addr); got != c.want {
				t.Errorf("%s: over HTTP/2, arrived as %s", c.name, got)
			}
			if c.h1 {
				if got := ask(t, http.DefaultClient, addr); got != "HTTP/1.1" {
					t.Errorf("%s: over HTTP/1.1, arrived as %s", c.name, got)
				}
			}
		}
		// One question, and a connection for each protocol.
		if n := r.conns.Load(); n > 4 {
			t.Errorf("%s: %d connections for 40 requests, one after the other", c.name, n)
		}
	}
}

// Many at once share the question, and a function that cannot be reached is told apart from one that does not speak HTTP/2.
func TestAutoAtOnce(t *testing.T) {
	r := &replaceable{t: t}
	r.become(true, true)
	addr := serve(t, newForward(t, forward.Config{Addr: r.addr, Protocol: "auto"}))
	two := h2Client(t)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if got := ask(t, two, addr); got != "HTTP/2.0" {
				t.Errorf("arrived as %s", got)
			}
		})
	}
	wg.Wait()
	if n := r.conns.Load(); n > 3 {
		t.Errorf("%d connections", n)
	}
	r.s.CloseClientConnections()
	r.s.Close()
	reason := ""
	for range 3 { // the first may have been sent on a connection whose end had not been seen
		resp, err := two.Get("http://" + addr)
		if err != nil || resp.StatusCode != 502 {
			t.Fatalf("%v %v", resp, err)
		}
		resp.Body.Close()
		reason = resp.Header.Get("X-Thaw-Error")
	}
	if reason != "unreachable" {
		t.Errorf("X-Thaw-Error %q", reason)
	}
}

// A server that answers a preface with silence, rubbish or its end is one of HTTP/1.1.
func TestAutoStrangers(t *testing.T) {
	for name, reply := range map[string]string{"silence": "-", "end": "", "rubbish": "\x00\x00\x00\x07\x00\x00\x00\x00\x00", "refusal": "HTTP/1.1 400 Bad Request\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					go func() {
						defer c.Close()
						line, _ := bufio.NewReader(c).ReadString('\n')
						switch {
						case line != "PRI * HTTP/2.0\r\n":
							io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
						case reply == "-":
							time.Sleep(2 * time.Second) // longer than the question waits
						default:
							io.WriteString(c, reply)
						}
					}()
				}
			}()
			addr := serve(t, newForward(t, forward.Config{Addr: ln.Addr().String(), Protocol: "auto", DialTimeout: 200 * time.Millisecond}))
			if got := ask(t, h2Client(t), addr); got != "ok" {
				t.Errorf("%q", got)
			}
		})
	}
}
