package instance

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Measure puts what the node has room for, what it keeps ready, and its packages into the metrics.
func (a *Agent) Measure(m metric.Meter) error {
	return errors.Join(a.measureRoom(m), a.measurePackages(m))
}

func (a *Agent) measureRoom(m metric.Meter) error {
	frozen, _ := m.Int64ObservableGauge("thaw.instances.frozen", metric.WithUnit("{instance}"), metric.WithDescription("Instances that are kept frozen on this node."))
	size, _ := m.Int64ObservableGauge("thaw.instances.frozen.size", metric.WithUnit("By"), metric.WithDescription("What they take, as measured when each was frozen."))
	thawed, _ := m.Int64ObservableCounter("thaw.instances.thawed", metric.WithUnit("{instance}"), metric.WithDescription("Frozen instances that were needed again."))
	evicted, _ := m.Int64ObservableCounter("thaw.instances.evicted", metric.WithUnit("{instance}"), metric.WithDescription("Frozen instances that were ended for want of room or memory."))
	places, _ := m.Int64ObservableGauge("thaw.instances.places", metric.WithUnit("{place}"), metric.WithDescription("Places for instances to come that are kept ready on this node."))
	units, _ := m.Int64ObservableGauge("thaw.instances.units", metric.WithUnit("{unit}"), metric.WithDescription("Units of instances that this node has room for."))
	used, _ := m.Int64ObservableGauge("thaw.instances.units.used", metric.WithUnit("{unit}"), metric.WithDescription("Those of them that instances take, frozen ones included."))
	_, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		f := a.Frozen()
		o.ObserveInt64(frozen, int64(f.Now))
		o.ObserveInt64(size, f.Bytes)
		o.ObserveInt64(thawed, int64(f.Woken))
		o.ObserveInt64(evicted, int64(f.Ended))
		o.ObserveInt64(places, int64(a.Places()))
		n, taken, _ := a.Units()
		o.ObserveInt64(units, int64(n))
		o.ObserveInt64(used, int64(taken))
		return nil
	}, frozen, size, thawed, evicted, places, units, used)
	return err
}

func (a *Agent) measurePackages(m metric.Meter) error {
	lookups, _ := m.Int64ObservableCounter("thaw.code.lookups", metric.WithUnit("{package}"),
		metric.WithDescription("Packages that were needed, by how they were found: hit, miss (fetched) or failed."))
	corrupt, _ := m.Int64ObservableCounter("thaw.code.corrupt", metric.WithUnit("{package}"), metric.WithDescription("Unpacked packages that had changed on disk and were thrown away."))
	evicted, _ := m.Int64ObservableCounter("thaw.code.evictions", metric.WithUnit("{package}"), metric.WithDescription("Unpacked packages that made room for others."))
	count, _ := m.Int64ObservableGauge("thaw.code.packages", metric.WithUnit("{package}"), metric.WithDescription("Unpacked packages on this node."))
	size, _ := m.Int64ObservableGauge("thaw.code.size", metric.WithUnit("By"), metric.WithDescription("Their size."))
	result := func(r string) metric.ObserveOption { return metric.WithAttributes(attribute.String("result", r)) }
	hit, miss, failed := result("hit"), result("miss"), result("failed")
	_, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		st := a.Packages().Stats()
		o.ObserveInt64(lookups, st.Hits, hit)
		o.ObserveInt64(lookups, st.Misses, miss)
		o.ObserveInt64(lookups, st.Failed, failed)
		o.ObserveInt64(corrupt, st.Corrupt)
		o.ObserveInt64(evicted, st.Evicted)
		o.ObserveInt64(count, st.Count)
		o.ObserveInt64(size, st.Bytes)
		return nil
	}, lookups, corrupt, evicted, count, size)
	return err
}
