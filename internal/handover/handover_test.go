package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const limit = 10 * time.Second

var quiet = slog.New(slog.DiscardHandler)

// open is Open with Close at the end of the test.
func open(t *testing.T, path string, addrs ...string) *Sockets {
	t.Helper()
	s, err := Open(path, addrs, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func ready(t *testing.T, s *Sockets) {
	t.Helper()
	if err := s.Ready(); err != nil {
		t.Fatal(err)
	}
}

func isTaken(s *Sockets, within time.Duration) bool {
	select {
	case <-s.Taken():
		return true
	case <-time.After(within):
		return false
	}
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(limit))
	t.Cleanup(func() { c.Close() })
	return c
}

// greet accepts n connections and greets each.
func greet(ln net.Listener, n int) error {
	for range n {
		ln.(*net.TCPListener).SetDeadline(time.Now().Add(limit))
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		io.WriteString(c, "hello")
		c.Close()
	}
	return nil
}

// Connections that wait in the kernel's queue when the process ends are accepted by the next one.
func TestTakeOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	a := open(t, path, "127.0.0.1:0")
	ready(t, a)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	addr := a.Listeners[0].Addr().String()
	waiting := make([]net.Conn, 50)
	for i := range waiting {
		waiting[i] = dial(t, addr)
	}
	b := open(t, path, "127.0.0.1:0", "localhost:0")
	if b.Inherited || b.Listeners[0].Addr().String() != addr || isTaken(a, 20*time.Millisecond) {
		t.Fatalf("inherited %v, %v, taken before ready", b.Inherited, b.Listeners[0].Addr())
	}
	ready(t, b)
	if !isTaken(a, limit) {
		t.Fatal("not taken")
	}
	a.Close()
	waiting = append(waiting, dial(t, addr))
	if err := greet(b.Listeners[0], len(waiting)); err != nil {
		t.Fatal(err)
	}
	for _, c := range waiting {
		if got, err := io.ReadAll(c); string(got) != "hello" {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

// The other way to share a port, SO_REUSEPORT, has a queue for each process, and what waits in it dies with its process. This is why sockets
// are handed over; if this test fails, the kernel has learnt to move them (net.ipv4.tcp_migrate_req).
func TestReusePortLosesConnections(t *testing.T) {
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_migrate_req"); err != nil || strings.TrimSpace(string(b)) != "0" {
		t.Skip("only for Linux with net.ipv4.tcp_migrate_req=0")
	}
	share := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) (err error) {
		rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return err
	}}
	a, err := share.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	waiting := make([]net.Conn, 50)
	for i := range waiting {
		waiting[i] = dial(t, a.Addr().String())
	}
	b, err := share.Listen(context.Background(), "tcp", a.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	a.Close()
	for _, c := range waiting {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("%v, expected a reset", err)
		}
	}
}

// A process that waits in Accept can still give its listener up after its socket was sent, whatever has been done to the socket.
func TestAcceptEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	a := open(t, path, "127.0.0.1:0")
	ready(t, a)
	accepted := make(chan error, 1)
	go func() {
		_, err := a.Listeners[0].Accept()
		accepted <- err
	}()
	ready(t, open(t, path, "127.0.0.1:0"))
	if !isTaken(a, limit) {
		t.Fatal("not taken")
	}
	a.Close()
	select {
	case err := <-accepted:
		if !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	case <-time.After(limit):
		t.Fatal("Accept does not end: the socket blocks")
	}
}

// A successor that fails, at any time before its word, changes nothing.
func TestSuccessorFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	a := open(t, path, "127.0.0.1:0")
	ready(t, a)
	addr := a.Listeners[0].Addr().String()
	for name, fail := range map[string]func(){
		"ends": func() { open(t, path, "127.0.0.1:0").Close() },
		"cannot listen elsewhere": func() {
			if s, err := Open(path, []string{"127.0.0.1:0", "192.0.2.1:1"}, quiet); err == nil {
				s.Close()
				t.Error("no error")
			}
		},
		"hangs up at once": func() {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		},
		"says something else": func() {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, "steady\n")
			io.ReadAll(c)
			c.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			fail()
			c := dial(t, addr)
			if err := greet(a.Listeners[0], 1); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(c); string(got) != "hello" {
				t.Errorf("%q, %v", got, err)
			}
			if isTaken(a, 0) {
				t.Error("taken")
			}
		})
	}
	ready(t, open(t, path, "127.0.0.1:0"))
	if !isTaken(a, limit) {
		t.Error("a good one after the bad ones did not take over")
	}
}

func TestGenerations(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	old := open(t, path, "127.0.0.1:0", "127.0.0.1:0") // two of the same name keep their order
	ready(t, old)
	addr := old.Listeners[1].Addr().String()
	for i := range 20 {
		next := open(t, path, "127.0.0.1:0", "127.0.0.1:0")
		ready(t, next)
		if !next.Inherited || next.Listeners[1].Addr().String() != addr || !isTaken(old, limit) {
			t.Fatalf("generation %d", i)
		}
		old.Close()
		old = next
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	old.Close()
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

// What is at the path when nobody serves there.
func TestPath(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	s := open(t, stale, "127.0.0.1:0")
	if s.Inherited {
		t.Error("inherited from nobody")
	}
	ready(t, s)

	file := filepath.Join(dir, "file")
	os.WriteFile(file, []byte("mine"), 0o600)
	if _, err := Open(file, []string{"127.0.0.1:0"}, quiet); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Error(err)
	}
	if b, _ := os.ReadFile(file); string(b) != "mine" {
		t.Error("the file is gone")
	}
	s = open(t, filepath.Join(dir, "missing", "sock"), "127.0.0.1:0")
	if err := s.Ready(); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Error(err)
	}
	none := open(t, "", "127.0.0.1:0")
	ready(t, none)
	none.Close()
}

// What a process at the path might send.
func TestBadPredecessor(t *testing.T) {
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	f, err := udp.(*net.UDPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, c := range []struct {
		say    string
		rights []byte
		want   string
	}{
		{"HTTP/1.1 400 Bad Request\r\n", nil, "does not hand over"},
		{"", nil, "does not"},
		{`{"version":2,"names":[]}`, nil, "version 2"},
		{`{"version":1,"names":["a","b"]}`, nil, "names 2 sockets and sent 0"},
		{`{"version":1,"names":["127.0.0.1:0"]}`, syscall.UnixRights(int(f.Fd())), `socket "127.0.0.1:0"`},
		{`{"version":1,"names":["` + strings.Repeat("a", maxHello) + `"]}`, nil, "does not hand over"},
	} {
		path := filepath.Join(t.TempDir(), "sock")
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			conn, err := ln.AcceptUnix()
			if err == nil {
				conn.WriteMsgUnix([]byte(c.say), c.rights, nil)
				conn.Close()
			}
		}()
		if _, err := Open(path, []string{"127.0.0.1:0"}, quiet); err == nil || !strings.Contains(fmt.Sprint(err), c.want) {
			t.Errorf("%.40q: %v, want %q", c.say, err, c.want)
		}
		ln.Close()
	}
}

// What is accepted names exactly as many sockets as came.
func FuzzHello(f *testing.F) {
	f.Add([]byte(`{"version":1,"names":["127.0.0.1:80","[::]:443"]}`), 2)
	f.Add([]byte(`{"version":1,"names":["a","a"]}`), 2)
	f.Add([]byte(`{"names":null}`), 0)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		names, err := parseHello(b, n)
		if err != nil {
			return
		}
		if len(names) != n {
			t.Errorf("%q for %d sockets", names, n)
		}
	})
}
