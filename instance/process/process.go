// Package process runs instances as plain processes of this machine: each in its own session (and so its own process
// group), its output going straight into files, without any tie that would end it when its agent is killed.
//
// It knows nothing of revisions. The agent describes one process in a Spec, gets a Process back, and can take hold of a
// process that a predecessor started (Adopt). What is Linux alone (pidfd, cgroups, LISTEN_PID) sits in files of that name;
// elsewhere a process is waited for by a blocking wait, and processes of a predecessor cannot be adopted, only ended.
package process

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"
)

// Marker is the name of the environment variable that carries Spec.ID. It is how processes are found whose pid was never
// written down, because the agent was killed between starting them and noting it.
const Marker = "THAW_INSTANCE"

// ErrGone says that the process to adopt has ended (or that its pid belongs to another one now).
var ErrGone = errors.New("process has ended")

// Limits bound one instance. Zero = no bound.
type Limits struct {
	MemoryBytes int64
	PIDs        int64 // processes and threads
}

// Spec is everything that starting one process needs. The runtime adds Marker to the environment, and LISTEN_FDS and
// LISTEN_PID when there is a Listener.
type Spec struct {
	ID             string
	Path           string   // absolute
	Argv           []string // with argv[0]
	Env            []string
	Dir            string
	Stdout, Stderr *os.File
	Listener       *os.File // becomes fd 3; nil = none
	Limits         Limits
}

// Identity is what it takes to find a process again after the agent was killed. It is stored as JSON.
type Identity struct {
	PID     int       `json:"pid"`
	Ticks   uint64    `json:"ticks,omitempty"`  // start of the process since boot, as in /proc/PID/stat; 0 where there is none
	Boot    string    `json:"boot,omitempty"`   // id of the boot that Ticks counts from
	Started time.Time `json:"started,omitzero"` // wall clock, for systems without Ticks
	Cgroups []string  `json:"cgroups,omitempty"`
}

// Exit is how a process ended.
type Exit struct {
	Known  bool // false: it was adopted, and only its real parent learns how it ended
	Code   int
	Signal syscall.Signal // 0 = it exited by itself
	OOM    bool           // its own memory limit killed it
}

// Reason returns the CamelCase word for conditions: ExitCode1, Signal9, OOMKilled, or Exited where nothing is known.
func (e Exit) Reason() string {
	switch {
	case e.OOM:
		return "OOMKilled"
	case !e.Known:
		return "Exited"
	case e.Signal != 0:
		return fmt.Sprintf("Signal%d", int(e.Signal))
	}
	return fmt.Sprintf("ExitCode%d", e.Code)
}

func (e Exit) String() string {
	switch {
	case e.OOM:
		return "was killed because it used more memory than its limit"
	case !e.Known:
		return "ended (how is not known, it had outlived its agent)"
	case e.Signal != 0:
		return fmt.Sprintf("was killed by signal %d (%v)", int(e.Signal), e.Signal)
	}
	return fmt.Sprintf("exited with code %d", e.Code)
}

// StartError is why a program could not be started.
type StartError struct {
	Path string
	Err  error // normally a syscall.Errno
}

func (e *StartError) Error() string {
	return fmt.Sprintf("start %s: %v%s", e.Path, e.Err, hint(e.Err))
}

func (e *StartError) Unwrap() error { return e.Err }

// hint says what an errno of execve usually means; the kernel's words alone send people looking in the wrong place.
func hint(err error) string {
	switch {
	case errors.Is(err, syscall.ENOENT):
		return " (the program, the interpreter in its first line, or its working directory does not exist)"
	case errors.Is(err, syscall.EACCES):
		return " (not executable, or a folder on the way may not be entered; try: chmod +x)"
	case errors.Is(err, syscall.ENOEXEC):
		return " (not a program for this machine, or a script without a #! line)"
	case errors.Is(err, syscall.E2BIG):
		return " (environment and arguments together are too long)"
	}
	return ""
}

// Runtime starts and adopts processes.
type Runtime struct {
	log    *slog.Logger
	null   *os.File
	groups *cgroups // nil where there are none
	boot   string
}

// New makes a runtime. node names this agent's data folder; cgroups are made below a group of that name.
func New(node string, log *slog.Logger) (*Runtime, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("process runtime: %w", err)
	}
	keepDescriptors()
	rt := &Runtime{log: log, null: null, boot: bootID()}
	rt.groups = newCgroups(node, log)
	return rt, nil
}

// Close gives back what New took. Processes go on.
func (rt *Runtime) Close() {
	rt.null.Close()
	rt.groups.close()
}

// Isolation says in one line what this runtime can bound here, for logs and `thaw doctor`.
func (rt *Runtime) Isolation() string { return "process: own session; " + rt.groups.String() }

// Process is one running instance. Its methods may be called from any goroutine.
type Process struct {
	id     Identity
	child  bool
	pidfd  int // -1 where there is none; owned by wait after Start
	group  *group
	log    *slog.Logger
	signal sync.Mutex // guards ended: no signal is sent after the pid was given back
	ended  bool
	done   chan struct{}
	exit   Exit // set before done is closed
}

// Identity returns what is to be stored for Adopt.
func (p *Process) Identity() Identity { return p.id }

// PID returns the process id, which is also the id of its session and group.
func (p *Process) PID() int { return p.id.PID }

// Done is closed when the process has ended and what was left of its group has been killed.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how it ended. It may be called once Done is closed.
func (p *Process) Exit() Exit { return p.exit }

// Terminate sends SIGTERM to the process group.
func (p *Process) Terminate() { p.send(syscall.SIGTERM) }

// Kill sends SIGKILL to the process group, and to the whole cgroup where there is one.
func (p *Process) Kill() {
	p.group.kill()
	p.send(syscall.SIGKILL)
}

func (p *Process) send(sig syscall.Signal) {
	p.signal.Lock()
	defer p.signal.Unlock()
	if !p.ended {
		_ = syscall.Kill(-p.id.PID, sig) // ESRCH: it ended this moment
	}
}

// finish is called by wait as soon as the process is known to have ended and, for a child, before it is reaped: until
// then its pid cannot belong to anybody else, so the rest of the group can be killed without hitting a stranger. The group
// of an adopted process is reaped by init at once; it is killed all the same, as the pid counter would have to go once
// round between two system calls to do harm.
func (p *Process) finish(reap func() Exit) {
	p.group.kill()
	p.signal.Lock()
	_ = syscall.Kill(-p.id.PID, syscall.SIGKILL)
	p.ended = true
	p.signal.Unlock()
	p.exit = reap()
	if p.exit.Signal == syscall.SIGKILL || !p.exit.Known {
		p.exit.OOM = p.group.oomKilled()
	}
	p.group.remove()
	close(p.done)
}

// reapChild collects the status of a child that has ended or is about to.
func reapChild(pid int) Exit {
	var ws syscall.WaitStatus
	for {
		_, err := syscall.Wait4(pid, &ws, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return Exit{}
		}
		if ws.Signaled() {
			return Exit{Known: true, Code: 128 + int(ws.Signal()), Signal: ws.Signal()}
		}
		if ws.Exited() {
			return Exit{Known: true, Code: ws.ExitStatus()}
		}
	}
}
