// Package provider is the contract between the node agent and a way to run instances on its machine. The agent knows no system
// call; a provider knows no revision. What every provider promises is what the suite in providertest checks:
//
//   - Operations name an instance by its id. All are idempotent: done twice they have done it once, and what concerns an
//     instance that is gone already succeeds (Stop, Destroy) or says ErrUnknown (the others).
//   - They end with their context: ctx's error then comes back, and the operation may be repeated.
//   - Operations on one instance are carried out one after the other, those on different ones side by side.
//   - An instance outlives the provider: after a crash of the agent, List finds what its predecessor ran.
//
// The way of an instance: Create (a place without a program, which may wait in a pool), Specialise (the program runs in it), perhaps
// Grant (an interpreter that waits is given a function), Freeze and Thaw, Stop, Destroy.
package provider

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// Marker is the name of the environment variable that carries Spec.Name. It is how processes are found whose pid was never
// written down, because the agent was killed between starting them and noting it.
const Marker = "THAW_INSTANCE"

// What callers branch on.
var (
	ErrUnknown     = errors.New("no such instance")
	ErrUnsupported = errors.New("not supported by this provider on this machine")
)

// Provider runs instances.
type Provider interface {
	// Capabilities says what this provider can do here and what it costs.
	Capabilities() Capabilities

	// Prepare checks, when a revision becomes known, that its program can run at all, and makes ready what its starts have in
	// common. ID, Name, files and sockets of the Spec are not used.
	Prepare(ctx context.Context, s *Spec) error

	// Create makes a place for an instance, without a program: it belongs to nobody yet and may wait in a pool.
	Create(ctx context.Context, id string) error

	// Specialise runs a program in it. When it returns nil the kernel has executed the program; errors of the program's
	// own are a *StartError. After an error the place is good for Destroy only.
	Specialise(ctx context.Context, id string, s *Spec) error

	// Grant gives a program that runs already what it would have got from Specialise: s.Code becomes visible at its own place, s.Limits hold
	// (if Capabilities has LateLimits), s.Name is its host name. Nothing else of s counts, and only the first call does.
	// ErrUnknown without a program.
	Grant(ctx context.Context, id string, s *Spec) error

	// Freeze stops all of an instance where it stands, until Thaw; ErrUnsupported where Capabilities does not list it. What it
	// would have been sent waits in its sockets. Stop thaws it, Destroy need not.
	Freeze(ctx context.Context, id string) error
	Thaw(ctx context.Context, id string) error

	// Stop asks the program to end (SIGTERM) and returns at once; Watch tells when it has.
	Stop(ctx context.Context, id string) error

	// Destroy ends it by force, and returns when nothing of it is left in the kernel.
	Destroy(ctx context.Context, id string) error

	// List returns the ids of all instances with a program that runs. The first call takes possession of what a predecessor
	// left running, and ends what it left half-made.
	List(ctx context.Context) ([]string, error)

	// Watch has f called once for each program that ends, from a goroutine of its own. Call it before the first Specialise
	// and List; there is one watcher.
	Watch(f func(Event))

	// Stats measures an instance; ErrUnknown without a program.
	Stats(ctx context.Context, id string) (Stats, error)

	// Dial connects to a TCP port on the loopback address that the instance sees. It is refused when nobody listens there.
	Dial(ctx context.Context, id string, port int) (net.Conn, error)

	// Socket returns a copy of the listening socket that the instance was given, if it is bound to addr; nil if it cannot be had.
	Socket(id, addr string) *os.File

	// Command runs one more program inside the instance, for probes, and returns when it has ended or ctx has. Both its
	// streams go to out. ErrUnsupported without OwnFiles: there is no inside then.
	Command(ctx context.Context, id string, s *Spec, out io.Writer) error

	// Close gives up what the provider itself holds; instances go on.
	Close()
}

// Capabilities are what a provider can do on this machine.
type Capabilities struct {
	Name       string // "process", "sandbox"
	Isolation  string // one line for people
	OwnNetwork bool   // each instance has all ports to itself; else ports are the machine's
	OwnFiles   bool   // an instance sees a file system of its own, with a writable /tmp
	Freezes    bool
	LateLimits bool   // Grant can set limits
	Path       string // PATH that programs are looked up in and get
	Costs      Costs
}

// Costs are what the transitions take, averaged over the latest ones (weight 1/8 each). Zero = not measured yet.
type Costs struct {
	Create, Specialise, Freeze, Thaw, Destroy time.Duration
}

// Limits bound one instance. Zero = no bound.
type Limits struct {
	MemoryBytes int64
	PIDs        int64 // processes and threads
	Precaution  bool  // MemoryBytes is nobody's wish: where it cannot be set nothing is said, and it may hold a moment after the start
	CPUMillis   int64 // thousandths of a processor
	CPURequest  int64 // thousandths of a processor that it gets at least when others want it too, in proportion to theirs
}

// LateMemory says that there is no other limit than one on memory that may hold a moment after the start.
func (l Limits) LateMemory() bool {
	return l.Precaution && l.PIDs <= 0 && l.CPUMillis <= 0 && l.CPURequest <= 0
}

// Spec is everything that running one program needs. The provider adds Marker to the environment, and LISTEN_FDS and
// LISTEN_PID when there is a Listener.
type Spec struct {
	Name           string   // of the instance, for people; ends in "-" and its id
	Path           string   // of the program, absolute
	Argv           []string // with argv[0]
	Env            []string
	Dir            string   // working directory
	Code           []string // files and folders that are readable for the instance whatever else is not
	Stdout, Stderr *os.File
	Started        time.Time // set by Specialise: when the kernel had executed the program
	Listener       *os.File  // becomes descriptor 3; nil = none
	Ready          *os.File  // writing end of a pipe, becomes descriptor 4; nil = none
	Order          *os.File  // reading end of a pipe, becomes descriptor 5; nil = none. Needs Listener and Ready
	Limits         Limits
	UID            int  // user (and group) inside a sandbox, 0 to 65,535; it has no rights either way
	HostNetwork    bool // shares the machine's network although the provider has own ones

	// Network is a network namespace to run in, in the place of the instance's own; nil = its own. ErrUnsupported without OwnNetwork.
	// The caller closes it after Specialise.
	Network *os.File
}

// Event tells that an instance's program has ended and that all its processes have.
type Event struct {
	ID   string
	Exit Exit
}

// Stats is what an instance uses. Zero = cannot be told here.
type Stats struct {
	MemoryBytes int64
	CPU         time.Duration
	PIDs        int
	Throttled   time.Duration // it was kept from running by its CPU limit
	Frozen      bool
}

// Exit is how a program ended.
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
