package instance

import (
	"context"
	"slices"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// The idle ladder: an instance that is not needed any more drains, is frozen, and is ended when it was not needed for a while, or when
// the machine needs its memory. Until then it is the cheapest instance that its revision can get, because what makes a start long
// (exec, the interpreter, the function's own initialisation) is behind it.

// dismissLocked takes an instance out of service: to be frozen, if it may be, else to end.
func (a *Agent) dismissLocked(in *instance) {
	if !a.mayRestLocked(in) {
		a.stopLocked(in)
		return
	}
	a.stopLocked(in)
	in.resting = true
}

// mayRestLocked says whether an instance is worth being kept: it works, and its revision has not enough frozen ones yet.
func (a *Agent) mayRestLocked(in *instance) bool {
	r := in.rev
	if in.plan.frozenFor <= 0 || !a.caps.Freezes || a.stopping || r.removed || in.state != endpoints.Ready || in.plan.rev.UID != r.plan.rev.UID {
		return false
	}
	kept := 0
	for _, other := range r.instances {
		if other.state == endpoints.Frozen || other.resting {
			kept++
		}
	}
	return kept < in.plan.frozenMax
}

// rest drains an instance that was taken out of service, and freezes it, if that is what it is meant for. What comes back is why it is over:
// nil = it is needed and runs again, errStopped = it shall end, errExited = it has ended.
func (a *Agent) rest(in *instance) error {
	a.mu.Lock()
	resting := in.resting
	a.mu.Unlock()
	if !resting || a.drain(in) != nil {
		return errStopped
	}
	ctx, cancel := context.WithTimeout(context.Background(), providerPatience)
	defer cancel()
	if err := a.provider.Freeze(ctx, in.folder); err != nil {
		select {
		case <-in.prog.done:
			return errExited
		default:
		}
		a.cfg.Log.Warn("an instance cannot be frozen, so it ends", "instance", in.id, "err", err)
		return errStopped
	}
	st, _ := a.provider.Stats(ctx, in.folder) // 0 bytes where it cannot be told
	a.mu.Lock()
	if !in.resting { // it shall end after all; to stop it thaws it
		a.mu.Unlock()
		return errStopped
	}
	sidecar := in.sidecar
	in.memory, in.sidecar = st.MemoryBytes, nil
	in.stop, in.stopping, in.resting = make(chan struct{}), false, false
	a.freezeLocked(in)
	a.unlock()
	if sidecar != nil {
		sidecar.Close() // closes the connections to it as well: they would hold on to nothing
	}
	return a.sleep(in)
}

// freezeLocked shows a frozen instance as that.
func (a *Agent) freezeLocked(in *instance) {
	in.state, in.wake = endpoints.Frozen, make(chan struct{})
	a.frozen = append(a.frozen, in)
	a.publishLocked(in.rev)
	a.boundFrozenLocked()
	a.reconcileLocked(in.rev) // somebody may have come meanwhile
}

// sleep waits with a frozen instance until it is needed, and thaws it then.
func (a *Agent) sleep(in *instance) error {
	over := time.NewTimer(in.plan.frozenFor)
	defer over.Stop()
	for {
		select {
		case <-in.wake:
			return a.thaw(in)
		case <-in.stop:
			return errStopped
		case <-in.prog.done:
			return errExited
		case <-over.C:
			a.mu.Lock()
			if in.state == endpoints.Frozen { // else it has just been woken
				a.forgetFrozenLocked(in)
				a.stopLocked(in)
			}
			a.unlock()
		}
	}
}

// wakeLocked thaws up to n frozen instances of a revision, those first that were used last. It returns how many.
func (a *Agent) wakeLocked(r *revision, n int) (woken int) {
	for i := len(a.frozen) - 1; i >= 0 && woken < n; i-- {
		in := a.frozen[i]
		if in.rev != r {
			continue
		}
		a.frozen = slices.Delete(a.frozen, i, i+1)
		in.state = endpoints.Starting
		in.start = endpoints.StartTimes{Decided: r.decided, Placed: r.placed}
		if in.start.Placed.IsZero() {
			in.start.Placed = time.Now()
		}
		close(in.wake)
		woken++
	}
	a.woken += uint64(woken)
	if woken > 0 {
		a.publishLocked(r)
	}
	return woken
}

// thaw begins to let an instance run again, and does not wait for it: the instance is ready at once. It was ready when it was stopped, and the
// kernel keeps its socket listening: what is sent to it before it runs waits there, and not for long.
func (a *Agent) thaw(in *instance) error {
	thawed := make(chan error, 1)
	now := time.Now()
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), providerPatience)
		defer cancel()
		a.thaws <- struct{}{}
		defer func() { <-a.thaws }()
		thawed <- a.provider.Thaw(ctx, in.folder)
	}()
	in.thawed = thawed
	a.mu.Lock()
	in.start.Code, in.start.Exec = now, now
	a.mu.Unlock()
	a.addSidecar(in)
	return nil
}

// forgetFrozenLocked takes an instance out of the list of frozen ones, if it is there.
func (a *Agent) forgetFrozenLocked(in *instance) {
	if i := slices.Index(a.frozen, in); i >= 0 {
		a.frozen = slices.Delete(a.frozen, i, i+1)
	}
}

// boundFrozenLocked ends what is beyond the node's bounds for frozen instances, the oldest first.
func (a *Agent) boundFrozenLocked() {
	var bytes int64
	for i := len(a.frozen) - 1; i >= 0; i-- {
		bytes += a.frozen[i].memory
		if bytes > a.cfg.FrozenBytes || len(a.frozen)-i > a.cfg.FrozenMax {
			a.endFrozenLocked(i + 1)
			return
		}
	}
}

// makeRoomLocked ends as many frozen instances, the oldest first, as n instances of so many units need beyond the room that there is; for none
// of them in vain.
func (a *Agent) makeRoomLocked(n, units, room int) {
	room += a.leaving
	all := room
	for _, in := range a.frozen {
		all += in.units()
	}
	n = min(n, all/units)
	i := 0
	for ; n*units > room; i++ {
		room += a.frozen[i].units()
	}
	a.endFrozenLocked(i)
}

// endFrozenLocked ends the n oldest frozen instances, as far as there are so many.
func (a *Agent) endFrozenLocked(n int) {
	n = max(0, min(n, len(a.frozen)))
	for _, in := range a.frozen[:n] {
		a.stopLocked(in)
		in.evicted = true
		a.leaving += in.units()
	}
	a.frozen = slices.Delete(a.frozen, 0, n)
	a.ended += uint64(n)
}

// relievePeriod is how often the machine's memory is looked at while there are frozen instances.
const relievePeriod = time.Second

// relieve ends frozen instances while the machine is short of memory: an eighth of them at a time, the oldest first. It also gives up
// reservations that are over.
func (a *Agent) relieve(ctx context.Context) {
	tick := time.NewTicker(relievePeriod)
	defer tick.Stop()
	resized := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		a.mu.Lock()
		n := len(a.frozen)
		if now := time.Now(); len(a.reserved) > 0 && now.After(resized.Add(resizePeriod)) {
			resized = now
			a.sizePoolsLocked(now)
		}
		a.mu.Unlock()
		if n == 0 || !a.cfg.lowMemory() {
			continue
		}
		a.mu.Lock()
		before := len(a.frozen)
		a.endFrozenLocked((before + 7) / 8)
		ended := before - len(a.frozen)
		a.unlock()
		a.cfg.Log.Info("memory is short: frozen instances end", "ended", ended, "left", before-ended)
	}
}

// Frozen is what the ladder has done and holds.
type Frozen struct {
	Now   int    // instances that are frozen
	Bytes int64  // what they take, as measured when each was frozen
	Woken uint64 // instances that were thawed because they were needed, since the start
	Ended uint64 // instances that were ended to make room for others, since the start
}

// Frozen counts frozen instances.
func (a *Agent) Frozen() Frozen {
	a.mu.Lock()
	defer a.mu.Unlock()
	f := Frozen{Now: len(a.frozen), Woken: a.woken, Ended: a.ended}
	for _, in := range a.frozen {
		f.Bytes += in.memory
	}
	return f
}

// FrozenOf counts the frozen instances of one revision.
func (a *Agent) FrozenOf(id api.RevisionID) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, in := range a.frozen {
		if in.rev.id == id {
			n++
		}
	}
	return n
}

// A machine is short of memory when programs could get less than a tenth of it, or when they have been waiting for some for a tenth of
// the last ten seconds.
const (
	leastAvailable = 10 // parts of total
	mostPressure   = 10 // percent
)

func memoryIsLow() bool {
	total, available := machineMemory()
	return total > 0 && available < total/leastAvailable || memoryPressure() > mostPressure
}
