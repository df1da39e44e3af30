package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/control/apiserver"
	"github.com/thawrun/thaw/instance/store"
	"github.com/thawrun/thaw/instance/store/bucket"
)

// newStoreCommand is `thaw store`: the packages of a zone.
func newStoreCommand(env *verbs.Env) *cobra.Command {
	var listen, dir, from string
	var allowRemote bool
	cmd := &cobra.Command{
		Use:   "store --dir DIR",
		Short: "Run a package store for the nodes of a zone",
		Long: `Keeps packages as they were uploaded, by the SHA-256 of their bytes, and gives them to nodes ("thaw dev --store URL") over HTTP.
With --bucket the folder is a cache in front of a bucket of any service that speaks S3; its keys come from AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY. The store asks nobody who they are: it belongs on the network of the nodes and nowhere else.`,
		Args:    cobra.NoArgs,
		Example: "  thaw store --listen 127.0.0.1:8090 --dir /var/lib/thaw/store",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return errors.New("a folder for the packages is needed: --dir DIR")
			}
			if err := apiserver.CheckListen(listen, allowRemote); err != nil {
				return fmt.Errorf("--listen: %w", err)
			}
			var packages store.Store
			disk, err := store.OpenDisk(dir)
			if err != nil {
				return err
			}
			packages = disk
			if from != "" {
				far, err := bucket.Open(cmd.Context(), from)
				if err != nil {
					return err
				}
				packages = store.NewCache(disk, far)
			}
			log := slog.New(slog.NewTextHandler(env.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
			return serveStore(cmd.Context(), listen, store.Handler(packages, log), func(addr string) {
				fmt.Fprintf(env.Stdout, "thaw store ready listen=%s\n", addr)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:8090", "address to listen on")
	f.StringVar(&dir, "dir", os.Getenv("THAW_STORE_DIR"), "folder for the packages (default $THAW_STORE_DIR)")
	f.StringVar(&from, "bucket", "", "bucket behind the folder: s3://BUCKET/PREFIX?endpoint=HOST:PORT&region=REGION&insecure=true")
	f.BoolVar(&allowRemote, "allow-remote", false, "let --listen be other than a loopback address")
	return cmd
}

// serveStore serves until ctx ends, and lets transfers finish for 15 s.
func serveStore(ctx context.Context, listen string, h http.Handler, ready func(addr string)) error {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
	group, ended := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error {
		<-ended.Done()
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
		defer cancel()
		return srv.Shutdown(drain)
	})
	ready(ln.Addr().String())
	return group.Wait()
}
