package front

import (
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
)

// appendAnswerHead writes the head of an answer without what belonged to the connection it came on, and without the empty line at the end.
func appendAnswerHead(dst []byte, h *fasthttp.ResponseHeader) ([]byte, hop.Connection) {
	code := h.StatusCode()
	dst = strconv.AppendInt(append(dst, "HTTP/1.1 "...), int64(code), 10)
	dst = append(dst, ' ')
	if msg := h.StatusMessage(); len(msg) > 0 {
		dst = append(dst, msg...)
	} else {
		dst = append(dst, fasthttp.StatusMessage(code)...)
	}
	dst = append(dst, "\r\n"...)
	for k, v := range h.All() {
		dst = append(append(append(append(dst, k...), ": "...), v...), "\r\n"...)
	}
	return hop.Filter(dst)
}

// bodyless says that an answer ends with its head.
func bodyless(x *hop.Exchange) bool {
	code := x.Resp.StatusCode()
	return x.Resp.SkipBody || x.Req.Header.IsHead() || code == fasthttp.StatusNoContent || code == fasthttp.StatusNotModified || code < 200
}

// bodySize is the length that an answer says it has: -1 = not known before its end, -2 = it says nothing.
func bodySize(x *hop.Exchange) int {
	if x.Resp.IsBodyStream() {
		return max(x.Resp.Header.ContentLength(), -1)
	}
	if n := len(x.Resp.Body()); n > 0 || !bodyless(x) {
		return n
	}
	return x.Resp.Header.ContentLength() // of a HEAD: what a GET would have had
}

// answer writes the answer. It returns false when the connection is to be closed.
func (c *clientConn) answer(x *hop.Exchange, last bool) (keep bool) {
	w := c.w
	resp := x.Resp
	c.setMay(mayNothing)
	if !w.body.done.Load() {
		// What is left of the body would be taken for the next request.
		last = true
		c.linger.Store(true)
	}
	none, size := bodyless(x), bodySize(x)
	chunked := size == -1 && !none && !x.HTTP10
	keep = !last && !resp.ConnectionClose() && !c.s.stopping.Load() && (size >= 0 || chunked || none) && x.Hijack == nil

	head, conn := appendAnswerHead(w.head[:0], &resp.Header)
	switch {
	case x.Hijack != nil:
		head = append(append(append(head, "Connection: Upgrade\r\nUpgrade: "...), conn.Upgrade...), "\r\n"...)
	case !keep:
		head = append(head, "Connection: close\r\n"...)
	case x.HTTP10:
		head = append(head, "Connection: keep-alive\r\n"...)
	}
	switch code := resp.StatusCode(); {
	case code < 200 || code == fasthttp.StatusNoContent:
	case code == fasthttp.StatusNotModified && size <= 0:
	case size >= 0:
		head = append(strconv.AppendInt(append(head, "Content-Length: "...), int64(size), 10), "\r\n"...)
	case size == -1 && !x.HTTP10:
		head = append(head, "Transfer-Encoding: chunked\r\n"...)
		if conn.Announced != "" {
			head = append(append(append(head, "Trailer: "...), conn.Announced...), "\r\n"...)
		}
	}
	head = append(head, "\r\n"...)
	w.head = head
	w.out.add(head)

	if x.Hijack != nil {
		c.endBusy() // both sides are read from now on
		if w.out.Flush() == nil {
			c.reading = readingFreely
			c.Conn.SetDeadline(time.Time{})
			c.readEnd, c.writeEnd = time.Time{}, time.Time{}
			x.Hijack(&upgraded{c})
		}
		x.Finish()
		return false
	}
	ok := c.writeBody(x, none, size, chunked)
	_ = resp.CloseBodyStream()
	x.Finish()
	if !ok || c.reset.Load() {
		return false
	}
	if c.aborted.Load() { // nothing can be read any more
		keep = false
	}
	// Answers to requests that are here already go out together.
	if keep && c.buffered() > 0 && len(w.out.buf) < outSize {
		return true
	}
	if w.out.Flush() != nil {
		x.Cut = true
		return false
	}
	return keep
}

// writeBody copies the body as far as it goes. When it is false the answer is not complete.
func (c *clientConn) writeBody(x *hop.Exchange, none bool, size int, chunked bool) bool {
	out, resp := &c.w.out, x.Resp
	stream := resp.BodyStream()
	switch {
	case none:
		return true
	case stream == nil:
		x.Out = int64(len(resp.Body()))
		out.add(resp.Body())
		return true
	}
	out.chunked, out.n = chunked, 0
	if chunked {
		defer c.setMay(mayNothing)
	}
	var err error
	if wt, ok := stream.(io.WriterTo); ok {
		_, err = wt.WriteTo(out)
	} else {
		if err = out.Flush(); err == nil { // the answer has begun, whenever its body will
			_, err = io.Copy(struct{ io.Writer }{out}, stream)
		}
	}
	out.chunked = false
	x.Out = out.n
	if err == nil && size >= 0 && out.n != int64(size) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		c.Reset() // the only way to say that this is not the end
		x.Cut = true
		return false
	}
	if chunked {
		out.buf = chunk.AppendEnd(out.buf, x.RespTrailer)
	}
	return true
}

// writer collects what is small and writes what is large without copying it.
type writer struct {
	c       *clientConn
	buf     []byte
	chunked bool
	n       int64 // bytes of the body
	vec     net.Buffers
	spare   net.Buffers // vec is eaten up by its own WriteTo
}

const direct = 2 << 10 // pieces from this size on are not copied

// add puts p behind what is there.
func (w *writer) add(p []byte) {
	w.buf = append(w.buf, p...)
}

// Write takes a piece of the body.
func (w *writer) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	w.n += int64(len(p))
	if w.chunked {
		w.c.setMay(mayNothing)
		w.buf = chunk.AppendSize(w.buf, len(p))
	}
	if len(p) < direct {
		w.buf = append(w.buf, p...)
		if w.chunked {
			w.buf = append(w.buf, "\r\n"...)
		}
		if len(w.buf) < outSize {
			return len(p), nil
		}
		return len(p), w.Flush()
	}
	if err := w.send(p); err != nil {
		return 0, err
	}
	if w.chunked {
		w.buf = append(w.buf, "\r\n"...)
	}
	return len(p), nil
}

// send writes what was collected and p, in one system call where the connection can.
func (w *writer) send(p []byte) error {
	w.c.armWrite()
	w.spare = append(w.spare[:0], w.buf, p)
	w.vec = w.spare
	_, err := w.vec.WriteTo(w.c.Conn)
	clear(w.spare)
	w.buf = w.buf[:0]
	return err
}

var errSlowClient = errors.New("the client takes nothing of its answer")

// CanSplice makes w a hop.Splicer.
func (w *writer) CanSplice() bool { return w.c.tcp != nil && !w.c.tls && !w.chunked }

// Splice lets the kernel move the bytes.
func (w *writer) Splice(src *net.TCPConn, n int64) (int64, error) {
	if err := w.Flush(); err != nil {
		return 0, err
	}
	w.c.armWrite()
	took, err := w.c.tcp.ReadFrom(&io.LimitedReader{R: src, N: n})
	w.n += took
	if errors.Is(err, os.ErrDeadlineExceeded) && !time.Now().Before(w.c.writeEnd) {
		err = errSlowClient
	}
	return took, err
}

// Flush writes what was collected.
func (w *writer) Flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	_, err := w.c.Write(w.buf)
	w.buf = w.buf[:0]
	if w.chunked {
		w.c.setMay(mayZero) // whatever was flushed ended with a whole chunk, or with the head
	}
	return err
}

// Interim passes on an answer before the answer.
func (c *clientConn) Interim(h *fasthttp.ResponseHeader) error {
	if c.w.x.HTTP10 {
		return nil
	}
	head, _ := appendAnswerHead(c.w.head[:0], h)
	head = append(head, "\r\n"...)
	c.w.head = head
	c.writing.Lock()
	defer c.writing.Unlock()
	c.w.out.add(head)
	return c.w.out.Flush()
}

// malformed answers what could not be read as a request, if there is anything to answer.
func (c *clientConn) malformed(err error) bool {
	w := c.w
	var small *fasthttp.ErrSmallBuffer
	var nothing fasthttp.ErrNothingRead
	var nerr net.Error
	e := &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "malformed request"}
	switch {
	case errors.As(err, &small):
		e = &hop.Error{Status: 431, Reason: hop.ReasonHeaderTooBig, Message: "request header exceeds " + strconv.Itoa(c.s.cfg.MaxHeaderBytes) + " bytes"}
	case errors.As(err, &nothing), err == io.EOF:
		w.out.Flush()
		return false
	case errors.As(err, &nerr) && nerr.Timeout():
		e = &hop.Error{Status: 408, Reason: hop.ReasonBadRequest, Message: "request head did not come within " + c.s.cfg.HeaderTimeout.String()}
	}
	w.resp.Reset()
	writeError(&w.resp, e)
	w.x.Req, w.x.Resp, w.x.Client, w.x.RemoteAddr, w.x.Arrived, w.x.TLS = &w.req, &w.resp, c, c.RemoteAddr(), time.Now(), c.tls
	w.body.done.Store(true)
	c.linger.Store(true)
	c.answer(&w.x, true)
	w.x.Req = nil
	c.s.observe(&w.x)
	return false
}
