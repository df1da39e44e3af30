package sock

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

func conns(t *testing.T) (c *Conn, other net.Conn) {
	t.Helper()
	server, client := pair(t)
	if c = NewConn(server); c == nil {
		t.Fatal("a TCP connection is not taken")
	}
	return c, client
}

func TestNewConn(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if NewConn(a) != nil {
		t.Error("a pipe is no TCP connection")
	}
}

// More than the socket's buffers hold goes both ways at once, in sizes on both sides of quick.
func TestReadWrite(t *testing.T) {
	for _, size := range []int{1, 700, quick, quick + 1} {
		c, other := conns(t)
		sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<18) // 4 MiB
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := io.Copy(other, io.LimitReader(other, int64(len(sent))))
			if err != nil {
				t.Error(err)
			}
			other.(*net.TCPConn).CloseWrite()
		})
		wg.Go(func() {
			for p := sent; len(p) > 0; {
				n, err := c.Write(p[:min(max(size, 512), len(p))])
				if err != nil {
					t.Error(err)
					return
				}
				p = p[n:]
			}
		})
		var got bytes.Buffer
		p := make([]byte, max(size, 512))
		for {
			n, err := c.Read(p)
			got.Write(p[:n])
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		wg.Wait()
		if !bytes.Equal(got.Bytes(), sent) {
			t.Errorf("size %d: %d bytes came back, not the same %d", size, got.Len(), len(sent))
		}
	}
}

func TestErrors(t *testing.T) {
	c, other := conns(t)
	c.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	c.SetReadDeadline(time.Time{})
	other.(*net.TCPConn).SetLinger(0)
	other.Close()
	var op *net.OpError
	if _, err := c.Read(make([]byte, 1)); !errors.As(err, &op) {
		t.Errorf("after a reset: %v", err)
	}
	if n, err := c.Write([]byte("x")); err == nil || n != 0 {
		t.Errorf("write after a reset: %d, %v", n, err)
	}
	c.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

var question = []byte("ask")

func TestAsk(t *testing.T) {
	c, other := conns(t)
	go func() {
		b := make([]byte, 8)
		for {
			n, err := other.Read(b)
			if err != nil {
				return
			}
			other.Write(b[:n])
		}
	}()
	b := make([]byte, 8)
	for range 1000 { // an answer that comes before the wait must not be missed
		if n, got, stale, err := c.Ask(question, b); n != 3 || string(b[:got]) != "ask" || stale || err != nil {
			t.Fatal(n, got, stale, err)
		}
	}
	if n := testing.AllocsPerRun(100, func() { c.Ask(question, b) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	// With a deadline that has passed nothing is written.
	c.SetReadDeadline(time.Unix(1, 0))
	if n, _, _, err := c.Ask(question, b); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(n, err)
	}
}

// The end of the connection in place of an answer is told as Read tells it.
func TestAskEnds(t *testing.T) {
	c, other := conns(t)
	go func() {
		io.ReadFull(other, make([]byte, len(question)))
		other.Close()
	}()
	if n, got, stale, err := c.Ask(question, make([]byte, 8)); n != len(question) || got != 0 || stale || err != io.EOF {
		t.Error(n, got, stale, err)
	}
}

// Nothing is sent on a connection that the other side has closed, or has written to unasked.
func TestAskStale(t *testing.T) {
	for name, spoil := range map[string]func(net.Conn){
		"closed":  func(c net.Conn) { c.Close() },
		"written": func(c net.Conn) { c.Write([]byte("x")) },
	} {
		c, other := conns(t)
		spoil(other)
		for end := time.Now().Add(2 * time.Second); c.Look() == Silent && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if n, _, stale, err := c.Ask(question, make([]byte, 8)); n != 0 || !stale || err != nil {
			t.Errorf("%s: %d, stale %v, %v", name, n, stale, err)
		}
	}
}
