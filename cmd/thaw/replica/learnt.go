package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/shards"
	"github.com/thawrun/thaw/internal/state"
)

// learnt keeps what the planner has learnt in the shared state, a key or several for each shard, so that whoever owns the shard next goes on from
// there. It is a convenience: without it, or when it is damaged, everything is learnt again. What was learnt in the last minute before a crash is lost.
type learnt struct {
	store state.Store
	log   *slog.Logger
	wake  chan struct{} // capacity 1

	mu      sync.Mutex
	waiting map[int][]byte // to be written, by shard
}

// chunk bounds the value of a key, in bytes; a function has some hundred.
const chunk = state.MaxValueBytes / 2

// maxChunks bounds the keys of a shard: 64 MiB.
const maxChunks = 128

// loadWait bounds how long a new owner waits for what was learnt: requests wait for it to decide.
const loadWait = 500 * time.Millisecond

func newLearnt(s state.Store, log *slog.Logger) *learnt {
	return &learnt{store: s, log: log, wake: make(chan struct{}, 1), waiting: map[int][]byte{}}
}

func key(shard, i int) string { return fmt.Sprintf("/thaw/learnt/%02d/%03d", shard, i) }

// part is the shard whose owner decides about a revision.
func part(id api.RevisionID) int { return shards.OfNamespace(id) }

// save has b written soon, or what comes after it.
func (l *learnt) save(shard int, b []byte) {
	l.mu.Lock()
	l.waiting[shard] = b
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run writes until ctx ends.
func (l *learnt) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
			l.flush(ctx)
		}
	}
}

// flush writes what waits. What cannot be written is learnt again, or comes again with the next minute.
func (l *learnt) flush(ctx context.Context) {
	l.mu.Lock()
	waiting := l.waiting
	l.waiting = map[int][]byte{}
	l.mu.Unlock()
	for shard, b := range waiting {
		if err := l.write(ctx, shard, b); err != nil {
			l.log.Warn("what the autoscaler has learnt is not kept", "shard", shard, "error", err)
		}
	}
}

func (l *learnt) write(ctx context.Context, shard int, b []byte) error {
	if len(b) > maxChunks*chunk {
		return fmt.Errorf("%d bytes, at most %d are kept of a shard", len(b), maxChunks*chunk)
	}
	n := 0
	for c := range slices.Chunk(b, chunk) {
		if _, err := l.store.Put(ctx, key(shard, n), c, state.Any); err != nil {
			return err
		}
		n++
	}
	for ; ; n++ { // of a longer one before
		switch _, err := l.store.Delete(ctx, key(shard, n), state.Any); {
		case errors.Is(err, state.ErrNotFound):
			return nil
		case err != nil:
			return err
		}
	}
}

// load is what was saved of a shard last, nil = nothing. If some of its keys are of another time than others, its reader notices.
func (l *learnt) load(ctx context.Context, shard int) []byte {
	ctx, cancel := context.WithTimeout(ctx, loadWait)
	defer cancel()
	kvs, _, err := l.store.List(ctx, fmt.Sprintf("/thaw/learnt/%02d/", shard))
	if err != nil {
		l.log.Warn("what the autoscaler has learnt before cannot be read", "shard", shard, "error", err)
		return nil
	}
	var b []byte
	for _, kv := range kvs[:min(len(kvs), maxChunks)] {
		b = append(b, kv.Value...)
	}
	return b
}
