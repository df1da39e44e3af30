package breaker

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func one(limit int) []Spec { return []Spec{{ID: "a", Limit: limit}} }

func TestOrderOfArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(Config{MaxWaiting: 100})
		b.Set(one(1))
		first := b.Try()
		if first == nil {
			t.Fatal("no slot in an empty breaker")
		}
		var order []int
		for i := range 50 {
			w := NewWaiter(nil, 0, time.Now())
			if err := b.Enqueue(w); err != nil {
				t.Fatal(err)
			}
			go func() {
				tg, err := b.Wait(w, 0)
				if err != nil {
					t.Error(err)
				}
				order = append(order, i) // the limit of 1 is the lock
				b.Release(tg)
			}()
		}
		if b.Try() != nil {
			t.Fatal("a newcomer passed those who wait")
		}
		b.Release(first)
		synctest.Wait()
		for i, v := range order {
			if i != v {
				t.Fatalf("served as number %d: %d", i, v)
			}
		}
		if len(order) != 50 {
			t.Fatalf("served %d of 50", len(order))
		}
	})
}

func TestBounds(t *testing.T) {
	g := &Budget{MaxBytes: 100, MaxWaiting: 4}
	b := New(Config{MaxWaiting: 3, MaxBytes: 80, Budget: g})
	enqueue := func(n int64) error { return b.Enqueue(NewWaiter(nil, n, time.Now())) }
	for i, c := range []struct {
		bytes int64
		want  error
	}{{50, nil}, {40, ErrFullBytes}, {30, nil}, {0, nil}, {0, ErrFull}} {
		if err := enqueue(c.bytes); err != c.want || err != nil && !errors.Is(err, ErrFull) {
			t.Errorf("%d: %v, want %v", i, err, c.want)
		}
	}
	other := New(Config{MaxWaiting: 3, Budget: g})
	if err := other.Enqueue(NewWaiter(nil, 30, time.Now())); err != ErrFullTotal {
		t.Errorf("budget of 100 bytes holds 80, 30 more: %v", err)
	}
	if err := other.Enqueue(NewWaiter(nil, 20, time.Now())); err != nil {
		t.Errorf("budget of 100 bytes holds 80, 20 more: %v", err)
	}
	if err := other.Enqueue(NewWaiter(nil, 0, time.Now())); err != ErrFullTotal {
		t.Errorf("budget of 4 requests holds 4, one more: %v", err)
	}
	if n := b.Fail(errors.New("x")); n != 3 {
		t.Errorf("failed %d", n)
	}
	other.Close(errors.New("x"))
	if n, bytes := g.Held(); n != 0 || bytes != 0 {
		t.Errorf("budget still has %d requests, %d bytes", n, bytes)
	}
}

func TestTimeoutAndSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(Config{MaxWaiting: 10})
		w := NewWaiter(nil, 0, time.Now())
		b.Enqueue(w)
		if _, err := b.Wait(w, time.Second); err != ErrTimeout {
			t.Errorf("own limit: %v", err)
		}
		gone := &leaver{}
		old, left, stays := NewWaiter(nil, 1, time.Now().Add(-time.Hour)), NewWaiter(gone, 1, time.Now()), NewWaiter(&leaver{}, 1, time.Now())
		b.Enqueue(old)
		b.Enqueue(left)
		b.Enqueue(stays)
		gone.gone.Store(true)
		if !b.Sweep(time.Now(), time.Minute) {
			t.Error("one still waits, Sweep says no")
		}
		if _, err := b.Wait(old, 0); err != ErrTimeout {
			t.Errorf("old: %v", err)
		}
		if _, err := b.Wait(left, 0); err != ErrGone {
			t.Errorf("left: %v", err)
		}
		if n, _ := b.Load(); n != 1 {
			t.Errorf("%d wait, want 1", n)
		}
	})
}

type leaver struct{ gone atomic.Bool }

func (l *leaver) Gone() bool { return l.gone.Load() }
func (l *leaver) Abort()     {}
func (l *leaver) Reset()     {}

// Against a dumb model: after any sequence of operations the limit holds, nothing is lost, and no request waits while a slot is free.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := New(Config{MaxWaiting: 1 << 20})
		type held struct {
			w  *Waiter
			tg *Target
		}
		var running, waiting []*held
		specs := map[string]int{}
		refused := false // from then on requests may pass those that targets have refused
		now := time.Now()
		most := map[*Target]int{}
		collect := func() {
			var still []*held
			for i, h := range waiting {
				select {
				case <-h.w.done:
					h.tg = h.w.target
					running = append(running, h)
					if len(still) > 0 && !refused {
						t.Fatalf("waiter %d was served before an older one", i)
					}
				default:
					still = append(still, h)
				}
			}
			waiting = still
		}
		for range rapid.IntRange(1, 60).Draw(t, "n") {
			now = now.Add(time.Duration(rapid.IntRange(0, 200).Draw(t, "ms")) * time.Millisecond)
			switch rapid.IntRange(0, 5).Draw(t, "op") {
			case 4: // a target refuses
				if len(running) > 0 {
					i := rapid.IntRange(0, len(running)-1).Draw(t, "i")
					h := running[i]
					running = append(running[:i], running[i+1:]...)
					waiting = append([]*held{h}, waiting...)
					refused = true
					if _, err := b.Requeue(h.w, h.tg, now, rapid.Bool().Draw(t, "busy")); err != nil {
						t.Fatal(err)
					}
				}
			case 5:
				b.Sweep(now, 0)
			case 0, 1:
				h := &held{w: NewWaiter(nil, 1, time.Now())}
				if err := b.Enqueue(h.w); err != nil {
					t.Fatal(err)
				}
				waiting = append(waiting, h)
			case 2:
				if len(running) > 0 {
					i := rapid.IntRange(0, len(running)-1).Draw(t, "i")
					b.Release(running[i].tg)
					running = append(running[:i], running[i+1:]...)
				}
			case 3:
				specs = map[string]int{}
				var list []Spec
				limit := rapid.IntRange(0, 3).Draw(t, "limit")
				for i := range rapid.IntRange(0, 4).Draw(t, "targets") {
					id := fmt.Sprint("t", rapid.IntRange(0, 5).Draw(t, "id"), i)
					specs[id] = limit
					list = append(list, Spec{ID: id, Limit: limit})
				}
				b.Set(list)
			}
			collect()
			per := map[*Target]int{}
			for _, h := range running {
				per[h.tg]++
			}
			free := false
			for tg, n := range per {
				if tg.inflight != n {
					t.Fatalf("%s counts %d, holds %d", tg.ID, tg.inflight, n)
				}
			}
			for id, limit := range specs {
				if tg := b.targets[id]; tg.index >= 0 && !tg.full() && (limit == 0 || tg.inflight < limit) {
					free = true
				}
				if tg := b.targets[id]; limit > 0 && tg.inflight > max(limit, most[tg]) {
					t.Fatalf("%d inside %s, limit %d", tg.inflight, id, limit)
				}
			}
			untried := 0 // who wait and were not refused: for them every slot is good
			for _, h := range waiting {
				if len(h.w.tried) == 0 && h.w.list == &b.queue {
					untried++
				}
			}
			if free && untried > 0 {
				t.Fatalf("%d wait although a slot is free", untried)
			}
			clear(most) // a lowered limit does not end what is inside
			for _, tg := range b.targets {
				most[tg] = tg.inflight
			}
			if w, r := b.Load(); w != len(waiting) || r != len(running) {
				t.Fatalf("load %d %d, want %d %d", w, r, len(waiting), len(running))
			}
		}
	})
}

// Never over the limit, nobody lost, with real goroutines, while the targets come and go.
func TestHammer(t *testing.T) {
	const limit, clients, each = 3, 16, 300
	b := New(Config{MaxWaiting: clients})
	// Instances come and go while the load runs; an id is never used again, as in real life.
	window := func(n int) (s []Spec) {
		for i := n; i < n+3; i++ {
			s = append(s, Spec{ID: fmt.Sprint(i), Limit: limit, Value: new(atomic.Int32)})
		}
		return s
	}
	b.Set(window(0))
	stop := make(chan struct{})
	var churn sync.WaitGroup
	churn.Go(func() {
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			default:
				b.Set(window(n))
				b.Sweep(time.Now(), 0)
				runtime.Gosched()
			}
		}
	})
	var served atomic.Int32
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range each {
				tg := b.Try()
				if tg == nil {
					w := NewWaiter(nil, 0, time.Now())
					if err := b.Enqueue(w); err != nil {
						t.Error(err)
						return
					}
					var err error
					if tg, err = b.Wait(w, time.Minute); err != nil {
						t.Error(err)
						return
					}
				}
				n := tg.Value.(*atomic.Int32)
				if in := n.Add(1); in > limit {
					t.Errorf("%d inside, limit %d", in, limit)
				}
				served.Add(1)
				n.Add(-1)
				b.Release(tg)
			}
		})
	}
	wg.Wait()
	close(stop)
	churn.Wait()
	if served.Load() != clients*each {
		t.Errorf("served %d of %d", served.Load(), clients*each)
	}
}

func TestNoAllocations(t *testing.T) {
	b := New(Config{})
	b.Set(one(10))
	if n := testing.AllocsPerRun(1000, func() { b.Release(b.Try()) }); n != 0 {
		t.Errorf("%v allocations for a free slot", n)
	}
}

func BenchmarkFreeSlot(b *testing.B) {
	br := New(Config{})
	var specs []Spec
	for i := range 100 {
		specs = append(specs, Spec{ID: fmt.Sprint(i), Limit: 10})
	}
	br.Set(specs)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if t := br.Try(); t != nil {
				br.Release(t)
			}
		}
	})
}
