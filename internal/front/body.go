package front

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/sock"
)

// requestBody is the body of an HTTP/1 request on its way. io.EOF comes only after its real end.
type requestBody struct {
	c       *clientConn
	x       *hop.Exchange
	left    int64
	chunked bool
	chunks  chunk.Reader
	done    atomic.Bool // read to its end; another goroutine may be reading
}

func (b *requestBody) Read(p []byte) (int, error) {
	if b.chunked {
		n, err := b.chunks.Read(b.c.br, p)
		b.x.In += int64(n)
		if err == io.EOF && !b.done.Load() {
			b.x.ReqTrailer = append(b.x.ReqTrailer, b.chunks.Trailer...)
			b.done.Store(true)
		}
		return n, err
	}
	if b.left == 0 {
		b.done.Store(true)
		return 0, io.EOF
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.c.br.Read(p)
	b.x.In += int64(n)
	if b.left -= int64(n); b.left == 0 {
		b.done.Store(true)
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// CanSplice makes b a hop.Spliced.
func (b *requestBody) CanSplice() bool {
	return b.c.tcp != nil && !b.c.tls && !b.chunked && b.left > 0 && b.c.br.Buffered() == 0
}

// SpliceTo lets the kernel move the bytes.
func (b *requestBody) SpliceTo(dst *net.TCPConn, n int64) (moved int64, source bool, err error) {
	if err := b.c.armBody(); err != nil {
		return 0, true, err
	}
	n = min(n, b.left)
	moved, err = dst.ReadFrom(&io.LimitedReader{R: b.c.tcp.TCPConn, N: n})
	b.x.In += moved
	if b.left -= moved; b.left == 0 {
		b.done.Store(true)
	}
	switch {
	case b.c.aborted.Load():
		return moved, true, errAborted
	case err == nil && moved < n:
		return moved, true, io.ErrUnexpectedEOF
	case errors.Is(err, os.ErrDeadlineExceeded):
		if source = !time.Now().Before(b.c.readEnd); source && moved > 0 {
			err = nil // it was slow, but not silent
		}
		return moved, source, err
	case err != nil:
		// An error does not say which of the sockets it is of. One that has failed has nothing more to say.
		state := b.c.tcp.Look()
		return moved, state == sock.Ended || state == sock.Reset, err
	}
	return moved, false, nil
}

// asksFirst says whether the client waits to be told that its body is wanted.
func asksFirst(x *hop.Exchange) bool {
	return x.BodySize != 0 && !x.HTTP10 && bytes.EqualFold(x.Req.Header.Peek("Expect"), []byte("100-continue"))
}

// readSmall takes a small body into memory (see hop.SmallBody).
func readSmall(x *hop.Exchange, buf *[]byte) error {
	if x.BodySize <= 0 || x.BodySize > hop.SmallBody || !x.Req.IsBodyStream() || asksFirst(x) {
		return nil
	}
	if cap(*buf) < int(x.BodySize) {
		*buf = make([]byte, max(int(x.BodySize), 1<<10))
	}
	b := (*buf)[:x.BodySize]
	if _, err := io.ReadFull(x.Req.BodyStream(), b); err != nil {
		var nerr net.Error
		if errors.As(err, &nerr) && nerr.Timeout() {
			return &hop.Error{Status: 408, Reason: hop.ReasonBadRequest, Message: "request body did not come in time"}
		}
		return &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "request body ended early"}
	}
	x.Req.SetBodyRaw(b)
	return nil
}
