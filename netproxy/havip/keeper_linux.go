package havip

import (
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
)

const (
	// lease is how long an address stays that nobody prolongs: a member that was killed or stopped keeps it no longer.
	lease        = 2 * time.Second
	prolongEvery = 500 * time.Millisecond
)

// keeper adds, prolongs and deletes the addresses, on a thread of its own: the kernel does that under a lock (RTNL) which others may
// hold for tens of milliseconds, and adverts must not wait for them. Connections do not either: packets of known ones are
// translated and forwarded whether the router has the address or not.
type keeper struct {
	say  func(string, ...any)
	wake int // written on each change of what follows
	hold atomic.Bool
	end  atomic.Bool

	mu    sync.Mutex
	sites []*site
	gone  []*site // to be released
	runs  bool
}

// set says whether the addresses are to be here. It does not wait.
func (k *keeper) set(hold bool) {
	k.hold.Store(hold)
	rouse(k.wake)
}

func (k *keeper) add(s *site) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sites = append(k.sites, s)
	rouse(k.wake)
}

// remove takes a site's addresses away; its released says when.
func (k *keeper) remove(s *site) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sites = slices.DeleteFunc(k.sites, func(o *site) bool { return o == s })
	if !k.runs { // not yet, or no more
		close(s.released)
		return
	}
	k.gone = append(k.gone, s)
	rouse(k.wake)
}

// stop lets run delete the addresses and return.
func (k *keeper) stop() {
	k.end.Store(true)
	k.set(false)
}

func (k *keeper) run() {
	k.mu.Lock()
	k.runs = true
	k.mu.Unlock()
	runtime.LockOSThread()
	if err := realtime(keeperPriority); err != nil {
		k.say("warning: addresses without %v", err)
	}
	buf := make([]byte, 8)
	for held := false; ; {
		hold := k.hold.Load()
		k.mu.Lock()
		sites, gone := slices.Clone(k.sites), k.gone
		k.gone = nil
		k.mu.Unlock()
		for _, s := range sites {
			if hold {
				k.each(s, func(c *link.Conn, index int, p netip.Prefix) error { return c.SetAddress(index, p, lease) })
			} else if held {
				k.each(s, (*link.Conn).DeleteAddress)
			}
		}
		for _, s := range gone {
			k.each(s, (*link.Conn).DeleteAddress)
			close(s.released)
		}
		held = hold
		if k.end.Load() && !hold && k.finish() {
			return
		}
		if k.hold.Load() != held {
			continue
		}
		timeout := -1
		if held {
			timeout = int(prolongEvery / time.Millisecond)
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(k.wake), Events: unix.POLLIN}}, timeout); err == nil {
			_, _ = unix.Read(k.wake, buf)
		}
	}
}

func (k *keeper) each(s *site, f func(*link.Conn, int, netip.Prefix) error) {
	for _, v := range s.VIPs {
		if err := f(s.conn, s.index[v.Device], v.Prefix); err != nil {
			k.say("error: %s%v", s.label(), err)
		}
	}
}

// finish says whether nobody is left who waits to be released.
func (k *keeper) finish() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.runs = len(k.gone) > 0
	return !k.runs
}

// rouse wakes whoever waits on an event descriptor.
func rouse(fd int) { _, _ = unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

func eventfd() (int, error) { return unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK) }
