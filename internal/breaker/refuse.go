package breaker

import (
	"container/heap"
	"slices"
	"time"
)

// refusals is what a target's breaker remembers of its refusing.
type refusals struct {
	failures int       // in a row
	until    time.Time // ejected, or on trial, until then
	busy     bool      // for being full, and not for being out of reach
	trial    trial
}

// trial says how far a target is trusted that comes back from an ejection.
type trial uint8

const (
	trialNone     trial = iota // as all others
	trialNext                  // takes one request
	trialUnderWay              // which is under way
)

const (
	ejectAfter = 3 // refusals in a row: one may be a connection's fault, and a restart takes a moment
	firstPause = 50 * time.Millisecond
	longPause  = 5 * time.Second        // of an ejection: those who would go there have others to go to
	busyPause  = 100 * time.Millisecond // of one that was full: it has free slots again any moment
	longRest   = time.Second            // of a request that all have refused: an instance that comes back is found within this
	trialTime  = time.Second            // a trial without a refusal is passed: a dial takes no longer, the answer may
)

// pause doubles from firstPause to longest.
func pause(n int, longest time.Duration) time.Duration {
	return min(firstPause<<min(n, 10), longest)
}

// answeredLocked notes that t took a request. What ends at an ejected target may have begun long ago and says nothing; but when all are ejected,
// it is the best sign that there is.
func (b *Breaker) answeredLocked(t *Target) {
	switch {
	case t.index >= 0:
		t.failures, t.trial = 0, trialNone
	case t.member && len(b.ready) == 0:
		b.returnLocked(t)
		t.failures = 0
	}
}

// returnLocked takes an ejected target back into service.
func (b *Breaker) returnLocked(t *Target) {
	t.busy, t.share = false, whole
	t.weigh()
	heap.Push(&b.ready, t)
	b.rampLocked(time.Now(), true)
}

// refusedLocked notes that t did not take a request. It is ejected when it has done so ejectAfter times in a row, or when it was on trial.
func (b *Breaker) refusedLocked(t *Target, now time.Time, busy bool) (ejected bool) {
	t.failures++
	if t.index < 0 || t.failures < ejectAfter && t.trial != trialUnderWay {
		return false
	}
	longest := longPause
	if busy {
		longest = busyPause
	}
	t.busy, t.trial = busy, trialNone
	t.until = now.Add(pause(max(0, t.failures-ejectAfter), longest))
	b.doubts = true
	heap.Remove(&b.ready, t.index)
	b.rampLocked(now, true)
	return true
}

// anywayLocked chooses among ejected targets, when all are: one may have come back, and nobody is better. Those that are only full are left
// alone, they say themselves when they are not.
func (b *Breaker) anywayLocked(tried []*Target) (best *Target) {
	for _, t := range b.targets {
		if !t.busy && (best == nil || t.inflight < best.inflight) && !slices.Contains(tried, t) {
			best = t
		}
	}
	return best
}

// Requeue puts w, which had been given t's slot, back to the head of the queue: t did not take it, being full (busy) or out of reach. w goes to
// each other target before it goes to t again. The bounds do not apply, w has its place already. It returns whether t has been ejected for
// being out of reach, and why the breaker was closed.
func (b *Breaker) Requeue(w *Waiter, t *Target, now time.Time, busy bool) (ejected bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ejected = b.refusedLocked(t, now, busy) && !busy
	if b.closed != nil {
		b.backLocked(t)
		return ejected, b.closed
	}
	w.target, w.err = nil, nil
	b.cfg.Budget.add(w.Bytes)
	b.bytes += w.Bytes
	w.tried = append(w.tried, t)
	w.rest = now.Add(firstPause)
	if b.exhaustedLocked(w) && b.restLocked(w, now) {
		b.resting.pushBack(w)
	} else {
		b.queue.pushFront(w) // before the slot is given back: w is the longest waiter
	}
	b.backLocked(t)
	return ejected, nil
}

// Refused gives back the slot of a t that did not take its request, for callers that do not wait; see Requeue. It returns whether t has been
// ejected for being out of reach.
func (b *Breaker) Refused(t *Target, now time.Time, busy bool) (ejected bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ejected = b.refusedLocked(t, now, busy) && !busy
	b.backLocked(t)
	return ejected
}

// exhaustedLocked says that no target is left that might take w.
func (b *Breaker) exhaustedLocked(w *Waiter) bool {
	if len(b.ready) == 0 {
		return b.anywayLocked(w.tried) == nil
	}
	return b.leastLocked(w.tried) == nil
}

// restLocked ends w's round. It returns whether w has to wait for the next one: when a lone target has refused for the first time it is asked again at
// once, because what refused may have been the connection.
func (b *Breaker) restLocked(w *Waiter, now time.Time) bool {
	w.rounds++
	if len(b.targets) <= 1 && w.rounds == 1 {
		w.tried = w.tried[:0]
		return false
	}
	w.rest = now.Add(pause(w.rounds-1, longRest))
	return true
}

// wakeLocked lets those go on whose rest is over, all when now is zero, at the head of the queue. The zero time stands for a new target: then the
// round goes on with it.
func (b *Breaker) wakeLocked(now time.Time) {
	for w := b.resting.tail; w != nil; {
		prev := w.prev
		if now.IsZero() || !w.rest.After(now) {
			b.resting.remove(w)
			if !now.IsZero() {
				w.tried = w.tried[:0]
			}
			b.queue.pushFront(w)
		}
		w = prev
	}
}

// reviveLocked gives another chance to ejected targets and to requests whose rest is over.
func (b *Breaker) reviveLocked(now time.Time) {
	if b.doubts {
		b.doubts = false
		for _, t := range b.targets {
			b.judgeLocked(t, now)
			b.doubts = b.doubts || t.index < 0 || t.trial == trialUnderWay
		}
	}
	b.wakeLocked(now)
	for w := b.queue.head; w != nil; w = w.next {
		// The targets that it could still go to have been taken away, or take none for a long time.
		if len(w.tried) > 0 && !w.rest.After(now) {
			w.tried = w.tried[:0]
		}
	}
	b.dispatchLocked()
}

// judgeLocked takes t back when its time has come, on trial if there are others.
func (b *Breaker) judgeLocked(t *Target, now time.Time) {
	switch {
	case t.until.After(now):
	case t.index < 0:
		if !t.busy && len(b.ready) > 0 {
			t.trial = trialNext
		}
		b.returnLocked(t)
	case t.trial == trialUnderWay:
		t.trial = trialNone
		b.fixLocked(t)
	}
}

// Ejected returns how many targets are out of service for refusing requests.
func (b *Breaker) Ejected() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.targets) - len(b.ready)
}
