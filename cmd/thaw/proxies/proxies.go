// Package proxies holds the queue-proxies that a node agent hosts in its own process.
package proxies

import (
	"sync"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/queueproxy"
)

// Set are the queue-proxies in front of a node's instances. The zero value is ready; its methods may be called concurrently.
type Set struct {
	mu sync.RWMutex
	m  map[string]*proxy
}

type proxy struct {
	*queueproxy.Proxy
	id string
	of *Set
}

// Close ends the proxy and forgets it.
func (p *proxy) Close() {
	p.Proxy.Close()
	p.of.mu.Lock()
	delete(p.of.m, p.id)
	p.of.mu.Unlock()
}

// Open makes the queue-proxy of an instance that was just started or adopted.
func (ps *Set) Open(in endpoints.Instance, rev *api.Revision, dial instance.Dialer) instance.Sidecar {
	total, start, idle := rev.Timeouts()
	p := &proxy{id: in.ID, of: ps, Proxy: queueproxy.New(queueproxy.Config{
		Revision: in.Revision, Instance: in.ID, Concurrency: rev.Concurrency(), RefuseProxied: true,
	}, forward.New(forward.Config{Addr: in.Addr, Dial: forward.Dialer(dial), Protocol: rev.Protocol(), Total: total, ResponseStart: start, Idle: idle}))}
	ps.mu.Lock()
	if ps.m == nil {
		ps.m = make(map[string]*proxy)
	}
	ps.m[in.ID] = p
	ps.mu.Unlock()
	return p
}

// Handler is the way to an instance. One that is gone meanwhile cannot be reached, which sends the request elsewhere.
func (ps *Set) Handler(in endpoints.Instance) hop.Handler {
	ps.mu.RLock()
	p := ps.m[in.ID]
	ps.mu.RUnlock()
	if p == nil {
		return hop.HandlerFunc(func(*hop.Exchange) error { return hop.ErrNotSent })
	}
	return p.Proxy
}

// Get is the queue-proxy of an instance; nil = it is not here.
func (ps *Set) Get(id string) *queueproxy.Proxy {
	ps.mu.RLock()
	defer ps.mu.RUnlock()
	if p := ps.m[id]; p != nil {
		return p.Proxy
	}
	return nil
}

// All are the queue-proxies that there are.
func (ps *Set) All() []*queueproxy.Proxy {
	ps.mu.RLock()
	defer ps.mu.RUnlock()
	out := make([]*queueproxy.Proxy, 0, len(ps.m))
	for _, p := range ps.m {
		out = append(out, p.Proxy)
	}
	return out
}
