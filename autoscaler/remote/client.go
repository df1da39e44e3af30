package remote

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/peers"
	"github.com/thawrun/thaw/internal/shards"
	"github.com/thawrun/thaw/internal/wire"
)

// beat is how often an agent says at least that it is there.
const beat = time.Second

// maxStats bounds the reports that wait for one replica: what it does not take in seconds is too old to be of use.
const maxStats = 100_000

// freshDemand is how old a demand may be to be told to a new owner. An older one has led to instances, or is over.
const freshDemand = 10 * time.Second

// Scaler carries out orders: a node agent.
type Scaler interface {
	Scale(id api.RevisionID, n int, decided time.Time)
}

// ClientConfig is one reporter.
type ClientConfig struct {
	Name        string
	Agent       Scaler                           // nil: a router, activator or control, which get no orders
	Learn       func()                           // called when who calls whom is of use, maybe more than once; nil = it is not told
	Capacity    int                              // of an agent: how many units of instances its node takes; 0 = does not say
	Credentials credentials.TransportCredentials // nil = none, for loopback
	Log         *slog.Logger
}

// Client tells the owners of revisions what happens, and carries out their orders. Its methods may be called from any goroutine and
// do not block. Nothing happens before Run.
type Client struct {
	cfg ClientConfig
	set *peers.Set

	mu        sync.Mutex // guards what follows; not held while Agent is called
	owners    [shards.Count]owner
	revisions [shards.Count]map[api.RevisionID]*known
	ready     map[endpoints.Shift]time.Time    // when an owner said so last
	asking    map[api.RevisionID][]chan []byte // who waits for an explanation; each has room for it
}

// owner is who decides about a shard, as far as heard.
type owner struct {
	epoch int64
	peer  *peer // nil = nobody that can be reached
}

// known is what a new owner has to be told of a revision.
type known struct {
	snapshot *endpoints.Snapshot // the last one that was not empty; nil = none
	demand   endpoints.Demand
	applied  int // what the agent was told last
}

// peer is a connection to a replica.
type peer struct {
	name, addr string
	wake       chan struct{} // capacity 1

	// Guarded by Client.mu.
	stats     []endpoints.Stat
	demands   map[api.RevisionID]endpoints.Demand
	snapshots map[api.RevisionID]*endpoints.Snapshot
	calls     []endpoints.Call
	shifts    []endpoints.Shift
	asks      []api.RevisionID
	told      []wire.Claim // claims to be confirmed once the snapshots above are out
	lost      int          // reports that found no room
}

// NewClient makes a client that knows no replica yet.
func NewClient(c ClientConfig) *Client {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	cl := &Client{cfg: c, ready: map[endpoints.Shift]time.Time{}, asking: map[api.RevisionID][]chan []byte{}, set: peers.New("autoscaler replica", c.Credentials, c.Log)}
	for i := range cl.revisions {
		cl.revisions[i] = map[api.RevisionID]*known{}
	}
	return cl
}

// SetMembers names all replicas and their addresses.
func (c *Client) SetMembers(addrs map[string]string) { c.set.SetMembers(addrs) }

// Observe tells which instances a revision has.
func (c *Client) Observe(s *endpoints.Snapshot) {
	c.tell(s.Revision, func(k *known, p *peer) {
		k.snapshot = s
		if p != nil {
			p.snapshots[s.Revision] = s
		}
	})
}

// Demand tells the true length of a revision's queue.
func (c *Client) Demand(d endpoints.Demand) {
	c.tell(d.Revision, func(k *known, p *peer) {
		k.demand = d
		if p != nil {
			p.demands[d.Revision] = d
		}
	})
}

// Report tells of load. Reports that no owner can be told are lost: to those who decide they are missing, not zero.
func (c *Client) Report(stats []endpoints.Stat) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range stats {
		p := c.owners[shards.OfNamespace(stats[i].Revision)].peer
		switch {
		case p == nil:
		case len(p.stats) >= maxStats:
			p.lost++
		default:
			p.stats = append(p.stats, stats[i])
			p.nudge()
		}
	}
}

// Calls tells who has called whom; the slice is not kept. What nobody can be told now is lost.
func (c *Client) Calls(calls []endpoints.Call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, call := range calls {
		if p := c.owners[shards.OfNamespace(call.Callee)].peer; p != nil && len(p.calls) < perFrame {
			p.calls = append(p.calls, call)
			p.nudge()
		}
	}
}

// ErrNobody means that nobody who could be reached decides about a revision, or answered in time.
var ErrNobody = errors.New("no autoscaler that can be reached decides about it")

// maxAsking bounds the questions that wait for an answer.
const maxAsking = 1_000

// Explain asks the owner of a revision how that scales; nil = the owner does not know the revision.
func (c *Client) Explain(ctx context.Context, id api.RevisionID) ([]byte, error) {
	answer := make(chan []byte, 1)
	c.mu.Lock()
	p := c.owners[shards.OfNamespace(id)].peer
	if p == nil || len(c.asking) >= maxAsking {
		c.mu.Unlock()
		return nil, ErrNobody
	}
	if len(c.asking[id]) == 0 {
		p.asks = append(p.asks, id)
	}
	c.asking[id] = append(c.asking[id], answer)
	p.nudge()
	c.mu.Unlock()
	select {
	case text := <-answer:
		return text, nil
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asking[id] = slices.DeleteFunc(c.asking[id], func(a chan []byte) bool { return a == answer }); len(c.asking[id]) == 0 {
		delete(c.asking, id)
	}
	return nil, ErrNobody
}

// said hands explanations to those who wait for them.
func (c *Client) said(all []wire.Said) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range all {
		for _, answer := range c.asking[s.Revision] {
			answer <- s.Text
		}
		delete(c.asking, s.Revision)
	}
}

// readyFor is how long the word of an owner counts that a revision is ready for a shift: the next one may have changed it.
const readyFor = time.Second

// maxShifts bounds the shifts that wait for one replica, and the answers that are remembered.
const maxShifts = 1_000

// Shift is told that a share of a revision's requests is about to go to another one, and says whether that was said to have the instances
// for it. The caller asks again every few hundred milliseconds; the answer to one question comes with the next. True too when
// nobody can be asked, as when the two are of different namespaces, and so of different owners.
func (c *Client) Shift(from, to api.RevisionID, weight float64) (ready bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := endpoints.Shift{From: from, To: to, Weight: weight}
	p := c.owners[shards.OfNamespace(to)].peer
	if p == nil || p != c.owners[shards.OfNamespace(from)].peer {
		return true
	}
	if len(p.shifts) < maxShifts && !slices.Contains(p.shifts, s) {
		p.shifts = append(p.shifts, s)
		p.nudge()
	}
	return time.Since(c.ready[s]) < readyFor
}

// answers notes which shifts may be made.
func (c *Client) answers(ready []endpoints.Shift) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if len(c.ready) > maxShifts {
		maps.DeleteFunc(c.ready, func(_ endpoints.Shift, at time.Time) bool { return now.Sub(at) >= readyFor })
	}
	for _, s := range ready {
		if len(c.ready) <= maxShifts {
			c.ready[s] = now
		}
	}
}

func (c *Client) tell(id api.RevisionID, f func(*known, *peer)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	shard := shards.OfNamespace(id)
	k := c.revisions[shard][id]
	if k == nil {
		k = &known{}
		c.revisions[shard][id] = k
	}
	p := c.owners[shard].peer
	f(k, p)
	if p != nil {
		p.nudge()
	}
	if k.idle() {
		delete(c.revisions[shard], id)
	}
}

// idle says that there is nothing a new owner would have to know.
func (k *known) idle() bool {
	return (k.snapshot == nil || len(k.snapshot.Instances) == 0 && k.snapshot.Failure == nil) && k.demand.Waiting+k.demand.Running <= 0 && k.applied == 0
}

// live is how many instances take requests or soon will, as last seen.
func (k *known) live() int {
	if k.snapshot == nil {
		return 0
	}
	return k.snapshot.Count(endpoints.Ready) + k.snapshot.Count(endpoints.Starting)
}

func (p *peer) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run keeps a stream to every replica until ctx ends.
func (c *Client) Run(ctx context.Context) error { return c.set.Run(ctx, c.stream, nil) }

// stream holds one stream until it breaks.
func (c *Client) stream(ctx context.Context, conn *grpc.ClientConn, name, addr string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := peers.Open(ctx, conn, service, method)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(&wire.Frame{Sequence: 1, Reporter: c.cfg.Name, Agent: c.cfg.Agent != nil, Capacity: c.cfg.Capacity}); err != nil {
		return err
	}
	p := &peer{name: name, addr: addr, wake: make(chan struct{}, 1)}
	p.clear()
	defer c.forget(p)
	sent := make(chan struct{})
	go func() { // ends with ctx or a broken stream; what receives sees both
		defer close(sent)
		c.send(ctx, stream, p)
	}()
	for {
		var o wire.Orders
		if err = stream.RecvMsg(&o); err != nil {
			break
		}
		c.claims(p, o.Claims)
		c.orders(o.Orders)
		c.answers(o.Ready)
		c.said(o.Said)
		if o.Learn && c.cfg.Learn != nil {
			c.cfg.Learn()
		}
	}
	cancel()
	<-sent
	return err
}

func (p *peer) clear() {
	p.stats, p.told, p.asks, p.demands, p.snapshots = nil, nil, nil, map[api.RevisionID]endpoints.Demand{}, map[api.RevisionID]*endpoints.Snapshot{}
}

// perFrame bounds the items of one frame, so that none gets near wire.MaxFrame: a snapshot of 1,000 instances has 60 KB.
const perFrame = 5_000

func (c *Client) send(ctx context.Context, stream grpc.ClientStream, p *peer) {
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for sequence := uint64(2); ; {
		alive := false
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-tick.C:
			alive = c.cfg.Agent != nil // a node that says nothing is taken for lost
		}
		for {
			f, more := c.frame(p)
			if f == nil && alive {
				f = &wire.Frame{}
			}
			if f == nil {
				break
			}
			alive = false
			f.Sequence = sequence
			sequence++
			if stream.SendMsg(f) != nil { // the receiving side is told why
				return
			}
			if !more {
				break
			}
		}
	}
}

// maxInstances bounds the instances in the snapshots of one frame.
const maxInstances = 20_000

// frame takes out what waits for p, or as much of it as a frame holds; nil = nothing.
func (c *Client) frame(p *peer) (f *wire.Frame, more bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(p.stats)+len(p.demands)+len(p.snapshots)+len(p.told)+len(p.calls)+len(p.shifts)+len(p.asks) == 0 {
		return nil, false
	}
	f = &wire.Frame{}
	room := maxInstances
	for id, s := range p.snapshots { // instances first: demands are judged by them
		if room <= 0 || len(f.Snapshots) >= perFrame {
			return f, true
		}
		room -= len(s.Instances) + 1
		f.Snapshots = append(f.Snapshots, s)
		delete(p.snapshots, id)
	}
	f.Told, p.told = p.told, nil
	for id, d := range p.demands {
		if len(f.Demands) >= perFrame {
			return f, true
		}
		f.Demands = append(f.Demands, d)
		delete(p.demands, id)
	}
	f.Calls, p.calls = p.calls, nil
	f.Shifts, p.shifts = p.shifts, nil
	f.Asks, p.asks = p.asks, nil
	n := min(len(p.stats), perFrame)
	f.Stats, p.stats = p.stats[:n:n], p.stats[n:]
	return f, len(p.stats) > 0
}

// claims notes who owns what, and tells a new owner all that there is to know.
func (c *Client) claims(p *peer, claims []wire.Claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, claim := range claims {
		o := &c.owners[claim.Shard]
		switch {
		case claim.Epoch == 0 && o.peer == p:
			o.peer = nil
		case claim.Epoch == 0, claim.Epoch < o.epoch: // of the past
		default:
			o.epoch, o.peer = claim.Epoch, p
			p.told = append(p.told, claim)
			for id, k := range c.revisions[claim.Shard] {
				if k.snapshot != nil {
					p.snapshots[id] = k.snapshot
				}
				if k.demand.Waiting+k.demand.Running > 0 && time.Since(k.demand.At) < freshDemand {
					p.demands[id] = k.demand
				}
			}
			p.nudge()
		}
	}
}

// forget is the end of a peer: nobody is told of its shards until somebody claims them.
func (c *Client) forget(p *peer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.owners {
		if c.owners[i].peer == p {
			c.owners[i].peer = nil
		}
	}
	if p.lost > 0 {
		c.cfg.Log.Warn("reports were lost: the autoscaler did not take them in time", "replica", p.name, "reports", p.lost)
	}
}

// orders carries out what the present owner has ordered.
func (c *Client) orders(orders []wire.Order) {
	if c.cfg.Agent == nil {
		return
	}
	for _, o := range orders {
		if c.allow(&o) {
			c.cfg.Agent.Scale(o.Revision, o.N, o.Decided)
		}
	}
}

// allow says whether an order is to be carried out, and notes it.
func (c *Client) allow(o *wire.Order) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	shard := shards.OfNamespace(o.Revision)
	if o.Epoch < c.owners[shard].epoch {
		c.cfg.Log.Info("an order of a former owner is not carried out", "revision", string(o.Revision), "epoch", o.Epoch, "owner_epoch", c.owners[shard].epoch)
		return false
	}
	k := c.revisions[shard][o.Revision]
	if k == nil {
		k = &known{}
		c.revisions[shard][o.Revision] = k
	}
	if o.AtLeast && o.N < max(k.applied, k.live()) {
		return false
	}
	k.applied = o.N
	if k.idle() {
		delete(c.revisions[shard], o.Revision)
	}
	return true
}
