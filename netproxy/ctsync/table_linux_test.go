package ctsync

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
)

func TestMain(m *testing.M) { os.Exit(linktest.Main(m)) }

// kernelIn opens the table of a namespace.
func kernelIn(t *testing.T, ns *link.Namespace, refused *[]unix.Errno) *kernel {
	t.Helper()
	var k *kernel
	err := ns.Do(func() (err error) {
		k, err = openKernel(func(e unix.Errno) { *refused = append(*refused, e) })
		return err
	})
	if err != nil {
		t.Skip("needs connection tracking:", err)
	}
	t.Cleanup(k.close)
	return k
}

// list reads a whole table.
func list(t *testing.T, ns *link.Namespace, k *kernel) map[Key]Entry {
	t.Helper()
	var w walker
	if err := ns.Do(func() (err error) { w, err = k.walk(); return err }); err != nil {
		t.Fatal(err)
	}
	defer w.close()
	all := map[Key]Entry{}
	for more := true; more; {
		var c []Change
		var err error
		if c, more, err = w.next(nil); err != nil {
			t.Fatal(err)
		}
		for _, c := range c {
			all[c.Key] = c.Entry
		}
	}
	return all
}

// TestEntriesSurvive enters connections of all kinds into a kernel's table and reads them back.
func TestEntriesSurvive(t *testing.T) {
	ns := linktest.New(t)
	var refused []unix.Errno
	k := kernelIn(t, ns, &refused)
	client, server, floating := [4]byte{10, 1, 0, 100}, [4]byte{10, 2, 0, 100}, [4]byte{10, 2, 0, 10}
	conn := func(proto uint8, zone, sport, dport uint16) Entry {
		o := Tuple{Src: client, Dst: server, SPort: sport, DPort: dport}
		e := Entry{Key: Key{Zone: zone, Proto: proto, Orig: o}, Reply: o.inverse(proto), Status: assured | seenReply, Timeout: 300, Mark: 7}
		if proto == tcp {
			e.TCP = TCPState{Known: true, State: tcpEstablished, WScaleOrig: 7, WScaleReply: 9, FlagsOrig: 3, FlagsReply: 3}
		}
		return e
	}
	snat := func(e Entry, port uint16) Entry {
		if e.Reply.Dst = floating; e.Proto == icmp {
			e.Reply.SPort = port
		} else {
			e.Reply.DPort = port
		}
		return e
	}
	dnat := conn(tcp, 0, 5000, 80)
	dnat.Reply.Src, dnat.Reply.SPort = [4]byte{10, 3, 0, 1}, 8080
	portOnly := conn(udp, 0, 5001, 53)
	portOnly.Reply.DPort = 6001
	want := []Entry{
		conn(tcp, 0, 4000, 80), snat(conn(tcp, 0, 4001, 80), 40001), snat(conn(udp, 0, 4002, 53), 40002), snat(conn(icmp, 0, 77, 8<<8), 99),
		conn(icmp, 0, 78, 8<<8),
		snat(conn(tcp, 5, 4001, 80), 40003), // as the second, in another zone
		dnat, snat(dnat, 40004), portOnly,
	}
	want[7].Orig.SPort = 5002
	var changes []Change
	for _, e := range want {
		changes = append(changes, Change{Create, e})
	}
	k.apply(changes)
	if len(refused) > 0 {
		t.Fatal(refused)
	}
	got := list(t, ns, k)
	if len(got) != len(want) {
		t.Errorf("%d entries, want %d", len(got), len(want))
	}
	for _, e := range want {
		g := got[e.Key]
		if e.Proto == tcp { // what makes it liberal about windows is added
			e.TCP.FlagsOrig |= tcpFlagBeLiberal
			e.TCP.FlagsReply |= tcpFlagBeLiberal
		}
		if g.Timeout > e.Timeout || g.Timeout < e.Timeout-5 {
			t.Errorf("time-out %d became %d", e.Timeout, g.Timeout)
		}
		if g.Timeout = e.Timeout; g != e {
			t.Errorf("entered %+v\n     read %+v", e, g)
		}
	}

	// The same once more is no news; a change, an end, and another connection in the place of a stray are.
	closing, instead := want[0], snat(want[1], 50001)
	closing.TCP.State = 5
	k.apply([]Change{{Copy, want[2]}, {offer, want[2]}, {Update, closing}, {Create, instead}, {Destroy, want[3].Key.entry()}, {Destroy, want[3].Key.entry()}})
	if len(refused) > 0 {
		t.Fatal(refused)
	}
	got = list(t, ns, k)
	if got[closing.Key].TCP.State != 5 || got[instead.Key].Reply != instead.Reply || len(got) != len(want)-1 {
		t.Errorf("closing %+v\ninstead %+v\n%d entries", got[closing.Key], got[instead.Key], len(got))
	}
	// What is not there is made by an update.
	k.apply([]Change{{Update, want[3]}})
	if got := list(t, ns, k); got[want[3].Key].Reply != want[3].Reply {
		t.Errorf("%+v", got[want[3].Key])
	}
}

// TestLateBeginning: a copy has brought an established connection, and then its whole life so far comes as events, in one go.
func TestLateBeginning(t *testing.T) {
	ns := linktest.New(t)
	var refused []unix.Errno
	k := kernelIn(t, ns, &refused)
	o := Tuple{Src: [4]byte{10, 1, 0, 100}, Dst: [4]byte{10, 2, 0, 100}, SPort: 4000, DPort: 80}
	state := func(s uint8, status uint32) Entry {
		return Entry{Key: Key{Proto: tcp, Orig: o}, Reply: o.inverse(tcp), Status: status, Timeout: 300, TCP: TCPState{Known: true, State: s}}
	}
	sent, received, established := state(1, 0), state(2, seenReply), state(tcpEstablished, seenReply|assured)
	life := []Change{{Create, sent}, {Update, received}, {Update, established}}
	k.apply([]Change{{Copy, established}})
	k.apply(life)
	if got := list(t, ns, k)[established.Key]; got.TCP.State != tcpEstablished || got.Status != established.Status {
		t.Errorf("an established connection is left as %+v", got)
	}
	k.apply(append(life, Change{Destroy, established.Key.entry()}))
	if there(t, ns, k, established.Key) {
		t.Error("a connection that has ended is left")
	}
	if len(refused) > 0 {
		t.Error(refused)
	}
}

func there(t *testing.T, ns *link.Namespace, k *kernel, key Key) bool {
	_, ok := list(t, ns, k)[key]
	return ok
}

func addr4(a, b, c, d byte) netip.Addr { return netip.AddrFrom4([4]byte{a, b, c, d}) }

func (k Key) entry() Entry { return Entry{Key: k} }

// TestReplication runs two sides between two namespaces: entries that one has, and then gets, are on the other; strays go.
func TestReplication(t *testing.T) {
	a, b := linktest.New(t), linktest.New(t)
	linktest.Cable(t, link.End{In: a, Name: "sync"}, link.End{In: b, Name: "sync"})
	linktest.Up(t, a, "sync", "10.9.0.1/24")
	linktest.Up(t, b, "sync", "10.9.0.2/24")
	var refused []unix.Errno
	ka, kb := kernelIn(t, a, &refused), kernelIn(t, b, &refused)
	const many = 20_000
	for n := 0; n < many; n += 50 {
		var c []Change
		for i := n; i < n+50; i++ {
			c = append(c, Change{Create, entry(i)})
		}
		ka.apply(c)
	}
	kb.apply([]Change{{Create, entry(40_000)}, {Create, entry(1 << 16)}}) // strays; the second one has the translated port of entry 0
	sides := [2]*Sync{}
	for i, ns := range []*link.Namespace{a, b} {
		cfg := Config{Device: "sync", Local: addr4(10, 9, 0, 1), Peer: addr4(10, 9, 0, 2), Key: []byte("a secret of the two")}
		if i == 1 {
			cfg.Local, cfg.Peer = cfg.Peer, cfg.Local
		}
		if err := ns.Do(func() (err error) { sides[i], err = New(cfg); return err }); err != nil {
			t.Fatal(err)
		}
		sides[i].SetRole(i == 0, 1)
		run(t, ns, sides[i])
	}
	began := time.Now()
	within(t, 20*time.Second, "b is full and has no stray", func() bool {
		return sides[1].State().Full && sides[1].State().Stats.Swept == 1 && !there(t, b, kb, entry(40_000).Key)
	})
	t.Logf("%d entries copied and compared in %s", many, time.Since(began).Round(time.Millisecond))
	if got := list(t, b, kb); len(got) != many {
		for k, e := range list(t, a, ka) {
			if _, there := got[k]; !there {
				t.Errorf("b lacks %+v", e)
			}
		}
		t.Fatalf("b has %d entries, want %d", len(got), many)
	}
	// Events, through a socket that is not a's own: a hundred come, and then half of them go. (Of what was made before anybody listened,
	// the kernel does not tell the end.)
	var come, gone []Change
	for i := range 100 {
		come = append(come, Change{Create, entry(many + i)})
		if i%2 == 0 {
			gone = append(gone, Change{Destroy, entry(many + i)})
		}
	}
	ka.apply(come)
	within(t, 10*time.Second, "b has what came", func() bool { return len(list(t, b, kb)) == many+100 })
	ka.apply(gone)
	within(t, 10*time.Second, "b lacks what went", func() bool { return len(list(t, b, kb)) == many+50 })
	if s := sides[1].State(); s.Stats.EventsReceived < 150 || s.Stats.Errors > 0 || len(refused) > 0 {
		t.Errorf("%+v, refused %v", s, refused)
	}
	if s := sides[0].State(); s.Stats.EventsReceived > 0 {
		t.Errorf("b sent back what it had from a: %+v", s)
	}
}

// run runs a side in a namespace until the test ends.
func run(t *testing.T, ns *link.Namespace, s *Sync) {
	done := make(chan error, 1)
	go func() { done <- ns.Do(func() error { return s.Run(t.Context()) }) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func within(t *testing.T, d time.Duration, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

func TestOwnConversationsAreNot(t *testing.T) {
	own := map[[4]byte]bool{{10, 9, 0, 1}: true}
	for _, c := range []struct {
		src, dst [4]byte
		local    bool
	}{
		{[4]byte{10, 9, 0, 1}, [4]byte{10, 9, 0, 2}, true},
		{[4]byte{10, 9, 0, 2}, [4]byte{10, 9, 0, 1}, true},
		{[4]byte{127, 0, 0, 1}, [4]byte{127, 0, 0, 1}, true},
		{[4]byte{10, 9, 0, 2}, [4]byte{224, 0, 0, 18}, true},
		{[4]byte{10, 1, 0, 1}, [4]byte{10, 2, 0, 1}, false},
	} {
		e := Entry{Key: Key{Orig: Tuple{Src: c.src, Dst: c.dst}}}
		if e.local(own) != c.local {
			t.Errorf("%v to %v: %t", c.src, c.dst, !c.local)
		}
	}
}
