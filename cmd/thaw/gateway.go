package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/cmd/thaw/gateways"
	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/control/apiserver"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/netproxy/gateway"
)

// addGatewayRole makes `thaw gateway --config FILE` the role, beside the verbs about the objects of that name (thaw gateway list and so on).
func addGatewayRole(env *verbs.Env, root *cobra.Command) {
	for _, cmd := range root.Commands() {
		if cmd.Name() == "gateway" {
			gatewayRole(env, cmd)
		}
	}
}

func gatewayRole(env *verbs.Env, cmd *cobra.Command) {
	var path, level, metrics string
	var check, allowRemote bool
	var etcd state.Config
	cmd.Use = "gateway --config FILE [--etcd URL]"
	cmd.Long = cmd.Short + `: verbs about them, or, with --config, the role.

With --config it runs one of two nodes that have the gateway pairs of a file: for each a network namespace with a NIC in the tenant's subnet, to
which tunnels from the workers lead. Functions leave under the pair's address in the subnet (HAVIP), which moves to the other node within 3
to 4 advert intervals when this one fails, with their connections. What the file says, and what happens to packets, stands in netproxy.md.

With --etcd the pairs and the workers are those of a cluster, and the file says only what the node itself is: control gives each subnet that
functions need to two nodes with the same outer addresses. Traffic goes on while etcd does not answer.

SIGHUP reads the file again: pairs and workers may change, and what has not changed is not touched. SIGTERM hands the addresses over. Namespaces
and tunnels stay when it ends in any way, and the next process adopts them; an empty list of pairs takes them away. It needs root and Linux
5.10.`
	cmd.Example = "  thaw gateway --config /etc/thaw/gateway.yaml\n  thaw gateway --config /etc/thaw/gateway.yaml --etcd http://10.0.0.1:2379"
	cmd.Args = cobra.NoArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		log, err := logger(env, level)
		if err != nil {
			return err
		}
		if path == "" {
			path = env.Getenv("THAW_GATEWAY_CONFIG")
		}
		if path == "" {
			return &verbs.Failure{Err: errors.New("--config: name the file with the pairs, or give a verb"), Next: "thaw gateway --help", Code: verbs.ExitUsage}
		}
		load := func() (gateway.Config, error) {
			b, err := os.ReadFile(path)
			if err != nil {
				return gateway.Config{}, err
			}
			c, err := gateway.Parse(b)
			if err != nil {
				err = fmt.Errorf("%s: %w", path, err)
			}
			return c, err
		}
		if check {
			c, err := load()
			if err == nil {
				fmt.Fprintf(env.Stdout, "%s: %d pairs, %d workers\n", path, len(c.Pairs), len(c.Workers))
			}
			return err
		}
		var ln net.Listener
		where := ""
		if metrics != "" {
			if err := apiserver.CheckListen(metrics, allowRemote); err != nil {
				return fmt.Errorf("--metrics: %w", err)
			}
			if ln, err = net.Listen("tcp", metrics); err != nil {
				return fmt.Errorf("--metrics: %w", err)
			}
			defer ln.Close()
			where = " metrics=" + ln.Addr().String()
		}
		serve := gateway.Serve
		if len(etcd.Endpoints) > 0 {
			etcd.Password, etcd.Log = env.Getenv("THAW_ETCD_PASSWORD"), log
			store, err := state.Open(cmd.Context(), etcd)
			if err != nil {
				return err
			}
			defer store.Close()
			serve = func(ctx context.Context, o gateway.Options) error { return gateways.Serve(ctx, store, o) }
		}
		g, ctx := errgroup.WithContext(cmd.Context())
		g.Go(func() error {
			return serve(ctx, gateway.Options{
				Load: load, Again: hangups(ctx), Log: log, Out: env.Stdout,
				Ready: func(pairs int) { fmt.Fprintf(env.Stdout, "thaw gateway ready pairs=%d%s\n", pairs, where) },
				Measure: func(status func() (gateway.Status, error)) {
					if ln != nil {
						g.Go(func() error { return serveGatewayMetrics(ctx, ln, status) })
					}
				},
			})
		})
		return g.Wait()
	}
	f := cmd.Flags()
	f.StringVar(&path, "config", "", "YAML or JSON file with this node, the workers and the pairs (default $THAW_GATEWAY_CONFIG)")
	etcdFlags(f, &etcd)
	f.StringVar(&metrics, "metrics", "", "serve /metrics (Prometheus text) on this address")
	f.BoolVar(&allowRemote, "allow-remote", false, "let --metrics be other than a loopback address")
	f.BoolVar(&check, "check", false, "only say whether the file can be used")
	levelFlag(f, &level)
}

// hangups passes SIGHUP on until ctx ends.
func hangups(ctx context.Context) <-chan struct{} {
	in, out := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(in, syscall.SIGHUP)
	go func() {
		defer signal.Stop(in)
		for {
			select {
			case <-ctx.Done():
				return
			case <-in:
			}
			select {
			case <-ctx.Done():
				return
			case out <- struct{}{}:
			}
		}
	}()
	return out
}
