package slots

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/instance"
	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/internal/telemetry"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// functionEnv makes the test binary a function.
const functionEnv = "THAW_SLOTS_FUNCTION"

func TestMain(m *testing.M) {
	if os.Getenv(functionEnv) != "" {
		function()
		return
	}
	os.Exit(linktest.Main(m))
}

// network is a node on the way to a tenant's server, and the store that it follows.
type network struct {
	t     *testing.T
	node  *Node
	store *objects.Store
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	host, gw, server := linktest.New(t), linktest.New(t), linktest.New(t)
	under := linktest.NewSwitch(t)
	under.Plug(t, host, "under", "192.0.2.1/24")
	under.Plug(t, gw, "under", "192.0.2.11/24")
	linktest.Cable(t, link.End{In: gw, Name: "tenant"}, link.End{In: server, Name: "eth0"})
	linktest.Up(t, server, "eth0", "10.0.0.10/24")
	c := linktest.Open(t, server)
	eth0, err := c.Device("eth0")
	if err == nil {
		err = errors.Join(
			c.SetNeighbor(eth0.Index, netip.MustParseAddr("10.0.0.1"), [6]byte{2, 0, 0, 0, 0, 1}),
			c.SetRoute(link.Route{To: netip.MustParsePrefix("100.64.0.0/10"), Via: netip.MustParseAddr("10.0.0.1"), Device: "eth0"}),
		)
	}
	if err != nil {
		t.Fatal(err)
	}
	member(t, gw)
	echo(t, server)

	dir := t.TempDir()
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), tunnel.MountPins(dir)); err != nil {
		t.Skip("cannot mount a file system of type bpf here: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	n := &network{t: t, store: objects.New(state.Memory(), time.Now)}
	if err := host.Do(func() (err error) {
		n.node, err = Open(Config{Device: "under", Prefix: "100.64.0.0/24", Ready: 2, Pin: filepath.Join(dir, "node"), Log: slog.New(slog.DiscardHandler)})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	synced, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- n.node.Run(ctx, n.store, func() { close(synced) }) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-ended, n.node.Close()); err != nil {
			t.Error(err)
		}
	})
	<-synced
	return n
}

// gateway makes the object that says where the tunnels of a subnet lead.
func (n *network) gateway() {
	n.t.Helper()
	g := &api.Gateway{}
	g.Namespace, g.Name, g.Spec.Subnet = "default", "blue-web", "blue/web"
	o, err := n.store.Create(context.Background(), api.Gateways, g)
	if err != nil {
		n.t.Fatal(err)
	}
	g = o.(*api.Gateway)
	g.Status.ID, g.Status.Key, g.Status.Address, g.Status.State = 1, 7, "192.0.2.11", api.PairActive
	if _, err := n.store.UpdateStatus(context.Background(), api.Gateways, g); err != nil {
		n.t.Fatal(err)
	}
	await(n.t, "an attached instance", func() bool {
		f, err := n.node.Attach("default", "blue/web")
		if err == nil {
			f.Close()
		}
		return err == nil
	})
}

// TestGatewayObjectsLeadThere: a node attaches instances to the subnets that have a Gateway in the store, and lets go of those whose Gateway
// goes.
func TestGatewayObjectsLeadThere(t *testing.T) {
	n := newNetwork(t)
	metrics, err := telemetry.New(nil)
	if err == nil {
		err = n.node.Measure(metrics.Meter("network"))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.node.Attach("default", "blue/web"); err == nil {
		t.Error("attached to a subnet without a gateway")
	}
	n.gateway()
	f, err := n.node.Attach("default", "blue/web")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var c net.Conn
	if err := link.DoIn(f, func() (err error) { c, err = net.DialTCP("tcp4", nil, server); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := hello(c); err != nil {
		t.Error(err)
	}
	w := httptest.NewRecorder()
	metrics.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{`thaw_network_slots{state="used"} `, `thaw_network_drops_total{reason="spoofed"} 0`, `thaw_network_packets_total{direction="in"} `} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("metrics lack %q:\n%s", want, w.Body)
		}
	}
	if _, err := n.store.Delete(context.Background(), api.Gateways, "default", "blue-web", "", ""); err != nil {
		t.Fatal(err)
	}
	await(t, "the end of a subnet", func() bool {
		f, err := n.node.Attach("default", "blue/web")
		if err == nil {
			f.Close()
		}
		return err != nil
	})
}

// server is the tenant's.
var server = &net.TCPAddr{IP: net.IPv4(10, 0, 0, 10), Port: 7}

func hello(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 5))
	return err
}

// function is what an instance runs: it says whether it reaches the server.
func function() {
	_ = http.ListenAndServe(":"+os.Getenv("PORT"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c, err := net.DialTimeout("tcp4", server.String(), 5*time.Second)
		if err == nil {
			defer c.Close()
			err = hello(c)
		}
		fmt.Fprint(w, "reached: ", err == nil, " ", err)
	}))
}

// TestFunctionReachesItsTenant runs functions in sandboxes, from the annotation to the server's answer. One without the annotation is the
// control.
func TestFunctionReachesItsTenant(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("sandboxes need root")
	}
	n := newNetwork(t)
	n.gateway()
	var mu sync.Mutex
	dials := map[string]instance.Dialer{}
	agent, err := instance.New(instance.Config{
		Dir: t.TempDir(), Provider: "sandbox", Networks: n.node, Shutdown: 5 * time.Second,
		Sidecar: func(in endpoints.Instance, _ *api.Revision, dial instance.Dialer) instance.Sidecar {
			mu.Lock()
			defer mu.Unlock()
			dials[in.ID] = dial
			return sidecar{}
		},
	})
	if errors.Is(err, provider.ErrUnsupported) {
		t.Skip("no sandboxes here: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	last := map[api.RevisionID]*endpoints.Snapshot{}
	agent.Subscribe(func(s *endpoints.Snapshot) {
		mu.Lock()
		defer mu.Unlock()
		last[s.Revision] = s
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, subnet := range []string{"blue/web", ""} {
		rev := &api.Revision{}
		rev.Namespace, rev.Name = "default", "f"+strings.ReplaceAll(subnet, "/", "-")
		rev.Annotations = map[string]string{}
		if subnet != "" {
			rev.Annotations[api.AnnotationSubnet] = subnet
		}
		rev.Spec.Containers = []api.Container{{Name: "f", Image: "exec://" + self, Env: []api.EnvVar{{Name: functionEnv, Value: "1"}}}}
		agent.SetRevision(rev)
		agent.Scale(rev.ID(), 1, time.Now())
		var in endpoints.Instance
		await(t, "instance of "+rev.Name, func() bool {
			mu.Lock()
			defer mu.Unlock()
			s := last[rev.ID()]
			if s != nil && s.Failure != nil {
				t.Fatal(s.Failure.Message)
			}
			if s == nil || s.Count(endpoints.Ready) != 1 {
				return false
			}
			in = s.Instances[0]
			return true
		})
		client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				mu.Lock()
				dial := dials[in.ID]
				mu.Unlock()
				return dial(ctx, network, addr)
			},
		}}
		resp, err := client.Get("http://" + in.Addr + "/")
		if err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := fmt.Sprint("reached: ", subnet != ""); err != nil || !strings.HasPrefix(string(answer), want) {
			t.Errorf("subnet %q: %q, %v", subnet, answer, err)
		}
		if in.Start.Net.IsZero() != (subnet == "") {
			t.Errorf("subnet %q: attached at %v", subnet, in.Start.Net)
		} else if subnet != "" {
			t.Logf("attached in %v", in.Start.Net.Sub(in.Start.Code))
		}
	}
	stop()
	await(t, "end of the instance's slot", func() bool { return n.node.pool.Stats().Used == 0 })
}

// sidecar is none.
type sidecar struct{}

func (sidecar) InFlight() int               { return 0 }
func (sidecar) Drain(context.Context) error { return nil }
func (sidecar) Close()                      {}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}

func member(t *testing.T, gw *link.Namespace) {
	t.Helper()
	var m tunnel.Member
	err := gw.Do(func() (err error) { m, err = tunnel.OpenMember(tunnel.Config{Device: "under"}); return err })
	if errors.Is(err, tunnel.ErrUnsupported) || errors.Is(err, unix.EPERM) {
		t.Skip("not on this machine: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	d, err := linktest.Open(t, gw).Device("tenant")
	if err == nil {
		err = errors.Join(
			m.AddTenant(tunnel.Tenant{VPC: 7, Local: netip.MustParseAddr("192.0.2.11"), Host: d.Index}),
			m.SetWorkers(7, []tunnel.Peer{{Outer: netip.MustParseAddr("192.0.2.1"), Prefix: netip.MustParsePrefix("100.64.0.0/24")}}),
		)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func echo(t *testing.T, ns *link.Namespace) {
	t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", "0.0.0.0:7"); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 100)
				for {
					k, err := c.Read(b)
					if err != nil {
						return
					}
					if _, err := c.Write(b[:k]); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// TestSubnetOf: a Gateway that does not say enough yet is not there.
func TestSubnetOf(t *testing.T) {
	g := func(id, key int64, address, pair string) *api.Gateway {
		g := &api.Gateway{}
		g.Status.ID = id
		g.Namespace, g.Spec.Subnet = "ns", "blue/web"
		g.Status.Key, g.Status.Address, g.Status.State = key, address, pair
		return g
	}
	for _, bad := range []*api.Gateway{g(1, 0, "192.0.2.1", ""), g(1, 7, "", ""), g(1, 7, "x", ""), g(1, 1<<32, "192.0.2.1", ""), g(1, -1, "192.0.2.1", ""), g(0, 7, "192.0.2.1", ""), g(1<<32, 7, "192.0.2.1", "")} {
		if s, ok := subnetOf(bad); ok {
			t.Errorf("%+v: %+v", bad.Status, s)
		}
	}
	s, ok := subnetOf(g(3, 1<<32-1, "192.0.2.1", api.PairDraining))
	if !ok || s.Namespace != "ns" || s.Name != "blue/web" || s.Key != 1<<32-1 || len(s.Pairs) != 1 || !s.Pairs[0].Draining || s.Pairs[0].ID != 3 {
		t.Errorf("%+v, %t", s, ok)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range []Config{{Device: "lo", Prefix: "x"}, {Device: "none-such", Prefix: "100.64.0.0/24"}, {Device: "lo", Prefix: "100.64.0.0/24", Address: "x"}} {
		if n, err := Open(c); err == nil {
			n.Close()
			t.Errorf("%+v is taken", c)
		}
	}
}

// TestPairsOfAGateway: workers go to those that are there, and keep what those have that drain.
func TestPairsOfAGateway(t *testing.T) {
	g := &api.Gateway{}
	g.Namespace, g.Spec.Subnet = "default", "blue/web"
	g.Status.ID, g.Status.Key, g.Status.Address = 1, 7, "192.0.2.1"
	for _, c := range []struct {
		pairs []api.GatewayPair
		want  string
	}{
		{nil, "[{1 192.0.2.1 false}]"},
		{[]api.GatewayPair{{ID: 1, Address: "192.0.2.1", State: api.PairCreating}}, "[{1 192.0.2.1 false}]"},
		{[]api.GatewayPair{
			{ID: 1, Address: "192.0.2.1", State: api.PairActive}, {ID: 2, Address: "192.0.2.2", State: api.PairCreating},
			{ID: 3, Address: "192.0.2.3", State: api.PairDraining}, {ID: 4, Address: "192.0.2.4", State: api.PairActive},
		}, "[{1 192.0.2.1 false} {3 192.0.2.3 true} {4 192.0.2.4 false}]"},
	} {
		g.Status.Pairs = c.pairs
		if s, ok := subnetOf(g); !ok || fmt.Sprint(s.Pairs) != c.want {
			t.Errorf("%v: %v, want %s", c.pairs, s.Pairs, c.want)
		}
	}
}
