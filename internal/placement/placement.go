// Package placement chooses the node for an instance. It is a table that was made ready before: each node has units, worked out from what
// limits the node (memory, pids, descriptors, ports, addresses), an instance takes as many of them as its size class says, and to place
// is to take them from a counter. The cost does not depend on how many nodes and instances there are.
//
// It is pure memory and knows neither the network nor etcd. Table is safe for concurrent use.
package placement

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"time"
)

// ErrFull means that no node has room for the instance.
var ErrFull = errors.New("placement: no node has room")

// ErrBusy means that nodes have room, but each has started as much as its start rate allows at this moment.
var ErrBusy = errors.New("placement: every node with room has used up its start rate")

// MaxUnits bounds the units of a node.
const MaxUnits = 1 << 14

// Policy is which of the nodes with room is taken.
type Policy uint8

// The policies.
const (
	Spread Policy = iota // the emptiest node
	Pack                 // the fullest node that has room
)

// Resources are what a node has, or what one unit takes. Zero in a node: not limited by that.
type Resources struct {
	Memory      int64 // bytes
	Pids        int64
	Descriptors int64
	Ports       int64
	Addresses   int64
}

// Units is how many units a node holds: the scarcest resource counts. What says which one that is.
func Units(node, one Resources) (units int, what string) {
	units = MaxUnits
	for _, r := range []struct {
		what      string
		node, one int64
	}{
		{"memory", node.Memory, one.Memory}, {"pids", node.Pids, one.Pids}, {"descriptors", node.Descriptors, one.Descriptors},
		{"ports", node.Ports, one.Ports}, {"addresses", node.Addresses, one.Addresses},
	} {
		if r.node > 0 && r.one > 0 && r.node/r.one < int64(units) {
			units, what = int(r.node/r.one), r.what
		}
	}
	return units, what
}

// Node is one node as it joins.
type Node struct {
	Name       string
	Units      int     // 1 to MaxUnits
	StartRate  float64 // instances a second that may be started, once StartBurst is used up; 0 = no limit
	StartBurst float64 // instances that may be started at once
}

// Table is the slots of all nodes.
type Table struct {
	policy Policy

	mu    sync.Mutex // guards what follows
	nodes map[string]*node
	rows  [MaxUnits + 1][]*node // by free units
	used  [MaxUnits/64 + 1]uint64
}

// node is a node with its present counters.
type node struct {
	Node
	free   int
	spot   int // in its row
	tokens float64
	at     time.Time // of tokens
	closed bool      // cordoned: takes nothing, and is in no row
}

// New makes an empty table.
func New(p Policy) *Table { return &Table{policy: p, nodes: map[string]*node{}} }

// Add lets a node join, with all its units free.
func (t *Table) Add(n Node) error {
	if n.Name == "" || n.Units < 1 || n.Units > MaxUnits || n.StartRate < 0 || n.StartRate > 0 && n.StartBurst < 1 {
		return fmt.Errorf("placement: node %q: want a name, 1 to %d units, and with a start rate a start burst of at least 1", n.Name, MaxUnits)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.nodes[n.Name] != nil {
		return fmt.Errorf("placement: node %q is there already", n.Name)
	}
	x := &node{Node: n, free: n.Units, tokens: n.StartBurst}
	t.nodes[n.Name] = x
	t.enter(x)
	return nil
}

// Remove takes a node out, with whatever was placed there.
func (t *Table) Remove(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nodes[name]; n != nil {
		t.leave(n)
		delete(t.nodes, name)
	}
}

// Cordon lets a node take nothing more, or (false) take part again.
func (t *Table) Cordon(name string, closed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[name]
	if n == nil || n.closed == closed {
		return
	}
	if closed {
		t.leave(n)
		n.closed = true
		return
	}
	n.closed = false
	t.enter(n)
}

// tries is how many nodes are looked at for one that may start something now. With more of them busy, the caller waits a moment:
// looking through all of them would make placing slowest when there is most to do.
const tries = 16

// Place takes units from a node and names it. ErrFull and ErrBusy say why there is none; after ErrBusy try again in some milliseconds.
func (t *Table) Place(now time.Time, units int) (string, error) {
	if units < 1 {
		return "", fmt.Errorf("placement: %d units; an instance takes at least 1", units)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	left := tries
	for free := t.first(units); free >= 0; free = t.after(free, units) {
		row := t.rows[free]
		for i := len(row) - 1; i >= 0; i-- {
			if n := row[i]; n.start(now) {
				t.change(n, -units)
				return n.Name, nil
			}
			if left--; left == 0 {
				return "", ErrBusy
			}
		}
	}
	if left < tries {
		return "", ErrBusy
	}
	return "", ErrFull
}

// Take takes units from a certain node, whether it has them or not: for what runs there already.
func (t *Table) Take(name string, units int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nodes[name]; n != nil {
		t.change(n, -max(0, units))
	}
}

// Roomiest names the node with the most units left, be it none, of those that take so many when they are empty, or if there is no such node, of
// all; "" if no node takes part. It looks at all nodes: it is for when Place has found none.
func (t *Table) Roomiest(units int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var best *node
	for _, n := range t.nodes {
		if n.closed {
			continue
		}
		if best == nil {
			best = n
			continue
		}
		fits, bestFits := n.Units >= units, best.Units >= units
		if fits && !bestFits || fits == bestFits && (n.free > best.free || n.free == best.free && n.Name < best.Name) {
			best = n
		}
	}
	if best == nil {
		return ""
	}
	return best.Name
}

// Release gives units back; of a node that has left meanwhile it does nothing.
func (t *Table) Release(name string, units int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nodes[name]; n != nil {
		t.change(n, min(max(0, units), n.Units-n.free))
	}
}

// Free is how many units a node has left; less than zero when more run there than it has room for.
func (t *Table) Free(name string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nodes[name]; n != nil {
		return n.free
	}
	return 0
}

// start says whether the node may start one more now, and counts it.
func (n *node) start(now time.Time) bool {
	if n.StartRate == 0 {
		return true
	}
	if d := now.Sub(n.at); d > 0 {
		if !n.at.IsZero() {
			n.tokens = min(n.StartBurst, n.tokens+d.Seconds()*n.StartRate)
		}
		n.at = now
	}
	if n.tokens < 1 {
		return false
	}
	n.tokens--
	return true
}

func (t *Table) change(n *node, by int) {
	if n.closed {
		n.free += by
		return
	}
	t.leave(n)
	n.free += by
	t.enter(n)
}

// row is the row that a node belongs to.
func (n *node) row() int { return max(0, n.free) }

func (t *Table) enter(n *node) {
	free := n.row()
	n.spot = len(t.rows[free])
	t.rows[free] = append(t.rows[free], n)
	t.used[free/64] |= 1 << (free % 64)
}

func (t *Table) leave(n *node) {
	if n.closed {
		return
	}
	free := n.row()
	row := t.rows[free]
	last := len(row) - 1
	row[n.spot] = row[last]
	row[n.spot].spot = n.spot
	row[last] = nil
	t.rows[free] = row[:last]
	if last == 0 {
		t.used[free/64] &^= 1 << (free % 64)
	}
}

// first is the row that the policy begins with, -1 when none has the units.
func (t *Table) first(units int) int {
	if units > MaxUnits {
		return -1
	}
	if t.policy == Pack {
		return t.up(units)
	}
	return t.down(MaxUnits, units)
}

func (t *Table) after(free, units int) int {
	if t.policy == Pack {
		return t.up(free + 1)
	}
	return t.down(free-1, units)
}

// up is the first row in use from free on, down the last one from free down to least.
func (t *Table) up(free int) int {
	for w := free / 64; w < len(t.used); w++ {
		set := t.used[w]
		if w == free/64 {
			set &= ^uint64(0) << (free % 64)
		}
		if set != 0 {
			return w*64 + bits.TrailingZeros64(set)
		}
	}
	return -1
}

func (t *Table) down(free, least int) int {
	if free < least {
		return -1
	}
	for w := free / 64; w >= least/64; w-- {
		set := t.used[w]
		if w == free/64 {
			set &= ^uint64(0) >> (63 - free%64)
		}
		if set != 0 {
			if at := w*64 + 63 - bits.LeadingZeros64(set); at >= least {
				return at
			}
			return -1
		}
	}
	return -1
}
