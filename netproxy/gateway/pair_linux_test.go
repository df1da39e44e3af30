package gateway

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/netproxy/havip"
)

// realtimeAllowed says whether nodes here get real-time priority.
func realtimeAllowed() bool {
	allowed := make(chan bool)
	go func() {
		runtime.LockOSThread() // and end this thread
		allowed <- unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0) == nil
	}()
	return <-allowed
}

// TestPair is the way of a function into its VPC and back, and what does not get through it.
func TestPair(t *testing.T) {
	l := newLab(t)
	v := l.vpc(1)
	fn := l.function(v, "100.64.0.10")
	l.up()
	for _, network := range []string{"tcp4", "udp4"} {
		c, err := dial(fn, network, serverAddr+":7", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got, err := say(c, "hello", 5*time.Second); err != nil || got != "vpc1 10.0.0.111 hello" {
			t.Errorf("%s: %q, %v", network, got, err)
		}
	}
	// The VPC hears nothing of who has no business there: neither an answer nor a refusal, of either member.
	dropped := func() uint64 { return l.a.pair(1).Packets[countInbound] + l.b.pair(1).Packets[countInbound] } // on a busy machine b may be master for a moment
	before := dropped()
	if _, err := dial(v.server, "tcp4", "10.0.0.111:22", time.Second); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("connection to the HAVIP: %v", err)
	}
	if dropped() <= before {
		t.Error("what was dropped is not counted")
	}
	if _, err := dial(fn, "tcp4", "169.254.1.2:22", time.Second); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("connection of a function to the gateway itself: %v", err)
	}
	if s, err := l.b.ask(); err != nil || s.Role != havip.Backup {
		t.Errorf("%+v, %v", s, err)
	}
}
