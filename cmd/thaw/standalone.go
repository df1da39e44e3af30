package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/cmd/thaw/cluster"
	"github.com/thawrun/thaw/cmd/thaw/standalone"
	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/control/apiserver"
)

// newStandaloneCommands are the hops that stand alone.
func newStandaloneCommands(env *verbs.Env) []*cobra.Command {
	router := &cobra.Command{
		Use:   "router --static HOST=ADDR | --etcd URL",
		Short: "Run a router: of a cluster, or alone in front of fixed addresses",
		Long: `With --static, passes requests on by host to fixed addresses, without etcd and without instances of its own. It refuses malformed
requests, stamps and cleans headers, streams both ways, and drains on SIGTERM. With --etcd it is one of the routers of a cluster: hosts lead to
revisions, and a request goes straight to an instance or to the activator that holds the revision's queue.`,
		Example: "  thaw router --etcd http://10.0.0.1:2379 --listen 0.0.0.0:80 --allow-remote --name router-1\n  thaw router --listen 127.0.0.1:8000 --static 'a.example=127.0.0.1:9001' --static '*=127.0.0.1:9000'",
	}
	activator := &cobra.Command{
		Use:   "activator --static HOST=ADDR | --etcd URL",
		Short: "Run an activator: of a cluster, or alone as a bounded queue in front of fixed addresses",
		Long: `With --static as thaw router, with a limit of concurrent requests for each address and one bounded queue in order of arrival for each
host. Nothing is started: the addresses are taken to be there. With --etcd it is one of the activators of a cluster: it holds the requests of
the revisions that are its share while the autoscaler starts instances. It trusts everybody who can reach it.`,
		Example: "  thaw activator --etcd http://10.0.0.1:2379 --listen 10.0.0.5:8082 --allow-remote --name activator-1\n  thaw activator --listen 127.0.0.1:8000 --static '*=127.0.0.1:9000' --concurrency 10",
	}
	for _, cmd := range []*cobra.Command{router, activator} {
		var cfg standalone.Config
		var tls tlsFlags
		var in cluster.Common // of a cluster
		allowRemote, shared, tlsDir, domain, level := false, false, "", "", ""
		cfg.Activator = cmd == activator
		cmd.Args = cobra.NoArgs
		cmd.RunE = func(cmd *cobra.Command, _ []string) error {
			var err error
			if cfg.TLS, err = tls.read(); err != nil {
				return err
			}
			cfg.TLS.Dir = tlsDir
			for _, l := range []struct{ flag, addr string }{{"--listen", cfg.Listen}, {"--tls-listen", cfg.TLS.Listen}, {"--metrics", cfg.Metrics}} {
				if l.addr == "" {
					continue
				}
				if err := apiserver.CheckListen(l.addr, allowRemote); err != nil {
					return fmt.Errorf("%s: %w", l.flag, err)
				}
			}
			if len(in.Etcd.Endpoints) > 0 {
				if len(cfg.Static) > 0 || cfg.Handover != "" {
					return errors.New("--etcd, or --static with --handover: not both")
				}
				in.Listen, in.Metrics, in.Drain, in.Observe = cfg.Listen, cfg.Metrics, cfg.Drain, cfg.Observe
				if err := prepare(env, &in, level); err != nil {
					return err
				}
				if cfg.Activator {
					return cluster.Activator(cmd.Context(), cluster.ActivatorConfig{Common: in, MaxWait: cfg.MaxWait}, ready(env, "activator", &in))
				}
				return cluster.Router(cmd.Context(), cluster.RouterConfig{Common: in, TLS: cfg.TLS, Domain: domain, Shared: shared}, ready(env, "router", &in))
			}
			cfg.Version = env.Version
			if cfg.Log, err = logger(env, level); err != nil {
				return err
			}
			return standalone.Run(cmd.Context(), cfg, func(listen, metrics string) {
				if metrics != "" {
					metrics = " metrics=" + metrics
				}
				fmt.Fprintf(env.Stdout, "thaw %s ready listen=%s%s\n", cmd.Name(), listen, metrics)
			})
		}
		f := cmd.Flags()
		f.StringVar(&cfg.Listen, "listen", "127.0.0.1:8080", "address to listen on")
		f.StringArrayVar(&cfg.Static, "static", nil, "HOST=ADDR:PORT; may be repeated; * stands for every other host; an activator takes several addresses, with commas")
		f.StringVar(&cfg.Protocol, "upstream-protocol", "h1", "what the addresses speak: h1, h2c (HTTP/2 without TLS, as gRPC), or auto: what each request came by, if the address takes h2c")
		f.BoolVar(&cfg.Hops, "hops", false, "the addresses are hops of Thaw (queueproxy, thaw activator): what they refuse goes to another one, or is answered as they said it")
		f.BoolVar(&allowRemote, "allow-remote", false, "let --listen, --tls-listen and --metrics be other than loopback addresses")
		f.StringVar(&cfg.Metrics, "metrics", "", "serve /metrics (Prometheus text), /healthz and /readyz (503 while draining) on this address")
		f.StringVar(&cfg.Handover, "handover", "", "path of a unix socket: a process started with the same path takes the listening sockets over")
		tls.add(cmd, false)
		f.StringVar(&tlsDir, "tls-dir", "", "folder for what --tls-local and --acme make")
		cfg.Observe.Flags(f)
		etcdFlags(f, &in.Etcd)
		f.StringVar(&in.Name, "name", cmd.Name()+"-0", "with --etcd: name of this process, unique among those of its role")
		f.StringVar(&in.Advertise, "advertise", "", "with --etcd: host that others reach this process at (default: that of --listen)")
		f.StringVar(&level, "log-level", "warn", "debug, info, warn or error; the log goes to stderr")
		f.DurationVar(&cfg.Drain, "drain", 15*time.Second, "how long requests may take to end after SIGTERM or a hand-over")
		if !cfg.Activator {
			f.BoolVar(&shared, "share-port", false, "with --etcd: other routers may listen on the same addresses; the kernel shares connections out among them (Linux)")
			f.StringVar(&domain, "domain", "localhost", "with --etcd: public hosts are NAME.NAMESPACE.DOMAIN; the same as control's")
		}
		if cfg.Activator {
			f.IntVar(&cfg.Concurrency, "concurrency", 0, "requests at once for each address; 0 = no limit")
			f.IntVar(&cfg.Queue, "queue", 10_000, "requests that may wait for each host")
			f.DurationVar(&cfg.MaxWait, "max-wait", 300*time.Second, "how long a request may wait")
		}
	}
	return []*cobra.Command{router, activator}
}
