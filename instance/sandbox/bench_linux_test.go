//go:build amd64 || arm64

package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/provider"
)

// BenchmarkStart runs /bin/true: a place, the start, and the end, each by itself.
func BenchmarkStart(b *testing.B) {
	r := newRig(b)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	for _, limits := range []provider.Limits{{}, {MemoryBytes: 1 << 30, Precaution: true}, {MemoryBytes: 64 << 20, CPUMillis: 1000}} {
		b.Run(fmt.Sprintf("%+v", limits), func(b *testing.B) {
			var create, start, end time.Duration
			for i := 0; b.Loop(); i++ {
				id := fmt.Sprintf("b%d", i)
				if err := os.MkdirAll(filepath.Join(r.Dir, id), 0o755); err != nil {
					b.Fatal(err)
				}
				os.WriteFile(filepath.Join(r.Dir, id, local.NoteFile), nil, 0o644)
				t0 := time.Now()
				if err := r.Provider.Create(b.Context(), id); err != nil {
					b.Fatal(err)
				}
				t1 := time.Now()
				err := r.Provider.Specialise(b.Context(), id, &provider.Spec{
					Name: "bench-" + id, Path: "/bin/sleep", Argv: []string{"sleep", "10"}, Dir: "/", Stdout: null, Stderr: null, Limits: limits,
				})
				if err != nil {
					b.Fatal(err)
				}
				t2 := time.Now()
				if err := r.Provider.Destroy(b.Context(), id); err != nil {
					b.Fatal(err)
				}
				create, start, end = create+t1.Sub(t0), start+t2.Sub(t1), end+time.Since(t2)
			}
			for name, d := range map[string]time.Duration{"create": create, "start": start, "end": end} {
				b.ReportMetric(float64(d.Microseconds())/float64(b.N), name+"-µs")
			}
		})
	}
}

// BenchmarkFilter starts a child that takes on the system call filter, or does not, and ends.
func BenchmarkFilter(b *testing.B) {
	f, err := newFilter()
	if err != nil {
		b.Fatal(err)
	}
	for _, with := range []bool{false, true} {
		b.Run(fmt.Sprintf("filter=%v", with), func(b *testing.B) {
			for b.Loop() {
				s := &script{}
				s.do("no_new_privs", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
				if with {
					s.do("system call filter", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, unsafe.Pointer(&f.prog))
				}
				s.do("end", unix.SYS_EXIT_GROUP, 0)
				pid, pidfd, err := s.run(0, -1)
				if err != nil {
					b.Fatal(err)
				}
				unix.Close(pidfd)
				reap(pid)
			}
		})
	}
}
