package instance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/internal/endpoints"
)

// instance is one copy of a revision, from the order until it is gone.
type instance struct {
	// static
	id     string
	folder string // name of its folder under instances/
	rev    *revision
	plan   *plan // of a new instance changed once, before its start, under Agent.mu
	made   time.Time

	// Replaced by the instance's goroutine, when it is frozen, under Agent.mu.
	stop chan struct{} // closed by stopLocked, under Agent.mu
	wake chan struct{} // closed by wakeLocked, under Agent.mu; nil = it was never frozen

	// guarded by Agent.mu
	state    endpoints.State
	addr     string
	start    endpoints.StartTimes
	adopted  bool
	stopping bool  // stop is closed
	resting  bool  // it is not to end but to be frozen when its last request is out
	memory   int64 // of a frozen one, bytes
	evicted  bool  // it counts among Agent.leaving
	unready  bool  // was ready, and its readiness probe fails now
	readyAt  time.Time
	sidecar  Sidecar

	// owned by the instance's goroutine
	blank    *blank // what it began as; nil = it is started
	berth    *berth // nil = to be made, or given back
	prog     *program
	frozen   bool         // was found so
	thawed   <-chan error // tells the end of a thaw that is under way; nil = none is
	inside   bool         // listens on a port of a network of its own
	port     int          // to be given back; 0 = none
	listener *os.File     // our copy of the socket on its fd 3
	env      []string     // for exec probes
	ready    *os.File     // the function says ready here; nil = it does not
}

// errStopped and errExited are why waiting for something about an instance ended: it shall go, or it has gone.
var (
	errStopped = errors.New("instance is asked to end")
	errExited  = errors.New("instance has ended")
)

// newInstanceLocked orders an instance. Its goroutine does the rest.
func (a *Agent) newInstanceLocked(r *revision) *instance {
	_, name := r.id.Split()
	slot := false
	select { // before anything is taken: those who refill what was taken wait for starts
	case a.slots <- struct{}{}:
		slot = true
	default:
	}
	var blank *blank
	if len(r.spare) == 0 { // what waits in a crashed instance's socket needs one that takes it over
		blank = a.blanks.take(r.plan.language)
	}
	var b *berth
	if blank != nil {
		b = blank.berth
	} else {
		b = a.berths.take()
	}
	folder := ""
	if b != nil {
		folder = b.name
	} else {
		folder = a.berths.newName()
	}
	in := &instance{
		id: name + "-" + folder, folder: folder, blank: blank, berth: b, rev: r, plan: r.plan, made: time.Now(), stop: make(chan struct{}),
		start: endpoints.StartTimes{Decided: r.decided, Placed: r.placed},
	}
	if in.start.Placed.IsZero() {
		in.start.Placed = in.made
	}
	if n := len(r.spare); n > 0 {
		in.listener = r.spare[n-1]
		r.spare = r.spare[:n-1]
	}
	r.instances = append(r.instances, in)
	a.used += in.units()
	a.instances.Go(func() { a.live(in, slot) })
	return in
}

// stopLocked asks an instance to end: from now on it takes no new requests.
func (a *Agent) stopLocked(in *instance) {
	in.resting = false
	if in.stopping {
		return
	}
	in.stopping = true
	close(in.stop)
	if in.state != endpoints.Draining {
		in.state = endpoints.Draining
		a.publishLocked(in.rev)
	}
}

func (in *instance) endpointLocked() endpoints.Instance {
	return endpoints.Instance{
		ID: in.id, Revision: in.rev.id, State: in.state, Addr: in.addr,
		Capacity: in.plan.rev.Concurrency(), Start: in.start, Adopted: in.adopted,
	}
}

// units is what it takes of the node. Of one revision all plans say the same.
func (in *instance) units() int { return in.plan.class.Units }

func (in *instance) logKey() logs.Key {
	ns, name := in.rev.id.Split()
	return logs.Key{Namespace: ns, Revision: name, Instance: in.id}
}

func (a *Agent) dir(folder string) string { return filepath.Join(a.cfg.Dir, "instances", folder) }

// live is the whole life of a new instance. slot says that it has one of MaxStarts already.
func (a *Agent) live(in *instance, slot bool) {
	if !slot {
		select {
		case a.slots <- struct{}{}:
		case <-in.stop:
			a.gone(in, nil)
			return
		}
	}
	release := sync.OnceFunc(func() { <-a.slots })
	defer release()
	select {
	case <-in.stop: // while it waited
		a.gone(in, nil)
		return
	default:
	}
	if err := a.launch(in); err != nil {
		a.gone(in, &failure{reasonOf(err), err.Error()})
		return
	}
	// A slow starter waits more than it computes: it must not keep others from starting.
	late := time.AfterFunc(slowStart, release)
	defer late.Stop()
	a.tend(in, release)
}

// slowStart is how long a start counts as one of MaxStarts.
const slowStart = 250 * time.Millisecond

// launch does everything up to exec. Nothing in it waits for a disk or for another part.
func (a *Agent) launch(in *instance) error {
	if in.plan.err != nil || in.plan.code.Check() != nil {
		a.planAgain(in)
	}
	p := in.plan
	if p.err != nil {
		return p.err
	}
	coded := time.Now()
	if in.blank != nil {
		return a.fill(in, coded)
	}
	if err := a.bind(in); err != nil {
		return err
	}
	if in.berth == nil {
		var err error
		if in.berth, err = a.berths.build(in.folder); err != nil {
			return err
		}
	}
	b := in.berth
	// From here on, a process that carries this id is ours to adopt or to end.
	if err := writeRecord(b.dir, newRecord(in, a.caps.Name)); err != nil {
		return err
	}
	argv, env := p.environ(in.portNumber(), p.homeOr(b.home()))
	in.env = env
	spec := p.spec()
	spec.Name, spec.Argv, spec.Env = in.id, argv, env
	spec.Stdout, spec.Stderr, spec.Listener = b.stdout, b.stderr, in.listener
	if p.says {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer w.Close()
		in.ready, spec.Ready = r, w
		spec.Env = append(spec.Env[:len(spec.Env):len(spec.Env)], "READY_FD=4")
	}
	var attached time.Time
	if p.subnet != "" {
		ns, _ := in.rev.id.Split()
		network, err := a.cfg.Networks.Attach(ns, p.subnet)
		if err != nil {
			return fmt.Errorf("attach to subnet %s: %w", p.subnet, err)
		}
		defer network.Close()
		spec.Network, attached = network, time.Now()
	}
	ctx, cancel := context.WithTimeout(context.Background(), providerPatience)
	defer cancel()
	prog := a.programs.add(in.folder)
	if err := a.provider.Specialise(ctx, in.folder, spec); err != nil {
		a.programs.drop(in.folder)
		return err
	}
	in.prog = prog
	a.mu.Lock()
	in.start.Code, in.start.Net, in.start.Exec = coded, attached, spec.Started
	a.unlock()
	b.close()
	a.placeLogs(in.logKey(), p.rev.ServiceName(), b.dir)
	a.addSidecar(in)
	return nil
}

// placeLogs moves the files that an instance writes to from its folder to the logs, where they stay when it has gone.
func (a *Agent) placeLogs(k logs.Key, service, dir string) {
	err := a.logs.Place(k, service, filepath.Join(dir, stdoutFile), filepath.Join(dir, stderrFile))
	if err != nil {
		a.cfg.Log.Warn("the output of an instance cannot be kept", "instance", k.Instance, "err", err)
	}
}

// planAgain looks for the code once more: what was missing may be there by now, and a file that was only touched still has
// its digest.
func (a *Agent) planAgain(in *instance) {
	p := a.newPlan(in.plan.rev)
	a.mu.Lock()
	if in.rev.plan == in.plan {
		in.rev.plan = p
		a.pinLocked(in.rev)
		a.speakLocked(in.rev, p.language)
	}
	in.plan = p
	a.mu.Unlock()
}

// bind gives the instance its address: a free port, or a socket that listens already.
func (a *Agent) bind(in *instance) error {
	var addr string
	switch {
	case !in.plan.socket && in.plan.port != 0:
		in.inside = true
		addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(in.plan.port))
	case !in.plan.socket:
		port, err := a.ports.take()
		if err != nil {
			return err
		}
		in.port = port
		addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	default:
		if in.listener == nil {
			var err error
			if in.listener, err = listen(); err != nil {
				return err
			}
		}
		addr = in.listener.Name()
	}
	a.mu.Lock()
	in.addr = addr
	a.mu.Unlock()
	return nil
}

// listen makes a listening socket on a free port of loopback; its name is its address. Plain TCP, not the multipath sockets
// that Go listens with by itself: other languages get it.
func listen() (*os.File, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return dup(f, l.Addr().String())
}

// portNumber is the port that requests come to.
func (in *instance) portNumber() int {
	_, p, _ := net.SplitHostPort(in.addr)
	n, _ := strconv.Atoi(p)
	return n
}

func (a *Agent) addSidecar(in *instance) {
	if a.cfg.Sidecar == nil {
		return
	}
	a.mu.Lock()
	e := in.endpointLocked()
	a.mu.Unlock()
	s := a.cfg.Sidecar(e, in.plan.rev, a.dialer(in))
	a.mu.Lock()
	in.sidecar = s
	a.mu.Unlock()
}

// tend looks after a started or adopted instance until it is gone. settled is called when it no longer counts as starting.
func (a *Agent) tend(in *instance, settled func()) {
	var err error
	if in.frozen {
		settled()
		err = a.sleep(in)
	} else {
		err = a.attend(in, func(ctx context.Context) error {
			defer settled()
			return a.awaitReady(ctx, in)
		})
	}
	for {
		if errors.Is(err, errStopped) {
			err = a.rest(in)
		}
		if err != nil {
			break
		}
		err = a.attend(in, nil) // it was thawed
	}

	var why *failure
	switch {
	case errors.Is(err, errStopped):
		a.end(in)
	case errors.Is(err, errExited):
		words := a.logs.LastWords(in.logKey())
		a.mu.Lock()
		if !in.stopping && in.state != endpoints.Frozen { // of that nobody has missed anything
			why = exitFailure(in, in.prog.exit, !in.readyAt.IsZero(), words)
		}
		a.mu.Unlock()
	default: // a probe has given up on it
		why = &failure{reasonOf(err), err.Error()}
		if words := a.logs.LastWords(in.logKey()); words != "" {
			why.message += "; its last output: " + words
		}
		a.mu.Lock()
		a.failLocked(in, why)
		why = nil // it is noted
		a.stopLocked(in)
		a.reconcileLocked(in.rev) // the replacement need not wait for the end
		a.unlock()
		a.end(in)
	}
	a.gone(in, why)
}

// attend waits until an instance is ready (nil = it is), shows it, and looks after it until it shall end or has ended.
func (a *Agent) attend(in *instance, ready func(context.Context) error) error {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	stop := in.stop
	wg.Go(func() { // ends the probes when there is nothing left to probe
		defer cancel()
		select {
		case <-in.prog.done:
		case <-stop:
		case <-ctx.Done():
		}
	})
	defer wg.Wait()
	defer cancel()
	if ready != nil {
		if err := ready(ctx); err != nil {
			return err
		}
	}
	a.markReady(in)
	if in.thawed != nil {
		err := <-in.thawed
		if in.thawed = nil; err != nil {
			return a.whyNot(in, &failure{reasonStartFailed, fmt.Sprintf("instance %s was frozen and does not go on: %v", in.id, err)})
		}
	}
	return a.watch(ctx, in)
}

// markReady shows an instance as taking requests. A revision with a ready instance has no failure.
func (a *Agent) markReady(in *instance) {
	now := time.Now()
	a.mu.Lock()
	if !in.stopping {
		in.state, in.readyAt = endpoints.Ready, now
		if !in.start.Placed.IsZero() { // an adopted one has no start of ours
			in.start.Ready = now
		}
		in.rev.fault = nil
		a.publishLocked(in.rev)
		a.reconcileLocked(in.rev) // starts that were held back while the last one had failed
	}
	a.unlock()
}

// setWell follows the readiness probe after the start.
func (a *Agent) setWell(in *instance, well bool, err error) {
	a.mu.Lock()
	if !in.stopping && in.unready == well {
		in.unready = !well
		if in.state = endpoints.Starting; well {
			in.state = endpoints.Ready
		}
		a.cfg.Log.Info("readiness of an instance has changed", "instance", in.id, "ready", well, "err", err)
		a.publishLocked(in.rev)
	}
	a.unlock()
}

// end drains and ends an instance that is shown as draining.
func (a *Agent) end(in *instance) {
	if err := a.drain(in); err != nil {
		a.cfg.Log.Warn("instance ends with requests inside", "instance", in.id, "err", err)
	}
	a.stop(in.prog, in.plan.grace, a.endGrace)
}

// drain waits until an instance that is shown as draining has no requests inside.
func (a *Agent) drain(in *instance) error {
	a.awaitDelivered(in.rev)
	a.mu.Lock()
	sidecar, wasReady := in.sidecar, !in.readyAt.IsZero()
	a.mu.Unlock()
	if sidecar == nil || !wasReady {
		return nil
	}
	ctx, cancel := context.WithTimeout(a.endDrain, in.plan.drain)
	defer cancel()
	go func() { // nothing to wait for once it has ended
		select {
		case <-in.prog.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	return sidecar.Drain(ctx)
}

// gone takes an instance that has ended, or never began, out of the revision, and gives back what it had. why is its
// failure, nil if it had been asked to end.
func (a *Agent) gone(in *instance, why *failure) {
	r := in.rev
	a.mu.Lock()
	in.state = endpoints.Gone
	for i, other := range r.instances {
		if other == in {
			r.instances = append(r.instances[:i:i], r.instances[i+1:]...)
			break
		}
	}
	a.used -= in.units()
	a.forgetFrozenLocked(in)
	if in.evicted {
		a.leaving -= in.units()
	}
	if why != nil && !in.stopping {
		a.failLocked(in, why)
	}
	if in.listener != nil {
		// Whoever waits in its accept queue is served by the replacement, if there is to be one soon. Where crashing has
		// become a habit their connections are reset: they would wait for nothing, and nobody would hear why.
		if why != nil && in.prog != nil && !a.stopping && backOff(r.crashes) < longBackOff {
			r.spare = append(r.spare, in.listener)
		} else {
			in.listener.Close()
			a.closeSpareLocked(r, 0)
		}
	}
	a.publishLocked(r)
	a.reconcileLocked(r)
	for other := range a.short {
		a.reconcileLocked(other)
	}
	sidecar := in.sidecar
	a.unlock()

	if sidecar != nil {
		sidecar.Close()
	}
	if in.blank != nil {
		in.blank.close()
	}
	if in.berth != nil {
		in.berth.close()
	}
	if in.ready != nil {
		in.ready.Close()
	}
	a.destroy(in.folder)
	if in.port != 0 {
		a.ports.put(in.port)
	}
	a.logs.Ended(in.logKey())
	if err := os.RemoveAll(a.dir(in.folder)); err != nil {
		a.cfg.Log.Warn("cannot remove the folder of an instance", "instance", in.id, "err", err)
	}
}
