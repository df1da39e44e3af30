//go:build unix && !linux

package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/thawrun/thaw/instance/cgroup"
	"github.com/thawrun/thaw/instance/provider"
)

// Start runs the program; g is nil here. When it returns nil the kernel has executed it; errors of execve come back as *provider.StartError.
// Limits cannot be set here and are ignored, as Isolation says.
func (rt *Runtime) Start(_ *cgroup.Group, s *provider.Spec) (*Process, error) {
	attr := &syscall.ProcAttr{
		Dir:   s.Dir,
		Env:   append([]string{provider.Marker + "=" + s.Name}, s.Env...),
		Files: []uintptr{rt.null.Fd(), s.Stdout.Fd(), s.Stderr.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	var pid int
	var err error
	attr.Files = append(attr.Files, rt.extra(s)...)
	if s.Listener == nil {
		pid, err = syscall.ForkExec(s.Path, s.Argv, attr)
	} else {
		attr.Env = append(attr.Env, "LISTEN_FDS=1")
		pid, err = forkExecShell(s, attr)
	}
	if err != nil {
		return nil, &provider.StartError{Path: s.Path, Err: err}
	}
	p := &Process{
		id:    Identity{PID: pid, Started: time.Now()},
		child: true, pidfd: -1, log: rt.log, done: make(chan struct{}),
	}
	go p.wait()
	return p, nil
}

// wait takes one thread for each process: there is nothing here that the poller could wait on for all of them.
func (p *Process) wait() {
	exit := reapChild(p.id.PID)
	p.finish(func() provider.Exit { return exit })
}

// Adopt is not supported here: a process that is not a child cannot be waited for. What is left of a predecessor is ended:
// the process group is killed if its leader began when the record says.
func (rt *Runtime) Adopt(_ string, id Identity) (*Process, error) {
	if id.PID <= 1 {
		return nil, ErrGone
	}
	out, err := exec.Command("ps", "-o", "lstart=", "-p", strconv.Itoa(id.PID)).Output()
	if err != nil {
		return nil, ErrGone
	}
	began, err := time.ParseInLocation(time.ANSIC, strings.Join(strings.Fields(string(out)), " "), time.Local)
	if err != nil || began.Sub(id.Started).Abs() > 2*time.Second {
		return nil, ErrGone
	}
	_ = syscall.Kill(-id.PID, syscall.SIGKILL)
	return nil, fmt.Errorf("adopting a process is not supported on this system, process %d was ended: %w", id.PID, errors.ErrUnsupported)
}

// Sweep does nothing here.
func (rt *Runtime) Sweep(func(string) bool) {}

// Listener returns nil: sockets of other processes cannot be had here.
func (p *Process) Listener(string) *os.File { return nil }

// Marked is not supported here: the environment of other processes cannot be read.
func (rt *Runtime) Marked() (map[string][]Identity, error) { return nil, errors.ErrUnsupported }

// KillStray does nothing here; Marked finds none.
func (rt *Runtime) KillStray(Identity) {}

// keepDescriptors does nothing here: descriptors that this process was started with are passed on.
func keepDescriptors() {}

func bootID() string { return "" }

func memoryOf(int) int64 { return 0 }

func deafFirst(int) (deaf, blocked bool) { return false, false }
