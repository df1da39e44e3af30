package networks

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/thawrun/thaw/test/harness"
)

const inside = "inside.default.localhost"

// Two tenants with the same addresses: each function reaches its own tenant's server.
func TestTwoTenants(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	// meet says which server each tenant's function has reached.
	meet := func(t *testing.T, bin string, name, other string) (reached []string) {
		red, blue := newTenant(t, name), newTenant(t, other)
		th := harness.Start(t, bin, "--networks", "--provider", "sandbox")
		red.join(th, "default", "inside", one...)
		first := talking(t, th, inside, server)
		blue.join(th, "other", "inside", one...)
		second := talking(t, th, "inside.other.localhost", server)
		for _, c := range []conversation{first, second, talking(t, th, inside, server)} {
			whose, at, _ := strings.Cut(c.Last, " ")
			if !strings.HasPrefix(at, havipA+":") {
				t.Errorf("the server of %s was reached from %s", whose, at)
			}
			reached = append(reached, whose)
		}
		must(t, th.Stop())
		nothingIsLeft(t, th)
		return reached
	}
	if got := meet(t, bin, "red", "blue"); !slices.Equal(got, []string{"red", "blue", "red"}) {
		t.Errorf("functions of red, blue and red have reached %v", got)
	}
	t.Run("control", func(t *testing.T) {
		// Tenants who are told apart by their functions' addresses alone.
		same := changed(t, harness.Change{File: "netproxy/worker/pool_linux.go", Old: "p.cfg.Tunnel.Attach(x.Slot, s.Key)", New: `p.cfg.Tunnel.Attach(x.Slot, func() tunnel.Key {
			for _, o := range p.subnets {
				if o.Namespace == "default" {
					return o.Key
				}
			}
			return s.Key
		}())`})
		if got := meet(t, same, "green", "grey"); !slices.Equal(got, []string{"green", "green", "green"}) {
			t.Errorf("without keys of their own functions of green, grey and green have reached %v", got)
		}
	})
}

// The gateway that carries a function's connection is killed: the connection goes on, over the other one and back.
func TestGatewayIsKilled(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	shop := newTenant(t, "shop")
	th := harness.Start(t, bin, "--networks", "--provider", "sandbox")
	shop.join(th, "default", "inside", one...)
	before := talking(t, th, inside, server)
	ready(t, th, 1)
	kill(t, nodes(th)[0].pid())
	takenOver(t, th)
	if after := talking(t, th, inside, server); after.Last != before.Last {
		t.Errorf("the server sees %q instead of %q", after.Last, before.Last)
	}
	ready(t, th, 1)
	if back := talking(t, th, inside, server); back.Last != before.Last {
		t.Errorf("the server sees %q instead of %q after the return", back.Last, before.Last)
	}
	must(t, th.Stop())

	t.Run("control", func(t *testing.T) {
		shop := newTenant(t, "ctl")
		th := harness.Start(t, changed(t, unreplicated, gone), "--networks", "--provider", "sandbox")
		shop.join(th, "default", "inside", one...)
		talking(t, th, inside, server)
		kill(t, nodes(th)[0].pid())
		takenOver(t, th)
		shop.stalls("without replication the connection ends with its gateway")
	})
}

// Changes for controls: gateways that tell each other nothing, and one that does not come back.
var (
	unreplicated = harness.Change{File: "cmd/thaw/pairs/pairs_linux.go", Old: "Pairs: []gateway.Pair{},\n", New: "Pairs: []gateway.Pair{}, Replicate: new(bool),\n"}
	gone         = harness.Change{File: "cmd/thaw/pairs/pairs_linux.go", Old: "case <-time.After(time.Second):", New: "case <-time.After(time.Hour):"}
)

// thaw dev is killed and comes back: connections of functions do not notice, and new functions find their way.
func TestKilledAndBack(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	shop := newTenant(t, "shop")
	th := harness.Start(t, bin, "--networks", "--provider", "sandbox")
	shop.join(th, "default", "inside", one...)
	before := talking(t, th, inside, server)
	ready(t, th, 1)
	var pids [2]int
	var terms [2]uint64
	for i, n := range nodes(th) {
		s, err := n.status()
		must(t, err)
		pids[i], terms[i] = n.pid(), s.Term
	}
	th.Kill()
	shop.goesOn(20, "the function's connection goes on without thaw dev")
	th.Relaunch()
	if after := talking(t, th, inside, server); after.Last != before.Last || after.Answers < before.Answers {
		t.Errorf("%+v became %+v", before, after)
	}
	shop.add(th, "default", "second", one...)
	if c := talking(t, th, "second.default.localhost", server); !strings.HasPrefix(c.Last, "shop "+havipA+":") {
		t.Errorf("a function that came later is seen as %q", c.Last)
	}
	for i, n := range nodes(th) {
		if s, err := n.status(); err != nil || n.pid() != pids[i] || s.Term != terms[i] {
			t.Errorf("process %d in term %d became %d in term %d, %v", pids[i], terms[i], n.pid(), s.Term, err)
		}
	}
	// A node that was adopted is looked after as any.
	kill(t, pids[0])
	takenOver(t, th)
	ready(t, th, 1)
	if after := talking(t, th, inside, server); after.Last != before.Last {
		t.Errorf("%q became %q", before.Last, after.Last)
	}
	must(t, th.Stop())
	nothingIsLeft(t, th)

	t.Run("control", func(t *testing.T) {
		shop := newTenant(t, "ctl")
		th := harness.Start(t, changed(t, harness.Change{File: "cmd/thaw/pairs/pairs_linux.go", Old: "m.adopted = whole && m.recognize()", New: "m.adopted = whole && m.recognize() && false"}), "--networks", "--provider", "sandbox")
		shop.join(th, "default", "inside", one...)
		talking(t, th, inside, server)
		th.Kill()
		th.Relaunch()
		shop.stalls("what is made anew does not carry the old connection")
		must(t, th.Stop())
		nothingIsLeft(t, th)
	})
}

// thaw dev is killed and comes back without networks: nothing of them is left.
func TestKilledAndBackWithout(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	shop := newTenant(t, "shop")
	th := harness.Start(t, bin, "--networks", "--provider", "sandbox")
	shop.join(th, "default", "inside", one...)
	talking(t, th, inside, server)
	th.Kill()
	for _, n := range nodes(th) {
		if n.pid() == 0 {
			t.Fatal("the control: there is nothing to be left")
		}
	}
	again, err := harness.Open(bin, th.Dir, "--provider", "sandbox")
	must(t, err)
	nothingIsLeft(t, again)
	if _, err := os.Stat(filepath.Join(th.Dir, "networks")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the folder is left:", err)
	}
	must(t, again.Stop())
}

// A function with fixed egress is seen under the elastic IP outside of its network, on one connection before and after the gateway that carries it is
// killed.
func TestFixedEgress(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	shop := newTenant(t, "shop")
	shop.outside()
	th := harness.Start(t, bin, "--networks", "--provider", "sandbox")
	shop.join(th, "default", "before", one...)
	// The control.
	if c := talking(t, th, "before.default.localhost", worldHost); !strings.HasPrefix(c.Last, "shop "+havipA+":") {
		t.Errorf("without an elastic IP the server outside sees %q", c.Last)
	}
	verb(t, th, "eip", "create", "out", "--address", elastic, "--subnet", "shop/a")
	shop.add(th, "default", "inside", append(one, "net.thaw.run/egress: fixed")...)
	before := talking(t, th, inside, worldHost)
	if !strings.HasPrefix(before.Last, "shop "+elastic+":") {
		t.Errorf("the server outside sees %q", before.Last)
	}
	if c := talking(t, th, inside, server); !strings.HasPrefix(c.Last, "shop "+havipA+":") {
		t.Errorf("the server of the subnet sees %q", c.Last)
	}
	ready(t, th, 1)
	kill(t, nodes(th)[0].pid())
	takenOver(t, th)
	if after := talking(t, th, inside, worldHost); after.Last != before.Last {
		t.Errorf("the server outside sees %q instead of %q", after.Last, before.Last)
	}
}
