package gateways

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/internal/state"
)

const (
	made = 5 * time.Second // how long a pair is waited for before it is said to be in the making
	poll = 50 * time.Millisecond
)

// Network is a reconcile.Network whose pairs are made by the nodes that Serve.
type Network struct{ store state.Store }

// NewNetwork returns one over a store.
func NewNetwork(store state.Store) *Network { return &Network{store} }

// EnsurePair is reconcile.Network's. A pair stays with the nodes that have it.
func (n *Network) EnsurePair(ctx context.Context, p reconcile.Pair) (st reconcile.PairStatus, err error) {
	group, old, err := n.find(ctx, p.ID)
	if err != nil {
		return st, err
	}
	if group == "" {
		if group, err = n.choose(ctx, p); err != nil {
			return st, err
		}
	}
	if st.Address, err = netip.ParseAddr(group); err != nil {
		return st, err
	}
	if !reflect.DeepEqual(old, p) {
		value, err := json.Marshal(p)
		if err == nil {
			_, err = n.store.Put(ctx, pairKey(group, p.ID), value, state.Any)
		}
		if err != nil {
			return st, err
		}
	}
	for soon := time.Now().Add(made); ; {
		nodes, err := n.nodes(ctx)
		if err != nil {
			return st, err
		}
		st.Driver, st.MTU, st.Members = "", 0, nil
		active := 0
		for _, r := range nodes[group] {
			m := api.GatewayMember{Node: r.Name, Role: r.Role, State: api.PairCreating}
			if i := slices.IndexFunc(r.Pairs, func(h half) bool { return h.ID == p.ID }); i >= 0 {
				if m.Message = r.Pairs[i].Message; r.Pairs[i].Active {
					m.State = api.PairActive
					active++
				}
			}
			st.Members = append(st.Members, m)
			if st.Driver = r.Driver; st.MTU == 0 || r.MTU < st.MTU {
				st.MTU = r.MTU
			}
		}
		if active == 2 || time.Now().After(soon) {
			return st, nil
		}
		select {
		case <-ctx.Done():
			return st, context.Cause(ctx)
		case <-time.After(poll):
		}
	}
}

// RemovePair is reconcile.Network's. It waits for the nodes that are there; one that comes back later finds the pair gone from the state.
func (n *Network) RemovePair(ctx context.Context, p reconcile.Pair) error {
	group, _, err := n.find(ctx, p.ID)
	if err != nil {
		return err
	}
	if group != "" {
		if _, err := n.store.Delete(ctx, pairKey(group, p.ID), state.Any); err != nil && !errors.Is(err, state.ErrNotFound) {
			return err
		}
	}
	for holder := ""; ; {
		nodes, err := n.nodes(ctx)
		if ctx.Err() != nil && holder != "" {
			return fmt.Errorf("the gateway node %s does not let go: %w", holder, context.Cause(ctx))
		}
		if err != nil {
			return err
		}
		holder = ""
		for _, list := range nodes {
			for _, r := range list {
				if slices.ContainsFunc(r.Pairs, func(h half) bool { return h.ID == p.ID }) {
					holder = r.Name
				}
			}
		}
		if holder == "" {
			return nil
		}
		select {
		case <-ctx.Done():
		case <-time.After(poll):
		}
	}
}

// Pairs is reconcile.Network's.
func (n *Network) Pairs(ctx context.Context) ([]reconcile.Pair, error) {
	kvs, _, err := n.store.List(ctx, pairsRoot)
	if err != nil {
		return nil, err
	}
	var all []reconcile.Pair
	for _, kv := range kvs {
		var p reconcile.Pair
		if err := json.Unmarshal(kv.Value, &p); err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// find returns the group that has a pair, "" = none, and what it was told of it.
func (n *Network) find(ctx context.Context, id uint32) (group string, p reconcile.Pair, err error) {
	kvs, _, err := n.store.List(ctx, pairsRoot)
	if err != nil {
		return "", p, err
	}
	for _, kv := range kvs {
		group, _, _ := strings.Cut(strings.TrimPrefix(kv.Key, pairsRoot), "/")
		if kv.Key == pairKey(group, id) {
			return group, p, json.Unmarshal(kv.Value, &p)
		}
	}
	return "", p, nil
}

// choose takes the group with the fewest pairs, among those that are complete and are the nodes that p names, if it names any.
func (n *Network) choose(ctx context.Context, p reconcile.Pair) (string, error) {
	nodes, err := n.nodes(ctx)
	if err != nil {
		return "", err
	}
	kvs, _, err := n.store.List(ctx, pairsRoot)
	if err != nil {
		return "", err
	}
	has := map[string]int{}
	for _, kv := range kvs {
		group, _, _ := strings.Cut(strings.TrimPrefix(kv.Key, pairsRoot), "/")
		has[group]++
	}
	best := ""
	for _, group := range slices.Sorted(maps.Keys(nodes)) {
		var names []string
		for _, r := range nodes[group] {
			names = append(names, r.Name)
		}
		wanted := slices.Sorted(slices.Values(p.Nodes))
		if len(names) != 2 || len(wanted) > 0 && !slices.Equal(names, wanted) {
			continue
		}
		if best == "" || has[group] < has[best] {
			best = group
		}
	}
	if best == "" {
		what := "no two gateway nodes are there"
		if len(p.Nodes) > 0 {
			what = fmt.Sprintf("the gateway nodes %s are not there, or share no outer address", strings.Join(p.Nodes, " and "))
		}
		return "", fmt.Errorf("%s: run thaw gateway --etcd on two nodes with the same outer addresses", what)
	}
	return best, nil
}

// nodes are those that live, by group, in the order of their names.
func (n *Network) nodes(ctx context.Context) (map[string][]record, error) {
	kvs, _, err := n.store.List(ctx, nodesRoot)
	if err != nil {
		return nil, err
	}
	all := map[string][]record{}
	for _, kv := range kvs {
		group, name, _ := strings.Cut(strings.TrimPrefix(kv.Key, nodesRoot), "/")
		var r record
		if err := json.Unmarshal(kv.Value, &r); err != nil || r.Name != name {
			continue // a node of another version: it is not one to give pairs to
		}
		all[group] = append(all[group], r)
	}
	return all, nil
}
