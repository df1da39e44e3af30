package instance

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/placement"
)

// TestUnitsSayWhatLimits: the scarcest thing counts, ports only where they are shared, ranges of users only in sandboxes.
func TestUnitsSayWhatLimits(t *testing.T) {
	for _, c := range []struct {
		sandbox bool
		node    placement.Resources
		units   int
		what    string
	}{
		{false, placement.Resources{Memory: 1 << 30, Pids: 32768}, 57, "memory"}, // nine tenths of it
		{false, placement.Resources{Memory: 1 << 40, Pids: 400}, 50, "pids"},
		{false, placement.Resources{Memory: 1 << 40, Pids: 4 << 20, Descriptors: 1024}, 256, "descriptors"},
		{false, placement.Resources{Memory: 1 << 30, Ports: 10, Addresses: 5}, 10, "ports"},
		{true, placement.Resources{Memory: 1 << 30, Ports: 5, Addresses: 10}, 10, "addresses"},
		{true, placement.Resources{Memory: 1 << 20}, 1, "memory"},
	} {
		if n, what := unitsOf(c.node, c.sandbox); n != c.units || what != c.what {
			t.Errorf("sandbox %v, %+v: %d units by %s, want %d by %s", c.sandbox, c.node, n, what, c.units, c.what)
		}
	}
	r := newRig(t, nil)
	if n, used, bound := r.Units(); n < 1 || used != 0 || bound == "" {
		t.Errorf("this machine: %d units, %d used, by %q", n, used, bound)
	}
}

// sized is a revision whose instances request so much memory.
func sized(t *testing.T, name, memory string) *api.Revision {
	rev := revisionOf(t, name, "ok")
	rev.Spec.Containers[0].Resources.Requests = map[string]api.Quantity{"memory": api.Quantity(memory)}
	return rev
}

// A node takes few large or many small instances, refuses the next with what it has and what that takes, and starts it when there is room.
func TestNodeHoldsFewLargeOrManySmall(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Units = 20 })
	small, tiny, huge := sized(t, "small-00001", "100Mi"), revisionOf(t, "tiny-00001", "ok"), sized(t, "huge-00001", "1Gi")
	for _, rev := range []*api.Revision{small, tiny, huge} {
		r.SetRevision(rev)
	}
	full := func(id api.RevisionID, live int, words ...string) {
		t.Helper()
		s := r.until(id, fmt.Sprintf("%d ready and no room", live), func(s *endpoints.Snapshot) bool {
			return s.Count(endpoints.Ready) == live && len(s.Instances) == live && s.Failure != nil && s.Failure.Reason == "NodeFull"
		})
		for _, w := range words {
			if !strings.Contains(s.Failure.Message, w) {
				t.Errorf("%q does not say %q", s.Failure.Message, w)
			}
		}
	}
	r.Scale(small.ID(), 3, time.Now()) // 8 units each
	full(small.ID(), 2, "20 units", "16 are taken", "takes 8", "class small")
	r.Scale(tiny.ID(), 5, time.Now())
	full(tiny.ID(), 4, "20 are taken", "takes 1", "class tiny")
	r.Scale(huge.ID(), 1, time.Now())
	full(huge.ID(), 0, "has 20 units", "takes 64", "class large")
	if _, used, _ := r.Units(); used != 20 {
		t.Errorf("%d units used of 20", used)
	}

	r.Scale(huge.ID(), 0, time.Now())
	r.Scale(tiny.ID(), 0, time.Now())
	full(small.ID(), 2) // four units are no room for eight
	r.Scale(small.ID(), 0, time.Now())
	r.Scale(tiny.ID(), 20, time.Now())
	if s := r.ready(tiny.ID(), 20); s.Failure != nil {
		t.Errorf("failure %+v though there is room", s.Failure)
	}
	r.Scale(tiny.ID(), 0, time.Now())
	r.until(tiny.ID(), "none", func(s *endpoints.Snapshot) bool { return len(s.Instances) == 0 })
	if _, used, _ := r.Units(); used != 0 {
		t.Errorf("%d units used by nothing", used)
	}
}

// Frozen instances make room for a large one, as many as it needs; and none for one that has no room even then. While they leave, nobody is told
// that there is no room.
func TestFrozenInstancesMakeRoomForLargeOnes(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Units, c.FrozenFor, c.FrozenMax = 12, time.Minute, 12 })
	tiny, small, huge := revisionOf(t, "tiny-00001", "ok"), sized(t, "small-00001", "100Mi"), sized(t, "huge-00001", "1Gi")
	for _, rev := range []*api.Revision{tiny, small, huge} {
		r.SetRevision(rev)
	}
	r.Subscribe(func(s *endpoints.Snapshot) {
		if s.Revision == small.ID() && s.Failure != nil {
			t.Errorf("%+v while frozen instances leave", s.Failure)
		}
	})
	r.Scale(tiny.ID(), 10, time.Now())
	r.ready(tiny.ID(), 10)
	r.Scale(tiny.ID(), 0, time.Now())
	r.frozenCount(tiny.ID(), 10)
	r.Scale(huge.ID(), 1, time.Now())
	r.until(huge.ID(), "no room", func(s *endpoints.Snapshot) bool { return s.Failure != nil })
	r.Scale(huge.ID(), 0, time.Now())
	if n := r.Frozen().Now; n != 10 {
		t.Fatalf("%d are frozen after a start that could not be, want 10", n)
	}
	r.Scale(small.ID(), 1, time.Now())
	r.ready(small.ID(), 1)
	r.frozenCount(tiny.ID(), 4) // 12 - 8
	if n := r.Frozen().Ended; n != 6 {
		t.Errorf("%d were ended, want 6", n)
	}
}
