package reconcile

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
)

// hopeless are the reasons of failures that a second try does not heal: the code is not there, or cannot even be executed.
var hopeless = map[string]bool{"StartFailed": true, "CodeNotFound": true, "CodeChanged": true}

// slowResolve is how long a resolution may take before the status says that it is under way. Usual ones are over before
// that would be written.
const slowResolve = time.Second

// reconcileRevision resolves a revision's code, judges whether it is ready, and keeps its labels and counts true.
func (r *Reconcilers) reconcileRevision(ctx context.Context, k key) error {
	rev := r.cache.revision(k.of())
	id := api.MakeRevisionID(k.namespace, k.name)
	if rev == nil {
		r.observed.forget(id)
		r.images.forget(id)
		return nil
	}
	if gone, err := r.removeOrphan(ctx, api.Revisions, rev); gone || err != nil {
		return err
	}
	rev, err := r.labelRouting(ctx, rev)
	if err != nil {
		return err
	}

	now := r.cfg.Now()
	next := *rev
	next.Status.ObservedGeneration = rev.Generation
	c := &next.Status.Conditions
	r.warn(rev, c)
	if !resolved(rev) {
		res := r.resolve(ctx, rev)
		switch {
		case res.statuses != nil:
			next.Status.ContainerStatuses = res.statuses
			r.images.forget(id) // it is in the status now, or will be resolved again
		case res.failure != "":
			c.Set(now, api.ConditionContainerHealthy, api.False, api.ReasonContainerMissing, res.failure)
			c.Set(now, api.ConditionResourcesAvailable, api.False, api.ReasonContainerMissing, res.failure)
		case now.Sub(res.began) < slowResolve:
			r.queue.addAfter(k, slowResolve-now.Sub(res.began))
			return nil
		default:
			c.Set(now, api.ConditionContainerHealthy, api.Unknown, api.ReasonResolvingDigests, "")
			c.Set(now, api.ConditionResourcesAvailable, api.Unknown, api.ReasonResolvingDigests, "")
		}
	}
	obs := r.observed.get(id)
	if resolved(&next) && !rev.Ready() {
		if again := r.judge(&next, obs, now); again > 0 {
			r.queue.addAfter(k, again)
		}
	}
	r.judgeNetwork(rev, c, now)
	c.Summarise(now, api.ConditionReady, readyDependents(rev)...)
	r.count(&next, obs, now)

	if reflect.DeepEqual(rev.Status, next.Status) {
		return nil
	}
	if onlyCounts(rev, &next) {
		if wait := obs.written.Add(r.cfg.StatusInterval).Sub(now); wait > 0 && wait <= r.cfg.StatusInterval {
			r.queue.addAfter(k, wait)
			return nil
		}
	}
	if !rev.Ready() && next.Ready() {
		r.cfg.Log.Info("revision ready", "revision", id)
	} else if v := next.Status.Conditions.Get(api.ConditionReady); v.Status == api.False && !rev.Status.Conditions.IsFalse(api.ConditionReady) {
		r.cfg.Log.Info("revision failed", "revision", id, "reason", v.Reason, "message", v.Message)
	}
	if err := r.updateStatus(ctx, api.Revisions, rev, &next); err != nil {
		return err
	}
	r.observed.change(id, func(o *observation) { o.written = now })
	return nil
}

// onlyCounts says that two states of a revision differ in replica counts and Active at most.
func onlyCounts(a, b *api.Revision) bool {
	return sameToOthers(a, b) && a.Status.ObservedGeneration == b.Status.ObservedGeneration
}

// judge sets the conditions that Ready depends on, for a revision that never was ready: one that was stays so, because to
// have no instance, or none that starts just now, is no property of a revision. It returns when to look again although
// nothing happens; 0 = no need.
func (r *Reconcilers) judge(rev *api.Revision, obs observation, now time.Time) time.Duration {
	c := &rev.Status.Conditions
	failure := obs.failure()
	deadline := r.cfg.progressDeadline(rev)
	waited := time.Duration(0)
	if !obs.since.IsZero() {
		waited = now.Sub(obs.since)
	}
	switch {
	case obs.ready() >= initialScale(rev):
		c.Set(now, api.ConditionContainerHealthy, api.True, "", "")
		c.Set(now, api.ConditionResourcesAvailable, api.True, "", "")
	case failure != nil && (hopeless[failure.Reason] || failure.Count >= r.cfg.MaxStartFailures || waited >= deadline):
		c.Set(now, api.ConditionContainerHealthy, api.False, failure.Reason, "Container failed with: "+failure.Message)
		if waited >= deadline {
			late(c, now, deadline)
		}
	case waited >= deadline:
		late(c, now, deadline)
	default:
		for _, typ := range []string{api.ConditionContainerHealthy, api.ConditionResourcesAvailable} {
			if v := c.Get(typ); v == nil || v.Status != api.False || v.Reason == api.ReasonContainerMissing {
				message := ""
				if failure != nil && typ == api.ConditionContainerHealthy {
					message = "Container failed with: " + failure.Message // it is tried again, but who waits may want to know
				}
				c.Set(now, typ, api.Unknown, api.ReasonDeploying, message) // a failure stays until an instance gets ready
			}
		}
		return deadline - waited
	}
	return 0
}

func late(c *api.Conditions, now time.Time, deadline time.Duration) {
	c.Set(now, api.ConditionResourcesAvailable, api.False, api.ReasonProgressDeadlineExceeded,
		fmt.Sprintf("Initial scale was never achieved within %v", deadline))
	if !c.IsFalse(api.ConditionContainerHealthy) {
		c.Set(now, api.ConditionContainerHealthy, api.Unknown, api.ReasonProgressDeadlineExceeded, "")
	}
}

// progressDeadline is how long a revision may take to get ready.
func (c Config) progressDeadline(rev *api.Revision) time.Duration {
	if d, err := time.ParseDuration(rev.Annotations[api.AnnotationProgressDeadline]); err == nil && d > 0 {
		return d
	}
	return c.ProgressDeadline
}

// initialScale is how many instances have to be ready once before a revision is: initial-scale (1 if not given), at least
// min-scale, at most max-scale. 0 = it needs no start.
func initialScale(rev *api.Revision) int {
	number := func(suffix string, otherwise int) int {
		if v, ok := api.ScalingAnnotation(rev.Annotations, suffix); ok {
			if n, err := strconv.Atoi(v); err == nil && n >= 0 {
				return n
			}
		}
		return otherwise
	}
	n := max(number(api.ScalingInitial, 1), number(api.ScalingMin, 0))
	if m := number(api.ScalingMax, 0); m > 0 {
		n = min(n, m)
	}
	return n
}

// count sets replica counts and Active from what was observed. Nothing observed leaves what the store says, until the
// grace of the start is over: by then whoever runs instances would have told.
func (r *Reconcilers) count(rev *api.Revision, obs observation, now time.Time) {
	if obs.snapshot == nil && !obs.scaled {
		if active := rev.Status.Conditions.Get(api.ConditionActive); active == nil || now.Sub(r.began) < r.cfg.StartupGrace || obs.since.After(r.began) {
			return
		}
	}
	ready, desired, active := obs.ready(), obs.desired, obs.active
	if !obs.scaled && obs.snapshot != nil {
		desired = obs.snapshot.Desired
		active = desired > 0
	}
	rev.Status.ActualReplicas, rev.Status.DesiredReplicas = counter(rev.Status.ActualReplicas, ready), counter(rev.Status.DesiredReplicas, desired)
	c := &rev.Status.Conditions
	switch failure := obs.failure(); {
	case !active && desired == 0:
		c.SetInfo(now, api.ConditionActive, api.False, api.ReasonNoTraffic, "The target is not receiving traffic.")
	case ready > 0:
		c.SetInfo(now, api.ConditionActive, api.True, "", "")
	case failure != nil:
		c.SetInfo(now, api.ConditionActive, api.Unknown, failure.Reason, failure.Message)
	case rev.Ready():
		c.SetInfo(now, api.ConditionActive, api.Unknown, reasonQueued, "Requests to the target are being buffered as resources are provisioned.")
	default:
		c.SetInfo(now, api.ConditionActive, api.Unknown, api.ReasonDeploying, "")
	}
}

// counter is a pointer to n; the old one if it says the same, so that equal states share it.
func counter(old *int32, n int) *int32 {
	v := int32(n)
	if old != nil && *old == v {
		return old
	}
	return &v
}

// labelRouting says in a revision's metadata which routes lead to it, and since when it is in its routing state: active while
// there is one, reserve afterwards. A new revision is pending until a route takes it, or a newer one overtakes it.
func (r *Reconcilers) labelRouting(ctx context.Context, rev *api.Revision) (*api.Revision, error) {
	routes := r.cache.routesTo(nameOf(rev))
	was := rev.Labels[api.LabelRoutingState]
	want := was
	switch {
	case len(routes) > 0:
		want = api.RoutingStateActive
	case was == api.RoutingStateActive, was == api.RoutingStatePending && r.overtaken(rev):
		want = api.RoutingStateReserve
	case was == "":
		want = api.RoutingStatePending
	}
	list := strings.Join(routes, ",")
	if want == was && rev.Annotations[api.AnnotationRoutes] == list {
		return rev, nil
	}
	next := *rev
	next.Labels, next.Annotations = maps.Clone(rev.Labels), maps.Clone(rev.Annotations)
	if next.Labels == nil {
		next.Labels = map[string]string{}
	}
	if next.Annotations == nil {
		next.Annotations = map[string]string{}
	}
	next.Labels[api.LabelRoutingState] = want
	if want != was {
		next.Annotations[api.AnnotationRoutingStateModified] = r.cfg.Now().UTC().Format(time.RFC3339)
	}
	if list == "" {
		delete(next.Annotations, api.AnnotationRoutes)
	} else {
		next.Annotations[api.AnnotationRoutes] = list
	}
	o, err := r.update(ctx, api.Revisions, &next)
	if err != nil {
		return nil, err
	}
	return o.(*api.Revision), nil
}

// overtaken says that a newer revision of the same configuration is the latest ready one.
func (r *Reconcilers) overtaken(rev *api.Revision) bool {
	cfg := r.cache.configuration(name{rev.Namespace, rev.ConfigurationName()})
	if cfg == nil || cfg.Status.LatestReadyRevisionName == "" || cfg.Status.LatestReadyRevisionName == rev.Name {
		return false
	}
	latest := r.cache.revision(name{rev.Namespace, cfg.Status.LatestReadyRevisionName})
	return latest != nil && generationOf(latest) > generationOf(rev)
}
