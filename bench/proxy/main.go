// Command proxy measures what one request costs in the hops of Thaw and, in alternation on the same machine, in proxies that
// everybody knows: nginx and haproxy when they are installed, and net/http's ReverseProxy.
//
//	go run ./bench/proxy                            # every row, 3 rounds of 2 s a turn; see -h
//	go run ./bench/proxy -rows small -only nginx,router
//	go run ./bench/proxy -rows small -gate 'router=1.9,merged=1.9'   # fails when one costs more than so many times nginx
//
// The figure to trust is CPU time per request, user and system, of the proxy's processes: it hardly depends on what else the
// machine does. Rates and latencies on a shared machine mostly measure the neighbours. On Linux with two processors or more,
// every process of a peer is pinned to the last one, and this process, which is client and function, to the first: a chain of hops has
// no more than a single one. As root it all happens in a network namespace of its own, so that no packet filter is measured.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"
)

var (
	rounds  = flag.Int("rounds", 3, "rounds; in each every peer has its turn")
	length  = flag.Duration("time", 2*time.Second, "length of a turn")
	clients = flag.Int("clients", 64, "connections of the closed-loop rows")
	only    = flag.String("only", "", "comma-separated names of peers; empty = all")
	which   = flag.String("rows", "", "comma-separated names of rows; empty = all: "+rowNames())
	gate    = flag.String("gate", "", "PEER=RATIO, comma-separated: exit with 1 when a peer costs more than so many times nginx in any row")
	asJSON  = flag.Bool("json", false, "print one JSON object per peer and row")
)

func main() {
	if spec := os.Getenv("BENCH_GOPROXY"); spec != "" {
		goproxy(spec)
		return
	}
	flag.Parse()
	if dir := os.Getenv("BENCH_DIR"); dir != "" {
		check(run(dir))
		return
	}
	check(prepare())
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// prepare builds what is measured and runs this program again in a namespace of its own.
func prepare() error {
	dir, err := os.MkdirTemp("", "thaw-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir+"/", "./cmd/thaw", "./cmd/queueproxy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build (run this in the repository's root): %w\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), "BENCH_DIR="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	isolate(cmd)
	return cmd.Run()
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

func listed(list, name string) bool {
	return list == "" || slices.Contains(strings.Split(list, ","), name)
}

func run(dir string) error {
	pinned := pinSelf()
	f := newFunction()
	b := &bench{dir: dir, function: f}
	defer b.stop()
	if err := b.start(); err != nil {
		return err
	}
	fmt.Printf("%d rounds of %v in alternation; %s; medians, ratios round by round\n", *rounds, *length, pinned)
	var failed bytes.Buffer
	for _, r := range rows {
		if !listed(*which, r.name) {
			continue
		}
		got, err := b.measure(r)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		report(r, got)
		checkGate(&failed, r, got)
	}
	if failed.Len() > 0 {
		return fmt.Errorf("%s", strings.TrimSpace(failed.String()))
	}
	return nil
}
