package reconcile

import (
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/routes"
)

// precedence orders those who want the same host. A route's public host cannot be taken by anybody; a mapping can take
// what is only a short name for a route that has better ones (the private host of a service "example" in a namespace "com"
// is example.com).
type precedence uint8

const (
	mainHost    precedence = iota // NAME.NAMESPACE.DOMAIN, and NAME.NAMESPACE.svc.CLUSTERDOMAIN
	tagHost                       // the same for a tag
	mappingHost                   // a domain mapping
	shortHost                     // NAME.NAMESPACE and NAME.NAMESPACE.svc, with tags too
)

// claim is one wish for a host. There are four for every service, so it is small.
type claim struct {
	to    *routes.Route
	owner *name // the route, or for a mappingHost the domain mapping
	rank  precedence
}

// same says that two claims are one party's, wherever they lead to.
func (c claim) same(o claim) bool { return c.rank == o.rank && *c.owner == *o.owner }

// before says which of two claims gets the host; it depends on nothing but the two.
func (c claim) before(o claim) bool {
	if c.rank != o.rank {
		return c.rank < o.rank
	}
	if c.owner.namespace != o.owner.namespace {
		return c.owner.namespace < o.owner.namespace
	}
	return c.owner.name < o.owner.name
}

// entry is what one route puts into the table.
type entry struct {
	hosts []wish        // each host once
	main  *routes.Route // what a domain mapping leads to

	owner   string // uid of the service that the route belongs to
	traffic []api.TrafficTarget
}

// wish is a claim and what it is for.
type wish struct {
	host string
	claim
}

// find returns the wish for a host; nil if there is none.
func (e *entry) find(host string) *wish {
	for i := range e.hosts {
		if e.hosts[i].host == host {
			return &e.hosts[i]
		}
	}
	return nil
}

// table builds the one route table. It keeps the wishes of every route and mapping, so that a change costs what that route
// has, plus one flat copy of the map of hosts for the next immutable snapshot.
type table struct {
	mu       sync.Mutex
	entries  map[name]entry
	mappings map[string]mapping // host -> where it leads
	byRoute  index[name]        // route -> (host in name.name) of the mappings that lead to it
	held     map[string]claim
	waiting  map[string][]claim // who wants a host that is held by another
	changes  uint64             // counts changes of held
	shadowed map[string]bool    // mappings whose host a route holds

	publishing sync.Mutex // held while a snapshot is handed over, so that none overtakes a newer one; taken before mu
	published  uint64     // changes at the last snapshot, plus one; 0 = there was none yet; guarded by publishing
}

// mapping is a domain mapping that has its host and its reference.
type mapping struct {
	owner  name
	route  name
	limits api.Timeouts // of its own, beside the route's
}

func newTable() *table {
	return &table{entries: map[name]entry{}, mappings: map[string]mapping{}, byRoute: index[name]{}, held: map[string]claim{},
		waiting: map[string][]claim{}, shadowed: map[string]bool{}}
}

// setRoute puts in what a route leads to; an empty entry takes it out. It returns the hosts of the mappings that won or lost
// their host by that: their status has to be looked at.
func (t *table) setRoute(n name, e entry) (affected []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.entries[n]
	if reflect.DeepEqual(old.main, e.main) { // all hosts of a route follow from this one
		if e.main != nil {
			old.owner, old.traffic = e.owner, e.traffic
			t.entries[n] = old
		}
		return nil
	}
	for _, w := range old.hosts {
		if now := e.find(w.host); now == nil || now.rank != w.rank {
			affected = t.releaseLocked(w.host, w.claim, affected)
		}
	}
	for _, w := range e.hosts {
		affected = t.claimLocked(w.host, w.claim, affected)
	}
	if e.hosts == nil {
		delete(t.entries, n)
	} else {
		t.entries[n] = e
	}
	for _, m := range t.byRoute[n] {
		affected = t.mapLocked(m.name, affected)
		if old.main == nil || e.main == nil {
			affected = append(affected, m.name)
		}
	}
	return affected
}

// has says whether a route is in the table.
func (t *table) has(n name) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.entries[n].hosts != nil
}

// main returns what a route leads to now; nil if it is not in the table. It must not be modified.
func (t *table) main(n name) *routes.Route {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.entries[n].main
}

// inherit returns the traffic of the route that was there under this name and belonged to the same service: what a route that
// was deleted by hand and made again goes on with. The caller must not modify it.
func (t *table) inherit(n name, owner string) []api.TrafficTarget {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.entries[n]; owner != "" && e.owner == owner {
		return e.traffic
	}
	return nil
}

// setMapping lets a host lead to a route, or to nothing when m is nil. held says that the host is in the table for the
// mapping; shadowed that a route has it.
func (t *table) setMapping(host string, m *mapping) (held, shadowed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old, had := t.mappings[host]; had && (m == nil || *m != old) {
		t.byRoute.remove(old.route, name{"", host})
		delete(t.mappings, host)
		t.releaseLocked(host, claim{rank: mappingHost, owner: &old.owner}, nil)
		delete(t.shadowed, host)
	}
	if m != nil {
		t.mappings[host] = *m
		t.byRoute.add(m.route, name{"", host})
		t.mapLocked(host, nil)
	}
	c := t.held[host]
	return m != nil && c.owner != nil && c.same(claim{rank: mappingHost, owner: &m.owner}), t.shadowed[host]
}

// mapLocked brings a mapping's claim up to date with the route that it leads to.
func (t *table) mapLocked(host string, affected []string) []string {
	m := t.mappings[host]
	c := claim{rank: mappingHost, owner: &m.owner}
	to := t.entries[m.route].main
	if to == nil {
		return t.releaseLocked(host, c, affected)
	}
	if to.Local || m.limits != (api.Timeouts{}) {
		own := *to
		own.Local = false // a mapping is how a private route is made public
		own.Limits = to.Limits.And(m.limits)
		to = &own
	}
	c.to = to
	return t.claimLocked(host, c, affected)
}

func (t *table) claimLocked(host string, c claim, affected []string) []string {
	h, taken := t.held[host]
	switch {
	case !taken, h.same(c):
		if taken && h.to == c.to {
			return affected
		}
		t.held[host] = c
		t.changes++
	case c.before(h):
		t.held[host] = c
		t.waitLocked(host, h)
		t.changes++
	default:
		t.waitLocked(host, c)
	}
	return t.shadeLocked(host, affected)
}

func (t *table) waitLocked(host string, c claim) {
	line := slices.DeleteFunc(t.waiting[host], func(w claim) bool { return w.same(c) })
	t.waiting[host] = append(line, c)
}

func (t *table) releaseLocked(host string, c claim, affected []string) []string {
	line := slices.DeleteFunc(t.waiting[host], func(w claim) bool { return w.same(c) })
	if h, taken := t.held[host]; taken && h.same(c) {
		delete(t.held, host)
		t.changes++
		if len(line) > 0 {
			best := 0
			for i := range line {
				if line[i].before(line[best]) {
					best = i
				}
			}
			t.held[host] = line[best]
			line = slices.Delete(line, best, best+1)
		}
	}
	if len(line) == 0 {
		delete(t.waiting, host)
	} else {
		t.waiting[host] = line
	}
	return t.shadeLocked(host, affected)
}

// shadeLocked notes whether a mapping of the host stands behind a route, and tells if that changed.
func (t *table) shadeLocked(host string, affected []string) []string {
	shadowed := slices.ContainsFunc(t.waiting[host], func(w claim) bool { return w.rank == mappingHost })
	if shadowed == t.shadowed[host] {
		return affected
	}
	if shadowed {
		t.shadowed[host] = true
	} else {
		delete(t.shadowed, host)
	}
	return append(affected, host)
}

// publish hands the table to set, unless nothing changed since the last time. When it returns, a table that has all changes
// made before the call has been handed over, by this call or by another one: callers that publish at the same time share
// one copy.
func (t *table) publish(set func(*routes.Table)) {
	t.publishing.Lock()
	defer t.publishing.Unlock()
	t.mu.Lock()
	if t.published == t.changes+1 {
		t.mu.Unlock()
		return
	}
	next := &routes.Table{Hosts: make(map[string]*routes.Route, len(t.held))}
	for h, c := range t.held {
		next.Hosts[h] = c.to
	}
	t.published = t.changes + 1
	t.mu.Unlock()
	set(next)
}

// hosts makes the entry of a route from what its status says it leads to. It is empty while the route leads nowhere yet.
// A cluster-local route has private hosts only.
func (c Config) hosts(r *api.Route, traffic []api.TrafficTarget) entry {
	local := r.Labels[api.LabelVisibility] == api.VisibilityClusterLocal
	service := r.Labels[api.LabelService]
	if service == "" {
		service = r.Name
	}
	limits := api.RouteTimeouts(r.Annotations)
	main := &routes.Route{Namespace: r.Namespace, Service: service, Local: local, Limits: limits}
	tags := map[string]api.RevisionID{}
	percent := map[api.RevisionID]int{}
	for _, t := range traffic {
		id := api.MakeRevisionID(r.Namespace, t.RevisionName)
		if t.Tag != "" {
			tags[t.Tag] = id
		}
		if t.Percent != nil && *t.Percent > 0 {
			if _, there := percent[id]; !there {
				main.Targets = append(main.Targets, routes.Target{Revision: id})
			}
			percent[id] += int(*t.Percent)
		}
	}
	for i := range main.Targets {
		main.Targets[i].Percent = percent[main.Targets[i].Revision]
	}
	if len(main.Targets) == 0 {
		return entry{}
	}
	if len(tags) > 0 {
		main.Tags = tags
	}
	e := entry{hosts: make([]wish, 0, 4*(1+len(tags))), main: main, traffic: traffic}
	if o := controller(r); o != nil {
		e.owner = o.UID
	}
	owner := nameOf(r)
	c.addHosts(&e, r.Name, claim{main, &owner, mainHost})
	for _, tag := range slices.Sorted(maps.Keys(tags)) {
		to := &routes.Route{Namespace: r.Namespace, Service: service, Tag: tag,
			Local: local, Limits: limits, Targets: []routes.Target{{Revision: tags[tag], Percent: 100}}}
		c.addHosts(&e, tag+"-"+r.Name, claim{to, &owner, tagHost})
	}
	return e
}

// addHosts adds the hosts that a label gives: the private one and the public one as claimed, and short names.
func (c Config) addHosts(e *entry, label string, as claim) {
	full := privateHost(label, as.owner.namespace, c.ClusterDomain) // the shorter private names are parts of its memory
	short := full[:len(label)+1+len(as.owner.namespace)]
	add := func(host string, rank precedence) {
		w := wish{host, as}
		w.rank = rank
		if old := e.find(host); old == nil {
			e.hosts = append(e.hosts, w)
		} else if w.before(old.claim) {
			*old = w
		}
	}
	add(full, as.rank)
	add(short, shortHost)
	add(full[:len(short)+len(".svc")], shortHost)
	if !as.to.Local {
		add(publicHost(label, as.owner.namespace, c.Domain), as.rank)
	}
}

func publicHost(label, namespace, domain string) string {
	return strings.ToLower(label + "." + namespace + "." + domain)
}

func privateHost(label, namespace, cluster string) string {
	return strings.ToLower(label + "." + namespace + ".svc." + cluster)
}

// hostOf is the host that a domain mapping is about.
func hostOf(m *api.DomainMapping) string { return strings.ToLower(m.Name) }
