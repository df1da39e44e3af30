package reconcile

import (
	"context"
	"errors"
	"maps"
	"reflect"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/state"
)

// Every call of the store but lists and watches goes through here: it has a deadline, and what it brought is in the cache when
// it returns.

func (r *Reconcilers) absorb(o api.Object) {
	if old, changed := r.cache.putOwn(o); changed {
		r.changed(old, o)
	}
}

// read returns an object as the store has it now, which belongs to the caller; nil if there is none.
func (r *Reconcilers) read(ctx context.Context, k *api.Kind, n name) (api.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.StoreTimeout)
	defer cancel()
	o, err := r.store.Get(ctx, k, n.namespace, n.name)
	if errors.Is(err, state.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r.absorb(o)
	return o, nil
}

func (r *Reconcilers) create(ctx context.Context, k *api.Kind, o api.Object) (api.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.StoreTimeout)
	defer cancel()
	made, err := r.store.Create(ctx, k, o)
	if err != nil {
		return nil, err
	}
	r.absorb(made)
	return made, nil
}

func (r *Reconcilers) update(ctx context.Context, k *api.Kind, o api.Object) (api.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.StoreTimeout)
	defer cancel()
	now, err := r.store.Update(ctx, k, o)
	if err != nil {
		return nil, err
	}
	r.absorb(now)
	return now, nil
}

// updateStatus writes the status of now if it differs from old's. An object that is gone meanwhile needs none.
func (r *Reconcilers) updateStatus(ctx context.Context, k *api.Kind, old, now api.Object) error {
	if reflect.DeepEqual(old, now) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.StoreTimeout)
	defer cancel()
	written, err := r.store.UpdateStatus(ctx, k, now)
	if errors.Is(err, state.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	r.absorb(written)
	return nil
}

// delete removes exactly this object, at exactly this version if one is given; gone already is fine. The cache learns of it
// by the watch: until then a pass may see the object once more, which does no harm.
func (r *Reconcilers) delete(ctx context.Context, k *api.Kind, o api.Object, version string) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.StoreTimeout)
	defer cancel()
	m := o.Meta()
	_, err := r.store.Delete(ctx, k, m.Namespace, m.Name, m.UID, version)
	if errors.Is(err, state.ErrNotFound) {
		return nil
	}
	return err
}

// controller returns the reference to the owner that manages an object, nil if it has none.
func controller(o api.Object) *api.OwnerReference {
	refs := o.Meta().OwnerReferences
	for i := range refs {
		if refs[i].Controller != nil && *refs[i].Controller {
			return &refs[i]
		}
	}
	return nil
}

// ownedBy is the reference that makes an object a child of its owner.
func ownedBy(k *api.Kind, owner *api.ObjectMeta) []api.OwnerReference {
	yes := true
	return []api.OwnerReference{{APIVersion: k.APIVersion, Kind: k.Kind, Name: owner.Name, UID: owner.UID, Controller: &yes, BlockOwnerDeletion: &yes}}
}

func owns(owner, o api.Object) bool {
	c := controller(o)
	return c != nil && c.UID == owner.Meta().UID
}

// removeOrphan deletes an object whose owner is gone, and says whether it did.
func (r *Reconcilers) removeOrphan(ctx context.Context, k *api.Kind, o api.Object) (bool, error) {
	c := controller(o)
	if c == nil {
		return false, nil
	}
	var ownerKind *api.Kind
	for _, k := range []*api.Kind{api.Services, api.Configurations, api.Subnets} {
		if k.Kind == c.Kind && k.APIVersion == c.APIVersion {
			ownerKind = k
		}
	}
	if ownerKind == nil {
		return false, nil // owned by something that is not ours to know
	}
	at := name{o.Meta().Namespace, c.Name}
	switch ownerKind {
	case api.Services:
		if s := r.cache.service(at); s != nil && s.UID == c.UID {
			return false, nil
		}
	case api.Configurations:
		if s := r.cache.configuration(at); s != nil && s.UID == c.UID {
			return false, nil
		}
	case api.Subnets:
		if s := r.cache.netObject(api.Subnets, at); s != nil && s.Meta().UID == c.UID {
			return false, nil
		}
	}
	// The watches of two kinds are not in step: the child may be here before its owner. Only the store knows.
	owner, err := r.read(ctx, ownerKind, at)
	if err != nil || owner != nil && owner.Meta().UID == c.UID {
		return false, err
	}
	r.cfg.Log.Info("deleted with its owner", "kind", k.Plural, "namespace", at.namespace, "name", o.Meta().Name, "owner", c.Name)
	return true, r.delete(ctx, k, o, "")
}

// sameToOthers says that two states of a revision differ only in what nobody but the revision's own status is about: replica
// counts and the condition Active.
func sameToOthers(a, b *api.Revision) bool {
	if a.Generation != b.Generation || !maps.Equal(a.Labels, b.Labels) || !maps.Equal(a.Annotations, b.Annotations) ||
		!reflect.DeepEqual(a.Status.ContainerStatuses, b.Status.ContainerStatuses) {
		return false
	}
	ca, cb := a.Status.Conditions, b.Status.Conditions
	ca.Remove(api.ConditionActive) // on our own slice headers: the objects stay as they are
	cb.Remove(api.ConditionActive)
	return ca.Equal(cb)
}

// warn shows what of an object's spec is accepted but has no effect yet.
func (r *Reconcilers) warn(o api.Object, conditions *api.Conditions) {
	sentences := api.Unsupported(o)
	if len(sentences) == 0 {
		conditions.Remove(api.ConditionFieldsHonoured)
		return
	}
	conditions.SetWarning(r.cfg.Now(), api.ConditionFieldsHonoured, api.False, api.ReasonUnsupportedFields, join(sentences))
}

// join makes one line of several sentences.
func join(sentences []string) string {
	out := ""
	for i, s := range sentences {
		if i > 0 {
			out += " "
		}
		out += s
		if s != "" && s[len(s)-1] != '.' {
			out += "."
		}
	}
	return out
}
