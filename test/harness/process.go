package harness

import (
	"bufio"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Process is a running `thaw` of any role.
type Process struct {
	Ready map[string]string // what its first line said: listen, api, metrics, name
	name  string
	cmd   *exec.Cmd
	done  chan struct{}
	log   *lockedBuffer
}

// startTime bounds the wait for the first line.
const startTime = 60 * time.Second

// Run starts a role from the folder bin (the first of args names it) and waits for the line by which it says that it is ready.
func Run(bin string, args ...string) (*Process, error) {
	p := &Process{name: args[0], cmd: exec.Command(filepath.Join(bin, "thaw"), args...), done: make(chan struct{}), log: &lockedBuffer{}, Ready: map[string]string{}}
	p.cmd.Stderr = p.log
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	lines := make(chan string, 1)
	go func() { // ends with the process
		defer close(p.done)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			select {
			case lines <- sc.Text():
			default:
			}
		}
		p.cmd.Wait() // it closes the pipe: all must have been read before
	}()
	select {
	case line := <-lines:
		words := strings.Fields(line)
		if len(words) < 3 || words[0] != "thaw" || words[1] != p.name || words[2] != "ready" {
			p.Kill()
			return nil, fmt.Errorf("first line of thaw %s: %q", p.name, line)
		}
		for _, w := range words[3:] {
			if k, v, ok := strings.Cut(w, "="); ok {
				p.Ready[k] = v
			}
		}
		return p, nil
	case <-p.done:
		return nil, fmt.Errorf("thaw %s ended:\n%s", strings.Join(args, " "), p.log)
	case <-time.After(startTime):
		p.Kill()
		return nil, fmt.Errorf("thaw %s not ready within %v:\n%s", p.name, startTime, p.log)
	}
}

// PID is its process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Log is what it has written to stderr so far.
func (p *Process) Log() string { return p.log.String() }

// Signal sends it a signal.
func (p *Process) Signal(s syscall.Signal) { _ = p.cmd.Process.Signal(s) }

// Kill ends it as a crash does.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Running says whether it is there.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Stop ends it as SIGTERM does.
func (p *Process) Stop() error {
	if !p.Running() {
		return nil
	}
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(40 * time.Second):
		p.Kill()
		return errors.New("thaw " + p.name + " did not end within 40 s of SIGTERM")
	}
}
