package reconcile

import (
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/thawrun/thaw/api"
)

// What is kept of objects. Services, configurations and routes are kept without what only their own passes look at, which read them
// from the store; revisions are whole, because the platform needs them, but say everything only once. Most services of an
// installation are idle, and for a thousand of them this is most of the memory.

// outline is what routes, revisions, domain mappings and garbage collection ask of a service or configuration.
type outline struct {
	uid     string
	version int64
	newest  api.ConfigurationStatusFields // of a configuration
	failed  bool                          // a configuration that is not Ready; as opposed to not yet
}

func outlineOf(o api.Object, newest api.ConfigurationStatusFields, conditions api.Conditions) *outline {
	if newest.LatestReadyRevisionName == newest.LatestCreatedRevisionName {
		newest.LatestReadyRevisionName = newest.LatestCreatedRevisionName // one string for both
	}
	return &outline{o.Meta().UID, version(o), newest, conditions.IsFalse(api.ConditionReady)}
}

func (o *outline) at() int64 { return o.version }

// service is an object with what is known; nil for nil.
func (o *outline) service(n name) *api.Service {
	if o == nil {
		return nil
	}
	return &api.Service{ObjectMeta: o.meta(n)}
}

// configuration is an object with what is known, of its conditions whether it failed; nil for nil.
func (o *outline) configuration(n name) *api.Configuration {
	if o == nil {
		return nil
	}
	c := &api.Configuration{ObjectMeta: o.meta(n), Status: api.ConfigurationStatus{ConfigurationStatusFields: o.newest}}
	if o.failed {
		c.Status.Conditions = api.Conditions{{Type: api.ConditionReady, Status: api.False}}
	}
	return c
}

func (o *outline) meta(n name) api.ObjectMeta {
	return api.ObjectMeta{Namespace: n.namespace, Name: n.name, UID: o.uid, ResourceVersion: strconv.FormatInt(o.version, 10)}
}

// slimRoute keeps who a route belongs to and what it mentions.
func slimRoute(r *api.Route) *api.Route {
	slim := &api.Route{ObjectMeta: api.ObjectMeta{Namespace: r.Namespace, Name: r.Name, UID: r.UID, ResourceVersion: r.ResourceVersion}}
	slim.OwnerReferences = slices.Clone(r.OwnerReferences)
	slim.Spec.Traffic = slimTraffic(r.Spec.Traffic)
	slim.Status.Traffic = slimTraffic(r.Status.Traffic)
	return slim
}

func slimTraffic(all []api.TrafficTarget) []api.TrafficTarget {
	if all == nil {
		return nil
	}
	slim := make([]api.TrafficTarget, len(all))
	for i, t := range all {
		slim[i] = api.TrafficTarget{RevisionName: t.RevisionName, ConfigurationName: t.ConfigurationName}
	}
	return slim
}

// outlineRoutes ends the time in which routes are kept whole: from now on their passes read them.
func (c *cache) outlineRoutes() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.outset = false
	for n, r := range c.routes.objects {
		c.routes.objects[n] = slimRoute(r)
	}
}

// slimRevision keeps all of a revision, but only once what its older version has too: the platform goes on holding that one.
func slimRevision(r, old *api.Revision) *api.Revision {
	if old == nil || old.UID != r.UID {
		return r
	}
	slim := *r
	slim.Spec = old.Spec // it never changes
	if maps.Equal(r.Labels, old.Labels) {
		slim.Labels = old.Labels
	}
	if maps.Equal(r.Annotations, old.Annotations) {
		slim.Annotations = old.Annotations
	}
	if reflect.DeepEqual(r.OwnerReferences, old.OwnerReferences) {
		slim.OwnerReferences = old.OwnerReferences
	}
	if slices.Equal(r.Status.ContainerStatuses, old.Status.ContainerStatuses) {
		slim.Status.ContainerStatuses = old.Status.ContainerStatuses
	}
	return &slim
}

// words has one copy of each string that many objects say: types and reasons of conditions, names of labels, images. The
// standard library's package unique forgets a string that is not held by its handle, so it cannot serve fields of type string.
type words map[string]string

// Bounds of words, a megabyte in all. Beyond maxWords it begins anew, and what is in use stays with its users; longer ones (bytes) are
// messages that nobody else has.
const (
	maxWords = 4096
	maxWord  = 256
)

// of returns the copy of s.
func (w words) of(s string) string {
	if s == "" || len(s) > maxWord {
		return s
	}
	if known, ok := w[s]; ok {
		return known
	}
	if len(w) >= maxWords {
		clear(w)
	}
	s = strings.Clone(s)
	w[s] = s
	return s
}

// pairs returns labels or annotations with few words of their own. Values are taken from known where they are the same; other
// long ones are left alone, as each object has its own.
func (w words) pairs(m map[string]string, known ...string) map[string]string {
	if m == nil {
		return nil
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		if i := slices.Index(known, v); i >= 0 {
			v = known[i]
		} else if len(v) <= 8 {
			v = w.of(v)
		}
		out[w.of(k)] = v
	}
	return out
}

// revision returns a copy of a revision that says the same with few words of its own, and in slices without room to grow.
func (w words) revision(r *api.Revision) *api.Revision {
	c := *r
	c.Kind, c.APIVersion, c.Namespace = w.of(r.Kind), w.of(r.APIVersion), w.of(r.Namespace)
	known := []string{c.Name}
	c.OwnerReferences = exactly(r.OwnerReferences)
	for i := range c.OwnerReferences {
		o := &c.OwnerReferences[i]
		o.Kind, o.APIVersion = w.of(o.Kind), w.of(o.APIVersion)
		known = append(known, o.Name, o.UID)
	}
	c.Labels, c.Annotations = w.pairs(r.Labels, known...), w.pairs(r.Annotations, known...)
	c.Status.Conditions = exactly(r.Status.Conditions)
	for i := range c.Status.Conditions {
		v := &c.Status.Conditions[i]
		v.Type, v.Status, v.Severity, v.Reason, v.Message = w.of(v.Type), w.of(v.Status), w.of(v.Severity), w.of(v.Reason), w.of(v.Message)
	}
	c.Status.ContainerStatuses = exactly(r.Status.ContainerStatuses)
	for i := range c.Status.ContainerStatuses {
		v := &c.Status.ContainerStatuses[i]
		v.Name, v.ImageDigest = w.of(v.Name), w.of(v.ImageDigest)
	}
	c.Spec.Containers = exactly(r.Spec.Containers)
	for i := range c.Spec.Containers {
		v := &c.Spec.Containers[i]
		v.Name, v.Image, v.ImagePullPolicy = w.of(v.Name), w.of(v.Image), w.of(v.ImagePullPolicy)
		v.Ports, v.Env = exactly(v.Ports), exactly(v.Env)
		for i := range v.Ports {
			v.Ports[i].Name, v.Ports[i].Protocol = w.of(v.Ports[i].Name), w.of(v.Ports[i].Protocol)
		}
		for i := range v.Env {
			v.Env[i].Name = w.of(v.Env[i].Name)
		}
	}
	return &c
}

// exactly returns a copy without room to grow.
func exactly[S ~[]E, E any](s S) S {
	if s == nil {
		return nil
	}
	c := make(S, len(s))
	copy(c, s)
	return c
}
