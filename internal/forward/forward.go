// Package forward is the last step of a path: it sends an Exchange to one address over HTTP/1.1 and brings back the answer, both
// bodies streaming, each byte passed on when it comes.
//
// It is an upstream client of our own because the promises need one: a body that breaks off is never passed on as
// complete, in either direction; an answer may begin before the request's body has ended; what was provably not sent is told apart from
// everything else (hop.ErrNotSent) and nothing is ever sent twice by itself; time-outs begin when the function gets the
// request; a stream that is cut ends as a reset.
package forward

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// Config says where to and how long.
type Config struct {
	Addr          string        // host:port
	Total         time.Duration // from the request's head sent to the last byte of the answer; 0 = no limit
	ResponseStart time.Duration // from the request's head sent to the answer's head; 0 = no limit
	Idle          time.Duration // between two bytes of the answer, or of an upgraded connection; 0 = no limit
	DialTimeout   time.Duration // 0 = 1 s
	MaxIdle       int           // connections kept for reuse; 0 = 256
	// IdleConn is how long an unused connection is kept; 0 = 4 s, less than what common servers wait (5 s and more),
	// so that it is we who close and no request meets a closing connection.
	IdleConn time.Duration
}

// Forward sends requests to one address. Make one with New.
type Forward struct {
	cfg Config

	mu     sync.Mutex
	idle   []*conn // most recently used last
	closed bool
}

const (
	readerSize = 16 << 10 // bounds the head of an answer
	copySize   = 32 << 10
	smallBody  = 8 << 10 // a request's body up to this is in memory before the first step runs, and goes out with the head
	maxInterim = 16      // 1xx answers before the real one
)

// New returns a Forward; it opens no connection.
func New(cfg Config) *Forward {
	if cfg.DialTimeout <= 0 {
		cfg.DialTimeout = time.Second
	}
	if cfg.MaxIdle <= 0 {
		cfg.MaxIdle = 256
	}
	if cfg.IdleConn <= 0 {
		cfg.IdleConn = 4 * time.Second
	}
	return &Forward{cfg: cfg}
}

// Close closes the idle connections and keeps no more; exchanges under way go on.
func (f *Forward) Close() {
	f.mu.Lock()
	idle := f.idle
	f.idle, f.closed = nil, true
	f.mu.Unlock()
	for _, c := range idle {
		c.Close()
	}
}

// conn is a connection to the address. Its reader comes from a pool and is there only while an exchange uses it.
type conn struct {
	net.Conn
	br   *bufio.Reader
	used time.Time
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
		if now.Sub(c.used) < f.cfg.IdleConn && alive(c.Conn) {
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
	c = &conn{Conn: nc}
	c.attach()
	return c, nil
}

// Donate gives a connection that a probe has opened and not used; the first request will.
func (f *Forward) Donate(nc net.Conn) { f.put(&conn{Conn: nc}) }

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
	c.Close()
	c.detach()
}

// Serve sends x and answers it. Errors: hop.ErrNotSent when no byte of the request can have reached the address,
// *hop.Error for everything else.
func (f *Forward) Serve(x *hop.Exchange) error {
	c, err := f.get()
	if err != nil {
		return err
	}
	upgrade := prepareRequest(x)
	up, err := f.send(x, c, upgrade != "")
	if err != nil {
		c.discard()
		return err
	}
	if err := f.readHead(x, c); err != nil {
		return f.headFailed(x, c, up, err)
	}
	if x.Resp.Header.StatusCode() == fasthttp.StatusSwitchingProtocols {
		return f.switchProtocols(x, c, up, upgrade)
	}
	return f.answer(x, c, up)
}

// headBuffers hold the head of a request and a small body while they are written in one piece.
var headBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 2<<10); return &b }}

// send writes the head and starts the body on its way. The upload is nil when nothing is left to send.
func (f *Forward) send(x *hop.Exchange, c *conn, upgrading bool) (*upload, error) {
	h := &x.Req.Header
	bp := headBuffers.Get().(*[]byte)
	defer func() {
		if cap(*bp) <= 64<<10 {
			headBuffers.Put(bp)
		}
	}()
	stream := x.BodySize < 0 || x.BodySize > smallBody
	var body []byte
	switch {
	case stream:
		h.SetContentLength(int(x.BodySize)) // -1 = chunked
	case x.BodySize > 0:
		// Small and known: it is in memory. Body turns the stream into bytes once, so that another instance may get it too.
		body = x.Req.Body()
		if int64(len(body)) != x.BodySize {
			return nil, &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "request body ended early"}
		}
		h.SetContentLength(len(body))
	}
	if !stream {
		x.BodyDone = true
	}
	buf := appendHead((*bp)[:0], h, upgrading)
	buf = append(buf, body...)
	*bp = buf
	x.Sent = time.Now()
	c.SetDeadline(f.startDeadline(x.Sent))
	if n, err := c.Write(buf); err != nil {
		if n == 0 {
			return nil, fmt.Errorf("%w: %w", hop.ErrNotSent, err)
		}
		return nil, broke(err)
	}
	if !stream {
		return nil, nil
	}
	up := &upload{done: make(chan struct{})}
	go up.run(x, c)
	return up, nil
}

func (f *Forward) startDeadline(sent time.Time) (t time.Time) {
	if f.cfg.ResponseStart > 0 {
		t = sent.Add(f.cfg.ResponseStart)
	}
	if f.cfg.Total > 0 {
		if end := sent.Add(f.cfg.Total); t.IsZero() || end.Before(t) {
			t = end
		}
	}
	return t
}

// upload is a request's body on its way while the answer may already come. The goroutine is the only user of the body's stream and
// of the connection's write half.
type upload struct {
	done   chan struct{}
	client error // the client's side failed: the body is not complete
}

func (u *upload) run(x *hop.Exchange, c *conn) {
	defer close(u.done)
	bp := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(bp)
	const room = 16 // for a chunk's size line, before the data; CRLF follows it
	buf := *bp
	chunked := x.BodySize < 0
	in := x.Req.BodyStream()
	left := x.BodySize
	for {
		n, err := in.Read(buf[room : len(buf)-2])
		if n > 0 {
			out := buf[room : room+n]
			if chunked {
				start := room - 2
				buf[start], buf[start+1] = '\r', '\n'
				for v := n; v > 0; v >>= 4 {
					start--
					buf[start] = "0123456789abcdef"[v&15]
				}
				buf[room+n], buf[room+n+1] = '\r', '\n'
				out = buf[start : room+n+2]
			}
			left -= int64(n)
			if _, werr := c.Write(out); werr != nil {
				return // the function does not want it; its answer says why
			}
		}
		switch {
		case err == io.EOF && (chunked || left == 0):
			x.BodyDone = true
			if chunked {
				_, _ = c.Write([]byte("0\r\n\r\n"))
			}
			return
		case err != nil:
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			u.client = err
			// The function must not take the part for the whole. Closing is the only way to say so.
			c.Close()
			return
		}
	}
}

// stop ends the upload, whatever it waits for, and returns when it has ended.
func (u *upload) stop(x *hop.Exchange, c *conn) {
	if u == nil {
		return
	}
	select {
	case <-u.done:
		return
	default:
	}
	c.Close()
	if x.Client != nil {
		x.Client.Abort()
	}
	<-u.done
}

func (u *upload) running() bool {
	if u == nil {
		return false
	}
	select {
	case <-u.done:
		return false
	default:
		return true
	}
}

// readHead reads the head of the answer, past interim ones.
func (f *Forward) readHead(x *hop.Exchange, c *conn) error {
	for range maxInterim {
		x.Resp.Header.SetNoDefaultContentType(true)
		if err := x.Resp.Header.Read(c.br); err != nil {
			return err
		}
		if code := x.Resp.Header.StatusCode(); code >= 200 || code == fasthttp.StatusSwitchingProtocols {
			return nil
		}
	}
	return errors.New("too many interim answers")
}

func (f *Forward) headFailed(x *hop.Exchange, c *conn, up *upload, err error) error {
	up.stop(x, c)
	c.discard()
	x.Resp.Reset()
	switch {
	case up != nil && up.client != nil:
		return &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "request body broke off: " + up.client.Error()}
	case timedOut(err):
		return &hop.Error{Status: 504, Reason: hop.ReasonTimeout, Message: fmt.Sprintf("no answer from the function within %v", time.Since(x.Sent).Round(time.Millisecond))}
	}
	return broke(err)
}

// timedOut knows fasthttp's own error too, which hides the deadline that passed.
func timedOut(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, fasthttp.ErrTimeout)
}

func broke(err error) error {
	return &hop.Error{Status: 502, Reason: hop.ReasonInstanceBroke, Message: "instance broke off: " + err.Error()}
}

// answer passes the answer on: at once when all of it is here, else as a stream.
func (f *Forward) answer(x *hop.Exchange, c *conn, up *upload) error {
	h := &x.Resp.Header
	keep := !h.ConnectionClose()
	size := h.ContentLength() // -1 chunked, -2 until close
	code := h.StatusCode()
	cleanResponse(h)
	uploading := up.running()
	if uploading {
		h.SetConnectionClose() // what the client still sends cannot be told from a next request
	}
	if x.Req.Header.IsHead() || code == http.StatusNoContent || code == http.StatusNotModified {
		size = 0
		x.Resp.SkipBody = true
	}
	if size >= 0 && c.br.Buffered() >= size && !uploading {
		if size > 0 {
			b, _ := c.br.Peek(size)
			x.Resp.SetBody(b)
			_, _ = c.br.Discard(size)
		}
		f.release(c, keep && c.br.Buffered() == 0)
		x.Finish()
		return nil
	}
	b := bodies.Get().(*body)
	*b = body{f: f, c: c, x: x, up: up, keep: keep && size != -2, left: int64(max(size, 0)), chunked: size == -1, untilClose: size == -2}
	if f.cfg.Total > 0 {
		b.end = x.Sent.Add(f.cfg.Total)
	}
	c.SetReadDeadline(b.end)
	if size < 0 {
		size = -1
	}
	x.Resp.SetBodyStream(b, size)
	return nil
}

func (f *Forward) release(c *conn, keep bool) {
	if keep {
		c.SetDeadline(time.Time{})
		f.put(c)
	} else {
		c.discard()
	}
}

// switchProtocols hands an upgraded connection over: bytes both ways until both ends have closed, without a total limit.
func (f *Forward) switchProtocols(x *hop.Exchange, c *conn, up *upload, asked string) error {
	if asked == "" {
		up.stop(x, c)
		c.discard()
		x.Resp.Reset()
		return &hop.Error{Status: 502, Reason: hop.ReasonInstanceBroke, Message: "instance switched protocols without being asked"}
	}
	h := &x.Resp.Header
	proto := string(h.Peek("Upgrade"))
	cleanResponse(h)
	h.Set("Upgrade", proto)
	h.Set("Connection", "Upgrade")
	x.Resp.SkipBody = true
	x.Hijack = func(client net.Conn) {
		defer c.discard()
		c.SetDeadline(time.Time{})
		pipe(client, c, f.cfg.Idle)
	}
	return nil
}

// pipe copies both ways. One side's end is passed on as a half-close; an idle limit counts bytes of either direction.
func pipe(client net.Conn, c *conn, idle time.Duration) {
	touch := func() {
		if idle > 0 {
			t := time.Now().Add(idle)
			client.SetReadDeadline(t)
			c.SetReadDeadline(t)
		}
	}
	touch()
	one := func(dst net.Conn, src io.Reader) {
		bp := copyBuffers.Get().(*[]byte)
		defer copyBuffers.Put(bp)
		for {
			n, err := src.Read(*bp)
			if n > 0 {
				touch()
				if _, werr := dst.Write((*bp)[:n]); werr != nil {
					err = werr
				}
			}
			if err == io.EOF {
				if hc, ok := dst.(interface{ CloseWrite() error }); ok && hc.CloseWrite() == nil {
					return
				}
			}
			if err != nil {
				client.Close()
				c.Close()
				return
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { one(c, client) })
	one(client, c.br)
	wg.Wait()
}

// CloseWrite ends our direction only.
func (c *conn) CloseWrite() error {
	if t, ok := c.Conn.(*net.TCPConn); ok {
		return t.CloseWrite()
	}
	return errors.ErrUnsupported
}

// alive says whether a kept connection is still open and silent. It does not block.
func alive(nc net.Conn) bool {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return true
	}
	return quiet(sc)
}

// trimmed returns s without spaces and tabs around it.
func trimmed(s []byte) []byte { return bytes.Trim(s, " \t") }
