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
	var tls tlsFlags
	var level string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run everything in one process on this machine",
		Long: `Runs ingress, activator, autoscaler, API server and an embedded etcd in this one process, and functions beside it: in sandboxes,
or as plain processes where those cannot be had.
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
			if cfg.TLS, err = tls.read(); err != nil {
				return err
			}
			if cfg.Provider == "" {
				cfg.Provider = env.Getenv("THAW_PROVIDER")
			}
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
	f.StringVar(&cfg.Store, "store", "", "URL of a package store (thaw store) in place of the data folder")
	f.Int64Var(&cfg.PackageMiB, "package-cache", 10<<10, "MiB that unpacked packages may take before unused ones go")
	f.StringVar(&cfg.Autoscaler, "autoscaler-config", "", "YAML file with Knative's config-autoscaler keys")
	f.BoolVar(&cfg.AllowRemote, "allow-remote", false, "let --listen, --tls-listen and --api be other than loopback addresses")
	tls.add(cmd, true)
	f.DurationVar(&cfg.MaxTimeout, "max-revision-timeout", 600*time.Second, "largest timeoutSeconds that a revision may have")
	f.DurationVar(&cfg.MaxWait, "max-wait", 300*time.Second, "how long a request may wait for a free instance")
	f.IntVar(&cfg.Held.Requests, "max-waiting", 10_000, "requests of one revision that may wait for a free instance")
	f.Int64Var(&cfg.Held.Bytes, "max-waiting-bytes", 64<<20, "what they may hold in memory, in bytes")
	f.IntVar(&cfg.Held.RequestsTotal, "max-waiting-total", 0, "requests of all revisions that may wait; 0 = 100,000, less with a small GOMEMLIMIT")
	f.Int64Var(&cfg.Held.BytesTotal, "max-waiting-bytes-total", 0, "what they may hold in memory, in bytes; 0 = 256 MiB, less with a small GOMEMLIMIT")
	f.DurationVar(&cfg.Drain, "drain", 15*time.Second, "how long requests may take to end after SIGTERM")
	f.StringVar(&cfg.Provider, "provider", "", "what runs functions: sandbox (Linux, root), process, or auto: sandboxes where they can be had, else processes; default $THAW_PROVIDER, else auto")
	f.IntVar(&cfg.Capacity, "capacity", 0, "units of 16 MiB that there are for instances; one that requests nothing takes one of them; 0 = what the machine has")
	f.BoolVar(&cfg.Networks, "networks", false, "functions may join tenants' networks: this machine is also both nodes of all gateway pairs (Linux, root)")
	f.StringSliceVar(&cfg.Share, "share", nil, "folders of this machine that functions in sandboxes may read")
	f.DurationVar(&cfg.FrozenFor, "frozen-for", 5*time.Minute, "how long an idle instance is kept frozen, ready to go on within a millisecond; 0 = it ends at once")
	f.IntVar(&cfg.FrozenMax, "frozen-max", 500, "idle instances that are kept frozen; beyond that the oldest end")
	f.Int64Var(&cfg.FrozenMiB, "frozen-memory", 0, "MiB that they may take; 0 = a tenth of the machine's memory")
	f.StringSliceVar(&cfg.Etcd, "etcd", nil, "URLs of an external etcd in place of the embedded one")
	f.StringVar(&cfg.EtcdConfig.CAFile, "etcd-ca", "", "certificates (PEM) to check the external etcd's with")
	f.StringVar(&cfg.EtcdConfig.CertFile, "etcd-cert", "", "client certificate (PEM) for the external etcd")
	f.StringVar(&cfg.EtcdConfig.KeyFile, "etcd-key", "", "key (PEM) of the client certificate")
	f.StringVar(&cfg.EtcdConfig.Username, "etcd-user", "", "user of the external etcd; the password is taken from THAW_ETCD_PASSWORD")
	cfg.Observe.Flags(f)
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
