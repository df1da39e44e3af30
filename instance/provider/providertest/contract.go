// Package providertest has what every provider must pass, and a fake one that can be slow, fail, and break each promise: the suite
// is tried on its vices, so that it is known to notice them.
package providertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/thawrun/thaw/instance/provider"
)

// Scripts for /bin/sh that the checks run; the fake knows them by heart.
const (
	Sleeps   = "exec sleep 300"
	Exits    = "exit 3"
	Stubborn = "trap '' TERM; echo deaf; while :; do sleep 0.05; done"
	Counts   = "while :; do echo x; sleep 0.01; done"                            // adds to its output as long as it may
	Looks    = `until cat "$1" 2>/dev/null; do sleep 0.01; done; exec sleep 300` // prints a file as soon as it sees it
)

// Rig is a provider to be checked.
type Rig struct {
	Provider provider.Provider
	Events   *Events
	Dir      string // has the instances' folders
	Note     string // file in such a folder that the provider writes; made empty beforehand
	Reopen   func() (provider.Provider, *Events, error)
}

// Events collects what a provider's watcher is told.
type Events struct {
	mu  sync.Mutex
	all []provider.Event
}

// Add is for Provider.Watch.
func (e *Events) Add(ev provider.Event) {
	e.mu.Lock()
	e.all = append(e.all, ev)
	e.mu.Unlock()
}

// Of returns the events of one instance so far.
func (e *Events) Of(id string) (of []provider.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ev := range e.all {
		if ev.ID == id {
			of = append(of, ev)
		}
	}
	return of
}

// patience is how long anything may take that must happen. The suite's own test has less.
var patience = 10 * time.Second

// await asks until ok, and returns an error that says what did not happen.
func await(what string, ok func() bool) error {
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has not happened in %v", what, patience)
		}
	}
	return nil
}

func (e *Events) await(id string) (provider.Exit, error) {
	if err := await("the event of the end of "+id, func() bool { return len(e.Of(id)) > 0 }); err != nil {
		return provider.Exit{}, err
	}
	return e.Of(id)[0].Exit, nil
}

// Check is one promise.
type Check struct {
	Name string
	Run  func(ctx context.Context, r *Rig) error
}

// Checks are the promises of package provider. Each leaves nothing behind.
var Checks = []Check{
	{"a life", life},
	{"twice is once", twice},
	{"side by side is once", sideBySide},
	{"unknown ids", unknown},
	{"the end is told once", toldOnce},
	{"by force", byForce},
	{"a program that is not there", noProgram},
	{"ends with the context", deadlines},
	{"grants code to a program that runs", grants},
	{"freezes and thaws", freezes},
	{"is found again", found},
	{"is found frozen", foundFrozen},
	{"many at once", many},
	{"costs are measured", costs},
}

// spec describes an instance that runs a script; out is where it prints to.
func (r *Rig) spec(id, script string) (s *provider.Spec, out string, err error) {
	dir := filepath.Join(r.Dir, id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, "", err
	}
	if err := os.WriteFile(filepath.Join(dir, r.Note), nil, 0o644); err != nil {
		return nil, "", err
	}
	f, err := os.OpenFile(filepath.Join(dir, "out"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return nil, "", err
	}
	return &provider.Spec{
		// Not the name of anything that the suite runs elsewhere on this machine, nor of what it has run a second ago: strays are killed by it.
		Name: fmt.Sprintf("contract%d.%d-%s", os.Getpid(), specs.Add(1), id), Path: "/bin/sh", Argv: []string{"sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin"}, Dir: "/",
		Stdout: f, Stderr: f,
	}, f.Name(), nil
}

// specs counts those that were made.
var specs atomic.Int64

// start creates and specialises.
func (r *Rig) start(ctx context.Context, id, script string) (out string, err error) {
	s, out, err := r.spec(id, script)
	if err != nil {
		return "", err
	}
	defer s.Stdout.Close()
	if err := r.Provider.Create(ctx, id); err != nil {
		return "", err
	}
	return out, r.Provider.Specialise(ctx, id, s)
}

// end destroys an instance and its folder, and says what went wrong.
func (r *Rig) end(ctx context.Context, id string) error {
	err := r.Provider.Destroy(ctx, id)
	os.RemoveAll(filepath.Join(r.Dir, id))
	return err
}

func (r *Rig) runs(ctx context.Context, id string) bool {
	ids, err := r.Provider.List(ctx)
	return err == nil && slices.Contains(ids, id)
}

func life(ctx context.Context, r *Rig) error {
	if _, err := r.start(ctx, "life", Sleeps); err != nil {
		return err
	}
	defer r.end(ctx, "life")
	if !r.runs(ctx, "life") {
		return errors.New("a running instance is not listed")
	}
	if s, err := r.Provider.Stats(ctx, "life"); err != nil || s.MemoryBytes == 0 {
		return fmt.Errorf("stats %+v, %v", s, err)
	}
	if err := r.Provider.Stop(ctx, "life"); err != nil {
		return err
	}
	exit, err := r.Events.await("life")
	if err != nil {
		return err
	}
	if exit.Signal != syscall.SIGTERM {
		return fmt.Errorf("a program that does nothing about SIGTERM %v", exit)
	}
	if err := r.Provider.Destroy(ctx, "life"); err != nil {
		return err
	}
	if r.runs(ctx, "life") {
		return errors.New("a destroyed instance is listed")
	}
	return nil
}

func twice(ctx context.Context, r *Rig) error {
	s, _, err := r.spec("twice", Sleeps)
	if err != nil {
		return err
	}
	defer s.Stdout.Close()
	defer r.end(ctx, "twice")
	steps := []func() error{
		func() error { return r.Provider.Create(ctx, "twice") },
		func() error { return r.Provider.Specialise(ctx, "twice", s) },
		func() error { return r.Provider.Stop(ctx, "twice") },
		func() error { return r.Provider.Destroy(ctx, "twice") },
	}
	for i, step := range steps {
		for range 2 {
			if err := step(); err != nil {
				return fmt.Errorf("step %d: %w", i, err)
			}
		}
	}
	if _, err := r.Events.await("twice"); err != nil {
		return err
	}
	time.Sleep(20 * time.Millisecond) // for another one
	if n := len(r.Events.Of("twice")); n != 1 {
		return fmt.Errorf("%d programs have ended, one was asked for", n)
	}
	return nil
}

func sideBySide(ctx context.Context, r *Rig) error {
	s, out, err := r.spec("side", Counts)
	if err != nil {
		return err
	}
	defer s.Stdout.Close()
	defer r.end(ctx, "side")
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := errors.Join(r.Provider.Create(ctx, "side"), r.Provider.Specialise(ctx, "side", s)); err != nil {
				failed.Store(&err)
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	if err := await("output", func() bool { return size(out) > 0 }); err != nil {
		return err
	}
	for range 8 {
		wg.Go(func() { _ = r.Provider.Destroy(ctx, "side") })
	}
	wg.Wait()
	if _, err := r.Events.await("side"); err != nil {
		return err
	}
	if n := len(r.Events.Of("side")); n != 1 {
		return fmt.Errorf("%d programs for one instance", n)
	}
	before := size(out)
	time.Sleep(50 * time.Millisecond) // a second program would print
	if after := size(out); after != before {
		return fmt.Errorf("something of a destroyed instance still prints: %d bytes, then %d", before, after)
	}
	return nil
}

func size(file string) int64 {
	fi, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return fi.Size()
}

func unknown(ctx context.Context, r *Rig) error {
	p := r.Provider
	_, stats := p.Stats(ctx, "nobody")
	_, dial := p.Dial(ctx, "nobody", 80)
	for what, err := range map[string]error{
		"specialise": p.Specialise(ctx, "nobody", &provider.Spec{}), "stats": stats, "dial": dial, "grant": p.Grant(ctx, "nobody", &provider.Spec{}),
	} {
		if !errors.Is(err, provider.ErrUnknown) {
			return fmt.Errorf("%s of an unknown instance: %v", what, err)
		}
	}
	if err := errors.Join(p.Stop(ctx, "nobody"), p.Destroy(ctx, "nobody")); err != nil {
		return err
	}
	for _, id := range []string{"", "..", "a/b", "."} {
		if p.Create(ctx, id) == nil {
			return fmt.Errorf("the id %q was taken", id)
		}
	}
	return nil
}

func toldOnce(ctx context.Context, r *Rig) error {
	if _, err := r.start(ctx, "told", Exits); err != nil {
		return err
	}
	exit, err := r.Events.await("told")
	if err != nil {
		return err
	}
	if exit.Reason() != "ExitCode3" {
		return fmt.Errorf("it %v", exit)
	}
	if _, err := r.Provider.Stats(ctx, "told"); !errors.Is(err, provider.ErrUnknown) {
		return fmt.Errorf("stats of an ended program: %v", err)
	}
	if err := errors.Join(r.Provider.Stop(ctx, "told"), r.end(ctx, "told")); err != nil {
		return err
	}
	time.Sleep(20 * time.Millisecond)
	if n := len(r.Events.Of("told")); n != 1 {
		return fmt.Errorf("its end was told %d times", n)
	}
	return nil
}

func byForce(ctx context.Context, r *Rig) error {
	out, err := r.start(ctx, "force", Stubborn)
	if err != nil {
		return err
	}
	defer r.end(ctx, "force")
	if err := await("the trap", func() bool { return size(out) > 0 }); err != nil {
		return err
	}
	if err := r.Provider.Stop(ctx, "force"); err != nil {
		return err
	}
	time.Sleep(50 * time.Millisecond)
	if len(r.Events.Of("force")) != 0 {
		return errors.New("who ignores SIGTERM was ended by Stop")
	}
	if err := r.Provider.Destroy(ctx, "force"); err != nil {
		return err
	}
	_, err = r.Events.await("force")
	return err
}

func noProgram(ctx context.Context, r *Rig) error {
	s, _, err := r.spec("absent", Sleeps)
	if err != nil {
		return err
	}
	defer s.Stdout.Close()
	defer r.end(ctx, "absent")
	s.Path = "/no/such/program"
	if r.Provider.Prepare(ctx, s) == nil {
		return errors.New("Prepare has nothing to say about a program that is not there")
	}
	if err := r.Provider.Create(ctx, "absent"); err != nil {
		return err
	}
	err = r.Provider.Specialise(ctx, "absent", s)
	if start, ok := errors.AsType[*provider.StartError](err); !ok || !errors.Is(start, os.ErrNotExist) {
		return fmt.Errorf("no *StartError with ENOENT: %v", err)
	}
	return r.Provider.Destroy(ctx, "absent")
}

func deadlines(ctx context.Context, r *Rig) error {
	over, cancel := context.WithCancel(ctx)
	cancel()
	s, _, err := r.spec("late", Sleeps)
	if err != nil {
		return err
	}
	defer s.Stdout.Close()
	defer r.end(ctx, "late")
	p := r.Provider
	_, list := p.List(over)
	_, stats := p.Stats(over, "late")
	for what, err := range map[string]error{
		"prepare": p.Prepare(over, s), "create": p.Create(over, "late"), "specialise": p.Specialise(over, "late", s), "grant": p.Grant(over, "late", s),
		"stop": p.Stop(over, "late"), "destroy": p.Destroy(over, "late"), "list": list, "stats": stats,
	} {
		if !errors.Is(err, context.Canceled) {
			return fmt.Errorf("%s with a context that has ended: %v", what, err)
		}
	}
	if r.runs(ctx, "late") {
		return errors.New("what was refused has happened")
	}
	return errors.Join(p.Create(ctx, "late"), p.Specialise(ctx, "late", s), p.Destroy(ctx, "late")) // may be repeated
}

func grants(ctx context.Context, r *Rig) error {
	p := r.Provider
	code, err := os.MkdirTemp(r.Dir, "code")
	if err != nil {
		return err
	}
	defer os.RemoveAll(code)
	file := filepath.Join(code, "word")
	if err := os.WriteFile(file, []byte("granted\n"), 0o644); err != nil {
		return err
	}
	s, out, err := r.spec("grant", Looks)
	if err != nil {
		return err
	}
	defer s.Stdout.Close()
	defer r.end(ctx, "grant")
	s.Argv = append(s.Argv, "sh", file)
	if err := p.Create(ctx, "grant"); err != nil {
		return err
	}
	if err := p.Grant(ctx, "grant", s); !errors.Is(err, provider.ErrUnknown) {
		return fmt.Errorf("grant without a program: %v", err)
	}
	if err := p.Specialise(ctx, "grant", s); err != nil {
		return err
	}
	if p.Capabilities().OwnFiles {
		time.Sleep(50 * time.Millisecond)
		if size(out) != 0 {
			return errors.New("a program sees a file that it was not granted")
		}
	}
	more := *s
	more.Code = []string{code}
	if err := errors.Join(p.Grant(ctx, "grant", &more), p.Grant(ctx, "grant", &more)); err != nil {
		return err
	}
	if err := await("the sight of what was granted", func() bool { return size(out) > 0 }); err != nil {
		return err
	}
	b, err := os.ReadFile(out)
	if err != nil || string(b) != "granted\n" {
		return fmt.Errorf("it saw %q, %v", b, err)
	}
	return nil
}

func freezes(ctx context.Context, r *Rig) error {
	p := r.Provider
	if !p.Capabilities().Freezes {
		if err := p.Freeze(ctx, "x"); !errors.Is(err, provider.ErrUnsupported) {
			return fmt.Errorf("does not freeze, and says %v", err)
		}
		return nil
	}
	if err := p.Freeze(ctx, "nobody"); !errors.Is(err, provider.ErrUnknown) {
		return fmt.Errorf("freeze of an unknown instance: %v", err)
	}
	out, err := r.start(ctx, "frozen", Counts)
	if err != nil {
		return err
	}
	defer r.end(ctx, "frozen")
	if err := await("output", func() bool { return size(out) > 0 }); err != nil {
		return err
	}
	if err := errors.Join(p.Freeze(ctx, "frozen"), p.Freeze(ctx, "frozen")); err != nil {
		return err
	}
	if s, err := p.Stats(ctx, "frozen"); err != nil || !s.Frozen {
		return fmt.Errorf("a frozen instance's stats: %+v, %v", s, err)
	}
	before := size(out)
	time.Sleep(100 * time.Millisecond)
	if after := size(out); after != before {
		return fmt.Errorf("a frozen instance prints: %d bytes, then %d", before, after)
	}
	if err := errors.Join(p.Thaw(ctx, "frozen"), p.Thaw(ctx, "frozen")); err != nil {
		return err
	}
	if err := await("output after the thaw", func() bool { return size(out) > before }); err != nil {
		return err
	}
	// Stop ends a frozen one too, and so does Destroy.
	if err := errors.Join(p.Freeze(ctx, "frozen"), p.Stop(ctx, "frozen")); err != nil {
		return err
	}
	if _, err := r.Events.await("frozen"); err != nil {
		return err
	}
	if _, err := r.start(ctx, "frozen2", Counts); err != nil {
		return err
	}
	if err := errors.Join(p.Freeze(ctx, "frozen2"), r.end(ctx, "frozen2")); err != nil {
		return err
	}
	_, err = r.Events.await("frozen2")
	return err
}

func found(ctx context.Context, r *Rig) error {
	if r.Reopen == nil {
		return nil
	}
	if _, err := r.start(ctx, "found", Sleeps); err != nil {
		return err
	}
	if err := r.Provider.Create(ctx, "blank"); err != nil { // was never given a program: is gone with the provider
		return err
	}
	p, events, err := r.Reopen()
	if err != nil {
		return err
	}
	ids, err := p.List(ctx)
	if err != nil || !slices.Equal(ids, []string{"found"}) {
		return fmt.Errorf("after the end of the agent %v runs, %v", ids, err)
	}
	again, err := p.List(ctx)
	if err != nil || !slices.Equal(again, ids) {
		return fmt.Errorf("a second look finds %v, %v", again, err)
	}
	r.Provider, r.Events = p, events
	if _, err := p.Stats(ctx, "found"); err != nil {
		return err
	}
	if err := p.Stop(ctx, "found"); err != nil {
		return err
	}
	if _, err := events.await("found"); err != nil {
		return err
	}
	return r.end(ctx, "found")
}

func foundFrozen(ctx context.Context, r *Rig) error {
	if r.Reopen == nil || !r.Provider.Capabilities().Freezes {
		return nil
	}
	out, err := r.start(ctx, "icy", Counts)
	if err != nil {
		return err
	}
	if err := await("output", func() bool { return size(out) > 0 }); err != nil {
		return err
	}
	if err := r.Provider.Freeze(ctx, "icy"); err != nil {
		return err
	}
	p, events, err := r.Reopen()
	if err != nil {
		return err
	}
	if ids, err := p.List(ctx); err != nil || !slices.Equal(ids, []string{"icy"}) {
		return fmt.Errorf("after the end of the agent %v runs, %v", ids, err)
	}
	r.Provider, r.Events = p, events
	if s, err := p.Stats(ctx, "icy"); err != nil || !s.Frozen {
		return fmt.Errorf("stats of an instance that a predecessor froze: %+v, %v", s, err)
	}
	before := size(out)
	if err := p.Thaw(ctx, "icy"); err != nil {
		return err
	}
	if err := await("output after a successor's thaw", func() bool { return size(out) > before }); err != nil {
		return err
	}
	return r.end(ctx, "icy")
}

func many(ctx context.Context, r *Rig) error {
	const n = 24
	errs := make(chan error, n)
	for i := range n {
		go func() {
			id := fmt.Sprintf("many%02d", i)
			_, err := r.start(ctx, id, Sleeps)
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			return err
		}
	}
	ids, err := r.Provider.List(ctx)
	if err != nil || len(ids) != n {
		return fmt.Errorf("%d of %d run, %v", len(ids), n, err)
	}
	for _, id := range ids {
		go func() { errs <- r.end(ctx, id) }()
	}
	for range n {
		if err := <-errs; err != nil {
			return err
		}
	}
	if ids, err = r.Provider.List(ctx); err != nil || len(ids) != 0 {
		return fmt.Errorf("%v are left, %v", ids, err)
	}
	return nil
}

func costs(ctx context.Context, r *Rig) error {
	if _, err := r.start(ctx, "costs", Sleeps); err != nil {
		return err
	}
	freezes := r.Provider.Capabilities().Freezes
	if freezes {
		if err := errors.Join(r.Provider.Freeze(ctx, "costs"), r.Provider.Thaw(ctx, "costs")); err != nil {
			return err
		}
	}
	if err := r.end(ctx, "costs"); err != nil {
		return err
	}
	c := r.Provider.Capabilities().Costs
	all := []time.Duration{c.Create, c.Specialise, c.Destroy}
	if freezes {
		all = append(all, c.Freeze, c.Thaw)
	}
	for _, d := range all {
		if d <= 0 || d > patience {
			return fmt.Errorf("costs %s", strings.TrimPrefix(fmt.Sprintf("%+v", c), "{"))
		}
	}
	return nil
}
