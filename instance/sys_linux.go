package instance

import (
	"context"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// nap sleeps in the kernel, to some tens of microseconds.
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil) // shorter after a signal, which does no harm
}

// connectTimeout bounds one try: on loopback a connection is made or refused at once, unless the function's accept queue is full.
const connectTimeout = 100 * time.Millisecond

// tryConnect says whether somebody listens at addr. Plain system calls: on loopback they take some ten microseconds, a tenth of
// what a net.Dialer with its poller and timers takes, so that many instances can be watched closely while they start.
func tryConnect(_ context.Context, addr *net.TCPAddr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(connectTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		return err
	}
	return unix.Connect(fd, &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())})
}
