package instance

import (
	"strconv"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
)

// TestReservationsSizeThePools: who may need many at once has them ready, within bounds, for as long as was said.
func TestReservationsSizeThePools(t *testing.T) {
	r := newRig(t, nil)
	script, program := deployed(t, r.Agent, "python", "fn-00001", nil), revisionOf(t, "go-00001", "ok")
	r.SetRevision(script)
	r.SetRevision(program)
	wanted := func() (places, pythons int) {
		r.blanks.mu.Lock()
		defer r.blanks.mu.Unlock()
		return int(r.berths.wanted.Load()), r.blanks.wanted["python"]
	}
	check := func(what string, places, pythons int) {
		t.Helper()
		if p, y := wanted(); p != places || y != pythons {
			t.Errorf("%s: %d places and %d interpreters, want %d and %d", what, p, y, places, pythons)
		}
	}
	check("at first", berthsAhead, blanksAhead)
	soon := time.Now().Add(time.Hour)
	r.Reserve(script.ID(), 3, soon)
	r.Reserve(program.ID(), 10, soon)
	check("reserved", berthsAhead+10, blanksAhead+3)
	r.Reserve(program.ID(), 4, soon) // less than what holds
	check("less", berthsAhead+10, blanksAhead+3)
	r.blanksReady("python", blanksAhead+3)
	r.Reserve(script.ID(), 0, soon)
	r.Reserve(script.ID(), 5, time.Now().Add(-time.Second))
	r.Reserve("default/nobody", 5, soon)
	check("nothing", berthsAhead+10, blanksAhead+3)
	r.Reserve(program.ID(), 100_000, soon)
	r.Reserve(script.ID(), 100_000, soon)
	check("bounded", berthsMost, blanksMost)
	r.Agent.mu.Lock()
	r.sizePoolsLocked(soon.Add(time.Second)) // they are over
	r.Agent.mu.Unlock()
	check("over", berthsAhead, blanksAhead)
	r.blanksReady("python", blanksAhead)
	r.RemoveRevision(script.ID())
	check("removed", berthsAhead, 0)
	if n := len(r.reserved); n != 0 {
		t.Errorf("%d reservations are left", n)
	}
}

// TestRolloutsReserveOnce: the revisions of a service that follow each other are not added up; those of another service are.
func TestRolloutsReserveOnce(t *testing.T) {
	r := newRig(t, nil)
	soon := time.Now().Add(time.Hour)
	for i, service := range []string{"a", "a", "a", "b", ""} {
		rev := revisionOf(t, "fn-"+strconv.Itoa(i), "ok")
		rev.Labels = map[string]string{api.LabelService: service}
		r.SetRevision(rev)
		r.Reserve(rev.ID(), 10+i, soon)
	}
	if p, want := int(r.berths.wanted.Load()), berthsAhead+12+13+14; p != want {
		t.Errorf("%d places, want %d", p, want)
	}
}

// TestManyRevisionsOfALanguage counts them without looking at all of them each time.
func TestManyRevisionsOfALanguage(t *testing.T) {
	r := newRig(t, nil)
	rev := deployed(t, r.Agent, "python", "fn-00001", nil)
	var all []*api.Revision
	for i := range 20 {
		c := *rev
		c.Name, c.UID = "fn-"+strconv.Itoa(i), "uid"+strconv.Itoa(i)
		all = append(all, &c)
		r.SetRevision(&c)
		r.SetRevision(&c)
	}
	count := func() int {
		r.Agent.mu.Lock()
		defer r.Agent.mu.Unlock()
		return r.languages["python"]
	}
	if n := count(); n != 20 {
		t.Errorf("%d revisions are counted, want 20", n)
	}
	for _, rev := range all {
		r.RemoveRevision(rev.ID())
		r.RemoveRevision(rev.ID())
	}
	if n := count(); n != 0 {
		t.Errorf("%d revisions are counted, want none", n)
	}
}

// TestAStartCountsFromItsOrder: those who refill the pools look whether anything is being started, at once when something was taken.
func TestAStartCountsFromItsOrder(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "go-00001", "ok")
	r.SetRevision(rev)
	r.Agent.mu.Lock()
	before := len(r.slots)
	r.newInstanceLocked(r.revisions[rev.ID()])
	after := len(r.slots)
	r.Agent.mu.Unlock()
	if before != 0 || after != 1 {
		t.Errorf("%d starts before the order and %d after it", before, after)
	}
}
