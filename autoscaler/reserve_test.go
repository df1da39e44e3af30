package autoscaler

import (
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
)

// A scaler that keeps things ready is told the size of each step up, and for how long to expect the like; of steps down it hears nothing.
func TestReserverIsToldOfSteps(t *testing.T) {
	inWorld(t, DefaultConfig(), healthy(testRevision("r", nil, 10)), func(w *world) {
		type told struct {
			id   api.RevisionID
			n    int
			long time.Duration
		}
		got := make(chan told, 10)
		w.a.reserve = func(id api.RevisionID, n int, until time.Time) { got <- told{id, n, time.Until(until)} }
		w.set(w.rev)
		w.demand(350, 0)
		w.expect(order{at: 0, n: 50})
		if x := <-got; x != (told{w.rev.ID(), 50, reserveFor}) {
			t.Errorf("reserved %+v", x)
		}
		w.demand(490, 0)
		w.expect(order{at: 0, n: 70})
		if x := <-got; x.n != 20 {
			t.Errorf("reserved %+v for a step of 20", x)
		}
		w.until(10 * time.Minute) // down to nothing
		if len(got) != 0 {
			t.Errorf("reserved %+v for a step down", <-got)
		}
	})
}

// TestScalerIsAskedWhetherItReserves: the interface is found where there is one.
func TestScalerIsAskedWhetherItReserves(t *testing.T) {
	if a := New(DefaultConfig(), &world{}); a.reserve != nil {
		t.Error("a scaler without Reserve has one")
	}
	if a := New(DefaultConfig(), reserving{&world{}}); a.reserve == nil {
		t.Error("Reserve is not found")
	}
}

type reserving struct{ *world }

func (reserving) Reserve(api.RevisionID, int, time.Time) {}
