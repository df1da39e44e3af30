package networks

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/test/harness"
)

// The network between the nodes of a cluster: this namespace is the one with instances and everything else, two others have the gateways.
const (
	nodesDevice = "under"
	workerAt    = "192.0.2.11"
	gatewayAt   = "192.0.2.1"
)

// farm is a cluster of processes with two gateway nodes.
type farm struct {
	*harness.Thaw
	t     *testing.T
	bin   string
	dir   string
	etcd  []string
	agent []string // its command line
	procs map[string]*harness.Process
	nodes [2]farmNode
}

type farmNode struct {
	ns   *link.Namespace
	file string
}

func startFarm(t *testing.T, bin string) *farm {
	t.Helper()
	f := &farm{t: t, bin: bin, dir: t.TempDir(), procs: map[string]*harness.Process{}}
	conn, err := link.Open()
	must(t, err)
	defer conn.Close()
	here, err := link.Current()
	must(t, err)
	t.Cleanup(func() { here.Close() })
	must(t, conn.AddBridge("switch"))
	t.Cleanup(func() {
		if conn, err := link.Open(); err == nil {
			defer conn.Close()
			for _, d := range []string{nodesDevice, "port0", "port1", "switch"} { // with their other ends; namespaces go later
				must(t, conn.DeleteDevice(d))
			}
		}
	})
	plug := func(ns *link.Namespace, port, at string) {
		t.Helper()
		must(t, link.Cable(link.End{In: here, Name: port}, link.End{In: ns, Name: nodesDevice}))
		must(t, errors.Join(conn.Enslave(port, "switch"), conn.SetUp(port, true)))
		address(t, ns, nodesDevice, at+"/24")
	}
	plug(here, "port", workerAt)
	for i := range f.nodes {
		f.nodes[i].ns = namespace(t)
		plug(f.nodes[i].ns, fmt.Sprint("port", i), fmt.Sprint("192.0.2.", 2+i))
	}
	a, b := f.nodes[0].ns, f.nodes[1].ns
	must(t, link.Cable(link.End{In: a, Name: "sync"}, link.End{In: b, Name: "sync"}))
	address(t, a, "sync", "198.51.100.1/30")
	address(t, b, "sync", "198.51.100.2/30")

	t.Cleanup(f.stop)
	f.etcd = []string{"--etcd", "http://" + f.run("etcd", "etcd", "--data", f.dir+"/etcd", "--listen", workerAt+":0", "--peers", "127.0.0.1:0")}
	store := []string{"--store", "http://" + f.run("store", "store", "--listen", "127.0.0.1:0", "--dir", f.dir+"/store")}
	role := func(name string, args ...string) string {
		return f.run(name, append(append([]string{name, "--listen", "127.0.0.1:0"}, f.etcd...), args...)...)
	}
	at := role("control", append(store, "--data", f.dir+"/control")...)
	role("autoscaler")
	f.agent = append(append([]string{"agent", "--listen", "127.0.0.1:0", "--feed", "127.0.0.1:0", "--data", f.dir + "/agent", "--provider", "sandbox",
		"--net-device", nodesDevice, "--net-prefix", "100.64.0.0/22", "--net-slots", "4"}, f.etcd...), store...)
	f.run("agent", f.agent...)
	role("activator")
	f.Thaw = harness.Over(t, bin, role("router"), at, f.dir+"/control")
	return f
}

func (f *farm) run(name string, args ...string) (listen string) {
	f.t.Helper()
	p, err := harness.Run(f.bin, args...)
	must(f.t, err)
	f.procs[name] = p
	return p.Ready["listen"]
}

// gateway starts a node with gateways; it goes on in the namespaces that an earlier one of the same number made.
func (f *farm) gateway(i int) {
	f.t.Helper()
	n := &f.nodes[i]
	name := fmt.Sprint("gw-", i)
	n.file = filepath.Join(f.dir, name+".yaml")
	must(f.t, os.WriteFile(n.file, fmt.Appendf(nil, `name: %s
device: %s
outer: [%s/24]
priority: %d
advert: 100ms
sync: sync,198.51.100.%d,198.51.100.%d
status: %s
namespaces: %s
pin: %s
`, name, nodesDevice, gatewayAt, 200-100*i, 1+i, 2-i, f.status(i), filepath.Join(f.dir, name), filepath.Join(f.dir, name+"-pins")), 0o600))
	must(f.t, n.ns.Do(func() error {
		p, err := harness.Run(f.bin, append([]string{"gateway", "--config", n.file}, f.etcd...)...)
		f.procs[name] = p
		return err
	}))
}

// status is a short path: that of a socket has 107 bytes at most.
func (f *farm) status(i int) string { return fmt.Sprintf("/tmp/thaw-farm-%d-%d", os.Getpid(), i) }

func (f *farm) stop() {
	for _, name := range []string{"agent", "gw-0", "gw-1", "router", "activator", "autoscaler", "control", "store", "etcd"} {
		if p := f.procs[name]; p != nil {
			if err := p.Stop(); err != nil {
				f.t.Errorf("%s: %v", name, err)
			}
			if f.t.Failed() {
				f.t.Logf("%s:\n%s", name, harness.Tail(p.Log(), 3000))
			}
		}
	}
	for i := range f.nodes {
		os.Remove(f.status(i))
		held, _ := filepath.Glob(filepath.Join(f.dir, fmt.Sprintf("gw-%d", i), "*")) // of a test that has failed
		for _, h := range held {
			_ = link.Unname(h)
		}
		_ = syscall.Unmount(filepath.Join(f.dir, fmt.Sprintf("gw-%d-pins", i)), syscall.MNT_DETACH)
	}
}

// Gateways of a cluster: control gives a subnet to the two nodes, and says so when there are none; a function gets through, its connection lives on
// when the gateway that carries it is killed, while etcd is away, and when its agent is killed and comes back; what is deleted is taken away.
func TestClusterGateways(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	shop := newTenant(t, "shop")
	f := startFarm(t, bin)
	for i := range f.nodes {
		shop.uplink(f.nodes[i].ns, i)
	}
	verb(t, f.Thaw, "vpc", "create", "shop", "--cidr", "10.0.0.0/16")
	verb(t, f.Thaw, "subnet", "create", "a", "--vpc", "shop", "--cidr", subnet, "--bridge", "br0")
	doc := strings.ReplaceAll(service("inside", append(one, "net.thaw.run/subnet: shop/a")...), "$BIN", bin)
	if code, _, stderr := f.Verb(doc, "apply", "-f", "-", "--no-wait"); code != 0 {
		t.Fatal(stderr)
	}
	harness.Eventually(t, patient, "the gateway says what is missing", func() bool {
		o, err := f.Client.Get(t.Context(), api.Gateways, "default", "a")
		return err == nil && strings.Contains(fmt.Sprint(o.(*api.Gateway).Status), "no two gateway nodes are there")
	})
	for i := range f.nodes {
		f.gateway(i)
	}
	f.active("both members are active")
	harness.Eventually(t, patient, "the function is ready", func() bool {
		o, err := f.Client.Get(t.Context(), api.Services, "default", "inside")
		return err == nil && client.Readiness(o).Status == api.True
	})
	before := talking(t, f.Thaw, inside, server)
	if whose, at, _ := strings.Cut(before.Last, " "); whose != "shop" || !strings.HasPrefix(at, havipA+":") {
		t.Errorf("the server of %s was reached from %s", whose, at)
	}
	same := func(what string) {
		t.Helper()
		if after := talking(t, f.Thaw, inside, server); after.Last != before.Last {
			t.Errorf("%s: the server sees %q instead of %q", what, after.Last, before.Last)
		}
	}

	harness.Eventually(t, patient, "the other node knows the connection", func() bool { // what it has not heard of dies with the first one
		s, err := status(f.status(1))
		return err == nil && s.Full && len(s.Pairs) == 1 && inStep(s.Pairs)
	})
	f.procs["gw-0"].Kill()
	f.until("the other node is master", func(g *api.Gateway) bool {
		for _, m := range g.Status.Members {
			if m.Node == "gw-1" && m.Role == api.RoleMaster {
				return true
			}
		}
		return false
	})
	same("the master was killed")
	f.gateway(0)
	f.active("the node is back")
	same("the node is back")

	f.procs["agent"].Kill()
	f.run("agent", f.agent...)
	same("the agent was killed and is back")

	f.procs["etcd"].Signal(syscall.SIGSTOP)
	time.Sleep(4 * time.Second) // the leases of the nodes have run out
	same("etcd does not answer")
	f.procs["etcd"].Signal(syscall.SIGCONT)

	verb(t, f.Thaw, "delete", "inside")
	harness.Eventually(t, patient, "the subnet can be deleted", func() bool { code, _, _ := f.Verb("", "subnet", "delete", "a"); return code == 0 })
	harness.Eventually(t, patient, "the gateway is gone", func() bool {
		_, err := f.Client.Get(t.Context(), api.Gateways, "default", "a")
		return errors.Is(err, client.ErrNotFound)
	})
	harness.Eventually(t, patient, "the nodes have taken its namespaces away", func() bool {
		left, _ := filepath.Glob(filepath.Join(f.dir, "gw-?", "*"))
		return len(left) == 0
	})
}

func (f *farm) until(what string, ok func(*api.Gateway) bool) {
	f.t.Helper()
	harness.Eventually(f.t, patient, what, func() bool {
		o, err := f.Client.Get(f.t.Context(), api.Gateways, "default", "a")
		return err == nil && ok(o.(*api.Gateway))
	})
}

func (f *farm) active(what string) {
	f.t.Helper()
	f.until(what, func(g *api.Gateway) bool { return g.Status.State == api.PairActive && len(g.Status.Members) == 2 })
}

// uplink gives a gateway node a bridge br0 into the tenant's network.
func (x *tenant) uplink(ns *link.Namespace, i int) {
	x.t.Helper()
	here, err := link.Current()
	must(x.t, err)
	defer here.Close()
	conn, err := link.Open()
	must(x.t, err)
	defer conn.Close()
	inside, err := ns.Open()
	must(x.t, err)
	defer inside.Close()
	port := fmt.Sprint(x.name, "gw", i)
	must(x.t, link.Cable(link.End{In: here, Name: port}, link.End{In: ns, Name: "up0"}))
	must(x.t, errors.Join(conn.Enslave(port, x.bridge), conn.SetUp(port, true), inside.AddBridge("br0"), inside.Enslave("up0", "br0"), inside.SetUp("up0", true)))
}

// Two nodes cannot have the same addresses for their instances while both are there.
func TestClusterPrefixes(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	f := startFarm(t, bin)
	_, err := harness.Run(bin, append([]string{"agent", "--name", "second", "--listen", "127.0.0.1:0", "--feed", "127.0.0.1:0", "--data", f.dir + "/second", "--provider", "process",
		"--net-device", nodesDevice, "--net-prefix", "100.64.2.0/24", "--net-slots", "1"}, f.etcd...)...)
	if err == nil || !strings.Contains(err.Error(), "overlap 100.64.0.0/22 of the node agent-0") {
		t.Errorf("got %v", err)
	}
}
