package worker

import (
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestBench measures what attaching costs and fails when a figure of docs/netproxy.md is missed (make bench-tunnel).
func TestBench(t *testing.T) {
	if os.Getenv("THAW_BENCH_TUNNEL") == "" {
		t.Skip("measures: make bench-tunnel")
	}
	const ready = 256
	n := newNode(t, "100.64.0.0/20", ready)
	var held []*os.File
	defer func() {
		for _, f := range held {
			f.Close()
		}
	}()
	full := func() { n.until("full pool", func(s Stats) bool { return s.Ready == ready }) }
	percentiles := func(d []time.Duration) (p50, p99 time.Duration) {
		slices.Sort(d)
		return d[len(d)/2], d[len(d)*99/100]
	}
	// What the machine itself adds: an echo through a slot that has been there for long, in alternation with what is measured.
	held = append(held, n.attach())
	old, err := dial("udp4", held[0])
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	echo := func(c net.Conn) time.Duration {
		began := time.Now()
		if err := ask(c, "x"); err != nil {
			t.Fatal(err)
		}
		return time.Since(began)
	}
	for _, present := range []int{1, 100, 1000} {
		for len(held) < present {
			full()
			for range min(ready/2, present-len(held)) {
				held = append(held, n.attach())
			}
		}
		full()
		cold := n.pool.Stats().Cold
		var took, answered, noise []time.Duration
		for range 200 {
			time.Sleep(5 * time.Millisecond) // faster they do not come one by one; the pool is filled meanwhile
			noise = append(noise, echo(old))
			began := time.Now()
			f := n.attach()
			attach := time.Since(began)
			c, err := dial("udp4", f) // an instance makes its socket itself, and is in its namespace already
			if err != nil {
				t.Fatal(err)
			}
			took, answered = append(took, attach), append(answered, attach+echo(c))
			c.Close()
			f.Close()
		}
		a50, a99 := percentiles(took)
		f50, f99 := percentiles(answered)
		n50, n99 := percentiles(noise)
		t.Logf("%d present: attach p50 %v, p99 %v; with the first answer p50 %v, p99 %v; cold %d; an echo through an old slot p50 %v, p99 %v",
			present, a50, a99, f50, f99, n.pool.Stats().Cold-cold, n50, n99)
		if n99 > time.Millisecond {
			t.Log("the machine is too busy to judge")
			continue
		}
		if a50 > 200*time.Microsecond || a99 > 2*time.Millisecond || f99 > 5*time.Millisecond {
			t.Errorf("%d present: want attach p50 0.2 ms, p99 2 ms, first answer p99 5 ms at most", present)
		}
	}
	full()
	took := make([]time.Duration, 200)
	files := make([]*os.File, len(took))
	cold := n.pool.Stats().Cold
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range took {
		wg.Go(func() {
			<-start
			began := time.Now()
			files[i], _ = n.pool.Attach("default", "blue/web")
			took[i] = time.Since(began)
		})
	}
	close(start)
	wg.Wait()
	for _, f := range files {
		if f == nil {
			t.Fatal("an attach of the burst has failed")
		}
		f.Close()
	}
	p50, p99 := percentiles(took)
	t.Logf("burst of %d: p50 %v, p99 %v; cold %d", len(took), p50, p99, n.pool.Stats().Cold-cold)
	if p99 > 10*time.Millisecond {
		t.Errorf("burst: p99 %v, want at most 10 ms", p99)
	}
	// With the pool empty, what an instance waits for.
	var made []time.Duration
	for range 50 {
		began := time.Now()
		x, err := n.pool.make(true)
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, time.Since(began))
		x.ns.Close()
	}
	p50, p99 = percentiles(made)
	t.Logf("a slot made while an instance waits: p50 %v, p99 %v", p50, p99)
}
