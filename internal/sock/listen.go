package sock

import (
	"context"
	"net"
	"syscall"
	"time"
)

// Keep-alive of accepted connections: what net sets by itself, one connection after the other.
const (
	keepIdle     = 15 * time.Second
	keepInterval = 15 * time.Second
	keepCount    = 9
)

// Listen is net.Listen for TCP, but keep-alive is set on the listening socket, from which the connections inherit it: four
// system calls less for each.
func Listen(addr string) (net.Listener, error) { return listen(addr, false) }

// ListenShared is Listen for an address that other processes of the same user may listen on too: the kernel shares connections out
// among them (SO_REUSEPORT).
func ListenShared(addr string) (net.Listener, error) { return listen(addr, true) }

func listen(addr string, shared bool) (net.Listener, error) {
	lc := net.ListenConfig{}
	if inherits {
		lc.KeepAlive = -1
	}
	lc.Control = func(_, _ string, rc syscall.RawConn) error {
		var err error
		if cerr := rc.Control(func(fd uintptr) { err = options(int(fd), shared) }); cerr != nil {
			return cerr
		}
		return err
	}
	return lc.Listen(context.Background(), "tcp", addr)
}

func options(fd int, shared bool) error {
	if shared {
		if err := share(fd); err != nil {
			return err
		}
	}
	return keepAlive(fd)
}
