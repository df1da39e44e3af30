// Package instance is the node agent: it runs the instances of revisions on this machine. It is told what should be
// (SetRevision, Scale), makes it so, and says what is (Subscribe); it never asks anybody. Between an order and the start of a
// process there is no disk flush, no network and no other part.
//
// What the agent promises:
//
//   - Orders are desired state. They may be repeated, come in any order, and come before the revision is known.
//   - Subscribers get a snapshot after every change, in order for each revision; changes that come while they are told fold into one. They
//     may call the agent.
//   - An instance is shown as draining before its queue-proxy is drained, and is sent SIGTERM only when its last request is out.
//   - An instance that is not needed any more may be kept frozen for a while, and is the first to be used when its revision, and no
//     other, needs one again.
//   - Instances outlive the agent when that is killed, and are adopted by the next one in the same data folder: none is lost,
//     none is started twice. When Run ends in order, none is left.
//   - A revision whose instances crash is tried again one at a time, after growing waits.
//
// Sub-packages: provider is the contract with ways to run instances, local holds what those of this machine share, process starts and
// adopts processes, cgroup bounds them, code finds the program of an image, logs keeps the output.
package instance

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/instance/sandbox"
	"github.com/thawrun/thaw/instance/store"
	"github.com/thawrun/thaw/internal/endpoints"
)

// Agent runs the instances of one data folder.
type Agent struct {
	// Static after New.
	cfg      Config
	provider provider.Provider
	programs programs
	caps     provider.Capabilities // without costs
	bound    string                // what Config.Units comes from
	code     *code.Resolver
	packages *code.Packages
	logs     *logs.Store
	ports    *ports
	berths   *berths
	blanks   *blanks
	lock     *os.File
	slots    chan struct{} // one token for each start in progress
	thaws    chan struct{} // and for each thaw: the kernel does them one after the other, and who waits there costs a thread

	// Ends of the two parts of a shutdown: no more waiting for requests, no more waiting for processes.
	endDrain, endGrace context.Context
	stopDrain          context.CancelFunc
	stopGrace          context.CancelFunc

	instances sync.WaitGroup // goroutines of instances

	mu        sync.Mutex
	delivered sync.Cond // on mu: a snapshot was delivered, or a revision has none waiting
	running   bool      // Run has begun; before, orders are only noted
	stopping  bool      // Run is ending
	revisions map[api.RevisionID]*revision
	languages map[string]int // revisions of each
	reserved  map[*revision]reservation
	changed   []*revision // with snapshots to deliver, emptied by unlock
	used      int         // units of instances that are not gone
	frozen    []*instance // those of them that are frozen, in the order in which they became so
	leaving   int         // units of frozen instances that were ended to make room and are not gone yet
	woken     uint64      // instances that were thawed because they were needed
	ended     uint64      // frozen instances that were ended to make room
	short     map[*revision]bool
	sequence  uint64 // of the last snapshot
	subs      []func(*endpoints.Snapshot)
}

// New opens the data folder, which no other agent may be using (ErrLocked). It starts nothing.
func New(cfg Config) (*Agent, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, fmt.Errorf("instance: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "instances"), 0o755); err != nil {
		return nil, fmt.Errorf("instance: %w", err)
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg:       cfg,
		lock:      lock,
		ports:     newPorts(cfg.FirstPort, cfg.LastPort),
		slots:     make(chan struct{}, cfg.MaxStarts),
		thaws:     make(chan struct{}, cfg.MaxStarts),
		revisions: map[api.RevisionID]*revision{},
		languages: map[string]int{},
		reserved:  map[*revision]reservation{},
		short:     map[*revision]bool{},
	}
	a.delivered.L = &a.mu
	a.endDrain, a.stopDrain = context.WithCancel(context.Background())
	a.endGrace, a.stopGrace = context.WithCancel(context.Background())
	if err := a.open(); err != nil {
		lock.Close()
		return nil, err
	}
	return a, nil
}

func (a *Agent) open() error {
	node, err := nodeID(a.cfg.Dir)
	if err != nil {
		return err
	}
	far := a.cfg.Store
	if far == nil {
		if far, err = store.OpenDisk(filepath.Join(a.cfg.Dir, "store")); err != nil {
			return err
		}
	}
	a.packages, err = code.OpenPackages(code.PackagesConfig{
		Dir: filepath.Join(a.cfg.Dir, "packages"), Store: far, Limits: a.cfg.Packages, Bytes: a.cfg.PackageBytes, Log: a.cfg.Log,
	})
	if err != nil {
		return err
	}
	a.code = code.NewResolver(a.packages, a.cfg.Images)
	l := a.cfg.Logs
	l.Dir, l.Log = filepath.Join(a.cfg.Dir, "logs"), a.cfg.Log
	if a.logs, err = logs.New(l); err != nil {
		return err
	}
	if a.provider, err = a.newProvider(node); err != nil {
		return err
	}
	a.caps = a.provider.Capabilities()
	a.bound = "the configuration"
	if a.cfg.Units == 0 {
		a.cfg.Units, a.bound = a.unitsHere()
	}
	a.cfg.Path = a.caps.Path
	a.provider.Watch(a.programs.ended)
	a.blanks = newBlanks(a)
	a.berths = newBerths(a.dir(""), a.provider, func() (some, all bool) { return len(a.slots) > 0, len(a.slots) == cap(a.slots) })
	return nil
}

// newProvider makes the provider that is configured.
func (a *Agent) newProvider(node string) (provider.Provider, error) {
	processes := func() (provider.Provider, error) {
		return local.NewProcesses(node, a.dir(""), a.cfg.Path, a.cfg.Log)
	}
	switch a.cfg.Provider {
	case "process":
		return processes()
	case "sandbox", "auto":
		p, err := sandbox.New(sandbox.Config{
			Node: node, Dir: a.dir(""), Path: a.cfg.Path, Share: a.cfg.Share, MaxPIDs: a.cfg.MaxPIDs, Log: a.cfg.Log,
		})
		switch {
		case err == nil:
			return p, nil
		case a.cfg.Provider == "sandbox":
			return nil, fmt.Errorf("instance: %w", err)
		}
		a.cfg.Log.Info("functions run as plain processes, which see each other and this machine", "why", err)
		return processes()
	}
	return nil, fmt.Errorf("instance: provider %q: auto, process or sandbox", a.cfg.Provider)
}

// nodeID returns the name of the data folder in the kernel's trees (cgroups), made at first use.
func nodeID(dir string) (string, error) {
	file := filepath.Join(dir, "node-id")
	if b, err := os.ReadFile(file); err == nil {
		if id := strings.TrimSpace(string(b)); len(id) == 12 && strings.Trim(id, "0123456789abcdef") == "" {
			return id, nil
		}
	}
	var raw [6]byte
	rand.Read(raw[:]) // never fails
	id := hex.EncodeToString(raw[:])
	if err := os.WriteFile(file, []byte(id+"\n"), 0o644); err != nil {
		return "", fmt.Errorf("instance: %w", err)
	}
	return id, nil
}

// Run takes over what a predecessor left, carries out orders until ctx ends, then ends all instances within
// Config.Shutdown and returns. It is called once.
func (a *Agent) Run(ctx context.Context) error {
	defer a.lock.Close()
	defer a.provider.Close()
	defer a.stopDrain()
	defer a.stopGrace()
	a.cfg.Log.Info("node agent starts", "dir", a.cfg.Dir, "isolation", a.caps.Isolation, "units", a.cfg.Units, "limited_by", a.bound)

	// Helpers end after the instances, which still need them.
	helpers, stopHelpers := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { _ = a.logs.Run(helpers) })
	wg.Go(func() { a.packages.Scrub(helpers, scrubPeriod) })
	defer wg.Wait()
	defer stopHelpers()

	found := a.loadLeftovers(ctx)
	wg.Go(func() { a.ports.run(helpers) })
	wg.Go(func() { a.relieve(helpers) })
	wg.Go(func() { a.blanks.run(helpers) })
	wg.Go(func() { a.berths.run(helpers) }) // after loadLeftovers, which removes what it does not know
	if m, ok := a.provider.(interface{ Measure(context.Context) error }); ok {
		wg.Go(func() {
			if err := m.Measure(helpers); err != nil && helpers.Err() == nil {
				a.cfg.Log.Warn("the costs of starting cannot be measured", "err", err)
			}
		})
	}
	a.mu.Lock()
	a.running = true
	for _, l := range found {
		r := a.revisionLocked(l.record.revisionID())
		r.leftovers = append(r.leftovers, l)
		a.used += l.record.units()
	}
	for _, r := range a.revisions { // what was ordered meanwhile
		a.reconcileLocked(r)
		r.decided, r.placed = time.Time{}, time.Time{}
	}
	a.unlock()

	unclaimed := time.AfterFunc(a.cfg.AdoptWithin, a.endUnclaimed)
	defer unclaimed.Stop()
	<-ctx.Done()

	drain := time.AfterFunc(a.cfg.Shutdown*6/10, a.stopDrain)
	defer drain.Stop()
	grace := time.AfterFunc(a.cfg.Shutdown, a.stopGrace)
	defer grace.Stop()
	a.mu.Lock()
	a.stopping = true
	for _, r := range a.revisions {
		a.reconcileLocked(r)
	}
	a.unlock()
	a.instances.Wait()
	return nil
}

// scrubPeriod is how often each unpacked package is read whole, to see whether it is still what was uploaded.
const scrubPeriod = 24 * time.Hour

// SetRevision makes a revision known, or known again after its status has changed. A revision of the same name with another
// uid is another revision: the instances of the old one are ended.
func (a *Agent) SetRevision(rev *api.Revision) {
	// Finding the code may hash a program: not under the lock.
	p := a.newPlan(rev)
	if err := a.logs.SetRevision(rev.Namespace, rev.Name, rev.ServiceName()); err != nil {
		a.cfg.Log.Warn("no folder for logs", "revision", rev.ID(), "err", err)
	}
	a.mu.Lock()
	r := a.revisionLocked(rev.ID())
	if r.plan != nil && r.plan.rev.UID != rev.UID {
		r.forgetFailureLocked()
		for _, in := range r.instances {
			a.stopLocked(in)
		}
	}
	r.plan, r.removed = p, false
	a.pinLocked(r)
	a.speakLocked(r, p.language)
	a.reconcileLocked(r)
	a.unlock()
}

// pinLocked keeps the code of a known revision on this node, and lets go of what it had before.
func (a *Agent) pinLocked(r *revision) {
	image := ""
	if r.plan != nil && r.plan.code != nil {
		image = r.plan.code.Image
	}
	if image != r.pinned {
		a.packages.Pin(image)
		a.packages.Unpin(r.pinned)
		r.pinned = image
	}
}

// RemoveRevision ends all instances of a revision and forgets it. Unknown ones are ignored.
func (a *Agent) RemoveRevision(id api.RevisionID) {
	a.mu.Lock()
	if r := a.revisions[id]; r != nil {
		r.removed, r.desired, r.scaled = true, 0, true
		a.speakLocked(r, "")
		r.forgetFailureLocked()
		a.publishLocked(r)
		a.reconcileLocked(r)
	}
	a.unlock()
}

// Scale orders n instances of a revision. decided is when the autoscaler knew that they are needed, for the waterfall.
// Until the first order, what was adopted is left alone.
func (a *Agent) Scale(id api.RevisionID, n int, decided time.Time) {
	now := time.Now()
	a.mu.Lock()
	if r := a.revisions[id]; r == nil && n <= 0 {
		a.mu.Unlock()
		return
	}
	r := a.revisionLocked(id)
	if n = max(n, 0); r.desired != n || !r.scaled {
		r.desired, r.scaled, r.removed = n, true, false
		a.publishLocked(r)
	}
	r.decided, r.placed = decided, now
	a.reconcileLocked(r)
	if a.running {
		r.decided, r.placed = time.Time{}, time.Time{} // instances that are started later are not this order's
	}
	a.unlock()
}

// Subscribe adds a receiver of snapshots. It is called in order for each revision, without locks of the agent, from whatever
// goroutine made the change: it should return soon. Subscribe before Run.
func (a *Agent) Subscribe(f func(*endpoints.Snapshot)) {
	a.mu.Lock()
	a.subs = append(a.subs, f)
	a.mu.Unlock()
}

// Resolve returns an image with the digest of its code (code.ErrUnknownImage and others say what is wrong).
func (a *Agent) Resolve(ctx context.Context, image string) (string, error) {
	return a.code.Resolve(ctx, image)
}

// Upload stores a package: tar, tar.gz, tar.zst or zip.
func (a *Agent) Upload(ctx context.Context, r io.Reader) (code.Package, error) {
	return a.packages.Upload(ctx, r)
}

// Packages are what Upload has unpacked here.
func (a *Agent) Packages() *code.Packages { return a.packages }

// Logs returns lines that functions printed; see logs.Query.
func (a *Agent) Logs(ctx context.Context, q logs.Query) iter.Seq2[logs.Line, error] {
	return a.logs.Read(ctx, q)
}

// Capabilities says what instances can be here, and what their transitions cost.
func (a *Agent) Capabilities() provider.Capabilities { return a.provider.Capabilities() }

// Stats measures an instance; provider.ErrUnknown when it is not there.
func (a *Agent) Stats(ctx context.Context, instance string) (provider.Stats, error) {
	return a.provider.Stats(ctx, instance[strings.LastIndexByte(instance, '-')+1:])
}

// Units is how many units of instances this node takes, how many of them are taken, by frozen ones too, and what the number comes from.
func (a *Agent) Units() (n, used int, bound string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg.Units, a.used, a.bound
}

// Isolation says in one line what instances on this machine are bounded by.
func (a *Agent) Isolation() string { return a.caps.Isolation }

func (a *Agent) revisionLocked(id api.RevisionID) *revision {
	r := a.revisions[id]
	if r == nil {
		r = &revision{id: id}
		a.revisions[id] = r
	}
	return r
}

// unlock ends a change: it releases mu and delivers the snapshots that the change made.
func (a *Agent) unlock() {
	changed := a.changed
	a.changed = nil
	a.mu.Unlock()
	for _, r := range changed {
		a.deliver(r)
	}
}

// deliver hands a revision's state out, unless somebody is at it already, who then goes on with ours. So calls are in order,
// no lock is held, and a subscriber may cause another change. It is made into a snapshot only now: when hundreds of instances get ready
// at once, most changes come while another is being told.
func (a *Agent) deliver(r *revision) {
	a.mu.Lock()
	if r.delivering {
		a.mu.Unlock()
		return
	}
	r.delivering = true
	for r.seen < r.sequence {
		s := a.snapshotLocked(r)
		subs := a.subs
		a.mu.Unlock()
		for _, f := range subs {
			f(s)
		}
		a.mu.Lock()
		r.seen = s.Sequence
		a.delivered.Broadcast()
	}
	r.delivering = false
	a.mu.Unlock()
}

// awaitDelivered returns once all snapshots of the revision up to now have been handed out. Not for subscribers.
func (a *Agent) awaitDelivered(r *revision) {
	a.mu.Lock()
	for want := r.sequence; r.seen < want; {
		a.delivered.Wait()
	}
	a.mu.Unlock()
}
