package sock

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// CanAsk: the kernel tells a connection that was reset after its end from one that only ended.
const CanAsk = true

const tcpClose = 7 // TCP_CLOSE of the kernel's tcp_states.h

// Dead says that the kernel has given the connection up.
func Dead(rc syscall.RawConn) (yes bool) {
	if rc.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		yes = err == nil && info.State == tcpClose
	}) != nil {
		return true
	}
	return yes
}
