package providertest

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/thawrun/thaw/instance/provider"
)

func TestMain(m *testing.M) {
	patience = 2 * time.Second // what a vice keeps from happening is waited for
	os.Exit(m.Run())
}

func fakeRig(t *testing.T, f *Fake) *Rig {
	r := &Rig{Provider: f, Events: &Events{}, Dir: t.TempDir(), Note: "note"}
	f.Watch(r.Events.Add)
	r.Reopen = func() (provider.Provider, *Events, error) {
		n, e := r.Provider.(*Fake).Keep(), &Events{}
		n.Watch(e.Add)
		return n, e, nil
	}
	return r
}

func TestFake(t *testing.T) {
	for _, delay := range []time.Duration{0, 2 * time.Millisecond} {
		for _, c := range Checks {
			t.Run(c.Name, func(t *testing.T) {
				if err := c.Run(t.Context(), fakeRig(t, &Fake{Delay: delay})); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestChecksNotice is the negative control of the suite.
func TestChecksNotice(t *testing.T) {
	for vice, check := range Vices {
		t.Run(vice, func(t *testing.T) {
			t.Parallel() // what must happen and does not is waited for
			for _, c := range Checks {
				if c.Name != check {
					continue
				}
				if err := c.Run(t.Context(), fakeRig(t, &Fake{Vice: vice})); err == nil {
					t.Errorf("%q says nothing about a provider that %s", check, vice)
				} else {
					t.Log(err)
				}
				return
			}
			t.Errorf("there is no check %q", check)
		})
	}
}

func TestFaults(t *testing.T) {
	broken := errors.New("broken")
	f := &Fake{Fault: func(op string) error {
		if op == "create" {
			return broken
		}
		return nil
	}}
	if err := f.Create(context.Background(), "x"); !errors.Is(err, broken) {
		t.Error(err)
	}
	f.Fault = nil
	if err := f.Create(context.Background(), "x"); err != nil {
		t.Error(err)
	}
	f.Delay = time.Hour
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if err := f.Destroy(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
