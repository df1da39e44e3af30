//go:build amd64 || arm64

package sandbox

import (
	"fmt"
	"maps"
	"slices"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// denied are the system calls that get EPERM. Most would fail for want of a capability as well; the filter keeps code of the kernel
// from being reached that only administrators need, and that exploits like to begin in. Everything else that the table of calls
// knows is allowed; what it does not know (a newer kernel's calls, other ABIs) gets ENOSYS, so that programs fall back to what they
// did before.
var denied = []string{
	// the kernel itself
	"init_module", "finit_module", "delete_module", "create_module", "query_module", "get_kernel_syms", "kexec_load",
	"kexec_file_load", "reboot", "bpf", "perf_event_open", "syslog", "lookup_dcookie", "uselib", "nfsservctl", "_sysctl", "sysfs",
	"ustat", "vm86", "vm86old", "modify_ldt", "acct", "swapon", "swapoff", "quotactl", "quotactl_fd", "iopl", "ioperm",
	// mounts and namespaces
	"mount", "umount", "umount2", "pivot_root", "chroot", "setns", "unshare", "fsopen", "fsconfig", "fsmount", "fspick", "move_mount",
	"open_tree", "open_tree_attr", "mount_setattr", "statmount", "listmount", "name_to_handle_at", "open_by_handle_at",
	// other processes and their memory
	"ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd", "move_pages", "migrate_pages",
	"mbind", "set_mempolicy", "set_mempolicy_home_node", "get_mempolicy", "userfaultfd",
	// keys, clocks, and what has been an exploit's way in more often than a function's need
	"add_key", "request_key", "keyctl", "settimeofday", "stime", "clock_settime", "clock_settime64", "clock_adjtime", "clock_adjtime64", "adjtimex",
	"io_uring_setup", "io_uring_enter", "io_uring_register", "fanotify_init", "fanotify_mark", "vhangup",
	"lsm_get_self_attr", "lsm_set_self_attr", "lsm_list_modules", "personality",
}

// newNamespaces are the flags of clone that make namespaces. clone3 hides its flags from filters: it gets ENOSYS, which makes C
// libraries use clone.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// filter is a seccomp program in the kernel's form.
type filter struct {
	prog unix.SockFprog
	code []bpf.RawInstruction
}

func newFilter() (*filter, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, fmt.Errorf("seccomp: %w", err)
	}
	f := &filter{}
	if f.code, err = bpf.Assemble(program(uint32(info.ID), info.SyscallNumbers)); err != nil {
		return nil, fmt.Errorf("seccomp: %w", err)
	}
	// bpf.RawInstruction has the kernel's layout of struct sock_filter.
	f.prog = unix.SockFprog{Len: uint16(len(f.code)), Filter: (*unix.SockFilter)(unsafe.Pointer(unsafe.SliceData(f.code)))}
	return f, nil
}

// verdict is what a system call gets.
type verdict int

const (
	missing verdict = iota // ENOSYS
	refused                // EPERM
	allowed
	asSocket // as its first argument is
	asClone  // as its flags are
)

func verdictOn(name string) verdict {
	switch {
	case name == "" || name == "clone3":
		return missing
	case slices.Contains(denied, name):
		return refused
	case name == "socket":
		return asSocket
	case name == "clone":
		return asClone
	default:
		return allowed
	}
}

// stretch is a run of numbers, from first up to the next stretch, that get the same.
type stretch struct {
	first uint32
	verdict
}

// program looks a call's number up by halving. The kernel translates the program for each process that takes it on, and tries it with every
// number there is: one comparison after the other, as filters usually are, took half of all the time from clone to exec.
func program(audit uint32, names map[int]string) []bpf.Instruction {
	stretches := []stretch{{}}
	for nr := range slices.Max(slices.Collect(maps.Keys(names))) + 2 { // what follows the last is missing; so are the numbers of x32
		if v := verdictOn(names[nr]); v != stretches[len(stretches)-1].verdict {
			stretches = append(stretches, stretch{uint32(nr), v})
		}
	}
	return append([]bpf.Instruction{
		bpf.LoadAbsolute{Off: offArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: audit, SkipTrue: 1},
		returns(missing),
		bpf.LoadAbsolute{Off: offNr, Size: 4},
	}, search(stretches)...)
}

// Offsets in struct seccomp_data, of a machine whose low bytes come first.
const (
	offNr   = 0
	offArch = 4
	offArg  = 16 // the lower half of the first argument, all that the kernel looks at of a protocol family
)

func search(s []stretch) []bpf.Instruction {
	if len(s) == 1 {
		return s[0].answer()
	}
	half := len(s) / 2
	below, above := search(s[:half]), search(s[half:])
	jump := bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: s[half].first, SkipTrue: uint8(len(below))}
	return slices.Concat([]bpf.Instruction{jump}, below, above)
}

func returns(v verdict) bpf.Instruction {
	switch v {
	case allowed:
		return bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	case refused:
		return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)}
	default:
		return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)}
	}
}

func (v verdict) answer() []bpf.Instruction {
	switch v {
	case asSocket: // these are not of a network namespace, so they would lead outside
		return []bpf.Instruction{
			bpf.LoadAbsolute{Off: offArg, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_VSOCK, SkipTrue: 2},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_ALG, SkipTrue: 1},
			returns(allowed), returns(missing),
		}
	case asClone:
		return []bpf.Instruction{
			bpf.LoadAbsolute{Off: offArg, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: newNamespaces, SkipTrue: 1},
			returns(allowed), returns(missing),
		}
	default:
		return []bpf.Instruction{returns(v)}
	}
}
