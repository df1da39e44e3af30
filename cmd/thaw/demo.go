package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/cmd/thaw/demo"
	"github.com/thawrun/thaw/cmd/thaw/demonet"
	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// newDemoCommand is `thaw demo`.
func newDemoCommand(env *verbs.Env) *cobra.Command {
	cfg := demo.Config{Out: env.Stdout, Version: env.Version}
	verbose := false
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Watch a function wake from zero, scale, change its version and go back to sleep",
		Long: `Starts everything in this process with a throw-away data folder, deploys a sample, wakes it from zero, bursts it with
vegeta, prints the waterfall of the cold start and the scaling as it happens, and ends with a summary. It needs
neither root nor Docker and takes less than a minute.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if verbose {
				cfg.Log = env.Stderr
			}
			go keepSmall(cmd.Context())
			return demo.Run(cmd.Context(), cfg)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&cfg.Keep, "keep", false, "leave it running afterwards, on 127.0.0.1:8080 and 127.0.0.1:8081 unless told otherwise")
	f.StringVar(&cfg.Listen, "listen", "", "address of the ingress (default: a free port)")
	f.StringVar(&cfg.API, "api", "", "address of the API server (default: a free port)")
	f.BoolVarP(&verbose, "verbose", "v", false, "show the server's log")
	cmd.AddCommand(newDemoNetCommand(env))
	return cmd
}

// newDemoNetCommand is `thaw demo net`.
func newDemoNetCommand(env *verbs.Env) *cobra.Command {
	cfg := demonet.Config{Out: env.Stdout}
	cmd := &cobra.Command{
		Use:   "net",
		Short: "Watch functions reach two tenants' networks with the same addresses, through a failover",
		Long: `Makes two workers, a pair of gateways, and two tenants with the same addresses out of network namespaces (Linux, root), pulls all
cables of the active gateway while connections talk, and shows three ways into a tenant's network side by side. Nothing is left when it ends.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return demonet.Run(cmd.Context(), cfg) },
	}
	cmd.Flags().DurationVar(&cfg.Delay, "eni-delay", 2*time.Second, "what a cloud would take to make a NIC, for the comparison")
	return cmd
}

// newDemoFunction is the demo's sample function: this program in another role, so that the demo needs nothing else.
func newDemoFunction() *cobra.Command {
	return &cobra.Command{
		Use: demo.Function, Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return demo.RunFunction(cmd.Context()) },
	}
}
