//go:build unix

package front

import (
	"syscall"

	"golang.org/x/sys/unix"
)

type peer int

const (
	peerSilent peer = iota // nothing new
	peerSent               // bytes to be read
	peerEnded              // end of the stream: closed, or half-closed
	peerReset
)

// peek looks at the socket without blocking and without taking anything.
func peek(rc syscall.RawConn) (p peer) {
	var b [1]byte
	if rc.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case n > 0:
			p = peerSent
		case err == nil:
			p = peerEnded
		case err != nil && err != unix.EAGAIN && err != unix.EINTR:
			p = peerReset
		}
	}) != nil {
		return peerReset // closed by ourselves
	}
	return p
}

// readable says, without blocking, that a read will return at once: with bytes, an end or an error.
func readable(fd uintptr) bool {
	var b [1]byte
	_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return err != unix.EAGAIN && err != unix.EINTR
}
