package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

// printed asks for what the checkers of a service printed: request id -> how often it reached a function, and how many instances
// began. They may run in sandboxes, which leave nothing in a folder of ours.
func printed(t *testing.T, th *harness.Thaw, service string) (deliveries map[string]int, starts int) {
	t.Helper()
	deliveries = map[string]int{}
	for line, err := range th.Client.Logs(t.Context(), "default", client.LogOptions{Service: service, Tail: -1}) {
		if err != nil {
			t.Fatal(err)
		}
		if id, ok := strings.CutPrefix(line.Text, "request "); ok {
			deliveries[id]++
		} else if line.Text == "started" {
			starts++
		}
	}
	return deliveries, starts
}

// 1,000 requests at once, no instance, containerConcurrency 10: all are answered once, no instance ever has more than 10.
func TestBurstFromZero(t *testing.T) {
	th := harness.Start(t, bin)
	th.Apply(harness.CheckerService("burst", 10, map[string]string{"CHECKER_LOG": "-"}, harness.InitialZero, harness.MaxScale+"20"))
	const n = 1000
	var wg sync.WaitGroup
	var bad, over atomic.Int32
	begin := time.Now()
	for i := range n {
		wg.Go(func() {
			id := fmt.Sprintf("burst-%04d", i)
			a := th.Get("burst", "/?sleep=5", "X-Request-Id", id)
			var r struct {
				ID       string
				InFlight int
			}
			if a.Err != nil || a.Status != 200 || json.Unmarshal([]byte(a.Body), &r) != nil || r.ID != id || a.Header.Get("X-Request-Id") != id {
				if bad.Add(1) < 4 {
					t.Errorf("%s: %v", id, a)
				}
			}
			if r.InFlight > 10 {
				over.Add(1)
			}
		})
	}
	wg.Wait()
	t.Logf("%d requests answered in %v", n, time.Since(begin).Round(time.Millisecond))
	if bad.Load() > 0 || over.Load() > 0 {
		t.Errorf("%d bad answers, %d saw more than 10 in flight", bad.Load(), over.Load())
	}
	seen, _ := printed(t, th, "burst")
	for id, times := range seen {
		if times != 1 {
			t.Errorf("%s was delivered %d times", id, times)
		}
	}
	if len(seen) != n {
		t.Errorf("%d of %d ids reached a function", len(seen), n)
	}
}

// One request starts one instance, never two.
func TestOneStartForOneRequest(t *testing.T) {
	th := harness.Start(t, bin)
	for i := range 20 {
		name := fmt.Sprintf("one-%d", i)
		th.Apply(harness.CheckerService(name, 1, map[string]string{"CHECKER_LOG": "-"}, harness.InitialZero))
		a := th.Get(name, "/")
		if a.Status != 200 || !strings.Contains(a.Header.Get("Server-Timing"), "create;dur=") {
			t.Fatalf("%v; Server-Timing %q", a, a.Header.Get("Server-Timing"))
		}
		if _, starts := printed(t, th, name); starts != 1 {
			t.Errorf("%s: %d instances were started for one request", name, starts)
		}
	}
}

// A split of 80/20 over 10,000 requests within 1.5 points, tag hosts and the tag header 100 %.
func TestTrafficSplit(t *testing.T) {
	th := harness.Start(t, bin)
	th.Apply(harness.CheckerService("split", 0, map[string]string{"V": "1"}))
	th.Apply(harness.CheckerService("split", 0, map[string]string{"V": "2"}))
	th.Split("split", `{"revisionName":"split-00001","percent":80,"tag":"old"},{"revisionName":"split-00002","percent":20,"tag":"new"}`)
	got := th.Count(10_000, "split")
	if p := float64(got["split-00001"]) / 100; math.Abs(p-80) > 1.5 {
		t.Errorf("%.2f %% went to the old revision, want 80 +- 1.5", p)
	}
	t.Logf("split: %v", got)
	for host, want := range map[string]string{"old-split": "split-00001", "new-split": "split-00002"} {
		if got := th.Count(400, host); got[want] != 400 {
			t.Errorf("%s: %v", host, got)
		}
	}
	if got := th.Count(400, "split", "Knative-Serving-Tag", "new"); got["split-00002"] != 400 {
		t.Errorf("tag header: %v", got)
	}
	if a := th.Get("nothere-split", "/"); a.Status != 404 || a.Header.Get("X-Thaw-Error") != "no_service" {
		t.Errorf("unknown tag host: %v", a)
	}
}

// Changing the split, rolling out and rolling back under load: no request fails.
func TestChangesUnderLoad(t *testing.T) {
	th := harness.Start(t, bin)
	th.Apply(harness.CheckerService("live", 0, map[string]string{"V": "1"}))
	stop := th.Load(8, "live", "/?sleep=1")
	for v := 2; v <= 4; v++ {
		th.Apply(harness.CheckerService("live", 0, map[string]string{"V": fmt.Sprint(v)}))
	}
	for _, split := range []string{
		`{"revisionName":"live-00001","percent":50},{"latestRevision":true,"percent":50}`,
		`{"revisionName":"live-00001","percent":100}`,
		`{"revisionName":"live-00002","percent":10},{"revisionName":"live-00003","percent":90}`,
		`{"latestRevision":true,"percent":100}`,
	} {
		th.Split("live", split)
	}
	// A revision that never gets ready must not take a single request.
	if _, err := th.TryApply(strings.Replace(harness.CheckerService("live", 0, nil), "$BIN/checker", "$BIN/crasher", 1)); err == nil {
		t.Error("a crashing revision was reported as ready")
	}
	total, bad := stop()
	if len(bad) > 0 {
		t.Errorf("%d of %d requests failed, first: %v", len(bad), total, bad[0])
	}
	t.Logf("%d requests", total)
	if got := th.Count(80, "live"); got["live-00004"] != 80 {
		t.Errorf("after the bad revision: %v", got)
	}
}

// Load makes several instances within 2 s; no request fails while the number goes up or down; at the end there is none, not even a frozen one.
func TestUpAndDownToZero(t *testing.T) {
	cfg := filepath.Join(t.TempDir(), "autoscaler.yaml")
	if err := os.WriteFile(cfg, []byte(harness.Quick), 0o644); err != nil {
		t.Fatal(err)
	}
	th := harness.Start(t, bin, "--autoscaler-config", cfg, "--frozen-for", "1s")
	th.Apply(harness.CheckerService("updown", 1, nil, harness.InitialZero, harness.MaxScale+"6"))
	begin := time.Now()
	stop := th.Load(4, "updown", "/?sleep=50")
	harness.Eventually(t, 2*time.Second, "4 instances are ready", func() bool { ready, _, _, _ := th.Scale("updown-00001"); return ready >= 4 })
	t.Logf("4 instances after %v", time.Since(begin).Round(time.Millisecond))
	// The load becomes a quarter: instances must go while requests run.
	thin := th.Load(1, "updown", "/?sleep=50")
	total, bad := stop()
	harness.Eventually(t, 30*time.Second, "at most 2 instances", func() bool { ready, _, _, _ := th.Scale("updown-00001"); return ready <= 2 })
	more, worse := thin()
	if bad = append(bad, worse...); len(bad) > 0 {
		t.Errorf("%d of %d requests failed, first: %v", len(bad), total+more, bad[0])
	}
	idle := time.Now()
	harness.Eventually(t, 30*time.Second, "no instance", func() bool {
		ready, starting, _, _ := th.Scale("updown-00001")
		return ready+starting == 0 && len(harness.ProcessesOf(th.Dir)) == 0
	})
	t.Logf("zero %v after the last request", time.Since(idle).Round(time.Millisecond))
	if a := th.Get("updown", "/"); a.Status != 200 {
		t.Errorf("after zero: %v", a)
	}
}

// kill -9 of everything but the functions, under load: afterwards all is there, and the same functions serve.
func TestKillAndComeBack(t *testing.T) {
	th := harness.Start(t, bin)
	for _, n := range []string{"a", "b"} {
		th.Apply(harness.CheckerService("kill-"+n, 5, nil, harness.MinScale+"2"))
	}
	th.Split("kill-a", `{"latestRevision":true,"percent":100,"tag":"t"}`)
	harness.Eventually(t, 10*time.Second, "2 instances each", func() bool {
		a, _, _, _ := th.Scale("kill-a-00001")
		b, _, _, _ := th.Scale("kill-b-00001")
		return a == 2 && b == 2
	})
	var before []int
	harness.Eventually(t, 5*time.Second, "4 functions run", func() bool { before = harness.ProcessesOf(th.Dir); return len(before) == 4 })
	stop := th.Load(8, "kill-a", "/?sleep=2")
	harness.Eventually(t, 5*time.Second, "the load runs", func() bool { return th.Get("kill-b", "/").Status == 200 })
	th.Kill()
	stop() // what was under way is lost with the process, and what came while it was away
	begin := time.Now()
	th.Relaunch()
	for _, host := range []string{"kill-a", "t-kill-a", "kill-b"} {
		if a := th.Get(host, "/"); a.Status != 200 {
			t.Errorf("%s after the restart: %v", host, a)
		}
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("ready again after %v, want 2 s", d)
	} else {
		t.Logf("served again %v after the restart", d.Round(time.Millisecond))
	}
	harness.Eventually(t, 5*time.Second, "both instances serve again", func() bool { ready, _, _, _ := th.Scale("kill-a-00001"); return ready == 2 })
	// Eventually: a new agent runs a small program of its own once, to see what a start costs.
	harness.Eventually(t, 5*time.Second, fmt.Sprintf("the functions are those of before, %v: they are adopted", before), func() bool {
		return fmt.Sprint(before) == fmt.Sprint(harness.ProcessesOf(th.Dir))
	})
	for _, name := range []string{"kill-a", "kill-b"} {
		o, err := th.Client.Get(context.Background(), api.Services, "default", name)
		if err != nil || api.StatusOf(o).Conditions.Get("Ready").Status != "True" {
			t.Errorf("%s: %v, %+v", name, err, o)
		}
	}
	revs, _ := th.Client.Raw(context.Background(), http.MethodGet, "/apis/serving.knative.dev/v1/namespaces/default/revisions", "", nil)
	if n := strings.Count(string(revs), `"kind":"Revision"`); n != 2 {
		t.Errorf("%d revisions after the restart", n)
	}
}

// An instance that crashes at start: one bounded answer with the cause and the function's last words, no crash loop.
func TestCrashingFunction(t *testing.T) {
	th := harness.Start(t, bin)
	doc := strings.Replace(harness.CheckerService("crash", 1, nil, harness.InitialZero), "$BIN/checker", "$BIN/crasher", 1)
	th.Apply(doc) // initial scale 0: ready without a start
	begin := time.Now()
	a := th.Get("crash", "/")
	if a.Status != 503 || a.Header.Get("X-Thaw-Error") != "cannot_start" || a.Header.Get("Retry-After") == "" || !strings.Contains(a.Body, "ExitCode") {
		t.Errorf("%v, Retry-After %q", a, a.Header.Get("Retry-After"))
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("the answer took %v", d)
	}
	t.Logf("answer: %v", a)
}

// The first deploy fails with the function's own last output.
func TestFailingDeploy(t *testing.T) {
	th := harness.Start(t, bin)
	_, err := th.TryApply(strings.Replace(harness.CheckerService("fails", 1, nil), "$BIN/checker", "$BIN/crasher", 1))
	if err == nil || !strings.Contains(err.Error(), "fails-00001") {
		t.Errorf("error of the deploy: %v", err)
	}
	o, gerr := th.Client.Get(context.Background(), api.Services, "default", "fails")
	if gerr != nil {
		t.Fatal(gerr)
	}
	t.Logf("%v", err)
	c := api.StatusOf(o).Conditions.Get("ConfigurationsReady")
	if c == nil || c.Status != "False" || c.Reason != "RevisionFailed" || !strings.Contains(c.Message, "exit") {
		t.Errorf("condition %+v", c)
	}
}

// Slow starters: held requests are answered when the function is ready, and only one instance is started for them.
func TestSlowStarter(t *testing.T) {
	th := harness.Start(t, bin)
	th.Apply(harness.CheckerService("slow", 0, map[string]string{"CHECKER_START_MS": "700"}, harness.InitialZero))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if a := th.Get("slow", "/"); a.Status != 200 {
				t.Errorf("%v", a)
			}
		})
	}
	wg.Wait()
	if n := len(harness.ProcessesOf(th.Dir)); n != 1 {
		t.Errorf("%d instances for 20 requests without a limit", n)
	}
}
