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

	"github.com/thawrun/thaw/instance/cgroup"
	"github.com/thawrun/thaw/instance/provider"
)

// ErrGone says that the process to adopt has ended (or that its pid belongs to another one now).
var ErrGone = errors.New("process has ended")

// Later is when, after a start, that is done which the request waiting for the start does not need: noting the process, and a limit that is a
// precaution. At once it would have the processor first where there are few; and while a process is moved into a group of cgroup v1 nothing on
// the machine can make a thread, which a program that is just beginning does.
const Later = 20 * time.Millisecond

// Identity is what it takes to find a process again after the agent was killed. It is stored as JSON.
type Identity struct {
	PID     int       `json:"pid"`
	Ticks   uint64    `json:"ticks,omitempty"`  // start of the process since boot, as in /proc/PID/stat; 0 where there is none
	Boot    string    `json:"boot,omitempty"`   // id of the boot that Ticks counts from
	Started time.Time `json:"started,omitzero"` // wall clock, for systems without Ticks
	Cgroups []string  `json:"cgroups,omitempty"`
}

// Runtime starts and adopts processes.
type Runtime struct {
	log    *slog.Logger
	null   *os.File
	groups *cgroup.Trees // nil where there are none
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
	rt.groups = cgroup.New(node, log)
	return rt, nil
}

// Close gives back what New took. Processes go on.
func (rt *Runtime) Close() {
	rt.null.Close()
	rt.groups.Close()
}

// Groups are the control groups that this runtime's processes get theirs from.
func (rt *Runtime) Groups() *cgroup.Trees { return rt.groups }

// Null is the machine's null device.
func (rt *Runtime) Null() *os.File { return rt.null }

// Isolation says in one line what this runtime can bound here, for logs and `thaw doctor`.
func (rt *Runtime) Isolation() string { return "process: own session; " + rt.groups.String() }

// Process is one running instance. Its methods may be called from any goroutine.
type Process struct {
	id     Identity
	ticks  func() uint64 // of a child: its id's Ticks; nil = they are there
	child  bool
	pidfd  int // -1 where there is none; owned by wait after Start
	group  *cgroup.Group
	log    *slog.Logger
	signal sync.Mutex // guards ended and deaf: no signal is sent after the pid was given back
	ended  bool
	deaf   bool // SIGKILL stood for SIGTERM
	done   chan struct{}
	exit   provider.Exit // set before done is closed
}

// Identity returns what is to be stored for Adopt.
func (p *Process) Identity() Identity {
	id := p.id
	if p.ticks != nil {
		id.Ticks = p.ticks()
	}
	return id
}

// PID returns the process id, which is also the id of its session and group.
func (p *Process) PID() int { return p.id.PID }

// Group returns its control group.
func (p *Process) Group() *cgroup.Group { return p.group }

// Memory returns what the process itself keeps in memory, in bytes; 0 where that cannot be told.
func (p *Process) Memory() int64 { return memoryOf(p.id.PID) }

// Done is closed when the process has ended and what was left of its group has been killed.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how it ended. It may be called once Done is closed.
func (p *Process) Exit() provider.Exit { return p.exit }

// Terminate sends SIGTERM to the process group. The first process of a process id namespace is spared by the kernel what it has
// no handler for; one that would not notice is ended as any other process would be.
func (p *Process) Terminate() {
	deaf, blocked := deafFirst(p.id.PID)
	if deaf && !blocked {
		p.endDeaf()
		return
	}
	p.send(syscall.SIGTERM)
	if !deaf {
		return
	}
	// Who blocks it may be waiting for it in another way, or be in the middle of a fork, as shells are; then it is lost
	// when it is let through. A shell can be found in the middle of one fork after the other.
	p.lookAgain(blockLooks)
}

// Those who do not wait for a signal block it for a moment only: they are looked at each blockPatience, blockLooks times.
const (
	blockPatience = 50 * time.Millisecond
	blockLooks    = 100
)

// lookAgain ends one that was sent SIGTERM and turns out not to wait for it.
func (p *Process) lookAgain(times int) {
	time.AfterFunc(blockPatience, func() {
		select {
		case <-p.done: // its id may be another's by now
			return
		default:
		}
		switch deaf, blocked := deafFirst(p.id.PID); {
		case deaf && !blocked:
			p.endDeaf()
		case deaf && times > 1:
			p.lookAgain(times - 1)
		}
	})
}

func (p *Process) endDeaf() {
	p.signal.Lock()
	p.deaf = p.deaf || !p.ended // told again when it has just ended, it ended of the first time
	p.signal.Unlock()
	select {
	case <-p.done: // its id may be another's by now
	default:
		p.Kill()
	}
}

// Kill sends SIGKILL to the process group, and to the whole cgroup where there is one.
func (p *Process) Kill() {
	p.group.Kill()
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
func (p *Process) finish(reap func() provider.Exit) {
	p.group.Kill()
	if p.ticks != nil { // as long as the pid is its own
		p.ticks()
	}
	p.signal.Lock()
	_ = syscall.Kill(-p.id.PID, syscall.SIGKILL)
	p.ended = true
	p.exit = reap()
	deaf := p.deaf
	p.signal.Unlock()
	if deaf && p.exit.Signal == syscall.SIGKILL {
		p.exit.Signal, p.exit.Code = syscall.SIGTERM, 128+int(syscall.SIGTERM)
	}
	if p.exit.Signal == syscall.SIGKILL || !p.exit.Known {
		p.exit.OOM = p.group.OOMKilled()
	}
	p.group.Remove()
	close(p.done)
}

// reapChild collects the status of a child that has ended or is about to.
func reapChild(pid int) provider.Exit {
	var ws syscall.WaitStatus
	for {
		_, err := syscall.Wait4(pid, &ws, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return provider.Exit{}
		}
		if ws.Signaled() {
			return provider.Exit{Known: true, Code: 128 + int(ws.Signal()), Signal: ws.Signal()}
		}
		if ws.Exited() {
			return provider.Exit{Known: true, Code: ws.ExitStatus()}
		}
	}
}

// extra returns what a program gets on its descriptors from 3: its listening socket, the pipe that it says ready on, and the one that a
// blank is told on what it shall be.
func (rt *Runtime) extra(s *provider.Spec) []uintptr {
	var fds []uintptr
	if s.Listener != nil {
		fds = append(fds, s.Listener.Fd())
	}
	if s.Ready != nil {
		if s.Listener == nil {
			fds = append(fds, rt.null.Fd()) // 4 is 4 whatever is on 3
		}
		fds = append(fds, s.Ready.Fd())
	}
	if s.Order != nil {
		fds = append(fds, s.Order.Fd())
	}
	return fds
}
