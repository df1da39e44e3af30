package autoscaler

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

// metrics are the autoscaler's instruments. What a revision's state is gets observed when somebody asks, so that idle revisions
// cost nothing and removed ones disappear; events are counted.
type metrics struct {
	causes       map[string][]metric.AddOption // made once: ticks are many
	reasons      map[refusal][]metric.AddOption
	decisions    metric.Int64Counter
	reports      metric.Int64Counter
	instances    metric.Int64Counter
	registration metric.Registration
}

var (
	stateKnown  = metric.WithAttributeSet(attribute.NewSet(attribute.String("state", "known")))
	stateListed = metric.WithAttributeSet(attribute.NewSet(attribute.String("state", "listed")))
)

// gauges are observed from Status.
type gauges struct {
	desired, ordered, ready, starting metric.Int64ObservableGauge
	activators, panicMode, proxyMode  metric.Int64ObservableGauge
	excess, revisions                 metric.Int64ObservableGauge
	stable, panic, target             [2]metric.Float64ObservableGauge // by Metric
}

// newMetrics makes the instruments. A meter refuses only names that break its rules; it then still returns something that can be used.
func newMetrics(m metric.Meter, statuses func() (listed []Status, known int)) *metrics {
	if m == nil {
		m = noop.NewMeterProvider().Meter("")
	}
	r := &metrics{causes: map[string][]metric.AddOption{}}
	for _, cause := range []string{"tick", "event", "report"} {
		r.causes[cause] = []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(attribute.String("cause", cause)))}
	}
	r.reasons = map[refusal][]metric.AddOption{}
	for _, why := range refusals {
		r.reasons[why] = []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(attribute.String("reason", string(why))))}
	}
	r.decisions, _ = m.Int64Counter("thaw.autoscaler.decisions", metric.WithUnit("{decision}"),
		metric.WithDescription("Decisions by what caused them: tick, event or report."))
	r.reports, _ = m.Int64Counter("thaw.autoscaler.reports.refused", metric.WithUnit("{report}"),
		metric.WithDescription("Load reports that were not counted, by reason: value, late, future, repeat or source."))
	r.instances, _ = m.Int64Counter("thaw.autoscaler.instances.ordered", metric.WithUnit("{instance}"),
		metric.WithDescription("Instances by which orders went up or down."))

	count := func(name, unit, what string) metric.Int64ObservableGauge {
		g, _ := m.Int64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(what))
		return g
	}
	load := func(name, unit, what string) metric.Float64ObservableGauge {
		g, _ := m.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(what))
		return g
	}
	g := gauges{
		desired:    count("thaw.revision.instances.desired", "{instance}", "Instances the revision should have."),
		ordered:    count("thaw.revision.instances.ordered", "{instance}", "Instances that were ordered from the agents."),
		ready:      count("thaw.revision.instances.ready", "{instance}", "Instances that take requests."),
		starting:   count("thaw.revision.instances.starting", "{instance}", "Instances that are being started."),
		activators: count("thaw.revision.activators", "{activator}", "Activators that the revision's capacity calls for."),
		panicMode:  count("thaw.revision.panic.mode", "1", "1 in panic mode."),
		proxyMode:  count("thaw.revision.proxy.mode", "1", "1 while requests should pass the activator."),
		revisions:  count("thaw.autoscaler.revisions", "{revision}", "Revisions by state: known, or listed in the metrics because they are not at rest."),
		excess:     count("thaw.revision.capacity.excess", "{request}", "Free capacity less the target burst capacity."),
		stable: [2]metric.Float64ObservableGauge{
			load("thaw.revision.concurrency.stable", "{request}", "Concurrent requests over the stable window."),
			load("thaw.revision.rps.stable", "{request}/s", "Requests a second over the stable window."),
		},
		panic: [2]metric.Float64ObservableGauge{
			load("thaw.revision.concurrency.panic", "{request}", "Concurrent requests over the panic window."),
			load("thaw.revision.rps.panic", "{request}/s", "Requests a second over the panic window."),
		},
		target: [2]metric.Float64ObservableGauge{
			load("thaw.revision.concurrency.target", "{request}", "Concurrent requests one instance should carry."),
			load("thaw.revision.rps.target", "{request}/s", "Requests a second one instance should carry."),
		},
	}
	r.registration, _ = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		listed, known := statuses()
		for _, s := range listed {
			g.observe(o, s)
		}
		o.ObserveInt64(g.revisions, int64(known), stateKnown)
		o.ObserveInt64(g.revisions, int64(len(listed)), stateListed)
		return nil
	}, g.all()...)
	return r
}

func (g gauges) all() []metric.Observable {
	all := []metric.Observable{g.desired, g.ordered, g.ready, g.starting, g.activators, g.panicMode, g.proxyMode, g.excess, g.revisions}
	for i := range g.stable {
		all = append(all, g.stable[i], g.panic[i], g.target[i])
	}
	return all
}

func (g gauges) observe(o metric.Observer, s Status) {
	namespace, name := s.Revision.Split()
	of := metric.WithAttributeSet(attribute.NewSet(
		attribute.String("thaw.namespace", namespace), attribute.String("thaw.revision", name)))
	o.ObserveInt64(g.desired, int64(s.Desired), of)
	o.ObserveInt64(g.ordered, int64(s.Ordered), of)
	o.ObserveInt64(g.ready, int64(s.Ready), of)
	o.ObserveInt64(g.starting, int64(s.Starting), of)
	o.ObserveInt64(g.activators, int64(s.Activators), of)
	o.ObserveInt64(g.panicMode, bit(s.PanicMode), of)
	o.ObserveInt64(g.proxyMode, bit(s.Mode == Proxy), of)
	o.ObserveInt64(g.excess, int64(s.ExcessBurstCapacity), of)
	o.ObserveFloat64(g.target[s.Policy.Metric], s.Policy.Target, of)
	if s.Measured { // missing data is missing
		o.ObserveFloat64(g.stable[s.Policy.Metric], s.Stable, of)
		o.ObserveFloat64(g.panic[s.Policy.Metric], s.Panic, of)
	}
}

func bit(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func (m *metrics) decided(cause string) {
	m.decisions.Add(context.Background(), 1, m.causes[cause]...)
}

func (m *metrics) refused(why refusal) {
	m.reports.Add(context.Background(), 1, m.reasons[why]...)
}

func (m *metrics) scaled(from, to int) {
	direction, n := "up", to-from
	if n < 0 {
		direction, n = "down", -n
	}
	m.instances.Add(context.Background(), int64(n), metric.WithAttributes(attribute.String("direction", direction)))
}

func (m *metrics) close() {
	if m.registration != nil {
		_ = m.registration.Unregister() // fails only for a registration of another meter
	}
}
