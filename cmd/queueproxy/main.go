// Command queueproxy is the sidecar in front of one instance of a function: hard concurrency limit, bounded queue, readiness,
// statistics, drain. Without flags it takes Knative's environment and opens Knative's ports; with --listen it stands alone, in front of anything
// that speaks HTTP/1.1, and opens only what it is told. docs/queueproxy.md has every flag, variable, port and format.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the build.
var version = "dev"

func main() {
	c, err := configure(os.Args[1:], os.LookupEnv, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "queueproxy:", err)
		os.Exit(2)
	case c.version:
		fmt.Println("queueproxy", version)
		return
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.logLevel}))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	// The second signal is taken as meant: it ends the process without a drain.
	context.AfterFunc(ctx, stop)
	s, err := start(c, log)
	if err == nil {
		fmt.Println(s.readyLine())
		err = s.run(ctx)
	}
	if err != nil {
		log.Error("queueproxy ends", "error", err)
		os.Exit(1)
	}
}
