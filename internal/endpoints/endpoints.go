// Package endpoints says which instances a revision has and what they are worth, as immutable snapshots. The node agent
// alone writes them and pushes a new one at every change; activator, autoscaler and control read them. Nothing here locks:
// a snapshot is never changed after it was handed out.
package endpoints

import (
	"time"

	"github.com/thawrun/thaw/api"
)

// State is where an instance is in its life.
type State uint8

// The states of an instance, in order.
const (
	Starting State = iota // ordered, not yet listening
	Ready                 // takes requests
	Draining              // takes no new requests, finishes those inside
	Frozen                // is kept, stopped where it stands, for the next demand; does not count as running
	Gone                  // ended; never part of a snapshot, only of the agent's events
)

func (s State) String() string {
	return [...]string{"starting", "ready", "draining", "frozen", "gone"}[s]
}

// StartTimes are the moments of an instance's start; zero = that step did not happen (an adopted instance has none).
type StartTimes struct {
	Decided time.Time // the autoscaler asked for it
	Placed  time.Time // a node and a slot were chosen
	Code    time.Time // its code was there
	Net     time.Time // its network was attached
	Exec    time.Time // its process was started (create ends here)
	Ready   time.Time // it was seen listening and ready
}

// All are the moments in the order in which they follow each other.
func (s *StartTimes) All() [6]*time.Time {
	return [...]*time.Time{&s.Decided, &s.Placed, &s.Code, &s.Net, &s.Exec, &s.Ready}
}

// Instance is one running copy of a revision.
type Instance struct {
	ID       string
	Revision api.RevisionID
	State    State
	Addr     string // host:port that the data path sends requests to
	Capacity int    // requests it takes at once (containerConcurrency); 0 = no limit
	Start    StartTimes
	Adopted  bool // survived a restart of its agent
}

// Failure is why instances of a revision do not get ready or do not stay.
type Failure struct {
	Reason  string    // ExitCode1, ProgressDeadlineExceeded, StartFailed, …: a CamelCase word for conditions
	Message string    // one line for people, with the function's last output
	Count   int       // failed starts in a row
	At      time.Time // of the last one
	Until   time.Time // no start before this (back-off); zero = nobody knows when
	Served  bool      // the instance that failed had been ready: the next one probably gets ready too
}

// Snapshot is everything that is known of one revision's instances at one moment.
type Snapshot struct {
	Revision  api.RevisionID
	Sequence  uint64     // grows with each snapshot of a revision
	Desired   int        // as last ordered
	Instances []Instance // without those that are gone
	Failure   *Failure   // set while the last start failed; nil after one got ready
}

// Count returns how many instances are in the given state.
func (s *Snapshot) Count(state State) int {
	n := 0
	for i := range s.Instances {
		if s.Instances[i].State == state {
			n++
		}
	}
	return n
}

// Stat is one report about a revision's load over the period that ended at Time (normally a second). The autoscaler adds up
// the reports of all sources; Proxied parts are subtracted, so that a request seen by an activator and by an instance counts once.
type Stat struct {
	Revision           api.RevisionID
	Source             string // instance id, or the activator's name
	Activator          bool   // Source is an activator, not an instance
	Time               time.Time
	Concurrency        float64 // average over the period of requests inside (activator: waiting and forwarded)
	ProxiedConcurrency float64 // part of Concurrency that an activator has counted too
	Requests           float64 // requests that began in the period
	ProxiedRequests    float64
}

// Call says that requests of one revision have led to so many of another since it was last told.
type Call struct {
	Caller, Callee api.RevisionID
	N              int
}

// Shift says that the share Weight, in (0, 1], of the requests of one revision is about to go to another one.
type Shift struct {
	From, To api.RevisionID
	Weight   float64
}

// Demand is the true state of a revision's queue at one moment: the event that a cold start is decided on.
type Demand struct {
	Revision api.RevisionID
	Waiting  int       // requests held for want of a free slot
	Running  int       // requests forwarded and not yet answered
	At       time.Time // arrival of the request that raised the event
}
