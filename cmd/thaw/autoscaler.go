package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/autoscaler/replay"
	"github.com/thawrun/thaw/cmd/thaw/dev"
	"github.com/thawrun/thaw/cmd/thaw/replica"
	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/internal/state"
)

// newAutoscalerCommand is `thaw autoscaler`: one of several autoscalers, and below it what can be tried without a running system.
func newAutoscalerCommand(env *verbs.Env) *cobra.Command {
	var cfg replica.Config
	var st state.Config
	var scaling, level string
	cmd := &cobra.Command{
		Use:   "autoscaler",
		Short: "Run one of several autoscalers, or try its decisions",
		Long: `Runs an autoscaler that shares the revisions with the others at the same etcd: each shard has one owner by a lease, and
if that dies another one takes over within three seconds, without taking away an instance it knows too little about. Activators and node
agents report to all of them over streams. It prints one line when it is ready and gives its shards away on SIGTERM.`,
		Args:    cobra.NoArgs,
		Example: "  thaw autoscaler --etcd http://10.0.0.1:2379 --listen 10.0.0.5:8091 --name scaler-1",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(st.Endpoints) == 0 {
				return errors.New("--etcd: name the etcd that the autoscalers share; to try decisions use a subcommand (--help)")
			}
			var lv slog.Level
			if err := lv.UnmarshalText([]byte(level)); err != nil {
				return fmt.Errorf("--log-level %q: debug, info, warn or error", level)
			}
			cfg.Log = slog.New(slog.NewTextHandler(env.Stderr, &slog.HandlerOptions{Level: lv}))
			var err error
			if cfg.Scaling, err = dev.LoadScaling(scaling); err != nil {
				return err
			}
			if scaling != "" {
				cfg.Follow = func(ctx context.Context, apply func(autoscaler.Config)) error {
					return dev.FollowScaling(ctx, scaling, cfg.Log, apply)
				}
			}
			if cfg.Store, err = state.Open(cmd.Context(), st); err != nil {
				return err
			}
			defer cfg.Store.Close()
			return replica.Run(cmd.Context(), cfg, func(addr string) {
				fmt.Fprintf(env.Stdout, "thaw autoscaler ready listen=%s name=%s\n", addr, cfg.Name)
			})
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&st.Endpoints, "etcd", nil, "URLs of the shared etcd")
	f.StringVar(&cfg.Advertise, "advertise", "", "host that they reach this autoscaler at (default: that of --listen)")
	f.StringVar(&cfg.Listen, "listen", "127.0.0.1:8091", "address for activators and node agents; they are not authenticated, so keep it to a network of your own")
	f.StringVar(&cfg.Name, "name", "autoscaler-0", "name of this autoscaler, unique among them")
	f.StringVar(&scaling, "autoscaler-config", "", "YAML file with Knative's config-autoscaler keys; its changes are taken over")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error; the log goes to stderr")
	cmd.AddCommand(newReplayCommand(env), newSimCommand(env))
	return cmd
}

func newReplayCommand(env *verbs.Env) *cobra.Command {
	show := 3
	cmd := &cobra.Command{
		Use:   "replay FILE",
		Short: "Recompute recorded decisions of Knative's autoscaler and compare",
		Long: `Reads a recording of decisions (JSON lines, plain or gzip; - is standard input), puts every case and step to the
autoscaler, and prints where policies, averages or decisions differ, then how many were compared. The exit code is 1 if anything
differs or nothing was compared.`,
		Example: "  thaw autoscaler replay autoscaler/replay/testdata/kpa-decisions.jsonl.gz",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			in := env.Stdin
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return fmt.Errorf("recording: %w", err)
				}
				defer f.Close()
				in = f
			}
			res, err := replay.Compare(in, func(d replay.Difference) {
				switch {
				case d.Count <= show:
					fmt.Fprintln(env.Stdout, d)
				case d.Count == show+1:
					fmt.Fprintf(env.Stdout, "case %d: more differences are not shown\n", d.Case)
				}
			})
			fmt.Fprintf(env.Stdout, "%d cases, %d decisions compared, %d different\n", res.Cases, res.Decisions, res.Different)
			switch {
			case err != nil:
				return fmt.Errorf("%s: %w", args[0], err)
			case res.Different > 0:
				return fmt.Errorf("%s: %d of %d policies and decisions differ", args[0], res.Different, res.Cases+res.Decisions)
			case !res.Same():
				return fmt.Errorf("%s: nothing to compare (%d cases, %d decisions)", args[0], res.Cases, res.Decisions)
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&show, "show", show, "differences to print of each case")
	return cmd
}
