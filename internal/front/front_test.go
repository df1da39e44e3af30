package front_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
)

// stand is a front before a forward before a net/http server: one whole hop over real sockets.
type stand struct {
	addr string
	up   *httptest.Server
	hits atomic.Int32
	f    *forward.Forward
	s    *front.Server
}

func newStand(t *testing.T, fc forward.Config, h http.HandlerFunc) *stand {
	t.Helper()
	st := &stand{}
	st.up = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		st.hits.Add(1)
		h(w, r)
	}))
	if fc.Addr == "" {
		fc.Addr = st.up.Listener.Addr().String()
	}
	st.f = forward.New(fc)
	st.serve(t, front.Config{HeaderTimeout: 2 * time.Second}, st.f)
	t.Cleanup(func() {
		st.f.Close()
		st.up.CloseClientConnections()
		st.up.Close()
	})
	return st
}

func (st *stand) serve(t *testing.T, c front.Config, h hop.Handler) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	st.addr = ln.Addr().String()
	st.s = front.New(c, h)
	done := make(chan error, 1)
	go func() { done <- st.s.Serve(ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		st.s.Shutdown(ctx)
		<-done
	})
}

func (st *stand) dial(t *testing.T) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", st.addr)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// raw sends bytes and returns everything that comes back until the end; half closes our direction first if asked. A client that has closed its
// direction may be asked whether it is still there, if its answer takes long (see Gone): that is left out.
func (st *stand) raw(t *testing.T, send string, half bool) (string, error) {
	t.Helper()
	c := st.dial(t)
	io.WriteString(c, send)
	if half {
		c.CloseWrite()
	}
	b, err := io.ReadAll(c)
	return strings.ReplaceAll(string(b), "HTTP/1.1 102 Processing\r\n\r\n", ""), err
}

func echo(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Write(b)
}

func TestPlain(t *testing.T) {
	st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Seen", r.Method+" "+r.URL.RequestURI()+" "+r.Host+" "+r.Header.Get("X-Foo")+" "+r.Header.Get("Connection")+r.Header.Get("X-Hop"))
		w.Header().Set("Connection", "X-Secret")
		w.Header().Set("X-Secret", "1")
		echo(w, r)
	})
	for _, c := range []struct{ method, path, body string }{
		{"GET", "/a?b=c%20d&e", ""}, {"POST", "/", "hello"}, {"PUT", "/x", strings.Repeat("y", 7000)}, {"POST", "/big", strings.Repeat("z", 300_000)}, {"DELETE", "/d", ""},
	} {
		req, _ := http.NewRequest(c.method, "http://"+st.addr+c.path, strings.NewReader(c.body))
		req.Host = "fn.example"
		req.Header.Set("x-foo", "bar")
		req.Header.Set("Connection", "X-Hop")
		req.Header.Set("X-Hop", "secret")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", c.method, c.path, err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != c.body || resp.StatusCode != 200 {
			t.Errorf("%s %s: %d, %d bytes of %d, %v", c.method, c.path, resp.StatusCode, len(b), len(c.body), err)
		}
		if got, want := resp.Header.Get("X-Seen"), c.method+" "+c.path+" fn.example bar"; got != want {
			t.Errorf("function saw %q, want %q", got, want)
		}
		if resp.Header.Get("X-Secret") != "" || resp.Header.Get("X-Request-Id") == "" {
			t.Errorf("headers of the answer: %v", resp.Header)
		}
	}
}

// Cases over a raw socket: what is sent, what must begin the answer, whether the function may get the whole of it.
func TestStrictness(t *testing.T) {
	const h = "Host: a\r\n"
	long := strings.Repeat("x", 20_000)
	for _, c := range []struct {
		name, send, want string
		reaches          bool
	}{
		{"plain", "GET / HTTP/1.1\r\n" + h + "Connection: close\r\n\r\n", "HTTP/1.1 200", true},
		{"lower-case field names", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi", "HTTP/1.1 200", true},
		{"absolute form", "GET http://b.example/p?q HTTP/1.1\r\n" + h + "Connection: close\r\n\r\n", "HTTP/1.1 200", true},
		{"HTTP/1.0", "GET / HTTP/1.0\r\n" + h + "\r\n", "HTTP/1.1 200", true},
		{"no Host", "GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 400", false},
		{"two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "HTTP/1.1 400", false},
		{"Host with a space", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "HTTP/1.1 400", false},
		{"length and chunked", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"chunked and length", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"two lengths", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", "HTTP/1.1 400", false},
		{"same length twice", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "HTTP/1.1 400", false},
		{"length list", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5, 5\r\n\r\nhello", "HTTP/1.1 400", false},
		{"length with sign", "POST / HTTP/1.1\r\n" + h + "Content-Length: +5\r\n\r\nhello", "HTTP/1.1 400", false},
		{"length negative", "POST / HTTP/1.1\r\n" + h + "Content-Length: -1\r\n\r\nhello", "HTTP/1.1 400", false},
		{"length hex", "POST / HTTP/1.1\r\n" + h + "Content-Length: 0x5\r\n\r\nhello", "HTTP/1.1 400", false},
		{"length 2^64+5", "POST / HTTP/1.1\r\n" + h + "Content-Length: 18446744073709551621\r\n\r\nhello", "HTTP/1.1 400", false},
		{"identity", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello", "HTTP/1.1 ", false},
		{"gzip, chunked", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "HTTP/1.1 ", false},
		{"chunked twice", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"xchunked", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "HTTP/1.1 ", false},
		{"chunked in HTTP/1.0", "POST / HTTP/1.0\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"space in a field name", "GET / HTTP/1.1\r\n" + h + "X A: b\r\n\r\n", "HTTP/1.1 400", false},
		{"space before the colon", "GET / HTTP/1.1\r\n" + h + "X : b\r\n\r\n", "HTTP/1.1 400", false},
		{"no colon", "GET / HTTP/1.1\r\n" + h + "X\r\n\r\n", "HTTP/1.1 400", false},
		{"empty name", "GET / HTTP/1.1\r\n" + h + ": b\r\n\r\n", "HTTP/1.1 400", false},
		{"NUL in a value", "GET / HTTP/1.1\r\n" + h + "X: a\x00b\r\n\r\n", "HTTP/1.1 400", false},
		{"bare CR in a value", "GET / HTTP/1.1\r\n" + h + "X: a\rb\r\n\r\n", "HTTP/1.1 400", false},
		{"folded line", "GET / HTTP/1.1\r\n" + h + "X: a\r\n b\r\n\r\n", "HTTP/1.1 400", false},
		{"HTTP/2.0 in words", "GET / HTTP/2.0\r\n" + h + "\r\n", "HTTP/1.1 505", false},
		{"HTTP/1.2", "GET / HTTP/1.2\r\n" + h + "\r\n", "HTTP/1.1 505", false},
		{"CONNECT", "CONNECT a:443 HTTP/1.1\r\n" + h + "\r\n", "HTTP/1.1 405", false},
		{"garbage", "\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", "HTTP/1.1 400", false},
		{"target without slash", "GET foo HTTP/1.1\r\n" + h + "\r\n", "HTTP/1.1 400", false},
		{"Host with a slash", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "HTTP/1.1 400", false},
		{"absolute form with a bad host", "GET http://a b/ HTTP/1.1\r\n" + h + "\r\n", "HTTP/1.1 400", false},
		{"absolute form with user", "GET http://u@b/ HTTP/1.1\r\n" + h + "\r\n", "HTTP/1.1 400", false},
		{"chunk extension", "POST / HTTP/1.1\r\n" + h + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nhi\r\n0;c\r\n\r\n", "HTTP/1.1 200", true},
		{"LF in a chunk extension", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n2;a\nb\r\nhi\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"256 KiB chunk extension", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n2;a=" + strings.Repeat("x", 256<<10) + "\r\nhi\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"256 KiB of chunk extensions", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1;a="+strings.Repeat("x", 100)+"\r\nh\r\n", 2600) + "0\r\n\r\n", "HTTP/1.1 400", false},
		{"chunk size with sign", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n+2\r\nhi\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"chunk size 0x2", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n0x2\r\nhi\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"chunk size 2^64+2", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\nhi\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"chunk longer than its size", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n2\r\nhiX\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"chunk line ends in LF", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n2\nhi\r\n0\r\n\r\n", "HTTP/1.1 400", false},
		{"trailer", "POST / HTTP/1.1\r\n" + h + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n", "HTTP/1.1 200", true},
		{"trailer with a bad name", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX Sum: 1\r\n\r\n", "HTTP/1.1 400", false},
		{"trailer of 64 KiB", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n" + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\r\n", 64) + "\r\n", "HTTP/1.1 400", false},
		{"200 header lines", "GET / HTTP/1.1\r\n" + h + "Connection: close\r\n" + strings.Repeat("X: y\r\n", 200) + "\r\n", "HTTP/1.1 200", true},
		{"10,000 header lines", "GET / HTTP/1.1\r\n" + h + strings.Repeat("X:\r\n", 10_000) + "\r\n", "HTTP/1.1 431", false},
		{"1,000 header lines", "GET / HTTP/1.1\r\n" + h + strings.Repeat("X: y\r\n", 1000) + "\r\n", "HTTP/1.1 431", false},
		{"header of 20 KB", "GET / HTTP/1.1\r\n" + h + "X: " + long + "\r\n\r\n", "HTTP/1.1 431", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var whole atomic.Int32
			st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
				b, err := io.ReadAll(r.Body)
				if err != nil {
					panic(http.ErrAbortHandler)
				}
				whole.Add(1)
				w.Write(b)
			})
			got, _ := st.raw(t, c.send, false)
			if !strings.HasPrefix(got, c.want) {
				t.Errorf("answer %.80q, want %q", got, c.want)
			}
			if strings.Count(got, "HTTP/1.1 ") != 1 {
				t.Errorf("%d answers: %.200q", strings.Count(got, "HTTP/1.1 "), got)
			}
			if reached := whole.Load() > 0; reached != c.reaches {
				t.Errorf("reached the function whole: %v", reached)
			}
		})
	}
}

// A body that breaks off is never passed on as complete.
func TestTruncatedUpload(t *testing.T) {
	for _, c := range []struct{ name, send string }{
		{"chunk boundary", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"},
		{"inside a chunk", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel"},
		{"inside the last chunk's line", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0"},
		{"known length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20000\r\n\r\n" + strings.Repeat("x", 12000)},
		{"known short length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\nhello"},
	} {
		t.Run(c.name, func(t *testing.T) {
			complete := make(chan bool, 1)
			st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
				_, err := io.ReadAll(r.Body)
				complete <- err == nil
			})
			st.raw(t, c.send, true)
			if st.hits.Load() == 0 {
				return // it never began: fine too
			}
			if <-complete {
				t.Error("the function took a part for the whole")
			}
		})
	}
}

// An answer that breaks off is never passed on as complete, whatever the client speaks.
func TestTruncatedAnswer(t *testing.T) {
	for _, c := range []struct{ name, answer, version string }{
		{"chunk boundary", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "1.1"},
		{"inside a chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", "1.1"},
		{"known length", "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello", "1.1"},
		{"chunks to HTTP/1.0", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "1.0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			up, _ := net.Listen("tcp", "127.0.0.1:0")
			defer up.Close()
			go func() {
				for {
					conn, err := up.Accept()
					if err != nil {
						return
					}
					http.ReadRequest(bufio.NewReader(conn))
					io.WriteString(conn, c.answer)
					conn.Close()
				}
			}()
			st := newStand(t, forward.Config{Addr: up.Addr().String()}, nil)
			conn := st.dial(t)
			fmt.Fprintf(conn, "GET / HTTP/%s\r\nHost: a\r\n\r\n", c.version)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				if c.version == "1.0" && errors.Is(err, io.ErrUnexpectedEOF) || strings.Contains(err.Error(), "reset") {
					return
				}
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			if err == nil {
				t.Errorf("client took %q for the whole answer", b)
			}
		})
	}
}

// Whether a body is wanted is the function's to say: it is not asked for before, and a refusal is what the client reads first.
func TestExpect(t *testing.T) {
	for _, c := range []struct {
		name, framing, body string
		accept              bool
	}{
		{"small, wanted", "Content-Length: 5", "hello", true},
		{"small, refused", "Content-Length: 5", "", false},
		{"chunked, wanted", "Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n", true},
		{"large, refused", "Content-Length: 1000000", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
				if !c.accept {
					w.Header().Set("Connection", "close")
					w.WriteHeader(401)
					return
				}
				echo(w, r) // net/http sends the 100 when the body is first read
			})
			conn := st.dial(t)
			fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n%s\r\n\r\n", c.framing)
			br := bufio.NewReader(conn)
			line, err := br.ReadString('\n')
			if !c.accept {
				if err != nil || !strings.HasPrefix(line, "HTTP/1.1 401") {
					t.Errorf("first line %q, %v", line, err)
				}
				rest, err := io.ReadAll(br)
				if err != nil || !strings.Contains(string(rest), "Connection: close\r\n") {
					t.Errorf("rest %q, %v", rest, err)
				}
				return
			}
			if err != nil || !strings.HasPrefix(line, "HTTP/1.1 100") {
				t.Fatalf("first line %q, %v", line, err)
			}
			if line, _ = br.ReadString('\n'); line != "\r\n" {
				t.Errorf("after the 100: %q", line)
			}
			for range 2 { // the connection goes on
				io.WriteString(conn, c.body)
				resp, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Fatal(err)
				}
				if b, err := io.ReadAll(resp.Body); resp.StatusCode != 200 || string(b) != "hello" || err != nil {
					t.Errorf("%d %q, %v", resp.StatusCode, b, err)
				}
				fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: a\r\n%s\r\n\r\n", c.framing)
				if resp.Close {
					// The answer came while the body's end was still on its way.
					return
				}
			}
		})
	}
}

// The order of lines of the same name has a meaning, and what stands between them may have to go.
func TestHeaderOrder(t *testing.T) {
	up, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	heads := make(chan string, 1)
	go func() {
		for {
			c, err := up.Accept()
			if err != nil {
				return
			}
			br := bufio.NewReader(c)
			var head strings.Builder
			for {
				line, err := br.ReadString('\n')
				if err != nil || line == "\r\n" {
					break
				}
				head.WriteString(line)
			}
			heads <- head.String()
			io.WriteString(c, "HTTP/1.1 200 OK\r\nV: 1\r\nKeep-Alive: 5\r\nV: 2\r\nX-Hop: y\r\nV: 3\r\nConnection: x-hop\r\nConnection: close\r\nV: 4\r\nContent-Length: 0\r\n\r\n")
			c.Close()
		}
	}()
	st := newStand(t, forward.Config{Addr: up.Addr().String()}, nil)
	got, err := st.raw(t, "GET / HTTP/1.1\r\nHost: a\r\nV: 1\r\nte: gzip\r\nV: 2\r\nproxy-connection: x\r\nX-Hop: 1\r\nV: 3\r\nConnection: x-hop, x-forwarded-for\r\nX-Forwarded-For: 1\r\nConnection: close\r\nV: 4\r\n\r\n", false)
	if err != nil {
		t.Fatal(err)
	}
	lines := func(head string) (out []string) {
		for _, l := range strings.Split(head, "\r\n")[1:] {
			if l != "" && !strings.HasPrefix(l, "X-Request-Id: ") {
				out = append(out, l)
			}
		}
		return out
	}
	if seen := fmt.Sprint(lines(<-heads)); seen != "[Host: a V: 1 V: 2 V: 3 X-Forwarded-For: 1 V: 4]" {
		t.Errorf("the function saw %s", seen)
	}
	if seen := fmt.Sprint(lines(got)); seen != "[V: 1 V: 2 V: 3 V: 4 Connection: close Content-Length: 0]" {
		t.Errorf("the client saw %s", seen)
	}
}

func TestHTTP10(t *testing.T) {
	st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hint" {
			w.WriteHeader(103)
		}
		if r.URL.Path == "/stream" {
			w.(http.Flusher).Flush()
		}
		io.WriteString(w, "hello")
	})
	// Without being asked the connection ends; a body of unknown length ends with it, in no chunks; and there are no interim answers.
	for _, path := range []string{"/", "/stream", "/hint"} {
		got, err := st.raw(t, "GET "+path+" HTTP/1.0\r\n\r\n", false)
		if err != nil || !strings.HasPrefix(got, "HTTP/1.1 200") || !strings.HasSuffix(got, "\r\n\r\nhello") || strings.Contains(got, "chunked") || !strings.Contains(got, "Connection: close") {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	got, err := st.raw(t, strings.Repeat("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", 2)+"GET / HTTP/1.0\r\n\r\n", false)
	if err != nil || strings.Count(got, "Connection: keep-alive") != 2 || strings.Count(got, "hello") != 3 {
		t.Errorf("%q, %v", got, err)
	}
}

// A chunked upload that is small, and whose end follows the answer, is full duplex too; then the connection cannot go on.
func TestSmallDuplex(t *testing.T) {
	st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.(http.Flusher).Flush()
		io.Copy(flushing{w}, r.Body)
	})
	c := st.dial(t)
	io.WriteString(c, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	for _, want := range "abc" {
		if _, err := io.ReadFull(resp.Body, b); err != nil || rune(b[0]) != want {
			t.Fatalf("%q, %v, want %q", b, err, want)
		}
		fmt.Fprintf(c, "1\r\n%c\r\n", want+1)
	}
	io.WriteString(c, "0\r\n\r\n")
	rest, err := io.ReadAll(resp.Body)
	if string(rest) != "d" || err != nil || !resp.Close {
		t.Errorf("rest %q, %v, close %v", rest, err, resp.Close)
	}
}

type flushing struct{ http.ResponseWriter }

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.ResponseWriter.Write(p)
	f.ResponseWriter.(http.Flusher).Flush()
	return n, err
}

// What a slow client may take is bounded: a head in total, the silence in a body, the silence between requests.
func TestSlowClients(t *testing.T) {
	const limit = time.Second // what is sent at once has to come before it, also on a busy machine
	f := newStand(t, forward.Config{}, echo).f
	st := &stand{}
	st.serve(t, front.Config{HeaderTimeout: limit, IdleTimeout: limit, BodyIdle: limit}, f)
	drip := func(c net.Conn, every time.Duration) {
		for {
			if _, err := c.Write([]byte("x")); err != nil {
				return
			}
			time.Sleep(every)
		}
	}
	for _, c := range []struct {
		name, send string
		drip       bool
		want       string
	}{
		{"nothing", "", false, ""},
		{"half a head", "GET / HTTP/1.1\r\nHost: a\r\nX: ", false, "HTTP/1.1 408"},
		{"dripping head", "GET / HTTP/1.1\r\nHost: a\r\nX: ", true, "HTTP/1.1 408"},
		{"half the preface", "PRI * HT", false, "HTTP/1.1 408"},
		{"half a small body", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe", false, "HTTP/1.1 408"},
		{"half a chunk", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe", false, "HTTP/1.1 4"},
		{"idle after an answer", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", false, "HTTP/1.1 200"},
		{"second head", "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT", true, "HTTP/1.1 200"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			begin := time.Now() // before the server's clock
			conn := st.dial(t)
			io.WriteString(conn, c.send)
			if c.drip {
				go drip(conn, limit/20)
			}
			got, _ := io.ReadAll(conn) // a reset at the end is fine for one that goes on sending
			d := time.Since(begin)
			if !strings.HasPrefix(string(got), c.want) || c.want == "" && len(got) > 0 {
				t.Errorf("%.80q, want %q", got, c.want)
			}
			if d < limit/2 || d > 8*limit {
				t.Errorf("took %v", d)
			}
		})
	}
}

// A shutdown answers what has arrived and closes what is idle, at once.
func TestShutdownIdle(t *testing.T) {
	for range 20 {
		ln, _ := net.Listen("tcp", "127.0.0.1:0")
		s := front.New(front.Config{}, hop.HandlerFunc(func(x *hop.Exchange) error {
			x.Resp.SetBodyString("ok")
			return nil
		}))
		go s.Serve(ln)
		fresh, _ := net.Dial("tcp", ln.Addr().String())
		used, _ := net.Dial("tcp", ln.Addr().String())
		io.WriteString(used, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		br := bufio.NewReader(used)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.ReadAll(resp.Body)
		io.WriteString(used, "GET / HTTP/1.1\r\nHost: a\r\n\r\n") // in the socket, read or not
		begin := time.Now()
		if err := s.Shutdown(context.Background()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d > time.Second {
			t.Errorf("took %v", d)
		}
		if resp, err = http.ReadResponse(br, nil); err != nil || !resp.Close {
			// It may have been answered before the shutdown began; then it did not say so.
			if err != nil {
				t.Errorf("a request that had arrived was not answered: %v", err)
			}
		}
		if n, err := fresh.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("unused connection: %d, %v", n, err)
		}
		fresh.Close()
		used.Close()
	}
}

func TestAnswersWithoutBody(t *testing.T) {
	st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/204":
			w.WriteHeader(204)
		case "/304":
			w.WriteHeader(304)
		default:
			w.Header().Set("Content-Length", "5")
			io.WriteString(w, "hello")
		}
	})
	got, err := st.raw(t, "HEAD / HTTP/1.1\r\nHost: a\r\n\r\nGET /204 HTTP/1.1\r\nHost: a\r\n\r\nGET /304 HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", false)
	if err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(strings.NewReader(got))
	for i, want := range []struct {
		method string
		code   int
		length int64
		body   string
	}{{"HEAD", 200, 5, ""}, {"GET", 204, 0, ""}, {"GET", 304, -2, ""}, {"GET", 200, 5, "hello"}} {
		resp, err := http.ReadResponse(br, &http.Request{Method: want.method})
		if err != nil {
			t.Fatalf("answer %d: %v in %q", i, err, got)
		}
		b, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != want.code || string(b) != want.body || want.length >= 0 && resp.ContentLength != want.length {
			t.Errorf("answer %d: %d, length %d, %q", i, resp.StatusCode, resp.ContentLength, b)
		}
	}
}

func TestPipelinedAndHalfClosed(t *testing.T) {
	st := newStand(t, forward.Config{}, echo)
	got, err := st.raw(t, strings.Repeat("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", 100), true)
	if n := strings.Count(got, "HTTP/1.1 200"); n != 100 || err != nil {
		t.Errorf("%d of 100 answered, %v", n, err)
	}
}

// Every byte is passed on when it comes, also when the length is known.
func TestStreamsAtOnce(t *testing.T) {
	for _, known := range []bool{true, false} {
		next := make(chan struct{})
		st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
			if known {
				w.Header().Set("Content-Length", "4")
			}
			for _, s := range []string{"a", "b", "c", "d"} {
				io.WriteString(w, s)
				w.(http.Flusher).Flush()
				<-next
			}
		})
		resp, err := http.Get("http://" + st.addr)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		for _, want := range "abcd" {
			// The function waits for us: a byte that is held back anywhere would stop the test.
			if _, err := io.ReadFull(resp.Body, b); err != nil || rune(b[0]) != want {
				t.Fatalf("got %q, %v, want %q", b, err, want)
			}
			next <- struct{}{}
		}
		if n, err := resp.Body.Read(b); n != 0 || err != io.EOF {
			t.Errorf("end: %d, %v", n, err)
		}
		resp.Body.Close()
	}
}

// An answer may begin, and go on, while the request's body still comes: 32 MiB through buffers of a few KiB.
func TestFullDuplex(t *testing.T) {
	st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		io.Copy(w, r.Body)
	})
	const size = 32 << 20
	sum, block := sha256.New(), bytes.Repeat([]byte("0123456789abcdef"), 4096)
	pr, pw := io.Pipe()
	go func() {
		for n := 0; n < size; n += len(block) {
			pw.Write(block)
		}
		pw.Close()
	}()
	want := sha256.New()
	for n := 0; n < size; n += len(block) {
		want.Write(block)
	}
	req, _ := http.NewRequest("POST", "http://"+st.addr, pr)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	n, err := io.Copy(sum, resp.Body)
	if err != nil || n != size || !bytes.Equal(sum.Sum(nil), want.Sum(nil)) {
		t.Errorf("%d bytes of %d came back, %v", n, size, err)
	}
}

// The function refuses a large upload: the client reads why, and the connection is not used for the rest of the body.
func TestEarlyRefusal(t *testing.T) {
	st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		http.Error(w, "too much", 413)
	})
	c := st.dial(t)
	fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", 100<<20)
	go func() { // as much as the other side takes
		block := make([]byte, 64<<10)
		for range 100 << 20 / len(block) {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	}()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 413 || !resp.Close {
		t.Errorf("%d, close %v", resp.StatusCode, resp.Close)
	}
}

// A limit that is to pass is short; one that is to be kept first is fair, on a busy machine too; long is later than all of them.
const short, fair, long = 100 * time.Millisecond, 2 * time.Second, 20 * time.Second

// timeLimits are limits and when a function begins its answer, and ends it.
var timeLimits = []struct {
	name        string
	cfg         forward.Config
	first, rest time.Duration
	code        int
	whole       bool
}{
	{"in time", forward.Config{Total: long, ResponseStart: long, Idle: long}, 0, short, 200, true},
	{"silent beyond the total", forward.Config{Total: short}, long, 0, 504, false},
	{"silent beyond the start", forward.Config{Total: long, ResponseStart: short}, long, 0, 504, false},
	{"late after the start is fine", forward.Config{Total: long, ResponseStart: fair}, 0, fair + short, 200, true},
	{"begun, then beyond the total", forward.Config{Total: fair}, 0, long, 200, false},
	{"begun, then idle", forward.Config{Total: long, Idle: fair}, 0, long, 200, false},
}

func TestTimeouts(t *testing.T) {
	slow := func(first, rest time.Duration) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(first):
			case <-r.Context().Done():
				return
			}
			io.WriteString(w, "begin")
			w.(http.Flusher).Flush()
			select {
			case <-time.After(rest):
			case <-r.Context().Done():
				return
			}
			io.WriteString(w, "end")
		}
	}
	for _, c := range timeLimits {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			st := newStand(t, c.cfg, slow(c.first, c.rest))
			begin := time.Now()
			resp, err := http.Get("http://" + st.addr)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != c.code {
				t.Errorf("%d %q, want %d", resp.StatusCode, b, c.code)
			}
			if c.code == 504 && resp.Header.Get("X-Thaw-Error") != "timeout" {
				t.Errorf("X-Thaw-Error %q", resp.Header.Get("X-Thaw-Error"))
			}
			if c.code == 200 && (err == nil) != c.whole {
				t.Errorf("body %q, %v; whole must be %v", b, err, c.whole)
			}
			if d := time.Since(begin); d > long/2 {
				t.Errorf("took %v", d)
			}
		})
	}
}

func TestUpgrade(t *testing.T) {
	st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "echo" || !strings.EqualFold(r.Header.Get("Connection"), "upgrade") {
			http.Error(w, "no upgrade: "+fmt.Sprint(r.Header), 400)
			return
		}
		c, rw, _ := w.(http.Hijacker).Hijack()
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		io.Copy(c, rw)
		io.WriteString(c, " bye")
	})
	// Early bytes after the head, and a half-close at the end: both must arrive.
	got, err := st.raw(t, "GET / HTTP/1.1\r\nHost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nearly bytes", true)
	if err != nil || !strings.HasPrefix(got, "HTTP/1.1 101 ") || !strings.HasSuffix(got, "\r\n\r\nearly bytes bye") {
		t.Errorf("%q, %v", got, err)
	}
	got, _ = st.raw(t, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n", true)
	if !strings.HasPrefix(got, "HTTP/1.1 400 ") || strings.Contains(got, "Http2-Settings") {
		t.Errorf("h2c upgrade was passed on: %q", got)
	}
}

func TestUnaskedUpgrade(t *testing.T) {
	st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		c, _, _ := w.(http.Hijacker).Hijack()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		c.Close()
	})
	if got, _ := st.raw(t, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", false); !strings.HasPrefix(got, "HTTP/1.1 502") {
		t.Errorf("%q", got)
	}
}

func TestNotSent(t *testing.T) {
	ln, _ := net.Listen("tcp", "127.0.0.1:0")
	addr := ln.Addr().String()
	ln.Close()
	f := forward.New(forward.Config{Addr: addr})
	var seen error
	st := &stand{}
	st.serve(t, front.Config{}, hop.HandlerFunc(func(x *hop.Exchange) error {
		seen = f.Serve(x)
		return seen
	}))
	resp, err := http.Post("http://"+st.addr, "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if !errors.Is(seen, hop.ErrNotSent) || resp.StatusCode != 502 {
		t.Errorf("%v, %d", seen, resp.StatusCode)
	}
}

// A client that leaves is noticed while its request waits; one that only closed its direction is not taken for it.
func TestGone(t *testing.T) {
	hold := make(chan hop.Client)
	release := make(chan struct{})
	st := &stand{}
	st.serve(t, front.Config{}, hop.HandlerFunc(func(x *hop.Exchange) error {
		hold <- x.Client
		<-release
		x.Resp.SetBodyString("ok")
		return nil
	}))
	gone := func(c hop.Client, within time.Duration) bool {
		for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
			if c.Gone() {
				return true
			}
		}
		return false
	}
	const get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	stays := st.dial(t)
	io.WriteString(stays, get)
	if gone(<-hold, 50*time.Millisecond) {
		t.Error("a waiting client was taken for gone")
	}
	release <- struct{}{}

	leaves := st.dial(t)
	io.WriteString(leaves, get)
	c := <-hold
	leaves.Close()
	if !gone(c, 10*time.Second) {
		t.Error("a client that left was not noticed")
	}
	release <- struct{}{}

	half := st.dial(t)
	io.WriteString(half, get)
	c = <-hold
	half.CloseWrite()
	if gone(c, 50*time.Millisecond) {
		t.Error("a half-closed client was taken for gone")
	}
	release <- struct{}{}
	b, err := io.ReadAll(half)
	if err != nil || !strings.HasSuffix(string(b), "ok") {
		t.Errorf("half-closed client got %q, %v", b, err)
	}
}

func TestShutdownEndsWithTheLastRequest(t *testing.T) {
	entered, finish := make(chan struct{}), make(chan struct{})
	ln, _ := net.Listen("tcp", "127.0.0.1:0")
	s := front.New(front.Config{}, hop.HandlerFunc(func(x *hop.Exchange) error {
		close(entered)
		<-finish
		x.Resp.SetBodyString("done")
		return nil
	}))
	go s.Serve(ln)
	answer := make(chan string, 1)
	go func() {
		resp, err := http.Get("http://" + ln.Addr().String())
		if err != nil {
			answer <- err.Error()
			return
		}
		b, _ := io.ReadAll(resp.Body)
		answer <- string(b) + strconv.FormatBool(resp.Close)
	}()
	<-entered
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(context.Background()) }()
	select {
	case <-ended:
		t.Fatal("shut down while a request was inside")
	case <-time.After(50 * time.Millisecond): // a negative: nothing to wait for
	}
	close(finish)
	if got := <-answer; got != "donetrue" {
		t.Errorf("answer %q, want the body and Connection: close", got)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
