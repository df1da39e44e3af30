package autoscaler

import (
	"time"

	"github.com/thawrun/thaw/api"
)

// Status is what can be seen of a revision's scaling. It is a copy: it does not change after it was handed out.
type Status struct {
	Revision api.RevisionID
	Desired  int // as Knative shows it: 0 once inactive, even while the last instance stays for the grace period
	Ordered  int // what the Scaler was told last
	Ready    int
	Starting int

	Metric              Metric
	Stable              float64 // average over the stable window, in Metric's unit
	Panic               float64 // average over the panic window
	Target              float64 // for one instance
	Measured            bool    // false: no reports within the stable window; Stable and Panic mean nothing
	PanicMode           bool
	ExcessBurstCapacity int
	Mode                Mode
	Activators          int // that Knative would put in front
	Activity            Activity
	Reachable           bool
	Why                 Why
	Decided             time.Time // of the last decision or event
}

// Active says whether the revision's Active condition should be true.
func (s Status) Active() bool { return s.Activity == Active }

// differs says whether somebody who shows the status should look again. Averages move with every report and do not count.
func (s Status) differs(o Status) bool {
	return s.Desired != o.Desired || s.Ordered != o.Ordered || s.Ready != o.Ready || s.Starting != o.Starting ||
		s.PanicMode != o.PanicMode || s.Mode != o.Mode || s.Activators != o.Activators || s.Activity != o.Activity ||
		s.Reachable != o.Reachable || s.Target != o.Target
}
