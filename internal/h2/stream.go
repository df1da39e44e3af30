package h2

import (
	"errors"
	"io"
	"math"
	"os"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/thawrun/thaw/internal/hop"
)

// Stream is one request and its answer. One goroutine at a time may read from it and one may write.
type Stream struct {
	ID     uint32
	Head   []byte // the request's head in the form of HTTP/1.1, without what frames its body
	Length int64  // Content-Length; -1 = not said
	TooBig bool   // the head has more than Config.HeaderBytes; Head is not what was sent

	c *Conn

	// Guarded by c.mu.
	cond     sync.Cond
	in       []byte // from off on not read
	off      int
	got      int64 // bytes of the body
	trailer  []hop.Field
	recvEnd  bool
	sentEnd  bool
	deaf     bool  // nobody will read
	patient  bool  // reads have no limit
	err      error // the end before the end
	sendWin  int32
	recvWin  int32
	unsaid   int32     // read, and not given back to the other side
	tail     int       // where the last piece of our body begins in out
	tailAt   int       // what c.written was then
	readEnd  time.Time // of a wait under way
	writeEnd time.Time
	watcher  hop.Canceller
	left     bool
}

var (
	errAborted  = errors.New("h2: body no longer wanted")
	errAfterEnd = errors.New("h2: frame after the stream's end")
	errLength   = errors.New("h2: the body has not the length that was announced")
	errWindow   = errors.New("h2: flow-control window overrun")
	errEnded    = errors.New("h2: stream ended")
)

func (c *Conn) newStreamLocked(id uint32) *Stream {
	s := &Stream{ID: id, c: c, Length: -1, sendWin: c.peerWin, recvWin: streamWindow}
	s.cond.L = &c.mu
	c.streams[id] = s
	return s
}

// headLocked puts a head into out.
func (s *Stream) headLocked(fields []hpack.HeaderField, end bool) {
	c := s.c
	c.bufferLocked()
	c.encBuf.Reset()
	for _, f := range fields {
		_ = c.enc.WriteField(f) // into memory
	}
	block := c.encBuf.Bytes()
	t, flags := http2.FrameHeaders, http2.Flags(0)
	if end {
		flags = http2.FlagHeadersEndStream
	}
	for {
		p := block[:min(len(block), c.peerFrame)]
		if block = block[len(p):]; len(block) == 0 {
			flags |= http2.FlagHeadersEndHeaders
		}
		c.out = append(appendHeader(c.out, len(p), t, flags, s.ID), p...)
		if len(block) == 0 {
			break
		}
		t, flags = http2.FrameContinuation, 0
	}
	if end {
		s.sentLocked()
	}
}

// dataLocked puts a piece of the body into out, for which there must be room in the windows.
func (s *Stream) dataLocked(p []byte, end bool) {
	flags := http2.Flags(0)
	if end {
		flags = http2.FlagDataEndStream
	}
	s.c.bufferLocked()
	s.tail, s.tailAt = len(s.c.out), s.c.written
	s.c.out = append(appendHeader(s.c.out, len(p), http2.FrameData, flags, s.ID), p...)
	s.sendWin -= int32(len(p))
	s.c.sendWin -= int32(len(p))
	if end {
		s.sentLocked()
	}
}

// sentLocked notes the end of our direction.
func (s *Stream) sentLocked() {
	s.sentEnd = true
	s.closeLocked()
}

// endLocked notes the end of the other side's direction.
func (s *Stream) endLocked() {
	if s.Length >= 0 && s.got != s.Length {
		s.abortLocked(http2.ErrCodeProtocol, errLength)
		return
	}
	s.recvEnd = true
	s.closeLocked()
}

// closeLocked forgets a stream that has ended both ways.
func (s *Stream) closeLocked() {
	if s.recvEnd && s.sentEnd {
		s.forgetLocked()
	}
}

func (s *Stream) forgetLocked() {
	if _, ok := s.c.streams[s.ID]; ok {
		delete(s.c.streams, s.ID)
		s.c.emptyLocked()
	}
}

// failLocked ends the stream before its time.
func (s *Stream) failLocked(err error) {
	if s.err == nil {
		s.err = err
		s.dropLocked()
		if w := s.watcher; w != nil {
			s.watcher, s.left = nil, true
			w.Cancel()
		}
	}
	s.cond.Broadcast()
	s.c.room.Broadcast()
}

// dropLocked throws away what nobody will read.
func (s *Stream) dropLocked() {
	s.c.readLocked(int32(len(s.in) - s.off))
	s.in, s.off = nil, 0
}

// abortLocked takes the stream back.
func (s *Stream) abortLocked(code http2.ErrCode, err error) {
	if _, open := s.c.streams[s.ID]; open {
		s.c.resetLocked(s.ID, code)
	}
	s.failLocked(err)
	s.forgetLocked()
}

// Reset takes the stream back, unless it has ended; err is what those get who use it.
func (s *Stream) Reset(code http2.ErrCode, err error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if _, open := s.c.streams[s.ID]; open {
		s.abortLocked(code, err)
	}
}

// finish ends a stream after its handler.
func (s *Stream) finish() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.deaf, s.watcher = true, nil
	s.dropLocked()
	if _, open := s.c.streams[s.ID]; !open {
		return
	}
	code := http2.ErrCodeInternal
	if s.sentEnd {
		code = http2.ErrCodeNo // the rest of the request is of no use
	}
	s.abortLocked(code, errEnded)
}

// Err says why the stream ended before its time; nil = it has not.
func (s *Stream) Err() error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.err
}

// Gone makes a stream part of a hop.Client.
func (s *Stream) Gone() bool { return s.Err() != nil }

// Watch makes a stream a hop.Watcher.
func (s *Stream) Watch(r hop.Canceller) {
	s.c.mu.Lock()
	gone := s.err != nil
	if s.left = gone; !gone {
		s.watcher = r
	}
	s.c.mu.Unlock()
	if gone {
		r.Cancel()
	}
}

// Unwatch ends Watch.
func (s *Stream) Unwatch() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.watcher = nil
	return !s.left
}

// Abort ends a read of the body, now or to come.
func (s *Stream) Abort() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.deaf = true
	s.dropLocked()
	s.cond.Broadcast()
}

// waitLocked waits for cond; end, if it is not zero, is when to give up.
func (s *Stream) waitLocked(cond *sync.Cond, slot *time.Time, end time.Time) error {
	if !end.IsZero() {
		if !time.Now().Before(end) {
			return os.ErrDeadlineExceeded
		}
		*slot = end
		s.c.untilLocked(end)
	}
	cond.Wait()
	*slot = time.Time{}
	return nil
}

// Read reads the body. It waits as long as Config.BodyIdle says. io.EOF comes only after the body's real end.
func (s *Stream) Read(p []byte) (int, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	var end time.Time
	for {
		switch {
		case s.err != nil:
			return 0, s.err
		case s.deaf:
			return 0, errAborted
		case len(s.in) > s.off:
			n := copy(p, s.in[s.off:])
			s.tookLocked(n)
			return n, nil
		case s.recvEnd:
			return 0, io.EOF
		}
		if s.patient {
			end = time.Time{}
		} else if end.IsZero() && s.c.cfg.BodyIdle > 0 {
			end = time.Now().Add(s.c.cfg.BodyIdle)
		}
		if err := s.waitLocked(&s.cond, &s.readEnd, end); err != nil {
			return 0, err
		}
	}
}

// Patient lifts the limit of reads, of one under way too.
func (s *Stream) Patient() {
	s.c.mu.Lock()
	s.patient = true
	s.c.mu.Unlock()
}

// addLocked keeps a piece of the body for its reader.
func (s *Stream) addLocked(p []byte) {
	if s.off > 0 && len(s.in)+len(p) > cap(s.in) {
		s.in, s.off = s.in[:copy(s.in, s.in[s.off:])], 0
	}
	s.in = append(s.in, p...)
}

// tookLocked notes that n bytes of the body have been read.
func (s *Stream) tookLocked(n int) {
	if s.off += n; s.off == len(s.in) {
		s.in, s.off = s.in[:0], 0
	}
	s.c.readLocked(int32(n))
	if s.unsaid += int32(n); s.unsaid >= streamWindow/2 && !s.recvEnd {
		s.c.out = appendUint32(appendHeader(s.c.out, 4, http2.FrameWindowUpdate, 0, s.ID), uint32(s.unsaid))
		s.recvWin += s.unsaid
		s.unsaid = 0
		s.c.kickLocked()
	}
}

// Whole returns the body if all of it has come, has at most max bytes, and is not followed by a trailer. It counts as read.
func (s *Stream) Whole(max int) (body []byte, ok bool) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if !s.recvEnd || len(s.in)-s.off > max || s.off > 0 || len(s.trailer) > 0 || s.err != nil {
		return nil, false
	}
	body = s.in
	s.in = nil
	s.c.readLocked(int32(len(body)))
	return body, true
}

// Trailer is there once Read has returned io.EOF.
func (s *Stream) Trailer() []hop.Field {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.trailer
}

// writableLocked waits until there is room for one frame more, of body if it is one.
func (s *Stream) writableLocked(body bool) error {
	var end time.Time
	for {
		cond := &s.c.room
		switch {
		case s.err != nil:
			return s.err
		case s.sentEnd:
			return errEnded
		case body && s.sendWin <= 0:
			cond = &s.cond
		case len(s.c.out) < outMax && (!body || s.c.sendWin > 0):
			return nil
		}
		s.c.kickLocked()
		if end.IsZero() && s.c.cfg.WriteIdle > 0 {
			end = time.Now().Add(s.c.cfg.WriteIdle)
		}
		if err := s.waitLocked(cond, &s.writeEnd, end); err != nil {
			return ErrTooSlow
		}
	}
}

// WriteHead sends a head, or a trailer. It is kept back until Flush unless the stream ends with it.
func (s *Stream) WriteHead(fields []hpack.HeaderField, end bool) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if err := s.writableLocked(false); err != nil {
		return err
	}
	s.headLocked(fields, end)
	if end {
		s.c.kickLocked()
	}
	return nil
}

// Write sends a piece of the body. What there is room for is kept back until Flush unless the stream ends with it.
func (s *Stream) Write(p []byte, end bool) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	for {
		if err := s.writableLocked(len(p) > 0); err != nil {
			return err
		}
		n := min(len(p), s.c.peerFrame, int(min(s.sendWin, s.c.sendWin, math.MaxInt32)))
		if len(p) == 0 {
			n = 0
		}
		last := n == len(p)
		if n == 0 && end && s.tailLocked() {
			s.c.out[s.tail+4] |= byte(http2.FlagDataEndStream)
			s.sentLocked()
		} else if n > 0 || end {
			s.dataLocked(p[:n], end && last)
		}
		if p = p[n:]; last {
			break
		}
	}
	if end || len(s.c.out) >= outMax {
		s.c.kickLocked()
	}
	return nil
}

// tailLocked says that the last piece of our body is still in out: the end can go with it. Clients of gRPC know a refusal that is no gRPC only
// if its end comes with its last byte.
func (s *Stream) tailLocked() bool { return s.tailAt == s.c.written && len(s.c.out) > s.tail+9 }

// Flush sends what was kept back.
func (s *Stream) Flush() error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.c.kickLocked()
	return s.err
}
