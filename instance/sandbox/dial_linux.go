//go:build amd64 || arm64

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// dialIn connects to a port of loopback in another network namespace. A socket belongs to the namespace that it was made in, so only
// its making happens there: two changes of the thread's namespace, some microseconds, and no interface, address, route or filter
// rule on the machine for each sandbox.
func dialIn(ctx context.Context, ns, host *os.File, port int) (net.Conn, error) {
	addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: addr, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	fd, err := socketIn(ns, host)
	if err != nil {
		return fail(err)
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	if errors.Is(err, unix.EINPROGRESS) {
		err = connected(ctx, f)
	}
	if err != nil {
		return fail(err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return fail(err)
	}
	_ = c.(*net.TCPConn).SetNoDelay(true)
	return c, nil
}

// socketIn makes a socket in another network namespace. The file cannot be closed meanwhile: its number might then be another's, and the
// socket in another sandbox.
func socketIn(ns, host *os.File) (fd int, err error) {
	rc, err := ns.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd = -1
	ctlErr := rc.Control(func(nsFD uintptr) {
		runtime.LockOSThread()
		if err = unix.Setns(int(nsFD), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("enter the sandbox's network: %w", err)
			return
		}
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if back := unix.Setns(int(host.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread() // else the thread ends with its goroutine
		}
	})
	return fd, errors.Join(ctlErr, err)
}

// connected waits for the end of a connect.
func connected(ctx context.Context, f *os.File) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(time.Second) // on loopback it takes microseconds, unless the accept queue is full
	}
	if err := f.SetDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = rc.Write(func(fd uintptr) bool {
		n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			result = err
		case n != 0:
			result = unix.Errno(n)
		default:
			// Not connected and no error: still under way.
			if _, err := unix.Getpeername(int(fd)); err != nil {
				return false
			}
		}
		return true
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(err, result)
}
