package front

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/valyala/fasthttp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/thawrun/thaw/internal/h2"
	"github.com/thawrun/thaw/internal/hop"
)

// Limits of an HTTP/2 connection besides those of Config.
const (
	h2HeaderBytes = 64 << 10         // a request's fields
	h2Ping        = 30 * time.Second // a silent connection is asked whether it is still there,
	h2Pong        = 15 * time.Second // and closed when no answer comes
)

// serveH2 serves the streams of a connection whose preface has come.
func (c *clientConn) serveH2() {
	br := c.br
	c.br = nil
	c.rest()
	_, _ = br.Discard(len(preface))
	c.reading = readingFreely
	c.Conn.SetDeadline(time.Time{})
	conn := h2.New(c.Conn, br, h2.Config{
		MaxStreams:  c.s.cfg.MaxStreams,
		HeaderBytes: h2HeaderBytes,
		HeaderTime:  c.s.cfg.HeaderTimeout,
		BodyIdle:    c.s.cfg.BodyIdle,
		WriteIdle:   c.s.cfg.WriteIdle,
		Ping:        h2Ping,
		Pong:        h2Pong,
		Idle:        c.s.cfg.IdleTimeout,
		Handle:      c.stream,
	})
	c.s.mu.Lock()
	c.h2 = conn
	c.s.mu.Unlock()
	if c.s.stopping.Load() {
		conn.Drain()
	}
	_ = conn.Run() // how a client leaves is its own affair
	c.linger.Store(true)
	c.Close()
	conn.Wait()
	br.Reset(nil)
	c.s.readers.Put(br)
}

// streamWork is what a stream needs; the memory is used again. It is the hop.Client of its exchange.
type streamWork struct {
	*h2.Stream
	x      hop.Exchange
	req    fasthttp.Request
	resp   fasthttp.Response
	reset  bool
	begun  bool   // the answer's head has been sent
	ended  bool   // its last byte, too
	n      int64  // bytes of its body
	size   int    // how many there will be; below 0 = not known
	held   []byte // the last of them, of a known number, until it is known whether the stream ends with them
	text   []byte
	fields []hpack.HeaderField
	src    bytes.Reader
	br     *bufio.Reader
	small  []byte
}

var streamWorks = sync.Pool{New: func() any { return &streamWork{br: bufio.NewReaderSize(nil, 4<<10)} }}

// Reset makes w a hop.Client.
func (w *streamWork) Reset() { w.reset = true }

var errCut = errors.New("the answer was cut short")

// stream maps one HTTP/2 stream to an exchange and back.
func (c *clientConn) stream(st *h2.Stream) {
	w := streamWorks.Get().(*streamWork)
	w.Stream, w.reset, w.begun, w.ended, w.n, w.size, w.held = st, false, false, false, 0, -1, w.held[:0]
	x := &w.x
	x.Reset()
	w.req.Reset()
	w.resp.Reset()
	x.Req, x.Resp, x.Client, x.RemoteAddr, x.Arrived, x.TLS, x.HTTP2 = &w.req, &w.resp, w, c.RemoteAddr(), time.Now(), c.tls, true
	err := w.parse(st.Head)
	if err == nil {
		w.attachBody()
		c.s.run(x, &w.small)
	} else {
		x.ID = requestID(nil)
		Render(x, err)
	}
	st.Patient() // a client may be quiet while it listens to a stream
	w.answer()
	_ = x.Resp.CloseBodyStream()
	x.Finish()
	if x.Cut = w.reset; x.Cut {
		st.Reset(http2.ErrCodeInternal, errCut)
	}
	if err != nil {
		x.Req = nil
	}
	c.s.observe(x)
	x.Req, x.Resp, x.Client, w.Stream = nil, nil, nil, nil
	clear(w.fields)
	if cap(w.text) <= maxKept {
		streamWorks.Put(w)
	}
}

// parse reads the head in the form of HTTP/1.1: so every check sees the same thing whatever the request came by, and what HTTP/2 could carry but a
// line of HTTP/1.1 could not is found.
func (w *streamWork) parse(head []byte) error {
	if w.TooBig {
		return &hop.Error{Status: 431, Reason: hop.ReasonHeaderTooBig, Message: "request header exceeds " + strconv.Itoa(h2HeaderBytes) + " bytes"}
	}
	if len(head) > w.br.Size() {
		w.br = bufio.NewReaderSize(nil, len(head))
	}
	w.src.Reset(head)
	w.br.Reset(&w.src)
	if err := w.req.Header.Read(w.br); err != nil || w.br.Buffered() > 0 || w.src.Len() > 0 {
		return &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "malformed request"}
	}
	return nil
}

// attachBody gives the exchange the body: in memory if it is small and has come together with the head.
func (w *streamWork) attachBody() {
	x := &w.x
	if b, ok := w.Whole(hop.SmallBody); ok {
		x.BodySize, x.In = int64(len(b)), int64(len(b))
		if len(b) > 0 {
			w.req.SetBodyRaw(b)
		}
		return
	}
	x.BodySize = w.Length
	w.req.SetBodyStream((*streamBody)(w), int(x.BodySize))
}

// streamBody is a request's body; it leaves its trailer in the exchange.
type streamBody streamWork

func (b *streamBody) Read(p []byte) (int, error) {
	n, err := b.Stream.Read(p)
	b.x.In += int64(n)
	if err == io.EOF && len(b.x.ReqTrailer) == 0 {
		b.x.ReqTrailer = append(b.x.ReqTrailer, b.Trailer()...)
	}
	return n, err
}

// head makes the fields of an answer's head, without what belongs to a connection.
func (w *streamWork) head(h *fasthttp.ResponseHeader) (announced string) {
	text, conn := appendAnswerHead(w.text[:0], h)
	w.text = text
	w.fields = append(w.fields[:0], hpack.HeaderField{Name: ":status", Value: strconv.Itoa(h.StatusCode())})
	w.fields = h2.Fields(w.fields, text[bytes.IndexByte(text, '\n')+1:])
	return conn.Announced
}

// Interim passes on an answer before the answer.
func (w *streamWork) Interim(h *fasthttp.ResponseHeader) error {
	w.head(h)
	if err := w.WriteHead(w.fields, false); err != nil {
		return err
	}
	return w.Stream.Flush()
}

// answer writes the answer to the stream.
func (w *streamWork) answer() {
	x := &w.x
	announced := w.head(&x.Resp.Header)
	size, code := bodySize(x), x.Resp.StatusCode()
	if size > 0 || size == 0 && code != fasthttp.StatusNoContent && code != fasthttp.StatusNotModified {
		w.fields = append(w.fields, h2.Field("content-length", strconv.Itoa(size)))
	}
	if announced != "" {
		w.fields = append(w.fields, h2.Field("trailer", announced))
	}
	if code < 200 {
		w.Reset() // 101 is no answer in HTTP/2
		return
	}
	var err error
	switch stream := x.Resp.BodyStream(); {
	case bodyless(x):
	case stream == nil:
		if b := x.Resp.Body(); len(b) > 0 {
			// The end goes with the last byte: clients of gRPC know a refusal that is no gRPC only by that.
			w.ended = len(x.RespTrailer) == 0
			if err = w.begin(false); err == nil {
				err = w.Stream.Write(b, w.ended)
			}
			w.n = int64(len(b))
		}
	default:
		err = w.copyBody(stream, size)
	}
	x.Out = w.n
	if err == nil && !w.ended {
		err = w.end()
	}
	if err != nil {
		w.Reset()
	}
}

// begin sends the head, unless it has been sent.
func (w *streamWork) begin(end bool) error {
	if w.begun {
		return nil
	}
	w.begun = true
	return w.WriteHead(w.fields, end)
}

// end sends what is left of the answer. One without a body ends with its head: gRPC takes an error for one only then.
func (w *streamWork) end() error {
	trailer := w.x.RespTrailer
	if len(w.held) > 0 {
		err := w.Stream.Write(w.held, len(trailer) == 0)
		if err != nil || len(trailer) == 0 {
			return err
		}
	}
	if !w.begun && len(trailer) == 0 {
		return w.begin(true)
	}
	if err := w.begin(false); err != nil || len(trailer) == 0 {
		return errors.Join(err, w.Stream.Write(nil, true))
	}
	text := w.text[:0]
	for _, f := range trailer {
		text = f.AppendLine(text)
	}
	w.text, w.fields = text, h2.Fields(w.fields[:0], text)
	return w.WriteHead(w.fields, true)
}

// copyBody copies a body that is still coming.
func (w *streamWork) copyBody(stream io.Reader, size int) (err error) {
	out := (*streamWriter)(w)
	w.size = size
	if wt, ok := stream.(io.WriterTo); ok {
		_, err = wt.WriteTo(out)
	} else {
		_ = out.Flush() // the answer has begun, whenever its body will
		_, err = io.Copy(struct{ io.Writer }{out}, stream)
	}
	if err == nil && size >= 0 && w.n != int64(size) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// maxHeld is how long the last piece of a body may be to be held back for the end.
const maxHeld = 4 << 10

// streamWriter takes an answer's body. What is small is kept back until Flush.
type streamWriter streamWork

func (w *streamWriter) Write(p []byte) (int, error) {
	if err := (*streamWork)(w).begin(false); err != nil {
		return 0, err
	}
	if w.size >= 0 && w.n+int64(len(p)) == int64(w.size) && len(p) <= maxHeld {
		w.held = append(w.held[:0], p...)
		w.n += int64(len(p))
		return len(p), nil
	}
	if err := w.Stream.Write(p, false); err != nil {
		return 0, err
	}
	w.n += int64(len(p))
	if len(p) >= direct {
		return len(p), w.Flush()
	}
	return len(p), nil
}

func (w *streamWriter) Flush() error {
	if err := (*streamWork)(w).begin(false); err != nil {
		return err
	}
	if len(w.held) > 0 { // nobody knows how long the end will take
		err := w.Stream.Write(w.held, false)
		if w.held = w.held[:0]; err != nil {
			return err
		}
	}
	return w.Stream.Flush()
}
