package networks

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/harness"
)

// Starts of instances are no work for who makes ENIs: while functions of a subnet are called, started and scaled out, the nodes' providers are not
// called once. THAW_NETWORKS says for how long, in place of a few seconds.
func TestNoENIWork(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	during := 5 * time.Second
	if v := os.Getenv("THAW_NETWORKS"); v != "" {
		var err error
		during, err = time.ParseDuration(v)
		must(t, err)
	}
	calls, starts := underLoad(t, bin, "shop", during)
	t.Logf("in %v with %d cold starts and the start of %d more instances the ENI provider was called %d times", during, starts.cold, starts.more, calls)
	if calls != 0 {
		t.Error("it may not be called")
	}
	t.Run("control", func(t *testing.T) {
		eager := changed(t, harness.Change{File: "cmd/thaw/pairs/pairs_linux.go", Old: "return m.slots.Attach(namespace, subnet)", New: `m.mu.Lock()
			defer m.mu.Unlock()
			if err := m.tell(); err != nil {
				return nil, err
			}
			return m.slots.Attach(namespace, subnet)`})
		if calls, _ := underLoad(t, eager, "ctl", time.Second); calls == 0 {
			t.Error("gateways that look at their ENIs for each instance were not noticed")
		}
	})
}

// starts are of instances: those that a request waited for because there was none, and those of a function that had some.
type starts struct{ cold, more int }

// underLoad returns how often providers were called meanwhile.
func underLoad(t *testing.T, bin, name string, during time.Duration) (calls uint64, s starts) {
	t.Helper()
	shop := newTenant(t, name)
	th := harness.Start(t, bin, "--networks", "--provider", "sandbox")
	shop.join(th, "default", "inside", "autoscaling.knative.dev/target: 1")
	var cold []string
	for i := range 3 + int(during/time.Second) {
		name := fmt.Sprint("cold", i)
		shop.add(th, "default", name, harness.InitialZero)
		cold = append(cold, name+".default.localhost")
	}
	ask := func(host string) {
		if a := th.Get(host, "/call?host=shop"); a.Status != 200 {
			t.Error(a)
		}
	}
	ask(inside)
	count := func() (n uint64) {
		for _, n1 := range nodes(th) {
			s, err := n1.status()
			must(t, err)
			if s.ENIs == 0 {
				t.Fatal("the counter does not count: the pair has been made")
			}
			n += s.ENIs
		}
		return n
	}
	before := count()
	stop := th.Load(8, inside, "/call?host=shop")
	for end := time.Now().Add(during); len(cold) > 0 && (s.cold < 3 || time.Now().Before(end)); s.cold++ {
		ask(cold[0])
		cold = cold[1:]
		time.Sleep(time.Second / 2)
	}
	harness.Eventually(t, patient, "the function is scaled out", func() bool {
		ready, _, _, _ := th.Scale("inside-00001")
		s.more = max(s.more, ready-1)
		return s.more >= 2
	})
	n, bad := stop()
	if n == 0 || len(bad) > 0 {
		t.Errorf("%d answers, bad: %v", n, bad)
	}
	calls = count() - before
	must(t, th.Stop())
	return calls, s
}
