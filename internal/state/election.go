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

// firmTimeout bounds the entry into an election and the withdrawal from it, which go on when the context of the campaign has ended.
const firmTimeout = 5 * time.Second

// retryPause is between two looks of a campaign at a store that does not answer.
const retryPause = 200 * time.Millisecond

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

// campaign enters the election with the given lease and waits until it leads. lost is closed when the lease ends; abandon stops keeping
// it alive.
//
// A candidacy that nobody knows of would win some day and keep everybody else out for as long as its session lives. So the entry does not
// end with ctx, which would leave open whether it happened, and a candidacy that cannot be withdrawn takes the session with it.
func campaign(ctx context.Context, s fencedStore, lease int64, lost <-chan struct{}, abandon func(), name, value string) (*leadership, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("election %s: %w", name, err)
	}
	firmly := func(w write) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), firmTimeout)
		defer cancel()
		_, err := s.write(ctx, w)
		return err
	}
	prefix := electionRoot + name + "/"
	key := fmt.Sprintf("%s%016x", prefix, lease)
	err := firmly(write{key: key, value: []byte(value), expect: 0, lease: lease})
	switch {
	case err == nil, errors.Is(err, ErrExists): // we stand already, perhaps by a write that seemed to fail
	case errors.Is(err, ErrLeaseLost), errors.Is(err, ErrClosed), errors.Is(err, ErrDenied), errors.Is(err, ErrFull), errors.Is(err, ErrTooLarge):
		return nil, fmt.Errorf("enter election %s: %w", name, err)
	default:
		abandon()
		return nil, fmt.Errorf("enter election %s: %w", name, err)
	}
	l, err := await(ctx, s, lost, prefix, key)
	if err == nil {
		return l, nil
	}
	if e := firmly(write{key: key, delete: true, expect: Any}); e != nil && !errors.Is(e, ErrNotFound) {
		abandon()
	}
	return nil, fmt.Errorf("election %s: %w", name, err)
}

// await returns once key is the oldest under prefix. While the store does not answer it waits too: the session knows how long it may.
func await(ctx context.Context, s fencedStore, lost <-chan struct{}, prefix, key string) (*leadership, error) {
	for {
		l, rev, err := leads(ctx, s, prefix, key)
		if l != nil {
			return l, nil
		}
		if err == nil {
			err = awaitDeletion(ctx, s, lost, prefix, rev)
		}
		switch {
		case err == nil:
		case !errors.Is(err, ErrUnavailable):
			return nil, err
		default:
			select {
			case <-time.After(retryPause):
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			case <-lost:
				return nil, ErrLeaseLost
			}
		}
	}
}

// leads looks whether key is the oldest under prefix, at the revision that it returns.
func leads(ctx context.Context, s fencedStore, prefix, key string) (*leadership, int64, error) {
	candidates, rev, err := s.List(ctx, prefix)
	if err != nil {
		return nil, 0, err
	}
	i := slices.IndexFunc(candidates, func(kv KV) bool { return kv.Key == key })
	if i < 0 {
		return nil, rev, ErrLeaseLost
	}
	mine := candidates[i].Created
	if slices.ContainsFunc(candidates, func(kv KV) bool { return kv.Created < mine }) {
		return nil, rev, nil
	}
	return &leadership{store: s, fence: fence{key: key, created: mine}}, rev, nil
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
