package networks

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/test/harness"
)

// flows are connections of functions, a number from each.
type flows struct {
	t    *testing.T
	th   *harness.Thaw
	fns  []string          // functions
	each map[string]int    // connections of a function
	seen map[string]string // by function and number: where the server sees it come from
}

func (f *flows) ask(fn string, pause int) []conversation {
	f.t.Helper()
	return talks(f.t, f.th, fn+".default.localhost", fmt.Sprintf("to=%s:7&n=%d&pause=%d", server, f.each[fn], pause))
}

// goOn waits until each connection had another answer, with a pause of so many milliseconds between two, or has ended. It returns how many
// ended, or are seen from elsewhere than at first.
func (f *flows) goOn(pause int) (lost int) {
	f.t.Helper()
	before := map[string][]conversation{}
	for _, fn := range f.fns {
		before[fn] = f.ask(fn, pause)
	}
	for _, fn := range f.fns {
		var now []conversation
		harness.Eventually(f.t, patient, "the connections of "+fn+" go on", func() bool {
			now = f.ask(fn, pause)
			return goneOn(before[fn], now)
		})
		for i, c := range now {
			key := fmt.Sprint(fn, " ", i)
			if f.seen[key] == "" {
				f.seen[key] = c.Last
			}
			if c.Error != "" || c.Last != f.seen[key] {
				f.t.Logf("%s: %+v, was %s", key, c, f.seen[key])
				lost++
			}
		}
	}
	return lost
}

func goneOn(before, now []conversation) bool {
	for i, c := range now {
		if c.Error == "" && c.Answers <= before[i].Answers {
			return false
		}
	}
	return true
}

// stall waits until some connection had no answer for five seconds.
func (f *flows) stall(what string) {
	f.t.Helper()
	type state struct {
		answers int
		since   time.Time
	}
	last := map[string]state{}
	harness.Eventually(f.t, 2*patient, what, func() bool {
		for _, fn := range f.fns {
			for i, c := range f.ask(fn, busy) {
				key := fmt.Sprint(fn, " ", i)
				if l := last[key]; c.Answers != l.answers || l.since.IsZero() {
					last[key] = state{c.Answers, time.Now()}
				} else if time.Since(l.since) > 5*time.Second {
					return true
				}
			}
		}
		return false
	})
}

// add makes another function with some connections.
func (f *flows) add(shop *tenant, n int) {
	f.t.Helper()
	fn := fmt.Sprint("f", len(f.each))
	shop.add(f.th, "default", fn, one...)
	f.fns = append(f.fns, fn)
	f.each[fn] = n
}

// over counts a function's connections that are seen under an address.
func (f *flows) over(fn, havip string) (n int) {
	for i := range f.each[fn] {
		if strings.Contains(f.seen[fmt.Sprint(fn, " ", i)], " "+havip+":") {
			n++
		}
	}
	return n
}

// under counts the connections that the server sees under an address.
func (f *flows) under(havip string) (n int) {
	for _, from := range f.seen {
		if strings.Contains(from, " "+havip+":") {
			n++
		}
	}
	return n
}

const (
	havipB     = "10.0.1.253"
	busy, calm = 150, 5000 // milliseconds between two lines of a connection
)

// impatient are changes by which a hundred busy connections are much for a pair within seconds, and two hundred calm ones are little.
var impatient = []harness.Change{
	{File: "cmd/thaw/pairs/pairs_linux.go", Old: "Pairs: []gateway.Pair{},\n", New: "Pairs: []gateway.Pair{}, Capacity: gateway.Capacity{Packets: 500},\n"},
	{File: "cmd/thaw/dev/dev.go", Old: `Log: cfg.Log.With("part", "networks")}`, New: `Log: cfg.Log.With("part", "networks"), Policy: gateway.Policy{OutAfter: 2 * time.Second, InAfter: 3 * time.Second}}`},
	{File: "cmd/thaw/dev/dev.go", Old: `"github.com/thawrun/thaw/cmd/thaw/pairs"`, New: `"github.com/thawrun/thaw/cmd/thaw/pairs"; "github.com/thawrun/thaw/netproxy/gateway"`},
	// The machine's other work is none of the pairs'.
	{File: "netproxy/gateway/load_linux.go", Old: "load: Load{CPU: cpu}", New: "load: Load{CPU: 0 * cpu}"},
}

// pairs is what the Gateway says of them.
func pairs(t *testing.T, th *harness.Thaw) []api.GatewayPair {
	t.Helper()
	o, err := th.Client.Get(t.Context(), api.Gateways, "default", "a")
	must(t, err)
	return o.(*api.Gateway).Status.Pairs
}

// scaledOut has a hundred connections of ten functions over one pair, and then two pairs.
func scaledOut(t *testing.T, shop *tenant, th *harness.Thaw) *flows {
	t.Helper()
	t.Cleanup(func() {
		for _, n := range nodes(th) {
			if s, err := n.status(); t.Failed() && err == nil {
				t.Logf("%+v", s.Pairs)
			}
		}
	})
	f := &flows{t: t, th: th, each: map[string]int{}, seen: map[string]string{}}
	verb(t, th, "vpc", "create", "shop", "--cidr", "10.0.0.0/16")
	verb(t, th, "subnet", "create", "a", "--vpc", "shop", "--cidr", subnet, "--bridge", shop.bridge, "--havip", havipA, "--havip", havipB, "--pairs", "2")
	for range 10 {
		f.add(shop, 10)
	}
	for _, fn := range f.fns { // at once: nobody else's are to come later
		f.ask(fn, calm)
	}
	if lost := f.goOn(calm); lost != 0 || f.under(havipA) != 100 {
		t.Fatalf("%d are lost, %d of 100 are seen under %s", lost, f.under(havipA), havipA)
	}
	for _, fn := range f.fns {
		f.ask(fn, busy)
	}
	harness.Eventually(t, patient, "there is a second pair", func() bool { p := pairs(t, th); return len(p) == 2 && p[1].State == api.PairActive })
	return f
}

// Pairs of gateways come with the load and go with it, and 200 of 200 connections go on meanwhile.
func TestPairsFollowTheLoad(t *testing.T) {
	switch {
	case unfit != "":
		t.Skip(unfit)
	case os.Getenv("THAW_NETWORKS") == "":
		t.Skip("takes some minutes: make test-networks")
	}
	shop := newTenant(t, "shop")
	th := harness.Start(t, changed(t, impatient...), "--networks", "--provider", "sandbox")
	f := scaledOut(t, shop, th)
	// New connections, of functions that are there and of new ones, until both pairs have some.
	for i := range f.fns {
		f.each[f.fns[i]] += 10
	}
	for len(f.fns) < 20 {
		if lost := f.goOn(busy); lost != 0 {
			t.Fatalf("%d connections are lost", lost)
		}
		if len(f.seen) >= 200 && f.under(havipB) > 0 {
			break
		}
		f.add(shop, 10)
	}
	a, b := f.under(havipA), f.under(havipB)
	if a < 80 || b == 0 || a+b != len(f.seen) || len(f.seen) < 200 {
		t.Errorf("of %d connections %d are seen under %s, %d under %s", len(f.seen), a, havipA, b, havipB)
	}
	t.Logf("%d and %d connections over two pairs", a, b)

	// The load goes, and so does the second pair, when its connections have ended.
	if lost := f.goOn(calm); lost != 0 {
		t.Errorf("%d of %d connections are lost", lost, len(f.seen))
	}
	harness.Eventually(t, patient, "the second pair drains", func() bool { p := pairs(t, th); return len(p) == 2 && p[1].State == api.PairDraining })
	if lost := f.goOn(calm); lost != 0 {
		t.Errorf("%d of %d connections are lost while their pair drains", lost, len(f.seen))
	}
	harness.Eventually(t, patient, "the nodes refuse new connections of the second pair", func() bool {
		for _, n := range nodes(th) {
			s, err := n.status()
			if err != nil || len(s.Pairs) != 2 || s.Pairs[1].Gate != "draining" {
				return false
			}
		}
		return true
	})
	before := f.under(havipB)
	f.add(shop, 5)
	if lost := f.goOn(calm); lost != 0 || f.under(havipB) != before {
		t.Errorf("%d of %d connections are lost, and %d new ones are over the pair that drains", lost, len(f.seen), f.under(havipB)-before)
	}
	var keep []string
	for _, fn := range f.fns {
		if over := f.over(fn, havipB); over > 0 {
			verb(t, th, "delete", fn)
			for i := range f.each[fn] {
				delete(f.seen, fmt.Sprint(fn, " ", i))
			}
			continue
		}
		keep = append(keep, fn)
	}
	f.fns = keep
	harness.Eventually(t, 2*patient, "the second pair is gone", func() bool { return len(pairs(t, th)) == 1 })
	for _, n := range nodes(th) {
		if s, err := n.status(); err != nil || len(s.Pairs) != 1 {
			t.Errorf("%+v %v", s.Pairs, err)
		}
	}
	if lost := f.goOn(calm); lost != 0 {
		t.Errorf("%d of %d connections of the first pair are lost", lost, len(f.seen))
	}
	must(t, th.Stop())
	nothingIsLeft(t, th)

	t.Run("control-out", func(t *testing.T) {
		// A worker that does not know which pair a flow is on.
		forget := harness.Change{File: "netproxy/tunnel/worker_linux.go", Old: "dev, cfg.forgetful)", New: "dev, true)"}
		shop := newTenant(t, "one")
		th := harness.Start(t, changed(t, append(impatient, forget)...), "--networks", "--provider", "sandbox")
		scaledOut(t, shop, th).stall("connections whose instance falls to the new pair end")
	})
	t.Run("control-in", func(t *testing.T) {
		// A pair that goes without being drained.
		abrupt := harness.Change{File: "cmd/thaw/pairs/scale_linux.go", Old: `case x.Draining && (s.Drained || s.Gate == "closed"):`, New: "case true:"}
		shop := newTenant(t, "two")
		th := harness.Start(t, changed(t, append(impatient, abrupt)...), "--networks", "--provider", "sandbox")
		f := scaledOut(t, shop, th)
		for i := 0; f.under(havipB) == 0 && i < 10; i++ {
			f.add(shop, 10)
			f.goOn(busy)
		}
		for _, fn := range f.fns {
			f.ask(fn, calm)
		}
		harness.Eventually(t, patient, "the second pair is gone", func() bool { return len(pairs(t, th)) == 1 })
		f.stall("connections of the second pair end with it")
	})
}
