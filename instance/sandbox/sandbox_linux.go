//go:build amd64 || arm64

// Package sandbox runs instances in sandboxes of this machine's kernel: namespaces of their own (process ids, mounts, network, IPC,
// host name, users), a file system made of read-only system folders, the code, and a private /tmp, no capabilities, a system
// call filter, and control groups. Nothing but the kernel is needed: no container engine, no second program.
//
// A sandbox is made in two steps. Place makes all that does not depend on the program, ahead of time: namespaces without a process
// in them, held by descriptors. Start then needs one clone and one exec. Who uses it is instance/local.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/instance/cgroup"
	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/instance/provider"
)

// Config is what sandboxes need to know.
type Config struct {
	Node  string   // name of the data folder in the kernel's trees
	Dir   string   // has the instances' folders
	Path  string   // PATH of the agent; what of it is visible inside is PATH of the programs
	Share []string // further folders of the machine that every function may read
	Log   *slog.Logger

	// MaxPIDs bounds processes and threads of an instance that sets no limit of its own. 0 = 1,024.
	MaxPIDs int64
}

// Runtime makes sandboxes. It is a local.Backend.
type Runtime struct {
	*process.Runtime
	cfg    Config
	base   *base
	filter *filter
	host   *os.File // the agent's own network namespace

	unlimited map[string]string // folders of control groups without limits, to be read by instances without; nil = none

	mu    sync.Mutex
	slots map[uint32]bool // ranges of user ids in use
	next  uint32
}

// New makes the provider of sandboxes, or says what this machine lacks for it.
func New(cfg Config) (*local.Provider, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("sandboxes need root: %w", provider.ErrUnsupported)
	}
	if cfg.MaxPIDs == 0 {
		cfg.MaxPIDs = 1024
	}
	rt := &Runtime{cfg: cfg, slots: map[uint32]bool{}}
	err := keepMemoryClosed()
	if err != nil {
		return nil, fmt.Errorf("sandbox: %w: %w", err, provider.ErrUnsupported)
	}
	if rt.filter, err = newFilter(); err != nil {
		return nil, err
	}
	if rt.host, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	if rt.Runtime, err = process.New(cfg.Node, cfg.Log); err != nil {
		return nil, err
	}
	rt.unlimited = rt.Groups().Unlimited()
	if rt.base, err = newBase(cfg, rt.unlimited); err != nil {
		rt.Runtime.Close()
		return nil, fmt.Errorf("sandbox: %w: %w", err, provider.ErrUnsupported)
	}
	// What cannot be made here shall be known now, not at the first request.
	place, err := rt.Place("probe")
	if err != nil {
		rt.Close()
		return nil, fmt.Errorf("sandbox: %w: %w", err, provider.ErrUnsupported)
	}
	place.Close()
	return local.New(rt, cfg.Dir, cfg.Log), nil
}

// Close gives up what New took. Sandboxes go on.
func (rt *Runtime) Close() {
	rt.base.close()
	rt.host.Close()
	rt.Runtime.Close()
}

// Capabilities is local.Backend's.
func (rt *Runtime) Capabilities() provider.Capabilities {
	return provider.Capabilities{
		Name: "sandbox",
		Isolation: "sandbox: own process ids, mounts, network (loopback only), IPC, host name and users; no capabilities; system call filter; " +
			"limit on processes; " + rt.Groups().String(),
		OwnNetwork: true, OwnFiles: true, Freezes: rt.Groups().Freezes(), LateLimits: rt.Groups().Late(), Path: rt.base.path(rt.cfg.Path),
	}
}

// Strays is local.Backend's: nothing outlives the first process of a process id namespace.
func (rt *Runtime) Strays() bool { return false }

// Prepare is local.Backend's. It looks at the program as it will be seen from inside.
func (rt *Runtime) Prepare(_ context.Context, s *provider.Spec) error {
	open := func(file string) (*os.File, error) {
		if !rt.base.has(file) && !slices.ContainsFunc(s.Code, func(c string) bool { return below(file, c) }) {
			return nil, fmt.Errorf("%s: a sandbox sees of this machine only the code (%s) and %s: %w",
				file, strings.Join(s.Code, ", "), strings.Join(rt.base.folders, ", "), os.ErrNotExist)
		}
		return os.Open(file)
	}
	for _, c := range withoutOwn(s.Code, s.Dir) {
		if err := rt.base.mayShow(c); err != nil {
			return err
		}
	}
	return local.CheckProgram(s.Path, rt.base.path(rt.cfg.Path), open)
}

func below(file, dir string) bool {
	return dir != "" && (file == dir || strings.HasPrefix(file, strings.TrimSuffix(dir, "/")+"/"))
}

// MaxSandboxes is how many there can be at once: there are so many ranges of user ids.
const MaxSandboxes = maxSlots

// Users inside are numbers of the machine that nobody else has: 65,536 of them for each sandbox, from firstUser.
const (
	firstUser = 1 << 30
	usersEach = 1 << 16
	maxSlots  = 8192
)

func (rt *Runtime) takeSlot() (uint32, error) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	for range maxSlots {
		slot := rt.next
		rt.next = (rt.next + 1) % maxSlots
		if !rt.slots[slot] {
			rt.slots[slot] = true
			return slot, nil
		}
	}
	return 0, fmt.Errorf("all %d ranges of user ids are in use", maxSlots)
}

func (rt *Runtime) putSlot(slot uint32) {
	rt.mu.Lock()
	delete(rt.slots, slot)
	rt.mu.Unlock()
}

// place is one sandbox.
type place struct {
	rt    *Runtime
	id    string
	slot  uint32
	group *cgroup.Group
	used  bool // the group belongs to a process

	net                  *os.File // kept for Dial
	mnt, ipc, uts, users *os.File // until Start

	proc atomic.Pointer[process.Process] // nil = runs no program yet
}

func (pl *place) user() int { return firstUser + int(pl.slot)*usersEach }

// Place is local.Backend's: a sandbox without a program.
func (rt *Runtime) Place(id string) (local.Place, error) {
	slot, err := rt.takeSlot()
	if err != nil {
		return nil, err
	}
	pl := &place{rt: rt, id: id, slot: slot}
	if err := pl.make(); err != nil {
		pl.Close()
		return nil, err
	}
	pl.group = rt.Groups().Create(id)
	return pl, nil
}

// make has a child make the namespaces, takes hold of them, and ends the child. The namespaces belong to the machine's own users, so
// that nobody inside has power over them; the user namespace, made last, belongs to whoever will run in it.
func (pl *place) make() error {
	s := &script{}
	// The lowest descriptor is free after this, so a new one is known to be 0.
	s.try("close", unix.SYS_CLOSE, 0)
	s.do("socket", unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	up := &ifreqFlags{name: [unix.IFNAMSIZ]byte{'l', 'o'}, flags: unix.IFF_UP | unix.IFF_RUNNING}
	s.do("bring lo up", unix.SYS_IOCTL, 0, unix.SIOCSIFFLAGS, unsafe.Pointer(up))
	// Low ports mean nothing in a network of its own. The file is that of the network namespace that the opener is in.
	s.try("close", unix.SYS_CLOSE, 0)
	s.try("open sysctl", unix.SYS_OPENAT, atFDCWD, "/proc/sys/net/ipv4/ip_unprivileged_port_start", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	s.try("write sysctl", unix.SYS_WRITE, 0, []byte("0"), 1)
	s.enter(pl.rt.base.mnt, unix.CLONE_NEWNS)
	s.do("unshare mounts", unix.SYS_UNSHARE, unix.CLONE_NEWNS)
	s.mount("tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=1777,size=%d,nr_inodes=65536", tmpBytes))
	s.mount("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,max=64")
	s.mount("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size=67108864,nr_inodes=4096")
	s.do("unshare users", unix.SYS_UNSHARE, unix.CLONE_NEWUSER)
	h, err := s.hold(unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS)
	if err != nil {
		return err
	}
	defer h.release()
	mapping := fmt.Sprintf("0 %d %d\n", pl.user(), usersEach)
	for _, file := range []string{"uid_map", "gid_map"} {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", h.pid, file), []byte(mapping), 0); err != nil {
			return err
		}
	}
	for kind, f := range map[string]**os.File{"net": &pl.net, "mnt": &pl.mnt, "ipc": &pl.ipc, "uts": &pl.uts, "user": &pl.users} {
		if *f, err = h.namespace(kind); err != nil {
			return err
		}
	}
	return nil
}

// tmpBytes bounds /tmp. What is in it counts as memory of the instance.
const tmpBytes = 512 << 20

// ifreqFlags is struct ifreq with its flags.
type ifreqFlags struct {
	name  [unix.IFNAMSIZ]byte
	flags uint16
	_     [22]byte
}

// closeMade closes what only Start needs.
func (pl *place) closeMade() {
	for _, f := range []**os.File{&pl.mnt, &pl.ipc, &pl.uts, &pl.users} {
		if *f != nil {
			(*f).Close()
			*f = nil
		}
	}
}

// Close is local.Place's. The kernel takes apart what nobody holds any more.
func (pl *place) Close() {
	pl.closeMade()
	if pl.net != nil {
		pl.net.Close()
	}
	if !pl.used {
		pl.group.Remove()
	}
	pl.rt.putSlot(pl.slot)
}

// Adopt is local.Backend's.
func (rt *Runtime) Adopt(id string, i process.Identity) (*process.Process, local.Place, error) {
	proc, err := rt.Runtime.Adopt(id, i)
	if err != nil {
		return nil, nil, err
	}
	pl := &place{rt: rt, id: id, used: true, group: proc.Group()}
	pl.proc.Store(proc)
	if err := pl.reopen(i.PID); err != nil {
		if pl.net != nil {
			pl.net.Close()
		}
		proc.Kill()
		<-proc.Done()
		return nil, nil, fmt.Errorf("adopt sandbox %s: %w", id, err)
	}
	return proc, pl, nil
}

// reopen finds out what Place knew.
func (pl *place) reopen(pid int) (err error) {
	if pl.net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil {
		return err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", pid))
	if err != nil {
		return err
	}
	var inside, outside, n int
	if _, err := fmt.Sscan(string(b), &inside, &outside, &n); err != nil || inside != 0 || n != usersEach || outside < firstUser {
		return fmt.Errorf("its users are not a sandbox's: %q", b)
	}
	pl.slot = uint32((outside - firstUser) / usersEach)
	pl.rt.mu.Lock()
	defer pl.rt.mu.Unlock()
	if pl.rt.slots[pl.slot] {
		return fmt.Errorf("its users, from %d, are another's", outside)
	}
	pl.rt.slots[pl.slot] = true
	return nil
}

// Dial is local.Place's.
func (pl *place) Dial(ctx context.Context, port int) (net.Conn, error) {
	return dialIn(ctx, pl.net, pl.rt.host, port) // after Close it finds the file closed
}

// Start is local.Place's.
func (pl *place) Start(s *provider.Spec) (*process.Process, error) {
	// The user inside is nobody else's, so a limit on the user's processes is one on the sandbox's, and costs nothing.
	limits := s.Limits
	pids := limits.PIDs
	if limits.PIDs = 0; pids <= 0 {
		pids = pl.rt.cfg.MaxPIDs
	}
	pl.group.Limit(limits)
	if s.Network != nil {
		if err := pl.move(s.Network); err != nil {
			return nil, err
		}
	}
	script, closeAfter, err := pl.program(s, pids)
	defer closeAfter()
	if err != nil {
		return nil, err
	}
	pid, pidfd, err := script.run(unix.CLONE_NEWPID, pl.group.CloneFD())
	pl.group.CloseFD()
	if err != nil {
		return nil, startError(s, err)
	}
	pl.closeMade()
	pl.used = true
	proc := pl.rt.Track(pid, pidfd, pl.group, limits.LateMemory(), func() {
		if err := pl.group.Attach(pid); err != nil {
			pl.rt.cfg.Log.Warn("instance runs without its limits", "instance", s.Name, "err", err)
		}
	})
	pl.proc.Store(proc)
	return proc, nil
}

// move gives the sandbox another network.
func (pl *place) move(ns *os.File) error {
	fd, err := unix.FcntlInt(ns.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fmt.Errorf("network of a sandbox: %w", err)
	}
	pl.net.Close()
	pl.net = os.NewFile(uintptr(fd), ns.Name())
	return nil
}

// Grant is local.Place's: a child enters the sandbox's mounts and shows the code there.
func (pl *place) Grant(s *provider.Spec) error {
	proc := pl.proc.Load()
	limits := s.Limits
	pids := limits.PIDs
	limits.PIDs = 0
	pl.group.Limit(limits)
	there, err := proc.Open()
	if err != nil {
		return fmt.Errorf("grant: %w", err)
	}
	defer there.Close()
	users, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", proc.PID()))
	if err != nil {
		return fmt.Errorf("grant: %w", err)
	}
	defer users.Close()
	sc := &script{}
	sc.enter(there, unix.CLONE_NEWNS|unix.CLONE_NEWUTS)
	sc.writable("/")
	trees, err := pl.rt.base.show(sc, s.Code, s.Dir, users)
	defer func() {
		for _, f := range trees {
			f.Close()
		}
	}()
	if err != nil {
		return err
	}
	sc.readOnly("/")
	sc.do("sethostname", unix.SYS_SETHOSTNAME, []byte(hostName(s.Name)), len(hostName(s.Name)))
	sc.do("end", unix.SYS_EXIT_GROUP, 0)
	pid, pidfd, err := sc.run(0, -1)
	if err != nil {
		return fmt.Errorf("grant: %w", err)
	}
	unix.Close(pidfd)
	reap(pid)
	if pids > 0 {
		if err := unix.Prlimit(proc.PID(), unix.RLIMIT_NPROC, &unix.Rlimit{Cur: uint64(pids), Max: uint64(pids)}, nil); err != nil {
			return fmt.Errorf("grant: %w", err)
		}
	}
	return nil
}

// startError tells the program's own faults from ours.
func startError(s *provider.Spec, err error) error {
	var c *errCall
	if errors.As(err, &c) {
		switch c.nr {
		case unix.SYS_EXECVE:
			return &provider.StartError{Path: s.Path, Err: c.err}
		case unix.SYS_CHDIR:
			return &provider.StartError{Path: s.Path, Err: fmt.Errorf("its working directory %s inside the sandbox: %w", s.Dir, c.err)}
		}
	}
	return fmt.Errorf("make a sandbox: %w", err)
}

// program makes the script that turns a clone into the running program.
func (pl *place) program(s *provider.Spec, pids int64) (sc *script, closeAfter func(), err error) {
	sc = &script{}
	var files []*os.File
	closeAfter = func() {
		for _, f := range files {
			f.Close()
		}
	}
	sc.expendable()
	sc.enter(pl.mnt, unix.CLONE_NEWNS)
	sc.proc()
	trees, err := pl.rt.base.show(sc, s.Code, s.Dir, pl.users)
	files = append(files, trees...)
	if err != nil {
		return sc, closeAfter, err
	}
	groups, err := pl.showGroups(sc)
	files = append(files, groups...)
	if err != nil {
		return sc, closeAfter, err
	}
	sc.readOnly("/")
	if !s.HostNetwork {
		sc.enter(pl.net, unix.CLONE_NEWNET)
	}
	sc.limit(unix.RLIMIT_NPROC, uint64(pids))
	sc.enter(pl.ipc, unix.CLONE_NEWIPC)
	sc.enter(pl.uts, unix.CLONE_NEWUTS)
	sc.do("sethostname", unix.SYS_SETHOSTNAME, []byte(hostName(s.Name)), len(hostName(s.Name)))
	sc.do("setsid", unix.SYS_SETSID)
	sc.descriptors(pl.rt.Null(), pl.users, s)
	sc.drop(s.UID)
	sc.do("working directory", unix.SYS_CHDIR, s.Dir)
	pl.chown(s)
	return sc, closeAfter, sc.exec(s, pl.rt.filter)
}

// hostName is what of an instance's name fits.
func hostName(name string) string { return name[max(0, len(name)-63):] }

// chown lets the program open its own output again by way of /dev/stdout.
func (pl *place) chown(s *provider.Spec) {
	for _, f := range []*os.File{s.Stdout, s.Stderr} {
		if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() {
			_ = f.Chown(pl.user()+s.UID, pl.user()+s.UID)
		}
	}
}

// descriptors puts the program's files where it expects them, and then enters the user namespace users (or that of the process that
// users is a descriptor of). They go above all of ours first, so that none is overwritten before it was copied. The rest closes
// with exec, whatever it is: the child has copies of all descriptors that any part of this process had open.
func (s *script) descriptors(null, users *os.File, spec *provider.Spec) {
	files := []*os.File{null, spec.Stdout, spec.Stderr, spec.Listener, spec.Ready, spec.Order}
	high := 8
	for _, f := range append(files, users) {
		if f != nil {
			high = max(high, int(f.Fd())+1)
		}
	}
	for i, f := range files {
		if f != nil {
			s.do("dup", unix.SYS_DUP3, f, high+i, unix.O_CLOEXEC)
		}
	}
	// users is still needed and may be one of the low ones.
	s.do("dup", unix.SYS_DUP3, users, high+len(files), unix.O_CLOEXEC)
	s.do("close the others with exec", unix.SYS_CLOSE_RANGE, 3, uintptr(math.MaxInt32), unix.CLOSE_RANGE_CLOEXEC)
	for i, f := range files {
		if f != nil {
			s.do("dup", unix.SYS_DUP3, high+i, i, 0)
		}
	}
	s.do("enter users", unix.SYS_SETNS, high+len(files), unix.CLONE_NEWUSER)
}
