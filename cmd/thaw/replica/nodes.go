package replica

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/thawrun/thaw/autoscaler/remote"
	"github.com/thawrun/thaw/internal/state"
)

// NodesPrefix is where the wishes of operators about nodes are: a key for each node that is not to be used as all others, with a Wish.
const NodesPrefix = "/thaw/nodes/"

// Wish is what is written about a node.
type Wish struct {
	Scheduling string `json:"scheduling"`
}

// What Wish.Scheduling may be; every other node is on.
const (
	SchedulingOn      = "on"
	SchedulingCordon  = "cordoned"
	SchedulingDrained = "draining"
)

// Wishes reads all of them.
func Wishes(ctx context.Context, s state.Store) (map[string]Wish, int64, error) {
	kvs, rev, err := s.List(ctx, NodesPrefix)
	wishes := map[string]Wish{}
	for _, kv := range kvs {
		var w Wish
		if json.Unmarshal(kv.Value, &w) == nil {
			wishes[strings.TrimPrefix(kv.Key, NodesPrefix)] = w
		}
	}
	return wishes, rev, err
}

// followNodes tells of the wishes at each change until ctx ends. While the state does not answer, the last ones hold.
func followNodes(ctx context.Context, s state.Store, told func(map[string]remote.Wish)) error {
	for ctx.Err() == nil {
		wishes, rev, err := Wishes(ctx, s)
		if err == nil {
			all := map[string]remote.Wish{}
			for name, w := range wishes {
				switch w.Scheduling {
				case SchedulingCordon:
					all[name] = remote.Cordon
				case SchedulingDrained:
					all[name] = remote.Drain
				}
			}
			told(all)
			err = awaitChange(ctx, s, rev)
		}
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
	return nil
}

// awaitChange returns after a wish has changed since rev.
func awaitChange(ctx context.Context, s state.Store, rev int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, reason := s.Watch(ctx, NodesPrefix, rev)
	for e := range events {
		if !e.Progress {
			return nil
		}
	}
	if err := reason(); !errors.Is(err, state.ErrCompacted) {
		return err
	}
	return nil
}
