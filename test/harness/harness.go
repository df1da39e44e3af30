// Package harness runs the real `thaw` binary as a process for whole-system tests and benchmarks: embedded etcd on disk, real
// functions as processes, real clients over loopback. It is imported by tests only.
package harness

import (
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
	"slices"
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
func Build(packages ...string) (dir string, err error) { return build(nil, packages...) }

// Change replaces a text, which must be there exactly once, in a file of the module, or of Go's own library, which is named by its whole path.
type Change struct{ File, Old, New string }

// BuildChanged is Build from other sources than those on disk, for negative controls: with a mechanism switched off, the test that is about it
// must fail.
func BuildChanged(changes []Change, packages ...string) (dir string, err error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(out)))
	tmp, err := os.MkdirTemp("", "thaw-test-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for _, c := range changes {
		on := filepath.FromSlash(c.File)
		if !filepath.IsAbs(on) {
			on = filepath.Join(root, on)
		}
		instead, again := overlay.Replace[on]
		if !again {
			instead = filepath.Join(tmp, fmt.Sprintf("%d.go", len(overlay.Replace)))
			overlay.Replace[on] = instead
		}
		from := on
		if again {
			from = instead
		}
		text, err := os.ReadFile(from)
		if err != nil {
			return "", err
		}
		if n := strings.Count(string(text), c.Old); n != 1 {
			return "", fmt.Errorf("%s has %d times %q, want it once", c.File, n, c.Old)
		}
		if err := os.WriteFile(instead, []byte(strings.Replace(string(text), c.Old, c.New, 1)), 0o600); err != nil {
			return "", err
		}
	}
	file := filepath.Join(tmp, "overlay.json")
	text, err := json.Marshal(overlay)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return "", err
	}
	return build([]string{"-overlay", file}, packages...)
}

// RaceBinaries makes Build use the race detector for the commands under test (THAW_TEST_RACE=1, see make race). Functions stay without it: static,
// as a sandbox without a C library needs them.
var RaceBinaries = os.Getenv("THAW_TEST_RACE") != ""

func build(flags []string, packages ...string) (dir string, err error) {
	if dir, err = os.MkdirTemp("", "thaw-test-"); err != nil {
		return "", err
	}
	var raced, static []string
	for _, p := range packages {
		if RaceBinaries && strings.HasPrefix(p, "cmd/") {
			raced = append(raced, module+p)
		} else {
			static = append(static, module+p)
		}
	}
	for _, b := range []struct {
		packages []string
		cgo      string
		flags    []string
	}{{static, "CGO_ENABLED=0", nil}, {raced, "CGO_ENABLED=1", []string{"-race"}}} {
		if len(b.packages) == 0 {
			continue
		}
		cmd := exec.Command("go", slices.Concat([]string{"build", "-buildvcs=false", "-o", dir + "/"}, flags, b.flags, b.packages)...)
		cmd.Env = append(os.Environ(), b.cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			os.RemoveAll(dir)
			return "", fmt.Errorf("go build: %w\n%s", err, out)
		}
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

// process is what all views of one system share; it is another one after Relaunch.
type process struct {
	*Process
	before string // logs of the processes before this one
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
	th := &Thaw{Dir: dir, bin: bin, args: args, process: &process{}}
	if err := th.launch("127.0.0.1:0", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	th.HTTP = th.dialer()
	return th, nil
}

// Over is a view of a system whose processes are the caller's: what a router and an API server at these addresses answer. dir is control's data folder.
func Over(t testing.TB, bin, ingress, apiAddr, dir string) *Thaw {
	t.Helper()
	th := &Thaw{Dir: dir, Ingress: ingress, API: apiAddr, t: t, bin: bin}
	th.HTTP = th.dialer()
	t.Cleanup(th.HTTP.CloseIdleConnections)
	cfg, err := client.Discover("http://"+apiAddr, dir, func(string) string { return "" })
	if err == nil {
		th.Client, err = client.New(cfg)
	}
	if err != nil {
		t.Fatal(err)
	}
	return th
}

// dialer is a client of the ingress.
func (th *Thaw) dialer() *http.Client {
	tr := &http.Transport{MaxIdleConnsPerHost: 2000, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", th.Ingress)
	}}
	return &http.Client{Transport: tr, Timeout: 60 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// For returns the same system for another test.
func (th *Thaw) For(t testing.TB) *Thaw {
	c := *th
	c.t = t
	return &c
}

// Log is what thaw dev has written to stderr so far, before a Relaunch too.
func (th *Thaw) Log() string { return th.before + th.Process.Log() }

// Tail is the end of a text.
func Tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// Stop ends thaw dev as SIGTERM does. It is an error if that takes longer than 40 s or if a function is left behind.
func (th *Thaw) Stop() (err error) {
	th.HTTP.CloseIdleConnections()
	err = th.Process.Stop()
	if left := ProcessesOf(th.Dir); len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("functions left behind: %v", left))
		for _, pid := range left {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return err
}

// Relaunch starts thaw dev again after Kill, on the same addresses.
func (th *Thaw) Relaunch() {
	th.t.Helper()
	th.before = th.Log()
	if err := th.launch(th.Ingress, th.API); err != nil {
		th.t.Fatal(err)
	}
}

// launch starts the process and waits for its line.
func (th *Thaw) launch(listen, apiAddr string) error {
	p, err := Run(th.bin, append([]string{"dev", "--listen", listen, "--api", apiAddr, "--data", th.Dir}, th.args...)...)
	if err != nil {
		return err
	}
	th.process.Process = p
	th.Ingress, th.API = p.Ready["listen"], p.Ready["api"]
	fail := func(err error) error {
		th.Kill()
		return err
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

// Apply sends a Service, again when the server wants that: where many test at the same time a disk may take seconds for etcd's log.
func Apply(ctx context.Context, c *client.Client, name string, doc []byte) error {
	return client.Patiently(ctx, func() error { _, _, err := c.Apply(ctx, api.Services, "default", name, doc); return err })
}

// TryApply is Apply for what may fail.
func (th *Thaw) TryApply(doc string) (*api.Service, error) {
	data, name, err := th.JSON(doc)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := Apply(ctx, th.Client, name, data); err != nil {
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
	if err := client.Patiently(ctx, func() error {
		_, err := th.Client.Patch(ctx, api.Services, "default", name, client.MergePatch, []byte(`{"spec":{"traffic":[`+targets+`]}}`))
		return err
	}); err != nil {
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

// ProcessesOf finds the functions whose data folder is dir, by the instance folder in their environment or by the data folder's
// name in their control group; none on systems without /proc.
func ProcessesOf(dir string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	node, _ := os.ReadFile(filepath.Join(dir, "node-id"))
	group := append([]byte("/thaw-"), bytes.TrimSpace(node)...)
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
		if err != nil || !bytes.Contains(env, []byte("THAW_INSTANCE=")) {
			continue
		}
		groups, _ := os.ReadFile("/proc/" + e.Name() + "/cgroup")
		if bytes.Contains(env, []byte(dir+"/")) || len(node) > 0 && bytes.Contains(groups, group) {
			pids = append(pids, pid)
		}
	}
	return pids
}
