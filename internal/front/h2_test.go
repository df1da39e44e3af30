package front_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
)

// h2cStand is a stand whose function speaks HTTP/2 without TLS.
func h2cStand(t *testing.T, fc forward.Config, h http.HandlerFunc) *stand {
	t.Helper()
	st := &stand{}
	st.up = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		st.hits.Add(1)
		if r.ProtoMajor != 2 {
			t.Errorf("the function was spoken to in %s", r.Proto)
		}
		h(w, r)
	}))
	st.up.Config.Protocols = h2only()
	st.up.Start()
	if fc.Addr == "" {
		fc.Addr = st.up.Listener.Addr().String()
	}
	fc.Protocol = "h2c"
	st.f = forward.New(fc)
	st.serve(t, front.Config{HeaderTimeout: 2 * time.Second}, st.f)
	t.Cleanup(func() {
		st.f.Close()
		st.up.CloseClientConnections()
		st.up.Close()
	})
	return st
}

func h2only() *http.Protocols {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	return &p
}

// clients are the ways to speak to a front.
func clients(t *testing.T) map[string]*http.Client {
	h1, h2 := &http.Transport{}, &http.Transport{Protocols: h2only()}
	t.Cleanup(func() { h1.CloseIdleConnections(); h2.CloseIdleConnections() })
	return map[string]*http.Client{"h1": {Transport: h1}, "h2": {Transport: h2}}
}

// everyWay runs a test for each pair of what the client and what the function speaks.
func everyWay(t *testing.T, fc forward.Config, h http.HandlerFunc, test func(t *testing.T, st *stand, c *http.Client, client, function string)) {
	for function, make := range map[string]func(*testing.T, forward.Config, http.HandlerFunc) *stand{"h1": newStand, "h2": h2cStand} {
		for client, c := range clients(t) {
			t.Run(client+" to "+function, func(t *testing.T) {
				st := make(t, fc, h)
				t.Cleanup(c.CloseIdleConnections) // a graceful end of HTTP/2 takes a second
				test(t, st, c, client, function)
			})
		}
	}
}

func TestTranslation(t *testing.T) {
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Seen", r.Method+" "+r.URL.RequestURI()+" "+r.Host+" "+r.Header.Get("X-Foo")+" "+r.Header.Get("User-Agent")+" "+r.Header.Get("Cookie")+" "+fmt.Sprint(r.Header["Accept"])+r.Header.Get("Accept-Encoding"))
		w.Header().Set("Date", "Mon, 01 Jan 2024 00:00:00 GMT")
		w.Header()["Set-Cookie"] = []string{`a="1"; Path=/`, "b=2"}
		w.Header()["Vary"] = []string{"A", "B"}
		w.Header()["Content-Type"] = nil
		if r.URL.Path == "/teapot" {
			w.WriteHeader(418)
		}
		echo(w, r)
	}, func(t *testing.T, st *stand, cl *http.Client, _, _ string) {
		for _, c := range []struct{ method, path, body string }{
			{"GET", "/a?b=c%20d&e", ""}, {"POST", "/teapot", "hello"}, {"PUT", "//x/../y;z", strings.Repeat("y", 7000)}, {"POST", "/big", strings.Repeat("z", 300_000)}, {"DELETE", "/d?", ""}, {"PURGE", "/", "x"},
		} {
			for _, known := range []bool{true, false} {
				var body io.Reader = strings.NewReader(c.body)
				if !known {
					if c.body == "" {
						continue
					}
					body = io.MultiReader(body)
				}
				req, err := http.NewRequest(c.method, "http://"+st.addr, body)
				if err != nil {
					t.Fatal(err)
				}
				req.URL.Opaque = c.path
				if strings.HasPrefix(c.path, "//") {
					req.URL.Opaque, req.URL.Path, req.URL.RawPath = "", c.path, c.path
				}
				req.Host = "fn.example"
				req.Header.Set("X-Foo", "bar")
				req.Header["User-Agent"] = []string{""}
				req.Header.Set("Accept-Encoding", "x")
				req.Header["Accept"] = []string{"a", "b", "a"}
				req.Header.Set("Cookie", `q="1 2"; r=s`)
				resp, err := cl.Do(req)
				if err != nil {
					t.Fatalf("%s %s: %v", c.method, c.path, err)
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				code := 200
				if c.path == "/teapot" {
					code = 418
				}
				if err != nil || string(b) != c.body || resp.StatusCode != code {
					t.Errorf("%s %s: %d, %d bytes of %d, %v", c.method, c.path, resp.StatusCode, len(b), len(c.body), err)
				}
				if got, want := resp.Header.Get("X-Seen"), c.method+" "+c.path+` fn.example bar  q="1 2"; r=s [a b a]x`; got != want {
					t.Errorf("function saw %q, want %q", got, want)
				}
				h := resp.Header
				if h.Get("Date") != "Mon, 01 Jan 2024 00:00:00 GMT" || fmt.Sprint(h["Set-Cookie"], h["Vary"], h["Content-Type"]) != `[a="1"; Path=/ b=2] [A B] []` || h.Get("X-Request-Id") == "" {
					t.Errorf("headers of the answer: %q", h)
				}
			}
		}
	})
}

func TestAnswersWithoutBodyEveryWay(t *testing.T) {
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/204":
			w.WriteHeader(204)
		case "/304":
			w.Header().Set("Etag", `"x"`)
			w.WriteHeader(304)
		case "/empty":
			w.WriteHeader(200)
		default:
			w.Header().Set("Content-Length", "5")
			io.WriteString(w, "hello")
		}
	}, func(t *testing.T, st *stand, cl *http.Client, _, _ string) {
		for _, c := range []struct {
			method, path string
			code         int
			length       int64 // -2 = does not matter
			body         string
		}{{"HEAD", "/", 200, 5, ""}, {"GET", "/204", 204, -2, ""}, {"GET", "/304", 304, -2, ""}, {"GET", "/empty", 200, 0, ""}, {"HEAD", "/empty", 200, -2, ""}, {"GET", "/", 200, 5, "hello"}, {"POST", "/", 200, 5, "hello"}} {
			req, _ := http.NewRequest(c.method, "http://"+st.addr+c.path, nil)
			resp, err := cl.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != c.code || string(b) != c.body || c.length >= -1 && resp.ContentLength != c.length {
				t.Errorf("%s %s: %d, length %d, %q, %v", c.method, c.path, resp.StatusCode, resp.ContentLength, b, err)
			}
		}
	})
}

func TestTrailers(t *testing.T) {
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Announced")
		w.WriteHeader(200)
		b, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %v %v", b, err, r.Trailer)
		w.Header().Set("X-Announced", "1")
		w.Header()[http.TrailerPrefix+"X-Late"] = []string{"2", "3"}
	}, func(t *testing.T, st *stand, cl *http.Client, _, _ string) {
		for _, size := range []int{5, 100_000} {
			body := strings.Repeat("b", size)
			req, _ := http.NewRequest("POST", "http://"+st.addr, io.MultiReader(strings.NewReader(body)))
			req.Trailer = http.Header{"X-Sum": nil, "X-More": nil}
			req.Body = &atEOF{req.Body, func() { req.Trailer["X-Sum"], req.Trailer["X-More"] = []string{"s"}, []string{"m", "n"} }}
			resp, err := cl.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if want := body + " <nil> map[X-More:[m n] X-Sum:[s]]"; err != nil || string(b) != want {
				t.Errorf("function saw %.60q ... %q, %v", b, b[max(0, len(b)-60):], err)
			}
			if got := fmt.Sprint(resp.Trailer); got != "map[X-Announced:[1] X-Late:[2 3]]" {
				t.Errorf("trailers of the answer: %s", got)
			}
		}
	})
}

type atEOF struct {
	io.ReadCloser
	f func()
}

func (a *atEOF) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	if err == io.EOF {
		a.f()
	}
	return n, err
}

func TestEarlyHints(t *testing.T) {
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Link", "</a.css>; rel=preload")
		w.Header().Add("Link", "</b.css>; rel=preload")
		w.WriteHeader(103)
		w.Header().Set("Link", "</c.css>")
		w.WriteHeader(200)
		io.WriteString(w, "body")
	}, func(t *testing.T, st *stand, cl *http.Client, _, _ string) {
		var hints []string
		ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			hints = append(hints, fmt.Sprint(code, h["Link"]))
			return nil
		}})
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+st.addr, nil)
		resp, err := cl.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if fmt.Sprint(hints) != "[103 [</a.css>; rel=preload </b.css>; rel=preload]]" || string(b) != "body" || fmt.Sprint(resp.Header["Link"]) != "[</c.css>]" {
			t.Errorf("hints %q, body %q, %q", hints, b, resp.Header["Link"])
		}
	})
}

func TestTooManyHints(t *testing.T) {
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		for range 100 {
			w.WriteHeader(103)
		}
		w.WriteHeader(200)
	}, func(t *testing.T, st *stand, cl *http.Client, client, _ string) {
		hints := 0
		ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{Got1xxResponse: func(int, textproto.MIMEHeader) error { hints++; return nil }})
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+st.addr, nil)
		resp, err := cl.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 502 || hints != 16 {
			t.Errorf("%d after %d hints", resp.StatusCode, hints)
		}
	})
}

// Whether a body is wanted is the function's to say, whatever both speak.
func TestContinueEveryWay(t *testing.T) {
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refused" {
			w.WriteHeader(401)
			return
		}
		echo(w, r)
	}, func(t *testing.T, st *stand, cl *http.Client, _, _ string) {
		cl.Transport.(*http.Transport).ExpectContinueTimeout = 20 * time.Second
		for path, want := range map[string]string{"/refused": "401 false ", "/wanted": "200 true hello"} {
			asked := false
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			req, _ := http.NewRequestWithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got100Continue: func() { asked = true }}), "POST", "http://"+st.addr+path, strings.NewReader("hello"))
			req.Header.Set("Expect", "100-continue")
			resp, err := cl.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if got := fmt.Sprintf("%d %v %s", resp.StatusCode, asked, b); got != want {
				t.Errorf("%s: %s, want %s", path, got, want)
			}
		}
	})
}

func TestFullDuplexEveryWay(t *testing.T) {
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		b := make([]byte, 32<<10)
		for {
			n, err := r.Body.Read(b)
			w.Write(b[:n])
			w.(http.Flusher).Flush()
			if err != nil {
				return
			}
		}
	}, func(t *testing.T, st *stand, cl *http.Client, _, _ string) {
		// First byte by byte, each sent only when the one before has come back; then a lot.
		pr, pw := io.Pipe()
		req, _ := http.NewRequest("POST", "http://"+st.addr, pr)
		resp, err := cl.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		one := make([]byte, 1)
		for i := range 20 {
			pw.Write([]byte{byte(i)})
			if _, err := io.ReadFull(resp.Body, one); err != nil || one[0] != byte(i) {
				t.Fatalf("byte %d: %v, %v", i, one, err)
			}
		}
		block := bytes.Repeat([]byte("0123456789abcdef"), 4096)
		want := sha256.New()
		go func() {
			for range 128 {
				pw.Write(block)
			}
			pw.Close()
		}()
		for range 128 {
			want.Write(block)
		}
		got := sha256.New()
		if n, err := io.Copy(got, resp.Body); err != nil || n != int64(128*len(block)) || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
			t.Errorf("%d bytes, %v", n, err)
		}
	})
}

// The function's end in mid-answer is the client's error, whatever both speak.
func TestTruncatedAnswerEveryWay(t *testing.T) {
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begin")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}, func(t *testing.T, st *stand, cl *http.Client, _, _ string) {
		resp, err := cl.Get("http://" + st.addr)
		if err != nil {
			return // the reset overtook the head
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil {
			t.Errorf("client took %q for the whole answer", b)
		}
	})
}

// A client that breaks off in mid-upload is the function's error, and its request is cancelled.
func TestTruncatedUploadEveryWay(t *testing.T) {
	saw := make(chan error, 1)
	everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		saw <- err
	}, func(t *testing.T, st *stand, cl *http.Client, _, _ string) {
		for _, size := range []int64{-1, 1 << 20} {
			pr, pw := io.Pipe()
			req, _ := http.NewRequest("POST", "http://"+st.addr, pr)
			req.ContentLength = size
			go func() {
				pw.Write(make([]byte, 20_000))
				for st.hits.Load() == 0 {
					time.Sleep(time.Millisecond)
				}
				pw.CloseWithError(errors.New("client stops"))
			}()
			if resp, err := cl.Do(req); err == nil {
				resp.Body.Close()
			}
			select {
			case err := <-saw:
				if err == nil {
					t.Error("the function took a part for the whole")
				}
			case <-time.After(5 * time.Second):
				t.Error("the function was not told")
			}
			st.hits.Store(0)
		}
	})
}

// A stream that its client takes back cancels the function's work.
func TestCancel(t *testing.T) {
	for _, begun := range []bool{false, true} {
		entered, cancelled := make(chan struct{}, 1), make(chan struct{}, 1)
		everyWay(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
			if begun {
				w.WriteHeader(200)
				w.(http.Flusher).Flush()
			}
			entered <- struct{}{}
			select {
			case <-r.Context().Done():
				cancelled <- struct{}{}
			case <-time.After(5 * time.Second):
			}
		}, func(t *testing.T, st *stand, cl *http.Client, client, _ string) {
			if client == "h1" {
				t.Skip("of HTTP/1 only a leaving client that waits in a queue is noticed")
			}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			go func() { <-entered; cancel() }()
			req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+st.addr, nil)
			resp, err := cl.Do(req)
			if err == nil {
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			select {
			case <-cancelled:
			case <-time.After(3 * time.Second):
				t.Error("the function goes on")
			}
		})
	}
}

func TestTimeoutsH2(t *testing.T) {
	for _, c := range timeLimits {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cancelled := make(chan struct{})
			st := h2cStand(t, c.cfg, func(w http.ResponseWriter, r *http.Request) {
				for i, d := range []time.Duration{c.first, c.rest} {
					select {
					case <-time.After(d):
					case <-r.Context().Done():
						close(cancelled)
						return
					}
					fmt.Fprint(w, i)
					w.(http.Flusher).Flush()
				}
			})
			resp, err := http.Get("http://" + st.addr)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != c.code || c.code == 504 && resp.Header.Get("X-Thaw-Error") != "timeout" {
				t.Errorf("%d %q, want %d", resp.StatusCode, b, c.code)
			}
			if c.code == 200 && (err == nil) != c.whole {
				t.Errorf("body %q, %v; whole must be %v", b, err, c.whole)
			}
			if !c.whole {
				select {
				case <-cancelled:
				case <-time.After(3 * time.Second):
					t.Error("the function was not cancelled")
				}
			}
		})
	}
}

// A function that says nothing while an upload goes on, or stalls, is the function's fault and not the client's.
func TestTimeoutInUpload(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	everyWay(t, forward.Config{ResponseStart: 100 * time.Millisecond}, func(w http.ResponseWriter, r *http.Request) {
		go io.Copy(io.Discard, r.Body)
		select {
		case <-r.Context().Done():
		case <-release:
		}
	}, func(t *testing.T, st *stand, cl *http.Client, client, _ string) {
		pr, pw := io.Pipe()
		defer pw.Close()
		go pw.Write([]byte("begin"))
		resp, err := cl.Post("http://"+st.addr, "text/plain", pr)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 504 || resp.Header.Get("X-Thaw-Error") != "timeout" {
			t.Errorf("%d %s", resp.StatusCode, resp.Header.Get("X-Thaw-Error"))
		}
	})
}

func TestNotSentH2(t *testing.T) {
	ln, _ := net.Listen("tcp", "127.0.0.1:0")
	addr := ln.Addr().String()
	ln.Close()
	f := forward.New(forward.Config{Addr: addr, Protocol: "h2c"})
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

// A function that goes away gracefully loses nothing: the streams it has taken are answered, later ones go to a new connection.
func TestGoAway(t *testing.T) {
	release := make(chan struct{})
	st := h2cStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			<-release
		}
		io.WriteString(w, "ok")
	})
	slow := make(chan string, 1)
	go func() {
		resp, err := http.Get("http://" + st.addr + "/slow")
		if err != nil {
			slow <- err.Error()
			return
		}
		b, _ := io.ReadAll(resp.Body)
		slow <- string(b)
	}()
	for st.hits.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	go st.up.Config.Shutdown(context.Background())
	for { // until nobody listens any more
		c, err := net.Dial("tcp", st.up.Listener.Addr().String())
		if err != nil {
			break
		}
		c.Close()
		time.Sleep(time.Millisecond)
	}
	// The old connection may still take one, a new one cannot be made: nothing but an answer or "not sent" is right.
	for range 20 {
		resp, err := http.Get("http://" + st.addr + "/")
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(b) != "ok" && !strings.Contains(string(b), hop.ErrNotSent.Error()) {
			t.Errorf("%d %q", resp.StatusCode, b)
		}
	}
	close(release)
	if got := <-slow; got != "ok" {
		t.Errorf("the stream under way: %q", got)
	}
}

func TestH2Refusals(t *testing.T) {
	st := newStand(t, forward.Config{}, echo)
	cl := clients(t)["h2"]
	for _, c := range []struct {
		name   string
		change func(*http.Request)
		code   int // 0 = the stream is reset
	}{
		{"plain", func(*http.Request) {}, 200},
		{"CONNECT", func(r *http.Request) { r.Method, r.URL.Path = "CONNECT", "" }, 405},
		{"extended CONNECT", func(r *http.Request) { r.Method = "CONNECT"; r.Header.Set(":protocol", "websocket") }, 0},
		{"60 KiB of fields", func(r *http.Request) { r.Header.Set("X", strings.Repeat("x", 60<<10)) }, 200},
		{"300 fields", func(r *http.Request) {
			for i := range 300 {
				r.Header.Set(fmt.Sprint("X", i), "y")
			}
		}, 431},
		{"200 KiB of fields", func(r *http.Request) { r.Header.Set("X", strings.Repeat("x", 200<<10)) }, 0},
		{"Host that is none", func(r *http.Request) { r.Host = "a b" }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			st.hits.Store(0)
			req, _ := http.NewRequest("GET", "http://"+st.addr+"/", nil)
			c.change(req)
			resp, err := cl.Do(req)
			if err != nil {
				if c.code != 0 {
					t.Error(err)
				}
			} else {
				resp.Body.Close()
				if c.code != 0 && resp.StatusCode != c.code || c.code == 0 && resp.StatusCode < 400 {
					t.Errorf("%d, want %d", resp.StatusCode, c.code)
				}
			}
			if reached := st.hits.Load() > 0; reached != (c.code == 200) {
				t.Errorf("reached the function: %v", reached)
			}
		})
	}
}

// The preface may come in any pieces, and requests that begin like it are requests.
func TestPrefaceInPieces(t *testing.T) {
	st := newStand(t, forward.Config{}, echo)
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	for _, cut := range []int{1, 3, 10, 23} {
		c := st.dial(t)
		io.WriteString(c, preface[:cut])
		time.Sleep(5 * time.Millisecond) // so that it is read in two pieces; nothing depends on it
		io.WriteString(c, preface[cut:]+"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
		b := make([]byte, 9)
		if _, err := io.ReadFull(c, b); err != nil || b[3] != 4 {
			t.Errorf("cut at %d: %x, %v, want a SETTINGS frame", cut, b, err)
		}
		c.Close()
	}
	for _, line := range []string{"P / HTTP/1.1", "PRI / HTTP/1.1", "PRI * HTTP/1.1", "PROPFIND / HTTP/1.1", "PATCH / HTTP/1.1"} {
		c := st.dial(t)
		for i := range len(line) {
			io.WriteString(c, line[i:i+1])
		}
		io.WriteString(c, "\r\nHost: a\r\nConnection: close\r\n\r\n")
		b, err := io.ReadAll(c)
		want := "HTTP/1.1 200"
		if strings.Contains(line, "*") {
			want = "HTTP/1.1 400"
		}
		if err != nil || !strings.HasPrefix(string(b), want) {
			t.Errorf("%s: %.60q, %v", line, b, err)
		}
	}
}

func TestShutdownH2(t *testing.T) {
	entered, finish := make(chan struct{}), make(chan struct{})
	var once atomic.Bool
	ln, _ := net.Listen("tcp", "127.0.0.1:0")
	s := front.New(front.Config{}, hop.HandlerFunc(func(x *hop.Exchange) error {
		if once.CompareAndSwap(false, true) {
			close(entered)
		}
		<-finish
		x.Resp.SetBodyString("done")
		return nil
	}))
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	answer := make(chan string, 1)
	cl := clients(t)["h2"]
	go func() {
		resp, err := cl.Get("http://" + ln.Addr().String())
		if err != nil {
			answer <- err.Error()
			return
		}
		b, _ := io.ReadAll(resp.Body)
		answer <- string(b)
	}()
	<-entered
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(context.Background()) }()
	select {
	case <-ended:
		t.Fatal("shut down while a stream was inside")
	case <-time.After(50 * time.Millisecond): // a negative: nothing to wait for
	}
	close(finish)
	if got := <-answer; got != "done" {
		t.Errorf("answer %q", got)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// slots counts exchanges that are inside, as a queue-proxy would.
type slots struct {
	next   hop.Handler
	inside atomic.Int32
}

func (s *slots) Serve(x *hop.Exchange) error {
	s.inside.Add(1)
	if err := s.next.Serve(x); err != nil {
		s.inside.Add(-1)
		return err
	}
	x.OnFinish(s)
	return nil
}

func (s *slots) Finish(*hop.Exchange) { s.inside.Add(-1) }

func (s *slots) become(t *testing.T, want int32) {
	t.Helper()
	for end := time.Now().Add(3 * time.Second); s.inside.Load() != want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d slots held, want %d", s.inside.Load(), want)
		}
	}
}

var echoDesc = grpc.ServiceDesc{
	ServiceName: "test.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := &wrapperspb.StringValue{}
		if err := dec(in); err != nil {
			return nil, err
		}
		md, _ := metadata.FromIncomingContext(ctx)
		grpc.SetHeader(ctx, metadata.Pairs("x-head", strings.Join(md.Get("x-in"), ",")))
		grpc.SetTrailer(ctx, metadata.Pairs("x-tail", "t", "x-bin-bin", "\x00\xff"))
		if in.Value == "fail" {
			return nil, status.Error(codes.FailedPrecondition, "as asked: é")
		}
		if in.Value == "hang" {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return in, nil
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Stream", ClientStreams: true, ServerStreams: true, Handler: func(_ any, ss grpc.ServerStream) error {
		ss.SendHeader(metadata.Pairs("x-head", "early"))
		ss.SetTrailer(metadata.Pairs("x-tail", "t"))
		sum := 0
		for {
			in := &wrapperspb.StringValue{}
			err := ss.RecvMsg(in)
			switch {
			case err == io.EOF: // client streaming: one answer at the end
				return ss.SendMsg(wrapperspb.String(fmt.Sprint(sum)))
			case err != nil:
				return err
			case in.Value == "many": // server streaming
				for i := range 100 {
					if err := ss.SendMsg(wrapperspb.String(fmt.Sprint(i))); err != nil {
						return err
					}
				}
			case in.Value == "abort":
				return status.Error(codes.DataLoss, "in mid-stream")
			case in.Value == "ping": // bidirectional
				if err := ss.SendMsg(wrapperspb.String("pong")); err != nil {
					return err
				}
			}
			sum += len(in.Value)
		}
	}}},
}

func TestGRPC(t *testing.T) {
	up, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer()
	gs.RegisterService(&echoDesc, struct{}{})
	go gs.Serve(up)
	defer gs.Stop()
	f := forward.New(forward.Config{Addr: up.Addr().String(), Protocol: "h2c"})
	defer f.Close()
	sl := &slots{next: f}
	st := &stand{}
	st.serve(t, front.Config{}, sl)
	conn, err := grpc.NewClient("passthrough:///"+st.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	recv := func(s grpc.ClientStream, want string) {
		t.Helper()
		out := &wrapperspb.StringValue{}
		if err := s.RecvMsg(out); err != nil || out.Value != want {
			t.Fatalf("received %q, %v, want %q", out.Value, err, want)
		}
	}
	open := func(ctx context.Context) grpc.ClientStream {
		t.Helper()
		s, err := conn.NewStream(ctx, &echoDesc.Streams[0], "/test.Echo/Stream")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	send := func(s grpc.ClientStream, v string) {
		t.Helper()
		if err := s.SendMsg(wrapperspb.String(v)); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("unary", func(t *testing.T) {
		for _, size := range []int{0, 10, 1 << 20} {
			var head, tail metadata.MD
			out := &wrapperspb.StringValue{}
			in := wrapperspb.String(strings.Repeat("x", size))
			err := conn.Invoke(metadata.AppendToOutgoingContext(ctx, "x-in", "1", "x-in", "2"), "/test.Echo/Unary", in, out, grpc.Header(&head), grpc.Trailer(&tail))
			if err != nil || out.Value != in.Value {
				t.Errorf("%d bytes of %d, %v", len(out.Value), size, err)
			}
			if h := head.Get("x-head"); len(h) != 1 || h[0] != "1,2" {
				t.Errorf("header %v", head)
			}
			if fmt.Sprint(tail.Get("x-tail"), tail.Get("x-bin-bin")) != "[t] [\x00\xff]" {
				t.Errorf("trailer %v", tail)
			}
		}
		sl.become(t, 0)
	})
	t.Run("error status", func(t *testing.T) {
		var tail metadata.MD
		err := conn.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("fail"), &wrapperspb.StringValue{}, grpc.Trailer(&tail))
		if s := status.Convert(err); s.Code() != codes.FailedPrecondition || s.Message() != "as asked: é" || tail.Get("x-tail") == nil {
			t.Errorf("%v, trailer %v", err, tail)
		}
		err = conn.Invoke(ctx, "/test.Echo/Nothing", wrapperspb.String(""), &wrapperspb.StringValue{})
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("no method: %v", err)
		}
	})
	t.Run("client streaming", func(t *testing.T) {
		s := open(ctx)
		if h, err := s.Header(); err != nil || h.Get("x-head")[0] != "early" {
			t.Fatalf("header before the first message: %v, %v", h, err)
		}
		sl.become(t, 1)
		for range 50 {
			send(s, "12345")
		}
		s.CloseSend()
		recv(s, "250")
		if err := s.RecvMsg(&wrapperspb.StringValue{}); err != io.EOF || s.Trailer().Get("x-tail") == nil {
			t.Errorf("end: %v, %v", err, s.Trailer())
		}
		sl.become(t, 0)
	})
	t.Run("server streaming", func(t *testing.T) {
		s := open(ctx)
		send(s, "many")
		s.CloseSend()
		for i := range 100 {
			recv(s, fmt.Sprint(i))
		}
		recv(s, "4")
		if err := s.RecvMsg(&wrapperspb.StringValue{}); err != io.EOF {
			t.Error(err)
		}
	})
	t.Run("bidirectional", func(t *testing.T) {
		s := open(ctx)
		for range 20 {
			send(s, "ping")
			recv(s, "pong")
			sl.become(t, 1)
		}
		send(s, "abort")
		if err := s.RecvMsg(&wrapperspb.StringValue{}); status.Code(err) != codes.DataLoss {
			t.Errorf("error in mid-stream: %v", err)
		}
		sl.become(t, 0)
	})
	t.Run("many at once", func(t *testing.T) {
		var all []grpc.ClientStream
		for range 300 { // more than one connection carries
			s, err := conn.NewStream(ctx, &echoDesc.Streams[0], "/test.Echo/Stream", grpc.WaitForReady(true))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, s)
			if len(all) == 200 {
				break
			}
		}
		for _, s := range all {
			send(s, "ping")
		}
		for _, s := range all {
			recv(s, "pong")
		}
		sl.become(t, int32(len(all)))
		for _, s := range all {
			s.CloseSend()
		}
		sl.become(t, 0)
	})
	t.Run("client leaves", func(t *testing.T) {
		short, cancel := context.WithCancel(ctx)
		s := open(short)
		send(s, "ping")
		recv(s, "pong")
		cancel()
		sl.become(t, 0)
		short, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		err := conn.Invoke(short, "/test.Echo/Unary", wrapperspb.String("hang"), &wrapperspb.StringValue{})
		// The function has the same deadline, and its reset may be here first.
		if code := status.Code(err); code != codes.DeadlineExceeded && code != codes.Unavailable {
			t.Errorf("deadline: %v", err)
		}
		sl.become(t, 0)
	})
}
