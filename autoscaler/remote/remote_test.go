package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/shards"
	"github.com/thawrun/thaw/internal/wire"
)

// replica is a server with a real autoscaler, reachable over loopback.
type replica struct {
	*Server
	addr   string
	reader *sdk.ManualReader
	stop   func()
}

func newReplica(t *testing.T, addr string) *replica {
	t.Helper()
	r := &replica{reader: sdk.NewManualReader()}
	r.Server = NewServer(nil, sdk.NewMeterProvider(sdk.WithReader(r.reader)).Meter("autoscaler"))
	c := autoscaler.DefaultConfig()
	c.StableWindow, c.Tick = 6*time.Second, 200*time.Millisecond
	a := autoscaler.New(c, r.Server)
	r.SetDecider(a)
	var ln net.Listener
	eventually(t, "the address is free", func() (ok bool) {
		var err error
		ln, err = net.Listen("tcp", addr)
		return err == nil
	})
	r.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = a.Run(ctx) })
	running.Go(func() { _ = r.Serve(ctx, func(g *grpc.Server) error { return g.Serve(ln) }) })
	r.stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(r.stop)
	return r
}

func (r *replica) ownAll(epoch int64) {
	for shard := range shards.Count {
		r.Own(shard, epoch)
	}
}

// counted is the value of a counter by its reason.
func (r *replica) counted(t *testing.T, reason string) (n int64) {
	t.Helper()
	var m metricdata.ResourceMetrics
	if err := r.reader.Collect(t.Context(), &m); err != nil {
		t.Fatal(err)
	}
	for _, s := range m.ScopeMetrics {
		for _, x := range s.Metrics {
			sum, ok := x.Data.(metricdata.Sum[int64])
			for _, p := range sum.DataPoints {
				if v, _ := p.Attributes.Value("reason"); ok && v.AsString() == reason {
					n += p.Value
				}
			}
		}
	}
	return n
}

// node is an agent whose instances are ready at once.
type node struct {
	client *Client
	mu     sync.Mutex
	count  int
	orders []int
	serial uint64
	slow   bool // instances stay starting until getReady
	room   int  // for instances; 0 = any number
	full   bool // it has been asked for more
}

func (n *node) Scale(id api.RevisionID, want int, _ time.Time) {
	n.mu.Lock()
	n.count, n.full = want, n.room > 0 && want > n.room
	if n.full {
		n.count = n.room
	}
	n.orders = append(n.orders, want)
	n.mu.Unlock()
	n.observe(id)
}

func (n *node) observe(id api.RevisionID) {
	n.mu.Lock()
	n.serial++
	s := &endpoints.Snapshot{Revision: id, Sequence: n.serial, Desired: n.orders[len(n.orders)-1]}
	if n.full {
		s.Failure = &endpoints.Failure{Reason: reasonNodeFull, At: time.Now()}
	}
	state := endpoints.Ready
	if n.slow {
		state = endpoints.Starting
	}
	for i := range n.count {
		s.Instances = append(s.Instances, endpoints.Instance{ID: fmt.Sprint(i), Revision: id, State: state})
	}
	n.mu.Unlock()
	n.client.Observe(s)
}

// getReady is the end of being slow.
func (n *node) getReady() {
	n.mu.Lock()
	n.slow = false
	n.mu.Unlock()
	n.observe(rev.ID())
}

// report is a tenth of a second's load of 7 for each instance.
func (n *node) report() {
	n.mu.Lock()
	var stats []endpoints.Stat
	for i := range n.count {
		stats = append(stats, endpoints.Stat{Revision: rev.ID(), Source: fmt.Sprint(i), Time: time.Now(), Concurrency: 0.7})
	}
	n.mu.Unlock()
	n.client.Report(stats)
}

func (n *node) has() int { n.mu.Lock(); defer n.mu.Unlock(); return n.count }

// lowest is the smallest order since the i-th.
func (n *node) since(i int) (lowest, next int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	lowest = n.count
	for _, o := range n.orders[i:] {
		lowest = min(lowest, o)
	}
	return lowest, len(n.orders)
}

// heard says whether there was an order for want since the i-th; the owner's own decisions may follow at once.
func (n *node) heard(i, want int) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Contains(n.orders[i:], want)
}

func newNode(t *testing.T, replicas ...*replica) *node {
	n := &node{}
	n.client = NewClient(ClientConfig{Name: "node", Agent: n})
	members := map[string]string{}
	for i, r := range replicas {
		members[fmt.Sprint(i)] = r.addr
	}
	n.client.SetMembers(members)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.client.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return n
}

var rev = func() *api.Revision {
	r := &api.Revision{ObjectMeta: api.ObjectMeta{Namespace: "default", Name: "fn-00001"}}
	limit := int64(10)
	r.Spec.ContainerConcurrency = &limit
	r.Status.Conditions.Set(time.Now(), api.ConditionContainerHealthy, api.True, "", "")
	return r
}()

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("not in time: " + what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// warm has eight instances running under a first owner.
func warm(t *testing.T) (one, two *replica, n *node) {
	one, two = newReplica(t, "127.0.0.1:0"), newReplica(t, "127.0.0.1:0")
	n = newNode(t, one, two)
	for _, r := range []*replica{one, two} {
		r.SetRevision(rev)
	}
	one.ownAll(1)
	n.client.Demand(endpoints.Demand{Revision: rev.ID(), Waiting: 56, At: time.Now()})
	eventually(t, "eight instances", func() bool { return n.has() == 8 })
	n.report()
	eventually(t, "both are connected", func() bool {
		for _, r := range []*replica{one, two} {
			r.mu.Lock()
			connected := len(r.links) == 1
			r.mu.Unlock()
			if !connected {
				return false
			}
		}
		return true
	})
	return one, two, n
}

// A new owner finds eight instances and one waiting request: it takes none away, before it has the snapshot and after.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	one, two, n := warm(t)
	one.stop()
	n.client.Demand(endpoints.Demand{Revision: rev.ID(), Waiting: 1, Running: 50, At: time.Now()}) // nobody is there to hear it
	two.ownAll(2)
	for range 12 { // twice the ticks in which a wrong decision would come
		n.report()
		time.Sleep(100 * time.Millisecond)
	}
	if lowest, _ := n.since(0); lowest < 8 || n.has() != 8 {
		t.Errorf("orders %v", n.orders)
	}
	n.client.Demand(endpoints.Demand{Revision: rev.ID(), Waiting: 20, Running: 57, At: time.Now()})
	eventually(t, "the new owner decides", func() bool { return n.has() == 11 })
}

// The same with the mechanisms off: the new owner takes itself for one who has seen all instances, and nobody tells it of them.
func TestTakeOverUnprotected(t *testing.T) {
	t.Parallel()
	one, two, n := warm(t)
	one.stop()
	shard := shards.OfNamespace(rev.ID())
	eventually(t, "the stream of the first one has ended", func() bool {
		n.client.mu.Lock()
		defer n.client.mu.Unlock()
		return n.client.owners[shard].peer == nil
	})
	n.client.mu.Lock()
	delete(n.client.revisions[shard], rev.ID())
	n.client.mu.Unlock()
	two.mu.Lock()
	two.nodes.named["node"].told[shard] = 2
	two.mu.Unlock()
	n.client.Demand(endpoints.Demand{Revision: rev.ID(), Waiting: 1, At: time.Now()})
	two.ownAll(2)
	eventually(t, "instances are taken away", func() bool { return n.has() == 1 })
}

// An order that says "at least" takes nothing away; neither does one of a former owner. The same orders without that are carried out.
func TestOrdersOfThePast(t *testing.T) {
	t.Parallel()
	one, two, n := warm(t)
	two.ownAll(2) // the first one does not know yet
	eventually(t, "the claim is heard", func() bool {
		n.client.mu.Lock()
		defer n.client.mu.Unlock()
		return n.client.owners[shards.OfNamespace(rev.ID())].epoch == 2
	})
	_, i := n.since(0)
	one.Scale(rev.ID(), 1, time.Now())
	for _, r := range []*replica{one, two} { // what follows comes after it
		r.Own(0, 1)
	}
	two.mu.Lock()
	two.nodes.named["node"].told[shards.OfNamespace(rev.ID())] = 0
	two.mu.Unlock()
	two.Scale(rev.ID(), 2, time.Now()) // at least
	two.Scale(rev.ID(), 9, time.Now())
	eventually(t, "nine", func() bool { return n.heard(i, 9) })
	time.Sleep(50 * time.Millisecond) // the order of the first one travels on another stream
	if lowest, _ := n.since(i); lowest < 8 {
		t.Errorf("orders %v", n.orders[i:])
	}
	two.mu.Lock()
	two.nodes.named["node"].told[shards.OfNamespace(rev.ID())] = 2
	two.mu.Unlock()
	two.Scale(rev.ID(), 2, time.Now())
	eventually(t, "two", func() bool { return n.heard(i, 2) })
	for shard := range shards.Count {
		one.Own(shard, 3)
	}
	eventually(t, "the first one is told", func() bool {
		one.mu.Lock()
		defer one.mu.Unlock()
		return one.nodes.named["node"].told[shards.OfNamespace(rev.ID())] == 3
	})
	one.Scale(rev.ID(), 1, time.Now())
	eventually(t, "one", func() bool { return n.heard(i, 1) })
}

// A replica that ends and comes back at its address is found again, and told everything.
func TestReconnect(t *testing.T) {
	t.Parallel()
	one, _, n := warm(t)
	one.stop()
	again := newReplica(t, one.addr)
	again.SetRevision(rev)
	again.ownAll(5)
	eventually(t, "the new one has seen the instances", func() bool {
		again.mu.Lock()
		defer again.mu.Unlock()
		return again.nodes.seen.Part(rev.ID(), "node") != nil
	})
	n.report()
	n.client.Demand(endpoints.Demand{Revision: rev.ID(), Waiting: 90, At: time.Now()})
	eventually(t, "it decides", func() bool { return n.has() == 13 })
}

// A removed revision loses its instances, whatever was seen of it.
func TestRemove(t *testing.T) {
	t.Parallel()
	one, _, n := warm(t)
	one.RemoveRevision(rev.ID())
	eventually(t, "nothing is left", func() bool { return n.has() == 0 })
}

// raw is a reporter that says what it is told.
func raw(t *testing.T, r *replica) grpc.ClientStream {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodec(wire.Codec{})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/"+service+"/"+method)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Frames that are repeated, missing or out of order end their stream and are counted; what they say does not count.
func TestSequence(t *testing.T) {
	t.Parallel()
	for name, sequences := range map[string][]uint64{"repeated": {1, 2, 2}, "gap": {1, 3}, "back": {1, 2, 1}, "no beginning": {2}} {
		t.Run(name, func(t *testing.T) {
			r := newReplica(t, "127.0.0.1:0")
			r.SetRevision(rev)
			r.ownAll(1)
			s := raw(t, r)
			for i, n := range sequences {
				f := &wire.Frame{Sequence: n, Reporter: "x", Agent: true}
				if i == len(sequences)-1 {
					f.Demands = []endpoints.Demand{{Revision: rev.ID(), Waiting: 70, At: time.Now()}}
				}
				if err := s.SendMsg(f); err != nil {
					t.Fatal(err)
				}
			}
			var err error
			for err == nil {
				var o wire.Orders
				if err = s.RecvMsg(&o); err == nil && len(o.Orders) > 0 {
					t.Errorf("it was decided: %+v", o.Orders)
				}
			}
			if n := r.counted(t, "sequence"); n != 1 && name != "no beginning" {
				t.Errorf("%d counted", n)
			}
		})
	}
}

// What is about shards of others is not taken, and counted.
func TestForeign(t *testing.T) {
	t.Parallel()
	r := newReplica(t, "127.0.0.1:0")
	r.SetRevision(rev)
	r.Own((shards.OfNamespace(rev.ID())+1)%shards.Count, 1)
	s := raw(t, r)
	for i, f := range []*wire.Frame{{Reporter: "x", Agent: true}, {
		Stats:     []endpoints.Stat{{Revision: rev.ID(), Source: "x", Activator: true, Time: time.Now(), Concurrency: 100}},
		Demands:   []endpoints.Demand{{Revision: rev.ID(), Waiting: 100, At: time.Now()}},
		Snapshots: []*endpoints.Snapshot{{Revision: rev.ID()}},
	}} {
		f.Sequence = uint64(i + 1)
		if err := s.SendMsg(f); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "counted", func() bool { return r.counted(t, "foreign") == 3 })
	if r.nodes.seen.Part(rev.ID(), "x") != nil {
		t.Error("a foreign snapshot was noted")
	}
}

// Garbage on the port, below and above gRPC, ends its own connection and nothing else.
func TestGarbageOnThePort(t *testing.T) {
	t.Parallel()
	r := newReplica(t, "127.0.0.1:0")
	r.SetRevision(rev)
	r.ownAll(1)
	random := rand.NewChaCha8([32]byte{1})
	for range 50 {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1+rand.IntN(4000))
		_, _ = random.Read(b)
		_, _ = c.Write(b)
		c.Close()
	}
	conn, err := grpc.NewClient("passthrough:///"+r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodec(bytesCodec{})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 50 {
		s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/"+service+"/"+method)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, rand.IntN(200))
		_, _ = random.Read(b)
		_ = s.SendMsg(b)
		_ = s.CloseSend()
		for err == nil {
			var out []byte
			err = s.RecvMsg(&out)
		}
	}
	n := newNode(t, r)
	n.client.Demand(endpoints.Demand{Revision: rev.ID(), Waiting: 7, At: time.Now()})
	eventually(t, "it still decides", func() bool { return n.has() == 1 })
}

type bytesCodec struct{}

func (bytesCodec) Name() string                  { return "thaw" }
func (bytesCodec) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (bytesCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = b
	return nil
}

// Of many orders for a revision the last one counts, those of many revisions go out in messages of a bounded size and none is lost, and
// claims do not pile up before somebody who does not read.
func TestLinkIsBounded(t *testing.T) {
	const revisions, claims = 3 * maxOrders, 100_000
	l := &link{wake: make(chan struct{}, 1)}
	for i := range 5 * revisions {
		l.say(func(o *wire.Orders) {
			o.Orders = append(o.Orders, wire.Order{Revision: api.RevisionID(fmt.Sprint(i % revisions)), N: i})
		})
	}
	for i := range claims {
		l.say(func(o *wire.Orders) {
			o.Claims = append(o.Claims, wire.Claim{Shard: i % shards.Count, Epoch: int64(i)})
		})
	}
	last := map[api.RevisionID]int{}
	for more := true; more; {
		var o wire.Orders
		o, more = l.take()
		if len(o.Orders) > maxOrders || len(o.Claims) > maxClaims {
			t.Fatalf("a message of %d orders and %d claims", len(o.Orders), len(o.Claims))
		}
		for _, x := range o.Orders {
			last[x.Revision] = x.N
		}
		for i, c := range o.Claims[max(0, len(o.Claims)-shards.Count):] {
			if want := int64(claims - shards.Count + i); c.Epoch != want {
				t.Fatalf("the last claims are not the newest ones: %d, want %d", c.Epoch, want)
			}
		}
	}
	if len(last) != revisions {
		t.Errorf("orders of %d revisions, want %d", len(last), revisions)
	}
	for id, n := range last {
		if want := 4*revisions + number(id); n != want {
			t.Fatalf("%s: %d, want the last one, %d", id, n, want)
		}
	}
}

func number(id api.RevisionID) (n int) {
	_, _ = fmt.Sscan(string(id), &n)
	return n
}

// A reporter that has said all and reads nothing does not hold its replica's end for ever.
func TestDeafReporter(t *testing.T) {
	s := NewServer(nil, nil)
	s.SetDecider(&nobody{})
	l := deaf{ctx: t.Context(), frames: make(chan *wire.Frame, 1)}
	l.frames <- &wire.Frame{Sequence: 1, Reporter: "deaf", Agent: true}
	close(l.frames)
	s.Own(0, 1) // there is something to say to it
	ended := make(chan error, 1)
	go func() { ended <- s.handle(nil, &l) }()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("still there")
	}
	if len(s.links) != 0 {
		t.Error("its link is still there")
	}
}

// deaf is a stream whose other end never reads.
type deaf struct {
	grpc.ServerStream
	ctx    context.Context
	frames chan *wire.Frame
}

func (d *deaf) Context() context.Context { return d.ctx }
func (d *deaf) SendMsg(any) error        { <-d.ctx.Done(); return d.ctx.Err() }

func (d *deaf) RecvMsg(m any) error {
	f, ok := <-d.frames
	if !ok {
		return io.EOF
	}
	*m.(*wire.Frame) = *f
	return nil
}

type nobody struct{ Decider }

// heeds is a decider that notes who called whom, and is ready for some shifts.
type heeds struct {
	undecided
	mu     sync.Mutex
	calls  []endpoints.Call
	shifts []endpoints.Shift
}

func (h *heeds) Calls(calls []endpoints.Call) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = append(h.calls, calls...)
}

// Shift says that what gets less than half is ready.
func (h *heeds) Shift(from, to api.RevisionID, weight float64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.shifts = append(h.shifts, endpoints.Shift{From: from, To: to, Weight: weight})
	return weight < 0.5
}

func (h *heeds) heard() (calls, shifts int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.calls), len(h.shifts)
}

// Reporters are asked for who calls whom when that is of use, and then it reaches the owner of both; a shift is asked about until it is
// answered. What is not of one owner is told nobody, and delays nothing.
func TestCallsAndShifts(t *testing.T) {
	t.Parallel()
	r := newReplica(t, "127.0.0.1:0")
	h := &heeds{}
	r.SetDecider(h)
	const caller, callee, elsewhere = "default/a-00001", "default/b-00001", "shop/c-00001"
	r.Own(shards.OfNamespace(caller), 1)
	asked := make(chan struct{}, 10)
	c := NewClient(ClientConfig{Name: "router", Learn: func() { asked <- struct{}{} }})
	if !c.Shift(caller, callee, 0.9) {
		t.Error("a shift waits for an owner that nobody knows")
	}
	c.SetMembers(map[string]string{"r": r.addr})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	defer func() { cancel(); <-done }()
	eventually(t, "the owner is known", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.owners[shards.OfNamespace(caller)].peer != nil
	})
	select {
	case <-asked:
		t.Error("asked for calls without need")
	default:
	}
	r.Learn()
	<-asked
	c.Calls([]endpoints.Call{{Caller: caller, Callee: callee, N: 3}, {Caller: elsewhere, Callee: callee, N: 1}, {Caller: caller, Callee: elsewhere, N: 1}})
	eventually(t, "the call is heard", func() bool { n, _ := h.heard(); return n == 1 })
	if h.calls[0] != (endpoints.Call{Caller: caller, Callee: callee, N: 3}) {
		t.Errorf("heard %+v", h.calls)
	}
	eventually(t, "the small shift may be made", func() bool { return c.Shift(caller, callee, 0.1) })
	for range 20 {
		_, before := h.heard()
		if c.Shift(caller, callee, 0.9) {
			t.Fatal("the large shift may be made")
		}
		eventually(t, "it is asked about again", func() bool { _, n := h.heard(); return n > before })
	}
	if !c.Shift(caller, elsewhere, 0.9) {
		t.Error("a shift between owners waits")
	}
}

// Whoever asks hears how a revision scales from the one that owns it, now and after it has changed hands; of nobody, an error.
func TestExplain(t *testing.T) {
	t.Parallel()
	one, two, n := warm(t)
	for name, r := range map[string]*replica{"one": one, "two": two} {
		r.SetExplain(func(id api.RevisionID, frozen int) []byte {
			if id != rev.ID() {
				return nil
			}
			return fmt.Appendf(nil, "%s has %d frozen", name, frozen)
		})
	}
	ask := func(id api.RevisionID) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		text, err := n.client.Explain(ctx, id)
		return string(text), err
	}
	if text, err := ask(rev.ID()); err != nil || text != "one has 0 frozen" {
		t.Errorf("%q, %v", text, err)
	}
	if text, err := ask("default/nobody-00001"); err != nil || text != "" {
		t.Errorf("not known: %q, %v", text, err)
	}
	var all sync.WaitGroup
	for range 500 {
		all.Go(func() {
			if text, err := ask(rev.ID()); err != nil || text == "" {
				t.Errorf("one of many: %q, %v", text, err)
			}
		})
	}
	all.Wait()
	one.stop()
	two.ownAll(2)
	eventually(t, "the next owner explains", func() bool { text, err := ask(rev.ID()); return err == nil && text == "two has 0 frozen" })
	two.ownAll(0)
	eventually(t, "nobody does", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := n.client.Explain(ctx, rev.ID())
		return errors.Is(err, ErrNobody)
	})
}
