package objects

import (
	"context"
	"sync"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/state"
)

// The types of events, as Kubernetes writes them.
const (
	Added    = "ADDED"
	Modified = "MODIFIED"
	Deleted  = "DELETED"
	Bookmark = "BOOKMARK"
)

// Event is one change of an object. With a Bookmark, Object is an empty one that has only kind, apiVersion and resourceVersion:
// everything up to Revision has been delivered. With Deleted it is the object's last form. Its resourceVersion is always Revision.
type Event struct {
	Type     string
	Object   api.Object
	Revision int64
}

// Watch delivers the changes of a kind in a namespace ("" = in all) after revision from (0 = from now on), under the rules of
// state.Store.Watch: the channel is closed when ctx ends or after an error that the returned func tells, and state.ErrCompacted
// means list again.
func (s *Store) Watch(ctx context.Context, k *api.Kind, namespace string, from int64) (<-chan Event, func() error) {
	out := make(chan Event)
	if namespace != "" {
		if err := checkSegment("namespace", namespace); err != nil {
			close(out)
			return out, func() error { return err }
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	in, reason := s.state.Watch(ctx, Prefix(k, namespace), from)
	var mu sync.Mutex
	var failed error // guarded by mu
	go func() {      // ends with in, which ends with ctx at the latest
		defer close(out)
		defer cancel(nil)
		for e := range in {
			ev, err := typed(k, e)
			if err != nil {
				mu.Lock()
				failed = err
				mu.Unlock()
				return
			}
			select {
			case out <- ev:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, func() error {
		mu.Lock()
		defer mu.Unlock()
		if failed != nil {
			return failed
		}
		return reason()
	}
}

// typed turns a change of a key into a change of an object.
func typed(k *api.Kind, e state.Event) (Event, error) {
	if e.Progress {
		o := k.New()
		o.Type().Kind, o.Type().APIVersion = k.Kind, k.APIVersion
		o.Meta().ResourceVersion = formatRevision(e.Revision)
		return Event{Type: Bookmark, Object: o, Revision: e.Revision}, nil
	}
	o, err := decode(k, e.KV)
	if err != nil {
		return Event{}, err
	}
	switch {
	case e.Deleted:
		return Event{Type: Deleted, Object: o, Revision: e.Revision}, nil
	case e.Created == e.Revision:
		return Event{Type: Added, Object: o, Revision: e.Revision}, nil
	}
	return Event{Type: Modified, Object: o, Revision: e.Revision}, nil
}
