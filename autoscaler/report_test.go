package autoscaler

import (
	"encoding/binary"
	"math"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/endpoints"
)

// FuzzReports sends whatever the bytes say, 40 of them for a report. The averages stay finite numbers, and what is refused changes none.
func FuzzReports(f *testing.F) {
	nonsense := func(c, pc float64, at int64, source byte) []byte {
		var b []byte
		for _, v := range []uint64{math.Float64bits(c), math.Float64bits(pc), math.Float64bits(c), uint64(at), uint64(source)} {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
		return b
	}
	f.Add(nonsense(math.NaN(), 0, 0, 1))
	f.Add(append(nonsense(1e308, 0, 0, 1), nonsense(1e308, -1, math.MinInt64, 0)...))
	f.Add(append(nonsense(3, 1, 5, 1), nonsense(3, 1, 5, 1)...))
	f.Add(nonsense(math.Inf(-1), math.Inf(1), math.MaxInt64, 9))
	f.Fuzz(func(t *testing.T, b []byte) {
		rev := healthy(testRevision("r", nil, 10))
		r := newRevision(rev.ID())
		if _, err := r.apply(t0, t0, DefaultConfig(), shared[Policy]{}, rev); err != nil {
			t.Fatal(err)
		}
		r.observe(t0, t0, time.Second, &endpoints.Snapshot{Revision: r.id, Instances: []endpoints.Instance{{ID: "1", State: endpoints.Ready}}})
		r.awake(t0, t0, time.Second)
		now := t0.Add(time.Minute)
		taking := 0.0
		for ; len(b) >= 40; b = b[40:] {
			word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
			s := endpoints.Stat{
				Revision: r.id, Source: string('0' + rune(word(4)%4)), Activator: word(4)%4 == 3,
				Concurrency: math.Float64frombits(word(0)), ProxiedConcurrency: math.Float64frombits(word(1)), Requests: math.Float64frombits(word(2)),
				Time: now.Add(time.Duration(word(3))),
			}
			stable, panicked := r.stable.Average(now), r.panic.Average(now)
			v, why := r.report(now, s)
			if why != taken && (v != 0 || r.stable.Average(now) != stable || r.panic.Average(now) != panicked) {
				t.Fatalf("%+v was refused (%s) and counted", s, why)
			}
			if why == taken && !(v >= 0 && v <= maxLoad) {
				t.Fatalf("%+v counted as %v", s, v)
			}
			taking += v
		}
		r.decide(now)
		for _, v := range []float64{r.stable.Average(now), r.panic.Average(now)} {
			if !(v >= 0 && v <= taking+1e-3) {
				t.Fatalf("average %v of reports of %v", v, taking)
			}
		}
	})
}
