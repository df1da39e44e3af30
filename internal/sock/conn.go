package sock

import (
	"io"
	"net"
	"os"
	"syscall"
)

// Conn is a TCP connection that reads and writes without telling the scheduler: its sockets never block, and a goroutine that announces each
// system call (as net does) wakes the runtime's monitor thread whenever the process was idle before, which costs a small request more than
// its own calls do. It waits as net's connections do. One goroutine at a time may read, and one may write.
type Conn struct {
	*net.TCPConn
	rc   syscall.RawConn
	in   transfer // owned by the reader
	out  transfer // owned by the writer
	ask  request  // owned by the reader
	step struct{ read, write, ask func(fd uintptr) bool }
}

// transfer is a system call under way.
type transfer struct {
	p     []byte
	n     int
	errno syscall.Errno
}

// request is an Ask under way.
type request struct {
	transfer
	in    []byte
	got   int
	stale bool // the connection was not silent before
	asked bool // written; the next call comes when something can be read
}

// NewConn returns nil for what is no TCP connection.
func NewConn(c net.Conn) *Conn {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	rc, err := t.SyscallConn()
	if err != nil {
		return nil
	}
	s := &Conn{TCPConn: t, rc: rc}
	// Made once: a closure made for each call would be an allocation.
	s.step.read, s.step.write, s.step.ask = s.stepRead, s.stepWrite, s.stepAsk
	return s
}

// quick is the size up to which a transfer is over so soon that the scheduler need not know of it. A larger one goes net's way.
const quick = 32 << 10

// Read is net.Conn's.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(p) > quick {
		return c.TCPConn.Read(p)
	}
	c.in = transfer{p: p}
	err := c.rc.Read(c.step.read)
	n, errno := c.in.n, c.in.errno
	c.in.p = nil
	switch {
	case err != nil:
		return 0, err
	case errno != 0:
		return 0, c.failed("read", errno)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

func (c *Conn) stepRead(fd uintptr) bool {
	c.in.n, c.in.errno = read(fd, c.in.p)
	return c.in.errno != syscall.EAGAIN
}

// Await calls step when something may be there to read, until it returns true; deadline and Close end it as they end a read. step may
// use TryRead, and nothing else that reads.
func (c *Conn) Await(step func(fd uintptr) bool) error { return c.rc.Read(step) }

// TryRead reads from fd what is there. ok is false when there is nothing.
func (c *Conn) TryRead(fd uintptr, p []byte) (n int, ok bool, err error) {
	n, errno := read(fd, p)
	switch {
	case errno == syscall.EAGAIN:
		return 0, false, nil
	case errno != 0:
		return 0, true, c.failed("read", errno)
	case n == 0:
		return 0, true, io.EOF
	}
	return n, true, nil
}

// Write is net.Conn's.
func (c *Conn) Write(p []byte) (int, error) {
	if len(p) > quick {
		return c.TCPConn.Write(p)
	}
	c.out = transfer{p: p}
	err := c.rc.Write(c.step.write)
	n, errno := c.out.n, c.out.errno
	c.out.p = nil
	if err == nil && errno != 0 {
		err = c.failed("write", errno)
	}
	return n, err
}

func (c *Conn) stepWrite(fd uintptr) bool {
	for c.out.n < len(c.out.p) {
		n, errno := write(fd, c.out.p[c.out.n:])
		if errno == syscall.EAGAIN {
			return false
		}
		if errno != 0 {
			c.out.errno = errno
			return true
		}
		c.out.n += n
	}
	return true
}

// TryWrite writes p if there is room for it now. It may be called beside a writer whose bytes it need not follow.
func (c *Conn) TryWrite(p []byte) error {
	var errno syscall.Errno
	if err := c.rc.Control(func(fd uintptr) { _, errno = write(fd, p) }); err != nil {
		return err
	}
	if errno != 0 {
		return c.failed("write", errno)
	}
	return nil
}

// Ask writes p, waits until something can be read and reads it into in, in one go: without a useless read before the wait. It looks first
// whether the connection is open and silent: when it is not, stale is true and nothing has been written, since what came before the
// wait would go unnoticed. n is what has been written: when it is less than p, the caller writes the rest and reads. got is what was read; with an error
// of the read n is len(p).
func (c *Conn) Ask(p, in []byte) (n, got int, stale bool, err error) {
	c.ask = request{transfer: transfer{p: p}, in: in}
	// What net says of the socket is forgotten before the first step: so no answer to what that writes is missed.
	err = c.rc.Read(c.step.ask)
	a := &c.ask
	a.p, a.in = nil, nil
	switch {
	case err != nil || a.stale || a.n < len(p) && a.errno == 0:
	case a.errno != 0 && a.asked:
		err = c.failed("read", a.errno)
	case a.errno != 0:
		err = c.failed("write", a.errno)
	case a.got == 0:
		err = io.EOF
	}
	return a.n, a.got, a.stale, err
}

func (c *Conn) stepAsk(fd uintptr) bool {
	a := &c.ask
	if a.asked {
		a.got, a.errno = read(fd, a.in)
		return a.errno != syscall.EAGAIN
	}
	if peek(fd) != Silent {
		a.stale = true
		return true
	}
	n, errno := write(fd, a.p)
	switch {
	case errno == syscall.EAGAIN:
		return true
	case errno != 0:
		a.errno = errno
		return true
	}
	a.n = n
	a.asked = n == len(a.p)
	return !a.asked
}

func (c *Conn) failed(op string, errno syscall.Errno) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: os.NewSyscallError(op, errno)}
}

// Look says what can be read.
func (c *Conn) Look() State { return Look(c.rc) }

// Raw is for Look and Dead.
func (c *Conn) Raw() syscall.RawConn { return c.rc }
