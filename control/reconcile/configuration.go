package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/state"
)

// errTaken says that the name of the revision to be belongs to a revision with another spec.
var errTaken = errors.New("reconcile: the revision's name is taken")

// errGone says that an object was there a moment ago; the next pass sees what is true then.
var errGone = errors.New("reconcile: the object went away meanwhile")

// reconcileConfiguration stamps a revision for the newest template and follows which of its revisions are ready.
func (r *Reconcilers) reconcileConfiguration(ctx context.Context, k key) error {
	o, err := r.read(ctx, api.Configurations, k.of())
	if o == nil {
		return err
	}
	cfg := o.(*api.Configuration)
	if gone, err := r.removeOrphan(ctx, api.Configurations, cfg); gone || err != nil {
		return err
	}
	now := r.cfg.Now()
	next := *cfg
	next.Status.ObservedGeneration = cfg.Generation
	c := &next.Status.Conditions
	r.warn(cfg, c)

	created, err := r.stamp(ctx, cfg)
	switch {
	case errors.Is(err, errTaken):
		r.cache.want(name{cfg.Namespace, revisionName(cfg)}, nameOf(cfg))
		c.Set(now, api.ConditionReady, api.False, api.ReasonRevisionFailed,
			fmt.Sprintf("Revision creation failed with message: revisions.serving.knative.dev %q already exists.", revisionName(cfg)))
	case err != nil:
		return err
	case created == nil:
		return nil // the revision of a former configuration is in the way, and going
	default:
		next.Status.LatestCreatedRevisionName = created.Name
		switch v := created.Status.Conditions.Get(api.ConditionReady); {
		case v == nil:
			c.Set(now, api.ConditionReady, api.Unknown, "", "")
		case v.Status == api.False:
			c.Set(now, api.ConditionReady, api.False, api.ReasonRevisionFailed, fmt.Sprintf("Revision %q failed with message: %s.", created.Name, v.Message))
		case v.Status == api.True:
			c.Set(now, api.ConditionReady, api.True, "", "")
		default:
			c.Set(now, api.ConditionReady, api.Unknown, v.Reason, v.Message)
		}
	}
	next.Status.LatestReadyRevisionName = latestReady(cfg, r.cache.revisionsOfConfig(k.of()))
	return r.updateStatus(ctx, api.Configurations, cfg, &next)
}

// latestReady is the ready revision of the highest generation; it goes back only if the one it was is gone.
func latestReady(cfg *api.Configuration, revs []*api.Revision) string {
	var best *api.Revision
	for _, rev := range revs {
		if owns(cfg, rev) && rev.Ready() && (best == nil || generationOf(rev) > generationOf(best)) {
			best = rev
		}
	}
	for _, rev := range revs { // ready once is ready for ever, whatever becomes of its condition
		if rev.Name == cfg.Status.LatestReadyRevisionName && (best == nil || generationOf(rev) >= generationOf(best)) {
			best = rev
		}
	}
	if best == nil {
		return ""
	}
	return best.Name
}

// generationOf is the generation of the configuration that a revision stands for.
func generationOf(rev *api.Revision) int64 {
	n, _ := strconv.ParseInt(rev.Labels[api.LabelConfigurationGeneration], 10, 64) // 0, the oldest, if somebody broke the label
	return n
}

// revisionName is what the revision of a configuration's newest template is called.
func revisionName(cfg *api.Configuration) string {
	if n := cfg.Spec.Template.Name; n != "" {
		return n
	}
	return api.GenerateName(cfg.Name, cfg.Generation)
}

// nameTaken returns the revision that has the name of the configuration's next one and cannot be it; nil if there is none.
func (r *Reconcilers) nameTaken(cfg *api.Configuration) *api.Revision {
	rev := r.cache.revision(name{cfg.Namespace, revisionName(cfg)})
	if rev == nil || isOf(cfg, rev) {
		return nil
	}
	return rev
}

// isOf says that a revision is the one of the configuration's newest template: made for this generation, or for an earlier
// one with the same name and spec (which is how people roll back with named revisions).
func isOf(cfg *api.Configuration, rev *api.Revision) bool {
	if !owns(cfg, rev) {
		return false
	}
	return generationOf(rev) == cfg.Generation || api.EqualSpec(rev, &api.Revision{Spec: defaulted(cfg)})
}

// defaulted is the spec that a revision of the newest template has.
func defaulted(cfg *api.Configuration) api.RevisionSpec {
	rev := &api.Revision{Spec: api.DeepCopy(cfg).Spec.Template.Spec}
	api.SetDefaults(rev)
	return rev.Spec
}

// stamp returns the revision of the newest template; it makes it if there is none. nil without an error means: not yet.
func (r *Reconcilers) stamp(ctx context.Context, cfg *api.Configuration) (*api.Revision, error) {
	at := name{cfg.Namespace, revisionName(cfg)}
	rev := r.cache.revision(at)
	if rev == nil {
		made, err := r.create(ctx, api.Revisions, r.revisionOf(cfg))
		if !errors.Is(err, state.ErrExists) {
			if err != nil {
				return nil, err
			}
			r.cfg.Log.Info("revision created", "revision", api.MakeRevisionID(at.namespace, at.name), "generation", cfg.Generation)
			return made.(*api.Revision), nil
		}
		o, err := r.read(ctx, api.Revisions, at) // it is newer than the cache
		if o == nil {
			return nil, errors.Join(err, errGone)
		}
		rev = o.(*api.Revision)
	}
	if !isOf(cfg, rev) {
		if o := controller(rev); o != nil && o.Kind == api.Configurations.Kind && o.Name == cfg.Name && o.UID != cfg.UID {
			r.queue.add(revisionKey(rev.ID())) // of a former configuration of this name: it goes, then this one is looked at again
			return nil, nil
		}
		return nil, errTaken
	}
	if generation := strconv.FormatInt(cfg.Generation, 10); rev.Labels[api.LabelConfigurationGeneration] != generation {
		// An old revision is the newest again: order among revisions is by this label.
		next := *rev
		next.Labels = maps.Clone(rev.Labels)
		next.Labels[api.LabelConfigurationGeneration] = generation
		o, err := r.update(ctx, api.Revisions, &next)
		if err != nil {
			return nil, err
		}
		return o.(*api.Revision), nil
	}
	return rev, nil
}

// revisionOf is the revision of the newest template.
func (r *Reconcilers) revisionOf(cfg *api.Configuration) *api.Revision {
	t := cfg.Spec.Template
	labels, annotations := maps.Clone(t.Labels), maps.Clone(t.Annotations)
	if labels == nil {
		labels = map[string]string{}
	}
	if annotations == nil {
		annotations = map[string]string{}
	}
	labels[api.LabelConfiguration] = cfg.Name
	labels[api.LabelConfigurationUID] = cfg.UID
	labels[api.LabelConfigurationGeneration] = strconv.FormatInt(cfg.Generation, 10)
	labels[api.LabelRoutingState] = api.RoutingStatePending
	for _, l := range []string{api.LabelService, api.LabelServiceUID} {
		if v, ok := cfg.Labels[l]; ok {
			labels[l] = v
		} else {
			delete(labels, l)
		}
	}
	annotations[api.AnnotationRoutingStateModified] = r.cfg.Now().UTC().Format(time.RFC3339)
	if v, ok := cfg.Annotations[api.AnnotationLastModifier]; ok { // who changed the template made the revision
		annotations[api.AnnotationCreator] = v
	}
	return &api.Revision{ObjectMeta: api.ObjectMeta{Namespace: cfg.Namespace, Name: revisionName(cfg), Labels: labels, Annotations: annotations,
		OwnerReferences: ownedBy(api.Configurations, &cfg.ObjectMeta)}, Spec: defaulted(cfg)}
}
