package havip

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/ctsync"
)

const (
	// aloneAfter is the silence after which nobody is there to copy a table from.
	aloneAfter = 1500 * time.Millisecond
	// linger is how long a member that leaves goes on telling the peer of connections.
	linger = 50 * time.Millisecond
)

// announceAt are the times of announcements after a take-over. The last one comes when the lease of a peer that died has ended, which
// may have answered ARP requests until then.
var announceAt = []time.Duration{0, 20 * time.Millisecond, 200 * time.Millisecond, time.Second, lease + 200*time.Millisecond}

// Member is one of the two routers. What has no other owner is owned by the goroutine of Run.
type Member struct {
	cfg    Config
	where  *link.Namespace // of the member itself
	home   *site           // the member's own addresses
	ads    *adverts
	wake   int
	keeper keeper
	lines  chan string
	status *statusServer
	failed chan error

	working sync.WaitGroup // calls of Join and Leave, which use what Run closes at its end; grows only under mu, while not ended
	over    chan struct{}  // closed when Run has ended all sites

	// mu guards what follows. The loop holds it but for the times when it waits.
	mu     sync.Mutex
	engine Engine
	sites  []*site // that have joined
	master bool
	ended  bool
	now    Status

	links     bool // home's are all up
	linked    bool // those of sites too
	announces []time.Time
	linksAt   time.Time // since when links is true, or a site's link is back
	heard     time.Time // an advert of the peer
	count     uint64    // of our adverts
	peerCount uint64
	refused   uint64
	told      Role
	buf       []byte
	packet    []byte
	addrs     []netip.Addr
	heardBuf  []netip.Addr
	polled    []*site
	polls     []unix.PollFd
}

// Run is a member until ctx ends; then it hands its addresses over and returns. It works in the network namespace of the calling
// thread, and what it lacks to be on time (real-time priority, locked memory) it says and goes on without.
func Run(ctx context.Context, cfg Config) error {
	m, err := NewMember(cfg)
	if err != nil {
		return err
	}
	return m.Run(ctx)
}

// NewMember opens what a member needs in the network namespace of the calling thread. Run has to be called once.
func NewMember(cfg Config) (*Member, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	m := &Member{
		cfg: cfg, wake: -1, keeper: keeper{wake: -1}, lines: make(chan string, 64), buf: make([]byte, 32<<10), failed: make(chan error, 1), over: make(chan struct{}),
		home: newSite(Site{VIPs: cfg.VIPs}),
	}
	if err := m.open(); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// Run is the member until ctx ends; then it hands the addresses over, and returns when all is closed.
func (m *Member) Run(ctx context.Context) error {
	defer m.close()
	for _, err := range prepareProcess() {
		m.say("warning: without %v; on a busy machine adverts will be late and the addresses move without need", err)
	}
	return m.run(ctx)
}

func (m *Member) open() (err error) {
	if m.where, err = link.Current(); err != nil {
		return err
	}
	for _, v := range m.cfg.VIPs {
		m.addrs = append(m.addrs, v.Prefix.Addr())
	}
	if err := m.where.Do(m.home.open); err != nil {
		return err
	}
	own, err := m.ownAddress()
	if err != nil {
		return err
	}
	first := m.cfg.VIPs[0].Device
	if err := m.where.Do(func() error { m.ads, err = openAdverts(first, m.home.index[first], own); return err }); err != nil {
		return err
	}
	if m.wake, err = eventfd(); err != nil {
		return err
	}
	m.keeper.say = m.say
	if m.keeper.wake, err = eventfd(); err != nil {
		return err
	}
	m.keeper.sites = []*site{m.home}
	if m.cfg.Status != "" {
		if m.status, err = listenStatus(m.cfg.Status, m.Status); err != nil {
			return err
		}
	}
	m.engine = Engine{Priority: uint8(m.cfg.Priority), Interval: m.cfg.Advert, Own: own, Stay: m.cfg.Stay}
	if !m.cfg.Replicate {
		return nil
	}
	return m.where.Do(func() error {
		m.home.sync, err = ctsync.New(m.syncConfig(m.home, m.cfg.Sync.Port, m.cfg.Key))
		return err
	})
}

// syncConfig is that of a site's replication.
func (m *Member) syncConfig(s *site, port int, key []byte) ctsync.Config {
	cfg := ctsync.Config{
		Device: m.cfg.Sync.Device, Local: m.cfg.Sync.Local, Peer: m.cfg.Sync.Peer, Port: port, Key: key,
		Thread: func() {
			if err := realtime(syncPriority); err != nil {
				m.say("warning: replication without %v; new connections may be lost in a failover under load", err)
			}
		},
	}
	for _, v := range s.VIPs {
		cfg.Virtual = append(cfg.Virtual, v.Prefix.Addr())
	}
	return cfg
}

// fail lets the member end in order, so that the peer takes over: replication is half of what is promised.
func (m *Member) fail(err error) {
	select {
	case m.failed <- err:
	default:
	}
	rouse(m.wake)
}

// ownAddress is the first device's own address: adverts need one that does not move.
func (m *Member) ownAddress() (netip.Addr, error) {
	first := m.cfg.VIPs[0].Device
	list, err := m.home.conn.Addresses(m.home.index[first])
	if err != nil {
		return netip.Addr{}, err
	}
	for _, p := range list {
		if !slices.Contains(m.addrs, p.Addr()) {
			return p.Addr(), nil
		}
	}
	return netip.Addr{}, fmt.Errorf("device %q has no address of its own: adverts need one to be sent from", first)
}

func (m *Member) close() {
	m.home.close()
	if m.where != nil {
		m.where.Close()
	}
	if m.ads != nil {
		m.ads.close()
	}
	if m.status != nil {
		m.status.l.Close()
	}
	for _, fd := range []int{m.wake, m.keeper.wake} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// run starts what works beside the loop and waits for all of it.
func (m *Member) run(ctx context.Context) error {
	done := make(chan struct{})
	printed := make(chan struct{})
	go func() {
		defer close(printed)
		m.print()
	}()
	var side errgroup.Group
	syncCtx, stopSync := context.WithCancel(context.Background())
	defer stopSync()
	if m.status != nil {
		side.Go(func() error { return m.status.run(done) })
	}
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		m.keeper.run()
	}()
	if m.home.sync != nil {
		side.Go(func() error {
			err := m.home.sync.Run(syncCtx)
			if err != nil {
				m.fail(err)
			}
			return err
		})
	}
	roused := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(roused)
		rouse(m.wake)
	})
	defer func() {
		if !stop() { // the descriptor may be somebody else's once it is closed
			<-roused
		}
	}()
	looped := make(chan struct{})
	go func() {
		defer close(looped)
		m.loop(ctx)
	}()
	<-looped
	m.keeper.stop()
	<-kept
	m.mu.Lock()
	m.ended = true
	m.mu.Unlock()
	m.working.Wait()
	m.mu.Lock()
	sites := m.sites
	m.sites = nil
	m.mu.Unlock()
	if m.home.sync != nil || len(sites) > 0 {
		time.Sleep(linger)
	}
	for _, s := range sites {
		s.endSync()
		s.close()
	}
	close(m.over)
	stopSync()
	close(done)
	err := side.Wait()
	if err == nil && len(m.failed) > 0 {
		err = <-m.failed
	}
	close(m.lines)
	<-printed
	return err
}

// loop is the member: wait, hear, decide, act.
func (m *Member) loop(ctx context.Context) {
	runtime.LockOSThread() // and end this thread, which has a priority that nobody else should get
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := realtime(advertPriority); err != nil {
		m.say("warning: without %v; on a busy machine adverts will be late and the addresses move without need", err)
	}
	now := time.Now()
	m.count = uint64(now.UnixNano())
	m.heard = now
	m.engine.Start(now)
	m.checkLinks(now)
	m.linksAt = time.Time{} // what was up before us is trusted
	leaving := false
	for {
		if !leaving && (ctx.Err() != nil || len(m.failed) > 0) {
			leaving = true
			m.act(now, m.engine.Leave(now))
		}
		m.act(now, m.engine.Tick(now, m.facts(now)))
		m.announceDue(now)
		m.tell(now)
		if role, _ := m.engine.Role(); role == Left {
			return
		}
		before := now
		m.wait(now)
		now = time.Now()
		m.hear(now, now.Sub(before) > m.engine.Stall())
	}
}

// wait returns when something came or something is due.
func (m *Member) wait(now time.Time) {
	due := m.engine.Next()
	if len(m.announces) > 0 {
		due = earlier(due, m.announces[0])
	}
	ts := unix.NsecToTimespec(int64(min(max(due.Sub(now), 0), time.Second)))
	m.polled = append(append(m.polled[:0], m.home), m.sites...)
	m.polls = append(m.polls[:0], unix.PollFd{Fd: int32(m.ads.in), Events: unix.POLLIN}, unix.PollFd{Fd: int32(m.wake), Events: unix.POLLIN})
	for _, s := range m.polled {
		m.polls = append(m.polls, unix.PollFd{Fd: int32(s.watch), Events: unix.POLLIN})
	}
	m.mu.Unlock()
	n, err := unix.Ppoll(m.polls, &ts, nil)
	m.mu.Lock()
	if err != nil || n == 0 {
		return
	}
	if m.polls[1].Revents != 0 {
		m.drain(m.wake)
	}
	for i, s := range m.polled {
		if m.polls[i+2].Revents != 0 && !s.closed {
			s.readWatch(m.buf)
		}
	}
	m.checkLinks(time.Now())
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func (m *Member) drain(fd int) {
	for {
		if _, err := unix.Read(fd, m.buf); err != nil && err != unix.ENOBUFS && err != unix.EINTR {
			return
		}
	}
}

func (m *Member) checkLinks(now time.Time) {
	links, linked := m.home.linked(), true
	for _, s := range m.sites {
		linked = linked && s.linked()
	}
	if links && !m.links {
		m.heard = now // silence counts from when there is a link to hear over
		m.linksAt = now
	}
	if linked && !m.linked {
		m.linksAt = now
	}
	m.links, m.linked = links, linked
}

// hear takes the adverts that came. stalled: we did not run for a while before.
func (m *Member) hear(now time.Time, stalled bool) {
	for {
		n, _, err := unix.Recvfrom(m.ads.in, m.buf, 0)
		if err != nil {
			return
		}
		payload, from, ok := unwrap(m.buf[:n], m.ads.own)
		if !ok {
			continue
		}
		a, err := ParseAdvert(payload, from, group, m.cfg.Key, m.heardBuf)
		if a.Router != uint8(m.cfg.Router) && err == nil {
			continue // another pair's
		}
		if err != nil || len(m.cfg.Key) > 0 && a.Count <= m.peerCount {
			m.refused++
			continue
		}
		m.heardBuf, m.peerCount, m.heard = a.Addrs, a.Count, now
		m.act(now, m.engine.Hear(now, a, from, stalled))
	}
}

// facts gathers what the engine decides by.
func (m *Member) facts(now time.Time) Facts {
	// A link that has just come back is not trusted to carry anything yet, because switches take their time: the peer may be well and not
	// be heard. So what counts is what was heard since, or a longer silence.
	settled := now.Sub(m.linksAt) >= m.cfg.Settle
	sites := true
	for _, s := range m.sites {
		if sites, _ = s.full(now, m.linksAt); !sites {
			break
		}
	}
	if m.home.sync == nil {
		full := m.linksAt.IsZero() || m.heard.After(m.linksAt) || now.Sub(m.heard) >= aloneAfter
		return Facts{Links: m.links, Full: full && sites, InStep: settled && sites, Impaired: !m.linked}
	}
	s := m.home.sync.State()
	m.engine.Learn(s.Term)
	full := s.Full && s.Heard.After(m.linksAt)
	return Facts{
		Links:    m.links,
		Full:     sites && (full || now.Sub(later(m.heard, s.Heard)) >= aloneAfter),
		InStep:   sites && full && settled && now.Sub(s.Heard) < aloneAfter,
		Impaired: !m.linked,
	}
}

// act does what the engine orders. What fails is said and does not stop the rest: the next advert comes in any case.
func (m *Member) act(now time.Time, o Orders) {
	if o.Advert >= 0 {
		m.advertise(o.Advert)
	}
	if o.Take {
		m.setRole(true)
		m.again(now)
	}
	if o.Announce {
		m.announces = slices.Insert(m.announces, 0, now)
	}
	if o.Drop {
		m.announces = m.announces[:0]
		m.setRole(false)
	}
	m.announceDue(now)
}

// again announces all addresses from now on as after a take-over.
func (m *Member) again(now time.Time) {
	m.announces = m.announces[:0]
	for _, d := range announceAt {
		m.announces = append(m.announces, now.Add(d))
	}
}

func (m *Member) setRole(master bool) {
	m.master = master
	m.keeper.set(master)
	for _, s := range append([]*site{m.home}, m.sites...) {
		if s.sync != nil {
			s.sync.SetRole(master, m.engine.Known())
		}
	}
}

func (m *Member) advertise(priority int) {
	m.count++
	a := Advert{Router: uint8(m.cfg.Router), Priority: uint8(priority), Interval: m.cfg.Advert, Addrs: m.addrs, Term: m.engine.Term(), Count: m.count}
	m.packet = a.Append(m.packet[:0], m.ads.own, group, m.cfg.Key)
	_ = m.ads.send(m.packet) // fails while the link is down, which is known elsewhere
}

func (m *Member) announceDue(now time.Time) {
	for len(m.announces) > 0 && !now.Before(m.announces[0]) {
		m.announces = m.announces[1:]
		m.home.announce()
		for _, s := range m.sites {
			s.announce()
		}
	}
}

// say puts a line out without waiting for whoever reads it; when nobody does, lines are lost.
func (m *Member) say(format string, args ...any) {
	select {
	case m.lines <- fmt.Sprintf(format, args...):
	default:
	}
}

func (m *Member) print() {
	for line := range m.lines {
		if m.cfg.Out != nil {
			fmt.Fprintln(m.cfg.Out, line)
		}
	}
}
