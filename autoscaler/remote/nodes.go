package remote

import (
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/placement"
	"github.com/thawrun/thaw/internal/shards"
	"github.com/thawrun/thaw/internal/wire"
)

// lostAfter is how long a node may say nothing before its instances are replaced elsewhere. An agent says something each second, and one that is
// started anew is back within this time.
const lostAfter = 4 * time.Second

// defaultCapacity is how many units of instances a node takes that does not say.
const defaultCapacity = 1000

// fullFor is how long a node that has refused an instance for want of room is given no more.
const fullFor = 5 * time.Second

// reasonNodeFull is the failure by which an agent says that it has no room.
const reasonNodeFull = "NodeFull"

// maxStrangers bounds the revisions that nodes speak of and that are not known. Snapshots may come before the word of their revision, but not of any
// number of names.
const maxStrangers = 10_000

// nodes is where the instances of own revisions are. The numbers are orders: what a node makes of its order is its own business, and an
// instance that breaks is replaced there. All of it is guarded by Server.mu.
type nodes struct {
	table  *placement.Table
	named  map[string]*host
	shares map[api.RevisionID]*share
	seen   endpoints.Nodes // what all nodes together say
	wishes map[string]Wish // of operators, by name, whether the node is there or not
}

// Wish is what an operator wants of a node.
type Wish uint8

// The wishes.
const (
	Use    Wish = iota // what every node is for
	Cordon             // nothing new goes there
	Drain              // nor stays there: what is there is started elsewhere, and ends once it is ready there
)

// host is one node agent. It outlives its stream.
type host struct {
	link     *link // the newest; orders to one that has ended are lost, and sent again when the node is back
	capacity int
	alive    bool
	full     bool // it has refused an instance a moment ago
	watchdog *time.Timer
	told     [shards.Count]int64         // the epoch of our claim for which it has told all that it has
	asked    [shards.Count]int           // claims on this stream that it has not answered yet by telling all that it has
	fresh    map[api.RevisionID]struct{} // what it has told of meanwhile
}

// share is how many instances of a revision were ordered, and where. Those of nodes that are drained come on top of total, until as many others are ready.
type share struct {
	total   int
	units   int       // that one takes of a node
	decided time.Time // zero = nobody has decided yet, and what there is stays
	at      map[string]int

	// What no node has room for is asked of one all the same: it says why it cannot be, which those hear who wait for it, and begins as soon as
	// it can.
	asked  string // the node; "" = none
	beyond int    // instances that it is asked for beyond at
}

// ordered is how many instances a node is told to have.
func (sh *share) ordered(name string) int {
	if name == sh.asked {
		return sh.at[name] + sh.beyond
	}
	return sh.at[name]
}

func newNodes() nodes {
	return nodes{table: placement.New(placement.Spread), named: map[string]*host{}, shares: map[api.RevisionID]*share{}}
}

func (n *nodes) share(id api.RevisionID, rev *api.Revision) *share {
	sh := n.shares[id]
	if sh == nil {
		sh = &share{at: map[string]int{}, units: 1}
		n.shares[id] = sh
		n.resize(rev)
	}
	return sh
}

// resize takes over what an instance of a revision needs: word of it may come after word of its instances.
func (n *nodes) resize(rev *api.Revision) {
	if rev == nil {
		return
	}
	sh := n.shares[rev.ID()]
	if sh == nil {
		return
	}
	before := sh.units
	if sh.units = placement.ClassOf(rev).Units; sh.units == before {
		return
	}
	for name, count := range sh.at {
		n.table.Release(name, count*before)
		n.table.Take(name, count*sh.units)
	}
}

func (n *nodes) forget(id api.RevisionID) {
	if sh := n.shares[id]; sh != nil {
		for name, count := range sh.at {
			n.table.Release(name, count*sh.units)
		}
		delete(n.shares, id)
	}
	n.seen.Forget(id)
}

func (n *nodes) forgetShard(shard int) {
	for id := range n.shares {
		if shards.OfNamespace(id) == shard {
			n.forget(id)
		}
	}
	n.seen.ForgetIf(func(id api.RevisionID) bool { return shards.OfNamespace(id) == shard })
	for _, x := range n.named {
		x.told[shard] = 0
	}
}

// join is the begin of a stream of a node agent.
func (s *Server) join(l *link, capacity int) {
	if capacity <= 0 {
		capacity = defaultCapacity
	}
	x := s.nodes.named[l.name]
	if x == nil {
		x = &host{}
		s.nodes.named[l.name] = x
	}
	x.link, x.capacity = l, min(capacity, placement.MaxUnits)
	x.asked, x.fresh = [shards.Count]int{}, map[api.RevisionID]struct{}{}
	s.revive(l.name, x)
}

// asks notes that a node is asked for all that it has of a shard.
func (n *nodes) asks(l *link, shard int) {
	if x := n.named[l.name]; x != nil && x.link == l {
		x.asked[shard]++
	}
}

// heard is a sign of life.
func (s *Server) heard(l *link) {
	x := s.nodes.named[l.name]
	if x == nil || x.link != l {
		return
	}
	if x.alive {
		x.watchdog.Reset(lostAfter)
		if s.nodes.wishes[l.name] == Drain { // there may be room elsewhere by now
			s.respread(l.name)
		}
		return
	}
	s.revive(l.name, x)
	s.claim(l) // what it has now it has to tell again
}

func (s *Server) revive(name string, x *host) {
	if x.watchdog != nil {
		x.watchdog.Stop()
	}
	x.watchdog = time.AfterFunc(lostAfter, func() { s.lost(name, x) })
	if x.alive {
		return
	}
	x.alive = true
	if err := s.nodes.table.Add(placement.Node{Name: name, Units: x.capacity}); err != nil {
		s.log.Error("autoscaler: a node cannot take part", "node", name, "error", err)
	}
	s.open(name, x)
}

// open lets new instances go to a node, or not.
func (s *Server) open(name string, x *host) {
	s.nodes.table.Cordon(name, x.full || s.nodes.wishes[name] != Use)
}

// SetNodes tells all wishes about nodes; those that are not in it are to be used.
func (s *Server) SetNodes(wishes map[string]Wish) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.nodes.wishes
	s.nodes.wishes = wishes
	var changed []string
	for name, x := range s.nodes.named {
		if old[name] != wishes[name] {
			s.log.Info("autoscaler: a node is to be used otherwise", "node", name, "cordoned", wishes[name] != Use, "drained", wishes[name] == Drain)
			s.open(name, x)
			changed = append(changed, name)
		}
	}
	for _, name := range changed { // when all of them are as they are to be
		s.respread(name)
	}
}

// respread looks again where the instances of the revisions should be that a node has a part in.
func (s *Server) respread(name string) {
	for id, sh := range s.nodes.shares {
		if sh.ordered(name) > 0 {
			if sh.asked == name && s.nodes.wishes[name] != Use {
				sh.asked, sh.beyond = "", 0
				s.order(name, id, sh)
			}
			s.spread(id, sh)
		}
	}
}

// lost replaces the instances of a node that says nothing any more.
func (s *Server) lost(name string, x *host) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !x.alive || s.nodes.named[name] != x {
		return
	}
	x.alive = false
	s.nodes.table.Remove(name)
	s.log.Warn("autoscaler: a node is lost; what it had is started elsewhere", "node", name)
	for _, sn := range s.nodes.seen.Drop(name) {
		s.decider.Observe(sn)
	}
	for id, sh := range s.nodes.shares {
		if sh.ordered(name) > 0 {
			delete(sh.at, name)
			if sh.asked == name {
				sh.asked, sh.beyond = "", 0
			}
			s.spread(id, sh)
		}
	}
}

// snapshot takes in what a node says of an own revision.
func (s *Server) snapshot(name string, sn *endpoints.Snapshot) {
	x := s.nodes.named[name]
	if x == nil || !x.alive {
		return
	}
	shard := shards.OfNamespace(sn.Revision)
	if x.asked[shard] > 0 {
		x.fresh[sn.Revision] = struct{}{}
	}
	if _, known := s.revisions[shard][sn.Revision]; !known && s.nodes.seen.Part(sn.Revision, name) == nil && s.nodes.seen.Len() >= s.known()+maxStrangers {
		s.refuse("stranger", 1)
		return
	}
	s.decider.Observe(s.nodes.seen.Set(name, sn))
	if x.told[shard] != s.epochs[shard] { // what there was before us
		sh := s.nodes.share(sn.Revision, s.revisions[shard][sn.Revision])
		there := max(sn.Desired, sn.Count(endpoints.Ready)+sn.Count(endpoints.Starting))
		if sn.Failure != nil && sn.Failure.Reason == reasonNodeFull { // it desires what another replica has asked of it beyond its room
			there = sn.Count(endpoints.Ready) + sn.Count(endpoints.Starting)
		}
		if there > sh.at[name] {
			s.nodes.table.Take(name, (there-sh.at[name])*sh.units)
			sh.at[name] = there
		}
		return
	}
	if sh := s.nodes.shares[sn.Revision]; sh != nil && sh.asked == name {
		if found := min(sh.beyond, sn.Count(endpoints.Ready)+sn.Count(endpoints.Starting)-sh.at[name]); found > 0 { // there was room meanwhile
			s.nodes.table.Take(name, found*sh.units)
			sh.at[name] += found
			sh.beyond -= found
		}
	}
	if f := sn.Failure; f != nil && f.Reason == reasonNodeFull {
		s.full(name, sn)
	}
	if sh := s.nodes.shares[sn.Revision]; sh != nil {
		s.leave(sn.Revision, sh)
	}
}

// known is how many revisions there are.
func (s *Server) known() (n int) {
	for _, of := range s.revisions {
		n += len(of)
	}
	return n
}

// full takes back what a node has no room for, and gives it to others.
func (s *Server) full(name string, sn *endpoints.Snapshot) {
	sh := s.nodes.share(sn.Revision, s.revisions[shards.OfNamespace(sn.Revision)][sn.Revision])
	there := len(sn.Instances)
	if sh.at[name] <= there {
		return
	}
	s.log.Warn("autoscaler: a node is full", "node", name, "revision", string(sn.Revision), "ordered", sh.at[name], "there", there)
	s.nodes.table.Release(name, (sh.at[name]-there)*sh.units)
	sh.at[name] = there
	if sh.asked == name {
		sh.asked, sh.beyond = "", 0
	}
	s.order(name, sn.Revision, sh)
	x := s.nodes.named[name]
	x.full = true
	s.open(name, x)
	time.AfterFunc(fullFor, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		x.full = false
		s.open(name, x)
	})
	s.spread(sn.Revision, sh)
}

// told is the end of what a node had to tell about shards. The first time for a claim, that is what there is; after a stream that broke off
// it shows which orders were lost with it. What it has told nothing of on this stream it has not, as when it was ended in order and started again.
func (s *Server) told(l *link, claims []wire.Claim) {
	x := s.nodes.named[l.name]
	if x == nil || x.link != l {
		return
	}
	var now, again [shards.Count]bool
	for _, c := range claims {
		if s.epochs[c.Shard] == c.Epoch && c.Epoch != 0 && x.asked[c.Shard] > 0 {
			now[c.Shard], again[c.Shard] = true, x.told[c.Shard] == c.Epoch
			x.told[c.Shard] = c.Epoch
			x.asked[c.Shard]--
		}
	}
	for _, sn := range s.nodes.seen.Keep(l.name, func(id api.RevisionID) bool {
		_, fresh := x.fresh[id]
		return fresh || !now[shards.OfNamespace(id)]
	}) {
		s.decider.Observe(sn)
	}
	maps.DeleteFunc(x.fresh, func(id api.RevisionID, _ struct{}) bool { return x.asked[shards.OfNamespace(id)] == 0 })
	for id, sh := range s.nodes.shares {
		shard := shards.OfNamespace(id)
		if !now[shard] {
			continue
		}
		part := s.nodes.seen.Part(id, l.name)
		if n := sh.ordered(l.name); again[shard] && (part != nil || n > 0) && (part == nil || part.Desired != n) {
			s.order(l.name, id, sh)
		}
		s.raise(id, sh)
	}
}

// spread makes the numbers of the nodes add up to what is wanted: new instances go where there is most room, and the node with the most gives
// one up.
func (s *Server) spread(id api.RevisionID, sh *share) {
	if sh.decided.IsZero() {
		return
	}
	if !s.raise(id, sh) {
		s.lower(id, sh)
	}
	s.leave(id, sh)
}

func (s *Server) lower(id api.RevisionID, sh *share) {
	changed := map[string]bool{}
	for over := s.nodes.staying(sh) - sh.total; over > 0; over-- {
		name := s.nodes.most(sh)
		sh.at[name]--
		s.nodes.table.Release(name, sh.units)
		changed[name] = true
	}
	for name := range changed {
		s.order(name, id, sh)
		if sh.at[name] == 0 {
			delete(sh.at, name)
		}
	}
}

// leave takes from nodes that are drained what others are ready for.
func (s *Server) leave(id api.RevisionID, sh *share) {
	if sh.decided.IsZero() {
		return
	}
	var leaving []string
	for name := range sh.at {
		if s.nodes.wishes[name] == Drain {
			leaving = append(leaving, name)
		}
	}
	if len(leaving) == 0 {
		return
	}
	missing := sh.total // ready elsewhere
	for name := range sh.at {
		if part := s.nodes.seen.Part(id, name); part != nil && s.nodes.wishes[name] != Drain {
			missing -= part.Count(endpoints.Ready)
		}
	}
	shard := shards.OfNamespace(id)
	slices.Sort(leaving)
	for _, name := range leaving {
		keep := min(sh.at[name], max(0, missing))
		missing -= keep
		if x := s.nodes.named[name]; keep == sh.at[name] || x == nil || x.told[shard] != s.epochs[shard] {
			continue // nothing can be taken from a node that has not told what it has
		}
		s.nodes.table.Release(name, (sh.at[name]-keep)*sh.units)
		sh.at[name] = keep
		s.order(name, id, sh)
		if keep == 0 {
			delete(sh.at, name)
		}
	}
}

// raise places what is missing. False: nothing was.
func (s *Server) raise(id api.RevisionID, sh *share) bool {
	missing := sh.total - s.nodes.staying(sh)
	if missing <= 0 {
		s.ask(id, sh, 0)
		return false
	}
	changed := map[string]bool{}
	var err error
	for ; missing > 0; missing-- {
		var name string
		if name, err = s.nodes.table.Place(time.Now(), sh.units); err != nil {
			s.log.Warn("autoscaler: instances cannot be placed", "revision", string(id), "missing", missing, "units", sh.units, "nodes", len(s.nodes.named), "error", err)
			break
		}
		sh.at[name]++
		changed[name] = true
	}
	if errors.Is(err, placement.ErrFull) {
		s.ask(id, sh, missing)
	} else {
		s.ask(id, sh, 0)
	}
	for name := range changed {
		s.order(name, id, sh)
	}
	return true
}

// ask asks a node, the one that was asked before if there is one, for so many instances beyond its room; 0 = for none any more.
func (s *Server) ask(id api.RevisionID, sh *share, beyond int) {
	if sh.asked == "" && beyond > 0 {
		sh.asked = s.nodes.table.Roomiest(sh.units)
	}
	if sh.asked == "" {
		return
	}
	name := sh.asked
	if sh.beyond = beyond; beyond == 0 {
		sh.asked = ""
	}
	s.order(name, id, sh)
}

// order tells a node its part. Until it has told what it has, the order can take nothing away.
func (s *Server) order(name string, id api.RevisionID, sh *share) {
	x := s.nodes.named[name]
	if x == nil {
		return
	}
	shard := shards.OfNamespace(id)
	epoch := s.epochs[shard]
	x.link.order(wire.Order{Revision: id, N: sh.ordered(name), Decided: sh.decided, Epoch: epoch, AtLeast: x.told[shard] != epoch})
}

// staying is how many instances were ordered from nodes that are not drained.
func (n *nodes) staying(sh *share) (total int) {
	for name, count := range sh.at {
		if n.wishes[name] != Drain {
			total += count
		}
	}
	return total
}

// most is the node with the most instances that is not drained, of several the last by name.
func (n *nodes) most(sh *share) string {
	best := ""
	for name, count := range sh.at {
		if n.wishes[name] != Drain && (best == "" || count > sh.at[best] || count == sh.at[best] && name > best) {
			best = name
		}
	}
	return best
}
