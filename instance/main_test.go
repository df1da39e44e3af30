package instance

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/internal/endpoints"
)

// The test binary is its own function and its own agent: with THAW_TEST_FUNCTION set it behaves as named.
func TestMain(m *testing.M) {
	if os.Getenv("THAW_TEST_FUNCTION") != "" { // instances outlive a test that is killed, but not for ever
		time.AfterFunc(10*time.Minute, func() { os.Exit(9) })
	}
	switch role := os.Getenv("THAW_TEST_FUNCTION"); role {
	case "":
		os.Exit(m.Run())
	case "agent":
		agentMain()
	default:
		function(role)
	}
}

// function serves HTTP on PORT, with the given vice.
func function(vice string) {
	fmt.Println("hello from", os.Getenv("K_REVISION"), "args", os.Args[1:])
	switch vice {
	case "crash":
		fmt.Fprintln(os.Stderr, "panic: \x1b[31mno database\x1b[0m \xff")
		os.Exit(3)
	case "deaf": // never listens
		select {}
	case "late":
		d, _ := time.ParseDuration(os.Getenv("DELAY"))
		time.Sleep(d)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
	case "flood":
		line := bytes.Repeat([]byte("x"), 1023)
		line = append(line, '\n')
		for range 4096 {
			os.Stdout.Write(line)
		}
	case "once": // crashes at its first start only
		if f, err := os.OpenFile(os.Getenv("MARK"), os.O_CREATE|os.O_EXCL, 0o600); err == nil {
			f.Close()
			os.Exit(1)
		}
	}
	var l net.Listener
	var err error
	if os.Getenv("LISTEN_FDS") == "1" {
		if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
			fmt.Fprintln(os.Stderr, "LISTEN_PID is", os.Getenv("LISTEN_PID"), "and I am", os.Getpid())
			os.Exit(4)
		}
		l, err = net.FileListener(os.NewFile(3, "socket"))
		if d, _ := time.ParseDuration(os.Getenv("DELAY")); d > 0 {
			time.Sleep(d)
		}
		if os.Getenv("MARK") != "" {
			if f, err := os.OpenFile(os.Getenv("MARK"), os.O_CREATE|os.O_EXCL, 0o600); err == nil {
				f.Close()
				os.Exit(1)
			}
		}
	} else {
		l, err = net.Listen("tcp", ":"+os.Getenv("PORT"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	var ill atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("/pid", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, os.Getpid()) })
	mux.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, strings.Join(os.Environ(), "\n"))
	})
	mux.HandleFunc("/args", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%q", os.Args) })
	mux.HandleFunc("/cwd", func(w http.ResponseWriter, r *http.Request) {
		d, _ := os.Getwd()
		fmt.Fprint(w, d)
	})
	mux.HandleFunc("/stdin", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(os.Stdin)
		fmt.Fprint(w, len(b), err)
	})
	mux.HandleFunc("/health", func(w http.ResponseWriter, r *http.Request) {
		if ill.Load() {
			http.Error(w, "ill", 500)
		}
	})
	mux.HandleFunc("/ill", func(w http.ResponseWriter, r *http.Request) { ill.Store(true) })
	mux.HandleFunc("/well", func(w http.ResponseWriter, r *http.Request) { ill.Store(false) })
	mux.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) { os.Exit(7) })
	mux.HandleFunc("/say", func(w http.ResponseWriter, r *http.Request) { fmt.Println(r.URL.Query().Get("what")) })
	mux.HandleFunc("/escape", func(w http.ResponseWriter, r *http.Request) { // a child that leaves the session
		p, err := os.StartProcess("/bin/sleep", []string{"sleep", "300"}, &os.ProcAttr{
			Env: os.Environ(), Files: []*os.File{nil, nil, nil}, Sys: &syscall.SysProcAttr{Setsid: true}})
		fmt.Fprint(w, p.Pid, " ", err)
	})
	mux.HandleFunc("/tmpfile", func(w http.ResponseWriter, r *http.Request) {
		f, err := os.CreateTemp("", "x")
		if err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		fmt.Fprint(w, f.Name())
	})
	http.Serve(l, mux)
}

// collector keeps all snapshots of an agent and checks what must hold for each of them.
type collector struct {
	t      testing.TB
	mu     chan struct{} // lock with capacity 1, so that waiting can time out
	last   map[api.RevisionID]*endpoints.Snapshot
	all    []*endpoints.Snapshot
	change chan struct{}
}

func newCollector(t testing.TB) *collector {
	return &collector{t: t, mu: make(chan struct{}, 1), last: map[api.RevisionID]*endpoints.Snapshot{}, change: make(chan struct{}, 1)}
}

func (c *collector) observe(s *endpoints.Snapshot) {
	c.mu <- struct{}{}
	if old := c.last[s.Revision]; old != nil && old.Sequence >= s.Sequence {
		c.t.Errorf("snapshot %d of %s after %d", s.Sequence, s.Revision, old.Sequence)
	}
	c.last[s.Revision] = s
	c.all = append(c.all, s)
	<-c.mu
	select {
	case c.change <- struct{}{}:
	default:
	}
}

func (c *collector) get(id api.RevisionID) *endpoints.Snapshot {
	c.mu <- struct{}{}
	defer func() { <-c.mu }()
	if s := c.last[id]; s != nil {
		return s
	}
	return &endpoints.Snapshot{Revision: id}
}

// until waits for a snapshot that satisfies ok.
func (c *collector) until(id api.RevisionID, what string, ok func(*endpoints.Snapshot) bool) *endpoints.Snapshot {
	c.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		s := c.get(id)
		if ok(s) {
			return s
		}
		select {
		case <-c.change:
		case <-time.After(50 * time.Millisecond):
		case <-deadline:
			c.t.Fatalf("%s: no snapshot with %s; last: %+v, failure %+v", id, what, s, s.Failure)
		}
	}
}

func (c *collector) ready(id api.RevisionID, n int) *endpoints.Snapshot {
	c.t.Helper()
	return c.until(id, fmt.Sprintf("%d ready", n), func(s *endpoints.Snapshot) bool {
		return s.Count(endpoints.Ready) == n && len(s.Instances) == n
	})
}

// rig is an agent that runs until the test ends, after which nothing of it may be left.
type rig struct {
	*Agent
	*collector
	dir  string
	stop func()
}

func newRig(t testing.TB, adapt func(*Config)) *rig {
	t.Helper()
	dir := t.TempDir()
	return newRigIn(t, dir, adapt)
}

func newRigIn(t testing.TB, dir string, adapt func(*Config)) *rig {
	t.Helper()
	cfg := Config{Dir: dir, Provider: "process", Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)), Shutdown: 5 * time.Second}
	if adapt != nil {
		adapt(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c := newCollector(t)
	a.Subscribe(c.observe)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stopped := false
	r := &rig{Agent: a, collector: c, dir: dir}
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		noOrphans(t, dir)
	}
	t.Cleanup(r.stop)
	return r
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	if testing.Verbose() {
		fmt.Fprintf(os.Stderr, "%s: %s", w.t.Name(), b)
	}
	return len(b), nil
}

// noOrphans fails the test if a process that belongs to the data folder is alive: TMPDIR of every instance lies in it.
func noOrphans(t testing.TB, dir string) {
	t.Helper()
	for _, pid := range alive(t, dir) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		t.Errorf("process %d is still there: %q", pid, b)
		syscall.Kill(pid, syscall.SIGKILL)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "instances")); len(left) > 0 {
		t.Errorf("folders of instances are left: %v", left)
	}
}

func alive(t testing.TB, dir string) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Skip("needs /proc")
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
		if err == nil && bytes.Contains(env, []byte("TMPDIR="+filepath.Join(dir, "instances"))) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// revision makes a revision whose function is this test binary with the given vice.
func revisionOf(t testing.TB, name, vice string, env ...string) *api.Revision {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	timeout := int64(2)
	rev := &api.Revision{}
	rev.Namespace, rev.Name, rev.UID = "default", name, "uid-"+name
	rev.Labels = map[string]string{api.LabelService: "svc", api.LabelConfiguration: "cfg"}
	rev.Annotations = map[string]string{}
	rev.Spec.TimeoutSeconds = &timeout
	c := api.Container{Name: "user-container", Image: "exec://" + self}
	c.Env = append(c.Env, api.EnvVar{Name: "THAW_TEST_FUNCTION", Value: vice})
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		c.Env = append(c.Env, api.EnvVar{Name: k, Value: v})
	}
	rev.Spec.Containers = []api.Container{c}
	return rev
}

func get(t testing.TB, addr, path string) string {
	t.Helper()
	body, err := tryGet(addr, path)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

var client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

func tryGet(addr, path string) (string, error) {
	resp, err := client.Get("http://" + addr + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func collectLogs(t testing.TB, a *Agent, q logs.Query) []logs.Line {
	t.Helper()
	var lines []logs.Line
	for l, err := range a.Logs(context.Background(), q) {
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, l)
	}
	return lines
}
