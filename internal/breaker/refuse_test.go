package breaker

import (
	"fmt"
	"testing"
	"time"
)

func specs(limit int, ids ...string) (s []Spec) {
	for _, id := range ids {
		s = append(s, Spec{ID: id, Limit: limit})
	}
	return s
}

// given returns the target that w has been given, nil if it waits.
func given(w *Waiter) *Target {
	select {
	case <-w.done:
		return w.target
	default:
		return nil
	}
}

func join(t *testing.T, b *Breaker) *Waiter {
	t.Helper()
	w := NewWaiter(nil, 0, time.Now())
	if err := b.Enqueue(w); err != nil {
		t.Fatal(err)
	}
	return w
}

// A request that is refused goes to each other target once, and then rests.
func TestEachTargetOnce(t *testing.T) {
	for _, limit := range []int{0, 10} {
		b := New(Config{MaxWaiting: 10})
		b.Set(specs(limit, "a", "b", "c"))
		now := time.Now()
		w := join(t, b)
		tried := map[string]int{}
		for tg := given(w); tg != nil; tg = given(w) {
			tried[tg.ID]++
			b.Requeue(w, tg, now, false)
		}
		if fmt.Sprint(tried) != "map[a:1 b:1 c:1]" {
			t.Errorf("limit %d: tried %v", limit, tried)
		}
		if waiting, running := b.Load(); waiting != 1 || running != 0 {
			t.Errorf("limit %d: %d wait, %d run", limit, waiting, running)
		}
		// It stands in nobody's way, and nothing is lost of the targets, which have refused but once.
		for range 3 {
			if tg := b.Try(); tg == nil {
				t.Error("a request that rests holds up others")
			} else {
				b.Release(tg)
			}
		}
		if b.Sweep(now.Add(firstPause/2), 0); given(w) != nil {
			t.Error("no rest between two rounds")
		}
		if b.Sweep(now.Add(firstPause), 0); given(w) == nil {
			t.Error("the rest does not end")
		}
	}
}

// A new target is asked at once, by those too that rest.
func TestRestEndsWithNewTarget(t *testing.T) {
	b := New(Config{MaxWaiting: 10})
	b.Set(specs(1, "a", "b"))
	w := join(t, b)
	for tg := given(w); tg != nil; tg = given(w) {
		b.Requeue(w, tg, time.Now(), false)
	}
	b.Set(specs(1, "a", "b", "c"))
	if tg := given(w); tg == nil || tg.ID != "c" {
		t.Errorf("given %+v", tg)
	}
}

// A lone target is tried again at once after its first refusal, and is not ejected by it.
func TestLoneTarget(t *testing.T) {
	b := New(Config{MaxWaiting: 10})
	b.Set(specs(1, "a"))
	now := time.Now()
	w := join(t, b)
	if ejected, _ := b.Requeue(w, given(w), now, false); ejected || b.Ejected() != 0 {
		t.Fatal("ejected for one refusal")
	}
	tg := given(w)
	if tg == nil {
		t.Fatal("not tried again after one refusal")
	}
	b.Requeue(w, tg, now, false)
	if given(w) != nil {
		t.Fatal("tried a third time without a rest")
	}
	// Ejected by a third one, it is still what new requests get: there is no other.
	next := join(t, b)
	if ejected, _ := b.Requeue(next, given(next), now, false); !ejected {
		t.Fatal("not ejected")
	}
	b.Requeue(next, given(next), now, false)
	if tg := b.Try(); tg == nil {
		t.Error("an ejection has emptied the set")
	} else if b.Release(tg); b.Ejected() != 0 {
		t.Error("an ejected target that answered while all were out is not taken back")
	}
}

// refuse makes a target refuse n requests, all others take theirs.
func refuse(t *testing.T, b *Breaker, id string, n int, now time.Time) (times int) {
	t.Helper()
	for range n {
		w := join(t, b)
		for tg := given(w); ; tg = given(w) {
			if tg == nil {
				t.Fatal("a request waits although there are good targets")
			}
			if tg.ID != id {
				b.Release(tg)
				break
			}
			times++
			b.Requeue(w, tg, now, false)
		}
	}
	return times
}

// A target that refuses is ejected, comes back after a growing pause, on trial, and is a target like others once it takes its request.
func TestEjection(t *testing.T) {
	for _, limit := range []int{0, 10} {
		b := New(Config{MaxWaiting: 10})
		b.Set(specs(limit, "a", "b", "dead"))
		for _, id := range []string{"a", "b"} { // which makes the dead one the best
			b.targets[id].inflight, b.running = 5, b.running+5
			b.fixLocked(b.targets[id])
		}
		now := time.Now()
		if n := refuse(t, b, "dead", 200, now); n != ejectAfter {
			t.Fatalf("limit %d: asked %d times at once", limit, n)
		}
		if b.Ejected() != 1 {
			t.Fatal("not ejected")
		}
		asked := 0
		for range 1000 { // ten seconds
			now = now.Add(10 * time.Millisecond)
			b.Sweep(now, 0)
			asked += refuse(t, b, "dead", 5, now)
		}
		// 50 ms, doubling to 5 s: after 0.05, 0.15, 0.35, 0.75, 1.55, 3.15, 6.35 s, when a draw falls on it
		if asked < 4 || asked > 7 {
			t.Errorf("limit %d: asked %d times in 10 s", limit, asked)
		}
		now = now.Add(longPause)
		if b.Sweep(now, 0); b.Ejected() != 0 {
			t.Fatal("not taken back")
		}
		// On trial it gets one request, whatever the others carry.
		var taken []*Target
		trials := 0
		for range 30 {
			tg := b.Try()
			if tg == nil {
				break
			}
			if tg.ID == "dead" {
				trials++
			}
			taken = append(taken, tg)
		}
		if trials != 1 {
			t.Errorf("limit %d: %d requests at once on trial", limit, trials)
		}
		for _, tg := range taken {
			b.Release(tg)
		}
		if b.targets["dead"].full() {
			t.Errorf("limit %d: trial passed, and still full", limit)
		}
	}
}

// A trial whose request is long is passed when the time has gone in which it could have been refused.
func TestTrialEnds(t *testing.T) {
	b := New(Config{MaxWaiting: 10})
	b.Set(specs(2, "a", "dead"))
	now := time.Now()
	refuse(t, b, "dead", 20, now)
	b.Sweep(now.Add(firstPause), 0)
	for range 4 {
		b.Try()
	}
	if b.Load(); b.targets["dead"].inflight != 1 {
		t.Fatalf("%d on trial", b.targets["dead"].inflight)
	}
	w := join(t, b)
	if b.Sweep(time.Now().Add(trialTime/2), 0); given(w) != nil {
		t.Error("the trial has no time")
	}
	if b.Sweep(time.Now().Add(2*trialTime), 0); given(w) == nil {
		t.Error("the trial does not end")
	}
}

// A target that is only full is left alone for a moment, and not counted as ejected for being out of reach.
func TestBusyTarget(t *testing.T) {
	b := New(Config{MaxWaiting: 10})
	b.Set(specs(5, "a"))
	now := time.Now()
	var ws []*Waiter
	for range 5 {
		ws = append(ws, join(t, b))
	}
	for _, w := range ws {
		if ejected, _ := b.Requeue(w, given(w), now, true); ejected {
			t.Error("ejected")
		}
	}
	if tg := b.Try(); tg != nil {
		t.Error("everybody asks a target that is full")
	}
	b.Sweep(now.Add(busyPause), 0)
	for i, w := range ws {
		if given(w) == nil {
			t.Errorf("%d still waits", i)
		}
	}
}

// One that waits for the only target that has not refused it gets another chance at the others before that one is free.
func TestNotBoundToTheBusy(t *testing.T) {
	b := New(Config{MaxWaiting: 10})
	b.Set(specs(1, "a", "b"))
	now := time.Now()
	x, w := b.Try(), join(t, b)
	b.Requeue(w, given(w), now, false)
	if given(w) != nil {
		t.Fatal("went where it was refused")
	}
	// The slot is there for those who come after it.
	later := join(t, b)
	tg := given(later)
	if tg == nil || tg == x {
		t.Fatal("a free slot and a request that waits for it")
	}
	b.Release(tg)
	if b.Sweep(now.Add(firstPause), 0); given(w) == nil {
		t.Error("waits for ever for a target that is busy")
	}
}
