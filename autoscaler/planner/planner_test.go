package planner

import (
	"math"
	"math/rand/v2"
	"syscall"
	"testing"
	"unsafe"
)

// world drives one planner with made-up loads, second by second; a function has instances as decided.
type world struct {
	t      *testing.T
	p      *Planner
	now    float64
	target map[ID]int
	wake   map[ID]float64
	warm   map[ID]int // seconds with an instance
	misses map[ID]int // seconds with a need that began without an instance
	wakes  int        // decisions without an observation
}

func newWorld(t *testing.T, c Config) *world {
	return &world{t: t, p: New(c), target: map[ID]int{}, wake: map[ID]float64{}, warm: map[ID]int{}, misses: map[ID]int{}}
}

func (w *world) add() ID {
	id := w.p.Add(1)
	w.wake[id] = math.Inf(1)
	return id
}

// second plays one second in which the functions have the given concurrency.
func (w *world) second(load map[ID]float64) {
	w.now++
	for id := ID(0); int(id) < len(w.wake); id++ {
		c := load[id]
		if c > 0 && w.target[id] == 0 {
			w.misses[id]++
		}
		if w.target[id] > 0 {
			w.warm[id]++
		}
		if c > 0 || w.target[id] > 0 {
			l := Load{Seconds: []float64{c}}
			if c > 0 {
				l.Arrivals, l.Done, l.Service = max(1, int(c)), max(1, int(c)), 0.1
			}
			w.p.Observe(w.now, id, &l)
		} else if w.now < w.wake[id] {
			continue
		} else {
			w.wakes++
		}
		w.decide(id)
	}
	for _, id := range w.p.Called() {
		w.decide(id)
	}
}

func (w *world) decide(id ID) {
	d := w.p.Decide(w.now, id)
	if d.Target < 0 || !(d.Wake > w.now-1) {
		w.t.Fatalf("at %v function %d: %+v", w.now, id, d)
	}
	w.target[id], w.wake[id] = d.Target, d.Wake
}

func (w *world) idle(seconds int) {
	for range seconds {
		w.second(nil)
	}
}

// A timer is started just before its time, and costs a few seconds of each period instead of all of it.
func TestTimer(t *testing.T) {
	w := newWorld(t, DefaultConfig())
	f := w.add()
	run := func(periods int) {
		for range periods {
			w.second(map[ID]float64{f: 0.1})
			w.idle(299)
		}
	}
	run(10)
	w.misses[f], w.warm[f] = 0, 0
	run(20)
	if w.misses[f] > 0 {
		t.Errorf("%d of 20 runs found no instance", w.misses[f])
	}
	if share := float64(w.warm[f]) / (20 * 300); share > 0.05 {
		t.Errorf("an instance was there for %.0f %% of the time", share*100)
	}
}

// A function that is never seen again is given up, and one that comes at random is kept as its value says.
func TestValue(t *testing.T) {
	warm, misses := map[float64]int{}, map[float64]int{}
	for _, value := range []float64{10, 200, 4000} {
		w := newWorld(t, Config{Value: value, StartCost: defaultStartCost})
		f := w.add()
		rng := rand.New(rand.NewPCG(1, 2))
		for range 200 {
			w.second(map[ID]float64{f: 0.2})
			w.idle(1 + int(rng.ExpFloat64()*120))
		}
		warm[value], misses[value] = w.warm[f], w.misses[f]
		w.idle(5 * 3600)
		if w.target[f] != 0 {
			t.Errorf("value %v: an instance after five idle hours", value)
		}
	}
	if !(misses[10] > 2*misses[200] && misses[200] > misses[4000]) || !(warm[10] < warm[200] && warm[200] < warm[4000]) {
		t.Errorf("misses %v, warm seconds %v: a higher value must buy fewer misses with more time", misses, warm)
	}
}

// A callee whose calls come seconds after its caller's request is there when they come, though it was cold when the caller was called.
// Without the call graph (nobody tells of calls) it is not.
func TestCalls(t *testing.T) {
	misses := func(tell bool) int {
		w := newWorld(t, Config{Value: 60, StartCost: 1}) // so low that nothing is kept for long
		caller, callee := w.add(), w.add()
		rng := rand.New(rand.NewPCG(3, 4))
		for i := range 40 {
			w.second(map[ID]float64{caller: 1})
			w.second(nil)
			if tell {
				w.p.Call(w.now+1, caller, callee, 1)
			}
			w.second(map[ID]float64{callee: 0.5})
			w.idle(400 + rng.IntN(2000))
			if i == 19 {
				clear(w.misses)
			}
		}
		return w.misses[callee]
	}
	with, without := misses(true), misses(false)
	if with > 2 || without < 15 {
		t.Errorf("of 20 calls %d found no instance when calls are told, %d when they are not", with, without)
	}
}

// Before an announced shift the new version gets instances for its share, and loses them when nothing comes.
func TestShift(t *testing.T) {
	w := newWorld(t, DefaultConfig())
	old, next := w.add(), w.add()
	for range 120 {
		w.second(map[ID]float64{old: 7.5})
	}
	if w.decide(next); w.target[next] != 0 {
		t.Fatalf("the new version has %d instances before anything was announced", w.target[next])
	}
	w.p.Shift(w.now, w.now+10, old, next, 0.5)
	w.decide(next)
	for range 10 {
		w.second(map[ID]float64{old: 7.5})
	}
	if w.target[next] != 4 {
		t.Errorf("the new version has %d instances when half of 8 instances' load is shifted to it, want 4", w.target[next])
	}
	w.idle(3600)
	if w.target[next] > 1 {
		t.Errorf("%d instances an hour after a shift that brought no request", w.target[next])
	}
}

// A steady stream of short requests is given a reserve for its spread, and no more than a few instances of it. The same number of requests
// in bursts is left to the levels, which have seen how far bursts go.
func TestStream(t *testing.T) {
	run := func(burst int) (stream int, target int) {
		p := New(DefaultConfig())
		f := p.Add(1)
		rng := rand.New(rand.NewPCG(5, 6))
		for now := 1.0; now < 4000; now++ {
			n := poisson(rng, 20/float64(burst)) * burst
			c := float64(poisson(rng, 4))
			if burst > 1 {
				c = float64(n) / 5
			}
			// A start takes so long that waits look cheap beside it: the cost alone would speak for the stream.
			p.Observe(now, f, &Load{Seconds: []float64{c}, Arrivals: n, Done: n, Running: int(c), Service: 0.2, Starts: []float64{float64(burst)}})
			d := p.Decide(now, f)
			if now > 2000 && d.Why&WhyStream != 0 {
				stream++
			}
			target = d.Target
		}
		return stream, target
	}
	if stream, target := run(1); stream < 1900 || target < 7 || target > 12 {
		t.Errorf("a steady stream: %d of 2000 decisions by its spread, %d instances for a mean of 4", stream, target)
	}
	if stream, target := run(20); stream > 0 || target < 12 {
		t.Errorf("bursts of 20: %d of 2000 decisions by the spread of a stream, %d instances for 4 that a burst needs", stream, target)
	}
}

func poisson(rng *rand.Rand, mean float64) int {
	n := 0
	for x := rng.ExpFloat64(); x < mean; x += rng.ExpFloat64() {
		n++
	}
	return n
}

// Steady state allocates nothing.
func TestAllocations(t *testing.T) {
	p := New(DefaultConfig())
	f, g := p.Add(1), p.Add(1)
	l := Load{Seconds: []float64{2.5}, Arrivals: 12, Done: 12, Running: 2, Service: 0.2}
	now := 0.0
	step := func() {
		now++
		l.Seconds[0] = 0.5 + math.Mod(now, 7)
		p.Call(now, f, g, 1)
		p.Observe(now, f, &l)
		p.Decide(now, f)
		for _, id := range p.Called() {
			p.Decide(now, id)
		}
		p.Decide(now, g)
	}
	for range 5000 {
		step()
	}
	if n := testing.AllocsPerRun(1000, step); n != 0 {
		t.Errorf("%v allocations for one observation and decision", n)
	}
}

// An idle function keeps at most 512 bytes, whatever it did before.
func TestIdleBytes(t *testing.T) {
	w := newWorld(t, DefaultConfig())
	f := w.add()
	for range maxEdges {
		callee := w.add()
		w.p.Call(1, f, callee, 1)
	}
	for range 100 {
		w.second(map[ID]float64{f: 20})
	}
	if len(w.p.fns[f].levels) < 20 || w.p.fns[f].stream == nil {
		t.Fatal("the function has no state that could be given back")
	}
	w.idle(6 * 3600)
	if n := w.p.bytes(f); n > 512 {
		t.Errorf("an idle function takes %d bytes", n)
	} else {
		t.Logf("%d bytes", n)
	}
}

func (p *Planner) bytes(id ID) int {
	f := &p.fns[id]
	n := int(unsafe.Sizeof(*f)) + cap(f.levels)*int(unsafe.Sizeof(level{})) + cap(f.edges)*int(unsafe.Sizeof(edge{}))
	if f.stream != nil {
		n += int(unsafe.Sizeof(stream{}))
	}
	return n
}

func TestSnapshot(t *testing.T) {
	w := newWorld(t, DefaultConfig())
	f := w.add()
	rng := rand.New(rand.NewPCG(7, 8))
	for range 300 {
		w.second(map[ID]float64{f: 3 * rng.Float64()})
		w.idle(rng.IntN(200))
	}
	b, prior := w.p.AppendSnapshot(nil, f), w.p.AppendPrior(nil)
	if len(b) > MaxSnapshot {
		t.Errorf("%d bytes, more than %d", len(b), MaxSnapshot)
	}
	q := New(DefaultConfig())
	g := q.Add(1)
	fresh := q.Decide(w.now, g)
	if err := q.RestorePrior(prior); err != nil {
		t.Fatal(err)
	}
	if err := q.Restore(w.now, g, b); err != nil {
		t.Fatal(err)
	}
	a, c := w.p.Decide(w.now+60, f), q.Decide(w.now+60, g)
	if a.Target != c.Target || a.Wake != c.Wake || fresh.Target == c.Target && fresh.Wake == c.Wake {
		t.Errorf("before the restart %+v, after it %+v, without a snapshot %+v", a, c, fresh)
	}
	for n := range b {
		if err := q.Restore(w.now, g, b[:n]); err == nil {
			t.Fatalf("took the first %d of %d bytes", n, len(b))
		}
	}
	if err := q.Restore(w.now-3600, g, b); err == nil {
		t.Error("took a snapshot from the future")
	}
	b[0]++
	if err := q.Restore(w.now, g, b); err == nil {
		t.Error("took a snapshot of another version")
	}
}

// Nonsense changes nothing: the same decisions come as without it.
func TestNonsense(t *testing.T) {
	p, q := New(DefaultConfig()), New(DefaultConfig())
	f, g := p.Add(1), q.Add(1)
	bad := []float64{math.NaN(), math.Inf(-1), -1}
	for now := 1.0; now < 500; now++ {
		l := Load{Seconds: []float64{math.Mod(now, 9)}, Arrivals: 3, Done: 3, Service: 0.5, Starts: []float64{1}}
		p.Observe(now, f, &l)
		q.Observe(now, g, &l)
		b := bad[int(now)%len(bad)]
		q.Observe(now, g, &Load{Seconds: []float64{b}, Service: b, Starts: []float64{b}})
		q.Observe(now-300, g, &Load{Seconds: []float64{5}}) // late
		if a, b := p.Decide(now, f), q.Decide(now, g); a.Target != b.Target {
			t.Fatalf("at %v: %+v, with nonsense %+v", now, a, b)
		}
	}
	for _, c := range []Config{{}, {Value: -1}, {Value: math.NaN()}, {Value: math.Inf(1)}, {Value: 1, StartCost: -1}, {Value: 1, StartCost: math.NaN()}} {
		if c.Validate() == nil {
			t.Errorf("%+v is taken", c)
		}
	}
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
}

// Numbers of removed functions are used again, and nothing of the one before is left.
func TestRemove(t *testing.T) {
	w := newWorld(t, DefaultConfig())
	f := w.add()
	for range 50 {
		w.second(map[ID]float64{f: 3})
	}
	w.p.Remove(f)
	w.p.Remove(f)
	if g := w.p.Add(1); g != f || w.p.Decide(w.now, g).Target != 0 {
		t.Errorf("function %d after %d was removed: %+v", g, f, w.p.Decide(w.now, g))
	}
}

func FuzzRestore(f *testing.F) {
	p := New(DefaultConfig())
	id := p.Add(1)
	p.Observe(5, id, &Load{Seconds: []float64{2.5}, Arrivals: 1})
	f.Add(p.AppendSnapshot(nil, id))
	f.Add(p.AppendPrior(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := New(DefaultConfig())
		id := p.Add(1)
		if p.Restore(10, id, b) != nil && p.RestorePrior(b) != nil {
			return
		}
		for now := 10.0; now < 100; now++ {
			p.Observe(now, id, &Load{Seconds: []float64{1.5}, Arrivals: 1})
			if d := p.Decide(now, id); d.Target < 0 || d.Target > snapshotLevels+2 || math.IsNaN(d.Wake) {
				t.Fatalf("%+v", d)
			}
		}
	})
}

// The plan is never dearer than any simple keep-alive, by the hazards that it was made from.
func TestPlanIsCheapest(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 10))
	for range 200 {
		var h hazards
		var o odds
		for i := range o {
			o[i] = float32(rng.Float64() * rng.Float64())
		}
		pr := price{miss: float32(10 + 2000*rng.Float64()), start: float32(30 * rng.Float64())}
		best := expectedCost(h.plan(&o, pr), &o, pr)
		for keep := 0; keep <= bins; keep++ {
			w := warmth(1)<<keep - 1
			if c := expectedCost(w, &o, pr); c < best-0.01*best-0.01 {
				t.Fatalf("keeping for %d bins costs %v, the plan %v", keep, c, best)
			}
		}
	}
}

func expectedCost(w warmth, o *odds, pr price) float64 {
	total, alive := 0.0, 1.0
	has := true // with the instance of the spell before
	for i := range bins {
		p := float64(o[i])
		if w.at(i) {
			if !has {
				total += alive * float64(pr.start)
			}
			total += alive * float64(edges[i+1]-edges[i]) * (1 - p/2)
		} else {
			total += alive * p * float64(pr.miss)
		}
		has = w.at(i)
		alive *= 1 - p
	}
	return total
}

// BenchmarkDecide is one function's second of wild load: an observation and a decision, and the decision alone. On a machine that
// others use the time that counts is that of the processor, cpu-ns/op.
func BenchmarkDecide(b *testing.B) {
	const functions = 1000
	loads := make([]Load, 4096)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range loads {
		c := rng.ExpFloat64() * 1.5
		if rng.IntN(3) == 0 {
			c = 0
		}
		loads[i] = Load{Seconds: []float64{c}, Arrivals: int(c * 5), Done: int(c * 5), Running: int(c), Service: 0.2}
	}
	p := New(DefaultConfig())
	for range functions {
		p.Add(1)
	}
	n, now := 0, 0.0
	observe := func() {
		if n%functions == 0 {
			now++
		}
		p.Observe(now, ID(n%functions), &loads[(n*31+n/functions*7)%len(loads)])
		p.Decide(now, ID(n%functions))
		n++
	}
	for range 200 * functions {
		observe()
	}
	decide := func() {
		p.Decide(now+0.5, ID(n%functions))
		n++
	}
	for name, step := range map[string]func(){"observe": observe, "only": decide} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			begin := processorTime()
			for b.Loop() {
				step()
			}
			b.ReportMetric(float64(processorTime()-begin)/float64(b.N), "cpu-ns/op")
		})
	}
}

// processorTime is what this process has used of the processor, nanoseconds.
func processorTime() int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
