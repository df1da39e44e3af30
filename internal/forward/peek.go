package forward

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// quiet says that nothing has come on the connection, neither data nor an end.
func quiet(sc syscall.Conn) bool {
	rc, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	var b [1]byte
	if rc.Control(func(fd uintptr) {
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		ok = err == unix.EAGAIN
	}) != nil {
		return false
	}
	return ok
}
