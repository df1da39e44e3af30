package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/ctsync"
)

// sample is what was measured of a pair last.
type sample struct {
	at      time.Time
	traffic link.Traffic
	load    Load
	entries int
	noPort  uint64
}

// watch measures, and refuses new connections of a tenant that has used its quota up. nf_conntrack_max would be the kernel's way, but it is
// one for all namespaces, and cannot be written in them.
func (n *Node) watch(ctx context.Context) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.mu.Lock()
		cpu := n.busiest()
		for _, h := range n.pairs {
			if err := n.check(h, time.Now(), cpu); err != nil {
				n.log.Warn("a pair cannot be measured", "pair", h.Name, "error", err)
			}
		}
		n.mu.Unlock()
	}
}

// check measures a pair and closes or opens its gate. Node.mu is held.
func (n *Node) check(h *half, now time.Time, cpu float64) error {
	c, err := n.host.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	traffic, err := c.Traffic(hostDevice(h.ID))
	if err != nil {
		return err
	}
	s := sample{at: now, traffic: traffic, load: Load{CPU: cpu}}
	err = h.ns.Do(func() error {
		s.entries, err = number("/proc/sys/net/netfilter/nf_conntrack_count")
		s.noPort = insertFailed()
		return err
	})
	if err != nil {
		return err
	}
	old := h.last
	if old != nil && now.After(old.at) {
		t := now.Sub(old.at).Seconds()
		// The node's end of the cable: what it receives goes to functions, what it sends comes from them.
		rate := func(rx, tx, oldRx, oldTx uint64) float64 {
			return float64(max(rx-min(oldRx, rx), tx-min(oldTx, tx))) / t
		}
		s.load.Bits = 8 * rate(traffic.RxBytes, traffic.TxBytes, old.traffic.RxBytes, old.traffic.TxBytes) / n.cfg.Capacity.Bits
		s.load.Packets = rate(traffic.RxPackets, traffic.TxPackets, old.traffic.RxPackets, old.traffic.TxPackets) / n.cfg.Capacity.Packets
		if s.noPort > old.noPort {
			n.log.Warn("connections found no free port: give the pair another HAVIP, or the subnet another pair", "pair", h.Name, "connections", s.noPort-old.noPort)
		}
	}
	s.load.Table = float64(s.entries) / float64(h.Flows)
	ports := float64(h.Ports.count())
	// All entries together are at least as many as lead to the busiest destination: the table is read only when that says too little.
	if s.load.Ports = float64(s.entries) / ports; s.load.Ports > 0.3 {
		census, err := ctsync.Survey(h.ns)
		if err != nil {
			return err
		}
		s.load.Ports = float64(census.Busiest) / ports
	}
	h.last = &s
	want := h.gate
	switch {
	case h.gate == gateOpen && s.entries >= h.Flows:
		want = gateFull
		n.log.Warn("a tenant has used up its quota of connections", "pair", h.Name, "connections", s.entries, "quota", h.Flows)
	case h.gate == gateFull && s.entries < h.Flows*95/100:
		want = gateOpen
	}
	if want == h.gate {
		return nil
	}
	if err := setGate(h.ns, want); err != nil {
		return err
	}
	h.gate = want
	return nil
}

// Load returns what was measured of a pair in the last second.
func (n *Node) Load(id uint32) (Load, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if h := n.pairs[id]; h != nil && h.last != nil {
		return h.last.load, nil
	}
	return Load{}, fmt.Errorf("%w: %d, or it was not measured yet", ErrNoPair, id)
}

func number(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// insertFailed is how many connections of the thread's namespace could not be entered, because every port that was tried is taken; 0
// where the kernel does not say.
func insertFailed() (sum uint64) {
	b, err := os.ReadFile("/proc/thread-self/net/stat/nf_conntrack")
	if err != nil {
		return 0
	}
	column := -1
	for i, line := range strings.Split(string(b), "\n") {
		fields := strings.Fields(line)
		if i == 0 {
			for j, name := range fields {
				if name == "insert_failed" {
					column = j
				}
			}
			continue
		}
		if column >= 0 && column < len(fields) { // a line for each processor
			v, _ := strconv.ParseUint(fields[column], 16, 64)
			sum += v
		}
	}
	return sum
}

// cpuSample is the times of each processor, in soft interrupts and in all.
type cpuSample map[string][2]uint64

// busiest is the part of its time that the busiest processor has spent in soft interrupts since the last call.
func (n *Node) busiest() (worst float64) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	now := cpuSample{}
	const softirq = 7 // proc_stat(5)
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) <= softirq || !strings.HasPrefix(fields[0], "cpu") || fields[0] == "cpu" {
			continue
		}
		var t [2]uint64
		for i, f := range fields[1:] {
			v, _ := strconv.ParseUint(f, 10, 64)
			t[1] += v
			if i+1 == softirq {
				t[0] = v
			}
		}
		now[fields[0]] = t
		if old, ok := n.cpu[fields[0]]; ok && t[1] > old[1] && t[0] >= old[0] {
			worst = max(worst, float64(t[0]-old[0])/float64(t[1]-old[1]))
		}
	}
	n.cpu = now
	return worst
}

// Status returns what is true now.
func (n *Node) Status() (Status, error) {
	ha := n.ha.Status()
	s := Status{Name: n.cfg.Name, Role: ha.Role, Reason: ha.Reason, Term: ha.Term, Full: ha.Full, Refused: ha.Refused, Pairs: []PairStatus{}}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, h := range slices.SortedFunc(maps.Values(n.pairs), func(a, b *half) int { return cmp.Compare(a.ID, b.ID) }) {
		p := PairStatus{Name: h.Name, ID: h.ID, Gate: string(h.gate), Drained: h.drained}
		for _, o := range ha.Sites {
			if o.Name == site(h.ID) {
				p.Link, p.Full, p.InStep, p.Connections, p.Replication = o.Link, o.Full, o.InStep, o.Entries, o.Replicate
			}
		}
		if m := h.last; m != nil {
			p.Load, p.NoPort, p.Connections = m.load, m.noPort, m.entries
		}
		var err error
		if p.Packets, err = readCounters(h.ns); err != nil {
			return s, fmt.Errorf("pair %s: %w", h.Name, err)
		}
		s.Pairs = append(s.Pairs, p)
	}
	if m, ok := n.enis.(interface{ Calls() uint64 }); ok {
		s.ENIs = m.Calls()
	}
	t, err := n.tunnel.Stats()
	if err == nil {
		s.Tunnel = &t
	}
	return s, err
}

// serveStatus answers each connection with one line until ctx ends.
func (n *Node) serveStatus(ctx context.Context) error {
	if st, err := os.Lstat(n.cfg.Status); err == nil && st.Mode()&fs.ModeSocket != 0 {
		if c, err := net.DialTimeout("unix", n.cfg.Status, time.Second); err == nil {
			c.Close()
			return fmt.Errorf("status socket %s: another node answers there", n.cfg.Status)
		}
		if err := os.Remove(n.cfg.Status); err != nil {
			return fmt.Errorf("status socket: %w", err)
		}
	}
	l, err := net.Listen("unix", n.cfg.Status)
	if err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("status socket: %w", err)
		}
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		if s, err := n.Status(); err != nil {
			n.log.Warn("status", "error", err)
		} else {
			_ = json.NewEncoder(c).Encode(s)
		}
		c.Close()
	}
}
