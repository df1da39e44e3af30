package process

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/thawrun/thaw/instance/provider"
)

// BenchmarkListenPID compares the ways to start a program that finds its own pid in LISTEN_PID, from the order to the end of the
// program (/bin/true): not at all, traced, and through a shell that executes it.
func BenchmarkListenPID(b *testing.B) {
	program, err := filepath.EvalSymlinks("/bin/true")
	if err != nil {
		b.Skip(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	for _, way := range []struct {
		name string
		fork func(*provider.Spec, *syscall.ProcAttr) (int, error)
	}{
		{"none", func(s *provider.Spec, a *syscall.ProcAttr) (int, error) { return syscall.ForkExec(s.Path, s.Argv, a) }},
		{"traced", forkExecListening},
		{"shell", forkExecShell},
	} {
		b.Run(way.name, func(b *testing.B) {
			for b.Loop() {
				s := &provider.Spec{Name: "bench", Path: program, Argv: []string{program}}
				a := &syscall.ProcAttr{Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true}}
				pid, err := way.fork(s, a)
				if err != nil {
					b.Fatal(err)
				}
				if e := reapChild(pid); e.Code != 0 {
					b.Fatal(e)
				}
			}
		})
	}
}
