package reconcile

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/thawrun/thaw/api"
)

// Reasons that only the reconcilers use; the words are Knative's.
const (
	reasonOutOfDate            = "OutOfDate"          // a child has not looked at its newest spec yet
	reasonTrafficNotMigrated   = "TrafficNotMigrated" // the route does not lead to what the service wants yet
	reasonRevisionNameTaken    = "RevisionNameTaken"
	reasonIngressNotConfigured = "IngressNotConfigured"
	reasonRolloutInProgress    = "RolloutInProgress"
	reasonQueued               = "Queued" // wanted, but no instance is ready
	reasonDomainAlreadyClaimed = "DomainAlreadyClaimed"
	reasonResolveFailed        = "ResolveFailed"
	reasonUnresolved           = "ReferenceNotResolved"
)

// reconcileService makes a service's configuration and route be what it says, and its status be what they say.
func (r *Reconcilers) reconcileService(ctx context.Context, k key) error {
	o, err := r.read(ctx, api.Services, k.of())
	if o == nil {
		return err // the children see for themselves that their owner is gone
	}
	s := o.(*api.Service)
	next := *s
	next.Status.ObservedGeneration = s.Generation
	c := &next.Status.Conditions
	r.warn(s, c)

	err = r.serviceChildren(ctx, s, &next.Status)
	c.Summarise(r.cfg.Now(), api.ConditionReady, api.ReadyDependents(api.Services)...)
	if werr := r.updateStatus(ctx, api.Services, s, &next); err == nil {
		err = werr
	}
	return err
}

func (r *Reconcilers) serviceChildren(ctx context.Context, s *api.Service, status *api.ServiceStatus) error {
	now := r.cfg.Now()
	c := &status.Conditions
	for _, typ := range api.ReadyDependents(api.Services) {
		if c.Get(typ) == nil {
			c.Set(now, typ, api.Unknown, "", "")
		}
	}

	have, err := r.read(ctx, api.Configurations, nameOf(s))
	if err != nil {
		return err
	}
	if have != nil && !owns(s, have) {
		if r.formerChild(s, have) {
			r.queue.add(key{kindConfiguration, s.Namespace, s.Name}) // it goes, and this service is looked at again
			return nil
		}
		c.Set(now, api.ConditionConfigurationsReady, api.False, api.ReasonNotOwned, fmt.Sprintf("There is an existing Configuration %q that we do not own.", s.Name))
		return nil
	}
	o, err := r.apply(ctx, api.Configurations, have, configurationOf(s))
	if err != nil {
		return err
	}
	cfg := o.(*api.Configuration)
	if cfg.Generation != cfg.Status.ObservedGeneration {
		c.Set(now, api.ConditionConfigurationsReady, api.Unknown, reasonOutOfDate, "The Configuration is still working to reflect the latest desired specification.")
		if cfg.Spec.Template.Name != "" {
			return nil // the route may name the revision that is about to be made: one after the other
		}
	} else {
		status.ConfigurationStatusFields = cfg.Status.ConfigurationStatusFields
		mirror(c, now, api.ConditionConfigurationsReady, cfg.Status.Conditions)
		if r.nameTaken(cfg) != nil {
			c.Set(now, api.ConditionRoutesReady, api.False, reasonRevisionNameTaken,
				fmt.Sprintf("The revision name %q is taken by a conflicting Revision, so traffic will not be migrated", cfg.Spec.Template.Name))
			if r.cache.route(nameOf(s)) == nil { // deleted by hand: its hosts must come back all the same
				_, err = r.apply(ctx, api.Routes, nil, routeOf(s))
			}
			return err
		}
	}

	have, err = r.read(ctx, api.Routes, nameOf(s))
	if err != nil {
		return err
	}
	if have != nil && !owns(s, have) {
		if r.formerChild(s, have) {
			r.queue.add(key{kindRoute, s.Namespace, s.Name})
			return nil
		}
		c.Set(now, api.ConditionRoutesReady, api.False, api.ReasonNotOwned, fmt.Sprintf("There is an existing Route %q that we do not own.", s.Name))
		return nil
	}
	if o, err = r.apply(ctx, api.Routes, have, routeOf(s)); err != nil {
		return err
	}
	rt := o.(*api.Route)
	status.RouteStatusFields = rt.Status.RouteStatusFields
	if rt.Generation != rt.Status.ObservedGeneration {
		c.Set(now, api.ConditionRoutesReady, api.Unknown, reasonOutOfDate, "The Route is still working to reflect the latest desired specification.")
		return nil
	}
	mirror(c, now, api.ConditionRoutesReady, rt.Status.Conditions)
	if c.IsTrue(api.ConditionRoutesReady) && !migrated(cfg, rt) {
		c.Set(now, api.ConditionRoutesReady, api.Unknown, reasonTrafficNotMigrated, "Traffic is not yet migrated to the latest revision.")
	}
	return nil
}

// formerChild says that a child belongs to an earlier service of the same name, so that it is about to go.
func (r *Reconcilers) formerChild(s *api.Service, child api.Object) bool {
	o := controller(child)
	return o != nil && o.Kind == api.Services.Kind && o.Name == s.Name && o.UID != s.UID
}

// mirror copies the condition Ready of a child into a condition of its owner.
func mirror(c *api.Conditions, now time.Time, typ string, child api.Conditions) {
	v := child.Get(api.ConditionReady)
	if v == nil {
		v = &api.Condition{Status: api.Unknown}
	}
	c.Set(now, typ, v.Status, v.Reason, v.Message)
}

// migrated says that a route leads to what its spec means now: with "latest" read as the configuration's latest ready
// revision. During a rollout it does not.
func migrated(cfg *api.Configuration, rt *api.Route) bool {
	type target struct {
		tag, revision string
	}
	sum := func(traffic []api.TrafficTarget, latest string) map[target]int64 {
		m := map[target]int64{}
		for _, t := range traffic {
			at := target{t.Tag, t.RevisionName}
			if t.RevisionName == "" {
				at.revision = latest
			}
			if t.Percent != nil {
				m[at] += *t.Percent
			} else {
				m[at] += 0
			}
		}
		return m
	}
	return maps.Equal(sum(rt.Spec.Traffic, cfg.Status.LatestReadyRevisionName), sum(rt.Status.Traffic, ""))
}

// apply makes a child be as wanted: labels, annotations and spec. have is what the cache knows, nil for nothing.
func (r *Reconcilers) apply(ctx context.Context, k *api.Kind, have, want api.Object) (api.Object, error) {
	api.SetDefaults(want)
	if have == nil {
		return r.create(ctx, k, want)
	}
	h, w := have.Meta(), want.Meta()
	if maps.Equal(h.Labels, w.Labels) && maps.Equal(h.Annotations, w.Annotations) && api.EqualSpec(have, want) {
		return have, nil
	}
	m := *h
	m.Labels, m.Annotations = w.Labels, w.Annotations
	*w = m // keeps uid, resource version and owners
	return r.update(ctx, k, want)
}

// configurationOf is the configuration that a service wants.
func configurationOf(s *api.Service) *api.Configuration {
	c := &api.Configuration{ObjectMeta: childMeta(s, api.AnnotationRolloutDuration, api.AnnotationTimeout, api.AnnotationResponseStartTimeout, api.AnnotationIdleTimeout), Spec: api.DeepCopy(s).Spec.ConfigurationSpec}
	c.Labels[api.LabelServiceUID] = s.UID
	return c
}

// routeOf is the route that a service wants: its targets without a revision follow the service's configuration.
func routeOf(s *api.Service) *api.Route {
	r := &api.Route{ObjectMeta: childMeta(s), Spec: api.DeepCopy(s).Spec.RouteSpec}
	for i := range r.Spec.Traffic {
		if t := &r.Spec.Traffic[i]; t.RevisionName == "" {
			t.ConfigurationName = s.Name
		}
	}
	return r
}

// childMeta is the metadata of a service's child: the service's labels and annotations, but for what is only about the
// service itself.
func childMeta(s *api.Service, without ...string) api.ObjectMeta {
	labels, annotations := maps.Clone(s.Labels), maps.Clone(s.Annotations)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[api.LabelService] = s.Name
	for _, a := range append(without, api.AnnotationLastApplied) {
		delete(annotations, a)
	}
	return api.ObjectMeta{Namespace: s.Namespace, Name: s.Name, Labels: labels, Annotations: annotations,
		OwnerReferences: ownedBy(api.Services, &s.ObjectMeta)}
}
