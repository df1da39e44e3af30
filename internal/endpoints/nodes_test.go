package endpoints

import (
	"slices"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
)

func part(id api.RevisionID, desired int, failure *Failure, states ...State) *Snapshot {
	s := &Snapshot{Revision: id, Desired: desired, Failure: failure}
	for _, st := range states {
		s.Instances = append(s.Instances, Instance{Revision: id, State: st})
	}
	return s
}

func TestNodes(t *testing.T) {
	old, young := &Failure{Reason: "Old", At: time.Unix(1, 0)}, &Failure{Reason: "Young", At: time.Unix(2, 0)}
	var n Nodes
	check := func(what string, s *Snapshot, desired, ready int, failure *Failure) {
		t.Helper()
		if s.Desired != desired || s.Count(Ready) != ready || s.Failure != failure {
			t.Errorf("%s: %+v", what, s)
		}
	}
	check("one", n.Set("a", part("r", 2, nil, Ready, Starting)), 2, 1, nil)
	check("two", n.Set("b", part("r", 1, nil, Ready)), 3, 2, nil)
	check("a node that fails beside one that runs", n.Set("b", part("r", 1, old)), 3, 1, nil)
	check("both fail", n.Set("a", part("r", 2, young)), 3, 0, young)
	check("both fail, told again", n.Set("b", part("r", 1, old)), 3, 0, young)
	last := n.Set("a", part("r", 0, nil))
	check("one leaves", last, 1, 0, old)
	if n.Part("r", "a") != nil || n.Part("r", "b") == nil {
		t.Error("parts")
	}
	n.Set("b", part("s", 1, nil, Ready))
	kept := n.Keep("b", func(id api.RevisionID) bool { return id == "s" })
	if len(kept) != 1 || kept[0].Revision != "r" || kept[0].Sequence <= last.Sequence {
		t.Errorf("kept %+v", kept)
	}
	gone := n.Drop("b")
	if len(gone) != 1 || gone[0].Revision != "s" || len(gone[0].Instances) != 0 || len(n.of) != 0 {
		t.Errorf("gone %+v, left %v", gone, n.of)
	}
	if !slices.Equal(n.Drop("b"), nil) {
		t.Error("dropped twice")
	}
}
