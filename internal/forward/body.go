package forward

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

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
	left       int64     // of the body, or of the current chunk
	chunked    bool
	inChunk    bool
	untilClose bool
	keep       bool
	eof        bool
	err        error
}

var errChunk = errors.New("malformed chunk from the instance")

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
	if b.chunked && b.left == 0 {
		if err := b.nextChunk(); err != nil {
			return 0, err
		}
	}
	if !b.untilClose {
		if b.left == 0 {
			return 0, io.EOF
		}
		if int64(len(p)) > b.left {
			p = p[:b.left]
		}
	}
	b.arm()
	n, err := b.c.br.Read(p)
	b.left -= int64(n)
	if err == io.EOF && !b.untilClose {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// arm sets the idle limit for the next read, never beyond the total one.
func (b *body) arm() {
	if b.f.cfg.Idle <= 0 {
		return
	}
	t := time.Now().Add(b.f.cfg.Idle)
	if !b.end.IsZero() && b.end.Before(t) {
		t = b.end
	}
	b.c.SetReadDeadline(t)
}

// nextChunk reads up to the data of the next chunk. After the last one it reads the trailer and returns io.EOF.
func (b *body) nextChunk() error {
	br := b.c.br
	b.arm()
	if b.inChunk {
		if err := crlf(br); err != nil {
			return err
		}
	}
	b.inChunk = true
	line, err := readLine(br)
	if err != nil {
		return err
	}
	size, err := chunkSize(line)
	if err != nil {
		return err
	}
	if b.left = size; size > 0 {
		return nil
	}
	for total := 0; ; {
		if line, err = readLine(br); err != nil {
			return err
		}
		if len(line) == 0 {
			return io.EOF
		}
		if total += len(line); total > readerSize {
			return errChunk
		}
	}
}

// readLine returns a line without its CRLF; the reader's buffer bounds it.
func readLine(br *bufio.Reader) ([]byte, error) {
	line, err := br.ReadSlice('\n')
	switch {
	case err == io.EOF:
		return nil, io.ErrUnexpectedEOF
	case err == bufio.ErrBufferFull:
		return nil, errChunk
	case err != nil:
		return nil, err
	case len(line) < 2 || line[len(line)-2] != '\r':
		return nil, errChunk
	}
	return line[:len(line)-2], nil
}

func crlf(br *bufio.Reader) error {
	line, err := readLine(br)
	if err == nil && len(line) != 0 {
		err = errChunk
	}
	return err
}

// chunkSize parses the hexadecimal size in front of a chunk; extensions after ';' are ignored.
func chunkSize(line []byte) (int64, error) {
	var n int64
	digits := 0
	for _, ch := range line {
		var v byte
		switch {
		case ch >= '0' && ch <= '9':
			v = ch - '0'
		case ch >= 'a' && ch <= 'f':
			v = ch - 'a' + 10
		case ch >= 'A' && ch <= 'F':
			v = ch - 'A' + 10
		case (ch == ';' || ch == ' ' || ch == '\t') && digits > 0:
			return n, nil
		default:
			return 0, errChunk
		}
		if digits++; digits > 15 {
			return 0, errChunk
		}
		n = n<<4 | int64(v)
	}
	if digits == 0 {
		return 0, errChunk
	}
	return n, nil
}

// SupportsBodyWriteTo lets the front use WriteTo in place of Read.
func (b *body) SupportsBodyWriteTo() bool { return true }

// WriteTo copies the body in large pieces and pushes out what has come whenever nothing more is there, so that a slow
// stream is not held back by a buffer.
func (b *body) WriteTo(w io.Writer) (int64, error) {
	bp := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(bp)
	flusher, _ := w.(interface{ Flush() error })
	var total int64
	for {
		n, err := b.Read(*bp)
		if n > 0 {
			if _, werr := w.Write((*bp)[:n]); werr != nil {
				return total, werr
			}
			total += int64(n)
			if flusher != nil && b.c.br.Buffered() == 0 {
				if werr := flusher.Flush(); werr != nil {
					return total, werr
				}
			}
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
