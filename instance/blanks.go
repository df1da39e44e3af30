package instance

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
	"time"

	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/internal/bundle"
	"github.com/thawrun/thaw/internal/placement"
)

// blank is an interpreter that has started, in a place of its own, and waits for the one function that it shall serve. Nearly all of what
// a start of Python or Node takes lies behind it, and it has seen nothing but our own bootstrap, so it belongs to nobody. It is used
// once: the function's code is shown to it, and it becomes the instance.
type blank struct {
	*berth
	language string
	prog     *program
	listener *os.File // on its descriptor 3
	ready    *os.File // what it writes to descriptor 4 comes out here
	order    *os.File // what is written here it reads from descriptor 5; it ends when this is closed without
	bytes    int64
}

// blanks keeps some of each language ready that a revision of this node is written in.
type blanks struct {
	a    *Agent
	wake chan struct{} // capacity 1: look again

	mu     sync.Mutex
	wanted map[string]int
	ready  map[string][]*blank
	failed map[string]time.Time // languages that cannot be had, and when that was
	made   uint64
	used   uint64
}

const (
	// blanksAhead is how many of a language are kept when nobody says more, blanksMost when somebody does.
	blanksAhead = 2
	blanksMost  = 32
	// blankAgain is how long after a failure a language is tried again.
	blankAgain = time.Minute
)

func newBlanks(a *Agent) *blanks {
	return &blanks{a: a, wake: make(chan struct{}, 1), wanted: map[string]int{}, ready: map[string][]*blank{}, failed: map[string]time.Time{}}
}

// want sets how many of each language shall wait.
func (b *blanks) want(n map[string]int) {
	b.mu.Lock()
	b.wanted = n
	b.mu.Unlock()
	b.look()
}

func (b *blanks) look() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take returns a blank of the language, nil if none waits.
func (b *blanks) take(language string) *blank {
	if language == "" {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.look()
	for n := len(b.ready[language]); n > 0; n-- {
		x := b.ready[language][n-1]
		b.ready[language] = b.ready[language][:n-1]
		select {
		case <-x.prog.done: // it has died while it waited
			go x.discard(b.a)
		default:
			b.used++
			return x
		}
	}
	return nil
}

// next says what is to be done: a blank to be made, or one to be given up.
func (b *blanks) next(low bool) (make string, drop *blank) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var bytes int64
	for language, ready := range b.ready {
		for _, x := range ready {
			bytes += x.bytes
		}
		if n := len(ready); n > 0 && (low || n > b.wanted[language]) {
			b.ready[language] = ready[:n-1]
			return "", ready[n-1]
		}
	}
	for language, n := range b.wanted {
		if !low && len(b.ready[language]) < n && bytes < b.a.cfg.BlankBytes && time.Since(b.failed[language]) > blankAgain {
			return language, nil
		}
	}
	return "", nil
}

// run keeps blanks ready until ctx ends, then ends those that were not used. They are made one after the other, and not while instances
// are being started: those need the processor more.
func (b *blanks) run(ctx context.Context) {
	defer b.end()
	for {
		// A start that was just ordered, and a burst in progress, need the processor more; but not for ever.
		for range 100 {
			if len(b.a.slots) == 0 || !pause(ctx, 20*time.Millisecond) {
				break
			}
		}
		if ctx.Err() != nil {
			return
		}
		language, drop := b.next(b.a.cfg.lowMemory())
		switch {
		case drop != nil:
			drop.discard(b.a)
			continue
		case language == "":
			select {
			case <-ctx.Done():
				return
			case <-b.wake:
			case <-time.After(10 * time.Second): // memory may be short by now, or a failure long ago
			}
			continue
		}
		x, err := b.build(ctx, language)
		b.mu.Lock()
		if err != nil {
			b.failed[language] = time.Now()
		} else {
			b.ready[language] = append(b.ready[language], x)
			b.made++
		}
		b.mu.Unlock()
		if err != nil && ctx.Err() == nil {
			b.a.cfg.Log.Warn("no interpreter can be started ahead", "language", language, "err", err)
		}
	}
}

func (b *blanks) end() {
	b.mu.Lock()
	all := b.ready
	b.ready, b.wanted = map[string][]*blank{}, map[string]int{}
	b.mu.Unlock()
	for _, ready := range all {
		for _, x := range ready {
			x.discard(b.a)
		}
	}
}

// build starts one.
func (b *blanks) build(ctx context.Context, language string) (_ *blank, err error) {
	a := b.a
	x := &blank{language: language}
	if x.berth, err = a.berths.build(a.berths.newName()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			x.discard(a)
		}
	}()
	file, err := b.bootstrap(language)
	if err != nil {
		return nil, err
	}
	interpreter, err := lookProgram(bundle.Interpreter(language), "", a.caps.Path)
	if err != nil {
		return nil, err
	}
	if x.listener, err = listen(); err != nil {
		return nil, err
	}
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer readyW.Close()
	x.ready = readyR
	orderR, orderW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer orderR.Close()
	x.order = orderW
	home := x.home()
	if a.caps.OwnFiles {
		home = "/tmp"
	}
	ctx, cancel := context.WithTimeout(ctx, providerPatience)
	defer cancel()
	x.prog = a.programs.add(x.name)
	err = a.provider.Specialise(ctx, x.name, &provider.Spec{
		Name: "blank-" + x.name, Path: interpreter, Argv: []string{bundle.Interpreter(language), file, "--blank"},
		Env: []string{"PATH=" + a.caps.Path, "HOME=" + home, "TMPDIR=" + home}, Dir: "/", Code: []string{file},
		Stdout: x.stdout, Stderr: x.stderr, Listener: x.listener, Ready: readyW, Order: orderR,
		// With a limit from the beginning another can be set later, wherever limits are.
		Limits: provider.Limits{MemoryBytes: placement.Classes[0].MemoryLimit(), Precaution: true},
	})
	if err != nil {
		a.programs.drop(x.name)
		x.prog = nil
		return nil, err
	}
	return x, x.settle(ctx, a)
}

// settle waits until the interpreter has started, that is until it reads its order: from then on it uses no processor.
func (x *blank) settle(ctx context.Context, a *Agent) error {
	// There is no word from it that would not cost its next step; that its processor time stands still says the same.
	var last time.Duration = -1
	for {
		select {
		case <-x.prog.done:
			return fmt.Errorf("a waiting interpreter %v", x.prog.exit)
		default:
		}
		if !pause(ctx, 20*time.Millisecond) {
			return context.Cause(ctx)
		}
		st, err := a.provider.Stats(ctx, x.name)
		if err != nil {
			return err
		}
		if st.CPU == last {
			x.bytes = st.MemoryBytes
			return nil
		}
		last = st.CPU
	}
}

// bootstrap writes the program of a language to a file that blanks can see.
func (b *blanks) bootstrap(language string) (string, error) {
	dir := filepath.Join(b.a.cfg.Dir, "bootstrap")
	file := filepath.Join(dir, language)
	if old, err := os.ReadFile(file); err == nil && bundle.Language(old) == language {
		return file, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp := file + ".new"
	return file, errors.Join(os.WriteFile(tmp, bundle.Bootstrap(language), 0o644), os.Rename(tmp, file))
}

// close closes our ends of what the blank was given and the instance has no use for.
func (x *blank) close() {
	if x.order != nil {
		x.order.Close()
	}
}

// discard ends a blank that nobody uses.
func (x *blank) discard(a *Agent) {
	x.close()
	for _, f := range []*os.File{x.listener, x.ready} {
		if f != nil {
			f.Close()
		}
	}
	a.programs.drop(x.name)
	a.berths.discard(x.berth)
}

// assignment is what a bootstrap reads from descriptor 5; see bundle.Bootstrap.
type assignment struct {
	Env     map[string]string `json:"env"`
	Dir     string            `json:"dir"`
	Program string            `json:"program"`
	Args    []string          `json:"args"`
}

// fill makes an instance of the blank that it has.
func (a *Agent) fill(in *instance, coded time.Time) error {
	p, x := in.plan, in.blank
	in.listener, in.ready, in.prog = x.listener, x.ready, x.prog
	if p.language != x.language {
		return fmt.Errorf("the code of %s is not what it was", in.id) // the next try knows
	}
	a.mu.Lock()
	in.addr = in.listener.Name()
	a.mu.Unlock()
	if err := writeRecord(x.dir, newRecord(in, a.caps.Name)); err != nil {
		return err
	}
	argv, env := p.environ(in.portNumber(), p.homeOr(x.home()))
	in.env = env
	o := assignment{Env: map[string]string{provider.Marker: in.id, "READY_FD": "4"}, Dir: p.dir, Program: p.program, Args: append([]string{}, argv[1:]...)}
	for _, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		o.Env[name] = value
	}
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	spec := p.spec()
	spec.Name = in.id
	ctx, cancel := context.WithTimeout(context.Background(), providerPatience)
	defer cancel()
	if err := a.provider.Grant(ctx, in.folder, spec); err != nil {
		return err
	}
	if err := x.order.SetWriteDeadline(time.Now().Add(providerPatience)); err != nil {
		return err
	}
	if _, err := x.order.Write(b); err != nil {
		return fmt.Errorf("tell the interpreter: %w", err)
	}
	x.order.Close()
	a.mu.Lock()
	in.start.Code, in.start.Exec = coded, time.Now()
	a.unlock()
	x.berth.close()
	a.placeLogs(in.logKey(), p.rev.ServiceName(), x.dir)
	a.addSidecar(in)
	return nil
}

// early are names of environment variables that an interpreter or its C library looks at when it starts: a blank has started already.
var early = []string{"PATH", "TZ", "LANG", "LANGUAGE", "PYTHON*", "NODE_*", "UV_*", "LD_*", "LC_*", "MALLOC_*", "GLIBC_*", "SSL_*", "OPENSSL_*", "LISTEN_*", "READY_FD"}

// blankLanguage says which blanks can become an instance of the plan. It must make no difference to the function how it was started.
func (p *plan) blankLanguage(lateLimits bool) string {
	c := p.rev.Serving()
	limited := p.limits.MemoryBytes > 0 && !p.limits.Precaution || p.limits.CPUMillis > 0
	if len(c.Command) > 0 || !p.socket || !p.says || p.host || p.subnet != "" || p.uid != 0 || limited && !lateLimits {
		return ""
	}
	for _, v := range c.Env {
		if slices.ContainsFunc(early, func(e string) bool {
			prefix, isPrefix := strings.CutSuffix(e, "*")
			return v.Name == e || isPrefix && strings.HasPrefix(v.Name, prefix)
		}) {
			return ""
		}
	}
	f, err := os.Open(p.program)
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, 64<<10)
	n, _ := f.Read(b)
	return bundle.Language(b[:n])
}
