package reconcile

import (
	"context"
	"maps"
	"slices"

	"github.com/thawrun/thaw/api"
)

// reconcileRoute lets a route lead to what it asks for, as soon as all of that is ready, and not before.
func (r *Reconcilers) reconcileRoute(ctx context.Context, k key) error {
	o, err := r.read(ctx, api.Routes, k.of())
	if o == nil {
		return err
	}
	rt := o.(*api.Route)
	if gone, err := r.removeOrphan(ctx, api.Routes, rt); gone || err != nil {
		return err
	}
	now := r.cfg.Now()
	next := *rt
	st := &next.Status
	st.ObservedGeneration = rt.Generation
	c := &st.Conditions
	r.warn(rt, c)
	st.URL = r.cfg.routeURL(rt, "")
	st.Address = &api.Addressable{URL: r.cfg.url(privateHost(rt.Name, rt.Namespace, r.cfg.ClusterDomain), true)}
	c.Set(now, api.ConditionCertificateProvisioned, api.True, api.ReasonTLSNotEnabled, "autoTLS is not enabled")

	if len(st.Traffic) == 0 { // new, or made again by its service after somebody deleted it
		if o := controller(rt); o != nil {
			st.Traffic = slices.Clone(r.table.inherit(k.of(), o.UID))
		}
	}

	dests, trouble := resolve(r.cache, rt)
	var ro rollout
	if trouble != nil {
		// Everything stays as it is: what the route led to goes on, and a rollout under way waits.
		c.Set(now, api.ConditionAllTrafficAssigned, trouble.status, trouble.reason, trouble.message)
	} else {
		c.Set(now, api.ConditionAllTrafficAssigned, api.True, "", "")
		was := parseRollout(st.Annotations[api.AnnotationRolloutInProgress])
		duration := r.cfg.rolloutDuration(rt)
		st.Traffic, ro = assign(dests, was, served(r.cache, &next), duration, now)
		for i := range st.Traffic {
			if t := &st.Traffic[i]; t.Tag != "" {
				t.URL = r.cfg.routeURL(rt, t.Tag)
			}
		}
	}

	to := r.cfg.hosts(rt, st.Traffic)
	if trouble == nil && !r.prepared(k.of(), to.main, now) {
		r.queue.addAfter(k, prepareEvery)
		return nil // everything stays as it is, the status too: nothing of what was asked for holds yet
	}

	// The table first: whoever reads "ready" may call at once.
	r.queueHosts(r.table.setRoute(k.of(), to))
	if r.cache.route(k.of()) == nil && r.ownerService(rt) == nil { // deleted just now, and whoever saw that came before us
		r.dropRoute(k.of())
		return nil
	}
	r.table.publish(r.platform.SetRoutes)

	if trouble == nil {
		served := r.cfg.Now() // the first percent of a new revision is served from here on
		duration := r.cfg.rolloutDuration(rt)
		for i := range ro.Configurations {
			ro.Configurations[i].schedule(duration, served)
		}
		st.Annotations = withRollout(st.Annotations, ro)
		if wait, ok := ro.wait(served); ok {
			r.queue.addAfter(k, max(wait, 1)) // 1 ns: never in this very pass
		}
	}
	switch {
	case !r.table.has(k.of()):
		c.Set(now, api.ConditionIngressReady, api.Unknown, reasonIngressNotConfigured, "Ingress has not yet been reconciled.")
	case parseRollout(st.Annotations[api.AnnotationRolloutInProgress]).moving():
		c.Set(now, api.ConditionIngressReady, api.Unknown, reasonRolloutInProgress, "A gradual rollout of the latest revision(s) is in progress.")
	default:
		c.Set(now, api.ConditionIngressReady, api.True, "", "")
	}
	c.Summarise(now, api.ConditionReady, api.ReadyDependents(api.Routes)...)
	return r.updateStatus(ctx, api.Routes, rt, &next)
}

// withRollout returns the annotations with the state of a rollout, or without one when none is under way.
func withRollout(annotations map[string]string, ro rollout) map[string]string {
	old, had := annotations[api.AnnotationRolloutInProgress]
	text := ""
	if ro.moving() {
		text = ro.String()
	}
	if had == (text != "") && old == text {
		return annotations
	}
	annotations = maps.Clone(annotations)
	if text == "" {
		delete(annotations, api.AnnotationRolloutInProgress)
	} else {
		if annotations == nil {
			annotations = map[string]string{}
		}
		annotations[api.AnnotationRolloutInProgress] = text
	}
	if len(annotations) == 0 {
		return nil
	}
	return annotations
}
