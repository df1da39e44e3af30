package sock

import (
	"net"
	"syscall"
	"testing"
	"time"
)

func TestLook(t *testing.T) {
	server, client := pair(t)
	rc, _ := server.(syscall.Conn).SyscallConn()
	w := NewWatch(server)
	become := func(want State) {
		t.Helper()
		end := time.Now().Add(2 * time.Second)
		for Look(rc) != want || w.Look() != want {
			if time.Now().After(end) {
				t.Fatalf("state %d, %d, want %d", Look(rc), w.Look(), want)
			}
			time.Sleep(time.Millisecond)
		}
	}
	become(Silent)
	if n := testing.AllocsPerRun(100, func() { w.Look() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	client.Write([]byte("x"))
	become(Sent)
	if n, _ := server.Read(make([]byte, 8)); n != 1 {
		t.Error("looking took a byte")
	}
	become(Silent)
	client.(*net.TCPConn).CloseWrite()
	become(Ended)
	server.Close()
	become(Reset)
	if NewWatch(nil) != nil {
		t.Error("a watch over nothing")
	}
}

func TestReset(t *testing.T) {
	for _, half := range []bool{false, true} {
		server, client := pair(t)
		rc, _ := server.(syscall.Conn).SyscallConn()
		if CanAsk && Dead(rc) {
			t.Error("an open connection is dead")
		}
		gone := func() bool { return Look(rc) == Reset }
		if half {
			// Nothing tells an end from a close but a write, which the closed side answers with a reset.
			client.(*net.TCPConn).CloseWrite()
			gone = func() bool { return Dead(rc) }
		}
		client.(*net.TCPConn).SetLinger(0)
		client.Close()
		for end := time.Now().Add(2 * time.Second); !gone(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("half-closed before %v: not seen", half)
			}
		}
	}
}

func pair(t *testing.T) (server, client net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return server, client
}
