package reconcile

import (
	"maps"
	"reflect"
	"slices"
	"strconv"
	"sync"

	"github.com/thawrun/thaw/api"
)

// name is an object's place within its kind.
type name struct{ namespace, name string }

func nameOf(o api.Object) name { return name{o.Meta().Namespace, o.Meta().Name} }

// version is the store's revision of an object's last write.
func version(o api.Object) int64 {
	v, _ := strconv.ParseInt(o.Meta().ResourceVersion, 10, 64) // the store fills it with a number
	return v
}

// shelf holds the objects of one kind. Guarded by cache.mu.
type shelf[T api.Object] struct {
	objects map[name]T
	// seen is the store's revision up to which the watch has told everything. A write of ours that is not newer was
	// already told, or overtaken by a deletion, and must not be taken in again.
	seen int64
}

// put takes o in unless something newer is known; it returns what was there before.
func (s *shelf[T]) put(o T) (old T, changed bool) {
	n := nameOf(o)
	old, had := s.objects[n]
	if had && version(old) >= version(o) {
		return old, false
	}
	if s.objects == nil {
		s.objects = map[name]T{}
	}
	s.objects[n] = o
	return old, true
}

// drop removes the object that was deleted at the given revision of the store.
func (s *shelf[T]) drop(n name, at int64) (old T, changed bool) {
	old, had := s.objects[n]
	if !had || version(old) > at {
		var none T
		return none, false
	}
	delete(s.objects, n)
	return old, true
}

// index finds objects by something they mention. The lists are short; they are copied on change so that readers may keep
// what they got.
type index[K comparable] map[K][]name

func (x index[K]) add(k K, n name) {
	if !slices.Contains(x[k], n) {
		x[k] = append(slices.Clip(x[k]), n)
	}
}

func (x index[K]) remove(k K, n name) {
	rest := slices.DeleteFunc(slices.Clone(x[k]), func(m name) bool { return m == n })
	if len(rest) == 0 {
		delete(x, k)
		return
	}
	x[k] = rest
}

// cache is what the store holds of our kinds, with the indexes that answer "who must look again". Objects in it are shared and
// never modified. Services and configurations are there in outline only.
type cache struct {
	mu             sync.RWMutex
	services       shelf[*api.Service]
	configurations shelf[*api.Configuration]
	revisions      shelf[*api.Revision]
	routes         shelf[*api.Route]
	mappings       shelf[*api.DomainMapping]

	revisionsOf     index[name]   // configuration -> its revisions
	routesOfConfig  index[name]   // configuration -> routes whose spec names it
	routesOfRev     index[name]   // revision -> routes whose spec or status names it
	mappingsOfHost  index[string] // host -> domain mappings of that name in all namespaces
	mappingsOfRoute index[name]   // service or route -> domain mappings that refer to it

	// wanted has the configurations that wait for the name of a revision which is not theirs, by that revision.
	wanted index[name]
}

func newCache() *cache {
	return &cache{revisionsOf: index[name]{}, routesOfConfig: index[name]{}, routesOfRev: index[name]{},
		mappingsOfHost: index[string]{}, mappingsOfRoute: index[name]{}, wanted: index[name]{}}
}

// put takes an object in. changed is false when something at least as new is known already; old is nil when it is new.
func (c *cache) put(o api.Object) (old api.Object, changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.putLocked(o)
}

// putOwn takes in the result of a write of ours, unless the watch is already past it.
func (c *cache) putOwn(o api.Object) (old api.Object, changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if version(o) <= *c.seenLocked(o) {
		return nil, false
	}
	return c.putLocked(o)
}

func (c *cache) seenLocked(o api.Object) *int64 {
	switch o.(type) {
	case *api.Service:
		return &c.services.seen
	case *api.Configuration:
		return &c.configurations.seen
	case *api.Revision:
		return &c.revisions.seen
	case *api.Route:
		return &c.routes.seen
	}
	return &c.mappings.seen
}

// saw notes that the watch has told everything about o's kind up to a revision of the store.
func (c *cache) saw(o api.Object, revision int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	seen := c.seenLocked(o)
	*seen = max(*seen, revision)
}

func (c *cache) putLocked(o api.Object) (old api.Object, changed bool) {
	switch o := o.(type) {
	case *api.Service:
		was, ok := c.services.put(slimService(o))
		return orNil(was), ok
	case *api.Configuration:
		was, ok := c.configurations.put(slimConfiguration(o))
		return orNil(was), ok
	case *api.Revision:
		was, ok := c.revisions.put(slimRevision(o, c.revisions.objects[nameOf(o)]))
		if ok {
			c.indexRevision(was, o)
		}
		return orNil(was), ok
	case *api.Route:
		was, ok := c.routes.put(o)
		if ok {
			c.indexRoute(was, o)
		}
		return orNil(was), ok
	case *api.DomainMapping:
		was, ok := c.mappings.put(o)
		if ok {
			c.indexMapping(was, o)
		}
		return orNil(was), ok
	}
	return nil, false
}

// drop removes an object that was deleted at the given revision of the store; old is what is gone.
func (c *cache) drop(o api.Object, at int64) (old api.Object, changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := nameOf(o)
	switch o.(type) {
	case *api.Service:
		was, ok := c.services.drop(n, at)
		return orNil(was), ok
	case *api.Configuration:
		was, ok := c.configurations.drop(n, at)
		return orNil(was), ok
	case *api.Revision:
		was, ok := c.revisions.drop(n, at)
		if ok {
			c.indexRevision(was, nil)
		}
		return orNil(was), ok
	case *api.Route:
		was, ok := c.routes.drop(n, at)
		if ok {
			c.indexRoute(was, nil)
		}
		return orNil(was), ok
	case *api.DomainMapping:
		was, ok := c.mappings.drop(n, at)
		if ok {
			c.indexMapping(was, nil)
		}
		return orNil(was), ok
	}
	return nil, false
}

// Services and configurations are kept without what only their own passes look at, which read them from the store: for a
// thousand idle services that is most of the memory.

// slimService keeps that the service exists.
func slimService(s *api.Service) *api.Service {
	return &api.Service{ObjectMeta: identity(&s.ObjectMeta)}
}

// slimConfiguration keeps what routes, revisions and garbage collection ask.
func slimConfiguration(c *api.Configuration) *api.Configuration {
	slim := &api.Configuration{ObjectMeta: identity(&c.ObjectMeta)}
	slim.Status.ConfigurationStatusFields = c.Status.ConfigurationStatusFields
	if v := c.Status.Conditions.Get(api.ConditionReady); v != nil {
		slim.Status.Conditions = api.Conditions{*v}
	}
	return slim
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

func identity(m *api.ObjectMeta) api.ObjectMeta {
	return api.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, Generation: m.Generation}
}

// orNil turns a typed nil into a plain one.
func orNil[T interface {
	comparable
	api.Object
}](o T) api.Object {
	var none T
	if o == none {
		return nil
	}
	return o
}

func (c *cache) indexRevision(old, now *api.Revision) {
	if old != nil {
		c.revisionsOf.remove(name{old.Namespace, old.ConfigurationName()}, nameOf(old))
	}
	if now != nil && now.ConfigurationName() != "" {
		c.revisionsOf.add(name{now.Namespace, now.ConfigurationName()}, nameOf(now))
	}
}

func (c *cache) indexRoute(old, now *api.Route) {
	if old != nil {
		configs, revs := mentions(old)
		for _, n := range configs {
			c.routesOfConfig.remove(n, nameOf(old))
		}
		for _, n := range revs {
			c.routesOfRev.remove(n, nameOf(old))
		}
	}
	if now != nil {
		configs, revs := mentions(now)
		for _, n := range configs {
			c.routesOfConfig.add(n, nameOf(now))
		}
		for _, n := range revs {
			c.routesOfRev.add(n, nameOf(now))
		}
	}
}

func (c *cache) indexMapping(old, now *api.DomainMapping) {
	if old != nil {
		c.mappingsOfHost.remove(hostOf(old), nameOf(old))
		c.mappingsOfRoute.remove(name{old.Namespace, old.Spec.Ref.Name}, nameOf(old))
	}
	if now != nil {
		c.mappingsOfHost.add(hostOf(now), nameOf(now))
		c.mappingsOfRoute.add(name{now.Namespace, now.Spec.Ref.Name}, nameOf(now))
	}
}

// mentions returns the configurations and revisions that a route speaks of: what it wants, and what it really leads to.
func mentions(r *api.Route) (configs, revs []name) {
	if len(r.Spec.Traffic) == 0 { // see resolve
		configs = append(configs, nameOf(r))
	}
	for _, t := range r.Spec.Traffic {
		if t.RevisionName != "" {
			revs = append(revs, name{r.Namespace, t.RevisionName})
		} else {
			configs = append(configs, name{r.Namespace, t.ConfigurationName})
		}
	}
	for _, t := range r.Status.Traffic {
		if t.RevisionName != "" {
			revs = append(revs, name{r.Namespace, t.RevisionName})
		}
	}
	return configs, revs
}

// The readers. All return nil for what is not there.

func (c *cache) service(n name) *api.Service {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.services.objects[n]
}

func (c *cache) configuration(n name) *api.Configuration {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.configurations.objects[n]
}

func (c *cache) revision(n name) *api.Revision {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.revisions.objects[n]
}

func (c *cache) route(n name) *api.Route {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.routes.objects[n]
}

// revisionsOfConfig returns a configuration's revisions, in no order.
func (c *cache) revisionsOfConfig(n name) []*api.Revision {
	c.mu.RLock()
	defer c.mu.RUnlock()
	names := c.revisionsOf[n]
	revs := make([]*api.Revision, 0, len(names))
	for _, m := range names {
		revs = append(revs, c.revisions.objects[m])
	}
	return revs
}

// routesTo returns the names of the routes that mention a revision, sorted.
func (c *cache) routesTo(n name) []string {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var names []string
	for _, m := range c.routesOfRev[n] {
		names = append(names, m.name)
	}
	slices.Sort(names)
	return names
}

// mappingsFor returns the domain mappings of a host in all namespaces, in no order.
func (c *cache) mappingsFor(host string) []*api.DomainMapping {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var all []*api.DomainMapping
	for _, m := range c.mappingsOfHost[host] {
		all = append(all, c.mappings.objects[m])
	}
	return all
}

// keys returns what must look again when n of an index changes.
func keys[K comparable](c *cache, x index[K], k K, kd kind) []key {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var all []key
	for _, m := range x[k] {
		all = append(all, key{kd, m.namespace, m.name})
	}
	return all
}

// all returns the objects of a kind, in no order.
func (c *cache) all(k *api.Kind) []api.Object {
	c.mu.RLock()
	defer c.mu.RUnlock()
	switch k {
	case api.Services:
		return values(c.services.objects)
	case api.Configurations:
		return values(c.configurations.objects)
	case api.Revisions:
		return values(c.revisions.objects)
	case api.Routes:
		return values(c.routes.objects)
	}
	return values(c.mappings.objects)
}

func values[T api.Object](m map[name]T) []api.Object {
	all := make([]api.Object, 0, len(m))
	for _, o := range m {
		all = append(all, o)
	}
	return all
}

// want notes that a configuration waits for the name of a revision to become free.
func (c *cache) want(revision, configuration name) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wanted.add(revision, configuration)
}

// wanting returns the configurations that wait for the name of a revision, once.
func (c *cache) wanting(revision name) []name {
	c.mu.Lock()
	defer c.mu.Unlock()
	waiting := c.wanted[revision]
	delete(c.wanted, revision)
	return waiting
}
