// Package soak lets a whole system serve for a while under everything that happens to one: load that rises and falls, revisions that
// replace each other, instances that come and go down to zero, streams of every protocol, and a router that is restarted again and again. Nothing
// may fail, and nothing may grow. `make soak` runs it for ten minutes, `go test` for a few seconds.
package soak

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"

	"github.com/thawrun/thaw/test/harness"
	"github.com/thawrun/thaw/test/protocols"
)

var (
	duration = flag.Duration("duration", 20*time.Second, "how long the load lasts")
	bin      string
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(harness.Main(m, &bin, "cmd/thaw", "examples/checker", "test/protocols/function"))
}

// The steady service: its slots decide what it can serve, not the processor, so that the load is the same share on every machine.
const (
	instances = 6 // at most
	slots     = 5 // of each
	work      = 100 * time.Millisecond
	capacity  = instances * slots * int(time.Second/work) // requests per second
)

func steady(version int) string {
	return harness.CheckerService("steady", slots, map[string]string{"VERSION": strconv.Itoa(version)}, harness.MinScale+"1", harness.MaxScale+strconv.Itoa(instances))
}

func protocolService(name, port string) string {
	return fmt.Sprintf(`apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: %s}
spec:
  template:
    metadata: {annotations: {autoscaling.knative.dev/max-scale: "1"}}
    spec:
      containers:
      - image: exec://$BIN/function
        ports: [{name: %s}]
        env: [{name: PROTOCOL, value: %s}]
`, name, port, name)
}

// failures collects what went wrong, with the time, and how much went right.
type failures struct {
	begin time.Time
	ok    atomic.Int64
	mu    sync.Mutex
	all   []string
}

func (f *failures) note(what string, err error) {
	if err == nil {
		f.ok.Add(1)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all = append(f.all, fmt.Sprintf("at %v: %s: %v", time.Since(f.begin).Round(time.Millisecond), what, err))
}

// every calls f each d until ctx ends.
func every(ctx context.Context, d time.Duration, f func(n int)) {
	tick := time.NewTicker(d)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-tick.C:
			f(n)
		case <-ctx.Done():
			return
		}
	}
}

func TestSoak(t *testing.T) {
	cfg := filepath.Join(t.TempDir(), "autoscaler.yaml")
	if err := os.WriteFile(cfg, []byte(harness.Quick), 0o600); err != nil {
		t.Fatal(err)
	}
	th := harness.Start(t, bin, "--autoscaler-config", cfg, "--frozen-for", "2s")
	th.Apply(steady(0))
	th.Apply(harness.CheckerService("sleeper", 1, nil, harness.InitialZero))
	th.Apply(protocolService("http", "http1"))
	th.Apply(protocolService("grpc", "h2c"))
	r := startRouter(t, th.Ingress)

	all := &failures{begin: time.Now()}
	ctx, stop := context.WithTimeout(t.Context(), *duration)
	defer stop()
	watch := &watcher{th: th, router: r}
	watch.look(t)
	var rollouts, restarts int
	var side sync.WaitGroup
	side.Go(func() { every(ctx, max(*duration/60, time.Second), func(int) { watch.look(t) }) })
	side.Go(func() {
		every(ctx, max(*duration/40, 4*time.Second), func(n int) {
			_, err := th.TryApply(steady(n))
			all.note("rollout", err)
			rollouts++
		})
	})
	side.Go(func() {
		every(ctx, max(*duration/40, 3*time.Second), func(int) {
			all.note("restart of the router", r.restart())
			restarts++
		})
	})
	side.Go(func() { // from zero, again and again
		every(ctx, 15*time.Second, func(int) { all.note("sleeper", good(th.Get("sleeper", "/"))) })
	})
	side.Go(func() { streams(ctx, th.Ingress, all) })

	res := load(ctx, t, r.addr, all)
	stop()
	side.Wait()
	r.stop()
	end := watch.settle(t)

	t.Log("\n" + watch.table() + fmt.Sprintf(`
duration       %v
requests       %d (%.0f/s; the slots take %d/s), latency p50 %v, p99 %v, max %v, of which %v are the function's
other calls    %d (cold starts of the sleeper, streams, rollouts, restarts)
failures       %d
rollouts       %d
router starts  %d
cold starts    %s
`, *duration, res.Requests, res.Rate, capacity, res.Latencies.P50.Round(time.Millisecond), res.Latencies.P99.Round(time.Millisecond), res.Latencies.Max.Round(time.Millisecond), work,
		all.ok.Load(), len(all.all), rollouts, restarts, watch.metric("faas_coldstarts_total")))
	for i, f := range all.all {
		if t.Errorf("%s", f); i == 20 {
			t.Errorf("and %d more", len(all.all)-i)
			break
		}
	}
	watch.judge(t, end)
	if rollouts == 0 || restarts == 0 {
		t.Errorf("%d rollouts, %d restarts: nothing was tried", rollouts, restarts)
	}
}

func good(a harness.Answer) error {
	if a.Err != nil {
		return a.Err
	}
	if a.Status != 200 {
		return fmt.Errorf("%v", a)
	}
	return nil
}

// load sends requests through the router, at half of what the slots take on average and between a tenth and nine tenths of it, six waves in all.
func load(ctx context.Context, t *testing.T, addr string, all *failures) *vegeta.Metrics {
	half := vegeta.Rate{Freq: capacity / 2, Per: time.Second}
	pace := vegeta.SinePacer{Period: *duration / 6, Mean: half, Amp: vegeta.Rate{Freq: capacity * 4 / 10, Per: time.Second}, StartAt: vegeta.Trough}
	tr := &http.Transport{MaxIdleConnsPerHost: 1000, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}}
	defer tr.CloseIdleConnections()
	attacker := vegeta.NewAttacker(vegeta.Client(&http.Client{Transport: tr, Timeout: 30 * time.Second}), vegeta.MaxWorkers(2000))
	targets := vegeta.NewStaticTargeter(
		vegeta.Target{Method: "GET", URL: fmt.Sprintf("http://steady.default.localhost/?sleep=%d", work.Milliseconds())},
		vegeta.Target{Method: "POST", URL: fmt.Sprintf("http://steady.default.localhost/?sleep=%d", work.Milliseconds()), Body: bytes.Repeat([]byte("x"), 20_000)})
	m := &vegeta.Metrics{}
	for r := range attacker.Attack(targets, pace, *duration, "soak") {
		m.Add(r)
		if r.Error != "" || r.Code != 200 {
			all.note("request", fmt.Errorf("%d %s %.100q", r.Code, r.Error, r.Body))
		}
	}
	m.Close()
	return m
}

// streams runs the cases of package protocols, one after another.
func streams(ctx context.Context, ingress string, all *failures) {
	for {
		for _, s := range []struct {
			host  string
			http2 bool
			cases []protocols.Case
		}{{"http", false, protocols.HTTPCases}, {"http", true, protocols.HTTPCases}, {"grpc", true, protocols.GRPCCases}} {
			for _, c := range s.cases {
				if ctx.Err() != nil {
					return
				}
				if c.H1 && s.http2 {
					continue
				}
				run, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
				all.note(c.Name, c.Run(run, protocols.Target{Addr: ingress, Host: s.host + ".default.localhost", HTTP2: s.http2}))
				cancel()
				select {
				case <-time.After(100 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		}
	}
}

// router is `thaw router` in front of the system; a new process takes over from the one before.
type router struct {
	addr, socket, to string
	mu               sync.Mutex
	cmd              *exec.Cmd
	left             sync.WaitGroup // processes that have been replaced
	once             sync.Once
}

func startRouter(t *testing.T, to string) *router {
	dir, err := os.MkdirTemp("", "soak") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &router{socket: filepath.Join(dir, "router"), to: to}
	if err := r.restart(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	return r
}

// stop ends the router, and with it the connections that it keeps.
func (r *router) stop() {
	r.once.Do(func() {
		r.cmd.Process.Signal(syscall.SIGTERM)
		r.cmd.Wait()
		r.left.Wait()
	})
}

// restart starts a process that takes the socket over, and returns when it serves.
func (r *router) restart() error {
	cmd := exec.Command(filepath.Join(bin, "thaw"), "router", "--listen", "127.0.0.1:0", "--static", "*="+r.to, "--handover", r.socket)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	_, addr, ok := strings.Cut(strings.TrimSpace(line), " listen=")
	if addr, _, _ = strings.Cut(addr, " "); err != nil || !ok || r.cmd != nil && addr != r.addr {
		cmd.Process.Kill()
		cmd.Wait()
		return fmt.Errorf("no router that took over: %q, %w", line, err)
	}
	// The same words as before: the socket is known by them.
	r.mu.Lock()
	before := r.cmd
	r.cmd, r.addr = cmd, addr
	r.mu.Unlock()
	if before != nil {
		r.left.Go(func() { before.Wait() })
	}
	return nil
}

func (r *router) pid() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cmd.Process.Pid
}

// sample is what the processes hold at one time.
type sample struct {
	at                   time.Duration
	rss, routerRSS       int // MiB
	goroutines           int
	places               int // that are kept ready for instances to come, as the node says
	placeFDs, fds        int // descriptors that belong to places (an instance that runs gives them up); all others
	routerFDs, functions int
}

type watcher struct {
	th     *harness.Thaw
	router *router
	begin  time.Time
	mu     sync.Mutex
	all    []sample
	text   string // of the last /metrics
}

// look keeps what the processes hold now.
func (w *watcher) look(t *testing.T) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, w.lookLocked(t))
}

func (w *watcher) lookLocked(t *testing.T) sample {
	if w.begin.IsZero() {
		w.begin = time.Now()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if b, err := w.th.Client.Raw(ctx, "GET", "/metrics", "", nil); err != nil {
		t.Errorf("metrics: %v", err)
	} else {
		w.text = string(b)
	}
	number := func(name string) int { f, _ := strconv.ParseFloat(w.metric(name), 64); return int(f) }
	router := w.router.pid()
	s := sample{at: time.Since(w.begin), rss: rss(w.th.PID()), routerRSS: rss(router), goroutines: number("go_goroutines"), places: number("thaw_instances_places"),
		functions: len(harness.ProcessesOf(w.th.Dir))}
	s.placeFDs, s.fds = fds(w.th.PID())
	routerPlaces, routerFDs := fds(router)
	s.routerFDs = routerPlaces + routerFDs
	return s
}

// metric is the sum of a metric's values over all its labels.
func (w *watcher) metric(name string) string {
	sum := 0.0
	for line := range strings.SplitSeq(w.text, "\n") {
		if rest, ok := strings.CutPrefix(line, name); ok && rest != "" && (rest[0] == ' ' || rest[0] == '{') {
			f, _ := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
			sum += f
		}
	}
	return strconv.FormatFloat(sum, 'f', -1, 64)
}

// settle waits until what belongs to the load is gone, and looks once more.
func (w *watcher) settle(t *testing.T) sample {
	w.th.HTTP.CloseIdleConnections()
	w.mu.Lock()
	defer w.mu.Unlock()
	first := w.all[0]
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(500 * time.Millisecond) {
		if s := w.lookLocked(t); len(s.left(first)) == 0 || time.Now().After(end) {
			w.all = append(w.all, s)
			return s
		}
	}
}

// spare is how many goroutines and descriptors more may be there at the end than at the start: instances are not as many as then.
const spare = 30

// left says what of s is too much, compared with the first look. Places are kept ready after steps up, within a bound of the node's, so
// their descriptors may be as many as the node says that it has places.
func (s sample) left(first sample) (what []string) {
	if s.goroutines > first.goroutines+spare {
		what = append(what, fmt.Sprintf("%d goroutines at the start, %d at the end", first.goroutines, s.goroutines))
	}
	if s.fds > first.fds+spare {
		what = append(what, fmt.Sprintf("%d descriptors besides those of places at the start, %d at the end", first.fds, s.fds))
	}
	if first.places == 0 || s.placeFDs*first.places > (first.placeFDs+spare)*s.places {
		what = append(what, fmt.Sprintf("%d descriptors of %d places at the start, %d of %d at the end", first.placeFDs, first.places, s.placeFDs, s.places))
	}
	return what
}

// The control of what TestSoak finds at its end: what is left behind is told from what a node keeps ready.
func TestLeft(t *testing.T) {
	first := sample{goroutines: 120, places: 35, placeFDs: 246, fds: 97}
	for _, c := range []struct {
		name string
		s    sample
		want int // complaints
	}{
		{"the same", first, 0},
		{"more places", sample{goroutines: 130, places: 70, placeFDs: 491, fds: 100}, 0},
		{"places whose descriptors stay open", sample{goroutines: 130, places: 35, placeFDs: 291, fds: 100}, 1},
		{"connections", sample{goroutines: 130, places: 35, placeFDs: 246, fds: 137}, 1},
		{"goroutines", sample{goroutines: 160, places: 35, placeFDs: 246, fds: 97}, 1},
	} {
		if got := c.s.left(first); len(got) != c.want {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}

func (w *watcher) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%8s %9s %11s %7s %10s %6s %10s %11s %9s\n", "time", "RSS MiB", "goroutines", "places", "their fds", "fds", "functions", "router MiB", "its fds")
	step := max(len(w.all)/20, 1)
	for i := 0; i < len(w.all); i++ {
		if s := w.all[i]; i%step == 0 || i == len(w.all)-1 {
			fmt.Fprintf(&b, "%8v %9d %11d %7d %10d %6d %10d %11d %9d\n", s.at.Round(time.Second), s.rss, s.goroutines, s.places, s.placeFDs, s.fds, s.functions, s.routerRSS, s.routerFDs)
		}
	}
	return b.String()
}

// judge compares the second quarter with the last one: before that the system warms up.
func (w *watcher) judge(t *testing.T, end sample) {
	middle := func(part []sample) int {
		var all []int
		for _, s := range part {
			all = append(all, s.rss)
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	n := len(w.all) - 1 // the last one is without load
	early, late := middle(w.all[n/4:n/2]), middle(w.all[n*3/4:n])
	if late > early+24 && !harness.RaceBinaries { // the race detector remembers what was accessed
		t.Errorf("resident memory grew from %d to %d MiB", early, late)
	}
	for _, what := range end.left(w.all[0]) {
		t.Error(what)
	}
	most, least := 0, 1<<30
	for _, s := range w.all[:n] {
		most, least = max(most, s.functions), min(least, s.functions)
	}
	if most < least+3 {
		t.Errorf("from %d to %d functions: nothing was scaled", least, most)
	}
}

func rss(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	n, _ := strconv.Atoi(f[1])
	return n * os.Getpagesize() >> 20
}

// fds counts what a process has open: what belongs to a place for an instance (its namespaces, cgroup, output files), and the rest.
func fds(pid int) (places, rest int) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	all, _ := os.ReadDir(dir)
	for _, fd := range all {
		to, _ := os.Readlink(filepath.Join(dir, fd.Name()))
		kind, _, _ := strings.Cut(to, ":[")
		switch kind {
		case "mnt", "uts", "ipc", "user", "pid", "cgroup":
			places++
			continue
		}
		if strings.Contains(to, "/instances/") || strings.Contains(to, "/cgroup/") && strings.Contains(to, "/thaw-") {
			places++
		} else {
			rest++
		}
	}
	return places, rest
}
