package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

const predictive = "autoscaling.thaw.run/planner: predictive"

// listening is how long the functions of this file take until they listen.
const listening = 2500 * time.Millisecond

// program is a service around test/function.
func program(th *harness.Thaw, name string, annotations ...string) string {
	doc := harness.CheckerService(name, 10, map[string]string{"LISTEN_MS": fmt.Sprint(listening.Milliseconds()), "ROUTER": th.Ingress}, annotations...)
	return strings.ReplaceAll(doc, "$BIN/checker", "$BIN/function")
}

// deploy makes services at the same time and waits for them.
func deploy(t *testing.T, th *harness.Thaw, docs ...string) {
	t.Helper()
	var making sync.WaitGroup
	for _, doc := range docs {
		making.Go(func() {
			if _, err := th.TryApply(doc); err != nil {
				t.Error(err)
			}
		})
	}
	making.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// The planner of a running system: a function is started together with the one that calls it once that is learnt, and only if the calls
// give themselves away; its settings change without a restart, and wrong ones change nothing. The settings begin with a value at which
// nothing idle is kept for long, so that the test sees zero.
func TestPlannerLearnsCalls(t *testing.T) {
	t.Parallel()
	settings := filepath.Join(t.TempDir(), "autoscaler.yaml")
	set := func(lines string) {
		t.Helper()
		if err := os.WriteFile(settings, []byte("stable-window: 6s\n"+lines), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set("planner-value: 1\n")
	// Processes, because a sandbox has no way to the router, and none frozen: this is about starts.
	th := harness.Start(t, bin, "--autoscaler-config", settings, "--provider", "process", "--frozen-for", "0s")
	deploy(t, th, program(th, "caller", predictive), program(th, "callee", predictive),
		program(th, "stranger", predictive), program(th, "called", predictive))
	ask := func(path, caller string) (started struct{ Caller, Callee time.Time }) {
		t.Helper()
		a := th.Get(caller, path)
		if a.Err != nil || a.Status != 200 || json.Unmarshal([]byte(a.Body), &started) != nil {
			t.Fatalf("%s: %v", caller, a)
		}
		return started
	}
	const passing, silent = "/call?pass=yes&host=callee.default.localhost", "/call?host=called.default.localhost"
	for range 25 {
		ask(passing, "caller")
		ask(silent, "stranger")
		time.Sleep(100 * time.Millisecond) // over some seconds, because calls are told each second
	}
	log := func(what string) func() bool { return func() bool { return strings.Contains(th.Log(), what) } }
	set("planner-value: many\n")
	harness.Eventually(t, 20*time.Second, "the log says that the settings are wrong", log("what was there before stays"))
	harness.Eventually(t, 90*time.Second, "nothing runs", func() bool { return len(harness.ProcessesOf(th.Dir)) == 0 })
	set("planner-value: 530\n")
	harness.Eventually(t, 20*time.Second, "the log says that the settings have changed", log("configuration: changed"))

	var learnt, unknown struct{ Caller, Callee time.Time }
	learnt = ask(passing, "caller")
	unknown = ask(silent, "stranger")
	if d := learnt.Callee.Sub(learnt.Caller); d > listening*6/10 {
		t.Errorf("the callee was started %v after its caller, which listens after %v: it was started by the call", d, listening)
	}
	if d := unknown.Callee.Sub(unknown.Caller); d < listening {
		t.Errorf("a callee that nobody could know of was started %v after its caller, which listens after %v", d, listening)
	}
	t.Logf("callee started %v after its caller; without the request's names %v after it", learnt.Callee.Sub(learnt.Caller), unknown.Callee.Sub(unknown.Caller))
}

// Before a new revision gets the traffic of the one before, or half of it by a canary step, it has the instances for it, where the planner
// decides. Under Knative's rules it has the one that made it ready.
func TestRolloutIsPrepared(t *testing.T) {
	t.Parallel()
	rollout(t, 1, func(_, next string) []string { return []string{next} })
}

// The same for a canary step: the new revision is there without traffic, and then gets half of it.
func TestCanaryIsPrepared(t *testing.T) {
	t.Parallel()
	rollout(t, 2, func(name, next string) []string {
		traffic := func(old, new int) string {
			return next + fmt.Sprintf("  traffic:\n  - {revisionName: %s-00001, percent: %d}\n  - {revisionName: %[1]s-00002, percent: %[3]d}\n", name, old, new)
		}
		return []string{strings.Replace(traffic(100, 0), fmt.Sprintf("  - {revisionName: %s-00002, percent: 0}\n", name), "", 1), traffic(50, 50)}
	})
}

// rollout gives a service under load its next version, in steps, and looks how many instances that has before its first request: a
// part of those that the load needs where the planner decides, one else. What is seen from outside is late on a busy machine: one of three services must
// show it.
func rollout(t *testing.T, part int, steps func(name, next string) []string) {
	th := harness.Start(t, bin)
	for kind, annotations := range map[string][]string{
		"planned": {predictive, "autoscaling.knative.dev/target-utilization-percentage: 100"},
		"plain":   {"autoscaling.knative.dev/target-utilization-percentage: 100"},
	} {
		good := func(had int) bool { return had <= 1 }
		if kind == "planned" {
			good = func(had int) bool { return had >= (rolloutClients/2+part-1)/part }
		}
		had := -1
		for try := 1; try <= 3 && !t.Failed() && (had < 0 || !good(had)); try++ {
			name := fmt.Sprint(kind, try)
			had = rolledOut(t, th, name, annotations, steps)
			t.Logf("%s: %d instances before the first request", name, had)
		}
		if !good(had) {
			t.Errorf("%s: the new revision had %d instances before its first request", kind, had)
		}
	}
}

const rolloutClients = 6

// rolledOut returns how many instances the new revision had when the last word before the shift came.
func rolledOut(t *testing.T, th *harness.Thaw, name string, annotations []string, steps func(name, next string) []string) (had int) {
	doc := func(version string) string {
		return harness.CheckerService(name, 2, map[string]string{"VERSION": version}, annotations...)
	}
	deploy(t, th, doc("1"))
	stop := th.Load(rolloutClients, name, "/?sleep=100")
	harness.Eventually(t, 30*time.Second, name+" has instances for its load", func() bool { ready, _, _, _ := th.Scale(name + "-00001"); return ready >= rolloutClients/2 })
	time.Sleep(5 * time.Second) // the planner has seen the load in its reports, too

	for i, step := range steps(name, doc("2")) {
		if i > 0 {
			if _, err := th.Client.WaitReady(t.Context(), api.Services, "default", name, client.WaitOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		data, _, err := th.JSON(step)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := th.Client.Apply(context.Background(), api.Services, "default", name, data); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(30 * time.Second); ; {
		a := th.Get(name, "/")
		if a.Status != 200 {
			t.Fatalf("%s: %v", name, a)
		}
		if strings.Contains(a.Body, name+"-00002") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s: the new revision never got a request", name)
		}
		if ready, _, _, _ := th.Scale(name + "-00002"); ready > had {
			had = ready
		}
	}
	if _, err := th.Client.WaitReady(t.Context(), api.Services, "default", name, client.WaitOptions{}); err != nil {
		t.Error(err)
	}
	if all, bad := stop(); len(bad) > 0 || all == 0 {
		t.Errorf("%s: %d of %d requests failed: %v", name, len(bad), all, bad)
	}
	return had
}
