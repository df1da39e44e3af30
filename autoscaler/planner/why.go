package planner

import "strings"

// Why is the set of reasons of a decision.
type Why uint8

// The reasons.
const (
	WhyLoad   Why = 1 << iota // requests are there, or were a moment ago
	WhyAge                    // the next request is expected soon enough to keep or start an instance for it
	WhyTimer                  // requests come at a fixed distance
	WhyStream                 // the spread of a stream of requests
	WhyCall                   // a caller has a request
	WhyShift                  // traffic will be shifted to this version
)

var whyTexts = [...]string{
	"requests are there",
	"the next request is expected soon enough",
	"requests come at a fixed distance",
	"reserve for the spread of a steady stream",
	"a function that calls it has a request",
	"traffic is about to be shifted to it",
}

// String names the reasons in words, or says that there are none.
func (w Why) String() string {
	var parts []string
	for i, text := range whyTexts {
		if w>>i&1 == 1 {
			parts = append(parts, text)
		}
	}
	if len(parts) == 0 {
		return "nothing is expected"
	}
	return strings.Join(parts, "; ")
}

func (l *level) why(now float64) Why {
	switch {
	case now-l.seen < minHold:
		return WhyLoad
	case l.choice == byTimer:
		return WhyTimer
	}
	return WhyAge
}
