// Package sock looks at sockets without blocking and without taking anything from them.
package sock

import "syscall"

// State is what can be read from a socket now.
type State int

// States of a socket.
const (
	Silent State = iota // nothing
	Sent                // bytes
	Ended               // the end of the stream: the other side has closed it, or its own direction of it
	Reset               // an error, also after it was closed here
)

// Look says what can be read.
func Look(rc syscall.RawConn) (s State) {
	if rc.Control(func(fd uintptr) { s = peek(fd) }) != nil {
		return Reset
	}
	return s
}

// Readable says that a read would return at once, with bytes, an end or an error. It is meant for RawConn.Read, which then waits for that without
// a buffer.
func Readable(fd uintptr) bool { return peek(fd) != Silent }

// Watch is one socket that is looked at again and again by one goroutine at a time, without an allocation.
type Watch struct {
	rc   syscall.RawConn
	s    State
	look func(fd uintptr)
}

// NewWatch returns nil for what is no socket.
func NewWatch(c any) *Watch {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	w := &Watch{rc: rc}
	w.look = func(fd uintptr) { w.s = peek(fd) }
	return w
}

// Look says what can be read.
func (w *Watch) Look() State {
	if w.rc.Control(w.look) != nil {
		return Reset
	}
	return w.s
}
