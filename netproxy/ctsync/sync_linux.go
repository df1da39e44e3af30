package ctsync

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
)

// Sync replicates the connection table of one network namespace. New opens what it needs there; Run works until its context ends.
type Sync struct {
	cfg    Config
	table  *link.Namespace // whose table it is; nil: that of the thread that called New
	conn   *link.Conn
	kernel *kernel
	events int // socket of the kernel's events
	udp    int // socket to the peer
	wake   int
	buf    []byte
	rep    *replica // owned by Run

	master atomic.Bool
	term   atomic.Uint64

	mu    sync.Mutex
	state State
}

// New opens the sockets in the namespace of the calling thread.
func New(cfg Config) (*Sync, error) { return NewIn(nil, cfg) }

// NewIn replicates the table of another namespace, which has to be open until Run has returned, over the network of the calling thread's.
func NewIn(table *link.Namespace, cfg Config) (*Sync, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Sync{cfg: cfg, table: table, events: -1, udp: -1, wake: -1, buf: make([]byte, 256<<10)}
	err := s.openSockets()
	if err == nil && table != nil {
		err = table.Do(s.openTable)
	} else if err == nil {
		err = s.openTable()
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *Sync) openSockets() (err error) {
	if s.udp, err = s.openPeer(); err != nil {
		return fmt.Errorf("sync %s, %s to %s: %w", s.cfg.Device, s.cfg.Local, s.cfg.Peer, err)
	}
	s.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	return err
}

func (s *Sync) openTable() (err error) {
	if s.conn, err = link.Open(); err != nil {
		return err
	}
	if s.kernel, err = openKernel(func(unix.Errno) { s.rep.stats.Errors++ }); err != nil {
		return err
	}
	const newUpdateDestroy = 1 | 2 | 4
	if s.events, _, err = openConntrack(newUpdateDestroy); err != nil {
		return err
	}
	if err = ignore(s.events, s.kernel.portID); err != nil {
		return err
	}
	largeBuffer(s.events)
	// Entries made while nobody listens otherwise never make events, not even their end. Where it cannot be written, the copy of each
	// minute has to do.
	_ = os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_events", []byte("1"), 0)
	return s.ownAddresses()
}

func (s *Sync) openPeer() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	largeBuffer(fd)
	at := func(a netip.Addr) *unix.SockaddrInet4 { return &unix.SockaddrInet4{Port: s.cfg.Port, Addr: a.As4()} }
	err = unix.BindToDevice(fd, s.cfg.Device)
	if err == nil {
		err = unix.Bind(fd, at(s.cfg.Local))
	}
	if err == nil {
		err = unix.Connect(fd, at(s.cfg.Peer))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (s *Sync) close() {
	if s.conn != nil {
		s.conn.Close()
	}
	if s.kernel != nil {
		s.kernel.close()
	}
	for _, fd := range []int{s.events, s.udp, s.wake} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Discard closes what New opened when Run will not be called.
func (s *Sync) Discard() { s.close() }

// ownAddresses learns which connections are the router's own. Those to addresses that move to the peer are not.
func (s *Sync) ownAddresses() error {
	list, err := s.conn.Addresses(0)
	if err != nil {
		return err
	}
	own := make(map[[4]byte]bool, len(list))
	for _, p := range list {
		if !slices.Contains(s.cfg.Virtual, p.Addr()) {
			own[p.Addr().As4()] = true
		}
	}
	s.kernel.own = own
	return nil
}

// SetRole tells the part whether its side is in charge, and the term. It takes effect before the next event is sent.
func (s *Sync) SetRole(master bool, term uint64) {
	s.master.Store(master)
	s.term.Store(term)
}

// State returns what is known of the peer and the table.
func (s *Sync) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Run replicates until ctx ends; then it sends what is left and closes the sockets.
func (s *Sync) Run(ctx context.Context) error {
	runtime.LockOSThread() // for the priority, and so that a thread with it does not come to serve others
	defer s.close()
	if s.table != nil {
		if err := s.table.Enter(); err != nil { // the table is listed through new sockets, and its size is read from /proc
			return err
		}
	}
	if s.cfg.Thread != nil {
		s.cfg.Thread()
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(s.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() { // the descriptor may be somebody else's once it is closed
			<-woken
		}
	}()
	now := time.Now()
	s.rep = newReplica(now, s.cfg.Key, s.kernel, s.transmit)
	s.rep.beat(now)
	slow := time.Time{}
	for ctx.Err() == nil {
		s.rep.setRole(now, s.master.Load(), s.term.Load())
		if err := s.readEvents(now); err != nil {
			return err
		}
		s.readPeer(now)
		busy := s.rep.work(now)
		next := s.rep.tick(now)
		if now.Sub(slow) >= time.Second {
			slow = now
			_ = s.ownAddresses() // the list before is right for almost all
			s.publish(true)
		} else {
			s.publish(false)
		}
		wait := max(time.Until(next), 0)
		if busy {
			wait = 0
		}
		fds := []unix.PollFd{{Fd: int32(s.events), Events: unix.POLLIN}, {Fd: int32(s.udp), Events: unix.POLLIN}, {Fd: int32(s.wake), Events: unix.POLLIN}}
		ts := unix.NsecToTimespec(int64(wait))
		if _, err := unix.Ppoll(fds, &ts, nil); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
		now = time.Now()
	}
	err := s.readEvents(now)
	s.rep.flush(now)
	return err
}

func (s *Sync) transmit(b []byte) {
	// A link that is down or a peer that does not run refuses; whatever is lost is asked for again.
	_, _ = unix.Write(s.udp, b)
}

// readEvents takes what the kernel has told. Losing some is no failure: the peer copies the table.
func (s *Sync) readEvents(now time.Time) error {
	for range 256 {
		n, _, err := unix.Recvfrom(s.events, s.buf, unix.MSG_DONTWAIT)
		switch err {
		case nil:
		case unix.EAGAIN:
			s.rep.flush(now)
			return nil
		case unix.EINTR:
			continue
		case unix.ENOBUFS:
			s.rep.restart(now)
			continue
		default:
			return fmt.Errorf("conntrack events: %w", err)
		}
		if _, err := s.kernel.read(s.buf[:n], func(c Change) { s.rep.local(now, c) }); err != nil {
			return err
		}
	}
	s.rep.flush(now)
	return nil
}

// readPeer takes some of what has come, so that our own events are not left waiting for long.
func (s *Sync) readPeer(now time.Time) {
	for range copyWindow {
		n, _, err := unix.Recvfrom(s.udp, s.buf, 0)
		if err == unix.EAGAIN {
			return
		}
		if err == nil {
			s.rep.receive(now, s.buf[:n])
		}
	}
}

func (s *Sync) publish(count bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Full, s.state.Heard, s.state.Term, s.state.Stats = s.rep.full, s.rep.heard, s.rep.term, s.rep.stats
	if count {
		s.state.Entries = s.kernel.count()
	}
}
