package forward

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/sock"
)

func (f *Forward) serveH1(x *hop.Exchange) error {
	c, up, asked, err := f.send(x)
	if err != nil {
		return err
	}
	c.attach()
	if err := f.readHead(x, c); err != nil {
		return f.headFailed(x, c, up, err)
	}
	if x.Resp.Header.StatusCode() == fasthttp.StatusSwitchingProtocols {
		return f.switchProtocols(x, c, up, asked)
	}
	if f.cfg.Hop && len(x.Resp.Header.Peek(headerError)) > 0 {
		return f.refused(x, c, up)
	}
	return f.answer(x, c, up)
}

// headBuffers hold the head of a request and a small body while they are written in one piece.
var headBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 2<<10); return &b }}

// send writes the request on a connection that is not stale and waits for the answer's first byte; of a request with a streaming body it
// writes the head and starts the body on its way. The upload is nil when nothing is left to send; asked is the protocol that the client
// wants to switch to.
func (f *Forward) send(x *hop.Exchange) (c *conn, up *upload, asked string, err error) {
	bp := headBuffers.Get().(*[]byte)
	defer func() {
		if cap(*bp) <= 64<<10 {
			headBuffers.Put(bp)
		}
	}()
	buf, asked := appendHead((*bp)[:0], x, f.cfg.Addr)
	stream := x.BodySize != 0 && !inMemory(x)
	if !stream && x.BodySize > 0 {
		buf = append(buf, x.Req.Body()...)
	}
	*bp = buf
	for stale := true; stale; {
		x.Sent = time.Now()
		var kept bool
		if c, kept, err = f.get(x.Sent); err != nil {
			return nil, nil, "", err
		}
		if !kept {
			x.Sent = time.Now()
		}
		if stale, err = f.begin(x, c, kept, buf, stream); err != nil || stale {
			c.discard()
		}
		if err != nil {
			return nil, nil, "", err
		}
		if stale && f.learn.doubt(x) {
			return nil, nil, "", errRelearn
		}
	}
	x.BodyDone = !stream // before the upload, which may set it
	if stream {
		up = &upload{done: make(chan struct{})}
		go up.run(x, c)
	}
	return c, up, asked, nil
}

// begin writes the first bytes of x's request, all of them if it is no stream, and then waits for the answer. It does nothing when c is stale.
func (f *Forward) begin(x *hop.Exchange, c *conn, kept bool, buf []byte, stream bool) (stale bool, err error) {
	c.follow(x.Client)
	c.until(f.startDeadline(x))
	n := 0
	switch {
	case kept && !stream:
		n, stale, err = c.ask(buf)
		if stale || n == len(buf) {
			return stale, nil // what became of the wait, the reader will be told again
		}
	case kept && c.Look() != sock.Silent:
		return true, nil
	}
	if err == nil {
		c.writeUntil(f.totalEnd(x))
		var m int
		m, err = c.Write(buf[n:])
		n += m
	}
	switch {
	case err == nil:
		return false, nil
	case !c.unfollow():
		return false, clientLeft()
	case n == 0 && kept:
		return true, nil
	case n == 0:
		return false, fmt.Errorf("%w: %w", hop.ErrNotSent, err)
	}
	return false, broke(err)
}

// readHead reads the head of the answer and passes on interim ones before it, "100 Continue" among them: whether a body is wanted is the
// function's to say.
func (f *Forward) readHead(x *hop.Exchange, c *conn) error {
	h := &x.Resp.Header
	for range maxInterim {
		h.SetNoDefaultContentType(true)
		if err := checkStatusLine(c.br); err != nil {
			return err
		}
		if err := h.Read(c.br); err != nil {
			return err
		}
		code := h.StatusCode()
		if code >= 200 || code == fasthttp.StatusSwitchingProtocols {
			return nil
		}
		if w, ok := x.Client.(hop.InterimWriter); ok {
			if err := w.Interim(h); err != nil {
				return err
			}
		}
	}
	return errors.New("too many interim answers")
}

// checkStatusLine wants HTTP/1 and a status of three digits that is none below 100: the parser takes any number, and 000 for 200.
func checkStatusLine(br *bufio.Reader) error {
	b, err := br.Peek(len("HTTP/1.1 200\r"))
	if err != nil {
		return nil // the parser says it better
	}
	code := b[len("HTTP/1.1 "):]
	if string(b[:7]) != "HTTP/1." || code[0] < '1' || code[0] > '9' || !digit(code[1]) || !digit(code[2]) || code[3] != ' ' && code[3] != '\r' && code[3] != '\n' {
		return fmt.Errorf("no status line of HTTP/1: %q", b)
	}
	return nil
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

func (f *Forward) headFailed(x *hop.Exchange, c *conn, up *upload, err error) error {
	up.stop(x, c)
	left := !c.unfollow()
	c.discard()
	x.Resp.Reset()
	switch {
	case left:
		return clientLeft()
	case up != nil && up.client != nil:
		return clientBroke(up.client)
	case timedOut(err):
		return tooLate(x)
	}
	return broke(err)
}

// timedOut knows fasthttp's own error too, which hides the deadline that passed.
func timedOut(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, fasthttp.ErrTimeout)
}

// answer passes the answer on: at once when all of it is here, else as a stream.
func (f *Forward) answer(x *hop.Exchange, c *conn, up *upload) error {
	h := &x.Resp.Header
	keep := !h.ConnectionClose()
	size := h.ContentLength() // -1 chunked, -2 until close
	code := h.StatusCode()
	resetClose(h)
	uploading := up.settle()
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
			x.Small = append(x.Small[:0], b...)
			x.Resp.SetBodyRaw(x.Small)
			_, _ = c.br.Discard(size)
		}
		f.release(c, keep && c.br.Buffered() == 0)
		x.Finish()
		return nil
	}
	b := bodies.Get().(*body)
	*b = body{f: f, c: c, x: x, up: up, keep: keep && size != -2, left: int64(max(size, 0)), chunked: size == -1, untilClose: size == -2}
	b.end = f.totalEnd(x)
	c.until(b.end)
	if size < 0 {
		size = -1
	}
	x.Resp.SetBodyStream(b, size)
	return nil
}
