package endpoints

import (
	"maps"
	"slices"

	"github.com/thawrun/thaw/api"
)

// Nodes puts together what several node agents say of the same revisions: each agent knows its own instances only. The zero value is ready.
// It is not safe for concurrent use.
type Nodes struct {
	of       map[api.RevisionID]map[string]*Snapshot
	sequence uint64 // of what was put together last
}

// Set takes over what a node says of a revision and returns the picture of all nodes. The snapshot is not changed; a node whose snapshot is
// empty (no instance, none desired, no failure) has no part in the revision any more.
func (n *Nodes) Set(node string, s *Snapshot) *Snapshot {
	if n.of == nil {
		n.of = map[api.RevisionID]map[string]*Snapshot{}
	}
	parts := n.of[s.Revision]
	if len(s.Instances) == 0 && s.Desired == 0 && s.Failure == nil {
		delete(parts, node)
		if len(parts) == 0 {
			delete(n.of, s.Revision)
		}
	} else {
		if parts == nil {
			parts = map[string]*Snapshot{}
			n.of[s.Revision] = parts
		}
		parts[node] = s
	}
	return n.merge(s.Revision)
}

// Drop forgets a node, and returns the new pictures of the revisions that it had a part in.
func (n *Nodes) Drop(node string) []*Snapshot {
	var out []*Snapshot
	for id, parts := range n.of {
		if _, ok := parts[node]; !ok {
			continue
		}
		delete(parts, node)
		if len(parts) == 0 {
			delete(n.of, id)
		}
		out = append(out, n.merge(id))
	}
	return out
}

// Keep forgets what a node said of revisions that keep does not want, and returns their new pictures: a node that has told everything it has
// has nothing of the rest.
func (n *Nodes) Keep(node string, keep func(api.RevisionID) bool) []*Snapshot {
	var out []*Snapshot
	for id, parts := range n.of {
		if _, ok := parts[node]; ok && !keep(id) {
			out = append(out, n.Set(node, &Snapshot{Revision: id}))
		}
	}
	return out
}

// Forget drops what all nodes said of a revision.
func (n *Nodes) Forget(id api.RevisionID) { delete(n.of, id) }

// ForgetIf drops what all nodes said of the revisions that drop names.
func (n *Nodes) ForgetIf(drop func(api.RevisionID) bool) {
	for id := range n.of {
		if drop(id) {
			delete(n.of, id)
		}
	}
}

// Len is how many revisions nodes have said something of.
func (n *Nodes) Len() int { return len(n.of) }

// Part is what a node said of a revision last; nil = it has none of it.
func (n *Nodes) Part(id api.RevisionID, node string) *Snapshot { return n.of[id][node] }

// Parts are what a node said of each revision last, in no order.
func (n *Nodes) Parts(node string) (all []*Snapshot) {
	for _, parts := range n.of {
		if s := parts[node]; s != nil {
			all = append(all, s)
		}
	}
	return all
}

// Of is the picture of all nodes again; nil = none says anything.
func (n *Nodes) Of(id api.RevisionID) *Snapshot {
	if len(n.of[id]) == 0 {
		return nil
	}
	return n.merge(id)
}

// merge is the picture of all nodes. A failure counts unless another node shows that the revision can run.
func (n *Nodes) merge(id api.RevisionID) *Snapshot {
	n.sequence++
	out := &Snapshot{Revision: id, Sequence: n.sequence}
	parts := n.of[id]
	runs := false
	for _, node := range slices.Sorted(maps.Keys(parts)) {
		s := parts[node]
		out.Desired += s.Desired
		out.Instances = append(out.Instances, s.Instances...)
		if s.Failure == nil {
			runs = runs || s.Count(Ready)+s.Count(Starting) > 0
		} else if out.Failure == nil || s.Failure.At.After(out.Failure.At) {
			out.Failure = s.Failure
		}
	}
	if runs {
		out.Failure = nil
	}
	return out
}
