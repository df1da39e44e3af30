//go:build amd64 || arm64

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A script is what a child does between clone and exec, as a table of system calls that is made beforehand. The child is a loop in
// assembly that carries the table out (forkCalls). So no Go runs in it, there is no second start of a Go runtime inside the sandbox
// (measured elsewhere at 1.9 ms), and it may share our memory: nothing is copied, and the results come back in the table.
type script struct {
	calls []call
	what  []string // of each call, for errors
	keep  []any    // what the calls' arguments point to
}

// call is one system call. The layout is known to forkCalls.
type call struct {
	nr     uintptr
	args   [6]uintptr
	result uintptr
	mayErr uintptr // not 0: go on after an error
}

// cloneArgs is struct clone_args of Linux 5.7.
type cloneArgs struct {
	flags, pidfd, _, _, exitSignal, _, _, _, _, _, cgroup uint64
}

// clearSighand gives the child default signal handlers: ours are Go functions, which must not run in it.
const clearSighand = 0x100000000 // CLONE_CLEAR_SIGHAND, Linux 5.5

//go:noescape
func forkCalls(args *cloneArgs, size uintptr, calls *call, n uintptr) (pid, errno uintptr)

// do adds a call. Arguments are int, uint, uintptr, string (as a path), *os.File, []byte, or unsafe.Pointer to something on
// the heap.
func (s *script) do(what string, nr uintptr, args ...any) *call {
	c := call{nr: nr}
	for i, a := range args {
		switch a := a.(type) {
		case int:
			c.args[i] = uintptr(a)
		case uintptr:
			c.args[i] = a
		case *os.File:
			c.args[i] = a.Fd()
		case string:
			b := append([]byte(a), 0)
			c.args[i] = s.pointer(unsafe.Pointer(unsafe.SliceData(b)))
		case []byte:
			c.args[i] = s.pointer(unsafe.Pointer(unsafe.SliceData(a)))
		case unsafe.Pointer:
			c.args[i] = s.pointer(a)
		case nil:
		default:
			panic(fmt.Sprintf("sandbox: argument %d of %s is a %T", i, what, a))
		}
	}
	s.calls = append(s.calls, c)
	s.what = append(s.what, what)
	return &s.calls[len(s.calls)-1]
}

// try adds a call that may fail.
func (s *script) try(what string, nr uintptr, args ...any) { s.do(what, nr, args...).mayErr = 1 }

// pointer keeps what p points to where it is for as long as the script is there.
func (s *script) pointer(p unsafe.Pointer) uintptr {
	s.keep = append(s.keep, p)
	return uintptr(p)
}

const atFDCWD = ^uintptr(99) // AT_FDCWD, -100

func (s *script) mount(source, target, fstype string, flags int, data string) {
	s.do("mount "+target, unix.SYS_MOUNT, source, target, fstype, flags, data)
}

// readOnly makes the mount at target read-only.
func (s *script) readOnly(target string) { s.setattr(target, unix.MOUNT_ATTR_RDONLY, 0) }

// writable takes that back, for what is done next.
func (s *script) writable(target string) {
	attr := &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	s.do("mount_setattr "+target, unix.SYS_MOUNT_SETATTR, atFDCWD, target, 0, unsafe.Pointer(attr), int(unsafe.Sizeof(*attr)))
}

func (s *script) setattr(target string, set uint64, flags int) {
	attr := &unix.MountAttr{Attr_set: set}
	s.do("mount_setattr "+target, unix.SYS_MOUNT_SETATTR, atFDCWD, target, flags, unsafe.Pointer(attr), int(unsafe.Sizeof(*attr)))
}

func (s *script) mkdir(path string) { s.try("mkdir "+path, unix.SYS_MKDIRAT, atFDCWD, path, 0o755) }

// file writes a small file. The child's descriptor 0 is ours to use: it has a table of its own.
func (s *script) file(path string, content string, mode int) {
	s.try("close", unix.SYS_CLOSE, 0)
	s.do("create "+path, unix.SYS_OPENAT, atFDCWD, path, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, mode)
	if content != "" {
		s.do("write "+path, unix.SYS_WRITE, 0, []byte(content), len(content))
	}
}

// enter joins a namespace.
func (s *script) enter(ns *os.File, kind int) { s.do("enter "+ns.Name(), unix.SYS_SETNS, ns, kind) }

// errCall is a call that failed in a child.
type errCall struct {
	what string
	nr   uintptr
	err  syscall.Errno
}

func (e *errCall) Error() string { return fmt.Sprintf("%s: %v", e.what, e.err) }
func (e *errCall) Unwrap() error { return e.err }

// failed returns the call that ended the child, nil if none did.
func (s *script) failed() error {
	for i := range s.calls {
		c := &s.calls[i]
		if int(c.result) < 0 && int(c.result) > -4096 && c.mayErr == 0 {
			return &errCall{s.what[i], c.nr, syscall.Errno(-int(c.result))}
		}
	}
	return nil
}

// keepMemoryClosed makes the memory of this process, which all children share until their exec, closed to whoever is not the
// machine's root. A child takes the user of its sandbox while it still shares it; without this a program that runs in
// that sandbox already could open the child's /proc/PID/mem, which is ours. The kernel closes it by itself when a child changes its
// user, but the next exec of another one must not be the end of that: it stays closed for good. What is lost is this
// process's core dumps, and being traced by others than root.
func keepMemoryClosed() error {
	if b, err := os.ReadFile("/proc/sys/fs/suid_dumpable"); err == nil && strings.TrimSpace(string(b)) == "1" {
		return errors.New("the setting fs.suid_dumpable is 1, which would open the agent's memory to functions; set it to 0 or 2")
	}
	return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

// fork makes a child that carries the script out. With CLONE_VFORK it returns when the child has executed a program or
// ended, otherwise at once; the caller then keeps s until the child is gone.
func (s *script) fork(flags uint64, cgroup int) (pid, pidfd int, err error) {
	fd := new(int32)
	args := &cloneArgs{
		flags: flags | unix.CLONE_VM | unix.CLONE_PIDFD | clearSighand, exitSignal: uint64(unix.SIGCHLD),
		pidfd: uint64(s.pointer(unsafe.Pointer(fd))),
	}
	if cgroup >= 0 {
		args.flags |= unix.CLONE_INTO_CGROUP
		args.cgroup = uint64(cgroup)
	}
	// All signals wait while the child shares our memory: it inherits the mask, and is not to act on ours. The goroutine
	// must stay on the thread whose mask it is.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	all, old := ^uint64(0), uint64(0)
	const maskSize = unsafe.Sizeof(all)
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), maskSize, 0, 0)
	p, errno := forkCalls(args, unsafe.Sizeof(*args), unsafe.SliceData(s.calls), uintptr(len(s.calls)))
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, maskSize, 0, 0)
	runtime.KeepAlive(s)
	if errno != 0 {
		return 0, -1, fmt.Errorf("clone: %w", syscall.Errno(errno))
	}
	return int(p), int(*fd), nil
}

// run carries out a script that ends by itself or in exec, and returns the child. A child that failed is reaped.
func (s *script) run(flags uint64, cgroup int) (pid, pidfd int, err error) {
	pid, pidfd, err = s.fork(flags|unix.CLONE_VFORK, cgroup)
	if err != nil {
		return 0, -1, err
	}
	if err := s.failed(); err != nil {
		unix.Close(pidfd)
		reap(pid)
		return 0, -1, err
	}
	return pid, pidfd, nil
}

func reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// held is a child that has carried out its script and waits to be looked at.
type held struct {
	*script
	pid, pidfd int
}

// lifePipe is a pipe whose writing end this process alone keeps open: its reading end is hung up when the process ends. One for
// all, because a child closes its copy of the writing end but knows nothing of others'.
var lifePipe = sync.OnceValues(func() ([2]*os.File, error) {
	r, w, err := os.Pipe()
	return [2]*os.File{r, w}, err
})

// hold runs a script and keeps the child, so that its namespaces can be taken hold of.
func (s *script) hold(flags uint64) (*held, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	life, err := lifePipe()
	if err != nil {
		return nil, err
	}
	one := []byte{1}
	// The child ends with us, by whatever we end: it has copies of all our descriptors, locks among them.
	s.do("close", unix.SYS_CLOSE, life[1])
	s.do("tell", unix.SYS_WRITE, w, one, 1)
	// The child's copy of the writing end is the last one: if it dies, the read below ends.
	s.do("wait", unix.SYS_PPOLL, unsafe.Pointer(&unix.PollFd{Fd: int32(life[0].Fd())}), 1, nil, nil, 0)
	pid, pidfd, err := s.fork(flags, -1)
	w.Close()
	if err != nil {
		return nil, err
	}
	h := &held{s, pid, pidfd}
	if _, err := r.Read(one); err != nil {
		h.release()
		if f := s.failed(); f != nil {
			return nil, f
		}
		return nil, fmt.Errorf("a child that makes a sandbox has died: %w", err)
	}
	return h, nil
}

// namespace opens one of the child's namespaces.
func (h *held) namespace(kind string) (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/%d/ns/%s", h.pid, kind))
}

func (h *held) release() {
	_ = unix.Kill(h.pid, unix.SIGKILL)
	reap(h.pid)
	unix.Close(h.pidfd)
	runtime.KeepAlive(h.script)
}
