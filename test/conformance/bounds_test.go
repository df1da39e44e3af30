package conformance

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/protocols"
)

var bodyMiB = flag.Int("body", 64, "MiB of the large bodies; the promise is about 256 (make bodies)")

// zeros is a reader of n bytes.
type zeros struct{ left int }

func (z *zeros) Read(p []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), z.left)
	clear(p[:n])
	z.left -= n
	return n, nil
}

// bodyFunction serves large bodies: it takes them, sends size bytes, or echoes.
func bodyFunction(t *testing.T, size int) (addr string) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/up", func(w http.ResponseWriter, r *http.Request) { n, _ := io.Copy(io.Discard, r.Body); fmt.Fprint(w, n) })
	mux.HandleFunc("/down", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(size))
		io.Copy(w, &zeros{size})
	})
	mux.HandleFunc("/both", func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r.Body}, make([]byte, 64<<10))
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := protocols.Server(mux)
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// sendBody sends up bytes and takes down bytes; one of them may be 0.
func sendBody(ctx context.Context, tr *http.Transport, addr, path string, up, down int) error {
	var body io.Reader
	if up > 0 {
		body = &zeros{up}
	}
	req, err := http.NewRequestWithContext(ctx, "POST", "http://"+addr+path, body)
	if err != nil {
		return err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if down == 0 {
		b, err := io.ReadAll(resp.Body)
		return errors.Join(err, differ(string(b), strconv.Itoa(up)))
	}
	got, err := io.Copy(io.Discard, resp.Body)
	return errors.Join(err, differ(strconv.FormatInt(got, 10), strconv.Itoa(down)))
}

// growth runs f and says by how many KiB the hops' resident memory grew at its peak.
func growth(t *testing.T, hops []string, f func()) (all []int) {
	t.Helper()
	var before []int
	for _, h := range hops {
		before = append(before, resident(t, h))
		forgetPeak(t, h)
	}
	f()
	for i, h := range hops {
		all = append(all, peak(t, h)-before[i])
	}
	return all
}

const mayGrow = 16 << 10 // KiB, whatever passes

// Large bodies pass router and queue-proxy, up, down and both at once, in HTTP/1 and HTTP/2, and neither process keeps more of them than it must.
func TestLargeBodies(t *testing.T) {
	size := *bodyMiB << 20
	fn := bodyFunction(t, size)
	for _, upstream := range []string{"h1", "h2c"} {
		inner := hop(t, "queueproxy", "--listen", "127.0.0.1:0", "--upstream", fn, "--upstream-protocol", upstream, "--concurrency", "10")
		outer := hop(t, "thaw", "router", "--listen", "127.0.0.1:0", "--static", "*="+inner, "--upstream-protocol", upstream)
		tr := &http.Transport{Protocols: new(http.Protocols)}
		tr.Protocols.SetHTTP1(upstream == "h1")
		tr.Protocols.SetUnencryptedHTTP2(upstream == "h2c")
		if err := errors.Join(sendBody(t.Context(), tr, outer, "/up", 1<<20, 0), sendBody(t.Context(), tr, outer, "/both", 1<<20, 1<<20)); err != nil { // what is needed once
			t.Fatalf("%s: %v", upstream, err)
		}
		for _, c := range []struct {
			path     string
			up, down int
		}{{"/up", size, 0}, {"/down", 0, size}, {"/both", size, size}} {
			grown := []int{mayGrow + 1, 0}
			for try := 1; try <= 3 && grown[0]+grown[1] > mayGrow; try++ { // when the collector gets its turn is the machine's affair
				begin := time.Now()
				grown = growth(t, []string{outer, inner}, func() {
					if err := sendBody(t.Context(), tr, outer, c.path, c.up, c.down); err != nil {
						t.Errorf("%s, %s: %v", upstream, c.path, err)
					}
				})
				t.Logf("%-3s %-5s %d MiB in %v: router grew by %d KiB, queue-proxy by %d", upstream, c.path, *bodyMiB, time.Since(begin).Round(time.Millisecond), grown[0], grown[1])
			}
			if grown[0]+grown[1] > mayGrow {
				t.Errorf("%s, %s: memory grew by %v KiB", upstream, c.path, grown)
			}
		}
		tr.CloseIdleConnections()
	}
}

func differ(got, want string) error {
	if got != want {
		return fmt.Errorf("%s bytes, want %s", got, want)
	}
	return nil
}

// kib reads a line of /proc/PID/status of a hop.
func kib(t *testing.T, addr, field string) int {
	t.Helper()
	pid, _ := pids.Load(addr)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%v/status", pid))
	if err != nil {
		t.Skipf("memory of a process cannot be read here: %v", err)
	}
	_, rest, _ := bytes.Cut(b, []byte(field+":"))
	n, _ := strconv.Atoi(string(bytes.Fields(rest)[0]))
	return n
}

func resident(t *testing.T, addr string) int { return kib(t, addr, "VmRSS") }
func peak(t *testing.T, addr string) int     { return kib(t, addr, "VmHWM") }

// forgetPeak makes the peak what is resident now.
func forgetPeak(t *testing.T, addr string) {
	t.Helper()
	pid, _ := pids.Load(addr)
	if err := os.WriteFile(fmt.Sprintf("/proc/%v/clear_refs", pid), []byte("5"), 0); err != nil {
		t.Skipf("the peak of a process cannot be reset here: %v", err)
	}
}

// percentile of durations, in place.
func percentile(d []time.Duration, p int) time.Duration {
	slices.Sort(d)
	return d[min(len(d)*p/100, len(d)-1)]
}

// A good GET is answered as quickly as ever while 1,000 heads and 1,000 bodies stand half sent, and 50 clients take nothing of a large
// answer. The bound is 50 ms, or what a busy machine makes of it: five times what the same hops beside them, which have no such clients, take in
// the same moment. Of ten tries one must keep it.
func TestGoodAmongBad(t *testing.T) {
	if *bodyMiB < 256 {
		t.Parallel()
	}
	for _, c := range chains {
		t.Run(c.name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(serveHTTP(ln))
			addr, alone := c.hops(t, ln.Addr().String(), "h1", "0"), c.hops(t, ln.Addr().String(), "h1", "0")
			good := func(addr string, d []time.Duration) []time.Duration {
				took, err := goodGet(addr, limit)
				if err != nil {
					t.Fatal(err)
				}
				return append(d, took)
			}
			check := func(what string) {
				var after, bound time.Duration
				for range 10 {
					var beside, without []time.Duration
					for range 200 {
						beside, without = good(addr, beside), good(alone, without)
					}
					after, bound = percentile(beside, 99), max(50*time.Millisecond, 5*percentile(without, 99))
					t.Logf("beside %s: 99 of 100 good ones within %v, all within %v; without %v, %v",
						what, after, beside[len(beside)-1], percentile(without, 99), without[len(without)-1])
					if after <= bound {
						return
					}
				}
				t.Errorf("beside %s: 99 of 100 good ones within %v, want %v", what, after, bound)
			}
			sendHalf(t, addr)
			check("2,000 half-sent")
			sendMany(t, addr, 50, "GET /bytes?n=100000000 HTTP/1.1\r\nHost: x\r\n\r\n")
			check("those and 50 that read nothing")
		})
	}
}

// goodGet sends a request that is as it should be over a connection of its own.
func goodGet(addr string, limit time.Duration) (took time.Duration, err error) {
	begin := time.Now()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return 0, err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(limit))
	io.WriteString(nc, "GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	b, err := io.ReadAll(nc)
	if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200 ") {
		return 0, fmt.Errorf("%q, %w", b, err)
	}
	return time.Since(begin), nil
}

// sendMany opens n connections that send a text and stay until the test ends.
func sendMany(t *testing.T, addr string, n int, text string) {
	t.Helper()
	for range n {
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		io.WriteString(nc, text)
	}
}

// sendHalf sends 2,000 half requests.
func sendHalf(t *testing.T, addr string) {
	t.Helper()
	sendMany(t, addr, 1000, "GET / HTTP/1.1\r\nHost: x\r\nX-A: ")
	sendMany(t, addr, 500, "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
	sendMany(t, addr, 500, "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
}

// leaveWithin is what is promised for a slot or a place in the queue to be free after its client has left.
const leaveWithin = 100 * time.Millisecond

// A client that leaves while it waits makes its place free, one that leaves while it runs makes its slot free: the next one gets it in time.
// Of five tries the quickest counts: the machine has other work too.
func TestClientLeaves(t *testing.T) {
	t.Parallel()
	for _, upstream := range []string{"h1", "h2c"} {
		for _, c := range chains {
			if !c.held {
				continue
			}
			for _, http2 := range []bool{false, true} {
				name := upstream + "/" + c.name + map[bool]string{false: "/h1", true: "/h2"}[http2]
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					ln, err := net.Listen("tcp", "127.0.0.1:0")
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(serveHTTP(ln))
					addr := c.hops(t, ln.Addr().String(), upstream, "1")
					free := map[bool]time.Duration{}
					for _, waiting := range []bool{true, false} {
						ctx, cancel := context.WithTimeout(t.Context(), 6*limit)
						best, err := measureLeaving(ctx, addr, http2, waiting)
						cancel()
						if err != nil {
							t.Fatal(err)
						}
						if best > leaveWithin {
							t.Errorf("waiting %v: at best free after %v, want %v", waiting, best, leaveWithin)
						}
						free[waiting] = best.Round(100 * time.Microsecond)
					}
					t.Logf("free after %v while it waited, after %v while it ran", free[true], free[false])
				})
			}
		}
	}
}

// measureLeaving takes the only slot, lets one client leave, and measures how long the next one then waits, five times. If waiting is set, the one
// that leaves is waiting for the slot, ahead of the next one; the slot's owner ends in the same moment.
func measureLeaving(ctx context.Context, addr string, http2, waiting bool) (best time.Duration, err error) {
	target := protocols.Target{Addr: addr, Host: "x", HTTP2: http2}
	best = time.Hour
	for range 5 {
		leave, err := target.Occupy(ctx)
		if err != nil {
			return 0, err
		}
		owner := func() {}
		if waiting {
			owner = leave
			var stop context.CancelFunc
			var stay context.Context
			stay, stop = context.WithCancel(ctx)
			go target.Get(stay, "/hang") // would keep the slot if it were let in
			time.Sleep(20 * time.Millisecond)
			leave = stop
		}
		next := make(chan error, 1)
		go func() { next <- target.Get(ctx, "/echo") }()
		time.Sleep(20 * time.Millisecond) // it waits
		select {
		case err := <-next:
			leave()
			owner()
			return 0, fmt.Errorf("let in although the slot was taken: %w", err)
		default:
		}
		begin := time.Now()
		leave()
		owner()
		if err := <-next; err != nil {
			return 0, fmt.Errorf("the next one, after %v: %w", time.Since(begin), err)
		}
		best = min(best, time.Since(begin))
	}
	return best, nil
}
