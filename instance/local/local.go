// Package local makes a provider out of a way to start programs on this machine (a Backend: plain processes, sandboxes). What all
// of them share is here: ids, idempotency, deadlines, the note on disk by which a successor finds an instance, costs, and the
// watcher. The agent calls it; it calls nobody back but the watcher.
package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/instance/provider"
)

// Backend starts programs in places that it makes.
type Backend interface {
	Capabilities() provider.Capabilities // without costs
	Prepare(ctx context.Context, s *provider.Spec) error
	Place(id string) (Place, error)
	// Adopt takes hold of an instance of a predecessor; process.ErrGone when it has ended.
	Adopt(id string, p process.Identity) (*process.Process, Place, error)
	// Marked finds living processes by the name in their provider.Marker.
	Marked() (map[string][]process.Identity, error)
	KillStray(process.Identity)
	Sweep(keep func(id string) bool) // kills and removes what is left of other instances than these in the kernel
	Strays() bool                    // a process may outlive the instance that it came from
	Close()
}

// Place is where one instance runs.
type Place interface {
	Start(s *provider.Spec) (*process.Process, error) // once
	Grant(s *provider.Spec) error                     // once, after Start
	Dial(ctx context.Context, port int) (net.Conn, error)
	Command(ctx context.Context, s *provider.Spec, out io.Writer) error
	Close() // after its process has ended, or if it never had one
}

// Provider is a provider.Provider over a Backend. Make one with New.
type Provider struct {
	backend Backend
	dir     string // DIR/ID/process.json is the note of an instance
	log     *slog.Logger
	caps    provider.Capabilities
	watch   func(provider.Event)
	killing sync.Mutex // held while stray processes are killed, so that Close does not return in the middle of that; before mu

	mu      sync.Mutex
	m       map[string]*entry
	ended   map[string]bool // names whose stray processes have not been looked for yet
	looking bool
	swept   bool // what is in the kernel without a folder was looked for once
	costs   provider.Costs
}

// entry is one instance, from Create to Destroy. busy is held by whoever works on it, and guards what is here; place and proc are
// changed with Provider.mu held too, so that others may look at them.
type entry struct {
	busy    chan struct{} // a mutex that can be waited for with a deadline
	place   Place         // nil = not made
	proc    *process.Process
	name    string
	frozen  bool
	granted bool
	gone    bool // Destroy is done with it
}

// NoteFile is what the identity of an instance's process is written to, in its folder.
const NoteFile = "process.json"

// New makes a provider whose instances have their folders in dir.
func New(b Backend, dir string, log *slog.Logger) *Provider {
	return &Provider{
		backend: b, dir: dir, log: log, caps: b.Capabilities(), watch: func(provider.Event) {},
		m: map[string]*entry{}, ended: map[string]bool{},
	}
}

// Close looks for strays once more and gives up what the provider holds. Instances go on.
func (p *Provider) Close() {
	var empty []Place
	p.mu.Lock()
	for _, e := range p.m {
		if e.place != nil && e.proc == nil {
			empty = append(empty, e.place)
		}
	}
	p.m = map[string]*entry{}
	p.mu.Unlock()
	for _, place := range empty {
		place.Close()
	}
	p.killStrays()
	p.backend.Close()
}

// Capabilities is provider.Provider's.
func (p *Provider) Capabilities() provider.Capabilities {
	c := p.caps
	p.mu.Lock()
	c.Costs = p.costs
	p.mu.Unlock()
	return c
}

// Watch is provider.Provider's.
func (p *Provider) Watch(f func(provider.Event)) { p.watch = f }

// Prepare is provider.Provider's.
func (p *Provider) Prepare(ctx context.Context, s *provider.Spec) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return p.backend.Prepare(ctx, s)
}

// with runs f as the only operation on an instance. It is made if it is not there, when that is asked for.
func (p *Provider) with(ctx context.Context, id string, mk bool, f func(e *entry) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	for {
		p.mu.Lock()
		e := p.m[id]
		if e == nil && mk {
			e = &entry{busy: make(chan struct{}, 1)}
			p.m[id] = e
		}
		p.mu.Unlock()
		if e == nil {
			return fmt.Errorf("instance %s: %w", id, provider.ErrUnknown)
		}
		select {
		case e.busy <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		if e.gone { // while we waited; the id may be there anew
			<-e.busy
			continue
		}
		err := f(e)
		<-e.busy
		return err
	}
}

// forget ends an entry that is being worked on.
func (p *Provider) forget(id string, e *entry) {
	p.mu.Lock()
	e.gone = true
	delete(p.m, id)
	p.mu.Unlock()
}

// took adds a measurement to an average; the first is the average.
func (p *Provider) took(cost *time.Duration, began time.Time) {
	d := time.Since(began)
	p.mu.Lock()
	if *cost == 0 {
		*cost = d
	} else {
		*cost += (d - *cost) / 8
	}
	p.mu.Unlock()
}

// Create is provider.Provider's.
func (p *Provider) Create(ctx context.Context, id string) error {
	if id == "" || id != filepath.Base(id) || strings.HasPrefix(id, ".") {
		return fmt.Errorf("instance id %q is not a plain name", id)
	}
	return p.with(ctx, id, true, func(e *entry) error {
		if e.place != nil {
			return nil
		}
		began := time.Now()
		place, err := p.backend.Place(id)
		if err != nil {
			p.forget(id, e)
			return fmt.Errorf("place for an instance: %w", err)
		}
		p.mu.Lock()
		e.place = place
		p.mu.Unlock()
		p.took(&p.costs.Create, began)
		return nil
	})
}

// Specialise is provider.Provider's.
func (p *Provider) Specialise(ctx context.Context, id string, s *provider.Spec) error {
	return p.with(ctx, id, false, func(e *entry) error {
		if e.proc != nil {
			return nil
		}
		if s.Network != nil && !p.caps.OwnNetwork {
			return fmt.Errorf("a network for instance %s: %w", id, provider.ErrUnsupported)
		}
		began := time.Now()
		proc, err := e.place.Start(s)
		if err != nil {
			return err
		}
		s.Started = time.Now()
		p.took(&p.costs.Specialise, began)
		p.run(id, e, s.Name, e.place, proc)
		return nil
	})
}

// run notes a process, and looks after it until it has ended.
func (p *Provider) run(id string, e *entry, name string, place Place, proc *process.Process) {
	e.name = name
	p.mu.Lock()
	e.place, e.proc = place, proc
	p.mu.Unlock()
	go func() { // as long as the process lives, which may be longer than we are used
		select {
		case <-time.After(process.Later):
			// If we are killed before this is written, the process is found by its marker.
			if err := writeNote(filepath.Join(p.dir, id, NoteFile), proc.Identity()); err != nil && !errors.Is(err, fs.ErrNotExist) {
				p.log.Warn("cannot note the process of an instance", "instance", name, "err", err)
			}
			<-proc.Done()
		case <-proc.Done():
		}
		p.lookForStrays(name)
		p.watch(provider.Event{ID: id, Exit: proc.Exit()})
	}()
}

func writeNote(file string, id process.Identity) error {
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return WriteNote(file, b)
}

// WriteNote writes to a file that is there, most often empty: nothing is made in a folder that somebody has removed. Truncating comes last,
// and only where it has to: ext4 takes a file that was truncated and closed for one that is being replaced, and has the disk write it at once.
func WriteNote(file string, b []byte) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if fi, err2 := f.Stat(); err == nil && (err2 != nil || fi.Size() > int64(len(b))) {
		err = f.Truncate(int64(len(b)))
	}
	return errors.Join(err, f.Close())
}

// Grant is provider.Provider's.
func (p *Provider) Grant(ctx context.Context, id string, s *provider.Spec) error {
	return p.with(ctx, id, false, func(e *entry) error {
		if e.proc == nil || ended(e.proc) {
			return fmt.Errorf("instance %s runs no program: %w", id, provider.ErrUnknown)
		}
		if e.granted {
			return nil
		}
		if err := e.place.Grant(s); err != nil {
			return err
		}
		e.granted, e.name = true, s.Name
		return nil
	})
}

// Freeze is provider.Provider's.
func (p *Provider) Freeze(ctx context.Context, id string) error { return p.freeze(ctx, id, true) }

// Thaw is provider.Provider's.
func (p *Provider) Thaw(ctx context.Context, id string) error { return p.freeze(ctx, id, false) }

func (p *Provider) freeze(ctx context.Context, id string, frozen bool) error {
	if !p.caps.Freezes {
		return provider.ErrUnsupported
	}
	return p.with(ctx, id, false, func(e *entry) error {
		if e.proc == nil || ended(e.proc) {
			return fmt.Errorf("instance %s runs no program: %w", id, provider.ErrUnknown)
		}
		if e.frozen == frozen {
			return nil
		}
		began := time.Now()
		if err := e.proc.Freeze(ctx, frozen); err != nil {
			return err
		}
		e.frozen = frozen
		cost := &p.costs.Thaw
		if frozen {
			cost = &p.costs.Freeze
		}
		p.took(cost, began)
		return nil
	})
}

func ended(proc *process.Process) bool {
	select {
	case <-proc.Done():
		return true
	default:
		return false
	}
}

// Stop is provider.Provider's.
func (p *Provider) Stop(ctx context.Context, id string) error {
	err := p.with(ctx, id, false, func(e *entry) error {
		if e.proc == nil {
			return nil
		}
		e.proc.Terminate()
		if e.frozen { // a signal is acted upon only by those who run
			e.frozen = false
			return e.proc.Freeze(ctx, false)
		}
		return nil
	})
	if errors.Is(err, provider.ErrUnknown) {
		return nil
	}
	return err
}

// Destroy is provider.Provider's.
func (p *Provider) Destroy(ctx context.Context, id string) error {
	err := p.with(ctx, id, false, func(e *entry) error {
		began := time.Now()
		if e.proc != nil {
			e.proc.Kill()
			select {
			case <-e.proc.Done():
			case <-ctx.Done():
				return fmt.Errorf("instance %s is being killed: %w", id, ctx.Err())
			}
		}
		if e.place != nil {
			e.place.Close()
		}
		p.forget(id, e)
		if e.proc != nil {
			p.took(&p.costs.Destroy, began)
		}
		return nil
	})
	if errors.Is(err, provider.ErrUnknown) {
		return nil
	}
	return err
}

// Stats is provider.Provider's.
func (p *Provider) Stats(ctx context.Context, id string) (s provider.Stats, err error) {
	err = p.with(ctx, id, false, func(e *entry) error {
		if e.proc == nil || ended(e.proc) {
			return fmt.Errorf("instance %s runs no program: %w", id, provider.ErrUnknown)
		}
		s = e.proc.Group().Stats()
		s.Frozen = e.proc.Frozen()
		// A group of cgroup v1, which the process got into after its exec, does not know of what it had before.
		s.MemoryBytes = max(s.MemoryBytes, e.proc.Memory())
		return nil
	})
	return s, err
}

// place returns where an instance is. It is not waited for: to dial is no change.
func (p *Provider) place(id string) (Place, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.m[id]; e != nil && e.place != nil {
		return e.place, nil
	}
	return nil, fmt.Errorf("instance %s: %w", id, provider.ErrUnknown)
}

// Dial is provider.Provider's.
func (p *Provider) Dial(ctx context.Context, id string, port int) (net.Conn, error) {
	place, err := p.place(id)
	if err != nil {
		return nil, err
	}
	return place.Dial(ctx, port)
}

// Command is provider.Provider's.
func (p *Provider) Command(ctx context.Context, id string, s *provider.Spec, out io.Writer) error {
	place, err := p.place(id)
	if err != nil {
		return err
	}
	return place.Command(ctx, s, out)
}

// Socket is provider.Provider's.
func (p *Provider) Socket(id, addr string) *os.File {
	p.mu.Lock()
	var proc *process.Process
	if e := p.m[id]; e != nil {
		proc = e.proc
	}
	p.mu.Unlock()
	if proc == nil {
		return nil
	}
	return proc.Listener(addr)
}
