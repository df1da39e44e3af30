package reconcile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/state"
)

// BenchmarkThousandServices reports what 1,000 services cost this package: the memory of the cache, the time until all are
// ready, and the time in which a restart has its table.
func BenchmarkThousandServices(b *testing.B) {
	const n = 1000
	for b.Loop() {
		ctx, cancel := context.WithCancelCause(b.Context())
		mem := state.Memory()
		store := objects.New(mem, time.Now)
		begin := time.Now()
		for i := range n {
			if _, err := store.Create(ctx, api.Services, service(fmt.Sprintf("service-%d", i), "exec:///bin/hello")); err != nil {
				b.Fatal(err)
			}
		}
		img := newResolver()
		run := func(auto bool) (*platform, *Reconcilers, func()) {
			ctx, stop := context.WithCancelCause(ctx)
			p := newPlatform()
			p.auto = auto
			r := New(Config{}, store, p, img)
			p.observe = r.ObserveInstances
			done := make(chan error)
			go func() { done <- r.Run(ctx) }()
			<-r.Synced()
			return p, r, func() { stop(errors.New("end")); <-done }
		}
		p, _, end := run(true)
		for {
			p.mu.Lock()
			hosts := len(p.table.Hosts)
			p.mu.Unlock()
			if hosts == 4*n {
				break
			}
			time.Sleep(time.Millisecond)
		}
		b.ReportMetric(float64(time.Since(begin).Milliseconds()), "ms-until-1000-ready")
		end()

		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		begin = time.Now()
		p, r, end := run(false)
		b.ReportMetric(float64(time.Since(begin).Microseconds())/1000, "ms-restart-to-synced")
		for r.queue.pending() > 0 {
			time.Sleep(time.Millisecond)
		}
		b.ReportMetric(float64(time.Since(begin).Milliseconds()), "ms-restart-to-rest")
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&after)
		if f := os.Getenv("THAW_HEAP"); f != "" {
			w, _ := os.Create(f)
			_ = pprof.WriteHeapProfile(w)
			_ = w.Close()
		}
		b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/n, "B/service")
		if len(p.table.Hosts) != 4*n {
			b.Fatalf("%d hosts", len(p.table.Hosts))
		}
		end()
		runtime.KeepAlive(p)
		cancel(nil)
		if err := mem.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPublish is one change of one route among 1,000.
func BenchmarkPublish(b *testing.B) {
	cfg := Config{}.withDefaults()
	t := newTable()
	entryOf := func(i int, revision string) (name, entry) {
		r := &api.Route{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: fmt.Sprintf("service-%d", i)}}
		all := int64(100)
		return nameOf(r), cfg.hosts(r, []api.TrafficTarget{{RevisionName: revision, Percent: &all}})
	}
	for i := range 1000 {
		t.setRoute(entryOf(i, "a"))
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		t.setRoute(entryOf(7, fmt.Sprint(i)))
		t.publish(func(*routes.Table) {})
	}
}
