// Package h2 is the server's end of a connection of HTTP/2, as a proxy needs it: streams, flow control and the endings. Frames are read by
// golang.org/x/net/http2's Framer and heads packed by its hpack; the rest is ours, because the libraries hand each frame of each
// stream from goroutine to goroutine, which costs a small call several times what its bytes do.
//
// One goroutine reads (Run). Whoever has something to say puts whole frames into one buffer, and a goroutine that is there only while
// there is something to write takes all of them at once. Streams hand out heads in the form of HTTP/1.1, so that the same
// checks see every request, whatever it came by.
//
// What a peer can make this end keep is bounded: heads by Config.HeaderBytes, bodies by the flow-control windows, what it has not taken
// yet by one buffer, frames that want an answer and streams taken back by a budget.
package h2

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Config has the limits. A duration of 0 means no such limit.
type Config struct {
	MaxStreams  int           // at once, counted until their handlers have returned; more are refused
	HeaderBytes int           // of a head, as RFC 9113 6.5.2 counts them; a stream with more has TooBig set
	HeaderTime  time.Duration // for a head from its first byte to its last, and for the other side's first SETTINGS
	BodyIdle    time.Duration // a read of a body waits no longer for the next byte
	WriteIdle   time.Duration // the other side must take something within this, or up to a half more
	Ping        time.Duration // a silent connection is asked whether it is still there
	Pong        time.Duration // how long the answer may take
	Idle        time.Duration // a connection without streams is ended after this
	// Handle serves a stream that the other side has opened, in a goroutine of its own; the stream ends with it.
	Handle func(*Stream)
}

// What a stream and a connection may have on their way to a reader here; the other side's limit for frames is the protocol's own.
const (
	streamWindow = 256 << 10
	connWindow   = 1 << 20
	maxFrame     = 16 << 10
)

const (
	outMax     = 64 << 10 // bytes waiting to be written from which on bodies wait
	outKept    = 128 << 10
	replyMax   = 1000 // frames waiting to be written that answer the other side's
	blockMax   = 256 << 10
	blockParts = 64 // HEADERS and CONTINUATION of one head
)

// What streams taken back and frames that want an answer cost, from a budget that fills up again (CVE-2023-44487, CVE-2019-9512, -9515).
const (
	budgetMax  = 20_000
	budgetRate = 10_000 // a second
	costPing   = 1
	costReset  = 10
)

var (
	// ErrTooSlow says that the other side takes nothing of what is sent to it.
	ErrTooSlow = errors.New("h2: the other side takes nothing")

	errClosed  = errors.New("h2: connection closed")
	errIdle    = errors.New("h2: connection unused")
	errSilent  = errors.New("h2: no answer to a PING")
	errDrained = errors.New("h2: connection drained")
	errHead    = errors.New("h2: head or frame did not come in time")
)

// Conn is one connection. Make one with New and call Run.
type Conn struct {
	cfg Config
	nc  net.Conn

	// Owned by Run.
	br       *bufio.Reader
	fr       *http2.Framer
	dec      *hpack.Decoder
	block    block
	fresh    []*Stream // whose handlers start when all that has come is read
	first    bool      // the other side's SETTINGS have come
	armed    time.Time // the read deadline
	heard    time.Time // when something came last
	since    time.Time // when the frame or head that has not come in whole began; zero = none
	inHead   bool
	pinged   time.Time // zero = not asked
	budget   float64
	budgetAt time.Time

	mu      sync.Mutex // guards what follows
	room    sync.Cond  // out, or the connection's window, has some again; out is empty; writing has ended
	out     []byte     // whole frames
	spare   []byte
	replies int // frames in out that answer the other side's
	writing bool
	written int       // how often out has been emptied; begins at 1
	wend    time.Time // the write deadline
	err     error     // the end
	enc     *hpack.Encoder
	encBuf  bytes.Buffer

	streams   map[uint32]*Stream
	running   int       // streams whose handlers have not returned
	maxID     uint32    // the last stream that the other side has opened
	idleSince time.Time // while there are no streams
	dropped   [64]uint32
	ndropped  int

	sendWin   int32
	recvWin   int32
	unsaid    int32 // read, and not given back to the other side
	peerWin   int32 // a new stream's
	peerFrame int

	draining int       // 0 = no, 1 = told to open no more, 2 = told which are served
	drainEnd time.Time // of 1
	lastID   uint32    // streams beyond it are refused, while draining

	timer   *time.Timer
	timerAt time.Time // zero = not set
}

// New returns a connection whose preface has been read. br may hold what has been read besides; it must not be used any more.
func New(nc net.Conn, br *bufio.Reader, cfg Config) *Conn {
	c := &Conn{cfg: cfg, nc: nc, br: br, streams: make(map[uint32]*Stream), sendWin: 65535, recvWin: connWindow, peerWin: 65535, peerFrame: maxFrame,
		written: 1, lastID: math.MaxInt32, budget: budgetMax}
	c.room.L = &c.mu
	c.fr = http2.NewFramer(nil, (*reader)(c))
	c.fr.SetReuseFrames()
	c.fr.SetMaxReadFrameSize(maxFrame)
	c.dec = hpack.NewDecoder(4096, c.block.field)
	c.dec.SetMaxStringLength(cfg.HeaderBytes)
	c.block.dec, c.block.limit = c.dec, cfg.HeaderBytes
	c.enc = hpack.NewEncoder(&c.encBuf)
	now := time.Now()
	c.heard, c.since, c.inHead, c.budgetAt, c.idleSince = now, now, true, now, now
	c.out = appendHeader(c.out, 3*6, http2.FrameSettings, 0, 0)
	c.out = appendSetting(c.out, http2.SettingMaxConcurrentStreams, uint32(cfg.MaxStreams))
	c.out = appendSetting(c.out, http2.SettingInitialWindowSize, streamWindow)
	c.out = appendSetting(c.out, http2.SettingMaxHeaderListSize, uint32(cfg.HeaderBytes))
	c.out = appendUint32(appendHeader(c.out, 4, http2.FrameWindowUpdate, 0, 0), connWindow-65535)
	return c
}

func appendHeader(dst []byte, n int, t http2.FrameType, flags http2.Flags, stream uint32) []byte {
	return append(dst, byte(n>>16), byte(n>>8), byte(n), byte(t), byte(flags), byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendUint32(dst []byte, v uint32) []byte {
	return append(dst, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
}

func appendSetting(dst []byte, id http2.SettingID, v uint32) []byte {
	return appendUint32(append(dst, byte(id>>8), byte(id)), v)
}

// Run reads until the connection ends, and says why; all its streams have ended by then, though not their handlers. The socket is the
// caller's to close.
func (c *Conn) Run() error {
	c.mu.Lock()
	c.kickLocked()
	c.emptyLocked()
	c.mu.Unlock()
	err := c.read()
	c.end(err)
	return err
}

// end tells the other side why, if it can still be told, and ends all streams.
func (c *Conn) end(err error) {
	code := http2.ErrCodeNo
	var ce http2.ConnectionError
	switch {
	case errors.As(err, &ce):
		code = http2.ErrCode(ce)
	case errors.Is(err, errHead):
		code = http2.ErrCodeEnhanceYourCalm
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running -= len(c.fresh) // which nobody will serve
	c.failLocked(err)
	if c.timer != nil {
		c.timer.Stop()
	}
	var op net.Error
	switch {
	case errors.As(err, &op), errors.Is(err, io.EOF), errors.Is(err, errClosed):
		c.nc.SetWriteDeadline(past)
	case errors.Is(err, errDrained): // all has been said
		c.nc.SetWriteDeadline(time.Now().Add(max(c.cfg.WriteIdle, time.Second)))
	default:
		c.out = appendGoAway(c.out, min(c.maxID, c.lastID), code)
		c.wend = time.Now().Add(time.Second)
		c.nc.SetWriteDeadline(c.wend)
		c.kickLocked()
	}
	for c.writing {
		c.room.Wait()
	}
}

var past = time.Unix(1, 0)

func appendGoAway(dst []byte, last uint32, code http2.ErrCode) []byte {
	return appendUint32(appendUint32(appendHeader(dst, 8, http2.FrameGoAway, 0, 0), last), uint32(code))
}

// failLocked ends the connection for all its streams. Run finds out by its next read.
func (c *Conn) failLocked(err error) {
	if c.err == nil {
		c.err = err
	}
	for _, s := range c.streams {
		s.failLocked(fmt.Errorf("%w: %w", errClosed, c.err))
	}
	clear(c.streams)
	c.room.Broadcast()
}

// Writing.

// kickLocked makes sure that what is in out is going to be written.
func (c *Conn) kickLocked() {
	if !c.writing && len(c.out) > 0 {
		c.writing = true
		go c.write()
	}
}

// write writes what there is. Those that can run now have their say first, so that it goes out in one piece.
func (c *Conn) write() {
	runtime.Gosched()
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.out) > 0 {
		buf := c.out
		c.out, c.spare, c.replies = c.spare[:0], nil, 0
		c.written++
		c.armWriteLocked()
		c.mu.Unlock()
		_, err := c.nc.Write(buf)
		c.mu.Lock()
		if err != nil {
			c.out = nil
			c.failLocked(err)
			c.nc.SetReadDeadline(past)
			break
		}
		c.spare = buf[:0]
		c.room.Broadcast()
	}
	for _, b := range [][]byte{c.out, c.spare} { // a connection that has nothing to say holds no buffer
		if cap(b) >= outMax && cap(b) <= outKept {
			outs.Put(&b)
		}
	}
	c.out, c.spare = nil, nil
	c.writing = false
	c.room.Broadcast()
}

var outs = sync.Pool{New: func() any { b := make([]byte, 0, outMax+maxFrame+1<<10); return &b }}

// bufferLocked makes sure that out has a buffer in which heads and bodies have room.
func (c *Conn) bufferLocked() {
	if cap(c.out) < outMax {
		c.out = append((*outs.Get().(*[]byte))[:0], c.out...)
	}
}

func (c *Conn) armWriteLocked() {
	if c.cfg.WriteIdle <= 0 || c.err != nil && c.err != errDrained { // end has set a nearer one
		return
	}
	if now := time.Now(); c.wend.Before(now.Add(c.cfg.WriteIdle)) {
		c.wend = now.Add(c.cfg.WriteIdle + c.cfg.WriteIdle/2)
		c.nc.SetWriteDeadline(c.wend)
	}
}

// replyLocked is called for each frame that answers one of the other side's. Who does not read his answers cannot have more of them kept.
func (c *Conn) replyLocked() error {
	if c.replies++; c.replies > replyMax {
		return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	c.kickLocked()
	return nil
}

// resetLocked says RST_STREAM.
func (c *Conn) resetLocked(id uint32, code http2.ErrCode) {
	c.out = appendUint32(appendHeader(c.out, 4, http2.FrameRSTStream, 0, id), uint32(code))
	c.dropLocked(id)
	c.kickLocked()
}

// dropLocked remembers a stream of which frames may still come, which are to be overlooked.
func (c *Conn) dropLocked(id uint32) {
	c.dropped[c.ndropped%len(c.dropped)] = id
	c.ndropped++
}

// wasDroppedLocked says that a stream was taken back here, so that the other side may not know yet.
func (c *Conn) wasDroppedLocked(id uint32) bool {
	for _, d := range c.dropped {
		if d == id {
			return true
		}
	}
	return c.ndropped > len(c.dropped) // some have been forgotten
}

// Drain lets the streams that are under way, or on their way, end, and takes no new ones; then the connection ends. The other
// side is told twice: first that it shall open no more, then, when it has said that it has heard (or a second later), up to which they
// will be served.
func (c *Conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining > 0 || c.err != nil {
		return
	}
	c.draining, c.drainEnd = 1, time.Now().Add(time.Second)
	c.out = appendGoAway(c.out, math.MaxInt32, http2.ErrCodeNo)
	c.out = append(appendHeader(c.out, 8, http2.FramePing, 0, 0), drainPing[:]...)
	c.kickLocked()
	c.untilLocked(c.drainEnd)
}

var drainPing = [8]byte{'d', 'r', 'a', 'i', 'n', 'i', 'n', 'g'}

// drainedLocked is the second half of Drain.
func (c *Conn) drainedLocked() {
	if c.draining != 1 {
		return
	}
	c.draining, c.lastID = 2, c.maxID
	c.out = appendGoAway(c.out, c.lastID, http2.ErrCodeNo)
	c.kickLocked()
	c.emptyLocked()
}

// emptyLocked ends a connection that was waiting for its last stream.
func (c *Conn) emptyLocked() {
	if len(c.streams) > 0 || c.err != nil {
		return
	}
	c.idleSince = time.Now()
	if c.cfg.Idle > 0 {
		c.untilLocked(c.idleSince.Add(c.cfg.Idle))
	}
	if c.draining == 2 {
		c.err = errDrained
		go func() { // Run waits in a read
			c.mu.Lock()
			defer c.mu.Unlock()
			for c.writing {
				c.room.Wait()
			}
			c.nc.SetReadDeadline(past)
		}()
	}
}

// Deadlines of streams. One timer looks after all: setting one for each call would cost more than to look at all of them now and then.

// untilLocked makes sure that tick runs at t.
func (c *Conn) untilLocked(t time.Time) {
	if !c.timerAt.IsZero() && !t.Before(c.timerAt) || c.err != nil {
		return
	}
	c.timerAt = t
	if c.timer == nil {
		c.timer = time.AfterFunc(time.Until(t), c.tick)
	} else {
		c.timer.Reset(time.Until(t))
	}
}

func (c *Conn) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	now := time.Now()
	var next time.Time
	for _, s := range c.streams {
		for _, end := range []*time.Time{&s.readEnd, &s.writeEnd} {
			switch {
			case end.IsZero():
			case !end.After(now):
				s.cond.Broadcast()
				c.room.Broadcast()
			case next.IsZero() || end.Before(next):
				next = *end
			}
		}
	}
	c.timerAt = time.Time{}
	if c.draining == 1 && !c.drainEnd.After(now) {
		c.drainedLocked()
	} else if c.draining == 1 {
		c.untilLocked(c.drainEnd)
	}
	if idleEnd := c.idleSince.Add(c.cfg.Idle); len(c.streams) == 0 && c.cfg.Idle > 0 && c.err == nil {
		if !idleEnd.After(now) {
			c.failLocked(errIdle)
			c.nc.SetReadDeadline(past)
			return
		}
		c.untilLocked(idleEnd)
	}
	if !next.IsZero() {
		c.untilLocked(next)
	}
}

// Reading.

// reader is what the Framer reads from.
type reader Conn

func (r *reader) Read(p []byte) (int, error) {
	if r.br.Buffered() == 0 {
		if err := (*Conn)(r).fill(1); err != nil {
			return 0, err
		}
	}
	return r.br.Read(p)
}

// fill waits for n bytes in the reader's buffer.
func (c *Conn) fill(n int) error {
	for {
		if end := c.limit(); !end.IsZero() && (c.armed.IsZero() || end.Before(c.armed)) {
			c.armed = end
			c.nc.SetReadDeadline(end)
		}
		c.mu.Lock()
		err := c.err
		c.mu.Unlock()
		if err != nil { // it may have been cut off just before the deadline was set
			return err
		}
		before := c.br.Buffered()
		_, err = c.br.Peek(n)
		if c.br.Buffered() > before {
			c.heard, c.pinged = time.Now(), time.Time{}
		}
		if err == nil {
			return nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		c.armed = time.Time{}
		if err := c.late(time.Now()); err != nil {
			return err
		}
	}
}

// limit is when late must look again.
func (c *Conn) limit() (t time.Time) {
	sooner := func(u time.Time, d time.Duration) {
		if d > 0 && !u.IsZero() && (t.IsZero() || u.Add(d).Before(t)) {
			t = u.Add(d)
		}
	}
	if c.inHead {
		sooner(c.since, c.cfg.HeaderTime)
	} else if !c.since.IsZero() {
		sooner(c.heard, c.cfg.BodyIdle)
	}
	if c.pinged.IsZero() {
		sooner(c.heard, c.cfg.Ping)
	} else {
		sooner(c.pinged, c.cfg.Pong)
	}
	return t
}

// late looks which limit has passed.
func (c *Conn) late(now time.Time) error {
	passed := func(since time.Time, d time.Duration) bool {
		return d > 0 && !since.IsZero() && !now.Before(since.Add(d))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return c.err
	case c.inHead && passed(c.since, c.cfg.HeaderTime), !c.inHead && !c.since.IsZero() && passed(c.heard, c.cfg.BodyIdle):
		return errHead
	case passed(c.pinged, c.cfg.Pong):
		return errSilent
	case c.pinged.IsZero() && passed(c.heard, c.cfg.Ping):
		c.pinged = now
		c.out = append(appendHeader(c.out, 8, http2.FramePing, 0, 0), 0, 0, 0, 0, 0, 0, 0, 0)
		c.kickLocked()
	}
	return nil
}

// read reads frames until the end.
func (c *Conn) read() error {
	for {
		if err := c.await(); err != nil {
			return err
		}
		fh, err := c.fr.ReadFrameHeader()
		var f http2.Frame
		if err == nil {
			f, err = c.fr.ReadFrameForHeader(fh)
		}
		if err != nil {
			err = frameError(fh, err)
		} else {
			err = c.frame(f)
		}
		if err != nil {
			return err
		}
	}
}

// await returns when a frame has begun to come. What is to be done before one has to wait is done here.
func (c *Conn) await() error {
	if c.whole() {
		return nil
	}
	for i, s := range c.fresh {
		c.fresh[i] = nil
		go c.serve(s)
	}
	c.fresh = c.fresh[:0]
	if !c.inHead {
		c.since = time.Time{}
	}
	if c.br.Buffered() == 0 {
		if err := c.fill(1); err != nil {
			return err
		}
	}
	if !c.inHead && !c.whole() {
		c.since = c.heard
		if err := c.fill(4); err != nil {
			return err
		}
		b, _ := c.br.Peek(4)
		c.inHead = b[3] == byte(http2.FrameHeaders)
	}
	return nil
}

// whole says that the next frame is in the buffer.
func (c *Conn) whole() bool {
	n := c.br.Buffered()
	if n < 9 {
		return false
	}
	b, _ := c.br.Peek(3)
	return n >= 9+int(b[0])<<16+int(b[1])<<8+int(b[2])
}

func (c *Conn) serve(s *Stream) {
	defer func() {
		s.finish()
		c.mu.Lock()
		c.running--
		c.room.Broadcast()
		c.mu.Unlock()
	}()
	c.cfg.Handle(s)
}

// Wait returns when the handlers of all streams have returned, after Run has.
func (c *Conn) Wait() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.running > 0 {
		c.room.Wait()
	}
}

// frameError gives what the Framer says the form of an end of the connection.
func frameError(fh http2.FrameHeader, err error) error {
	var se http2.StreamError
	switch {
	case errors.Is(err, http2.ErrFrameTooLarge), errors.Is(err, io.ErrUnexpectedEOF):
		return http2.ConnectionError(http2.ErrCodeFrameSize)
	case errors.As(err, &se) && fh.Type != http2.FrameWindowUpdate: // a part of a head is lost, and with it the state of hpack
		return http2.ConnectionError(se.Code)
	case errors.As(err, &se):
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return err
}

// spend takes from the budget of what is legal but of no use.
func (c *Conn) spend(cost float64) error {
	c.budget = min(budgetMax, c.budget+c.heard.Sub(c.budgetAt).Seconds()*budgetRate)
	c.budgetAt = c.heard
	if c.budget -= cost; c.budget < 0 {
		return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	return nil
}
