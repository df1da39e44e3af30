package process

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/instance/provider"
)

func getsid(pid int) (int, error) { return unix.Getsid(pid) }

func zombie(pid int) bool {
	st, err := readStat(pid)
	return err == nil && st.state == 'Z'
}

// named makes a name for provider.Marker that no other run of the tests on this machine has: it is looked for among all processes.
func named(what string) string { return what + strconv.Itoa(os.Getpid()) + "-test" }

// A stray that was killed is not there any more when its killer says so.
func TestKillStray(t *testing.T) {
	rt, name := newRuntime(t), named("stray")
	for range 20 {
		if err := exec.Command("/bin/sh", "-c", provider.Marker+"="+name+" setsid sleep 300 >/dev/null 2>&1 &").Run(); err != nil {
			t.Fatal(err)
		}
		var strays []Identity
		await(t, "the stray", func() bool {
			marked, err := rt.Marked()
			strays = marked[name]
			return err == nil && len(strays) > 0
		})
		for _, s := range strays {
			rt.KillStray(s)
			if st, err := readStat(s.PID); err == nil && st.ticks == s.Ticks && st.state != 'Z' && st.state != 'X' {
				t.Fatalf("process %d is in state %c", s.PID, st.state)
			}
		}
	}
}

// TestAdopt takes hold of a process that is not a child: a shell starts it and leaves.
func TestAdopt(t *testing.T) {
	rt, name := newRuntime(t), named("adopted")
	out, err := exec.Command("/bin/sh", "-c", provider.Marker+"="+name+" setsid sleep 300 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(out)))
	t.Cleanup(func() { // of a test that has failed
		marked, _ := rt.Marked()
		for _, id := range marked[name] {
			rt.KillStray(id)
		}
	})
	var id Identity
	await(t, "its session", func() bool {
		marked, err := rt.Marked()
		if err != nil || len(marked[name]) != 1 {
			return false
		}
		id = marked[name][0]
		sid, _ := unix.Getsid(id.PID)
		return sid == id.PID
	})
	if id.PID != pid {
		t.Logf("the marker found %d, the shell said %d", id.PID, pid)
	}
	wrong := id
	wrong.Ticks++
	if _, err := rt.Adopt(name, wrong); !errors.Is(err, ErrGone) {
		t.Errorf("adopted a pid that was used again: %v", err)
	}
	wrong = id
	wrong.Boot = "another"
	if _, err := rt.Adopt(name, wrong); !errors.Is(err, ErrGone) {
		t.Errorf("adopted a process of another boot: %v", err)
	}
	p, err := rt.Adopt(name, id)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
		t.Fatal("a living process is done")
	default:
	}
	p.Terminate()
	<-p.Done()
	if p.Exit().Known {
		t.Error("claims to know how a stranger's child ended")
	}
	if _, err := rt.Adopt(name, id); !errors.Is(err, ErrGone) {
		t.Errorf("adopted a dead process: %v", err)
	}
}

// TestAdoptedGetIntoTheirGroups: whoever started the process was killed before it had put it into the groups with its limits.
func TestAdoptedGetIntoTheirGroups(t *testing.T) {
	rt := newRuntime(t)
	s, _ := shell(t, "exec sleep 300")
	s.Limits.MemoryBytes = 32 << 20
	first := start(t, rt, s)
	dir := first.Group().Folder("memory")
	if dir == "" {
		t.Skip("limits are in the unified tree, where a process is from its beginning, or nowhere: " + rt.Isolation())
	}
	inside := func() bool {
		return slices.Contains(strings.Fields(contents(filepath.Join(dir, "cgroup.procs"))), strconv.Itoa(first.PID()))
	}
	await(t, "it is in its group", inside)
	if err := os.WriteFile(filepath.Join(dir, "../cgroup.procs"), []byte(strconv.Itoa(first.PID())), 0); err != nil || inside() {
		t.Fatalf("taken out of its group: %v", err)
	}
	second, err := rt.Adopt(s.Name, first.Identity())
	if err != nil {
		t.Fatal(err)
	}
	await(t, "it is in its group again", inside)
	second.Kill()
	<-second.Done()
	<-first.Done()
}

func TestMemoryLimit(t *testing.T) {
	rt := newRuntime(t)
	if !strings.Contains(rt.Isolation(), "memory") || strings.Contains(rt.Isolation(), "no limits") {
		t.Skip("no memory controller may be used here: " + rt.Isolation())
	}
	// A shell that doubles a string until it is stopped; the sleep lets the process arrive in its group first.
	s, out := shell(t, `sleep 0.1; x=0123456789abcdef; while :; do x=$x$x; done`)
	s.Limits.MemoryBytes = 32 << 20
	p := start(t, rt, s)
	<-p.Done()
	if e := p.Exit(); e.Reason() != "OOMKilled" {
		t.Errorf("%+v %s, output %q; %s", e, e.Reason(), contents(out), rt.Isolation())
	}
}

func TestPIDLimit(t *testing.T) {
	rt := newRuntime(t)
	if !strings.Contains(rt.Isolation(), "pids") {
		t.Skip("no pids controller may be used here: " + rt.Isolation())
	}
	s, out := shell(t, `sleep 0.1; for i in 1 2 3 4 5 6 7 8 9; do sleep 30 & done; echo all`)
	s.Limits.PIDs = 5
	p := start(t, rt, s)
	<-p.Done()
	if strings.Contains(contents(out), "all") {
		t.Errorf("nine children within a limit of five: %q", contents(out))
	}
}

func TestGroupsAreRemoved(t *testing.T) {
	rt := newRuntime(t)
	if rt.groups == nil {
		t.Skip("no cgroups here")
	}
	s, _ := shell(t, "exec sleep 300")
	p := start(t, rt, s)
	paths := p.Identity().Cgroups
	if len(paths) == 0 || filepath.Base(paths[0]) != s.Name {
		t.Fatalf("groups %v", paths)
	}
	p.Kill()
	<-p.Done()
	for _, dir := range paths {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s is left", dir)
		}
	}
	// What nobody claims is swept, what is kept is not.
	a, b := start(t, rt, func() *provider.Spec { s, _ := shell(t, "exec sleep 300"); return s }()), start(t, rt, func() *provider.Spec { s, _ := shell(t, "exec sleep 300"); return s }())
	rt.Sweep(func(id string) bool { return id == filepath.Base(a.Identity().Cgroups[0]) })
	<-b.Done()
	select {
	case <-a.Done():
		t.Error("swept what was to be kept")
	default:
	}
}

func FuzzParseStat(f *testing.F) {
	own, _ := os.ReadFile("/proc/self/stat")
	f.Add(own)
	f.Add([]byte("1 (a) b) S 1 1 1"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = parseStat(b) })
}

func TestParseStat(t *testing.T) {
	st, err := parseStat([]byte("42 (evil) R 1 2 (x) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 100 200 18446744073709551615 1 2 3 4 5 6 7 8 9 10 11 12 17 1 0 0 0 0 0 1 2 3 4 140000 6 7"))
	if err != nil || st.state != 'S' || st.session != 42 || st.ticks != 98765 {
		t.Errorf("%+v, %v", st, err)
	}
}
