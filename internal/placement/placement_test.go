package placement

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/thawrun/thaw/api"
)

var t0 = time.Unix(1_700_000_000, 0)

// TestAgainstPlain compares with looking through all nodes: the node that is taken is an emptiest (spread) or a fullest one with room
// (pack), never one without room, a cordoned one or one that has left.
func TestAgainstPlain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		policy := Policy(rapid.IntRange(0, 1).Draw(t, "policy"))
		table := New(policy)
		has, free, closed := map[string]int{}, map[string]int{}, map[string]bool{}
		type placed struct {
			node  string
			units int
		}
		var all []placed
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			name := fmt.Sprint(rapid.IntRange(0, 7).Draw(t, "node"))
			switch rapid.IntRange(0, 7).Draw(t, "what") {
			case 0:
				units := rapid.IntRange(1, 200).Draw(t, "units")
				_, there := free[name]
				if err := table.Add(Node{Name: name, Units: units}); (err != nil) != there {
					t.Fatalf("add %s: %v", name, err)
				} else if err == nil {
					has[name], free[name], closed[name] = units, units, false
				}
			case 1:
				table.Remove(name)
				delete(free, name)
				delete(closed, name)
				kept := all[:0]
				for _, p := range all {
					if p.node != name {
						kept = append(kept, p)
					}
				}
				all = kept
			case 2:
				c := rapid.Bool().Draw(t, "cordon")
				table.Cordon(name, c)
				if _, ok := free[name]; ok {
					closed[name] = c
				}
			case 3:
				if len(all) > 0 {
					i := rapid.IntRange(0, len(all)-1).Draw(t, "which")
					table.Release(all[i].node, all[i].units)
					free[all[i].node] += all[i].units
					all = append(all[:i], all[i+1:]...)
				}
			case 4: // what runs there already counts, whether there is room or not
				units := rapid.IntRange(0, 100).Draw(t, "taken")
				table.Take(name, units)
				if _, ok := free[name]; ok {
					free[name] -= units
					all = append(all, placed{name, units})
				}
				want := ""
				for n, f := range free { // those that it fits into first, then by what is left
					better := want == "" || (has[n] >= units) != (has[want] >= units) && has[n] >= units ||
						(has[n] >= units) == (has[want] >= units) && (f > free[want] || f == free[want] && n < want)
					if !closed[n] && better {
						want = n
					}
				}
				if n := table.Roomiest(units); n != want {
					t.Fatalf("the roomiest for %d is %q, want %q", units, n, want)
				}
			default:
				units := rapid.IntRange(1, 60).Draw(t, "size")
				best := -1
				for n, f := range free {
					if closed[n] || f < units {
						continue
					}
					if best < 0 || policy == Spread && f > best || policy == Pack && f < best {
						best = f
					}
				}
				n, err := table.Place(t0, units)
				if best < 0 {
					if !errors.Is(err, ErrFull) {
						t.Fatalf("placed on %q (%v) although nothing has room", n, err)
					}
					continue
				}
				if err != nil || closed[n] || free[n] != best {
					t.Fatalf("placed on %q (%d free, %v), want one with %d", n, free[n], err, best)
				}
				free[n] -= units
				all = append(all, placed{n, units})
			}
			for n, f := range free {
				if table.Free(n) != f {
					t.Fatalf("%s has %d free, want %d", n, table.Free(n), f)
				}
			}
		}
	})
}

// A node starts so many at once and then at its rate; another one takes what it may not.
func TestStartRate(t *testing.T) {
	table := New(Pack)
	for _, n := range []Node{{Name: "a", Units: 100, StartRate: 10, StartBurst: 5}, {Name: "b", Units: 200, StartRate: 10, StartBurst: 5}} {
		if err := table.Add(n); err != nil {
			t.Fatal(err)
		}
	}
	count := func(now time.Time) (on map[string]int) {
		on = map[string]int{}
		for {
			n, err := table.Place(now, 1)
			if errors.Is(err, ErrBusy) {
				return on
			}
			if err != nil {
				t.Fatal(err)
			}
			on[n]++
		}
	}
	if on := count(t0); on["a"] != 5 || on["b"] != 5 {
		t.Errorf("at once: %v", on)
	}
	if on := count(t0.Add(300 * time.Millisecond)); on["a"] != 3 || on["b"] != 3 {
		t.Errorf("after 300 ms: %v", on)
	}
	if on := count(t0.Add(time.Hour)); on["a"] != 5 || on["b"] != 5 {
		t.Errorf("after an hour: %v", on)
	}
}

func TestUnits(t *testing.T) {
	one := Resources{Memory: 32 << 20, Pids: 16, Descriptors: 64, Ports: 1, Addresses: 1}
	for _, c := range []struct {
		node  Resources
		units int
		what  string
	}{
		{Resources{Memory: 64 << 30, Pids: 32768, Ports: 28000, Addresses: 65000}, 2048, "memory"},
		{Resources{Memory: 64 << 30, Pids: 1600}, 100, "pids"},
		{Resources{Memory: 64 << 30, Addresses: 254}, 254, "addresses"},
		{Resources{}, MaxUnits, ""},
	} {
		if n, what := Units(c.node, one); n != c.units || what != c.what {
			t.Errorf("%+v: %d by %s", c.node, n, what)
		}
	}
}

func TestBadNodes(t *testing.T) {
	table := New(Spread)
	for _, n := range []Node{{Units: 1}, {Name: "a"}, {Name: "a", Units: MaxUnits + 1}, {Name: "a", Units: 1, StartRate: 1}, {Name: "a", Units: 1, StartRate: -1}} {
		if table.Add(n) == nil {
			t.Errorf("%+v was taken", n)
		}
	}
	if _, err := table.Place(t0, 0); err == nil || errors.Is(err, ErrFull) {
		t.Errorf("an instance of nothing: %v", err)
	}
	if _, err := table.Place(t0, MaxUnits+1); !errors.Is(err, ErrFull) {
		t.Errorf("an instance larger than any node: %v", err)
	}
	table.Release("nobody", 3)
}

// BenchmarkPlace places and releases on n nodes that are half full.
func BenchmarkPlace(b *testing.B) {
	for _, n := range []int{10, 1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			table := New(Spread)
			for i := range n {
				if err := table.Add(Node{Name: fmt.Sprint(i), Units: 1000, StartRate: 1e6, StartBurst: 1e6}); err != nil {
					b.Fatal(err)
				}
			}
			now := t0
			ring, at := make([]string, n*20), 0
			b.ReportAllocs()
			for b.Loop() {
				if ring[at] != "" {
					table.Release(ring[at], 1)
				}
				now = now.Add(time.Microsecond)
				name, err := table.Place(now, 1)
				if err != nil {
					b.Fatal(err)
				}
				ring[at] = name
				at = (at + 1) % len(ring)
			}
		})
	}
}

func TestClasses(t *testing.T) {
	type list = map[string]api.Quantity
	for _, c := range []struct {
		requests, limits list
		name             string
		units            int
	}{
		{nil, nil, "tiny", 1},
		{list{"memory": "16Mi"}, nil, "tiny", 1},
		{list{"memory": "17Mi"}, nil, "small", 8},
		{list{"memory": "128Mi"}, list{"memory": "4Gi"}, "small", 8}, // what is requested counts
		{nil, list{"memory": "512Mi"}, "medium", 32},                 // else the limit
		{nil, list{"memory": "1000M"}, "large", 64},
		{list{"memory": "2Gi"}, nil, "xlarge", 128},
		{list{"memory": "2049Mi"}, nil, "xlarge", 256},
		{list{"memory": "7Gi"}, nil, "xlarge", 512},
		{list{"cpu": "100m"}, nil, "tiny", 1},
		{list{"cpu": "0.101"}, nil, "small", 8},
		{list{"cpu": "1"}, nil, "large", 64},
		{nil, list{"cpu": "3"}, "xlarge", 256},
		{list{"memory": "200Mi"}, list{"cpu": "1"}, "large", 64}, // the larger of both
		{list{"memory": "1Ei", "cpu": "1E"}, nil, "xlarge", MaxUnits * 128},
		{list{"memory": "0", "cpu": "nonsense"}, nil, "tiny", 1},
	} {
		rev := &api.Revision{}
		rev.Spec.Containers = []api.Container{{Resources: api.Resources{Requests: c.requests, Limits: c.limits}}}
		if got := ClassOf(rev); got.Name != c.name || got.Units != c.units {
			t.Errorf("requests %v, limits %v: %s with %d units, want %s with %d", c.requests, c.limits, got.Name, got.Units, c.name, c.units)
		}
	}
	for _, c := range Classes {
		if c.Memory != int64(c.Units)*UnitMemory {
			t.Errorf("class %s: %d units are not its %d bytes", c.Name, c.Units, c.Memory)
		}
	}
	if c := ClassOf(&api.Revision{}); c != Classes[0] {
		t.Errorf("without a container: %+v", c)
	}
}
