package cluster

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

// onNodes counts the functions on each of the nodes.
func (s *system) onNodes() (n []int) {
	for i := range 3 {
		n = append(n, len(harness.ProcessesOf(fmt.Sprintf("%s/agent-%d", s.dir, i))))
	}
	return n
}

// metric adds up what a part says under a name of metrics.
func (s *system) metric(part, name string) (sum float64) {
	s.t.Helper()
	resp, err := http.Get("http://" + s.procs[part].Ready["metrics"] + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	for sc := bufio.NewScanner(resp.Body); sc.Scan(); {
		line, value, _ := strings.Cut(sc.Text(), " ")
		if line, _, _ = strings.Cut(line, "{"); line == name {
			v, _ := strconv.ParseFloat(value, 64)
			sum += v
		}
	}
	return sum
}

// held is how many requests wait in an activator.
func (s *system) held(i int) int {
	return int(s.metric(fmt.Sprintf("activator-%d", i), "thaw_revision_queue_depth"))
}

func sum(n []int) (total int) {
	for _, x := range n {
		total += x
	}
	return total
}

// From zero through any router, with a waterfall; a burst is spread over the nodes; a limit of one holds whichever router a request came by; all
// of it goes back to zero.
func TestCluster(t *testing.T) {
	s := start(t, 3)
	s.apply(harness.CheckerService("one", 1, nil, harness.InitialZero, harness.MaxScale+"10"))
	if a := s.caller(1).get("one", "/"); a.Status != 200 || !strings.Contains(a.Header.Get("Server-Timing"), "create;dur=") {
		t.Fatalf("cold: %v, Server-Timing %q", a, a.Header.Get("Server-Timing"))
	}
	type result struct {
		bad       []harness.Answer
		instances map[string]int
	}
	results := make(chan result)
	for i := range 3 {
		c := s.caller(i)
		go func() {
			bad, instances := c.burst(60, "one", "/?sleep=50")
			results <- result{bad, instances}
		}()
	}
	instances := map[string]int{}
	for range 3 {
		r := <-results
		if len(r.bad) > 0 {
			t.Errorf("%d of 60 were not answered: %v", len(r.bad), r.bad[0])
		}
		for i, n := range r.instances {
			instances[i] += n
		}
	}
	if nodes := s.onNodes(); slices.Min(nodes) == 0 || sum(nodes) != 10 {
		t.Errorf("instances on the nodes: %v, want ten on all three", nodes)
	}
	c := s.caller(0)
	for range 200 {
		if a := c.get("one", "/"); a.Status != 200 || a.Header.Get("X-Checker-Max-In-Flight") != "1" {
			t.Fatalf("%v, most in flight %s", a, a.Header.Get("X-Checker-Max-In-Flight"))
		}
	}
	if len(instances) < 5 {
		t.Errorf("only %d instances answered", len(instances))
	}
	s.apply(harness.CheckerService("open", 0, nil))
	if bad, _ := s.caller(2).burst(100, "open", "/?sleep=20"); len(bad) > 0 {
		t.Errorf("without a limit: %d of 100 were not answered: %v", len(bad), bad[0])
	}
	s.explained("one")
	if a := s.caller(0).get("nobody", "/"); a.Status != 404 {
		t.Errorf("unknown host: %v", a)
	}
	harness.Eventually(t, 60*time.Second, "everything is at zero", func() bool { return sum(s.onNodes()) == 0 })
	if a := s.caller(2).get("open", "/"); a.Status != 200 {
		t.Errorf("from zero again: %v", a)
	}
}

// Nodes take few large or many small instances. What has room on one node alone goes there; what has room nowhere is refused at once, with what a node
// has and what it would take, and is started as soon as there is room.
func TestSizes(t *testing.T) {
	s := plan{routers: 1, units: [3]int{16, 16, 40}}.start(t)
	c := s.caller(0)
	sized := func(name, memory string, annotations ...string) string {
		return harness.CheckerService(name, 1, nil, append(annotations, harness.MaxScale+"8")...) + "        resources: {requests: {memory: " + memory + "}}\n"
	}
	refused := func(name string, words ...string) {
		t.Helper()
		a := c.get(name, "/")
		if a.Status != 503 || a.Header.Get("X-Thaw-Error") != "cannot_start" || a.Header.Get("Retry-After") == "" {
			t.Errorf("%s, for which there is no room: %v", name, a)
		}
		for _, w := range append(words, "NodeFull") {
			if !strings.Contains(a.Body, w) {
				t.Errorf("%s: %q does not say %q", name, a.Body, w)
			}
		}
		if a.Took > 20*time.Second {
			t.Errorf("%s was refused after %v", name, a.Took)
		}
	}
	for _, name := range []string{"large", "larger", "largest"} {
		s.apply(sized(name, map[string]string{"large": "512Mi", "larger": "300Mi", "largest": "1Gi"}[name], harness.InitialZero))
	}
	if a := c.get("large", "/"); a.Status != 200 || !slices.Equal(s.onNodes(), []int{0, 0, 1}) {
		t.Fatalf("32 units: %v, nodes %v, want it on the last", a, s.onNodes())
	}
	refused("larger", "40 units", "32 are taken", "takes 32", "class medium") // by the one node that could take it
	refused("largest", "takes 64", "class large", "ask for less")

	s.apply(sized("small", "128Mi", harness.MinScale+"5")) // eight units each fill all the nodes
	harness.Eventually(t, 30*time.Second, "all nodes are full", func() bool { return slices.Equal(s.onNodes(), []int{2, 2, 2}) })
	for i, want := range []float64{16, 16, 40} {
		if all, used := s.metric(fmt.Sprintf("agent-%d", i), "thaw_instances_units"), s.metric(fmt.Sprintf("agent-%d", i), "thaw_instances_units_used"); all != want || used != want {
			t.Errorf("node %d says that %v of %v units are taken, want all of %v", i, used, all, want)
		}
	}
	s.apply(harness.CheckerService("tiny", 1, nil, harness.InitialZero))
	refused("tiny", "takes 1 ")
	ctx := t.Context()
	if err := s.client.Delete(ctx, api.Services, "default", "small"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, "a small one has room", func() bool { return c.get("tiny", "/").Status == 200 })
	if err := s.client.Delete(ctx, api.Services, "default", "large"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, "another large one has room", func() bool { return c.get("larger", "/").Status == 200 })
}

// explained checks that verbs show how a service scales, as the autoscaler says that decides about it.
func (s *system) explained(service string) {
	s.t.Helper()
	out, err := s.verb("explain-scale", service)
	if err != nil || !strings.Contains(out, service+"-00001\n  ") {
		s.t.Errorf("explain-scale: %v: %s", err, out)
	}
	scale, err := s.client.Scale(s.t.Context(), "default", service+"-00001")
	if ready, _ := scale["ready"].(float64); err != nil || ready < 1 || scale["mode"] == "" {
		s.t.Errorf("scale: %v, %v", scale, err)
	}
	if _, err := s.client.Scale(s.t.Context(), "default", "nobody-00001"); !errors.Is(err, client.ErrNotFound) {
		s.t.Errorf("scale of nobody: %v", err)
	}
	out, err = s.verb("describe", service)
	if err != nil || !strings.Contains(out, strings.ToLower(fmt.Sprint(scale["mode"]))) || strings.Contains(out, "warning") {
		s.t.Errorf("describe: %v: %s", err, out)
	}
}

// What a killed process takes along is what was inside it, and nothing else fails: each part dies under load, cold starts work within three seconds
// after that, and the part comes back.
func TestKilledParts(t *testing.T) {
	faults(t)
	s := start(t, 2)
	s.apply(harness.CheckerService("limited", 5, nil, harness.MinScale+"3"))
	s.apply(harness.CheckerService("open", 0, nil, harness.MinScale+"3"))
	cold := 0
	coldStart := func(why string) {
		t.Helper()
		cold++
		name := fmt.Sprintf("cold-%d", cold)
		s.apply(harness.CheckerService(name, 1, nil, harness.InitialZero))
		begin := time.Now()
		a := s.caller(1).get(name, "/")
		for a.Status == 404 && time.Since(begin) < time.Second { // a router may hear of a route a moment after it is ready
			time.Sleep(10 * time.Millisecond)
			a = s.caller(1).get(name, "/")
		}
		if a.Status != 200 {
			t.Errorf("%s: a cold start gave %v", why, a)
		} else if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%s: a cold start took %v", why, took)
		}
	}
	for _, c := range []struct {
		part string
		lost int // requests of one service that may fail: what was inside
	}{
		{"control", 0}, {"autoscaler-0", 0}, {"autoscaler-1", 0}, {"activator-0", 20}, {"activator-1", 20}, {"agent-0", 20}, {"router-0", 20},
	} {
		t.Run(c.part, func(t *testing.T) {
			stops := map[string]func() (int, []harness.Answer){}
			router := 1
			if c.part == "router-0" {
				router = -1 // by both
			}
			for _, service := range []string{"limited", "open"} {
				stops[service] = s.caller(router).load(10, service, "/?sleep=5")
			}
			time.Sleep(300 * time.Millisecond) // of undisturbed load
			s.kill(c.part)
			time.Sleep(300 * time.Millisecond)
			if c.part != "control" { // it takes what a deploy needs along
				coldStart("after the end of " + c.part)
			}
			s.again(c.part)
			time.Sleep(300 * time.Millisecond)
			coldStart("after the return of " + c.part)
			for service, stop := range stops {
				n, bad := stop()
				if len(bad) > c.lost {
					t.Errorf("%s: %d of %d failed, at most %d may: %v", service, len(bad), n, c.lost, bad[0])
				}
				t.Logf("%s: %d of %d failed", service, len(bad), n)
			}
		})
	}
}

// Nodes that are far away: cold starts, bursts and warm requests all succeed, and a hard limit holds.
func TestFarNodes(t *testing.T) {
	faults(t)
	const trip = 70 * time.Millisecond
	s := plan{routers: 1, delay: trip / 2}.start(t)
	s.apply(harness.CheckerService("far", 1, nil, harness.InitialZero, harness.MaxScale+"10"))
	s.apply(harness.CheckerService("open", 0, nil, harness.InitialZero))
	c := s.caller(0)
	for _, service := range []string{"far", "open"} {
		begin := time.Now()
		if a := c.get(service, "/"); a.Status != 200 {
			t.Errorf("%s: cold: %v", service, a)
		}
		cold := time.Since(begin)
		begin = time.Now()
		if a := c.get(service, "/"); a.Status != 200 {
			t.Errorf("%s: warm: %v", service, a)
		}
		warm := time.Since(begin)
		t.Logf("%s: cold %v, warm %v", service, cold.Round(time.Millisecond), warm.Round(time.Millisecond))
		if warm < trip {
			t.Errorf("%s: a warm request took %v: the nodes are not far away", service, warm)
		}
		if cold > 5*time.Second {
			t.Errorf("%s: a cold one took %v", service, cold)
		}
	}
	bad, instances := c.burst(100, "far", "/?sleep=20")
	if len(bad) > 0 {
		t.Errorf("%d of 100 failed: %v", len(bad), bad[0])
	}
	if len(instances) < 5 {
		t.Errorf("only %d instances answered", len(instances))
	}
	for range 50 {
		if a := c.get("far", "/"); a.Status != 200 || a.Header.Get("X-Checker-Max-In-Flight") != "1" {
			t.Fatalf("%v, most in flight %s", a, a.Header.Get("X-Checker-Max-In-Flight"))
		}
	}
}

// Every process is ended in order and started again, one after the other, under some 200 requests a second for services with and without a limit
// and with a cold one now and then: not one fails.
func TestRollingRestart(t *testing.T) {
	faults(t)
	s := start(t, 2)
	s.apply(harness.CheckerService("limited", 5, nil, harness.MinScale+"3"))
	s.apply(harness.CheckerService("open", 0, nil, harness.MinScale+"3"))
	for i := range len(s.procs) {
		s.apply(harness.CheckerService(fmt.Sprintf("cold-%d", i), 1, nil, harness.InitialZero))
	}
	c := s.caller(-1)
	stops := map[string]func() (int, []harness.Answer){}
	for _, service := range []string{"limited", "open"} {
		stops[service] = c.load(3, service, "/?sleep=15")
	}
	names := slices.Sorted(maps.Keys(s.procs))
	for i, name := range names {
		cold := make(chan harness.Answer, 1)
		go func() { cold <- c.get(fmt.Sprintf("cold-%d", i), "/") }()
		if err := s.procs[name].Stop(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		s.again(name)
		if a := <-cold; a.Status != 200 {
			t.Errorf("cold while %s is restarted: %v", name, a)
		}
		harness.Eventually(t, 20*time.Second, "three instances of each after the restart of "+name, func() bool { return sum(s.onNodes()) >= 6 })
	}
	for service, stop := range stops {
		n, bad := stop()
		t.Logf("%s: %d of %d failed", service, len(bad), n)
		for _, a := range bad[:min(len(bad), 5)] {
			t.Errorf("%s: %v", service, a)
		}
	}
}
