package reconcile

import (
	"context"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/routes"
)

// Tables builds the route table from objects as they are stored, for a process that routes and does not reconcile: what a route leads to is
// in its status. Its methods other than Run are called from one goroutine at a time.
type Tables struct {
	cfg     Config
	set     func(*routes.Table)
	table   *table
	claims  map[string]map[name]*api.DomainMapping // by host
	changed chan struct{}                          // capacity 1
}

// publishEvery bounds how often a table is handed over: each is a copy of all hosts.
const publishEvery = 20 * time.Millisecond

// NewTables returns empty tables; of cfg the domains count, which must be those of the reconcilers. set gets each new table, from Run.
func NewTables(cfg Config, set func(*routes.Table)) *Tables {
	return &Tables{cfg: cfg.withDefaults(), set: set, table: newTable(), claims: map[string]map[name]*api.DomainMapping{}, changed: make(chan struct{}, 1)}
}

// SetRoute takes over a route.
func (t *Tables) SetRoute(r *api.Route) {
	t.table.setRoute(nameOf(r), t.cfg.hosts(r, r.Status.Traffic))
	t.nudge()
}

// RemoveRoute takes one out.
func (t *Tables) RemoveRoute(r *api.Route) {
	t.table.setRoute(nameOf(r), entry{})
	t.nudge()
}

// SetMapping takes over a domain mapping.
func (t *Tables) SetMapping(m *api.DomainMapping) {
	host := hostOf(m)
	if t.claims[host] == nil {
		t.claims[host] = map[name]*api.DomainMapping{}
	}
	t.claims[host][nameOf(m)] = m
	t.settle(host)
}

// RemoveMapping takes one out.
func (t *Tables) RemoveMapping(m *api.DomainMapping) {
	host := hostOf(m)
	delete(t.claims[host], nameOf(m))
	if len(t.claims[host]) == 0 {
		delete(t.claims, host)
	}
	t.settle(host)
}

// settle gives a host to the mapping that the reconcilers have given it to.
func (t *Tables) settle(host string) {
	var to *mapping
	for n, m := range t.claims[host] {
		if c := m.Status.Conditions; c.IsTrue(api.ConditionDomainClaimed) && c.IsTrue(api.ConditionReferenceResolved) {
			to = &mapping{n, name{m.Namespace, m.Spec.Ref.Name}, api.RouteTimeouts(m.Annotations)}
		}
	}
	t.table.setMapping(host, to)
	t.nudge()
}

func (t *Tables) nudge() {
	select {
	case t.changed <- struct{}{}:
	default:
	}
}

// Run hands tables over, many changes at a time, until ctx ends.
func (t *Tables) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.changed:
		}
		t.Publish()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(publishEvery):
		}
	}
}

// Publish hands the table over as it is now, if anything has changed.
func (t *Tables) Publish() { t.table.publish(t.set) }

// Startable says whether it is known which code a revision runs, and whether its network, if it joins one, is there: only then can it be handed to
// those who serve it.
func Startable(rev *api.Revision) bool { return resolved(rev) && networked(rev) }
