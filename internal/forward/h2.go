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
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// h2 sends exchanges over HTTP/2 with prior knowledge, by net/http's implementation and over connections of its own: so that a connection
// that could not be made is told apart from one that broke, and nothing is sent twice behind our back.
type h2 struct {
	f *Forward
	t *http.Transport

	mu      sync.Mutex
	conns   []*http.ClientConn
	dialing *dial // under way; the others wait for it
	closed  bool
}

type dial struct {
	done chan struct{}
	err  error
}

const (
	h2Idle          = 60 * time.Second // an unused connection is closed after this; HTTP/2 closes without losing a request
	maxAnswerFields = 64 << 10         // bytes of an answer's head
)

func newH2(f *Forward) *h2 {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	return &h2{f: f, t: &http.Transport{
		Protocols: &protocols,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			nc, err := f.cfg.Dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return newBatch(nc), nil
		},
		DisableCompression:     true, // the body is not ours to unpack
		IdleConnTimeout:        h2Idle,
		MaxResponseHeaderBytes: maxAnswerFields,
	}}
}

// get returns a connection with a stream reserved on it.
func (h *h2) get() (*http.ClientConn, error) {
	for {
		lost := false
		h.mu.Lock()
		for i := len(h.conns) - 1; i >= 0; i-- {
			c := h.conns[i]
			if c.Err() != nil {
				h.conns = append(h.conns[:i], h.conns[i+1:]...)
				lost = true
				continue
			}
			if c.Reserve() == nil {
				h.mu.Unlock()
				return c, nil
			}
		}
		if lost && h.f.learn != nil {
			h.mu.Unlock()
			return nil, errRelearn
		}
		if d := h.dialing; d != nil {
			h.mu.Unlock()
			<-d.done // bounded by the dial's own limit
			if d.err != nil {
				return nil, d.err
			}
			continue
		}
		d := &dial{done: make(chan struct{})}
		h.dialing = d
		h.mu.Unlock()

		c, err := h.t.NewClientConn(context.Background(), "http", h.f.cfg.Addr)
		if err == nil {
			if err = c.Reserve(); err != nil {
				c.Close()
			}
		}
		h.mu.Lock()
		h.dialing = nil
		late := h.closed
		if err == nil && !late {
			h.conns = append(h.conns, c)
		}
		h.mu.Unlock()
		if err == nil && late {
			closeUnused(c)
		}
		if err != nil {
			d.err = fmt.Errorf("%w: %w", hop.ErrNotSent, err)
		}
		close(d.done)
		return c, d.err
	}
}

// close closes the connections that nobody uses and keeps no more.
func (h *h2) close() {
	h.mu.Lock()
	conns := h.conns
	h.conns, h.closed = nil, true
	h.mu.Unlock()
	for _, c := range conns {
		closeUnused(c)
	}
}

// closeUnused closes c now, or when its last exchange has ended.
func closeUnused(c *http.ClientConn) {
	c.SetStateHook(func(c *http.ClientConn) {
		if c.InFlight() == 0 {
			c.Close()
		}
	})
	if c.InFlight() == 0 {
		c.Close()
	}
}

var (
	errTimeLimit = errors.New("time limit")
	errLeft      = errors.New("the client left")
)

// stream is one exchange over HTTP/2. Its deadline moves on as the answer comes; when it passes, the stream is reset.
type stream struct {
	x       *hop.Exchange
	cancel  context.CancelCauseFunc
	ctx     context.Context
	timer   *time.Timer
	watcher hop.Watcher // over the client; nil = nobody
	up      *h2upload   // nil = the request has no streaming body

	mu      sync.Mutex
	interim int  // answers before the answer
	begun   bool // the answer, or the giving up on it: no interim answer after this
}

// begin waits for an interim answer that is being passed on and lets no more follow.
func (s *stream) begin() {
	s.mu.Lock()
	s.begun = true
	s.mu.Unlock()
}

func (s *stream) until(t time.Time) {
	switch {
	case t.IsZero():
		if s.timer != nil {
			s.timer.Stop()
		}
	case s.timer == nil:
		s.timer = time.AfterFunc(time.Until(t), func() { s.cancel(errTimeLimit) })
	default:
		s.timer.Reset(time.Until(t))
	}
}

// Cancel makes the stream a hop.Canceller.
func (s *stream) Cancel() { s.cancel(errLeft) }

// end gives up what the exchange holds. The function's work is cancelled if it is not done.
func (s *stream) end() {
	if s.watcher != nil {
		s.watcher.Unwatch()
		s.watcher = nil
	}
	s.up.stop()
	if s.timer != nil {
		s.timer.Stop()
	}
	s.cancel(nil)
}

func (h *h2) serve(x *hop.Exchange) error {
	cc, err := h.get()
	if err != nil {
		return err
	}
	s := &stream{x: x}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	if w, ok := x.Client.(hop.Watcher); ok {
		s.watcher = w
		w.Watch(s)
	}
	req, err := s.request(h.f.cfg.Addr)
	if err != nil {
		cc.Release()
		s.end()
		return err
	}
	x.Sent = time.Now()
	s.until(h.f.startDeadline(x))
	resp, err := cc.RoundTrip(req)
	s.begin()
	if err != nil {
		s.end()
		switch {
		case s.up.failed() != nil:
			return clientBroke(s.up.failed())
		case errors.Is(context.Cause(s.ctx), errTimeLimit):
			return tooLate(x)
		case errors.Is(context.Cause(s.ctx), errLeft):
			return clientLeft()
		case unprocessed(err) && !s.up.touched():
			x.BodyDone = false
			return fmt.Errorf("%w: %w", hop.ErrNotSent, err)
		}
		return broke(err)
	}
	return h.answer(s, resp)
}

// request makes x's request for net/http out of the same lines that HTTP/1.1 would send.
func (s *stream) request(addr string) (*http.Request, error) {
	x := s.x
	bp := headBuffers.Get().(*[]byte)
	buf, conn := appendFields((*bp)[:0], x)
	head := string(buf)
	*bp = buf
	headBuffers.Put(bp)

	hdr := make(http.Header, 16)
	hdr["User-Agent"] = nil // else one is made up
	for k, v := range hop.Lines(head) {
		if k == "Host" {
			continue
		}
		k = textproto.CanonicalMIMEHeaderKey(k)
		hdr[k] = append(hdr[k], v)
	}
	if conn.Trailers {
		hdr["Te"] = []string{"trailers"}
	}
	target := string(x.Req.Header.RequestURI())
	u := &url.URL{Scheme: "http", Host: addr, Opaque: target}
	if strings.HasPrefix(target, "//") { // Opaque would be taken for an authority
		p, err := url.ParseRequestURI(target)
		if err != nil {
			return nil, &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "malformed request target"}
		}
		p.Scheme, p.Host = u.Scheme, u.Host
		u = p
	}
	req := &http.Request{Method: string(x.Req.Header.Method()), URL: u, Host: string(x.Req.Header.Host()), Header: hdr, Body: http.NoBody,
		Proto: "HTTP/2.0", ProtoMajor: 2}
	switch {
	case x.BodySize == 0:
		x.BodyDone = true
	case inMemory(x):
		x.BodyDone = true
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(x.Req.Body())), x.BodySize
	default:
		s.up = newUpload(x, req)
		req.Body, req.ContentLength = s.up, x.BodySize
		for name := range strings.SplitSeq(conn.Announced, ",") {
			if name = textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name)); name != "" && hop.TrailerAllowed(name) {
				if req.Trailer == nil {
					req.Trailer = make(http.Header)
				}
				req.Trailer[name] = nil
			}
		}
	}
	ctx := s.ctx
	if w, ok := x.Client.(hop.InterimWriter); ok {
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			if code == http.StatusSwitchingProtocols {
				return errors.New("101 in HTTP/2")
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.interim++; s.begun || s.interim > maxInterim {
				return errors.New("too many interim answers")
			}
			h := answerHeads.Get().(*answerHead)
			defer answerHeads.Put(h)
			if err := h.parse(code, http.Header(header)); err != nil {
				return err
			}
			return w.Interim(&h.resp)
		}})
	}
	return req.WithContext(ctx), nil
}

// unprocessed says that the function has certainly not seen the request. net/http does not export these errors.
func unprocessed(err error) bool {
	const refused = 7 // REFUSED_STREAM, RFC 9113 7
	if se := (streamError{}); errors.As(err, &se) {
		return se.Code == refused
	}
	msg := err.Error()
	return msg == "http2: client conn not usable" || msg == "http2: Transport received Server's graceful shutdown GOAWAY"
}

// streamError has the fields of net/http's own, which lets errors.As fill it.
type streamError struct {
	StreamID uint32
	Code     uint32
	Cause    error
}

func (streamError) Error() string { return "stream error" }

// answer passes the answer on.
func (h *h2) answer(s *stream, resp *http.Response) error {
	if h.f.cfg.Hop && resp.Header.Get(headerError) != "" {
		return h.refused(s, resp)
	}
	x := s.x
	x.Resp.Reset()
	head := answerHeads.Get().(*answerHead)
	err := head.parse(resp.StatusCode, resp.Header)
	if err == nil {
		head.resp.CopyTo(&x.Resp.Header)
		for k := range resp.Trailer { // what was announced
			_ = x.Resp.Header.AddTrailer(k)
		}
	}
	answerHeads.Put(head)
	if err != nil {
		resp.Body.Close()
		s.end()
		x.Resp.Reset()
		return broke(err)
	}
	size := resp.ContentLength
	// The stream has ended with its head: then net/http says 0 although the function has not.
	ended := size == 0 && resp.Header.Get("Content-Length") == ""
	if len(resp.Trailer) > 0 {
		size = -1 // what speaks HTTP/1.1 has a trailer only after chunks
	}
	code := resp.StatusCode
	if x.Req.Header.IsHead() || code == http.StatusNoContent || code == http.StatusNotModified {
		x.Resp.SkipBody = true
		if size >= 0 {
			x.Resp.Header.SetContentLength(int(size))
		}
	}
	b := &h2body{h: h, s: s, resp: resp, end: h.f.totalEnd(x)}
	if ended {
		b.eof = true
		return b.Close()
	}
	x.Resp.SetBodyStream(b, int(size))
	return nil
}

// answerHead turns a head of net/http's into fasthttp's by way of the wire form: what is set field by field loses Date, and the order of lines.
type answerHead struct {
	resp fasthttp.ResponseHeader
	text []byte
	src  bytes.Reader
	br   *bufio.Reader
}

var answerHeads = sync.Pool{New: func() any { return &answerHead{br: bufio.NewReaderSize(nil, 4<<10)} }}

func (a *answerHead) parse(code int, hdr http.Header) error {
	a.text = append(strconv.AppendInt(append(a.text[:0], "HTTP/1.1 "...), int64(code), 10), ' ')
	a.text = append(append(a.text, http.StatusText(code)...), "\r\n"...)
	for k, vv := range hdr {
		if hop.ConnectionOnly([]byte(k)) {
			continue
		}
		for _, v := range vv {
			a.text = hop.Field{Name: k, Value: v}.AppendLine(a.text)
		}
	}
	a.text = append(a.text, "\r\n"...)
	a.src.Reset(a.text)
	if len(a.text) > a.br.Size() {
		a.br = bufio.NewReaderSize(nil, len(a.text))
	}
	a.br.Reset(&a.src)
	a.resp.SetNoDefaultContentType(true)
	return a.resp.Read(a.br)
}

// h2body is an answer's body. The front reads it and closes it once; then the exchange is finished.
type h2body struct {
	h    *h2
	s    *stream
	resp *http.Response
	end  time.Time
	got  int64 // bytes so far
	eof  bool
	err  error
}

// Read reads body bytes. io.EOF comes only after the body's real end.
func (b *h2body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	b.s.until(b.h.f.idleDeadline(b.s.x, b.end))
	n, err := b.resp.Body.Read(p)
	b.got += int64(n)
	if err == io.EOF {
		b.eof = true
		b.trailer()
	} else if err != nil && errors.Is(context.Cause(b.s.ctx), errTimeLimit) {
		err = fmt.Errorf("answer cut off by a time limit: %w", err)
	}
	b.err = err
	return n, err
}

func (b *h2body) trailer() {
	x := b.s.x
	for k, vv := range b.resp.Trailer {
		if hop.TrailerAllowed(k) {
			for _, v := range vv {
				x.RespTrailer = append(x.RespTrailer, hop.Field{Name: k, Value: v})
			}
		}
	}
}

// WriteTo copies the body in large pieces; each goes out at once, since whether more has come cannot be told. Only after as many bytes as were
// announced nothing more can come: the end goes out together with the last of them, or with the head. gRPC's own client needs
// that of an answer without messages, and of a refusal that is no gRPC.
func (b *h2body) WriteTo(w io.Writer) (int64, error) {
	return copyBody(w, b, func() bool { return b.got != b.resp.ContentLength })
}

// Close ends the exchange. When the body was not read to its end the stream is reset, which cancels the function's work, and the client's
// side will be reset too.
func (b *h2body) Close() error {
	x := b.s.x
	complete := b.eof || x.Resp.SkipBody
	b.resp.Body.Close()
	b.s.end()
	if !complete && x.Client != nil {
		x.Client.Reset()
	}
	x.Finish()
	return nil
}

// h2upload is a request's body that net/http's goroutine reads. After stop nobody reads it any more and the exchange is not
// touched, which is when the front may have both back. net/http may call Close later than that.
type h2upload struct {
	x   *hop.Exchange
	req *http.Request

	mu      sync.Mutex
	quiet   sync.Cond // reading has ended
	reading bool
	stopped bool
	read    bool  // a byte was read
	err     error // the end, or how the client's side broke off
}

func newUpload(x *hop.Exchange, req *http.Request) *h2upload {
	u := &h2upload{x: x, req: req}
	u.quiet.L = &u.mu
	return u
}

var errStopped = errors.New("the answer is complete")

func (u *h2upload) Read(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.err != nil:
		return 0, u.err
	case u.stopped:
		return 0, errStopped
	}
	u.reading = true
	u.mu.Unlock()
	n, err := u.x.Req.BodyStream().Read(p)
	u.mu.Lock()
	if err == io.EOF {
		u.x.BodyDone = true
		for _, f := range u.x.ReqTrailer {
			if _, announced := u.req.Trailer[f.Name]; announced {
				u.req.Trailer[f.Name] = append(u.req.Trailer[f.Name], f.Value)
			}
		}
	}
	if err != nil && err != io.EOF && u.stopped {
		err = errStopped // it was us
	}
	u.reading, u.read, u.err = false, u.read || n > 0, err
	u.quiet.Broadcast()
	return n, err
}

// Close is net/http's, when it wants no more: it waits for a read under way, which may wait for the client.
func (u *h2upload) Close() error { u.stop(); return nil }

// stop ends a read that is under way and lets no more begin.
func (u *h2upload) stop() {
	if u == nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.reading && !u.stopped && u.x.Client != nil {
		u.x.Client.Abort()
	}
	u.stopped = true
	for u.reading {
		u.quiet.Wait()
	}
}

// failed is how the client's side broke off. Only after stop.
func (u *h2upload) failed() error {
	if u == nil || u.err == io.EOF || u.err == errStopped {
		return nil
	}
	return u.err
}

func (u *h2upload) touched() bool { return u != nil && u.read }
