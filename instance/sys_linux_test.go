package instance

import (
	"context"
	"net"
	"testing"
	"time"
)

// BenchmarkConnect compares tryConnect with a net.Dialer at a port where nobody listens, which is what most tries meet; and tells
// by how much a nap is too long.
func BenchmarkConnect(b *testing.B) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr)
	l.Close()
	b.Run("plain", func(b *testing.B) {
		for b.Loop() {
			if tryConnect(context.Background(), addr) == nil {
				b.Fatal("somebody listens")
			}
		}
	})
	b.Run("dialer", func(b *testing.B) {
		d := net.Dialer{Timeout: connectTimeout}
		for b.Loop() {
			if _, err := d.DialContext(context.Background(), "tcp4", addr.String()); err == nil {
				b.Fatal("somebody listens")
			}
		}
	})
	b.Run("nap", func(b *testing.B) {
		var over time.Duration
		for b.Loop() {
			begin := time.Now()
			nap(200 * time.Microsecond)
			over += time.Since(begin) - 200*time.Microsecond
		}
		b.ReportMetric(float64(over.Microseconds())/float64(b.N), "µs-late")
	})
}

// Two agents of one machine never tell two functions the same port, though neither has bound it yet.
func TestPortsOfTwoAgents(t *testing.T) {
	const first, last = 19000, 19039
	a, b := newPorts(first, last), newPorts(first, last)
	seen := map[int]bool{}
	var held []int
	for i := range 20 {
		p := a
		if i%2 == 1 {
			p = b
			p.next = a.next // where they would meet
		}
		port, err := p.take()
		if err != nil {
			t.Fatal(err)
		}
		if seen[port] {
			t.Errorf("port %d was given twice", port)
		}
		seen[port] = true
		if p == a {
			held = append(held, port)
		}
	}
	for _, port := range held {
		a.put(port)
	}
	b.next = held[0] - first
	if port, err := b.take(); err != nil || port != held[0] {
		t.Errorf("a port that was given back is not to be had: %d, %v", port, err)
	}
	for port := range b.used {
		b.put(port)
	}
}
