package autoscaler

import (
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// Status is what can be seen of a revision's scaling. It is a copy: it does not change after it was handed out.
type Status struct {
	Revision api.RevisionID
	Desired  int // as Knative shows it: 0 once inactive, even while the last instance stays for the grace period
	Ordered  int // what the Scaler was told last
	Ready    int
	Starting int

	Policy              *Policy // what the numbers follow from; shared, not to be changed
	Stable              float64 // average over the stable window, in the policy's metric
	Panic               float64 // average over the panic window
	Measured            bool    // false: no reports within the stable window; Stable and Panic mean nothing
	FromLoad            int     // instances that the averages ask for
	FromEvents          int     // instances that queues asked for within the stable window
	Waiting, Running    int     // requests, of the last event
	Asked               time.Time
	PanicMode           bool
	ExcessBurstCapacity int
	Mode                Mode
	Activators          int // that Knative would put in front
	Activity            Activity
	Why                 Why
	Failure             *endpoints.Failure // of the last start, nil = it did not fail
	Announced           *Announced         // the last shift of traffic to it that the planner was told of; nil = none
	Outlook             string             // what the planner expects, "" = it does not decide
	Wake                time.Time          // when the number may fall or rise next without anything happening; zero = not planned
	Decided             time.Time          // of the last decision or event; zero = long ago
}

// Active says whether the revision's Active condition should be true.
func (s Status) Active() bool { return s.Activity == Active }

// of is the status as that of another revision, or as nobody's (""): without what differs between two idle ones.
func (s *Status) of(id api.RevisionID) Status {
	c := *s
	c.Revision = id
	if id == "" {
		c.Stable, c.Panic, c.Measured, c.FromEvents = 0, 0, false, 0
		c.Waiting, c.Running, c.Asked, c.Wake, c.Decided = 0, 0, time.Time{}, time.Time{}, time.Time{}
	}
	return c
}

// differs says whether somebody who shows the status should look again. Averages move with every report and do not count.
func (s *Status) differs(o *Status) bool {
	return s.Desired != o.Desired || s.Ordered != o.Ordered || s.Ready != o.Ready || s.Starting != o.Starting ||
		s.PanicMode != o.PanicMode || s.Mode != o.Mode || s.Activators != o.Activators || s.Activity != o.Activity ||
		s.Policy != o.Policy
}
