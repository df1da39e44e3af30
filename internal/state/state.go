// Package state is the only importer of etcd: keys and values with revisions, compare-and-write, lists that are a consistent
// picture, watches that begin where a list ended, leases, sessions and elections. Open gives a store on an embedded server or on external
// endpoints, Memory one without any server for other packages' tests; one test suite runs on both.
package state

import (
	"context"
	"errors"
	"time"
)

// What callers branch on.
var (
	ErrNotFound  = errors.New("state: no such key")
	ErrConflict  = errors.New("state: the key was changed meanwhile")
	ErrExists    = errors.New("state: the key exists already")
	ErrCompacted = errors.New("state: the history before this revision is gone") // watch again from a fresh list
	ErrClosed    = errors.New("state: closed")
)

// KV is one key with its value. Revision is the store's revision of its last write (etcd's mod revision).
type KV struct {
	Key      string
	Value    []byte
	Revision int64
}

// Event is one change. After a deletion Value is the last value before it and Revision that of the deletion.
type Event struct {
	Deleted  bool
	KV            // Progress: only Revision counts
	Progress bool // no change: everything up to Revision has been delivered
}

// Any, as the expected revision of a write, means no comparison.
const Any int64 = -1

// Store is a revisioned key-value store. All methods may be called concurrently.
type Store interface {
	// Get returns the value of key, or ErrNotFound.
	Get(ctx context.Context, key string) (KV, error)
	// List returns all keys that begin with prefix, sorted, and the revision of the store that the picture is of.
	List(ctx context.Context, prefix string) ([]KV, int64, error)
	// Put writes key if its revision is expect: Any = always, 0 = the key must not exist (else ErrExists), n = the key must be
	// unchanged since (else ErrConflict, or ErrNotFound if it is gone). It returns the revision of the write.
	Put(ctx context.Context, key string, value []byte, expect int64) (int64, error)
	// Delete removes key under the same rules (0 is not allowed) and returns the revision of the deletion.
	Delete(ctx context.Context, key string, expect int64) (int64, error)
	// Watch delivers every change of keys under prefix after revision from, in order, and progress marks from time to time; from 0 =
	// from now on. The channel is closed when ctx ends, or after an error that the returned func tells:
	// ErrCompacted means list again.
	Watch(ctx context.Context, prefix string, from int64) (events <-chan Event, err func() error)
	// Compact forgets the history before rev.
	Compact(ctx context.Context, rev int64) error
	// Session returns a lease that is kept alive until it is closed or ctx ends.
	Session(ctx context.Context, ttl time.Duration) (Session, error)
	// Close ends all watches and sessions and, for an embedded server, the server.
	Close() error
}

// Session is a lease. Keys written through it vanish with it.
type Session interface {
	// Done is closed when the lease is lost or closed.
	Done() <-chan struct{}
	// Put writes key under the lease, with the comparison of Store.Put.
	Put(ctx context.Context, key string, value []byte, expect int64) (int64, error)
	// Campaign blocks until this session leads the named election, and returns the fence: writes of the leader go through it and
	// fail with ErrConflict once somebody else leads.
	Campaign(ctx context.Context, name, value string) (Leadership, error)
	Close() error
}

// Leadership is a won election.
type Leadership interface {
	// Put writes key only while this leadership lasts.
	Put(ctx context.Context, key string, value []byte, expect int64) (int64, error)
	Resign(ctx context.Context) error
}
