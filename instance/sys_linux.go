package instance

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/placement"
)

// nap sleeps in the kernel. It ends some 0.1 ms late (BenchmarkConnect, two busy cores).
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil) // shorter after a signal, which does no harm
}

// tryConnect says whether somebody listens at addr. Plain system calls: a net.Dialer takes as long on loopback but makes 24
// allocations where this makes one (BenchmarkConnect), and many instances are watched closely while they start.
func tryConnect(_ context.Context, addr *net.TCPAddr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(connectTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		return err
	}
	return unix.Connect(fd, &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())})
}

// reserve takes a port for this agent among all agents of this machine: it binds an abstract socket of that name, which the kernel
// gives back when the process ends, however that happens. An error means that another has it.
func reserve(port int) (io.Closer, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "@thaw-instance-port-" + strconv.Itoa(port)}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return descriptor(fd), nil
}

type descriptor int

func (d descriptor) Close() error { return unix.Close(int(d)) }

// accepting returns how many connections wait in the accept queue of a listening socket. For such a socket the kernel tells that
// in the field that otherwise counts segments without acknowledgement (tcp_get_info in net/ipv4/tcp.c).
func accepting(listener *os.File) int {
	rc, err := listener.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	_ = rc.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
			n = int(info.Unacked)
		}
	})
	return n
}

// machineMemory returns what memory the machine has, and what of it programs could still get; 0 = not known.
func machineMemory() (total, available int64) {
	b, _ := os.ReadFile("/proc/meminfo")
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, _ := strconv.ParseInt(string(f[1]), 10, 64)
		switch string(f[0]) {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			available = kib << 10
		}
	}
	return total, available
}

// machineResources is what this machine has for instances, as far as it is known. Memory is what our own control group may use, where that
// is less.
func machineResources() placement.Resources {
	var r placement.Resources
	r.Memory, _ = machineMemory()
	if limit, err := memlimit.FromCgroup(); err == nil && limit < uint64(r.Memory) {
		r.Memory = int64(limit)
	}
	b, _ := os.ReadFile("/proc/sys/kernel/pid_max")
	r.Pids, _ = strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	var files unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil && files.Cur < 1<<40 {
		r.Descriptors = int64(files.Cur)
	}
	return r
}

// memoryPressure is the share of the last ten seconds in which some program waited for memory, in percent; 0 where that is not known.
func memoryPressure() float64 {
	b, _ := os.ReadFile("/proc/pressure/memory")
	_, rest, ok := bytes.Cut(b, []byte("some avg10="))
	if !ok {
		return 0
	}
	v, _ := strconv.ParseFloat(string(bytes.Fields(rest)[0]), 64)
	return v
}
