package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// newHealthCommand is for health checks of containers, which have no other program to ask with.
func newHealthCommand(*verbs.Env) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "health URL...",
		Short: "Ask processes whether they are well: exit code 0 if all are",
		Long: `For health checks of containers whose image has nothing but this binary. An http:// URL has to answer with 200, a tcp://HOST:PORT has to
accept a connection.`,
		Args:    cobra.MinimumNArgs(1),
		Example: "  thaw health http://127.0.0.1:9100/readyz tcp://127.0.0.1:8091",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			for _, a := range args {
				if err := healthy(ctx, a); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 2*time.Second, "how long all answers together may take")
	return cmd
}

func healthy(ctx context.Context, target string) error {
	u, err := url.Parse(target)
	if err != nil || u.Host == "" {
		return fmt.Errorf("%q: want http://HOST:PORT/PATH or tcp://HOST:PORT", target)
	}
	switch u.Scheme {
	case "tcp":
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", u.Host)
		if err != nil {
			return err
		}
		return c.Close()
	case "http":
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", target, resp.Status)
		}
		return nil
	}
	return fmt.Errorf("%q: want http:// or tcp://", target)
}

// newHoldCommand does nothing: a container that runs it holds a network that others share.
func newHoldCommand(*verbs.Env) *cobra.Command {
	return &cobra.Command{
		Use:    "hold",
		Short:  "Do nothing until SIGTERM",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE:   func(cmd *cobra.Command, _ []string) error { <-cmd.Context().Done(); return nil },
	}
}
