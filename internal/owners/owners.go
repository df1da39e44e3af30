// Package owners shares the shards of the revisions out among processes: each shard has one owner at a time, by a key in the shared
// state that lives as long as its owner's lease. A member that dies loses its keys with its lease; the others take them over within a
// lease's time.
//
// A member whose lease ran out while the state does not answer keeps its shards: nobody else can have taken them, and stopping would
// help nobody. Should it be wrong (it is cut off, the others are not), its orders carry an epoch lower than the new owner's and are
// refused where they arrive.
package owners

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/internal/shards"
	"github.com/thawrun/thaw/internal/state"
)

// DefaultTTL is the time that a lease lives on after its process: the shortest that etcd grants at its usual settings. Take-over
// takes this, and at most half a second until etcd notices.
const DefaultTTL = 2 * time.Second

// sayEvery bounds how often a state that does not answer is complained about.
const sayEvery = 10 * time.Second

// retry is the pause between two looks at a state that does not answer, or at shards that could not be claimed.
const retry = 200 * time.Millisecond

// Config is one member. Store, Group, Name and Changed are required.
type Config struct {
	Store state.Store
	Group string // what is shared out: "autoscaler"
	Name  string // unique among the members
	Addr  string // where others reach this member
	TTL   time.Duration
	Log   *slog.Logger

	// Changed is told of every shard that this member has gained (with its epoch) or lost (epoch 0), from one goroutine. A shard
	// is given away only after Changed has returned: by then nothing may be done for it any more. A new epoch without a loss before it
	// means that nobody else has had the shard meanwhile.
	Changed func(shard int, epoch int64)
}

func root(group string) string { return "/thaw/owners/" + group + "/" }

// record is the value of a member's key and of a shard's.
type record struct {
	Name string `json:"name"`
	Addr string `json:"addr"`
}

// member is a Config at work. It belongs to Run.
type member struct {
	Config
	mine    map[int]int64 // epochs of own shards
	value   []byte
	session state.Session
}

// Run takes part until ctx ends, then gives the shards back, so that others have them at once.
func Run(ctx context.Context, c Config) error {
	if c.Store == nil || c.Group == "" || c.Name == "" || strings.Contains(c.Name+c.Group, "/") || c.Changed == nil {
		return errors.New("owners: Store, Group, Name (without a slash) and Changed are required")
	}
	if c.TTL <= 0 {
		c.TTL = DefaultTTL
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	m := &member{Config: c, mine: map[int]int64{}}
	m.value, _ = json.Marshal(record{c.Name, c.Addr})
	var said time.Time
	for ctx.Err() == nil {
		err := m.take(ctx)
		if ctx.Err() == nil && time.Since(said) > sayEvery {
			said = time.Now()
			c.Log.Warn("owners: starting over", "member", c.Name, "shards", len(m.mine), "error", err)
		}
		pause(ctx)
	}
	for shard := range m.mine {
		c.Changed(shard, 0)
	}
	if m.session != nil {
		_ = m.session.Close() // what it misses runs out by itself
	}
	return nil
}

// take opens a session and takes part with it until it is lost.
func (m *member) take(ctx context.Context) error {
	s, err := m.Store.Session(context.WithoutCancel(ctx), m.TTL) // the end of ctx gives it back in order
	if err != nil {
		return err
	}
	old := m.session
	m.session = s
	_, err = s.Put(ctx, root(m.Group)+"members/"+m.Name, m.value, state.Any)
	if old != nil { // now that this member's key does not go with it: to the others it has not been away, should that lease live yet
		_ = old.Close()
	}
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	for {
		v, rev, err := look(ctx, m.Store, m.Group)
		if err == nil {
			err = m.settle(ctx, v)
		}
		if err == nil {
			err = m.change(ctx, rev)
		}
		if err != nil {
			return err
		}
	}
}

// change returns after something has changed since rev, or the session is over.
func (m *member) change(ctx context.Context, rev int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	over := m.session.Done()
	go func() { // ends with change, but nobody waits for that: m may have another session by then
		select {
		case <-over:
			cancel(state.ErrLeaseLost)
		case <-ctx.Done():
		}
	}()
	if err := changed(ctx, m.Store, root(m.Group), rev); err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	return nil
}

// view is a consistent picture of a group.
type view struct {
	members []string
	owned   map[int]state.KV
}

func look(ctx context.Context, s state.Store, group string) (view, int64, error) {
	kvs, rev, err := s.List(ctx, root(group))
	v := view{owned: map[int]state.KV{}}
	for _, kv := range kvs {
		kind, name, _ := strings.Cut(strings.TrimPrefix(kv.Key, root(group)), "/")
		if n, err := strconv.Atoi(name); kind == "shards" && err == nil && n >= 0 && n < shards.Count {
			v.owned[n] = kv
		} else if kind == "members" {
			v.members = append(v.members, name)
		}
	}
	return v, rev, err
}

// settle gives up what others should have, notes what was lost, and claims what is free and ours.
func (m *member) settle(ctx context.Context, v view) error {
	for shard, epoch := range m.mine {
		kv, ok := v.owned[shard]
		switch {
		case ok && kv.Created != epoch: // somebody has it; perhaps our own claim under a lease that is gone
			m.lost(shard)
		case ok && shards.Preferred(v.members, shard) != m.Name:
			m.lost(shard)
			if _, err := m.Store.Delete(ctx, kv.Key, kv.Revision); err != nil && !errors.Is(err, state.ErrNotFound) && !errors.Is(err, state.ErrConflict) {
				return fmt.Errorf("hand over: %w", err)
			}
		}
	}
	for shard := range shards.Count {
		if _, taken := v.owned[shard]; taken || shards.Preferred(v.members, shard) != m.Name {
			continue
		}
		epoch, err := m.session.Put(ctx, fmt.Sprintf("%sshards/%02d", root(m.Group), shard), m.value, 0)
		switch {
		case errors.Is(err, state.ErrExists): // the next look tells whose it is
		case err != nil:
			return fmt.Errorf("claim: %w", err)
		default:
			if _, was := m.mine[shard]; was && len(v.members) > 1 { // another may have had it in between, and heard what is missing here
				m.lost(shard)
			}
			m.mine[shard] = epoch
			m.Changed(shard, epoch)
		}
	}
	for shard := range m.mine { // lost with an old lease, and not ours to claim again
		if _, taken := v.owned[shard]; !taken && shards.Preferred(v.members, shard) != m.Name {
			m.lost(shard)
		}
	}
	return nil
}

func (m *member) lost(shard int) {
	delete(m.mine, shard)
	m.Changed(shard, 0)
}

// Members hands the addresses of the members by name to told at each change, from one goroutine, until ctx ends. While the state does
// not answer, or nobody is there, the last answer holds: a member that cannot prove to be alive may well be.
func Members(ctx context.Context, s state.Store, group string, told func(map[string]string)) error {
	var last map[string]string
	for ctx.Err() == nil {
		members, rev, err := addresses(ctx, s, group)
		if err == nil {
			if len(members) > 0 && !maps.Equal(members, last) {
				last = members
				told(maps.Clone(members))
			}
			err = changed(ctx, s, root(group)+"members/", rev)
		}
		if err != nil {
			pause(ctx)
		}
	}
	return nil
}

// List returns the addresses of the members by name.
func List(ctx context.Context, s state.Store, group string) (map[string]string, error) {
	members, _, err := addresses(ctx, s, group)
	return members, err
}

func addresses(ctx context.Context, s state.Store, group string) (map[string]string, int64, error) {
	kvs, rev, err := s.List(ctx, root(group)+"members/")
	members := map[string]string{}
	for _, kv := range kvs {
		var r record
		if json.Unmarshal(kv.Value, &r) == nil && r.Addr != "" {
			members[r.Name] = r.Addr
		}
	}
	return members, rev, err
}

// changed returns after a change under prefix since rev.
func changed(ctx context.Context, s state.Store, prefix string, rev int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, reason := s.Watch(ctx, prefix, rev)
	for e := range events {
		if !e.Progress {
			return nil
		}
	}
	if errors.Is(reason(), state.ErrCompacted) {
		return nil
	}
	return reason()
}

func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(retry):
	}
}
