package front

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/h2"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/sock"
)

// clientConn is a client's connection. One goroutine serves it; while it is idle it holds nothing but that. It is the hop.Client of
// its exchanges.
type clientConn struct {
	net.Conn // the socket, or TLS over it
	s        *Server
	socket   net.Conn
	tcp      *sock.Conn      // socket if it is one, else nil
	raw      syscall.RawConn // of the socket; nil = it is none
	remote   net.Addr
	seat     *seat
	tls      bool          // written by its goroutine, under s.mu
	alpn     string        // the protocol that TLS agreed on; "" = none
	h2       *h2.Conn      // guarded by s.mu; nil = it is not HTTP/2
	w        *work         // nil while idle
	br       *bufio.Reader // nil unless there is something to read, or may be
	ahead    [1]byte
	hasAhead bool // ahead is the first byte of what comes

	step    func(fd uintptr) bool // of await; made once
	fd      uintptr               // while step runs
	decided bool                  // it speaks HTTP/1
	dry     bool                  // a read without a wait has found nothing
	next    next                  // what is to be done when await has ended
	broken  error                 // with nextBroken: why there is no request
	now     time.Time             // when something was written last

	// Reading: see Read. Owned by whoever reads, the connection's goroutine or an upload's.
	reading  phase
	headEnd  time.Time
	readEnd  time.Time // the deadline as last set, except by wake and Abort
	writeEnd time.Time

	mu      sync.Mutex // guards what follows, and the read deadline while idle changes
	idle    bool
	woken   bool
	running hop.Canceller // what is done for the client; nil = nothing, or it was cancelled
	left    bool          // running was cancelled

	writing sync.Mutex  // held while something is written that Gone's question must not come into
	may     may         // guarded by writing
	probed  atomic.Bool // half-closed client asked already (see Gone)
	aborted atomic.Bool
	linger  atomic.Bool // the client may still be sending: take it for a moment, so that it can read the answer
	reset   atomic.Bool
}

type phase int

const (
	readingIdle phase = iota
	readingNow        // what is there, without a wait
	readingHead
	readingBody
	readingFreely // upgraded
)

// next is what the waiting has come to (see stepAwait).
type next int

const (
	nextRead    next = iota // bytes have come, or the end, or there is an error
	nextServe               // a request has been parsed and has to be served
	nextBroken              // what has come is no request
	nextPending             // the server stops: only what is there already is answered
	nextClose               // the last request has been answered
)

// work is what a connection needs while it is not idle, besides its reader.
type work struct {
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
	c := &clientConn{Conn: nc, s: s, socket: nc, remote: nc.RemoteAddr()}
	if c.tcp = sock.NewConn(nc); c.tcp != nil {
		c.Conn, c.socket, c.raw = c.tcp, c.tcp, c.tcp.Raw()
		c.step = c.stepAwait
	}
	return c
}

func (c *clientConn) attach() {
	if c.br != nil {
		return
	}
	if c.br, _ = c.s.readers.Get().(*bufio.Reader); c.br == nil {
		c.br = bufio.NewReaderSize(nil, c.s.cfg.MaxHeaderBytes)
	}
	c.br.Reset(c)
}

// detach gives the reader back; there must be nothing in it.
func (c *clientConn) detach() {
	if c.br != nil {
		c.br.Reset(nil)
		c.s.readers.Put(c.br)
		c.br = nil
	}
}

// buffered is how many bytes have been read and not used.
func (c *clientConn) buffered() int {
	if c.br == nil {
		return 0
	}
	return c.br.Buffered()
}

func (c *clientConn) begin() {
	if c.w == nil {
		if c.w, _ = works.Get().(*work); c.w == nil {
			c.w = new(work)
		}
		c.w.out.c = c
	}
}

// rest gives back what only a connection needs that is not idle.
func (c *clientConn) rest() {
	c.detach()
	w := c.w
	if w == nil {
		return
	}
	c.w = nil
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

// serve answers requests until the connection is to be closed.
func (c *clientConn) serve() {
	defer c.rest()
	if !c.decide() {
		return
	}
	c.decided = true
	for c.exchange() {
		if c.buffered() > 0 {
			c.reading, c.headEnd = readingHead, time.Time{}
			continue
		}
		if !c.await(c.s.cfg.IdleTimeout) {
			return
		}
	}
}

// decide finds out what the client speaks. If that is HTTP/2, it is served to its end; what is to be served here is HTTP/1.
func (c *clientConn) decide() bool {
	if !c.await(c.s.cfg.HeaderTimeout) {
		return false
	}
	if c.s.cfg.TLS != nil && c.speaksTLS() && !c.startTLS() {
		return false
	}
	streams := c.speaksH2()
	switch {
	case c.alpn != "" && streams != (c.alpn == "h2"):
		return false // it does not keep to what was agreed on
	case streams:
		c.serveH2()
		return false
	}
	return true
}

// goIdle marks c as idle, for at least limit. It does nothing when the server has stopped and takes no more requests.
func (c *clientConn) goIdle(limit time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	var end *time.Time
	if c.s.stopping.Load() {
		if end = c.s.idleEnd.Load(); !time.Now().Before(*end) {
			return false
		}
	}
	c.idle = true
	// With some room, so that the deadline need not be moved for every request.
	if c.now.IsZero() {
		c.now = time.Now()
	}
	if end != nil {
		c.setReadEnd(*end)
	} else if c.readEnd.Before(c.now.Add(limit)) || c.readEnd.After(c.now.Add(limit+limit/4)) {
		c.setReadEnd(c.now.Add(limit + limit/4))
	}
	c.reading = readingIdle
	return true
}

// goBusy ends goIdle and says whether the server has woken c meanwhile.
func (c *clientConn) goBusy() (woken bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = false
	return c.woken
}

// await waits for the first byte of a request, for at least limit. It holds no buffers meanwhile. Requests that need no more than what has come
// with them are answered in it: then it waits on.
func (c *clientConn) await(limit time.Duration) bool {
	if !c.goIdle(limit) {
		return c.pending()
	}
	ok := false
	if c.tcp != nil && !c.tls {
		c.next = nextRead
		ok = c.tcp.Await(c.step) == nil && c.buffered() > 0
		switch c.next {
		case nextServe, nextBroken:
			return true
		case nextPending:
			return c.pending()
		case nextClose:
			return false
		}
	} else { // bytes of the socket need not be bytes of the client's: take one
		c.rest()
		n, _ := c.Conn.Read(c.ahead[:])
		ok, c.hasAhead = n == 1, n == 1
	}
	if c.goBusy() {
		// A request that has come in time is served, although there will be no other.
		if ok = ok || c.pending(); ok {
			c.setReadEnd(time.Now().Add(c.s.cfg.HeaderTimeout))
		}
	}
	if !ok {
		return false
	}
	// The bytes are there. Only if they are not all does the head get a deadline of its own.
	c.reading, c.headEnd = readingHead, time.Time{}
	c.attach()
	c.begin()
	return true
}

// stepAwait reads what is there, or gives the buffers back when there is nothing yet. It serves a request that came in one piece, and goes on waiting
// where it is: what comes meanwhile ends the wait at once, so nothing has to be read in vain before it. As long as it runs the connection
// counts as being read: whoever serves here must not read from it, nor close it.
func (c *clientConn) stepAwait(fd uintptr) bool {
	c.attach()
	c.fd, c.reading = fd, readingNow
	_, err := c.br.Peek(1)
	c.reading = readingIdle
	if err == errNothing {
		c.rest()
		return false
	}
	if err != nil || !c.decided || !c.wholeHead() || c.goBusy() {
		return true
	}
	c.begin()
	for {
		c.reading = readingNow
		c.dry = false
		switch c.broken = c.parse(); {
		case c.dry:
			return true // there is an end of a head, but the parser does not take it for this one's
		case c.broken != nil:
			c.next = nextBroken
			return true
		case !c.wholeRequest():
			c.next = nextServe
			return true
		case !c.respond():
			c.next = nextClose
			return true
		}
		if c.buffered() == 0 {
			break
		}
		if !c.wholeHead() {
			return true
		}
	}
	if !c.goIdle(c.s.cfg.IdleTimeout) {
		c.next = nextPending
		return true
	}
	c.rest()
	return false
}

var headEnd = []byte("\r\n\r\n")

// wholeHead says whether a request's head has been read to its end.
func (c *clientConn) wholeHead() bool {
	b, _ := c.br.Peek(c.br.Buffered())
	return bytes.Contains(b, headEnd)
}

// wholeRequest says whether the request that was parsed needs nothing more of its client.
func (c *clientConn) wholeRequest() bool {
	x := &c.w.x
	if x.BodySize != 0 && (x.BodySize < 0 || x.BodySize > hop.SmallBody || x.BodySize > int64(c.buffered()) || asksFirst(x)) {
		return false
	}
	return len(x.Req.Header.Peek("Upgrade")) == 0
}

// errNothing says that there is nothing to read now.
var errNothing = errors.New("nothing to read yet")

// pending says whether bytes are there.
func (c *clientConn) pending() bool {
	if c.raw == nil || sock.Look(c.raw) != sock.Sent {
		return false
	}
	c.reading, c.headEnd = readingHead, time.Now().Add(c.s.cfg.HeaderTimeout)
	c.setReadEnd(c.headEnd)
	c.attach()
	c.begin()
	return true
}

// wake ends the wait of an idle connection.
func (c *clientConn) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle {
		c.woken = true
		c.Conn.SetReadDeadline(later(time.Unix(1, 0), *c.s.idleEnd.Load()))
	}
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

func (c *clientConn) setReadEnd(t time.Time) {
	c.readEnd = t
	c.Conn.SetReadDeadline(t)
}

// exchange reads one request, unless await has, and answers it. It returns false when the connection is to be closed.
func (c *clientConn) exchange() bool {
	err := c.broken
	if was := c.next; was != nextServe && was != nextBroken {
		err = c.parse()
	}
	c.next, c.broken = nextRead, nil
	if err != nil {
		return c.malformed(err)
	}
	return c.respond()
}

// parse reads one request, but for its body.
func (c *clientConn) parse() error {
	w := c.w
	x := &w.x
	x.Reset()
	w.req.Reset()
	w.resp.Reset()
	h := &w.req.Header
	if err := h.Read(c.br); err != nil {
		return err
	}
	x.Req, x.Resp, x.Client, x.RemoteAddr, x.Arrived, x.TLS = &w.req, &w.resp, c, c.remote, time.Now(), c.tls
	x.HTTP10 = !h.IsHTTP11()
	w.body.c, w.body.x, w.body.left, w.body.chunked = c, x, 0, false
	w.body.done.Store(true)
	if n := h.ContentLength(); n == -1 || n > 0 {
		x.BodySize = int64(n)
		w.body.left, w.body.chunked, w.body.chunks = max(x.BodySize, 0), n < 0, chunk.Reader{}
		w.body.done.Store(false)
		w.req.SetBodyStream(&w.body, n)
	}
	return nil
}

// respond answers the request that was parsed. It returns false when the connection is to be closed.
func (c *clientConn) respond() bool {
	w := c.w
	x := &w.x
	h := &w.req.Header
	if len(w.out.buf) == 0 && !x.HTTP10 {
		c.setMay(mayInterim)
	}
	c.probed.Store(false)
	c.reading = readingBody
	if w.body.done.Load() && c.br.Buffered() == 0 {
		c.detach() // nothing more to read for as long as this takes
	}
	last := c.last(h)
	c.beginBusy(x.Arrived)
	defer c.endBusy()
	c.s.run(x, &w.small)
	keep := c.answer(x, last)
	c.s.observe(x)
	return keep
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
		b, err := c.br.Peek(n)
		if len(b) < n || err != nil || b[n-1] != preface[n-1] {
			return false
		}
		if n == len(preface) {
			return true
		}
	}
}

var errBareLF = errors.New("a line that ends in LF without CR")

// bareLF says that a head has begun that will never be complete: the parser waits for lines to end in CRLF.
func (c *clientConn) bareLF() bool {
	b, _ := c.br.Peek(c.br.Buffered())
	for {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			return false
		}
		if i == 0 || b[i-1] != '\r' {
			return true
		}
		b = b[i+1:]
	}
}

var errAborted = errors.New("request body no longer wanted")

// Read reads from the client under the deadline that the phase has.
func (c *clientConn) Read(p []byte) (int, error) {
	switch c.reading {
	case readingNow:
		n, ok, err := c.tcp.TryRead(c.fd, p)
		if !ok {
			c.dry = true
			err = errNothing
		}
		return n, err
	case readingHead:
		if c.headEnd.IsZero() {
			c.headEnd = time.Now().Add(c.s.cfg.HeaderTimeout)
		}
		if !c.readEnd.Equal(c.headEnd) {
			c.setReadEnd(c.headEnd)
		}
		if c.hasAhead {
			return c.readBehind(p)
		}
		if c.bareLF() {
			return 0, errBareLF
		}
	case readingBody:
		if err := c.armBody(); err != nil {
			return 0, err
		}
	}
	return c.Conn.Read(p)
}

// armBody gives the next bytes of a body their time.
func (c *clientConn) armBody() error {
	if c.aborted.Load() {
		return errAborted
	}
	c.setReadEnd(time.Now().Add(c.s.cfg.BodyIdle))
	if c.aborted.Load() { // Abort may have come between: its deadline must win
		c.Conn.SetReadDeadline(time.Unix(1, 0))
		return errAborted
	}
	return nil
}

// Write bounds how long a client may take nothing at all: by WriteIdle, or up to a half more.
func (c *clientConn) Write(p []byte) (int, error) {
	c.armWrite()
	return c.Conn.Write(p)
}

func (c *clientConn) armWrite() {
	if c.now = time.Now(); c.writeEnd.Before(c.now.Add(c.s.cfg.WriteIdle)) {
		c.writeEnd = c.now.Add(c.s.cfg.WriteIdle + c.s.cfg.WriteIdle/2)
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
		if c.tcp != nil {
			c.tcp.SetLinger(0)
		}
		return c.socket.Close() // not TLS, which would announce a proper end
	}
	if c.linger.Load() && c.CloseWrite() == nil {
		c.Conn.SetReadDeadline(time.Now().Add(lingerTime))
		_, _ = io.CopyN(io.Discard, c.Conn, lingerBytes)
	}
	return c.Conn.Close()
}

// kill ends the connection now, with a reset, whatever its goroutine does with it. Close is not for that: it waits for one that is in await.
// It is called under s.mu.
func (c *clientConn) kill() {
	c.Reset()
	switch {
	case c.tcp == nil || c.tls:
		c.Close()
	case sock.Disconnect(c.raw) != nil:
		go c.Close()
	}
}

// upgraded is a client's connection after its upgrade: reads see what was buffered, and the write half can be closed.
type upgraded struct{ *clientConn }

func (u *upgraded) Read(p []byte) (int, error) {
	if u.buffered() > 0 {
		return u.br.Read(p)
	}
	return u.Conn.Read(p)
}

func (u *upgraded) Write(p []byte) (int, error) { return u.clientConn.Write(p) }
