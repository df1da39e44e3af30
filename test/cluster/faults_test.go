package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/internal/shards"
	"github.com/thawrun/thaw/test/harness"
)

// A fault is a scenario: what happens to a cluster, and what of the promise was broken. It is played on the program as it is, where nothing may be,
// and as its own control on programs in which what keeps the promise is switched off, where something must be.
type fault struct {
	plan   plan
	always []harness.Change // that the program of plan is built with, and controls are too
	play   func(s *system) (broken []string)
	// without has, by what is switched off, the changes that do so.
	without map[string][]harness.Change
}

func (f fault) test(t *testing.T) {
	t.Run("as it is", func(t *testing.T) { // ends before another one begins
		s := f.plan.start(t)
		for _, b := range f.play(s) {
			t.Error(b)
		}
	})
	if os.Getenv("THAW_FAULTS") == "" {
		return // programs are changed and linked for make faults only
	}
	for what, changes := range f.without {
		t.Run("without "+what, func(t *testing.T) {
			dir, err := harness.BuildChanged(slices.Concat(f.always, changes), "cmd/thaw", "examples/checker")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			p := f.plan
			p.bin = dir
			broken := f.play(p.start(t))
			if len(broken) == 0 {
				t.Error("the promise was kept all the same: this scenario shows nothing")
			}
			for _, b := range broken {
				t.Logf("as it should be: %s", b)
			}
		})
	}
}

// list collects what was broken.
type list struct {
	mu  sync.Mutex
	all []string
}

func (l *list) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, fmt.Sprintf(format, args...))
}

// none notes answers that should not be there.
func (l *list) none(what string, n int, bad []harness.Answer) {
	if len(bad) > 0 {
		l.add("%s: %d of %d failed: %v", what, len(bad), n, bad[0])
	}
}

// within waits for a condition, and says how long it took; false = it did not come true in time.
func within(limit time.Duration, ok func() bool) (time.Duration, bool) {
	begin := time.Now()
	for !ok() {
		if time.Since(begin) > limit {
			return limit, false
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(begin), true
}

// change tries to change something: any error that is not a clear refusal is a broken promise.
func (s *system) change(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	doc := fmt.Sprintf(`{"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":%q},"spec":{"template":{"metadata":{"annotations":{"autoscaling.knative.dev/initial-scale":"0"}},"spec":{"containers":[{"image":"exec://%s/checker"}]}}}}`, name, s.bin)
	_, _, err := s.client.Apply(ctx, api.Services, "default", name, []byte(doc))
	return err
}

// without is a time without the state: warm and cold requests go on, changes are refused with a reason. lost takes the state away, back brings it again.
func (s *system) withoutState(outage time.Duration, lost, back func()) (broken []string) {
	const cold = 4
	s.apply(harness.CheckerService("warm", 2, nil, harness.MinScale+"1"))
	for i := range cold {
		s.apply(harness.CheckerService(fmt.Sprintf("cold-%d", i), 1, nil, harness.InitialZero))
	}
	c := s.caller(0)
	c.http.Timeout = 15 * time.Second
	if a := c.get("warm", "/"); a.Status != 200 {
		s.t.Fatal(a)
	}
	var l list
	lost()
	stop := c.load(4, "warm", "/?sleep=5")
	begin := time.Now()
	for i := range cold {
		time.Sleep(time.Until(begin.Add(outage * time.Duration(i+1) / (cold + 1))))
		at := time.Since(begin)
		bad, _ := c.burst(5, fmt.Sprintf("cold-%d", i), "/")
		l.none(fmt.Sprintf("cold, %v without the state", at.Round(100*time.Millisecond)), 5, bad)
		if len(bad) > 0 {
			break
		}
	}
	refused := s.change("refused")
	if status := (*client.StatusError)(nil); !errors.As(refused, &status) || status.Code != http.StatusServiceUnavailable {
		l.add("a change was not refused with 503: %v", refused)
	}
	time.Sleep(time.Until(begin.Add(outage)))
	n, bad := stop()
	l.none("warm", n, bad)
	if len(l.all) > 0 { // of a control: what comes now would only take long
		return l.all
	}
	back()
	took, ok := within(60*time.Second, func() bool { return s.change("new") == nil })
	if !ok {
		l.add("changes are not taken again")
	}
	s.t.Logf("%v without the state: warm %d of %d failed, cold 0 of %d; refused with %q; changes again %v after its return", outage, len(bad), n, 5*cold, refused, took.Round(10*time.Millisecond))
	if _, ok := within(30*time.Second, func() bool { return c.get("new", "/").Status == 200 }); !ok {
		l.add("routers do not hear of what is new: %v", c.get("new", "/"))
	}
	for _, name := range []string{"warm", "cold-0", "new"} {
		if _, err := s.client.Get(context.Background(), api.Services, "default", name); err != nil {
			l.add("an object that was there: %v", err)
		}
	}
	return l.all
}

// ownersGiveUp switches off that an owner whose lease has run out goes on while the state does not answer.
var ownersGiveUp = []harness.Change{{File: "internal/owners/owners.go", Old: "\t\terr := m.take(ctx)\n",
	New: "\t\terr := m.take(ctx)\n\t\tfor shard := range m.mine {\n\t\t\tm.lost(shard)\n\t\t}\n"}}

// While etcd does not answer, warm and cold requests of known revisions go on; a change is refused; afterwards all is well by itself.
func TestWithoutState(t *testing.T) {
	const short = 5 * time.Second // longer than any lease lives
	fault{
		plan: plan{routers: 1},
		play: func(s *system) []string {
			outage := short
			if os.Getenv("THAW_FAULTS") != "" && s.bin == bin {
				outage = time.Minute
			}
			return s.withoutState(outage, func() { s.kill("etcd") }, func() { s.again("etcd") })
		},
		without: map[string][]harness.Change{"owners that go on": ownersGiveUp},
	}.test(t)
}

// Requests that an activator holds are lost with it, and told so; those that the other one holds are not; and what comes later is held by the other.
func TestKilledActivator(t *testing.T) {
	faults(t)
	fault{
		plan: plan{routers: 1},
		play: killActivator,
		without: map[string][]harness.Change{
			"owners": {{File: "cmd/thaw/cluster/ways.go", Old: "first := shards.Preferred(rest, shard)", New: "first := rest[0*len(shards.Preferred(rest, shard))]"}},
			"an answer": {{File: "cmd/thaw/cluster/ways.go", Old: "case !errors.Is(err, hop.ErrNotSent):\n",
				New: "case !errors.Is(err, hop.ErrNotSent):\n\t\t\t\tfor err != nil && !x.Client.Gone() {\n\t\t\t\t\ttime.Sleep(50 * time.Millisecond)\n\t\t\t\t}\n"}},
		},
	}.test(t)
}

func killActivator(s *system) []string {
	const victims, others = 500, 100
	activators := []string{"activator-0", "activator-1"}
	of := map[string]string{} // a service of each activator
	for i := 0; len(of) < len(activators); i++ {
		name := fmt.Sprintf("slow-%d", i)
		owner := shards.Preferred(activators, shards.Of(api.MakeRevisionID("default", name+"-00001")))
		if of[owner] == "" {
			of[owner] = name
			s.apply(harness.CheckerService(name, 10, map[string]string{"CHECKER_START_MS": "8000"}, harness.InitialZero, harness.MaxScale+"5"))
		}
	}
	c := s.caller(0)
	c.http.Timeout = 30 * time.Second
	var l list
	type result struct {
		bad  []harness.Answer
		took time.Duration // until the last was answered
	}
	results := map[string]chan result{}
	begin := func(service string, n int) {
		done := make(chan result, 1)
		results[service] = done
		go func() { bad, _ := c.burst(n, service, "/"); done <- result{bad, 0} }()
	}
	begin(of["activator-0"], victims)
	begin(of["activator-1"], others)
	if _, ok := within(7*time.Second, func() bool { return s.held(0) == victims && s.held(1) == others }); !ok {
		l.add("held: %d and %d, want %d and %d", s.held(0), s.held(1), victims, others)
	}
	killed := time.Now()
	s.kill("activator-0")
	lost := (<-results[of["activator-0"]]).bad
	told := time.Since(killed)
	silent := 0
	for _, a := range lost {
		if a.Err != nil || a.Status != 502 && a.Status != 503 || a.Header.Get("X-Thaw-Error") == "" {
			if silent++; silent == 1 {
				l.add("a lost request: %v", a)
			}
		}
	}
	if len(lost) != victims {
		l.add("%d of %d requests that were held by who was killed were answered by nobody", len(lost), victims)
	}
	kept := (<-results[of["activator-1"]]).bad
	l.none("held by the other one", others, kept)
	bad, _ := c.burst(20, of["activator-0"], "/")
	l.none("afterwards", 20, bad)
	s.t.Logf("%d of %d lost, all told within %v; of the other one's %d of %d lost; afterwards %d of 20", len(lost), victims, told.Round(time.Millisecond), len(kept), others, len(bad))
	return l.all
}

// nodeLostLate switches off that nodes are looked after.
var nodeLostLate = []harness.Change{{File: "autoscaler/remote/nodes.go", Old: "const lostAfter = 4 * time.Second", New: "const lostAfter = time.Hour"}}

// A node that stands still is replaced by the others within ten seconds; requests that wait for instances there are answered by others.
func TestLostNode(t *testing.T) {
	faults(t)
	fault{
		plan: plan{routers: 1},
		play: func(s *system) []string {
			return s.loseNode(func() { s.procs["agent-2"].Signal(syscall.SIGSTOP) }, func() { s.procs["agent-2"].Signal(syscall.SIGCONT) })
		},
		without: map[string][]harness.Change{"a watchdog": nodeLostLate},
	}.test(t)
}

// loseNode takes node 2 away with lose, and brings it back.
func (s *system) loseNode(lose, back func()) []string {
	const replaceWithin = 10 * time.Second
	s.apply(harness.CheckerService("spread", 1, nil, harness.MinScale+"6"))
	s.apply(harness.CheckerService("open", 0, nil, harness.MinScale+"3"))
	s.apply(harness.CheckerService("held", 1, map[string]string{"CHECKER_START_MS": "4000"}, harness.InitialZero, harness.MaxScale+"9"))
	harness.Eventually(s.t, 20*time.Second, "nine on three nodes", func() bool { return slices.Equal(s.onNodes(), []int{3, 3, 3}) })
	var l list
	c := s.caller(0)
	stop := map[string]func() (int, []harness.Answer){}
	for _, service := range []string{"spread", "open"} {
		stop[service] = c.load(3, service, "/?sleep=10")
	}
	held := make(chan []harness.Answer, 1)
	go func() { bad, _ := c.burst(9, "held", "/"); held <- bad }()
	harness.Eventually(s.t, 10*time.Second, "nine more are being started", func() bool { return sum(s.onNodes()) == 18 })
	lose()
	gone := true
	bring := func() {
		if gone {
			gone = false
			back()
		}
	}
	defer bring()
	took, ok := within(replaceWithin, func() bool { n := s.onNodes(); return n[0]+n[1] == 18 })
	if !ok {
		l.add("not replaced within %v: instances on the nodes %v", replaceWithin, s.onNodes())
	}
	failed := <-held
	l.none("held requests", 9, failed)
	bad, _ := c.burst(20, "spread", "/?sleep=10")
	l.none("warm, afterwards", 20, bad)
	bring()
	if len(l.all) == 0 {
		if _, ok := within(40*time.Second, func() bool { return sum(s.onNodes()) <= 18 }); !ok {
			l.add("a node that is back does not give up what others have taken over: %v", s.onNodes())
		}
	}
	s.t.Logf("replaced after %v, held requests %d of 9 failed", took.Round(10*time.Millisecond), len(failed))
	for _, service := range slices.Sorted(maps.Keys(stop)) {
		n, bad := stop[service]()
		s.t.Logf("%s: %d of %d failed under load of 3 clients", service, len(bad), n)
		if len(bad) > 3 { // at most what was inside
			l.add("%s: %d of %d failed, with 3 clients: %v", service, len(bad), n, bad[0])
		}
	}
	return l.all
}

// One of three members of etcd dies, each in turn: nothing happens, neither to requests, warm and cold, nor to changes.
func TestLostMember(t *testing.T) {
	faults(t)
	fault{
		plan: plan{routers: 1, members: 3},
		play: func(s *system) []string {
			s.apply(harness.CheckerService("warm", 2, nil, harness.MinScale+"3"))
			c := s.caller(0)
			var l list
			for i := range s.members {
				member := fmt.Sprintf("etcd-%d", i)
				stop := c.load(4, "warm", "/?sleep=5")
				s.kill(member)
				begin := time.Now()
				name := fmt.Sprintf("cold-%d", i)
				if took, ok := within(20*time.Second, func() bool { return s.change(name) == nil }); !ok {
					l.add("without %s: no change is taken", member)
				} else {
					s.t.Logf("without %s: a change was taken after %v", member, took.Round(time.Millisecond))
				}
				if len(l.all) == 0 {
					if _, ok := within(20*time.Second, func() bool { return c.get(name, "/").Status == 200 }); !ok {
						l.add("without %s: what is new does not answer: %v", member, c.get(name, "/"))
					}
				}
				time.Sleep(time.Until(begin.Add(4 * time.Second))) // longer than any lease lives
				n, bad := stop()
				l.none("warm, without "+member, n, bad)
				if on := s.onNodes(); slices.Min(on) == 0 {
					l.add("without %s: nodes were given up: %v", member, on)
				}
				if len(l.all) > 0 {
					return l.all
				}
				s.t.Logf("without %s: warm %d of %d failed", member, len(bad), n)
				s.again(member)
			}
			return l.all
		},
		without: map[string][]harness.Change{"more than one way": {{File: "internal/state/etcd.go", Old: "Endpoints:            cfg.Endpoints,", New: "Endpoints:            cfg.Endpoints[:1],"}}},
	}.test(t)
}

// Any part stands still for a while: what it had to do is done afterwards, or by others meanwhile, and nobody lies about it.
func TestStandingStill(t *testing.T) {
	faults(t)
	s := start(t, 2)
	s.apply(harness.CheckerService("limited", 5, nil, harness.MinScale+"3"))
	s.apply(harness.CheckerService("open", 0, nil, harness.MinScale+"3"))
	names := slices.Sorted(maps.Keys(s.procs))
	for _, name := range names {
		s.apply(harness.CheckerService("cold-"+name, 1, nil, harness.InitialZero))
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			clients := 4
			stops := map[string]func() (int, []harness.Answer){}
			for _, service := range []string{"limited", "open"} {
				stops[service] = s.caller(1).load(clients, service, "/?sleep=5")
			}
			time.Sleep(200 * time.Millisecond)
			p := s.procs[name]
			p.Signal(syscall.SIGSTOP)
			time.Sleep(6 * time.Second) // longer than leases live and nodes are waited for
			p.Signal(syscall.SIGCONT)
			if a := s.caller(1).get("cold-"+name, "/"); a.Status != 200 {
				t.Errorf("cold, afterwards: %v", a)
			}
			for service, stop := range stops {
				n, bad := stop()
				t.Logf("%s: %d of %d failed", service, len(bad), n)
				if len(bad) > clients {
					t.Errorf("%s: %d of %d failed: %v", service, len(bad), n, bad[0])
				}
			}
			harness.Eventually(t, 30*time.Second, "a change is taken", func() bool { return s.change("after-"+name) == nil })
			harness.Eventually(t, 30*time.Second, "the status says what there is", func() bool {
				n := 0
				for _, r := range s.revisions() {
					if r.Status.ActualReplicas != nil {
						n += int(*r.Status.ActualReplicas)
					}
				}
				return n == sum(s.onNodes())
			})
		})
	}
}

func (s *system) revisions() (out []*api.Revision) {
	all, _, err := s.client.List(context.Background(), api.Revisions, "default", client.ListOptions{})
	if err != nil {
		return nil
	}
	for _, o := range all {
		if r, ok := o.(*api.Revision); ok {
			out = append(out, r)
		}
	}
	return out
}

// Five times what its instances can do: they go on at their peak, the rest is refused fast, and another tenant does not notice.
func TestOverload(t *testing.T) {
	faults(t)
	const (
		instances = 4
		inside    = 100 * time.Millisecond
		times     = 5
		lasting   = 10 * time.Second
		goodput   = 0.8
		patience  = 5 * time.Second // of clients: the queue holds half a second's work
	)
	fault{
		plan: plan{routers: 2},
		play: func(s *system) []string {
			s.apply(harness.CheckerService("busy", 1, nil, harness.MinScale+"4", harness.MaxScale+"4", api.AnnotationQueueMaxRequests+": 20"))
			s.apply(harness.CheckerService("other", 1, nil, harness.MinScale+"2"))
			c := s.caller(-1)
			other := c.load(2, "other", "/?sleep=5")
			var l list
			requests := int(times * instances * lasting / inside)
			var mu sync.Mutex
			var good int
			var slowest time.Duration // of those that were refused
			var wrong []harness.Answer
			var all sync.WaitGroup
			tick := time.NewTicker(inside / instances / times)
			defer tick.Stop()
			begin := time.Now()
			for range requests {
				<-tick.C
				all.Go(func() {
					a := c.get("busy", fmt.Sprintf("/?sleep=%d", inside.Milliseconds()))
					mu.Lock()
					defer mu.Unlock()
					switch {
					case a.Err == nil && a.Status == 200 && a.Took < patience:
						good++
					case a.Err == nil && a.Status == 503 && strings.Contains(a.Header.Get("X-Thaw-Error"), "queue_full"):
						slowest = max(slowest, a.Took)
					default:
						wrong = append(wrong, a)
					}
				})
			}
			peak := int(instances * time.Since(begin) / inside) // a busy machine may have sent them more slowly
			all.Wait()
			n, bad := other()
			s.t.Logf("%d of %d were answered, where %d is the peak (%.0f %%), refusals took at most %v; other tenant: %d of %d failed", good, requests, peak, 100*float64(good)/float64(peak), slowest.Round(time.Millisecond), len(bad), n)
			if float64(good) < goodput*float64(peak) {
				l.add("%d of %d", good, peak)
			}
			l.none("neither an answer nor a refusal", requests, wrong)
			l.none("the other tenant", n, bad)
			return l.all
		},
		without: map[string][]harness.Change{"bounds of queues": {{File: "internal/breaker/breaker.go", Old: "case b.waitingLocked() >= b.cfg.MaxWaiting:", New: "case b.waitingLocked() >= 1<<30:"}}},
	}.test(t)
}

// A function that breaks at its start is tried again ever more slowly, and who waits for it is told why, once.
func TestBrokenFunction(t *testing.T) {
	faults(t)
	fault{
		plan: plan{routers: 1},
		play: func(s *system) []string {
			s.apply(harness.CheckerService("good", 1, nil, harness.MinScale+"1"))
			s.apply(harness.CheckerService("breaks", 1, map[string]string{"CHECKER_LOG": "/nowhere/at/all"}, harness.InitialZero))
			c := s.caller(0)
			c.http.Timeout = 20 * time.Second
			stop := c.load(1, "good", "/?sleep=5")
			var l list
			begin := time.Now()
			bad, _ := c.burst(20, "breaks", "/")
			took := time.Since(begin)
			for _, a := range bad {
				if a.Status != 503 || a.Header.Get("X-Thaw-Error") == "" || !strings.Contains(a.Body, "/nowhere/at/all") {
					l.add("not told why: %v", a)
					break
				}
			}
			if len(bad) != 20 {
				l.add("%d of 20 were answered", 20-len(bad))
			}
			for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				_ = c.get("breaks", "/")
			}
			starts := 0
			for i := range 3 {
				starts += strings.Count(s.procs[fmt.Sprintf("agent-%d", i)].Log(), `msg="instance failed"`)
			}
			n, broken := stop()
			s.t.Logf("20 told why within %v; %d starts in %v on three nodes; its neighbour: %d of %d failed", took.Round(time.Millisecond), starts, time.Since(begin).Round(time.Second), len(broken), n)
			if starts > 20+3*12 { // what the burst asked for at first, and on three nodes one after 0, 0.1, 0.2, 0.4 s and so on
				l.add("%d starts", starts)
			}
			l.none("its neighbour", n, broken)
			return l.all
		},
		without: map[string][]harness.Change{"back-off": {{File: "instance/revision.go", Old: "\tif crashes < 2 {", New: "\tif crashes >= 0 {"}}},
	}.test(t)
}

// Clocks jump by an hour and back, of all processes and of some of them: nobody who waits is told that he has waited too long, warm and cold requests
// go on, and the instances stay.
func TestClockJump(t *testing.T) {
	faults(t)
	clock, err := harness.SettableClock()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := harness.BuildChanged(clock, "cmd/thaw", "examples/checker")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	clocks := harness.NewClocks(t)
	const hour = 3600
	jumps := []struct {
		what string
		set  map[string]int // seconds by the beginning of processes' names
	}{
		{"all an hour ahead", map[string]int{"": hour}},
		{"all right again", map[string]int{"": 0}},
		{"all an hour behind", map[string]int{"": -hour}},
		{"all right once more", map[string]int{"": 0}},
		{"one node ahead", map[string]int{"agent-0": hour}},
		{"that node behind", map[string]int{"agent-0": -hour}},
		{"autoscalers ahead", map[string]int{"agent-0": 0, "autoscaler": hour}},
		{"activators ahead", map[string]int{"autoscaler": 0, "activator": hour}},
		{"etcd ahead", map[string]int{"activator": 0, "etcd": hour}},
	}
	fault{
		plan:   plan{routers: 1, bin: dir},
		always: clock,
		play: func(s *system) []string {
			var l list
			s.apply(harness.CheckerService("warm", 1, nil, harness.MinScale+"6"))
			s.apply(harness.CheckerService("grows", 1, nil, harness.InitialZero, harness.MaxScale+"6"))
			harness.Eventually(s.t, 20*time.Second, "six on three nodes", func() bool { return sum(s.onNodes()) == 6 })
			for i := range jumps {
				s.apply(harness.CheckerService(fmt.Sprintf("slow-%d", i), 1, map[string]string{"CHECKER_START_MS": "2500"}, harness.InitialZero, harness.MaxScale+"3"))
			}
			c := s.caller(0)
			c.http.Timeout = 30 * time.Second
			for i, j := range jumps {
				stop := c.load(3, "warm", "/?sleep=5")
				busy := c.load(4, "grows", "/?sleep=50")
				held := make(chan []harness.Answer, 1)
				go func() { bad, _ := c.burst(9, fmt.Sprintf("slow-%d", i), "/"); held <- bad }()
				if _, ok := within(10*time.Second, func() bool { return s.held(0)+s.held(1) >= 9 }); !ok {
					l.add("%s: %d and %d are held, want nine", j.what, s.held(0), s.held(1))
				}
				for name, p := range s.procs {
					for prefix, seconds := range j.set {
						if strings.HasPrefix(name, prefix) {
							if err := clocks.Set(p, seconds); err != nil {
								s.t.Fatal(err)
							}
						}
					}
				}
				waited := <-held
				l.none(j.what+": held", 9, waited)
				time.Sleep(8 * time.Second) // longer than the stable window, and than leases live
				n, bad := stop()
				l.none(j.what+": warm", n, bad)
				m, slow := busy()
				l.none(j.what+": busy", m, slow)
				on := sum(s.onNodes())
				s.t.Logf("%s: held %d of 9 failed, warm %d of %d, busy %d of %d; instances %d", j.what, len(waited), len(bad), n, len(slow), m, on)
				if err := s.change(fmt.Sprintf("after-%d", i)); err != nil {
					l.add("%s: a change: %v", j.what, err)
				}
				if len(l.all) > 0 && s.bin != dir {
					break
				}
			}
			for _, p := range s.procs {
				if err := clocks.Set(p, 0); err != nil {
					s.t.Fatal(err)
				}
			}
			if took, ok := within(60*time.Second, func() bool { return sum(s.onNodes()) == 6 }); !ok {
				l.add("what is not used any more is still there: %v", s.onNodes())
			} else {
				s.t.Logf("at rest after %v", took.Round(time.Second))
			}
			return l.all
		},
		// Waiting is measured by the clock that does not jump.
		without: map[string][]harness.Change{"the monotonic clock": {{File: "activator/activator.go", Old: "w := breaker.NewWaiter(x.Client, held(x), time.Now())", New: "w := breaker.NewWaiter(x.Client, held(x), time.Now().Round(0))"}}},
	}.test(t)
}

// drainWaits switches off that a drained node keeps what nobody else is ready for.
var drainWaits = []harness.Change{{File: "autoscaler/remote/nodes.go", Old: "keep := min(sh.at[name], max(0, missing))", New: "keep := 0 * missing"}}

// A node is drained under load: everything there is started elsewhere and ended when it is ready there, no request fails or waits for a start; nothing goes
// to the node until it may take part again.
func TestDrainedNode(t *testing.T) {
	const (
		starts   = 6 * time.Second
		patience = 4 * time.Second // nobody waits for a start
	)
	fault{
		plan: plan{routers: 2},
		play: func(s *system) []string {
			var l list
			services := map[string]int{"limited": 2, "open": 0, "single-0": 1, "single-1": 1, "single-2": 1} // one of the single ones is on the node
			for _, least := range []string{"1", "3"} {                                                       // the single ones first: one goes to each node
				var deployed sync.WaitGroup
				for name, limit := range services {
					if strings.HasPrefix(name, "single") == (least == "1") {
						deployed.Go(func() {
							s.apply(harness.CheckerService(name, limit, map[string]string{"CHECKER_START_MS": fmt.Sprint(starts.Milliseconds())}, harness.MinScale+least))
						})
					}
				}
				deployed.Wait()
			}
			s.apply(harness.CheckerService("cold", 1, nil, harness.InitialZero))
			harness.Eventually(s.t, 30*time.Second, "nine on three nodes", func() bool { return slices.Equal(s.onNodes(), []int{3, 3, 3}) })
			c := s.caller(-1)
			var mu sync.Mutex
			slowest := map[string]time.Duration{}
			total := 0
			var failed []harness.Answer
			end := make(chan struct{})
			var load sync.WaitGroup
			for service := range services {
				load.Go(func() {
					for {
						select {
						case <-end:
							return
						default:
						}
						a := c.get(service, "/?sleep=20")
						mu.Lock()
						total++
						slowest[service] = max(slowest[service], a.Took)
						if a.Err != nil || a.Status != 200 {
							failed = append(failed, a)
						}
						mu.Unlock()
					}
				})
			}
			begin := time.Now()
			if out, err := s.verb("node", "drain", "agent-2"); err != nil {
				l.add("drain: %v: %s", err, out)
			}
			took := time.Since(begin)
			if n := s.onNodes(); n[2] != 0 {
				l.add("drained, but instances on the nodes are %v", n)
			}
			bad, _ := c.burst(6, "cold", "/?sleep=200")
			l.none("cold, with a node drained", 6, bad)
			if n := s.onNodes(); n[2] != 0 {
				l.add("something new went to a drained node: %v", n)
			}
			if out, err := s.verb("node", "list"); err != nil || !strings.Contains(out, "draining") {
				l.add("node list: %v: %s", err, out)
			}
			if out, err := s.verb("node", "cordon", "nobody"); err == nil {
				l.add("a node that is not there was cordoned: %s", out)
			}
			close(end)
			load.Wait()
			l.none("under load", total, failed)
			longest := slices.Max(slices.Collect(maps.Values(slowest)))
			if longest > patience {
				l.add("a request waited for a start: %v", slowest)
			}
			s.t.Logf("drained within %v, where starts take %v: %d of %d failed, the slowest took %v", took.Round(10*time.Millisecond), starts, len(failed), total, longest.Round(time.Millisecond))
			if out, err := s.verb("node", "uncordon", "agent-2"); err != nil {
				l.add("uncordon: %v: %s", err, out)
			}
			s.apply(harness.CheckerService("more", 1, nil, harness.MinScale+"6"))
			if _, ok := within(20*time.Second, func() bool { return s.onNodes()[2] > 0 }); !ok {
				l.add("nothing goes to a node that may take part again: %v", s.onNodes())
			}
			return l.all
		},
		without: map[string][]harness.Change{"waiting for others": drainWaits},
	}.test(t)
}

// Three routers, ten instances that take one request at a time, and always more requests than that: never are two in one instance, and none is idle
// for long while requests wait, whichever router they came by.
func TestThreeRouters(t *testing.T) {
	const (
		instances, clients = 10, 30
		idle               = 10 * time.Millisecond // half of the times: the 99th in 100 is the machine's as much as ours, and told, not judged
	)
	measured := os.Getenv("THAW_FAULTS") != ""
	windows, window := 3, time.Second
	if measured {
		windows, window = 12, 5*time.Second
	}
	fault{
		plan: plan{routers: 3},
		play: func(s *system) []string {
			windows := windows
			if s.bin != bin {
				windows = 3
			}
			var l list
			s.apply(harness.CheckerService("one", 1, nil, harness.MinScale+"10", harness.MaxScale+"10"))
			harness.Eventually(s.t, 20*time.Second, "ten instances", func() bool { return sum(s.onNodes()) == instances })
			best := time.Hour // of the windows: what else the machine does at one moment is not the cluster's doing
			for range windows {
				var mu sync.Mutex
				var gaps []time.Duration
				used := map[string]int{}
				total := 0
				ctx, cancel := context.WithTimeout(context.Background(), window)
				var all sync.WaitGroup
				for i := range clients {
					c := s.caller(i % s.routers)
					all.Go(func() {
						for ctx.Err() == nil {
							a := c.get("one", "/?sleep=20")
							mu.Lock()
							total++
							if a.Err != nil || a.Status != 200 {
								l.add("%v", a)
							} else if n := a.Header.Get("X-Checker-Max-In-Flight"); n != "1" {
								l.add("%s were in one instance", n)
							}
							used[a.Header.Get("X-Checker-Instance")]++
							if us, err := strconv.Atoi(a.Header.Get("X-Checker-Idle")); err == nil {
								gaps = append(gaps, time.Duration(us)*time.Microsecond)
							}
							mu.Unlock()
						}
					})
				}
				all.Wait()
				cancel()
				gaps = gaps[min(len(gaps), 10*clients):] // until all clients are there, and connections are made
				slices.Sort(gaps)
				if len(used) != instances {
					l.add("%d instances were used", len(used))
				}
				if len(gaps) == 0 {
					continue
				}
				at := func(share float64) time.Duration { return gaps[int(share*float64(len(gaps)-1))] }
				s.t.Logf("%d requests in %v; idle while others wait: median %v, p99 %v, at most %v", total, window, at(0.5), at(0.99), at(1))
				best = min(best, at(0.5))
				if len(l.all) > 10 {
					return l.all[:10]
				}
			}
			if measured && best > idle {
				l.add("instances are idle for %v (median) while requests wait", best)
			}
			return l.all
		},
		without: map[string][]harness.Change{
			"a limit": {
				{File: "cmd/thaw/proxies/proxies.go", Old: "Concurrency: rev.Concurrency()", New: "Concurrency: 0"},
				{File: "activator/activator.go", Old: "Limit: in.Capacity", New: "Limit: 2 * in.Capacity"},
			},
			"handing slots on": { // they are looked for every 50 ms
				{File: "internal/breaker/breaker.go", Old: "\tb.fixLocked(t)\n\tb.dispatchLocked()\n", New: "\tb.fixLocked(t)\n"},
				{File: "internal/breaker/breaker.go", Old: "\tdefer b.mu.Unlock()\n\treturn b.waitingLocked() > 0 || b.doubts", New: "\tdefer b.mu.Unlock()\n\tb.dispatchLocked()\n\treturn b.waitingLocked() > 0 || b.doubts"},
			},
		},
	}.test(t)
}

// verb runs a verb of the command line against this cluster.
func (s *system) verb(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "thaw"), args...)
	cmd.Env = append(os.Environ(), "THAW_API=http://"+s.procs["control"].Ready["listen"], "THAW_DATA="+s.dir+"/control", "THAW_TOKEN=")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// The autoscaler that decides is killed: requests that need an instance wait for the other one to take over, no longer.
func TestKilledAutoscaler(t *testing.T) {
	faults(t)
	fault{
		plan: plan{routers: 1},
		play: func(s *system) []string {
			s.apply(harness.CheckerService("cold", 1, nil, harness.InitialZero))
			owner := shards.Preferred([]string{"autoscaler-0", "autoscaler-1"}, shards.OfNamespace("default/cold-00001"))
			c := s.caller(0)
			c.http.Timeout = 15 * time.Second
			var l list
			s.kill(owner)
			a := c.get("cold", "/")
			s.t.Logf("a cold request right after the end of %s took %v", owner, a.Took.Round(time.Millisecond))
			if a.Status != 200 {
				l.add("cold, without %s: %v", owner, a)
			}
			return l.all
		},
		without: map[string][]harness.Change{"leases that run out": {{File: "internal/owners/owners.go", Old: "const DefaultTTL = 2 * time.Second", New: "const DefaultTTL = time.Minute"}}},
	}.test(t)
}
