package tunnel

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/thawrun/thaw/internal/link"
)

type workerMaps struct{ slots, inner, pairs, peers, flows, counters *ebpf.Map }

type worker struct {
	// static after OpenWorker
	cfg    Config
	files  *mapSet
	maps   workerMaps
	progs  programs
	uplink link.Ingress

	// connMu is held while the kernel's lock of network configuration is waited for, so never by Attach, and never under mu.
	connMu sync.Mutex
	conn   *link.Conn

	mu    sync.Mutex
	pairs map[Key][]Pair
	slots map[Slot]Key
	ofVPC map[Key]map[Slot]bool // the same the other way round
}

// OpenWorker makes the worker's end of tunnels in the namespace of the calling thread, or takes over the one that is pinned there:
// its traffic goes on meanwhile.
func OpenWorker(cfg Config) (_ Worker, err error) {
	if err := cfg.validate(true); err != nil {
		return nil, err
	}
	w := &worker{cfg: cfg, pairs: map[Key][]Pair{}, slots: map[Slot]Key{}, ofVPC: map[Key]map[Slot]bool{}}
	if w.conn, err = link.Open(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.release()
		}
	}()
	dev, err := device(w.conn, cfg)
	if err != nil {
		return nil, err
	}
	if w.files, err = openMaps(cfg.Pin); err != nil {
		return nil, err
	}
	w.maps = workerMaps{
		slots:    w.files.open(mapOf(ebpf.Hash, "slots", slotKey{}, slotValue{}, maxSlots)),
		inner:    w.files.open(mapOf(ebpf.Hash, "inner", innerKey{}, uint32(0), maxSlots)),
		pairs:    w.files.open(mapOf(ebpf.Hash, "pairs", uint32(0), pairValue{}, maxPairs)),
		peers:    w.files.open(mapOf(ebpf.Hash, "peers", peerKey{}, uint32(0), maxPairs)),
		flows:    w.files.open(mapOf(ebpf.LRUHash, "flows", flowKey{}, uint32(0), cfg.Flows)),
		counters: w.files.open(counters("worker_counters")),
	}
	if err := errors.Join(w.files.errs...); err != nil {
		return nil, fmt.Errorf("tunnel: %w", err)
	}
	if err := w.recover(); err != nil {
		return nil, fmt.Errorf("tunnel: read the pinned state: %w", err)
	}
	if w.progs.cable, err = load("from_instance", fromInstance(cfg.Driver, &w.maps, cfg.Local, dev, cfg.forgetful)); err != nil {
		return nil, err
	}
	if w.progs.uplink, err = load("from_pair", fromPair(cfg.Driver, &w.maps, cfg.Local)); err != nil {
		return nil, err
	}
	w.uplink = link.Ingress{Device: dev, Name: "thaw_from_pair", Priority: workerPriority, Program: w.progs.uplink.FD()}
	if err := w.conn.SetIngress(w.uplink); err != nil {
		return nil, fmt.Errorf("tunnel: %w", err)
	}
	return w, nil
}

// recover reads what a predecessor has left in the maps.
func (w *worker) recover() error {
	return errors.Join(
		each(w.maps.slots, func(k slotKey, v slotValue) {
			w.noteLocked(Slot{int(k.Device), k.Source.addr()}, Key(v.VPC))
		}),
		each(w.maps.pairs, func(id uint32, v pairValue) {
			w.pairs[Key(v.VPC)] = append(w.pairs[Key(v.VPC)], Pair{id, v.Outer.addr(), v.Draining != 0})
		}),
	)
}

func (w *worker) noteLocked(s Slot, vpc Key) {
	w.slots[s] = vpc
	if w.ofVPC[vpc] == nil {
		w.ofVPC[vpc] = map[Slot]bool{}
	}
	w.ofVPC[vpc][s] = true
}

func (w *worker) forgetLocked(s Slot) {
	vpc := w.slots[s]
	delete(w.slots, s)
	delete(w.ofVPC[vpc], s)
	if len(w.ofVPC[vpc]) == 0 {
		delete(w.ofVPC, vpc)
	}
}

// release gives up what the process holds.
func (w *worker) release() {
	w.progs.close()
	if w.files != nil {
		w.files.close()
	}
	w.conn.Close()
}

// Close is Worker's.
func (w *worker) Close() error {
	w.connMu.Lock()
	defer w.connMu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	var err error
	if w.cfg.Pin == "" {
		// Cables keep their program, which finds nothing any more.
		err = w.conn.RemoveIngress(w.uplink)
		for s := range w.slots {
			err = errors.Join(err, drop(w.maps.slots, s.key()))
		}
	}
	w.release()
	return err
}

// Plug is Worker's.
func (w *worker) Plug(device int) error {
	w.connMu.Lock()
	defer w.connMu.Unlock()
	err := w.conn.SetIngress(link.Ingress{Device: device, Name: "thaw_from_instance", Priority: workerPriority, Program: w.progs.cable.FD()})
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	return nil
}

func (s Slot) key() slotKey { return slotKey{uint32(s.Device), wireAddr(s.Inner)} }

func (s Slot) innerKey(vpc Key) innerKey { return innerKey{uint32(vpc), wireAddr(s.Inner)} }

// Attach is Worker's.
func (w *worker) Attach(s Slot, vpc Key) error {
	if err := w.cfg.Driver.checkKey(vpc); err != nil {
		return fmt.Errorf("tunnel: attach: %w", err)
	}
	if s.Device <= 0 || !s.Inner.Is4() {
		return fmt.Errorf("tunnel: attach: %w: device %d with address %v", ErrInvalid, s.Device, s.Inner)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if old, there := w.slots[s]; there && old != vpc {
		if err := w.detachLocked(s); err != nil {
			return err
		}
	}
	// The way in first: an answer must find it.
	if err := w.maps.inner.Put(s.innerKey(vpc), uint32(s.Device)); err != nil {
		return fmt.Errorf("tunnel: attach %v: %w", s.Inner, err)
	}
	if err := w.maps.slots.Put(s.key(), slotValue{uint32(vpc), choose(s, w.pairs[vpc])}); err != nil {
		return errors.Join(fmt.Errorf("tunnel: attach %v: %w", s.Inner, err), drop(w.maps.inner, s.innerKey(vpc)))
	}
	w.noteLocked(s, vpc)
	return nil
}

// Detach is Worker's.
func (w *worker) Detach(s Slot) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.detachLocked(s)
}

func (w *worker) detachLocked(s Slot) error {
	vpc, there := w.slots[s]
	if !there {
		return nil
	}
	if err := errors.Join(drop(w.maps.slots, s.key()), drop(w.maps.inner, s.innerKey(vpc))); err != nil {
		return fmt.Errorf("tunnel: detach %v: %w", s.Inner, err)
	}
	w.forgetLocked(s)
	return nil
}

// Slots is Worker's.
func (w *worker) Slots() (map[Slot]Key, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.slots), nil
}

// Stats is Worker's.
func (w *worker) Stats() (Stats, error) { return stats(w.maps.counters) }

// choose returns the pair that new flows of a slot go to, by rendezvous: when a pair comes or goes only those slots change
// theirs that it is about. 0 = none.
func choose(s Slot, pairs []Pair) (id uint32) {
	inner := s.Inner.As4()
	var best uint64
	for _, p := range pairs {
		if p.Draining {
			continue
		}
		// The finalizer of splitmix64, so that neighbouring addresses fall to different pairs.
		x := uint64(inner[0])<<56 | uint64(inner[1])<<48 | uint64(inner[2])<<40 | uint64(inner[3])<<32 | uint64(p.ID)
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		if x ^= x >> 31; id == 0 || x > best || x == best && p.ID < id {
			id, best = p.ID, x
		}
	}
	return id
}

// SetPairs is Worker's.
func (w *worker) SetPairs(vpc Key, pairs []Pair) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.checkPairsLocked(vpc, pairs); err != nil {
		return fmt.Errorf("tunnel: pairs of VPC %d: %w", vpc, err)
	}
	if slices.Equal(w.pairs[vpc], pairs) {
		return nil
	}
	old := w.pairs[vpc]
	if err := w.putPairsLocked(vpc, pairs); err != nil {
		// What is there now is neither the old nor the new: say nothing of it, so that the next call does it all.
		w.pairs[vpc] = slices.Concat(old, pairs)
		return fmt.Errorf("tunnel: pairs of VPC %d: %w", vpc, err)
	}
	if err := w.dropPairsLocked(vpc, old, pairs); err != nil {
		w.pairs[vpc] = slices.Concat(old, pairs)
		return fmt.Errorf("tunnel: pairs of VPC %d: %w", vpc, err)
	}
	if w.pairs[vpc] = slices.Clone(pairs); len(pairs) == 0 {
		delete(w.pairs, vpc)
	}
	return nil
}

func (w *worker) checkPairsLocked(vpc Key, pairs []Pair) error {
	if err := w.cfg.Driver.checkKey(vpc); err != nil {
		return err
	}
	ids, outers := map[uint32]bool{}, map[netip.Addr]bool{}
	for _, p := range pairs {
		if p.ID == 0 || !p.Outer.Is4() || ids[p.ID] || outers[p.Outer] {
			return fmt.Errorf("%w: pair %d at %v: IDs and IPv4 addresses of their own are needed", ErrInvalid, p.ID, p.Outer)
		}
		ids[p.ID], outers[p.Outer] = true, true
	}
	keyless := w.cfg.Driver.wireKey(vpc) == wire{}
	for other, list := range w.pairs {
		if other == vpc {
			continue
		}
		for _, p := range list {
			if ids[p.ID] {
				return fmt.Errorf("%w: pair %d is VPC %d's", ErrInvalid, p.ID, other)
			}
			if keyless && outers[p.Outer] {
				return fmt.Errorf("%w: pair %d at %v: with %s the address says whose a packet is, and it is VPC %d's", ErrInvalid, p.ID, p.Outer, w.cfg.Driver, other)
			}
		}
	}
	return nil
}

// putPairsLocked adds pairs and sends new flows to them.
func (w *worker) putPairsLocked(vpc Key, pairs []Pair) error {
	key := w.cfg.Driver.wireKey(vpc)
	for _, p := range pairs {
		outer := wireAddr(p.Outer)
		v := pairValue{VPC: uint32(vpc), Outer: outer, Wire: key, Sum: w.cfg.Driver.checksumOf(wireAddr(w.cfg.Local), outer)}
		if p.Draining {
			v.Draining = 1
		}
		if err := w.maps.peers.Put(peerKey{key, outer}, uint32(vpc)); err != nil {
			return err
		}
		if err := w.maps.pairs.Put(p.ID, v); err != nil {
			return err
		}
	}
	for s := range w.ofVPC[vpc] {
		if err := w.maps.slots.Put(s.key(), slotValue{uint32(vpc), choose(s, pairs)}); err != nil {
			return err
		}
	}
	return nil
}

// dropPairsLocked removes those that are no longer listed. Their flows go where new ones go from now on.
func (w *worker) dropPairsLocked(vpc Key, old, pairs []Pair) error {
	key := w.cfg.Driver.wireKey(vpc)
	var err error
	for _, p := range old {
		if !slices.ContainsFunc(pairs, func(q Pair) bool { return q.ID == p.ID }) {
			err = errors.Join(err, drop(w.maps.pairs, p.ID))
		}
		if !slices.ContainsFunc(pairs, func(q Pair) bool { return q.Outer == p.Outer }) {
			err = errors.Join(err, drop(w.maps.peers, peerKey{key, wireAddr(p.Outer)}))
		}
	}
	return err
}
