package reconcile

import (
	"fmt"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/routes"
)

func TestShifts(t *testing.T) {
	list := func(pairs ...any) (l []routes.Target) {
		for i := 0; i < len(pairs); i += 2 {
			l = append(l, routes.Target{Revision: api.RevisionID(pairs[i].(string)), Percent: pairs[i+1].(int)})
		}
		return l
	}
	for _, c := range []struct {
		name    string
		was, to []routes.Target
		want    string
	}{
		{"all at once", list("a", 100), list("b", 100), "a>b 1.00 "},
		{"first step of a canary", list("a", 100), list("a", 90, "b", 10), "a>b 0.10 "},
		{"a later one", list("a", 80, "b", 20), list("a", 40, "b", 60), "a>b 0.50 "},
		{"from two", list("a", 30, "b", 70), list("c", 100), "a>c 1.00 b>c 1.00 "},
		{"to two", list("a", 100), list("b", 30, "c", 70), "a>b 0.30 a>c 0.70 "},
		{"nothing moves", list("a", 50, "b", 50), list("b", 50, "a", 50), ""},
		{"back", list("a", 10, "b", 90), list("a", 100), "b>a 1.00 "},
	} {
		got := ""
		for _, s := range shifts(c.was, c.to) {
			got += fmt.Sprintf("%s>%s %.2f ", s.from.Revision, s.to.Revision, s.weight)
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// A change waits until its revision is ready, and no longer than it may; another change begins its time anew.
func TestPrepareWaits(t *testing.T) {
	var p prepares
	n, now := name{"default", "r"}, time.Unix(1000, 0)
	one, two := []routes.Target{{Revision: "a", Percent: 100}}, []routes.Target{{Revision: "b", Percent: 100}}
	for i, step := range []struct {
		after time.Duration
		to    []routes.Target
		ready bool
		want  bool
	}{
		{0, one, false, false},
		{9 * time.Second, one, false, false},
		{10 * time.Second, two, false, false}, // another one
		{19 * time.Second, two, false, false},
		{20 * time.Second, two, false, true},
		{21 * time.Second, two, false, false}, // and again
		{22 * time.Second, two, true, true},
	} {
		if got := p.over(n, step.to, step.ready, now.Add(step.after), 10*time.Second); got != step.want {
			t.Errorf("step %d: over is %v", i, got)
		}
	}
	if len(p.waiting) != 0 {
		t.Errorf("%d routes still wait", len(p.waiting))
	}
}
