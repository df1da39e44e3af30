package state

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// memoryHistory bounds the changes that a memory store remembers for watches from an earlier revision.
const memoryHistory = 64 << 10

// memory is a Store without a server: one sorted slice of keys, one log of changes, one lock.
type memory struct {
	progress time.Duration
	unread   int // bound of unread events of a watch

	mu       sync.Mutex // guards the rest
	keys     []entry    // sorted by key
	rev      int64
	log      []Event // changes in order, those up to floor forgotten
	floor    int64   // watches may start from here on
	leases   int64   // the last lease id given out
	sessions map[int64]*memorySession
	watchers map[*memoryWatcher]struct{}
	closed   bool
	running  sync.WaitGroup
}

type entry struct {
	KV
	lease int64
}

type memoryWatcher struct {
	prefix string
	*mailbox
}

// Memory returns an empty store that lives in this process alone. It has the semantics of the etcd store, which the same test
// suite checks, and is what other packages test against; it works inside a testing/synctest bubble.
func Memory() Store {
	return &memory{
		progress: defaultProgress,
		unread:   maxUnreadEvents,
		rev:      1, // as etcd: the empty store is revision 1
		floor:    1,
		sessions: map[int64]*memorySession{},
		watchers: map[*memoryWatcher]struct{}{},
	}
}

func (m *memory) find(key string) (int, bool) {
	return slices.BinarySearchFunc(m.keys, key, func(e entry, k string) int { return strings.Compare(e.Key, k) })
}

// usableLocked is the first check of every operation.
func (m *memory) usableLocked(ctx context.Context) error {
	if m.closed {
		return ErrClosed
	}
	return ctx.Err()
}

func (m *memory) Get(ctx context.Context, key string) (KV, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return KV{}, err
	}
	i, ok := m.find(key)
	if !ok {
		return KV{}, fmt.Errorf("%w: %q", ErrNotFound, key)
	}
	return m.keys[i].KV, nil
}

func (m *memory) List(ctx context.Context, prefix string) ([]KV, int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return nil, 0, err
	}
	var kvs []KV
	i, _ := m.find(prefix)
	for ; i < len(m.keys) && strings.HasPrefix(m.keys[i].Key, prefix); i++ {
		kvs = append(kvs, m.keys[i].KV)
	}
	return kvs, m.rev, nil
}

func (m *memory) Put(ctx context.Context, key string, value []byte, expect int64) (int64, error) {
	return m.write(ctx, write{key: key, value: value, expect: expect})
}

func (m *memory) Delete(ctx context.Context, key string, expect int64) (int64, error) {
	return m.write(ctx, write{key: key, delete: true, expect: expect})
}

func (m *memory) write(ctx context.Context, w write) (int64, error) {
	if err := w.check(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return 0, err
	}
	if f := w.fence; f != nil {
		if i, ok := m.find(f.key); !ok || m.keys[i].Created != f.created {
			return 0, fmt.Errorf("write %q: %w", w.key, ErrNotLeader)
		}
	}
	if w.lease != 0 && m.sessions[w.lease] == nil {
		return 0, fmt.Errorf("write %q: %w", w.key, ErrLeaseLost)
	}
	i, ok := m.find(w.key)
	switch {
	case ok && w.expect == 0:
		return 0, fmt.Errorf("%w: %q", ErrExists, w.key)
	case !ok && (w.expect > 0 || w.delete):
		return 0, fmt.Errorf("%w: %q", ErrNotFound, w.key)
	case w.expect > 0 && m.keys[i].Revision != w.expect:
		return 0, fmt.Errorf("%w: %q has revision %d, not %d", ErrConflict, w.key, m.keys[i].Revision, w.expect)
	}
	m.rev++
	if w.delete {
		m.publishLocked(m.removeLocked(i))
		return m.rev, nil
	}
	e := entry{KV: KV{Key: w.key, Value: bytes.Clone(w.value), Revision: m.rev, Created: m.rev}, lease: w.lease}
	if ok {
		e.Created = m.keys[i].Created
		m.keys[i] = e
	} else {
		m.keys = slices.Insert(m.keys, i, e)
	}
	m.publishLocked(Event{KV: e.KV})
	return m.rev, nil
}

// removeLocked takes the i-th key away at the current revision.
func (m *memory) removeLocked(i int) Event {
	e := Event{Deleted: true, KV: m.keys[i].KV}
	e.Revision = m.rev
	m.keys = slices.Delete(m.keys, i, i+1)
	return e
}

// publishLocked adds the changes of one revision to the log and to the mailboxes of those who watch.
func (m *memory) publishLocked(evs ...Event) {
	m.log = append(m.log, evs...)
	if len(m.log) > memoryHistory+memoryHistory/4 { // a quarter at a time: moving the log costs as much as it has entries
		m.compactLocked(m.log[len(m.log)-memoryHistory].Revision)
	}
	for w := range m.watchers {
		var mine []Event
		for _, e := range evs {
			if strings.HasPrefix(e.Key, w.prefix) {
				mine = append(mine, e)
			}
		}
		w.push(mine...)
	}
}

func (m *memory) Compact(ctx context.Context, rev int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return err
	}
	switch {
	case rev > m.rev:
		return fmt.Errorf("compact at %d: %w: the store is at %d", rev, ErrBadRevision, m.rev)
	case rev <= m.floor:
		return nil
	}
	m.compactLocked(rev)
	return nil
}

// compactLocked forgets the changes up to rev. As in etcd a watch from rev-1, whose first change is that of rev, is the
// earliest that is still served.
func (m *memory) compactLocked(rev int64) {
	m.floor = max(m.floor, rev-1)
	n := 0
	for n < len(m.log) && m.log[n].Revision <= m.floor {
		n++
	}
	m.log = append([]Event(nil), m.log[n:]...)
}

func (m *memory) Watch(ctx context.Context, prefix string, from int64) (<-chan Event, func() error) {
	w := &memoryWatcher{prefix: prefix, mailbox: newMailbox(m.unread, maxUnreadBytes)}
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.usableLocked(ctx)
	switch {
	case err != nil:
	case from < 0:
		err = fmt.Errorf("watch from %d: %w", from, ErrBadRevision)
	case from > m.rev, from != 0 && from < m.floor:
		err = fmt.Errorf("watch from %d: %w", from, ErrCompacted)
	}
	if err != nil {
		return failedWatch(err)
	}
	if from > 0 {
		i, _ := slices.BinarySearchFunc(m.log, from+1, func(e Event, r int64) int { return int(e.Revision - r) })
		var missed []Event
		for _, e := range m.log[i:] {
			if strings.HasPrefix(e.Key, prefix) {
				missed = append(missed, e)
			}
		}
		w.events += len(missed) // being behind at the start is not being slow
		w.limit += sizes(missed)
		w.push(missed...)
	}
	m.watchers[w] = struct{}{}
	m.running.Go(func() { m.serve(ctx, w) })
	return w.out, w.reason
}

// serve feeds one watcher until it ends, with a progress mark now and then.
func (m *memory) serve(ctx context.Context, w *memoryWatcher) {
	ctx, cancel := context.WithCancelCause(ctx)
	var marks sync.WaitGroup
	marks.Go(func() {
		tick := time.NewTicker(m.progress)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				m.mu.Lock() // no write comes between the revision and the mark
				w.push(Event{Progress: true, KV: KV{Revision: m.rev}})
				m.mu.Unlock()
			case <-ctx.Done():
				return
			}
		}
	})
	w.deliver(ctx)
	cancel(nil)
	marks.Wait()
	m.mu.Lock()
	delete(m.watchers, w)
	m.mu.Unlock()
}

func (m *memory) Session(ctx context.Context, ttl time.Duration) (Session, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return nil, err
	}
	m.leases++
	s := &memorySession{store: m, id: m.leases, ttl: seconds(ttl), done: make(chan struct{})}
	m.sessions[s.id] = s
	s.stop = context.AfterFunc(ctx, s.orphan)
	return s, nil
}

func (m *memory) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	for w := range m.watchers {
		w.end(ErrClosed)
	}
	for _, s := range m.sessions {
		s.endLocked()
	}
	m.mu.Unlock()
	m.running.Wait()
	return nil
}

// memorySession is a lease of a memory store. This process being alive keeps it alive.
type memorySession struct {
	store *memory
	id    int64
	ttl   time.Duration
	done  chan struct{}
	stop  func() bool // undoes the wait for the context

	// guarded by store.mu
	ended bool
	timer *time.Timer // of an orphan
}

func (s *memorySession) Done() <-chan struct{} { return s.done }

func (s *memorySession) Put(ctx context.Context, key string, value []byte, expect int64) (int64, error) {
	if err := s.alive(); err != nil {
		return 0, err
	}
	return s.store.write(ctx, write{key: key, value: value, expect: expect, lease: s.id})
}

func (s *memorySession) Campaign(ctx context.Context, name, value string) (Leadership, error) {
	if err := s.alive(); err != nil {
		return nil, err
	}
	return notNil(campaign(ctx, s.store, s.id, s.done, s.orphan, name, value))
}

func (s *memorySession) alive() error {
	select {
	case <-s.done:
		return ErrLeaseLost
	default:
		return nil
	}
}

// orphan is the end of the context: nobody keeps the lease alive any more, so it runs out.
func (s *memorySession) orphan() {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	if !s.ended {
		s.endLocked()
		s.timer = time.AfterFunc(s.ttl, s.expire)
	}
}

func (s *memorySession) endLocked() {
	if !s.ended {
		s.ended = true
		s.stop()
		close(s.done)
	}
	if s.timer != nil {
		s.timer.Stop()
	}
}

// expire removes the lease and its keys, all in one revision as etcd does.
func (s *memorySession) expire() {
	m := s.store
	m.mu.Lock()
	defer m.mu.Unlock()
	s.endLocked()
	if m.closed || m.sessions[s.id] == nil {
		return
	}
	delete(m.sessions, s.id)
	var evs []Event
	for i := len(m.keys) - 1; i >= 0; i-- {
		if m.keys[i].lease == s.id {
			if evs == nil {
				m.rev++
			}
			evs = append(evs, m.removeLocked(i))
		}
	}
	slices.Reverse(evs)
	if evs != nil {
		m.publishLocked(evs...)
	}
}

func (s *memorySession) Close() error {
	s.expire()
	return nil
}

// seconds rounds a time to live up to whole seconds, at least one: the grain of etcd's leases.
func seconds(ttl time.Duration) time.Duration {
	return max(time.Second, (ttl + time.Second - 1).Truncate(time.Second))
}

// failedWatch is the answer to a watch that cannot begin.
func failedWatch(err error) (<-chan Event, func() error) {
	c := make(chan Event)
	close(c)
	return c, func() error { return err }
}

// notNil keeps a nil *leadership from becoming a non-nil Leadership.
func notNil(l *leadership, err error) (Leadership, error) {
	if err != nil {
		return nil, err
	}
	return l, nil
}

func sizes(evs []Event) (n int) {
	for _, e := range evs {
		n += size(e)
	}
	return n
}
