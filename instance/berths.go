package instance

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/provider"
)

// berth is a folder for one instance and the provider's place for it, made before the instance is known: making a file costs
// some file systems more than starting a process. It holds tmp/ (the function's HOME and TMPDIR), the two empty files of the record, and the two files
// that the output goes to, which are moved to the logs once the process runs.
type berth struct {
	name           string // the folder's name, and the end of the instance's id
	dir            string
	stdout, stderr *os.File
}

const (
	stdoutFile = "stdout.log"
	stderrFile = "stderr.log"

	// berthsAhead is how many are kept ready when nobody says more, berthsMost when somebody does; a burst beyond it makes its own.
	berthsAhead = 32
	berthsMost  = 256
)

// berths keeps some ready.
type berths struct {
	root     string
	provider provider.Provider // makes the place that goes with the folder
	ready    chan *berth
	wanted   atomic.Int32
	wake     chan struct{}           // capacity 1: look again
	starting func() (some, all bool) // instances are being started; as many as may be, so that others wait
}

func newBerths(root string, p provider.Provider, starting func() (some, all bool)) *berths {
	b := &berths{root: root, provider: p, ready: make(chan *berth, berthsMost), wake: make(chan struct{}, 1), starting: starting}
	b.wanted.Store(berthsAhead)
	return b
}

// want sets how many shall be ready, at most berthsMost.
func (b *berths) want(n int) {
	b.wanted.Store(int32(n))
	b.look()
}

func (b *berths) look() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// name makes a new name for a berth: the part of an instance's id that is its own.
func (b *berths) newName() string { return strings.ToLower(rand.Text()[:10]) }

// take returns a berth that is ready, or nil.
func (b *berths) take() *berth {
	select {
	case r := <-b.ready:
		b.look()
		return r
	default:
		return nil
	}
}

// Places counts the places for instances to come that are kept ready: a few, and as many as are reserved.
func (a *Agent) Places() int { return len(a.berths.ready) }

// build makes a berth.
func (b *berths) build(name string) (*berth, error) {
	r := &berth{name: name, dir: filepath.Join(b.root, name)}
	if err := r.fill(); err != nil {
		b.discard(r)
		return nil, fmt.Errorf("folder for an instance: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), providerPatience)
	defer cancel()
	if err := b.provider.Create(ctx, name); err != nil {
		b.discard(r)
		return nil, err
	}
	return r, nil
}

func (r *berth) fill() error {
	if err := os.Mkdir(r.dir, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(r.home(), 0o700); err != nil {
		return err
	}
	for _, name := range []string{recordFile, local.NoteFile} {
		if err := os.WriteFile(filepath.Join(r.dir, name), nil, 0o644); err != nil {
			return err
		}
	}
	var err error
	if r.stdout, err = appendTo(filepath.Join(r.dir, stdoutFile)); err != nil {
		return err
	}
	r.stderr, err = appendTo(filepath.Join(r.dir, stderrFile))
	return err
}

func appendTo(file string) (*os.File, error) {
	return os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

func (r *berth) home() string { return filepath.Join(r.dir, "tmp") }

// close closes our copies of the files that the process writes to.
func (r *berth) close() {
	for _, f := range []*os.File{r.stdout, r.stderr} {
		if f != nil {
			f.Close()
		}
	}
}

func (b *berths) discard(r *berth) {
	r.close()
	ctx, cancel := context.WithTimeout(context.Background(), providerPatience)
	defer cancel()
	_ = b.provider.Destroy(ctx, r.name)
	_ = os.RemoveAll(r.dir)
}

// run keeps berths ready until ctx ends, then removes those that were not used.
func (b *berths) run(ctx context.Context) {
	defer func() {
		for r := b.take(); r != nil; r = b.take() {
			b.discard(r)
		}
	}()
	for {
		switch have, want := len(b.ready), int(b.wanted.Load()); {
		case have > want:
			if r := b.take(); r != nil {
				b.discard(r)
			}
			continue
		case have == want:
			select {
			case <-b.wake:
			case <-ctx.Done():
				return
			}
			continue
		}
		// The start that took one, and a burst in progress, need the processor more; but not for ever.
		for range 20 {
			some, all := b.starting()
			if !all && (!some || len(b.ready) < berthsAhead/2) || !pause(ctx, 20*time.Millisecond) {
				break
			}
		}
		r, err := b.build(b.newName())
		if err != nil {
			if !pause(ctx, time.Second) { // the next start will say what is wrong
				return
			}
			continue
		}
		b.ready <- r // there is room: nobody else adds any
		if ctx.Err() != nil {
			return
		}
	}
}
