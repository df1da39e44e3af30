package h2

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/net/http2"
)

// frame takes in one frame. An error is the connection's end.
func (c *Conn) frame(f http2.Frame) error {
	if _, ok := f.(*http2.SettingsFrame); !c.first && !ok {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	switch f := f.(type) {
	case *http2.HeadersFrame:
		return c.headers(f)
	case *http2.ContinuationFrame:
		return c.fragment(f.HeaderBlockFragment(), f.HeadersEnded())
	case *http2.DataFrame:
		return c.data(f)
	case *http2.SettingsFrame:
		return c.settings(f)
	case *http2.WindowUpdateFrame:
		return c.windowUpdate(f)
	case *http2.RSTStreamFrame:
		return c.rst(f)
	case *http2.PingFrame:
		return c.ping(f)
	case *http2.PriorityFrame:
		if f.StreamDep == f.StreamID {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
	case *http2.PushPromiseFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return nil
}

// idleLocked says that a stream has never been open.
func (c *Conn) idleLocked(id uint32) bool { return id&1 == 0 || id > c.maxID }

// headers begins a head: of a new stream, or a trailer.
func (c *Conn) headers(f *http2.HeadersFrame) error {
	if f.HasPriority() && f.Priority.StreamDep == f.StreamID {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	b := &c.block
	b.reset()
	b.stream, b.end = f.StreamID, f.StreamEnded()
	c.mu.Lock()
	s := c.streams[f.StreamID]
	idle, dropped := c.idleLocked(f.StreamID), c.wasDroppedLocked(f.StreamID)
	switch {
	case f.StreamID&1 == 0:
		c.mu.Unlock()
		return http2.ConnectionError(http2.ErrCodeProtocol)
	case s == nil && idle:
		b.kind = isRequest
		c.maxID = f.StreamID
	case s == nil && !dropped, s != nil && s.recvEnd:
		c.mu.Unlock()
		return http2.ConnectionError(http2.ErrCodeStreamClosed)
	case s == nil:
		b.kind = isNothing
	default:
		b.kind = isTrailer
	}
	c.mu.Unlock()
	c.inHead = true
	if c.since.IsZero() {
		c.since = c.heard
	}
	return c.fragment(f.HeaderBlockFragment(), f.HeadersEnded())
}

// fragment unpacks a part of a head.
func (c *Conn) fragment(p []byte, last bool) error {
	b := &c.block
	b.parts++
	b.bytes += len(p)
	if b.parts > blockParts || b.bytes > blockMax {
		return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	if _, err := c.dec.Write(p); err != nil {
		return http2.ConnectionError(http2.ErrCodeCompression)
	}
	if !last {
		return nil
	}
	if err := c.dec.Close(); err != nil {
		return http2.ConnectionError(http2.ErrCodeCompression)
	}
	c.inHead, c.since = false, time.Time{}
	c.dec.SetEmitEnabled(true)
	if b.kind == isRequest {
		b.finish()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch b.kind {
	case isRequest:
		return c.openedLocked()
	case isNothing:
		return nil
	}
	s := c.streams[b.stream]
	switch {
	case s == nil: // ended since the head began
		return nil
	case b.bad != "", b.tooBig, !b.end:
		s.abortLocked(http2.ErrCodeProtocol, fmt.Errorf("h2: malformed trailer: %s", b.bad))
		return c.replyLocked()
	}
	s.trailer, b.trailer = b.trailer, nil
	s.endLocked()
	s.cond.Broadcast()
	return nil
}

// openedLocked makes a stream of the request whose head has come.
func (c *Conn) openedLocked() error {
	b := &c.block
	switch {
	case c.err != nil: // who writes has found out first; what has come besides is nobody's any more
		return c.err
	case b.stream > c.lastID: // it was told, or will be
		c.dropLocked(b.stream)
		return nil
	case b.bad != "":
		c.resetLocked(b.stream, http2.ErrCodeProtocol)
		return c.replyLocked()
	case c.running >= c.cfg.MaxStreams:
		c.resetLocked(b.stream, http2.ErrCodeRefusedStream)
		if err := c.spend(costReset); err != nil {
			return err
		}
		return c.replyLocked()
	}
	s := c.newStreamLocked(b.stream)
	s.Head, s.Length, s.TooBig = append([]byte(nil), b.text...), b.length, b.tooBig
	if b.end {
		s.recvEnd = true
		if s.Length > 0 && !s.TooBig {
			delete(c.streams, s.ID)
			c.resetLocked(s.ID, http2.ErrCodeProtocol)
			c.emptyLocked()
			return c.replyLocked()
		}
	}
	c.running++
	c.fresh = append(c.fresh, s)
	return nil
}

// data takes in a piece of a body.
func (c *Conn) data(f *http2.DataFrame) error {
	n, p := int32(f.Length), f.Data()
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.streams[f.StreamID]
	if s == nil && c.idleLocked(f.StreamID) {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if n > c.recvWin {
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	c.recvWin -= n
	if s == nil || s.recvEnd {
		c.readLocked(n)
		if s == nil && c.wasDroppedLocked(f.StreamID) {
			return nil
		}
		if s != nil {
			s.abortLocked(http2.ErrCodeStreamClosed, errAfterEnd)
			return c.replyLocked()
		}
		return http2.ConnectionError(http2.ErrCodeStreamClosed)
	}
	if n > s.recvWin {
		c.readLocked(n)
		s.abortLocked(http2.ErrCodeFlowControl, errWindow)
		return c.replyLocked()
	}
	s.recvWin -= n
	s.got += int64(len(p))
	pad := n - int32(len(p))
	if pad > 0 {
		c.readLocked(pad)
	}
	switch {
	case s.Length >= 0 && s.got > s.Length:
		c.readLocked(int32(len(p)))
		s.abortLocked(http2.ErrCodeProtocol, errLength)
		return c.replyLocked()
	case s.deaf:
		c.readLocked(int32(len(p)))
	default:
		s.unsaid += pad
		s.addLocked(p)
	}
	if len(p) == 0 && !f.StreamEnded() {
		if err := c.spend(costPing); err != nil {
			return err
		}
	}
	if f.StreamEnded() {
		s.endLocked()
	}
	s.cond.Broadcast()
	return nil
}

// readLocked gives bytes back to the connection's window; the other side is told when they are worth a frame.
func (c *Conn) readLocked(n int32) {
	if c.unsaid += n; c.unsaid >= connWindow/2 && c.err == nil {
		c.out = appendUint32(appendHeader(c.out, 4, http2.FrameWindowUpdate, 0, 0), uint32(c.unsaid))
		c.recvWin += c.unsaid
		c.unsaid = 0
		c.kickLocked()
	}
}

func (c *Conn) settings(f *http2.SettingsFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.IsAck() {
		if !c.first {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		return nil
	}
	if !c.first {
		c.first, c.inHead, c.since = true, false, time.Time{}
	}
	if err := c.spend(costPing); err != nil {
		return err
	}
	if err := f.ForeachSetting(c.settingLocked); err != nil {
		return err
	}
	c.room.Broadcast()
	c.out = appendHeader(c.out, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	return c.replyLocked()
}

func (c *Conn) settingLocked(s http2.Setting) error {
	if err := s.Valid(); err != nil {
		return err
	}
	switch s.ID {
	case http2.SettingHeaderTableSize:
		c.enc.SetMaxDynamicTableSize(min(s.Val, 4096))
	case http2.SettingMaxFrameSize:
		c.peerFrame = int(min(s.Val, maxFrame))
	case http2.SettingInitialWindowSize:
		delta := int64(s.Val) - int64(c.peerWin)
		c.peerWin = int32(s.Val)
		for _, st := range c.streams {
			w := int64(st.sendWin) + delta
			if w > math.MaxInt32 {
				return http2.ConnectionError(http2.ErrCodeFlowControl)
			}
			st.sendWin = int32(w)
			st.cond.Broadcast()
		}
	}
	return nil
}

func (c *Conn) windowUpdate(f *http2.WindowUpdateFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.StreamID == 0 {
		if int64(c.sendWin)+int64(f.Increment) > math.MaxInt32 {
			return http2.ConnectionError(http2.ErrCodeFlowControl)
		}
		c.sendWin += int32(f.Increment)
		c.room.Broadcast()
		return nil
	}
	s := c.streams[f.StreamID]
	switch {
	case s == nil && c.idleLocked(f.StreamID):
		return http2.ConnectionError(http2.ErrCodeProtocol)
	case s == nil:
		return nil
	case int64(s.sendWin)+int64(f.Increment) > math.MaxInt32:
		s.abortLocked(http2.ErrCodeFlowControl, errWindow)
		return c.replyLocked()
	}
	s.sendWin += int32(f.Increment)
	s.cond.Broadcast()
	return nil
}

func (c *Conn) rst(f *http2.RSTStreamFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.streams[f.StreamID]
	if s == nil {
		if c.idleLocked(f.StreamID) {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		return nil
	}
	s.failLocked(StreamError{Code: f.ErrCode})
	s.forgetLocked()
	return c.spend(costReset)
}

func (c *Conn) ping(f *http2.PingFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.IsAck() {
		if f.Data == drainPing {
			c.drainedLocked()
		}
		return nil
	}
	if err := c.spend(costPing); err != nil {
		return err
	}
	c.out = append(appendHeader(c.out, 8, http2.FramePing, http2.FlagPingAck, 0), f.Data[:]...)
	return c.replyLocked()
}

// StreamError says that the other side has taken the stream back.
type StreamError struct{ Code http2.ErrCode }

func (e StreamError) Error() string { return "h2: stream reset by the other side: " + e.Code.String() }
