package networks

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/test/harness"
)

// Addresses, the same for every tenant.
const (
	subnet = "10.0.1.0/24"
	havipA = "10.0.1.254"
	server = "10.0.1.9"
	router = "10.0.1.1"
	// Beyond the router.
	worldHost = "198.18.0.9"
	elastic   = "203.0.113.7"
)

// tenant is a network with a server and a router, behind a bridge of this namespace.
type tenant struct {
	t      *testing.T
	name   string
	bridge string
	server *link.Namespace

	mu    sync.Mutex
	from  []string // who asked the server by HTTP
	lines int      // that were said to it
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newTenant(t *testing.T, name string) *tenant {
	t.Helper()
	x := &tenant{t: t, name: name, bridge: "br-" + name}
	conn, err := link.Open()
	must(t, err)
	defer conn.Close()
	must(t, conn.AddBridge(x.bridge))
	t.Cleanup(func() {
		conn, err := link.Open()
		if err == nil {
			defer conn.Close()
			err = conn.DeleteDevice(x.bridge)
		}
		if err != nil {
			t.Error(err)
		}
	})
	x.server = x.host(name+"0", server)
	ln := listen(t, x.server, server+":80")
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		x.mu.Lock()
		x.from = append(x.from, from)
		x.mu.Unlock()
		fmt.Fprintln(w, "{}")
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	x.chat(x.server, server)
	return x
}

// host puts a host into the network.
func (x *tenant) host(port, at string) *link.Namespace {
	x.t.Helper()
	ns := namespace(x.t)
	here, err := link.Current()
	must(x.t, err)
	defer here.Close()
	conn, err := link.Open()
	must(x.t, err)
	defer conn.Close()
	must(x.t, link.Cable(link.End{In: here, Name: port}, link.End{In: ns, Name: "eth0"}))
	x.t.Cleanup(func() { // the namespace goes later than a test that makes it anew can wait for
		if conn, err := link.Open(); err == nil {
			defer conn.Close()
			_ = conn.DeleteDevice(port)
		}
	})
	must(x.t, errors.Join(conn.Enslave(port, x.bridge), conn.SetUp(port, true)))
	address(x.t, ns, "eth0", at+"/24")
	return ns
}

func namespace(t *testing.T) *link.Namespace {
	t.Helper()
	ns, err := link.NewNamespace()
	must(t, err)
	t.Cleanup(func() { ns.Close() })
	return ns
}

func address(t *testing.T, ns *link.Namespace, device, at string) {
	t.Helper()
	c, err := ns.Open()
	must(t, err)
	defer c.Close()
	d, err := c.Device(device)
	must(t, err)
	must(t, errors.Join(c.SetAddress(d.Index, netip.MustParsePrefix(at), 0), c.SetUp(device, true)))
}

func route(t *testing.T, ns *link.Namespace, r link.Route) {
	t.Helper()
	c, err := ns.Open()
	must(t, err)
	defer c.Close()
	must(t, c.SetRoute(r))
}

func listen(t *testing.T, ns *link.Namespace, at string) (ln net.Listener) {
	t.Helper()
	must(t, ns.Do(func() (err error) { ln, err = net.Listen("tcp4", at); return err }))
	t.Cleanup(func() { ln.Close() })
	return ln
}

// chat answers each line with the tenant's name and the address that it came from.
func (x *tenant) chat(ns *link.Namespace, at string) {
	ln := listen(x.t, ns, at+":7")
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for lines := bufio.NewScanner(c); lines.Scan(); {
					x.mu.Lock()
					x.lines++
					x.mu.Unlock()
					if _, err := fmt.Fprintln(c, x.name, c.RemoteAddr()); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// outside connects the network's router with a server in another network, and that with the elastic IP.
func (x *tenant) outside() {
	t := x.t
	t.Helper()
	r, far := x.host(x.name+"1", router), namespace(t)
	must(t, link.Cable(link.End{In: r, Name: "out"}, link.End{In: far, Name: "eth0"}))
	address(t, r, "out", "198.18.0.1/24")
	address(t, far, "eth0", worldHost+"/24")
	must(t, r.Sysctl("net/ipv4/ip_forward", "1"))
	route(t, r, link.Route{To: netip.MustParsePrefix(elastic + "/32"), Device: "eth0"})
	route(t, far, link.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("198.18.0.1"), Device: "eth0"})
	x.chat(far, worldHost)
}

func (x *tenant) asked() []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.from)
}

func (x *tenant) heard() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.lines
}

// goesOn waits for as many more lines.
func (x *tenant) goesOn(n int, what string) {
	x.t.Helper()
	before := x.heard()
	harness.Eventually(x.t, patient, what, func() bool { return x.heard() >= before+n })
}

// stalls waits until nothing has been said for three seconds.
func (x *tenant) stalls(what string) {
	x.t.Helper()
	last, since := x.heard(), time.Now()
	harness.Eventually(x.t, patient, what, func() bool {
		if n := x.heard(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > 3*time.Second
	})
}

func service(name string, annotations ...string) string {
	return strings.NewReplacer("$BIN/checker", "$BIN/function").Replace(harness.CheckerService(name, 10, map[string]string{"ROUTER": server}, annotations...))
}

func verb(t *testing.T, th *harness.Thaw, args ...string) {
	t.Helper()
	if code, stdout, stderr := th.Verb("", args...); code != 0 {
		t.Fatalf("thaw %v: %d\n%s%s", args, code, stdout, stderr)
	}
}

// one is for a function with exactly one instance.
var one = []string{harness.MinScale + "1", harness.MaxScale + "1"}

// join makes a tenant's VPC and subnet in a namespace of objects, and a function in it.
func (x *tenant) join(th *harness.Thaw, namespace, function string, annotations ...string) {
	x.t.Helper()
	verb(x.t, th, "vpc", "create", "shop", "--cidr", "10.0.0.0/16", "-n", namespace)
	verb(x.t, th, "subnet", "create", "a", "--vpc", "shop", "--cidr", subnet, "--bridge", x.bridge, "--router", router, "-n", namespace)
	x.add(th, namespace, function, annotations...)
}

// add makes a function in the subnet.
func (x *tenant) add(th *harness.Thaw, namespace, function string, annotations ...string) {
	x.t.Helper()
	doc := strings.ReplaceAll(service(function, append(annotations, "net.thaw.run/subnet: shop/a")...), "$BIN", bin)
	if code, _, stderr := th.Verb(doc, "apply", "-f", "-", "--no-wait", "-n", namespace); code != 0 {
		x.t.Fatal(stderr)
	}
	ctx, cancel := context.WithTimeout(x.t.Context(), patient)
	defer cancel()
	if _, err := th.Client.WaitReady(ctx, api.Services, namespace, function, client.WaitOptions{}); err != nil {
		_, gw, _ := th.Verb("", "gateway", "describe", "a", "-n", namespace)
		_, rev, _ := th.Verb("", "list", "revisions", "-o", "yaml", "-n", namespace)
		x.t.Fatalf("%v\n%s\n%s", err, gw, rev)
	}
}

// conversation is what a function says of its one connection.
type conversation struct {
	Answers     int
	Last, Error string
}

// talk asks a function's only instance about its conversation, which the first call begins.
func talk(t *testing.T, th *harness.Thaw, host, to string) conversation {
	t.Helper()
	return talks(t, th, host, "to="+to+":7")[0]
}

func talks(t *testing.T, th *harness.Thaw, host, query string) (all []conversation) {
	t.Helper()
	a := th.Get(host, "/talk?"+query)
	if a.Status != 200 {
		t.Fatal(a)
	}
	must(t, json.Unmarshal([]byte(a.Body), &all))
	return all
}

// talking waits until a conversation is some answers further.
func talking(t *testing.T, th *harness.Thaw, host, to string) (c conversation) {
	t.Helper()
	before := talk(t, th, host, to)
	harness.Eventually(t, patient, "the function's connection goes on", func() bool {
		c = talk(t, th, host, to)
		if c.Error != "" {
			t.Fatalf("after %d answers: %s", c.Answers, c.Error)
		}
		return c.Answers >= before.Answers+20
	})
	return c
}

// node is one of the two of a thaw dev.
type node struct{ file string }

func nodes(th *harness.Thaw) [2]node {
	dir := filepath.Join(th.Dir, "networks")
	return [2]node{{filepath.Join(dir, "a.json")}, {filepath.Join(dir, "b.json")}}
}

// status asks the node; an error is that it cannot be asked.
func (n node) status() (s gateway.Status, err error) {
	var cfg gateway.Config
	b, err := os.ReadFile(n.file)
	if err == nil {
		err = json.Unmarshal(b, &cfg)
	}
	if err != nil {
		return s, err
	}
	return status(cfg.Status)
}

// status asks a gateway at its socket.
func status(socket string) (s gateway.Status, err error) {
	c, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return s, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	return s, json.NewDecoder(c).Decode(&s)
}

// pid is the node's process; 0 = there is none.
func (n node) pid() int {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		line, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if pid, no := strconv.Atoi(e.Name()); err == nil && no == nil && strings.HasSuffix(string(line), "\x00gateway\x00--config\x00"+n.file+"\x00") {
			return pid
		}
	}
	return 0
}

// ready waits until the first node is master of as many pairs, and the other one knows their connections.
func ready(t *testing.T, th *harness.Thaw, pairs int) {
	t.Helper()
	n := nodes(th)
	var last string
	defer func() {
		if t.Failed() {
			t.Log(last)
		}
	}()
	harness.Eventually(t, patient, "node a is master and b in step", func() bool {
		a, err1 := n[0].status()
		b, err2 := n[1].status()
		last = fmt.Sprintf("%+v %v\n%+v %v", a, err1, b, err2)
		if err1 != nil || err2 != nil || a.Role != havip.Master || b.Role != havip.Backup || !b.Full || len(a.Pairs) != pairs || len(b.Pairs) != pairs {
			return false
		}
		return inStep(append(a.Pairs, b.Pairs...))
	})
}

// inStep says that all pairs have connections that both nodes know.
func inStep(pairs []gateway.PairStatus) bool {
	return !slices.ContainsFunc(pairs, func(p gateway.PairStatus) bool { return !p.Link || !p.InStep || p.Connections == 0 })
}

// takenOver waits until the second node is master.
func takenOver(t *testing.T, th *harness.Thaw) {
	t.Helper()
	harness.Eventually(t, patient, "node b is master", func() bool { s, err := nodes(th)[1].status(); return err == nil && s.Role == havip.Master })
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if pid == 0 {
		t.Fatal("no process to kill")
	}
	must(t, syscall.Kill(pid, syscall.SIGKILL))
}

// changed builds a program from other sources for a control.
func changed(t *testing.T, changes ...harness.Change) (bin string) {
	t.Helper()
	dir, err := harness.BuildChanged(changes, "cmd/thaw", "test/function")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// nothingIsLeft looks for what a thaw dev that has ended could have left.
func nothingIsLeft(t *testing.T, th *harness.Thaw) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), th.Dir) {
		t.Errorf("mounts are left below %s", th.Dir)
	}
	for _, n := range nodes(th) {
		if pid := n.pid(); pid != 0 {
			t.Errorf("process %d is left: %s", pid, n.file)
		}
	}
	for _, pattern := range []string{"ns/*", "a/*", "b/*", "*.json"} {
		if left, _ := filepath.Glob(filepath.Join(th.Dir, "networks", pattern)); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	// Those of namespaces that nobody holds go a moment later.
	var left []string
	for end := time.Now().Add(patient); ; time.Sleep(10 * time.Millisecond) {
		devices, err := net.Interfaces()
		must(t, err)
		left = nil
		for _, d := range devices {
			if strings.HasPrefix(d.Name, "thaw") || strings.HasPrefix(d.Name, "gw") {
				left = append(left, d.Name)
			}
		}
		if len(left) == 0 || time.Now().After(end) {
			break
		}
	}
	if len(left) > 0 {
		t.Errorf("devices are left: %v", left)
	}
}
