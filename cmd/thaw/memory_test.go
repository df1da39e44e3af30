package main

import (
	"context"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"
)

func TestPercentFor(t *testing.T) {
	for live, want := range map[uint64]int{0: maxPercent, 1 << 20: maxPercent, 8 << 20: 50, 16 << 20: 25, 20 << 20: 20, 1 << 30: minPercent} {
		if got := percentFor(live); got != want {
			t.Errorf("%d MiB live: %d %%, want %d", live>>20, got, want)
		}
	}
}

// keepSmall sets the percentage, ends with its context, and leaves alone what somebody else has set.
func TestKeepSmall(t *testing.T) {
	old := debug.SetGCPercent(100)
	defer debug.SetGCPercent(old)
	t.Setenv("GOMEMLIMIT", "")
	for _, gogc := range []string{"", "100"} {
		t.Setenv("GOGC", gogc)
		debug.SetGCPercent(100)
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { keepSmall(ctx); close(done) }()
			time.Sleep(time.Minute) // of the bubble
			cancel()
			<-done
		})
		if got := debug.SetGCPercent(100); (got == 100) != (gogc != "") || got < minPercent {
			t.Errorf("GOGC=%q: the percentage became %d", gogc, got)
		}
	}
}
