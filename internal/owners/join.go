package owners

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/thawrun/thaw/internal/state"
)

// Join makes a process a member of a group that shares nothing out, so that Members tells others of it, until ctx ends. Its entry
// lives as long as its lease: a process that dies, or stands still, is gone within the lease's time. When ctx ends it is gone at once.
func Join(ctx context.Context, s state.Store, group, name, addr string, ttl time.Duration, log *slog.Logger) error {
	if group == "" || name == "" || addr == "" || strings.Contains(name+group, "/") {
		return errors.New("owners: a group, a name (without a slash) and an address are required")
	}
	if ttl <= 0 {
		ttl = DefaultTTL
	}
	value, _ := json.Marshal(record{name, addr})
	var session state.Session
	for ctx.Err() == nil {
		next, err := s.Session(context.WithoutCancel(ctx), ttl) // the end of ctx gives it back in order
		if err == nil {
			if session != nil {
				_ = session.Close()
			}
			session = next
			_, err = session.Put(ctx, root(group)+"members/"+name, value, state.Any)
		}
		if err == nil {
			select {
			case <-ctx.Done():
			case <-session.Done():
				err = state.ErrLeaseLost
			}
		}
		if err != nil && ctx.Err() == nil {
			log.Warn("joining the others again", "group", group, "member", name, "error", fmt.Sprint(err))
			pause(ctx)
		}
	}
	if session != nil {
		_ = session.Close() // what it misses runs out by itself
	}
	return nil
}
