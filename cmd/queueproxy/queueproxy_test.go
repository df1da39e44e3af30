package main

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
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The test binary is the sidecar when it is told so: real processes, and with -race the sidecar has the race detector too.
func TestMain(m *testing.M) {
	if os.Getenv("BE_QUEUEPROXY") == "1" {
		main()
		return
	}
	os.Exit(m.Run())
}

// process is a running sidecar.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	addr   map[string]string // listen, admin, stats, metrics
	ended  chan struct{}
	err    error // valid after ended
	stderr bytes.Buffer
}

// run starts a sidecar and waits until it is ready.
func run(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(os.Args[0], args...), addr: map[string]string{}, ended: make(chan struct{})}
	p.cmd.Env = append(append(os.Environ(), "BE_QUEUEPROXY=1", "GORACE=atexit_sleep_ms=0"), env...) // the race detector would wait a second at each exit
	p.cmd.Stderr = &p.stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	go func() { p.err = p.cmd.Wait(); close(p.ended) }()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("sidecar's log:\n%s", p.stderr.String())
		}
		if strings.Contains(p.stderr.String(), "DATA RACE") {
			t.Error("data race in the sidecar")
		}
	})
	if err != nil {
		<-p.ended
		t.Fatalf("no ready line: %v: %s", p.err, p.stderr.String())
	}
	for _, f := range strings.Fields(line) {
		if k, v, ok := strings.Cut(f, "="); ok {
			p.addr[k] = strings.Replace(v, "[::]", "127.0.0.1", 1)
		}
	}
	return p
}

func (p *process) url(path string) string { return "http://" + p.addr["listen"] + path }

// metric returns a sample of the metrics port.
func (p *process) metric(name, label string) float64 {
	_, body, err := get(http.DefaultClient, "http://"+p.addr["metrics"]+"/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + name + `\{[^}]*` + label + `[^}]*\} (.+)$`).FindStringSubmatch(body)
	if m == nil {
		p.t.Fatalf("no %s with %s in:\n%s", name, label, body)
	}
	v, _ := strconv.ParseFloat(m[1], 64)
	return v
}

// until polls a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func (p *process) term() { p.cmd.Process.Signal(syscall.SIGTERM) }

// exit waits for the end and wants it clean.
func (p *process) exit() {
	p.t.Helper()
	select {
	case <-p.ended:
		if p.err != nil {
			p.t.Errorf("sidecar ended with %v", p.err)
		}
	case <-time.After(20 * time.Second):
		p.t.Fatal("sidecar does not end")
	}
}

func get(c *http.Client, url string) (*http.Response, string, error) {
	res, err := c.Get(url)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res, string(b), err
}

// clients is a client with as many connections as it likes.
func clients(t *testing.T) *http.Client {
	tr := &http.Transport{MaxIdleConnsPerHost: 1000}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 30 * time.Second}
}

// function is the server behind the sidecar. It watches its own concurrency, as a careful function would.
type function struct {
	*httptest.Server
	inside, most atomic.Int32
	calls        atomic.Int32
	work         func(w http.ResponseWriter, r *http.Request)
}

func serve(t *testing.T, work func(w http.ResponseWriter, r *http.Request)) *function {
	f := &function{work: work}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := f.inside.Add(1)
		defer f.inside.Add(-1)
		for m := f.most.Load(); n > m && !f.most.CompareAndSwap(m, n); m = f.most.Load() {
		}
		f.calls.Add(1)
		f.work(w, r)
	}))
	t.Cleanup(f.Close)
	return f
}

func (f *function) addr() string { return f.Listener.Addr().String() }

// Mirrors Knative's conformance test single_threaded_test.go: with containerConcurrency 1 the function never sees two requests at
// once, from five clients.
func TestSingleThreaded(t *testing.T) {
	f := serve(t, func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(time.Millisecond)
		io.WriteString(w, "one")
	})
	p := run(t, []string{"CONTAINER_CONCURRENCY=1", "USER_PORT=" + port(f.addr()), "QUEUE_SERVING_PORT=" + freePort(t)}, "--admin", "127.0.0.1:0", "--stats", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
	limit(t, f, p, 5, 40, 1)
}

// The same for higher limits, and more clients than can wait without being many.
func TestLimit(t *testing.T) {
	f := serve(t, func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(time.Millisecond)
		io.Copy(w, r.Body)
		io.WriteString(w, "one")
	})
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--concurrency", "4", "--metrics", "127.0.0.1:0")
	limit(t, f, p, 32, 40, 4)
}

func limit(t *testing.T, f *function, p *process, n, each, max int) {
	t.Helper()
	c := clients(t)
	var wg sync.WaitGroup
	share := make([]time.Duration, n)
	for i := range n {
		wg.Go(func() {
			for range each {
				began := time.Now()
				res, body, err := get(c, p.url("/"))
				if err != nil || res.StatusCode != 200 || body != "one" {
					t.Errorf("%v %v %q", res, err, body)
					return
				}
				share[i] += time.Since(began)
			}
		})
	}
	wg.Wait()
	if m := f.most.Load(); int(m) > max {
		t.Errorf("%d at once inside the function, the limit is %d", m, max)
	}
	if got := f.calls.Load(); int(got) != n*each {
		t.Errorf("%d calls for %d requests", got, n*each)
	}
	if slowest, fastest := slices.Max(share), slices.Min(share); slowest > 2*fastest {
		t.Errorf("of clients in a closed loop one waited %v in all, another %v: not in order of arrival", slowest, fastest)
	}
	if v := p.metric("thaw_queueproxy_requests_total", `way="direct"`); int(v) != n*each {
		t.Errorf("%v requests counted", v)
	}
	if v := p.metric("thaw_queueproxy_inside", `state="running"`); v != 0 {
		t.Errorf("%v inside at the end", v)
	}
}

// Requests run in the order they came; those over the bound are refused at once and told when to come again, and not one of them reaches the
// function.
func TestQueue(t *testing.T) {
	var mu sync.Mutex
	var order []string
	release := make(chan struct{})
	f := serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		order = append(order, r.URL.Path)
		mu.Unlock()
		<-release
	})
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--concurrency", "1", "--metrics", "127.0.0.1:0")
	c := clients(t)
	var wg sync.WaitGroup
	var want []string
	for i := range 11 { // 1 runs, 10 wait: the default
		path := fmt.Sprintf("/%d", i)
		want = append(want, path)
		wg.Go(func() {
			if res, _, err := get(c, p.url(path)); err != nil || res.StatusCode != 200 {
				t.Errorf("%s: %v %v", path, res, err)
			}
		})
		state := `state="running"`
		if i > 0 {
			state = `state="waiting"`
		}
		until(t, path+" is inside", func() bool { return p.metric("thaw_queueproxy_inside", state) == float64(max(1, i)) })
	}
	for range 20 {
		began := time.Now()
		res, body, err := get(c, p.url("/over"))
		if err != nil || res.StatusCode != 503 || res.Header.Get("Retry-After") != "1" || res.Header.Get("X-Thaw-Error") != "queue_full" || body != "pending request queue full\n" {
			t.Fatalf("%v %v %q", res, err, body)
		}
		if d := time.Since(began); d > time.Second {
			t.Errorf("refused after %v", d)
		}
	}
	close(release)
	wg.Wait()
	if !slices.Equal(order, want) {
		t.Errorf("order %v", order)
	}
	if v := p.metric("thaw_queueproxy_refused_total", `reason="queue_full"`); v != 20 {
		t.Errorf("%v refusals counted", v)
	}
}

// A client that leaves while it waits makes room within 100 ms (and a little), and its request never runs.
func TestClientLeavesQueue(t *testing.T) {
	release := make(chan struct{})
	f := serve(t, func(w http.ResponseWriter, r *http.Request) { <-release })
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--concurrency", "1", "--queue", "1", "--metrics", "127.0.0.1:0")
	c := clients(t)
	var wg sync.WaitGroup
	wg.Go(func() { get(c, p.url("/first")) })
	until(t, "the first runs", func() bool { return f.inside.Load() == 1 })
	ctx, leave := context.WithCancel(t.Context())
	wg.Go(func() {
		req, _ := http.NewRequestWithContext(ctx, "GET", p.url("/second"), nil)
		if _, err := c.Do(req); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	until(t, "the second waits", func() bool { return p.metric("thaw_queueproxy_inside", `state="waiting"`) == 1 })
	leave()
	left := time.Now()
	until(t, "its place is free", func() bool { return p.metric("thaw_queueproxy_inside", `state="waiting"`) == 0 })
	if d := time.Since(left); d > time.Second { // 100 ms, on a machine that has nothing else to do
		t.Errorf("its place was free after %v", d)
	}
	close(release)
	wg.Wait()
	if f.calls.Load() != 1 || p.metric("thaw_queueproxy_refused_total", `reason="client_gone"`) != 1 {
		t.Errorf("%d calls", f.calls.Load())
	}
}

// SIGTERM under load loses nothing: every request that the function saw was answered in full. The control shows that this load does lose
// requests when the sidecar is simply killed.
func TestDrainUnderLoad(t *testing.T) {
	for _, c := range []struct {
		name   string
		signal syscall.Signal
		loses  bool
	}{{"SIGTERM", syscall.SIGTERM, false}, {"control: SIGKILL", syscall.SIGKILL, true}} {
		t.Run(c.name, func(t *testing.T) {
			var mu sync.Mutex
			open := map[string]bool{} // seen by the function, not yet answered to the client
			f := serve(t, func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				open[r.URL.Path] = true
				mu.Unlock()
				time.Sleep(5 * time.Millisecond)
				io.WriteString(w, "begin ")
				w.(http.Flusher).Flush() // a streamed answer
				time.Sleep(5 * time.Millisecond)
				io.WriteString(w, "end")
			})
			p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--concurrency", "8", "--queue", "100")
			var wg sync.WaitGroup
			var answered atomic.Int32
			stop := make(chan struct{})
			for i := range 24 {
				// A connection for each request: on a kept one the client repeats by itself what came back unanswered.
				cl := &http.Client{Transport: &http.Transport{DisableKeepAlives: i%2 == 0}, Timeout: 20 * time.Second}
				wg.Go(func() {
					defer cl.CloseIdleConnections()
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						path := fmt.Sprintf("/%d/%d", i, n)
						res, body, err := get(cl, p.url(path))
						if err == nil && res.StatusCode == 200 && body == "begin end" {
							answered.Add(1)
							mu.Lock()
							delete(open, path)
							mu.Unlock()
						} else {
							select { // refused from now on, in whatever way
							case <-p.ended:
								return
							case <-time.After(time.Millisecond):
							}
						}
					}
				})
			}
			until(t, "the load runs", func() bool { return answered.Load() > 200 })
			p.cmd.Process.Signal(c.signal)
			select {
			case <-p.ended:
			case <-time.After(20 * time.Second):
				t.Fatal("the sidecar does not end")
			}
			close(stop)
			wg.Wait()
			mu.Lock()
			defer mu.Unlock()
			if lost := len(open); (lost > 0) != c.loses {
				t.Errorf("%d requests lost of %d answered", lost, answered.Load())
			}
			if !c.loses && p.err != nil {
				t.Errorf("ended with %v", p.err)
			}
		})
	}
}

// The drain waits for the last request, however long it takes, and nothing longer; new connections are not accepted meanwhile.
func TestDrainEndsWithLastRequest(t *testing.T) {
	release := make(chan struct{})
	f := serve(t, func(w http.ResponseWriter, r *http.Request) { <-release })
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--concurrency", "1", "--admin", "127.0.0.1:0", "--drain-cancel", "10s")
	c := clients(t)
	var wg sync.WaitGroup
	for range 2 { // one runs, one waits
		wg.Go(func() {
			if res, _, err := get(c, p.url("/")); err != nil || res.StatusCode != 200 || !res.Close {
				t.Errorf("%v %v", res, err)
			}
		})
	}
	until(t, "one runs", func() bool { return f.inside.Load() == 1 })

	hook := make(chan string, 1)
	go func() {
		_, body, err := get(c, "http://"+p.addr["admin"]+"/wait-for-drain")
		hook <- fmt.Sprint(body, err)
	}()
	until(t, "not ready", func() bool {
		res, _, err := get(c, "http://"+p.addr["admin"]+"/healthz")
		return err == nil && res.StatusCode == 503
	})
	p.term()
	until(t, "nothing is accepted", func() bool {
		nc, err := net.Dial("tcp", p.addr["listen"])
		if err == nil {
			nc.Close()
		}
		return err != nil
	})
	select {
	case <-p.ended:
		t.Fatal("ended with a request inside")
	case h := <-hook:
		t.Fatalf("the hook answered %q with a request inside", h)
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	began := time.Now()
	p.exit()
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("ended %v after the last request", d)
	}
	wg.Wait()
	if h := <-hook; h != "drained\n<nil>" {
		t.Errorf("the hook answered %q", h)
	}
}

// A hook that no SIGTERM follows is a restart of the function alone: the drain is taken back.
func TestHookAlone(t *testing.T) {
	f := serve(t, func(w http.ResponseWriter, r *http.Request) {})
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--admin", "127.0.0.1:0", "--drain-cancel", "50ms", "--readiness-probe", `{"periodSeconds":1}`)
	c := clients(t)
	if _, body, err := get(c, "http://"+p.addr["admin"]+"/wait-for-drain"); err != nil || body != "not drained: no SIGTERM within 50ms\n" {
		t.Fatalf("%q %v", body, err)
	}
	if res, _, err := get(c, p.url("/")); err != nil || res.StatusCode != 200 || res.Close {
		t.Errorf("%v %v", res, err)
	}
	p.term()
	p.exit()
}

// With --drain-quiet requests are served after SIGTERM until they stop coming.
func TestDrainQuiet(t *testing.T) {
	f := serve(t, func(w http.ResponseWriter, r *http.Request) {})
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--drain-quiet", "300ms")
	c := clients(t)
	p.term()
	began := time.Now()
	for time.Since(began) < 600*time.Millisecond {
		if res, _, err := get(c, p.url("/")); err != nil || res.StatusCode != 200 {
			t.Fatalf("%v after SIGTERM: %v %v", time.Since(began), res, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	p.exit()
}

// What is left after --drain-timeout is cut, and the exit code says so.
func TestDrainTimeout(t *testing.T) {
	release := make(chan struct{})
	f := serve(t, func(w http.ResponseWriter, r *http.Request) { <-release })
	defer close(release)
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--drain-timeout", "100ms")
	go get(clients(t), p.url("/"))
	until(t, "it runs", func() bool { return f.inside.Load() == 1 })
	p.term()
	<-p.ended
	if p.err == nil || !strings.Contains(p.stderr.String(), "the drain took longer than 100ms") {
		t.Errorf("%v: %s", p.err, p.stderr.String())
	}
}

// Probes as Knative's: see also queueproxy.TestSidecarProbes for the table.
func TestProbes(t *testing.T) {
	fd, addr := reserve(t)
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", addr, "--readiness-probe", `{"httpGet":{"path":"/ready"},"periodSeconds":1}`)
	ask := func() (int, string) {
		req, _ := http.NewRequest("GET", p.url("/any/path"), nil)
		req.Header.Set("User-Agent", "kube-probe/1.32")
		req.Header.Set("K-Network-Probe", "queue")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	if code, body := ask(); code != 503 || !strings.Contains(body, "nobody listens") {
		t.Errorf("%d %q", code, body)
	}
	var warm atomic.Bool
	listen(t, fd, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ready" || !warm.Load() {
			http.Error(w, "warming up", 500)
		}
	})
	if code, body := ask(); code != 503 || !strings.Contains(body, "warming up") {
		t.Errorf("%d %q", code, body)
	}
	warm.Store(true)
	if code, body := ask(); code != 200 || body != "queue" {
		t.Errorf("%d %q", code, body)
	}
}

// Without a period the probe waits for the function: the answer comes when the port opens, not at the next try of whoever asks.
func TestProbeWaits(t *testing.T) {
	fd, addr := reserve(t)
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", addr, "--readiness-probe", `{}`)
	req, _ := http.NewRequest("GET", p.url("/"), nil)
	req.Header.Set("User-Agent", "Knative-Activator-Probe")
	req.Header.Set("K-Network-Probe", "queue")
	answer := make(chan int, 1)
	go func() {
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			answer <- -1
			return
		}
		res.Body.Close()
		answer <- res.StatusCode
	}()
	select {
	case code := <-answer:
		t.Fatalf("answered %d with nobody listening", code)
	case <-time.After(100 * time.Millisecond):
	}
	listen(t, fd, func(http.ResponseWriter, *http.Request) {})
	if code := <-answer; code != 200 {
		t.Errorf("%d", code)
	}
}

// Mirrors revision_timeout_test.go: in time, silent, and begun but not ended. The last is a broken answer and not a short one.
func TestRevisionTimeout(t *testing.T) {
	f := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/silent":
			<-r.Context().Done()
		case "/begun":
			io.WriteString(w, "begun")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	})
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--timeout", "300ms")
	c := clients(t)
	if res, _, err := get(c, p.url("/")); err != nil || res.StatusCode != 200 {
		t.Errorf("in time: %v %v", res, err)
	}
	if res, body, err := get(c, p.url("/silent")); err != nil || res.StatusCode != 504 || res.Header.Get("X-Thaw-Error") != "timeout" {
		t.Errorf("silent: %v %q %v", res, body, err)
	}
	if res, body, err := get(c, p.url("/begun")); err == nil || res == nil || res.StatusCode != 200 || body != "begun" {
		t.Errorf("begun: %v %q %v", res, body, err)
	}
}

// What the function sees and what it does not.
func TestHeaders(t *testing.T) {
	f := serve(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "host", r.Host)
		for k, v := range r.Header {
			fmt.Fprintln(w, strings.ToLower(k), v)
		}
	})
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--stats", "127.0.0.1:0")
	req, _ := http.NewRequest("GET", p.url("/"), nil)
	for k, v := range map[string]string{"K-Original-Host": "www.example.org", "Knative-Serving-Revision": "r", "Knative-Serving-Namespace": "n",
		"K-Proxy-Request": "activator", "K-Network-Probe": "queue", "X-Forwarded-For": "1.2.3.4, ::1", "X-Forwarded-Proto": "https", "Cookie": `a="b"; c=d`, "X-Own": "kept"} {
		req.Header.Set(k, v)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	for _, want := range []string{"host www.example.org\n", `forwarded [for=1.2.3.4;proto=https, for="[::1]"]`, "x-own [kept]", `cookie [a="b"; c=d]`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("missing: %s", want)
		}
	}
	for _, leak := range []string{"knative-", "k-"} {
		if strings.Contains(string(b), "\n"+leak) {
			t.Errorf("leaked: %s…", leak)
		}
	}
	if t.Failed() {
		t.Logf("%s", b)
	}
}

// Reports hold what was inside, with the part that an activator counts too.
func TestStats(t *testing.T) {
	release := make(chan struct{})
	f := serve(t, func(w http.ResponseWriter, r *http.Request) { <-release })
	p := run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--concurrency", "2", "--stats", "127.0.0.1:0",
		"--namespace", "default", "--revision", "hello-00001", "--instance", "i-1")
	c := clients(t)
	var wg sync.WaitGroup
	for i := range 3 { // two run, one waits: all are inside
		wg.Go(func() {
			req, _ := http.NewRequest("GET", p.url("/"), nil)
			if i == 0 {
				req.Header.Set("K-Proxy-Request", "activator")
			}
			if res, err := c.Do(req); err != nil || res.StatusCode != 200 {
				t.Error(res, err)
			}
		})
	}
	defer wg.Wait()
	defer close(release)
	var s stat
	requests := map[time.Time][2]float64{}
	until(t, "a whole second with three inside is reported", func() bool {
		_, body, err := get(c, "http://"+p.addr["stats"]+"/stats")
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(body), &s); err != nil {
			t.Fatal(err)
		}
		requests[s.Time] = [2]float64{s.Requests, s.ProxiedRequests}
		return s.Concurrency == 3
	})
	if s.ProxiedConcurrency != 1 || s.Running != 2 || s.Waiting != 1 || s.Draining || s.Instance != "i-1" || s.Revision != "hello-00001" || s.Namespace != "default" || s.Uptime <= 0 {
		t.Errorf("%+v", s)
	}
	var all, proxied float64
	for _, r := range requests {
		all, proxied = all+r[0], proxied+r[1]
	}
	if all != 3 || proxied != 1 {
		t.Errorf("%v requests reported, %v of them proxied", all, proxied)
	}
	if _, body, _ := get(c, "http://"+p.addr["stats"]+"/metrics"); !strings.Contains(body, `thaw_queueproxy_concurrency_average{namespace="default",revision="hello-00001",instance="i-1"} 3`) {
		t.Errorf("%s", body)
	}
}

// Standing alone it opens the one port it was told.
func TestOpensOnlyWhatItIsTold(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	f := serve(t, func(http.ResponseWriter, *http.Request) {})
	p := run(t, []string{"CONTAINER_CONCURRENCY=1", "USER_PORT=1"}, "--listen", "127.0.0.1:0", "--upstream", f.addr())
	if n := listening(t, p.cmd.Process.Pid); n != 1 {
		t.Errorf("%d ports open", n)
	}
	p = run(t, nil, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--stats", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	if n := listening(t, p.cmd.Process.Pid); n != 4 {
		t.Errorf("%d ports open, want 4", n)
	}
}

func TestCannotOpen(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, flag := range []string{"--listen", "--admin"} {
		args := []string{"--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:1", flag, ln.Addr().String()}
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(os.Environ(), "BE_QUEUEPROXY=1")
		out, err := cmd.CombinedOutput()
		var ee *exec.ExitError
		if !errors.As(err, &ee) || ee.ExitCode() != 1 || !strings.Contains(string(out), "address already in use") {
			t.Errorf("%s: %v: %s", flag, err, out)
		}
	}
}

// The real binary, idle after its first requests, stays below 10 MiB.
func TestIdleMemory(t *testing.T) {
	if testing.Short() || runtime.GOOS != "linux" {
		t.Skip("builds the binary and reads /proc")
	}
	bin := filepath.Join(t.TempDir(), "queueproxy")
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f := serve(t, func(http.ResponseWriter, *http.Request) {})
	cmd := exec.Command(bin, "--listen", "127.0.0.1:0", "--upstream", f.addr(), "--concurrency", "10", "--admin", "127.0.0.1:0", "--stats", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--readiness-probe", "{}")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	addr := strings.TrimPrefix(strings.Fields(line)[2], "listen=")
	rss := func() int {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(b)
		n, _ := strconv.Atoi(string(m[1]))
		return n
	}
	fresh := rss()
	for range 20 {
		if res, _, err := get(http.DefaultClient, "http://"+addr+"/"); err != nil || res.StatusCode != 200 {
			t.Fatal(res, err)
		}
	}
	used := rss()
	st, _ := os.Stat(bin)
	t.Logf("resident: %d KiB fresh, %d KiB after 20 requests; binary %d KiB", fresh, used, st.Size()>>10)
	if used > 10<<10 {
		t.Errorf("%d KiB resident, the bound is 10 MiB", used)
	}
}

func port(addr string) string {
	_, p, _ := net.SplitHostPort(addr)
	return p
}

// freePort is one that was free a moment ago; where the program takes port 0, that is better.
func freePort(t *testing.T) string {
	ln, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return port(ln.Addr().String())
}

// reserve binds an address on which nobody listens until listen is called.
func reserve(t *testing.T) (fd int, addr string) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	syscall.CloseOnExec(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fd, fmt.Sprintf("127.0.0.1:%d", sa.(*syscall.SockaddrInet4).Port)
}

func listen(t *testing.T, fd int, h http.HandlerFunc) {
	if err := syscall.Listen(fd, 128); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "listener")
	defer file.Close()
	ln, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.Listener.Close()
	s.Listener = ln
	s.Start()
	t.Cleanup(s.Close)
}

// listening counts the TCP sockets that a process listens on.
func listening(t *testing.T, pid int) (n int) {
	inodes := map[string]bool{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatal(err, fds)
	}
	for _, fd := range fds {
		if l, err := os.Readlink(fd); err == nil && strings.HasPrefix(l, "socket:[") {
			inodes[strings.Trim(l, "socket:[]")] = true
		}
	}
	for _, file := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, file))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" && inodes[f[9]] {
				n++
			}
		}
	}
	return n
}
