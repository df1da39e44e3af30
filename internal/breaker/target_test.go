package breaker

import (
	"fmt"
	"math"
	"testing"
	"testing/synctest"
	"time"
)

func many(n, limit int, since time.Time) (s []Spec) {
	for i := range n {
		s = append(s, Spec{ID: fmt.Sprint("i", i), Limit: limit, Since: since})
	}
	return s
}

// Without limits the less loaded of two: nobody is far above the average, and one that is ahead by a lot gets nothing.
func TestLessLoadedOfTwo(t *testing.T) {
	b := New(Config{})
	b.Set(many(20, 0, time.Time{}))
	for range 2000 {
		if b.Try() == nil {
			t.Fatal("no slot without a limit")
		}
	}
	for id, tg := range b.targets {
		if tg.inflight < 90 || tg.inflight > 110 {
			t.Errorf("%s has %d of 2000 over 20", id, tg.inflight)
		}
	}
	hot := b.ready[7]
	hot.inflight += 1000
	b.fixLocked(hot)
	before := hot.inflight
	for range 200 {
		if tg := b.Try(); tg == hot {
			t.Fatal("the most loaded was chosen of two")
		}
	}
	if hot.inflight != before {
		t.Error("changed")
	}
}

// While others are warm a fresh target gets a share that grows; a limit is never passed, and no slot stays empty on its account.
func TestSlowStart(t *testing.T) {
	const window = 10 * time.Second
	for _, on := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			cfg := Config{MaxWaiting: 10}
			if on {
				cfg.SlowStart = window
			}
			b := New(cfg)
			all := append(many(9, 0, time.Time{}), Spec{ID: "fresh", Since: time.Now()})
			b.Set(all)
			fresh := b.targets["fresh"]
			// Each time 1,000 requests come at once, and end.
			share := func() int {
				var taken []*Target
				for range 1000 {
					taken = append(taken, b.Try())
				}
				n := fresh.inflight
				for _, tg := range taken {
					b.Release(tg)
				}
				return n
			}
			for _, c := range []struct {
				age       time.Duration
				low, high int // an equal share is 100
			}{{0, 5, 20}, {5 * time.Second, 40, 70}, {window, 90, 110}} {
				time.Sleep(c.age - time.Since(fresh.since))
				low, high := c.low, c.high
				if !on {
					low, high = 90, 110 // the control
				}
				if n := share(); n < low || n > high {
					t.Errorf("slow start %v, after %v: %d of 1000 over 10, want %d to %d", on, c.age, n, low, high)
				}
			}
		})
	}
}

func TestSlowStartWithLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(Config{MaxWaiting: 100, SlowStart: 10 * time.Second})
		b.Set(append(many(3, 20, time.Time{}), Spec{ID: "fresh", Limit: 20, Since: time.Now()}))
		fresh := b.targets["fresh"]
		for range 40 {
			b.Try()
		}
		if fresh.inflight > 3 {
			t.Errorf("%d of 40 in the fresh one of four", fresh.inflight)
		}
		for range 40 { // nobody waits while it has a slot
			if b.Try() == nil {
				t.Fatal("no slot")
			}
		}
		if fresh.inflight != 20 || b.Try() != nil {
			t.Errorf("%d in the fresh one, limit 20", fresh.inflight)
		}
	})
}

// When all are fresh, or most, there is no slow start: a burst from zero is not slowed down, and what was there before it is not buried.
func TestNoSlowStartForAMajority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, warm := range []int{0, 1, 4} {
			b := New(Config{SlowStart: 10 * time.Second})
			list := many(10, 0, time.Now())
			for i := range warm {
				list[i].Since = time.Time{}
			}
			b.Set(list)
			for range 1000 {
				b.Try()
			}
			for id, tg := range b.targets {
				if tg.inflight < 85 || tg.inflight > 115 {
					t.Errorf("%d warm of 10: %s has %d of 1000", warm, id, tg.inflight)
				}
			}
		}
	})
}

// Requests of one key go to one target; when one of n targets comes or goes, about one key in n moves, and only to or from it.
func TestSticky(t *testing.T) {
	const keys, n = 3000, 10
	b := New(Config{})
	where := func() map[uint64]string {
		m := make(map[uint64]string)
		for k := range uint64(keys) {
			key := KeyOf(fmt.Append(nil, "user-", k))
			tg := b.TryKey(key)
			m[key] = tg.ID
			b.Release(tg)
			if again := b.TryKey(key); again != tg {
				t.Fatal("the same key, another target")
			} else {
				b.Release(again)
			}
		}
		return m
	}
	b.Set(many(n, 0, time.Time{}))
	before := where()
	per := map[string]int{}
	for _, id := range before {
		per[id]++
	}
	for id, c := range per {
		if math.Abs(float64(c)-keys/n) > keys/n/4 {
			t.Errorf("%s has %d of %d keys over %d", id, c, keys, n)
		}
	}
	b.Set(many(n+1, 0, time.Time{}))
	grown := where()
	moved := 0
	for k, id := range grown {
		if id != before[k] {
			moved++
			if id != fmt.Sprint("i", n) {
				t.Fatal("a key moved between targets that stayed")
			}
		}
	}
	if moved < keys/(n+1)*3/4 || moved > keys/(n+1)*5/4 {
		t.Errorf("one of %d came: %d of %d keys moved", n+1, moved, keys)
	}
	b.Set(many(n, 0, time.Time{}))
	for k, id := range where() {
		if id != before[k] {
			t.Fatal("after it went a key is elsewhere")
		}
	}
	// Another process that has heard of them in another order decides the same.
	other := New(Config{})
	list := many(n, 0, time.Time{})
	for i := range list {
		other.Set(append([]Spec{}, list[len(list)-1-i:]...))
	}
	for k, id := range before {
		tg := other.TryKey(k)
		if other.Release(tg); tg.ID != id {
			t.Fatal("two processes, two targets")
		}
	}
}

// One key that all send does not bury its target: nobody is more than a quarter above the average, and no limit is passed.
func TestStickyWithinBound(t *testing.T) {
	b := New(Config{MaxWaiting: 1000})
	b.Set(many(10, 0, time.Time{}))
	key := KeyOf([]byte("everybody"))
	for range 1000 {
		b.TryKey(key)
	}
	for id, tg := range b.targets {
		if tg.inflight > 126 {
			t.Errorf("%s has %d of 1000 over 10", id, tg.inflight)
		}
	}
	hard := New(Config{MaxWaiting: 1000})
	hard.Set(many(4, 3, time.Time{}))
	for range 12 {
		if hard.TryKey(key) == nil {
			t.Fatal("no slot although there is one")
		}
	}
	if hard.TryKey(key) != nil {
		t.Error("over the limit")
	}
}

// The order is the same as with a key: those who wait are not passed.
func TestStickyWaitsInOrder(t *testing.T) {
	b := New(Config{MaxWaiting: 10})
	b.Set(many(2, 1, time.Time{}))
	key := KeyOf([]byte("k"))
	own, other := b.TryKey(key), b.Try()
	w := NewWaiter(nil, 0, time.Now())
	w.Key = key
	b.Enqueue(w)
	next := join(t, b)
	b.Release(other)
	if given(w) != other {
		t.Error("bound to its busy target")
	}
	b.Release(own)
	if given(next) != own {
		t.Error("the second did not get the second slot")
	}
}

func BenchmarkSticky100(b *testing.B) {
	br := New(Config{})
	br.Set(many(100, 0, time.Time{}))
	b.ReportAllocs()
	for i := uint64(1); b.Loop(); i++ {
		br.Release(br.TryKey(mix(i)))
	}
}

func BenchmarkNoLimit100(b *testing.B) {
	br := New(Config{})
	br.Set(many(100, 0, time.Time{}))
	b.ReportAllocs()
	for b.Loop() {
		br.Release(br.Try())
	}
}

// A target that is in another place is another one: what was refused at the old place says nothing, what is inside there ends there.
func TestMovedTarget(t *testing.T) {
	b := New(Config{MaxWaiting: 10})
	spec := func(at string) []Spec { return []Spec{{ID: "a", At: at, Limit: 1, Value: at}} }
	b.Set(spec("here"))
	old := b.Try()
	w := join(t, b)
	b.Set(spec("here"))
	if given(w) != nil {
		t.Fatal("the same target has another slot")
	}
	b.Set(spec("there"))
	tg := given(w)
	if tg == nil || tg.Value != "there" {
		t.Fatalf("given %+v", tg)
	}
	b.Release(old)
	if b.Try() != nil {
		t.Error("the end of a request in the old place gave a slot in the new one")
	}
	b.Release(tg)
	if tg = b.Try(); tg == nil || tg.Value != "there" || b.Targets() != 1 {
		t.Errorf("%+v, of %d", tg, b.Targets())
	}
}
