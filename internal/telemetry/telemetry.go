// Package telemetry sets up the one OpenTelemetry meter provider of a process and serves what it measures in Prometheus' text
// format. Parts get a metric.Meter and know nothing of this.
package telemetry

import (
	"context"
	"fmt"
	"io"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
)

// Metrics is a process's meter provider with its exposition.
type Metrics struct {
	provider *sdkmetric.MeterProvider
	handler  http.Handler
}

// New makes the provider. More writes further metrics in Prometheus' text format behind the provider's own; it may be nil.
func New(more func(io.Writer) error) (*Metrics, error) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exp, err := otelprom.New(otelprom.WithRegisterer(reg), otelprom.WithoutScopeInfo(), otelprom.WithoutTargetInfo())
	if err != nil {
		return nil, fmt.Errorf("telemetry: %w", err)
	}
	text := promhttp.HandlerFor(reg, promhttp.HandlerOpts{DisableCompression: true})
	return &Metrics{
		provider: sdkmetric.NewMeterProvider(sdkmetric.WithReader(exp)),
		handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			// Plain text whatever was asked for: the second part could not follow another format.
			r = r.Clone(r.Context())
			r.Header.Set("Accept", "text/plain")
			text.ServeHTTP(w, r)
			if more != nil {
				_ = more(w) // the client has gone, or it sees a short body
			}
		}),
	}, nil
}

// Meter returns a meter for a part.
func (m *Metrics) Meter(name string) metric.Meter { return m.provider.Meter(name) }

// ServeHTTP writes all metrics.
func (m *Metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) { m.handler.ServeHTTP(w, r) }

// Shutdown ends the provider.
func (m *Metrics) Shutdown(ctx context.Context) error { return m.provider.Shutdown(ctx) }
