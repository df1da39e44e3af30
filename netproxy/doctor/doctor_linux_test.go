package doctor

import (
	"errors"
	"net"
	"os"
	"testing"

	"github.com/thawrun/thaw/netproxy/tunnel"
)

// What is found is consistent, and nothing of it stays.
func TestExamine(t *testing.T) {
	devices := func() int {
		all, err := net.Interfaces()
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	before := devices()
	r, err := Examine(self, "-test.run=^$")
	if err != nil {
		t.Fatal(err)
	}
	if after := devices(); after != before {
		t.Errorf("%d devices, before %d", after, before)
	}
	state := map[string]State{}
	for _, f := range r.Features {
		state[f.What] = f.State
		if (f.State == Works) != (f.Why == "") {
			t.Errorf("%+v", f)
		}
	}
	if b := newBench(); b.err != nil {
		for what, s := range state {
			if s != NotTried && what != "user namespaces" {
				t.Errorf("%s: %s, although nothing can be tried: %v", what, s, b.err)
			}
		}
		t.Skip("most of it needs root:", b.err)
	} else {
		b.close()
	}
	works := map[tunnel.Driver]bool{}
	var first tunnel.Driver
	for _, d := range r.Drivers {
		if works[d.Name] = d.State == Works; works[d.Name] && first == "" {
			first = d.Name
		}
	}
	if r.Chosen != first || len(r.Drivers) != len(tunnel.Drivers()) {
		t.Errorf("%s chosen of %+v", r.Chosen, r.Drivers)
	}
	// Two ways to the same answer: a driver works if, and only if, what it is made of does.
	for d, parts := range map[tunnel.Driver][]string{tunnel.Ebpf: {"bpf", "clsact"}, tunnel.KernelGRE: {"gre"}, tunnel.VXLAN: {"vxlan"}, tunnel.KernelIPIP: {"ipip"}} {
		all := true
		for _, p := range parts {
			all = all && state[p] == Works
		}
		if all != works[d] {
			t.Errorf("driver %s works: %v; its parts %v work: %v", d, works[d], parts, all)
		}
	}
	for _, p := range r.Paths {
		if p.Inside != p.MTU-r.Chosen.Overhead() || p.MSS != p.Inside-40 {
			t.Errorf("%+v", p)
		}
	}
}

func TestFinding(t *testing.T) {
	for _, c := range []struct {
		nowhere, err error
		want         State
	}{
		{nil, nil, Works},
		{nil, errors.New("no such thing"), Missing},
		{nil, os.ErrPermission, NotTried},
		{os.ErrPermission, nil, NotTried},
	} {
		f := finding("x", "y", c.nowhere, func() error { return c.err })
		if f.State != c.want || (f.Why == "") != (c.want == Works) {
			t.Errorf("%v %v: %+v", c.nowhere, c.err, f)
		}
	}
}
