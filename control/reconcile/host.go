package reconcile

import (
	"context"
	"fmt"
	"strings"

	"github.com/thawrun/thaw/api"
)

// claimant returns the domain mapping that has a host: the one that has it already, else the oldest; of several as old the
// first by namespace.
func (r *Reconcilers) claimant(host string) *api.DomainMapping {
	var best *api.DomainMapping
	for _, m := range r.cache.mappingsFor(host) {
		if best == nil || claimsBefore(m, best) {
			best = m
		}
	}
	return best
}

func claimsBefore(a, b *api.DomainMapping) bool {
	if x, y := a.Status.Conditions.IsTrue(api.ConditionDomainClaimed), b.Status.Conditions.IsTrue(api.ConditionDomainClaimed); x != y {
		return x
	}
	if a.CreationTimestamp != nil && b.CreationTimestamp != nil && !a.CreationTimestamp.Equal(b.CreationTimestamp.Time) {
		return a.CreationTimestamp.Before(b.CreationTimestamp.Time)
	}
	return strings.Compare(a.Namespace, b.Namespace) < 0
}

// reconcileHost looks at all domain mappings of one host.
func (r *Reconcilers) reconcileHost(ctx context.Context, host string) error {
	winner := r.claimant(host)
	if winner == nil {
		r.table.setMapping(host, nil)
		r.table.publish(r.platform.SetRoutes)
		return nil
	}
	if err := r.reconcileMapping(ctx, winner, host, true); err != nil {
		return err
	}
	for _, m := range r.cache.mappingsFor(host) {
		if nameOf(m) == nameOf(winner) {
			continue
		}
		if err := r.reconcileMapping(ctx, m, host, false); err != nil {
			return err
		}
	}
	return nil
}

func (r *Reconcilers) reconcileMapping(ctx context.Context, m *api.DomainMapping, host string, first bool) error {
	now := r.cfg.Now()
	next := *m
	next.Status.ObservedGeneration = m.Generation
	c := &next.Status.Conditions
	r.warn(m, c)
	next.Status.URL = r.cfg.url(host, false)
	next.Status.Address = &api.Addressable{URL: next.Status.URL}
	c.Set(now, api.ConditionCertificateProvisioned, api.True, api.ReasonTLSNotEnabled, "autoTLS is not enabled")

	missing := r.reference(m)
	if missing != "" {
		c.Set(now, api.ConditionReferenceResolved, api.False, reasonResolveFailed, missing)
	} else {
		c.Set(now, api.ConditionReferenceResolved, api.True, "", "")
	}

	held, shadowed := false, false
	if first {
		var to *mapping
		if missing == "" {
			to = &mapping{nameOf(m), name{m.Namespace, m.Spec.Ref.Name}, api.RouteTimeouts(m.Annotations)}
		}
		held, shadowed = r.table.setMapping(host, to)
		r.table.publish(r.platform.SetRoutes)
	}
	switch {
	case !first:
		c.Set(now, api.ConditionDomainClaimed, api.False, reasonDomainAlreadyClaimed, "The domain name is already in use by another DomainMapping")
	case shadowed:
		c.Set(now, api.ConditionDomainClaimed, api.False, reasonDomainAlreadyClaimed, "The domain name is already in use by a Route of this installation")
	default:
		c.Set(now, api.ConditionDomainClaimed, api.True, "", "")
	}
	switch {
	case held:
		c.Set(now, api.ConditionIngressReady, api.True, "", "")
	case missing != "":
		c.Set(now, api.ConditionIngressReady, api.Unknown, reasonUnresolved, "")
	default:
		c.Set(now, api.ConditionIngressReady, api.Unknown, reasonIngressNotConfigured, "Ingress has not yet been reconciled.")
	}
	c.Summarise(now, api.ConditionReady, api.ReadyDependents(api.DomainMappings)...)
	return r.updateStatus(ctx, api.DomainMappings, m, &next)
}

// reference says what is wrong with what a domain mapping refers to; empty if it is there.
func (r *Reconcilers) reference(m *api.DomainMapping) string {
	ref := m.Spec.Ref
	group, _, _ := strings.Cut(ref.APIVersion, "/")
	at := name{m.Namespace, ref.Name}
	switch {
	case ref.Namespace != "" && ref.Namespace != m.Namespace:
		return fmt.Sprintf("the reference is into namespace %q, the DomainMapping is in %q", ref.Namespace, m.Namespace)
	case ref.Kind == api.Services.Kind && group == api.ServingGroup:
		if r.cache.service(at) == nil {
			return fmt.Sprintf("services.serving.knative.dev %q not found", ref.Name)
		}
	case ref.Kind == api.Routes.Kind && group == api.ServingGroup:
		if r.cache.route(at) == nil {
			return fmt.Sprintf("routes.serving.knative.dev %q not found", ref.Name)
		}
	default:
		return fmt.Sprintf("%s %s cannot be referred to: only Services and Routes of %s", ref.APIVersion, ref.Kind, api.ServingGroup)
	}
	return ""
}
