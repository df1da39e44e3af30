//go:build unix && !linux

package sock

import "golang.org/x/sys/unix"

func peek(fd uintptr) State {
	var b [1]byte
	for {
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return Silent
		case err != nil:
			return Reset
		case n == 0:
			return Ended
		}
		return Sent
	}
}
