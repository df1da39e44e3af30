package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/state"
)

// platform is a small model of everything behind the Platform: it has revisions, a table, and instances that get ready by
// themselves (auto) or as a test says.
type platform struct {
	mu        sync.Mutex
	auto      bool // every revision that needs instances gets them at once
	revisions map[api.RevisionID]*api.Revision
	table     *routes.Table
	tables    int                          // how many were set
	sets      map[api.RevisionID]int       // calls of SetRevision
	removed   []api.RevisionID             // in order
	watch     func(*routes.Table)          // sees every table
	observe   func(s *endpoints.Snapshot)  // where snapshots go
	sequence  map[api.RevisionID]uint64    // of the last snapshot
	broken    map[string]endpoints.Failure // by image: what happens instead of getting ready
	zero      map[api.RevisionID]bool      // revisions that were ready without a start (initial-scale 0)
}

func newPlatform() *platform {
	return &platform{revisions: map[api.RevisionID]*api.Revision{}, sets: map[api.RevisionID]int{}, sequence: map[api.RevisionID]uint64{},
		broken: map[string]endpoints.Failure{}, zero: map[api.RevisionID]bool{}}
}

func (p *platform) SetRoutes(t *routes.Table) {
	p.mu.Lock()
	p.table = t
	p.tables++
	watch := p.watch
	p.mu.Unlock()
	if watch != nil {
		watch(t)
	}
}

func (p *platform) SetRevision(r *api.Revision) {
	p.mu.Lock()
	_, known := p.revisions[r.ID()]
	p.revisions[r.ID()] = r
	p.sets[r.ID()]++
	if initialScale(r) == 0 {
		p.zero[r.ID()] = true
	}
	auto := p.auto
	failure, broken := p.broken[r.Serving().Image]
	p.mu.Unlock()
	if known || !auto || r.Ready() {
		return
	}
	if broken {
		p.tell(r.ID(), 0, 1, &failure)
	} else {
		p.tell(r.ID(), initialScale(r), initialScale(r), nil)
	}
}

func (p *platform) RemoveRevision(id api.RevisionID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.revisions, id)
	p.removed = append(p.removed, id)
}

func (p *platform) needsNoStart(id api.RevisionID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.zero[id]
}

// What tests read and set; the workers may run again as soon as time goes on, so all of it is under the lock.

func (p *platform) locked(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

func (p *platform) setAuto(on bool) { p.locked(func() { p.auto = on }) }

func (p *platform) setWatch(f func(*routes.Table)) { p.locked(func() { p.watch = f }) }

func (p *platform) breakImage(image string, f endpoints.Failure) {
	p.locked(func() { p.broken[image] = f })
}

func (p *platform) count() (n int) { p.locked(func() { n = p.tables }); return n }

func (p *platform) setsOf(id api.RevisionID) (n int) { p.locked(func() { n = p.sets[id] }); return n }

func (p *platform) hosts() (h []string) {
	p.locked(func() { h = slices.Sorted(maps.Keys(p.table.Hosts)) })
	return h
}

func (p *platform) known() (ids []api.RevisionID) {
	p.locked(func() { ids = slices.Sorted(maps.Keys(p.revisions)) })
	return ids
}

func (p *platform) revision(id api.RevisionID) (r *api.Revision) {
	p.locked(func() { r = p.revisions[id] })
	return r
}

func (p *platform) gone() (ids []api.RevisionID) {
	p.locked(func() { ids = slices.Clone(p.removed) })
	return ids
}

// tell sends a snapshot with so many ready instances.
func (p *platform) tell(id api.RevisionID, ready, desired int, failure *endpoints.Failure) {
	p.mu.Lock()
	p.sequence[id]++
	s := &endpoints.Snapshot{Revision: id, Sequence: p.sequence[id], Desired: desired, Failure: failure}
	p.mu.Unlock()
	for i := range ready {
		s.Instances = append(s.Instances, endpoints.Instance{ID: fmt.Sprintf("%s-%d", id, i), Revision: id, State: endpoints.Ready})
	}
	p.observe(s)
}

// String prints the table, one host per line, and the revisions.
func (p *platform) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var b strings.Builder
	if p.table == nil {
		b.WriteString("no table\n")
	} else {
		for _, h := range slices.Sorted(maps.Keys(p.table.Hosts)) {
			fmt.Fprintf(&b, "%s -> %s\n", h, routeString(p.table.Hosts[h]))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(p.revisions)) {
		fmt.Fprintf(&b, "revision %s ready=%v %s\n", id, p.revisions[id].Ready(), p.revisions[id].Labels[api.LabelRoutingState])
	}
	return b.String()
}

func routeString(r *routes.Route) string {
	var parts []string
	for _, t := range r.Targets {
		_, n := t.Revision.Split()
		parts = append(parts, fmt.Sprintf("%s=%d", n, t.Percent))
	}
	s := strings.Join(parts, " ")
	if r.Tag != "" {
		s += " tag:" + r.Tag
	}
	for _, tag := range slices.Sorted(maps.Keys(r.Tags)) {
		_, n := r.Tags[tag].Split()
		s += " " + tag + ":" + n
	}
	if r.Local {
		s += " local"
	}
	return s
}

// resolver knows every image but those under missing; an image under slow answers when its channel is closed.
type resolver struct {
	mu      sync.Mutex
	missing map[string]string
	slow    map[string]chan struct{}
	calls   map[string]int
}

func newResolver() *resolver {
	return &resolver{missing: map[string]string{}, slow: map[string]chan struct{}{}, calls: map[string]int{}}
}

func (r *resolver) Resolve(ctx context.Context, image string) (string, error) {
	r.mu.Lock()
	r.calls[image]++
	why, missing := r.missing[image]
	slow := r.slow[image]
	r.mu.Unlock()
	if slow != nil {
		select {
		case <-slow:
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
	if missing {
		return "", errors.New(why)
	}
	return image + "@sha256:" + fmt.Sprintf("%064x", len(image)), nil
}

func (r *resolver) set(image, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if why == "" {
		delete(r.missing, image)
	} else {
		r.missing[image] = why
	}
}

func (r *resolver) hang(image string, until chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.slow[image] = until
}

func (r *resolver) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.calls)
}

func (r *resolver) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return fmt.Sprintf("calls %v, missing %v", r.calls, r.missing)
}

// house is a store with reconcilers at work, inside a synctest bubble: time stands still while anything moves.
type house struct {
	t     *testing.T
	ctx   context.Context
	mem   state.Store
	store *objects.Store
	p     *platform
	img   *resolver
	r     *Reconcilers
	stop  func() // ends the reconcilers; the store stays
}

const ns = "default"

// inHouse runs a test with running reconcilers whose revisions get ready by themselves.
func inHouse(t *testing.T, f func(h *house)) { inHouseWith(t, Config{}, f) }

func inHouseWith(t *testing.T, cfg Config, f func(h *house)) {
	synctest.Test(t, func(t *testing.T) {
		mem := state.Memory()
		h := &house{t: t, ctx: t.Context(), mem: mem, store: objects.New(mem, time.Now), img: newResolver()}
		h.start(cfg)
		f(h)
		h.stop()
		if err := mem.Close(); err != nil {
			t.Error(err)
		}
	})
}

// start runs new reconcilers, with a new platform, on the store: what a restart of the process is.
func (h *house) start(cfg Config) {
	h.t.Helper()
	h.prepare(cfg)
	h.run()
	select {
	case <-h.r.Synced():
	default:
		h.t.Fatal("not synced although everything stands still")
	}
}

func (h *house) prepare(cfg Config) {
	h.p = newPlatform()
	h.p.auto = true
	h.r = New(cfg, h.store, h.p, h.img)
	h.p.observe = h.r.ObserveInstances
}

func (h *house) run() {
	ctx, cancel := context.WithCancel(h.ctx)
	done := make(chan error, 1)
	r := h.r
	go func() { done <- r.Run(ctx) }()
	h.stop = func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			h.t.Errorf("Run returned %v", err)
		}
		h.stop = func() {}
	}
	synctest.Wait()
}

func (h *house) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// service returns a service as the API server would store it.
func service(name, image string, change ...func(*api.Service)) *api.Service {
	s := &api.Service{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: name}}
	s.Spec.Template.Spec.Containers = []api.Container{{Image: image}}
	for _, f := range change {
		f(s)
	}
	api.SetDefaults(s)
	return s
}

func (h *house) create(o api.Object) api.Object {
	h.t.Helper()
	o, err := h.store.Create(h.ctx, api.KindOf(o), o)
	if err != nil {
		h.t.Fatal(err)
	}
	synctest.Wait()
	return o
}

// update changes the stored service.
func (h *house) update(name string, f func(*api.Service)) *api.Service {
	h.t.Helper()
	s := h.service(name)
	f(s)
	for i := range s.Spec.Traffic {
		s.Spec.Traffic[i].LatestRevision = nil // the API server's defaulting says it anew
	}
	api.SetDefaults(s)
	o, err := h.store.Update(h.ctx, api.Services, s)
	if err != nil {
		h.t.Fatal(err)
	}
	synctest.Wait()
	return o.(*api.Service)
}

func image(image string) func(*api.Service) {
	return func(s *api.Service) { s.Spec.Template.Spec.Containers[0].Image = image }
}

func named(revision, image string) func(*api.Service) {
	return func(s *api.Service) {
		s.Spec.Template.Name = revision
		s.Spec.Template.Spec.Containers[0].Image = image
	}
}

func annotated(key, value string) func(*api.Service) {
	return func(s *api.Service) {
		a := maps.Clone(s.Spec.Template.Annotations)
		if a == nil {
			a = map[string]string{}
		}
		a[key] = value
		s.Spec.Template.Annotations = a
	}
}

// traffic sets the targets from words like "latest=50", "rev-1=20#tag".
func traffic(targets ...string) func(*api.Service) {
	return func(s *api.Service) { s.Spec.Traffic = targetsOf(targets...) }
}

func targetsOf(targets ...string) []api.TrafficTarget {
	var all []api.TrafficTarget
	for _, w := range targets {
		var t api.TrafficTarget
		w, t.Tag, _ = strings.Cut(w, "#")
		rev, percent, _ := strings.Cut(w, "=")
		if rev != "latest" {
			t.RevisionName = rev
		}
		var n int64
		if _, err := fmt.Sscan(percent, &n); err != nil {
			panic(err)
		}
		t.Percent = &n
		all = append(all, t)
	}
	return all
}

func get[T api.Object](h *house, k *api.Kind, name string) T {
	h.t.Helper()
	o, err := h.store.Get(h.ctx, k, ns, name)
	if err != nil {
		h.t.Fatal(err)
	}
	return o.(T)
}

func (h *house) service(name string) *api.Service { return get[*api.Service](h, api.Services, name) }
func (h *house) config(name string) *api.Configuration {
	return get[*api.Configuration](h, api.Configurations, name)
}
func (h *house) route(name string) *api.Route { return get[*api.Route](h, api.Routes, name) }
func (h *house) revision(name string) *api.Revision {
	return get[*api.Revision](h, api.Revisions, name)
}

func (h *house) missing(k *api.Kind, name string) {
	h.t.Helper()
	if _, err := h.store.Get(h.ctx, k, ns, name); !errors.Is(err, state.ErrNotFound) {
		h.t.Errorf("%s %s: %v, want it gone", k.Singular, name, err)
	}
}

func (h *house) delete(k *api.Kind, name string) {
	h.t.Helper()
	if _, err := h.store.Delete(h.ctx, k, ns, name, "", ""); err != nil {
		h.t.Fatal(err)
	}
	synctest.Wait()
}

// names lists what there is of a kind.
func (h *house) names(k *api.Kind) []string {
	h.t.Helper()
	all, _, err := h.store.List(h.ctx, k, ns)
	if err != nil {
		h.t.Fatal(err)
	}
	names := []string{}
	for _, o := range all {
		names = append(names, o.Meta().Name)
	}
	return names
}

// wantCondition compares "True", or "False Reason message part"; the last two may be left out.
func (h *house) wantCondition(o api.Object, typ, want string) {
	h.t.Helper()
	v := api.StatusOf(o).Conditions.Get(typ)
	if v == nil {
		h.t.Errorf("%s %s has no condition %s, want %s; it has %v", o.Type().Kind, o.Meta().Name, typ, want, api.StatusOf(o).Conditions)
		return
	}
	status, rest, _ := strings.Cut(want, " ")
	reason, message, _ := strings.Cut(rest, " ")
	if v.Status != status || reason != "" && v.Reason != reason || !strings.Contains(v.Message, message) {
		h.t.Errorf("%s %s: condition %s is %s %s %q, want %s", o.Type().Kind, o.Meta().Name, typ, v.Status, v.Reason, v.Message, want)
	}
}

// wantTraffic compares a status' traffic, written as in traffic; "latest:" before a name marks latestRevision.
func (h *house) wantTraffic(have []api.TrafficTarget, want ...string) {
	h.t.Helper()
	var got []string
	for _, t := range have {
		w := fmt.Sprintf("%s=%d", t.RevisionName, *t.Percent)
		if *t.LatestRevision {
			w = "latest:" + w
		}
		if t.Tag != "" {
			w += "#" + t.Tag
		}
		got = append(got, w)
	}
	if !slices.Equal(got, want) {
		h.t.Errorf("traffic is %v, want %v", got, want)
	}
}

// wantHost compares what the table says about a host, in the form of routeString; "" = unknown host.
func (h *house) wantHost(host, want string) {
	h.t.Helper()
	h.p.mu.Lock()
	rt := h.p.table.Hosts[host]
	h.p.mu.Unlock()
	got := ""
	if rt != nil {
		got = routeString(rt)
	}
	if got != want {
		h.t.Errorf("host %s leads to %q, want %q; the table:\n%s", host, got, want, h.p)
	}
}
