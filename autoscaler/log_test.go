package autoscaler

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/endpoints"
)

// The log tells the queue of the event that a decision follows from, not that of an event long past.
func TestLogHasNoStaleQueue(t *testing.T) {
	var out bytes.Buffer
	a := New(DefaultConfig(), nil)
	a.log, a.config.Tick = slog.New(slog.NewTextHandler(&out, nil)), 2*time.Second
	now := time.Now()
	r := &revision{id: "default/fn-00001", ordered: unknown, active: &active{}}
	r.demand = endpoints.Demand{Waiting: 6, At: now}
	for _, c := range []struct {
		at   time.Time
		want bool
	}{{now.Add(time.Second), true}, {now.Add(time.Minute), false}} {
		out.Reset()
		a.logScale(c.at, r, 1, Verdict{Order: 2})
		if got := strings.Contains(out.String(), "waiting=6"); got != c.want {
			t.Errorf("%v after the event: %s", c.at.Sub(now), out.String())
		}
	}
}
