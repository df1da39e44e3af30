package tunnel

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestConformance is what every driver must carry, with every driver at the other end that speaks the same.
func TestConformance(t *testing.T) {
	for _, ends := range [][2]Driver{
		{Ebpf, Ebpf}, {EbpfIPIP, EbpfIPIP}, {VXLAN, VXLAN},
		{KernelGRE, KernelGRE}, {KernelGRE, Ebpf}, {Ebpf, KernelGRE},
		{KernelIPIP, KernelIPIP}, {KernelIPIP, EbpfIPIP}, {EbpfIPIP, KernelIPIP},
	} {
		t.Run(string(ends[0])+"/"+string(ends[1]), func(t *testing.T) {
			l := newLab(t, ends[0], nil)
			g := l.gateway(ends[1], "192.0.2.11")
			tenant := g.tenant(1 << 20)
			echo(t, tenant.server, "a")
			i := l.instance(5).attach(1 << 20)
			l.pairs(1<<20, Pair{ID: 1, Outer: g.at})
			t.Run("udp", func(t *testing.T) {
				if got, err := ask(dialUDP(t, i.ns, "", serverAt+":7"), "x", 5*time.Second); err != nil || got != "ax" {
					t.Fatalf("%q, %v; worker %v", got, err, l.stats())
				}
			})
			t.Run("tcp", func(t *testing.T) {
				c := dialTCP(t, i.ns, serverAt+":7")
				sent := make([]byte, 1<<20)
				for i := range sent {
					sent[i] = byte(rand.Uint32())
				}
				go func() { _, _ = c.Write(sent); _ = c.CloseWrite() }()
				got, err := io.ReadAll(c)
				if err != nil || !bytes.Equal(got, sent) {
					t.Errorf("%d bytes of %d came back, %v", len(got), len(sent), err)
				}
			})
			t.Run("full", func(t *testing.T) {
				c := dialUDP(t, i.ns, "", serverAt+":7")
				rc, err := c.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				if err := rc.Control(func(fd uintptr) {
					_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
				}); err != nil {
					t.Fatal(err)
				}
				full := strings.Repeat("x", 1500-ends[0].Overhead()-28)
				got, err := ask(c, full[1:], 5*time.Second) // the answer is one byte longer
				if err != nil || got != "a"+full[1:] {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				if _, err := c.Write([]byte(full + "x")); err == nil {
					t.Error("one byte more was sent with DF")
				}
			})
			t.Run("icmp", func(t *testing.T) { ping(t, i, serverAt) })
		})
	}
}

func (l *lab) stats() Stats {
	s, err := l.worker.Stats()
	if err != nil {
		l.t.Fatal(err)
	}
	return s
}

// ping sends an echo request and wants its answer.
func ping(t *testing.T, i *inst, to string) {
	var c *net.IPConn
	in(t, i.ns, func() (err error) {
		c, err = net.DialIP("ip4:icmp", nil, &net.IPAddr{IP: net.ParseIP(to)})
		return err
	})
	defer c.Close()
	req := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1}
	var sum uint32
	for i := 0; i < len(req); i += 2 {
		sum += uint32(req[i])<<8 | uint32(req[i+1])
	}
	sum = ^(sum + sum>>16)
	req[2], req[3] = byte(sum>>8), byte(sum)
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write(req); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil || n != 28 || b[20] != 0 || !bytes.Equal(b[24:n], req[4:]) {
		t.Errorf("answer with its IP header %x, %v", b[:n], err)
	}
}
