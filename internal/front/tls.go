package front

import (
	"bytes"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/sock"
)

// recordHandshake is the first byte of every TLS connection (RFC 8446 5.1). No method of HTTP begins with it, nor does HTTP/2's preface.
const recordHandshake = 0x16

// errNoUse ends a connection that was made for its handshake only: ACME's tls-alpn-01.
var errNoUse = errors.New("nothing to be served in the protocol that was agreed on")

// speaksTLS looks at the first byte of a new connection, which has come.
func (c *clientConn) speaksTLS() bool {
	b, err := c.br.Peek(1)
	return err == nil && b[0] == recordHandshake
}

// startTLS shakes hands and waits for what the client says then. The memory for requests is given back before: a client that is slow here
// costs what crypto/tls keeps for it.
func (c *clientConn) startTLS() bool {
	b, _ := c.br.Peek(c.br.Buffered())
	t := tls.Server(&rewound{Conn: c.Conn, first: bytes.Clone(b)}, c.s.cfg.TLS)
	c.rest()
	end := c.s.handshakes.begin(c.Conn)
	// The context is for who looks for a certificate, which may take longer than the client has.
	ctx, cancel := context.WithTimeout(context.Background(), c.s.cfg.HeaderTimeout)
	err := t.HandshakeContext(ctx)
	cancel()
	end()
	agreed := t.ConnectionState().NegotiatedProtocol
	if err == nil && agreed != "" && agreed != "h2" && agreed != "http/1.1" {
		t.Close()
		err = errNoUse
	}
	if c.s.cfg.Handshake != nil && err != errNoUse {
		c.s.cfg.Handshake(err)
	}
	if err != nil {
		return false
	}
	c.s.mu.Lock() // kill may be looking
	c.Conn, c.tls, c.alpn = t, true, agreed
	c.s.mu.Unlock()
	c.Conn.SetDeadline(time.Time{})
	c.readEnd, c.writeEnd = time.Time{}, time.Time{}
	return c.await(c.s.cfg.HeaderTimeout)
}

// rewound is a connection of which some bytes have been read.
type rewound struct {
	net.Conn
	first []byte
}

func (c *rewound) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		if c.first = c.first[n:]; len(c.first) == 0 {
			c.first = nil
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

// readBehind is a read that begins with the byte that was taken while the connection was idle.
func (c *clientConn) readBehind(p []byte) (int, error) {
	c.hasAhead = false
	p[0] = c.ahead[0]
	if len(p) == 1 {
		return 1, nil
	}
	n, err := c.Conn.Read(p[1:])
	return n + 1, err
}

// goneTLS says whether a client has left. In TLS an ended direction is an ended connection; the alert that announces the end lies unread before it.
func (c *clientConn) goneTLS() bool {
	switch sock.Look(c.raw) {
	case sock.Silent:
		return false
	case sock.Sent:
		return sock.Finished(c.raw)
	}
	return true
}

// handshakes are those under way, the oldest first. One too many ends the oldest and not itself: who takes his time on purpose is
// always older than who does not, so that a crowd of the slow can keep nobody out.
type handshakes struct {
	max int

	mu    sync.Mutex
	conns list.List // of net.Conn; guarded by mu
}

// end ends all.
func (h *handshakes) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for e := h.conns.Front(); e != nil; e = e.Next() {
		e.Value.(net.Conn).Close()
	}
}

// begin takes nc in; end must be called when its handshake is over.
func (h *handshakes) begin(nc net.Conn) (end func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conns.Len() >= h.max {
		h.conns.Remove(h.conns.Front()).(net.Conn).Close()
	}
	e := h.conns.PushBack(nc)
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.conns.Remove(e) // nothing, if it was taken out above
	}
}
