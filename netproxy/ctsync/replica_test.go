package ctsync

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"
)

// memory is a table as the kernel's, with connections made by hand.
type memory struct {
	entries map[Key]Entry
	applied int
}

func (m *memory) apply(list []Change) {
	m.applied += len(list)
	for _, c := range list {
		_, there := m.entries[c.Key]
		switch {
		case c.Kind == Destroy:
			delete(m.entries, c.Key)
		case c.Kind == offer && there:
		case c.Kind == Update && there, c.Kind == Copy && there:
			c.Reply = m.entries[c.Key].Reply // the kernel does not change translations
			m.entries[c.Key] = c.Entry
		default:
			m.entries[c.Key] = c.Entry
		}
	}
}

func (m *memory) walk() (walker, error) {
	w := &memoryWalker{}
	for _, e := range m.entries {
		w.left = append(w.left, Change{Copy, e})
	}
	return w, nil
}

type memoryWalker struct{ left []Change }

func (w *memoryWalker) next(list []Change) ([]Change, bool, error) {
	n := min(len(w.left), 100)
	list = append(list, w.left[:n]...)
	w.left = w.left[n:]
	return list, len(w.left) > 0, nil
}

func (w *memoryWalker) close() {}

// pair is two replicas on a virtual clock, with a wire that loses datagrams.
type pair struct {
	t     *testing.T
	now   time.Time
	side  [2]*replica
	table [2]*memory
	wire  [2][][]byte // on their way to
	loss  func() bool
	dead  [2]bool
}

func newPair(t *testing.T) *pair {
	p := &pair{t: t, now: time.Unix(1000, 0), loss: func() bool { return false }}
	for i := range 2 {
		p.table[i] = &memory{entries: map[Key]Entry{}}
		p.start(i)
	}
	return p
}

func (p *pair) start(i int) {
	p.now = p.now.Add(time.Millisecond)
	p.side[i] = newReplica(p.now, []byte("a secret of the two"), p.table[i], func(b []byte) {
		if !p.loss() && !p.dead[1-i] {
			p.wire[1-i] = append(p.wire[1-i], append([]byte(nil), b...))
		}
	})
	p.side[i].beat(p.now)
	p.dead[i] = false
}

// run lets a time pass, in steps of a millisecond; during is called in each.
func (p *pair) run(d time.Duration, during func()) {
	for end := p.now.Add(d); p.now.Before(end); p.now = p.now.Add(time.Millisecond) {
		for i, r := range p.side {
			if p.dead[i] {
				p.wire[i] = nil
				continue
			}
			queue := p.wire[i]
			p.wire[i] = nil
			for _, b := range queue {
				r.receive(p.now, b)
			}
			for range 4 {
				r.work(p.now)
			}
			r.tick(p.now)
		}
		if during != nil {
			during()
		}
	}
}

// TestLateNewsOfTheDeposed: what the old master sent before it knew of the new one is read after that has taken over. That a connection was
// established counts; that one has ended, or is back at its beginning, does not.
func TestLateNewsOfTheDeposed(t *testing.T) {
	p := newPair(t)
	p.side[0].setRole(p.now, true, 1)
	p.run(500*time.Millisecond, nil)
	begun, ended, known := entry(1), entry(2), entry(3)
	begun.Status, begun.TCP.State = 0, 1
	for _, e := range []Entry{begun, ended, known} {
		p.table[0].entries[e.Key] = e
		p.side[0].local(p.now, Change{Create, e})
	}
	p.side[0].flush(p.now)
	p.run(100*time.Millisecond, nil)
	again := known
	again.Status, again.TCP.State = 0, 1
	p.side[0].local(p.now, Change{Update, entry(1)})
	p.side[0].local(p.now, Change{Destroy, ended})
	p.side[0].local(p.now, Change{Update, again})
	p.side[0].flush(p.now)
	p.side[1].setRole(p.now, true, 2) // before it has read that
	late := p.wire[1]
	p.wire[1] = nil
	for _, b := range late {
		p.side[1].receive(p.now, b)
	}
	got := p.table[1].entries
	if e := got[begun.Key]; e.TCP.State != tcpEstablished {
		t.Errorf("a connection that was established is left as %+v", e)
	}
	if _, there := got[ended.Key]; !there {
		t.Error("a connection was ended on the word of the deposed")
	}
	if e := got[known.Key]; e.TCP.State != tcpEstablished {
		t.Errorf("a connection went back to %+v", e)
	}
}

func entry(n int) Entry {
	o := Tuple{Src: [4]byte{10, 1, byte(n >> 16), byte(n >> 8)}, Dst: [4]byte{10, 2, 0, 1}, SPort: uint16(1024 + n%256), DPort: 80}
	e := Entry{Key: Key{Proto: tcp, Orig: o}, Reply: o.inverse(tcp), Status: assured | seenReply, Timeout: 100, TCP: TCPState{Known: true, State: tcpEstablished}}
	e.Reply.Dst, e.Reply.DPort = [4]byte{10, 2, 0, 10}, uint16(n+1)
	return e
}

// happen is an event on a side: the table changes and the replica hears of it.
func (p *pair) happen(i int, kind Kind, e Entry) {
	if kind == Destroy {
		delete(p.table[i].entries, e.Key)
	} else {
		p.table[i].entries[e.Key] = e
	}
	p.side[i].local(p.now, Change{kind, e})
}

func (p *pair) same() {
	p.t.Helper()
	a, b := p.table[0].entries, p.table[1].entries
	if !maps.Equal(a, b) {
		only := func(x, y map[Key]Entry) (n int) {
			for k, e := range x {
				if y[k] != e {
					n++
				}
			}
			return n
		}
		p.t.Fatalf("the tables differ: %d of %d entries of a are not on b, %d of %d of b not on a; b: %+v", only(a, b), len(a), only(b, a), len(b), p.side[1].stats)
	}
}

func TestEventsArrive(t *testing.T) {
	p := newPair(t)
	p.side[0].setRole(p.now, true, 1)
	p.run(300*time.Millisecond, nil)
	if !p.side[0].full || !p.side[1].full {
		t.Fatal("two empty tables are not full")
	}
	for n := range 1000 {
		p.happen(0, Create, entry(n))
	}
	p.run(2*time.Millisecond, nil)
	if p.same(); len(p.table[1].entries) != 1000 {
		t.Fatal(len(p.table[1].entries))
	}
	for n := range 500 {
		p.happen(0, Destroy, entry(n))
	}
	p.happen(1, Destroy, entry(700)) // it ran out on the backup, which is not believed
	p.run(100*time.Millisecond, nil)
	if len(p.table[0].entries) != 500 || len(p.table[1].entries) != 499 {
		t.Errorf("a has %d, b %d", len(p.table[0].entries), len(p.table[1].entries))
	}
	p.run(compareEvery+time.Second, nil)
	p.same() // the copy of each minute brings it back
	if lag := p.side[0].stats.LagSeconds; lag != 0 {
		t.Errorf("lag of %v s with nothing under way", lag)
	}
}

// TestLossyWire loses a tenth of all datagrams while tables change and the backup starts anew: the tables end up the same.
func TestLossyWire(t *testing.T) {
	for seed := range uint64(3) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		p := newPair(t)
		p.side[0].setRole(p.now, true, 1)
		for n := range 3000 {
			p.table[0].entries[entry(n).Key] = entry(n) // before anybody listened
		}
		for n := 10_000; n < 10_100; n++ {
			p.table[1].entries[entry(n).Key] = entry(n) // strays
		}
		other := entry(5) // the same connection with another translation: a stray too
		other.Reply.DPort++
		p.table[1].entries[other.Key] = other
		p.loss = func() bool { return rnd.IntN(10) == 0 }
		churn := func() {
			for range rnd.IntN(40) {
				e, kind := entry(rnd.IntN(6000)), Create
				if _, there := p.table[0].entries[e.Key]; there {
					kind = []Kind{Update, Destroy}[rnd.IntN(2)]
					e.TCP.State = uint8(rnd.IntN(maxTCPState))
				}
				p.happen(0, kind, e)
			}
		}
		p.run(2*time.Second, churn)
		p.dead[1] = true
		p.run(time.Second, churn)
		p.start(1)
		p.run(2*time.Second, churn)
		p.side[0].restart(p.now) // events were lost before they were read
		for n := 5000; n < 5100; n++ {
			p.table[0].entries[entry(n).Key] = entry(n)
		}
		p.run(2*time.Second, churn)
		p.run(5*time.Second, nil)
		if !p.side[1].full {
			t.Fatalf("seed %d: the backup's table is not full: %+v", seed, p.side[1].stats)
		}
		// What an event said while a copy went on may be older than what the copy of the next minute says.
		p.run(compareEvery+5*time.Second, nil)
		p.same()
	}
}

// TestLargeTable copies 50,000 entries to a fresh peer, without ever having more under way than the window.
func TestLargeTable(t *testing.T) {
	p := newPair(t)
	p.side[0].setRole(p.now, true, 1)
	for n := range 50_000 {
		p.table[0].entries[entry(n).Key] = entry(n)
	}
	p.run(5*time.Second, func() {
		if n := len(p.side[0].serve.flight); n > copyWindow {
			t.Fatalf("%d datagrams under way", n)
		}
	})
	if p.same(); len(p.table[1].entries) != 50_000 || !p.side[1].full {
		t.Fatalf("%d entries, full: %t", len(p.table[1].entries), p.side[1].full)
	}
}

// TestPartition: what changes while the wire is cut is there soon after, with the ring and without.
func TestPartition(t *testing.T) {
	for _, n := range []int{100, 70_000} { // the ring holds 55,000 events
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			p := newPair(t)
			p.side[0].setRole(p.now, true, 1)
			p.run(time.Second, nil)
			p.loss = func() bool { return true }
			for i := range n {
				p.happen(0, Create, entry(i))
			}
			p.run(time.Second, nil)
			p.loss = func() bool { return false }
			p.run(100*time.Millisecond, nil)
			if n > 1000 && p.side[1].full {
				t.Error("the backup calls its table full after it missed events")
			}
			p.run(8*time.Second, nil)
			if p.same(); !p.side[1].full {
				t.Error("the backup's table is not full")
			}
		})
	}
}

// TestDeposed: a master that has been replaced does not change or end what the new one has.
func TestDeposed(t *testing.T) {
	p := newPair(t)
	p.side[0].setRole(p.now, true, 1)
	p.run(time.Second, nil)
	p.happen(0, Create, entry(1))
	p.happen(0, Create, entry(2))
	p.run(100*time.Millisecond, nil)
	p.side[1].setRole(p.now, true, 2)
	old := entry(1)
	old.TCP.State = 7
	p.side[0].local(p.now, Change{Update, old})
	p.side[0].local(p.now, Change{Destroy, entry(2)})
	p.side[0].local(p.now, Change{Create, entry(3)})
	p.run(2*time.Millisecond, nil)
	got := p.table[1].entries
	if len(got) != 3 || got[entry(1).Key] != entry(1) {
		t.Errorf("%+v", got)
	}
}

func TestForeignDatagrams(t *testing.T) {
	p := newPair(t)
	p.run(time.Second, nil)
	var kept []byte
	r := p.side[1]
	stranger := newReplica(p.now.Add(time.Hour), []byte("another secret of it"), p.table[0], func(b []byte) { kept = append([]byte(nil), b...) })
	stranger.beat(p.now)
	session := r.in.session
	for _, b := range [][]byte{kept, kept[:10], nil, {}} {
		before := r.stats.Refused
		if r.receive(p.now, b); r.stats.Refused != before+1 || r.in.session != session {
			t.Errorf("%x was not refused", b)
		}
	}
	// A datagram of a former life of the peer, well signed.
	p.side[0].transmit(datagram{kind: typeHeartbeat}, nil)
	old := p.wire[1][len(p.wire[1])-1]
	p.start(0)
	p.run(time.Second, nil)
	session = r.in.session
	if r.receive(p.now, old); r.in.session != session {
		t.Error("an old session was taken up again")
	}
}

func FuzzDatagram(f *testing.F) {
	seal := newSealer(nil)
	e := entry(7)
	c := Change{Update, e}
	for _, d := range []datagram{{kind: typeHeartbeat, session: 1}, {kind: typeEvents, session: 1 << 60}, {kind: typeCopy, session: 1 << 60, base: 9}, {kind: typeCopyEnd}} {
		f.Add(seal.seal(c.append(d.appendHeader(nil))))
		f.Add(seal.seal(d.appendHeader(nil)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &memory{entries: map[Key]Entry{}}
		sent := 0
		now := time.Unix(1000, 0)
		r := newReplica(now, nil, m, func([]byte) { sent++ })
		for range 3 {
			r.receive(now, b)
			r.work(now)
			now = now.Add(time.Second)
			r.tick(now)
		}
		if m.applied > 3*maxDatagram/changeSize || sent > 3*(againMost+copyWindow) {
			t.Errorf("one datagram of %d bytes applied %d changes and sent %d datagrams", len(b), m.applied, sent)
		}
		if d, ok := parse(b); ok {
			list, ok := changes(nil, d.body)
			for i := range list {
				if back, fine := parseChange(list[i].append(nil)); !fine || back != list[i] {
					t.Errorf("%+v became %+v", list[i], back)
				}
			}
			if ok && len(list)*changeSize != len(d.body) {
				t.Error("not all of the body was read")
			}
		}
	})
}

func FuzzEvent(f *testing.F) {
	var r request
	e := entry(7)
	r.create(&e, 1)
	r.update(&e, 2)
	r.remove(e.Key, ctaTupleReply, e.Reply, 3)
	f.Add([]byte(r))
	f.Fuzz(func(t *testing.T, b []byte) {
		for {
			m, rest, ok := nextMessage(b)
			if !ok {
				return
			}
			if c, ok := parseEvent(m); ok {
				var again request
				again.create(&c.Entry, 1)
				if _, _, ok := nextMessage(again); !ok {
					t.Errorf("%+v became a message that cannot be read", c)
				}
			}
			b = rest
		}
	})
}
