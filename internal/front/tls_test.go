package front_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
)

// identity is a certificate for 127.0.0.1 and example.com, and what a client trusts it by.
func identity(t testing.TB) (server *tls.Config, client *tls.Config) {
	s := httptest.NewUnstartedServer(nil)
	s.StartTLS()
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return &tls.Config{Certificates: s.TLS.Certificates, NextProtos: []string{"h2", "http/1.1", "acme-tls/1"}, MinVersion: tls.VersionTLS12},
		&tls.Config{RootCAs: roots, ServerName: "example.com"}
}

// tlsStand answers with what the exchange came by, or does what fn says.
func tlsStand(t *testing.T, c front.Config, fn hop.HandlerFunc) (*stand, *tls.Config) {
	t.Helper()
	server, client := identity(t)
	if c.TLS == nil {
		c.TLS = server
	}
	if fn == nil {
		fn = func(x *hop.Exchange) error {
			x.Resp.SetBodyString(fmt.Sprint("tls=", x.TLS))
			return nil
		}
	}
	st := &stand{}
	st.serve(t, c, fn)
	return st, client
}

func (st *stand) dialTLS(t *testing.T, c *tls.Config, protocols ...string) *tls.Conn {
	t.Helper()
	c = c.Clone()
	c.NextProtos = protocols
	nc := tls.Client(st.dial(t), c)
	if err := nc.Handshake(); err != nil {
		t.Fatal(err)
	}
	return nc
}

// Plain and TLS, HTTP/1.1 and HTTP/2 share a port.
func TestOnePort(t *testing.T) {
	var handshakes atomic.Int32
	st, trust := tlsStand(t, front.Config{Handshake: func(err error) {
		if err == nil {
			handshakes.Add(1)
		}
	}}, nil)
	overTLS := func(h2 bool) *http.Transport {
		var p http.Protocols
		p.SetHTTP1(!h2)
		p.SetHTTP2(h2)
		return &http.Transport{TLSClientConfig: trust.Clone(), Protocols: &p}
	}
	for _, c := range []struct {
		name, scheme string
		tr           *http.Transport
		want, proto  string
	}{
		{"plain HTTP/1.1", "http", &http.Transport{}, "tls=false", "HTTP/1.1"},
		{"h2c", "http", &http.Transport{Protocols: h2only()}, "tls=false", "HTTP/2.0"},
		{"TLS HTTP/1.1", "https", overTLS(false), "tls=true", "HTTP/1.1"},
		{"TLS h2", "https", overTLS(true), "tls=true", "HTTP/2.0"},
		{"TLS without ALPN", "https", &http.Transport{TLSClientConfig: trust.Clone()}, "tls=true", "HTTP/1.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl := &http.Client{Transport: c.tr}
			defer cl.CloseIdleConnections()
			for range 3 { // more than one on a connection
				resp, err := cl.Post(c.scheme+"://"+st.addr+"/", "text/plain", strings.NewReader(strings.Repeat("x", 20<<10)))
				if err != nil {
					t.Fatal(err)
				}
				b, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if string(b) != c.want || resp.Proto != c.proto {
					t.Errorf("%q over %s, want %q over %s", b, resp.Proto, c.want, c.proto)
				}
			}
		})
	}
	if n := handshakes.Load(); n < 3 {
		t.Errorf("%d handshakes counted, want at least 3", n)
	}
}

// What was agreed on in the handshake is what has to be spoken.
func TestALPNIsKept(t *testing.T) {
	st, trust := tlsStand(t, front.Config{}, nil)
	const get, preface = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	for _, c := range []struct {
		agreed, say string
		ok          bool
	}{{"h2", preface, true}, {"h2", get, false}, {"http/1.1", get, true}, {"http/1.1", preface, false}, {"acme-tls/1", get, false}, {"", get, true}} {
		protocols := []string{c.agreed}
		if c.agreed == "" {
			protocols = nil
		}
		nc := st.dialTLS(t, trust, protocols...)
		io.WriteString(nc, c.say)
		b := make([]byte, 4)
		n, _ := io.ReadFull(nc, b)
		if ok := n == len(b); ok != c.ok {
			t.Errorf("agreed on %q, said %.10q: answered %q", c.agreed, c.say, b[:n])
		}
		nc.Close()
	}
}

// pieces writes what a client sends in another cut.
type pieces struct {
	net.Conn
	cut func([]byte) [][]byte
}

func (p pieces) Write(b []byte) (int, error) {
	for _, piece := range p.cut(b) {
		if _, err := p.Conn.Write(piece); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

func TestClientHelloInPieces(t *testing.T) {
	st, trust := tlsStand(t, front.Config{}, nil)
	bytewise := func(b []byte) (out [][]byte) {
		for i := range b {
			out = append(out, b[i:i+1])
		}
		return out
	}
	records := func(b []byte) (out [][]byte) {
		if len(b) < 5 || b[0] != 22 || int(binary.BigEndian.Uint16(b[3:5])) != len(b)-5 {
			return [][]byte{b}
		}
		for i := 5; i < len(b); i += 7 { // each part of the message in a record of its own
			part := b[i:min(i+7, len(b))]
			out = append(out, append([]byte{b[0], b[1], b[2], 0, byte(len(part))}, part...))
		}
		return out
	}
	for name, cut := range map[string]func([]byte) [][]byte{"segments": bytewise, "records": records} {
		raw := st.dial(t)
		raw.SetNoDelay(true)
		nc := tls.Client(pieces{raw, cut}, trust)
		io.WriteString(nc, "GET / HTTP/1.0\r\n\r\n")
		if b, err := io.ReadAll(nc); err != nil || !strings.HasSuffix(string(b), "tls=true") {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

// Who does not go on with his handshake is closed in time, whatever he has sent.
func TestHandshakeDeadline(t *testing.T) {
	st, _ := tlsStand(t, front.Config{HeaderTimeout: 100 * time.Millisecond}, nil)
	for _, say := range []string{"\x16", "\x16\x03\x01\x02\x00", "\x16\x03\x01\x40\x00" + strings.Repeat("\x01", 100), "\x16\x03\x01\x00\x04\x01\xff\xff\xff"} {
		c := st.dial(t)
		io.WriteString(c, say)
		begin := time.Now()
		if _, err := io.ReadAll(c); err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%q: %v after %v", say, err, time.Since(begin))
		}
	}
}

// A crowd of slow handshakes is bounded, and does not keep others out.
func TestHandshakesBounded(t *testing.T) {
	const limit = 20
	st, trust := tlsStand(t, front.Config{MaxHandshakes: limit}, nil)
	slow := make([]*net.TCPConn, 3*limit)
	for i := range slow {
		slow[i] = st.dial(t)
		io.WriteString(slow[i], "\x16\x03\x01\x02\x00\x01")
	}
	// Which of them begins first is the scheduler's to say; how many are left is not.
	closed := make(chan error, len(slow))
	for _, c := range slow {
		go func() {
			_, err := c.Read(make([]byte, 1))
			closed <- err
		}()
	}
	push := func(n int) {
		t.Helper()
		for range n {
			select {
			case err := <-closed:
				if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("one of the oldest: %v", err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("the crowd is not bounded")
			}
		}
		select {
		case err := <-closed:
			t.Fatalf("one too many was pushed out: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	push(2 * limit)
	nc := st.dialTLS(t, trust)
	io.WriteString(nc, "GET / HTTP/1.0\r\n\r\n")
	if b, err := io.ReadAll(nc); err != nil || !strings.HasSuffix(string(b), "tls=true") {
		t.Errorf("next to a crowd: %q, %v", b, err)
	}
	push(1)
}

// An answer that is cut short must not look like a whole one: no proper end of TLS follows it.
func TestTruncatedAnswerTLS(t *testing.T) {
	for _, whole := range []bool{true, false} {
		st, trust := tlsStand(t, front.Config{}, func(x *hop.Exchange) error {
			var body io.Reader = strings.NewReader("part")
			if !whole {
				body = io.MultiReader(body, broken{})
			}
			x.Resp.SetBodyStream(body, -1) // to a client of HTTP/1.0 the end of the connection is the end of the body
			return nil
		})
		nc := st.dialTLS(t, trust)
		io.WriteString(nc, "GET / HTTP/1.0\r\n\r\n")
		if b, err := io.ReadAll(nc); (err == nil) != whole {
			t.Errorf("whole %v: %q, %v", whole, b, err)
		}
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func TestGoneTLS(t *testing.T) {
	hold, release := make(chan hop.Client), make(chan struct{})
	st, trust := tlsStand(t, front.Config{}, func(x *hop.Exchange) error {
		hold <- x.Client
		<-release
		x.Resp.SetBodyString("ok")
		return nil
	})
	gone := func(c hop.Client, within time.Duration) bool {
		for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
			if c.Gone() {
				return true
			}
		}
		return false
	}
	const get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, c := range []struct {
		name  string
		leave func(*tls.Conn)
		gone  bool
	}{
		{"stays", func(*tls.Conn) {}, false},
		{"sends more", func(c *tls.Conn) { io.WriteString(c, get[:5]) }, false},
		{"closes", func(c *tls.Conn) { c.Close() }, true}, // its alert lies unread before the end
		{"vanishes", func(c *tls.Conn) { c.NetConn().Close() }, true},
		{"resets", func(c *tls.Conn) { c.NetConn().(*net.TCPConn).SetLinger(0); c.NetConn().Close() }, true},
	} {
		nc := st.dialTLS(t, trust)
		io.WriteString(nc, get)
		client := <-hold
		c.leave(nc)
		limit := 2 * time.Second
		if !c.gone {
			limit = 50 * time.Millisecond
		}
		if got := gone(client, limit); got != c.gone && (runtime.GOOS == "linux" || c.name != "closes") {
			t.Errorf("%s: gone %v", c.name, got)
		}
		release <- struct{}{}
		nc.Close()
	}
}

func TestUpgradeTLS(t *testing.T) {
	server, trust := identity(t)
	up := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "echo")
		w.WriteHeader(101)
		nc, rw, _ := w.(http.Hijacker).Hijack()
		defer nc.Close()
		for {
			line, err := rw.ReadString('\n')
			if err != nil {
				return
			}
			io.WriteString(nc, line)
		}
	})
	st := &stand{}
	st.serve(t, front.Config{TLS: server}, up.f)
	nc := st.dialTLS(t, trust)
	io.WriteString(nc, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nat once\n")
	br := bufio.NewReader(nc)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatal(resp, err)
	}
	if line, err := br.ReadString('\n'); line != "at once\n" {
		t.Errorf("%q, %v", line, err)
	}
	big := strings.Repeat("x", 100<<10) + "\n"
	go io.WriteString(nc, big)
	if line, err := br.ReadString('\n'); line != big {
		t.Errorf("%d bytes, %v", len(line), err)
	}
	nc.CloseWrite()
	if rest, err := io.ReadAll(br); err != nil || len(rest) != 0 {
		t.Errorf("%q, %v", rest, err)
	}
}

// Where TLS is not configured its bytes are malformed HTTP.
func TestNoTLS(t *testing.T) {
	_, trust := identity(t)
	st := &stand{}
	st.serve(t, front.Config{}, hop.HandlerFunc(func(*hop.Exchange) error { return nil }))
	if err := tls.Client(st.dial(t), trust).Handshake(); err == nil {
		t.Error("shook hands without a certificate")
	}
}

// A server whose sockets live on elsewhere lets every connection end with an answer: who sends one more request within the grace gets it
// answered, with the word that it is the last. Shutdown, which cannot wait for that, is the control.
func TestRetire(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, retire := range []bool{true, false} {
		st, trust := tlsStand(t, front.Config{}, nil)
		conns := map[string]net.Conn{"used": st.dial(t), "fresh": st.dial(t), "used TLS": st.dialTLS(t, trust), "fresh TLS": st.dialTLS(t, trust), "before TLS": st.dial(t)}
		for _, name := range []string{"used", "used TLS"} {
			io.WriteString(conns[name], get)
			if _, err := conns[name].Read(make([]byte, 1000)); err != nil {
				t.Fatal(err)
			}
		}
		h2 := tls.Client(st.dial(t), func() *tls.Config { c := trust.Clone(); c.NextProtos = []string{"h2"}; return c }())
		// Connections are accepted in order: once the last one is answered, all others have been.
		last := st.dial(t)
		io.WriteString(last, get)
		if _, err := last.Read(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		last.Close()
		ended := make(chan error, 1)
		go func() {
			if retire {
				ended <- st.s.Retire(context.Background(), time.Minute)
			} else {
				ended <- st.s.Shutdown(context.Background())
			}
		}()
		for { // until it has begun
			c, err := net.Dial("tcp", st.addr)
			if err != nil {
				break
			}
			c.Close()
		}
		conns["before TLS"] = tls.Client(conns["before TLS"], trust)
		if !retire {
			if err := <-ended; err != nil {
				t.Error(err)
			}
			ended <- nil
		}
		for name, c := range conns {
			io.WriteString(c, get)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if !retire {
				if err == nil {
					t.Errorf("%s: answered after a shutdown", name)
				}
				continue
			}
			if err != nil || !resp.Close {
				t.Errorf("%s: %v, %v", name, resp, err)
			} else if _, err := io.ReadAll(resp.Body); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if retire { // a connection that turns out to be HTTP/2 after the word to retire
			io.WriteString(h2, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
			if all, _ := io.ReadAll(h2); !bytes.Contains(all, []byte{7, 0, 0, 0, 0, 0}) { // a frame of type GOAWAY
				t.Errorf("HTTP/2: %q", all)
			}
		}
		if err := <-ended; err != nil {
			t.Errorf("retire %v: %v", retire, err)
		}
	}
}

// After the grace what is idle is closed.
func TestRetireEnds(t *testing.T) {
	st, trust := tlsStand(t, front.Config{}, nil)
	fresh, over := st.dial(t), st.dialTLS(t, trust)
	if err := st.s.Retire(context.Background(), 30*time.Millisecond); err != nil {
		t.Error(err)
	}
	for _, c := range []net.Conn{fresh, over} {
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%d, %v", n, err)
		}
	}
}

// A server may give up on a connection at the very end of its handshake, and be told to stop once more while that goes on. The race detector is
// what looks.
func TestKilledAfterHandshake(t *testing.T) {
	for range 10 {
		ctx, cancel := context.WithCancel(context.Background())
		shaken, addr := make(chan struct{}), make(chan string, 1)
		st, trust := tlsStand(t, front.Config{Handshake: func(error) {
			close(shaken)
			for a := <-addr; ; { // until it has begun to stop
				c, err := net.Dial("tcp", a)
				if err != nil {
					break
				}
				c.Close()
			}
			cancel()
		}}, nil)
		addr <- st.addr
		c := tls.Client(st.dial(t), trust)
		go c.Handshake()
		<-shaken
		if err := st.s.Retire(ctx, time.Minute); err != context.Canceled {
			t.Error(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("the connection goes on")
		}
	}
}
