package sim

import (
	"time"

	"github.com/thawrun/thaw/autoscaler"
)

// kpa plays Knative's autoscaler: the same Decide and Settle that run live, with default settings, a tick every two seconds and a
// poke for the first request only.
type kpa struct {
	fns    []kpaFn
	orders []Order2
}

type kpaFn struct {
	policy        autoscaler.Policy
	stable, panic *autoscaler.Window
	memory        autoscaler.Memory
	life          autoscaler.Life
}

const kpaInterval = 2

// epoch is the trace's second 0.
var epoch = time.Unix(0, 0)

func at(t float64) time.Time { return epoch.Add(time.Duration(t * float64(time.Second))) }

// NewKPA is Knative's autoscaler with default settings.
func NewKPA() Policy { return &kpa{} }

func (k *kpa) Hello(h *Hello) Ready {
	k.fns = make([]kpaFn, len(h.Functions))
	for i, f := range h.Functions {
		p, _ := autoscaler.PolicyFor(autoscaler.DefaultConfig(), nil, f.Concurrency)
		p.InitialScale, p.MaxScale = 0, h.MaxInstances
		k.fns[i] = kpaFn{
			policy: p,
			stable: autoscaler.NewWindow(epoch, p.StableWindow, p.Aggregation),
			panic:  autoscaler.NewWindow(epoch, p.PanicWindow, p.Aggregation),
			life:   autoscaler.NewLife(epoch, p, true),
		}
	}
	return Ready{Type: "ready", Name: "kpa", Interval: kpaInterval, OnDemand: OnDemandZero}
}

func (k *kpa) Tick(t *Tick) []Order2 {
	k.orders = k.orders[:0]
	now := at(t.T)
	for i := range t.Functions {
		l := &t.Functions[i]
		if n := k.fns[l.I].decide(now, t.T, l); n >= 0 && n != l.Target {
			k.orders = append(k.orders, Order2{l.I, n})
		}
	}
	return k.orders
}

// decide returns the target, -1 for no change.
func (f *kpaFn) decide(now time.Time, t float64, l *Load) int {
	for j, c := range l.Concurrency {
		second := at(t - float64(len(l.Concurrency)-j))
		f.stable.Record(second, c)
		f.panic.Record(second, c)
	}
	last := at(t - 1)
	load := autoscaler.Load{
		Ready: l.Ready, Stable: f.stable.Average(last), Panic: f.panic.Average(last), Measured: !f.stable.Empty(last),
	}
	var d autoscaler.Decision
	d, f.memory = autoscaler.Decide(now, f.policy, load, f.memory)
	want := -1
	if d.Valid {
		want = d.Desired
	}
	var v autoscaler.Verdict
	v, f.life = autoscaler.Settle(now, f.policy, want, autoscaler.Standing{
		Ready: l.Ready, Starting: l.Starting, ExcessBurstCapacity: d.ExcessBurstCapacity,
	}, f.life)
	return v.Order
}
