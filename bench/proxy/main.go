// Command proxy measures what one request costs in the hops of Thaw and, in alternation on the same machine, in proxies that
// everybody knows: nginx and haproxy when they are installed, and net/http's ReverseProxy.
//
//	go run ./bench/proxy                    # 3 rounds of 2 s each; see -h
//	go run ./bench/proxy -gate 2.5          # fails when the router costs more than 2.5 x nginx
//
// The figure to trust is CPU time per request, user and system, of the proxy's processes: it hardly depends on what else the
// machine does. Rates and latencies on a shared machine mostly measure the neighbours. The load is closed-loop over
// keep-alive connections from this process, which also serves the function: 13 bytes, no work.
package main

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/valyala/fasthttp"
)

var (
	rounds  = flag.Int("rounds", 3, "rounds; in each every peer has its turn")
	length  = flag.Duration("time", 2*time.Second, "length of a turn")
	clients = flag.Int("clients", 64, "connections")
	size    = flag.Int("body", 13, "bytes of an answer's body")
	only    = flag.String("only", "", "comma-separated names of peers; empty = all")
	gate    = flag.Float64("gate", 0, "exit with 1 when the router's cost is more than this many times nginx's; 0 = no gate")
)

func main() {
	if addr := os.Getenv("BENCH_GOPROXY"); addr != "" {
		goproxy(addr)
		return
	}
	flag.Parse()
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

// goproxy is net/http's reverse proxy with pooled buffers, in a process of its own.
func goproxy(spec string) {
	listen, upstream, _ := strings.Cut(spec, ",")
	u, _ := url.Parse("http://" + upstream)
	p := httputil.NewSingleHostReverseProxy(u)
	p.Transport = &http.Transport{MaxIdleConnsPerHost: 1000, MaxIdleConns: 1000}
	p.BufferPool = pool{}
	log.Fatal(http.ListenAndServe(listen, p))
}

type pool struct{}

var buffers = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

func (pool) Get() []byte  { return *buffers.Get().(*[]byte) }
func (pool) Put(b []byte) { buffers.Put(&b) }

// peer is a proxy under test.
type peer struct {
	name string
	addr string
	pids []int // whose CPU time counts
	us   []float64
	rate []float64
	p50  []time.Duration
	p99  []time.Duration
}

// bench owns the processes.
type bench struct {
	dir      string
	upstream string
	cmds     []*exec.Cmd
	peers    []*peer
}

func run() error {
	dir, err := os.MkdirTemp("", "thaw-bench-")
	if err != nil {
		return err
	}
	b := &bench{dir: dir}
	defer func() {
		for _, c := range b.cmds {
			c.Process.Kill()
			c.Wait()
		}
		os.RemoveAll(dir)
	}()
	build := exec.Command("go", "build", "-o", dir+"/", "./cmd/thaw", "./cmd/queueproxy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build (run this in the repository's root): %w\n%s", err, out)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	b.upstream = ln.Addr().String()
	body := bytes.Repeat([]byte("x"), *size)
	function := &fasthttp.Server{Handler: func(c *fasthttp.RequestCtx) { c.SetBody(body) }, NoDefaultDate: true}
	go function.Serve(ln)

	if err := b.start(); err != nil {
		return err
	}
	for range *rounds {
		for _, p := range b.peers {
			if err := p.measure(*length / 4); err != nil { // warm up
				return err
			}
			p.us, p.rate, p.p50, p.p99 = p.us[:len(p.us)-1], p.rate[:len(p.rate)-1], p.p50[:len(p.p50)-1], p.p99[:len(p.p99)-1]
			if err := p.measure(*length); err != nil {
				return err
			}
		}
	}
	return b.report()
}

func free() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// process starts one process of a peer, on one processor as nginx's single worker is.
func (b *bench) process(env []string, name string, args ...string) (int, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(append(os.Environ(), "GOMAXPROCS=1"), env...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	b.cmds = append(b.cmds, cmd)
	return cmd.Process.Pid, nil
}

func wanted(name string) bool {
	return *only == "" || slices.Contains(strings.Split(*only, ","), name)
}

func (b *bench) start() error {
	add := func(name, addr string, pids ...int) error {
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if c, err := net.Dial("tcp", addr); err == nil {
				c.Close()
				break
			} else if time.Now().After(end) {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if wanted(name) {
			b.peers = append(b.peers, &peer{name: name, addr: addr, pids: pids})
		}
		return nil
	}
	if err := b.known(add); err != nil {
		return err
	}
	thaw, qp := filepath.Join(b.dir, "thaw"), filepath.Join(b.dir, "queueproxy")
	hop := func(next string, program string, args ...string) (string, int, error) {
		addr := free()
		to := []string{"--static", "*=" + next}
		if program == qp {
			to = []string{"--upstream", next}
		}
		pid, err := b.process(nil, program, append(append(args, "--listen", addr), to...)...)
		return addr, pid, err
	}
	q, qpid, err := hop(b.upstream, qp, "--concurrency", "1000")
	if err != nil {
		return err
	}
	r, rpid, err := hop(b.upstream, thaw, "router")
	if err != nil {
		return err
	}
	a, apid, err := hop(b.upstream, thaw, "activator", "--concurrency", "1000") // router, queue and limit in one process
	if err != nil {
		return err
	}
	rq, rqpid, err := hop(q, thaw, "router")
	if err != nil {
		return err
	}
	aq, aqpid, err := hop(q, thaw, "activator", "--concurrency", "1000")
	if err != nil {
		return err
	}
	raq, raqpid, err := hop(aq, thaw, "router")
	if err != nil {
		return err
	}
	for _, p := range []struct {
		name, addr string
		pids       []int
	}{
		{"router", r, []int{rpid}},
		{"queue-proxy", q, []int{qpid}},
		{"merged (router, limit)", a, []int{apid}},
		{"router > queue-proxy", rq, []int{rqpid, qpid}},
		{"router > activator > queue-proxy", raq, []int{raqpid, aqpid, qpid}},
	} {
		if err := add(p.name, p.addr, p.pids...); err != nil {
			return err
		}
	}
	return nil
}

// known starts the peers that are not ours.
func (b *bench) known(add func(string, string, ...int) error) error {
	if program, err := exec.LookPath("nginx"); err == nil {
		addr := free()
		conf := filepath.Join(b.dir, "nginx.conf")
		text := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/nginx.pid; error_log %[1]s/nginx.err;
events { worker_connections 4096; }
http { access_log off; keepalive_requests 1000000000; client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
upstream u { server %[2]s; keepalive 512; keepalive_requests 1000000000; }
server { listen %[3]s; location / { proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection ""; } } }`, b.dir, b.upstream, addr)
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			return err
		}
		pid, err := b.process(nil, program, "-c", conf, "-e", filepath.Join(b.dir, "nginx.err"))
		if err != nil {
			return err
		}
		if err := add("nginx", addr, pid); err != nil {
			return err
		}
	} else {
		fmt.Println("nginx is not installed: no ratios (apt-get install nginx-light)")
	}
	if program, err := exec.LookPath("haproxy"); err == nil {
		addr := free()
		conf := filepath.Join(b.dir, "haproxy.cfg")
		text := fmt.Sprintf("global\n nbthread 1\ndefaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n http-reuse always\nfrontend f\n bind %s\n default_backend b\nbackend b\n server s %s\n", addr, b.upstream)
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			return err
		}
		pid, err := b.process(nil, program, "-f", conf, "-db")
		if err != nil {
			return err
		}
		if err := add("haproxy", addr, pid); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	addr := free()
	pid, err := b.process([]string{"BENCH_GOPROXY=" + addr + "," + b.upstream}, self)
	if err != nil {
		return err
	}
	return add("net/http ReverseProxy", addr, pid)
}

// cpu is the time that processes have used, in microseconds; the kernel counts in hundredths of a second.
func cpu(pids []int) (us float64) {
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			log.Fatalf("the processor time of a process is read from /proc, which is Linux: %v", err)
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		for _, i := range []int{11, 12} { // utime, stime
			n, _ := strconv.ParseFloat(f[i], 64)
			us += n * 10_000
		}
	}
	return us
}

// measure loads the peer for a while and notes the figures.
func (p *peer) measure(d time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	var n atomic.Int64
	var mu sync.Mutex
	var took []time.Duration
	var failed error
	var wg sync.WaitGroup
	before, begin := cpu(p.pids), time.Now()
	for range *clients {
		wg.Go(func() {
			mine, err := client(ctx, p.addr, &n)
			mu.Lock()
			took = append(took, mine...)
			if err != nil {
				failed = err
			}
			mu.Unlock()
		})
	}
	wg.Wait()
	if failed != nil {
		return fmt.Errorf("%s: %w", p.name, failed)
	}
	used := cpu(p.pids) - before
	slices.Sort(took)
	p.us = append(p.us, used/float64(n.Load()))
	p.rate = append(p.rate, float64(n.Load())/time.Since(begin).Seconds())
	p.p50 = append(p.p50, took[len(took)/2])
	p.p99 = append(p.p99, took[len(took)*99/100])
	return nil
}

// client sends one request after the other over one connection; every sixteenth is timed.
func client(ctx context.Context, addr string, n *atomic.Int64) (took []time.Duration, err error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	br := bufio.NewReaderSize(c, 16<<10)
	request := []byte("GET /path?query=1 HTTP/1.1\r\nHost: hello.default.localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	var resp fasthttp.Response
	for i := 0; ctx.Err() == nil; i++ {
		begin := time.Now()
		if _, err := c.Write(request); err != nil {
			return took, err
		}
		if err := resp.Read(br); err != nil {
			return took, err
		}
		if resp.StatusCode() != 200 || len(resp.Body()) != *size {
			return took, fmt.Errorf("answer %d with %d bytes", resp.StatusCode(), len(resp.Body()))
		}
		n.Add(1)
		if i%16 == 0 {
			took = append(took, time.Since(begin))
		}
	}
	return took, nil
}

func median[T ~int64 | ~float64](v []T) T {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

func (b *bench) report() error {
	var base *peer
	for _, p := range b.peers {
		if p.name == "nginx" {
			base = p
		}
	}
	fmt.Printf("%d rounds of %v in alternation, %d connections, %d-byte answers; medians, CPU also min-max\n", *rounds, *length, *clients, *size)
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "peer\tCPU us/request\tx nginx\trequests/s\tp50 ms\tp99 ms\tRSS MiB")
	ratio := map[string]float64{}
	for _, p := range b.peers {
		x := "-"
		if base != nil {
			r := make([]float64, len(p.us)) // round by round: the machine's speed drifts
			for i := range r {
				r[i] = p.us[i] / base.us[i]
			}
			ratio[p.name] = median(r)
			x = fmt.Sprintf("%.2f", ratio[p.name])
		}
		fmt.Fprintf(w, "%s\t%.1f (%.1f-%.1f)\t%s\t%.0f\t%.2f\t%.2f\t%.1f\n", p.name, median(p.us), slices.Min(p.us), slices.Max(p.us), x, median(p.rate), ms(median(p.p50)), ms(median(p.p99)), resident(p.pids))
	}
	w.Flush()
	if *gate > 0 && base != nil && ratio["router"] > *gate {
		return fmt.Errorf("the router costs %.2f x nginx, the gate is %.2f", ratio["router"], *gate)
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// resident is the memory of processes in MiB.
func resident(pids []int) (mib float64) {
	for _, pid := range pids {
		f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		b, _ := io.ReadAll(f)
		f.Close()
		if _, rest, ok := strings.Cut(string(b), "VmRSS:"); ok {
			kb, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			mib += kb / 1024
		}
	}
	return mib
}
