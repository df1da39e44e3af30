package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/state"
)

// counting counts the writes that reach a store, and refuses all of them while down is set.
type counting struct {
	state.Store
	mu     sync.Mutex
	writes map[string]int // by key
	down   bool
}

func (c *counting) setDown(down bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = down
}

func (c *counting) written() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.writes)
}

func (c *counting) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.writes)
}

var errDown = errors.New("the store is away")

func (c *counting) Put(ctx context.Context, key string, value []byte, expect int64) (int64, error) {
	c.mu.Lock()
	down := c.down
	if !down {
		c.writes[key]++
	}
	c.mu.Unlock()
	if down {
		return 0, errDown
	}
	return c.Store.Put(ctx, key, value, expect)
}

func (c *counting) List(ctx context.Context, prefix string) ([]state.KV, int64, error) {
	c.mu.Lock()
	down := c.down
	c.mu.Unlock()
	if down {
		return nil, 0, errDown
	}
	return c.Store.List(ctx, prefix)
}

// inCountedHouse is inHouse with a counting store.
func inCountedHouse(t *testing.T, f func(h *house, c *counting)) {
	synctest.Test(t, func(t *testing.T) {
		c := &counting{Store: state.Memory(), writes: map[string]int{}}
		h := &house{t: t, ctx: t.Context(), mem: c, store: objects.New(c, time.Now), img: newResolver()}
		h.start(Config{})
		f(h, c)
		h.stop()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

const helloKey = "/thaw/objects/serving.knative.dev/revisions/default/hello-00001"

// Under load replica counts change all the time; the store sees about one write a second, and the last value. No number of wanted
// instances comes twice: a count that happens to be what was written last is no reason to write.
func TestStatusWritesAreBounded(t *testing.T) {
	inCountedHouse(t, func(h *house, c *counting) {
		h.create(service("hello", "one"))
		h.sleep(5 * time.Second)
		c.reset()
		sets := h.p.setsOf("default/hello-00001")
		for i := range 10_000 { // 10 s, a change each millisecond
			h.p.tell("default/hello-00001", i%50, 50, nil)
			h.r.ObserveScale("default/hello-00001", 1000+i, true)
			time.Sleep(time.Millisecond)
		}
		h.p.tell("default/hello-00001", 7, 8, nil)
		h.r.ObserveScale("default/hello-00001", 8, true)
		h.sleep(2 * time.Second)
		// A write follows within the interval of a second and the next change, a millisecond; never sooner than the interval.
		if n := c.written()[helloKey]; n < 9 || n > 13 {
			t.Errorf("%d writes in 12 s, want one a second", n)
		}
		if len(c.written()) != 1 {
			t.Errorf("others were written: %v", c.written())
		}
		if rev := h.revision("hello-00001"); *rev.Status.ActualReplicas != 7 || *rev.Status.DesiredReplicas != 8 {
			t.Errorf("replicas %d of %d", *rev.Status.ActualReplicas, *rev.Status.DesiredReplicas)
		}
		if n := h.p.setsOf("default/hello-00001"); n != sets {
			t.Errorf("%d calls of SetRevision for replica counts", n-sets)
		}
	})
}

// Nothing is written while a cold start is under way: the first write comes when the interval is over.
func TestNoWriteOnColdStart(t *testing.T) {
	inCountedHouse(t, func(h *house, c *counting) {
		h.create(service("hello", "one"))
		h.p.tell("default/hello-00001", 0, 0, nil)
		h.r.ObserveScale("default/hello-00001", 0, false)
		h.sleep(time.Minute)
		c.reset()
		tables := h.p.count()
		h.r.ObserveScale("default/hello-00001", 1, true)
		h.p.tell("default/hello-00001", 0, 1, nil)
		h.sleep(500 * time.Millisecond)
		h.p.tell("default/hello-00001", 1, 1, nil)
		h.sleep(499 * time.Millisecond)
		if len(c.written()) != 0 {
			t.Errorf("written within the first second: %v", c.written())
		}
		h.sleep(time.Second)
		h.wantCondition(h.revision("hello-00001"), "Active", "True")
		if h.p.count() != tables {
			t.Error("the table was made anew for a cold start")
		}
	})
}

// At rest nothing happens at all: no pass, no write, no timer for days.
func TestIdleIsQuiet(t *testing.T) {
	inCountedHouse(t, func(h *house, c *counting) {
		for i := range 5 {
			h.create(service(fmt.Sprintf("s%d", i), "one"))
		}
		h.sleep(time.Minute)
		c.reset()
		tables := h.p.count()
		h.sleep(3 * time.Hour)
		h.r.queue.mu.Lock()
		timers := len(h.r.queue.timers)
		h.r.queue.mu.Unlock()
		if len(c.written()) != 0 || h.p.count() != tables || timers != 0 {
			t.Errorf("writes %v, tables %d, timers %d", c.written(), h.p.count()-tables, timers)
		}
	})
}

// After a restart the first table is complete, what was ready is ready, and nothing is resolved or written again.
func TestRestart(t *testing.T) {
	inCountedHouse(t, func(h *house, c *counting) {
		for i := range 10 {
			h.create(service(fmt.Sprintf("s%d", i), "one", traffic("latest=100#now")))
		}
		m := &api.DomainMapping{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: "www.example.com"}}
		m.Spec.Ref = api.Reference{Kind: "Service", APIVersion: api.ServingV1, Name: "s3", Namespace: ns}
		h.create(m)
		before := h.p.String()
		h.stop()

		c.reset()
		h.img = newResolver()
		h.prepare(Config{Workers: 1})
		h.p.auto = false // no instance runs
		first := ""
		h.p.watch = func(*routes.Table) {
			if first == "" {
				first = h.p.String()
			}
		}
		h.run()
		if first != before {
			t.Errorf("the first table after the restart is\n%s\nwant\n%s", first, before)
		}
		if h.img.count() != 0 || len(c.written()) != 0 {
			t.Errorf("a restart resolved %v and wrote %v", h.img, c.written())
		}
		h.sleep(5 * time.Minute)
		for i := range 10 {
			h.wantCondition(h.service(fmt.Sprintf("s%d", i)), "Ready", "True")
		}
		// The store said one replica each; nobody reported any within the grace, so there is none.
		rev := h.revision("s3-00001")
		h.wantCondition(rev, "Active", "False NoTraffic")
		if *rev.Status.ActualReplicas != 0 {
			t.Errorf("actual replicas %d", *rev.Status.ActualReplicas)
		}
	})
}

// A store that is away at the start is waited for; Synced is not closed before the table is there.
func TestStoreAway(t *testing.T) {
	inCountedHouse(t, func(h *house, c *counting) {
		h.create(service("hello", "one"))
		h.stop()
		c.setDown(true)
		h.prepare(Config{Workers: 1})
		h.run()
		h.sleep(time.Minute)
		select {
		case <-h.r.Synced():
			t.Error("synced without a store")
		default:
		}
		if h.p.count() != 0 {
			t.Error("a table was published")
		}
		c.setDown(false)
		h.sleep(10 * time.Second)
		<-h.r.Synced()
		h.wantHost("hello.default.localhost", "hello-00001=100")

		// Writes that fail later are tried again.
		c.setDown(true)
		h.p.tell("default/hello-00001", 3, 3, nil)
		h.sleep(10 * time.Second)
		h.wantHost("hello.default.localhost", "hello-00001=100")
		c.setDown(false)
		h.sleep(time.Minute)
		if rev := h.revision("hello-00001"); *rev.Status.ActualReplicas != 3 {
			t.Errorf("actual replicas %d", *rev.Status.ActualReplicas)
		}
	})
}

// deaf is a store whose watches can be cut off and told that their history is gone.
type deaf struct {
	state.Store
	on  atomic.Bool
	mu  sync.Mutex
	cut chan struct{}
}

// recut ends all watches.
func (d *deaf) recut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.cut)
	d.cut = make(chan struct{})
}

func (d *deaf) Watch(ctx context.Context, prefix string, from int64) (<-chan state.Event, func() error) {
	ctx, cancel := context.WithCancel(ctx)
	in, failed := d.Store.Watch(ctx, prefix, from)
	out := make(chan state.Event)
	d.mu.Lock()
	cut := d.cut
	d.mu.Unlock()
	compacted := false
	go func() {
		defer close(out)
		defer cancel()
		for {
			select {
			case <-cut:
				compacted = true
				return
			case e, ok := <-in:
				if !ok {
					return
				}
				if d.on.Load() {
					continue
				}
				select {
				case out <- e:
				case <-cut:
					compacted = true
					return
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out, func() error {
		if compacted {
			return state.ErrCompacted
		}
		return failed()
	}
}

// What happened while nothing was heard, deletions too, shows after the next list.
func TestRelistAfterCompaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &deaf{Store: state.Memory(), cut: make(chan struct{})}
		h := &house{t: t, ctx: t.Context(), mem: d, store: objects.New(d, time.Now), img: newResolver()}
		h.start(Config{})
		h.create(service("gone", "one"))
		h.create(service("stays", "one"))
		h.create(service("anew", "one"))
		d.on.Store(true)
		for _, n := range []string{"gone", "anew"} {
			h.delete(api.Services, n)
		}
		h.create(service("anew", "two"))
		h.create(service("new", "one"))
		h.sleep(time.Minute)
		h.wantHost("gone.default.localhost", "gone-00001=100") // control: nothing was heard
		h.wantHost("new.default.localhost", "")

		d.on.Store(false)
		d.recut()
		h.sleep(time.Minute)
		h.wantHost("gone.default.localhost", "")
		h.wantHost("stays.default.localhost", "stays-00001=100")
		h.wantHost("new.default.localhost", "new-00001=100")
		h.wantHost("anew.default.localhost", "anew-00001=100")
		if got := h.revision("anew-00001").Spec.Containers[0].Image; got != "two" {
			t.Errorf("image %s", got)
		}
		if got := h.names(api.Revisions); !slices.Equal(got, []string{"anew-00001", "new-00001", "stays-00001"}) {
			t.Errorf("revisions %v", got)
		}
		if slices.Contains(h.p.known(), "default/gone-00001") {
			t.Error("the platform still has the revision")
		}
		h.stop()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A route, configuration or revision that somebody deletes by hand is made again, and its host never leaves the table.
func TestDeletedByHand(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "one"))
		h.p.setWatch(func(table *routes.Table) {
			if table.Hosts["hello.default.localhost"] == nil {
				t.Error("the host vanished")
			}
		})
		h.delete(api.Routes, "hello")
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantHost("hello.default.localhost", "hello-00001=100")
		h.delete(api.Configurations, "hello")
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantHost("hello.default.localhost", "hello-00001=100")
		h.delete(api.Revisions, "hello-00001")
		h.wantCondition(h.service("hello"), "Ready", "True")
		h.wantHost("hello.default.localhost", "hello-00001=100")
	})
}

// An image that takes long to resolve holds up nobody else, and says so.
func TestSlowResolver(t *testing.T) {
	inHouseWith(t, Config{Workers: 1, Resolvers: 2}, func(h *house) {
		answer := make(chan struct{})
		h.img.hang("slow", answer)
		h.create(service("slow", "slow"))
		h.create(service("quick", "one"))
		h.wantCondition(h.service("quick"), "Ready", "True")
		h.sleep(2 * time.Second)
		h.wantCondition(h.revision("slow-00001"), "Ready", "Unknown ResolvingDigests")
		close(answer)
		h.sleep(0)
		h.wantCondition(h.service("slow"), "Ready", "True")

		h.img.hang("slow", make(chan struct{}))
		h.create(service("never", "slow"))
		h.sleep(61 * time.Second)
		h.wantCondition(h.revision("never-00001"), "Ready", `False ContainerMissing Unable to fetch image "slow": no answer within 1m0s`)
	})
}

// Fields that are accepted but not honoured show in a condition that does not count for Ready.
func TestFieldsHonoured(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(service("hello", "one", func(s *api.Service) {
			s.Spec.Template.Spec.Containers[0].Env = []api.EnvVar{{Name: "A", ValueFrom: []byte(`{"secretKeyRef":{"name":"s","key":"k"}}`)}}
		}))
		s := h.service("hello")
		h.wantCondition(s, "Ready", "True")
		h.wantCondition(s, "FieldsHonoured", "False UnsupportedFields spec.template.spec.containers[0].env[0].valueFrom")
		if v := s.Status.Conditions.Get("FieldsHonoured"); v.Severity != "Warning" {
			t.Errorf("severity %q", v.Severity)
		}
		h.wantCondition(h.revision("hello-00001"), "FieldsHonoured", "False UnsupportedFields spec.containers[0].env[0].valueFrom")
		h.update("hello", func(s *api.Service) { s.Spec.Template.Spec.Containers[0].Env = nil })
		if v := h.service("hello").Status.Conditions.Get("FieldsHonoured"); v != nil {
			t.Errorf("still %v", v)
		}
	})
}

// Garbage collection as a service goes through many revisions.
func TestRevisionGC(t *testing.T) { // test/e2e/gc
	gc := GC{RetainSinceCreate: 5 * time.Minute, RetainSinceLastActive: 5 * time.Minute, MinIdle: 1, MaxIdle: 3}
	inHouseWith(t, Config{GC: gc}, func(h *house) {
		h.create(service("hello", "v0"))
		for i := 1; i <= 6; i++ {
			h.update("hello", image(fmt.Sprintf("v%d", i)))
		}
		// Seven revisions, six idle: the cap leaves three of them.
		if got, want := h.names(api.Revisions), []string{"hello-00004", "hello-00005", "hello-00006", "hello-00007"}; !slices.Equal(got, want) {
			t.Errorf("revisions %v, want %v", got, want)
		}
		h.update("hello", traffic("hello-00005=1", "latest=99"))
		h.sleep(4 * time.Minute)
		if got := h.names(api.Revisions); len(got) != 4 {
			t.Errorf("too early: %v", got)
		}
		h.sleep(2 * time.Minute)
		// One idle one is kept whatever its age; what a route leads to is not idle.
		if got, want := h.names(api.Revisions), []string{"hello-00005", "hello-00006", "hello-00007"}; !slices.Equal(got, want) {
			t.Errorf("revisions %v, want %v", got, want)
		}
		if got := h.p.known(); len(got) != 3 {
			t.Errorf("the platform has %v", got)
		}
		h.wantCondition(h.service("hello"), "Ready", "True")
	})
}

func TestGarbage(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	cfg := &api.Configuration{}
	cfg.Status.LatestReadyRevisionName, cfg.Status.LatestCreatedRevisionName = "ready", "made"
	rev := func(name string, age, idle time.Duration, change ...func(*api.Revision)) *api.Revision {
		r := &api.Revision{ObjectMeta: api.ObjectMeta{Name: name, CreationTimestamp: &api.Time{Time: now.Add(-age)},
			Labels:      map[string]string{api.LabelRoutingState: api.RoutingStateReserve},
			Annotations: map[string]string{api.AnnotationRoutingStateModified: now.Add(-idle).Format(time.RFC3339)}}}
		for _, f := range change {
			f(r)
		}
		return r
	}
	const h = time.Hour
	state := func(s string) func(*api.Revision) {
		return func(r *api.Revision) { r.Labels[api.LabelRoutingState] = s }
	}
	noGC := func(r *api.Revision) { r.Annotations[api.AnnotationNoGC] = "true" }
	many := func(n int) (all []*api.Revision) {
		for i := range n {
			all = append(all, rev(fmt.Sprintf("r%04d", i), time.Duration(5000-i)*h, time.Duration(4000-i)*h))
		}
		return all
	}
	none := GC{RetainSinceCreate: -1, RetainSinceLastActive: -1, MinIdle: 0, MaxIdle: 2}
	for _, c := range []struct {
		name  string
		gc    GC
		revs  []*api.Revision
		want  string // first..last of what goes
		n     int
		again time.Duration
	}{
		{"defaults keep twenty", DefaultGC, many(20), "", 0, 0},
		{"the oldest above twenty go", DefaultGC, many(23), "r0000..r0002", 3, 0},
		{"young ones stay until they are 48 h old", DefaultGC, append(many(20), rev("young", 47*h, 5000*h)), "", 0, h},
		{"used within 15 h stays", GC{RetainSinceCreate: 48 * h, RetainSinceLastActive: 15 * h, MaxIdle: 9}, []*api.Revision{rev("used", 99*h, 14*h)}, "", 0, h},
		{"both limits passed", GC{RetainSinceCreate: 48 * h, RetainSinceLastActive: 15 * h, MaxIdle: 9}, []*api.Revision{rev("old", 48*h, 15*h)}, "old..old", 1, 0},
		{"active, pending, no-gc, newest and referenced ones are not idle", GC{MaxIdle: 0}, []*api.Revision{
			rev("a", 99*h, 99*h, state("active")), rev("p", 99*h, 99*h, state("pending")), rev("n", 99*h, 99*h, noGC),
			rev("ready", 99*h, 99*h), rev("made", 99*h, 99*h), rev("kept", 99*h, 99*h)}, "", 0, 0},
		{"the cap takes young ones, too", DefaultGC, append(many(20), func() (all []*api.Revision) {
			for i := range 1005 {
				all = append(all, rev(fmt.Sprintf("y%04d", i), time.Duration(47*60-i)*time.Minute, 0))
			}
			return all
		}()...), "r0000..y0004", 25, 15 * h},
		{"no ages: only the cap", none, many(5), "r0000..r0002", 3, 0},
		{"no cap", GC{RetainSinceCreate: -1, RetainSinceLastActive: -1, MaxIdle: -1}, many(50), "", 0, 0},
		{"disabled", GC{Disabled: true}, many(50), "", 0, 0},
	} {
		gone, again := garbage(c.gc, cfg, c.revs, func(r *api.Revision) bool { return r.Name == "kept" }, now)
		got := ""
		if len(gone) > 0 {
			got = gone[0].Name + ".." + gone[len(gone)-1].Name
		}
		wait := time.Duration(0)
		if !again.IsZero() {
			wait = again.Sub(now)
		}
		if got != c.want || len(gone) != c.n || wait != c.again {
			t.Errorf("%s: %d go, %s, next look in %v; want %d, %s, %v", c.name, len(gone), got, wait, c.n, c.want, c.again)
		}
	}
}

func TestConfigValidate(t *testing.T) {
	if err := (Config{}).Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	for want, c := range map[string]Config{
		"port 70000":                  {URLPort: 70000},
		"dot":                         {Domain: ".localhost"},
		"is the cluster domain":       {Domain: "svc.cluster.local"},
		"workers -1":                  {Workers: -1},
		"status interval -1s":         {StatusInterval: -time.Second},
		"the cap 5 is below":          {GC: GC{MinIdle: 10, MaxIdle: 5}},
		"rollout duration":            {RolloutDuration: -1},
		"max start failures -2":       {MaxStartFailures: -2},
		"progress deadline -1ns":      {ProgressDeadline: -1},
		"gc: -1 revisions to keep is": {GC: GC{MinIdle: -1, MaxIdle: 5}},
	} {
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", c, err, want)
		}
	}
	if err := New(Config{Workers: -1}, nil, nil, nil).Run(t.Context()); err == nil {
		t.Error("Run takes bad settings")
	}
}

// quiet is a logger for tests that want to read what is said.
func quiet(b *strings.Builder) *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

func TestFailureIsLoggedOnce(t *testing.T) {
	var b strings.Builder
	inHouseWith(t, Config{Workers: 1, Log: quiet(&b)}, func(h *house) {
		h.p.breakImage("bad", endpoints.Failure{Reason: "ExitCode1", Message: "panic: no", Count: 3})
		h.create(service("hello", "bad"))
		h.sleep(time.Hour)
	})
	if n := strings.Count(b.String(), "revision failed"); n != 1 || strings.Contains(b.String(), "level=WARN") {
		t.Errorf("the log:\n%s", b.String())
	}
}
