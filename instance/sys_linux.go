package instance

import (
	"time"

	"golang.org/x/sys/unix"
)

// nap sleeps in the kernel, to some tens of microseconds.
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil) // shorter after a signal, which does no harm
}
