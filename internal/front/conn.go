package front

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

type listener struct {
	net.Listener
	s *Server
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	cc := &clientConn{Conn: c, s: l.s}
	if sc, ok := c.(syscall.Conn); ok {
		cc.raw, _ = sc.SyscallConn()
	}
	return cc, nil
}

// clientConn is a client's connection with what fasthttp does not keep: whether a message is under way, how the
// connection has to end, and whether the client is still there. It is a hop.Client.
type clientConn struct {
	net.Conn
	s   *Server
	raw syscall.RawConn

	partial  atomic.Bool  // bytes came in since the last write: an end now is a message that broke off
	flushed  atomic.Bool  // something was written since the last exchange began, so nothing of an earlier answer is held back
	served   bool         // an exchange has begun here before; only the connection's goroutine uses it
	clear    atomic.Bool  // no earlier answer was held back when this exchange began: an interim answer may be written
	probed   atomic.Bool  // half-closed client asked already (see Gone)
	bodyIdle atomic.Int64 // ns; > 0 while a body is read: the limit between two bytes
	aborted  atomic.Bool
	linger   atomic.Bool // the client may still be sending: take it for a moment, so that it can read the answer
	reset    atomic.Bool
}

// begin is called at the start of each exchange.
func (c *clientConn) begin() {
	if !c.served {
		c.served = true
		c.flushed.Store(true)
		c.clear.Store(true)
	} else {
		c.clear.Store(c.flushed.Swap(false))
	}
	c.probed.Store(false)
}

var errAborted = errors.New("request body no longer wanted")

// Read tells a message that broke off from a connection that ended, which fasthttp's chunked reader does not.
func (c *clientConn) Read(p []byte) (int, error) {
	if c.aborted.Load() {
		return 0, errAborted
	}
	if d := c.bodyIdle.Load(); d > 0 {
		c.Conn.SetReadDeadline(time.Now().Add(time.Duration(d)))
		if c.aborted.Load() { // Abort may have come between: its deadline must win
			return 0, errAborted
		}
	}
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.partial.Store(true)
	}
	if err == io.EOF && c.partial.Load() {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Write bounds how long a client may take nothing at all.
func (c *clientConn) Write(p []byte) (int, error) {
	c.partial.Store(false)
	c.flushed.Store(true)
	c.Conn.SetWriteDeadline(time.Now().Add(c.s.cfg.WriteIdle))
	return c.Conn.Write(p)
}

// Abort ends a read of the body, now or to come.
func (c *clientConn) Abort() {
	c.aborted.Store(true)
	c.Conn.SetReadDeadline(time.Unix(1, 0))
}

// Reset makes Close send a reset.
func (c *clientConn) Reset() { c.reset.Store(true) }

// CloseWrite ends our direction.
func (c *clientConn) CloseWrite() error {
	if t, ok := c.Conn.(*net.TCPConn); ok {
		return t.CloseWrite()
	}
	return errors.ErrUnsupported
}

const (
	lingerBytes = 256 << 10
	lingerTime  = 500 * time.Millisecond
)

// Close ends the connection the way it has to end. Closing while the client's bytes are unread would make the kernel send
// a reset, which takes the answer away from a client that has not read it yet; so a bounded rest is read first.
func (c *clientConn) Close() error {
	if c.reset.Load() {
		if t, ok := c.Conn.(*net.TCPConn); ok {
			t.SetLinger(0)
		}
		return c.Conn.Close()
	}
	if c.linger.Load() && c.CloseWrite() == nil {
		c.Conn.SetReadDeadline(time.Now().Add(lingerTime))
		_, _ = io.CopyN(io.Discard, c.Conn, lingerBytes)
	}
	return c.Conn.Close()
}

// Gone says whether the client has left. An end of its direction alone may be a half-close (a client that has said all and waits): the
// first time it is seen, an interim answer is sent, which such a client skips and a closed socket answers with a
// reset. The next call then knows.
func (c *clientConn) Gone() bool {
	if c.raw == nil {
		return false
	}
	switch peek(c.raw) {
	case peerSilent:
		return false
	case peerReset:
		return true
	}
	if !canAsk || !c.clear.Load() {
		return !canAsk
	}
	if c.probed.CompareAndSwap(false, true) {
		_, err := c.Conn.Write([]byte("HTTP/1.1 102 Processing\r\n\r\n"))
		return err != nil
	}
	return dead(c.raw)
}

// upgraded is a client's connection after its upgrade: reads see what was buffered, and the write half can be closed.
type upgraded struct {
	net.Conn
	c *clientConn
}

func (u *upgraded) CloseWrite() error { return u.c.CloseWrite() }
