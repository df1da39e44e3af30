// Package state is the only importer of etcd: keys and values with revisions, compare-and-write, lists that are a consistent
// picture, watches that begin where a list ended, leases, sessions and elections. Open gives a store on an embedded server or on external
// endpoints, Memory one without any server for other packages' tests; one test suite runs on both.
package state

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// What callers branch on, with errors.Is.
var (
	ErrNotFound  = errors.New("state: no such key")
	ErrConflict  = errors.New("state: the key was changed meanwhile")
	ErrExists    = errors.New("state: the key exists already")
	ErrCompacted = errors.New("state: the history after this revision is gone") // watch again from a fresh list
	ErrClosed    = errors.New("state: closed")

	// ErrNotLeader is what a write through a Leadership fails with once somebody else leads. It is an ErrConflict too.
	ErrNotLeader = fmt.Errorf("state: no longer the leader: %w", ErrConflict)
	// ErrLeaseLost means that the session's lease has run out or was given back; its keys are gone.
	ErrLeaseLost = errors.New("state: the session's lease is lost")
	// ErrUnavailable means that the server did not answer in time. A write that fails with it may have happened all the same.
	ErrUnavailable = errors.New("state: the store does not answer")
	// ErrDenied means that the server refused the user, the password, or what the user tried to do.
	ErrDenied = errors.New("state: access denied")
	// ErrFull means that the server's space quota is used up: it still reads, but writes nothing.
	ErrFull = errors.New("state: the store is full")
	// ErrTooLarge means that a value has more than MaxValueBytes.
	ErrTooLarge = errors.New("state: the value is too large")
	// ErrBadRevision means an expected revision that no key can have, or 0 where 0 makes no sense.
	ErrBadRevision = errors.New("state: bad revision")
)

// MaxValueBytes bounds one value. etcd takes requests of 1.5 MiB; this leaves room for keys and comparisons.
const MaxValueBytes = 1 << 20

// KV is one key with its value. Value is shared with others: read it, do not change it.
type KV struct {
	Key      string
	Value    []byte
	Revision int64 // the store's revision of the last write (etcd's mod revision)
	Created  int64 // the store's revision of the first write since the key last did not exist; equal to Revision for a new key
}

// Event is one change. After a deletion Value and Created are those before it and Revision that of the deletion.
type Event struct {
	Deleted  bool
	KV            // Progress: only Revision counts
	Progress bool // no change: everything up to Revision has been delivered
}

// Any, as the expected revision of a write, means no comparison.
const Any int64 = -1

// Store is a revisioned key-value store. All methods may be called concurrently.
//
// Revisions start at 1 and each write adds one. Operations end with ErrUnavailable within the store's operation time-out (10 s
// unless configured) when the server does not answer, sooner if ctx ends.
type Store interface {
	// Get returns the value of key, or ErrNotFound.
	Get(ctx context.Context, key string) (KV, error)
	// List returns all keys that begin with prefix, sorted, and the revision of the store that the picture is of.
	List(ctx context.Context, prefix string) ([]KV, int64, error)
	// Put writes key if its revision is expect: Any = always, 0 = the key must not exist (else ErrExists), n = the key must be
	// unchanged since (else ErrConflict, or ErrNotFound if it is gone). It returns the revision of the write. A key that
	// was written through a session loses its lease by this.
	Put(ctx context.Context, key string, value []byte, expect int64) (int64, error)
	// Delete removes key under the same rules (0 is not allowed; Any on a missing key is ErrNotFound) and returns the revision
	// of the deletion.
	Delete(ctx context.Context, key string, expect int64) (int64, error)
	// Watch delivers every change of keys under prefix after revision from, in order, and progress marks from time to time; from 0 =
	// from now on: everything written after Watch returned. The channel is closed when ctx ends (the returned func then
	// tells its error), when the store is closed (ErrClosed), or after an error that the func tells: ErrCompacted means
	// list again. That is the answer too for a revision that the store has not reached yet (it had another life) and for
	// a watcher that reads too slowly: writers never wait for watchers, so unread events are bounded in number and bytes.
	// A change of several keys at once (the end of a session) gives several events of one revision.
	Watch(ctx context.Context, prefix string, from int64) (events <-chan Event, err func() error)
	// Compact forgets the history before rev: watches from an earlier revision get ErrCompacted.
	Compact(ctx context.Context, rev int64) error
	// Session returns a lease that is kept alive until it is closed or ctx ends. Closed, its keys vanish at once; when ctx ends
	// or the process dies, they vanish after ttl, which is rounded up to whole seconds.
	Session(ctx context.Context, ttl time.Duration) (Session, error)
	// Close ends all watches and sessions and, for an embedded server, the server. Further operations fail with ErrClosed.
	Close() error
}

// Session is a lease. Keys written through it vanish with it.
type Session interface {
	// Done is closed when the lease is lost or closed, or its context ends.
	Done() <-chan struct{}
	// Put writes key under the lease, with the comparison of Store.Put; ErrLeaseLost once the lease is gone.
	Put(ctx context.Context, key string, value []byte, expect int64) (int64, error)
	// Campaign blocks until this session leads the named election, and returns the fence: writes of the leader go through it and
	// fail with ErrNotLeader (an ErrConflict) once somebody else may lead. Candidates lead in the order in which they
	// came. A second Campaign of one session in one election is the same candidacy.
	Campaign(ctx context.Context, name, value string) (Leadership, error)
	// Close gives the lease back: its keys vanish at once.
	Close() error
}

// Leadership is a won election.
type Leadership interface {
	// Put writes key only while this leadership lasts, under no lease, with the comparison of Store.Put.
	Put(ctx context.Context, key string, value []byte, expect int64) (int64, error)
	// Delete removes key only while this leadership lasts, with the comparison of Store.Delete.
	Delete(ctx context.Context, key string, expect int64) (int64, error)
	// Resign gives the leadership up; the session stays.
	Resign(ctx context.Context) error
}
