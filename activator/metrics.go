package activator

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/hop"
)

// metrics are the activator's instruments. Nothing here is touched by a request that finds a free slot.
type metrics struct {
	coldstarts metric.Int64Counter
	platform   metric.Float64Histogram
	refusals   metric.Int64Counter
	again      metric.Int64Counter
	ejections  metric.Int64Counter
}

func newMetrics(m metric.Meter, a *Activator) (x metrics, err error) {
	if x.coldstarts, err = m.Int64Counter("faas.coldstarts", metric.WithUnit("{coldstart}"), metric.WithDescription("Requests that waited for the start of the instance that served them.")); err != nil {
		return
	}
	if x.platform, err = m.Float64Histogram("thaw.coldstart.platform.duration", metric.WithUnit("s"), metric.WithDescription("Time of a cold request less the function's own start and work."),
		metric.WithExplicitBucketBoundaries(.001, .002, .003, .005, .0075, .01, .015, .025, .05, .1, .25, 1, 5)); err != nil {
		return
	}
	if x.refusals, err = m.Int64Counter("thaw.activator.refusals", metric.WithUnit("{request}"), metric.WithDescription("Held requests that got no slot, by reason.")); err != nil {
		return
	}
	if x.again, err = m.Int64Counter("thaw.activator.redispatches", metric.WithUnit("{request}"), metric.WithDescription("Requests that went to another instance because no byte reached the first.")); err != nil {
		return
	}
	if x.ejections, err = m.Int64Counter("thaw.activator.ejections", metric.WithUnit("{ejection}"), metric.WithDescription("Instances taken out because they refused requests again and again.")); err != nil {
		return
	}
	if _, err = m.Int64ObservableGauge("thaw.revision.instances.ejected", metric.WithUnit("{instance}"), metric.WithDescription("Instances that get no requests because they refused them."),
		metric.WithInt64Callback(a.observe(func(r *revision) int { return r.b.Ejected() }))); err != nil {
		return
	}
	_, err = m.Int64ObservableGauge("thaw.revision.queue.depth", metric.WithUnit("{request}"), metric.WithDescription("Requests held for want of a free slot."),
		metric.WithInt64Callback(a.observe(func(r *revision) int { n, _ := r.b.Load(); return n })))
	return
}

// observe reports a number of each revision where it is not 0.
func (a *Activator) observe(number func(*revision) int) metric.Int64Callback {
	return func(_ context.Context, o metric.Int64Observer) error {
		a.revisions.Range(func(_, v any) bool {
			r := v.(*revision)
			if n := number(r); n > 0 {
				o.Observe(int64(n), metric.WithAttributes(attribute.String("revision", string(r.id))))
			}
			return true
		})
		return nil
	}
}

func (m *metrics) ejected(id api.RevisionID) {
	m.ejections.Add(context.Background(), 1, metric.WithAttributes(attribute.String("revision", string(id))))
}

func (m *metrics) cold(x *hop.Exchange) {
	set := metric.WithAttributes(attribute.String("revision", string(x.Revision)))
	m.coldstarts.Add(context.Background(), 1, set)
	m.platform.Record(context.Background(), PhasesOf(x, time.Now()).Platform().Seconds(), set)
}

func (m *metrics) refused(reason string) {
	m.refusals.Add(context.Background(), 1, metric.WithAttributes(attribute.String("reason", reason)))
}
