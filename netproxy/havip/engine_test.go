package havip

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

const tenMs = 10 * time.Millisecond

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// world is two engines on a virtual clock with a wire between them that can be cut, and lose adverts.
type world struct {
	t      *testing.T
	now    time.Time
	e      [2]*Engine
	facts  [2]Facts
	has    [2]bool // the addresses
	alive  [2]bool
	frozen [2]bool
	queue  [2][]Advert // adverts on their way to
	cut    bool
	loss   func() bool
	log    []string
	began  time.Time
	terms  bool
	last   [2]time.Time // ran
}

func newWorld(t *testing.T, terms bool) *world {
	w := &world{t: t, now: time.Unix(1000, 0), loss: func() bool { return false }, terms: terms}
	w.began = w.now
	for i, p := range []uint8{200, 100} {
		w.e[i] = &Engine{Priority: p, Interval: tenMs, Own: addr(fmt.Sprintf("10.1.0.%d", 2+i))}
		w.e[i].Start(w.now)
		w.facts[i] = Facts{Links: true, Full: true, InStep: true}
		w.alive[i] = true
		w.last[i] = w.now
	}
	return w
}

func (w *world) act(i int, o Orders) {
	if o.Take || o.Drop {
		w.has[i] = o.Take
		role, why := w.e[i].Role()
		w.log = append(w.log, fmt.Sprintf("%d ms: %c %s (%s)", w.now.Sub(w.began).Milliseconds(), 'a'+rune(i), role, why))
	}
	if o.Advert >= 0 && !w.cut && !w.loss() && w.facts[i].Links {
		a := Advert{Priority: uint8(o.Advert), Interval: w.e[i].Interval}
		if w.terms {
			a.Term = w.e[i].Term()
		}
		w.queue[1-i] = append(w.queue[1-i], a)
	}
}

// run lets a time pass in steps of half a millisecond.
func (w *world) run(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(500 * time.Microsecond) {
		for i, e := range w.e {
			if w.frozen[i] {
				continue
			}
			if !w.alive[i] || !w.facts[i].Links {
				w.queue[i] = nil
			}
			if !w.alive[i] {
				continue
			}
			stalled := w.now.Sub(w.last[i]) > e.Stall()
			w.last[i] = w.now
			for _, a := range slices.Clone(w.queue[i]) {
				w.act(i, e.Hear(w.now, a, w.e[1-i].Own, stalled))
			}
			w.queue[i] = nil
			w.act(i, e.Tick(w.now, w.facts[i]))
			if r, _ := e.Role(); r == Left {
				w.alive[i] = false
			}
		}
	}
}

func (w *world) want(a, b Role) {
	w.t.Helper()
	ra, _ := w.e[0].Role()
	rb, _ := w.e[1].Role()
	if ra != a || rb != b {
		w.t.Fatalf("a is %s and b is %s, want %s and %s; so far:\n%s", ra, rb, a, b, strings.Join(w.log, "\n"))
	}
}

func TestEngineElection(t *testing.T) {
	w := newWorld(t, false)
	w.run(30 * time.Millisecond)
	w.want(Backup, Backup)
	w.run(10 * time.Millisecond)
	w.want(Master, Backup)
	w.run(time.Second)
	if w.want(Master, Backup); len(w.log) != 1 {
		t.Errorf("more than one change: %q", w.log)
	}
}

func TestEngineTakeOverTimes(t *testing.T) {
	for _, c := range []struct {
		name        string
		do          func(*world)
		early, late time.Duration // b is not yet, and is, master
	}{
		{"death", func(w *world) { w.alive[0] = false }, 25 * time.Millisecond, 37 * time.Millisecond},
		{"no link", func(w *world) { w.facts[0].Links = false }, 25 * time.Millisecond, 37 * time.Millisecond},
		{"told to end", func(w *world) { w.act(0, w.e[0].Leave(w.now)) }, time.Millisecond, 10 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, false)
			w.run(time.Second)
			c.do(w)
			w.run(c.early)
			if r, _ := w.e[1].Role(); r != Backup {
				t.Fatalf("b is %s after %s", r, c.early)
			}
			w.run(c.late - c.early)
			if r, _ := w.e[1].Role(); r != Master {
				t.Fatalf("b is %s after %s", r, c.late)
			}
			if w.run(100 * time.Millisecond); w.has[0] && w.alive[0] || !w.has[1] {
				t.Errorf("has the addresses: a %t, b %t", w.has[0], w.has[1])
			}
		})
	}
}

// TestEngineHoldsUntilTaken: who leaves keeps the addresses until the peer has them, or nobody comes.
func TestEngineHoldsUntilTaken(t *testing.T) {
	w := newWorld(t, false)
	w.run(time.Second)
	w.act(0, w.e[0].Leave(w.now))
	for range 100 {
		if w.run(500 * time.Microsecond); !w.has[0] && !w.has[1] {
			t.Fatal("nobody has the addresses")
		}
	}
	w.want(Left, Master)
	w.act(1, w.e[1].Leave(w.now))
	if w.run(200 * time.Millisecond); w.alive[1] || w.has[1] {
		t.Error("the last one did not go")
	}
}

// TestEngineFullTable: nobody takes over without a full table, and nobody takes over from a living master out of step.
func TestEngineFullTable(t *testing.T) {
	w := newWorld(t, false)
	w.facts[0].InStep = false
	w.facts[0].Full = false
	w.run(time.Second)
	w.want(Backup, Master)
	w.facts[0].Full = true
	w.run(time.Second)
	w.want(Backup, Master)
	w.facts[0].InStep = true
	w.run(100 * time.Millisecond)
	w.want(Master, Backup)
	w.facts[1] = Facts{Links: true}
	w.alive[0] = false
	w.run(time.Second)
	if r, _ := w.e[1].Role(); r != Backup {
		t.Fatalf("b is %s without a full table", r)
	}
	w.facts[1].Full = true
	w.run(20 * time.Millisecond)
	if r, _ := w.e[1].Role(); r != Master {
		t.Fatalf("b is %s with a full table and nobody else", r)
	}
}

// TestEngineStall: a master that was stopped gives way to the lower priority that took over meanwhile, though without terms nothing but
// the pause tells it.
func TestEngineStall(t *testing.T) {
	for _, pause := range []time.Duration{20 * time.Millisecond, 300 * time.Millisecond} {
		w := newWorld(t, false)
		w.run(time.Second)
		w.facts[0].InStep = false // it would have to copy the table first
		w.frozen[0] = true
		w.run(pause)
		w.frozen[0] = false
		w.run(100 * time.Millisecond)
		if pause < 30*time.Millisecond {
			w.want(Master, Backup)
		} else {
			w.want(Backup, Master)
		}
	}
}

// TestEnginePartition: two masters part by term where there is one, else by priority.
func TestEnginePartition(t *testing.T) {
	for _, terms := range []bool{false, true} {
		w := newWorld(t, terms)
		w.run(time.Second)
		w.cut = true
		w.run(time.Second)
		w.want(Master, Master)
		w.facts[0].InStep = false
		w.cut = false
		w.run(100 * time.Millisecond)
		if terms {
			w.want(Backup, Master)
		} else {
			w.want(Master, Backup)
		}
		w.facts[0].InStep = true
		w.run(100 * time.Millisecond)
		w.want(Master, Backup)
	}
}

func TestEngineStay(t *testing.T) {
	w := newWorld(t, false)
	w.e[0].Stay = true
	w.facts[0].Links = false
	w.run(time.Second)
	w.facts[0].Links = true
	w.run(time.Second)
	w.want(Backup, Master)
}

// TestEngineImpaired: one of many sites without a link moves all of them, but only to a peer that is better off.
func TestEngineImpaired(t *testing.T) {
	for _, terms := range []bool{false, true} {
		w := newWorld(t, terms)
		w.run(time.Second)
		w.want(Master, Backup)
		w.facts[0].Impaired = true
		w.run(50 * time.Millisecond)
		w.want(Backup, Master)
		w.facts[1].Impaired = true
		w.run(200 * time.Millisecond)
		w.want(Master, Backup) // two who are no better than each other: as always
		w.facts[0].Impaired, w.facts[1].Impaired = false, false
		w.run(200 * time.Millisecond)
		w.want(Master, Backup)
	}
}

// TestEngineRandom breaks things at random for minutes, then mends them: then there is one master, it is a, and it has the addresses.
func TestEngineRandom(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		w := newWorld(t, seed%2 == 0)
		w.loss = func() bool { return rnd.IntN(20) == 0 }
		for range 50 {
			i := rnd.IntN(2)
			switch rnd.IntN(5) {
			case 0:
				w.facts[i].Links = !w.facts[i].Links
			case 1:
				w.facts[i].Full = !w.facts[i].Full
				w.facts[i].InStep = w.facts[i].Full
			case 2:
				w.cut = !w.cut
			case 3:
				w.frozen[i] = !w.frozen[i]
			case 4:
				w.facts[i].Impaired = !w.facts[i].Impaired
			}
			w.run(time.Duration(rnd.IntN(100)) * time.Millisecond)
		}
		w.cut, w.loss, w.frozen = false, func() bool { return false }, [2]bool{}
		well := Facts{Links: true, Full: true, InStep: true}
		w.facts = [2]Facts{well, well}
		w.run(500 * time.Millisecond)
		if w.want(Master, Backup); !w.has[0] || w.has[1] {
			t.Fatalf("seed %d: has the addresses: a %t, b %t", seed, w.has[0], w.has[1])
		}
	}
}

func TestConfig(t *testing.T) {
	good := func() Config {
		v, err := ParseVIP("10.0.0.10/24@eth0")
		if err != nil {
			t.Fatal(err)
		}
		return Config{Router: 51, Priority: 100, Advert: tenMs, VIPs: []VIP{v}}
	}
	c := good()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"router id 0":              func(c *Config) { c.Router = 0 },
		"priority 255":             func(c *Config) { c.Priority = 255 },
		"advert interval 15ms":     func(c *Config) { c.Advert = 15 * time.Millisecond },
		"advert interval 1m0s":     func(c *Config) { c.Advert = time.Minute },
		"no address":               func(c *Config) { c.VIPs = nil },
		"10.0.0.10 is given twice": func(c *Config) { c.VIPs = append(c.VIPs, c.VIPs[0]) },
		"no link for replication":  func(c *Config) { c.Replicate = true },
		"the key has 3 bytes":      func(c *Config) { c.Key = []byte("abc") },
		"settling time -1s":        func(c *Config) { c.Settle = -time.Second },
	} {
		c := good()
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	for _, s := range []string{"", "10.0.0.10@eth0", "10.0.0.10/24", "10.0.0.10/24@", "10.0.0.10/33@eth0", "fd00::1/64@eth0", "10.0.0.10/24@a/b", "10.0.0.10/24@" + strings.Repeat("x", 16)} {
		if _, err := ParseVIP(s); err == nil {
			t.Errorf("%q is taken for an address", s)
		}
	}
	for _, s := range []string{"", "eth2", "eth2,10.9.0.1", "eth2,10.9.0.1,10.9.0.1", "eth2,10.9.0.1,fd00::1", ",10.9.0.1,10.9.0.2", "eth2,10.9.0.1,10.9.0.2,x"} {
		if _, err := ParseSync(s); err == nil {
			t.Errorf("%q is taken for a link", s)
		}
	}
}
