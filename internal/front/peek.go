//go:build unix

package front

import (
	"syscall"

	"golang.org/x/sys/unix"
)

type peer int

const (
	peerSilent peer = iota // nothing new, or data
	peerEnded              // end of the stream: closed, or half-closed
	peerReset
)

// peek looks at the socket without blocking and without taking anything.
func peek(rc syscall.RawConn) (p peer) {
	var b [1]byte
	if rc.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case err == nil && n == 0:
			p = peerEnded
		case err != nil && err != unix.EAGAIN && err != unix.EINTR:
			p = peerReset
		}
	}) != nil {
		return peerReset // closed by ourselves
	}
	return p
}
