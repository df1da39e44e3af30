package tunnel

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/thawrun/thaw/internal/link/linktest"
)

// Packets, written here once more than the programs do: what they read and write is compared with this.

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// ipv4 puts a header in front of a payload.
func ipv4(src, dst string, proto, tos byte, flags uint16, payload []byte) []byte {
	h := make([]byte, 20, 20+len(payload))
	h[0], h[1], h[8], h[9] = 0x45, tos, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(h[6:], flags)
	copy(h[12:], netip.MustParseAddr(src).AsSlice())
	copy(h[16:], netip.MustParseAddr(dst).AsSlice())
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

func udp(from, to uint16, data string) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(data)))
	return append(append(b, 0, 0), data...) // no checksum
}

// greOf is GRE with a key around a packet.
func greOf(flags uint16, proto uint16, key Key, inner []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, flags)
	b = binary.BigEndian.AppendUint16(b, proto)
	b = binary.BigEndian.AppendUint32(b, uint32(key))
	return append(b, inner...)
}

func frame(packet []byte) []byte {
	return append([]byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0}, packet...)
}

const dontFragment = 0x4000

// What programs answer beside tcDrop and tcNext.
const tcRedirect = 7

// bench is a worker and a member whose programs are run on single packets; device 1, the loopback, stands for all cables.
type workbench struct {
	w *worker
	m *member
}

func newWorkbench(t testing.TB, d Driver) *workbench {
	t.Helper()
	ns := linktest.New(t)
	var w Worker
	var m Member
	err := ns.Do(func() (err error) {
		if w, err = OpenWorker(Config{Driver: d, Device: "lo", Local: addr(workerAt), Flows: 1024}); err != nil {
			return err
		}
		m, err = OpenMember(Config{Driver: d, Device: "lo"})
		return err
	})
	if err != nil {
		t.Fatal(skipUnsupported(t, err))
	}
	t.Cleanup(func() { w.Close(); m.Close() })
	gw := addr("192.0.2.11")
	for _, err := range []error{
		w.SetPairs(7, []Pair{{ID: 1, Outer: gw}}),
		w.Attach(Slot{1, addr("100.64.0.5")}, 7),
		m.AddTenant(Tenant{7, gw, 1}),
		m.SetWorkers(7, []Peer{{addr(workerAt), netip.MustParsePrefix(prefix)}}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return &workbench{w.(*worker), m.(*member)}
}

// run has a program look at a packet that came in, and returns what it says and leaves. Here and in the kernel an answer is a signed number.
func run(t testing.TB, p *ebpf.Program, packet []byte) (int, []byte) {
	t.Helper()
	ret, out, err := p.Test(packet)
	if err != nil {
		t.Fatal(err)
	}
	return int(int32(ret)), out
}

// TestOnTheWire compares what the programs write with packets that were written by hand.
func TestOnTheWire(t *testing.T) {
	for _, d := range []Driver{Ebpf, EbpfIPIP} {
		t.Run(string(d), func(t *testing.T) {
			b := newWorkbench(t, d)
			around := func(inner []byte) (byte, []byte) {
				if d == EbpfIPIP {
					return 4, inner
				}
				return 47, greOf(0x2000, 0x0800, 7, inner)
			}
			for _, tos := range []byte{0, 0xb8, 0x02, 0x03} { // none; expedited; able to hear of congestion; has
				for _, size := range []int{0, 1, 500, 1400} {
					up := ipv4("100.64.0.5", serverAt, 17, tos, 0, udp(1000, 7, string(make([]byte, size))))
					down := ipv4(serverAt, "100.64.0.5", 17, tos, dontFragment, udp(7, 1000, string(make([]byte, size))))
					proto, body := around(up)
					outer := ipv4(workerAt, "192.0.2.11", proto, tos, dontFragment, body)
					if ret, got := run(t, b.w.progs.cable, frame(up)); ret != tcRedirect || !bytes.Equal(got, frame(outer)) {
						t.Errorf("from an instance: %d\n%x\nwant\n%x", ret, got, frame(outer))
					}
					if ret, got := run(t, b.m.progs.uplink, frame(outer)); ret != tcRedirect || !bytes.Equal(got, frame(up)) {
						t.Errorf("from a worker: %d\n%x\nwant\n%x", ret, got, frame(up))
					}
					proto, body = around(down)
					outer = ipv4("192.0.2.11", workerAt, proto, tos, dontFragment, body)
					if ret, got := run(t, b.m.progs.cable, frame(down)); ret != tcRedirect || !bytes.Equal(got, frame(outer)) {
						t.Errorf("from a tenant: %d\n%x\nwant\n%x", ret, got, frame(outer))
					}
					if ret, got := run(t, b.w.progs.uplink, frame(outer)); ret != tcRedirect || !bytes.Equal(got, frame(down)) {
						t.Errorf("from a pair: %d\n%x\nwant\n%x", ret, got, frame(down))
					}
				}
			}
			// Marked by the network on the way: the mark goes on inside, or the packet is lost as it would have been without marks.
			for _, tos := range []byte{0x02, 0x00} {
				proto, body := around(ipv4(serverAt, "100.64.0.5", 17, tos, 0, udp(7, 1000, "x")))
				ret, got := run(t, b.w.progs.uplink, frame(ipv4("192.0.2.11", workerAt, proto, 3, dontFragment, body)))
				switch {
				case tos == 0 && ret != tcDrop:
					t.Errorf("congestion is hidden from who cannot hear of it: %d", ret)
				case tos == 2 && (ret != tcRedirect || !bytes.Equal(got, frame(ipv4(serverAt, "100.64.0.5", 17, 3, 0, udp(7, 1000, "x"))))):
					t.Errorf("congestion is not told: %d %x", ret, got)
				}
			}
			if s, err := b.w.Stats(); err != nil || s.Drops[Congested] != 1 || s.Out.Packets != 16 || s.In.Packets != 17 {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
}

// refused are packets for the member at 192.0.2.11, and why they are dropped.
func refused() map[string]struct {
	packet []byte
	why    Reason
} {
	inner := ipv4("100.64.0.5", serverAt, 17, 0, 0, udp(1000, 7, "x"))
	out := func(flags uint16, body []byte) []byte { return ipv4(workerAt, "192.0.2.11", 47, 0, flags, body) }
	good := greOf(0x2000, 0x0800, 7, inner)
	longHeader := append([]byte(nil), out(0, good)...)
	longHeader = slices.Insert(longHeader, 20, 1, 1, 1, 1)
	longHeader[0] = 0x46
	inside := func(at int, v byte) []byte {
		b := slices.Clone(inner)
		b[at] = v
		return out(0, greOf(0x2000, 0x0800, 7, b))
	}
	type x = struct {
		packet []byte
		why    Reason
	}
	return map[string]x{
		"no key":               {out(0, greOf(0, 0x0800, 0, inner)), Malformed},
		"checksum":             {out(0, greOf(0xa000, 0x0800, 7, inner)), Malformed},
		"sequence":             {out(0, greOf(0x3000, 0x0800, 7, inner)), Malformed},
		"routing":              {out(0, greOf(0x6000, 0x0800, 7, inner)), Malformed},
		"version 1":            {out(0, greOf(0x2001, 0x0800, 7, inner)), Malformed},
		"IPv6 inside":          {out(0, greOf(0x2000, 0x86dd, 7, inner)), Malformed},
		"Ethernet inside":      {out(0, greOf(0x2000, 0x6558, 7, inner)), Malformed},
		"GRE cut":              {out(0, good[:6]), Malformed},
		"inside cut":           {out(0, good[:20]), Malformed},
		"nothing inside":       {out(0, good[:8]), Malformed},
		"options outside":      {longHeader, Malformed},
		"inside not version 4": {inside(0, 0x65), Malformed},
		"inside header short":  {inside(0, 0x44), Malformed},
		"first fragment":       {out(0x2000, good), Fragment},
		"later fragment":       {out(3, good), Fragment},
		"unknown key":          {out(0, greOf(0x2000, 0x0800, 8, inner)), UnknownPeer},
		"key 0":                {out(0, greOf(0x2000, 0x0800, 0, inner)), UnknownPeer},
		"another's prefix":     {out(0, greOf(0x2000, 0x0800, 7, ipv4("100.64.4.5", serverAt, 17, 0, 0, udp(1000, 7, "x")))), Spoofed},
		"tenant's own address": {out(0, greOf(0x2000, 0x0800, 7, ipv4("10.0.0.7", serverAt, 17, 0, 0, udp(1000, 7, "x")))), Spoofed},
		"no worker":            {ipv4("192.0.2.66", "192.0.2.11", 47, 0, 0, good), Spoofed},
	}
}

// TestRefused: each is dropped for its reason. The control is the same packet with nothing wrong, in TestOnTheWire.
func TestRefused(t *testing.T) {
	b := newWorkbench(t, Ebpf)
	for name, c := range refused() {
		before, _ := b.m.Stats()
		ret, _ := run(t, b.m.progs.uplink, frame(c.packet))
		after, _ := b.m.Stats()
		if ret != tcDrop || after.Drops[c.why] != before.Drops[c.why]+1 {
			t.Errorf("%s: answer %d, drops %v", name, ret, after.Drops)
		}
	}
	for name, c := range map[string]struct {
		program *ebpf.Program
		packet  []byte
		why     Reason
	}{
		"no pair":             {b.w.progs.uplink, ipv4("192.0.2.12", workerAt, 47, 0, 0, greOf(0x2000, 0x0800, 7, ipv4(serverAt, "100.64.0.5", 17, 0, 0, nil))), UnknownPeer},
		"pair of another VPC": {b.w.progs.uplink, ipv4("192.0.2.11", workerAt, 47, 0, 0, greOf(0x2000, 0x0800, 8, ipv4(serverAt, "100.64.0.5", 17, 0, 0, nil))), UnknownPeer},
		"no such instance":    {b.w.progs.uplink, ipv4("192.0.2.11", workerAt, 47, 0, 0, greOf(0x2000, 0x0800, 7, ipv4(serverAt, "100.64.0.6", 17, 0, 0, nil))), NoInstance},
		"fragment":            {b.w.progs.uplink, ipv4("192.0.2.11", workerAt, 47, 0, 0x2000, greOf(0x2000, 0x0800, 7, ipv4(serverAt, "100.64.0.5", 17, 0, 0, nil))), Fragment},
		"another's address":   {b.w.progs.cable, ipv4("100.64.0.6", serverAt, 17, 0, 0, udp(1, 7, "x")), Spoofed},
		"no ports":            {b.w.progs.cable, ipv4("100.64.0.5", serverAt, 17, 0, 0, []byte{1}), Malformed},
	} {
		before, _ := b.w.Stats()
		ret, _ := run(t, c.program, frame(c.packet))
		after, _ := b.w.Stats()
		if ret != tcDrop || after.Drops[c.why] != before.Drops[c.why]+1 {
			t.Errorf("worker, %s: answer %d, drops %v", name, ret, after.Drops)
		}
	}
	notIP := frame(ipv4("100.64.0.5", serverAt, 17, 0, 0, udp(1, 7, string(make([]byte, 60)))))
	for _, kind := range []uint16{0x0806, 0x86dd, 0x8100, 0x88cc} { // ARP, IPv6, VLAN, LLDP
		binary.BigEndian.PutUint16(notIP[12:], kind)
		if ret, _ := run(t, b.w.progs.cable, notIP); ret != tcDrop {
			t.Errorf("type %#x out of an instance: %d", kind, ret)
		}
		if ret, _ := run(t, b.w.progs.uplink, notIP); ret != tcNext {
			t.Errorf("type %#x into the node: %d, is not for us", kind, ret)
		}
	}
	// What is not for a tunnel is left alone.
	for name, packet := range map[string][]byte{
		"UDP":               ipv4("192.0.2.11", workerAt, 17, 0, 0, udp(1, 2, "x")),
		"GRE for another":   ipv4("192.0.2.11", "192.0.2.99", 47, 0, 0, greOf(0x2000, 0x0800, 7, nil)),
		"a bad one as well": ipv4("192.0.2.11", "192.0.2.99", 47, 0, 0x2000, nil),
	} {
		for _, p := range []*ebpf.Program{b.w.progs.uplink, b.m.progs.uplink} {
			if ret, _ := run(t, p, frame(packet)); ret != tcNext {
				t.Errorf("%s: answer %d", name, ret)
			}
		}
	}
}

// FuzzPrograms compares the programs with readers written in Go: what comes from a worker, from a pair and out of an instance.
func FuzzPrograms(f *testing.F) {
	for _, c := range refused() {
		f.Add(c.packet)
	}
	inner := ipv4("100.64.0.5", serverAt, 17, 0, 0, udp(1, 7, "x"))
	f.Add(inner)
	f.Add(ipv4(workerAt, "192.0.2.11", 47, 0, dontFragment, greOf(0x2000, 0x0800, 7, inner)))
	f.Add(ipv4("192.0.2.11", workerAt, 47, 3, dontFragment, greOf(0x2000, 0x0800, 7, ipv4(serverAt, "100.64.0.5", 6, 0, 0, udp(1, 7, "x")))))
	b := newWorkbench(f, Ebpf)
	worker, pair, instance := []byte{192, 0, 2, 1}, []byte{192, 0, 2, 11}, []byte{100, 64, 0, 5}
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) < 20 || len(packet) > 1400 { // the kernel's test runner takes no less with type IPv4
			return
		}
		for name, c := range map[string]struct {
			program *ebpf.Program
			want    int
		}{
			"from worker": {b.m.progs.uplink, read(packet, worker, pair, func(inner []byte) bool { return inner[12] == 100 && inner[13] == 64 && inner[14] < 4 })},
			"from pair":   {b.w.progs.uplink, read(packet, pair, worker, func(inner []byte) bool { return bytes.Equal(inner[16:20], instance) })},
			"instance":    {b.w.progs.cable, leave(packet, instance)},
		} {
			if ret, _ := run(t, c.program, frame(packet)); ret != c.want {
				t.Errorf("%s: answer %d, want %d: %x", name, ret, c.want, packet)
			}
		}
	})
}

// read says what becomes of a packet that came in by a tunnel.
func read(p, from, to []byte, known func(inner []byte) bool) int {
	if p[9] != 47 || !bytes.Equal(p[16:20], to) {
		return tcNext
	}
	if p[0] != 0x45 || p[6]&0x3f != 0 || p[7] != 0 || len(p) < 48 || !bytes.Equal(p[20:28], []byte{0x20, 0, 8, 0, 0, 0, 0, 7}) {
		return tcDrop
	}
	inner := p[28:]
	congested := p[1]&3 == 3 && inner[1]&3 == 0
	if !version4(inner) || !bytes.Equal(p[12:16], from) || !known(inner) || congested {
		return tcDrop
	}
	return tcRedirect
}

func version4(p []byte) bool { return p[0]>>4 == 4 && p[0]&15 >= 5 }

// leave says what becomes of a packet that comes out of an instance.
func leave(p, source []byte) int {
	ports := p[6]&0x3f == 0 && p[7] == 0 && (p[9] == 6 || p[9] == 17)
	if !version4(p) || !bytes.Equal(p[12:16], source) || ports && len(p) < int(p[0]&15)*4+4 {
		return tcDrop
	}
	return tcRedirect
}
