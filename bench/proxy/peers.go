package main

import (
	"bytes"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// peer is a proxy under test, or a chain of them.
type peer struct {
	name string
	addr string
	pids []int // whose CPU time and memory count
	h2   bool  // speaks HTTP/2 on both sides; the others HTTP/1
}

// bench owns the processes.
type bench struct {
	dir      string
	function *function
	cmds     []*exec.Cmd
	peers    []*peer
}

func (b *bench) stop() {
	for _, c := range b.cmds {
		c.Process.Kill()
		c.Wait()
	}
}

func free() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// hop is a running process.
type hop struct {
	addr string
	pid  int
}

// process starts one process that will listen on addr.
func (b *bench) process(addr string, env []string, name string, args ...string) (hop, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(append(os.Environ(), "GOMAXPROCS=1"), env...) // as nginx's single worker has one processor
	cmd.Stderr = os.Stderr
	if err := startPinned(cmd); err != nil {
		return hop{}, err
	}
	b.cmds = append(b.cmds, cmd)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return hop{addr, cmd.Process.Pid}, nil
		}
		if time.Now().After(end) {
			return hop{}, fmt.Errorf("%s: %w", name, err)
		}
	}
}

// peer notes a chain of hops, the first one being what clients talk to.
func (b *bench) peer(name string, h2 bool, hops ...hop) {
	p := &peer{name: name, addr: hops[0].addr, h2: h2}
	for _, h := range hops {
		p.pids = append(p.pids, h.pid)
	}
	b.peers = append(b.peers, p)
}

// start starts what was asked for. nginx always runs when it is there: it is what the others are compared with.
func (b *bench) start() error {
	for _, kind := range []struct {
		program string // that must be installed; "" = ours
		start   func(program string) error
	}{{"nginx", b.nginxes}, {"haproxy", b.haproxy}, {"", b.goproxy}, {"", b.ours}} {
		program := ""
		if kind.program != "" {
			var err error
			if program, err = exec.LookPath(kind.program); err != nil {
				fmt.Printf("%s is not installed (Debian: apt-get install nginx-light haproxy)\n", kind.program)
				continue
			}
		}
		if err := kind.start(program); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) nginxes(program string) error {
	one, err := b.nginx(program, "1", b.function.h1, false)
	if err != nil {
		return err
	}
	b.peer("nginx", false, one)
	if listed(*only, "nginx>nginx") {
		two, err := b.nginx(program, "2", one.addr, false)
		if err != nil {
			return err
		}
		b.peer("nginx>nginx", false, two, one)
	}
	grpc, err := b.nginx(program, "3", b.function.h2, true)
	if err != nil {
		return err
	}
	b.peer("nginx", true, grpc)
	return nil
}

func (b *bench) nginx(program, id, upstream string, grpc bool) (hop, error) {
	addr, dir := free(), filepath.Join(b.dir, "nginx"+id)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return hop{}, err
	}
	listen, pass := addr, `proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection "";`
	if grpc {
		listen, pass = addr+" http2", "grpc_pass grpc://u;"
	}
	text := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log %[1]s/err; worker_rlimit_nofile 30000;
events { worker_connections 25000; }
http { access_log off; keepalive_requests 1000000000; http2_max_concurrent_streams 512; client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p;
fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
upstream u { server %[2]s; keepalive 512; keepalive_requests 1000000000; }
server { listen %[3]s; location / { %[4]s } } }`, dir, upstream, listen, pass)
	conf := filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return hop{}, err
	}
	return b.process(addr, nil, program, "-c", conf, "-e", filepath.Join(dir, "err"))
}

func (b *bench) haproxy(program string) error {
	if !listed(*only, "haproxy") {
		return nil
	}
	addr, conf := free(), filepath.Join(b.dir, "haproxy.cfg")
	text := fmt.Sprintf("global\n nbthread 1\n maxconn 9900\ndefaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n timeout queue 60s\n http-reuse always\n"+
		"frontend f\n bind %s\n default_backend b\nbackend b\n server s %s maxconn %d\n", addr, b.function.h1, heldLimit)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return err
	}
	h, err := b.process(addr, nil, program, "-f", conf, "-db", "-q")
	if err == nil {
		b.peer("haproxy", false, h)
	}
	return err
}

func (b *bench) goproxy(string) error {
	if !listed(*only, "net/http") {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	addr := free()
	h, err := b.process(addr, []string{"BENCH_GOPROXY=" + addr + "," + b.function.h1}, self)
	if err == nil {
		b.peer("net/http", false, h)
	}
	return err
}

// ours starts the hops of Thaw. Each peer has processes of its own, so that what one row leaves in memory counts for one peer only.
func (b *bench) ours(string) (err error) {
	limit := strconv.Itoa(heldLimit)
	queueproxy := func(to string, protocol string) (h hop) {
		if err == nil {
			addr := free()
			h, err = b.process(addr, nil, filepath.Join(b.dir, "queueproxy"), "--listen", addr, "--upstream", to, "--upstream-protocol", protocol, "--concurrency", limit)
		}
		return h
	}
	thaw := func(to string, args ...string) (h hop) {
		if err == nil {
			addr := free()
			h, err = b.process(addr, nil, filepath.Join(b.dir, "thaw"), append(args, "--listen", addr, "--static", "*="+to)...)
		}
		return h
	}
	activator := func(to string) hop { return thaw(to, "activator", "--concurrency", limit) }
	router := func(to string) hop { return thaw(to, "router") }
	fn := b.function.h1
	for _, p := range []struct {
		name string
		make func() []hop
	}{
		{"router", func() []hop { return []hop{router(fn)} }},
		{"queue-proxy", func() []hop { return []hop{queueproxy(fn, "h1")} }},
		{"merged", func() []hop { return []hop{activator(fn)} }}, // router, queue and limit in one process
		{"router>queue-proxy", func() []hop {
			q := queueproxy(fn, "h1")
			return []hop{router(q.addr), q}
		}},
		{"router>activator>queue-proxy", func() []hop {
			q := queueproxy(fn, "h1")
			a := activator(q.addr)
			return []hop{router(a.addr), a, q}
		}},
	} {
		if err == nil && listed(*only, p.name) {
			if hops := p.make(); err == nil {
				b.peer(p.name, false, hops...)
			}
		}
	}
	for _, t := range b.telemetry() {
		if err == nil && *only != "" && listed(*only, t.name) {
			if h := thaw(fn, append([]string{"router"}, t.args...)...); err == nil {
				b.peer(t.name, false, h)
			}
		}
	}
	if listed(*only, "queue-proxy") {
		if q := queueproxy(b.function.h2, "h2c"); err == nil {
			b.peer("queue-proxy", true, q)
		}
	}
	return err
}

// recorder is a router that records what it does.
type recorder struct {
	name string
	args []string
}

// telemetry are the recorders; they run only when they are named. The function takes the spans too: it answers whatever comes.
func (b *bench) telemetry() []recorder {
	trace := func(ratio string) recorder {
		return recorder{"router+trace" + ratio, []string{"--trace-endpoint", "http://" + b.function.h1, "--trace-ratio", ratio}}
	}
	return []recorder{{"router+log", []string{"--access-log", filepath.Join(b.dir, "access.log")}}, trace("0"), trace("0.01"), trace("1")}
}

// cpu is the time that the peer's threads have been running, user and system, in microseconds.
func (p *peer) cpu() (us float64) {
	for _, pid := range p.pids {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(tasks) == 0 {
			log.Fatal("the processor time of a process is read from /proc, which is Linux")
		}
		for _, t := range tasks {
			b, err := os.ReadFile(t)
			if err != nil {
				continue // ended
			}
			ns, _ := strconv.ParseFloat(strings.Fields(string(b))[0], 64)
			us += ns / 1000
		}
	}
	return us
}

// memory is what the peer's processes occupy in KiB, shared pages by their share.
func (p *peer) memory() (kib float64) {
	for _, pid := range p.pids {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if _, rest, ok := bytes.Cut(b, []byte("\nPss:")); ok {
			n, _ := strconv.ParseFloat(string(bytes.Fields(rest)[0]), 64)
			kib += n
		}
	}
	return kib
}
