// Package breaker is the one place where requests wait: a FIFO queue in front of the free slots of a set of targets.
//
// A queue-proxy uses it with one target, its instance; an activator with all instances of a revision. One lock answers both
// "may I" and "which one", so that a waiter is never bound to a busy target while another is free (late binding), the
// order of arrival is kept, and a slot that is given back goes straight to the longest waiter: nobody who comes later
// can take it. A target's limit is never passed, also not while the limit or the set of targets changes: a target that
// was taken out is forgotten when its last request is done.
//
// Which target a request gets (target.go): the one with the most free slots; without limits, the less loaded of two. A request with a key
// sticks to a target within a bound of load (sticky.go). A target that refuses requests again and again is ejected for a while and
// then tried with one request; a request goes to each target once, and if all refuse it rests before the next round (refuse.go).
//
// Cost: an uncontended Try or Release is one mutex and a heap fix of O(log targets); nothing is allocated.
package breaker

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

// Why a request did not get a slot.
var (
	ErrFull    = errors.New("breaker: the queue is full")
	ErrTimeout = errors.New("breaker: waited too long")
	ErrGone    = errors.New("breaker: the client left")
	ErrClosed  = errors.New("breaker: closed")

	// Which bound was reached; both are ErrFull.
	ErrFullBytes = fmt.Errorf("%w: bytes", ErrFull)
	ErrFullTotal = fmt.Errorf("%w: bound over all queues", ErrFull)
)

// Config has the bounds of one queue. Zero means no place to wait (MaxWaiting) and no bound (MaxBytes, Budget).
type Config struct {
	MaxWaiting int     // requests that may wait
	MaxBytes   int64   // what they may hold in memory, by their own account
	Budget     *Budget // bounds shared with other breakers

	// SlowStart is how long a target that has just become ready gets less than its share; 0 = no such time. See ramp.
	SlowStart time.Duration
}

// Budget bounds what several breakers hold together.
type Budget struct {
	MaxWaiting int   // requests; 0 = no bound
	MaxBytes   int64 // 0 = no bound

	mu      sync.Mutex
	waiting int
	bytes   int64
}

func (g *Budget) take(n int64) bool {
	if g == nil {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.MaxBytes > 0 && g.bytes+n > g.MaxBytes || g.MaxWaiting > 0 && g.waiting >= g.MaxWaiting {
		return false
	}
	g.bytes += n
	g.waiting++
	return true
}

// add takes without asking: for what is in memory already.
func (g *Budget) add(n int64) {
	if g == nil {
		return
	}
	g.mu.Lock()
	g.bytes += n
	g.waiting++
	g.mu.Unlock()
}

func (g *Budget) give(n int64) {
	if g == nil {
		return
	}
	g.mu.Lock()
	g.bytes -= n
	g.waiting--
	g.mu.Unlock()
}

// Held returns how many requests wait now, and how many bytes they hold.
func (g *Budget) Held() (waiting int, bytes int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiting, g.bytes
}

// Breaker is a queue and its targets. Make one with New.
type Breaker struct {
	mu      sync.Mutex
	cfg     Config
	targets map[string]*Target // nil until there is one: most revisions are idle
	ready   targetHeap         // members in service, least loaded first
	noLimit bool               // of no target
	doubts  bool               // there are members that are ejected, or whose trial is under way
	ramping int                // members in service that get less than their share, being fresh
	ramped  time.Time          // when that was last looked at
	queue   waiterList         // in order of arrival
	resting waiterList         // were refused by every target and wait for the next round; older than the queue
	bytes   int64
	running int
	closed  error
}

// New returns a breaker without targets: everything waits until Set.
func New(cfg Config) *Breaker {
	return &Breaker{cfg: cfg}
}

// Waiter is one request's place in the queue.
type Waiter struct {
	// Client, if set, is asked by Sweep whether it is still there.
	Client hop.Client
	// Bytes is what the request holds in memory while it waits.
	Bytes int64
	// Since is when it began to wait; Sweep ends the wait after its limit.
	Since time.Time
	// Key makes requests of the same key go to the same target; 0 = any.
	Key uint64

	done       chan struct{} // one token when the wait is over
	target     *Target
	err        error
	list       *waiterList // that it is in; nil = none
	prev, next *Waiter

	tried  []*Target // refused it in this round
	rounds int       // in which all did
	rest   time.Time // until when it rests
}

// NewWaiter returns a place for a request that has waited since the given time and holds so many bytes. It is not pooled: a
// request that waits is not the one whose allocations count, and a stale pointer to a place could end a stranger's wait.
func NewWaiter(c hop.Client, bytes int64, since time.Time) *Waiter {
	return &Waiter{Client: c, Bytes: bytes, Since: since, done: make(chan struct{}, 1)}
}

// Try takes a free slot if there is one and nobody waits for it; else nil.
func (b *Breaker) Try() *Target { return b.TryKey(0) }

// TryKey is Try for a request that should go where others of its key went; 0 = anywhere.
func (b *Breaker) TryKey(key uint64) *Target {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.queue.n > 0 {
		return nil
	}
	return b.takeLocked(key, nil)
}

// Enqueue puts w at the end of the queue, or gives it a slot at once. It returns which bound was reached (ErrFull), or why the breaker was closed.
func (b *Breaker) Enqueue(w *Waiter) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed != nil {
		return b.closed
	}
	if b.queue.n == 0 {
		if t := b.takeLocked(w.Key, nil); t != nil {
			w.target = t
			w.done <- struct{}{}
			return nil
		}
	}
	switch {
	case b.waitingLocked() >= b.cfg.MaxWaiting:
		return ErrFull
	case b.cfg.MaxBytes > 0 && b.bytes+w.Bytes > b.cfg.MaxBytes:
		return ErrFullBytes
	case !b.cfg.Budget.take(w.Bytes):
		return ErrFullTotal
	}
	b.bytes += w.Bytes
	b.queue.pushBack(w)
	if len(b.queue.head.tried) > 0 {
		b.dispatchLocked() // those before w may wait for others than w does
	}
	return nil
}

func (b *Breaker) waitingLocked() int { return b.queue.n + b.resting.n }

// Wait blocks until w has a slot or the wait ended with an error. With max > 0 it ends by itself after that time,
// otherwise only Sweep and Close end it.
func (b *Breaker) Wait(w *Waiter, max time.Duration) (*Target, error) {
	if max <= 0 {
		<-w.done
		return w.target, w.err
	}
	timer := time.NewTimer(max)
	defer timer.Stop()
	select {
	case <-w.done:
	case <-timer.C:
		b.remove(w, ErrTimeout)
		<-w.done
	}
	return w.target, w.err
}

// remove ends w's wait with err, unless it was just served.
func (b *Breaker) remove(w *Waiter, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if w.list != nil {
		b.unlinkLocked(w)
		w.err = err
		w.done <- struct{}{}
	}
}

func (b *Breaker) unlinkLocked(w *Waiter) {
	w.list.remove(w)
	b.bytes -= w.Bytes
	b.cfg.Budget.give(w.Bytes)
}

// Release gives a slot back; it goes to the longest waiter at once.
func (b *Breaker) Release(t *Target) {
	b.mu.Lock()
	b.answeredLocked(t)
	b.backLocked(t)
	b.mu.Unlock()
}

func (b *Breaker) backLocked(t *Target) {
	t.inflight--
	b.running--
	b.fixLocked(t)
	b.dispatchLocked()
}

// dispatchLocked hands free slots out, the longest waiter first. One that was refused by the targets that have free slots is passed over; there
// are few of those, since a target that refuses is soon ejected.
func (b *Breaker) dispatchLocked() {
	for w := b.queue.head; w != nil; {
		next := w.next
		t := b.takeLocked(w.Key, w.tried)
		switch {
		case t != nil:
			b.unlinkLocked(w)
			w.target = t
			w.done <- struct{}{}
		case len(w.tried) == 0:
			return // there is no slot for anybody
		}
		w = next
	}
}

// Set makes specs the targets: new ones join, changed limits count at once, missing ones get nothing more. Requests inside
// stay where they are.
func (b *Breaker) Set(specs []Spec) {
	b.mu.Lock()
	defer b.mu.Unlock()
	seen := make(map[string]bool, len(specs))
	b.noLimit = true
	joined := false
	for _, s := range specs {
		seen[s.ID] = true
		b.noLimit = b.noLimit && s.Limit == 0
		t := b.targets[s.ID]
		if t != nil && t.at != s.At {
			b.leaveLocked(t)
			t = nil
		}
		if t == nil {
			b.joinLocked(s)
			joined = true
		} else if t.limit != s.Limit {
			t.limit = s.Limit
			b.fixLocked(t)
		}
	}
	for id, t := range b.targets {
		if !seen[id] {
			b.leaveLocked(t)
		}
	}
	if joined {
		b.wakeLocked(time.Time{}) // there is one that has not refused them
	}
	b.rampLocked(time.Now(), true)
	b.dispatchLocked()
}

// Targets returns how many targets there are, ejected ones included.
func (b *Breaker) Targets() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.targets)
}

// Load returns how many requests wait and how many hold a slot.
func (b *Breaker) Load() (waiting, running int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.waitingLocked(), b.running
}

// Sweep ends the waits that are older than maxAge (0 = none) and those whose client has left, and gives ejected targets and resting requests
// another chance when their time has come. It returns whether there is anything left to sweep. Whoever
// uses Wait without a limit must call it every now and then.
func (b *Breaker) Sweep(now time.Time, maxAge time.Duration) bool {
	b.mu.Lock()
	b.reviveLocked(now)
	// Clients are asked without the lock: a system call for each of ten thousand waiters would hold up everybody.
	waiting := make([]*Waiter, 0, b.waitingLocked())
	for _, l := range [...]*waiterList{&b.resting, &b.queue} {
		for w := l.head; w != nil; w = w.next {
			waiting = append(waiting, w)
		}
	}
	b.mu.Unlock()

	for _, w := range waiting {
		switch {
		case maxAge > 0 && now.Sub(w.Since) >= maxAge:
			b.remove(w, ErrTimeout)
		case w.Client != nil && w.Client.Gone():
			b.remove(w, ErrGone) // nothing happens if it has been served meanwhile
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.waitingLocked() > 0 || b.doubts
}

// Fail ends all waits of now with err; later ones wait again.
func (b *Breaker) Fail(err error) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failLocked(err)
}

func (b *Breaker) failLocked(err error) int {
	n := 0
	for _, l := range [...]*waiterList{&b.resting, &b.queue} {
		for l.n > 0 {
			w := l.head
			b.unlinkLocked(w)
			w.err = err
			w.done <- struct{}{}
			n++
		}
	}
	return n
}

// Close ends all waits with err and refuses later ones with it. Requests inside are not touched.
func (b *Breaker) Close(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = err
	b.failLocked(err)
}

// waiterList is an intrusive list: joining and leaving allocate nothing.
type waiterList struct {
	head, tail *Waiter
	n          int
}

func (l *waiterList) pushBack(w *Waiter) {
	w.list, w.prev, w.next = l, l.tail, nil
	if l.tail != nil {
		l.tail.next = w
	} else {
		l.head = w
	}
	l.tail = w
	l.n++
}

func (l *waiterList) pushFront(w *Waiter) {
	w.list, w.prev, w.next = l, nil, l.head
	if l.head != nil {
		l.head.prev = w
	} else {
		l.tail = w
	}
	l.head = w
	l.n++
}

func (l *waiterList) remove(w *Waiter) {
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		l.head = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	} else {
		l.tail = w.prev
	}
	w.list, w.prev, w.next = nil, nil, nil
	l.n--
}
