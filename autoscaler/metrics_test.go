package autoscaler

import (
	"context"
	"fmt"
	"testing"

	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

func TestMetrics(t *testing.T) {
	reader := sdk.NewManualReader()
	provider := sdk.NewMeterProvider(sdk.WithReader(reader))
	c := DefaultConfig()
	c.Meter = provider.Meter("autoscaler")
	inWorld(t, c, healthy(testRevision("r", nil, 10)), func(w *world) {
		w.set(w.rev)
		w.demand(20, 0)
		w.load = 20
		w.until(seconds(5))
		got := collect(t, reader)
		for name, want := range map[string]float64{
			"thaw.revision.instances.desired":   3,
			"thaw.revision.instances.ordered":   3,
			"thaw.revision.instances.ready":     3,
			"thaw.revision.instances.starting":  0,
			"thaw.revision.activators":          3,
			"thaw.revision.proxy.mode":          1,
			"thaw.revision.capacity.excess":     -201,
			"thaw.revision.concurrency.stable":  20,
			"thaw.revision.concurrency.panic":   20,
			"thaw.revision.concurrency.target":  7,
			"thaw.autoscaler.instances.ordered": 3,
			"thaw.autoscaler.decisions":         3, // one event, ticks at 2 s and 4 s
		} {
			if v, ok := got[name]; !ok || v != want {
				t.Errorf("%s is %v (%v), want %v", name, v, ok, want)
			}
		}
		if _, ok := got["thaw.revision.rps.stable"]; ok {
			t.Error("a load in a metric that is not the revision's")
		}
		// Nine more that nobody calls are counted, and have no series.
		for i := range 9 {
			w.a.SetRevision(healthy(testRevision(fmt.Sprint("idle-", i), nil, 10)))
		}
		w.wait()
		if got := collect(t, reader); got["thaw.autoscaler.revisions"] != 10+1 || got["thaw.revision.instances.desired"] != 3 || got["thaw.revision.concurrency.target"] != 7 {
			t.Errorf("with nine idle ones: %v", got)
		}
		w.load = 0
		w.until(seconds(300))
		if got := collect(t, reader); got["thaw.autoscaler.revisions"] != 10 {
			t.Errorf("all at rest: %v", got)
		} else if _, ok := got["thaw.revision.instances.desired"]; ok {
			t.Error("a revision at rest has a series")
		}
		w.demand(1, 0)
		if got := collect(t, reader); got["thaw.revision.instances.desired"] != 1 {
			t.Errorf("woken again: %v", got)
		}
		w.a.RemoveRevision(w.rev.ID())
		w.wait()
		if _, ok := collect(t, reader)["thaw.revision.instances.desired"]; ok {
			t.Error("a removed revision is still measured")
		}
	})
}

// collect sums each instrument over its attributes.
func collect(t *testing.T, r *sdk.ManualReader) map[string]float64 {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := r.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, scope := range rm.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Gauge[int64]:
				for _, p := range d.DataPoints {
					got[m.Name] += float64(p.Value)
				}
			case metricdata.Gauge[float64]:
				for _, p := range d.DataPoints {
					got[m.Name] += p.Value
				}
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					got[m.Name] += float64(p.Value)
				}
			}
		}
	}
	return got
}
