package sock

import (
	"net"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestListen: what is accepted has the keep-alive that net would have given it.
func TestListen(t *testing.T) {
	ours, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	nets, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer nets.Close()
	if a, b := keepAliveOf(t, ours), keepAliveOf(t, nets); a != b {
		t.Errorf("%v, net's is %v", a, b)
	}
}

func keepAliveOf(t *testing.T, ln net.Listener) (v [5]int) {
	t.Helper()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	rc, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	rc.Control(func(fd uintptr) {
		for i, o := range [][2]int{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE}, {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE}, {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL},
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT}, {unix.IPPROTO_TCP, unix.TCP_NODELAY},
		} {
			if v[i], err = unix.GetsockoptInt(int(fd), o[0], o[1]); err != nil {
				t.Fatal(err)
			}
		}
	})
	return v
}
