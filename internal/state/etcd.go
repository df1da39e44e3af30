package state

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Keepalive of connections to an external etcd: a peer that vanished without a word is noticed after the sum. Servers refuse clients that ask
// more often than every 5 s.
const (
	pingAfter = 10 * time.Second
	pongLimit = 5 * time.Second
)

// etcd is a Store on an etcd client, which speaks to an embedded server in this process or to external ones.
type etcd struct {
	client  *clientv3.Client
	cfg     Config
	server  *server       // nil with an external etcd
	unread  int           // bound of unread events of a watch
	streams atomic.Uint64 // numbers the watches

	mu       sync.Mutex // guards the rest
	closed   bool
	watchers map[*mailbox]struct{}
	sessions map[*etcdSession]struct{}
	running  sync.WaitGroup // goroutines of watches and sessions; grows only while not closed
}

func openExternal(ctx context.Context, cfg Config) (Store, error) {
	t, err := cfg.tls()
	if err != nil {
		return nil, err
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            cfg.Endpoints,
		TLS:                  t,
		Username:             cfg.Username,
		Password:             cfg.Password,
		DialTimeout:          cfg.DialTimeout,
		DialKeepAliveTime:    pingAfter,
		DialKeepAliveTimeout: pongLimit,
		Logger:               zapTo(cfg.Log, nil, nil),
	})
	if err != nil {
		return nil, fmt.Errorf("open etcd at %s: %w", strings.Join(cfg.Endpoints, ", "), translate(err))
	}
	s := newEtcd(client, cfg, nil)
	ctx, cancel := context.WithTimeout(ctx, cfg.DialTimeout)
	defer cancel()
	err = s.within(ctx, cfg.DialTimeout, func(ctx context.Context) error { // an operation may have less
		_, err := s.client.Get(ctx, electionRoot, clientv3.WithCountOnly())
		return err
	})
	if err != nil {
		_ = s.Close()
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("%w within %s", ErrUnavailable, cfg.DialTimeout)
		}
		return nil, fmt.Errorf("open etcd at %s: %w", strings.Join(cfg.Endpoints, ", "), err)
	}
	return s, nil
}

func newEtcd(client *clientv3.Client, cfg Config, srv *server) *etcd {
	return &etcd{
		client:   client,
		cfg:      cfg,
		server:   srv,
		unread:   maxUnreadEvents,
		watchers: map[*mailbox]struct{}{},
		sessions: map[*etcdSession]struct{}{},
	}
}

// operation runs f within the time-out and gives its error one of this package's names.
func (s *etcd) operation(ctx context.Context, f func(context.Context) error) error {
	return s.within(ctx, s.cfg.OpTimeout, f)
}

func (s *etcd) within(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	if err := s.usable(); err != nil {
		return err
	}
	if ctx.Err() != nil { // the embedded server may be faster than the notice of it
		return context.Cause(ctx)
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := f(limited)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	if u := s.usable(); u != nil {
		return u
	}
	return translate(err)
}

// usable is ErrClosed after Close, and the reason if the embedded server has failed.
func (s *etcd) usable() error {
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return ErrClosed
	}
	if s.server == nil {
		return nil
	}
	if err := s.server.failure(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}

// translate gives an error of the etcd client one of this package's names. etcd's errors are values that are compared, and gRPC's have
// codes; no text is read.
func translate(err error) error {
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	switch {
	case is(rpctypes.ErrCompacted):
		return ErrCompacted
	case is(rpctypes.ErrFutureRev):
		return fmt.Errorf("%w: %w", ErrBadRevision, err)
	case is(rpctypes.ErrLeaseNotFound):
		return ErrLeaseLost
	case is(rpctypes.ErrNoSpace):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case is(rpctypes.ErrRequestTooLarge):
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	case is(rpctypes.ErrAuthFailed, rpctypes.ErrPermissionDenied, rpctypes.ErrInvalidAuthToken, rpctypes.ErrUserEmpty,
		rpctypes.ErrUserNotFound, rpctypes.ErrAuthNotEnabled):
		return fmt.Errorf("%w: %w", ErrDenied, err)
	case is(context.DeadlineExceeded, context.Canceled, clientv3.ErrNoAvailableEndpoints):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	switch code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	case codes.Unauthenticated, codes.PermissionDenied:
		return fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return fmt.Errorf("state: etcd: %w", err)
}

func code(err error) codes.Code {
	var e rpctypes.EtcdError
	if errors.As(err, &e) {
		return e.Code()
	}
	return status.Code(err)
}

// revision asks for the store's revision now.
func (s *etcd) revision(ctx context.Context) (rev int64, err error) {
	err = s.operation(ctx, func(ctx context.Context) error {
		r, err := s.client.Get(ctx, electionRoot, clientv3.WithCountOnly())
		if err == nil {
			rev = r.Header.Revision
		}
		return err
	})
	return rev, err
}

func (s *etcd) Get(ctx context.Context, key string) (kv KV, err error) {
	err = s.operation(ctx, func(ctx context.Context) error {
		r, err := s.client.Get(ctx, key)
		if err == nil && len(r.Kvs) > 0 {
			kv = fromEtcd(r.Kvs[0])
		}
		return err
	})
	if err == nil && kv.Revision == 0 {
		err = fmt.Errorf("%w: %q", ErrNotFound, key)
	}
	return kv, err
}

func (s *etcd) List(ctx context.Context, prefix string) (kvs []KV, rev int64, err error) {
	err = s.operation(ctx, func(ctx context.Context) error {
		r, err := s.client.Get(ctx, prefix, clientv3.WithPrefix())
		if err != nil {
			return err
		}
		rev = r.Header.Revision
		for _, kv := range r.Kvs { // sorted by key: the default order of a range
			kvs = append(kvs, fromEtcd(kv))
		}
		return nil
	})
	return kvs, rev, err
}

func (s *etcd) Put(ctx context.Context, key string, value []byte, expect int64) (int64, error) {
	return s.write(ctx, write{key: key, value: value, expect: expect})
}

func (s *etcd) Delete(ctx context.Context, key string, expect int64) (int64, error) {
	return s.write(ctx, write{key: key, delete: true, expect: expect})
}

// write is one transaction: the comparisons and the change, or else a look at what stood in the way.
func (s *etcd) write(ctx context.Context, w write) (int64, error) {
	if err := w.check(); err != nil {
		return 0, err
	}
	var compare []clientv3.Cmp
	instead := []clientv3.Op{clientv3.OpGet(w.key, clientv3.WithKeysOnly())}
	if w.fence != nil {
		compare = append(compare, clientv3.Compare(clientv3.CreateRevision(w.fence.key), "=", w.fence.created))
		instead = append(instead, clientv3.OpGet(w.fence.key, clientv3.WithKeysOnly()))
	}
	switch {
	case w.expect > 0:
		compare = append(compare, clientv3.Compare(clientv3.ModRevision(w.key), "=", w.expect))
	case w.expect == 0:
		compare = append(compare, clientv3.Compare(clientv3.CreateRevision(w.key), "=", 0))
	case w.delete:
		compare = append(compare, clientv3.Compare(clientv3.CreateRevision(w.key), ">", 0))
	}
	change := clientv3.OpPut(w.key, string(w.value), clientv3.WithLease(clientv3.LeaseID(w.lease)))
	if w.delete {
		change = clientv3.OpDelete(w.key)
	}
	var r *clientv3.TxnResponse
	err := s.operation(ctx, func(ctx context.Context) (err error) {
		r, err = s.client.Txn(ctx).If(compare...).Then(change).Else(instead...).Commit()
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("write %q: %w", w.key, err)
	}
	if r.Succeeded {
		return r.Header.Revision, nil
	}
	if w.fence != nil {
		holder := r.Responses[1].GetResponseRange().Kvs
		if len(holder) == 0 || holder[0].CreateRevision != w.fence.created {
			return 0, fmt.Errorf("write %q: %w", w.key, ErrNotLeader)
		}
	}
	found := r.Responses[0].GetResponseRange().Kvs
	switch {
	case len(found) == 0:
		return 0, fmt.Errorf("%w: %q", ErrNotFound, w.key)
	case w.expect == 0:
		return 0, fmt.Errorf("%w: %q", ErrExists, w.key)
	}
	return 0, fmt.Errorf("%w: %q has revision %d, not %d", ErrConflict, w.key, found[0].ModRevision, w.expect)
}

func (s *etcd) Compact(ctx context.Context, rev int64) error {
	err := s.operation(ctx, func(ctx context.Context) error {
		_, err := s.client.Compact(ctx, rev)
		return err
	})
	switch {
	case errors.Is(err, ErrCompacted):
		return nil // somebody has done it already
	case err != nil:
		return fmt.Errorf("compact at %d: %w", rev, err)
	}
	return nil
}

// Close gives the sessions' leases back, ends the watches, and closes the client before the server: the other way round the server waits 6 s
// for it.
func (s *etcd) Close() error {
	var sessions []*etcdSession
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	for e := range s.sessions {
		sessions = append(sessions, e)
	}
	s.mu.Unlock()

	var wg sync.WaitGroup
	for _, e := range sessions {
		wg.Go(func() { _ = e.Close() }) // what cannot be given back runs out
	}
	wg.Wait()

	s.mu.Lock()
	s.closed = true
	for w := range s.watchers {
		w.end(ErrClosed)
	}
	for e := range s.sessions {
		e.orphan() // one that came in between
	}
	s.mu.Unlock()
	s.running.Wait()

	err := s.client.Close()
	if errors.Is(err, context.Canceled) {
		err = nil // the client calls its own end so
	}
	if s.server != nil {
		err = errors.Join(err, s.server.close())
	}
	return err
}
