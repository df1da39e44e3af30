package reconcile

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
)

// garbage picks the revisions of a configuration that may go now, oldest first, and says when to look again (zero: only when
// something changes). kept says that something leads to a revision. Pure.
//
// Idle revisions are those in reserve that nothing leads to, that are not the newest ready or created one and that are not
// marked no-gc. They go when they are old, long unused, and not among the MinIdle that were used last; and, least recently
// used first, down to MaxIdle whatever their age.
func garbage(c GC, cfg *api.Configuration, revs []*api.Revision, kept func(*api.Revision) bool, now time.Time) (gone []*api.Revision, again time.Time) {
	if c.Disabled {
		return nil, time.Time{}
	}
	var idle []*api.Revision
	for _, r := range revs {
		if r.Labels[api.LabelRoutingState] != api.RoutingStateReserve || strings.EqualFold(r.Annotations[api.AnnotationNoGC], "true") ||
			r.Name == cfg.Status.LatestReadyRevisionName || r.Name == cfg.Status.LatestCreatedRevisionName || kept(r) {
			continue
		}
		idle = append(idle, r)
	}
	slices.SortFunc(idle, func(a, b *api.Revision) int {
		if d := lastActive(a).Compare(lastActive(b)); d != 0 {
			return d
		}
		if d := generationOf(a) - generationOf(b); d != 0 {
			return int(d)
		}
		return strings.Compare(a.Name, b.Name)
	})

	var rest []*api.Revision
	for i, r := range idle {
		if i < len(idle)-c.MinIdle {
			until := staleAt(c, r)
			if !until.IsZero() && !now.Before(until) {
				gone = append(gone, r)
				continue
			}
			if !until.IsZero() && (again.IsZero() || until.Before(again)) {
				again = until
			}
		}
		rest = append(rest, r)
	}
	if c.MaxIdle >= 0 && len(rest) > c.MaxIdle {
		gone = append(gone, rest[:len(rest)-c.MaxIdle]...)
	}
	return gone, again
}

// staleAt is when neither age nor use protects a revision any more; zero if its age never counts.
func staleAt(c GC, r *api.Revision) time.Time {
	if c.RetainSinceCreate < 0 && c.RetainSinceLastActive < 0 {
		return time.Time{} // only the cap counts
	}
	var at time.Time
	if c.RetainSinceCreate >= 0 {
		at = created(r).Add(c.RetainSinceCreate)
	}
	if c.RetainSinceLastActive >= 0 {
		if t := lastActive(r).Add(c.RetainSinceLastActive); t.After(at) {
			at = t
		}
	}
	return at
}

func created(r *api.Revision) time.Time {
	if r.CreationTimestamp == nil {
		return time.Time{}
	}
	return r.CreationTimestamp.Time
}

// lastActive is when the last route left a revision; for one that never had any, when it was made.
func lastActive(r *api.Revision) time.Time {
	if t, err := time.Parse(time.RFC3339, r.Annotations[api.AnnotationRoutingStateModified]); err == nil {
		return t
	}
	return created(r)
}

// reconcileGC forgets old revisions of a configuration.
func (r *Reconcilers) reconcileGC(ctx context.Context, k key) error {
	cfg := r.cache.configuration(k.of())
	if cfg == nil {
		return nil // its revisions go with it
	}
	now := r.cfg.Now()
	kept := func(rev *api.Revision) bool { return len(r.cache.routesTo(nameOf(rev))) > 0 }
	gone, again := garbage(r.cfg.GC, cfg, r.cache.revisionsOfConfig(k.of()), kept, now)
	for _, rev := range gone {
		r.cfg.Log.Info("revision forgotten", "revision", rev.ID(), "last_active", lastActive(rev))
		// The resource version is part of it: a route that has just begun to lead here changed the revision's labels.
		if err := r.delete(ctx, api.Revisions, rev, rev.ResourceVersion); err != nil {
			return err
		}
	}
	if !again.IsZero() {
		r.queue.addAfter(k, again.Sub(now))
	}
	return nil
}
