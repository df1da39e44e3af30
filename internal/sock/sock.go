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
