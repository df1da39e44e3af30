//go:build amd64 || arm64

package sandbox

import (
	"encoding/binary"
	"math"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestFilter asks the program about every number, one after the other, and about arguments and ABIs.
func TestFilter(t *testing.T) {
	for _, info := range []*arch.Info{arch.X86_64, arch.AARCH64} {
		p := program(uint32(info.ID), info.SyscallNumbers)
		vm, err := bpf.NewVM(p)
		if err != nil {
			t.Fatalf("%s: %v", info.Name, err)
		}
		t.Logf("%s: %d instructions", info.Name, len(p))
		ask := func(id arch.AuditArch, nr uint32, arg uint64) uint32 {
			data := make([]byte, 64) // the virtual machine reads as a network would, the kernel as the machine does
			binary.BigEndian.PutUint32(data[offNr:], nr)
			binary.BigEndian.PutUint32(data[offArch:], uint32(id))
			binary.BigEndian.PutUint32(data[offArg:], uint32(arg))
			binary.BigEndian.PutUint32(data[offArg+4:], uint32(arg>>32))
			r, err := vm.Run(data)
			if err != nil {
				t.Fatalf("%s: call %d: %v", info.Name, nr, err)
			}
			return uint32(r)
		}
		const enosys, eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS), unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		want := func(nr uint32, arg uint64, want uint32) {
			t.Helper()
			if got := ask(info.ID, nr, arg); got != want {
				t.Errorf("%s: %s (%d) with %#x: %#x, want %#x", info.Name, info.SyscallNumbers[int(nr)], nr, arg, got, want)
			}
		}
		counts := map[uint32]int{}
		for nr := range uint32(2000) {
			answer := uint32(unix.SECCOMP_RET_ALLOW)
			name, known := info.SyscallNumbers[int(nr)]
			if !known || name == "clone3" {
				answer = enosys
			}
			for _, d := range denied {
				if known && name == d {
					answer = eperm
				}
			}
			want(nr, 0, answer)
			counts[answer]++
			if got := ask(arch.I386.ID, nr, 0); got != enosys {
				t.Errorf("%s: call %d of another ABI: %#x", info.Name, nr, got)
			}
			want(nr|1<<30, 0, enosys) // x32
		}
		if counts[eperm] < 60 || counts[unix.SECCOMP_RET_ALLOW] < 200 {
			t.Errorf("%s: %d calls are refused and %d allowed", info.Name, counts[eperm], counts[unix.SECCOMP_RET_ALLOW])
		}
		want(math.MaxUint32, 0, enosys)
		socket, clone := uint32(info.SyscallNames["socket"]), uint32(info.SyscallNames["clone"])
		for family, answer := range map[uint64]uint32{
			unix.AF_INET: unix.SECCOMP_RET_ALLOW, unix.AF_INET6: unix.SECCOMP_RET_ALLOW, unix.AF_UNIX: unix.SECCOMP_RET_ALLOW,
			unix.AF_VSOCK: enosys, unix.AF_ALG: enosys, 1<<32 | unix.AF_VSOCK: enosys, // the kernel takes an int
		} {
			want(socket, family, answer)
		}
		want(clone, unix.CLONE_VM|unix.CLONE_THREAD|unix.CLONE_FILES, unix.SECCOMP_RET_ALLOW)
		for _, flag := range []uint64{unix.CLONE_NEWNS, unix.CLONE_NEWUSER, unix.CLONE_NEWNET, unix.CLONE_NEWPID, unix.CLONE_NEWIPC, unix.CLONE_NEWUTS, unix.CLONE_NEWCGROUP} {
			want(clone, flag|uint64(unix.SIGCHLD), enosys)
		}
	}
}
