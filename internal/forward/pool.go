package forward

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/sock"
)

// conn is a connection to the address. Its reader comes from a pool and is there only while an exchange uses it.
type conn struct {
	net.Conn
	br    *bufio.Reader
	used  time.Time
	sock  *sock.Watch // nil = cannot be asked
	watch func() bool // ends the watch over a client that may leave; nil = none
}

func newConn(nc net.Conn) *conn { return &conn{Conn: nc, sock: sock.NewWatch(nc)} }

// follow makes the end of ctx end the connection, until release.
func (c *conn) follow(ctx context.Context) {
	c.watch = context.AfterFunc(ctx, func() { c.Conn.Close() })
}

// unfollow says whether the connection has been spared.
func (c *conn) unfollow() bool {
	if c.watch == nil {
		return true
	}
	stop := c.watch
	c.watch = nil
	return stop()
}

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readerSize) }}

func (f *Forward) get() (c *conn, err error) {
	now := time.Now()
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
		if now.Sub(c.used) < f.cfg.IdleConn && c.alive() {
			c.attach()
			return c, nil
		}
		c.Close()
	}
	d := net.Dialer{Timeout: f.cfg.DialTimeout}
	nc, err := d.DialContext(context.Background(), "tcp", f.cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", hop.ErrNotSent, err)
	}
	c = newConn(nc)
	c.attach()
	return c, nil
}

// Donate gives a connection that a probe has opened and not used; the first request will.
func (f *Forward) Donate(nc net.Conn) { f.put(newConn(nc)) }

func (c *conn) attach() {
	c.br = readers.Get().(*bufio.Reader)
	c.br.Reset(c.Conn)
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

// CloseWrite ends our direction only.
func (c *conn) CloseWrite() error {
	if t, ok := c.Conn.(*net.TCPConn); ok {
		return t.CloseWrite()
	}
	return errors.ErrUnsupported
}

// alive says whether a kept connection is still open and silent. It does not block.
func (c *conn) alive() bool { return c.sock == nil || c.sock.Look() == sock.Silent }

func (f *Forward) release(c *conn, keep bool) {
	if c.unfollow() && keep {
		c.SetDeadline(time.Time{})
		f.put(c)
	} else {
		c.discard()
	}
}
