package dev

import (
	"context"

	"go.opentelemetry.io/otel/metric"
)

// measurePools puts what the node keeps ready into the metrics.
func (s *Server) measurePools() error {
	m := s.metrics.Meter("instance")
	frozen, _ := m.Int64ObservableGauge("thaw.instances.frozen", metric.WithUnit("{instance}"), metric.WithDescription("Instances that are kept frozen on this node."))
	size, _ := m.Int64ObservableGauge("thaw.instances.frozen.size", metric.WithUnit("By"), metric.WithDescription("What they take, as measured when each was frozen."))
	thawed, _ := m.Int64ObservableCounter("thaw.instances.thawed", metric.WithUnit("{instance}"), metric.WithDescription("Frozen instances that were needed again."))
	evicted, _ := m.Int64ObservableCounter("thaw.instances.evicted", metric.WithUnit("{instance}"), metric.WithDescription("Frozen instances that were ended for want of room or memory."))
	places, _ := m.Int64ObservableGauge("thaw.instances.places", metric.WithUnit("{place}"), metric.WithDescription("Places for instances to come that are kept ready on this node."))
	units, _ := m.Int64ObservableGauge("thaw.instances.units", metric.WithUnit("{unit}"), metric.WithDescription("Units of instances that this node has room for."))
	used, _ := m.Int64ObservableGauge("thaw.instances.units.used", metric.WithUnit("{unit}"), metric.WithDescription("Those of them that instances take, frozen ones included."))
	_, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		f := s.agent.Frozen()
		o.ObserveInt64(frozen, int64(f.Now))
		o.ObserveInt64(size, f.Bytes)
		o.ObserveInt64(thawed, int64(f.Woken))
		o.ObserveInt64(evicted, int64(f.Ended))
		o.ObserveInt64(places, int64(s.agent.Places()))
		n, taken, _ := s.agent.Units()
		o.ObserveInt64(units, int64(n))
		o.ObserveInt64(used, int64(taken))
		return nil
	}, frozen, size, thawed, evicted, places, units, used)
	return err
}
