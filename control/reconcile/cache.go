package reconcile

import (
	"slices"
	"strconv"
	"sync"

	"github.com/thawrun/thaw/api"
)

// netKinds are the kinds of tenants' networks.
var netKinds = []*api.Kind{api.VPCs, api.Subnets, api.Gateways, api.ElasticIPs}

// name is an object's place within its kind.
type name struct{ namespace, name string }

func nameOf(o api.Object) name { return name{o.Meta().Namespace, o.Meta().Name} }

// version is the store's revision of an object's last write.
func version[T api.Object](o T) int64 {
	v, _ := strconv.ParseInt(o.Meta().ResourceVersion, 10, 64) // the store fills it with a number
	return v
}

// shelf holds the objects of one kind, or what is kept of them. Guarded by cache.mu.
type shelf[V any] struct {
	objects map[name]V
	version func(V) int64
	// seen is the store's revision up to which the watch has told everything. A write of ours that is not newer was
	// already told, or overtaken by a deletion, and must not be taken in again.
	seen int64
}

func newShelf[V any](version func(V) int64) shelf[V] {
	return shelf[V]{objects: map[name]V{}, version: version}
}

// put takes v in unless something newer is known; it returns what was there before.
func (s *shelf[V]) put(n name, v V) (old V, changed bool) {
	old, had := s.objects[n]
	if had && s.version(old) >= s.version(v) {
		return old, false
	}
	s.objects[n] = v
	return old, true
}

// drop removes the object that was deleted at the given revision of the store.
func (s *shelf[V]) drop(n name, at int64) (old V, changed bool) {
	old, had := s.objects[n]
	if !had || s.version(old) > at {
		var none V
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
// never modified. Services, configurations and routes are there in outline only.
type cache struct {
	mu             sync.RWMutex
	services       shelf[*outline]
	configurations shelf[*outline]
	revisions      shelf[*api.Revision]
	routes         shelf[*api.Route]
	mappings       shelf[*api.DomainMapping]
	net            map[*api.Kind]*shelf[api.Object] // VPCs and the like: few, and kept whole

	revisionsOf       index[name]   // configuration -> its revisions
	revisionsOfSubnet index[name]   // namespace and VPC/SUBNET -> revisions that join it
	routesOfConfig    index[name]   // configuration -> routes whose spec names it
	routesOfRev       index[name]   // revision -> routes whose spec or status names it
	mappingsOfHost    index[string] // host -> domain mappings of that name in all namespaces
	mappingsOfRoute   index[name]   // service or route -> domain mappings that refer to it

	// wanted has the configurations that wait for the name of a revision which is not theirs, by that revision.
	wanted index[name]

	words  words
	outset bool // routes are kept whole: the route table is not made yet
}

func newCache() *cache {
	net := map[*api.Kind]*shelf[api.Object]{}
	for _, k := range netKinds {
		s := newShelf(version[api.Object])
		net[k] = &s
	}
	return &cache{net: net, services: newShelf((*outline).at), configurations: newShelf((*outline).at),
		revisions: newShelf(version[*api.Revision]), routes: newShelf(version[*api.Route]), mappings: newShelf(version[*api.DomainMapping]),
		words: words{}, outset: true, revisionsOf: index[name]{}, revisionsOfSubnet: index[name]{}, routesOfConfig: index[name]{}, routesOfRev: index[name]{},
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
	case *api.DomainMapping:
		return &c.mappings.seen
	}
	return &c.net[api.KindOf(o)].seen
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
		was, ok := c.services.put(nameOf(o), outlineOf(o, api.ConfigurationStatusFields{}, nil))
		return orNil(was.service(nameOf(o))), ok
	case *api.Configuration:
		was, ok := c.configurations.put(nameOf(o), outlineOf(o, o.Status.ConfigurationStatusFields, o.Status.Conditions))
		return orNil(was.configuration(nameOf(o))), ok
	case *api.Revision:
		was, ok := c.revisions.put(nameOf(o), slimRevision(c.words.revision(o), c.revisions.objects[nameOf(o)]))
		if ok {
			c.indexRevision(was, o)
		}
		return orNil(was), ok
	case *api.Route:
		if !c.outset {
			o = slimRoute(o)
		}
		was, ok := c.routes.put(nameOf(o), o)
		if ok {
			c.indexRoute(was, o)
		}
		return orNil(was), ok
	case *api.DomainMapping:
		was, ok := c.mappings.put(nameOf(o), o)
		if ok {
			c.indexMapping(was, o)
		}
		return orNil(was), ok
	}
	return c.net[api.KindOf(o)].put(nameOf(o), o)
}

// drop removes an object that was deleted at the given revision of the store; old is what is gone.
func (c *cache) drop(o api.Object, at int64) (old api.Object, changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := nameOf(o)
	switch o.(type) {
	case *api.Service:
		was, ok := c.services.drop(n, at)
		return orNil(was.service(n)), ok
	case *api.Configuration:
		was, ok := c.configurations.drop(n, at)
		return orNil(was.configuration(n)), ok
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
	return c.net[api.KindOf(o)].drop(n, at)
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
		if ref := old.Annotations[api.AnnotationSubnet]; ref != "" {
			c.revisionsOfSubnet.remove(name{old.Namespace, ref}, nameOf(old))
		}
	}
	if now != nil && now.ConfigurationName() != "" {
		c.revisionsOf.add(name{now.Namespace, now.ConfigurationName()}, nameOf(now))
	}
	if now != nil {
		if ref := now.Annotations[api.AnnotationSubnet]; ref != "" {
			c.revisionsOfSubnet.add(name{now.Namespace, ref}, nameOf(now))
		}
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
	return c.services.objects[n].service(n)
}

func (c *cache) configuration(n name) *api.Configuration {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.configurations.objects[n].configuration(n)
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

// netObject returns a VPC or the like.
func (c *cache) netObject(k *api.Kind, n name) api.Object {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.net[k].objects[n]
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
		return drawn(c.services.objects, (*outline).service)
	case api.Configurations:
		return drawn(c.configurations.objects, (*outline).configuration)
	case api.Revisions:
		return values(c.revisions.objects)
	case api.Routes:
		return values(c.routes.objects)
	case api.DomainMappings:
		return values(c.mappings.objects)
	}
	return values(c.net[k].objects)
}

func values[T api.Object](m map[name]T) []api.Object {
	return drawn(m, func(o T, _ name) T { return o })
}

// drawn makes objects of what is kept.
func drawn[V any, T api.Object](m map[name]V, object func(V, name) T) []api.Object {
	all := make([]api.Object, 0, len(m))
	for n, v := range m {
		all = append(all, object(v, n))
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
