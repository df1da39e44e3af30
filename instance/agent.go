// Package instance is the node agent: it runs the instances of revisions on this machine. It is told what should be
// (SetRevision, Scale), makes it so, and says what is (Subscribe); it never asks anybody. Between an order and the start of a
// process there is no disk flush, no network and no other part.
//
// What the agent promises:
//
//   - Orders are desired state. They may be repeated, come in any order, and come before the revision is known.
//   - Subscribers get a snapshot at every change, in order for each revision; they may call the agent.
//   - An instance is shown as draining before its queue-proxy is drained, and is sent SIGTERM only when its last request is out.
//   - Instances outlive the agent when that is killed, and are adopted by the next one in the same data folder: none is lost,
//     none is started twice. When Run ends in order, none is left.
//   - A revision whose instances crash is tried again one at a time, after growing waits.
//
// Sub-packages: process starts and adopts processes, code finds the program of an image, logs keeps the output.
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
	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/internal/endpoints"
)

// Agent runs the instances of one data folder.
type Agent struct {
	// Static after New.
	cfg      Config
	provider provider
	code     *code.Resolver
	packages *code.Packages
	logs     *logs.Store
	ports    *ports
	berths   *berths
	lock     *os.File
	slots    chan struct{} // one token for each start in progress

	// Ends of the two parts of a shutdown: no more waiting for requests, no more waiting for processes.
	endDrain, endGrace context.Context
	stopDrain          context.CancelFunc
	stopGrace          context.CancelFunc

	instances sync.WaitGroup // goroutines of instances
	sweep     chan struct{}  // an instance has ended: look for what it left

	mu        sync.Mutex
	delivered sync.Cond // on mu: a snapshot was delivered, or a revision has none waiting
	running   bool      // Run has begun; before, orders are only noted
	stopping  bool      // Run is ending
	revisions map[api.RevisionID]*revision
	changed   []*revision // with snapshots to deliver, emptied by unlock
	total     int         // instances that are not gone
	short     map[*revision]bool
	sequence  uint64          // of the last snapshot
	ended     map[string]bool // ids whose leftover processes have not been looked for yet
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
		sweep:     make(chan struct{}, 1),
		revisions: map[api.RevisionID]*revision{},
		short:     map[*revision]bool{},
		ended:     map[string]bool{},
	}
	a.delivered.L = &a.mu
	a.berths = newBerths(a.dir(""), func() bool { return len(a.slots) > 0 })
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
	if a.packages, err = code.OpenPackages(filepath.Join(a.cfg.Dir, "packages"), a.cfg.Packages); err != nil {
		return err
	}
	a.code = code.NewResolver(a.packages, a.cfg.Images)
	l := a.cfg.Logs
	l.Dir, l.Log = filepath.Join(a.cfg.Dir, "logs"), a.cfg.Log
	if a.logs, err = logs.New(l); err != nil {
		return err
	}
	rt, err := process.New(node, a.cfg.Log)
	if err != nil {
		return err
	}
	a.provider = processes{rt}
	return nil
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
	a.cfg.Log.Info("node agent starts", "dir", a.cfg.Dir, "isolation", a.provider.Isolation())

	// Helpers end after the instances, which still need them.
	helpers, stopHelpers := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { _ = a.logs.Run(helpers) })
	wg.Go(func() { a.sweeper(helpers) })
	defer wg.Wait()
	defer stopHelpers()

	found := a.loadLeftovers()
	wg.Go(func() { a.ports.run(helpers) })
	wg.Go(func() { a.berths.run(helpers) }) // after loadLeftovers, which removes what it does not know
	a.mu.Lock()
	a.running = true
	for _, l := range found {
		r := a.revisionLocked(l.record.revisionID())
		r.leftovers = append(r.leftovers, l)
		a.total++
	}
	for _, r := range a.revisions {
		a.reconcileLocked(r)
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
	a.killStrays()
	return nil
}

// SetRevision makes a revision known, or known again after its status has changed. A revision of the same name with another
// uid is another revision: the instances of the old one are ended.
func (a *Agent) SetRevision(rev *api.Revision) {
	// Finding the code may hash a program: not under the lock.
	p := newPlan(rev, a.cfg, a.code)
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
	a.reconcileLocked(r)
	a.unlock()
}

// RemoveRevision ends all instances of a revision and forgets it. Unknown ones are ignored.
func (a *Agent) RemoveRevision(id api.RevisionID) {
	a.mu.Lock()
	if r := a.revisions[id]; r != nil {
		r.removed, r.desired, r.scaled = true, 0, true
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
	r.decided, r.placed = time.Time{}, time.Time{} // instances that are started later are not this order's
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

// Upload stores a package, a tar archive, plain or gzip.
func (a *Agent) Upload(ctx context.Context, r io.Reader) (code.Package, error) {
	return a.packages.Upload(ctx, r)
}

// Packages is the store that Upload writes to.
func (a *Agent) Packages() *code.Packages { return a.packages }

// Logs returns lines that functions printed; see logs.Query.
func (a *Agent) Logs(ctx context.Context, q logs.Query) iter.Seq2[logs.Line, error] {
	return a.logs.Read(ctx, q)
}

// Isolation says in one line what instances on this machine are bounded by.
func (a *Agent) Isolation() string { return a.provider.Isolation() }

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

// deliver hands a revision's snapshots out, unless somebody is at it already, who then goes on with ours. So calls are in order,
// no lock is held, and a subscriber may cause another change.
func (a *Agent) deliver(r *revision) {
	a.mu.Lock()
	if r.delivering {
		a.mu.Unlock()
		return
	}
	r.delivering = true
	for len(r.outbox) > 0 {
		s := r.outbox[0]
		r.outbox = r.outbox[1:]
		subs := a.subs
		a.mu.Unlock()
		for _, f := range subs {
			f(s)
		}
		a.mu.Lock()
		r.seen = s.Sequence
		a.delivered.Broadcast()
	}
	r.outbox = nil
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
