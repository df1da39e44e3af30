package main

import (
	"context"
	"net"
	"net/http"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/thawrun/thaw/internal/telemetry"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// serveGatewayMetrics answers on ln with what a node says of itself, until ctx ends.
func serveGatewayMetrics(ctx context.Context, ln net.Listener, status func() (gateway.Status, error)) error {
	m, err := telemetry.New(nil)
	if err != nil {
		return err
	}
	defer func() { _ = m.Shutdown(context.WithoutCancel(ctx)) }()
	if err := measureGateway(m.Meter("gateway"), status); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	if err := srv.Serve(ln); ctx.Err() == nil {
		return err
	}
	return nil
}

// measureGateway makes the instruments of a node.
func measureGateway(m metric.Meter, status func() (gateway.Status, error)) error {
	gauge := func(name, unit, what string) metric.Float64ObservableGauge {
		g, _ := m.Float64ObservableGauge("thaw.gateway."+name, metric.WithUnit(unit), metric.WithDescription(what))
		return g
	}
	counter := func(name, unit, what string) metric.Int64ObservableCounter {
		c, _ := m.Int64ObservableCounter("thaw.gateway."+name, metric.WithUnit(unit), metric.WithDescription(what))
		return c
	}
	var (
		master      = gauge("master", "", "1 while the node carries the traffic.")
		term        = gauge("term", "", "Number of the last take-over that the node knows of.")
		adverts     = counter("adverts.refused", "{advert}", "Adverts that were malformed, unsigned or old.")
		enis        = counter("eni.calls", "{call}", "Calls of the provider of ENIs.")
		inStep      = gauge("pair.in_step", "", "1 while the other node is heard and has the pair's connections.")
		link        = gauge("pair.link", "", "1 while the pair's ENI has a link.")
		connections = gauge("pair.connections", "{connection}", "Connections of a pair.")
		load        = gauge("pair.load", "1", "Part of what a pair can do that it does.")
		refused     = counter("pair.refused", "{packet}", "Packets that a pair dropped or refused.")
		noPort      = counter("pair.ports.missing", "{connection}", "Connections that found no free port.")
		lag         = gauge("pair.replication.lag", "s", "Age of the oldest event that the other node has not confirmed.")
		events      = counter("pair.replication.events", "{event}", "Events of connections that were sent to the other node and received from it.")
		resyncs     = counter("pair.replication.resyncs", "{copy}", "Copies of the other node's table that were asked for.")
		packets     = counter("tunnel.packets", "{packet}", "Packets through tunnels; those that the kernel carries as one are one.")
		size        = counter("tunnel.size", "By", "Their bytes, without outer headers.")
		drops       = counter("tunnel.drops", "{packet}", "Packets that tunnels did not let through.")
	)
	flag := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	_, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s, err := status()
		if err != nil {
			return err
		}
		o.ObserveFloat64(master, flag(s.Role == havip.Master))
		o.ObserveFloat64(term, float64(s.Term))
		o.ObserveInt64(adverts, int64(s.Refused))
		o.ObserveInt64(enis, int64(s.ENIs))
		for _, p := range s.Pairs {
			pair := attribute.String("pair", p.Name)
			with := func(more ...attribute.KeyValue) metric.ObserveOption {
				return metric.WithAttributes(append(more, pair)...)
			}
			o.ObserveFloat64(inStep, flag(p.InStep), with())
			o.ObserveFloat64(link, flag(p.Link), with())
			o.ObserveFloat64(connections, float64(p.Connections), with())
			for of, v := range map[string]float64{"bits": p.Load.Bits, "packets": p.Load.Packets, "cpu": p.Load.CPU, "connections": p.Load.Table, "ports": p.Load.Ports} {
				o.ObserveFloat64(load, v, with(attribute.String("of", of)))
			}
			for reason, n := range p.Packets {
				o.ObserveInt64(refused, int64(n), with(attribute.String("reason", reason)))
			}
			o.ObserveInt64(noPort, int64(p.NoPort), with())
			if r := p.Replication; r != nil {
				o.ObserveFloat64(lag, r.LagSeconds, with())
				o.ObserveInt64(events, int64(r.EventsSent), with(attribute.String("direction", "out")))
				o.ObserveInt64(events, int64(r.EventsReceived), with(attribute.String("direction", "in")))
				o.ObserveInt64(resyncs, int64(r.Resyncs), with())
			}
		}
		if s.Tunnel == nil {
			return nil
		}
		for direction, c := range map[string]tunnel.Counter{"out": s.Tunnel.Out, "in": s.Tunnel.In} {
			o.ObserveInt64(packets, int64(c.Packets), metric.WithAttributes(attribute.String("direction", direction)))
			o.ObserveInt64(size, int64(c.Bytes), metric.WithAttributes(attribute.String("direction", direction)))
		}
		for reason, n := range s.Tunnel.Drops {
			o.ObserveInt64(drops, int64(n), metric.WithAttributes(attribute.String("reason", string(reason))))
		}
		return nil
	}, master, term, adverts, enis, inStep, link, connections, load, refused, noPort, lag, events, resyncs, packets, size, drops)
	return err
}
