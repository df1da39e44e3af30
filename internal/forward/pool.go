package forward

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/sock"
)

// conn is a connection to the address. Its reader comes from a pool and is there only while an answer is read.
type conn struct {
	*sock.Conn
	br    *bufio.Reader
	used  time.Time
	first bool      // the next read is an answer's first
	asks  []byte    // what that read has to send before it waits; nil = nothing
	sent  int       // of asks
	stale bool      // the connection had ended, or said something, before asks was sent
	ended error     // what the next read will say
	wend  time.Time // the write deadline; zero = none
	limit time.Time // reads fail after this; zero = never
	armed time.Time // what the socket was told: never after limit while that is set, and never taken back

	watcher hop.Watcher // who watches over a client that may leave; nil = nobody
}

func newConn(nc net.Conn) *conn {
	s := sock.NewConn(nc)
	if s == nil {
		return nil
	}
	return &conn{Conn: s}
}

// follow makes the client's leaving close the connection, until unfollow.
func (c *conn) follow(client hop.Client) {
	if w, ok := client.(hop.Watcher); ok {
		c.watcher = w
		w.Watch(c)
	}
}

// Cancel makes the connection a hop.Canceller. It ends with a reset: if the other side is a hop too, it need not ask whether only one direction
// has ended.
func (c *conn) Cancel() {
	if sock.Disconnect(c.Raw()) != nil {
		c.SetLinger(0)
		c.Close()
	}
}

// unfollow says whether the connection has been spared.
func (c *conn) unfollow() bool {
	w := c.watcher
	c.watcher = nil
	return w == nil || w.Unwatch()
}

// until makes reads fail after t; the zero time means never. Only a limit that is nearer than the last one is told to the socket: one that has moved
// away is looked at when the old one has passed (see again), so that a row of requests, each with the same limit, costs no timer each.
func (c *conn) until(t time.Time) {
	c.limit = t
	if !t.IsZero() && (c.armed.IsZero() || t.Before(c.armed)) {
		c.arm()
	}
}

func (c *conn) arm() {
	c.armed = c.limit
	c.SetReadDeadline(c.limit)
}

func (c *conn) writeUntil(t time.Time) {
	if t != c.wend {
		c.wend = t
		c.SetWriteDeadline(t)
	}
}

// again says that a read was ended by a limit that no longer holds.
func (c *conn) again(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) || !c.limit.IsZero() && !time.Now().Before(c.limit) {
		return false
	}
	c.arm()
	return true
}

// firstRead is how much is read of an answer at first: most heads, with most small bodies. What comes behind need not go through memory.
const firstRead = 4 << 10

// Read reads within the limit.
func (c *conn) Read(p []byte) (int, error) {
	if c.first {
		c.first = false
		p = p[:min(len(p), firstRead)]
	}
	if c.ended != nil {
		err := c.ended
		c.ended = nil
		return 0, err
	}
	if asks := c.asks; asks != nil {
		c.asks = nil
		if n, done, err := c.askRead(asks, p); done {
			return n, err
		}
	}
	for {
		n, err := c.Conn.Read(p)
		if n > 0 || err == nil || !c.again(err) {
			return n, err
		}
	}
}

// askRead is Ask within the limit. It is not done when asks has been sent, and the wait has still to be waited.
func (c *conn) askRead(asks, p []byte) (n int, done bool, err error) {
	for {
		c.sent, n, c.stale, err = c.Ask(asks, p)
		switch {
		case err == nil && n == 0:
			return 0, true, errNotAsked
		case err == nil || !c.again(err):
			return n, true, err
		case c.sent > 0:
			return 0, false, nil
		}
	}
}

var errNotAsked = errors.New("the connection is stale, or took a part of the request only")

// ask sends p and waits for the first bytes of the answer. It does nothing when the connection is stale. When it has sent all of p, what became of the
// wait is the reader's to say.
func (c *conn) ask(p []byte) (n int, stale bool, err error) {
	c.attach()
	c.asks, c.sent, c.stale = p, 0, false
	if _, err = c.br.Peek(1); err == errNotAsked {
		err = nil
	}
	if c.sent == len(p) {
		c.ended = err
		err = nil
	}
	return c.sent, c.stale, err
}

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readerSize) }}

// get returns a connection, one that was kept if there is one. Whoever sends on a kept one looks first whether it is stale.
func (f *Forward) get(now time.Time) (c *conn, kept bool, err error) {
	for {
		f.mu.Lock()
		n := len(f.idle)
		if n == 0 {
			f.mu.Unlock()
			break
		}
		c = f.idle[n-1]
		f.idle[n-1] = nil
		f.idle = f.idle[:n-1]
		f.mu.Unlock()
		if now.Sub(c.used) < f.cfg.IdleConn {
			return c, true, nil
		}
		c.Close()
	}
	nc, err := f.cfg.Dial(context.Background(), "tcp", f.cfg.Addr)
	if err != nil {
		return nil, false, fmt.Errorf("%w: %w", hop.ErrNotSent, err)
	}
	return newConn(nc), false, nil
}

// Donate gives a connection that a probe has opened and not used; the first request will.
func (f *Forward) Donate(nc net.Conn) {
	if c := newConn(nc); c != nil {
		f.put(c)
	} else {
		nc.Close()
	}
}

func (c *conn) attach() {
	if c.br != nil {
		return
	}
	c.br = readers.Get().(*bufio.Reader)
	c.br.Reset(c)
	c.first, c.ended = true, nil
}

func (c *conn) detach() {
	if c.br != nil {
		c.br.Reset(nil)
		readers.Put(c.br)
		c.br = nil
	}
}

func (f *Forward) put(c *conn) {
	c.detach()
	now := time.Now()
	c.used = now
	var old []*conn
	f.mu.Lock()
	if f.closed || len(f.idle) >= f.cfg.MaxIdle {
		old = append(old, c)
	} else {
		f.idle = append(f.idle, c)
		// The longest unused are in front; a few are looked at each time, so that a peak is given back without a timer.
		for len(f.idle) > 1 && len(old) < 2 && now.Sub(f.idle[0].used) >= f.cfg.IdleConn {
			old = append(old, f.idle[0])
			f.idle = f.idle[1:]
		}
	}
	f.mu.Unlock()
	for _, c := range old {
		c.Close()
	}
}

func (c *conn) discard() {
	c.unfollow()
	c.Close()
	c.detach()
}

func (f *Forward) release(c *conn, keep bool) {
	if c.unfollow() && keep {
		c.until(time.Time{})
		c.writeUntil(time.Time{})
		f.put(c)
	} else {
		c.discard()
	}
}
