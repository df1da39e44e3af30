package autoscaler

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestSettleKeepsItsPromises walks revisions through random weather.
func TestSettleKeepsItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, _ := PolicyFor(DefaultConfig(), nil, 10)
		p.MinScale = rapid.IntRange(0, 3).Draw(t, "min")
		if rapid.Bool().Draw(t, "limited") {
			p.MaxScale = p.MinScale + rapid.IntRange(1, 5).Draw(t, "above")
		}
		p.InitialScale = rapid.IntRange(0, 6).Draw(t, "initial")
		p.TargetBurstCapacity = rapid.SampledFrom([]float64{-1, 0, 211}).Draw(t, "burst")
		p.Retention = rapid.SampledFrom([]time.Duration{0, 10 * time.Second, 45 * time.Second}).Draw(t, "retention")
		now := t0
		l := NewLife(now, p, rapid.Bool().Draw(t, "healthy"))
		ready := 0
		for range 60 {
			now = now.Add(time.Duration(rapid.IntRange(1, 20000).Draw(t, "ms")) * time.Millisecond)
			want := rapid.SampledFrom([]int{-1, 0, 0, 0, 1, 3, 20}).Draw(t, "want")
			p.Reachable = rapid.IntRange(0, 9).Draw(t, "reachable") > 0
			s := Standing{Ready: ready, ExcessBurstCapacity: rapid.SampledFrom([]int{-5, 0, 5}).Draw(t, "ebc")}
			before := l
			var v Verdict
			v, l = Settle(now, p, want, s, l)

			if p.MaxScale > 0 && v.Order > p.MaxScale {
				t.Fatalf("above max-scale: %+v", v)
			}
			if p.Reachable && v.Order != unknown && v.Order < p.MinScale {
				t.Fatalf("below min-scale: %+v", v)
			}
			if want > 0 && v.Order == 0 {
				t.Fatalf("to zero although %d are wanted: %+v", want, v)
			}
			if v.Order == 0 && ready > 0 && before.Activity == Active && now.Sub(before.Since) < p.StableWindow {
				t.Fatalf("to zero %v after it became active", now.Sub(before.Since))
			}
			if v.Order == 0 && ready > 0 && l.Activity == Inactive && now.Sub(l.Since) < p.Retention {
				t.Fatalf("to zero within the retention: %+v %+v", v, l)
			}
			if !v.Wake.IsZero() && !v.Wake.After(now) {
				t.Fatalf("asks to be woken in the past: %+v", v)
			}
			if v.Order == unknown && v.Want == 0 && v.Wake.IsZero() {
				t.Fatalf("waits for zero without a time: %+v", v)
			}
			if l.Mode == Serve && (v.Want == 0 || ready == 0) {
				t.Fatalf("served without instances: %+v %+v", v, l)
			}
			if again, same := Settle(now, p, want, s, l); same.Activity != l.Activity && v.Order == unknown {
				t.Fatalf("not settled: %+v then %+v", v, again)
			}
			if v.Order != unknown && rapid.Bool().Draw(t, "obeyed") {
				ready = v.Order
			}
		}
	})
}

// TestSettleReachesZero says that a revision which nothing asks for always gets there, within the time that its settings allow.
func TestSettleReachesZero(t *testing.T) {
	for _, burst := range []float64{-1, 0, 211} {
		for _, retention := range []time.Duration{0, 45 * time.Second} {
			p, _ := PolicyFor(DefaultConfig(), nil, 10)
			p.TargetBurstCapacity, p.Retention = burst, retention
			now := t0
			l := NewLife(now, p, false)
			ready := 1
			for ready > 0 {
				v, next := Settle(now, p, 0, Standing{Ready: ready}, l)
				l = next
				if v.Order >= 0 {
					ready = v.Order
				}
				if ready == 0 {
					break
				}
				if now = v.Wake; v.Wake.IsZero() {
					now = now.Add(time.Second)
				}
				if now.Sub(t0) > 3*time.Minute {
					t.Fatalf("still there: %+v %+v", v, l)
				}
			}
		}
	}
}
