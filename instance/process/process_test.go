package process

import (
	"encoding/json"
	"errors"
	"fmt"

	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/instance/cgroup"
	"github.com/thawrun/thaw/instance/provider"
)

func newRuntime(t testing.TB) *Runtime {
	t.Helper()
	rt, err := New("test"+strconv.Itoa(os.Getpid()), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(rt.Close)
	return rt
}

// shell describes an instance that runs a script.
func shell(t testing.TB, script string) (*provider.Spec, string) {
	t.Helper()
	dir := t.TempDir()
	out, err := os.OpenFile(filepath.Join(dir, "out"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	id := strings.ReplaceAll(t.Name(), "/", "-") + "-" + strconv.FormatInt(time.Now().UnixNano(), 36)
	return &provider.Spec{
		Name: id, Path: "/bin/sh", Argv: []string{"sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin"}, Dir: dir,
		Stdout: out, Stderr: out,
	}, out.Name()
}

func start(t testing.TB, rt *Runtime, s *provider.Spec) *Process {
	t.Helper()
	p, err := rt.Start(rt.Groups().Create(s.Name), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		<-p.Done()
	})
	return p
}

func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

func contents(file string) string {
	b, _ := os.ReadFile(file)
	return string(b)
}

func TestExit(t *testing.T) {
	rt := newRuntime(t)
	for script, want := range map[string]string{
		"exit 0": "ExitCode0", "exit 3": "ExitCode3", "kill -9 $$": "Signal9", "kill -TERM $$": "Signal15",
	} {
		s, _ := shell(t, script)
		p := start(t, rt, s)
		<-p.Done()
		if e := p.Exit(); !e.Known || e.Reason() != want {
			t.Errorf("%s: %+v %s, want %s", script, e, e.Reason(), want)
		}
	}
}

func TestStartErrors(t *testing.T) {
	rt := newRuntime(t)
	for _, c := range []struct {
		adapt func(*provider.Spec)
		errno error
	}{
		{func(s *provider.Spec) { s.Path = "/no/such" }, syscall.ENOENT},
		{func(s *provider.Spec) { s.Dir = "/no/such" }, syscall.ENOENT},
		{func(s *provider.Spec) { s.Path = s.Dir }, syscall.EACCES},
	} {
		s, _ := shell(t, "true")
		c.adapt(s)
		_, err := rt.Start(rt.Groups().Create(s.Name), s)
		if e, ok := errors.AsType[*provider.StartError](err); !ok || !errors.Is(err, c.errno) || e.Path != s.Path {
			t.Errorf("%v, want %v", err, c.errno)
		}
	}
}

func TestOwnSessionAndStandardFiles(t *testing.T) {
	rt := newRuntime(t)
	s, out := shell(t, `read x; echo "read $?"; echo err >&2; ls -l /proc/self/fd | wc -l; exec sleep 300`)
	p := start(t, rt, s)
	await(t, "the output", func() bool { return strings.Count(contents(out), "\n") == 3 })
	// ls has 0, 1, 2, the folder, and a line with the total
	if got := contents(out); !strings.HasPrefix(got, "read 1\nerr\n") || strings.Fields(got)[3] != "5" {
		t.Errorf("output %q: stdin is not at its end, or descriptors leak", got)
	}
	if sid, err := getsid(p.PID()); err != nil || sid != p.PID() {
		t.Errorf("session %d, %v, want its own %d", sid, err, p.PID())
	}
	if pgid, err := syscall.Getpgid(p.PID()); err != nil || pgid != p.PID() {
		t.Errorf("process group %d, %v, want its own %d", pgid, err, p.PID())
	}
}

func TestTerminateReachesTheGroup(t *testing.T) {
	rt := newRuntime(t)
	s, out := shell(t, `trap 'echo parent; exit 0' TERM; (trap 'echo child; exit 0' TERM; echo up; while :; do sleep 0.01; done) & while :; do sleep 0.01; done`)
	p := start(t, rt, s)
	await(t, "the child", func() bool { return strings.Contains(contents(out), "up") })
	p.Terminate()
	<-p.Done()
	await(t, "both traps", func() bool { return strings.Contains(contents(out), "parent") })
}

// TestToldAgainAndAgain: one that was ended for SIGTERM has ended of SIGTERM, however often it is told, also while it ends.
func TestToldAgainAndAgain(t *testing.T) {
	rt := newRuntime(t)
	for range 20 {
		s, _ := shell(t, "exec sleep 300")
		p := start(t, rt, s)
		p.endDeaf()
		var tellers sync.WaitGroup
		for range 4 {
			tellers.Go(func() {
				for {
					select {
					case <-p.Done():
						return
					default:
						p.endDeaf()
					}
				}
			})
		}
		tellers.Wait()
		if e := p.Exit(); e.Signal != syscall.SIGTERM {
			t.Fatalf("%+v, want signal 15", e)
		}
	}
}

// TestNothingOutlivesTheLeader: children that stay behind when the leader exits are killed before Done is closed.
func TestNothingOutlivesTheLeader(t *testing.T) {
	for _, groups := range []bool{true, false} {
		rt := newRuntime(t)
		if !groups {
			rt.groups = nil
		}
		s, out := shell(t, `trap '' TERM; (trap '' TERM; echo $(exec sh -c 'echo $PPID'); exec sleep 300) & until [ -s out ]; do sleep 0.01; done; exit 0`)
		p := start(t, rt, s)
		<-p.Done()
		child, err := strconv.Atoi(strings.TrimSpace(contents(out)))
		if err != nil {
			t.Fatalf("no pid in %q", contents(out))
		}
		await(t, "the end of the child", func() bool { return errors.Is(syscall.Kill(child, 0), syscall.ESRCH) || zombie(child) })
	}
}

func TestSocket(t *testing.T) {
	for _, way := range []struct {
		name string
		fork func(*Runtime, *cgroup.Group, *provider.Spec) (*Process, error)
	}{{"traced", (*Runtime).Start}} {
		t.Run(way.name, func(t *testing.T) {
			rt := newRuntime(t)
			s, out := shell(t, `echo $LISTEN_FDS $LISTEN_PID $$ "$EXTRA"; readlink /proc/self/fd/3`)
			r, w, err := os.Pipe() // any descriptor will do
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			s.Listener, s.Env = r, append(s.Env, "EXTRA=kept")
			p, err := way.fork(rt, nil, s)
			if err != nil {
				t.Fatal(err)
			}
			<-p.Done()
			pid := strconv.Itoa(p.PID())
			if got := strings.Fields(contents(out)); len(got) != 5 || got[0] != "1" || got[1] != pid || got[2] != pid || got[3] != "kept" || !strings.HasPrefix(got[4], "pipe:") {
				t.Errorf("output %q, pid %s", contents(out), pid)
			}
		})
	}
}

// TestSocketThroughShell is the way that is left where tracing is forbidden.
func TestSocketThroughShell(t *testing.T) {
	s, out := shell(t, `echo $LISTEN_PID $$ "$1"`)
	s.Argv = append(s.Argv, "name", "an 'argument' with $signs")
	pid, err := forkExecShell(s, &syscall.ProcAttr{Env: s.Env, Files: []uintptr{0, s.Stdout.Fd(), s.Stderr.Fd()}})
	if err != nil {
		t.Fatal(err)
	}
	reapChild(pid)
	if got, want := contents(out), fmt.Sprintf("%d %d an 'argument' with $signs\n", pid, pid); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestIdentityIsStable(t *testing.T) {
	rt := newRuntime(t)
	s, _ := shell(t, "exec sleep 300")
	p := start(t, rt, s)
	b, err := json.Marshal(p.Identity())
	if err != nil {
		t.Fatal(err)
	}
	var id Identity
	if err := json.Unmarshal(b, &id); err != nil || id.PID != p.PID() {
		t.Errorf("%s: %+v, %v", b, id, err)
	}
}
