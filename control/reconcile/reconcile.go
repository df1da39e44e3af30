package reconcile

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/state"
)

// Platform is what the reconcilers drive. Its methods must return soon: they are called while a lock is held that keeps the
// calls about one revision, and the tables, in order.
type Platform interface {
	// SetRoutes hands over the whole route table. It is immutable.
	SetRoutes(*routes.Table)
	// SetRevision hands over a revision whose code is resolved and whose network, if it joins one, is there: at the start each one that there is, later each one whose
	// metadata, digest or conditions (but for Active) changed. It is shared and must not be modified.
	SetRevision(*api.Revision)
	// RemoveRevision says that the revision is gone for good.
	RemoveRevision(api.RevisionID)
}

// Resolver finds the code that an image means now.
type Resolver interface {
	// Resolve returns the digest in a form that is an image, too. It may take its time.
	Resolve(ctx context.Context, image string) (digest string, err error)
}

// Reconcilers is the whole of this package at work.
type Reconcilers struct {
	// Static after New.
	cfg      Config
	store    *objects.Store
	platform Platform
	resolver Resolver
	synced   chan struct{}

	// Each of these has its own lock; none is held while another one's is taken, but for sending's (before cache's).
	queue    *queue
	cache    *cache
	table    *table
	observed observations
	images   images
	prepares prepares
	pairs    pairs

	allocating sync.Mutex // held while a key or an ID is looked for and written

	// sending keeps calls of SetRevision and RemoveRevision in order. sent is what was handed over last.
	sending sync.Mutex
	sent    map[api.RevisionID]*api.Revision // guarded by sending

	began time.Time // set by Run before anything runs

	background sync.WaitGroup // resolutions and calls of the network under way; Run waits for them
}

// New returns the reconcilers of a store. It starts nothing; cfg must be valid (see Config.Validate).
func New(cfg Config, store *objects.Store, p Platform, r Resolver) *Reconcilers {
	cfg = cfg.withDefaults()
	return &Reconcilers{cfg: cfg, store: store, platform: p, resolver: r, synced: make(chan struct{}), queue: newQueue(),
		cache: newCache(), table: newTable(), observed: observations{of: map[api.RevisionID]observation{}},
		images: newImages(cfg.Resolvers), sent: map[api.RevisionID]*api.Revision{}, pairs: pairs{of: map[name]*pairWork{}}}
}

// Synced is closed when the platform has got every revision and the complete route table of what the store held at the
// start: from then on it may serve.
func (r *Reconcilers) Synced() <-chan struct{} { return r.synced }

// Run works until ctx ends, and returns after everything it started has ended. It may be called once. A store that is away
// is waited for; the error is that of ctx, or of settings that cannot work.
func (r *Reconcilers) Run(ctx context.Context) error {
	if err := r.cfg.Validate(); err != nil {
		return fmt.Errorf("reconcile: %w", err)
	}
	r.began = r.cfg.Now()
	from := map[*api.Kind]int64{}
	for _, k := range api.Kinds {
		rev, err := r.load(ctx, k)
		if err != nil {
			return err
		}
		from[k] = rev
	}
	r.start()

	var wg sync.WaitGroup
	for _, k := range api.Kinds {
		wg.Go(func() { r.follow(ctx, k, from[k]) })
	}
	for range r.cfg.Workers {
		wg.Go(func() { r.work(ctx) })
	}
	<-ctx.Done()
	r.queue.close()
	wg.Wait()
	r.background.Wait()
	return context.Cause(ctx)
}

// load fills the cache with all objects of a kind, and drops what is in the cache and not in the store. It tries until it
// succeeds or ctx ends.
func (r *Reconcilers) load(ctx context.Context, k *api.Kind) (int64, error) {
	for retry := 100 * time.Millisecond; ; retry = min(2*retry, 5*time.Second) {
		rev, err := r.list(ctx, k)
		if err == nil {
			return rev, nil
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		r.cfg.Log.Warn("cannot read objects, trying again", "kind", k.Plural, "in", retry, "err", err)
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-time.After(retry):
		}
	}
}

func (r *Reconcilers) list(ctx context.Context, k *api.Kind) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.StoreTimeout)
	defer cancel()
	all, rev, err := r.store.List(ctx, k, "")
	if err != nil {
		return 0, err
	}
	there := make(map[name]bool, len(all))
	for _, o := range all {
		there[nameOf(o)] = true
		if old, changed := r.cache.put(o); changed {
			r.changed(old, o)
		}
	}
	for _, o := range r.cache.all(k) {
		if !there[nameOf(o)] {
			if old, changed := r.cache.drop(o, rev); changed {
				r.changed(old, nil)
			}
		}
	}
	r.cache.saw(k.New(), rev)
	return rev, nil
}

// follow keeps the cache up to date. A watch that breaks begins again from a fresh list: what was missed shows there.
func (r *Reconcilers) follow(ctx context.Context, k *api.Kind, from int64) {
	for {
		events, failed := r.store.Watch(ctx, k, "", from)
		for e := range events {
			r.told(e)
		}
		if ctx.Err() != nil {
			return
		}
		if err := failed(); !errors.Is(err, state.ErrCompacted) {
			r.cfg.Log.Warn("watch ended, reading all objects again", "kind", k.Plural, "err", err)
			select { // the list may work while watching does not: do not spin
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
		var err error
		if from, err = r.load(ctx, k); err != nil {
			return
		}
	}
}

// told takes one event of a watch in.
func (r *Reconcilers) told(e objects.Event) {
	var old api.Object
	var changed bool
	now := e.Object
	switch e.Type {
	case objects.Bookmark:
	case objects.Deleted:
		old, changed = r.cache.drop(e.Object, e.Revision)
		now = nil
	default:
		old, changed = r.cache.put(e.Object)
	}
	r.cache.saw(e.Object, e.Revision)
	if changed {
		r.changed(old, now)
	}
}

// start hands the platform everything that the store held, as a whole, and then lets the workers begin.
func (r *Reconcilers) start() {
	for _, o := range r.cache.all(api.Routes) {
		route := o.(*api.Route)
		r.table.setRoute(nameOf(route), r.cfg.hosts(route, route.Status.Traffic))
	}
	r.cache.outlineRoutes()
	for _, o := range r.cache.all(api.DomainMappings) {
		host := hostOf(o.(*api.DomainMapping))
		if m := r.claimant(host); m != nil && m.Status.Conditions.IsTrue(api.ConditionDomainClaimed) {
			r.table.setMapping(host, &mapping{nameOf(m), name{m.Namespace, m.Spec.Ref.Name}, api.RouteTimeouts(m.Annotations)})
		}
	}
	for _, o := range r.cache.all(api.Revisions) {
		rev := o.(*api.Revision)
		r.handOver(nameOf(rev))
		if active := rev.Status.Conditions.Get(api.ConditionActive); active != nil && active.Status != api.False {
			r.queue.addAfter(revisionKey(rev.ID()), r.cfg.StartupGrace)
		}
	}
	r.queue.add(key{kind: kindNetwork})
	r.table.publish(r.platform.SetRoutes)
	close(r.synced)
}

// changed says who must look again after an object appeared (old nil), changed, or went (now nil).
func (r *Reconcilers) changed(old, now api.Object) {
	o := now
	if o == nil {
		o = old
	}
	n := nameOf(o)
	existence := old == nil || now == nil
	switch o := o.(type) {
	case *api.Service:
		r.queue.add(key{kindService, n.namespace, n.name})
		if existence {
			// Children look for their owner themselves; a configuration of this name that is somebody else's does, too.
			r.queue.add(key{kindRoute, n.namespace, n.name}, key{kindConfiguration, n.namespace, n.name})
			r.queue.add(r.hostsFor(n)...)
		}
		if now == nil && r.cache.route(n) == nil {
			r.dropRoute(n)
		}
	case *api.Configuration:
		r.queue.add(key{kindConfiguration, n.namespace, n.name}, key{kindService, n.namespace, n.name}, key{kindGC, n.namespace, n.name})
		r.queue.add(keys(r.cache, r.cache.routesOfConfig, n, kindRoute)...)
		if existence || asConfiguration(old).Status.LatestReadyRevisionName != asConfiguration(now).Status.LatestReadyRevisionName {
			r.queue.add(keys(r.cache, r.cache.revisionsOf, n, kindRevision)...) // orphans, or overtaken
		}
	case *api.Revision:
		r.revisionChanged(asRevision(old), asRevision(now))
	case *api.Route:
		r.routeChanged(asRoute(old), asRoute(now))
	case *api.DomainMapping:
		r.queue.add(key{kindHost, "", hostOf(o)})
	default:
		r.netChanged(old, now)
	}
}

func (r *Reconcilers) revisionChanged(old, now *api.Revision) {
	rev := now
	if rev == nil {
		rev = old
	}
	n := nameOf(rev)
	r.handOver(n)
	r.queue.add(key{kindRevision, n.namespace, n.name})
	if old != nil && now != nil && sameToOthers(old, now) {
		return // replica counts and the like, many times in a busy hour
	}
	if ref := rev.Annotations[api.AnnotationSubnet]; ref != "" && (old == nil || now == nil) {
		r.queueSubnet(n.namespace, ref)
		r.queueSubnetUsers(n.namespace, ref)
	}
	if c := rev.ConfigurationName(); c != "" {
		r.queue.add(key{kindConfiguration, n.namespace, c}, key{kindGC, n.namespace, c})
	}
	r.queue.add(keys(r.cache, r.cache.routesOfRev, n, kindRoute)...)
	if now == nil {
		for _, m := range r.cache.wanting(n) {
			r.queue.add(key{kindConfiguration, m.namespace, m.name})
		}
	}
}

func (r *Reconcilers) routeChanged(old, now *api.Route) {
	rt := now
	if rt == nil {
		rt = old
	}
	n := nameOf(rt)
	r.queue.add(key{kindRoute, n.namespace, n.name}, key{kindService, n.namespace, n.name})
	for _, some := range []*api.Route{old, now} { // revisions show who leads to them
		if some == nil {
			continue
		}
		_, revs := mentions(some)
		for _, m := range revs {
			r.queue.add(key{kindRevision, m.namespace, m.name})
		}
	}
	if old == nil || now == nil {
		r.queue.add(r.hostsFor(n)...)
	}
	if now == nil && r.ownerService(old) == nil {
		r.dropRoute(n)
	}
}

// ownerService returns the service that a route belongs to, nil if it has none or that is gone.
func (r *Reconcilers) ownerService(rt *api.Route) *api.Service {
	o := controller(rt)
	if o == nil || o.Kind != api.Services.Kind {
		return nil
	}
	if s := r.cache.service(name{rt.Namespace, o.Name}); s != nil && s.UID == o.UID {
		return s
	}
	return nil
}

// dropRoute takes the hosts of a route out of the table. A route that somebody deleted by hand while its service lives is
// not dropped: the service makes it anew, and meanwhile its hosts go on as they were.
func (r *Reconcilers) dropRoute(n name) {
	r.queueHosts(r.table.setRoute(n, entry{}))
	if r.isSynced() {
		r.table.publish(r.platform.SetRoutes)
	}
}

func (r *Reconcilers) isSynced() bool {
	select {
	case <-r.synced:
		return true
	default:
		return false
	}
}

// hostsFor returns the keys of the domain mappings that refer to a service or route.
func (r *Reconcilers) hostsFor(n name) []key {
	r.cache.mu.RLock()
	defer r.cache.mu.RUnlock()
	var all []key
	for _, m := range r.cache.mappingsOfRoute[n] {
		all = append(all, key{kindHost, "", hostOf(r.cache.mappings.objects[m])})
	}
	return all
}

func (r *Reconcilers) queueHosts(hosts []string) {
	for _, h := range hosts {
		r.queue.add(key{kindHost, "", h})
	}
}

// handOver tells the platform about a revision if there is something to tell. It is called at every change of the cache.
func (r *Reconcilers) handOver(n name) {
	r.sending.Lock()
	defer r.sending.Unlock()
	id := api.MakeRevisionID(n.namespace, n.name)
	rev := r.cache.revision(n)
	last := r.sent[id]
	switch {
	case rev == nil || last != nil && rev.UID != last.UID:
		if last != nil {
			delete(r.sent, id)
			r.platform.RemoveRevision(id)
			r.observed.forget(id)
			r.images.forget(id)
		}
		if rev == nil {
			return
		}
		last = nil
		fallthrough
	default:
		if !Startable(rev) || last != nil && sameToOthers(last, rev) {
			return
		}
		if !rev.Ready() {
			r.observed.change(id, func(o *observation) {
				if o.since.IsZero() {
					o.since = r.cfg.Now()
				}
			})
		}
		r.sent[id] = rev
		r.platform.SetRevision(rev)
	}
}

// work takes keys until the queue closes.
func (r *Reconcilers) work(ctx context.Context) {
	for {
		k, ok := r.queue.get()
		if !ok {
			return
		}
		err := r.reconcile(ctx, k)
		retry := r.queue.done(k, err != nil && ctx.Err() == nil)
		switch {
		case err == nil, ctx.Err() != nil:
		case errors.Is(err, state.ErrConflict), errors.Is(err, state.ErrExists):
			// Somebody else wrote first; the cache will know in a moment.
			r.cfg.Log.Debug("object changed meanwhile, looking again", "kind", k.kind.String(), "namespace", k.namespace, "name", k.name, "in", retry)
		default:
			r.cfg.Log.Warn("cannot reconcile, trying again", "kind", k.kind.String(), "namespace", k.namespace, "name", k.name, "in", retry, "err", err)
		}
	}
}

// reconcile makes one pass over a key.
func (r *Reconcilers) reconcile(ctx context.Context, k key) error {
	switch k.kind {
	case kindService:
		return r.reconcileService(ctx, k)
	case kindConfiguration:
		return r.reconcileConfiguration(ctx, k)
	case kindRevision:
		return r.reconcileRevision(ctx, k)
	case kindRoute:
		return r.reconcileRoute(ctx, k)
	case kindHost:
		return r.reconcileHost(ctx, k.name)
	case kindGC:
		return r.reconcileGC(ctx, k)
	case kindVPC:
		return r.reconcileVPC(ctx, k)
	case kindSubnet:
		return r.reconcileSubnet(ctx, k)
	case kindGateway:
		return r.reconcileGateway(ctx, k)
	case kindElasticIP:
		return r.reconcileElasticIP(ctx, k)
	case kindNetwork:
		return r.reconcileNetwork(ctx)
	}
	panic("reconcile: unknown kind of key")
}

func asRevision(o api.Object) *api.Revision {
	rev, _ := o.(*api.Revision)
	return rev
}

func asConfiguration(o api.Object) *api.Configuration {
	c, _ := o.(*api.Configuration)
	return c
}

func asRoute(o api.Object) *api.Route {
	rt, _ := o.(*api.Route)
	return rt
}
