package forward

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

func (f *Forward) serveH1(x *hop.Exchange) error {
	c, err := f.get()
	if err != nil {
		return err
	}
	if l, ok := x.Client.(hop.Leaver); ok {
		c.follow(l.Context())
	}
	up, asked, err := f.send(x, c)
	if err != nil {
		c.discard()
		return err
	}
	if err := f.readHead(x, c); err != nil {
		return f.headFailed(x, c, up, err)
	}
	if x.Resp.Header.StatusCode() == fasthttp.StatusSwitchingProtocols {
		return f.switchProtocols(x, c, up, asked)
	}
	return f.answer(x, c, up)
}

// headBuffers hold the head of a request and a small body while they are written in one piece.
var headBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 2<<10); return &b }}

// send writes the head and starts the body on its way. The upload is nil when nothing is left to send; asked is the protocol that the
// client wants to switch to.
func (f *Forward) send(x *hop.Exchange, c *conn) (up *upload, asked string, err error) {
	bp := headBuffers.Get().(*[]byte)
	defer func() {
		if cap(*bp) <= 64<<10 {
			headBuffers.Put(bp)
		}
	}()
	buf, asked := appendHead((*bp)[:0], x, f.cfg.Addr)
	stream := x.BodySize != 0 && !inMemory(x)
	if !stream {
		if x.BodySize > 0 {
			buf = append(buf, x.Req.Body()...)
		}
		x.BodyDone = true
	}
	*bp = buf
	x.Sent = time.Now()
	c.SetDeadline(f.startDeadline(x.Sent))
	if n, err := c.Write(buf); err != nil {
		if n == 0 {
			return nil, "", fmt.Errorf("%w: %w", hop.ErrNotSent, err)
		}
		return nil, "", broke(err)
	}
	if !stream {
		return nil, asked, nil
	}
	up = &upload{done: make(chan struct{})}
	go up.run(x, c)
	return up, asked, nil
}

// readHead reads the head of the answer and passes on interim ones before it, "100 Continue" among them: whether a body is wanted is the
// function's to say.
func (f *Forward) readHead(x *hop.Exchange, c *conn) error {
	h := &x.Resp.Header
	for range maxInterim {
		h.SetNoDefaultContentType(true)
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
