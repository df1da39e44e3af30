package front

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync/atomic"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
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
		n, err := b.chunks.Read(b.c.w.br, p)
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
	n, err := b.c.w.br.Read(p)
	if b.left -= int64(n); b.left == 0 {
		b.done.Store(true)
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// asksFirst says whether the client waits to be told that its body is wanted.
func asksFirst(x *hop.Exchange) bool {
	return x.BodySize != 0 && !x.HTTP10 && bytes.EqualFold(x.Req.Header.Peek("Expect"), []byte("100-continue"))
}

// readSmall takes a small body into memory (see hop.SmallBody).
func readSmall(x *hop.Exchange, buf *[]byte) error {
	if x.BodySize <= 0 || x.BodySize > hop.SmallBody || asksFirst(x) {
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
