package reconcile

import (
	"sync"
	"time"
)

// kind is what a key is worked by.
type kind uint8

const (
	kindService kind = iota
	kindConfiguration
	kindRevision
	kindRoute
	kindHost // name is a host; all domain mappings of that host are one key, so that two never claim it at once
	kindGC   // namespace and name are a configuration's
	kindVPC
	kindSubnet
	kindGateway
	kindElasticIP
	kindNetwork // what the network has from earlier processes; no name
)

func (k kind) String() string {
	return [...]string{"service", "configuration", "revision", "route", "host", "gc", "vpc", "subnet", "gateway", "elasticip", "network"}[k]
}

// key names one piece of work.
type key struct {
	kind            kind
	namespace, name string
}

func (k key) of() name { return name{k.namespace, k.name} }

// Back-off of a key that fails: it doubles from the first to the last. A conflict with another writer is over after
// milliseconds, a store that is away takes longer.
const (
	firstRetry = 5 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// queue hands out keys to workers. Its three sets:
//   - order: keys that wait for a worker, first come first served; each is also in dirty.
//   - dirty: keys that have to be worked. A key in dirty and active waits for its worker to be done.
//   - active: keys that a worker has now. None is ever in it twice.
//
// Adding a key that is in dirty does nothing: that is how bursts fold.
type queue struct {
	mu       sync.Mutex
	wake     sync.Cond
	order    []key
	dirty    map[key]struct{}
	active   map[key]struct{}
	timers   map[key]*alarm
	failures map[key]int
	closed   bool
}

// alarm is a pending add.
type alarm struct {
	at    time.Time
	timer *time.Timer
}

func newQueue() *queue {
	q := &queue{dirty: map[key]struct{}{}, active: map[key]struct{}{}, timers: map[key]*alarm{}, failures: map[key]int{}}
	q.wake.L = &q.mu
	return q
}

// add asks for a pass over each key.
func (q *queue) add(keys ...key) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, k := range keys {
		q.addLocked(k)
	}
}

func (q *queue) addLocked(k key) {
	if q.closed {
		return
	}
	if _, there := q.dirty[k]; there {
		return
	}
	q.dirty[k] = struct{}{}
	if _, busy := q.active[k]; busy {
		return // done puts it in line
	}
	q.order = append(q.order, k)
	q.wake.Signal()
}

// addAfter asks for a pass in d from now. Of several such wishes for a key the earliest counts; whoever is woken looks at
// the whole object and asks again if there is something later.
func (q *queue) addAfter(k key, d time.Duration) {
	if d <= 0 {
		q.add(k)
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	at := time.Now().Add(d)
	if old := q.timers[k]; old != nil {
		if !at.Before(old.at) {
			return
		}
		old.timer.Stop()
	}
	a := &alarm{at: at}
	a.timer = time.AfterFunc(d, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.timers[k] == a { // else it was replaced by an earlier one while this one fired
			delete(q.timers, k)
		}
		q.addLocked(k)
	})
	q.timers[k] = a
}

// get waits for a key; the caller must call done with it. false: the queue is closed.
func (q *queue) get() (key, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.order) == 0 && !q.closed {
		q.wake.Wait()
	}
	if q.closed {
		return key{}, false
	}
	k := q.order[0]
	q.order[0] = key{} // the array may live long: keep no names alive
	q.order = q.order[1:]
	if len(q.order) == 0 {
		q.order = nil
	}
	delete(q.dirty, k)
	if len(q.dirty) == 0 {
		q.dirty = map[key]struct{}{} // an emptied map keeps its room
	}
	q.active[k] = struct{}{}
	return k, true
}

// done ends the pass that get began. After a failure the key comes back later, and each failure in a row waits longer.
func (q *queue) done(k key, failed bool) (retry time.Duration) {
	q.mu.Lock()
	delete(q.active, k)
	if failed {
		q.failures[k]++
		retry = firstRetry << min(q.failures[k]-1, 16)
		retry = min(retry, lastRetry)
	} else {
		delete(q.failures, k)
	}
	if _, again := q.dirty[k]; again && !q.closed {
		q.order = append(q.order, k)
		q.wake.Signal()
	}
	q.mu.Unlock()
	if failed {
		q.addAfter(k, retry)
	}
	return retry
}

// pending returns how many keys wait for a worker or are with one.
func (q *queue) pending() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.order) + len(q.active)
}

// close ends all waiting; what is left in the queue is dropped.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	for _, a := range q.timers {
		a.timer.Stop()
	}
	clear(q.timers)
	q.order = nil
	q.wake.Broadcast()
}
