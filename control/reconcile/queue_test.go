package reconcile

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func numbered(i int) key { return key{kindService, "ns", string(rune('a' + i))} }

// Many adders, many workers: a key is never with two workers, and after the last add of a key there is a pass.
func TestQueueNeverTwiceAtOnce(t *testing.T) {
	q := newQueue()
	const n = 8
	var busy [n]atomic.Int32
	var added, seen [n]atomic.Int64
	var workers, adders sync.WaitGroup
	for range 6 {
		workers.Go(func() {
			for {
				k, ok := q.get()
				if !ok {
					return
				}
				i := int(k.name[0] - 'a')
				if busy[i].Add(1) != 1 {
					t.Error("a key is with two workers")
				}
				v := added[i].Load()
				for range rand.IntN(200) {
					_ = v
				}
				if v > seen[i].Load() {
					seen[i].Store(v)
				}
				busy[i].Add(-1)
				q.done(k, false)
			}
		})
	}
	for range 4 {
		adders.Go(func() {
			for range 5000 {
				i := rand.IntN(n)
				added[i].Add(1)
				q.add(numbered(i))
			}
		})
	}
	adders.Wait()
	deadline := time.Now().Add(10 * time.Second)
	for i := range n {
		for seen[i].Load() != added[i].Load() {
			if time.Now().After(deadline) {
				t.Fatalf("key %d: %d of %d seen", i, seen[i].Load(), added[i].Load())
			}
			time.Sleep(time.Millisecond)
		}
	}
	q.close()
	workers.Wait()
}

func TestQueueFolds(t *testing.T) {
	q := newQueue()
	for range 100 {
		q.add(numbered(0), numbered(1))
	}
	if q.pending() != 2 {
		t.Fatalf("%d wait", q.pending())
	}
	k, _ := q.get()
	q.add(k)
	q.add(k)
	if q.pending() != 2 || len(q.order) != 1 {
		t.Error("a key that is being worked waits in line")
	}
	q.done(k, false)
	if q.pending() != 2 {
		t.Error("what was asked for during the pass is lost")
	}
}

func TestQueueTimers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		defer q.close()
		k := numbered(0)
		at := func(want time.Duration, start time.Time) {
			t.Helper()
			got, _ := q.get()
			if got != k || time.Since(start) != want {
				t.Errorf("%v after %v, want after %v", got, time.Since(start), want)
			}
		}
		start := time.Now()
		q.addAfter(k, 3*time.Second)
		q.addAfter(k, 2*time.Second) // the earliest counts
		q.addAfter(k, 9*time.Second)
		at(2*time.Second, start)

		// Failures wait longer and longer, up to a bound; a success ends that.
		want := firstRetry
		for range 20 {
			if got := q.done(k, true); got != want {
				t.Fatalf("retry in %v, want %v", got, want)
			}
			start = time.Now()
			at(want, start)
			want = min(2*want, lastRetry)
		}
		q.done(k, false)
		q.add(k)
		at(0, time.Now())
		if got := q.done(k, true); got != firstRetry {
			t.Errorf("after a success the retry is in %v", got)
		}
	})
}

func TestQueueClose(t *testing.T) {
	q := newQueue()
	q.addAfter(numbered(1), time.Hour)
	done := make(chan bool)
	go func() { _, ok := q.get(); done <- ok }()
	q.close()
	if <-done {
		t.Error("a key out of a closed queue")
	}
	q.add(numbered(0))
	q.addAfter(numbered(0), time.Nanosecond)
	if _, ok := q.get(); ok {
		t.Error("a key out of a closed queue")
	}
}
