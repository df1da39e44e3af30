package providertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/thawrun/thaw/instance/provider"
)

// Fake runs nothing. It keeps the promises of a provider in memory, takes as long as it is told, fails when it is told, and can be
// given a vice. It knows the scripts of this package; any other program listens nowhere and lives until it is stopped.
type Fake struct {
	Delay time.Duration         // of every operation
	Fault func(op string) error // asked before each operation ("create", "specialise", …); nil = no faults
	Vice  string                // breaks one promise: see Vices

	mu    sync.Mutex
	m     map[string]*fakeInstance
	watch func(provider.Event)
	costs provider.Costs
}

// Vices are what Fake.Vice may be, and the check that must notice it.
var Vices = map[string]string{
	"starts again":         "twice is once",
	"tells twice":          "the end is told once",
	"forgets to tell":      "a life",
	"takes any id":         "unknown ids",
	"knows everybody":      "unknown ids",
	"ignores the context":  "ends with the context",
	"ends the stubborn":    "by force",
	"swallows ENOENT":      "a program that is not there",
	"does not freeze":      "freezes and thaws",
	"lists the dead":       "many at once",
	"loses what ran":       "is found again",
	"forgets who froze":    "is found frozen",
	"grants nothing":       "grants code to a program that runs",
	"grants to nobody":     "grants code to a program that runs",
	"does not measure":     "costs are measured",
	"locks nothing":        "side by side is once",
	"leaves it in the way": "a life",
}

type fakeInstance struct {
	script  string        // "" = blank
	printer chan struct{} // ends Counts
	frozen  atomic.Bool
	mu      sync.Mutex // held while Counts prints, which may outlive the Fake: who ends or freezes it takes it
	ended   bool
	looks   *provider.Spec
	stuck   bool // nobody knows any more that it is frozen
}

// Keep hands the instances to a successor, as the kernel does when an agent ends.
func (f *Fake) Keep() *Fake {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := &Fake{Delay: f.Delay, Fault: f.Fault, Vice: f.Vice, m: map[string]*fakeInstance{}}
	for id, in := range f.m {
		if in.script != "" && f.Vice != "loses what ran" {
			in.stuck = in.frozen.Load() && f.Vice == "forgets who froze"
			n.m[id] = in
		}
	}
	f.m = nil
	return n
}

// op is what each operation begins with: its delay, its fault, and the lock.
func (f *Fake) op(ctx context.Context, name string) (unlock func(), err error) {
	if f.Vice == "ignores the context" {
		ctx = context.WithoutCancel(ctx)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if f.Fault != nil {
		if err := f.Fault(name); err != nil {
			return nil, err
		}
	}
	f.mu.Lock()
	if f.m == nil {
		f.m = map[string]*fakeInstance{}
	}
	return f.mu.Unlock, nil
}

func (f *Fake) find(id string) (*fakeInstance, error) {
	if in := f.m[id]; in != nil {
		return in, nil
	}
	if f.Vice == "knows everybody" {
		return &fakeInstance{script: Sleeps}, nil
	}
	return nil, fmt.Errorf("instance %s: %w", id, provider.ErrUnknown)
}

func (f *Fake) Capabilities() provider.Capabilities {
	f.mu.Lock()
	defer f.mu.Unlock()
	return provider.Capabilities{Name: "fake", Isolation: "fake: runs nothing", Freezes: true, Path: "/bin", Costs: f.costs}
}

func (f *Fake) Prepare(ctx context.Context, s *provider.Spec) error {
	unlock, err := f.op(ctx, "prepare")
	if err != nil {
		return err
	}
	defer unlock()
	if strings.HasPrefix(s.Path, "/no/") {
		return os.ErrNotExist
	}
	return nil
}

func (f *Fake) Create(ctx context.Context, id string) error {
	unlock, err := f.op(ctx, "create")
	if err != nil {
		return err
	}
	defer unlock()
	if (id == "" || strings.Contains(id, "/") || strings.HasPrefix(id, ".")) && f.Vice != "takes any id" {
		return errors.New("not an id")
	}
	if f.m[id] == nil {
		f.m[id] = &fakeInstance{}
	}
	f.measure(func(c *provider.Costs) *time.Duration { return &c.Create })
	return nil
}

func (f *Fake) measure(of func(*provider.Costs) *time.Duration) {
	if f.Vice != "does not measure" {
		*of(&f.costs) = max(f.Delay, 1)
	}
}

func (f *Fake) Specialise(ctx context.Context, id string, s *provider.Spec) error {
	unlock, err := f.op(ctx, "specialise")
	if err != nil {
		return err
	}
	defer unlock()
	in, err := f.find(id)
	if err != nil {
		return err
	}
	again := in.script != "" && (f.Vice == "starts again" || f.Vice == "locks nothing")
	if in.script != "" && !again {
		return nil
	}
	if strings.HasPrefix(s.Path, "/no/") && f.Vice != "swallows ENOENT" {
		return &provider.StartError{Path: s.Path, Err: syscall.ENOENT}
	}
	if again {
		f.tell(id, provider.Exit{Known: true})
	}
	in.script, s.Started = "other", time.Now()
	if len(s.Argv) >= 3 {
		in.script = s.Argv[2]
	}
	f.measure(func(c *provider.Costs) *time.Duration { return &c.Specialise })
	switch in.script {
	case Exits:
		f.finish(id, in, provider.Exit{Known: true, Code: 3})
	case Stubborn:
		if _, err := s.Stdout.WriteString("deaf\n"); err != nil {
			return err
		}
	case Looks:
		in.looks = s
	case Counts:
		in.printer = make(chan struct{})
		out, err := os.OpenFile(s.Stdout.Name(), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		go f.print(in, out, in.printer)
	}
	return nil
}

// print is given what it uses without the lock.
func (f *Fake) print(in *fakeInstance, out *os.File, end <-chan struct{}) {
	defer out.Close()
	for {
		in.mu.Lock()
		select {
		case <-end:
			in.mu.Unlock()
			return
		default:
		}
		if !in.frozen.Load() || f.Vice == "does not freeze" {
			fmt.Fprintln(out, "x")
		}
		in.mu.Unlock()
		select {
		case <-end:
		case <-time.After(time.Millisecond):
		}
	}
}

// finish ends a program. The lock is held.
func (f *Fake) finish(id string, in *fakeInstance, e provider.Exit) {
	if in.ended {
		return
	}
	in.ended = true
	if in.printer != nil {
		in.mu.Lock()
		close(in.printer)
		in.mu.Unlock()
	}
	if f.Vice != "forgets to tell" {
		f.tell(id, e)
	}
	if f.Vice == "tells twice" {
		f.tell(id, e)
	}
}

func (f *Fake) tell(id string, e provider.Exit) {
	if f.watch != nil {
		go f.watch(provider.Event{ID: id, Exit: e})
	}
}

// Grant lets a program that looks for a file see it.
func (f *Fake) Grant(ctx context.Context, id string, s *provider.Spec) error {
	unlock, err := f.op(ctx, "grant")
	if err != nil {
		return err
	}
	defer unlock()
	in, err := f.find(id)
	if err != nil {
		return err
	}
	switch {
	case in.script == "" && f.Vice != "grants to nobody":
		return fmt.Errorf("instance %s: %w", id, provider.ErrUnknown)
	case in.looks == nil || f.Vice == "grants nothing":
		return nil
	}
	b, err := os.ReadFile(in.looks.Argv[4])
	if err != nil {
		return err
	}
	_, err = in.looks.Stdout.Write(b)
	in.looks = nil
	return err
}

func (f *Fake) Freeze(ctx context.Context, id string) error { return f.freeze(ctx, id, true) }
func (f *Fake) Thaw(ctx context.Context, id string) error   { return f.freeze(ctx, id, false) }

func (f *Fake) freeze(ctx context.Context, id string, frozen bool) error {
	op := "thaw"
	if frozen {
		op = "freeze"
	}
	unlock, err := f.op(ctx, op)
	if err != nil {
		return err
	}
	defer unlock()
	in, err := f.find(id)
	if err != nil {
		return err
	}
	in.mu.Lock()
	in.frozen.Store(frozen || in.stuck)
	in.mu.Unlock()
	f.measure(func(c *provider.Costs) *time.Duration { return &c.Freeze })
	f.measure(func(c *provider.Costs) *time.Duration { return &c.Thaw })
	return nil
}

func (f *Fake) Stop(ctx context.Context, id string) error {
	unlock, err := f.op(ctx, "stop")
	if err != nil {
		return err
	}
	defer unlock()
	if in := f.m[id]; in != nil && in.script != "" && (in.script != Stubborn || f.Vice == "ends the stubborn") {
		f.finish(id, in, provider.Exit{Known: true, Code: 143, Signal: syscall.SIGTERM})
	}
	return nil
}

func (f *Fake) Destroy(ctx context.Context, id string) error {
	unlock, err := f.op(ctx, "destroy")
	if err != nil {
		return err
	}
	defer unlock()
	in := f.m[id]
	if in == nil {
		return nil
	}
	if in.script != "" {
		f.finish(id, in, provider.Exit{Known: true, Code: 137, Signal: syscall.SIGKILL})
	}
	switch f.Vice {
	case "lists the dead", "leaves it in the way":
		in.ended = false
	default:
		delete(f.m, id)
	}
	f.measure(func(c *provider.Costs) *time.Duration { return &c.Destroy })
	return nil
}

// Die ends a program as a crash does.
func (f *Fake) Die(id string, e provider.Exit) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if in := f.m[id]; in != nil && in.script != "" {
		f.finish(id, in, e)
	}
}

func (f *Fake) List(ctx context.Context) ([]string, error) {
	unlock, err := f.op(ctx, "list")
	if err != nil {
		return nil, err
	}
	defer unlock()
	var ids []string
	for id, in := range f.m {
		if in.script != "" && !in.ended {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

func (f *Fake) Watch(w func(provider.Event)) { f.watch = w }

func (f *Fake) Stats(ctx context.Context, id string) (provider.Stats, error) {
	unlock, err := f.op(ctx, "stats")
	if err != nil {
		return provider.Stats{}, err
	}
	defer unlock()
	in, err := f.find(id)
	if err != nil || in.ended || in.script == "" {
		return provider.Stats{}, fmt.Errorf("instance %s: %w", id, provider.ErrUnknown)
	}
	return provider.Stats{MemoryBytes: 1 << 20, PIDs: 1, Frozen: in.frozen.Load()}, nil
}

// Dial connects to a server in memory that closes at once.
func (f *Fake) Dial(ctx context.Context, id string, _ int) (net.Conn, error) {
	unlock, err := f.op(ctx, "dial")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := f.find(id); err != nil {
		return nil, err
	}
	a, b := net.Pipe()
	b.Close()
	return a, nil
}

func (f *Fake) Socket(string, string) *os.File { return nil }

func (f *Fake) Command(context.Context, string, *provider.Spec, io.Writer) error {
	return provider.ErrUnsupported
}

func (f *Fake) Close() {}
