package isolation

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attempt is something that a function must not be able to do. It returns what it got hold of, "" if nothing. Run as root without a
// sandbox each of them succeeds, which is the test's negative control.
type attempt struct {
	name string
	try  func() string
	any  bool // some kernels refuse it to root as well: no control
}

// attempts are carried out inside; what they need of the outside is in the environment.
var attempts = []attempt{
	{"sees other processes", func() string {
		entries, _ := os.ReadDir("/proc")
		for _, e := range entries {
			pid, err := strconv.Atoi(e.Name())
			if err == nil && pid != os.Getpid() {
				return "process " + e.Name()
			}
		}
		return ""
	}, false},
	{"signals a process of the machine", func() string {
		pid, _ := strconv.Atoi(os.Getenv("OUTSIDE_PID"))
		return did(syscall.Kill(pid, 0))
	}, false},
	{"reads a file of the machine", func() string { return opened(os.Getenv("OUTSIDE_FILE")) }, false},
	{"reads /etc/shadow", func() string { return opened("/etc/shadow") }, false},
	{"reads root's home", func() string { return opened("/root/.") + listed("/root") }, false},
	{"leaves through another's root", func() string {
		return opened("/proc/1/root/"+os.Getenv("OUTSIDE_FILE")) + opened("/proc/"+os.Getenv("OUTSIDE_PID")+"/root/"+os.Getenv("OUTSIDE_FILE"))
	}, false},
	{"leaves through a parent of its root", func() string {
		return opened(strings.Repeat("../", 40) + strings.TrimPrefix(os.Getenv("OUTSIDE_FILE"), "/"))
	}, false},
	{"writes to its code", func() string {
		f, err := os.OpenFile(os.Getenv("CODE")+"/written", os.O_CREATE|os.O_WRONLY, 0o644)
		if err == nil {
			f.Close()
			os.Remove(f.Name())
		}
		return did(err)
	}, false},
	{"writes to the system", func() string {
		f, err := os.CreateTemp("/usr", "thaw-isolation")
		if err == nil {
			f.Close()
			os.Remove(f.Name())
		}
		return did(err)
	}, false},
	{"has a /tmp in common with the machine", func() string {
		f := filepath.Join("/tmp", os.Getenv("MARK"))
		_, err := os.Stat(f)
		return did(err)
	}, false},
	{"connects to a service of the machine", func() string {
		c, err := net.DialTimeout("tcp", os.Getenv("OUTSIDE_ADDR"), time.Second)
		if err == nil {
			c.Close()
		}
		return did(err)
	}, false},
	{"connects to an abstract socket of the machine", func() string {
		c, err := net.Dial("unix", os.Getenv("OUTSIDE_UNIX"))
		if err == nil {
			c.Close()
		}
		return did(err)
	}, false},
	{"has another interface than lo", func() string {
		ifs, _ := net.Interfaces()
		for _, i := range ifs {
			if i.Name != "lo" {
				return i.Name
			}
		}
		return ""
	}, false},
	{"opens a raw socket", func() string { return socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP) }, false},
	{"opens a socket to the crypto interface", func() string { return socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0) }, false},
	{"mounts", func() string {
		err := unix.Mount("tmpfs", "/tmp", "tmpfs", 0, "")
		if err == nil {
			unix.Unmount("/tmp", unix.MNT_DETACH)
		}
		return did(err)
	}, false},
	{"makes a user namespace", func() string { return child(unix.CLONE_NEWUSER) }, false},
	{"makes a network namespace", func() string { return child(unix.CLONE_NEWNET) }, false},
	{"unshares", func() string { return did(unix.Unshare(unix.CLONE_NEWUTS)) }, false},
	{"changes its root", func() string { return did(unix.Chroot("/")) }, false},
	{"makes a device", func() string {
		f := os.TempDir() + "/device" + strconv.Itoa(os.Getpid())
		err := unix.Mknod(f, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 1)))
		os.Remove(f)
		return did(err)
	}, false},
	{"has devices", func() string {
		entries, _ := os.ReadDir("/dev")
		for _, e := range entries {
			switch e.Name() {
			case "null", "zero", "full", "random", "urandom", "fd", "stdin", "stdout", "stderr", "shm", "tty", "ptmx", "pts":
			default:
				return e.Name()
			}
		}
		return ""
	}, false},
	{"traces", func() string {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"THAW_ATTEMPT=nothing"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
		err := cmd.Start()
		if err == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		return did(err)
	}, false},
	// Of these, which are not meant to succeed here, the errno tells whether the kernel looked at them at all.
	{"loads a module", func() string { return refused(unix.SYS_INIT_MODULE, 0, 0, 0) }, true},
	{"loads a kernel", func() string { return refused(unix.SYS_KEXEC_LOAD, 0, 99, 0) }, true},
	{"loads a bpf program", func() string { return refused(unix.SYS_BPF, 9999, 0, 0) }, false},
	{"watches the kernel", func() string { return refused(unix.SYS_PERF_EVENT_OPEN, 0, 0, 0) }, false},
	{"sets up an io_uring", func() string { return refused(unix.SYS_IO_URING_SETUP, 0, 0, 0) }, false},
	{"uses the kernel's keys", func() string { return refused(unix.SYS_KEYCTL, 9999, 0, 0) }, false},
	{"reboots", func() string { return refused(unix.SYS_REBOOT, 0, 0, 0) }, false},
	{"opens files by handle", func() string { return refused(unix.SYS_OPEN_BY_HANDLE_AT, 0, 0, 0) }, false},
	{"reads another's memory", func() string { return refused(unix.SYS_PROCESS_VM_READV, 1<<22-1, 0, 0) }, false},
	{"gains rights by a set-uid program", func() string {
		cmd := exec.Command(os.Getenv("SETUID"))
		cmd.Env = []string{"PATH=/"} // not nil, which would be ours: an attempt that makes attempts
		out, err := cmd.Output()
		if err != nil {
			return ""
		}
		if string(out) == "effective user 0\n" {
			return string(out)
		}
		return ""
	}, false},
	{"has capabilities", func() string {
		for _, name := range []string{"CapEff", "CapPrm", "CapBnd", "CapAmb"} {
			if v := status(name); strings.Trim(v, "0") != "" {
				return name + " " + v
			}
		}
		return ""
	}, false},
	{"may gain privileges", func() string {
		if status("NoNewPrivs") != "1" || status("Seccomp") != "2" {
			return "no_new_privs " + status("NoNewPrivs") + ", seccomp " + status("Seccomp")
		}
		return ""
	}, false},
	{"is a user of the machine", func() string {
		b, _ := os.ReadFile("/proc/self/uid_map")
		if f := strings.Fields(string(b)); len(f) == 3 && f[0] == "0" && f[1] == "0" {
			return string(b)
		}
		return ""
	}, false},
	{"leaves its cgroup", func() string {
		for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu"} {
			if f, err := os.OpenFile(dir+"/cgroup.procs", os.O_WRONLY, 0); err == nil {
				f.Close()
				return dir
			}
		}
		return ""
	}, false},
	{"changes settings of the kernel", func() string {
		f, err := os.OpenFile("/proc/sys/kernel/core_pattern", os.O_WRONLY, 0)
		if err == nil {
			f.Close()
		}
		return did(err)
	}, false},
	{"reads the kernel's symbols", func() string {
		b, _ := os.ReadFile("/proc/kallsyms")
		return string(b[:min(len(b), 40)])
	}, false},
	{"names the machine", func() string {
		name, _ := os.Hostname()
		if name == os.Getenv("OUTSIDE_HOST") {
			return name
		}
		return ""
	}, false},
	{"renames its machine", func() string {
		name, _ := os.Hostname()
		return did(unix.Sethostname([]byte(name)))
	}, false},
	{"reaches shared memory of the machine", func() string {
		key, _ := strconv.Atoi(os.Getenv("OUTSIDE_SHM"))
		_, err := unix.SysvShmGet(key, 0, 0)
		return did(err)
	}, false},
}

func did(err error) string {
	if err == nil {
		return "done"
	}
	return ""
}

func opened(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.IsDir() {
		return ""
	}
	return file
}

func listed(dir string) string {
	entries, _ := os.ReadDir(dir)
	if len(entries) > 0 {
		return dir + "/" + entries[0].Name()
	}
	return ""
}

func socket(family, kind, proto int) string {
	fd, err := unix.Socket(family, kind, proto)
	if err == nil {
		unix.Close(fd)
	}
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT) {
		return "asked" // this kernel has none, but it was asked
	}
	return did(err)
}

// child makes one with new namespaces.
func child(flags uintptr) string {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"THAW_ATTEMPT=nothing"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	return did(cmd.Run())
}

func refused(nr, a, b, c uintptr) string {
	_, _, errno := unix.Syscall6(nr, a, b, c, 0, 0, 0)
	if errno == unix.EPERM || errno == unix.ENOSYS {
		return ""
	}
	return fmt.Sprintf("the kernel's answer: %v", errno)
}

func status(name string) string {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if k, v, _ := strings.Cut(line, ":"); k == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// bombs are what a function does to hurt its neighbours.
var bombs = map[string]func(){
	"memory": func() {
		var keep [][]byte
		for {
			b := make([]byte, 8<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			keep = append(keep, b)
			_ = keep
		}
	},
	"processes": func() {
		for n := 0; ; n++ {
			pid, _, errno := unix.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0)
			if errno != 0 {
				fmt.Println("forks", n, errno)
				select {}
			}
			if pid == 0 {
				for {
					ts := unix.Timespec{Sec: 100}
					unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
				}
			}
		}
	},
	"cpu": func() {
		for range 4 {
			go func() {
				for n := new(atomic.Int64); ; {
					n.Add(1)
				}
			}()
		}
		fmt.Println("burning")
		select {}
	},
	"disk": func() {
		f, err := os.Create("/tmp/full")
		b := make([]byte, 1<<20)
		n := 0
		for ; err == nil; n++ {
			_, err = f.Write(b)
		}
		fmt.Println("wrote", n, err)
		select {}
	},
}

// spy looks for a process that joins the sandbox, and tries to open its memory before its exec: until then it is the agent's.
func spy() {
	fmt.Println("looking")
	at, _ := strconv.ParseInt(os.Getenv("SECRET_AT"), 10, 64)
	secret := strings.Repeat("7", 8)
	own := strconv.Itoa(os.Getpid())
	seen := 0
	for {
		entries, _ := os.ReadDir("/proc")
		for _, e := range entries {
			if name := e.Name(); name != own && name[0] >= '0' && name[0] <= '9' {
				if seen++; seen == 1 {
					fmt.Println("saw one")
				}
				f, err := os.OpenFile("/proc/"+name+"/mem", os.O_RDWR, 0)
				if err != nil {
					continue
				}
				var b [8]byte
				if _, err := f.ReadAt(b[:], at); err == nil && string(b[:]) == secret {
					fmt.Println("read the agent's memory")
					return
				}
				f.Close()
			}
		}
	}
}

// neighbour does 2 ms of work every 10 ms for three seconds, and prints how long that took at the 95th percentile, and how much
// processor time it has had, in nanoseconds.
func neighbour() {
	runtime.LockOSThread()
	used := func() time.Duration {
		var ts unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
		return time.Duration(ts.Nano())
	}
	var took []time.Duration
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(8 * time.Millisecond) {
		began := time.Now()
		for until := used() + 2*time.Millisecond; used() < until; {
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	fmt.Println(int64(took[len(took)*95/100]), int64(used()))
}
