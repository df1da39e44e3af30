package pairs

import (
	"context"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// group is the pairs of one Gateway: the first is made with it, the others when there is much to carry.
type group struct {
	spec   reconcile.Pair
	memory gateway.Memory
	// leaving is the pair that gets no new connections, by its place among the outer addresses; 0 = none. told is when its state was first given
	// to those who tell the workers.
	leaving int
	told    time.Time
}

const (
	// LastFirst is the last ID that a first pair may have. Those of the others come after it.
	LastFirst = 40_000
	lastID    = 50_000
	// toldAfter is how long workers may take to hear that a pair drains. After that the pair refuses what is new.
	toldAfter = 5 * time.Second
)

// pairOf is the configuration of pair k of a Gateway.
func pairOf(p reconcile.Pair, k int, id uint32) gateway.Pair {
	g := gateway.Pair{Name: p.Namespace + "/" + p.Name, ID: id, VPC: tunnel.Key(p.Key), Outer: outers[k], Subnet: p.CIDR, NextHop: p.Router, Network: gateway.Network{Bridge: bridge(p.ID)}}
	if k > 0 {
		g.Name += "/" + strconv.Itoa(k)
	}
	for i, a := range p.HAVIPs {
		if i%max(1, p.Most) != k {
			continue
		}
		g.HAVIPs = append(g.HAVIPs, a)
		if public, ok := p.Public[a]; ok {
			if g.EIPs == nil {
				g.EIPs = map[netip.Addr]netip.Addr{}
			}
			g.EIPs[a] = public
		}
	}
	return g
}

// split takes a pair's name apart.
func split(s string) (namespace, name string, k int) {
	parts := strings.Split(s, "/")
	if len(parts) > 2 {
		k, _ = strconv.Atoi(parts[2])
	}
	return parts[0], parts[min(1, len(parts)-1)], k
}

// ofLocked returns a Gateway's pairs by their places.
func (m *Machine) ofLocked(p reconcile.Pair) map[int]gateway.Pair {
	of := map[int]gateway.Pair{}
	for _, x := range m.pairs {
		if namespace, name, k := split(x.Name); namespace == p.Namespace && name == p.Name {
			of[k] = x
		}
	}
	return of
}

// setLocked makes a Gateway's pairs what it says now.
func (m *Machine) setLocked(p reconcile.Pair) error {
	g := m.groups[p.ID]
	if g == nil {
		g = &group{}
		m.groups[p.ID] = g
	}
	g.spec = p
	want := map[int]gateway.Pair{0: {ID: p.ID}}
	maps.Copy(want, m.ofLocked(p))
	changed := false
	for k, old := range want {
		now := pairOf(p, k, old.ID)
		now.Draining = old.Draining
		if now.Draining {
			g.leaving = k
		}
		if !reflect.DeepEqual(old, now) {
			m.pairs[now.ID], changed = now, true
		}
	}
	if !changed {
		return nil
	}
	return m.tell()
}

// listLocked is what workers are told of a Gateway's pairs.
func (m *Machine) listLocked(p reconcile.Pair, now [2]answer) (list []api.GatewayPair) {
	g := m.groups[p.ID]
	if p.Most < 2 || g == nil {
		return nil
	}
	of := m.ofLocked(p)
	for _, k := range slices.Sorted(maps.Keys(of)) {
		x := of[k]
		s := api.GatewayPair{ID: int64(x.ID), Address: x.Outer.String(), State: api.PairCreating}
		for _, a := range x.HAVIPs {
			s.HAVIPs = append(s.HAVIPs, a.String())
		}
		switch {
		case k > 0 && k == g.leaving:
			s.State = api.PairDraining
			if g.told.IsZero() {
				g.told = time.Now()
			}
		case m.whole[x.ID] || active(x.ID, now): // one that was is, whatever has happened to a node: connections depend on it
			m.whole[x.ID] = true
			s.State = api.PairActive
		}
		list = append(list, s)
	}
	return list
}

func active(id uint32, now [2]answer) bool {
	for i := range now {
		if now[i].member("", id).State != api.PairActive {
			return false
		}
	}
	return true
}

// scale looks at the loads each second until ctx ends.
func (m *Machine) scale(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			m.rescale(now)
		}
	}
}

func (m *Machine) rescale(now time.Time) {
	m.mu.Lock()
	some := false
	for _, g := range m.groups {
		some = some || g.spec.Most > 1
	}
	m.mu.Unlock()
	if !some {
		return
	}
	var said [2]answer
	for i, n := range m.nodes {
		said[i].Status, said[i].err = n.ask()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	changed := false
	for _, g := range m.groups {
		if g.spec.Most > 1 && m.rescaleLocked(g, now, said) {
			changed = true
		}
	}
	if changed {
		if err := m.tell(); err != nil {
			m.cfg.Log.Warn("pairs cannot be changed", "err", err)
		}
	}
}

// rescaleLocked takes the next step of one Gateway: one pair comes or goes at a time.
func (m *Machine) rescaleLocked(g *group, now time.Time, said [2]answer) (changed bool) {
	master := &said[0]
	if said[1].Role == havip.Master {
		master = &said[1]
	}
	var loads []gateway.Load
	of, last := m.ofLocked(g.spec), 0
	for k, x := range of {
		s, _ := master.pair(x.ID)
		switch {
		case k > 0 && k == g.leaving:
			switch {
			case x.Draining && (s.Drained || s.Gate == "closed"):
				m.cfg.Log.Info("pair removed", "pair", x.Name)
				delete(m.pairs, x.ID)
				delete(m.whole, x.ID)
				g.leaving = 0
				return true
			case !x.Draining && !g.told.IsZero() && now.Sub(g.told) > toldAfter:
				x.Draining = true
				m.pairs[x.ID] = x
				return true
			}
			return false
		case !active(x.ID, said):
			return false // it is being made, or a node is away
		}
		loads, last = append(loads, s.Load), max(last, k)
	}
	p := m.cfg.Policy
	p.Most = min(g.spec.Most, len(outers))
	d, memory := gateway.Scale(now, p, loads, g.memory)
	g.memory = memory
	log := m.cfg.Log.With("gateway", g.spec.Namespace+"/"+g.spec.Name, "pairs", d.Pairs, "why", d.Why)
	switch {
	case d.Pairs > len(loads):
		k := 1
		for of[k].ID != 0 {
			k++
		}
		id := uint32(LastFirst + 1)
		for m.pairs[id].ID != 0 {
			id++
		}
		if id > lastID {
			return false
		}
		log.Info("pair added")
		m.pairs[id] = pairOf(g.spec, k, id)
		return true
	case d.Pairs < len(loads) && last > 0:
		log.Info("pair drains")
		g.leaving, g.told = last, time.Time{}
	}
	return false
}
