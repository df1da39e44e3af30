package gateways

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/netproxy/gateway"
)

func pair(id uint32, nodes ...string) reconcile.Pair {
	return reconcile.Pair{Namespace: "default", Name: fmt.Sprint("gw", id), ID: id, Key: 100 + id, CIDR: netip.MustParsePrefix("10.0.1.0/24"),
		ENI: api.ENI{Bridge: "br0"}, HAVIPs: []netip.Addr{netip.MustParseAddr("10.0.1.254")}, Nodes: nodes}
}

// says writes what a node would.
func says(t *testing.T, s state.Store, group, name string, pairs ...half) {
	t.Helper()
	b, err := json.Marshal(record{Name: name, Driver: "ebpf", MTU: 1472, Role: "backup", Pairs: pairs})
	if err == nil {
		_, err = s.Put(t.Context(), nodesRoot+group+"/"+name, b, state.Any)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A pair goes to the complete group with the fewest, or to the nodes that it names, and stays there.
func TestChoice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := state.Memory()
		defer s.Close()
		n := NewNetwork(s)
		if _, err := n.EnsurePair(t.Context(), pair(1)); err == nil || !strings.Contains(err.Error(), "no two gateway nodes are there") {
			t.Errorf("without nodes: %v", err)
		}
		says(t, s, "192.0.2.1", "a")
		if _, err := n.EnsurePair(t.Context(), pair(1)); err == nil {
			t.Error("half a group has a pair")
		}
		says(t, s, "192.0.2.1", "b")
		says(t, s, "192.0.2.9", "c")
		says(t, s, "192.0.2.9", "d")
		group := func(p reconcile.Pair) string {
			t.Helper()
			st, err := n.EnsurePair(t.Context(), p)
			if err != nil {
				t.Error(err)
			}
			if len(st.Members) != 2 || st.Members[0].State != api.PairCreating || st.MTU != 1472 || st.Driver != "ebpf" {
				t.Errorf("%+v", st)
			}
			return st.Address.String()
		}
		for _, c := range []struct {
			p    reconcile.Pair
			want string
		}{{pair(1), "192.0.2.1"}, {pair(2), "192.0.2.9"}, {pair(3, "d", "c"), "192.0.2.9"}, {pair(4), "192.0.2.1"}, {pair(3, "d", "c"), "192.0.2.9"}, {pair(2), "192.0.2.9"}} {
			if got := group(c.p); got != c.want {
				t.Errorf("pair %d went to %s, want %s", c.p.ID, got, c.want)
			}
		}
		if _, err := n.EnsurePair(t.Context(), pair(5, "a", "c")); err == nil || !strings.Contains(err.Error(), "a and c") {
			t.Errorf("nodes of two groups: %v", err)
		}
		all, err := n.Pairs(t.Context())
		if err != nil || len(all) != 4 || fmt.Sprint(all[0]) != fmt.Sprint(pair(1)) {
			t.Errorf("%v %v", all, err)
		}
	})
}

// A pair is active once both nodes say so, and removed once none has it any more.
func TestMakeAndRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := state.Memory()
		defer s.Close()
		n := NewNetwork(s)
		const group = "192.0.2.1"
		says(t, s, group, "a", half{ID: 7, Message: "no bridge"})
		says(t, s, group, "b")
		st, err := n.EnsurePair(t.Context(), pair(7))
		if err != nil || st.Members[0].State != api.PairCreating || st.Members[0].Message != "no bridge" {
			t.Errorf("%+v %v", st, err)
		}
		go func() {
			time.Sleep(time.Second)
			says(t, s, group, "a", half{ID: 7, Active: true})
			says(t, s, group, "b", half{ID: 7, Active: true})
		}()
		begin := time.Now()
		st, err = n.EnsurePair(t.Context(), pair(7))
		if d := time.Since(begin); err != nil || d < time.Second || d > time.Second+poll || st.Members[0].State != api.PairActive || st.Members[1].State != api.PairActive {
			t.Errorf("after %v: %+v %v", d, st, err)
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.RemovePair(short, pair(7)); err == nil || !strings.Contains(err.Error(), "does not let go") {
			t.Errorf("both nodes have it: %v", err)
		}
		says(t, s, group, "a")
		if _, err := s.Delete(t.Context(), nodesRoot+group+"/b", state.Any); err != nil { // the node is gone
			t.Fatal(err)
		}
		for range 2 { // the second time there is nothing
			if err := n.RemovePair(t.Context(), pair(7)); err != nil {
				t.Error(err)
			}
		}
		if all, err := n.Pairs(t.Context()); err != nil || len(all) != 0 {
			t.Errorf("%v %v", all, err)
		}
	})
}

func testNode() *node {
	cfg, err := gateway.Parse([]byte("{name: a, device: lo, outer: [192.0.2.1/24], priority: 200, sync: 'lo,127.0.0.1,127.0.0.2', pairs: []}"))
	if err != nil {
		panic(err)
	}
	return &node{log: slog.New(slog.DiscardHandler), cfg: cfg, again: make(chan struct{}, 1)}
}

// What a node cannot use of the state's is left out, and keeps nothing else from being used.
func TestBadState(t *testing.T) {
	n := testNode()
	good, bad := pair(1), pair(2)
	bad.CIDR = netip.MustParsePrefix("100.64.0.0/24")
	enc := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	n.setPairs(map[string][]byte{"1": enc(good), "2": enc(bad), "3": []byte("{")})
	n.setWorkers(map[string][]byte{
		"a": enc(gateway.Worker{Outer: netip.MustParseAddr("192.0.2.11"), Prefix: netip.MustParsePrefix("100.64.0.0/22")}),
		"b": enc(gateway.Worker{Outer: netip.MustParseAddr("192.0.2.12"), Prefix: netip.MustParsePrefix("100.64.1.0/24")}),
		"c": enc(gateway.Worker{Outer: netip.MustParseAddr("192.0.2.13"), Prefix: netip.MustParsePrefix("10.0.0.0/24")}),
		"d": []byte("x"),
	})
	cfg, err := n.filled(n.cfg)
	if err != nil || len(cfg.Pairs) != 1 || cfg.Pairs[0].ID != 1 || len(cfg.Workers) != 1 {
		t.Errorf("%+v %v", cfg, err)
	}
	r := n.record(func() (gateway.Status, error) {
		return gateway.Status{Pairs: []gateway.PairStatus{{ID: 1, Link: true}}}, nil
	})
	if len(r.Pairs) != 2 || !r.Pairs[0].Active || r.Pairs[1].ID != 2 || !strings.Contains(r.Pairs[1].Message, "overlaps the instances'") {
		t.Errorf("%+v", r)
	}
}

func FuzzState(f *testing.F) {
	b, _ := json.Marshal(pair(1))
	f.Add(b)
	f.Add([]byte(`{"Outer":"192.0.2.11","Prefix":"100.64.0.0/22"}`))
	f.Add([]byte(`{"ID":4294967295,"HAVIPs":["::1"],"Public":{"10.0.1.254":""}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := testNode()
		n.setPairs(map[string][]byte{"1": b})
		n.setWorkers(map[string][]byte{"1": b})
		if _, err := n.filled(n.cfg); err != nil {
			t.Errorf("what was let through cannot be used: %v", err)
		}
	})
}

// Addresses of a live node are its own, those of one that is gone can be taken.
func TestJoin(t *testing.T) {
	s := state.Memory()
	defer s.Close()
	var live []string
	join := func(name, prefix string) error {
		return Join(t.Context(), s, name, gateway.Worker{Outer: netip.MustParseAddr("192.0.2.11"), Prefix: netip.MustParsePrefix(prefix)},
			func(context.Context) (map[string]string, error) {
				m := map[string]string{}
				for _, l := range live {
					m[l] = "x"
				}
				return m, nil
			})
	}
	names := func() (all []string) {
		kvs, _, err := s.List(t.Context(), workersRoot)
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range kvs {
			all = append(all, strings.TrimPrefix(kv.Key, workersRoot))
		}
		return all
	}
	for _, prefix := range []string{"100.64.0.0/22", "100.64.0.0/22"} { // again after a restart
		if err := join("one", prefix); err != nil {
			t.Fatal(err)
		}
	}
	live = []string{"one"}
	if err := join("two", "100.64.1.0/24"); err == nil || !strings.Contains(err.Error(), "overlap 100.64.0.0/22 of the node one") {
		t.Errorf("got %v", err)
	}
	if err := join("two", "100.64.4.0/22"); err != nil || !slices.Equal(names(), []string{"one", "two"}) {
		t.Errorf("%v %v", err, names())
	}
	live = nil
	if err := join("three", "100.64.0.0/21"); err != nil || !slices.Equal(names(), []string{"three"}) {
		t.Errorf("%v %v", err, names())
	}
}
