package sock

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CanAsk: the kernel tells a connection that was reset after its end from one that only ended.
const CanAsk = true

// States of the kernel's tcp_states.h.
const (
	tcpClose     = 7
	tcpCloseWait = 8
)

// Dead says that the kernel has given the connection up.
func Dead(rc syscall.RawConn) bool {
	state, ok := tcpState(rc)
	return !ok || state == tcpClose
}

// Finished says that the other side has ended its direction, even if bytes of it are still to be read.
func Finished(rc syscall.RawConn) bool {
	state, ok := tcpState(rc)
	return !ok || state == tcpCloseWait || state == tcpClose
}

// tcpState is not ok for a socket that is closed here. What is no TCP has state 0.
func tcpState(rc syscall.RawConn) (state uint8, ok bool) {
	err := rc.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = info.State
		}
	})
	return state, err == nil
}

// Disconnect ends a connection with a reset and leaves its descriptor open: reads and writes, also those under way, fail from now on.
func Disconnect(rc syscall.RawConn) error {
	var errno syscall.Errno
	err := rc.Control(func(fd uintptr) {
		to := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		_, _, errno = unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&to)), unsafe.Sizeof(to))
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}
