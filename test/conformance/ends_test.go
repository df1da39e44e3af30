package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/protocols"
)

// serving starts a server of HTTP/1.1 and h2c.
func serving(t *testing.T, h http.HandlerFunc) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := protocols.Server(h)
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// transport speaks HTTP/1.1 or HTTP/2 with prior knowledge; dials counts its connections.
func transport(t *testing.T, h2 bool, dials *atomic.Int32) *http.Transport {
	tr := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials.Add(1)
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}}
	tr.Protocols.SetHTTP1(!h2)
	tr.Protocols.SetUnencryptedHTTP2(h2)
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// Each time limit ends what goes beyond it, with 504 before the answer has begun and with an error after it, never with an end that looks like one. The
// function is told, the other streams of a connection are not touched, and what keeps within the limit comes whole.
func TestTimeLimits(t *testing.T) {
	t.Parallel()
	const short = 300 * time.Millisecond
	type outcome struct {
		fate string
		told bool // the function was told that nobody waits any more
	}
	for _, c := range []struct {
		limit, path, want string
	}{
		{"--timeout", "/silent", "504"},
		{"--timeout", "/stalls", "cut"},
		{"--timeout", "/drips", "cut"},
		{"--response-start-timeout", "/silent", "504"},
		{"--response-start-timeout", "/drips", "whole"},
		{"--idle-timeout", "/silent", "504"},
		{"--idle-timeout", "/stalls", "cut"},
		{"--idle-timeout", "/drips", "whole"},
		{"", "/drips", "whole"}, // the control: it is the limits that cut
	} {
		for _, function := range []string{"h1", "h2c"} {
			t.Run(strings.Trim(c.limit+c.path, "-/")+"/"+function, func(t *testing.T) {
				t.Parallel()
				told := make(chan bool, 8)
				fn := serving(t, func(w http.ResponseWriter, r *http.Request) {
					defer func() { told <- r.Context().Err() != nil }()
					switch r.URL.Path {
					case "/silent":
						<-r.Context().Done()
					case "/stalls":
						io.WriteString(w, "begin")
						w.(http.Flusher).Flush()
						<-r.Context().Done()
					case "/drips":
						for range 8 {
							io.WriteString(w, "drip")
							w.(http.Flusher).Flush()
							select {
							case <-time.After(short / 4):
							case <-r.Context().Done():
								return
							}
						}
					}
				})
				args := []string{"--listen", "127.0.0.1:0", "--upstream", fn, "--upstream-protocol", function}
				if c.limit != "" {
					args = append(args, c.limit, short.String())
				}
				inner := hop(t, "queueproxy", args...)
				outer := hop(t, "thaw", "router", "--listen", "127.0.0.1:0", "--static", "*="+inner, "--upstream-protocol", function, "--hops")
				for _, addr := range []string{inner, outer} {
					for _, h2 := range []bool{false, true} {
						var dials atomic.Int32
						tr := transport(t, h2, &dials)
						for range 2 {
							var got, want outcome
							for range 5 { // a busy machine may use a limit up before anything has come
								got, want = outcome{fate: fate(t, tr, addr+c.path)}, outcome{c.want, c.want != "whole"}
								select {
								case got.told = <-told:
								case <-time.After(limit):
									t.Fatal("the function goes on")
								}
								if got == want {
									break
								}
							}
							if got != want {
								t.Errorf("HTTP/2 %v, through the router %v: %+v, want %+v", h2, addr == outer, got, want)
							}
						}
						if n := dials.Load(); h2 && n != 1 {
							t.Errorf("%d connections of HTTP/2 for two streams", n)
						}
					}
				}
			})
		}
	}
}

// fate says what becomes of a request: whole, cut, or the status of a refusal.
func fate(t *testing.T, tr *http.Transport, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+url, nil)
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "nothing"
	case resp.StatusCode != 200:
		return fmt.Sprint(resp.StatusCode)
	case err != nil:
		return "cut"
	}
	return "whole"
}

// A hop that is told to end answers what is under way whole, says that its connections end, and takes no new ones. One that is killed does not: the
// control.
func TestDraining(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"router", "queueproxy"} {
		for _, h2 := range []bool{false, true} {
			for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
				t.Run(fmt.Sprintf("%s/http2=%v/%v", kind, h2, sig), func(t *testing.T) {
					t.Parallel()
					inside, release := make(chan struct{}), make(chan struct{})
					enter := sync.OnceFunc(func() { close(inside) })
					fn := serving(t, func(w http.ResponseWriter, r *http.Request) {
						enter()
						io.WriteString(w, "begin")
						w.(http.Flusher).Flush()
						<-release
						io.WriteString(w, "end")
					})
					var addr string
					if kind == "router" {
						addr = routerTo(t, fn)
					} else {
						addr = queueProxy(t, fn, false)
					}
					var dials atomic.Int32
					tr := transport(t, h2, &dials)
					req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+addr+"/", nil)
					answer := make(chan string, 1)
					begun := make(chan struct{})
					go func() {
						resp, err := tr.RoundTrip(req)
						close(begun)
						if err != nil {
							answer <- err.Error()
							return
						}
						b, err := io.ReadAll(resp.Body)
						answer <- fmt.Sprintf("%s %v", b, err)
					}()
					<-inside
					<-begun
					pid, _ := pids.Load(addr)
					if err := syscall.Kill(pid.(int), sig); err != nil {
						t.Fatal(err)
					}
					for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) { // until nobody listens any more
						c, err := net.Dial("tcp", addr)
						if err != nil {
							break
						}
						c.Close()
						if time.Now().After(end) {
							t.Fatal("it goes on accepting")
						}
					}
					close(release)
					got := <-answer
					if whole := got == "beginend <nil>"; whole != (sig == syscall.SIGTERM) {
						t.Errorf("the answer under way: %s", got)
					}
					// In HTTP/1 one more request may have been sent before the connection's end could be said.
					if resp, err := tr.RoundTrip(req.Clone(t.Context())); err == nil && (h2 || !resp.Close) {
						t.Error("the connection goes on")
					}
				})
			}
		}
	}
}

// While one of two instances drains, its requests go to the other one, and none fails. When it is killed with requests inside, some do: the
// control.
func TestDrainingInstance(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{"h1", "h2c"} {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			t.Run(fmt.Sprintf("%s/%v", protocol, sig), func(t *testing.T) {
				t.Parallel()
				var served [2]atomic.Int64
				var instances [2]string
				for i := range instances {
					fn := serving(t, func(w http.ResponseWriter, r *http.Request) {
						served[i].Add(1)
						io.Copy(io.Discard, r.Body)
						time.Sleep(10 * time.Millisecond) // the work
						io.WriteString(w, "ok")
					})
					instances[i] = hop(t, "queueproxy", "--listen", "127.0.0.1:0", "--upstream", fn, "--upstream-protocol", protocol, "--concurrency", "10")
				}
				addr := hop(t, "thaw", "activator", "--listen", "127.0.0.1:0", "--static", "*="+instances[0]+","+instances[1], "--upstream-protocol", protocol, "--concurrency", "10", "--hops")
				var failed, answered atomic.Int64
				var first atomic.Pointer[string]
				stop := make(chan struct{})
				var wg sync.WaitGroup
				for i := range 12 {
					var dials atomic.Int32
					tr := transport(t, i%2 == 1, &dials)
					wg.Go(func() {
						for {
							select {
							case <-stop:
								return
							default:
							}
							req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+addr+"/", strings.NewReader("work"))
							resp, err := tr.RoundTrip(req)
							if err == nil {
								var b []byte
								b, err = io.ReadAll(resp.Body)
								resp.Body.Close()
								if err == nil && string(b) != "ok" {
									err = fmt.Errorf("%d %s", resp.StatusCode, b)
								}
							}
							if answered.Add(1); err != nil {
								failed.Add(1)
								text := err.Error()
								first.CompareAndSwap(nil, &text)
							}
						}
					})
				}
				reach := func(n *atomic.Int64, more int64) {
					for want, end := n.Load()+more, time.Now().Add(limit); n.Load() < want && time.Now().Before(end); time.Sleep(time.Millisecond) {
					}
				}
				reach(&served[0], 20)
				reach(&served[1], 20)
				pid, _ := pids.Load(instances[0])
				if err := syscall.Kill(pid.(int), sig); err != nil {
					t.Fatal(err)
				}
				reach(&served[1], 100)
				before := served[0].Load()
				reach(&served[1], 50)
				close(stop)
				wg.Wait()
				if n := served[0].Load(); n != before {
					t.Errorf("%d requests reached the instance long after it was told to end", n-before)
				}
				if (failed.Load() > 0) != (sig == syscall.SIGKILL) {
					why := "none"
					if p := first.Load(); p != nil {
						why = *p
					}
					t.Errorf("%d of %d failed: %s", failed.Load(), answered.Load(), why)
				}
			})
		}
	}
}
