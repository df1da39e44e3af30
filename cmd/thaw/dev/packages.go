package dev

import (
	"context"
	"fmt"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/store"
)

const (
	sweepEvery = time.Hour
	// sweepAfter is how long a package that nothing refers to is kept: a deploy uploads first and refers later.
	sweepAfter = 24 * time.Hour
)

// openStore returns the store that packages are uploaded to; nil is the agent's own folder.
func openStore(url string) (store.Store, error) {
	if url == "" {
		return nil, nil
	}
	s, err := store.NewRemote(url)
	if err != nil {
		return nil, fmt.Errorf("--store: %w", err)
	}
	return s, nil
}

// sweepPackages removes packages that no revision refers to any more. A store of several nodes is not ours to sweep.
func (s *Server) sweepPackages(ctx context.Context) error {
	if s.cfg.Store != "" {
		return nil
	}
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if n, err := s.sweepNow(ctx, time.Now().Add(-sweepAfter)); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("packages that nothing uses could not be removed", "err", err)
		} else if n > 0 {
			s.cfg.Log.Info("packages that nothing uses were removed", "count", n)
		}
	}
}

func (s *Server) sweepNow(ctx context.Context, before time.Time) (int, error) {
	list, _, err := s.objects.List(ctx, api.Revisions, "")
	if err != nil {
		return 0, err
	}
	used := make(map[string]bool)
	for _, o := range list {
		rev := o.(*api.Revision)
		for _, c := range rev.Spec.Containers {
			used[c.Image] = true
		}
		for _, st := range rev.Status.ContainerStatuses {
			used[st.ImageDigest] = true
		}
	}
	for _, image := range s.images {
		used[image] = true
	}
	return s.agent.Packages().Sweep(ctx, before, func(image string) bool { return used[image] })
}
