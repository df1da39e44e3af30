package tunnel

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
)

type memberMaps struct{ tenants, hosts, workers, counters *ebpf.Map }

// place names a tenant.
type place struct {
	vpc   Key
	local netip.Addr
}

type member struct {
	// static after OpenMember
	cfg    Config
	files  *mapSet
	maps   memberMaps
	progs  programs
	uplink link.Ingress

	mu      sync.Mutex
	conn    *link.Conn
	tenants map[place]int                       // node's ends
	workers map[Key]map[netip.Prefix]netip.Addr // outer addresses
}

// OpenMember makes a gateway's end of tunnels in the namespace of the calling thread, or takes over the one that is pinned there:
// its traffic goes on meanwhile.
func OpenMember(cfg Config) (_ Member, err error) {
	if err := cfg.validate(false); err != nil {
		return nil, err
	}
	m := &member{cfg: cfg, tenants: map[place]int{}, workers: map[Key]map[netip.Prefix]netip.Addr{}}
	if m.conn, err = link.Open(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			m.release()
		}
	}()
	dev, err := device(m.conn, cfg)
	if err != nil {
		return nil, err
	}
	if m.files, err = openMaps(cfg.Pin); err != nil {
		return nil, err
	}
	prefixes := mapOf(ebpf.LPMTrie, "workers", workerKey{}, wire{}, maxWorkers)
	prefixes.Flags = unix.BPF_F_NO_PREALLOC
	m.maps = memberMaps{
		tenants:  m.files.open(mapOf(ebpf.Hash, "tenants", tenantKey{}, tenantValue{}, 2*maxTenants)),
		hosts:    m.files.open(mapOf(ebpf.Hash, "hosts", uint32(0), hostValue{}, maxTenants)),
		workers:  m.files.open(prefixes),
		counters: m.files.open(counters("member_counters")),
	}
	if err := errors.Join(m.files.errs...); err != nil {
		return nil, fmt.Errorf("tunnel: %w", err)
	}
	if err := m.recover(); err != nil {
		return nil, fmt.Errorf("tunnel: read the pinned state: %w", err)
	}
	if m.progs.cable, err = load("from_tenant", fromTenant(cfg.Driver, &m.maps, dev)); err != nil {
		return nil, err
	}
	if m.progs.uplink, err = load("from_worker", fromWorker(cfg.Driver, &m.maps)); err != nil {
		return nil, err
	}
	m.uplink = link.Ingress{Device: dev, Name: "thaw_from_worker", Priority: memberPriority, Program: m.progs.uplink.FD()}
	if err := m.conn.SetIngress(m.uplink); err != nil {
		return nil, fmt.Errorf("tunnel: %w", err)
	}
	return m, nil
}

// recover reads what a predecessor has left in the maps.
func (m *member) recover() error {
	return errors.Join(
		each(m.maps.tenants, func(k tenantKey, v tenantValue) {
			if v.VPC != 0 {
				m.tenants[place{Key(v.VPC), k.Local.addr()}] = int(v.Device)
			}
		}),
		each(m.maps.workers, func(k workerKey, outer wire) {
			m.noteLocked(Key(k.VPC), netip.PrefixFrom(k.Addr.addr(), int(k.Bits)-32), outer.addr())
		}),
	)
}

func (m *member) noteLocked(vpc Key, p netip.Prefix, outer netip.Addr) {
	if m.workers[vpc] == nil {
		m.workers[vpc] = map[netip.Prefix]netip.Addr{}
	}
	m.workers[vpc][p] = outer
}

// release gives up what the process holds.
func (m *member) release() {
	m.progs.close()
	if m.files != nil {
		m.files.close()
	}
	m.conn.Close()
}

// Close is Member's.
func (m *member) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	if m.cfg.Pin == "" {
		err = m.conn.RemoveIngress(m.uplink)
		for t := range m.tenants {
			err = errors.Join(err, m.removeLocked(t))
		}
	}
	m.release()
	return err
}

// AddTenant is Member's.
func (m *member) AddTenant(t Tenant) error {
	d := m.cfg.Driver
	if err := d.checkKey(t.VPC); err != nil {
		return fmt.Errorf("tunnel: tenant: %w", err)
	}
	if !t.Local.Is4() || t.Host <= 0 {
		return fmt.Errorf("tunnel: tenant: %w: device %d with address %v", ErrInvalid, t.Host, t.Local)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.checkTenantLocked(t); err != nil {
		return fmt.Errorf("tunnel: tenant: %w", err)
	}
	at := place{t.VPC, t.Local}
	if old, there := m.tenants[at]; there && old != t.Host {
		if err := m.removeLocked(at); err != nil {
			return err
		}
	}
	key, local := d.wireKey(t.VPC), wireAddr(t.Local)
	host := hostValue{VPC: uint32(t.VPC), Local: local, Wire: key, Sum: d.checksumOf(local, wire{})}
	in := link.Ingress{Device: t.Host, Name: "thaw_from_tenant", Priority: memberPriority, Program: m.progs.cable.FD()}
	err := m.maps.hosts.Put(uint32(t.Host), host)
	if err == nil {
		err = m.conn.SetIngress(in)
	}
	if err == nil {
		err = m.maps.tenants.Put(tenantKey{key, local}, tenantValue{uint32(t.VPC), uint32(t.Host)})
	}
	if err == nil && key != (wire{}) {
		err = m.maps.tenants.Put(tenantKey{Local: local}, tenantValue{})
	}
	m.tenants[at] = t.Host
	if err != nil {
		return errors.Join(fmt.Errorf("tunnel: tenant %d at %v: %w", t.VPC, t.Local, err), m.removeLocked(at))
	}
	return nil
}

func (m *member) checkTenantLocked(t Tenant) error {
	keyless := m.cfg.Driver.wireKey(t.VPC) == wire{}
	for at, host := range m.tenants {
		switch {
		case at == place{t.VPC, t.Local}:
		case host == t.Host:
			return fmt.Errorf("%w: device %d is that of VPC %d at %v", ErrInvalid, host, at.vpc, at.local)
		case keyless && at.local == t.Local:
			return fmt.Errorf("%w: with %s the address says whose a packet is, and %v is VPC %d's", ErrInvalid, m.cfg.Driver, at.local, at.vpc)
		}
	}
	return nil
}

// RemoveTenant is Member's.
func (m *member) RemoveTenant(vpc Key, local netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.removeLocked(place{vpc, local})
}

func (m *member) removeLocked(at place) error {
	host, there := m.tenants[at]
	if !there {
		return nil
	}
	key, local := m.cfg.Driver.wireKey(at.vpc), wireAddr(at.local)
	err := errors.Join(drop(m.maps.tenants, tenantKey{key, local}), drop(m.maps.hosts, uint32(host)))
	shared := false
	for other := range m.tenants {
		shared = shared || other != at && other.local == at.local
	}
	if !shared {
		err = errors.Join(err, drop(m.maps.tenants, tenantKey{Local: local}))
	}
	if err != nil {
		return fmt.Errorf("tunnel: remove tenant %d at %v: %w", at.vpc, at.local, err)
	}
	delete(m.tenants, at)
	return nil
}

// Tenants is Member's.
func (m *member) Tenants() ([]Tenant, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]Tenant, 0, len(m.tenants))
	for at, host := range m.tenants {
		list = append(list, Tenant{at.vpc, at.local, host})
	}
	return list, nil
}

// Stats is Member's.
func (m *member) Stats() (Stats, error) { return stats(m.maps.counters) }

func (p Peer) key(vpc Key) workerKey { return prefixKey(vpc, p.Prefix) }

func prefixKey(vpc Key, p netip.Prefix) workerKey {
	return workerKey{uint32(32 + p.Bits()), uint32(vpc), wireAddr(p.Addr())}
}

// SetWorkers is Member's.
func (m *member) SetWorkers(vpc Key, workers []Peer) error {
	if err := m.cfg.Driver.checkKey(vpc); err != nil {
		return fmt.Errorf("tunnel: workers: %w", err)
	}
	if err := checkPeers(workers); err != nil {
		return fmt.Errorf("tunnel: workers of VPC %d: %w", vpc, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// Those that go first: a prefix that has moved must not be in two hands.
	want := map[netip.Prefix]netip.Addr{}
	for _, p := range workers {
		want[p.Prefix] = p.Outer
	}
	for p := range maps.Clone(m.workers[vpc]) {
		if _, keep := want[p]; keep {
			continue
		}
		if err := drop(m.maps.workers, prefixKey(vpc, p)); err != nil {
			return fmt.Errorf("tunnel: workers of VPC %d: %w", vpc, err)
		}
		delete(m.workers[vpc], p)
	}
	for _, p := range workers {
		if m.workers[vpc][p.Prefix] == p.Outer {
			continue
		}
		if err := m.maps.workers.Put(p.key(vpc), wireAddr(p.Outer)); err != nil {
			return fmt.Errorf("tunnel: workers of VPC %d: %w", vpc, err)
		}
		m.noteLocked(vpc, p.Prefix, p.Outer)
	}
	if len(m.workers[vpc]) == 0 {
		delete(m.workers, vpc)
	}
	return nil
}

// checkPeers refuses prefixes that overlap: of two workers with one address one could answer for the other.
func checkPeers(workers []Peer) error {
	prefixes := make([]netip.Prefix, 0, len(workers))
	for _, p := range workers {
		if !p.Outer.Is4() || !p.Prefix.Addr().Is4() || p.Prefix != p.Prefix.Masked() {
			return fmt.Errorf("%w: worker %v with prefix %v", ErrInvalid, p.Outer, p.Prefix)
		}
		prefixes = append(prefixes, p.Prefix)
	}
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	for i := 1; i < len(prefixes); i++ {
		if prefixes[i].Overlaps(prefixes[i-1]) {
			return fmt.Errorf("%w: prefixes %v and %v overlap", ErrInvalid, prefixes[i-1], prefixes[i])
		}
	}
	return nil
}
