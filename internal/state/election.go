package state

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// electionRoot is the folder of all elections: a candidate is a key <root><name>/<lease id> under its session's lease, its
// create revision is its place in the queue, and the lowest one leads.
const electionRoot = "/thaw/elections/"

// resignTimeout bounds the clean-up after a campaign whose context has ended; what it misses goes with the lease.
const resignTimeout = 2 * time.Second

// fence makes a write conditional on a candidacy: the key must still be the one that was made at created. Once the lease ends the key
// is gone, and a candidacy made later under the same key has another create revision.
type fence struct {
	key     string
	created int64
}

// fencedStore is what an election needs of a store. Both stores have it, so there is one election for both.
type fencedStore interface {
	Store
	// write is Put (delete: Delete) under a lease (0: none) and, unless f is nil, only while f holds (else ErrNotLeader).
	write(ctx context.Context, w write) (int64, error)
}

// write is one conditional change of one key.
type write struct {
	key    string
	value  []byte
	delete bool
	expect int64
	lease  int64
	fence  *fence
}

// check refuses what no store takes.
func (w write) check() error {
	switch {
	case w.expect < Any, w.delete && w.expect == 0:
		return fmt.Errorf("%w: expected revision %d of %q", ErrBadRevision, w.expect, w.key)
	case len(w.value) > MaxValueBytes:
		return fmt.Errorf("%w: %q has %d bytes, at most %d are taken", ErrTooLarge, w.key, len(w.value), MaxValueBytes)
	}
	return nil
}

// Leader returns the candidacy that leads the named election: its value and, as Created, the fence. ErrNotFound: nobody.
func Leader(ctx context.Context, s Store, name string) (KV, error) {
	candidates, _, err := s.List(ctx, electionRoot+name+"/")
	if err != nil {
		return KV{}, err
	}
	if len(candidates) == 0 {
		return KV{}, fmt.Errorf("%w: nobody leads %s", ErrNotFound, name)
	}
	return slices.MinFunc(candidates, func(a, b KV) int { return int(a.Created - b.Created) }), nil
}

// campaign enters the election with the given lease and waits until it leads. lost is closed when the lease ends.
func campaign(ctx context.Context, s fencedStore, lease int64, lost <-chan struct{}, name, value string) (*leadership, error) {
	prefix := electionRoot + name + "/"
	key := fmt.Sprintf("%s%016x", prefix, lease)
	_, err := s.write(ctx, write{key: key, value: []byte(value), expect: 0, lease: lease})
	if err != nil && !errors.Is(err, ErrExists) { // it exists: we stand already, perhaps by a write that seemed to fail
		return nil, fmt.Errorf("enter election %s: %w", name, err)
	}
	l, err := await(ctx, s, lost, prefix, key)
	if err != nil {
		// The wait is over but the candidacy would go on to win: take it back.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignTimeout)
		defer cancel()
		_, _ = s.write(ctx, write{key: key, delete: true, expect: Any})
		return nil, fmt.Errorf("election %s: %w", name, err)
	}
	return l, nil
}

// await returns once key is the oldest under prefix.
func await(ctx context.Context, s fencedStore, lost <-chan struct{}, prefix, key string) (*leadership, error) {
	for {
		candidates, rev, err := s.List(ctx, prefix)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(candidates, func(kv KV) bool { return kv.Key == key })
		if i < 0 {
			return nil, ErrLeaseLost
		}
		mine := candidates[i]
		if !slices.ContainsFunc(candidates, func(kv KV) bool { return kv.Created < mine.Created }) {
			return &leadership{store: s, fence: fence{key: key, created: mine.Created}}, nil
		}
		if err := awaitDeletion(ctx, s, lost, prefix, rev); err != nil {
			return nil, err
		}
	}
}

// awaitDeletion returns after some key under prefix has been deleted since rev, or may have been.
func awaitDeletion(ctx context.Context, s fencedStore, lost <-chan struct{}, prefix string, rev int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, reason := s.Watch(ctx, prefix, rev)
	for {
		select {
		case e, ok := <-events:
			if !ok && errors.Is(reason(), ErrCompacted) {
				return nil
			}
			if !ok {
				return reason()
			}
			if e.Deleted {
				return nil
			}
		case <-lost:
			return ErrLeaseLost
		}
	}
}

// leadership writes with the fence of its candidacy.
type leadership struct {
	store fencedStore
	fence fence
}

func (l *leadership) Put(ctx context.Context, key string, value []byte, expect int64) (int64, error) {
	return l.store.write(ctx, write{key: key, value: value, expect: expect, fence: &l.fence})
}

func (l *leadership) Delete(ctx context.Context, key string, expect int64) (int64, error) {
	return l.store.write(ctx, write{key: key, delete: true, expect: expect, fence: &l.fence})
}

func (l *leadership) Resign(ctx context.Context) error {
	_, err := l.store.write(ctx, write{key: l.fence.key, delete: true, expect: Any, fence: &l.fence})
	if errors.Is(err, ErrNotLeader) {
		return nil // somebody else leads, or nobody: that was the wish
	}
	return err
}
