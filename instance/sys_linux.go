package instance

import (
	"context"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// nap sleeps in the kernel. It ends some 0.1 ms late (BenchmarkConnect, two busy cores).
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil) // shorter after a signal, which does no harm
}

// connectTimeout bounds one try: on loopback a connection is made or refused at once, unless the function's accept queue is full.
const connectTimeout = 100 * time.Millisecond

// tryConnect says whether somebody listens at addr. Plain system calls: a net.Dialer takes as long on loopback but makes 24
// allocations where this makes one (BenchmarkConnect), and many instances are watched closely while they start.
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

// reserve takes a port for this agent among all agents of this machine: it binds an abstract socket of that name, which the kernel
// gives back when the process ends, however that happens. An error means that another has it.
func reserve(port int) (io.Closer, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "@thaw-instance-port-" + strconv.Itoa(port)}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return descriptor(fd), nil
}

type descriptor int

func (d descriptor) Close() error { return unix.Close(int(d)) }

// accepting returns how many connections wait in the accept queue of a listening socket. For such a socket the kernel tells that
// in the field that otherwise counts segments without acknowledgement (tcp_get_info in net/ipv4/tcp.c).
func accepting(listener *os.File) int {
	rc, err := listener.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	_ = rc.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
			n = int(info.Unacked)
		}
	})
	return n
}
