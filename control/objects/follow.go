package objects

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/state"
)

// retry is the pause after a list or a watch that failed.
const retry = time.Second

// Follower is told what there is. Its functions are called from one goroutine; any may be nil.
type Follower struct {
	Set    func(api.Object) // it is there, or has changed; it may be told again unchanged
	Remove func(api.Object) // it is gone; its last known form
	Synced func()           // once: everything that there was has been told
	Log    *slog.Logger     // nil = none
}

// Follow tells f of all objects of a kind and of their changes until ctx ends. While the store does not answer, what was told holds.
func (s *Store) Follow(ctx context.Context, k *api.Kind, f Follower) error {
	if f.Log == nil {
		f.Log = slog.New(slog.DiscardHandler)
	}
	known := map[[2]string]api.Object{}
	for ctx.Err() == nil {
		err := s.followOnce(ctx, k, &f, known)
		if ctx.Err() != nil || errors.Is(err, state.ErrCompacted) {
			continue
		}
		f.Log.Warn("objects cannot be read; what is known goes on", "kind", k.Plural, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
	return nil
}

func (s *Store) followOnce(ctx context.Context, k *api.Kind, f *Follower, known map[[2]string]api.Object) error {
	list, rev, err := s.List(ctx, k, "")
	if err != nil {
		return err
	}
	set := func(o api.Object) {
		known[[2]string{o.Meta().Namespace, o.Meta().Name}] = o
		if f.Set != nil {
			f.Set(o)
		}
	}
	remove := func(o api.Object) {
		delete(known, [2]string{o.Meta().Namespace, o.Meta().Name})
		if f.Remove != nil {
			f.Remove(o)
		}
	}
	there := make(map[[2]string]bool, len(list))
	for _, o := range list {
		there[[2]string{o.Meta().Namespace, o.Meta().Name}] = true
		set(o)
	}
	for name, o := range known {
		if !there[name] {
			remove(o)
		}
	}
	if f.Synced != nil {
		f.Synced()
		f.Synced = nil
	}
	events, reason := s.Watch(ctx, k, "", rev)
	for e := range events {
		switch e.Type {
		case Bookmark:
		case Deleted:
			remove(e.Object)
		default:
			set(e.Object)
		}
	}
	return reason()
}
