package conformance

import (
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/harness"
)

// An upstream that takes no connections for a while is waited for by hops that know no other: its queue of them is full, so the kernel leaves those
// that come unanswered. The activator, which may know others, dials for a second at a time, and waits too.
func TestFullAcceptQueue(t *testing.T) {
	t.Parallel()
	for _, h := range []struct {
		name string
		hop  func(upstream string) string
	}{
		{"router", func(upstream string) string { return routerTo(t, upstream) }},
		{"queueproxy", func(upstream string) string { return queueProxy(t, upstream, false) }},
		{"activator", func(upstream string) string { return activatorTo(t, upstream, false) }},
	} {
		t.Run(h.name, func(t *testing.T) {
			ln := takesNothing(t)
			addr := h.hop(ln.Addr().String())
			got := make(chan error, 1)
			go func() {
				_, err := goodGet(addr, 3*limit)
				got <- err
			}()
			select {
			case err := <-got:
				t.Fatalf("an answer, although the upstream takes nothing: %v", err)
			case <-time.After(2500 * time.Millisecond): // longer than a dial that has others to go to
			}
			t.Cleanup(serveHTTP(ln))
			if err := <-got; err != nil {
				t.Error(fmt.Errorf("the upstream takes connections again: %w", err))
			}
		})
	}
}

// The control: a queue-proxy that gives up after a second.
func TestFullAcceptQueueGivenUp(t *testing.T) {
	t.Parallel()
	addr := changed(t, takesNothing(t).Addr().String(),
		harness.Change{File: "internal/forward/forward.go", Old: "LoneDialTimeout = 10 * time.Second", New: "LoneDialTimeout = time.Second"})
	if _, err := goodGet(addr, limit); err == nil || !strings.Contains(err.Error(), " 502 ") {
		t.Errorf("got %v, want 502", err)
	}
}

// takesNothing listens, and lets no connection through: its queue of them is full.
func takesNothing(t *testing.T) net.Listener {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	ln, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	for range 3 {
		nc, err := net.DialTimeout("tcp", ln.Addr().String(), 200*time.Millisecond)
		if err != nil {
			return ln
		}
		t.Cleanup(func() { nc.Close() })
	}
	t.Fatal("the queue of connections does not get full")
	return nil
}
