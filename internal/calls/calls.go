// Package calls learns which revisions call which, from what their requests carry: a function that passes on the traceparent or the
// X-Request-Id of a request, with the requests that it makes for it, gives itself away as their caller.
//
// It stands behind the router, where the revision is known, and remembers the requests that are on their way under both of their
// names. One that comes under a name that is there already was called by the newest one of it. Memory is fixed: 4,096 names, those
// that find no room are not learnt from. Of many requests only a part is followed, chosen by the trace so that caller and callee
// are in it together, and their calls are counted for the others. It is switched off, at the cost of one look, until On.
package calls

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/hop"
)

const (
	sets, ways = 256, 16

	// maxAge is how long a request is remembered. Whoever is called later is not learnt as called.
	maxAge = time.Minute
	// followed requests a second: above the one number half as many are followed, below the other one twice as many.
	most, least = 2000, 500
	maxShift    = 16
	// maxPairs bounds the pairs between two Takes.
	maxPairs = 4096
)

// Pair is a caller and whom it called.
type Pair struct{ Caller, Callee api.RevisionID }

// Tracker is a step behind the router. The zero value is ready; its methods may be called from any goroutine.
type Tracker struct {
	on       atomic.Bool
	shift    atomic.Uint32 // one of 2^shift requests is followed
	followed atomic.Int64  // since the last Take
	serial   atomic.Uint64
	sets     [sets]set

	mu    sync.Mutex
	pairs map[Pair]int
}

// set are the requests on their way whose names fall into it.
type set struct {
	mu   sync.Mutex
	ways [ways]way
}

type way struct {
	name     uint64 // hash; 0 = free
	serial   uint64 // grows with each request
	revision api.RevisionID
	at       time.Time
}

var seed = maphash.MakeSeed()

// On switches the tracker on, for good.
func (t *Tracker) On() { t.on.Store(true) }

// Handler is the step; next serves.
func (t *Tracker) Handler(next hop.Handler) hop.Handler {
	return hop.HandlerFunc(func(x *hop.Exchange) error {
		if !t.on.Load() {
			return next.Serve(x)
		}
		names, n := t.begin(x)
		err := next.Serve(x)
		t.end(names, n)
		return err
	})
}

// begin looks for x's caller and remembers x; n = 0 when it is not followed.
func (t *Tracker) begin(x *hop.Exchange) (names [2]uint64, n uint64) {
	names = named(x)
	shift := t.shift.Load()
	if caller := t.caller(names, x.Arrived); caller != "" && caller != x.Revision {
		t.count(Pair{caller, x.Revision}, 1<<shift)
	}
	if names[0]&(1<<shift-1) != 0 {
		return names, 0
	}
	t.followed.Add(1)
	n = t.serial.Add(1)
	for _, name := range names {
		t.set(name).add(way{name, n, x.Revision, x.Arrived})
	}
	return names, n
}

func (t *Tracker) end(names [2]uint64, n uint64) {
	if n == 0 {
		return
	}
	for _, name := range names {
		t.set(name).remove(n)
	}
}

// named are x's names: its trace if it brought one, and its request id. The first decides whether it is followed.
func named(x *hop.Exchange) [2]uint64 {
	id := maphash.String(seed, x.ID) | 1<<63 // never 0
	if v := x.Req.Header.Peek("Traceparent"); len(v) >= 35 {
		return [2]uint64{maphash.Bytes(seed, v[3:35]) | 1<<63, id}
	}
	return [2]uint64{id, id}
}

func (t *Tracker) set(name uint64) *set { return &t.sets[name>>32%sets] }

// caller is the revision of the newest request on its way under one of the names; "" = none.
func (t *Tracker) caller(names [2]uint64, now time.Time) api.RevisionID {
	var newest way
	for i, name := range names {
		if i > 0 && name == names[0] {
			break
		}
		s := t.set(name)
		s.mu.Lock()
		for j := range s.ways {
			if w := &s.ways[j]; w.name == name && w.serial > newest.serial && now.Sub(w.at) < maxAge {
				newest = *w
			}
		}
		s.mu.Unlock()
	}
	return newest.revision
}

// add remembers a request once, in a place that is free or whose request is of long ago.
func (s *set) add(w way) {
	s.mu.Lock()
	defer s.mu.Unlock()
	free := -1
	for i := range s.ways {
		switch o := &s.ways[i]; {
		case o.serial == w.serial && o.name == w.name:
			return
		case o.name == 0 || w.at.Sub(o.at) >= maxAge:
			free = i
		}
	}
	if free >= 0 {
		s.ways[free] = w
	}
}

func (s *set) remove(serial uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.ways {
		if s.ways[i].serial == serial {
			s.ways[i] = way{}
		}
	}
}

func (t *Tracker) count(p Pair, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pairs == nil {
		t.pairs = map[Pair]int{}
	}
	if _, known := t.pairs[p]; known || len(t.pairs) < maxPairs {
		t.pairs[p] += n
	}
}

// Take returns how often whom was called since the last Take, nil = nobody. It is to be called each second, and chooses how many of the
// requests are followed in the next one.
func (t *Tracker) Take() map[Pair]int {
	switch n, shift := t.followed.Swap(0), t.shift.Load(); {
	case n > most && shift < maxShift:
		t.shift.Store(shift + 1)
	case n < least && shift > 0:
		t.shift.Store(shift - 1)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	pairs := t.pairs
	t.pairs = nil
	return pairs
}
