// Package e2e tests the whole system as people use it: the real `thaw` binary as a process with its embedded etcd on disk, real
// functions as processes, real clients over loopback.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

// bin is the folder with the binaries under test, built once.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "thaw-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		build := exec.Command("go", "build", "-o", dir+"/", "../../cmd/thaw", "../../examples/checker", "../../examples/hello-go", "../../examples/slow-start", "../../examples/crasher", "../../examples/websocket-echo")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// thaw is a running `thaw dev`.
type thaw struct {
	t       *testing.T
	dir     string
	ingress string
	api     string
	args    []string
	cmd     *exec.Cmd
	exited  chan struct{}
	client  *client.Client
	http    *http.Client
	log     *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// quick are autoscaler settings that let a test see zero: Knative's shortest window and its shortest grace.
const quick = "stable-window: 6s\nscale-to-zero-grace-period: 6s\n"

// start runs `thaw dev` on free ports with a data folder of its own; it is killed, with all functions, when the test ends.
func start(t *testing.T, args ...string) *thaw {
	t.Helper()
	th := &thaw{t: t, dir: t.TempDir(), args: args, log: &lockedBuffer{}}
	tr := &http.Transport{MaxIdleConnsPerHost: 2000, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", th.ingress)
	}}
	th.http = &http.Client{Transport: tr, Timeout: 60 * time.Second}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		if th.running() {
			th.cmd.Process.Signal(syscall.SIGTERM)
			select {
			case <-th.exited:
			case <-time.After(40 * time.Second):
				t.Error("thaw dev did not end within 40 s of SIGTERM")
				th.kill()
			}
		}
		if left := processesOf(th.dir); len(left) > 0 {
			t.Errorf("functions left behind: %v", left)
			for _, pid := range left {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		if t.Failed() {
			t.Logf("log of thaw dev:\n%s", tail(th.log.String(), 6000))
		}
	})
	th.launch("127.0.0.1:0", "127.0.0.1:0")
	return th
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

func (th *thaw) running() bool {
	select {
	case <-th.exited:
		return false
	default:
		return th.cmd != nil
	}
}

var readyLine = regexp.MustCompile(`^thaw dev ready listen=(\S+) api=(\S+)$`)

// launch starts the process and waits for its line.
func (th *thaw) launch(listen, apiAddr string) {
	th.t.Helper()
	th.cmd = exec.Command(filepath.Join(bin, "thaw"), append([]string{"dev", "--listen", listen, "--api", apiAddr, "--data", th.dir}, th.args...)...)
	th.cmd.Stderr = th.log
	out, err := th.cmd.StdoutPipe()
	if err != nil {
		th.t.Fatal(err)
	}
	if err := th.cmd.Start(); err != nil {
		th.t.Fatal(err)
	}
	lines := make(chan string, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			select {
			case lines <- sc.Text():
			default:
			}
		}
	}()
	exited := make(chan struct{})
	cmd := th.cmd
	go func() {
		<-read // Wait closes the pipe: all must have been read before
		cmd.Wait()
		close(exited)
	}()
	th.exited = exited
	select {
	case line := <-lines:
		m := readyLine.FindStringSubmatch(line)
		if m == nil {
			th.t.Fatalf("first line of thaw dev: %q", line)
		}
		th.ingress, th.api = m[1], m[2]
	case <-exited:
		th.t.Fatalf("thaw dev ended:\n%s", th.log)
	case <-time.After(30 * time.Second):
		th.t.Fatalf("thaw dev not ready within 30 s:\n%s", th.log)
	}
	cfg, err := client.Discover("http://"+th.api, th.dir, func(string) string { return "" })
	if err != nil {
		th.t.Fatal(err)
	}
	if th.client, err = client.New(cfg); err != nil {
		th.t.Fatal(err)
	}
}

// kill ends thaw dev as a crash does: functions are not told.
func (th *thaw) kill() {
	th.cmd.Process.Kill()
	<-th.exited
}

// apply sends YAML and waits until the service is ready.
func (th *thaw) apply(doc string) *api.Service {
	th.t.Helper()
	s, err := th.tryApply(doc)
	if err != nil {
		th.t.Fatal(err)
	}
	return s
}

func (th *thaw) tryApply(doc string) (*api.Service, error) {
	doc = strings.ReplaceAll(doc, "$BIN", bin)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	data, err := yaml.YAMLToJSON([]byte(doc))
	if err != nil {
		return nil, err
	}
	var meta struct{ Metadata api.ObjectMeta }
	if err := json.Unmarshal(data, &meta); err != nil {
		return nil, err
	}
	if _, _, err := th.client.Apply(ctx, api.Services, "default", meta.Metadata.Name, data); err != nil {
		return nil, err
	}
	o, err := th.client.WaitReady(ctx, api.Services, "default", meta.Metadata.Name, client.WaitOptions{})
	if err != nil {
		return nil, err
	}
	return o.(*api.Service), nil
}

// service returns a Service document around the checker; annotations are "key: value" lines.
func checkerService(name string, concurrency int, env map[string]string, annotations ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: %s}\nspec:\n  template:\n    metadata:\n      annotations:\n", name)
	for _, a := range append(annotations, "client.thaw.test/x: y") {
		k, v, _ := strings.Cut(a, ": ")
		fmt.Fprintf(&b, "        %s: %q\n", k, v)
	}
	fmt.Fprintf(&b, "    spec:\n      containerConcurrency: %d\n      containers:\n      - image: exec://$BIN/checker\n        env:\n        - {name: A, value: B}\n", concurrency)
	for k, v := range env {
		fmt.Fprintf(&b, "        - {name: %s, value: %q}\n", k, v)
	}
	return b.String()
}

const (
	initialZero = "autoscaling.knative.dev/initial-scale: 0"
	minScale    = "autoscaling.knative.dev/min-scale: "
	maxScale    = "autoscaling.knative.dev/max-scale: "
)

// answer is what came back.
type answer struct {
	status int
	body   string
	header http.Header
	err    error
	took   time.Duration
}

func (a answer) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprintf("%d %.200q (%s)", a.status, a.body, a.header.Get("X-Thaw-Error"))
}

// get calls host (without domain: NAME or TAG-NAME) and path.
func (th *thaw) get(host, path string, header ...string) answer {
	req, err := http.NewRequest("GET", "http://"+host+".default.localhost"+path, nil)
	if err != nil {
		return answer{err: err}
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	return th.do(req)
}

func (th *thaw) do(req *http.Request) answer {
	begin := time.Now()
	resp, err := th.http.Do(req)
	if err != nil {
		return answer{err: err, took: time.Since(begin)}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, string(b), resp.Header, err, time.Since(begin)}
}

// load keeps n clients busy until stop is called, which returns how many answers there were and those that were not 200.
func (th *thaw) load(n int, host, path string) (stop func() (int, []answer)) {
	var (
		total atomic.Int64
		mu    sync.Mutex
		bad   []answer
		wg    sync.WaitGroup
	)
	end := make(chan struct{})
	for range n {
		wg.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				a := th.get(host, path)
				total.Add(1)
				if a.err != nil || a.status != 200 {
					mu.Lock()
					bad = append(bad, a)
					mu.Unlock()
				}
			}
		})
	}
	return func() (int, []answer) {
		close(end)
		wg.Wait()
		return int(total.Load()), bad
	}
}

// scale asks how a revision scales.
func (th *thaw) scale(revision string) (ready, starting, desired int, mode string) {
	th.t.Helper()
	s, err := th.client.Scale(context.Background(), "default", revision)
	if errors.Is(err, client.ErrNotFound) {
		return 0, 0, 0, ""
	}
	if err != nil {
		th.t.Fatal(err)
	}
	n := func(k string) int { v, _ := s[k].(float64); return int(v) }
	mode, _ = s["mode"].(string)
	return n("ready"), n("starting"), n("desired"), mode
}

// eventually waits for a condition; the error names what did not come true.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// processesOf finds the functions whose data folder is dir by the instance folder in their environment.
func processesOf(dir string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil // not Linux: the tests of package instance look after it there
	}
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
		if err == nil && bytes.Contains(env, []byte("THAW_INSTANCE=")) && bytes.Contains(env, []byte(dir+"/")) {
			pids = append(pids, pid)
		}
	}
	return pids
}
