// Package breaker is the one place where requests wait: a FIFO queue in front of the free slots of a set of targets.
//
// A queue-proxy uses it with one target, its instance; an activator with all instances of a revision. One lock answers both
// "may I" and "which one", so that a waiter is never bound to a busy target while another is free (late binding), the
// order of arrival is kept, and a slot that is given back goes straight to the longest waiter: nobody who comes later
// can take it. A target's limit is never passed, also not while the limit or the set of targets changes: a target that
// was taken out is forgotten when its last request is done.
//
// Cost: an uncontended Try or Release is one mutex and a heap fix of O(log targets); nothing is allocated.
package breaker

import (
	"container/heap"
	"errors"
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
)

// Config has the bounds of one queue. Zero means no place to wait (MaxWaiting) and no bound (MaxBytes, Budget).
type Config struct {
	MaxWaiting int     // requests that may wait
	MaxBytes   int64   // what they may hold in memory, by their own account
	Budget     *Budget // bounds shared with other breakers
}

// Budget bounds what several breakers hold together.
type Budget struct {
	MaxBytes int64 // 0 = no bound

	mu    sync.Mutex
	bytes int64
}

func (g *Budget) take(n int64) bool {
	if g == nil {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.MaxBytes > 0 && g.bytes+n > g.MaxBytes {
		return false
	}
	g.bytes += n
	return true
}

// add takes without asking: for what is in memory already.
func (g *Budget) add(n int64) {
	if g == nil {
		return
	}
	g.mu.Lock()
	g.bytes += n
	g.mu.Unlock()
}

func (g *Budget) give(n int64) {
	if g == nil {
		return
	}
	g.mu.Lock()
	g.bytes -= n
	g.mu.Unlock()
}

// Bytes returns what is held now.
func (g *Budget) Bytes() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.bytes
}

// Target is one taker of requests. ID and Value are fixed; everything else belongs to its breaker.
type Target struct {
	ID    string
	Value any

	b *Breaker
	// guarded by b.mu
	limit     int // 0 = no limit
	inflight  int
	index     int // in b.free's heap; -1 = not in service (removed, or suspended)
	member    bool
	suspended time.Time // no requests before this
	failures  int       // in a row
}

// Finish gives the slot back; it makes a Target a hop.Finisher, so that an answer in progress needs no closure.
func (t *Target) Finish(*hop.Exchange) { t.b.Release(t) }

// Spec describes a target for Set.
type Spec struct {
	ID    string
	Limit int // requests at once; 0 = no limit
	Value any // kept from the first Set that names the ID
}

// Breaker is a queue and its targets. Make one with New.
type Breaker struct {
	mu      sync.Mutex
	cfg     Config
	targets map[string]*Target // nil until there is one: most revisions are idle
	heap    targetHeap         // members that are not suspended, least loaded first
	parked  int                // members that are suspended
	queue   waiterList
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

	done       chan struct{} // one token when the wait is over
	target     *Target
	err        error
	queued     bool
	prev, next *Waiter
}

// NewWaiter returns a place for a request that has waited since the given time and holds so many bytes. It is not pooled: a
// request that waits is not the one whose allocations count, and a stale pointer to a place could end a stranger's wait.
func NewWaiter(c hop.Client, bytes int64, since time.Time) *Waiter {
	return &Waiter{Client: c, Bytes: bytes, Since: since, done: make(chan struct{}, 1)}
}

// Try takes a free slot if there is one and nobody waits for it; else nil.
func (b *Breaker) Try() *Target {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.queue.n > 0 {
		return nil
	}
	return b.takeLocked()
}

// takeLocked takes a slot of the least loaded target.
func (b *Breaker) takeLocked() *Target {
	if len(b.heap) == 0 {
		return nil
	}
	t := b.heap[0]
	if t.limit > 0 && t.inflight >= t.limit {
		return nil // the least loaded is full, so all are
	}
	t.inflight++
	b.running++
	heap.Fix(&b.heap, 0)
	return t
}

// Enqueue puts w at the end of the queue, or gives it a slot at once. It returns ErrFull, or why the breaker was closed.
func (b *Breaker) Enqueue(w *Waiter) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed != nil {
		return b.closed
	}
	if b.queue.n == 0 {
		if t := b.takeLocked(); t != nil {
			w.target = t
			w.done <- struct{}{}
			return nil
		}
	}
	if b.queue.n >= b.cfg.MaxWaiting || (b.cfg.MaxBytes > 0 && b.bytes+w.Bytes > b.cfg.MaxBytes) || !b.cfg.Budget.take(w.Bytes) {
		return ErrFull
	}
	b.bytes += w.Bytes
	w.queued = true
	b.queue.pushBack(w)
	return nil
}

// Requeue puts w, which had been given t's slot, back to the head of the queue: t could not be used. When its target refused
// twice in a row it gets no requests for a while (Sweep ends that), so that the queue does not spin on it; the bounds do not apply, w
// has its place already. It returns why the breaker was closed.
func (b *Breaker) Requeue(w *Waiter, t *Target, now time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	t.failures++
	if t.failures > 1 && t.index >= 0 {
		t.suspended = now.Add(min(5*time.Millisecond<<min(t.failures, 8), time.Second))
		heap.Remove(&b.heap, t.index)
		b.parked++
	}
	if b.closed != nil {
		b.backLocked(t)
		return b.closed
	}
	w.target, w.err = nil, nil
	b.cfg.Budget.add(w.Bytes)
	b.bytes += w.Bytes
	w.queued = true
	b.queue.pushFront(w) // before the slot is given back: w is the longest waiter
	b.backLocked(t)
	return nil
}

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
	if w.queued {
		b.unlinkLocked(w)
		w.err = err
		w.done <- struct{}{}
	}
}

func (b *Breaker) unlinkLocked(w *Waiter) {
	b.queue.remove(w)
	w.queued = false
	b.bytes -= w.Bytes
	b.cfg.Budget.give(w.Bytes)
}

// Release gives a slot back; it goes to the longest waiter at once.
func (b *Breaker) Release(t *Target) {
	b.mu.Lock()
	t.failures = 0
	b.backLocked(t)
	b.mu.Unlock()
}

func (b *Breaker) backLocked(t *Target) {
	t.inflight--
	b.running--
	if t.index >= 0 {
		heap.Fix(&b.heap, t.index)
	}
	b.dispatchLocked()
}

func (b *Breaker) dispatchLocked() {
	for b.queue.n > 0 {
		t := b.takeLocked()
		if t == nil {
			return
		}
		w := b.queue.head
		b.unlinkLocked(w)
		w.target = t
		w.done <- struct{}{}
	}
}

// Set makes specs the targets: new ones join, changed limits count at once, missing ones get nothing more. Requests inside
// stay where they are.
func (b *Breaker) Set(specs []Spec) {
	b.mu.Lock()
	defer b.mu.Unlock()
	seen := make(map[string]bool, len(specs))
	for _, s := range specs {
		seen[s.ID] = true
		t := b.targets[s.ID]
		if t == nil {
			if b.targets == nil {
				b.targets = make(map[string]*Target)
			}
			t = &Target{ID: s.ID, Value: s.Value, b: b, limit: s.Limit, member: true, index: -1}
			b.targets[s.ID] = t
			heap.Push(&b.heap, t)
			continue
		}
		if t.limit != s.Limit {
			t.limit = s.Limit
			if t.index >= 0 {
				heap.Fix(&b.heap, t.index)
			}
		}
	}
	for id, t := range b.targets {
		if seen[id] {
			continue
		}
		t.member = false
		delete(b.targets, id)
		if t.index >= 0 {
			heap.Remove(&b.heap, t.index)
		} else {
			b.parked--
		}
	}
	b.dispatchLocked()
}

// Targets returns how many targets there are, suspended ones included.
func (b *Breaker) Targets() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.targets)
}

// Load returns how many requests wait and how many hold a slot.
func (b *Breaker) Load() (waiting, running int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.queue.n, b.running
}

// Sweep ends the waits that are older than maxAge (0 = none) and those whose client has left, and takes suspended targets back
// into service when their time has come. It returns whether there is anything left to sweep. Whoever
// uses Wait without a limit must call it every now and then.
func (b *Breaker) Sweep(now time.Time, maxAge time.Duration) bool {
	b.mu.Lock()
	if b.parked > 0 {
		for _, t := range b.targets {
			if t.index < 0 && !t.suspended.After(now) {
				b.parked--
				heap.Push(&b.heap, t)
			}
		}
		b.dispatchLocked()
	}
	// Clients are asked without the lock: a system call for each of ten thousand waiters would hold up everybody.
	waiting := make([]*Waiter, 0, b.queue.n)
	for w := b.queue.head; w != nil; w = w.next {
		waiting = append(waiting, w)
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
	return b.queue.n > 0 || b.parked > 0
}

// Fail ends all waits of now with err; later ones wait again.
func (b *Breaker) Fail(err error) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failLocked(err)
}

func (b *Breaker) failLocked(err error) int {
	n := 0
	for b.queue.n > 0 {
		w := b.queue.head
		b.unlinkLocked(w)
		w.err = err
		w.done <- struct{}{}
		n++
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
	w.prev, w.next = l.tail, nil
	if l.tail != nil {
		l.tail.next = w
	} else {
		l.head = w
	}
	l.tail = w
	l.n++
}

func (l *waiterList) pushFront(w *Waiter) {
	w.prev, w.next = nil, l.head
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
	w.prev, w.next = nil, nil
	l.n--
}

// targetHeap has the target with the most free slots on top; without limits that is the one with the fewest requests.
type targetHeap []*Target

func (h targetHeap) Len() int { return len(h) }
func (h targetHeap) Less(i, j int) bool {
	return h[i].inflight-h[i].limit < h[j].inflight-h[j].limit
}
func (h targetHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *targetHeap) Push(x any) {
	t := x.(*Target)
	t.index = len(*h)
	*h = append(*h, t)
}
func (h *targetHeap) Pop() any {
	old := *h
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	t.index = -1
	return t
}
