package tunnel

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
)

// TestBench measures what a packet costs, beside the same nodes without a tunnel, in alternation, and fails when a figure of
// docs/netproxy.md is missed (make bench-tunnel). Cost per packet is the kernel's own account of the programs and
// holds on a busy machine; the ratios do not.
func TestBench(t *testing.T) {
	if os.Getenv("THAW_BENCH_TUNNEL") == "" {
		t.Skip("measures: make bench-tunnel")
	}
	for _, d := range []Driver{Ebpf, EbpfIPIP, VXLAN} {
		t.Run(string(d), func(t *testing.T) { measure(t, d) })
	}
}

func measure(t *testing.T, d Driver) {
	l := newLab(t, d, nil)
	g := l.gateway(d, "192.0.2.11")
	x := g.tenant(1)
	i := l.instance(1).attach(1)
	l.pairs(1, Pair{ID: 1, Outer: g.at})
	echo(t, x.server, "")
	plain := l.plain(g, x)
	stop, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		t.Skip("the kernel does not count: ", err)
	}
	defer stop.Close()

	tunnelled, direct := dialUDP(t, i.ns, "", serverAt+":7"), dialUDP(t, plain, "", "10.0.1.10:7")
	for _, c := range []*net.UDPConn{tunnelled, direct} {
		if _, err := ask(c, "x", 5*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	var rtt, plainRTT []time.Duration
	for range 20 {
		rtt = append(rtt, roundTrips(t, tunnelled, 200)...)
		plainRTT = append(plainRTT, roundTrips(t, direct, 200)...)
	}
	s := newSink(t, x.server)
	flood, plainFlood := dialUDP(t, i.ns, "", serverAt+":9"), dialUDP(t, plain, "", "10.0.1.10:9")
	var ratios, control []float64
	for range 9 {
		a, b, c := rate(s, plainFlood), rate(s, flood), rate(s, plainFlood)
		ratios, control = append(ratios, 2*b/(a+c)), append(control, a/c)
	}
	perPacket := map[string]float64{}
	for name, p := range map[string]*ebpf.Program{
		"from instance": l.worker.(*worker).progs.cable, "from worker": g.member.(*member).progs.uplink,
		"from tenant": g.member.(*member).progs.cable, "from pair": l.worker.(*worker).progs.uplink,
	} {
		st, err := p.Stats()
		if err != nil {
			t.Fatal(err)
		}
		perPacket[name] = float64(st.Runtime) / float64(max(1, st.RunCount))
	}
	slices.Sort(ratios)
	slices.Sort(control)
	slices.Sort(rtt)
	slices.Sort(plainRTT)
	p50, plain50 := rtt[len(rtt)/2], plainRTT[len(plainRTT)/2]
	t.Logf("ns a packet: %.0f from instance, %.0f from worker, %.0f from tenant, %.0f from pair", perPacket["from instance"], perPacket["from worker"], perPacket["from tenant"], perPacket["from pair"])
	t.Logf("RTT p50 %v, plain %v; small packets %.2f of plain (plain of plain %.2f to %.2f)", p50, plain50, ratios[4], control[1], control[7])
	if d != Ebpf {
		return
	}
	for name, most := range map[string]float64{"from instance": 800, "from tenant": 800, "from worker": 400, "from pair": 400} {
		if perPacket[name] > most {
			t.Errorf("%s: %.0f ns a packet, want at most %.0f", name, perPacket[name], most)
		}
	}
	if float64(p50) > 1.2*float64(plain50) && p50 > plain50+5*time.Microsecond {
		t.Errorf("RTT p50 %v, plain %v", p50, plain50)
	}
	if control[1] > 0.9 && control[7] < 1.1 && ratios[4] < 0.8 {
		t.Errorf("small packets %.2f of plain", ratios[4])
	}
}

// plain is an instance without a tunnel: the same nodes forward.
func (l *lab) plain(g *gateway, x *tenant) *link.Namespace {
	t := l.t
	ns := linktest.New(t)
	linktest.Cable(t, link.End{In: l.host, Name: "plain"}, link.End{In: ns, Name: "eth0"})
	linktest.Up(t, l.host, "plain", "10.7.0.1/24")
	linktest.Up(t, ns, "eth0", "10.7.0.2/24")
	linktest.Cable(t, link.End{In: g.ns, Name: "plain"}, link.End{In: x.server, Name: "eth1"})
	linktest.Up(t, g.ns, "plain", "10.0.1.1/24")
	linktest.Up(t, x.server, "eth1", "10.0.1.10/24")
	for _, n := range []*link.Namespace{l.host, g.ns} {
		linktest.Sysctl(t, n, "net/ipv4/ip_forward", "1")
	}
	linktest.Route(t, ns, "0.0.0.0/0", "10.7.0.1")
	linktest.Route(t, l.host, "10.0.1.0/24", "192.0.2.11")
	linktest.Route(t, g.ns, "10.7.0.0/24", netip.MustParseAddr(workerAt).String())
	linktest.Route(t, x.server, "10.7.0.0/24", "10.0.1.1")
	return ns
}

func roundTrips(t testing.TB, c *net.UDPConn, n int) (all []time.Duration) {
	b, word := make([]byte, 100), []byte("0123456789012345")
	for range n {
		began := time.Now()
		_ = c.SetDeadline(began.Add(5 * time.Second))
		if _, err := c.Write(word); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(b); err != nil {
			t.Fatal(err)
		}
		all = append(all, time.Since(began))
	}
	return all
}

// rate sends small packets for a while and returns how many arrive in a second. The server reads on the same processors, so what is
// measured is the cost of the whole way.
func rate(s sink, c *net.UDPConn) float64 {
	const span = 200 * time.Millisecond
	done := make(chan int)
	go func() {
		n, b := 0, make([]byte, 100)
		_ = s.c.SetReadDeadline(time.Now().Add(span + 50*time.Millisecond))
		for {
			if _, err := s.c.Read(b); err != nil {
				done <- n
				return
			}
			n++
		}
	}()
	word := make([]byte, 64)
	for end := time.Now().Add(span); time.Now().Before(end); {
		for range 32 {
			_, _ = c.Write(word)
		}
	}
	return float64(<-done) / span.Seconds()
}
