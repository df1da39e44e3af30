package forward_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
)

// serve puts a front before h and returns its address.
func serve(t *testing.T, h hop.Handler) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := front.New(front.Config{}, h)
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		s.Shutdown(ctx)
		<-done
	})
	return ln.Addr().String()
}

// function serves h, over HTTP/2 too if asked.
func function(t *testing.T, h2 bool, h http.HandlerFunc) (addr string) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	if h2 {
		s.Config.Protocols = new(http.Protocols)
		s.Config.Protocols.SetHTTP1(true)
		s.Config.Protocols.SetUnencryptedHTTP2(true)
	}
	s.Start()
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return s.Listener.Addr().String()
}

func newForward(t *testing.T, cfg forward.Config) *forward.Forward {
	f := forward.New(cfg)
	t.Cleanup(f.Close)
	return f
}

// routed is a step before f that sets a route's limits, as the router does.
func routed(f hop.Handler, limits api.Timeouts) hop.Handler {
	return hop.HandlerFunc(func(x *hop.Exchange) error { x.Limits = limits; return f.Serve(x) })
}

// short is long enough for an answer on a busy machine, long for what must not be waited for.
const short, long = 500 * time.Millisecond, 20 * time.Second

// The limits of the route hold beside those of the revision, whichever are shorter, in both protocols of a function.
func TestLimits(t *testing.T) {
	for _, c := range []struct {
		name        string
		revision    forward.Config
		route       api.Timeouts
		first, rest time.Duration // until the first byte, and from there to the last
		code        int
		whole       bool
	}{
		{"none", forward.Config{}, api.Timeouts{}, short, short, 200, true},
		{"longer", forward.Config{Total: long, ResponseStart: long, Idle: long}, api.Timeouts{Total: long, ResponseStart: long, Idle: long}, short, short, 200, true},
		{"the route's total", forward.Config{Total: long}, api.Timeouts{Total: short}, long, 0, 504, false},
		{"the revision's total", forward.Config{Total: short}, api.Timeouts{Total: long}, long, 0, 504, false},
		{"only the route's total", forward.Config{}, api.Timeouts{Total: short}, long, 0, 504, false},
		{"the route's total, begun", forward.Config{Total: long}, api.Timeouts{Total: 2 * short}, 0, long, 200, false},
		{"the route's start", forward.Config{Total: long}, api.Timeouts{ResponseStart: short}, long, 0, 504, false},
		{"the route's start, begun", forward.Config{Total: long}, api.Timeouts{ResponseStart: short}, 0, 3 * short, 200, true},
		{"the route's idle", forward.Config{Total: long, Idle: long}, api.Timeouts{Idle: short}, 0, long, 200, false},
		{"idle before the first byte", forward.Config{Total: long, Idle: short}, api.Timeouts{}, long, 0, 504, false},
	} {
		for _, protocol := range []string{"h1", "h2c"} {
			t.Run(c.name+"/"+protocol, func(t *testing.T) {
				t.Parallel()
				cfg := c.revision
				cfg.Protocol = protocol
				cfg.Addr = function(t, protocol == "h2c", func(w http.ResponseWriter, r *http.Request) {
					for i, d := range []time.Duration{c.first, c.rest} {
						select {
						case <-time.After(d):
						case <-r.Context().Done():
							return
						}
						io.WriteString(w, []string{"begin", "end"}[i])
						w.(http.Flusher).Flush()
					}
				})
				addr := serve(t, routed(newForward(t, cfg), c.route))
				begin := time.Now()
				resp, err := http.Get("http://" + addr)
				if err != nil {
					t.Fatal(err)
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode != c.code || (c.code == 504) != (resp.Header.Get("X-Thaw-Error") == hop.ReasonTimeout) {
					t.Errorf("%d %q, want %d", resp.StatusCode, b, c.code)
				}
				if c.code == 200 && (err == nil) != c.whole { // cut means reset, never a clean end
					t.Errorf("body %q, %v; whole must be %v", b, err, c.whole)
				}
				if d := time.Since(begin); d > long/2 {
					t.Errorf("took %v", d)
				}
			})
		}
	}
}

// A client that takes its time with the body does not make the function idle.
func TestSlowUploadIsNotIdle(t *testing.T) {
	for _, protocol := range []string{"h1", "h2c"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			addr := serve(t, newForward(t, forward.Config{Idle: 2 * short, Protocol: protocol, Addr: function(t, protocol == "h2c", func(w http.ResponseWriter, r *http.Request) {
				n, _ := io.Copy(io.Discard, r.Body)
				if n == 5 {
					io.WriteString(w, "all")
				}
			})}))
			body, in := io.Pipe()
			go func() {
				for range 5 {
					time.Sleep(short)
					in.Write([]byte("x"))
				}
				in.Close()
			}()
			resp, err := http.Post("http://"+addr, "text/plain", body)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 200 || string(b) != "all" {
				t.Errorf("%d %q", resp.StatusCode, b)
			}
		})
	}
}

// An upgraded connection has no limit but the idle one.
func TestUpgradedIsExempt(t *testing.T) {
	fn := function(t, false, func(w http.ResponseWriter, r *http.Request) {
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		io.Copy(c, rw)
	})
	for _, c := range []struct {
		name  string
		cfg   forward.Config
		lives bool
	}{
		{"total and start", forward.Config{Total: short, ResponseStart: short}, true},
		{"idle", forward.Config{Total: long, Idle: short}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.cfg.Addr = fn
			nc, err := net.Dial("tcp", serve(t, newForward(t, c.cfg)))
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			nc.SetDeadline(time.Now().Add(long / 2))
			io.WriteString(nc, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			br := bufio.NewReader(nc)
			for line := " "; line != "\r\n"; {
				if line, err = br.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(4 * short) // the limits pass
			io.WriteString(nc, "still here")
			b := make([]byte, 10)
			if _, err := io.ReadFull(br, b); (err == nil) != c.lives || c.lives && string(b) != "still here" {
				t.Errorf("%q, %v; must live: %v", b, err, c.lives)
			}
		})
	}
}

// The message of a limit names how long it was, and the error is told apart from a broken function.
func TestLimitError(t *testing.T) {
	block := make(chan struct{})
	f := newForward(t, forward.Config{Addr: function(t, false, func(http.ResponseWriter, *http.Request) { <-block })})
	defer close(block)
	var seen error
	addr := serve(t, hop.HandlerFunc(func(x *hop.Exchange) error {
		x.Limits.Total = short
		seen = f.Serve(x)
		return seen
	}))
	if resp, err := http.Get("http://" + addr); err != nil || resp.StatusCode != 504 {
		t.Fatal(resp, err)
	}
	var e *hop.Error
	if !errors.As(seen, &e) || e.Reason != hop.ReasonTimeout {
		t.Fatal(seen)
	}
	_, within, _ := strings.Cut(e.Message, "within ")
	if d, err := time.ParseDuration(within); err != nil || d < short || d > long {
		t.Errorf("%q, after %v", e.Message, short)
	}
}
