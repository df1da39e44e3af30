// Package observe makes telemetry of exchanges: counts by revision (package meter), spans of sampled requests (package trace), lines of the
// access log (package accesslog). It is the front's hop.Observer: everything is made when an exchange is over, from what the steps have left in it,
// so that no step on the way knows of telemetry and a request pays for nothing that is switched off.
package observe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/internal/accesslog"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/meter"
	"github.com/thawrun/thaw/internal/trace"
)

// Config says what is observed. The zero value observes nothing.
type Config struct {
	AccessLog       string  // file, "-" = standard output, "" = none
	AccessLogFormat string  // as accesslog.Config.Format
	TraceEndpoint   string  // URL of an OTLP/HTTP collector; "" = no tracing, and trace headers pass as they are
	TraceRatio      float64 // as trace.Config.Ratio

	// Requests, when set, counts every exchange.
	Requests *meter.Requests
	// Span is the name of a sampled request's time in this process, for example router.route.
	Span string
	// Service and Version are how the exporter calls this process.
	Service, Version string
	// Exporter makes the exporter to a URL. Required with TraceEndpoint.
	Exporter func(url string, resource []trace.Attr) trace.Exporter
	Log      *slog.Logger
}

// FlagSet is what Flags needs of flag.FlagSet and pflag.FlagSet.
type FlagSet interface {
	StringVar(p *string, name, value, usage string)
	Float64Var(p *float64, name string, value float64, usage string)
}

// Flags adds the flags that every hop has.
func (c *Config) Flags(f FlagSet) {
	f.StringVar(&c.AccessLog, "access-log", "", "write a line for each request to this file, - for standard output; SIGHUP opens the file anew")
	f.StringVar(&c.AccessLogFormat, "access-log-format", "json", "json, or a template such as '{client} \"{method} {path}\" {status} {duration}'")
	f.StringVar(&c.TraceEndpoint, "trace-endpoint", "", "send spans of sampled requests to this OTLP/HTTP collector, for example http://127.0.0.1:4318")
	f.Float64Var(&c.TraceRatio, "trace-ratio", 0.01, "with --trace-endpoint: the part, 0 to 1, that is sampled of the requests that bring no traceparent")
}

// Observer is a hop.Observer. Make one with New; what it gathers leaves the process while Run runs.
type Observer struct {
	requests *meter.Requests
	tracer   *trace.Tracer  // nil = off
	log      *accesslog.Log // nil = off
	span     string
	errors   *slog.Logger
}

// New checks cfg and opens the access log. It starts nothing.
func New(cfg Config) (*Observer, error) {
	o := &Observer{requests: cfg.Requests, span: cfg.Span, errors: cfg.Log}
	if o.errors == nil {
		o.errors = slog.New(slog.DiscardHandler)
	}
	if cfg.TraceEndpoint != "" {
		url, err := trace.Endpoint(cfg.TraceEndpoint)
		if err != nil {
			return nil, fmt.Errorf("--trace-endpoint: %w", err)
		}
		resource := []trace.Attr{{Key: "service.name", Text: cfg.Service}, {Key: "service.version", Text: cfg.Version}}
		if o.tracer, err = trace.New(trace.Config{Ratio: cfg.TraceRatio, Exporter: cfg.Exporter(url, resource), Log: o.errors}); err != nil {
			return nil, fmt.Errorf("--trace-ratio: %w", err)
		}
	}
	if cfg.AccessLog != "" {
		var err error
		if o.log, err = accesslog.New(accesslog.Config{File: cfg.AccessLog, Format: cfg.AccessLogFormat, Log: o.errors}); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// Front is o as the front wants it: nil when there is nothing to observe.
func (o *Observer) Front() hop.Observer {
	if o.requests == nil && o.tracer == nil && o.log == nil {
		return nil
	}
	return o
}

// Begin decides about x's trace.
func (o *Observer) Begin(x *hop.Exchange) {
	if o.tracer != nil {
		begin(o.tracer, x)
	}
}

// End makes what is to be made of x.
func (o *Observer) End(x *hop.Exchange) {
	now := time.Now()
	if o.requests != nil {
		o.requests.Count(&meter.Request{Revision: x.Revision, Status: x.Resp.StatusCode(), Duration: now.Sub(x.Arrived), Waited: x.Queued, In: x.In, Out: x.Out, Cut: x.Cut})
	}
	if x.Trace.Sampled {
		o.tracer.Add(o.spans(x, now)...)
	}
	if o.log != nil {
		o.line(x, now)
	}
}

// Run takes spans and lines out of the process until ctx ends, and then what is left. It must end after the front has.
func (o *Observer) Run(ctx context.Context) error {
	var group errgroup.Group
	if o.tracer != nil {
		group.Go(func() error { return o.tracer.Run(ctx) })
	}
	if o.log != nil {
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
		group.Go(func() error { return o.log.Run(ctx) })
		group.Go(func() error { o.reopen(ctx, hup); return nil })
	}
	<-ctx.Done()
	return group.Wait()
}

// reopen makes room for logrotate: it moves the file away and sends SIGHUP.
func (o *Observer) reopen(ctx context.Context, hup <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			if err := o.log.Reopen(); err != nil {
				o.errors.Error("access log: it goes on in the old file", "error", err)
			}
		}
	}
}

// WriteMetrics writes what was counted in Prometheus' text format.
func (o *Observer) WriteMetrics(w io.Writer) error {
	var errs []error
	if o.requests != nil {
		errs = append(errs, o.requests.WriteMetrics(w))
	}
	if o.tracer != nil {
		errs = append(errs, o.tracer.WriteMetrics(w))
	}
	if o.log != nil {
		errs = append(errs, o.log.WriteMetrics(w))
	}
	return errors.Join(errs...)
}
