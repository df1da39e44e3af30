package reconcile

import (
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// observation is what other parts told about a revision since this process began.
type observation struct {
	snapshot *endpoints.Snapshot // nil: nothing yet
	scaled   bool                // desired and active were told
	desired  int
	active   bool
	since    time.Time // when the platform first got to know of the revision, not yet ready; zero: it has not
	written  time.Time // last write of replica counts and Active
}

// observations is the memory of all of them. The lock is held for a few assignments only: those who tell are on the way of
// cold starts.
type observations struct {
	mu sync.Mutex
	of map[api.RevisionID]observation
}

func (o *observations) get(id api.RevisionID) observation {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.of[id]
}

// change applies f and returns what was before and after.
func (o *observations) change(id api.RevisionID, f func(*observation)) (was, now observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	was = o.of[id]
	now = was
	f(&now)
	o.of[id] = now
	return was, now
}

func (o *observations) forget(id api.RevisionID) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.of, id)
}

func (s observation) ready() int {
	if s.snapshot == nil {
		return 0
	}
	return s.snapshot.Count(endpoints.Ready)
}

func (s observation) failure() *endpoints.Failure {
	if s.snapshot == nil {
		return nil
	}
	return s.snapshot.Failure
}

// ObserveInstances tells the state of a revision's instances. It only remembers the snapshot and returns: a revision that is
// not ready yet is looked at next, what else has changed is written within Config.StatusInterval.
func (r *Reconcilers) ObserveInstances(s *endpoints.Snapshot) {
	was, now := r.observed.change(s.Revision, func(o *observation) { o.snapshot = s })
	k := revisionKey(s.Revision)
	rev := r.cache.revision(k.of())
	switch {
	case rev == nil: // deleted, or not loaded yet; the pass forgets it or not
		r.queue.addAfter(k, r.cfg.StatusInterval)
	case !rev.Ready() && (was.ready() != now.ready() || failures(was) != failures(now)):
		r.queue.add(k)
	case was.snapshot == nil || was.ready() != now.ready() || was.snapshot.Desired != now.snapshot.Desired ||
		len(was.snapshot.Instances) != len(now.snapshot.Instances) || failures(was) != failures(now):
		r.queue.addAfter(k, r.cfg.StatusInterval)
	}
}

func failures(o observation) int {
	if f := o.failure(); f != nil {
		return f.Count
	}
	return 0
}

// ObserveScale tells how many instances the autoscaler wants of a revision, and whether it is active: receiving requests, or
// not yet idle for long enough. It only remembers.
func (r *Reconcilers) ObserveScale(id api.RevisionID, desired int, active bool) {
	was, _ := r.observed.change(id, func(o *observation) { o.scaled, o.desired, o.active = true, desired, active })
	if !was.scaled || was.desired != desired || was.active != active {
		r.queue.addAfter(revisionKey(id), r.cfg.StatusInterval)
	}
}

func revisionKey(id api.RevisionID) key {
	namespace, n := id.Split()
	return key{kindRevision, namespace, n}
}
