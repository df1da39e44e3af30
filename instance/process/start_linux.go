package process

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/instance/cgroup"
	"github.com/thawrun/thaw/instance/provider"
)

// Start runs the program in the group that was made for it. When it returns nil the kernel has executed it; errors of execve
// come back as *provider.StartError.
func (rt *Runtime) Start(g *cgroup.Group, s *provider.Spec) (*Process, error) {
	g.Limit(s.Limits)
	pidfd := -1
	attr := &syscall.ProcAttr{
		Dir:   s.Dir,
		Files: []uintptr{rt.null.Fd(), s.Stdout.Fd(), s.Stderr.Fd()},
		// No Pdeathsig: the instance has to survive its agent. Setsid also takes it out of the terminal's group, so
		// that ^C reaches the agent alone, which then ends its instances in order.
		Sys: &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	}
	if fd := g.CloneFD(); fd >= 0 {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, fd
	}
	var pid int
	var err error
	attr.Files = append(attr.Files, rt.extra(s)...)
	if s.Listener == nil {
		attr.Env = append([]string{provider.Marker + "=" + s.Name}, s.Env...)
		pid, err = syscall.ForkExec(s.Path, s.Argv, attr)
	} else {
		pid, err = forkExecListening(s, attr)
	}
	g.CloseFD()
	if err != nil {
		return nil, &provider.StartError{Path: s.Path, Err: err}
	}
	attach := func() {
		if err := g.Attach(pid); err != nil {
			rt.log.Warn("instance runs without its limits", "instance", s.Name, "err", err)
		}
	}
	late := s.Limits.LateMemory()
	if !late {
		attach()
		attach = func() {}
	}
	// There is no place for this between Go's fork and exec; what the program itself forks before it has our own score.
	_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(OOMScore), 0)
	// No core dumps: they would fill the function's folder with copies of its memory.
	_ = unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil)
	return rt.Track(pid, pidfd, g, late, attach), nil
}

// OOMScore is written to oom_score_adj of instances: when the machine has no memory left, the kernel ends the largest of them before anything
// else. It is the most that there is, so that no instance is too small to come before the platform, which everybody's requests go through.
const OOMScore = "1000"

// Track looks after a child that was just started, and that nobody else waits for. It takes pidfd (-1 = none). attach puts it into its groups, at
// once but without keeping the caller, or Later; as long as it runs, the child's pid cannot become another's.
func (rt *Runtime) Track(pid, pidfd int, g *cgroup.Group, late bool, attach func()) *Process {
	p := &Process{
		id:    Identity{PID: pid, Boot: rt.boot, Started: time.Now(), Cgroups: g.Paths()},
		child: true, pidfd: pidfd, group: g, log: rt.log, done: make(chan struct{}),
	}
	p.ticks = sync.OnceValue(func() uint64 {
		st, _ := readStat(pid)
		return st.ticks
	})
	if late {
		time.AfterFunc(Later, func() {
			p.signal.Lock()
			defer p.signal.Unlock()
			if !p.ended {
				attach()
			}
		})
	}
	go func() {
		if !late {
			attach()
		}
		p.wait()
	}()
	return p
}

// Open returns a descriptor of the process; ErrGone if it has ended.
func (p *Process) Open() (*os.File, error) {
	fd, err := unix.PidfdOpen(p.id.PID, 0)
	if err != nil {
		return nil, ErrGone
	}
	// Read after the descriptor was opened: if it is the right one, so is the descriptor.
	if st, err := readStat(p.id.PID); err != nil || st.ticks != p.Identity().Ticks || st.state == 'Z' {
		unix.Close(fd)
		return nil, ErrGone
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// listenPID is the placeholder that forkExecListening overwrites: room for the largest pid, ten digits.
const listenPID = "LISTEN_PID=0000000000"

// forkExecListening starts a process whose environment must contain its own pid, which nobody knows before the fork. The
// program is started traced, so that it stops before its first instruction; the digits are then written over a
// placeholder in its environment and it is let go. BenchmarkListenPID, on two busy cores: a start and end of 1.5 ms takes
// 0.1 ms more when traced and 1.3 ms more through a shell. Where tracing is forbidden the shell is what is left.
func forkExecListening(s *provider.Spec, attr *syscall.ProcAttr) (int, error) {
	// Only the thread that started a traced process may trace it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	attr.Env = append([]string{listenPID, provider.Marker + "=" + s.Name, "LISTEN_FDS=1"}, s.Env...)
	attr.Sys.Ptrace = true
	pid, err := syscall.ForkExec(s.Path, s.Argv, attr)
	if errors.Is(err, syscall.EPERM) {
		attr.Sys.Ptrace = false
		attr.Env = attr.Env[1:]
		return forkExecShell(s, attr)
	}
	if err != nil {
		return 0, err
	}
	if err := stampPID(pid); err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_ = syscall.PtraceDetach(pid)
		reapChild(pid)
		return 0, fmt.Errorf("set LISTEN_PID: %w", err)
	}
	return pid, nil
}

// stampPID waits for the stop after exec, writes the pid into the environment and lets the process go.
func stampPID(pid int) error {
	var ws syscall.WaitStatus
	for {
		_, err := syscall.Wait4(pid, &ws, 0, nil)
		if err == nil {
			break
		}
		if err != syscall.EINTR {
			return err
		}
	}
	if !ws.Stopped() || ws.StopSignal() != syscall.SIGTRAP {
		return fmt.Errorf("not stopped after exec (wait status %#x)", uint32(ws))
	}
	st, err := readStat(pid)
	if err != nil {
		return err
	}
	got := make([]byte, len(listenPID))
	if _, err := syscall.PtracePeekData(pid, uintptr(st.envStart), got); err != nil {
		return err
	}
	if string(got) != listenPID {
		return fmt.Errorf("environment of %d begins with %q", pid, got)
	}
	digits := make([]byte, len(listenPID)-len("LISTEN_PID="))
	copy(digits, strconv.Itoa(pid)) // the rest are zero bytes and end the string
	at := uintptr(st.envStart) + uintptr(len("LISTEN_PID="))
	if _, err := syscall.PtracePokeData(pid, at, digits); err != nil {
		return err
	}
	return syscall.PtraceDetach(pid)
}

// Adopt takes hold of a process that an earlier agent started for the given instance; ErrGone when it has ended.
func (rt *Runtime) Adopt(instance string, id Identity) (*Process, error) {
	if id.PID <= 1 || id.Boot != rt.boot {
		return nil, ErrGone
	}
	fd, err := unix.PidfdOpen(id.PID, unix.PIDFD_NONBLOCK)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, ErrGone
	case errors.Is(err, unix.ENOSYS):
		fd = -1 // older than Linux 5.3: wait looks now and then
	case err != nil:
		return nil, fmt.Errorf("adopt process %d: %w", id.PID, err)
	}
	// The start time is read after the descriptor was opened: if it is the right one, so is the descriptor.
	st, err := readStat(id.PID)
	if err != nil || st.ticks != id.Ticks || st.state == 'Z' || st.state == 'X' {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, ErrGone
	}
	if len(id.Cgroups) == 0 { // found by its marker
		id.Cgroups = rt.groups.Find(instance)
	}
	p := &Process{id: id, pidfd: fd, group: rt.groups.Open(instance, id.Cgroups), log: rt.log, done: make(chan struct{})}
	go func() {
		if err := p.group.Attach(id.PID); err != nil { // who started it may have been killed before
			rt.log.Warn("instance runs without its limits", "instance", instance, "err", err)
		}
		p.wait()
	}()
	return p, nil
}

// Sweep kills and removes the groups of instances that keep does not name: what an agent was killed in the middle of.
func (rt *Runtime) Sweep(keep func(instance string) bool) { rt.groups.Sweep(keep) }

// Listener returns a copy of the process's fd 3 if that is a socket listening at addr, else nil. An adopted process is
// asked for it, so that connections waiting in its accept queue can be kept through a crash after adoption too.
func (p *Process) Listener(addr string) *os.File {
	// p.pidfd belongs to wait: open another.
	fd, err := unix.PidfdOpen(p.id.PID, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	sock, err := unix.PidfdGetfd(fd, 3, 0)
	if err != nil {
		return nil
	}
	unix.CloseOnExec(sock)
	listening, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err == nil && listening == 1 && sockAddr(sock) == addr {
		return os.NewFile(uintptr(sock), addr)
	}
	unix.Close(sock)
	return nil
}

func sockAddr(fd int) string {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return ""
	}
	if v4, ok := sa.(*unix.SockaddrInet4); ok {
		return fmt.Sprintf("%d.%d.%d.%d:%d", v4.Addr[0], v4.Addr[1], v4.Addr[2], v4.Addr[3], v4.Port)
	}
	return ""
}

// wait blocks until the process has ended. A pidfd becomes readable then, so the runtime's poller can wait for thousands
// of them without a thread each, and for processes that are not children.
func (p *Process) wait() {
	if p.pidfd < 0 || !awaitReadable(p.pidfd) {
		for !p.child {
			st, err := readStat(p.id.PID)
			if err != nil || st.ticks != p.id.Ticks || st.state == 'Z' {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if p.child {
			var si unix.Siginfo // wait without reaping: finish has to come between
			for unix.Waitid(unix.P_PID, p.id.PID, &si, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
			}
		}
	}
	p.finish(func() provider.Exit {
		if p.child {
			return reapChild(p.id.PID)
		}
		return provider.Exit{}
	})
}

// awaitReadable waits in the runtime's poller; false = this kernel cannot poll a pidfd. It closes fd.
func awaitReadable(fd int) bool {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return false
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	rc, err := f.SyscallConn()
	if err != nil {
		return false
	}
	err = rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return err == nil && n > 0
	})
	return err == nil
}

// stat is what we use of /proc/PID/stat.
type stat struct {
	state    byte
	session  int
	ticks    uint64
	envStart uint64
}

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads the line by proc(5). The second field is the program's own name and may hold anything, so fields count
// from the last closing parenthesis.
func parseStat(b []byte) (stat, error) {
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:]) // f[0] is field 3
	if len(f) < 20 || len(f[0]) != 1 {
		return stat{}, fmt.Errorf("strange stat line %q", b)
	}
	s := stat{state: f[0][0]}
	var err, err2 error
	s.session, err = strconv.Atoi(string(f[6-3]))
	s.ticks, err2 = strconv.ParseUint(string(f[22-3]), 10, 64)
	if len(f) > 50-3 {
		s.envStart, _ = strconv.ParseUint(string(f[50-3]), 10, 64)
	}
	return s, errors.Join(err, err2)
}

// keepDescriptors marks what this process was itself started with, beyond the standard files, as not for instances. What Go
// opens is marked already.
func keepDescriptors() { _ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC) }

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(bytes.TrimSpace(b))
}

// Marked finds the living processes that carry provider.Marker, by its value; session leaders come first, then by age. Processes of
// other users, whose environment may not be read, are not ours and are left out.
func (rt *Runtime) Marked() (map[string][]Identity, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	type found struct {
		id     Identity
		leader bool
	}
	first := map[string][]found{}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue
		}
		marker := markerOf(pid)
		if marker == "" {
			continue
		}
		st, err := readStat(pid)
		if err != nil || st.state == 'Z' {
			continue
		}
		first[marker] = append(first[marker], found{
			id:     Identity{PID: pid, Ticks: st.ticks, Boot: rt.boot},
			leader: st.session == pid,
		})
	}
	all := make(map[string][]Identity, len(first))
	for marker, fs := range first {
		for _, leader := range []bool{true, false} {
			for _, f := range fs {
				if f.leader == leader {
					all[marker] = append(all[marker], f.id)
				}
			}
		}
	}
	return all, nil
}

// markerOf reads only the head of the environment: Start puts the marker there.
func markerOf(pid int) string {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return ""
	}
	defer f.Close()
	var buf [1024]byte
	n, _ := f.Read(buf[:])
	for v := range bytes.SplitSeq(buf[:n], []byte{0}) {
		if rest, ok := bytes.CutPrefix(v, []byte(provider.Marker+"=")); ok {
			return string(rest)
		}
	}
	return ""
}

// strayPatience is how long a killed process is waited for: one that is in the middle of something in the kernel goes later.
const strayPatience = time.Second

// KillStray ends one process that was found by its marker, if it is still the same one. When it returns it has ended.
func (rt *Runtime) KillStray(id Identity) {
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if st, err := readStat(id.PID); err == nil && st.ticks == id.Ticks && id.Boot == rt.boot {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		for end := time.Now().Add(strayPatience); time.Now().Before(end); {
			left := max(1, int(time.Until(end).Milliseconds()))
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, left); !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
}

// memoryOf returns what a process takes, in bytes: of pages that it shares with others its part alone, because a hundred instances of one
// program have its text once.
func memoryOf(pid int) int64 {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); len(f) > 1 && string(f[0]) == "Pss:" {
			kib, _ := strconv.ParseInt(string(f[1]), 10, 64)
			return kib << 10
		}
	}
	b, _ = os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if f := bytes.Fields(b); len(f) > 1 {
		pages, _ := strconv.ParseInt(string(f[1]), 10, 64)
		return pages * int64(os.Getpagesize())
	}
	return 0
}

// deafFirst says whether a process is the first of its process id namespace and neither handles nor ignores SIGTERM, and whether it
// blocks it now.
func deafFirst(pid int) (deaf, blocked bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false, false
	}
	first, meant := false, false
	for line := range bytes.Lines(b) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		switch string(name) {
		case "NSpid":
			ids := bytes.Fields(value)
			first = len(ids) > 1 && string(ids[len(ids)-1]) == "1"
		case "SigBlk", "SigIgn", "SigCgt":
			mask, _ := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
			set := mask&(1<<(unix.SIGTERM-1)) != 0
			if string(name) == "SigBlk" {
				blocked = set
			} else {
				meant = meant || set
			}
		}
	}
	return first && !meant, blocked
}
