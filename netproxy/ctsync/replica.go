package ctsync

import "time"

const (
	heartbeatEvery = 50 * time.Millisecond
	againEvery     = 5 * time.Millisecond   // requests for the same gap
	gapPatience    = 200 * time.Millisecond // then the whole table is copied
	pullEvery      = 100 * time.Millisecond // requests for a copy that has not begun
	copyResend     = 200 * time.Millisecond // copied datagrams without an answer
	copyPatience   = 3 * time.Second        // without progress, then the copy is given up and begun anew
	compareEvery   = time.Minute
	silence        = 4 * heartbeatEvery // after which the peer may have been without us

	ringSize   = 2048 // datagrams of events that can be sent again, 55,000 events
	againMost  = 256  // datagrams sent for one request
	copyWindow = 64   // datagrams of a copy under way
	ackEvery   = 16
	maxSeen    = 4 << 20 // entries of a copy that are remembered; a larger table is copied, but nothing taken away after it
)

// table is the kernel's connection tracking.
type table interface {
	// apply enters what the peer says: Create replaces what is there, Update and Copy change or make it, Destroy takes it away, and
	// offer makes it if there is nothing.
	apply([]Change)
	// walk starts reading all entries that are replicated.
	walk() (walker, error)
}

type walker interface {
	// next appends some entries, as Copy; false when there are no more.
	next([]Change) ([]Change, bool, error)
	close()
}

// replica is one side's rules. All calls are from one goroutine, and say what time it is.
type replica struct {
	send    func([]byte) // lossy
	table   table
	seal    *sealer
	session uint64
	master  bool
	term    uint64 // the highest that was heard of or set
	full    bool   // the table has everything that the peer's had
	heard   time.Time
	beatAt  time.Time
	out     outgoing
	in      incoming
	pull    pulling
	serve   serving
	stats   Stats

	pending []Change // changes that the next datagram of events takes
	scratch []Change
	buf     []byte
}

// outgoing is the stream of our events.
type outgoing struct {
	next, acked uint64
	ring        [ringSize][]byte // by number modulo size
	sentAt      [ringSize]time.Time
}

// incoming is the stream of the peer's events.
type incoming struct {
	session  uint64 // of the peer; 0 = never heard
	master   bool   // the peer is in charge, as its last heartbeat said: other datagrams may have been sent before
	known    bool   // next is right; false until a copy begins
	next     uint64
	gapSince time.Time // zero: no gap
	askedAt  time.Time
}

// pulling is a copy that we asked for, and the sweep after it.
type pulling struct {
	active, begun bool
	nonce, next   uint64
	startedAt     time.Time
	askedAt       time.Time
	progressAt    time.Time
	seen          map[Key]Tuple    // entries that the peer has, with their reply
	gone          map[Key]struct{} // ended since the copy began: the copy is older
	sweep         walker           // set when the copy is whole and what the peer lacks is taken away
	differ        bool             // the sweep found an entry that is another connection there
	overflow      bool
}

// serving is a copy that the peer asked for.
type serving struct {
	walker     walker // nil when read to the end
	active     bool
	nonce      uint64
	base       uint64   // number of the first datagram of events that the listing may lack
	next       uint64   // index of the next datagram
	flight     [][]byte // sent and not acknowledged; the last one has index next-1
	entries    []Change // read and not sent
	progressAt time.Time
	resentAt   time.Time
	ended      bool
}

func newReplica(now time.Time, key []byte, t table, send func([]byte)) *replica {
	return &replica{send: send, table: t, seal: newSealer(key), session: uint64(now.UnixNano()), beatAt: now}
}

// restart begins a new session, because events of this side were lost: the peer will ask for a copy.
func (r *replica) restart(now time.Time) {
	r.session = max(r.session+1, uint64(now.UnixNano()))
	r.out.next, r.out.acked = 0, 0
	r.pending = r.pending[:0]
	r.endServe()
	r.stats.Overruns++
	r.beat(now)
}

func (r *replica) transmit(d datagram, list []Change) []byte {
	d.session, d.to, d.term = r.session, r.in.session, r.term
	if r.master {
		d.flags = flagMaster
	}
	b := d.appendHeader(r.buf[:0])
	for i := range list {
		b = list[i].append(b)
	}
	r.buf = r.seal.seal(b)
	r.send(r.buf)
	return r.buf
}

// local is an event of our own table. Only the one in charge says that a connection has ended: the entries of the other see no
// packets and run out though the connection lives.
func (r *replica) local(now time.Time, c Change) {
	if c.Kind == Destroy && !r.master {
		return
	}
	if r.pending = append(r.pending, c); len(r.pending) == perDatagram {
		r.flush(now)
	}
}

// flush sends the events that wait.
func (r *replica) flush(now time.Time) {
	if len(r.pending) == 0 {
		return
	}
	slot := r.out.next % ringSize
	r.stats.EventsSent += uint64(len(r.pending))
	r.out.ring[slot] = append(r.out.ring[slot][:0], r.transmit(datagram{kind: typeEvents, a: r.out.next}, r.pending)...)
	r.out.sentAt[slot] = now
	r.out.next++
	r.pending = r.pending[:0]
}

func (r *replica) beat(now time.Time) {
	r.beatAt = now.Add(heartbeatEvery)
	r.transmit(datagram{kind: typeHeartbeat, a: r.out.next, b: r.in.next}, nil)
}

// receive takes a datagram from the peer.
func (r *replica) receive(now time.Time, b []byte) {
	b, sealed := r.seal.open(b)
	d, ok := parse(b)
	// Sessions only grow, so an older one is a straggler or a replay.
	if !sealed || !ok || d.session < r.in.session || d.session == 0 {
		r.stats.Refused++
		return
	}
	list, ok := changes(r.scratch[:0], d.body)
	if !ok {
		r.stats.Refused++
		return
	}
	if list != nil {
		r.scratch = list
	}
	silent := now.Sub(r.heard) > silence
	r.heard = now
	if d.session != r.in.session {
		r.in = incoming{session: d.session}
		r.endServe()
		r.doubt(now)
	} else if silent {
		r.doubt(now)
	}
	old := d.term < r.term
	r.term = max(r.term, d.term)
	if d.kind != typeHeartbeat && d.kind != typePull && d.to != r.session {
		return // meant for what we were before
	}
	switch d.kind {
	case typeHeartbeat:
		if master := d.flags == flagMaster; master != r.in.master {
			if r.in.master = master; master && !r.pull.active {
				r.startPull(now) // from now on it knows what is a stray
			}
		}
		if d.to == r.session && d.b <= r.out.next {
			r.out.acked = d.b
		}
		if r.in.known && d.a > r.in.next {
			r.gap(now)
		}
	case typeEvents:
		r.events(now, d, list, old && r.master)
	case typeAgain:
		r.again(d.a)
	case typePull:
		r.startServe(now, d.a)
	case typeCopy, typeCopyEnd:
		r.copied(now, d, list)
	case typeCopyAck:
		r.copyAcked(now, d)
	}
}

// events enters the peer's events in their order. deposed: they come from one who was in charge before us and does not know, or did not
// when it sent them. What it says of an entry that is there is not believed, but that a connection was established: on a busy machine
// that may come after we have taken over, and packets of a connection that has only begun are refused.
func (r *replica) events(now time.Time, d datagram, list []Change, deposed bool) {
	if !r.in.known || d.a < r.in.next {
		return
	}
	if d.a > r.in.next {
		r.gap(now)
		return
	}
	r.in.next++
	r.in.gapSince = time.Time{}
	r.stats.EventsReceived += uint64(len(list))
	if deposed {
		kept := list[:0]
		for _, c := range list {
			switch {
			case c.Kind == Create:
				c.Kind = offer
				kept = append(kept, c)
			case c.Kind == Update && c.Status&assured != 0 && (c.Proto != tcp || c.TCP.State == tcpEstablished):
				kept = append(kept, c)
			}
		}
		list = kept
	}
	if r.pull.active {
		for _, c := range list {
			r.note(c)
		}
	}
	r.table.apply(list)
}

// note keeps the memory of a running copy in step with events.
func (r *replica) note(c Change) {
	if c.Kind == Destroy {
		delete(r.pull.seen, c.Key)
		r.pull.gone[c.Key] = struct{}{}
	} else {
		delete(r.pull.gone, c.Key)
		r.pull.seen[c.Key] = c.Reply
	}
	r.pull.overflow = r.pull.overflow || len(r.pull.seen)+len(r.pull.gone) > maxSeen
	if r.pull.overflow {
		clear(r.pull.seen)
		clear(r.pull.gone)
	}
}

// gap asks for the events that are missing; everything after them comes again too.
func (r *replica) gap(now time.Time) {
	if r.in.gapSince.IsZero() {
		r.in.gapSince = now
	}
	if now.Sub(r.in.askedAt) >= againEvery {
		r.in.askedAt = now
		r.stats.Gaps++
		r.transmit(datagram{kind: typeAgain, a: r.in.next}, nil)
	}
}

// again sends events once more, as they were. What has left the ring is not answered: the peer will ask for a copy.
func (r *replica) again(from uint64) {
	if from+ringSize < r.out.next {
		return
	}
	for n := from; n < min(r.out.next, from+againMost); n++ {
		r.stats.Resent++
		r.send(r.out.ring[n%ringSize])
	}
}

// setRole says whether this side is in charge, and the term. The entries of one that is not any longer insist on TCP windows, which it
// does not see grow from now on, until a copy tells them not to. The table is as full as before.
func (r *replica) setRole(now time.Time, master bool, term uint64) {
	deposed := r.master && !master
	r.master, r.term = master, max(r.term, term)
	if deposed {
		r.startPull(now)
	}
}

// doubt says that the table may have missed something: it is full again when it has been copied.
func (r *replica) doubt(now time.Time) {
	r.full = false
	r.startPull(now)
}

// startPull asks for a copy of the peer's table.
func (r *replica) startPull(now time.Time) {
	r.endPull()
	r.stats.Resyncs++
	r.pull = pulling{active: true, nonce: r.pull.nonce + 1, startedAt: now, progressAt: now, askedAt: now, seen: map[Key]Tuple{}, gone: map[Key]struct{}{}}
	if r.pull.nonce == 1 {
		r.pull.nonce = r.session // a nonce of a former life must not fit
	}
	r.transmit(datagram{kind: typePull, a: r.pull.nonce}, nil)
}

func (r *replica) endPull() {
	if r.pull.sweep != nil {
		r.pull.sweep.close()
	}
	r.pull = pulling{nonce: r.pull.nonce, startedAt: r.pull.startedAt}
}

// copied takes a datagram of the copy that we asked for.
func (r *replica) copied(now time.Time, d datagram, list []Change) {
	p := &r.pull
	if !p.active || d.a != p.nonce || p.sweep != nil {
		r.transmit(datagram{kind: typeCopyAck, a: d.a, b: d.b + 1}, nil) // over already: let the peer forget it
		return
	}
	if d.b != p.next {
		r.transmit(datagram{kind: typeCopyAck, a: p.nonce, b: p.next}, nil)
		return
	}
	p.next++
	p.begun, p.progressAt = true, now
	if d.b == 0 && !r.in.known {
		r.in.known, r.in.next, r.in.gapSince = true, d.base, time.Time{}
	}
	kept := list[:0]
	for _, c := range list {
		_, ended := p.gone[c.Key]
		_, newer := p.seen[c.Key] // an event may have overtaken what was read for the copy
		if !ended && !newer {
			kept = append(kept, c)
			p.seen[c.Key] = c.Reply
		}
	}
	p.overflow = p.overflow || len(p.seen) > maxSeen
	if p.overflow {
		clear(p.seen)
	}
	// One in charge copies only to find the beginning of the peer's events: what it does not have itself has ended.
	if !r.master {
		r.table.apply(kept)
	}
	if d.kind == typeCopyEnd || p.next%ackEvery == 0 {
		r.transmit(datagram{kind: typeCopyAck, a: p.nonce, b: p.next}, nil)
	}
	if d.kind == typeCopyEnd {
		r.full = r.in.known
		r.startSweep()
	}
}

// startSweep begins to take away what the peer does not have, if the peer is the one who knows.
func (r *replica) startSweep() {
	if !r.in.master || r.master || r.pull.overflow {
		r.endPull()
		return
	}
	w, err := r.table.walk()
	if err != nil {
		r.stats.Errors++
		r.endPull()
		return
	}
	r.pull.sweep = w
}

// startServe begins to send our table.
func (r *replica) startServe(now time.Time, nonce uint64) {
	if r.serve.active && r.serve.nonce == nonce {
		return // the request was sent again before our first datagram arrived
	}
	r.endServe()
	w, err := r.table.walk()
	if err != nil {
		r.stats.Errors++
		return
	}
	// Events that wait belong before the copy: its first datagram names the first that come after it began.
	r.flush(now)
	r.serve = serving{active: true, walker: w, nonce: nonce, base: r.out.next, progressAt: now, resentAt: now, entries: r.serve.entries[:0]}
}

func (r *replica) endServe() {
	if r.serve.walker != nil {
		r.serve.walker.close()
	}
	r.serve = serving{entries: r.serve.entries[:0]}
}

func (r *replica) copyAcked(now time.Time, d datagram) {
	s := &r.serve
	if !s.active || d.a != s.nonce || d.b > s.next {
		return
	}
	left := int(s.next - d.b)
	if left >= len(s.flight) {
		return
	}
	s.flight = s.flight[len(s.flight)-left:]
	s.progressAt, s.resentAt = now, now
	if s.ended && left == 0 {
		r.endServe()
	}
}

// work does a piece of a copy or a sweep; false when there is nothing to do before something comes or time passes.
func (r *replica) work(now time.Time) bool {
	did := r.sendCopy()
	return r.sweepSome(now) || did
}

func (r *replica) sendCopy() bool {
	s := &r.serve
	if !s.active || s.ended || len(s.flight) >= copyWindow {
		return false
	}
	if s.walker != nil && len(s.entries) < perDatagram {
		list, more, err := s.walker.next(s.entries)
		s.entries = list
		if err != nil {
			r.stats.Errors++
			r.endServe() // the peer asks again
			return false
		}
		if !more {
			s.walker.close()
			s.walker = nil
		}
	}
	for sent := 0; len(s.flight) < copyWindow && (len(s.entries) >= perDatagram || s.walker == nil); sent++ {
		n := min(len(s.entries), perDatagram)
		d := datagram{kind: typeCopy, a: s.nonce, b: s.next, base: s.base}
		// The end is a datagram of its own kind with what is left, but never the first, which has the number before its entries.
		s.ended = s.walker == nil && n == len(s.entries) && s.next > 0
		if s.ended {
			d.kind = typeCopyEnd
			n = 0
			if len(s.entries) > 0 {
				d.kind, s.ended, n = typeCopy, false, len(s.entries)
			}
		}
		s.flight = append(s.flight, append([]byte(nil), r.transmit(d, s.entries[:n])...))
		s.entries = append(s.entries[:0], s.entries[n:]...)
		s.next++
		if s.ended {
			break
		}
	}
	return true
}

func (r *replica) sweepSome(now time.Time) bool {
	p := &r.pull
	if p.sweep == nil {
		return false
	}
	if r.master || p.overflow { // what comes now is ours to know
		r.endPull()
		return false
	}
	list, more, err := p.sweep.next(nil)
	if err != nil {
		r.stats.Errors++
		r.endPull()
		return false
	}
	var stray []Change
	for _, c := range list {
		reply, there := p.seen[c.Key]
		if there && reply == c.Reply {
			continue
		}
		p.differ = p.differ || there
		c.Kind = Destroy
		stray = append(stray, c)
	}
	r.stats.Swept += uint64(len(stray))
	r.table.apply(stray)
	if !more {
		again := p.differ
		r.endPull()
		if again { // the peer's connection with that address and port was kept out by a stray
			r.startPull(now)
		}
	}
	return more
}

// tick does what time demands, and returns when it wants to be called next.
func (r *replica) tick(now time.Time) time.Time {
	r.flush(now)
	if !now.Before(r.beatAt) {
		r.beat(now)
	}
	if r.in.known && !r.in.gapSince.IsZero() {
		if now.Sub(r.in.gapSince) > gapPatience {
			r.in.known, r.in.gapSince = false, time.Time{}
			r.doubt(now)
		} else {
			r.gap(now)
		}
	}
	p := &r.pull
	switch {
	case p.active && p.sweep == nil && now.Sub(p.progressAt) > copyPatience:
		r.startPull(now)
	case p.active && !p.begun && now.Sub(p.askedAt) >= pullEvery:
		p.askedAt = now
		r.transmit(datagram{kind: typePull, a: p.nonce}, nil)
	case !p.active && r.in.session != 0 && !r.full,
		!p.active && r.in.known && !r.master && now.Sub(p.startedAt) > compareEvery:
		r.startPull(now)
	}
	if s := &r.serve; s.active && len(s.flight) > 0 {
		if now.Sub(s.progressAt) > copyPatience {
			r.endServe()
		} else if now.Sub(s.resentAt) >= copyResend {
			s.resentAt = now
			for _, b := range s.flight {
				r.stats.Resent++
				r.send(b)
			}
		}
	}
	r.stats.LagSeconds = 0
	if r.out.acked < r.out.next && r.out.next-r.out.acked <= ringSize {
		r.stats.LagSeconds = now.Sub(r.out.sentAt[r.out.acked%ringSize]).Seconds()
	}
	if !r.in.gapSince.IsZero() {
		return now.Add(againEvery)
	}
	return r.beatAt
}

// Stats is what a side counts since it began.
type Stats struct {
	EventsSent     uint64  `json:"eventsSent"`
	EventsReceived uint64  `json:"eventsReceived"`
	Gaps           uint64  `json:"gaps"`       // requests for missing events
	Resent         uint64  `json:"resent"`     // datagrams sent once more
	Resyncs        uint64  `json:"resyncs"`    // copies asked for, the one of each minute included
	Overruns       uint64  `json:"overruns"`   // times the kernel's events came faster than they were read
	Swept          uint64  `json:"swept"`      // entries taken away because the peer did not have them
	Refused        uint64  `json:"refused"`    // datagrams that were malformed, unsigned or old
	Errors         uint64  `json:"errors"`     // refusals of the kernel, other than what is expected
	LagSeconds     float64 `json:"lagSeconds"` // age of the oldest event that the peer has not confirmed; it confirms every 50 ms
}
