package sock

import (
	"errors"
	"net"
	"syscall"
	"testing"
	"time"
)

func TestLook(t *testing.T) {
	server, client := pair(t)
	rc, _ := server.(syscall.Conn).SyscallConn()
	c := NewConn(server)
	become := func(want State) {
		t.Helper()
		end := time.Now().Add(2 * time.Second)
		for Look(rc) != want || c.Look() != want {
			if time.Now().After(end) {
				t.Fatalf("state %d, %d, want %d", Look(rc), c.Look(), want)
			}
			time.Sleep(time.Millisecond)
		}
	}
	become(Silent)
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

// A connection that is disconnected ends with a reset at once, although somebody reads it.
func TestDisconnect(t *testing.T) {
	server, client := pair(t)
	c := NewConn(server)
	read := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 1)); read <- err }()
	if err := Disconnect(c.Raw()); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	if err := <-read; err == nil {
		t.Error("the reader has read something")
	}
	client.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the other side: %v, want a reset", err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("written after the end")
	}
}
