//go:build amd64 || arm64

package sandbox

import (
	"fmt"
	"slices"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// denied are the system calls that get EPERM. Most would fail for want of a capability as well; the filter keeps code of the kernel
// from being reached that only administrators need, and that exploits like to begin in. Everything else that the filter's library
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
	conditional := []string{"socket", "clone"}
	var allow, deny []string
	for name := range info.SyscallNames {
		switch {
		case slices.Contains(denied, name):
			deny = append(deny, name)
		case name != "clone3" && !slices.Contains(conditional, name):
			allow = append(allow, name)
		}
	}
	slices.SortFunc(allow, func(a, b string) int { return info.SyscallNames[a] - info.SyscallNames[b] }) // the busiest have low numbers
	slices.Sort(deny)
	policy := seccomp.Policy{
		DefaultAction: seccomp.ActionKillProcess, // replaced below
		Syscalls: []seccomp.SyscallGroup{
			{Names: allow, Action: seccomp.ActionAllow},
			{Names: deny, Action: seccomp.ActionErrno},
			// Conditions last: after one of them the library's program compares what follows with the argument, not with the
			// number of the call. 38 and 40 are no numbers of clone.
			{Action: seccomp.ActionAllow, NamesWithCondtions: []seccomp.NameWithConditions{
				{Name: "socket", Conditions: seccomp.ArgumentConditions{ // not of a network namespace, so they would lead outside
					{Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_VSOCK},
					{Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_ALG},
				}},
				{Name: "clone", Conditions: seccomp.ArgumentConditions{
					{Argument: 0, Operation: seccomp.BitsNotSet, Value: newNamespaces},
				}},
			}},
		},
	}
	program, err := policy.Assemble()
	if err != nil {
		return nil, fmt.Errorf("seccomp: %w", err)
	}
	for i, in := range program { // the library knows no errno but EPERM
		if in == (bpf.RetConstant{Val: uint32(seccomp.ActionKillProcess)}) {
			program[i] = bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)}
		}
	}
	f := &filter{}
	if f.code, err = bpf.Assemble(program); err != nil {
		return nil, fmt.Errorf("seccomp: %w", err)
	}
	// bpf.RawInstruction has the kernel's layout of struct sock_filter.
	f.prog = unix.SockFprog{Len: uint16(len(f.code)), Filter: (*unix.SockFilter)(unsafe.Pointer(unsafe.SliceData(f.code)))}
	return f, nil
}
