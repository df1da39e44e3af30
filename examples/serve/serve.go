// Package serve is what the Go examples share: finding the listening socket and ending well. It is short enough to copy; a
// function needs nothing else of the platform.
package serve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// Listen returns the socket to serve on: the one that was handed over on descriptor 3 (LISTEN_FDS and LISTEN_PID, the
// protocol of systemd's socket activation), or else a new one on the port in PORT, 8080 if that is not set.
func Listen() (net.Listener, error) {
	if os.Getenv("LISTEN_FDS") == "1" && os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		f := os.NewFile(3, "listener")
		defer f.Close() // FileListener has its own copy
		ln, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("the socket on descriptor 3: %w", err)
		}
		return ln, nil
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	return net.Listen("tcp", net.JoinHostPort("", port))
}

// Run serves h until SIGTERM or SIGINT, then answers what is under way, for at most ten seconds, and returns.
func Run(h http.Handler) error {
	ln, err := Listen()
	if err != nil {
		return err
	}
	return On(ln, h)
}

// On is Run on a given socket.
func On(ln net.Listener, h http.Handler) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	if fd, err := strconv.Atoi(os.Getenv("READY_FD")); err == nil { // whoever asked for it hears that everything is set up
		f := os.NewFile(uintptr(fd), "ready")
		_, _ = f.WriteString("1")
		f.Close()
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		return err
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
