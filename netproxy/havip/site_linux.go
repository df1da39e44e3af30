package havip

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/ctsync"
)

// Site is a network namespace that follows a member: its addresses are there while the member is master, and its connections are
// replicated. Any number of sites follow one heartbeat. A site whose device has no link does not stop the member, it makes it Impaired.
type Site struct {
	Name      string          // unique
	In        *link.Namespace // has to be open until Leave has returned
	VIPs      []VIP           // at least one; announced on their devices, and not named in adverts
	Replicate bool
	Port      int    // UDP port of the replication on the member's sync link, the site's own
	Key       []byte // signs the replication; the site's own too, so that one's datagrams are not another's
}

// site is a namespace with addresses: the member's own, or one that has joined.
type site struct {
	Site
	conn   *link.Conn
	watch  int
	arp    int
	index  map[string]int // of the devices, by name
	up     map[int]bool   // by index
	frames [][]byte       // announcements, one for each address
	sync   *ctsync.Sync   // nil: no replication

	added    time.Time
	released chan struct{} // closed when the keeper has let go of it
	stop     context.CancelFunc
	stopped  chan error // gets what the replication ended with
	closed   bool
}

func newSite(cfg Site) *site {
	return &site{Site: cfg, watch: -1, arp: -1, index: map[string]int{}, up: map[int]bool{}, added: time.Now(), released: make(chan struct{})}
}

// open makes what belongs to the namespace, in the thread that is there.
func (s *site) open() (err error) {
	if s.conn, err = link.Open(); err != nil {
		return err
	}
	if s.watch, err = link.Watch(); err != nil { // before the devices are asked for, so that no change is missed
		return err
	}
	for _, v := range s.VIPs {
		d, err := s.conn.Device(v.Device)
		if err != nil {
			return err
		}
		s.index[v.Device] = d.Index
		s.up[d.Index] = d.Up
		s.frames = append(s.frames, announcement(d.MAC, v.Prefix.Addr()))
	}
	s.arp, err = openAnnounce()
	return err
}

func (s *site) close() {
	if s.closed {
		return
	}
	s.closed = true
	if s.conn != nil {
		s.conn.Close()
	}
	for _, fd := range []int{s.watch, s.arp} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// linked says whether all devices have a link.
func (s *site) linked() bool {
	for _, up := range s.up {
		if !up {
			return false
		}
	}
	return true
}

// readWatch takes the news about devices. When some were lost, all are asked for.
func (s *site) readWatch(buf []byte) {
	lost := link.ReadWatch(s.watch, buf, func(index int, up bool) {
		if _, ours := s.up[index]; ours {
			s.up[index] = up
		}
	})
	if !lost {
		return
	}
	for name, index := range s.index {
		d, err := s.conn.Device(name)
		s.up[index] = err == nil && d.Up
	}
}

func (s *site) announce() {
	for i, v := range s.VIPs {
		_ = announce(s.arp, s.index[v.Device], s.frames[i]) // fails while the link is down, which is known elsewhere
	}
}

// full says whether the site's table is, as Facts.Full, and whether that is by what the peer says: one that has been silent about a site does not
// have it. What it said before the links came back does not count.
func (s *site) full(now, linksAt time.Time) (full, inStep bool) {
	if s.sync == nil {
		return true, true
	}
	st := s.sync.State()
	silent := now.Sub(later(linksAt, later(s.added, st.Heard))) >= aloneAfter
	full = st.Full && st.Heard.After(linksAt)
	return full || silent, full && !silent
}

// Join lets a site follow the member from now on. It may be called at any time between NewMember and the end of Run.
func (m *Member) Join(cfg Site) error {
	if !m.begin() {
		return fmt.Errorf("site %s: %w", cfg.Name, errJoin)
	}
	defer m.working.Done()
	s := newSite(cfg)
	err := cfg.In.Do(s.open)
	if err == nil && cfg.Replicate {
		err = m.where.Do(func() (err error) {
			s.sync, err = ctsync.NewIn(cfg.In, m.syncConfig(s, cfg.Port, cfg.Key))
			return err
		})
	}
	if err != nil {
		s.close()
		return fmt.Errorf("site %s: %w", cfg.Name, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended || slices.ContainsFunc(m.sites, func(o *site) bool { return o.Name == cfg.Name }) {
		s.close()
		if s.sync != nil {
			s.sync.Discard()
		}
		return fmt.Errorf("site %s: %w", cfg.Name, errJoin)
	}
	m.sites = append(m.sites, s)
	if s.sync != nil {
		s.sync.SetRole(m.master, m.engine.Known())
		ctx, stop := context.WithCancel(context.Background())
		s.stop, s.stopped = stop, make(chan error, 1)
		go func() {
			err := s.sync.Run(ctx)
			if err != nil {
				m.fail(fmt.Errorf("site %s: %w", cfg.Name, err))
			}
			s.stopped <- err
		}()
	}
	if m.master {
		m.again(time.Now())
	}
	m.keeper.add(s)
	rouse(m.wake)
	return nil
}

var errJoin = errors.New("joined already, or the member has ended")

// begin says that Join or Leave is at work, which Run's end waits for; false: that has come.
func (m *Member) begin() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.ended {
		m.working.Add(1)
	}
	return !m.ended
}

// Leave takes a site from the member, with its addresses, and returns when nothing of it is in use. One that has not joined is no error.
func (m *Member) Leave(name string) {
	if !m.begin() {
		<-m.over
		return
	}
	defer m.working.Done()
	m.mu.Lock()
	i := slices.IndexFunc(m.sites, func(s *site) bool { return s.Name == name })
	if i < 0 {
		m.mu.Unlock()
		return
	}
	s := m.sites[i]
	m.sites = slices.Delete(m.sites, i, i+1)
	m.mu.Unlock()
	rouse(m.wake)
	m.keeper.remove(s)
	<-s.released
	s.endSync()
	m.mu.Lock()
	defer m.mu.Unlock()
	s.close()
}

// label begins what is said about a site.
func (s *site) label() string {
	if s.Name == "" {
		return ""
	}
	return "site " + s.Name + ": "
}

func (s *site) endSync() {
	if s.stop != nil {
		s.stop()
		<-s.stopped
	}
}
