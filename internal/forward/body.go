package forward

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
)

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, copySize); return &b }}

var bodies = sync.Pool{New: func() any { return new(body) }}

// body is the rest of an answer that is still coming. The front reads it and closes it once; then the connection goes back and
// the exchange is finished.
type body struct {
	f          *Forward
	c          *conn
	x          *hop.Exchange
	up         *upload
	end        time.Time // total limit; zero = none
	left       int64     // of a body of known length
	chunked    bool
	chunks     chunk.Reader
	untilClose bool
	keep       bool
	eof        bool
	err        error
}

// Read reads body bytes. io.EOF comes only after the body's real end.
func (b *body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.read(p)
	if err != nil {
		switch {
		case err == io.EOF:
			b.eof = true
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = fmt.Errorf("answer cut off by a time limit: %w", err)
		}
		b.err = err
	}
	return n, err
}

func (b *body) read(p []byte) (int, error) {
	b.arm()
	if b.chunked {
		n, err := b.chunks.Read(b.c.br, p)
		if err == io.EOF {
			b.x.RespTrailer = append(b.x.RespTrailer, b.chunks.Trailer...)
		}
		return n, err
	}
	if !b.untilClose {
		if b.left == 0 {
			return 0, io.EOF
		}
		if int64(len(p)) > b.left {
			p = p[:b.left]
		}
	}
	n, err := b.c.br.Read(p)
	b.left -= int64(n)
	if err == io.EOF && !b.untilClose {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// arm sets the idle limit for the next read, never beyond the total one.
func (b *body) arm() {
	if b.f.limits(b.x).Idle > 0 {
		b.c.until(b.f.idleDeadline(b.x, b.end))
	}
}

// waits says that the next read has to wait for the instance.
func (b *body) waits() bool {
	if b.chunked {
		return !b.chunks.Ready(b.c.br)
	}
	return b.c.br.Buffered() == 0 && (b.untilClose || b.left > 0)
}

// WriteTo copies the body in large pieces and pushes out what has come whenever nothing more is there, so that a slow
// stream is not held back by a buffer. Where the kernel can move the bytes from socket to socket, it does.
func (b *body) WriteTo(w io.Writer) (int64, error) {
	if s, ok := w.(hop.Splicer); ok && !b.chunked && !b.untilClose && b.left-int64(b.c.br.Buffered()) >= spliceFrom && s.CanSplice() {
		return b.splice(w, s)
	}
	return copyBody(w, b, b.waits)
}

const (
	spliceFrom  = 16 << 10 // bytes still to come from which on splicing pays
	splicePiece = 64 << 10 // after which the limits are looked at again: what a pipe holds
)

// splice moves what has been read already, and then the rest from socket to socket.
func (b *body) splice(w io.Writer, s hop.Splicer) (total int64, err error) {
	size := b.left
	if n := b.c.br.Buffered(); n > 0 {
		p, _ := b.c.br.Peek(n)
		_, err = w.Write(p)
		_, _ = b.c.br.Discard(n)
		b.left -= int64(n)
	}
	b.arm()
	for err == nil && b.left > 0 {
		var n int64
		n, err = s.Splice(b.c.TCPConn, min(b.left, splicePiece))
		if b.left -= n; n > 0 {
			b.arm()
		}
		switch {
		case err == nil && n == 0:
			err = io.ErrUnexpectedEOF
		case errors.Is(err, os.ErrDeadlineExceeded) && (n > 0 && b.within() || b.c.again(err)):
			err = nil
		}
	}
	b.eof, b.err = err == nil, err
	return size - b.left, err
}

// within says that the total limit has not passed.
func (b *body) within() bool { return b.end.IsZero() || time.Now().Before(b.end) }

func copyBody(w io.Writer, r io.Reader, waits func() bool) (total int64, err error) {
	bp := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(bp)
	flusher, _ := w.(interface{ Flush() error })
	for {
		if flusher != nil && waits() {
			if err := flusher.Flush(); err != nil {
				return total, err
			}
		}
		n, err := r.Read(*bp)
		if n > 0 {
			if _, werr := w.Write((*bp)[:n]); werr != nil {
				return total, werr
			}
			total += int64(n)
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// Close ends the exchange. When the body was not read to its end, the answer was cut short: the instance's connection is
// closed, which cancels the function's work, and the client's connection will be reset.
func (b *body) Close() error {
	x, up, c := b.x, b.up, b.c
	complete := b.eof || (!b.chunked && !b.untilClose && b.left == 0 && b.err == nil)
	if up.running() {
		up.stop(x, c)
		b.keep = false
	}
	if !complete && x.Client != nil {
		x.Client.Reset()
	}
	b.f.release(c, b.keep && complete && c.br.Buffered() == 0)
	*b = body{}
	bodies.Put(b)
	x.Finish()
	return nil
}
