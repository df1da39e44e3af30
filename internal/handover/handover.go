// Package handover lets one process take over the listening sockets of another, so that a restart refuses nobody: not a client that
// connects at that moment, and not one that waits in the kernel's queue to be accepted.
//
// The process that serves listens on a unix socket of its own (the path). The next one connects there and is sent the listening sockets
// themselves. It starts everything it needs, accepts on them, beside its predecessor, and only then says that it is ready; at this word
// the predecessor stops accepting. A successor that fails before costs nothing: the predecessor never stopped.
//
//	successor                                   predecessor
//	connects to the path                  ->
//	                                      <-    hello {version, names} with the descriptors
//	starts, accepts
//	ready                                 ->
//	                                      <-    yours; stops accepting, and drains
//	puts a socket of its own at the path
//
// Who may connect may take the sockets away: the path is readable and writable by its owner only.
package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/thawrun/thaw/internal/sock"
)

const (
	version      = 1
	maxHello     = 4 << 10
	maxSockets   = 16
	helloTimeout = 10 * time.Second
	startTimeout = 2 * time.Minute // for a successor, from the hello to its word that it is ready
)

type hello struct {
	Version int      `json:"version"`
	Names   []string `json:"names"` // addresses as they were asked for, in the order of the descriptors
}

const (
	wordReady = "ready\n"
	wordYours = "yours\n"
)

// Sockets are the listening sockets of a process. Open makes them; their owner serves on Listeners, then calls Ready.
type Sockets struct {
	// Listeners has one for each address that was asked for, in that order.
	Listeners []*net.TCPListener
	// Inherited says that all of them came from a predecessor.
	Inherited bool

	path        string // "" = they are not handed on
	names       []string
	log         *slog.Logger
	predecessor *net.UnixConn // nil = none, or it has been told

	ln    *net.UnixListener // at path; static after Ready
	taken chan struct{}
	done  chan struct{} // closed when serve has ended

	mu        sync.Mutex    // guards what follows
	successor *net.UnixConn // the one that was accepted last
	closed    bool
}

// Open returns sockets that listen on addrs: those of the process that serves path, if there is one, and else new ones. With path ""
// there is nobody to take them from or to hand them on to.
func Open(path string, addrs []string, log *slog.Logger) (_ *Sockets, err error) {
	s := &Sockets{path: path, names: addrs, log: log, taken: make(chan struct{}), done: make(chan struct{})}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	var have inherited
	if path != "" {
		if have, err = s.ask(); err != nil {
			return nil, fmt.Errorf("taking over by %s: %w", path, err)
		}
	}
	s.Inherited = true
	for _, addr := range addrs {
		ln := have.take(addr)
		if ln == nil {
			s.Inherited = false
			l, err := sock.Listen(addr)
			if err != nil {
				have.close()
				return nil, err
			}
			ln = l.(*net.TCPListener)
		}
		s.Listeners = append(s.Listeners, ln)
	}
	have.close() // an address that is no longer asked for
	return s, nil
}

// inherited are a predecessor's sockets.
type inherited struct {
	names     []string
	listeners []*net.TCPListener // nil = taken
}

// take returns the first one of a name that is not taken; nil = none.
func (in *inherited) take(name string) *net.TCPListener {
	for i, ln := range in.listeners {
		if in.names[i] == name && ln != nil {
			in.listeners[i] = nil
			return ln
		}
	}
	return nil
}

// close gives back what was not taken.
func (in *inherited) close() {
	for _, ln := range in.listeners {
		if ln != nil {
			ln.Close()
		}
	}
}

// ask takes the sockets from the process that serves the path. There are none if nobody does.
func (s *Sockets) ask() (have inherited, err error) {
	switch info, err := os.Lstat(s.path); {
	case errors.Is(err, fs.ErrNotExist):
		return have, nil
	case err != nil:
		return have, err
	case info.Mode().Type() != fs.ModeSocket:
		return have, errors.New("there is something that is no socket: name another path, or remove it")
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.path, Net: "unix"})
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return have, nil // left behind by a process that is gone
	}
	if err != nil {
		return have, err
	}
	s.predecessor = c
	c.SetDeadline(time.Now().Add(helloTimeout))
	return receive(c)
}

// receive reads the hello. Whatever comes with it is closed if it is not understood.
func receive(c *net.UnixConn) (have inherited, err error) {
	buf, oob := make([]byte, maxHello), make([]byte, syscall.CmsgSpace(maxSockets*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	files := descriptors(oob[:oobn])
	defer func() {
		for _, f := range files {
			f.Close() // net.FileListener has made a copy
		}
	}()
	if err != nil {
		return have, fmt.Errorf("the process there does not answer: %w", err)
	}
	have.names, err = parseHello(buf[:n], len(files))
	if err == nil && flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0 {
		err = errors.New("its message is too long")
	}
	if err != nil {
		return have, err
	}
	for i, f := range files {
		ln, err := net.FileListener(f)
		tcp, ok := ln.(*net.TCPListener)
		if err == nil && !ok {
			ln.Close()
			err = errors.New("it is not of TCP")
		}
		if err != nil {
			have.close()
			return inherited{}, fmt.Errorf("socket %q of the process there: %w", have.names[i], err)
		}
		have.listeners = append(have.listeners, tcp)
	}
	return have, nil
}

// parseHello reads what a predecessor says about n descriptors.
func parseHello(b []byte, n int) ([]string, error) {
	var h hello
	if err := json.Unmarshal(b, &h); err != nil {
		return nil, fmt.Errorf("the process there does not hand over: %w", err)
	}
	if h.Version != version {
		return nil, fmt.Errorf("the process there hands over in version %d, this one takes over in version %d: stop it first", h.Version, version)
	}
	if len(h.Names) != n {
		return nil, fmt.Errorf("the process there names %d sockets and sent %d", len(h.Names), n)
	}
	return h.Names, nil
}

func descriptors(oob []byte) (files []*os.File) {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range messages {
		fds, err := syscall.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			syscall.CloseOnExec(fd) // Linux has done so, Darwin cannot
			files = append(files, os.NewFile(uintptr(fd), "handover"))
		}
	}
	return files
}

// Ready is called once the process accepts on all listeners: the predecessor is told, and from now on a successor can come. After an error
// the process must end, since it could not be followed; its predecessor goes on.
func (s *Sockets) Ready() error {
	if s.path == "" {
		return nil
	}
	// What can fail comes first: after its word the predecessor is gone.
	tmp := filepath.Join(filepath.Dir(s.path), "."+filepath.Base(s.path)+"."+strconv.Itoa(os.Getpid()))
	_ = os.Remove(tmp)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err == nil {
		ln.SetUnlinkOnClose(false) // the path may be a successor's by then
		err = os.Chmod(tmp, 0o600)
	}
	if err == nil {
		if s.predecessor != nil {
			if err := tell(s.predecessor); err != nil {
				// It is gone, or it hangs. Either way this process serves; a predecessor that lives on shares the sockets.
				s.log.Warn("the process that was taken over from did not confirm", "error", err)
			}
			s.predecessor.Close()
			s.predecessor = nil
		}
		err = os.Rename(tmp, s.path)
	}
	if err != nil {
		if ln != nil {
			ln.Close()
		}
		_ = os.Remove(tmp)
		return fmt.Errorf("hand-over at %s: %w", s.path, err)
	}
	s.ln = ln
	go s.serve()
	return nil
}

func tell(p *net.UnixConn) error {
	p.SetDeadline(time.Now().Add(helloTimeout))
	if _, err := io.WriteString(p, wordReady); err != nil {
		return err
	}
	return hear(p, wordYours)
}

func hear(c *net.UnixConn, word string) error {
	b := make([]byte, len(word))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != word {
		return fmt.Errorf("it said %q in place of %q", b, word)
	}
	return nil
}

// Taken is closed when a successor is ready: it accepts on the same sockets, and the listeners here can be closed.
func (s *Sockets) Taken() <-chan struct{} { return s.taken }

// serve offers the sockets to one successor after the other, until one is ready.
func (s *Sockets) serve() {
	defer close(s.done)
	for {
		c, err := s.ln.AcceptUnix()
		if err != nil {
			return // closed; a unix socket knows no other end
		}
		err = s.offer(c)
		c.Close()
		if err == nil {
			s.ln.Close()
			close(s.taken)
			return
		}
		s.log.Warn("the process that wanted to take over did not get ready; this one goes on", "error", err)
	}
}

// offer sends the sockets and waits for the word.
func (s *Sockets) offer(c *net.UnixConn) error {
	s.mu.Lock()
	s.successor = c
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return net.ErrClosed
	}
	c.SetDeadline(time.Now().Add(startTimeout))
	if err := s.send(c); err != nil {
		return err
	}
	if err := hear(c, wordReady); err != nil {
		return err
	}
	_, err := io.WriteString(c, wordYours)
	return err
}

func (s *Sockets) send(c *net.UnixConn) error {
	b, err := json.Marshal(hello{version, s.names})
	if err != nil {
		return err
	}
	fds := make([]int, len(s.Listeners))
	for i, ln := range s.Listeners {
		f, err := ln.File() // a copy, for as long as it takes
		if err != nil {
			return err
		}
		defer f.Close()
		rc, err := f.SyscallConn() // not Fd, which may make the socket block, for both processes
		if err != nil {
			return err
		}
		if err := rc.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
			return err
		}
	}
	_, _, err = c.WriteMsgUnix(b, syscall.UnixRights(fds...), nil)
	return err
}

// Close gives the listeners up, and the path unless it is a successor's.
func (s *Sockets) Close() {
	for _, ln := range s.Listeners {
		ln.Close()
	}
	if s.predecessor != nil {
		s.predecessor.Close()
	}
	if s.ln == nil {
		return
	}
	s.mu.Lock()
	s.closed = true
	if s.successor != nil {
		s.successor.Close()
	}
	s.mu.Unlock()
	s.ln.Close()
	<-s.done
	select {
	case <-s.taken:
	default:
		_ = os.Remove(s.path)
	}
}
