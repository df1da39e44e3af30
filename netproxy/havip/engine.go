package havip

import (
	"net/netip"
	"time"
)

// Role is what a member is at the moment.
type Role string

const (
	Backup  Role = "backup"  // listens
	Master  Role = "master"  // has the addresses
	Fault   Role = "fault"   // a watched device has no link: takes no part
	Leaving Role = "leaving" // was told to end: has the addresses until the peer has them
	Left    Role = "left"
)

// Engine is the rules of one member, those of RFC 5798 section 6.4 and these:
//
//   - It takes over only with a full table of connections (Facts.Full), and takes over from a living master of lower priority only
//     while it is in step with it (Facts.InStep).
//   - With terms (a common key) the higher term wins over priority: who took over last knows the connections.
//   - A master that was stopped so long that the peer has had to take over gives way to whoever is master by then.
//   - A member without a link gives up at once, with priority 0 where that can still be heard.
//   - An impaired member (Facts.Impaired) has a sixteenth of its priority: one that is not takes over from it, and of two the order stays.
//
// It does nothing by itself: each method is told the time and returns what to do.
type Engine struct {
	Priority uint8
	Interval time.Duration
	Own      netip.Addr // decides between equal priorities: the higher one wins
	Stay     bool       // do not take over from a living master (keepalived's nopreempt)

	role   Role
	reason string
	known  uint64 // the highest term heard of
	term   uint64 // of our last take-over
	facts  Facts
	// next is when the master's next advert is due, or when a backup takes over; leaving: when it goes without having heard the peer.
	next     time.Time
	interval time.Duration // the master's, as it says
}

// Facts is what the engine cannot know by itself.
type Facts struct {
	Links  bool // all watched devices have a link
	Full   bool // the table of connections is full
	InStep bool // and it is safe to take over from a living master: the peer's replication is heard, and the links have settled
	// Impaired: a device of a site has no link. It is better to go on than to leave all sites to nobody, but the peer may be better.
	Impaired bool
}

// Orders is what to do, in this order.
type Orders struct {
	Advert   int  // priority of an advert to send, -1: none
	Take     bool // add the addresses and announce them
	Drop     bool // take the addresses away
	Announce bool // announce the addresses once more
}

// Start begins as backup.
func (e *Engine) Start(now time.Time) {
	e.role, e.reason, e.interval = Backup, "started", e.Interval
	e.next = now.Add(e.down())
}

// Role returns the role and why it is that.
func (e *Engine) Role() (Role, string) { return e.role, e.reason }

// Term is the number of our last take-over, which a master's adverts carry.
func (e *Engine) Term() uint64 { return e.term }

// Known is the highest term that was heard of.
func (e *Engine) Known() uint64 { return e.known }

// Learn is told of a term that was heard elsewhere: our next one will be higher.
func (e *Engine) Learn(term uint64) { e.known = max(e.known, term) }

// priority is what the member is worth now.
func (e *Engine) priority() uint8 {
	if e.facts.Impaired {
		return max(e.Priority/16, 1)
	}
	return e.Priority
}

// skew keeps two backups from taking over at once: the higher the priority, the shorter.
func (e *Engine) skew() time.Duration {
	return time.Duration(256-int(e.priority())) * e.interval / 256
}

func (e *Engine) down() time.Duration { return 3*e.interval + e.skew() }

// Stall is the pause after which a master has to assume that the peer has taken over.
func (e *Engine) Stall() time.Duration { return 3 * e.Interval }

func (e *Engine) become(now time.Time, r Role, why string) {
	e.role, e.reason = r, why
	e.next = now.Add(e.down())
}

// Hear is told of an advert of the peer, which is valid and not our own. stalled: we did not run for longer than Stall before.
func (e *Engine) Hear(now time.Time, a Advert, from netip.Addr, stalled bool) Orders {
	ahead, behind := a.Term > e.term, a.Term != 0 && a.Term < e.term
	e.Learn(a.Term)
	switch e.role {
	case Backup:
		return e.hearAsBackup(now, a)
	case Leaving:
		if a.Priority != 0 {
			e.become(now, Left, "the peer has taken over")
			return Orders{Advert: -1, Drop: true}
		}
	case Master:
		wins := a.Priority > e.priority() || a.Priority == e.priority() && e.Own.Less(from)
		switch {
		case a.Priority == 0:
			return Orders{Advert: int(e.priority())}
		case stalled || ahead || wins && !behind:
			e.interval = a.Interval
			e.become(now, Backup, "the peer is master")
			return Orders{Advert: -1, Drop: true}
		default: // its announcements may have misled switches
			return Orders{Advert: int(e.priority()), Announce: true}
		}
	}
	return Orders{Advert: -1}
}

func (e *Engine) hearAsBackup(now time.Time, a Advert) Orders {
	switch {
	case a.Priority == 0:
		e.reason = "the peer gave up"
		if e.facts.Full {
			e.next = now.Add(e.skew())
		}
	case a.Priority < e.priority() && !e.Stay && e.facts.InStep:
		e.reason = "higher priority" // next stays where it is, and comes
	default:
		e.interval = a.Interval
		e.reason = "the peer is master"
		e.next = now.Add(e.down())
	}
	return Orders{Advert: -1}
}

// Tick is to be called when Next has come, and whenever facts change.
func (e *Engine) Tick(now time.Time, f Facts) Orders {
	worth := e.priority()
	e.facts = f
	if e.role == Master && e.priority() != worth {
		e.next = now // the peer decides by what it hears next
	}
	switch {
	case e.role == Left:
	case !f.Links && e.role == Leaving:
		e.become(now, Left, "no link")
		return Orders{Advert: 0, Drop: true}
	case !f.Links && e.role != Fault:
		master := e.role == Master
		e.become(now, Fault, "no link")
		if master {
			return Orders{Advert: 0, Drop: true}
		}
	case f.Links && e.role == Fault:
		e.interval = e.Interval
		e.become(now, Backup, "links are back")
	case now.Before(e.next):
	case e.role == Fault:
		e.next = now.Add(time.Second) // nothing is due; the watch on the devices comes first
	case e.role == Leaving:
		e.become(now, Left, "no peer has taken over")
		return Orders{Advert: -1, Drop: true}
	case e.role == Master:
		e.next = e.next.Add(e.Interval)
		if !now.Before(e.next) { // late by more than one: no burst
			e.next = now.Add(e.Interval)
		}
		return Orders{Advert: int(e.priority())}
	case e.role == Backup && !f.Full:
		e.reason = "waiting for a full table"
		e.next = now.Add(e.Interval)
	case e.role == Backup:
		why := e.reason
		if why != "higher priority" && why != "the peer gave up" {
			why = "no advert of the peer"
		}
		e.known++
		e.term = e.known
		e.role, e.reason, e.next = Master, why, now.Add(e.Interval)
		return Orders{Advert: int(e.priority()), Take: true}
	}
	return Orders{Advert: -1}
}

// Leave is told that the member has to end.
func (e *Engine) Leave(now time.Time) Orders {
	if e.role != Master {
		e.become(now, Left, "told to end")
		return Orders{Advert: -1}
	}
	e.become(now, Leaving, "told to end")
	e.next = now.Add(2*e.down() + 20*time.Millisecond)
	return Orders{Advert: 0}
}

// Next is when Tick wants to be called.
func (e *Engine) Next() time.Time { return e.next }
