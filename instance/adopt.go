package instance

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/internal/endpoints"
)

// record is what is written down of an instance before its process is started: all that a successor of this agent needs,
// except for what its provider notes of the process.
// Nothing is flushed to disk: they have to survive the agent, not the machine, whose end is the instances' end as well.
type record struct {
	ID        string    `json:"id"`
	Namespace string    `json:"namespace"`
	Revision  string    `json:"revision"`
	UID       string    `json:"uid"`
	Image     string    `json:"image"`
	Provider  string    `json:"provider"` // that runs it
	Addr      string    `json:"addr"`
	Port      int       `json:"port,omitempty"`   // taken from the agent's range; 0 = socket on fd 3
	Inside    bool      `json:"inside,omitempty"` // Addr is in the instance's own network
	Units     int       `json:"units,omitempty"`  // that it takes of the node
	Made      time.Time `json:"made"`
}

const recordFile = "instance.json"

func newRecord(in *instance, provider string) record {
	ns, name := in.rev.id.Split()
	return record{
		ID: in.id, Namespace: ns, Revision: name, UID: in.plan.rev.UID, Image: in.plan.code.Image, Provider: provider,
		Addr: in.addr, Port: in.port, Inside: in.inside, Units: in.units(), Made: in.made,
	}
}

// units is what the instance takes of the node; a record of an older thaw does not say.
func (r record) units() int { return max(1, r.Units) }

func (r record) revisionID() api.RevisionID { return api.MakeRevisionID(r.Namespace, r.Revision) }

func writeRecord(dir string, r record) error { return writeJSON(filepath.Join(dir, recordFile), r) }

func writeJSON(file string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return local.WriteNote(file, b)
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
	prog   *program
	frozen bool
	memory int64
}

// loadLeftovers finds the instances that a predecessor left running. What has ended, or cannot be understood any more, is ended
// and removed.
func (a *Agent) loadLeftovers(ctx context.Context) []*leftover {
	entries, err := os.ReadDir(a.dir(""))
	if err != nil {
		a.cfg.Log.Error("cannot read the folder of instances", "err", err)
		return nil
	}
	programs := map[string]*program{}
	for _, e := range entries { // before List: they may end right after it
		programs[e.Name()] = a.programs.add(e.Name())
	}
	ids, err := a.provider.List(ctx)
	if err != nil {
		a.cfg.Log.Error("cannot look for instances of the last run", "err", err)
	}
	var found []*leftover
	for _, e := range entries {
		folder := e.Name()
		if slices.Contains(ids, folder) {
			l, err := a.loadLeftover(ctx, folder, programs[folder])
			if err == nil {
				found = append(found, l)
				continue
			}
			a.cfg.Log.Warn("an instance of the last run is ended", "folder", folder, "err", err)
		}
		a.destroy(folder)
		if err := os.RemoveAll(a.dir(folder)); err != nil {
			a.cfg.Log.Warn("cannot remove the folder of an instance", "folder", folder, "err", err)
		}
	}
	return found
}

func (a *Agent) loadLeftover(ctx context.Context, folder string, prog *program) (*leftover, error) {
	dir := a.dir(folder)
	var rec record
	if err := readJSON(filepath.Join(dir, recordFile), &rec); err != nil {
		return nil, err
	}
	if !strings.HasSuffix(rec.ID, "-"+folder) || rec.ID != filepath.Base(rec.ID) {
		return nil, fmt.Errorf("its record is of another instance, %q", rec.ID)
	}
	if rec.Provider != a.caps.Name {
		// The address of one that has a network of its own means something else on the machine's.
		return nil, fmt.Errorf("it was started by the provider %q, this is %q", rec.Provider, a.caps.Name)
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
	st, _ := a.provider.Stats(ctx, folder) // if it has ended meanwhile, that will be told
	return &leftover{folder: folder, record: rec, prog: prog, frozen: st.Frozen, memory: st.MemoryBytes}, nil
}

// claimLeftoversLocked makes leftovers of a known revision its instances and ends those that nobody wants.
func (a *Agent) claimLeftoversLocked(r *revision) {
	if len(r.leftovers) == 0 || (r.plan == nil && !r.removed && !a.stopping) {
		return
	}
	for _, l := range r.leftovers {
		if r.removed || r.plan == nil || r.plan.rev.UID != l.record.UID || a.stopping || l.frozen && r.plan.frozenFor <= 0 {
			a.endLeftoverLocked(l)
			continue
		}
		in := &instance{
			id: l.record.ID, folder: l.folder, rev: r, plan: r.plan, made: l.record.Made, stop: make(chan struct{}),
			addr: l.record.Addr, adopted: true, state: endpoints.Starting, prog: l.prog, port: l.record.Port, inside: l.record.Inside,
		}
		r.instances = append(r.instances, in)
		a.used += in.units() - l.record.units()
		if l.frozen {
			in.frozen, in.memory, in.readyAt = true, l.memory, time.Now()
			in.state, in.wake = endpoints.Frozen, make(chan struct{})
			a.frozen = append(a.frozen, in)
		}
		a.instances.Go(func() {
			if in.plan.socket {
				in.listener = a.provider.Socket(in.folder, in.addr)
			}
			_, in.env = in.plan.environ(in.portNumber(), in.plan.homeOr(filepath.Join(a.dir(in.folder), "tmp")))
			if !in.frozen {
				a.addSidecar(in)
			}
			a.tend(in, func() {})
		})
	}
	a.cfg.Log.Info("instances of the last run were found", "revision", r.id, "adopted", len(r.instances))
	r.leftovers = nil
	a.boundFrozenLocked()
	a.publishLocked(r)
}

// endLeftoverLocked ends an instance that never became one of ours.
func (a *Agent) endLeftoverLocked(l *leftover) {
	a.instances.Go(func() {
		a.cfg.Log.Info("an instance of the last run is ended, its revision is gone", "instance", l.record.ID)
		a.stop(l.prog, a.cfg.Grace, a.endGrace)
		a.destroy(l.folder)
		if l.record.Port != 0 {
			a.ports.put(l.record.Port)
		}
		a.logs.Ended(logs.Key{Namespace: l.record.Namespace, Revision: l.record.Revision, Instance: l.record.ID})
		if err := os.RemoveAll(a.dir(l.folder)); err != nil {
			a.cfg.Log.Warn("cannot remove the folder of an instance", "instance", l.record.ID, "err", err)
		}
		a.mu.Lock()
		a.used -= l.record.units()
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
