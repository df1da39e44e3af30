package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/shards"
)

// ways are the connections to agents, one pool for each address: instances of one node share it.
type ways struct {
	mu sync.Mutex
	to map[string]*forward.Forward // by address; guarded by mu
}

// maxIdle is how many connections to one hop are kept for reuse.
const maxIdle = 1024

func (w *ways) forward(addr string) *forward.Forward {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.to[addr]
	if f == nil {
		if w.to == nil {
			w.to = map[string]*forward.Forward{}
		}
		f = forward.New(forward.Config{Addr: addr, Protocol: "auto", Hop: true, MaxIdle: maxIdle})
		w.to[addr] = f
	}
	return f
}

// handler is the way to an instance: its agent, told which one is meant.
func (w *ways) handler(in endpoints.Instance) hop.Handler {
	if in.Addr == "" {
		return unreachable
	}
	f := w.forward(in.Addr)
	id := in.ID
	return hop.HandlerFunc(func(x *hop.Exchange) error {
		x.Req.Header.Set(headerInstance, id)
		sendLimits(x)
		x.Instance = id
		return f.Serve(x)
	})
}

func (w *ways) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.to {
		f.Close()
	}
}

// sendLimits hands the route's time-outs to the last hop: they begin when the function gets the request.
func sendLimits(x *hop.Exchange) {
	if x.Limits == (api.Timeouts{}) {
		return
	}
	l := x.Limits
	x.Req.Header.Set(headerLimits, fmt.Sprintf("%s,%s,%s", l.Total, l.ResponseStart, l.Idle))
	x.Limits = api.Timeouts{}
}

// takeLimits is the other end of sendLimits. What it does not understand it leaves out.
func takeLimits(x *hop.Exchange) {
	v := x.Req.Header.Peek(headerLimits)
	if len(v) == 0 {
		return
	}
	parts := strings.Split(string(v), ",")
	x.Req.Header.Del(headerLimits)
	if len(parts) != 3 {
		return
	}
	for i, d := range []*time.Duration{&x.Limits.Total, &x.Limits.ResponseStart, &x.Limits.Idle} {
		if t, err := time.ParseDuration(parts[i]); err == nil && t > 0 {
			*d = t
		}
	}
}

// distrust is how long an activator that could not be reached is asked last.
const distrust = 2 * time.Second

// activators is the way to the activator that owns a revision. Its owner comes first, then the others in the order in which they would take
// over: everybody who knows the same members comes to the same order.
type activators struct {
	view atomic.Pointer[activatorView]
}

type activatorView struct {
	old    chan struct{} // closed when there is a newer one
	byAddr map[string]*activatorPeer
	order  [shards.Count][]*activatorPeer
}

type activatorPeer struct {
	name    string
	forward *forward.Forward
	suspect atomic.Int64 // Unix time in nanoseconds until which it is asked last
}

var (
	errNoActivator = &hop.Error{Status: 503, Reason: hop.ReasonUnreachable, Message: "no activator can be reached", RetryAfter: time.Second}
	errQueueFull   = &hop.Error{Status: 503, Reason: hop.ReasonQueueFull, Message: "the revision's queue is full", RetryAfter: time.Second}
)

// set takes over the activators that there are, by name. It is called from one goroutine.
func (a *activators) set(addrs map[string]string) {
	next := &activatorView{old: make(chan struct{}), byAddr: map[string]*activatorPeer{}}
	old := a.view.Load()
	names := make([]string, 0, len(addrs))
	byName := map[string]*activatorPeer{}
	for name, addr := range addrs {
		var p *activatorPeer
		if old != nil && old.byAddr[addr] != nil && old.byAddr[addr].name == name {
			p = old.byAddr[addr]
		} else {
			p = &activatorPeer{name: name, forward: forward.New(forward.Config{Addr: addr, Protocol: "auto", Hop: true, MaxIdle: maxIdle})}
		}
		next.byAddr[addr], byName[name] = p, p
		names = append(names, name)
	}
	slices.Sort(names)
	for shard := range next.order {
		rest := slices.Clone(names)
		for len(rest) > 0 {
			first := shards.Preferred(rest, shard)
			next.order[shard] = append(next.order[shard], byName[first])
			rest = slices.DeleteFunc(rest, func(n string) bool { return n == first })
		}
	}
	a.view.Store(next)
	if old != nil {
		close(old.old)
		for addr, p := range old.byAddr {
			if next.byAddr[addr] != p {
				p.forward.Close()
			}
		}
	}
}

// While none can be reached, as when the only one is started again, a request waits for one for activatorWait, and asks known ones again each
// activatorRetry: they may be back before it is heard that they were away.
const (
	activatorWait  = 3 * time.Second
	activatorRetry = 100 * time.Millisecond
)

// Serve hands x to the owner of its revision. One that does not get it passes it to the next: no byte of it has reached anybody.
func (a *activators) Serve(x *hop.Exchange) error {
	v := a.view.Load()
	if v == nil {
		return errNoActivator
	}
	sendLimits(x)
	err := v.serve(x)
	for begin := time.Now(); err == errNoActivator && time.Since(begin) < activatorWait && !x.Client.Gone(); {
		select {
		case <-v.old:
		case <-time.After(activatorRetry):
		}
		v = a.view.Load()
		err = v.serve(x)
	}
	return err
}

func (v *activatorView) serve(x *hop.Exchange) error {
	now := time.Now().UnixNano()
	order := v.order[shards.Of(x.Revision)]
	for _, trusted := range [...]bool{true, false} {
		for _, p := range order {
			if (p.suspect.Load() <= now) != trusted {
				continue
			}
			err := p.forward.Serve(x)
			switch {
			case errors.Is(err, hop.ErrBusy):
				return errQueueFull
			case !errors.Is(err, hop.ErrNotSent):
				return err
			}
			p.suspect.Store(now + int64(distrust))
		}
	}
	return errNoActivator
}

func (a *activators) close() {
	if v := a.view.Load(); v != nil {
		for _, p := range v.byAddr {
			p.forward.Close()
		}
	}
}
