// Package harness runs the real `thaw` binary as a process for whole-system tests and benchmarks: embedded etcd on disk, real
// functions as processes, real clients over loopback. It is imported by tests only.
package harness

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

const module = "github.com/thawrun/thaw/"

// Build makes static binaries of packages (paths below the module, as "cmd/thaw") in a new folder, which is the caller's to remove.
func Build(packages ...string) (dir string, err error) {
	if dir, err = os.MkdirTemp("", "thaw-test-"); err != nil {
		return "", err
	}
	args := []string{"build", "-buildvcs=false", "-o", dir + "/"}
	for _, p := range packages {
		args = append(args, module+p)
	}
	build := exec.Command("go", args...)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return dir, nil
}

// Main is the body of a TestMain: it builds the packages, tells where they are, runs the tests and cleans up.
func Main(m *testing.M, bin *string, packages ...string) int {
	dir, err := Build(packages...)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	*bin = dir
	return m.Run()
}

// Thaw is a running `thaw dev`. Its methods fail the test that it belongs to.
type Thaw struct {
	Dir     string // data folder
	Ingress string // address
	API     string // address
	Client  *client.Client
	HTTP    *http.Client // dials the ingress, whatever the host; does not follow redirects

	t    testing.TB
	bin  string
	args []string
	*process
}

// process is what all views of one system share.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
	log    *lockedBuffer
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

// Start runs `thaw dev` from the folder bin on free ports with a data folder of its own; it is ended, with all functions, when
// the test ends, and it is an error if any of them is left.
func Start(t testing.TB, bin string, args ...string) *Thaw {
	t.Helper()
	th, err := Open(bin, t.TempDir(), args...)
	if err != nil {
		t.Fatal(err)
	}
	th.t = t
	t.Cleanup(func() {
		if err := th.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("log of thaw dev:\n%s", Tail(th.Log(), 6000))
		}
	})
	return th
}

// Open is Start for a system that several tests share: its owner calls Stop, each test uses its own view (For).
func Open(bin, dir string, args ...string) (*Thaw, error) {
	th := &Thaw{Dir: dir, bin: bin, args: args, process: &process{log: &lockedBuffer{}}}
	if err := th.launch("127.0.0.1:0", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	tr := &http.Transport{MaxIdleConnsPerHost: 2000, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", th.Ingress)
	}}
	th.HTTP = &http.Client{Transport: tr, Timeout: 60 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return th, nil
}

// For returns the same system for another test.
func (th *Thaw) For(t testing.TB) *Thaw {
	c := *th
	c.t = t
	return &c
}

// Log is what thaw dev has written to stderr so far.
func (th *Thaw) Log() string { return th.log.String() }

// PID is the process id of thaw dev.
func (th *Thaw) PID() int { return th.cmd.Process.Pid }

// Tail is the end of a text.
func Tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

func (th *Thaw) running() bool {
	select {
	case <-th.exited:
		return false
	default:
		return th.cmd != nil
	}
}

// Stop ends thaw dev as SIGTERM does. It is an error if that takes longer than 40 s or if a function is left behind.
func (th *Thaw) Stop() (err error) {
	th.HTTP.CloseIdleConnections()
	if th.running() {
		th.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-th.exited:
		case <-time.After(40 * time.Second):
			err = errors.New("thaw dev did not end within 40 s of SIGTERM")
			th.Kill()
		}
	}
	if left := ProcessesOf(th.Dir); len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("functions left behind: %v", left))
		for _, pid := range left {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return err
}

// Kill ends thaw dev as a crash does: functions are not told.
func (th *Thaw) Kill() {
	th.cmd.Process.Kill()
	<-th.exited
}

var readyLine = regexp.MustCompile(`^thaw dev ready listen=(\S+) api=(\S+)$`)

// Relaunch starts thaw dev again after Kill, on the same addresses.
func (th *Thaw) Relaunch() {
	th.t.Helper()
	if err := th.launch(th.Ingress, th.API); err != nil {
		th.t.Fatal(err)
	}
}

// launch starts the process and waits for its line.
func (th *Thaw) launch(listen, apiAddr string) error {
	cmd := exec.Command(filepath.Join(th.bin, "thaw"), append([]string{"dev", "--listen", listen, "--api", apiAddr, "--data", th.Dir}, th.args...)...)
	cmd.Stderr = th.log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
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
	go func() {
		<-read // Wait closes the pipe: all must have been read before
		cmd.Wait()
		close(exited)
	}()
	th.cmd, th.exited = cmd, exited
	fail := func(err error) error {
		th.Kill()
		return err
	}
	select {
	case line := <-lines:
		m := readyLine.FindStringSubmatch(line)
		if m == nil {
			return fail(fmt.Errorf("first line of thaw dev: %q", line))
		}
		th.Ingress, th.API = m[1], m[2]
	case <-exited:
		return fmt.Errorf("thaw dev ended:\n%s", th.Log())
	case <-time.After(30 * time.Second):
		return fail(fmt.Errorf("thaw dev not ready within 30 s:\n%s", th.Log()))
	}
	cfg, err := client.Discover("http://"+th.API, th.Dir, func(string) string { return "" })
	if err != nil {
		return fail(err)
	}
	if th.Client, err = client.New(cfg); err != nil {
		return fail(err)
	}
	return nil
}

// Verb runs a verb of the command line against this system and returns its exit code and output.
func (th *Thaw) Verb(stdin string, args ...string) (code int, stdout, stderr string) {
	th.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(th.bin, "thaw"), args...)
	cmd.Env = append(os.Environ(), "THAW_API=http://"+th.API, "THAW_DATA="+th.Dir, "THAW_TOKEN=")
	cmd.Stdin = strings.NewReader(stdin)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		th.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), o.String(), e.String()
}

// Apply sends the YAML of a Service and waits until it is ready. $BIN stands for the folder of the binaries.
func (th *Thaw) Apply(doc string) *api.Service {
	th.t.Helper()
	s, err := th.TryApply(doc)
	if err != nil {
		th.t.Fatal(err)
	}
	return s
}

// TryApply is Apply for what may fail.
func (th *Thaw) TryApply(doc string) (*api.Service, error) {
	data, name, err := th.JSON(doc)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, _, err := th.Client.Apply(ctx, api.Services, "default", name, data); err != nil {
		return nil, err
	}
	o, err := th.Client.WaitReady(ctx, api.Services, "default", name, client.WaitOptions{})
	if err != nil {
		return nil, err
	}
	return o.(*api.Service), nil
}

// JSON turns the YAML of an object into JSON, with $BIN replaced.
func (th *Thaw) JSON(doc string) (data []byte, name string, err error) {
	data, err = yaml.YAMLToJSON([]byte(strings.ReplaceAll(doc, "$BIN", th.bin)))
	if err != nil {
		return nil, "", err
	}
	var meta struct{ Metadata api.ObjectMeta }
	if err := json.Unmarshal(data, &meta); err != nil {
		return nil, "", err
	}
	return data, meta.Metadata.Name, nil
}

// CheckerService returns the YAML of a Service around examples/checker; annotations are "key: value" lines.
func CheckerService(name string, concurrency int, env map[string]string, annotations ...string) string {
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

// Annotations of a template, for CheckerService.
const (
	InitialZero = "autoscaling.knative.dev/initial-scale: 0"
	MinScale    = "autoscaling.knative.dev/min-scale: "
	MaxScale    = "autoscaling.knative.dev/max-scale: "
)

// Quick are autoscaler settings that let a test see zero: Knative's shortest window and its shortest grace.
const Quick = "stable-window: 6s\nscale-to-zero-grace-period: 6s\n"

// Answer is what came back.
type Answer struct {
	Status int
	Body   string
	Header http.Header
	Err    error
	Took   time.Duration
}

func (a Answer) String() string {
	if a.Err != nil {
		return a.Err.Error()
	}
	return fmt.Sprintf("%d %.200q (%s)", a.Status, a.Body, a.Header.Get("X-Thaw-Error"))
}

// Get calls host (NAME or TAG-NAME, the rest is added; as it is if it has a dot) and path; header has names and values in turn.
func (th *Thaw) Get(host, path string, header ...string) Answer {
	if !strings.Contains(host, ".") {
		host += ".default.localhost"
	}
	req, err := http.NewRequest("GET", "http://"+host+path, nil)
	if err != nil {
		return Answer{Err: err}
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	return th.Do(req)
}

// Do sends a request to the ingress and reads the whole answer. Status is there even if the body broke off (Err).
func (th *Thaw) Do(req *http.Request) Answer {
	begin := time.Now()
	resp, err := th.HTTP.Do(req)
	if err != nil {
		return Answer{Err: err, Took: time.Since(begin)}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return Answer{resp.StatusCode, string(b), resp.Header, err, time.Since(begin)}
}

// Load keeps n clients busy until stop is called, which returns how many answers there were and those that were not 200.
func (th *Thaw) Load(n int, host, path string) (stop func() (int, []Answer)) {
	var (
		total atomic.Int64
		mu    sync.Mutex
		bad   []Answer
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
				a := th.Get(host, path)
				total.Add(1)
				if a.Err != nil || a.Status != 200 {
					mu.Lock()
					bad = append(bad, a)
					mu.Unlock()
				}
			}
		})
	}
	return func() (int, []Answer) {
		close(end)
		wg.Wait()
		return int(total.Load()), bad
	}
}

// Count sends n requests (a multiple of 8) to host and returns how many each revision of the checker got.
func (th *Thaw) Count(n int, host string, header ...string) map[string]int {
	th.t.Helper()
	var mu sync.Mutex
	got := map[string]int{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range n / 8 {
				a := th.Get(host, "/", header...)
				var r struct{ Revision string }
				if a.Err != nil || a.Status != 200 || json.Unmarshal([]byte(a.Body), &r) != nil {
					th.t.Errorf("%s: %v", host, a)
					return
				}
				mu.Lock()
				got[r.Revision]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return got
}

// Split patches the traffic of a service (JSON targets, separated by commas) and waits until it is in force.
func (th *Thaw) Split(name, targets string) {
	th.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := th.Client.Patch(ctx, api.Services, "default", name, client.MergePatch, []byte(`{"spec":{"traffic":[`+targets+`]}}`)); err != nil {
		th.t.Fatal(err)
	}
	if _, err := th.Client.WaitReady(ctx, api.Services, "default", name, client.WaitOptions{}); err != nil {
		th.t.Fatal(err)
	}
}

// Scale asks how a revision scales; all zero if the autoscaler does not know it.
func (th *Thaw) Scale(revision string) (ready, starting, desired int, mode string) {
	th.t.Helper()
	s, err := th.Client.Scale(context.Background(), "default", revision)
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

// Eventually waits for a condition; the error names what did not come true.
func Eventually(t testing.TB, within time.Duration, what string, ok func() bool) {
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

// ProcessesOf finds the functions whose data folder is dir by the instance folder in their environment; none on systems without
// /proc.
func ProcessesOf(dir string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
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
