// Package feed tells other processes which instances a node agent has: routers, activators and the control part are connected to every
// agent, and put together what all of them say.
//
//	watcher (Client)                                  agent (Server)
//	   | --- hello: name --------------------------------> |
//	   | <-- snapshots of all revisions, then "synced" --- |  at once
//	   | <-- each snapshot as it changes ----------------- |  of one revision only the newest
//	   | <-- an empty frame ------------------------------ |  each second without anything else
//
// Frames are numbered; a gap ends the stream, and the next one begins with everything anew. What an agent that cannot be reached said last holds
// for Grace if its stream has broken: its instances run on, it may come back, and the data path finds out by itself whether they can be reached. One that
// is connected and silent stands still, with its instances' queue-proxies, and is forgotten at once, as is one that is no agent any more.
package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/peers"
	"github.com/thawrun/thaw/internal/wire"
)

const (
	service = "thaw.agent.v1"
	method  = "Watch"
)

// Grace is how long the instances of an agent that says nothing count as they were.
const Grace = 5 * time.Second

// beat is how often an agent that has nothing to say says so.
const beat = time.Second

// perFrame and maxInstances bound a frame: a snapshot of 1,000 instances has 100 KB.
const (
	perFrame     = 5_000
	maxInstances = 20_000
)

// Server is the agent's side. Its methods may be called from any goroutine.
type Server struct {
	log *slog.Logger

	mu    sync.Mutex // guards what follows
	last  map[api.RevisionID]*endpoints.Snapshot
	links map[*link]struct{}
}

// link is one watcher's stream.
type link struct {
	wake    chan struct{} // capacity 1
	pending map[api.RevisionID]*endpoints.Snapshot
	synced  bool // it has been told everything, or will have been with what is pending
}

// NewServer makes a server without snapshots; nil log = none.
func NewServer(log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{log: log, last: map[api.RevisionID]*endpoints.Snapshot{}, links: map[*link]struct{}{}}
}

// Observe tells all watchers of a snapshot. It does not block; the snapshot is kept.
func (s *Server) Observe(sn *endpoints.Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(sn.Instances) == 0 && sn.Desired == 0 && sn.Failure == nil {
		delete(s.last, sn.Revision)
	} else {
		s.last[sn.Revision] = sn
	}
	for l := range s.links {
		l.pending[sn.Revision] = sn
		l.nudge()
	}
}

func (l *link) nudge() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Serve answers watchers until ctx ends; serve is the listening, options are those of gRPC, as credentials.
func (s *Server) Serve(ctx context.Context, serve func(*grpc.Server) error, options ...grpc.ServerOption) error {
	return peers.Serve(ctx, service, method, s.handle, serve, options...)
}

func (s *Server) handle(_ any, stream grpc.ServerStream) error {
	var hello wire.Frame
	if err := stream.RecvMsg(&hello); err != nil {
		return err
	}
	if hello.Sequence != 1 || hello.Reporter == "" {
		return status.Error(codes.InvalidArgument, "the first frame has sequence 1 and the watcher's name")
	}
	s.log.Info("a watcher of instances is here", "watcher", hello.Reporter)
	l := s.attach()
	defer s.detach(l)
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for sequence := uint64(1); ; {
		f, more := s.frame(l)
		f.Sequence = sequence
		sequence++
		if err := stream.SendMsg(f); err != nil {
			return err
		}
		if more {
			continue
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-l.wake:
		case <-tick.C:
		}
	}
}

func (s *Server) attach() *link {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &link{wake: make(chan struct{}, 1), pending: make(map[api.RevisionID]*endpoints.Snapshot, len(s.last))}
	for id, sn := range s.last {
		l.pending[id] = sn
	}
	s.links[l] = struct{}{}
	return l
}

func (s *Server) detach(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.links, l)
}

// frame takes out what a watcher is still to be told, or as much of it as a frame holds.
func (s *Server) frame(l *link) (f *wire.Frame, more bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f = &wire.Frame{}
	room := maxInstances
	for id, sn := range l.pending {
		if room <= 0 || len(f.Snapshots) >= perFrame {
			return f, true
		}
		room -= len(sn.Instances) + 1
		f.Snapshots = append(f.Snapshots, sn)
		delete(l.pending, id)
	}
	if !l.synced {
		l.synced, f.Synced = true, true
	}
	return f, false
}

// ClientConfig is one watcher. Name and Told are required.
type ClientConfig struct {
	Name string
	// Told gets the picture of all nodes whenever it changes, from one goroutine at a time.
	Told        func(*endpoints.Snapshot)
	Credentials credentials.TransportCredentials // nil = none, for loopback
	Log         *slog.Logger
	Grace       time.Duration // 0 = Grace
}

// Client watches all agents.
type Client struct {
	cfg     ClientConfig
	set     *peers.Set
	running context.Context // Run's

	mu     sync.Mutex // guards what follows, and is held while Told is called
	nodes  endpoints.Nodes
	agents map[string]*agent
}

// agent is what is known of one of them.
type agent struct {
	stream int         // counts its streams: what an old one says does not count
	synced bool        // the present stream has told everything
	lost   *time.Timer // runs while there is no stream
}

// NewClient makes a watcher that knows no agent yet.
func NewClient(c ClientConfig) *Client {
	if c.Grace <= 0 {
		c.Grace = Grace
	}
	return &Client{cfg: c, set: peers.New("agent", c.Credentials, c.Log), agents: map[string]*agent{}, running: context.Background()}
}

// SetAgents names all agents and the addresses of their feeds.
func (c *Client) SetAgents(addrs map[string]string) { c.set.SetMembers(addrs) }

// Synced says whether every one of these agents has told everything it has.
func (c *Client) Synced(names ...string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range names {
		if a := c.agents[n]; a == nil || !a.synced {
			return false
		}
	}
	return true
}

// Of is what an agent said of each revision last; heard says whether it has told everything on a stream that it holds.
func (c *Client) Of(name string) (parts []*endpoints.Snapshot, heard bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.agents[name]
	return c.nodes.Parts(name), a != nil && a.synced
}

// Again tells of a revision once more, if any agent has said something of it: for a watcher that could not make use of it before.
func (c *Client) Again(id api.RevisionID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.nodes.Of(id); s != nil {
		c.cfg.Told(s)
	}
}

// Run watches until ctx ends.
func (c *Client) Run(ctx context.Context) error {
	c.running = ctx
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, a := range c.agents {
			if a.lost != nil {
				a.lost.Stop()
			}
		}
	}()
	return c.set.Run(ctx, c.stream, nil)
}

var errSilent = errors.New("the agent has not said anything for a while")

// silence ends a stream on which nothing has come for longer than an agent that lives would be quiet.
const silence = 3 * beat

func (c *Client) stream(member context.Context, conn *grpc.ClientConn, name, _ string) error {
	ctx, cancel := context.WithCancelCause(member)
	defer cancel(nil)
	stream, err := peers.Open(ctx, conn, service, method)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(&wire.Frame{Sequence: 1, Reporter: c.cfg.Name}); err != nil {
		return err
	}
	number := c.begin(name)
	defer func() {
		left := member.Err() != nil && c.running.Err() == nil
		c.end(name, number, left || context.Cause(ctx) == errSilent)
	}()
	watchdog := time.AfterFunc(silence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	told := map[api.RevisionID]bool{}
	for next := uint64(1); ; next++ {
		var f wire.Frame
		if err := stream.RecvMsg(&f); err != nil {
			return errors.Join(err, context.Cause(ctx))
		}
		watchdog.Reset(silence)
		if f.Sequence != next {
			return fmt.Errorf("frame %d came after %d", f.Sequence, next-1)
		}
		c.take(name, number, &f, told)
		if f.Synced {
			told = nil
		}
	}
}

// begin is a new stream to an agent.
func (c *Client) begin(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.agents[name]
	if a == nil {
		a = &agent{}
		c.agents[name] = a
	}
	if a.lost != nil {
		a.lost.Stop()
		a.lost = nil
	}
	a.stream++
	a.synced = false
	return a.stream
}

// end is the end of one: the agent has Grace to come back, unless it is gone.
func (c *Client) end(name string, stream int, gone bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.agents[name]
	if a == nil || a.stream != stream {
		return
	}
	a.synced = false
	if gone {
		c.dropLocked(name)
		return
	}
	a.lost = time.AfterFunc(c.cfg.Grace, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.agents[name] == a && a.stream == stream { // it has not come back
			c.dropLocked(name)
		}
	})
}

func (c *Client) dropLocked(name string) {
	delete(c.agents, name)
	for _, s := range c.nodes.Drop(name) {
		c.cfg.Told(s)
	}
}

// take passes on what an agent says; told collects the revisions until it has told everything.
func (c *Client) take(name string, stream int, f *wire.Frame, told map[api.RevisionID]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.agents[name]
	if a == nil || a.stream != stream {
		return
	}
	for _, s := range f.Snapshots {
		if told != nil {
			told[s.Revision] = true
		}
		c.cfg.Told(c.nodes.Set(name, s))
	}
	if f.Synced && !a.synced {
		a.synced = true
		for _, s := range c.nodes.Keep(name, func(id api.RevisionID) bool { return told[id] }) {
			c.cfg.Told(s)
		}
	}
}
