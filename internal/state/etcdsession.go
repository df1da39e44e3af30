package state

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// revokeTimeout bounds the giving back of a lease; what it misses runs out by itself.
const revokeTimeout = 2 * time.Second

// etcdSession is a lease of etcd that the client keeps alive. The client closes its channel of answers when the lease is gone, and also
// when by its own clock a time to live has passed without an answer: then the server may have given the keys away.
type etcdSession struct {
	store  *etcd
	id     clientv3.LeaseID
	orphan context.CancelFunc // stops the keepalive
	done   chan struct{}

	closing sync.Once
	err     error // of the closing
}

func (s *etcd) Session(ctx context.Context, ttl time.Duration) (Session, error) {
	var id clientv3.LeaseID
	err := s.operation(ctx, func(ctx context.Context) error {
		r, err := s.client.Grant(ctx, int64(seconds(ttl)/time.Second))
		if err == nil {
			id = r.ID
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("new session: %w", err)
	}
	keeping, cancel := context.WithCancel(ctx)
	answers, err := s.client.KeepAlive(keeping, id)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("new session: %w", translate(err))
	}
	e := &etcdSession{store: s, id: id, orphan: cancel, done: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		cancel()
		return nil, ErrClosed
	}
	s.sessions[e] = struct{}{}
	s.running.Go(func() {
		for range answers {
		}
		cancel()
		close(e.done)
		s.mu.Lock()
		delete(s.sessions, e)
		s.mu.Unlock()
	})
	return e, nil
}

func (e *etcdSession) Done() <-chan struct{} { return e.done }

func (e *etcdSession) alive() error {
	select {
	case <-e.done:
		return ErrLeaseLost
	default:
		return nil
	}
}

func (e *etcdSession) Put(ctx context.Context, key string, value []byte, expect int64) (int64, error) {
	if err := e.alive(); err != nil {
		return 0, err
	}
	return e.store.write(ctx, write{key: key, value: value, expect: expect, lease: int64(e.id)})
}

func (e *etcdSession) Campaign(ctx context.Context, name, value string) (Leadership, error) {
	if err := e.alive(); err != nil {
		return nil, err
	}
	return notNil(campaign(ctx, e.store, int64(e.id), e.done, e.orphan, name, value))
}

func (e *etcdSession) Close() error {
	e.closing.Do(func() {
		e.orphan()
		<-e.done
		ctx, cancel := context.WithTimeout(context.Background(), revokeTimeout)
		defer cancel()
		e.err = e.store.operation(ctx, func(ctx context.Context) error {
			_, err := e.store.client.Revoke(ctx, e.id)
			return err
		})
		switch {
		case errors.Is(e.err, ErrLeaseLost), errors.Is(e.err, ErrClosed):
			e.err = nil
		case errors.Is(e.err, context.DeadlineExceeded):
			e.err = fmt.Errorf("close session: %w", ErrUnavailable)
		}
	})
	return e.err
}
