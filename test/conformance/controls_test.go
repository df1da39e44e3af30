package conformance

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/harness"
)

// changed builds the queue-proxy from other sources and starts it with one slot.
func changed(t *testing.T, upstream string, changes ...harness.Change) (addr string) {
	t.Helper()
	dir, err := harness.BuildChanged(changes, "cmd/queueproxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return hopOf(t, dir, "queueproxy", "--listen", "127.0.0.1:0", "--upstream", upstream, "--upstream-protocol", "h1", "--concurrency", "1")
}

// The control of TestClientLeaves: a queue-proxy that does not look whether its clients are still there, nor hears from a stream that it ended.
func TestNobodyLooks(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(serveHTTP(ln))
	addr := changed(t, ln.Addr().String(),
		harness.Change{File: "internal/front/gone.go", Old: "case c.raw == nil:", New: "case true:"},
		harness.Change{File: "internal/h2/stream.go", Old: "s.watcher, s.left = nil, true\n\t\t\tw.Cancel()", New: "s.watcher = nil"},
		harness.Change{File: "internal/h2/stream.go", Old: "func (s *Stream) Gone() bool { return s.Err() != nil }", New: "func (s *Stream) Gone() bool { return false }"})
	for _, http2 := range []bool{false, true} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*leaveWithin)
		best, err := measureLeaving(ctx, addr, http2, false)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("HTTP/2 %v: free after %v (%v), although nobody looks", http2, best, err)
		}
	}
}

// The control of TestLargeBodies: a queue-proxy that takes the whole answer before it passes it on.
func TestBodyKept(t *testing.T) {
	const size = 64 << 20
	addr := changed(t, bodyFunction(t, size), harness.Change{File: "internal/forward/body.go", Old: "func (b *body) WriteTo(w io.Writer) (int64, error) {",
		New: "func (b *body) WriteTo(w io.Writer) (int64, error) {\nif all, err := io.ReadAll(b); true { n, _ := w.Write(all); return int64(n), err }"})
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	grown := growth(t, []string{addr}, func() {
		if err := sendBody(t.Context(), tr, addr, "/down", 0, size); err != nil {
			t.Error(err)
		}
	})
	if grown[0] <= mayGrow {
		t.Errorf("memory grew by %v KiB only, although the whole body was kept", grown)
	}
}

// workers is a server as they were once: so many connections are served at a time, each by one worker until it ends.
func workers(t *testing.T, to string, n int) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	for range n {
		go func() {
			for {
				in, err := ln.Accept()
				if err != nil {
					return
				}
				if out, err := net.Dial("tcp", to); err == nil {
					go func() { io.Copy(out, in); out.(*net.TCPConn).CloseWrite() }()
					io.Copy(in, out)
					out.Close()
				}
				in.Close()
			}
		}()
	}
	return ln.Addr().String()
}

// The control of TestGoodAmongBad: half-sent requests have all of 256 workers.
func TestGoodWaitsForWorkers(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(serveHTTP(ln))
	addr := workers(t, ln.Addr().String(), 256)
	if _, err := goodGet(addr, limit); err != nil {
		t.Fatal(err)
	}
	sendHalf(t, addr)
	if took, err := goodGet(addr, time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("answered after %v (%v), although no worker was free", took, err)
	}
}
