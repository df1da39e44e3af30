// Package isolation looks at sandboxes from inside: what a function tries there, and what becomes of it.
package isolation

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/instance/provider/providertest"
	"github.com/thawrun/thaw/instance/sandbox"
)

// The test binary is the function.
func TestMain(m *testing.M) {
	if os.Getenv("THAW_ATTEMPT") != "" || filepath.Base(os.Args[0]) == "setuid" {
		// An instance lives on when its agent is killed, which here is a test run: no bomb shall burn for ever then.
		time.AfterFunc(longest, func() { os.Exit(9) })
	}
	switch role := os.Getenv("THAW_ATTEMPT"); {
	case role == "":
		if filepath.Base(os.Args[0]) == "setuid" {
			fmt.Println("effective user", os.Geteuid())
			return
		}
		os.Exit(m.Run())
	case role == "attempts":
		got := map[string]string{}
		for _, a := range attempts {
			got[a.name] = a.try()
		}
		json.NewEncoder(os.Stdout).Encode(got)
	case role == "spy":
		spy()
	case role == "neighbour":
		neighbour()
	case bombs[role] != nil:
		bombs[role]()
	}
}

// longest is what a function here may live.
const longest = 2 * time.Minute

type rig struct {
	provider.Provider
	*providertest.Events
	dir, code string
}

func open(t testing.TB, kind string) *rig {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	r := &rig{Events: &providertest.Events{}, dir: t.TempDir(), code: t.TempDir()}
	log := slog.New(slog.DiscardHandler)
	node := "isolation" + strconv.Itoa(os.Getpid())
	var err error
	if kind == "sandbox" {
		r.Provider, err = sandbox.New(sandbox.Config{Node: node, Dir: r.dir, Path: os.Getenv("PATH"), Log: log})
	} else {
		r.Provider, err = local.NewProcesses(node, r.dir, os.Getenv("PATH"), log)
	}
	if errors.Is(err, provider.ErrUnsupported) {
		providertest.Lacks(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.Watch(r.Add)
	t.Cleanup(r.Close)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"run": 0o755, "setuid": 0o755 | os.ModeSetuid} {
		if err := os.WriteFile(filepath.Join(r.code, name), self, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(r.code, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// start runs the test binary in an instance.
func (r *rig) start(t testing.TB, id, role string, adapt func(*provider.Spec)) (out string) {
	t.Helper()
	dir := filepath.Join(r.dir, id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, local.NoteFile), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	program := filepath.Join(r.code, "run")
	s := &provider.Spec{
		Name: "x-" + id, Path: program, Argv: []string{program}, Env: []string{"THAW_ATTEMPT=" + role, "CODE=" + r.code, "SETUID=" + filepath.Join(r.code, "setuid")},
		Dir: r.code, Code: []string{r.code}, Stdout: f, Stderr: f, UID: 1000,
	}
	if adapt != nil {
		adapt(s)
	}
	if err := r.Create(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := r.Specialise(t.Context(), id, s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Destroy(context.WithoutCancel(t.Context()), id) }) // its own has ended by then
	return f.Name()
}

func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s has not happened", what)
		}
	}
}

// outside makes what the attempts are after.
func outside(t testing.TB) []string {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	mark, err := os.CreateTemp("/tmp", "thaw-isolation")
	if err != nil {
		t.Fatal(err)
	}
	mark.Close()
	t.Cleanup(func() { os.Remove(mark.Name()) })
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close() })
	abstract := "@thaw-isolation" + filepath.Base(mark.Name())
	ul, err := net.Listen("unix", abstract)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ul.Close() })
	key := 0x7a000000 + int(time.Now().UnixNano()&0xffffff)
	shm, err := unix.SysvShmGet(key, 4096, unix.IPC_CREAT|0o666)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.SysvShmCtl(shm, unix.IPC_RMID, nil) })
	sleeper := exec.Command("/bin/sleep", "300")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sleeper.Process.Kill(); sleeper.Wait() })
	host, _ := os.Hostname()
	return []string{
		"OUTSIDE_FILE=" + secret, "MARK=" + filepath.Base(mark.Name()), "OUTSIDE_ADDR=" + tcp.Addr().String(), "OUTSIDE_UNIX=" + abstract,
		"OUTSIDE_SHM=" + strconv.Itoa(key), "OUTSIDE_PID=" + strconv.Itoa(sleeper.Process.Pid), "OUTSIDE_HOST=" + host,
	}
}

func results(t testing.TB, r *rig, id string) map[string]string {
	out := r.start(t, id, "attempts", func(s *provider.Spec) {
		s.Env = append(s.Env, outside(t)...)
		s.Limits = provider.Limits{PIDs: 300, MemoryBytes: 1 << 30} // should an attempt start attempts, without a sandbox too
	})
	await(t, "the end of the attempts", func() bool { return len(r.Of(id)) > 0 })
	b, _ := os.ReadFile(out)
	got := map[string]string{}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatalf("%v: %q, it %v", err, b, r.Of(id)[0].Exit)
	}
	return got
}

// TestAttempts: in a sandbox none of them gets anywhere; without one, as root, each does.
func TestAttempts(t *testing.T) {
	inside := results(t, open(t, "sandbox"), "inside")
	without := results(t, open(t, "process"), "without")
	for _, a := range attempts {
		if got := inside[a.name]; got != "" {
			t.Errorf("a function in a sandbox %s: %s", a.name, got)
		}
		if without[a.name] == "" && !a.any {
			t.Errorf("nothing has happened without a sandbox either: %q tells nothing", a.name)
		}
	}
}

// TestCommandsAreNotSpiedOn: probes that are commands enter a sandbox as children that share the agent's memory until their exec, as
// the very user that runs there. The program inside must not get hold of it, whatever else the agent starts meanwhile.
func TestCommandsAreNotSpiedOn(t *testing.T) {
	r := open(t, "sandbox")
	secret := bytes.Repeat([]byte("7"), 8)
	at := strconv.FormatUint(uint64(uintptr(unsafe.Pointer(&secret[0]))), 10)
	out := r.start(t, "spy", "spy", func(s *provider.Spec) { s.Env = append(s.Env, "SECRET_AT="+at) })
	text := func() string { b, _ := os.ReadFile(out); return string(b) }
	await(t, "the spy", func() bool { return text() != "" })
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				s := &provider.Spec{Name: "x-spy", Path: "/bin/true", Argv: []string{"true"}, Dir: "/", UID: 1000}
				if err := r.Command(t.Context(), "spy", s, io.Discard); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := 0; ctx.Err() == nil; i++ {
		id := fmt.Sprintf("other%d", i)
		if err := r.Create(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	runtime.KeepAlive(secret)
	if got := text(); !strings.Contains(got, "saw one") || strings.Contains(got, "read") {
		t.Errorf("the program inside says %q", got)
	}
}

func TestMemoryBomb(t *testing.T) {
	r := open(t, "sandbox")
	if !strings.Contains(r.Capabilities().Isolation, "memory") {
		t.Skip("no memory controller: " + r.Capabilities().Isolation)
	}
	r.start(t, "bomb", "memory", func(s *provider.Spec) { s.Limits.MemoryBytes = 64 << 20 })
	await(t, "the end of the bomb", func() bool { return len(r.Of("bomb")) > 0 })
	if e := r.Of("bomb")[0].Exit; e.Reason() != "OOMKilled" {
		t.Errorf("it %v", e)
	}
}

func TestForkBomb(t *testing.T) {
	const limit = 60
	r := open(t, "sandbox")
	out := r.start(t, "bomb", "processes", func(s *provider.Spec) { s.Limits.PIDs = limit })
	var forks int
	await(t, "the limit", func() bool {
		b, _ := os.ReadFile(out)
		n, _ := fmt.Sscanf(string(b), "forks %d", &forks)
		return n == 1
	})
	if forks >= limit || forks < limit/4 {
		t.Errorf("%d forks within a limit of %d processes and threads", forks, limit)
	}
	if err := r.Destroy(t.Context(), "bomb"); err != nil {
		t.Error(err)
	}
	self, _ := filepath.EvalSymlinks(filepath.Join(r.code, "run"))
	for _, pid := range running(self) {
		t.Errorf("process %d of the bomb is left", pid)
	}
}

// running finds the processes that run a program.
func running(program string) (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if exe, err := os.Readlink("/proc/" + e.Name() + "/exe"); err == nil && exe == program {
			pid, _ := strconv.Atoi(e.Name())
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestCPUBomb: four threads that burn get a fiftieth of a processor: little enough for the limit to be felt on a machine full of others.
func TestCPUBomb(t *testing.T) {
	r := open(t, "sandbox")
	if !strings.Contains(r.Capabilities().Isolation, "cpu (") {
		t.Skip("no cpu controller: " + r.Capabilities().Isolation)
	}
	out := r.start(t, "bomb", "cpu", func(s *provider.Spec) { s.Limits.CPUMillis = 20 })
	await(t, "the fire", func() bool { b, _ := os.ReadFile(out); return len(b) > 0 })
	await(t, "throttling", func() bool { s, err := r.Stats(t.Context(), "bomb"); return err == nil && s.Throttled > 0 })
	before, _ := r.Stats(t.Context(), "bomb")
	began := time.Now()
	time.Sleep(time.Second)
	after, err := r.Stats(t.Context(), "bomb")
	if err != nil {
		t.Fatal(err)
	}
	if share := float64(after.CPU-before.CPU) / float64(time.Since(began)); share > 0.08 {
		t.Errorf("%.2f of a processor, 0.02 is its limit", share)
	}
}

func TestDiskBomb(t *testing.T) {
	r := open(t, "sandbox")
	out := r.start(t, "bomb", "disk", nil)
	await(t, "the end of /tmp", func() bool {
		b, _ := os.ReadFile(out)
		return strings.Contains(string(b), "no space left")
	})
}

// TestNeighbour: a function that needs a fifth of a processor takes no more than twice as long for its work, and gets as much of it
// done, while three others burn processor time, memory and process ids, each within limits of its own. Its figures mean something on a
// quiet machine only, so it is asked for: make test-sandbox.
func TestNeighbour(t *testing.T) {
	if os.Getenv("THAW_NEIGHBOUR") == "" {
		t.Skip("needs a machine with nothing else to do; set THAW_NEIGHBOUR=1")
	}
	r := open(t, "sandbox")
	measure := func(id string) (p95, worked time.Duration) {
		out := r.start(t, id, "neighbour", nil)
		await(t, "its figures", func() bool { return len(r.Of(id)) > 0 })
		b, _ := os.ReadFile(out)
		if n, err := fmt.Sscan(string(b), (*int64)(&p95), (*int64)(&worked)); n != 2 {
			t.Fatalf("%q: %v", b, err)
		}
		return p95, worked
	}
	alone, share := measure("alone")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r.start(t, "cpu", "cpu", func(s *provider.Spec) { s.Limits.CPUMillis = 500 })
	r.start(t, "forks", "processes", func(s *provider.Spec) { s.Limits = provider.Limits{PIDs: 60, CPUMillis: 500} })
	var wg sync.WaitGroup
	deaths := 0
	wg.Go(func() { // a memory bomb is dead within a moment: the next one follows
		for ctx.Err() == nil {
			id := fmt.Sprint("memory", deaths)
			r.start(t, id, "memory", func(s *provider.Spec) { s.Limits = provider.Limits{MemoryBytes: 64 << 20, CPUMillis: 500} })
			await(t, "its end", func() bool { return len(r.Of(id)) > 0 })
			deaths++
		}
	})
	before, _ := r.Stats(t.Context(), "cpu")
	began := time.Now()
	among, worked := measure("among")
	stats, _ := r.Stats(t.Context(), "cpu")
	burnt := float64(stats.CPU-before.CPU) / float64(time.Since(began))
	cancel()
	wg.Wait()
	t.Logf("p95 of 2 ms of work: alone %v, among bombs %v (%.2f x); work done: %v and %v; the CPU bomb had %.2f of a processor, %d memory bombs died",
		alone, among, float64(among)/float64(alone), share, worked, burnt, deaths)
	if among > 2*alone {
		t.Errorf("p95 is %.2f times what it was", float64(among)/float64(alone))
	}
	if worked < share*8/10 {
		t.Errorf("it got %v of the processor, %v alone", worked, share)
	}
	if burnt < 0.2 || burnt > 0.6 || deaths == 0 {
		t.Errorf("the CPU bomb had %.2f of a processor, 0.5 is its limit; %d memory bombs died", burnt, deaths)
	}
}

// TestNothingIsLeft starts and stops many, and compares what the kernel has of us before and after. THAW_STARTS sets how many.
func TestNothingIsLeft(t *testing.T) {
	n := 60
	if v, err := strconv.Atoi(os.Getenv("THAW_STARTS")); err == nil {
		n = v
	}
	r := open(t, "sandbox")
	once := func(i int) {
		id := fmt.Sprintf("n%d", i)
		r.start(t, id, "cpu", nil)
		if i%2 == 0 {
			r.Stop(t.Context(), id)
		}
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		os.RemoveAll(filepath.Join(r.dir, id))
	}
	once(0)
	before := count(t, r)
	began := time.Now()
	for i := range n {
		once(i + 1)
	}
	t.Logf("%d starts and stops in %v", n, time.Since(began))
	var after map[string]int
	await(t, "the state of before", func() bool {
		after = count(t, r)
		for what, had := range before {
			if after[what] > had {
				return false
			}
		}
		return true
	})
	t.Logf("before %v, after %v", before, after)
}

// count counts what a sandbox consists of.
func count(t testing.TB, r *rig) map[string]int {
	t.Helper()
	entries := func(dir string) int {
		e, _ := os.ReadDir(dir)
		return len(e)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	groups := 0
	node := "thaw-isolation" + strconv.Itoa(os.Getpid())
	for _, tree := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/pids"} {
		filepath.WalkDir(tree, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() && strings.Contains(path, node) {
				groups++
			}
			return nil
		})
	}
	self, _ := filepath.EvalSymlinks(filepath.Join(r.code, "run"))
	var children int
	for _, e := range must(os.ReadDir("/proc")) {
		b, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err == nil && strings.Contains(string(b), ") ") {
			f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
			if len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
				children++
			}
		}
	}
	return map[string]int{
		"descriptors": entries("/proc/self/fd"), "mounts": strings.Count(string(mounts), "\n"), "groups": groups, "files": entries(r.dir),
		"processes": len(running(self)), "children": children,
	}
}

func must[T any](v T, _ error) T { return v }
