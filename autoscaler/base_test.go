package autoscaler

import (
	"math"
	"time"
)

// t0 is an even whole second.
var t0 = time.Unix(1_700_000_000, 0)

func at(t float64) time.Time { return t0.Add(time.Duration(math.Round(t * 1e9))) }
