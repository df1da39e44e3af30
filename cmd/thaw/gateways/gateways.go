// Package gateways connects the nodes that have pairs of gateways with the state of a cluster: control says which pairs there are to be
// (Network), the nodes make them and say what they have (Serve), and those with instances say where these are (Join).
//
//	/thaw/gateways/nodes/GROUP/NAME   what a node is and has; it is gone with the node's lease
//	/thaw/gateways/pairs/GROUP/ID     what a pair is to be
//	/thaw/gateways/workers/NAME       where a node's instances are; it stays, so that the restart of an agent does not touch connections
//
// A GROUP is two nodes that share their outer addresses, named after the first of these. What is known goes on while the state does not answer.
package gateways

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/internal/state"
)

const (
	root        = "/thaw/gateways/"
	nodesRoot   = root + "nodes/"
	pairsRoot   = root + "pairs/"
	workersRoot = root + "workers/"
)

func pairKey(group string, id uint32) string {
	return pairsRoot + group + "/" + strconv.FormatUint(uint64(id), 10)
}

// record is what a node says of itself.
type record struct {
	Name   string `json:"name"`
	Driver string `json:"driver"` // of its tunnels
	MTU    int    `json:"mtu"`    // of what goes through them, bytes
	Role   string `json:"role"`
	Pairs  []half `json:"pairs"`
}

// half is what a node has of a pair.
type half struct {
	ID      uint32 `json:"id"`
	Active  bool   `json:"active"`
	Message string `json:"message,omitempty"` // why not
}

// pause is the time between two tries when the state does not answer.
const pause = 200 * time.Millisecond

// follow tells of all keys below prefix, by the rest of their names, at first and at each change, until ctx ends.
func follow(ctx context.Context, s state.Store, prefix string, told func(map[string][]byte)) error {
	for ctx.Err() == nil {
		kvs, rev, err := s.List(ctx, prefix)
		if err == nil {
			all := make(map[string][]byte, len(kvs))
			for _, kv := range kvs {
				all[strings.TrimPrefix(kv.Key, prefix)] = kv.Value
			}
			told(all)
			err = change(ctx, s, prefix, rev)
		}
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}
	return nil
}

// change returns after one below prefix since rev.
func change(ctx context.Context, s state.Store, prefix string, rev int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, reason := s.Watch(ctx, prefix, rev)
	for e := range events {
		if !e.Progress {
			return nil
		}
	}
	if err := reason(); !errors.Is(err, state.ErrCompacted) {
		return fmt.Errorf("watch %s: %w", prefix, err)
	}
	return nil
}
