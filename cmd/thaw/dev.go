package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/cmd/thaw/dev"
	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// newDevCommand is `thaw dev`: all parts in one process.
func newDevCommand(env *verbs.Env) *cobra.Command {
	var cfg dev.Config
	var level string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run everything in one process on this machine",
		Long: `Runs ingress, activator, autoscaler, API server and an embedded etcd in this one process, and functions as its processes.
Everything it knows lives in the data folder; after a crash it goes on from there, with the instances that still run.
It prints one line when it is ready and ends cleanly on SIGTERM or Ctrl-C.`,
		Args: cobra.NoArgs,
		Example: `  thaw dev
  thaw dev --listen 127.0.0.1:9000 --images examples/images.yaml`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var lv slog.Level
			if err := lv.UnmarshalText([]byte(level)); err != nil {
				return fmt.Errorf("--log-level %q: debug, info, warn or error", level)
			}
			cfg.Log = slog.New(slog.NewTextHandler(env.Stderr, &slog.HandlerOptions{Level: lv}))
			cfg.Version = env.Version
			dir, err := dataDir(cfg.Dir, env)
			if err != nil {
				return err
			}
			cfg.Dir = dir
			go keepSmall(cmd.Context())
			s, err := dev.Start(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			fmt.Fprintf(env.Stdout, "thaw dev ready listen=%s api=%s\n", s.Ingress, s.API)
			return s.Wait()
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Listen, "listen", "127.0.0.1:8080", "address of the ingress")
	f.StringVar(&cfg.API, "api", "127.0.0.1:8081", "address of the API server")
	f.StringVar(&cfg.Dir, "data", "", "data folder (default $THAW_DATA, else ~/.thaw)")
	f.StringVar(&cfg.Domain, "domain", "localhost", "public hosts are NAME.NAMESPACE.DOMAIN")
	f.StringVar(&cfg.ImagesFile, "images", "", "YAML map of image references, exact or by prefix (ending in *), to local code")
	f.StringVar(&cfg.Autoscaler, "autoscaler-config", "", "YAML file with Knative's config-autoscaler keys")
	f.BoolVar(&cfg.AllowRemote, "allow-remote", false, "let --listen and --api be other than loopback addresses")
	f.DurationVar(&cfg.MaxTimeout, "max-revision-timeout", 600*time.Second, "largest timeoutSeconds that a revision may have")
	f.DurationVar(&cfg.MaxWait, "max-wait", 300*time.Second, "how long a request may wait for a free instance")
	f.DurationVar(&cfg.Drain, "drain", 15*time.Second, "how long requests may take to end after SIGTERM")
	f.StringSliceVar(&cfg.Etcd, "etcd", nil, "URLs of an external etcd in place of the embedded one")
	f.StringVar(&cfg.EtcdConfig.CAFile, "etcd-ca", "", "certificates (PEM) to check the external etcd's with")
	f.StringVar(&cfg.EtcdConfig.CertFile, "etcd-cert", "", "client certificate (PEM) for the external etcd")
	f.StringVar(&cfg.EtcdConfig.KeyFile, "etcd-key", "", "key (PEM) of the client certificate")
	f.StringVar(&cfg.EtcdConfig.Username, "etcd-user", "", "user of the external etcd; the password is taken from THAW_ETCD_PASSWORD")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error; the log goes to stderr")
	cmd.PreRun = func(*cobra.Command, []string) { cfg.EtcdConfig.Password = env.Getenv("THAW_ETCD_PASSWORD") }
	return cmd
}

// dataDir finds the data folder: flag, then environment, then the home folder.
func dataDir(flag string, env *verbs.Env) (string, error) {
	if flag == "" {
		flag = env.Getenv("THAW_DATA")
	}
	if flag == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("no home folder for the data: %w; name one with --data", err)
		}
		flag = filepath.Join(home, ".thaw")
	}
	return filepath.Abs(flag)
}
