//go:build amd64 || arm64

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/instance/provider"
)

// expendable has the kernel end the child, and all that it forks, before the platform when memory is short. The child is still in the machine's
// files then, and nothing of ours but it is meant: for a child of vfork the kernel does not look at those that share its memory.
func (s *script) expendable() {
	s.try("close", unix.SYS_CLOSE, 0) // the lowest descriptor is free after this, so a new one is known to be 0
	s.try("open oom_score_adj", unix.SYS_OPENAT, atFDCWD, "/proc/self/oom_score_adj", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	s.try("write oom_score_adj", unix.SYS_WRITE, 0, []byte(process.OOMScore), len(process.OOMScore))
}

// drop gives up every right: the bounding set first, so that no program can bring one back, then groups, user, and what is
// left. The child is in its user namespace, as somebody whom that does not know, with all rights in it.
func (s *script) drop(uid int) {
	for c := range 64 {
		s.try("drop capability", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0, 0) // fails beyond the last
	}
	s.do("setgroups", unix.SYS_SETGROUPS, 0, nil)
	s.do("setresgid", unix.SYS_SETRESGID, uid, uid, uid)
	s.do("setresuid", unix.SYS_SETRESUID, uid, uid, uid)
	s.do("drop ambient capabilities", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	none := &[2]unix.CapUserData{}
	s.do("drop capabilities", unix.SYS_CAPSET, unsafe.Pointer(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}), unsafe.Pointer(none))
	s.do("no_new_privs", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// exec becomes the program. The filter is the last but two: it allows no more than what follows it and what programs need.
func (s *script) exec(spec *provider.Spec, f *filter) error {
	env := []string{provider.Marker + "=" + spec.Name}
	if spec.Listener != nil {
		env = append(env, "LISTEN_FDS=1", "LISTEN_PID=1") // the first process of its namespace
	}
	argv, err := s.strings(spec.Argv)
	envp, err2 := s.strings(append(env, spec.Env...))
	if err := errors.Join(err, err2); err != nil {
		return &provider.StartError{Path: spec.Path, Err: fmt.Errorf("a zero byte in its arguments or environment: %w", err)}
	}
	s.limit(unix.RLIMIT_CORE, 0)
	// Its output is a file of the machine, which it could make as large as the disk in one call (fallocate). Twice, because a
	// full /tmp shall say so before this does.
	s.limit(unix.RLIMIT_FSIZE, 2*tmpBytes)
	s.do("umask", unix.SYS_UMASK, 0o22)
	s.do("system call filter", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, unsafe.Pointer(&f.prog))
	s.keep = append(s.keep, f)
	s.do("signals", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, unsafe.Pointer(new(uint64)), nil, 8)
	s.do("execute "+spec.Path, unix.SYS_EXECVE, spec.Path, argv, envp)
	return nil
}

// limit sets a resource limit for good.
func (s *script) limit(resource int, n uint64) {
	s.do("prlimit", unix.SYS_PRLIMIT64, 0, resource, unsafe.Pointer(&unix.Rlimit{Cur: n, Max: n}), nil)
}

// strings makes a list of C strings.
func (s *script) strings(list []string) (unsafe.Pointer, error) {
	ptrs, err := syscall.SlicePtrFromStrings(list)
	if err != nil {
		return nil, err
	}
	s.keep = append(s.keep, ptrs)
	return unsafe.Pointer(unsafe.SliceData(ptrs)), nil
}

// Command is local.Place's: one more program in the namespaces of the one that is there, with the same rights and in the same groups.
func (pl *place) Command(ctx context.Context, s *provider.Spec, out io.Writer) error {
	proc := pl.proc.Load()
	if proc == nil {
		return fmt.Errorf("instance %s runs no program: %w", pl.id, provider.ErrUnknown)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	spec := *s
	spec.Stdout, spec.Stderr, spec.Listener, spec.Ready, spec.Order = w, w, nil, nil, nil
	pid, pidfd, err := pl.enter(proc, &spec)
	if err != nil {
		return err
	}
	w.Close() // the program has the last copies
	defer unix.Close(pidfd)
	killed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(killed)
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		r.Close()
	})
	defer func() {
		if !stop() { // the descriptor may be another process's once it is closed
			<-killed
		}
	}()
	_, _ = io.Copy(out, r)
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case ws.Signaled():
		return fmt.Errorf("killed by signal %d (%v)", int(ws.Signal()), ws.Signal())
	case ws.ExitStatus() != 0:
		return fmt.Errorf("exit status %d", ws.ExitStatus())
	}
	return nil
}

// enter starts a program beside the one that is there. A clone puts its child into the process id namespace that is set for
// children of the thread, so the thread changes that for a moment. The child joins the control groups after its exec: what it shares with us
// before, our memory and a thread of ours that waits for it, must not be killed or frozen with the instance.
func (pl *place) enter(proc *process.Process, s *provider.Spec) (pid, pidfd int, err error) {
	there, err := proc.Open()
	if err != nil {
		return 0, -1, fmt.Errorf("instance %s: %w: %w", pl.id, err, provider.ErrUnknown)
	}
	defer there.Close()
	own, err := os.Open("/proc/thread-self/ns/pid")
	if err != nil {
		return 0, -1, err
	}
	defer own.Close()
	sc := &script{}
	sc.expendable()
	sc.enter(there, unix.CLONE_NEWNS|unix.CLONE_NEWNET|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS)
	sc.do("setsid", unix.SYS_SETSID)
	sc.descriptors(pl.rt.Null(), there, s)
	sc.drop(s.UID)
	sc.do("working directory", unix.SYS_CHDIR, s.Dir)
	if err := sc.exec(s, pl.rt.filter); err != nil {
		return 0, -1, err
	}

	runtime.LockOSThread()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWPID); err != nil {
		runtime.UnlockOSThread()
		return 0, -1, err
	}
	pid, pidfd, err = sc.run(0, -1)
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWPID); back == nil {
		runtime.UnlockOSThread() // else the thread ends with the goroutine: nobody else shall start children from it
	}
	if err != nil {
		return 0, -1, startError(s, err)
	}
	if err := pl.group.Join(pid); err != nil {
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		unix.Close(pidfd)
		reap(pid)
		return 0, -1, fmt.Errorf("a command in instance %s: %w", pl.id, err)
	}
	return pid, pidfd, nil
}
