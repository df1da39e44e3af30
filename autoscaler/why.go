package autoscaler

import (
	"math/bits"
	"strings"
)

// Why is the set of reasons that shaped a decision, for log, metric and status alike. The zero value says nothing.
type Why uint32

// The reasons, in the order in which they apply.
const (
	WhyNoData           Why = 1 << iota // no report within the stable window: the last valid decision stays
	WhyStable                           // sized from the stable window's average
	WhyPanic                            // in panic mode and sized from the panic window's average
	WhyPanicHold                        // in panic mode: not below the most that was wanted since it began
	WhyUpRate                           // cut to max-scale-up-rate times the ready instances
	WhyDownRate                         // raised to the ready instances divided by max-scale-down-rate
	WhyActivationScale                  // raised to activation-scale
	WhyScaleDownDelay                   // raised to the most that was wanted within scale-down-delay
	WhyEvent                            // raised to what the length of the queue asked for
	WhyInitialScale                     // raised to initial-scale, which has not been reached yet
	WhyMinScale                         // raised to min-scale
	WhyMaxScale                         // cut to max-scale
	WhyScaleToZeroOff                   // one instead of zero, because enable-scale-to-zero is false
	WhyActivating                       // zero has to wait: instances are being started
	WhyActiveHold                       // zero has to wait: active for less than the stable window
	WhyGrace                            // zero has to wait: in proxy mode for less than scale-to-zero-grace-period
	WhyRetention                        // zero has to wait: inactive for less than scale-to-zero-pod-retention-period
	WhyIdle                             // zero: no load for the stable window and the grace period
	WhyActivationFailed                 // zero: no instance got ready in time, or none can be started and nobody asks
	WhyBackOff                          // an event asked for more, but starts fail and the back-off is not over
	WhyStartRate                        // cut to what start-rate and start-burst leave for this moment
	WhyAdopted                          // not below the instances that were found at start, before the first report came
	WhyPlanner                          // the planner keeps it, or starts it ahead
	WhyUnknown                          // nothing is known yet: what there is stays
)

var whyWords = [...]string{
	"no-data", "stable", "panic", "panic-hold", "max-scale-up-rate", "max-scale-down-rate", "activation-scale",
	"scale-down-delay", "event", "initial-scale", "min-scale", "max-scale", "scale-to-zero-off", "activating",
	"active-hold", "grace", "retention", "idle", "activation-failed", "back-off", "start-rate", "adopted", "planner", "unknown",
}

// Has says whether all reasons of w2 are in w.
func (w Why) Has(w2 Why) bool { return w&w2 == w2 }

// String is the reasons' words with commas between them, in the order of the constants.
func (w Why) String() string {
	if bits.OnesCount32(uint32(w)) == 1 { // the common case needs no building
		if i := bits.TrailingZeros32(uint32(w)); i < len(whyWords) {
			return whyWords[i]
		}
	}
	var b strings.Builder
	for i, word := range whyWords {
		if w&(1<<i) == 0 {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(word)
	}
	return b.String()
}
