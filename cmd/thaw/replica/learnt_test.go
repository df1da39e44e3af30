package replica

import (
	"bytes"
	"context"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/autoscaler/remote"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/state"
)

// What is saved of a shard can be loaded, whatever its size, and a shorter one after a longer one leaves nothing of that.
func TestLearntThereAndBack(t *testing.T) {
	s := state.Memory()
	defer s.Close()
	l := newLearnt(s, slog.New(slog.DiscardHandler))
	random := rand.NewChaCha8([32]byte{})
	for _, size := range []int{1, 3*chunk + 17, chunk, 2 * chunk, 5} {
		b := make([]byte, size)
		_, _ = random.Read(b)
		l.save(7, []byte("an older one"))
		l.save(7, b)
		l.flush(t.Context())
		if !bytes.Equal(l.load(t.Context(), 7), b) {
			t.Errorf("%d bytes do not come back", size)
		}
	}
	if b := l.load(t.Context(), 8); b != nil {
		t.Errorf("of a shard that nothing was learnt of there are %d bytes", len(b))
	}
	l.save(7, make([]byte, maxChunks*chunk+1))
	l.flush(t.Context())
	if n := len(l.load(t.Context(), 7)); n != 5 {
		t.Errorf("what is too much has left %d bytes of what was there", n)
	}
}

// What a replica has learnt of a revision is there for the one after it. Under Knative's rules there is nothing to learn.
func TestLearntOutlivesTheReplica(t *testing.T) {
	for _, planner := range []string{autoscaler.PlannerPredictive, autoscaler.PlannerKPA} {
		s := state.Memory()
		rev := &api.Revision{ObjectMeta: api.ObjectMeta{Namespace: "default", Name: "fn-00001", Annotations: map[string]string{api.AnnotationPlanner: planner}}}
		rev.Status.Conditions.Set(time.Now(), api.ConditionContainerHealthy, api.True, "", "")
		if _, err := objects.New(s, time.Now).Create(t.Context(), api.Revisions, rev); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ran, addr := make(chan error, 1), make(chan string, 1)
		go func() {
			ran <- Run(ctx, Config{Store: s, Name: "one", Listen: "127.0.0.1:0", Scaling: autoscaler.DefaultConfig()}, func(a string) { addr <- a })
		}()
		n := &node{count: map[api.RevisionID]int{rev.ID(): 1}, load: map[api.RevisionID]float64{rev.ID(): 3}, orders: map[api.RevisionID][]order{}}
		n.client = remote.NewClient(remote.ClientConfig{Name: "node", Agent: n})
		n.client.SetMembers(map[string]string{"one": <-addr})
		reporting, quiet := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = n.client.Run(reporting) }()
		go n.run(reporting)
		n.observe(rev.ID())
		n.client.Demand(endpoints.Demand{Revision: rev.ID(), Waiting: 3, At: time.Now()})
		l := newLearnt(s, slog.New(slog.DiscardHandler))
		time.Sleep(7 * time.Second) // three decisions with load
		stop()
		if err := <-ran; err != nil {
			t.Error(err)
		}
		quiet()
		<-done
		if b := l.load(t.Context(), part(rev.ID())); bytes.Contains(b, []byte(rev.ID())) != (planner == autoscaler.PlannerPredictive) {
			t.Errorf("%s: %d bytes are kept, of the revision: %v", planner, len(b), bytes.Contains(b, []byte(rev.ID())))
		}
		s.Close()
	}
}
