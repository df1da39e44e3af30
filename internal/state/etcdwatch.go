package state

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// Back-off between attempts to watch again: the first after a break, doubled up to the last.
const (
	firstRewatch = 50 * time.Millisecond
	lastRewatch  = 2 * time.Second
)

func (s *etcd) Watch(ctx context.Context, prefix string, from int64) (<-chan Event, func() error) {
	if from < 0 {
		return failedWatch(fmt.Errorf("watch from %d: %w", from, ErrBadRevision))
	}
	// The question costs a tenth of a millisecond. It is what makes "from now on" begin before Watch returns, and finds a
	// revision of another life of the store, at which etcd would wait for ever.
	rev, err := s.revision(ctx)
	switch {
	case err != nil:
		return failedWatch(fmt.Errorf("watch %q: %w", prefix, err))
	case from > rev:
		return failedWatch(fmt.Errorf("watch from %d: the store is at %d: %w", from, rev, ErrCompacted))
	case from == 0:
		from = rev
	}
	w := newMailbox(s.unread, maxUnreadBytes)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return failedWatch(ErrClosed)
	}
	s.watchers[w] = struct{}{}
	s.running.Go(func() {
		ctx, cancel := context.WithCancelCause(ctx)
		var following sync.WaitGroup
		following.Go(func() { s.follow(ctx, w, prefix, from+1) })
		w.deliver(ctx)
		cancel(nil)
		following.Wait()
		s.mu.Lock()
		delete(s.watchers, w)
		s.mu.Unlock()
	})
	return w.out, w.reason
}

// follow fills the mailbox with the changes from revision next on until ctx or the mailbox ends. The client goes on by itself after a
// lost connection; the loop is for the rest, such as a member that lost its leader.
func (s *etcd) follow(ctx context.Context, w *mailbox, prefix string, next int64) {
	for pause := firstRewatch; ctx.Err() == nil; pause = min(2*pause, lastRewatch) {
		began := next
		var open bool
		next, open = s.followOnce(ctx, w, prefix, next)
		if !open {
			return
		}
		if next > began {
			pause = firstRewatch
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// followOnce is one watch of the client. It returns where the next one has to begin, and whether there may be one.
func (s *etcd) followOnce(ctx context.Context, w *mailbox, prefix string, next int64) (int64, bool) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx)) // ends the client's watch in any case
	defer cancel()
	// The client puts watches with the same metadata on one stream. Over the embedded server's streams, which hold 16 messages and no more,
	// client and server can then wait for each other for ever: seen when 50 watches ended at once. So each has its own.
	ctx = metadata.AppendToOutgoingContext(ctx, "thaw-watch", strconv.FormatUint(s.streams.Add(1), 10))
	answers := s.client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(next), clientv3.WithPrevKV())
	tick := time.NewTicker(s.cfg.Progress)
	defer tick.Stop()
	marked := true // since the last tick
	for {
		var a clientv3.WatchResponse
		var ok bool
		select {
		case a, ok = <-answers:
		case <-tick.C:
			if !marked { // the server says nothing to a watch that is ahead of all changes
				w.push(Event{Progress: true, KV: KV{Revision: next - 1}})
			}
			marked = false
			s.askForProgress(ctx)
			continue
		}
		if !ok {
			return next, true
		}
		if a.CompactRevision != 0 {
			w.end(fmt.Errorf("watch from %d: %w", next-1, ErrCompacted))
			return next, false
		}
		if err := a.Err(); err != nil {
			s.cfg.Log.Debug("watch interrupted", "prefix", prefix, "revision", next, "error", err)
			return next, true
		}
		if a.IsProgressNotify() {
			if rev := a.Header.Revision; rev >= next-1 {
				w.push(Event{Progress: true, KV: KV{Revision: rev}})
				next, marked = rev+1, true
			}
			continue
		}
		events := make([]Event, 0, len(a.Events))
		for _, e := range a.Events {
			if e.Type == mvccpb.Event_DELETE && e.PrevKv == nil {
				// The deletion is remembered but what was deleted is not.
				w.end(fmt.Errorf("watch from %d: %w", next-1, ErrCompacted))
				return next, false
			}
			events = append(events, eventFromEtcd(e))
		}
		if len(events) == 0 {
			continue
		}
		if !w.push(events...) {
			return next, false
		}
		next = events[len(events)-1].Revision + 1
	}
}

// askForProgress makes the server tell the watch of ctx how far it is: the client finds its stream by the metadata of ctx. The
// server's own marks would need a setting of the server that an external one may not have.
func (s *etcd) askForProgress(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_ = s.client.RequestProgress(ctx)
}

func fromEtcd(kv *mvccpb.KeyValue) KV {
	return KV{Key: string(kv.Key), Value: kv.Value, Revision: kv.ModRevision, Created: kv.CreateRevision}
}

func eventFromEtcd(e *clientv3.Event) Event {
	if e.Type != mvccpb.Event_DELETE {
		return Event{KV: fromEtcd(e.Kv)}
	}
	kv := fromEtcd(e.PrevKv)
	kv.Revision = e.Kv.ModRevision
	return Event{Deleted: true, KV: kv}
}
