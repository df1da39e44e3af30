package autoscaler

import (
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/endpoints"
)

// Each reason has a sentence of its own, each with the number that it speaks of.
func TestEveryReasonHasWords(t *testing.T) {
	p, err := PolicyFor(DefaultConfig(), annotated("activation-scale", "14", "min-scale", "2", "max-scale", "17", "scale-down-delay", "77s"), 10)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for i, word := range whyWords {
		text := Status{Policy: &p}.because(1 << i)
		if other, ok := seen[text]; ok || text == (Status{Policy: &p}).because(0) {
			t.Errorf("%s has the words of %q: %s", word, other, text)
		}
		seen[text] = word
	}
	for word, want := range map[string]string{"activation-scale": "14", "min-scale": "2", "max-scale": "17", "scale-down-delay": "1m17s"} {
		found := false
		for text, w := range seen {
			found = found || w == word && strings.Contains(text, want)
		}
		if !found {
			t.Errorf("%s does not say %s", word, want)
		}
	}
}

func TestExplain(t *testing.T) {
	explain := func(w *world) string { return strings.Join(w.status().Explain(time.Now()), "\n") }
	expect := func(t *testing.T, got string, want ...string) {
		t.Helper()
		for _, s := range want {
			if !strings.Contains(got, s) {
				t.Errorf("not said: %q\n%s", s, got)
			}
		}
	}
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		expect(t, explain(w), "0 instances are wanted: 0 ready, 0 starting; the revision is inactive.", "Path: proxy. No instance is ready", "Unknown: nothing was decided yet")
		w.demand(20, 1)
		expect(t, explain(w), "3 instances are wanted: 0 ready, 3 starting; the revision is activating.", "Event: the length of the queue asked for it.",
			"Queue: 20 waited and 1 ran 0s ago; queues asked for 3")
		w.load = 21
		w.until(seconds(10))
		expect(t, explain(w), "3 ready", "Load: 21 concurrent requests over the stable window of 1m0s, 21 over the panic window of 6s; an instance should carry 7 (70 % of 10), so the averages ask for 3.", "The instances lack 202 to take the load and a burst of 211")
		w.silent = true
		w.until(seconds(200))
		expect(t, explain(w), "No-data: no report came", "No report of load came within the stable window")
	})
	inWorld(t, DefaultConfig(), healthy(testRevision("r", annotated("target-burst-capacity", "5"), 10)), func(w *world) {
		w.failure = &endpoints.Failure{Reason: "ExitCode1", Message: "exited: no such file", Count: 3, At: time.Now(), Until: time.Now().Add(time.Minute)}
		w.set(w.rev)
		w.observe()
		w.demand(100, 0)
		expect(t, explain(w), "The last start failed (ExitCode1, 3 times in a row): exited: no such file", "Back-off:")
		w.failure, w.ready = nil, 1
		w.observe()
		w.until(seconds(4))
		expect(t, explain(w), "Path: proxy. The burst capacity of 5 is there", "straight to the instances once it has been for 6s")
		w.until(seconds(20))
		expect(t, explain(w), "Path: serve. The instances can take the load, a burst of 5, and")
	})
}
