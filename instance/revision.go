package instance

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/internal/endpoints"
)

// revision is what the agent knows of one revision. All of it is guarded by Agent.mu.
type revision struct {
	id        api.RevisionID
	plan      *plan  // nil until SetRevision
	pinned    string // image whose package is kept on this node for it
	removed   bool
	desired   int
	scaled    bool      // desired was ordered
	decided   time.Time // of the order being carried out, else zero
	placed    time.Time
	instances []*instance // in order of creation
	leftovers []*leftover // of a predecessor, waiting for the plan
	language  string      // that it is written in, as plan.language
	spare     []*os.File  // listening sockets of crashed instances, with what waits in their accept queues

	fault   *endpoints.Failure // of the last start or instance; nil after one got ready
	crashes int                // in a row, for the back-off
	failed  time.Time          // when the last of them was
	until   time.Time          // no start before
	retry   *time.Timer        // looks again at until

	full       bool   // the node has no room for all that is desired
	sequence   uint64 // of the last change
	delivering bool
	seen       uint64 // of the last delivered snapshot
}

const (
	reasonStartFailed = "StartFailed"
	reasonNodeFull    = "NodeFull"
	reasonCodeChanged = "CodeChanged"
	reasonNoCode      = "CodeNotFound"
	reasonLiveness    = "LivenessProbeFailed"
	reasonStartup     = "StartupProbeFailed"

	// firstBackOff is the wait before the third start after two failures in a row (the second follows at once); it
	// doubles up to maxBackOff. An instance that was ready for steady makes the count begin anew.
	firstBackOff = 100 * time.Millisecond
	maxBackOff   = 30 * time.Second
	steady       = 30 * time.Second

	// longBackOff is the wait from which on nobody is kept waiting for the next start in the socket of a crashed instance.
	longBackOff = time.Second
)

// failure is an error with a reason for conditions.
type failure struct{ reason, message string }

func (f *failure) Error() string { return f.message }

func reasonOf(err error) string {
	if f, ok := errors.AsType[*failure](err); ok {
		return f.reason
	}
	switch {
	case errors.Is(err, code.ErrChanged):
		return reasonCodeChanged
	case errors.Is(err, code.ErrUnknownImage), errors.Is(err, code.ErrBadImage), errors.Is(err, code.ErrNotFound):
		return reasonNoCode
	}
	return reasonStartFailed
}

// backOff is the wait before the next start after so many failures in a row.
func backOff(crashes int) time.Duration {
	if crashes < 2 {
		return 0
	}
	if crashes > 12 { // 100 ms << 10 is beyond the maximum
		return maxBackOff
	}
	return min(firstBackOff<<(crashes-2), maxBackOff)
}

// reconcileLocked makes one step towards what is desired. It is called after every change and may be called at any time.
func (a *Agent) reconcileLocked(r *revision) {
	if !a.running {
		return
	}
	a.claimLeftoversLocked(r)
	want := r.desired
	if r.removed || a.stopping {
		want = 0
	} else if !r.scaled || r.plan == nil {
		return // not ordered yet, or not known yet: what was adopted stays
	}
	live := r.live()
	a.closeSpareLocked(r, max(0, want-len(live)))
	switch {
	case len(live) > want:
		for _, in := range surplus(live, len(live)-want) {
			a.dismissLocked(in)
		}
	case len(live) < want:
		if n := want - len(live) - a.wakeLocked(r, want-len(live)); n > 0 {
			a.startLocked(r, live, n)
		}
	}
	if r.removed || a.stopping {
		for _, in := range r.instances {
			a.stopLocked(in) // the frozen ones, and those that were about to be
		}
	}
	if want == 0 {
		delete(a.short, r)
		r.full = false
		if r.retry != nil {
			r.retry.Stop()
		}
	}
	if r.removed && len(r.instances) == 0 && len(r.leftovers) == 0 {
		delete(a.revisions, r.id)
		delete(a.reserved, r)
		a.packages.Unpin(r.pinned)
	}
}

// live returns the instances that run and are not going away, in order of creation.
func (r *revision) live() []*instance {
	var live []*instance
	for _, in := range r.instances {
		if in.state != endpoints.Draining && in.state != endpoints.Frozen {
			live = append(live, in)
		}
	}
	return live
}

// surplus chooses n instances to end: those that are not ready first, then those with the fewest requests; among equals
// the youngest, because the older ones have proved themselves and are warmer.
func surplus(live []*instance, n int) []*instance {
	type candidate struct {
		in   *instance
		idle int
		age  int
	}
	c := make([]candidate, len(live))
	for i, in := range live {
		c[i] = candidate{in: in, age: i}
		if in.state != endpoints.Starting {
			c[i].idle = 1
			if in.sidecar != nil {
				c[i].idle += in.sidecar.InFlight()
			}
		}
	}
	slices.SortFunc(c, func(x, y candidate) int {
		if x.idle != y.idle {
			return x.idle - y.idle
		}
		return y.age - x.age
	})
	chosen := make([]*instance, n)
	for i := range chosen {
		chosen[i] = c[i].in
	}
	return chosen
}

// startLocked starts up to n instances: none during a back-off, one at a time while the last one failed, none beyond what the
// node takes.
func (a *Agent) startLocked(r *revision, live []*instance, n int) {
	now := time.Now()
	if wait := r.until.Sub(now); wait > 0 {
		a.lookAgainLocked(r, wait)
		return
	}
	if r.fault != nil {
		starting := 0
		for _, in := range live {
			if in.state == endpoints.Starting && !in.unready {
				starting++
			}
		}
		n = min(n, 1-starting)
	}
	units := r.plan.class.Units
	room := max(0, a.cfg.Units-a.used)
	a.makeRoomLocked(n, units, room)
	if full := n*units > room+a.leaving; full != r.full { // what is leaving is as good as gone
		r.full = full
		a.publishLocked(r)
	}
	if fit := room / units; n > fit {
		a.short[r] = true
		n = fit
	} else {
		delete(a.short, r)
	}
	for range n {
		a.newInstanceLocked(r)
	}
	if n > 0 {
		a.publishLocked(r)
	}
}

func (a *Agent) lookAgainLocked(r *revision, wait time.Duration) {
	if r.retry != nil {
		r.retry.Stop()
	}
	r.retry = time.AfterFunc(wait, func() {
		a.mu.Lock()
		a.reconcileLocked(r)
		a.unlock()
	})
}

// closeSpareLocked keeps at most n sockets of crashed instances: as many as there will be replacements.
func (a *Agent) closeSpareLocked(r *revision, n int) {
	for len(r.spare) > n {
		r.spare[0].Close()
		r.spare = r.spare[1:]
	}
}

func (r *revision) forgetFailureLocked() {
	r.fault, r.crashes, r.until = nil, 0, time.Time{}
}

// failLocked notes that an instance did not get ready or did not stay. Instances that were ordered before the last failure
// are of the same wave and tell nothing new: fifty starts at once that fail are one failure.
func (a *Agent) failLocked(in *instance, why *failure) {
	r, now := in.rev, time.Now()
	if r.removed || in.plan.rev.UID != r.plan.rev.UID {
		return
	}
	if !in.readyAt.IsZero() && now.Sub(in.readyAt) > steady {
		r.crashes = 0
	}
	if r.crashes == 0 || in.made.After(r.failed) {
		r.crashes++
		r.failed = now
		r.until = now.Add(backOff(r.crashes))
	}
	r.fault = &endpoints.Failure{
		Reason: why.reason, Message: why.message, Count: r.crashes, At: now, Until: r.until,
		Served: !in.readyAt.IsZero(),
	}
	a.cfg.Log.Warn("instance failed", "revision", r.id, "instance", in.id, "reason", why.reason,
		"message", why.message, "count", r.crashes, "next", backOff(r.crashes))
}

// publishLocked notes a change of what subscribers see; unlock tells them.
func (a *Agent) publishLocked(r *revision) {
	a.sequence++ // one counter for all: it grows even if a revision is removed and comes back
	r.sequence = a.sequence
	if !slices.Contains(a.changed, r) {
		a.changed = append(a.changed, r)
	}
}

// snapshotLocked is what is now.
func (a *Agent) snapshotLocked(r *revision) *endpoints.Snapshot {
	s := &endpoints.Snapshot{Revision: r.id, Sequence: r.sequence, Desired: r.desired, Failure: r.fault}
	if r.full && s.Failure == nil {
		s.Failure = &endpoints.Failure{
			Reason: reasonNodeFull, At: time.Now(),
			Message: a.fullLocked(r),
		}
	}
	s.Instances = make([]endpoints.Instance, 0, len(r.instances))
	for _, in := range r.instances {
		s.Instances = append(s.Instances, in.endpointLocked())
	}
	return s
}

// fullLocked says why there is no room for one more instance of a revision.
func (a *Agent) fullLocked(r *revision) string {
	class := r.plan.class
	one := fmt.Sprintf("one instance of %s takes %d (class %s: up to %d MiB and %g processors)",
		r.id, class.Units, class.Name, class.Memory>>20, float64(class.CPU)/1000)
	if class.Units > a.cfg.Units {
		return fmt.Sprintf("this node has %d units for instances (by %s), and %s: ask for less, or for a larger node", a.cfg.Units, a.bound, one)
	}
	return fmt.Sprintf("of this node's %d units for instances (by %s) %d are taken, and %s: end some, or add a node", a.cfg.Units, a.bound, a.used, one)
}

// exitFailure says how an instance that nobody had asked to end ended.
func exitFailure(in *instance, e provider.Exit, wasReady bool, words string) *failure {
	when := "before it was ready"
	if wasReady {
		when = "while it was ready"
	}
	msg := fmt.Sprintf("instance %s %s %s", in.id, e, when)
	if e.OOM && in.plan.limits.Precaution {
		msg += fmt.Sprintf(" (%d MiB, because the revision sets none: resources.limits.memory)", in.plan.limits.MemoryBytes>>20)
	}
	if words != "" {
		msg += "; its last output: " + words
	} else {
		msg += "; it printed nothing"
	}
	return &failure{e.Reason(), msg}
}
