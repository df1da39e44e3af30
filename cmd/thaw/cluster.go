package main

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/thawrun/thaw/cmd/thaw/cluster"
	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/internal/state"
)

// etcdFlags are how a role finds the shared state.
func etcdFlags(f *pflag.FlagSet, c *state.Config) {
	f.StringSliceVar(&c.Endpoints, "etcd", nil, "URLs of the etcd that the processes share")
	f.StringVar(&c.CAFile, "etcd-ca", "", "certificates (PEM) to check the etcd's with")
	f.StringVar(&c.CertFile, "etcd-cert", "", "client certificate (PEM) for the etcd")
	f.StringVar(&c.KeyFile, "etcd-key", "", "key (PEM) of the client certificate")
	f.StringVar(&c.Username, "etcd-user", "", "user of the etcd; the password is taken from THAW_ETCD_PASSWORD")
}

// commonFlags are those of every role but etcd and store.
func commonFlags(f *pflag.FlagSet, c *cluster.Common, role, listen, what string) {
	etcdFlags(f, &c.Etcd)
	f.StringVar(&c.Name, "name", role+"-0", "name of this process, unique among those of its role")
	f.StringVar(&c.Listen, "listen", listen, what)
	f.StringVar(&c.Advertise, "advertise", "", "host that others reach this process at (default: that of --listen)")
	f.StringVar(&c.Metrics, "metrics", "", "serve /metrics (Prometheus text), /healthz and /readyz (503 while draining) on this address")
	f.DurationVar(&c.Drain, "drain", 15*time.Second, "how long requests may take to end after SIGTERM")
}

// logger writes to standard error from a level on.
func logger(env *verbs.Env, level string) (*slog.Logger, error) {
	var lv slog.Level
	if err := lv.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: debug, info, warn or error", level)
	}
	return slog.New(slog.NewTextHandler(env.Stderr, &slog.HandlerOptions{Level: lv})), nil
}

func levelFlag(f *pflag.FlagSet, level *string) {
	f.StringVar(level, "log-level", "info", "debug, info, warn or error; the log goes to stderr")
}

// prepare completes what flags alone do not say.
func prepare(env *verbs.Env, c *cluster.Common, level string) (err error) {
	c.Etcd.Password = env.Getenv("THAW_ETCD_PASSWORD")
	c.Version = env.Version
	c.Log, err = logger(env, level)
	return err
}

// ready prints the one line by which a role says that it serves.
func ready(env *verbs.Env, role string, c *cluster.Common) func(listen, metrics string) {
	return func(listen, metrics string) {
		if metrics != "" {
			metrics = " metrics=" + metrics
		}
		fmt.Fprintf(env.Stdout, "thaw %s ready listen=%s%s name=%s\n", role, listen, metrics, c.Name)
	}
}

func newControlCommand(env *verbs.Env) *cobra.Command {
	var cfg cluster.ControlConfig
	var level string
	cmd := &cobra.Command{
		Use:   "control --etcd URL --store URL --data DIR",
		Short: "Run the API server and the reconcilers of a cluster",
		Long: `Answers the API and turns what it is told into what runs. Several may run at the same etcd: all answer, one reconciles, and
another one takes over within seconds. Traffic does not need it.`,
		Args:    cobra.NoArgs,
		Example: "  thaw control --etcd http://10.0.0.1:2379 --store http://10.0.0.1:8090 --data /var/lib/thaw --listen 127.0.0.1:8081",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := prepare(env, &cfg.Common, level); err != nil {
				return err
			}
			dir, err := dataDir(cfg.Dir, env)
			if err != nil {
				return err
			}
			cfg.Dir = dir
			return cluster.Control(cmd.Context(), cfg, ready(env, "control", &cfg.Common))
		},
	}
	f := cmd.Flags()
	commonFlags(f, &cfg.Common, "control", "127.0.0.1:8081", "address of the API")
	f.StringVar(&cfg.Dir, "data", "", "data folder (default $THAW_DATA, else ~/.thaw)")
	f.StringVar(&cfg.Store, "store", "", "URL of the package store of the nodes (thaw store)")
	f.StringVar(&cfg.ImagesFile, "images", "", "YAML map of image references, exact or by prefix (ending in *), to local code; the same as the agents'")
	f.StringVar(&cfg.Domain, "domain", "localhost", "public hosts are NAME.NAMESPACE.DOMAIN; the same as the routers'")
	f.IntVar(&cfg.URLPort, "url-port", 0, "port of the public URLs in the status of objects; 0 and 80 are left out")
	f.DurationVar(&cfg.MaxTimeout, "max-revision-timeout", 600*time.Second, "largest timeoutSeconds that a revision may have")
	levelFlag(f, &level)
	return cmd
}

func newAgentCommand(env *verbs.Env) *cobra.Command {
	var cfg cluster.AgentConfig
	var level string
	cmd := &cobra.Command{
		Use:   "agent --etcd URL --store URL --data DIR",
		Short: "Run the node agent of a cluster: instances, and a queue-proxy in front of each",
		Long: `Starts and stops instances on this machine as the autoscalers order, and tells routers and activators of them. It trusts everybody who can
reach its addresses: keep them to a network of the cluster's own. After kill -9 its instances live on, and the next agent with the same data
folder takes them over.`,
		Args:    cobra.NoArgs,
		Example: "  thaw agent --etcd http://10.0.0.1:2379 --store http://10.0.0.1:8090 --data /var/lib/thaw --listen 10.0.0.7:8092 --feed 10.0.0.7:8093 --name node-7",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := prepare(env, &cfg.Common, level); err != nil {
				return err
			}
			dir, err := dataDir(cfg.Dir, env)
			if err != nil {
				return err
			}
			cfg.Dir = dir
			if cfg.Provider == "" {
				cfg.Provider = env.Getenv("THAW_PROVIDER")
			}
			return cluster.Agent(cmd.Context(), cfg, ready(env, "agent", &cfg.Common))
		},
	}
	f := cmd.Flags()
	commonFlags(f, &cfg.Common, "agent", "127.0.0.1:8092", "address for requests to the instances here")
	f.StringVar(&cfg.Feed, "feed", "127.0.0.1:8093", "address of the streams by which routers, activators and control learn of the instances here")
	f.StringVar(&cfg.Dir, "data", "", "data folder (default $THAW_DATA, else ~/.thaw)")
	f.StringVar(&cfg.Store, "store", "", "URL of the package store of the nodes (thaw store)")
	f.StringVar(&cfg.ImagesFile, "images", "", "YAML map of image references, exact or by prefix (ending in *), to local code")
	f.Int64Var(&cfg.PackageMiB, "package-cache", 10<<10, "MiB that unpacked packages may take before unused ones go")
	f.StringVar(&cfg.Provider, "provider", "", "what runs functions: process, sandbox (Linux, root), or auto; default $THAW_PROVIDER, else as thaw dev")
	f.StringSliceVar(&cfg.Share, "share", nil, "folders of this machine that functions in sandboxes may read")
	f.IntVar(&cfg.Capacity, "capacity", 0, "units of 16 MiB that this node has for instances; one that requests nothing takes one of them; 0 = what the machine has")
	f.StringVar(&cfg.Network.Device, "net-device", "", "device towards the gateways of tenants' networks; without, functions with a subnet do not run here")
	f.StringVar(&cfg.Network.Prefix, "net-prefix", "100.64.0.0/22", "addresses of the functions here in tenants' networks: no other node's")
	f.StringVar(&cfg.Network.Address, "net-address", "", "this node's address on --net-device (default its first)")
	f.StringVar(&cfg.Network.Driver, "net-driver", "ebpf", "driver of the tunnels to the gateways: ebpf, kernel-gre, vxlan, ebpf-ipip or kernel-ipip")
	f.IntVar(&cfg.Network.Ready, "net-slots", 64, "places in tenants' networks that are kept ready: twice the largest burst of starts")
	levelFlag(f, &level)
	return cmd
}

func newEtcdCommand(env *verbs.Env) *cobra.Command {
	var cfg state.MemberConfig
	var level string
	cmd := &cobra.Command{
		Use:   "etcd --name NAME --data DIR",
		Short: "Run a member of the etcd that the processes of a cluster share",
		Long: `Runs etcd as it is, from this binary: any other etcd 3.5 or later does as well. With --cluster it is one of several members, which
all name the same list; without, it is alone.`,
		Args:    cobra.NoArgs,
		Example: "  thaw etcd --name etcd-1 --data /var/lib/thaw-etcd --listen 10.0.0.1:2379 --peers 10.0.0.1:2380 --cluster etcd-1=10.0.0.1:2380,etcd-2=10.0.0.2:2380,etcd-3=10.0.0.3:2380",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if cfg.Log, err = logger(env, level); err != nil {
				return err
			}
			if cfg.Dir == "" {
				return fmt.Errorf("--data: name a folder for the data")
			}
			return state.RunMember(cmd.Context(), cfg, func(client string) {
				fmt.Fprintf(env.Stdout, "thaw etcd ready listen=%s name=%s\n", client, cfg.Name)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Name, "name", "etcd-0", "name of this member")
	f.StringVar(&cfg.Dir, "data", "", "data folder")
	f.StringVar(&cfg.Client, "listen", "127.0.0.1:2379", "address for clients")
	f.StringVar(&cfg.Peer, "peers", "127.0.0.1:2380", "address for the other members")
	f.StringVar(&cfg.Advertise, "advertise", "", "host that others reach this member at (default: that of --listen and --peers)")
	f.StringSliceVar(&cfg.Cluster, "cluster", nil, "all members of a new cluster, as NAME=HOST:PORT of --peers")
	f.StringVar(&level, "log-level", "warn", "debug, info, warn or error; the log goes to stderr")
	return cmd
}
