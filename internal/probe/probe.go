// Package probe asks an instance whether it is well: Kubernetes' four kinds of probe (HTTP, TCP, gRPC, a command), run once,
// run until the instance is ready, or run for as long as it lives. It keeps no history and reports to nobody else than its caller.
//
// Connections always go to the address that New was given, never to a host or port that the probe's author wrote: a probe
// must not be a way to reach other addresses of the machine it runs on. The written host becomes the Host header.
package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
)

// Defaults of Options and of fields that a probe leaves at zero.
const (
	// DefaultTimeout is how long one try of a periodic probe takes at most.
	DefaultTimeout = time.Second
	// DefaultFailureThreshold is how many failures in a row make an instance not well (Watch).
	DefaultFailureThreshold = 3
	// DefaultMaxOutput is how much of a command's output or of an HTTP answer's body an error quotes, in bytes.
	DefaultMaxOutput = 1024

	// The first aggressive tries get 100 ms each, so that a lost SYN of a fresh network device costs 100 ms and not a second; each try that
	// runs out of time gets twice as much as the one before, so that a slow answer is understood in the end.
	aggressiveTimeout = 100 * time.Millisecond
)

// ErrUnreachable says that nobody listened at the address: the function itself has not seen the try.
var ErrUnreachable = errors.New("nobody listens")

// Options are the circumstances of a prober. The zero value is usable.
type Options struct {
	Dir       string                                                            // working directory of commands; "" = the caller's
	Env       []string                                                          // environment of commands, "K=V"; nil = empty, not the caller's own
	MaxOutput int                                                               // bytes quoted in errors; 0 = DefaultMaxOutput
	Dial      func(ctx context.Context, network, addr string) (net.Conn, error) // nil = a net.Dialer
	Exec      Exec                                                              // nil = a process of this machine
}

// Exec runs a command where the function lives and returns when it has ended: nil for exit code 0. path is argv[0] as found on
// the function's PATH.
type Exec func(ctx context.Context, path string, argv []string, out io.Writer) error

// Prober runs one probe against one instance. Its methods may be called concurrently: callers of the same method share one
// run, which ends when the last of them has left.
type Prober struct {
	// static after New
	probe api.Probe
	addr  string
	o     Options
	try   func(ctx context.Context) error

	once, ready shared
}

// New makes a prober of p, whose connections go to addr (host:port) whatever port p names. A probe without a handler is a
// TCP probe; more than one handler is an error. p is copied.
func New(p *api.Probe, addr string, o Options) (*Prober, error) {
	pr := &Prober{addr: addr, o: o}
	if p != nil {
		pr.probe = *p
	}
	if o.MaxOutput <= 0 {
		pr.o.MaxOutput = DefaultMaxOutput
	}
	if o.Dial == nil {
		pr.o.Dial = new(net.Dialer).DialContext
	}
	var handlers int
	for _, h := range []struct {
		set bool
		try func(context.Context) error
	}{
		{pr.probe.HTTPGet != nil, pr.tryHTTP},
		{pr.probe.TCPSocket != nil, pr.tryTCP},
		{pr.probe.GRPC != nil, pr.tryGRPC},
		{pr.probe.Exec != nil, pr.tryExec},
	} {
		if h.set {
			handlers++
			pr.try = h.try
		}
	}
	switch {
	case handlers > 1:
		return nil, fmt.Errorf("probe: %d handlers are set, expected one of httpGet, tcpSocket, exec, grpc", handlers)
	case handlers == 0:
		pr.try = pr.tryTCP
	}
	if pr.probe.Exec != nil && len(pr.probe.Exec.Command) == 0 {
		return nil, errors.New("probe: exec.command is empty")
	}
	if _, _, err := net.SplitHostPort(addr); err != nil && pr.probe.Exec == nil {
		return nil, fmt.Errorf("probe: address %q: %w", addr, err)
	}
	if err := pr.checkHTTP(); err != nil {
		return nil, err
	}
	return pr, nil
}

// Aggressive says whether the probe has no period: WaitReady then tries as fast as is sensible.
func (p *Prober) Aggressive() bool { return p.probe.PeriodSeconds <= 0 }

// Once makes one try, limited by the probe's own timeout (DefaultTimeout when it has none), and returns why it failed.
func (p *Prober) Once(ctx context.Context) error {
	return p.once.run(ctx, func(ctx context.Context) error { return p.within(ctx, p.timeout()) })
}

// WaitReady tries until the probe has succeeded successThreshold times in a row, or ctx ends; then the error says so and quotes
// the last failure. Only ctx bounds the wait: failureThreshold says nothing about an instance that is still starting.
//
// A probe without a period (aggressive) begins at once and tries after waits that grow from 0.2 ms by half each, to 2 % of the time
// that has passed (at least 1 ms, at most 50 ms): the port's opening is seen within a millisecond when the function is fast, within 2 % of
// its start when it is slow. With a period, a try that reached the function is followed by a whole period, as its author asked; while
// nobody listens yet, asking costs the function nothing and the wait is the short one.
func (p *Prober) WaitReady(ctx context.Context) error {
	return p.ready.run(ctx, p.waitReady)
}

func (p *Prober) waitReady(ctx context.Context) error {
	if !sleep(ctx, seconds(p.probe.InitialDelaySeconds)) {
		return ended(ctx, nil)
	}
	var (
		need    = max(1, int(p.probe.SuccessThreshold))
		good    int
		began   = time.Now()
		wait    pace
		timeout = p.timeout()
	)
	if p.Aggressive() {
		timeout = aggressiveTimeout
	}
	for {
		err := p.within(ctx, timeout)
		if err == nil {
			if good++; good >= need {
				return nil
			}
		} else {
			good = 0
			if ctx.Err() != nil {
				return ended(ctx, err)
			}
		}
		pause := wait.next(time.Since(began), err)
		switch reached := !errors.Is(err, ErrUnreachable); {
		case !p.Aggressive() && reached:
			pause = seconds(p.probe.PeriodSeconds)
		case errors.Is(err, context.DeadlineExceeded):
			timeout = min(2*timeout, max(DefaultTimeout, p.timeout()))
		}
		if !sleep(ctx, pause) {
			return ended(ctx, err)
		}
	}
}

// Watch runs the probe every period (10 s when it has none, Kubernetes' default) until ctx ends, and calls report whenever its
// verdict changes: well after successThreshold successes in a row, not well after failureThreshold failures in a row, with the
// last failure. well is the verdict to begin with. Calls of report come from Watch's own goroutine, one after the other.
func (p *Prober) Watch(ctx context.Context, well bool, report func(well bool, err error)) {
	if !sleep(ctx, seconds(p.probe.InitialDelaySeconds)) {
		return
	}
	v := verdict{well: well, success: int(p.probe.SuccessThreshold), failure: int(p.probe.FailureThreshold)}
	period := seconds(p.probe.PeriodSeconds)
	if period <= 0 {
		period = 10 * time.Second
	}
	for {
		began := time.Now()
		err := p.Once(ctx)
		if ctx.Err() != nil {
			return
		}
		if v.note(err == nil) {
			report(v.well, err)
		}
		// The period runs from begin to begin, as kubelet's does: a slow probe is not asked more rarely.
		if !sleep(ctx, period-time.Since(began)) {
			return
		}
	}
}

// verdict turns a row of results into well and not well.
type verdict struct {
	well             bool
	success, failure int // thresholds; below 1 = default
	row              int // results in a row that speak against the verdict
}

// note takes one result and says whether the verdict has changed.
func (v *verdict) note(ok bool) bool {
	if ok == v.well {
		v.row = 0
		return false
	}
	v.row++
	need := max(1, v.success)
	if v.well {
		if need = v.failure; need < 1 {
			need = DefaultFailureThreshold
		}
	}
	if v.row < need {
		return false
	}
	v.well, v.row = ok, 0
	return true
}

// pace is how long to wait between aggressive tries.
type pace struct{ last time.Duration }

const (
	firstWait = 200 * time.Microsecond
	maxWait   = 50 * time.Millisecond
)

// next returns the wait after a try that ended with err, elapsed after the first one began.
func (p *pace) next(elapsed time.Duration, err error) time.Duration {
	if p.last == 0 {
		p.last = firstWait
	} else {
		p.last += p.last / 2
	}
	// 2 % of what has passed: the error in the moment found stays proportionate, and so does the work.
	least := time.Millisecond
	if !errors.Is(err, ErrUnreachable) {
		least = 5 * time.Millisecond // the function had to answer that one: spare it
	}
	p.last = min(p.last, max(least, min(elapsed/50, maxWait)))
	return p.last
}

// within makes one try of at most d.
func (p *Prober) within(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	err := p.try(ctx)
	if err != nil && ctx.Err() == context.DeadlineExceeded && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w within %v: %w", context.DeadlineExceeded, d, err)
	}
	return err
}

func (p *Prober) timeout() time.Duration {
	if p.probe.TimeoutSeconds > 0 {
		return seconds(p.probe.TimeoutSeconds)
	}
	return DefaultTimeout
}

// ended says that ctx ended the wait, after last.
func ended(ctx context.Context, last error) error {
	if last == nil {
		return context.Cause(ctx)
	}
	return &endedError{cause: context.Cause(ctx), last: last}
}

// endedError is the end of a wait: why it ended, and the last failure until then.
type endedError struct{ cause, last error }

func (e *endedError) Error() string {
	return "not ready: " + e.last.Error() + " (" + e.cause.Error() + ")"
}
func (e *endedError) Unwrap() []error { return []error{e.cause, e.last} }

func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

// sleep waits for d or for the end of ctx, and says whether it was d.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
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

// shared lets concurrent callers wait for one run of the same thing. The run belongs to all of them: it outlives the one who began
// it, and ends early only when all have left.
type shared struct {
	mu  sync.Mutex
	now *sharedRun // nil = none
}

type sharedRun struct {
	done    chan struct{}
	cancel  context.CancelFunc
	err     error // valid after done
	callers int   // guarded by shared.mu
}

func (s *shared) run(ctx context.Context, f func(context.Context) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	r := s.now
	if r == nil {
		// Without the first caller's end, which is not the end for the others.
		run, cancel := context.WithCancel(context.WithoutCancel(ctx))
		r = &sharedRun{done: make(chan struct{}), cancel: cancel}
		s.now = r
		go func() {
			err := f(run)
			s.mu.Lock()
			if s.now == r {
				s.now = nil
			}
			s.mu.Unlock()
			r.err = err
			cancel()
			close(r.done)
		}()
	}
	r.callers++
	s.mu.Unlock()

	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	r.callers--
	last := r.callers == 0
	if last && s.now == r {
		s.now = nil // whoever comes now must not join a run that is being ended
	}
	s.mu.Unlock()
	if !last {
		return context.Cause(ctx)
	}
	r.cancel()
	<-r.done // nothing of the run is left when its last caller returns
	if r.err == nil {
		return nil // it was quicker than the end
	}
	err := r.err
	if e, ok := errors.AsType[*endedError](err); ok {
		err = e.last
	}
	if errors.Is(err, context.Canceled) {
		err = nil // the run's own end, which is of no interest to the caller
	}
	return ended(ctx, err)
}
