package havip

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/link/linktest"
)

// TestFailures is every way to fail once, with a key, under traffic, and the return of the old master; make bench-havip does it often.
func TestFailures(t *testing.T) {
	l := newLab(t, labOptions{advert: tenMs, replicate: true, key: "a secret of the two"})
	l.serve()
	l.up()
	for _, f := range failures {
		t.Run(strings.ReplaceAll(f.name, " ", "-"), func(t *testing.T) {
			l.t = t
			r := l.fail(20, 50, func() { f.do(l) }, func() { f.mend(l) })
			t.Log(r)
			r.check(t, f.most+slack())
		})
	}
}

// slack is the outage in ms allowed on top where the order of things counts, not the time: in tests, which run beside others, and most where members
// are not on time. make bench-havip allows none.
func slack() int {
	switch {
	case !onTime():
		return 2000
	case os.Getenv("THAW_BENCH_HAVIP") == "":
		return 500
	}
	return 0
}

// onTime: neither does the kernel refuse real-time priority, nor does the race detector slow members down.
func onTime() bool { return !raceDetector && realtimeAllowed() }

// realtimeAllowed says whether members here get real-time priority.
func realtimeAllowed() bool {
	allowed := make(chan bool)
	go func() {
		runtime.LockOSThread() // and end this thread
		allowed <- realtime(1) == nil
	}()
	return <-allowed
}

// TestTwoFailoversInARow: the connections that b took over from a are on a again when b fails, because a copied them before it was master.
func TestTwoFailoversInARow(t *testing.T) {
	l := newLab(t, labOptions{advert: tenMs, replicate: true})
	l.serve()
	l.up()
	conns := l.open(50)
	l.caughtUp()
	l.a.cables(false)
	// What a knew is lost, as in a crash of the machine.
	l.a.member.Process.Kill()
	<-l.a.ended
	flushConntrack(t, l.a)
	within(t, 5*time.Second, "b is master", l.b.master)
	conns = append(conns, l.open(50)...) // a has never seen these
	l.a.cables(true)
	l.a.start()
	l.settled()
	l.a.cables(false)
	within(t, 5*time.Second, "b is master again", l.b.master)
	if n := kept(conns, 8*time.Second); n != 100 {
		t.Errorf("%d of 100 connections lived through two failovers", n)
	}
}

// flushConntrack empties a router's table.
func flushConntrack(t *testing.T, r *router) {
	t.Helper()
	if err := r.ns.Do(flushTable); err != nil {
		t.Fatal(err)
	}
}

// TestSyncLinkAlone: nothing moves when only the replication is cut, and what was opened before is kept in a failover meanwhile.
func TestSyncLinkAlone(t *testing.T) {
	l := newLab(t, labOptions{advert: tenMs, replicate: true})
	l.serve()
	l.up()
	conns := l.open(20)
	l.caughtUp()
	n := l.watched(func() int32 {
		l.a.sync.Cable(true) // the second time
		l.settled()
		before := l.a.changes.Load() + l.b.changes.Load()
		l.a.sync.Cable(false)
		time.Sleep(aloneAfter + 100*time.Millisecond)
		return l.a.changes.Load() + l.b.changes.Load() - before
	})
	if n != 0 {
		t.Errorf("%d changes of role after the replication was cut", n)
	}
	l.a.cables(false)
	within(t, 5*time.Second, "b is master", l.b.master)
	if n := kept(conns, 8*time.Second); n != 20 {
		t.Errorf("%d of 20 connections were kept", n)
	}
}

// TestLateSwitch: the switch has a carrier for the old master long before it forwards. The old master hears nothing and must not take that
// for the death of the peer.
func TestLateSwitch(t *testing.T) {
	for _, replicate := range []bool{true, false} {
		l := newLab(t, labOptions{advert: tenMs, replicate: replicate})
		l.serve()
		l.up()
		talking := talk(l.open(20))
		if replicate {
			l.caughtUp()
		}
		l.a.cables(false)
		within(t, 5*time.Second, "b is master", l.b.master)
		time.Sleep(300 * time.Millisecond)
		before := l.a.changes.Load()
		for _, p := range []*linktest.Port{l.a.under, l.a.eni, l.a.sync} {
			p.Forward(false)
			p.Cable(true)
		}
		within(t, 5*time.Second, "a has links", func() bool { return l.a.is(Backup) })
		time.Sleep(500 * time.Millisecond)
		if n := l.a.changes.Load() - before; n != 1 || !l.a.is(Backup) {
			t.Errorf("replicate %t: a changed its role %d times while it heard nothing", replicate, n)
		}
		for _, p := range []*linktest.Port{l.a.under, l.a.eni, l.a.sync} {
			p.Forward(true)
		}
		l.settled()
		time.Sleep(300 * time.Millisecond)
		if alive, _ := talking.stop(); replicate && alive != 20 {
			t.Errorf("%d of 20 connections lived", alive)
		}
	}
}

func TestNoFlowsWithoutReplication(t *testing.T) {
	l := newLab(t, labOptions{advert: tenMs})
	l.serve()
	l.up()
	conns := l.open(50)
	l.a.cables(false)
	within(t, 5*time.Second, "b is master", l.b.master)
	time.Sleep(100 * time.Millisecond)
	if n := kept(conns, time.Second); n != 0 {
		t.Errorf("%d of 50 connections were kept without replication: the other tests show nothing", n)
	}
	if n := kept(l.open(10), time.Second); n != 10 {
		t.Errorf("%d of 10 new connections work after the failover", n)
	}
}

// TestNoFalseFailover runs twice as many busy loops as there are processors.
func TestNoFalseFailover(t *testing.T) {
	if !realtimeAllowed() {
		t.Skip("needs real-time priority (root, or CAP_SYS_NICE)")
	}
	l := newLab(t, labOptions{advert: tenMs, replicate: true})
	l.up()
	if n := l.watched(func() int32 { return l.changesUnderLoad(2 * time.Second) }); n != 0 {
		t.Errorf("%d changes of role with nothing wrong", n)
	}
}

// changesUnderLoad counts changes of role while busy loops run.
func (l *lab) changesUnderLoad(d time.Duration) int32 {
	l.t.Helper()
	before := l.a.changes.Load() + l.b.changes.Load()
	for range 2 * runtime.NumCPU() {
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), memberEnv+"=busy")
		if err := c.Start(); err != nil {
			l.t.Fatal(err)
		}
		defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	}
	time.Sleep(d)
	return l.a.changes.Load() + l.b.changes.Load() - before
}

// TestForeignKey: members with different keys do not believe each other: both are masters, neither takes the other's connections.
func TestForeignKey(t *testing.T) {
	l := newLab(t, labOptions{advert: tenMs, replicate: true, key: "a secret of the two"})
	l.b.cfg.Key = []byte("another secret of it")
	l.a.start()
	l.b.start()
	within(t, 10*time.Second, "both are masters", func() bool { return l.a.master() && l.b.master() })
	within(t, 10*time.Second, "both count what they refused", func() bool {
		a, err1 := l.a.ask()
		b, err2 := l.b.ask()
		return err1 == nil && err2 == nil && a.Refused > 0 && b.Refused > 0 && a.Replicate.Refused > 0 && b.Replicate.Refused > 0
	})
}

// TestBadStart: what a member cannot work with is one error that says what.
func TestBadStart(t *testing.T) {
	l := newLab(t, labOptions{advert: tenMs, replicate: true})
	for _, c := range []struct {
		name, want string
		change     func(*Config)
	}{
		{"device", `no such network device: "eth7"`, func(c *Config) { c.VIPs[1].Device = "eth7" }},
		{"sync device", "sync eth7, 10.9.0.1 to 10.9.0.2", func(c *Config) { c.Sync.Device = "eth7" }},
		{"sync address", "sync sync, 10.9.0.77 to 10.9.0.2", func(c *Config) { c.Sync.Local = addr("10.9.0.77") }},
		{"no own address", `device "lo2" has no address of its own`, func(c *Config) { c.VIPs = []VIP{{c.VIPs[0].Prefix, "lo2"}} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := l.a.cfg
			cfg.VIPs = append([]VIP(nil), cfg.VIPs...)
			cfg.Status = ""
			c.change(&cfg)
			if c.name == "no own address" {
				plugBare(t, l.a, "lo2")
			}
			err := l.a.ns.Do(func() error { return Run(t.Context(), cfg) })
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
