package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance"
	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/internal/endpoints"
)

// bursts measures many instances at once: a new revision that is asked for starts of them, and thaws of frozen ones, through the node agent;
// beside each, in alternation, what the kernel alone does with the same program and the same number of workers.
func bursts(dir string, f function, provider string, starts, thaws int) error {
	a, err := newAgent(dir, provider, f, max(starts, thaws))
	if err != nil {
		return err
	}
	defer a.stop()
	const rounds = 3
	b := &bench{dir: dir}
	floor := func() error { return b.bareSandboxes(f, starts) }
	if provider == "process" {
		floor = func() error { return b.bareProcesses(f, starts) }
	}
	for _, expected := range []bool{false, true} {
		var bare, ours []float64
		for i := range rounds {
			if expected { // as the autoscaler says after a burst, of whichever revision; the pool then fills in the background
				a.Reserve("default/burst0-00001", starts, time.Now().Add(time.Minute))
				time.Sleep(2 * time.Second)
			}
			rate, err := perSecond(starts, floor)
			if err != nil {
				return err
			}
			bare = append(bare, rate)
			rev := a.revision(fmt.Sprintf("burst%d-00001", i), "0s")
			rate, err = perSecond(starts, func() error { return a.scale(rev, starts) })
			if err != nil {
				return err
			}
			ours = append(ours, rate)
			if i == 0 && !expected {
				if err := a.memory(rev); err != nil {
					return err
				}
			}
			a.Scale(rev.ID(), 0, time.Now())
			if err := a.until(rev.ID(), func(s *endpoints.Snapshot) bool { return len(s.Instances) == 0 }); err != nil {
				return err
			}
		}
		what := "nobody expected"
		if expected {
			what = "one like it was before"
		}
		printBurst(fmt.Sprintf("%d starts of a revision, %s", starts, what), provider, bare, ours)
	}
	var bare, ours []float64
	rev := a.revision("ice-00001", "10m")
	if err := a.scale(rev, thaws); err != nil {
		return err
	}
	for range rounds {
		if err := a.freeze(rev, thaws); err != nil {
			return err
		}
		rate, err := perSecond(thaws, func() error { return a.bareThaw(rev) })
		if err != nil {
			return err
		}
		bare = append(bare, rate)
		if err := a.bareFreeze(rev); err != nil {
			return err
		}
		rate, err = perSecond(thaws, func() error { return a.scale(rev, thaws) })
		if err != nil {
			return err
		}
		ours = append(ours, rate)
	}
	printBurst(fmt.Sprintf("%d frozen ones thawed", thaws), provider, bare, ours)
	return nil
}

func printBurst(what, provider string, bare, ours []float64) {
	ratios := make([]float64, len(bare))
	for i := range bare {
		ratios[i] = ours[i] / bare[i]
	}
	for _, v := range [][]float64{bare, ours, ratios} {
		slices.Sort(v)
	}
	mid := len(bare) / 2
	fmt.Printf("| %s | %s | %.0f | %.0f | %.2f |\n", what, provider, bare[mid], ours[mid], ratios[mid])
}

func perSecond(n int, f func() error) (float64, error) {
	began := time.Now()
	err := f()
	return float64(n) / time.Since(began).Seconds(), err
}

// workers is how many starts, and how many requests, are in progress at once, on both sides. More made the bare floor no faster.
const workers = 8

// each does something n times, by that many workers.
func each(n int, f func(i int) error) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && errs[w] == nil; i = int(next.Add(1)) - 1 {
				errs[w] = f(i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// bareSandboxes starts n that all stay until the last one has answered, as the agent's do.
func (b *bench) bareSandboxes(f function, n int) error {
	ends := make([]func(), n)
	defer func() {
		go func() { // the end is nobody's start
			for _, end := range ends {
				if end != nil {
					end()
				}
			}
		}()
	}()
	return each(n, func(i int) (err error) {
		_, ends[i], err = b.startSandbox(f)
		return err
	})
}

func (b *bench) bareProcesses(f function, n int) error {
	ends := make([]func(), n)
	defer func() {
		go func() {
			for _, end := range ends {
				if end != nil {
					end()
				}
			}
		}()
	}()
	return each(n, func(i int) (err error) {
		_, ends[i], err = b.startProcess(f)
		return err
	})
}

// agent is a node agent with a function.
type agent struct {
	*instance.Agent
	dir    string
	f      function
	cancel context.CancelFunc
	done   chan error

	mu     sync.Mutex
	last   map[api.RevisionID]*endpoints.Snapshot
	change chan struct{}
}

func newAgent(dir, provider string, f function, n int) (*agent, error) {
	a := &agent{dir: filepath.Join(dir, "agent-"+provider), f: f, done: make(chan error, 1), last: map[api.RevisionID]*endpoints.Snapshot{}, change: make(chan struct{}, 1)}
	var err error
	if a.Agent, err = instance.New(instance.Config{Dir: a.dir, Provider: provider, Units: 2*n + 10, FrozenFor: time.Minute, FrozenMax: n, Shutdown: 5 * time.Second}); err != nil {
		return nil, err
	}
	a.Subscribe(func(s *endpoints.Snapshot) {
		a.mu.Lock()
		a.last[s.Revision] = s
		a.mu.Unlock()
		select {
		case a.change <- struct{}{}:
		default:
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	go func() { a.done <- a.Run(ctx) }()
	time.Sleep(300 * time.Millisecond) // its pools are filled, as they are in a node that has been idle
	return a, nil
}

func (a *agent) stop() {
	a.cancel()
	if err := <-a.done; err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
	}
}

func (a *agent) revision(name, frozenFor string) *api.Revision {
	rev := &api.Revision{}
	rev.Namespace, rev.Name, rev.UID = "default", name, name
	rev.Annotations = map[string]string{api.AnnotationSocket: api.SocketFD3, api.AnnotationFrozenFor: frozenFor}
	timeout := int64(1)
	rev.Spec.TimeoutSeconds = &timeout
	rev.Spec.Containers = []api.Container{{Name: "f", Image: "exec://" + a.f.argv[0], Args: a.f.argv[1:]}}
	rev.Status.Conditions = api.Conditions{{Type: api.ConditionReady, Status: api.True}}
	a.SetRevision(rev)
	return rev
}

func (a *agent) get(id api.RevisionID) *endpoints.Snapshot {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.last[id]; s != nil {
		return s
	}
	return &endpoints.Snapshot{}
}

func (a *agent) until(id api.RevisionID, ok func(*endpoints.Snapshot) bool) error {
	for deadline := time.Now().Add(2 * time.Minute); !ok(a.get(id)); {
		if s := a.get(id); time.Now().After(deadline) {
			return fmt.Errorf("%s: %d instances, failure %+v", id, len(s.Instances), s.Failure)
		}
		select {
		case <-a.change:
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// scale orders n instances and returns when each has answered a request, which it is sent as soon as it is shown as ready.
func (a *agent) scale(rev *api.Revision, n int) error {
	addrs := make(chan string, n)
	failed := make(chan error, 1)
	go func() {
		failed <- each(n, func(int) error { return ask(<-addrs) })
	}()
	a.Scale(rev.ID(), n, time.Now())
	sent := map[string]bool{}
	err := a.until(rev.ID(), func(s *endpoints.Snapshot) bool {
		for _, in := range s.Instances {
			if in.State == endpoints.Ready && !sent[in.ID] {
				sent[in.ID] = true
				addrs <- in.Addr
			}
		}
		return len(sent) >= n
	})
	if err != nil {
		return err
	}
	return <-failed
}

func (a *agent) freeze(rev *api.Revision, n int) error {
	a.Scale(rev.ID(), 0, time.Now())
	return a.until(rev.ID(), func(s *endpoints.Snapshot) bool { return s.Count(endpoints.Frozen) == n })
}

// group is the folder of an instance's control group.
func (a *agent) group(in endpoints.Instance) (string, error) {
	b, err := os.ReadFile(filepath.Join(a.dir, "instances", in.ID[strings.LastIndexByte(in.ID, '-')+1:], local.NoteFile))
	if err != nil {
		return "", err
	}
	var id process.Identity
	if err := json.Unmarshal(b, &id); err != nil || len(id.Cgroups) == 0 {
		return "", fmt.Errorf("instance %s has no group: %w", in.ID, err)
	}
	return id.Cgroups[0], nil
}

// bareThaw thaws the agent's instances behind its back, and asks each.
func (a *agent) bareThaw(rev *api.Revision) error {
	all := a.get(rev.ID()).Instances
	return each(len(all), func(i int) error {
		dir, err := a.group(all[i])
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0)
		}
		return errors.Join(err, ask(all[i].Addr))
	})
}

func (a *agent) bareFreeze(rev *api.Revision) error {
	for _, in := range a.get(rev.ID()).Instances {
		dir, err := a.group(in)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("1"), 0)
		}
		if err != nil {
			return err
		}
	}
	time.Sleep(100 * time.Millisecond)
	return nil
}

// idle prints what an idle instance of an interpreted function takes beside others. In a sandbox it is the same program.
func idle(dir string, f function) error {
	a, err := newAgent(dir, "process", f, 20)
	if err != nil {
		return err
	}
	defer a.stop()
	rev := a.revision("idle-00001", "0s")
	if err := a.scale(rev, 20); err != nil {
		return err
	}
	return a.memory(rev)
}

// memory prints what an idle instance takes.
func (a *agent) memory(rev *api.Revision) error {
	var sum int64
	all := a.get(rev.ID()).Instances
	for _, in := range all {
		st, err := a.Stats(context.Background(), in.ID)
		if err != nil {
			return err
		}
		sum += st.MemoryBytes
	}
	fmt.Fprintf(os.Stderr, "%s, %s: %d idle instances take %.2f MiB each (proportional set size)\n", a.Capabilities().Name, a.f.name, len(all), float64(sum)/float64(len(all))/(1<<20))
	return nil
}
