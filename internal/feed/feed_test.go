package feed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/peers"
	"github.com/thawrun/thaw/internal/wire"
)

const rev api.RevisionID = "default/a-00001"

func snapshot(id api.RevisionID, instances ...string) *endpoints.Snapshot {
	s := &endpoints.Snapshot{Revision: id, Desired: len(instances)}
	for _, in := range instances {
		s.Instances = append(s.Instances, endpoints.Instance{ID: in, Revision: id, State: endpoints.Ready, Addr: "127.0.0.1:1"})
	}
	return s
}

// agent is a server on loopback.
func agentAt(t *testing.T, addr string) (*Server, string, func()) {
	t.Helper()
	var ln net.Listener
	eventually(t, "the address is free", func() (ok bool) {
		var err error
		ln, err = net.Listen("tcp", addr)
		return err == nil
	})
	s := NewServer(nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(ctx, func(g *grpc.Server) error { return g.Serve(ln) })
	}()
	stop := sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return s, ln.Addr().String(), stop
}

// watcher collects what it is told.
type watcher struct {
	*Client
	mu   sync.Mutex
	last map[api.RevisionID]*endpoints.Snapshot
}

func watch(t *testing.T, grace time.Duration, agents map[string]string) *watcher {
	w := &watcher{last: map[api.RevisionID]*endpoints.Snapshot{}}
	w.Client = NewClient(ClientConfig{Name: "w", Grace: grace, Told: func(s *endpoints.Snapshot) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if old := w.last[s.Revision]; old != nil && s.Sequence <= old.Sequence {
			t.Errorf("%s: sequence %d after %d", s.Revision, s.Sequence, old.Sequence)
		}
		w.last[s.Revision] = s
	}})
	w.SetAgents(agents)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = w.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return w
}

func (w *watcher) count(id api.RevisionID) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.last[id]; s != nil {
		return len(s.Instances)
	}
	return 0
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("not in time: " + what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// A watcher puts together what two agents say, before it came and after.
func TestTwoAgents(t *testing.T) {
	t.Parallel()
	a, addrA, _ := agentAt(t, "127.0.0.1:0")
	b, addrB, _ := agentAt(t, "127.0.0.1:0")
	a.Observe(snapshot(rev, "1", "2"))
	w := watch(t, 0, map[string]string{"a": addrA, "b": addrB})
	eventually(t, "two of a", func() bool { return w.count(rev) == 2 && w.Synced("a", "b") })
	b.Observe(snapshot(rev, "3"))
	eventually(t, "one more of b", func() bool { return w.count(rev) == 3 })
	a.Observe(&endpoints.Snapshot{Revision: rev})
	eventually(t, "only that of b", func() bool { return w.count(rev) == 1 })
	for i := range 2 * perFrame { // more than a frame holds
		b.Observe(snapshot(api.RevisionID(fmt.Sprintf("default/r%d", i)), "x"))
	}
	eventually(t, "all of them", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.last) == 2*perFrame+1
	})
}

// What an agent said holds while it is started again; what it does not have any more then is gone.
func TestAgentComesBack(t *testing.T) {
	t.Parallel()
	a, addr, stop := agentAt(t, "127.0.0.1:0")
	a.Observe(snapshot(rev, "1", "2"))
	a.Observe(snapshot("default/b", "3"))
	w := watch(t, time.Minute, map[string]string{"a": addr})
	eventually(t, "all", func() bool { return w.count(rev) == 2 && w.count("default/b") == 1 })
	stop()
	time.Sleep(50 * time.Millisecond) // the break is seen
	if w.count(rev) != 2 {
		t.Error("forgotten at once")
	}
	again, _, _ := agentAt(t, addr)
	again.Observe(snapshot(rev, "1"))
	eventually(t, "what is left", func() bool { return w.count(rev) == 1 && w.count("default/b") == 0 })
}

// An agent that stays away takes its instances along, after the grace.
func TestAgentIsLost(t *testing.T) {
	t.Parallel()
	a, addr, stop := agentAt(t, "127.0.0.1:0")
	a.Observe(snapshot(rev, "1"))
	w := watch(t, 100*time.Millisecond, map[string]string{"a": addr})
	eventually(t, "one", func() bool { return w.count(rev) == 1 })
	stop()
	eventually(t, "none", func() bool { return w.count(rev) == 0 })
}

// One that is no member any more is forgotten at once.
func TestAgentLeaves(t *testing.T) {
	t.Parallel()
	a, addr, _ := agentAt(t, "127.0.0.1:0")
	a.Observe(snapshot(rev, "1"))
	w := watch(t, time.Hour, map[string]string{"a": addr})
	eventually(t, "one", func() bool { return w.count(rev) == 1 })
	w.SetAgents(map[string]string{"b": addr})
	eventually(t, "none of a, one of b", func() bool { return w.Synced("b") && w.count(rev) == 1 })
	w.SetAgents(nil)
	eventually(t, "none", func() bool { return w.count(rev) == 0 })
}

// Frames out of order end their stream and do not count.
func TestSequence(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = peers.Serve(ctx, service, method, func(_ any, s grpc.ServerStream) error {
			var hello wire.Frame
			if err := s.RecvMsg(&hello); err != nil {
				return err
			}
			for _, f := range []*wire.Frame{{Sequence: 1}, {Sequence: 3, Snapshots: []*endpoints.Snapshot{snapshot(rev, "1")}}} {
				if err := s.SendMsg(f); err != nil {
					return err
				}
			}
			<-s.Context().Done()
			return errors.New("over")
		}, func(g *grpc.Server) error { return g.Serve(ln) })
	}()
	t.Cleanup(func() { cancel(); <-done })
	c := NewClient(ClientConfig{Name: "w", Told: func(*endpoints.Snapshot) { t.Error("told of a frame out of order") }})
	conn, err := grpc.NewClient("passthrough:///"+ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodec(wire.Codec{})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := c.stream(t.Context(), conn, "a", ""); err == nil || t.Context().Err() != nil {
		t.Error(err)
	}
}

// A watcher that does not say who it is, or garbage on the port, gets nothing, and others go on.
func TestStrangers(t *testing.T) {
	t.Parallel()
	a, addr, _ := agentAt(t, "127.0.0.1:0")
	for range 20 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nnonsense\x00\xff"))
		c.Close()
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodec(wire.Codec{})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, err := peers.Open(t.Context(), conn, service, method)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendMsg(&wire.Frame{Sequence: 1}); err != nil {
		t.Fatal(err)
	}
	if err := s.RecvMsg(&wire.Frame{}); err == nil {
		t.Error("a watcher without a name is served")
	}
	a.Observe(snapshot(rev, "1"))
	w := watch(t, 0, map[string]string{"a": addr})
	eventually(t, "one", func() bool { return w.count(rev) == 1 })
}
