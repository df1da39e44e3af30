// Command limiter measures the queue-proxy's limit over real sockets: that it is never passed, how fair and how fast the queue moves, what 10,000
// held requests cost and how soon they are served. The queue-proxy is a process of its own; haproxy, where it is installed, stands beside it.
// Figures that miss their target are marked, and the exit code is 1. `make bench-limiter` runs it.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
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
	"time"

	"github.com/valyala/fasthttp"
)

var (
	seconds = flag.Duration("time", 3*time.Second, "length of each closed loop; 0 = none, only held requests")
	rounds  = flag.Int("rounds", 3, "alternations of queue-proxy and haproxy at each limit; the best of each counts")
	held    = flag.Int("held", 10_000, "requests that are held at once")
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "limiter:", err)
		os.Exit(1)
	}
	for _, m := range misses {
		fmt.Println("\nMISSED:", m)
	}
	if len(misses) > 0 {
		os.Exit(1)
	}
}

func run() error {
	dir, err := os.MkdirTemp("", "limiter")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", dir, "./cmd/queueproxy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build of the queue-proxy: %w\n%s", err, out)
	}
	fn, err := newFunction()
	if err != nil {
		return err
	}
	defer fn.ln.Close()
	if err := inOrder(fn, dir); err != nil {
		return err
	}
	if *seconds <= 0 {
		return hold(fn, dir)
	}
	fmt.Printf("closed loop, 8 x limit clients (at most 256), function of %v, %v each, best of %d\n\n", work, *seconds, *rounds)
	fmt.Println("| | limit | most inside | the function took | of ideal rate | requests/s | p50 | p99 | p99/p50 | worst client's share |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|---|")
	for _, limit := range []int{1, 10, 100} {
		if err := beside(fn, dir, limit); err != nil {
			return err
		}
	}
	return hold(fn, dir)
}

var misses []string

// want marks a target that was missed.
func want(ok bool, format string, args ...any) {
	if !ok {
		misses = append(misses, fmt.Sprintf(format, args...))
	}
}

// beside measures a limit, in alternation with haproxy: on a machine that is busy with other things both suffer.
func beside(fn *function, dir string, limit int) error {
	peers := map[string]func(int) (*process, error){"queue-proxy": func(limit int) (*process, error) { return queueProxy(dir, fn.addr, limit, 10*limit) }}
	names := []string{"queue-proxy"}
	if _, err := exec.LookPath("haproxy"); err == nil {
		peers["haproxy"] = func(limit int) (*process, error) { return haproxy(dir, fn.addr, limit) }
		names = append(names, "haproxy")
	} else {
		fmt.Println("haproxy is not installed: not compared (apt-get install haproxy)")
	}
	best := map[string]result{}
	for range *rounds {
		for _, name := range names {
			r, err := loop(fn, name, limit, peers[name])
			if err != nil {
				return err
			}
			want(r.most <= limit, "%s is over the limit of %d: %d", name, limit, r.most)
			b, seen := best[name]
			if !seen {
				b = r
			}
			if r.busy > b.busy {
				b.busy, b.took = r.busy, r.took
			}
			b.rate, b.most, b.worst = max(b.rate, r.rate), max(b.most, r.most), max(b.worst, r.worst)
			if r.p99/r.p50 < b.p99/b.p50 {
				b.p50, b.p99 = r.p50, r.p99
			}
			best[name] = b
		}
	}
	for _, name := range names {
		best[name].print()
	}
	r := best["queue-proxy"]
	if h, ok := best["haproxy"]; ok && limit == 100 {
		want(r.rate >= h.rate, "rate at limit 100 below haproxy's: %.0f, %.0f", r.rate, h.rate)
	}
	if limit <= 10 {
		want(r.busy >= .87, "limit %d: rate %.2f of the ideal, want 0.87", limit, r.busy)
		want(r.p99 <= 1.2*r.p50, "limit %d: p99 %.2f x p50, want 1.2", limit, r.p99/r.p50)
	}
	return nil
}

// work is what the function does for each request: it sleeps, which takes up to a millisecond longer, as timers do. So what counts as ideal is not a
// rate by this number, but slots that are never free while the function has them: it measures how long it has really had each.
const work = 5 * time.Millisecond

// function counts what is inside it. While its gate is shut, requests stay inside.
type function struct {
	ln           net.Listener
	addr         string
	inside, most atomic.Int32
	nanos, done  atomic.Int64 // that requests have spent inside, and their number
	gate         atomic.Pointer[chan struct{}]

	mu    sync.Mutex
	order []int // numbers of the requests, as they came
}

func newFunction() (*function, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	f := &function{ln: ln, addr: ln.Addr().String()}
	s := &fasthttp.Server{Handler: f.serve, NoDefaultDate: true, NoDefaultServerHeader: true, Concurrency: 1 << 20}
	go s.Serve(ln) // ends with the listener
	return f, nil
}

func (f *function) serve(ctx *fasthttp.RequestCtx) {
	n := f.inside.Add(1)
	for m := f.most.Load(); n > m && !f.most.CompareAndSwap(m, n); m = f.most.Load() {
	}
	if gate := f.gate.Load(); gate != nil {
		if i, err := strconv.Atoi(string(ctx.Path()[1:])); err == nil {
			f.mu.Lock()
			f.order = append(f.order, i)
			f.mu.Unlock()
		}
		<-*gate
	} else {
		begin := time.Now()
		time.Sleep(work)
		f.nanos.Add(int64(time.Since(begin)))
		f.done.Add(1)
	}
	f.inside.Add(-1)
	ctx.SetBodyString("hello, world\n")
}

// process is a peer under test.
type process struct {
	cmd         *exec.Cmd
	addr, stats string
}

func (p *process) stop() { p.cmd.Process.Kill(); p.cmd.Wait() }

func queueProxy(dir, upstream string, limit, queue int) (*process, error) {
	p := &process{cmd: exec.Command(filepath.Join(dir, "queueproxy"), "--listen", "127.0.0.1:0", "--stats", "127.0.0.1:0", "--upstream", upstream,
		"--upstream-protocol", "h1", "--concurrency", strconv.Itoa(limit), "--queue", strconv.Itoa(queue))}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	for word := range strings.FieldsSeq(line) {
		if a, ok := strings.CutPrefix(word, "listen="); ok {
			p.addr = a
		}
		if a, ok := strings.CutPrefix(word, "stats="); ok {
			p.stats = a
		}
	}
	if err != nil || p.addr == "" || p.stats == "" {
		p.stop()
		return nil, fmt.Errorf("queue-proxy: %q, %w", line, err)
	}
	return p, nil
}

func haproxy(dir, upstream string, limit int) (*process, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := ln.Addr().String()
	ln.Close()
	file := filepath.Join(dir, "haproxy.cfg")
	text := fmt.Sprintf("global\n nbthread 1\n maxconn 5000\ndefaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n timeout queue 60s\n"+
		" option http-keep-alive\n http-reuse always\nlisten l\n bind %s\n server s %s maxconn %d\n", addr, upstream, limit)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command("haproxy", "-db", "-f", file), addr: addr}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return p, nil
		}
		if time.Now().After(end) {
			p.stop()
			return nil, fmt.Errorf("haproxy: %w", err)
		}
	}
}

// result is what one closed loop has shown. Times in milliseconds.
type result struct {
	name        string
	limit, most int
	rate        float64
	took        float64 // in the function, on average
	busy        float64 // of the slots, by the time that requests were inside the function: 1 = never one free, which is the ideal rate
	p50, p99    float64
	worst       float64 // requests of the worst client, relative to the average
}

func (r result) print() {
	fmt.Printf("| %s | %d | %d | %.2f ms | %.2f | %.0f | %.1f ms | %.1f ms | %.2f | %.2f |\n", r.name, r.limit, r.most, r.took, r.busy, r.rate, r.p50, r.p99, r.p99/r.p50, r.worst)
}

// loop lets clients send one request after the other through a peer.
func loop(fn *function, name string, limit int, start func(int) (*process, error)) (r result, err error) {
	p, err := start(limit)
	if err != nil {
		return r, err
	}
	defer p.stop()
	clients := min(256, 8*limit)
	times := make([][]float64, clients)
	errs := make(chan error, clients)
	fn.most.Store(0)
	const warm = 500 * time.Millisecond
	begin := time.Now().Add(warm)
	end := begin.Add(*seconds)
	var wg sync.WaitGroup
	wg.Go(func() {
		time.Sleep(time.Until(begin))
		spent, done := fn.nanos.Load(), fn.done.Load()
		time.Sleep(time.Until(end))
		spent, done = fn.nanos.Load()-spent, fn.done.Load()-done
		r.busy = float64(spent) / float64(*seconds) / float64(limit)
		r.took = float64(spent) / float64(max(done, 1)) / 1e6
	})
	for i := range clients {
		wg.Go(func() {
			c, err := dial(p.addr)
			for err == nil && time.Now().Before(end) {
				sent := time.Now()
				if err = c.get("/"); err == nil && sent.After(begin) {
					times[i] = append(times[i], float64(time.Since(sent).Microseconds())/1000)
				}
			}
			if err != nil {
				errs <- fmt.Errorf("%s, limit %d: %w", name, limit, err)
				return
			}
			c.Close()
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return r, err
	default:
	}
	var all []float64
	least := len(times[0])
	for _, t := range times {
		all = append(all, t...)
		least = min(least, len(t))
	}
	if len(all) == 0 {
		return r, fmt.Errorf("%s, limit %d: nothing was answered", name, limit)
	}
	slices.Sort(all)
	return result{name: name, busy: r.busy, took: r.took, limit: limit, most: int(fn.most.Load()), rate: float64(len(all)) / seconds.Seconds(),
		p50: all[len(all)/2], p99: all[len(all)*99/100], worst: float64(least) * float64(clients) / float64(len(all))}, nil
}

// client is a connection that costs little beside what it measures.
type client struct {
	net.Conn
	br *bufio.Reader
}

func dial(addr string) (*client, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return &client{c, bufio.NewReaderSize(c, 512)}, nil
}

func (c *client) send(path string) error {
	_, err := io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: a\r\n\r\n")
	return err
}

func (c *client) get(path string) error {
	if err := c.send(path); err != nil {
		return err
	}
	return c.answer()
}

// answer reads an answer, which must be the function's.
func (c *client) answer() error {
	resp, err := http.ReadResponse(c.br, nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("status %d, X-Thaw-Error %q", resp.StatusCode, resp.Header.Get("X-Thaw-Error"))
	}
	return err
}

// inOrder sends requests one after the other, each when the one before is inside, while the function's gate is shut, and wants them at the function in
// exactly that order. The limit is 1: of those that a larger one lets through at the same time, some overtake others on the way to where
// the function notes them, in the queue-proxy's goroutines and in the function's, and a busy machine shows more of that than a quiet one.
func inOrder(fn *function, dir string) error {
	const n = 500
	p, err := queueProxy(dir, fn.addr, 1, n)
	if err != nil {
		return err
	}
	defer p.stop()
	clients := make([]*client, n)
	if err := connect(clients, p.addr); err != nil {
		return err
	}
	gate := make(chan struct{})
	fn.gate.Store(&gate)
	defer fn.gate.Store(nil)
	fn.order = nil
	for i, c := range clients {
		if err := c.send("/" + strconv.Itoa(i)); err != nil {
			return err
		}
		if err := p.until(i + 1); err != nil {
			return errors.Join(err, early(clients[:i+1]))
		}
	}
	close(gate)
	for i, c := range clients {
		if err := c.answer(); err != nil {
			return fmt.Errorf("request %d of those in order: %w", i, err)
		}
		c.Close()
	}
	wrong := 0
	for at, i := range fn.order {
		if at != i {
			wrong++
		}
	}
	fmt.Printf("%d requests held and released one by one: %d not in the order of their arrival\n\n", n, wrong)
	want(wrong == 0 && len(fn.order) == n, "order of arrival: %d out of place, %d of %d seen", wrong, len(fn.order), n)
	return nil
}

// hold sends requests in batches into a function whose gate is shut, looks at what holding costs, and opens the gate.
func hold(fn *function, dir string) error {
	limit := *held / 10
	p, err := queueProxy(dir, fn.addr, limit, *held)
	if err != nil {
		return err
	}
	defer p.stop()
	fmt.Printf("\n%d requests held, released through a limit of %d by a function that takes no time\n\n", *held, limit)
	fmt.Println("| lost | last answer after | CPU from first request to last answer | idle keep-alive connection | held request, its connection included |\n|---|---|---|---|---|")
	before := p.rss()
	clients := make([]*client, *held)
	if err := connect(clients, p.addr); err != nil {
		return err
	}
	time.Sleep(3 * time.Second) // what is freed goes back
	idle := p.rss()
	gate := make(chan struct{})
	fn.gate.Store(&gate)
	spent := p.cpu()
	const batch = 500
	for i, c := range clients {
		if err := c.send("/" + strconv.Itoa(i)); err != nil {
			return err
		}
		if (i+1)%batch == 0 || i+1 == len(clients) {
			if err := p.until(i + 1); err != nil {
				return errors.Join(err, early(clients[:i+1]))
			}
		}
	}
	time.Sleep(time.Second)
	full := p.rss()
	errs := make(chan error, len(clients))
	begin := time.Now()
	close(gate)
	for _, c := range clients {
		go func() { errs <- c.answer() }()
	}
	lost := 0
	for range clients {
		if err := <-errs; err != nil {
			lost++
		}
	}
	took := time.Since(begin)
	fn.gate.Store(nil)
	spent = p.cpu() - spent
	perIdle, perHeld := float64(idle-before)/float64(*held), float64(full-before)/float64(*held)
	fmt.Printf("| %d | %.2f s | %.2f s | %.1f KiB | %.1f KiB |\n", lost, took.Seconds(), spent.Seconds(), perIdle, perHeld)
	want(lost == 0, "%d requests lost", lost)
	want(took <= 800*time.Millisecond, "release after %v, want 0.8 s", took)
	want(perIdle <= 10, "%.1f KiB per idle connection, want 10", perIdle)
	want(perHeld <= 13, "%.1f KiB per held request, want 13", perHeld)
	return nil
}

// connect opens connections that have had one request each.
func connect(clients []*client, addr string) error {
	const at = 50 // at the same time
	errs := make([]error, at)
	var wg sync.WaitGroup
	for w := range at {
		wg.Go(func() {
			for i := w; i < len(clients) && errs[w] == nil; i += at {
				c, err := dial(addr)
				if err == nil {
					err = c.get("/")
				}
				if err != nil {
					errs[w] = fmt.Errorf("connection %d: %w", i, err)
				}
				clients[i] = c
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// early says what the first of those was told that were answered although the gate is shut.
func early(clients []*client) error {
	n, first := 0, error(nil)
	for i, c := range clients {
		c.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := c.br.Peek(1); errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if n++; first == nil {
			first = fmt.Errorf("request %d: %w", i, c.answer())
		}
	}
	return fmt.Errorf("%d were answered at once; %w", n, first)
}

// rss is the resident memory in KiB; 0 where it cannot be told.
func (p *process) rss() int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			n, _ := strconv.Atoi(f[1])
			return n
		}
	}
	return 0
}

// cpu is what the process has spent so far; 0 where it cannot be told.
func (p *process) cpu() time.Duration {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	f := strings.Fields(string(b))
	if len(f) < 15 {
		return 0
	}
	user, _ := strconv.Atoi(f[13])
	system, _ := strconv.Atoi(f[14])
	return time.Duration(user+system) * (time.Second / 100) // USER_HZ
}

// until returns when n requests are inside the queue-proxy.
func (p *process) until(n int) error {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		resp, err := http.Get("http://" + p.stats + "/stats")
		if err != nil {
			return err
		}
		var s struct{ Running, Waiting int }
		err = json.NewDecoder(resp.Body).Decode(&s)
		resp.Body.Close()
		if err != nil {
			return err
		}
		if s.Running+s.Waiting >= n {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d requests inside, want %d", s.Running+s.Waiting, n)
		}
	}
}
