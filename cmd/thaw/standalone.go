package main

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/cmd/thaw/standalone"
	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/control/apiserver"
)

// newStandaloneCommands are the hops that stand alone.
func newStandaloneCommands(env *verbs.Env) []*cobra.Command {
	router := &cobra.Command{
		Use:   "router --static HOST=ADDR",
		Short: "Run a router alone, in front of fixed addresses",
		Long: `Passes requests on by host to fixed addresses, without etcd and without instances of its own. It refuses malformed
requests, stamps and cleans headers, streams both ways, and drains on SIGTERM.`,
		Example: "  thaw router --listen 127.0.0.1:8000 --static 'a.example=127.0.0.1:9001' --static '*=127.0.0.1:9000'",
	}
	activator := &cobra.Command{
		Use:   "activator --static HOST=ADDR",
		Short: "Run an activator alone: a bounded queue in front of fixed addresses",
		Long: `As thaw router, with a limit of concurrent requests for each address and one bounded queue in order of arrival for each
host. Nothing is started: the addresses are taken to be there.`,
		Example: "  thaw activator --listen 127.0.0.1:8000 --static '*=127.0.0.1:9000' --concurrency 10",
	}
	for _, cmd := range []*cobra.Command{router, activator} {
		var cfg standalone.Config
		allowRemote := false
		cfg.Activator = cmd == activator
		cmd.Args = cobra.NoArgs
		cmd.RunE = func(cmd *cobra.Command, _ []string) error {
			if err := apiserver.CheckListen(cfg.Listen, allowRemote); err != nil {
				return err
			}
			cfg.Log = slog.New(slog.NewTextHandler(env.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
			return standalone.Run(cmd.Context(), cfg, func(addr string) {
				fmt.Fprintf(env.Stdout, "thaw %s ready listen=%s\n", cmd.Name(), addr)
			})
		}
		f := cmd.Flags()
		f.StringVar(&cfg.Listen, "listen", "127.0.0.1:8080", "address to listen on")
		f.StringArrayVar(&cfg.Static, "static", nil, "HOST=ADDR:PORT; may be repeated; * stands for every other host")
		f.BoolVar(&allowRemote, "allow-remote", false, "let --listen be other than a loopback address")
		f.DurationVar(&cfg.Drain, "drain", 15*time.Second, "how long requests may take to end after SIGTERM")
		if cfg.Activator {
			f.IntVar(&cfg.Concurrency, "concurrency", 0, "requests at once for each address; 0 = no limit")
			f.IntVar(&cfg.Queue, "queue", 10_000, "requests that may wait for each host")
			f.DurationVar(&cfg.MaxWait, "max-wait", 300*time.Second, "how long a request may wait")
		}
	}
	return []*cobra.Command{router, activator}
}
