package instance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/probe"
)

// awaitReady returns nil when the instance takes requests, else errStopped, errExited or a *failure. ctx ends with the
// instance.
func (a *Agent) awaitReady(ctx context.Context, in *instance) error {
	p := in.plan
	ctx, cancel := context.WithTimeoutCause(ctx, p.progress, errProgress)
	defer cancel()
	if p.startup != nil {
		if err := a.awaitStartup(ctx, in); err != nil {
			return a.whyNot(in, err)
		}
	}
	if !plainTCP(p.readiness) {
		pr, err := probe.New(p.readiness, in.addr, a.probing(in))
		if err != nil {
			return &failure{reasonStartFailed, err.Error()}
		}
		return a.whyNot(in, pr.WaitReady(ctx))
	}
	if in.ready != nil {
		return a.whyNot(in, awaitWord(ctx, in.ready))
	}
	if p.socket {
		// It listens since before it began: requests can come. Only a revision that has never been ready must show that it works.
		if in.listener == nil || p.rev.Ready() {
			return nil
		}
		return a.whyNot(in, awaitAccept(ctx, in.addr, in.listener))
	}
	return a.whyNot(in, awaitPort(ctx, in.addr, a.dialer(in)))
}

// probing says how probes reach an instance.
func (a *Agent) probing(in *instance) probe.Options {
	o := probe.Options{Dir: in.plan.dir, Env: in.env, Dial: a.dialer(in)}
	if a.caps.OwnFiles {
		o.Exec = func(ctx context.Context, path string, argv []string, out io.Writer) error {
			s := in.plan.spec()
			s.Name, s.Path, s.Argv, s.Env = in.id, path, argv, in.env
			return a.provider.Command(ctx, in.folder, s, out)
		}
	}
	return o
}

// errProgress is the cause of a context that ended with the progress deadline.
var errProgress = errors.New("progress deadline")

// awaitStartup runs the startup probe, which has failureThreshold periods to succeed.
func (a *Agent) awaitStartup(ctx context.Context, in *instance) error {
	s := in.plan.startup
	pr, err := probe.New(s, in.addr, a.probing(in))
	if err != nil {
		return &failure{reasonStartFailed, err.Error()}
	}
	if s.PeriodSeconds > 0 {
		tries := max(1, int(s.FailureThreshold))
		limit := time.Duration(s.InitialDelaySeconds)*time.Second + time.Duration(tries)*time.Duration(s.PeriodSeconds)*time.Second
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, &failure{reasonStartup,
			fmt.Sprintf("instance %s did not pass its startup probe within %v", in.id, limit)})
		defer cancel()
	}
	return pr.WaitReady(ctx)
}

// whyNot turns the end of a wait into its reason.
func (a *Agent) whyNot(in *instance, err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-in.prog.done:
		return errExited
	default:
	}
	select {
	case <-in.stop:
		return errStopped
	default:
	}
	if f, ok := errors.AsType[*failure](err); ok {
		return f
	}
	if errors.Is(err, errProgress) {
		return &failure{api.ReasonProgressDeadlineExceeded,
			fmt.Sprintf("instance %s was not ready within %v (%v)", in.id, in.plan.progress, err)}
	}
	return &failure{reasonStartFailed, err.Error()}
}

// plainTCP says that a probe is the default one: can the port be connected to, asked as often as is sensible.
func plainTCP(p *api.Probe) bool {
	return p == nil || p.HTTPGet == nil && p.Exec == nil && p.GRPC == nil &&
		p.PeriodSeconds == 0 && p.InitialDelaySeconds == 0 && p.SuccessThreshold <= 1
}

// awaitPort connects until somebody listens. The waits grow from 0.2 ms by half each to 0.5 ms, later to 2 % of the time that
// has passed, at most 50 ms: a fast function is seen within half a millisecond, a slow one within 2 % of its start.
func awaitPort(ctx context.Context, address string, dial Dialer) error {
	began := time.Now()
	addr, err := net.ResolveTCPAddr("tcp4", address) // an IP address: nothing is looked up
	if err != nil {
		return err
	}
	var said error // by the kernel, last; that the time of a try was over says less
	for wait := 200 * time.Microsecond; ; wait += wait / 2 {
		err := tryOnce(ctx, addr, dial)
		if err == nil {
			return nil
		}
		late, timed := errors.AsType[net.Error](err)
		if timed = timed && late.Timeout(); !timed {
			said = err
		}
		wait = min(wait, max(500*time.Microsecond, min(time.Since(began)/50, 50*time.Millisecond)))
		if pause(ctx, wait) {
			continue
		}
		if timed && said != nil {
			err = fmt.Errorf("%w; before that %w", err, said)
		}
		return fmt.Errorf("%w: connect to %s: %w", context.Cause(ctx), address, err)
	}
}

// connectTimeout bounds one try: on loopback a connection is made or refused at once, unless the function's accept queue is full.
const connectTimeout = 100 * time.Millisecond

// tryOnce says whether somebody listens at addr.
func tryOnce(ctx context.Context, addr *net.TCPAddr, dial Dialer) error {
	if dial == nil {
		return tryConnect(ctx, addr)
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	c, err := dial(ctx, "tcp4", addr.String())
	if err == nil {
		c.Close()
	}
	return err
}

// awaitWord waits for the byte that the function writes when it is ready.
func awaitWord(ctx context.Context, r *os.File) error {
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var b [1]byte
	_, err := r.Read(b[:])
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%w: nothing was written to descriptor 4", context.Cause(ctx))
	}
	return &failure{reasonStartFailed, "the function closed descriptor 4 without writing the byte that says ready (annotation " + api.AnnotationReady + ")"}
}

// awaitAccept makes a connection and returns when the function has taken it out of the accept queue of its socket.
func awaitAccept(ctx context.Context, address string, listener *os.File) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp4", address)
	if err != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	defer conn.Close()
	for began := time.Now(); accepting(listener) > 0; {
		if !pause(ctx, min(time.Millisecond+time.Since(began)/50, 50*time.Millisecond)) {
			return fmt.Errorf("%w: no connection was accepted at %s", context.Cause(ctx), address)
		}
	}
	return nil
}

// pause waits and says whether ctx is still open. An idle Go program rounds timers up to the next millisecond, so the short
// waits are slept by the thread.
func pause(ctx context.Context, d time.Duration) bool {
	if d < 1500*time.Microsecond {
		nap(d)
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// watch looks after a ready instance: errStopped, errExited, or a *failure when its liveness probe fails.
func (a *Agent) watch(ctx context.Context, in *instance) error {
	p := in.plan
	o := a.probing(in)
	dead := make(chan error, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if p.liveness != nil {
		pr, err := probe.New(p.liveness, in.addr, o)
		if err != nil {
			return &failure{reasonStartFailed, err.Error()}
		}
		wg.Go(func() {
			pr.Watch(ctx, true, func(well bool, err error) {
				if !well {
					select {
					case dead <- err:
					default:
					}
				}
			})
		})
	}
	// That a process does not listen any more though it lives is not worth a connection every ten seconds for each
	// instance; whoever wants it says so with a period.
	if !plainTCP(p.readiness) {
		pr, err := probe.New(p.readiness, in.addr, o)
		if err != nil {
			return &failure{reasonStartFailed, err.Error()}
		}
		wg.Go(func() { pr.Watch(ctx, true, func(well bool, err error) { a.setWell(in, well, err) }) })
	}
	select {
	case <-in.prog.done:
		return errExited
	case <-in.stop:
		return errStopped
	case err := <-dead:
		return &failure{reasonLiveness, fmt.Sprintf("instance %s failed its liveness probe: %v", in.id, err)}
	}
}
