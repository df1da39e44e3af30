package standalone

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/queueproxy"
)

// instance is a function with a sidecar before it, over real sockets.
type instance struct {
	addr  string // of the sidecar
	seen  atomic.Int32
	proxy *queueproxy.Proxy
	fn    *httptest.Server
}

func newInstance(t *testing.T, concurrency int, h http.HandlerFunc) *instance {
	t.Helper()
	in := &instance{}
	in.fn = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { in.seen.Add(1); h(w, r) }))
	in.proxy = queueproxy.New(queueproxy.Config{Concurrency: concurrency, Queue: -1, Instance: "i"}, forward.New(forward.Config{Addr: in.fn.Listener.Addr().String()}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in.addr = ln.Addr().String()
	s := front.New(front.Config{}, &queueproxy.Sidecar{Proxy: in.proxy, Stopping: func() bool { return false }})
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		s.Shutdown(ctx)
		<-done
		in.proxy.Close()
		in.fn.Close()
	})
	return in
}

// Of two instances one refuses, in every way that there is: nobody notices, and the function behind it sees nothing. Without the trust in hops, the
// refusals come through: the control.
func TestRefusalsGoElsewhere(t *testing.T) {
	ok := func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); io.WriteString(w, "ok") }
	for _, c := range []struct {
		name   string
		refuse func(bad *instance) // nil = by a request inside
	}{
		{"drains", func(bad *instance) {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			bad.proxy.Drain(ctx)
		}},
		{"full", nil},
		{"function does not listen", func(bad *instance) { bad.fn.Close() }},
	} {
		for _, hops := range []bool{true, false} {
			t.Run(fmt.Sprint(c.name, "/hops=", hops), func(t *testing.T) {
				t.Parallel()
				good := newInstance(t, 100, ok)
				var bad *instance
				if c.refuse == nil {
					block := make(chan struct{})
					bad = newInstance(t, 1, func(http.ResponseWriter, *http.Request) { <-block })
					held := make(chan struct{})
					go func() { defer close(held); http.Get("http://" + bad.addr) }()
					t.Cleanup(func() { close(block); <-held })
					for bad.seen.Load() == 0 {
						time.Sleep(time.Millisecond)
					}
					bad.seen.Store(0)
				} else {
					bad = newInstance(t, 1, ok)
					c.refuse(bad)
				}
				addr := serve(t, Config{Activator: true, Hops: hops, Static: []string{"*=" + bad.addr + "," + good.addr}})
				var refused atomic.Int32
				var wg sync.WaitGroup
				for range 8 {
					wg.Go(func() {
						for range 20 {
							resp, err := http.Post("http://"+addr, "text/plain", strings.NewReader("a body"))
							if err != nil {
								t.Error(err)
								return
							}
							b, _ := io.ReadAll(resp.Body)
							resp.Body.Close()
							if resp.StatusCode != 200 || string(b) != "ok" {
								refused.Add(1)
							}
						}
					})
				}
				wg.Wait()
				if n := refused.Load(); (n > 0) == hops {
					t.Errorf("%d of 160 refused", n)
				}
				if n := bad.seen.Load(); n != 0 {
					t.Errorf("the function behind the one that refuses saw %d", n)
				}
			})
		}
	}
}

// A function cannot have its requests repeated: what it says in the platform's words does not get past its sidecar.
func TestFunctionCannotRefuse(t *testing.T) {
	for _, reason := range []string{hop.ReasonQueueFull, hop.ReasonDraining, hop.ReasonUnreachable} {
		lie := func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Thaw-Error", reason)
			w.WriteHeader(503)
		}
		a, b := newInstance(t, 10, lie), newInstance(t, 10, lie)
		addr := serve(t, Config{Activator: true, Hops: true, Static: []string{"*=" + a.addr + "," + b.addr}})
		for i := range 5 {
			resp, err := http.Get("http://" + addr)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if n := a.seen.Load() + b.seen.Load(); resp.StatusCode != 503 || resp.Header.Get("X-Thaw-Error") != "" || int(n) != i+1 {
				t.Errorf("%s: %d, X-Thaw-Error %q, %d requests reached functions of %d", reason, resp.StatusCode, resp.Header.Get("X-Thaw-Error"), n, i+1)
			}
		}
	}
}

// What a hop says of a refusal that is final comes through as it said it, reason included.
func TestFinalRefusalIsPassedOn(t *testing.T) {
	in := newInstance(t, 1, func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) })
	addr := serve(t, Config{Hops: true, Static: []string{"*=" + in.addr}})
	resp, err := http.Get("http://" + addr)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 502 || resp.Header.Get("X-Thaw-Error") != hop.ReasonInstanceBroke || !strings.Contains(string(b), "broke off") || in.seen.Load() != 1 {
		t.Errorf("%d %q %q, asked %d times", resp.StatusCode, resp.Header.Get("X-Thaw-Error"), b, in.seen.Load())
	}
}

// An address that nobody listens at is left out, and found again when somebody does.
func TestDeadAddressComesBack(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := ln.Addr().String()
	ln.Close()
	alive, _ := function(t, "alive", 0)
	addr := serve(t, Config{Activator: true, Static: []string{"*=" + alive + "," + dead}})
	for range 50 {
		if code, got := get(t, addr, "x"); code != 200 || got != "alive" {
			t.Fatalf("%d %q", code, got)
		}
	}
	if ln, err = net.Listen("tcp", dead); err != nil {
		t.Skip("somebody else has taken the port:", err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "back") })}
	go s.Serve(ln)
	defer s.Close()
	for end := time.Now().Add(20 * time.Second); ; {
		if _, got := get(t, addr, "x"); got == "back" {
			return
		}
		if time.Now().After(end) {
			t.Fatal("not found again")
		}
	}
}
