// Package side is what a process of the platform shows those who look after it: /metrics, /healthz and /readyz, on an address of its own.
package side

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Server answers them. Make one with New.
type Server struct {
	mux  *http.ServeMux
	http *http.Server
}

// New returns a server; ready says whether the process takes requests.
func New(metrics http.Handler, ready func() bool) *Server {
	s := &Server{mux: http.NewServeMux()}
	answer := func(ok func() bool) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if !ok() {
				http.Error(w, "shutting down", http.StatusServiceUnavailable)
				return
			}
			_, _ = io.WriteString(w, "ok\n")
		}
	}
	s.mux.HandleFunc("GET /healthz", answer(func() bool { return true }))
	s.mux.HandleFunc("GET /readyz", answer(ready))
	s.mux.Handle("GET /metrics", metrics)
	s.http = &http.Server{Handler: s.mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10}
	return s
}

// Handle adds an endpoint; before Serve.
func (s *Server) Handle(pattern string, h http.Handler) { s.mux.Handle(pattern, h) }

// Serve answers on ln until Close or Shutdown.
func (s *Server) Serve(ln net.Listener) error {
	if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}

// Close ends it at once.
func (s *Server) Close() { _ = s.http.Close() }

// Shutdown ends it after the requests under way.
func (s *Server) Shutdown(ctx context.Context) { _ = s.http.Shutdown(ctx) }
