package instance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/internal/endpoints"
)

// record is what is written down of an instance before its process is started: all that a successor of this agent needs,
// except for the process itself, which is written to its own file right after the start, or found by its marker.
// Neither file is flushed to disk: they have to survive the agent, not the machine, whose end is the instances' end as well.
type record struct {
	ID        string    `json:"id"`
	Namespace string    `json:"namespace"`
	Revision  string    `json:"revision"`
	UID       string    `json:"uid"`
	Image     string    `json:"image"`
	Addr      string    `json:"addr"`
	Port      int       `json:"port,omitempty"` // taken from the agent's range; 0 = socket on fd 3
	Made      time.Time `json:"made"`
}

const (
	recordFile   = "instance.json"
	identityFile = "process.json"
)

func newRecord(in *instance) record {
	ns, name := in.rev.id.Split()
	return record{
		ID: in.id, Namespace: ns, Revision: name, UID: in.plan.rev.UID, Image: in.plan.code.Image,
		Addr: in.addr, Port: in.port, Made: in.made,
	}
}

func (r record) revisionID() api.RevisionID { return api.MakeRevisionID(r.Namespace, r.Revision) }

func writeRecord(dir string, r record) error { return writeJSON(filepath.Join(dir, recordFile), r) }

func writeIdentity(dir string, id process.Identity) error {
	return writeJSON(filepath.Join(dir, identityFile), id)
}

func writeJSON(file string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0) // it is there, empty
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

func readJSON(file string, v any) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// leftover is a running instance of a predecessor.
type leftover struct {
	folder string
	record record
	proc   running
}

// loadLeftovers finds the instances that a predecessor left running. What has ended, or cannot be understood any more, is ended
// and removed.
func (a *Agent) loadLeftovers() []*leftover {
	entries, err := os.ReadDir(filepath.Join(a.cfg.Dir, "instances"))
	if err != nil {
		a.cfg.Log.Error("cannot read the folder of instances", "err", err)
		return nil
	}
	var marked map[string][]process.Identity
	if len(entries) > 0 {
		marked, err = a.provider.Marked()
	}
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		a.cfg.Log.Warn("cannot look for processes of instances", "err", err)
	}
	var found []*leftover
	for _, e := range entries {
		folder := e.Name()
		id := "" // the marker that ends in the folder's name
		for marker := range marked {
			if strings.HasSuffix(marker, "-"+folder) {
				id = marker
			}
		}
		l, err := a.loadLeftover(folder, marked[id])
		if err == nil {
			found = append(found, l)
			continue
		}
		if !errors.Is(err, process.ErrGone) {
			a.cfg.Log.Warn("an instance of the last run is ended", "folder", folder, "err", err)
		}
		for _, stray := range marked[id] {
			a.provider.KillStray(stray)
		}
		if err := os.RemoveAll(a.dir(folder)); err != nil {
			a.cfg.Log.Warn("cannot remove the folder of an instance", "folder", folder, "err", err)
		}
	}
	keep := make(map[string]bool, len(found))
	for _, l := range found {
		keep[l.record.ID] = true
	}
	a.provider.Sweep(func(id string) bool { return keep[id] })
	return found
}

func (a *Agent) loadLeftover(folder string, marked []process.Identity) (*leftover, error) {
	dir := a.dir(folder)
	var identity process.Identity
	if err := readJSON(filepath.Join(dir, identityFile), &identity); err != nil {
		if len(marked) == 0 {
			return nil, process.ErrGone // was never used, or never got as far as a process
		}
		identity = marked[0]
	}
	var rec record
	if err := readJSON(filepath.Join(dir, recordFile), &rec); err != nil {
		return nil, err
	}
	if !strings.HasSuffix(rec.ID, "-"+folder) || rec.ID != filepath.Base(rec.ID) {
		return nil, fmt.Errorf("its record is of another instance, %q", rec.ID)
	}
	proc, err := a.provider.Adopt(rec.ID, identity)
	if err != nil {
		return nil, err
	}
	if err := writeIdentity(dir, proc.Identity()); err != nil {
		a.cfg.Log.Warn("cannot note the process of an instance", "instance", rec.ID, "err", err)
	}
	if rec.Port != 0 {
		a.ports.claim(rec.Port)
	}
	k := logs.Key{Namespace: rec.Namespace, Revision: rec.Revision, Instance: rec.ID}
	if _, err := os.Stat(filepath.Join(dir, stdoutFile)); err == nil {
		a.placeLogs(k, "", dir) // the agent was killed before it could; SetRevision tells the service
	} else {
		a.logs.Track(k)
	}
	return &leftover{folder: folder, record: rec, proc: proc}, nil
}

// claimLeftoversLocked makes leftovers of a known revision its instances and ends those that nobody wants.
func (a *Agent) claimLeftoversLocked(r *revision) {
	if len(r.leftovers) == 0 || (r.plan == nil && !r.removed && !a.stopping) {
		return
	}
	for _, l := range r.leftovers {
		if r.removed || r.plan == nil || r.plan.rev.UID != l.record.UID || a.stopping {
			a.endLeftoverLocked(l)
			continue
		}
		in := &instance{
			id: l.record.ID, folder: l.folder, rev: r, plan: r.plan, made: l.record.Made, stop: make(chan struct{}),
			addr: l.record.Addr, adopted: true, state: endpoints.Starting, proc: l.proc, port: l.record.Port,
		}
		r.instances = append(r.instances, in)
		a.instances.Go(func() {
			if in.plan.socket {
				in.listener = in.proc.Listener(in.addr)
			}
			_, in.env = in.plan.environ(in.portNumber(), filepath.Join(a.dir(in.folder), "tmp"))
			a.addSidecar(in)
			a.tend(in, func() {})
		})
	}
	a.cfg.Log.Info("instances of the last run were found", "revision", r.id, "adopted", len(r.instances))
	r.leftovers = nil
	a.publishLocked(r)
}

// endLeftoverLocked ends an instance that never became one of ours.
func (a *Agent) endLeftoverLocked(l *leftover) {
	a.instances.Go(func() {
		a.cfg.Log.Info("an instance of the last run is ended, its revision is gone", "instance", l.record.ID)
		terminate(l.proc, a.cfg.Grace, a.endGrace)
		if l.record.Port != 0 {
			a.ports.put(l.record.Port)
		}
		a.logs.Ended(logs.Key{Namespace: l.record.Namespace, Revision: l.record.Revision, Instance: l.record.ID})
		if err := os.RemoveAll(a.dir(l.folder)); err != nil {
			a.cfg.Log.Warn("cannot remove the folder of an instance", "instance", l.record.ID, "err", err)
		}
		a.mu.Lock()
		a.total--
		a.ended[l.record.ID] = true
		for r := range a.short {
			a.reconcileLocked(r)
		}
		a.unlock()
	})
}

// endUnclaimed ends leftovers whose revisions did not become known in time.
func (a *Agent) endUnclaimed() {
	a.mu.Lock()
	for id, r := range a.revisions {
		if r.plan != nil || a.stopping {
			continue
		}
		for _, l := range r.leftovers {
			a.endLeftoverLocked(l)
		}
		r.leftovers = nil
		if !r.scaled {
			delete(a.revisions, id)
		}
	}
	a.unlock()
}

// sweeper kills processes that left the session and the cgroup of an instance and outlived it. It looks a second after an
// instance has ended, once for all that ended meanwhile.
func (a *Agent) sweeper(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.sweep:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		a.killStrays()
	}
}

func (a *Agent) killStrays() {
	a.mu.Lock()
	ended := a.ended
	a.ended = map[string]bool{}
	a.mu.Unlock()
	if len(ended) == 0 {
		return
	}
	marked, err := a.provider.Marked()
	if err != nil {
		return
	}
	for id, strays := range marked {
		if !ended[id] {
			continue
		}
		for _, s := range strays {
			a.cfg.Log.Warn("a process outlived its instance and is killed", "instance", id, "pid", s.PID)
			a.provider.KillStray(s)
		}
	}
}
