package autoscaler

import "testing"

// Equal policies are one, different ones are not, and many different ones do not pile up.
func TestPolicies(t *testing.T) {
	ps := shared[Policy]{}
	a, b, c := ps.of(Policy{MinScale: 1}), ps.of(Policy{MinScale: 1}), ps.of(Policy{MinScale: 2})
	if a != b || *a != (Policy{MinScale: 1}) || *c != (Policy{MinScale: 2}) {
		t.Errorf("%p %p %+v", a, b, c)
	}
	for i := range 10 * maxShared {
		if p := ps.of(Policy{MaxScale: i}); p.MaxScale != i {
			t.Fatalf("%d became %d", i, p.MaxScale)
		}
	}
	if len(ps) > maxShared {
		t.Errorf("%d are kept", len(ps))
	}
	if a.MinScale != 1 {
		t.Error("one in use has changed")
	}
}
