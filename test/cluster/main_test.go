// Package cluster tests the parts as processes of their own on loopback: etcd, store, control, two autoscalers, three node agents, two activators
// and two or three routers, and what happens when they die.
package cluster

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

var bin string

func TestMain(m *testing.M) {
	if raceEnabled {
		fmt.Println("skipped: what is tested here are processes, which are built without the race detector")
		return
	}
	if bin = os.Getenv(binEnv); bin != "" { // started again by apart
		os.Exit(m.Run())
	}
	os.Exit(harness.Main(m, &bin, "cmd/thaw", "examples/checker"))
}

// binEnv names the folder of the binaries to a test that was started again.
const binEnv = "THAW_TEST_BIN"

// faults skips a test that takes its time, unless it is asked for (make faults).
func faults(t *testing.T) {
	t.Helper()
	if os.Getenv("THAW_FAULTS") == "" {
		t.Skip("one of the longer ones: make faults runs it")
	}
}

// plan is what a cluster of one test is like.
type plan struct {
	routers int
	members int           // of etcd; 0 = one
	units   [3]int        // of the nodes; 0 = 200
	delay   time.Duration // of each byte between the nodes and those who connect to them
	bin     string        // folder of the binaries; "" = of the program as it is
	host    string        // address that all but node 2 are at; "" = 127.0.0.1

	// before, if set, is called before anything is started, with the folder that everything is in.
	before func(t *testing.T, dir string)

	// With in set, node 2 is at remote, and what in does happens there.
	remote string
	in     func(func() error) error
}

// system is a cluster of one test.
type system struct {
	plan
	t      *testing.T
	dir    string
	etcd   string // URLs, separated by commas
	store  string
	args   map[string][]string // of each process by its name, with fixed addresses
	procs  map[string]*harness.Process
	client *client.Client
}

// freePort is an address that nobody listens on at the moment, for processes that are started again at the same one.
func freePort(t *testing.T, host string) string {
	t.Helper()
	ln, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// start brings a cluster up; everything ends with the test, and nothing may be left.
func start(t *testing.T, routers int) *system {
	t.Helper()
	return plan{routers: routers}.start(t)
}

func (p plan) start(t *testing.T) *system {
	t.Helper()
	p.bin, p.host = cmp.Or(p.bin, bin), cmp.Or(p.host, "127.0.0.1")
	s := &system{plan: p, t: t, dir: t.TempDir(), args: map[string][]string{}, procs: map[string]*harness.Process{}}
	if p.before != nil {
		p.before(t, s.dir)
	}
	t.Cleanup(s.stop)
	scaling := filepath.Join(s.dir, "scaling.yaml")
	if err := os.WriteFile(scaling, []byte(harness.Quick), 0o600); err != nil {
		t.Fatal(err)
	}
	s.startState()
	s.store = "http://" + s.run("store", "store", "--listen", s.free(), "--allow-remote", "--dir", s.dir+"/store")
	s.run("control", "control", "--etcd", s.etcd, "--store", s.store, "--data", s.dir+"/control", "--listen", s.free())
	for i := range 2 {
		s.role("autoscaler", i, "--autoscaler-config", scaling)
	}
	for i := range 3 {
		s.node(i)
	}
	for i := range 2 {
		s.role("activator", i, "--allow-remote", "--metrics", s.host+":0")
	}
	for i := range p.routers {
		s.role("router", i, "--allow-remote")
	}
	cfg, err := client.Discover("http://"+s.procs["control"].Ready["listen"], s.dir+"/control", func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	if s.client, err = client.New(cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *system) free() string { s.t.Helper(); return freePort(s.t, s.host) }

// startState starts the etcd: one, or several that need each other to get ready.
func (s *system) startState() {
	s.t.Helper()
	if s.members == 0 {
		s.etcd = "http://" + s.run("etcd", "etcd", "--data", s.dir+"/etcd", "--listen", s.free(), "--peers", s.free())
		return
	}
	var all, urls []string
	for i := range s.members {
		name, listen, peers := fmt.Sprintf("etcd-%d", i), s.free(), s.free()
		s.args[name] = []string{"etcd", "--name", name, "--data", filepath.Join(s.dir, name), "--listen", listen, "--peers", peers}
		all, urls = append(all, name+"="+peers), append(urls, "http://"+listen)
	}
	s.etcd = strings.Join(urls, ",")
	var mu sync.Mutex // guards s.procs
	var starting sync.WaitGroup
	for name, args := range s.args {
		s.args[name] = append(args, "--cluster", strings.Join(all, ","))
		starting.Go(func() {
			p, err := harness.Run(s.bin, s.args[name]...)
			if err != nil {
				s.t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			s.procs[name] = p
		})
	}
	starting.Wait()
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// node starts the i-th node.
func (s *system) node(i int) {
	s.t.Helper()
	args := []string{"--store", s.store, "--data", fmt.Sprintf("%s/agent-%d", s.dir, i), "--capacity", fmt.Sprint(cmp.Or(s.units[i], 200)), "--provider", "process"}
	switch {
	case s.in != nil && i == 2:
		s.role("agent", i, append(args, "--listen", s.remote+":8092", "--feed", s.remote+":8093")...) // all ports are free there
	case s.delay == 0:
		s.role("agent", i, append(args, "--feed", s.free(), "--metrics", s.host+":0")...)
	default:
		const here, there = "127.0.0.2", "127.0.0.3" // the relay has the same ports at another address
		requests, feed := freePort(s.t, here), freePort(s.t, here)
		for _, at := range []string{requests, feed} {
			harness.Relay(s.t, strings.Replace(at, here, there, 1), at, s.delay)
		}
		s.role("agent", i, append(args, "--listen", requests, "--feed", feed, "--advertise", there)...)
	}
}

// role starts the i-th process of a role.
func (s *system) role(role string, i int, args ...string) {
	s.t.Helper()
	name := fmt.Sprintf("%s-%d", role, i)
	s.run(name, append([]string{role, "--etcd", s.etcd, "--name", name, "--listen", s.free()}, args...)...)
}

// run starts a process and returns its address.
func (s *system) run(name string, args ...string) string {
	s.t.Helper()
	var p *harness.Process
	begin := func() (err error) { p, err = harness.Run(s.bin, args...); return err }
	if s.in != nil && name == "agent-2" {
		there := begin
		begin = func() error { return s.in(there) }
	}
	if err := begin(); err != nil {
		s.t.Fatal(err)
	}
	s.args[name], s.procs[name] = args, p
	return p.Ready["listen"]
}

// again starts a process that has ended as it was.
func (s *system) again(name string) { s.run(name, s.args[name]...) }

func (s *system) kill(name string) { s.procs[name].Kill() }

// stop ends everything, agents first: they take their functions along.
func (s *system) stop() {
	for _, part := range []string{"agent", ""} {
		var all sync.WaitGroup
		for name, p := range s.procs {
			if strings.HasPrefix(name, part) {
				all.Go(func() {
					if err := p.Stop(); err != nil {
						s.t.Errorf("%s: %v", name, err)
					}
				})
			}
		}
		all.Wait()
	}
	for i := range 3 {
		if left := harness.ProcessesOf(fmt.Sprintf("%s/agent-%d", s.dir, i)); len(left) > 0 {
			s.t.Errorf("functions left behind: %v", left)
			for _, pid := range left {
				if p, err := os.FindProcess(pid); err == nil {
					_ = p.Kill()
				}
			}
		}
	}
	if s.t.Failed() {
		for name, p := range s.procs {
			s.t.Logf("%s:\n%s", name, harness.Tail(p.Log(), 3000))
		}
	}
}

// apply deploys a checker and waits until it is ready.
func (s *system) apply(doc string) {
	s.t.Helper()
	data, err := yaml.YAMLToJSON([]byte(strings.ReplaceAll(doc, "$BIN", s.bin)))
	if err != nil {
		s.t.Fatal(err)
	}
	var meta struct{ Metadata api.ObjectMeta }
	if err := yaml.Unmarshal(data, &meta); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := harness.Apply(ctx, s.client, meta.Metadata.Name, data); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.client.WaitReady(ctx, api.Services, "default", meta.Metadata.Name, client.WaitOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// caller is a client.
type caller struct{ http *http.Client }

// caller sends requests to one router or, with -1, to any that takes connections.
func (s *system) caller(router int) *caller {
	var addrs []string
	for name, p := range s.procs {
		if name == fmt.Sprintf("router-%d", router) || router < 0 && strings.HasPrefix(name, "router-") {
			addrs = append(addrs, p.Ready["listen"])
		}
	}
	tr := &http.Transport{MaxIdleConnsPerHost: 2000, DialContext: func(ctx context.Context, _, _ string) (conn net.Conn, err error) {
		for _, i := range rand.Perm(len(addrs)) {
			if conn, err = (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", addrs[i]); err == nil {
				break
			}
		}
		return conn, err
	}}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &caller{&http.Client{Transport: tr, Timeout: 60 * time.Second}}
}

func (c *caller) get(service, path string) harness.Answer {
	th := harness.Thaw{HTTP: c.http}
	return th.Get(service, path)
}

// load keeps n clients busy until stop is called, which returns how many answers there were and those that were not 200.
func (c *caller) load(n int, service, path string) (stop func() (int, []harness.Answer)) {
	return (&harness.Thaw{HTTP: c.http}).Load(n, service, path)
}

// burst sends n requests at once and returns those that were not answered with 200, and how often each instance answered.
func (c *caller) burst(n int, service, path string) (bad []harness.Answer, instances map[string]int) {
	var mu sync.Mutex
	instances = map[string]int{}
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			a := c.get(service, path)
			mu.Lock()
			defer mu.Unlock()
			if a.Err != nil || a.Status != 200 {
				bad = append(bad, a)
				return
			}
			instances[a.Header.Get("X-Checker-Instance")]++
		})
	}
	all.Wait()
	return bad, instances
}
