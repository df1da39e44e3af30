package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/peers"
	"github.com/thawrun/thaw/internal/shards"
	"github.com/thawrun/thaw/internal/wire"
)

const (
	service = "thaw.autoscaler.v1"
	method  = "Link"
)

// Decider is the autoscaler behind a Server.
type Decider interface {
	SetRevision(*api.Revision)
	RemoveRevision(api.RevisionID)
	Forget(api.RevisionID)
	Observe(*endpoints.Snapshot)
	Demand(endpoints.Demand)
	Report([]endpoints.Stat)
	Calls([]endpoints.Call)
	Shift(from, to api.RevisionID, weight float64) (ready bool)
}

// Server is the part of a replica that speaks with reporters, and keeps its autoscaler to the shards that it owns. Its methods may be
// called from any goroutine.
type Server struct {
	log     *slog.Logger
	refused metric.Int64Counter

	mu        sync.Mutex // guards what follows; held while telling decider, which does not call back from there
	decider   Decider
	revisions [shards.Count]map[api.RevisionID]*api.Revision // all that there are
	epochs    [shards.Count]int64                            // 0 = not ours
	links     map[*link]struct{}
	nodes     nodes
	learn     bool // calls are of use
	explain   func(id api.RevisionID, frozen int) []byte
}

// NewServer makes a server; nil log and meter mean none. SetDecider has to be called before anything else.
func NewServer(log *slog.Logger, meter metric.Meter) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if meter == nil {
		meter = noop.NewMeterProvider().Meter("")
	}
	s := &Server{log: log, links: map[*link]struct{}{}, nodes: newNodes()}
	s.refused, _ = meter.Int64Counter("thaw.autoscaler.frames.refused", metric.WithUnit("{item}"),
		metric.WithDescription("What reporters sent and was not taken, by reason: foreign (a shard that is not ours), stranger (one revision too many that nobody has told of) or sequence (a frame out of order, which ends its stream)."))
	for i := range s.revisions {
		s.revisions[i] = map[api.RevisionID]*api.Revision{}
	}
	return s
}

// SetDecider names the autoscaler, which in turn has the server as its Scaler.
func (s *Server) SetDecider(d Decider) { s.decider = d }

// SetExplain names what says how a revision scales: nil if it is not known. It must not call the server. Without, nothing is known.
func (s *Server) SetExplain(f func(id api.RevisionID, frozen int) []byte) { s.explain = f }

// SetRevision tells of a revision, whoever owns it.
func (s *Server) SetRevision(rev *api.Revision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	shard := shards.OfNamespace(rev.ID())
	s.revisions[shard][rev.ID()] = rev
	s.nodes.resize(rev)
	if s.epochs[shard] != 0 {
		s.decider.SetRevision(rev)
	}
}

// RemoveRevision tells that a revision is no more.
func (s *Server) RemoveRevision(id api.RevisionID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	shard := shards.OfNamespace(id)
	delete(s.revisions[shard], id)
	if s.epochs[shard] != 0 {
		s.decider.RemoveRevision(id)
	}
}

// Own tells that a shard is ours since the claim of that epoch, or with 0 that it is not any more.
func (s *Server) Own(shard int, epoch int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.epochs[shard]
	s.epochs[shard] = epoch
	switch {
	case before == 0 && epoch != 0:
		for _, rev := range s.revisions[shard] {
			s.decider.SetRevision(rev)
		}
	case before != 0 && epoch == 0:
		for id := range s.revisions[shard] {
			s.decider.Forget(id)
		}
		s.nodes.forgetShard(shard)
	}
	for l := range s.links {
		if epoch != 0 {
			s.nodes.asks(l, shard)
		}
		l.say(func(o *wire.Orders) { o.Claims = append(o.Claims, wire.Claim{Shard: shard, Epoch: epoch}) })
	}
}

// Learn asks reporters for who calls whom, which is of use where the planner decides. Once asked they go on.
func (s *Server) Learn() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.learn {
		return
	}
	s.learn = true
	for l := range s.links {
		l.say(func(o *wire.Orders) { o.Learn = true })
	}
}

// Again tells the autoscaler of all own revisions once more: its configuration has changed.
func (s *Server) Again() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for shard, epoch := range s.epochs {
		if epoch == 0 {
			continue
		}
		for _, rev := range s.revisions[shard] {
			s.decider.SetRevision(rev)
		}
	}
}

// Scale shares n instances out among the nodes and sends the orders; it makes the server an autoscaler.Scaler.
func (s *Server) Scale(id api.RevisionID, n int, decided time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	shard := shards.OfNamespace(id)
	if s.epochs[shard] == 0 {
		return // a decision that was under way when the shard was lost
	}
	if _, known := s.revisions[shard][id]; !known { // it was removed
		s.nodes.forget(id)
		for l := range s.links {
			if l.agent {
				l.order(wire.Order{Revision: id, Decided: decided, Epoch: s.epochs[shard]})
			}
		}
		return
	}
	sh := s.nodes.share(id, s.revisions[shard][id])
	sh.total, sh.decided = n, decided
	s.spread(id, sh)
}

// Serve answers reporters on a listener until ctx ends; options are those of gRPC, as credentials.
func (s *Server) Serve(ctx context.Context, serve func(*grpc.Server) error, options ...grpc.ServerOption) error {
	return peers.Serve(ctx, service, method, s.handle, serve, options...)
}

// link is one reporter's stream.
type link struct {
	name  string
	agent bool
	wake  chan struct{} // capacity 1

	mu   sync.Mutex  // guards what follows
	out  wire.Orders // not yet sent
	fold int         // number of orders at which it is looked for repetitions; 0 = maxOrders
}

func (l *link) say(add func(*wire.Orders)) {
	l.mu.Lock()
	add(&l.out)
	if len(l.out.Orders) > max(l.fold, maxOrders) { // of each revision the last one counts
		l.out.Orders = latest(l.out.Orders)
		l.fold = 2 * len(l.out.Orders) // so that each order is looked at a few times at most, however many revisions there are
	}
	if claims := l.out.Claims; len(claims) > maxClaims { // a reader that stands still; of each shard the last one counts
		slices.Reverse(claims)
		seen := [shards.Count]bool{}
		claims = slices.DeleteFunc(claims, func(c wire.Claim) bool { was := seen[c.Shard]; seen[c.Shard] = true; return was })
		slices.Reverse(claims)
		l.out.Claims = claims
	}
	if over := len(l.out.Said) - maxSaid; over > 0 {
		l.out.Said = l.out.Said[over:]
	}
	if over := len(l.out.Ready) - maxShifts; over > 0 { // the same; they are asked for again
		l.out.Ready = l.out.Ready[over:]
	}
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// maxOrders is how many orders a message holds: with names of the greatest length it stays below wire.MaxFrame.
const (
	maxOrders = 7_000
	maxClaims = 16 * shards.Count

	// Explanations go in messages of their own.
	maxSaid     = 100
	maxSaidText = 16 << 10
)

func latest(orders []wire.Order) []wire.Order {
	at := map[api.RevisionID]int{}
	out := orders[:0]
	for _, o := range orders {
		if i, ok := at[o.Revision]; ok {
			out[i] = o
			continue
		}
		at[o.Revision] = len(out)
		out = append(out, o)
	}
	return out
}

// take is the next message: all claims, before the orders that may follow from them, and as many orders as one holds.
func (l *link) take() (o wire.Orders, more bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if said := l.out.Said; len(said) > 0 {
		l.out.Said = nil
		return wire.Orders{Said: said}, true
	}
	n := min(len(l.out.Orders), maxOrders)
	o = wire.Orders{Claims: l.out.Claims, Orders: l.out.Orders[:n:n], Learn: l.out.Learn, Ready: l.out.Ready}
	l.out = wire.Orders{Orders: l.out.Orders[n:]}
	if len(l.out.Orders) == 0 {
		l.out.Orders, l.fold = nil, 0
	}
	return o, len(l.out.Orders) > 0
}

func (s *Server) handle(_ any, stream grpc.ServerStream) error {
	var hello wire.Frame
	if err := stream.RecvMsg(&hello); err != nil {
		return err
	}
	if hello.Sequence != 1 || hello.Reporter == "" {
		return status.Error(codes.InvalidArgument, "the first frame has sequence 1 and the reporter's name")
	}
	l := &link{name: hello.Reporter, agent: hello.Agent, wake: make(chan struct{}, 1)}
	s.attach(l, hello.Capacity)
	defer s.detach(l)
	s.log.Info("autoscaler: a reporter is here", "reporter", hello.Reporter, "agent", hello.Agent)

	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	sent := make(chan error, 1)
	go func() { sent <- l.send(ctx, stream) }() // ends with ctx, when the stream is broken, or with handle, which ends the stream
	err := s.listen(l, stream, hello)
	cancel()
	select {
	case last := <-sent:
		err = errors.Join(err, last)
	case <-time.After(time.Second): // a reporter that has said all and reads nothing: what is being sent to it is not waited for
	}
	s.log.Info("autoscaler: a reporter has left", "reporter", hello.Reporter, "error", err)
	return err
}

func (s *Server) attach(l *link, capacity int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.links[l] = struct{}{}
	if l.agent {
		s.join(l, capacity)
	}
	s.claim(l)
	if s.learn {
		l.say(func(o *wire.Orders) { o.Learn = true })
	}
}

// claim tells a reporter what is ours; it answers with all that it knows of it.
func (s *Server) claim(l *link) {
	l.say(func(o *wire.Orders) {
		for shard, epoch := range s.epochs {
			if epoch != 0 {
				s.nodes.asks(l, shard)
				o.Claims = append(o.Claims, wire.Claim{Shard: shard, Epoch: epoch})
			}
		}
	})
}

// order sends one order.
func (l *link) order(o wire.Order) {
	l.say(func(w *wire.Orders) { w.Orders = append(w.Orders, o) })
}

func (s *Server) detach(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.links, l)
}

func (l *link) send(ctx context.Context, stream grpc.ServerStream) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
		}
		for more := true; more; {
			var o wire.Orders
			if o, more = l.take(); len(o.Orders)+len(o.Claims)+len(o.Ready)+len(o.Said) == 0 && !o.Learn {
				break
			}
			if err := stream.SendMsg(&o); err != nil {
				return err
			}
		}
	}
}

// listen passes frames on until the stream ends.
func (s *Server) listen(l *link, stream grpc.ServerStream, f wire.Frame) error {
	for next := f.Sequence; ; next++ {
		if f.Sequence != next {
			s.refuse("sequence", 1)
			return status.Error(codes.Aborted, fmt.Sprintf("frame %d came after %d", f.Sequence, next-1))
		}
		s.take(l, &f)
		if err := stream.RecvMsg(&f); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// take passes on what is about own revisions.
func (s *Server) take(l *link, f *wire.Frame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.agent {
		s.heard(l)
	}
	foreign := 0
	own := func(id api.RevisionID) bool {
		if s.epochs[shards.OfNamespace(id)] == 0 {
			foreign++
			return false
		}
		return true
	}
	for _, sn := range f.Snapshots {
		if own(sn.Revision) && l.agent {
			s.snapshot(l.name, sn)
		}
	}
	if l.agent && len(f.Told) > 0 {
		s.told(l, f.Told)
	}
	for _, d := range f.Demands {
		if own(d.Revision) {
			s.decider.Demand(d)
		}
	}
	stats := f.Stats[:0]
	for _, st := range f.Stats {
		if own(st.Revision) {
			stats = append(stats, st)
		}
	}
	if len(stats) > 0 {
		s.decider.Report(stats)
	}
	calls := slices.DeleteFunc(f.Calls, func(c endpoints.Call) bool { return !own(c.Callee) || !own(c.Caller) })
	if len(calls) > 0 {
		s.decider.Calls(calls)
	}
	for _, sh := range f.Shifts {
		if own(sh.To) && own(sh.From) && s.decider.Shift(sh.From, sh.To, sh.Weight) {
			l.say(func(o *wire.Orders) { o.Ready = append(o.Ready, sh) })
		}
	}
	for _, id := range f.Asks {
		if own(id) {
			said := wire.Said{Revision: id}
			if s.explain != nil {
				frozen := 0
				if sn := s.nodes.seen.Of(id); sn != nil {
					frozen = sn.Count(endpoints.Frozen)
				}
				if text := s.explain(id, frozen); len(text) <= maxSaidText {
					said.Text = text
				}
			}
			l.say(func(o *wire.Orders) { o.Said = append(o.Said, said) })
		}
	}
	if foreign > 0 {
		s.refuse("foreign", foreign)
	}
}

func (s *Server) refuse(reason string, n int) {
	s.refused.Add(context.Background(), int64(n), metric.WithAttributes(attribute.String("reason", reason)))
}
