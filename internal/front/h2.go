package front

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
)

// Limits of an HTTP/2 connection besides those of Config.
const (
	h2HeaderBytes  = 64 << 10 // a request's fields
	h2StreamWindow = 256 << 10
	h2ConnWindow   = 1 << 20
	h2Ping         = 30 * time.Second // a silent connection is asked whether it is still there,
	h2Pong         = 15 * time.Second // and closed when no answer comes
)

func (s *Server) newH2() *http.Server {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           http.HandlerFunc(s.stream),
		Protocols:         &protocols,
		ReadHeaderTimeout: s.cfg.HeaderTimeout,
		IdleTimeout:       s.cfg.IdleTimeout,
		MaxHeaderBytes:    h2HeaderBytes,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          s.cfg.MaxStreams,
			MaxReceiveBufferPerConnection: h2ConnWindow,
			MaxReceiveBufferPerStream:     h2StreamWindow,
			SendPingTimeout:               h2Ping,
			PingTimeout:                   h2Pong,
			WriteByteTimeout:              s.cfg.WriteIdle,
		},
		ErrorLog:    log.New(io.Discard, "", 0), // it is about clients that misbehave
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
}

type connKey struct{}

// handover is the listener from which the HTTP/2 server gets its connections.
type handover struct {
	conns   chan net.Conn
	closed  chan struct{}
	once    sync.Once
	serving sync.WaitGroup
}

func (h *handover) give(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.closed:
		return false
	}
}

// Accept is the HTTP/2 server's.
func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close is the HTTP/2 server's.
func (h *handover) Close() error { h.once.Do(func() { close(h.closed) }); return nil }

// Addr is nobody's: the connections come from any listener.
func (h *handover) Addr() net.Addr { return &net.TCPAddr{} }

// h2Conn is a connection of which some bytes have been read.
type h2Conn struct {
	net.Conn
	c     *clientConn
	first []byte
}

func (c *h2Conn) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

func (c *h2Conn) Close() error {
	c.c.s.forget(c.c)
	return c.Conn.Close()
}

// streamClient is the hop.Client of a stream.
type streamClient struct {
	w     http.ResponseWriter
	r     *http.Request
	reset atomic.Bool
}

func (c *streamClient) Gone() bool               { return c.r.Context().Err() != nil }
func (c *streamClient) Context() context.Context { return c.r.Context() }
func (c *streamClient) Abort()                   { c.r.Body.Close() }
func (c *streamClient) Reset()                   { c.reset.Store(true) }

// Interim passes on an answer before the answer. A 100 is net/http's own to send, when the body is first read.
func (c *streamClient) Interim(h *fasthttp.ResponseHeader) error {
	if h.StatusCode() == http.StatusContinue {
		return nil
	}
	hdr := c.w.Header()
	head, _ := appendAnswerHead(nil, h)
	for k, v := range hop.Lines(string(head)) {
		hdr.Add(k, v)
	}
	c.w.WriteHeader(h.StatusCode())
	clear(hdr)
	return c.r.Context().Err()
}

// streamBody is a request's body; it leaves its trailer in the exchange.
type streamBody struct {
	r *http.Request
	x *hop.Exchange
}

func (b *streamBody) Read(p []byte) (int, error) {
	n, err := b.r.Body.Read(p)
	if err == io.EOF && len(b.r.Trailer) > 0 && len(b.x.ReqTrailer) == 0 {
		for k, vv := range b.r.Trailer {
			if hop.TrailerAllowed(k) {
				for _, v := range vv {
					b.x.ReqTrailer = append(b.x.ReqTrailer, hop.Field{Name: k, Value: v})
				}
			}
		}
	}
	return n, err
}

// streamWork is what a stream needs; the memory is used again.
type streamWork struct {
	x     hop.Exchange
	req   fasthttp.Request
	resp  fasthttp.Response
	text  []byte
	src   bytes.Reader
	br    *bufio.Reader
	small []byte
}

var streamWorks = sync.Pool{New: func() any { return &streamWork{br: bufio.NewReaderSize(nil, 4<<10)} }}

// stream maps one HTTP/2 stream to an exchange and back.
func (s *Server) stream(rw http.ResponseWriter, r *http.Request) {
	w := streamWorks.Get().(*streamWork)
	client := &streamClient{w: rw, r: r}
	x := &w.x
	x.Reset()
	w.req.Reset()
	w.resp.Reset()
	x.Req, x.Resp, x.Client, x.Arrived = &w.req, &w.resp, client, time.Now()
	if c, ok := r.Context().Value(connKey{}).(*h2Conn); ok {
		x.RemoteAddr, x.TLS = c.RemoteAddr(), c.c.tls
	}
	err := w.parse(r)
	if err == nil {
		if x.BodySize = r.ContentLength; r.Body == http.NoBody {
			x.BodySize = 0
		}
		if x.BodySize != 0 {
			w.req.SetBodyStream(&streamBody{r, x}, int(x.BodySize))
		}
		s.run(x, &w.small)
	} else {
		x.ID = requestID(nil)
		Render(x, err)
	}
	defer func() {
		_ = x.Resp.CloseBodyStream()
		x.Finish()
		if client.reset.Load() {
			panic(http.ErrAbortHandler) // net/http resets the stream
		}
		x.Req, x.Resp, x.Client = nil, nil, nil
		streamWorks.Put(w)
	}()
	w.answer(client)
}

// parse makes fasthttp's header of net/http's by way of the wire form of HTTP/1.1: so every check sees the same thing whatever the request came
// by, and what HTTP/2 could carry but a line of HTTP/1.1 could not is found.
func (w *streamWork) parse(r *http.Request) error {
	bad := &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "malformed request"}
	target := r.RequestURI
	if r.Method == http.MethodConnect {
		target = "/" // refused for its method
	}
	if !chunk.Token([]byte(r.Method)) || !visible(target) || !validHost([]byte(r.Host)) {
		return bad
	}
	b := append(append(append(append(w.text[:0], r.Method...), ' '), target...), " HTTP/1.1\r\nHost: "...)
	b = append(append(b, r.Host...), "\r\n"...)
	for k, vv := range r.Header {
		if k == "Te" {
			b = append(b, "Te: trailers\r\n"...) // nothing else is allowed in HTTP/2
			continue
		}
		if k == "Host" || hop.ConnectionOnly([]byte(k)) {
			continue
		}
		for _, v := range vv {
			b = hop.Field{Name: k, Value: v}.AppendLine(b)
		}
	}
	for k := range r.Trailer { // what was announced, on one line: the parser knows only the last
		if !bytes.HasSuffix(b, []byte(", ")) {
			b = append(b, "Trailer: "...)
		}
		b = append(append(b, k...), ", "...)
	}
	if len(r.Trailer) > 0 {
		b = append(bytes.TrimSuffix(b, []byte(", ")), "\r\n"...)
	}
	b = append(b, "\r\n"...)
	w.text = b
	if len(b) > w.br.Size() {
		w.br = bufio.NewReaderSize(nil, len(b))
	}
	w.src.Reset(b)
	w.br.Reset(&w.src)
	if err := w.req.Header.Read(w.br); err != nil || w.br.Buffered() > 0 || w.src.Len() > 0 {
		return bad
	}
	return nil
}

// visible says that s has no byte that would end or split a request line.
func visible(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] == 0x7f {
			return false
		}
	}
	return len(s) > 0
}

// answer writes the answer to the stream.
func (w *streamWork) answer(c *streamClient) {
	x := &w.x
	hdr := c.w.Header()
	hdr["Content-Type"], hdr["Date"] = nil, nil // else they are made up
	head, conn := appendAnswerHead(w.text[:0], &x.Resp.Header)
	w.text = head
	for k, v := range hop.Lines(string(head)) {
		hdr[k] = append(hdr[k], v)
	}
	size := bodySize(x)
	code := x.Resp.StatusCode()
	if size > 0 || size == 0 && code != fasthttp.StatusNoContent && code != fasthttp.StatusNotModified {
		hdr.Set("Content-Length", strconv.Itoa(size))
	}
	if conn.Announced != "" {
		hdr.Set("Trailer", conn.Announced)
	}
	if code < 200 {
		c.Reset() // 101 is no answer in HTTP/2
		return
	}
	c.w.WriteHeader(code)
	stream := x.Resp.BodyStream()
	switch {
	case bodyless(x):
	case stream == nil:
		_, _ = c.w.Write(x.Resp.Body())
	default:
		out := &streamWriter{w: c.w, f: c.w.(http.Flusher)}
		var err error
		if wt, ok := stream.(io.WriterTo); ok {
			_, err = wt.WriteTo(out)
		} else {
			_ = out.Flush() // the answer has begun, whenever its body will
			_, err = io.Copy(struct{ io.Writer }{out}, stream)
		}
		if err == nil && size >= 0 && out.n != int64(size) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			c.Reset()
			return
		}
	}
	for _, f := range x.RespTrailer {
		hdr.Add(http.TrailerPrefix+f.Name, f.Value)
	}
}

type streamWriter struct {
	w http.ResponseWriter
	f http.Flusher
	n int64
}

func (w *streamWriter) Write(p []byte) (int, error) {
	n, err := w.w.Write(p)
	w.n += int64(n)
	return n, err
}

func (w *streamWriter) Flush() error { w.f.Flush(); return nil }
