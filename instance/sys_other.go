//go:build unix && !linux

package instance

import "time"

func nap(d time.Duration) { time.Sleep(d) }
