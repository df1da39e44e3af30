package front

import (
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/sock"
)

// sweepEvery is how often clients are looked at whose requests have been running for as long: HTTP/1 has no word for leaving, and
// whoever waits for an answer reads nothing from them. A request that is over sooner costs two stores and a look at a flag. While no request runs there
// are no sweeps.
const (
	sweepEvery   = 25 * time.Millisecond
	sweepAtLeast = 40 * time.Millisecond // each, however many there are to be looked at; it takes two looks to know (see Gone)
)

// seat is a connection's place among those of the server. Seats lie side by side, so that a sweep over very many of them that are idle is
// a walk through memory; each has a cache line of its own.
type seat struct {
	busy atomic.Int64 // since when a request is running, in nanoseconds since 1970; 0 = none is
	c    *clientConn  // nil = free
	_    [48]byte
}

// seats are all connections of a server.
type seats struct {
	blocks [][]seat
	free   []*seat
	taken  int
}

const seatsPerBlock = 64

// take gives c a seat.
func (s *seats) take(c *clientConn) {
	if len(s.free) == 0 {
		b := make([]seat, seatsPerBlock)
		s.blocks = append(s.blocks, b)
		for i := range b {
			s.free = append(s.free, &b[len(b)-1-i])
		}
	}
	last := len(s.free) - 1
	c.seat, s.free = s.free[last], s.free[:last]
	c.seat.c = c
	s.taken++
}

// leave gives c's seat back. It may be called more than once.
func (s *seats) leave(c *clientConn) {
	if c.seat.c != c {
		return
	}
	c.seat.c = nil
	s.free = append(s.free, c.seat)
	if s.taken--; s.taken == 0 {
		s.blocks, s.free = nil, nil // memory of a peak goes with its last connection
	}
}

// all yields the seats that are taken.
func (s *seats) all(yield func(*seat) bool) {
	for _, b := range s.blocks {
		for i := range b {
			if b[i].c != nil && !yield(&b[i]) {
				return
			}
		}
	}
}

// beginBusy and endBusy say that c's request is running.
func (c *clientConn) beginBusy(now time.Time) {
	c.seat.busy.Store(now.UnixNano())
	if !c.s.sweeping.Load() { // after the store: either a sweep that is the last one sees it, or it sees that there has been one
		c.s.armSweep()
	}
}

func (c *clientConn) endBusy() { c.seat.busy.Store(0) }

// armSweep makes sure that there is a next sweep.
func (s *Server) armSweep() {
	if !s.sweeping.CompareAndSwap(false, true) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sweeper == nil {
		s.sweeper = time.AfterFunc(sweepEvery, s.sweep)
	} else {
		s.sweeper.Reset(sweepEvery)
	}
}

// sweep cancels what runs for clients that have left.
func (s *Server) sweep() {
	begun := time.Now()
	old, busy := s.busySince(begun.Add(-sweepEvery))
	for _, c := range old {
		if c.watched() && c.Gone() {
			c.cancel()
		}
	}
	if !busy {
		s.sweeping.Store(false)
		if _, busy = s.busySince(begun); !busy || !s.sweeping.CompareAndSwap(false, true) {
			return
		}
	}
	// A look at very many clients takes a while: a tenth of the time at most, as long as one that has left is still noticed within 100 ms.
	s.sweeper.Reset(min(max(sweepEvery, 10*time.Since(begun)), sweepAtLeast))
}

// busySince returns whose requests have been running since t, and whether any run at all.
func (s *Server) busySince(t time.Time) (old []*clientConn, busy bool) {
	since := t.UnixNano()
	s.mu.Lock()
	defer s.mu.Unlock()
	for seat := range s.conns.all {
		if b := seat.busy.Load(); b != 0 {
			busy = true
			if b <= since {
				old = append(old, seat.c)
			}
		}
	}
	return old, busy
}

// Watch makes c a hop.Watcher.
func (c *clientConn) Watch(r hop.Canceller) {
	c.mu.Lock()
	c.running, c.left = r, false
	c.mu.Unlock()
}

// Unwatch ends Watch.
func (c *clientConn) Unwatch() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running = nil
	return !c.left
}

// watched says whether there is something to cancel.
func (c *clientConn) watched() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.running != nil
}

func (c *clientConn) cancel() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.running; r != nil && c.seat.busy.Load() != 0 {
		c.running, c.left = nil, true
		r.Cancel()
	}
}

func (c *clientConn) setMay(m may) {
	c.writing.Lock()
	c.may = m
	c.writing.Unlock()
}

// may is what can be written to a client besides its answer, without changing what that means.
type may int

const (
	mayNothing may = iota
	mayInterim     // an interim answer: the client knows them, and nothing of an earlier answer is held back
	mayZero        // a chunked answer is between two chunks: the next one's size may begin with a zero (RFC 9112 7.1)
)

var question = [...][]byte{mayInterim: []byte("HTTP/1.1 102 Processing\r\n\r\n"), mayZero: []byte("0")}

// Gone says whether the client has left. An end of its direction alone may be a half-close (a client that has said all and waits). The
// first time it is seen, something is written that such a client skips and a closed socket answers with a reset; the next call then
// knows. Where nothing can be written, a client that has not left with a reset is noticed when the function says something.
func (c *clientConn) Gone() bool {
	switch {
	case c.raw == nil:
		return false
	case c.tls:
		return c.goneTLS()
	}
	switch sock.Look(c.raw) {
	case sock.Silent:
		return false
	case sock.Sent:
		if !sock.Finished(c.raw) {
			return false
		}
	case sock.Reset:
		return true
	}
	if !sock.CanAsk {
		return true
	}
	if c.probed.Load() {
		return sock.Dead(c.raw)
	}
	if !c.writing.TryLock() {
		return false
	}
	defer c.writing.Unlock()
	if c.may == mayNothing || c.tcp == nil || !c.probed.CompareAndSwap(false, true) {
		return sock.Dead(c.raw)
	}
	return c.tcp.TryWrite(question[c.may]) != nil
}
