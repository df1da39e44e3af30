package state

import (
	"context"
	"sync"
)

// Bounds of what one watcher may leave unread before it is told to list again.
const (
	maxUnreadEvents = 16 << 10
	maxUnreadBytes  = 64 << 20
)

// mailbox stands between a store and one watcher: the store never waits, the watcher reads a plain channel, and what lies between
// is bounded. A watcher that falls behind the bound loses its place (ErrCompacted), as one that asks for forgotten history does.
type mailbox struct {
	out  chan Event
	wake chan struct{} // holds one token when there is something new for deliver

	mu     sync.Mutex // guards the rest
	queue  []Event
	bytes  int
	ended  bool // nothing is accepted or delivered any more; queue is empty
	err    error
	events int // bound of len(queue)
	limit  int // bound of bytes
}

func newMailbox(events, bytes int) *mailbox {
	return &mailbox{out: make(chan Event), wake: make(chan struct{}, 1), events: events, limit: bytes}
}

// push hands over events and never blocks. It reports whether the mailbox still takes more.
func (m *mailbox) push(evs ...Event) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended {
		return false
	}
	for _, e := range evs {
		// Progress marks say the same as a later one: only the last of a row is worth keeping.
		if n := len(m.queue); e.Progress && n > 0 && m.queue[n-1].Progress {
			m.queue[n-1] = e
			continue
		}
		m.queue = append(m.queue, e)
		m.bytes += size(e)
	}
	if len(m.queue) > m.events || m.bytes > m.limit {
		m.endLocked(ErrCompacted)
	}
	m.signal()
	return !m.ended
}

// end makes deliver close the watcher's channel, whether or not somebody reads it. The first reason stays.
func (m *mailbox) end(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.endLocked(err)
	m.signal()
}

func (m *mailbox) endLocked(err error) {
	if !m.ended {
		m.ended, m.err = true, err
		m.queue, m.bytes = nil, 0 // every reason to end means that the watcher begins anew or not at all
	}
}

// reason is the func that Watch returns: why the channel was closed, nil before that.
func (m *mailbox) reason() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *mailbox) signal() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// take returns the next event; done means that there will be none.
func (m *mailbox) take() (e Event, ok, done bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.queue) == 0 {
		m.queue = nil // the array that was walked through can go
		return Event{}, false, m.ended
	}
	e = m.queue[0]
	m.queue[0] = Event{}
	m.queue = m.queue[1:]
	m.bytes -= size(e)
	return e, true, false
}

func (m *mailbox) isEnded() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ended
}

// deliver feeds the channel until the mailbox has ended or ctx ends, and closes it. It is the mailbox's only goroutine.
func (m *mailbox) deliver(ctx context.Context) {
	defer close(m.out)
	for {
		e, ok, done := m.take()
		switch {
		case done:
			return
		case !ok:
			select {
			case <-m.wake:
			case <-ctx.Done():
				m.end(context.Cause(ctx))
				return
			}
			continue
		}
		for sent := false; !sent; {
			select {
			case m.out <- e:
				sent = true
			case <-ctx.Done():
				m.end(context.Cause(ctx))
				return
			case <-m.wake: // perhaps the end of a watcher that does not read
				if m.isEnded() {
					return
				}
			}
		}
	}
}

func size(e Event) int { return len(e.Key) + len(e.Value) + 64 }
