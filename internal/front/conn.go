package front

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/sock"
)

// clientConn is a client's connection. One goroutine serves it; while it is idle it holds nothing but that. It is the hop.Client of
// its exchanges.
type clientConn struct {
	net.Conn
	s   *Server
	raw syscall.RawConn // nil = what stands under Conn cannot be asked (TLS)
	tls bool
	w   *work // nil while idle

	// Reading: see Read. Owned by whoever reads, the connection's goroutine or an upload's.
	reading  phase
	headEnd  time.Time
	readEnd  time.Time // the deadline as last set, except by wake and Abort
	writeEnd time.Time

	mu    sync.Mutex // guards idle and woken, and the read deadline while idle changes
	idle  bool
	woken bool

	clear   atomic.Bool // nothing of an earlier answer is held back, and the client knows interim answers: one may be written
	probed  atomic.Bool // half-closed client asked already (see Gone)
	aborted atomic.Bool
	linger  atomic.Bool // the client may still be sending: take it for a moment, so that it can read the answer
	reset   atomic.Bool
}

type phase int

const (
	readingIdle  phase = iota
	readingFirst       // bytes of a head are there
	readingHead        // the rest of it
	readingBody
	readingFreely // upgraded
)

// work is what a connection needs while it is not idle.
type work struct {
	br    *bufio.Reader
	x     hop.Exchange
	req   fasthttp.Request
	resp  fasthttp.Response
	body  requestBody
	out   writer
	head  []byte // of the answer
	small []byte // a small request's body
}

var works sync.Pool

const (
	outSize     = 4 << 10
	maxKept     = 64 << 10 // larger buffers are not kept
	lingerBytes = 256 << 10
	lingerTime  = 500 * time.Millisecond
)

func newConn(s *Server, nc net.Conn) *clientConn {
	c := &clientConn{Conn: nc, s: s}
	_, c.tls = nc.(*tls.Conn)
	if sc, ok := nc.(syscall.Conn); ok {
		c.raw, _ = sc.SyscallConn()
	}
	return c
}

func (c *clientConn) attach() {
	w, _ := works.Get().(*work)
	if w == nil || w.br.Size() != c.s.cfg.MaxHeaderBytes {
		w = &work{br: bufio.NewReaderSize(nil, c.s.cfg.MaxHeaderBytes)}
	}
	w.br.Reset(c)
	w.out.c = c
	c.w = w
}

func (c *clientConn) detach() {
	w := c.w
	if w == nil {
		return
	}
	c.w = nil
	w.br.Reset(nil)
	w.out = writer{buf: w.out.buf[:0], vec: w.out.vec[:0]}
	w.body.c, w.body.x = nil, nil
	if cap(w.head) > maxKept {
		w.head = nil
	}
	if cap(w.out.buf) > maxKept {
		w.out.buf = nil
	}
	works.Put(w)
}

// serve answers requests until the connection is to be closed, or until it turns out to be HTTP/2, which is then served elsewhere.
func (c *clientConn) serve() (handedOver bool) {
	defer c.detach()
	if !c.await(c.s.cfg.HeaderTimeout) {
		return false
	}
	if c.speaksH2() {
		return c.handOver()
	}
	for c.exchange() {
		if c.w.br.Buffered() > 0 {
			c.reading, c.headEnd = readingHead, time.Now().Add(c.s.cfg.HeaderTimeout)
			c.setReadEnd(c.headEnd)
			continue
		}
		if !c.await(c.s.cfg.IdleTimeout) {
			return false
		}
	}
	return false
}

// await waits for the first byte of a request, for at least limit. It holds no buffers meanwhile.
func (c *clientConn) await(limit time.Duration) bool {
	c.detach()
	c.mu.Lock()
	if c.s.stopping.Load() {
		c.mu.Unlock()
		return c.pending()
	}
	c.idle = true
	// With some room, so that the deadline need not be moved for every request.
	if now := time.Now(); c.readEnd.Before(now.Add(limit)) || c.readEnd.After(now.Add(limit+limit/4)) {
		c.setReadEnd(now.Add(limit + limit/4))
	}
	c.reading = readingIdle
	c.mu.Unlock()
	ok := true
	if c.raw != nil {
		ok = c.raw.Read(sock.Readable) == nil
	} else {
		c.attach()
		_, err := c.w.br.Peek(1)
		ok = err == nil
	}
	c.mu.Lock()
	c.idle = false
	woken := c.woken
	c.mu.Unlock()
	if woken {
		// A request that has come in time is served, although there will be no other.
		if ok = ok || c.raw != nil && c.pending(); ok {
			c.setReadEnd(time.Now().Add(c.s.cfg.HeaderTimeout))
		}
	}
	if !ok {
		return false
	}
	c.reading = readingFirst
	if c.w == nil {
		c.attach()
	}
	return true
}

// pending says whether bytes are there.
func (c *clientConn) pending() bool {
	if c.raw == nil || sock.Look(c.raw) != sock.Sent {
		return false
	}
	c.reading, c.headEnd = readingHead, time.Now().Add(c.s.cfg.HeaderTimeout)
	c.setReadEnd(c.headEnd)
	if c.w == nil {
		c.attach()
	}
	return true
}

// wake ends the wait of an idle connection.
func (c *clientConn) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle {
		c.woken = true
		c.Conn.SetReadDeadline(time.Unix(1, 0))
	}
}

func (c *clientConn) setReadEnd(t time.Time) {
	c.readEnd = t
	c.Conn.SetReadDeadline(t)
}

// exchange reads one request and answers it. It returns false when the connection is to be closed.
func (c *clientConn) exchange() bool {
	w := c.w
	x := &w.x
	x.Reset()
	w.req.Reset()
	w.resp.Reset()
	h := &w.req.Header
	if err := h.Read(w.br); err != nil {
		return c.malformed(err)
	}
	x.Req, x.Resp, x.Client, x.RemoteAddr, x.Arrived, x.TLS = &w.req, &w.resp, c, c.RemoteAddr(), time.Now(), c.tls
	x.HTTP10 = !h.IsHTTP11()
	c.clear.Store(len(w.out.buf) == 0 && !x.HTTP10)
	c.probed.Store(false)
	w.body.c, w.body.x, w.body.left, w.body.chunked = c, x, 0, false
	w.body.done.Store(true)
	if n := h.ContentLength(); n == -1 || n > 0 {
		x.BodySize = int64(n)
		w.body.left, w.body.chunked, w.body.chunks = max(x.BodySize, 0), n < 0, chunk.Reader{}
		w.body.done.Store(false)
		w.req.SetBodyStream(&w.body, n)
	}
	c.reading = readingBody
	last := c.last(h)
	c.s.run(x, &w.small)
	return c.answer(x, last)
}

// last says whether the client wants no further request on this connection.
func (c *clientConn) last(h *fasthttp.RequestHeader) bool {
	if h.ConnectionClose() {
		return true
	}
	var conn hop.Connection
	for _, v := range h.PeekAll("Connection") {
		conn.Read([]byte("Connection"), v)
	}
	return conn.Close || !h.IsHTTP11() && !conn.KeepAlive
}

var preface = []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

// speaksH2 looks at a new connection's first bytes; for HTTP/1 that is one comparison of one byte, except that some methods begin like the
// preface.
func (c *clientConn) speaksH2() bool {
	for n := 1; ; n++ {
		b, err := c.w.br.Peek(n)
		if len(b) < n || err != nil || b[n-1] != preface[n-1] {
			return false
		}
		if n == len(preface) {
			return true
		}
	}
}

// handOver gives the connection to the HTTP/2 server, with what has been read of it.
func (c *clientConn) handOver() bool {
	b, _ := c.w.br.Peek(c.w.br.Buffered())
	hc := &h2Conn{Conn: c.Conn, c: c, first: bytes.Clone(b)}
	c.Conn.SetDeadline(time.Time{})
	return c.s.h2conns.give(hc)
}

var errAborted = errors.New("request body no longer wanted")

// Read reads from the client under the deadline that the phase has.
func (c *clientConn) Read(p []byte) (int, error) {
	switch c.reading {
	case readingFirst:
		// The bytes are there. Only if they are not all does the head get a deadline of its own.
		c.reading, c.headEnd = readingHead, time.Now().Add(c.s.cfg.HeaderTimeout)
	case readingHead:
		if !c.readEnd.Equal(c.headEnd) {
			c.setReadEnd(c.headEnd)
		}
	case readingBody:
		if c.aborted.Load() {
			return 0, errAborted
		}
		c.setReadEnd(time.Now().Add(c.s.cfg.BodyIdle))
		if c.aborted.Load() { // Abort may have come between: its deadline must win
			c.Conn.SetReadDeadline(time.Unix(1, 0))
			return 0, errAborted
		}
	}
	return c.Conn.Read(p)
}

// Write bounds how long a client may take nothing at all: by WriteIdle, or up to a half more.
func (c *clientConn) Write(p []byte) (int, error) {
	c.armWrite()
	return c.Conn.Write(p)
}

func (c *clientConn) armWrite() {
	if now := time.Now(); c.writeEnd.Before(now.Add(c.s.cfg.WriteIdle)) {
		c.writeEnd = now.Add(c.s.cfg.WriteIdle + c.s.cfg.WriteIdle/2)
		c.Conn.SetWriteDeadline(c.writeEnd)
	}
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
	if t, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return t.CloseWrite()
	}
	return errors.ErrUnsupported
}

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
	switch sock.Look(c.raw) {
	case sock.Silent, sock.Sent:
		return false
	case sock.Reset:
		return true
	}
	if !sock.CanAsk || !c.clear.Load() {
		return !sock.CanAsk
	}
	if c.probed.CompareAndSwap(false, true) {
		_, err := c.Conn.Write([]byte("HTTP/1.1 102 Processing\r\n\r\n"))
		return err != nil
	}
	return sock.Dead(c.raw)
}

// upgraded is a client's connection after its upgrade: reads see what was buffered, and the write half can be closed.
type upgraded struct {
	*clientConn
	br *bufio.Reader
}

func (u *upgraded) Read(p []byte) (int, error) {
	if u.br.Buffered() > 0 {
		return u.br.Read(p)
	}
	return u.Conn.Read(p)
}

func (u *upgraded) Write(p []byte) (int, error) { return u.clientConn.Write(p) }
