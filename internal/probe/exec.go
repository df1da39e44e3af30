package probe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// tryExec runs the probe's command in a process group of its own; exit code 0 is a success. When the time is over the whole group is
// killed, so that a shell's children do not pile up behind it.
func (p *Prober) tryExec(ctx context.Context) error {
	command := p.probe.Exec.Command
	out := &tail{max: p.o.MaxOutput}
	if p.o.Exec != nil {
		return p.elsewhere(ctx, out)
	}
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Dir = p.o.Dir
	cmd.Env = p.o.Env
	if cmd.Env == nil {
		cmd.Env = []string{} // nil would hand over our own, secrets included
	}
	if !strings.Contains(command[0], "/") {
		// The name means a program in the function's PATH; os/exec has looked in ours.
		if cmd.Path = lookPath(command[0], p.o.Env); cmd.Path == "" {
			return fmt.Errorf("exec probe: %q is not in the function's PATH", command[0])
		}
		cmd.Err = nil
	}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = 100 * time.Millisecond // for a grandchild that left the group and holds the output open
	group(cmd)
	err := cmd.Run()
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay) && ctx.Err() == nil:
		return nil // the second: exit code 0, and something left behind that still holds the output
	case ctx.Err() != nil:
		return fmt.Errorf("exec probe: %q killed: %w%s", command[0], ctx.Err(), quote(out.b))
	}
	return fmt.Errorf("exec probe: %q: %w%s", command[0], err, quote(out.b))
}

// elsewhere has the command run by who knows where the function is.
func (p *Prober) elsewhere(ctx context.Context, out *tail) error {
	argv := p.probe.Exec.Command
	path := argv[0]
	if !strings.Contains(path, "/") {
		if path = lookPath(path, p.o.Env); path == "" {
			return fmt.Errorf("exec probe: %q is not in the function's PATH", argv[0])
		}
	}
	err := p.o.Exec(ctx, path, argv, out)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("exec probe: %q killed: %w%s", argv, ctx.Err(), quote(out.b))
	}
	return fmt.Errorf("exec probe: %q: %w%s", argv, err, quote(out.b))
}

// lookPath finds a program in the PATH of env, "" if it is not there.
func lookPath(name string, env []string) string {
	path := "/usr/local/bin:/usr/bin:/bin"
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v // of several the last counts, as for the program itself
		}
	}
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			continue // the working directory, in the shell's tradition: no
		}
		f := dir + "/" + name
		if st, err := os.Stat(f); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return f
		}
	}
	return ""
}

// tail keeps the last bytes that were written to it. os/exec writes from one goroutine when stdout and stderr are the same.
type tail struct {
	max int
	b   []byte
}

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	if len(p) > t.max {
		p = p[len(p)-t.max:]
	}
	if over := len(t.b) + len(p) - t.max; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	t.b = append(t.b, p...)
	return n, nil
}
