package remote

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// undecided decides nothing: the test does.
type undecided struct{}

func (undecided) SetRevision(*api.Revision)     {}
func (undecided) RemoveRevision(api.RevisionID) {}
func (undecided) Forget(api.RevisionID)         {}
func (undecided) Observe(*endpoints.Snapshot)   {}
func (undecided) Demand(endpoints.Demand)       {}
func (undecided) Report([]endpoints.Stat)       {}
func (undecided) Calls([]endpoints.Call)        {}

func (undecided) Shift(_, _ api.RevisionID, _ float64) bool { return false }

// decided is a replica whose decisions are the test's.
func decided(t *testing.T) *replica {
	r := newReplica(t, "127.0.0.1:0")
	r.SetDecider(undecided{})
	r.SetRevision(rev)
	r.ownAll(1)
	return r
}

// nodeAt is a node agent with a name and room for so many instances.
func nodeAt(t *testing.T, name string, capacity int, r *replica) (*node, func()) {
	t.Helper()
	n := &node{}
	n.client = NewClient(ClientConfig{Name: name, Agent: n, Capacity: capacity})
	n.client.SetMembers(map[string]string{"r": r.addr})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.client.Run(ctx) }()
	stop := func() { cancel(); <-done }
	t.Cleanup(stop)
	eventually(t, name+" is there", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		x := r.nodes.named[name]
		return x != nil && x.alive && !slices.Contains(x.told[:], 0)
	})
	return n, stop
}

func counts(nodes ...*node) (out []int) {
	for _, n := range nodes {
		out = append(out, n.has())
	}
	return out
}

// Instances go where there is room, evenly; fewer of them come from the node with the most; a node that is lost is replaced, and one that comes back
// gives up what others have.
func TestSpread(t *testing.T) {
	t.Parallel()
	r := decided(t)
	a, _ := nodeAt(t, "a", 10, r)
	b, _ := nodeAt(t, "b", 10, r)
	c, stop := nodeAt(t, "c", 10, r)
	want := func(what string, numbers ...int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%s: %v", what, numbers), func() bool { return slices.Equal(counts(a, b, c), numbers) })
	}
	r.Scale(rev.ID(), 9, time.Now())
	want("nine", 3, 3, 3)
	r.Scale(rev.ID(), 4, time.Now())
	eventually(t, "four", func() bool { n := counts(a, b, c); return slices.Max(n) == 2 && n[0]+n[1]+n[2] == 4 })
	r.Scale(rev.ID(), 9, time.Now())
	want("nine again", 3, 3, 3)
	stop()
	eventually(t, "the others have nine", func() bool { n := counts(a, b); return n[0]+n[1] == 9 })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.client.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	eventually(t, "who is back gives up what others have", func() bool { return c.has() == 0 })
	r.Scale(rev.ID(), 0, time.Now())
	want("none", 0, 0, 0)
}

// What a node has no room for goes to another.
func TestFullNode(t *testing.T) {
	t.Parallel()
	r := decided(t)
	a, _ := nodeAt(t, "a", 100, r)
	b, _ := nodeAt(t, "b", 5, r)
	r.Scale(rev.ID(), 6, time.Now())
	eventually(t, "all on the roomy one", func() bool { return slices.Equal(counts(a, b), []int{6, 0}) })
	s := &endpoints.Snapshot{Revision: rev.ID(), Sequence: 1000, Desired: 6, Failure: &endpoints.Failure{Reason: reasonNodeFull, At: time.Now()}}
	for i := range 4 {
		s.Instances = append(s.Instances, endpoints.Instance{ID: fmt.Sprint(i), Revision: rev.ID(), State: endpoints.Ready})
	}
	a.client.Observe(s) // it has less room than it said
	eventually(t, "two went elsewhere", func() bool { return slices.Equal(counts(a, b), []int{4, 2}) })
}

// A node that was ended in order and started again before it is missed has nothing of what it had: it is ordered anew. One whose stream alone
// broke off keeps what it has.
func TestNodeStartedAgain(t *testing.T) {
	t.Parallel()
	r := decided(t)
	a, stop := nodeAt(t, "a", 10, r)
	r.Scale(rev.ID(), 3, time.Now())
	eventually(t, "three", func() bool { return a.has() == 3 })
	eventually(t, "they are seen", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		s := r.nodes.seen.Of(rev.ID())
		return s != nil && len(s.Instances) == 3
	})
	stop()
	again, _ := nodeAt(t, "a", 10, r)
	eventually(t, "three again", func() bool { return again.has() == 3 })
}

// counted is a node agent with so many units: it starts what it has room for, and says so of the rest.
type counted struct {
	client *Client
	takes  map[api.RevisionID]int

	mu          sync.Mutex
	free        int
	wanted, has map[api.RevisionID]int
	serial      uint64
}

func countedNode(t *testing.T, name string, units int, takes map[api.RevisionID]int, r *replica) *counted {
	t.Helper()
	n := &counted{takes: takes, free: units, wanted: map[api.RevisionID]int{}, has: map[api.RevisionID]int{}}
	n.client = NewClient(ClientConfig{Name: name, Agent: n, Capacity: units})
	n.client.SetMembers(map[string]string{"r": r.addr})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.client.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	eventually(t, name+" is there", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		x := r.nodes.named[name]
		return x != nil && x.alive && !slices.Contains(x.told[:], 0)
	})
	return n
}

func (n *counted) Scale(id api.RevisionID, want int, _ time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wanted[id] = want
	if over := n.has[id] - want; over > 0 {
		n.has[id] = want
		n.free += over * n.takes[id]
	}
	for _, id := range slices.Sorted(maps.Keys(n.wanted)) { // what was refused before may have room now
		for n.has[id] < n.wanted[id] && n.free >= n.takes[id] {
			n.has[id]++
			n.free -= n.takes[id]
		}
		n.serial++
		s := &endpoints.Snapshot{Revision: id, Sequence: n.serial, Desired: n.wanted[id]}
		for i := range n.has[id] {
			s.Instances = append(s.Instances, endpoints.Instance{ID: fmt.Sprint(i), Revision: id, State: endpoints.Ready})
		}
		if n.has[id] < n.wanted[id] {
			s.Failure = &endpoints.Failure{Reason: reasonNodeFull, At: time.Now()}
		}
		n.client.Observe(s)
	}
}

// What an instance takes decides where it has room. What has room nowhere is asked of one node, which says why not; it goes to whichever node
// has room first.
func TestLargeInstances(t *testing.T) {
	t.Parallel()
	r := decided(t)
	large := *rev
	large.Name = "large-00001"
	large.Spec.Containers = []api.Container{{Resources: api.Resources{Requests: map[string]api.Quantity{"memory": "512Mi"}}}}
	id := large.ID()
	r.SetRevision(&large)
	takes := map[api.RevisionID]int{id: 32, rev.ID(): 1}
	a, b := countedNode(t, "a", 30, takes, r), countedNode(t, "b", 40, takes, r)
	want := func(what string, of api.RevisionID, nodes []*counted, numbers ...int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%s: %v", what, numbers), func() bool {
			var got []int
			for _, n := range nodes {
				n.mu.Lock()
				got = append(got, n.has[of])
				n.mu.Unlock()
			}
			return slices.Equal(got, numbers)
		})
	}
	asked := func(n *counted) int { n.mu.Lock(); defer n.mu.Unlock(); return n.wanted[id] - n.has[id] }
	refused := func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, name := range []string{"a", "b"} {
			if s := r.nodes.seen.Part(id, name); s != nil && s.Failure != nil && s.Failure.Reason == reasonNodeFull {
				return true
			}
		}
		return false
	}
	r.Scale(id, 1, time.Now())
	want("the one with room", id, []*counted{a, b}, 0, 1)
	r.Scale(rev.ID(), 3, time.Now())
	want("small ones where most room is left", rev.ID(), []*counted{a, b}, 3, 0)
	if refused() {
		t.Error("something was refused although there was room")
	}
	r.Scale(id, 3, time.Now())
	eventually(t, "the one that could take it is asked and refuses", func() bool { return asked(b) == 2 && refused() })
	r.Scale(id, 3, time.Now()) // as each tick does
	want("one is there", id, []*counted{a, b}, 0, 1)

	c := countedNode(t, "c", 40, takes, r)
	r.Scale(id, 3, time.Now())
	want("another has room", id, []*counted{a, b, c}, 0, 1, 1)
	eventually(t, "one is left to ask for", func() bool { return asked(b) == 1 })
	r.Scale(id, 2, time.Now())
	eventually(t, "none is asked for any more", func() bool { return asked(b) == 0 && !refused() })

	// The asked one finds room by itself.
	r.Scale(id, 0, time.Now())
	r.Scale(rev.ID(), 104, time.Now()) // 110 units in all
	eventually(t, "104 small ones", func() bool {
		n := 0
		for _, x := range []*counted{a, b, c} {
			x.mu.Lock()
			n += x.has[rev.ID()]
			x.mu.Unlock()
		}
		return n == 104
	})
	r.Scale(id, 1, time.Now())
	eventually(t, "one is asked for", func() bool { return asked(a)+asked(b)+asked(c) == 1 })
	r.Scale(rev.ID(), 0, time.Now())
	eventually(t, "it is there, and counts", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		sh := r.nodes.shares[id]
		free := r.nodes.table.Free("a") + r.nodes.table.Free("b") + r.nodes.table.Free("c")
		return r.nodes.staying(sh) == 1 && sh.beyond == 0 && free == 110-32
	})
	r.Scale(id, 0, time.Now())
	want("none", id, []*counted{a, b, c}, 0, 0, 0)
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, free := range map[string]int{"a": 30, "b": 40, "c": 40} {
		if n := r.nodes.table.Free(name); n != free {
			t.Errorf("%s has %d units free of %d when all is over", name, n, free)
		}
	}
}

// A revision becomes known after its instances: what they take is counted again.
func TestSizeIsLearntLater(t *testing.T) {
	t.Parallel()
	r := decided(t)
	large := *rev
	large.Name = "late-00001"
	large.Spec.Containers = []api.Container{{Resources: api.Resources{Requests: map[string]api.Quantity{"memory": "512Mi"}}}}
	n := &node{}
	n.client = NewClient(ClientConfig{Name: "a", Agent: n, Capacity: 100})
	n.client.Observe(&endpoints.Snapshot{Revision: large.ID(), Sequence: 1, Desired: 2, Instances: []endpoints.Instance{
		{ID: "x", Revision: large.ID(), State: endpoints.Ready}, {ID: "y", Revision: large.ID(), State: endpoints.Ready},
	}})
	n.client.SetMembers(map[string]string{"r": r.addr})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.client.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	free := func(want int) func() bool {
		return func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.nodes.table.Free("a") == want
		}
	}
	eventually(t, "two of one unit each", free(98))
	r.SetRevision(&large)
	eventually(t, "two of 32", free(36))
}

// A node that is cordoned gets nothing new. One that is drained gives up an instance only when another one is ready elsewhere, keeps what nobody else has
// room for, and takes part again when it may.
func TestDrain(t *testing.T) {
	t.Parallel()
	r := decided(t)
	a, _ := nodeAt(t, "a", 10, r)
	b, _ := nodeAt(t, "b", 3, r)
	want := func(what string, numbers ...int) {
		t.Helper()
		defer func() {
			if t.Failed() {
				t.Logf("have %v", counts(a, b))
			}
		}()
		eventually(t, fmt.Sprintf("%s: %v", what, numbers), func() bool { return slices.Equal(counts(a, b), numbers) })
	}
	a.mu.Lock()
	a.room = 10
	a.mu.Unlock()
	r.SetNodes(map[string]Wish{"b": Cordon})
	r.Scale(rev.ID(), 4, time.Now())
	want("nothing goes to a cordoned one", 4, 0)
	b.mu.Lock()
	b.slow, b.room = true, 3
	b.mu.Unlock()
	r.SetNodes(map[string]Wish{"a": Drain})
	want("started elsewhere, as far as there is room, and none ended before it is ready", 4, 3)
	b.getReady()
	want("one has nowhere to go", 1, 3)
	r.Scale(rev.ID(), 3, time.Now())
	want("it is not needed any more", 0, 3)
	r.Scale(rev.ID(), 6, time.Now())
	time.Sleep(50 * time.Millisecond) // an order would have come by now; it must not
	want("nothing goes to a drained one", 0, 3)
	r.SetNodes(nil)
	r.Scale(rev.ID(), 7, time.Now())
	want("all take part again", 4, 3)
	r.SetNodes(map[string]Wish{"a": Drain, "b": Drain})
	time.Sleep(50 * time.Millisecond)
	want("there is nowhere to go", 4, 3)
	r.Scale(rev.ID(), 0, time.Now())
	want("none", 0, 0)
}

// An autoscaler that has only just taken over, and has decided nothing yet, takes nothing away: not from a node that is drained, nor because another one is
// lost.
func TestDrainUndecided(t *testing.T) {
	t.Parallel()
	one, two := decided(t), newReplica(t, "127.0.0.1:0")
	two.SetDecider(undecided{})
	two.SetRevision(rev)
	a, _ := nodeAt(t, "a", 10, one)
	b, _ := nodeAt(t, "b", 10, one)
	c, end := nodeAt(t, "c", 10, one)
	one.Scale(rev.ID(), 6, time.Now())
	eventually(t, "two each", func() bool { return slices.Equal(counts(a, b, c), []int{2, 2, 2}) })
	two.SetNodes(map[string]Wish{"a": Drain})
	for _, n := range []*node{a, b, c} {
		n.client.SetMembers(map[string]string{"r": two.addr})
	}
	two.ownAll(2)
	eventually(t, "it knows what there is", func() bool {
		two.mu.Lock()
		defer two.mu.Unlock()
		s := two.nodes.seen.Of(rev.ID())
		return s != nil && len(s.Instances) == 6
	})
	end()
	eventually(t, "one is lost", func() bool {
		two.mu.Lock()
		defer two.mu.Unlock()
		return !two.nodes.named["c"].alive
	})
	time.Sleep(50 * time.Millisecond) // an order would have come by now
	if n := counts(a, b); !slices.Equal(n, []int{2, 2}) {
		t.Errorf("instances %v, want them where they were", n)
	}
	two.Scale(rev.ID(), 4, time.Now())
	eventually(t, "all on the other one", func() bool { return slices.Equal(counts(a, b), []int{0, 4}) })
}
