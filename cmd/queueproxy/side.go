package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"time"

	"github.com/thawrun/thaw/queueproxy"
)

// adminHandler serves the hook that an instance's stop begins with.
func (s *server) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /wait-for-drain", s.waitForDrain)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if s.stopping.Load() {
			http.Error(w, "shutting down", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// waitForDrain makes the sidecar not ready at once and answers when the last request is out, so that a container runtime that calls it before
// stopping the function stops nothing under way. The drain itself begins with SIGTERM, which comes at the same time when the whole instance
// goes. When it does not come only the function's container is being restarted, and requests will be wanted again: the drain is taken back.
func (s *server) waitForDrain(w http.ResponseWriter, r *http.Request) {
	was := s.stopping.Swap(true)
	s.log.Info("drain by hook")
	var cancel <-chan time.Time
	if s.c.drainCancel > 0 {
		t := time.NewTimer(s.c.drainCancel)
		defer t.Stop()
		cancel = t.C
	}
	select {
	case <-s.terminated:
	case <-r.Context().Done():
		return
	case <-cancel:
		select {
		case <-s.terminated: // at the same moment
		default:
			if !was {
				s.stopping.Store(false)
			}
			// SIGTERM may come right between: it has the last word.
			select {
			case <-s.terminated:
				s.stopping.Store(true)
			default:
			}
			s.log.Info("drain taken back: no SIGTERM", "within", s.c.drainCancel)
			fmt.Fprintf(w, "not drained: no SIGTERM within %v\n", s.c.drainCancel)
			return
		}
	}
	select {
	case <-s.drained:
		fmt.Fprintln(w, "drained")
	case <-r.Context().Done():
	}
}

// stat is a report in JSON.
type stat struct {
	Namespace          string    `json:"namespace"`
	Revision           string    `json:"revision"`
	Instance           string    `json:"instance"`
	Time               time.Time `json:"time"`               // end of the period, normally one second
	Concurrency        float64   `json:"concurrency"`        // average over the period of requests inside
	ProxiedConcurrency float64   `json:"proxiedConcurrency"` // the part that came through an activator
	Requests           float64   `json:"requests"`           // that began in the period
	ProxiedRequests    float64   `json:"proxiedRequests"`
	Running            int       `json:"running"` // now, in the function
	Waiting            int       `json:"waiting"` // now, for a slot
	Draining           bool      `json:"draining"`
	Uptime             float64   `json:"uptimeSeconds"`
}

func (s *server) stat() stat {
	l := s.latest.Load()
	waiting := s.proxy.Waiting()
	return stat{
		Namespace: s.c.namespace, Revision: s.c.revision, Instance: s.c.instance, Time: l.Time,
		Concurrency: l.Concurrency, ProxiedConcurrency: l.ProxiedConcurrency, Requests: l.Requests, ProxiedRequests: l.ProxiedRequests,
		Running: max(0, s.proxy.InFlight()-waiting), Waiting: waiting, Draining: s.stopping.Load(), Uptime: time.Since(s.started).Seconds(),
	}
}

const textFormat = "text/plain; version=0.0.4; charset=utf-8"

// statsHandler serves the last report to an autoscaler.
func (s *server) statsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /stats", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(s.stat()) // fails only when the reader has left
	})
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", textFormat)
		_ = queueproxy.WriteReport(w, *s.latest.Load())
	})
	return mux
}

// metricsHandler serves the counters to an operator's collector.
func (s *server) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", textFormat)
		_ = queueproxy.WriteMetrics(w, []*queueproxy.Proxy{s.proxy})
		_ = s.watch.WriteMetrics(w)
		fmt.Fprintf(w, "# HELP process_start_time_seconds Start of the process since the epoch.\n# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds %.3f\n",
			float64(s.started.UnixMilli())/1000)
		fmt.Fprintf(w, "# HELP go_goroutines Goroutines that exist.\n# TYPE go_goroutines gauge\ngo_goroutines %d\n", runtime.NumGoroutine())
	})
	return mux
}
