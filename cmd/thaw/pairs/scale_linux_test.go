package pairs

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/havip"
)

// addrs are addresses of a subnet.
func addrs(last ...byte) (list []netip.Addr) {
	for _, b := range last {
		list = append(list, netip.AddrFrom4([4]byte{10, 0, 1, b}))
	}
	return list
}

func TestHAVIPsAreDealtOut(t *testing.T) {
	p := reconcile.Pair{Namespace: "default", Name: "a", ID: 7, HAVIPs: addrs(9, 8, 7), Most: 2, Public: map[netip.Addr]netip.Addr{addrs(8)[0]: netip.MustParseAddr("203.0.113.7")}}
	for k, want := range []string{
		"default/a 192.0.2.1 [10.0.1.9 10.0.1.7] map[]",
		"default/a/1 192.0.2.101 [10.0.1.8] map[10.0.1.8:203.0.113.7]",
	} {
		g := pairOf(p, k, 7)
		if got := fmt.Sprint(g.Name, " ", g.Outer, " ", g.HAVIPs, " ", g.EIPs); got != want {
			t.Errorf("pair %d: %s, want %s", k, got, want)
		}
		if namespace, name, n := split(g.Name); namespace != "default" || name != "a" || n != k {
			t.Errorf("%s is %s, %s, %d", g.Name, namespace, name, n)
		}
	}
}

// TestPairsComeAndGo: one at a time; one that drains is told to the workers, then refuses, and goes when it is empty.
func TestPairsComeAndGo(t *testing.T) {
	m := New(Config{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler), Policy: gateway.Policy{OutAfter: time.Second, InAfter: time.Second}})
	spec := reconcile.Pair{Namespace: "default", Name: "a", ID: 7, Key: 1, HAVIPs: addrs(9, 8, 7), Most: 3}
	if err := m.setLocked(spec); err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1000, 0)
	load, drained, away := 0.0, false, false
	var said [2]answer
	// step is a second later; it returns the states of the pairs, by their last bytes.
	step := func() string {
		for i := range said {
			said[i] = answer{Status: gateway.Status{Role: havip.Backup}}
			for _, x := range m.pairs {
				if x.ID > LastFirst && i == 1 && away {
					continue
				}
				s := gateway.PairStatus{ID: x.ID, Link: true, Load: gateway.Load{Bits: load}}
				if i == 0 && x.Draining {
					s.Drained = drained
				}
				said[i].Pairs = append(said[i].Pairs, s)
			}
		}
		said[0].Role = havip.Master
		m.rescaleLocked(m.groups[7], now, said)
		now = now.Add(time.Second)
		var all []string
		for _, p := range m.listLocked(spec, said) {
			s := p.HAVIPs[0][len("10.0.1."):] + " " + p.State
			if m.pairs[uint32(p.ID)].Draining {
				s += "!"
			}
			all = append(all, s)
		}
		return strings.Join(all, ", ")
	}
	until := func(want string) {
		t.Helper()
		got := ""
		for range 10 {
			if got = step(); got == want {
				return
			}
		}
		t.Fatalf("%s, want %s", got, want)
	}
	const active, creating, draining = api.PairActive, api.PairCreating, api.PairDraining
	until("9 " + active)
	load = 0.9
	until("9 " + active + ", 8 " + creating)
	away = true
	for range 10 {
		if got := step(); got != "9 "+active+", 8 "+creating {
			t.Fatalf("%s while a node is away", got)
		}
	}
	away = false
	until("9 " + active + ", 8 " + active + ", 7 " + creating)
	until("9 " + active + ", 8 " + active + ", 7 " + active)
	away = true // as in a failover
	until("9 " + active + ", 8 " + active + ", 7 " + active)
	away = false
	for range 10 {
		if got := step(); strings.Count(got, ",") > 2 {
			t.Fatalf("more than it may have: %s", got)
		}
	}
	load = 0
	until("9 " + active + ", 8 " + active + ", 7 " + draining)
	m.groups[7].told = now // by the clock of this test
	for range int(toldAfter / time.Second) {
		if got := step(); strings.Contains(got, "!") {
			t.Fatalf("it refuses before workers can know: %s", got)
		}
	}
	until("9 " + active + ", 8 " + active + ", 7 " + draining + "!")
	for range 10 {
		if got := step(); !strings.HasSuffix(got, "!") {
			t.Fatalf("%s with connections", got)
		}
	}
	// Another process knows it by the configuration.
	m.groups[7] = &group{}
	if err := m.setLocked(spec); err != nil || m.groups[7].leaving != 2 {
		t.Fatal(m.groups[7], err)
	}
	drained = true
	until("9 " + active + ", 8 " + active)
}
