// Package scaling is how servers of all kinds say how a revision scales: the body of GET …/revisions/NAME/scale.
package scaling

import (
	"time"

	"github.com/thawrun/thaw/autoscaler"
)

// Status is the wire form of how a revision scales.
type Status struct {
	Desired             int     `json:"desired"`
	Ready               int     `json:"ready"`
	Starting            int     `json:"starting"`
	Frozen              int     `json:"frozen"`
	Waiting             int     `json:"waiting"`
	Running             int     `json:"running"`
	Mode                string  `json:"mode"`
	Panic               bool    `json:"panic"`
	Stable              float64 `json:"stable"`
	PanicWindow         float64 `json:"panicWindow"`
	Target              float64 `json:"target"`
	ExcessBurstCapacity int     `json:"excessBurstCapacity"`
	Activators          int     `json:"activators"`
	Why                 string  `json:"why"`

	Explain []string `json:"explain"` // the same for people, in sentences
}

// Of is a status with what the autoscaler does not know: frozen instances, and the requests that wait and run.
func Of(st autoscaler.Status, frozen, waiting, running int, now time.Time) Status {
	return Status{
		Desired: st.Desired, Ready: st.Ready, Starting: st.Starting, Frozen: frozen, Waiting: waiting, Running: running,
		Mode: st.Mode.String(), Panic: st.PanicMode, Stable: st.Stable, PanicWindow: st.Panic, Target: st.Policy.Target,
		ExcessBurstCapacity: st.ExcessBurstCapacity, Activators: st.Activators, Why: st.Why.String(),
		Explain: st.Explain(now),
	}
}
