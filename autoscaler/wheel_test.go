package autoscaler

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestWheelAgainstPlain compares with a list that is looked through each time: nobody is handed over early, late or twice, and next is
// never after the first that is due.
func TestWheelAgainstPlain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWheel(t0)
		revs := make([]*revision, 20)
		plain := map[*revision]time.Time{}
		for i := range revs {
			revs[i] = &revision{active: &active{}}
		}
		now := t0
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			r := revs[rapid.IntRange(0, len(revs)-1).Draw(t, "revision")]
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				w.set(r, time.Time{})
				delete(plain, r)
			case 1, 2:
				at := now.Add(time.Duration(rapid.Int64Range(-int64(time.Second), int64(40*time.Second)).Draw(t, "ahead")))
				w.set(r, at)
				if at.Before(now) {
					at = now // what is overdue is due at the next slot
				}
				plain[r] = at
			case 3:
				now = now.Add(time.Duration(rapid.Int64Range(0, int64(25*time.Second)).Draw(t, "pass")))
				got := map[*revision]bool{}
				w.due(now, func(r *revision) {
					if got[r] {
						t.Fatal("handed over twice")
					}
					got[r] = true
				})
				for r, at := range plain {
					switch {
					case got[r] && at.After(now):
						t.Fatalf("%v early", at.Sub(now))
					case !got[r] && at.Add(2*wheelSlot).Before(now):
						t.Fatalf("%v late", now.Sub(at))
					}
					if got[r] {
						delete(plain, r)
						delete(got, r)
					}
				}
				if len(got) > 0 {
					t.Fatal("handed over although it was taken out")
				}
			}
			if w.count != len(plain) {
				t.Fatalf("counts %d, want %d", w.count, len(plain))
			}
			next, ok := w.next()
			if ok != (len(plain) > 0) {
				t.Fatalf("next %v %v with %d", next, ok, len(plain))
			}
			for _, at := range plain {
				if next.After(at.Add(2 * wheelSlot)) {
					t.Fatalf("next is %v after the first", next.Sub(at))
				}
			}
		}
	})
}

// A loop that stood still for an hour finds everything that is due, once.
func TestWheelAfterAPause(t *testing.T) {
	w := newWheel(t0)
	for i := range 5000 {
		w.set(&revision{active: &active{}}, t0.Add(time.Duration(i)*37*time.Millisecond))
	}
	n := 0
	w.due(t0.Add(time.Hour), func(r *revision) { n++ })
	if n != 5000 || w.count != 0 {
		t.Errorf("%d, left %d", n, w.count)
	}
	if _, ok := w.next(); ok {
		t.Error("an empty wheel has a next")
	}
}

// BenchmarkWheel moves one of n timers and looks for what is due: the cost does not grow with n.
func BenchmarkWheel(b *testing.B) {
	for _, n := range []int{1000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWheel(t0)
			revs := make([]*revision, n)
			for i := range revs {
				revs[i] = &revision{active: &active{}}
				w.set(revs[i], t0.Add(time.Duration(i%9000)*time.Millisecond+time.Hour))
			}
			now, i := t0, 0
			b.ReportAllocs()
			for b.Loop() {
				now = now.Add(time.Microsecond)
				w.set(revs[i%n], now.Add(time.Duration(i%2000)*time.Millisecond))
				w.due(now, func(*revision) {})
				i++
			}
		})
	}
}
