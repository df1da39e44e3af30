package tunnel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
)

// raw sends whole IPv4 packets from a namespace.
func raw(t testing.TB, ns *link.Namespace) func(to string, packet []byte) {
	t.Helper()
	fd := -1
	in(t, ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	t.Cleanup(func() { unix.Close(fd) })
	return func(to string, packet []byte) {
		t.Helper()
		if err := unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: addr(to).As4()}); err != nil {
			t.Fatal(err)
		}
	}
}

// sink counts what arrives by UDP at port 9 of a server and begins with a word.
type sink struct{ c *net.UDPConn }

func newSink(t testing.TB, ns *link.Namespace) sink {
	t.Helper()
	var c *net.UDPConn
	in(t, ns, func() (err error) { c, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 9}); return err })
	t.Cleanup(func() { c.Close() })
	return sink{c}
}

// got reads until n have arrived, or nothing has for a while.
func (s sink) got(n int, quiet time.Duration) (words []string) {
	b := make([]byte, 2000)
	for len(words) < n {
		_ = s.c.SetReadDeadline(time.Now().Add(quiet))
		k, err := s.c.Read(b)
		if err != nil {
			return words
		}
		words = append(words, string(b[:k]))
	}
	return words
}

// TestSpoofing is what an instance or a host between the nodes may try in order to get into another's VPC. Each attempt is made 20 times,
// next to its control, which does the same with the right to, and arrives.
func TestSpoofing(t *testing.T) {
	l := newLab(t, Ebpf, nil)
	g := l.gateway(Ebpf, "192.0.2.11")
	a, b := g.tenant(1), g.tenant(2)
	atA, atB := newSink(t, a.server), newSink(t, b.server)
	mine, victim := l.instance(1).attach(1), l.instance(2).attach(2)
	l.pairs(1, Pair{ID: 1, Outer: g.at})
	l.pairs(2, Pair{ID: 2, Outer: g.at})
	stranger := linktest.New(t)
	l.under.Plug(t, stranger, "eth0", "192.0.2.66/24")

	fromMe, fromVictim, fromStranger, fromNode := raw(t, mine.ns), raw(t, victim.ns), raw(t, stranger), raw(t, l.host)
	inner := func(src string, word string) []byte { return ipv4(src, serverAt, 17, 0, 0, udp(1, 9, word)) }
	tunnelled := func(outer string, key Key, src, word string) []byte {
		return ipv4(outer, "192.0.2.11", 47, 0, dontFragment, greOf(0x2000, 0x0800, key, inner(src, word)))
	}
	const times = 20
	check := func(what string, try, control func(), counts func() Stats, why Reason) {
		t.Helper()
		before := counts()
		for range times {
			try()
		}
		for range times {
			control()
		}
		words := atB.got(times, 2*time.Second)
		extra := atB.got(1, 50*time.Millisecond)
		tried := slices.ContainsFunc(append(words, extra...), func(w string) bool { return strings.HasPrefix(w, "try") })
		if tried || len(words) != times || len(extra) != 0 {
			t.Errorf("%s: %d arrived and %d more, tried ones among them: %t", what, len(words), len(extra), tried)
		}
		if why == "" {
			return
		}
		if n := counts().Drops[why] - before.Drops[why]; n != times {
			t.Errorf("%s: %d counted as %s, want %d", what, n, why, times)
		}
	}
	member := func() Stats {
		s, err := g.member.Stats()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	honest := func() { fromVictim(serverAt, inner(victim.slot.Inner.String(), "honest")) }
	check("another's address", func() { fromMe(serverAt, inner(victim.slot.Inner.String(), "try")) }, honest, l.stats, Spoofed)
	check("a tunnel packet made inside", func() {
		fromMe("192.0.2.11", tunnelled(mine.slot.Inner.String(), 2, victim.slot.Inner.String(), "try"))
	}, honest, l.stats, "")
	check("a stranger with the victim's key", func() { fromStranger("192.0.2.11", tunnelled("192.0.2.66", 2, victim.slot.Inner.String(), "try")) },
		func() { fromNode("192.0.2.11", tunnelled(workerAt, 2, victim.slot.Inner.String(), "honest")) }, member, Spoofed)
	check("a worker with another's prefix", func() { fromNode("192.0.2.11", tunnelled(workerAt, 2, "100.64.4.1", "try")) },
		func() { fromNode("192.0.2.11", tunnelled(workerAt, 2, victim.slot.Inner.String(), "honest")) }, member, Spoofed)
	check("a key that nobody has", func() { fromNode("192.0.2.11", tunnelled(workerAt, 3, victim.slot.Inner.String(), "try")) },
		func() { fromNode("192.0.2.11", tunnelled(workerAt, 2, victim.slot.Inner.String(), "honest")) }, member, UnknownPeer)
	if err := g.member.SetWorkers(1, nil); err != nil {
		t.Fatal(err)
	}
	check("a worker whose right was taken back", func() { fromNode("192.0.2.11", tunnelled(workerAt, 1, mine.slot.Inner.String(), "try")) },
		honest, member, Spoofed)
	if words := atA.got(1, 50*time.Millisecond); len(words) != 0 {
		t.Errorf("arrived in the VPC of the one who tried: %q", words)
	}

	// Answers: only from a pair of the VPC.
	var c *net.UDPConn
	in(t, victim.ns, func() (err error) { c, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 1}); return err })
	defer c.Close()
	answer := func(from string, key Key, word string) []byte {
		return ipv4(from, workerAt, 47, 0, 0, greOf(0x2000, 0x0800, key, ipv4(serverAt, victim.slot.Inner.String(), 17, 0, 0, udp(9, 1, word))))
	}
	before := l.stats()
	for range times {
		fromStranger(workerAt, answer("192.0.2.66", 2, "try"))
		fromStranger(workerAt, answer("192.0.2.11", 1, "try")) // the VPC has no such instance
	}
	fromStranger(workerAt, answer("192.0.2.11", 2, "control")) // a false outer address passes: the network between the nodes must be trusted
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	word := make([]byte, 100)
	if n, err := c.Read(word); err != nil || string(word[:n]) != "control" {
		t.Errorf("first to arrive: %q, %v", word[:n], err)
	}
	after := l.stats()
	if after.Drops[UnknownPeer]-before.Drops[UnknownPeer] != times || after.Drops[NoInstance]-before.Drops[NoInstance] != times {
		t.Errorf("drops %v, before %v", after.Drops, before.Drops)
	}
}

// TestHundredVPCs: all with the same addresses on both sides, and the same ports. Each function reaches its own tenant's server. The control has all of
// them in one VPC.
func TestHundredVPCs(t *testing.T) {
	n := 100
	if testing.Short() {
		n = 10
	}
	for _, apart := range []bool{true, false} {
		l := newLab(t, Ebpf, nil)
		g := l.gateway(Ebpf, "192.0.2.11")
		right := 0
		var asking []*net.UDPConn
		for i := range n {
			key, number := Key(1), i // the control: one VPC, addresses of their own
			if apart {
				key, number = Key(i+1), 5
			}
			if apart || i == 0 {
				x := g.tenant(key)
				echo(t, x.server, fmt.Sprint(i, " "))
				l.pairs(key, Pair{ID: uint32(key), Outer: g.at})
			}
			asking = append(asking, dialUDP(t, l.instance(number).attach(key).ns, fmt.Sprintf("100.64.%d.%d:4000", number>>8, number&255), serverAt+":7"))
		}
		for i, c := range asking {
			got, err := ask(c, "x", 5*time.Second)
			if err != nil {
				t.Fatal(i, err)
			}
			if got == fmt.Sprint(i, " x") {
				right++
			}
		}
		if want := map[bool]int{true: n, false: 1}[apart]; right != want {
			t.Errorf("apart %t: %d of %d reach their own tenant, want %d", apart, right, n, want)
		}
	}
}

// TestPairsComeAndGo has 200 flows while a pair is added, the old one drained and removed. Without the table of flows none stays.
func TestPairsComeAndGo(t *testing.T) {
	for _, forgetful := range []bool{false, true} {
		t.Run(fmt.Sprint("forgetful=", forgetful), func(t *testing.T) {
			l := newLab(t, Ebpf, func(c *Config) { c.forgetful = forgetful })
			one, two := l.gateway(Ebpf, "192.0.2.11"), l.gateway(Ebpf, "192.0.2.12")
			echo(t, one.tenant(1).server, "1")
			echo(t, two.tenant(1).server, "2")
			first, second := Pair{ID: 1, Outer: one.at}, Pair{ID: 2, Outer: two.at}
			l.pairs(1, first)
			var instances []*inst
			var old []*net.UDPConn
			for i := range 10 {
				instances = append(instances, l.instance(i+1).attach(1))
			}
			flows := func() (list []*net.UDPConn) {
				for i := range 200 {
					list = append(list, dialUDP(t, instances[i%10].ns, "", serverAt+":7"))
				}
				return list
			}
			through := func(list []*net.UDPConn) (byPair [3]int) {
				t.Helper()
				for i, c := range list {
					got, err := ask(c, "x", 5*time.Second)
					if err != nil {
						t.Fatal(i, err)
					}
					byPair[got[0]-'0']++
				}
				return byPair
			}
			want := func(what string, got, want [3]int) {
				t.Helper()
				if got != want {
					t.Errorf("%s: by pair %v, want %v", what, got, want)
				}
			}
			old = flows()
			want("before", through(old), [3]int{0, 200, 0})

			l.pairs(1, first, second)
			fresh := through(flows())
			if fresh[1] == 0 || fresh[2] == 0 {
				t.Errorf("new flows with two pairs: %v", fresh)
			}
			kept := through(old)
			first.Draining = true
			l.pairs(1, first, second)
			if forgetful {
				if kept[1] == 200 {
					t.Error("control: without the table all flows stay, so the test shows nothing")
				}
				want("control: flows while their pair drains", through(old), [3]int{0, 0, 200})
				return
			}
			want("old flows with a second pair", kept, [3]int{0, 200, 0})
			want("old flows while their pair drains", through(old), [3]int{0, 200, 0})
			want("new flows meanwhile", through(flows()), [3]int{0, 0, 200})
			l.pairs(1, second)
			want("flows whose pair is gone", through(old), [3]int{0, 0, 200})
			l.pairs(1)
			if _, err := ask(old[0], "x", 0); err == nil {
				t.Error("a VPC without pairs reaches something")
			}
			if l.stats().Drops[NoPair] == 0 {
				t.Errorf("drops %v", l.stats().Drops)
			}
		})
	}
}

// TestCloseEndsTraffic is the control of TestRestartDoesNotTouchTraffic in netproxy/worker: without pinned maps everything ends with
// the process. It also says that an instance that was detached reaches nothing.
func TestCloseEndsTraffic(t *testing.T) {
	l := newLab(t, Ebpf, nil)
	g := l.gateway(Ebpf, "192.0.2.11")
	echo(t, g.tenant(1).server, "a")
	i := l.instance(1).attach(1)
	l.pairs(1, Pair{ID: 1, Outer: g.at})
	c := dialUDP(t, i.ns, "", serverAt+":7")
	reaches := func(want bool, when string) {
		t.Helper()
		if _, err := ask(c, "x", map[bool]time.Duration{true: 5 * time.Second}[want]); (err == nil) != want {
			t.Errorf("%s: %v", when, err)
		}
	}
	reaches(true, "attached")
	if err := errors.Join(l.worker.Detach(i.slot), l.worker.Detach(i.slot)); err != nil {
		t.Fatal(err)
	}
	reaches(false, "detached")
	i.attach(1)
	reaches(true, "attached again")
	i.attach(2)
	reaches(false, "moved to another VPC")
	i.attach(1)
	reaches(true, "moved back")
	if err := l.worker.Close(); err != nil {
		t.Fatal(err)
	}
	reaches(false, "closed")
}

// TestArguments: what makes no sense is refused with ErrInvalid and changes nothing.
func TestArguments(t *testing.T) {
	l := newLab(t, EbpfIPIP, nil)
	g := l.gateway(EbpfIPIP, "192.0.2.11")
	tenant := g.tenant(1)
	echo(t, tenant.server, "a")
	l.pairs(1, Pair{ID: 1, Outer: g.at})
	i := l.instance(1).attach(1)
	existing, err := g.member.Tenants()
	if err != nil {
		t.Fatal(err)
	}
	w, m := l.worker, g.member
	six := addr("2001:db8::1")
	net1, net2 := netip.MustParsePrefix("100.64.0.0/22"), netip.MustParsePrefix("100.64.1.0/24")
	for name, err := range map[string]error{
		"pair 0":               w.SetPairs(1, []Pair{{Outer: g.at}}),
		"pair IPv6":            w.SetPairs(1, []Pair{{ID: 1, Outer: six}}),
		"pair twice":           w.SetPairs(1, []Pair{{ID: 1, Outer: g.at}, {ID: 1, Outer: addr("192.0.2.12")}}),
		"address twice":        w.SetPairs(1, []Pair{{ID: 1, Outer: g.at}, {ID: 2, Outer: g.at}}),
		"pair of another":      w.SetPairs(2, []Pair{{ID: 1, Outer: addr("192.0.2.12")}}),
		"IPIP without own":     w.SetPairs(2, []Pair{{ID: 2, Outer: g.at}}),
		"key 0":                w.SetPairs(0, nil),
		"attach key 0":         w.Attach(i.slot, 0),
		"attach device 0":      w.Attach(Slot{Inner: i.slot.Inner}, 1),
		"attach IPv6":          w.Attach(Slot{i.slot.Device, six}, 1),
		"tenant key 0":         m.AddTenant(Tenant{0, g.at, existing[0].Host}),
		"tenant IPv6":          m.AddTenant(Tenant{2, six, 1}),
		"tenant's device":      m.AddTenant(Tenant{2, addr("192.0.2.12"), existing[0].Host}),
		"IPIP tenant":          m.AddTenant(Tenant{2, g.at, existing[0].Host + 1}),
		"overlapping prefixes": m.SetWorkers(1, []Peer{{addr(workerAt), net1}, {addr("192.0.2.2"), net2}}),
		"prefix with host":     m.SetWorkers(1, []Peer{{addr(workerAt), netip.MustParsePrefix("100.64.0.1/22")}}),
		"worker IPv6":          m.SetWorkers(1, []Peer{{six, net1}}),
		"VXLAN key":            VXLAN.checkKey(1 << 24),
	} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, cfg := range map[string]Config{
		"driver": {Driver: "smoke", Device: "under", Local: addr(workerAt)}, "device": {Local: addr(workerAt)}, "address": {Device: "under"},
		"IPv6": {Device: "under", Local: six}, "flows": {Device: "under", Local: addr(workerAt), Flows: -1},
		"not pinnable": {Device: "under", Local: addr(workerAt), Pin: t.TempDir()},
	} {
		if err := l.host.Do(func() error { _, err := OpenWorker(cfg); return err }); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got, err := ask(dialUDP(t, i.ns, "", serverAt+":7"), "x", 5*time.Second); err != nil || got != "ax" {
		t.Errorf("after all that: %q, %v", got, err)
	}
	if err := errors.Join(m.RemoveTenant(1, g.at), m.RemoveTenant(1, g.at)); err != nil {
		t.Error(err)
	}
	if _, err := ask(dialUDP(t, i.ns, "", serverAt+":7"), "x", 0); err == nil {
		t.Error("a tenant that was removed answers")
	}
}

// TestAttachWaitsForNobody: not for who is plugging in a device, which may take as long as others keep the kernel's lock of network
// configuration.
func TestAttachWaitsForNobody(t *testing.T) {
	l := newLab(t, Ebpf, nil)
	w := l.worker.(*worker)
	w.connMu.Lock()
	defer w.connMu.Unlock()
	done := make(chan error, 1)
	go func() {
		done <- errors.Join(w.Attach(Slot{1, addr("100.64.0.5")}, 7), w.Detach(Slot{1, addr("100.64.0.5")}))
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("attaching waits for the one who plugs in")
	}
}
