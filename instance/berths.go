package instance

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// berth is a folder for one instance, made before the instance is known: making a file costs some file systems more than
// starting a process. It holds tmp/ (the function's HOME and TMPDIR), the two empty files of the record, and the two files
// that the output goes to, which are moved to the logs once the process runs.
type berth struct {
	name           string // the folder's name, and the end of the instance's id
	dir            string
	stdout, stderr *os.File
}

const (
	stdoutFile = "stdout.log"
	stderrFile = "stderr.log"

	// berthsAhead is how many are kept ready; a burst beyond it makes its own.
	berthsAhead = 32
)

// berths keeps some ready.
type berths struct {
	root     string
	ready    chan *berth
	starting func() bool // instances are being started: making berths can wait
}

func newBerths(root string, starting func() bool) *berths {
	return &berths{root: root, ready: make(chan *berth, berthsAhead), starting: starting}
}

// name makes a new name for a berth: the part of an instance's id that is its own.
func (b *berths) newName() string { return strings.ToLower(rand.Text()[:10]) }

// take returns a berth that is ready, or nil.
func (b *berths) take() *berth {
	select {
	case r := <-b.ready:
		return r
	default:
		return nil
	}
}

// build makes a berth.
func (b *berths) build(name string) (*berth, error) {
	r := &berth{name: name, dir: filepath.Join(b.root, name)}
	if err := r.fill(); err != nil {
		r.discard()
		return nil, fmt.Errorf("folder for an instance: %w", err)
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
	for _, name := range []string{recordFile, identityFile} {
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

func (r *berth) discard() {
	r.close()
	_ = os.RemoveAll(r.dir)
}

// run keeps berths ready until ctx ends, then removes those that were not used.
func (b *berths) run(ctx context.Context) {
	defer func() {
		for r := b.take(); r != nil; r = b.take() {
			r.discard()
		}
	}()
	for {
		// The start that took one, and a burst in progress, need the processor more; but not for ever.
		for range 20 {
			if len(b.ready) < berthsAhead/2 || !pause(ctx, 20*time.Millisecond) || !b.starting() {
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
		select {
		case b.ready <- r:
		case <-ctx.Done():
			r.discard()
			return
		}
	}
}
