package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/thawrun/thaw/netproxy/ctsync"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/havip"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// TestGatewayMetrics: everything that docs/metrics.md lists for the role, under the names that it gives.
func TestGatewayMetrics(t *testing.T) {
	status := gateway.Status{
		Role: havip.Master, Term: 3, Refused: 4, ENIs: 5,
		Tunnel: &tunnel.Stats{Out: tunnel.Counter{Packets: 6, Bytes: 7}, In: tunnel.Counter{Packets: 8, Bytes: 9}, Drops: map[tunnel.Reason]uint64{tunnel.Spoofed: 10}},
		Pairs: []gateway.PairStatus{{
			Name: "default/a", InStep: true, Link: true, Connections: 11, NoPort: 12, Packets: map[string]uint64{"leak": 13},
			Load: gateway.Load{Bits: 0.1, Packets: 0.2, CPU: 0.3, Table: 0.4, Ports: 0.5}, Replication: &ctsync.Stats{EventsSent: 14, EventsReceived: 15, Resyncs: 16, LagSeconds: 0.017},
		}},
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serveGatewayMetrics(ctx, ln, func() (gateway.Status, error) { return status, nil }) }()
	resp, err := http.Get("http://" + ln.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`master 1`, `term 3`, `adverts_refused_total 4`, `eni_calls_total 5`, `pair_in_step{pair="default/a"} 1`, `pair_link{pair="default/a"} 1`,
		`pair_connections{pair="default/a"} 11`, `pair_ports_missing_total{pair="default/a"} 12`, `pair_refused_total{pair="default/a",reason="leak"} 13`,
		`pair_load_ratio{of="bits",pair="default/a"} 0.1`, `pair_load_ratio{of="packets",pair="default/a"} 0.2`, `pair_load_ratio{of="cpu",pair="default/a"} 0.3`,
		`pair_load_ratio{of="connections",pair="default/a"} 0.4`, `pair_load_ratio{of="ports",pair="default/a"} 0.5`,
		`pair_replication_events_total{direction="out",pair="default/a"} 14`, `pair_replication_events_total{direction="in",pair="default/a"} 15`,
		`pair_replication_resyncs_total{pair="default/a"} 16`, `pair_replication_lag_seconds{pair="default/a"} 0.017`,
		`tunnel_packets_total{direction="out"} 6`, `tunnel_size_bytes_total{direction="out"} 7`, `tunnel_packets_total{direction="in"} 8`,
		`tunnel_size_bytes_total{direction="in"} 9`, `tunnel_drops_total{reason="spoofed"} 10`,
	} {
		if !strings.Contains(string(body), "\nthaw_gateway_"+want+"\n") {
			t.Errorf("there is no thaw_gateway_%s", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", body)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
