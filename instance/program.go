package instance

import (
	"context"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/thawrun/thaw/instance/provider"
)

// program is the program of one instance, as its goroutine sees it: the provider's event made into a channel.
type program struct {
	id   string
	done chan struct{} // closed when it and all its processes have ended
	exit provider.Exit // set before done is closed
}

// programs are those that run. The provider's events find them by id.
type programs struct {
	mu sync.Mutex
	m  map[string]*program
}

// add makes room for the event of a program that is about to run.
func (ps *programs) add(id string) *program {
	p := &program{id: id, done: make(chan struct{})}
	ps.mu.Lock()
	if ps.m == nil {
		ps.m = map[string]*program{}
	}
	ps.m[id] = p
	ps.mu.Unlock()
	return p
}

func (ps *programs) drop(id string) {
	ps.mu.Lock()
	delete(ps.m, id)
	ps.mu.Unlock()
}

// ended is the provider's watcher.
func (ps *programs) ended(e provider.Event) {
	ps.mu.Lock()
	p := ps.m[e.ID]
	delete(ps.m, e.ID)
	ps.mu.Unlock()
	if p != nil {
		p.exit = e.Exit
		close(p.done)
	}
}

// providerPatience bounds what a provider may take over one operation. They take milliseconds.
const providerPatience = 10 * time.Second

// stop asks a program to end and ends it by force after grace or at the end of ctx; it returns when it has ended.
func (a *Agent) stop(p *program, grace time.Duration, ctx context.Context) {
	op, cancel := context.WithTimeout(context.Background(), providerPatience)
	err := a.provider.Stop(op, p.id)
	cancel()
	if err == nil {
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-p.done:
			return
		case <-t.C:
		case <-ctx.Done():
		}
	}
	a.destroy(p.id)
}

// destroy ends what is left of an instance in the kernel. What cannot be ended (a process that hangs in a broken file system)
// is left, and said.
func (a *Agent) destroy(id string) {
	ctx, cancel := context.WithTimeout(context.Background(), providerPatience)
	defer cancel()
	if err := a.provider.Destroy(ctx, id); err != nil {
		a.cfg.Log.Error("an instance cannot be ended", "id", id, "err", err)
	}
	a.programs.drop(id)
}

// Dialer connects to an instance.
type Dialer func(ctx context.Context, network, addr string) (net.Conn, error)

// dialer returns the way to an instance: through the provider where it has a network of its own, else nil, its address is good
// for anybody.
func (a *Agent) dialer(in *instance) Dialer {
	if !in.inside {
		return nil
	}
	return func(ctx context.Context, _, addr string) (net.Conn, error) {
		_, p, _ := net.SplitHostPort(addr)
		port, _ := strconv.Atoi(p)
		return a.provider.Dial(ctx, in.folder, port)
	}
}
