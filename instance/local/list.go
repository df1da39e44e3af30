package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/instance/provider"
)

// List is provider.Provider's. A folder in dir is the sign of an instance: processes and groups without one are ended.
func (p *Provider) List(ctx context.Context) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	var unknown []string // folders without an instance that we know
	p.mu.Lock()
	for _, d := range entries {
		if p.m[d.Name()] == nil {
			unknown = append(unknown, d.Name())
		}
	}
	p.mu.Unlock()
	if err := p.adopt(ctx, unknown); err != nil {
		return nil, err
	}
	var ids []string
	p.mu.Lock()
	sweep := len(unknown) > 0 || !p.swept
	p.swept = true
	for id, e := range p.m {
		if e.proc != nil && !ended(e.proc) {
			ids = append(ids, id)
		}
	}
	p.mu.Unlock()
	if sweep {
		p.backend.Sweep(func(id string) bool { // as it is now: an entry is there before anything of it is in the kernel
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.m[id] != nil
		})
	}
	return ids, nil
}

// adopt takes hold of what runs in folders that we do not know, and ends what it cannot understand.
func (p *Provider) adopt(ctx context.Context, folders []string) error {
	if len(folders) == 0 {
		return nil
	}
	marked, err := p.backend.Marked()
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		p.log.Warn("cannot look for processes of instances", "err", err)
	}
	byID := map[string]string{} // id -> name
	for name := range marked {
		byID[idOf(name)] = name
	}
	for _, id := range folders {
		name, found := byID[id]
		err := p.with(ctx, id, true, func(e *entry) error {
			proc, place, err := p.find(id, marked[name])
			if err != nil {
				p.forget(id, e)
				return err
			}
			e.frozen = proc.Frozen()
			p.run(id, e, name, place, proc)
			return nil
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, process.ErrGone) {
			p.log.Warn("an instance of the last run is ended", "folder", id, "err", err)
		}
		if found {
			for _, stray := range marked[name] {
				p.backend.KillStray(stray)
			}
		}
	}
	return nil
}

// find looks for the process of an instance: the one that was noted, else the first that carries its mark.
func (p *Provider) find(id string, marked []process.Identity) (*process.Process, Place, error) {
	var identity process.Identity
	b, err := os.ReadFile(filepath.Join(p.dir, id, NoteFile))
	if err != nil || json.Unmarshal(b, &identity) != nil {
		if len(marked) == 0 {
			return nil, nil, process.ErrGone // was never used, or never got as far as a process
		}
		identity = marked[0]
	}
	return p.backend.Adopt(id, identity)
}

// idOf returns the id that an instance's name ends in.
func idOf(name string) string { return name[strings.LastIndexByte(name, '-')+1:] }

// lookForStrays kills processes that left the session and the groups of an instance and outlived it. It looks a second after
// an instance has ended, once for all that ended meanwhile.
func (p *Provider) lookForStrays(name string) {
	if name == "" || !p.backend.Strays() {
		return
	}
	p.mu.Lock()
	p.ended[name] = true
	mine := !p.looking
	p.looking = true
	p.mu.Unlock()
	if mine {
		time.AfterFunc(time.Second, p.killStrays)
	}
}

func (p *Provider) killStrays() {
	p.killing.Lock()
	defer p.killing.Unlock()
	p.mu.Lock()
	ended := p.ended
	p.ended, p.looking = map[string]bool{}, false
	p.mu.Unlock()
	if len(ended) == 0 {
		return
	}
	marked, err := p.backend.Marked()
	if err != nil {
		return
	}
	for name, strays := range marked {
		if !ended[name] {
			continue
		}
		for _, s := range strays {
			p.log.Warn("a process outlived its instance and is killed", "instance", name, "pid", s.PID)
			p.backend.KillStray(s)
		}
	}
}

// Measure fills the costs by running a small program once, for those who want to plan before the first real start. Errors leave
// costs at zero.
func (p *Provider) Measure(ctx context.Context) error {
	const id = "measure"
	defer p.Destroy(context.WithoutCancel(ctx), id)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	s := &provider.Spec{
		Name: "thaw-" + id, Path: "/bin/sleep", Argv: []string{"sleep", "60"}, Dir: "/", Stdout: null, Stderr: null,
	}
	if err := p.Create(ctx, id); err != nil {
		return err
	}
	if err := p.Specialise(ctx, id, s); err != nil {
		return err
	}
	if !p.caps.Freezes {
		return nil
	}
	return errors.Join(p.Freeze(ctx, id), p.Thaw(ctx, id))
}
