package certs

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

type metrics struct {
	handshakes metric.Int64Counter
	reloads    metric.Int64Counter
}

func (m *metrics) init(meter metric.Meter, s *Store) (err error) {
	if m.handshakes, err = meter.Int64Counter("thaw.tls.handshakes", metric.WithUnit("{handshake}"),
		metric.WithDescription("TLS handshakes with clients, by how they ended.")); err != nil {
		return err
	}
	if m.reloads, err = meter.Int64Counter("thaw.tls.certificate.reloads", metric.WithUnit("{reload}"),
		metric.WithDescription("Changes of certificate files, by whether the new certificate was taken.")); err != nil {
		return err
	}
	_, err = meter.Float64ObservableGauge("thaw.tls.certificate.expiry", metric.WithUnit("s"),
		metric.WithDescription("Time until the certificate of a file expires; below zero = since it has."),
		metric.WithFloat64Callback(func(_ context.Context, o metric.Float64Observer) error {
			for file, end := range s.files.expiries() {
				o.Observe(time.Until(end).Seconds(), metric.WithAttributes(attribute.String("file", file)))
			}
			return nil
		}))
	return err
}

func result(err error) metric.MeasurementOption {
	if err != nil {
		return metric.WithAttributes(attribute.String("result", "failed"))
	}
	return metric.WithAttributes(attribute.String("result", "ok"))
}

// Handshake counts a handshake with a client.
func (s *Store) Handshake(err error) {
	s.metrics.handshakes.Add(context.Background(), 1, result(err))
}

func (m *metrics) reloaded(ctx context.Context, err error) { m.reloads.Add(ctx, 1, result(err)) }
