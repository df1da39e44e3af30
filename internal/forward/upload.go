package forward

import (
	"io"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
)

// upload is a request's body on its way while the answer may already come. The goroutine is the only user of the body's stream and
// of the connection's write half.
type upload struct {
	done    chan struct{}
	stopped atomic.Bool // by us
	last    atomic.Bool // the last piece of a body of known length is on its way
	client  error       // the client's side failed: the body is not complete
}

func (u *upload) run(x *hop.Exchange, c *conn) {
	defer close(u.done)
	bp := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(bp)
	const room = 20 // for a chunk's size line, before the data; CRLF follows it
	buf := *bp
	chunked := x.BodySize < 0
	in := x.Req.BodyStream()
	left := x.BodySize
	spliced, _ := in.(hop.Spliced)
	for {
		u.last.Store(left >= 0 && left <= splicePiece)
		if spliced != nil && left >= spliceFrom && spliced.CanSplice() {
			n, source, err := spliced.SpliceTo(c.TCPConn, min(left, splicePiece))
			switch left -= n; {
			case err != nil && source:
				u.broke(c, err)
				return
			case err != nil:
				return // the function does not want it
			case left == 0:
				x.BodyDone = true
				return
			}
			continue
		}
		n, err := in.Read(buf[room : len(buf)-2])
		if n > 0 {
			out := buf[room : room+n]
			if chunked {
				var line [room]byte
				size := chunk.AppendSize(line[:0], n)
				start := room - len(size)
				copy(buf[start:], size)
				buf[room+n], buf[room+n+1] = '\r', '\n'
				out = buf[start : room+n+2]
			}
			left -= int64(n)
			if _, werr := c.Write(out); werr != nil {
				return // the function does not want it; its answer says why
			}
		}
		switch {
		case err == io.EOF && (chunked || left == 0):
			x.BodyDone = true
			if chunked {
				_, _ = c.Write(chunk.AppendEnd(nil, x.ReqTrailer))
			}
			return
		case err != nil:
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			u.broke(c, err)
			return
		}
	}
}

// broke ends an upload whose body broke off. The function must not take the part for the whole. Closing is the only way to say so.
func (u *upload) broke(c *conn, err error) {
	if !u.stopped.Load() {
		u.client = err
	}
	c.Close()
}

// stop ends the upload, whatever it waits for, and returns when it has ended.
func (u *upload) stop(x *hop.Exchange, c *conn) {
	if u == nil {
		return
	}
	select {
	case <-u.done:
		return
	default:
	}
	u.stopped.Store(true)
	if x.Client != nil {
		x.Client.Abort() // first: Close waits for a splice into c that waits for the client
	}
	c.Close()
	<-u.done
}

// settle gives an upload whose last bytes the function has answered already the moment that its goroutine needs to say so: else
// the answer would cost the client its connection for nothing. A goroutine whose splice has ended may have to queue for a processor, so the last piece
// is waited for longer. It returns whether the body is still on its way.
func (u *upload) settle() bool {
	if !u.running() {
		return false
	}
	wait := time.Millisecond
	if u.last.Load() {
		wait = 25 * time.Millisecond
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-u.done:
		return false
	case <-t.C:
		return true
	}
}

func (u *upload) running() bool {
	if u == nil {
		return false
	}
	select {
	case <-u.done:
		return false
	default:
		return true
	}
}
