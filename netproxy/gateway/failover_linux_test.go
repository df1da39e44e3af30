package gateway

import (
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/ctsync"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// TestFailover is every way for a whole member to fail, with two tenants who have the same addresses, and the return of the old one.
func TestFailover(t *testing.T) {
	key := t.TempDir() + "/key"
	if err := os.WriteFile(key, []byte("a secret of the two nodes"), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLab(t)
	l.a.cfg.KeyFile, l.b.cfg.KeyFile = key, key
	one, two := l.vpc(1), l.vpc(2)
	fn1, fn2 := l.function(one, "100.64.0.10"), l.function(two, "100.64.0.10")
	l.up()
	for _, f := range []struct {
		name     string
		do, mend func()
	}{
		{"all links", func() { l.a.cables(false) }, func() { l.a.cables(true) }},
		{"link of one ENI", func() { l.a.vpcPort(1, false) }, func() { l.a.vpcPort(1, true) }},
		{"SIGKILL", func() { l.a.cmd.Process.Kill(); <-l.a.ended }, l.a.start},
		{"SIGTERM", func() { l.a.signal(syscall.SIGTERM); <-l.a.ended }, l.a.start},
		{"SIGSTOP", func() { l.a.signal(syscall.SIGSTOP) }, func() { l.a.signal(syscall.SIGCONT) }},
	} {
		t.Run(strings.ReplaceAll(f.name, " ", "-"), func(t *testing.T) {
			l.t = t
			conns1, conns2 := one.open(fn1, 20), two.open(fn2, 20)
			before := inode(t, l.a)
			l.replicated() // what it has not sent yet is lost with it
			f.do()
			began := time.Now()
			eventually(t, 10*time.Second, "b is master", func() bool { return l.b.is(havip.Master) })
			t.Logf("b is master after %s", time.Since(began).Round(time.Millisecond))
			if n := one.kept(conns1, 8*time.Second) + two.kept(conns2, 8*time.Second); n != 40 {
				t.Errorf("%d of 40 connections were kept", n)
			}
			late1, late2 := one.open(fn1, 5), two.open(fn2, 5)
			f.mend()
			l.settled()
			if n := one.kept(conns1, 8*time.Second) + two.kept(conns2, 8*time.Second) + one.kept(late1, 8*time.Second) + two.kept(late2, 8*time.Second); n != 50 {
				t.Errorf("%d of 50 connections were kept when the old master came back", n)
			}
			if after := inode(t, l.a); after != before {
				t.Errorf("the namespace was %d, and is %d: not adopted", before, after)
			}
		})
	}
}

// replicated waits until each node's table has as many open connections as the other's, and nothing is on its way from one to the other: a tenth of a
// second without news. A node that has no time says nothing new either, so that alone would not do.
func (l *lab) replicated() {
	l.t.Helper()
	var last uint64
	quiet := time.Now()
	eventually(l.t, 10*time.Second, "all is replicated", func() bool {
		a, err1 := l.a.ask()
		b, err2 := l.b.ask()
		if err1 != nil || err2 != nil {
			return false
		}
		var sum uint64
		for _, p := range slices.Concat(a.Pairs, b.Pairs) {
			sum += p.Replication.EventsSent + p.Replication.EventsReceived
		}
		if sum != last || !slices.Equal(l.a.open(), l.b.open()) {
			last, quiet = sum, time.Now()
		}
		return time.Since(quiet) >= 100*time.Millisecond
	})
}

// open counts the open connections in the table of each of the node's pairs.
func (n *node) open() (open []int) {
	n.t.Helper()
	for _, p := range n.cfg.Pairs {
		ns, _, err := link.Named(namespacePath(n.cfg.Namespace, p.ID))
		if err != nil {
			n.t.Fatal(err)
		}
		c, err := ctsync.Survey(ns)
		ns.Close()
		if err != nil {
			n.t.Fatal(err)
		}
		open = append(open, c.Open)
	}
	return open
}

// vpcPort pulls the cable of a pair's ENI, at the node's bridge.
func (n *node) vpcPort(id uint32, in bool) {
	if err := n.conn.SetUp(port(id), in); err != nil {
		n.t.Error(err)
	}
}

// inode tells namespaces apart.
func inode(t testing.TB, n *node) uint64 {
	t.Helper()
	st, err := os.Stat(namespacePath(n.cfg.Namespace, 1))
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Ino
}

// TestNothingKeptWithoutReplication is the control of TestFailover: the connections are kept by their replication, and by nothing else.
func TestNothingKeptWithoutReplication(t *testing.T) {
	l := newLab(t)
	no := false
	l.a.cfg.Replicate, l.b.cfg.Replicate = &no, &no
	v := l.vpc(1)
	fn := l.function(v, "100.64.0.10")
	l.up()
	conns := v.open(fn, 20)
	l.a.cables(false)
	eventually(t, 10*time.Second, "b is master", func() bool { return l.b.is(havip.Master) })
	if n := v.kept(conns, 2*time.Second); n != 0 {
		t.Errorf("%d of 20 connections were kept without replication: the other tests show nothing", n)
	}
	if got, err := say(v.open(fn, 1)[0], "new", 5*time.Second); err != nil {
		t.Errorf("a new connection after the failover: %q, %v", got, err)
	}
}

// TestRemove: nothing of a pair is left, its neighbour goes on, and its number can be used again.
func TestRemove(t *testing.T) {
	l := newLab(t)
	one, two := l.vpc(1), l.vpc(2)
	fn1, fn2 := l.function(one, "100.64.0.10"), l.function(two, "100.64.0.11")
	l.alone()
	one.open(fn1, 1)
	conns := two.open(fn2, 5)
	for range 2 {
		pairs := l.a.cfg.Pairs
		l.a.cfg.Pairs = pairs[1:]
		l.a.write()
		l.a.signal(syscall.SIGHUP)
		eventually(t, 10*time.Second, "the pair is gone", func() bool { s, err := l.a.ask(); return err == nil && len(s.Pairs) == 1 })
		eventually(t, 10*time.Second, "its namespace is gone", func() bool {
			_, err := os.Stat(namespacePath(l.a.cfg.Namespace, 1))
			return os.IsNotExist(err)
		})
		for _, dev := range []string{hostDevice(1), port(1)} {
			if there, err := has(l.a.ns, dev); there || err != nil {
				t.Errorf("device %s is left: %v", dev, err)
			}
		}
		if _, err := dial(fn1, "tcp4", serverAddr+":7", 300*time.Millisecond); err == nil {
			t.Error("the function's way is still there")
		}
		if n := two.kept(conns, 5*time.Second); n != 5 {
			t.Errorf("%d of 5 connections of the neighbour were kept", n)
		}
		l.a.cfg.Pairs = pairs
		l.a.write()
		l.a.signal(syscall.SIGHUP)
		eventually(t, 10*time.Second, "the pair is back", func() bool { s, err := l.a.ask(); return err == nil && len(s.Pairs) == 2 })
		one.open(fn1, 1)
	}
	// What a process leaves that the configuration no longer has is taken away by the next one.
	l.a.cmd.Process.Kill()
	<-l.a.ended
	l.a.cfg.Pairs = nil
	l.a.start()
	eventually(t, 10*time.Second, "a is ready", func() bool { return l.a.said("ready") })
	if _, err := os.ReadDir(l.a.cfg.Namespace); err != nil {
		t.Fatal(err)
	}
	if left, err := namespaces(l.a.cfg.Namespace); err != nil || len(left) != 0 {
		t.Errorf("namespaces of pairs %d are left, %v", left, err)
	}
	names, err := l.a.conn.Devices("gw")
	if err != nil || len(names) != 0 {
		t.Errorf("devices %s are left, %v", names, err)
	}
}

// TestHalfMade: a pair whose network is not there leaves nothing behind, is tried again, and does not keep others.
func TestHalfMade(t *testing.T) {
	l := newLab(t)
	l.vpc(1, func(p *Pair) { p.Network.Bridge = "br1" })
	two := l.vpc(2)
	l.a.cfg.Pairs[0].Network.Bridge = "later"
	fn := l.function(two, "100.64.0.10")
	l.a.start()
	eventually(t, 20*time.Second, "the error is said", func() bool { return l.a.said(`no such network device: \"later\"`) })
	if _, err := os.Stat(namespacePath(l.a.cfg.Namespace, 1)); !os.IsNotExist(err) {
		t.Errorf("a namespace of it is left: %v", err)
	}
	if there, err := has(l.a.ns, hostDevice(1)); there || err != nil {
		t.Errorf("its cable is left: %v", err)
	}
	eventually(t, 10*time.Second, "a is master", func() bool { return l.a.is(havip.Master) })
	two.open(fn, 1)
	if err := l.a.conn.AddBridge("later"); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "a is ready", func() bool { return l.a.said("ready 2") })
}

// TestEndsWhilePairsAreMade: of pairs that were not finished when the node was told to end nothing is left, and it ends only then.
func TestEndsWhilePairsAreMade(t *testing.T) {
	l := newLab(t)
	one := l.vpc(1)
	l.a.cfg.ENIDelay = Duration(time.Second) // long after all that the end itself takes
	l.a.cfg.Pairs = nil
	l.a.start()
	eventually(t, 20*time.Second, "a is ready", func() bool { return l.a.said("ready 0") })
	for id := uint32(1); id <= 8; id++ { // as many as are made at once
		p := one.pair
		p.Name, p.ID, p.VPC, p.HAVIPs = fmt.Sprint("vpc", id), id, 1000+tunnel.Key(id), []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, 110 + byte(id)})}
		l.a.cfg.Pairs = append(l.a.cfg.Pairs, p)
	}
	l.a.write()
	l.a.signal(syscall.SIGHUP)
	eventually(t, 20*time.Second, "pairs are being made", func() bool { held, _ := namespaces(l.a.cfg.Namespace); return len(held) == 8 })
	l.a.signal(syscall.SIGTERM)
	select {
	case <-l.a.ended:
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
	if code := l.a.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	held, err := namespaces(l.a.cfg.Namespace)
	names, err2 := l.a.conn.Devices("gw")
	if len(held)+len(names) > 0 || err != nil || err2 != nil {
		t.Errorf("namespaces of pairs %d and devices %s are left, %v, %v", held, names, err, err2)
	}
}

// TestStaleFile: a plain file where a namespace was held before a reboot is no obstacle.
func TestStaleFile(t *testing.T) {
	l := newLab(t)
	v := l.vpc(1)
	path := namespacePath(l.a.cfg.Namespace, 1)
	if err := os.MkdirAll(l.a.cfg.Namespace, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	l.alone()
	v.open(l.function(v, "100.64.0.10"), 1)
	l.a.signal(syscall.SIGTERM)
	<-l.a.ended
	if err := link.Unname(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil || !strings.Contains(fmt.Sprint(err), fs.ErrNotExist.Error()) && !os.IsNotExist(err) {
		t.Errorf("%v", err)
	}
}
