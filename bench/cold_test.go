// Package bench measures the whole system with real processes. Nothing here passes or fails; it prints figures.
package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

var built struct {
	once sync.Once
	dir  string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// binaries builds thaw and the sample function once.
func binaries(b *testing.B) string {
	b.Helper()
	built.once.Do(func() { built.dir, built.err = harness.Build("cmd/thaw", "examples/hello-go") })
	if built.err != nil {
		b.Fatal(built.err)
	}
	return built.dir
}

// deployIdle creates a service that has no instance until it is called.
func deployIdle(b *testing.B, c *client.Client, name, program string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	doc := fmt.Sprintf(`{"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":%q},"spec":{"template":{"metadata":{"annotations":{"autoscaling.knative.dev/initial-scale":"0"}},"spec":{"containers":[{"image":"exec://%s"}]}}}}`, name, program)
	if _, _, err := c.Apply(ctx, api.Services, "default", name, []byte(doc)); err != nil {
		b.Fatal(err)
	}
	if _, err := c.WaitReady(ctx, api.Services, "default", name, client.WaitOptions{}); err != nil {
		b.Fatal(err)
	}
}

var phases = []string{"decide", "place", "code", "net", "create", "ready", "queue", "app"}

// BenchmarkColdStart calls services that have no instance, one after the other, each once, over a connection that is open. It
// prints the median waterfall and reports the platform's share: from the request's arrival at the socket to the answer's first
// byte, as the client sees it, less the function's own time (ready: exec to listening; app: request sent to first byte).
func BenchmarkColdStart(b *testing.B) {
	th := harness.Start(b, binaries(b), "--log-level", "warn")
	program := filepath.Join(built.dir, "hello-go")
	conn, err := net.Dial("tcp", th.Ingress)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	br := bufio.NewReader(conn)
	var total, share []float64
	each := map[string][]float64{}
	n := 0
	for b.Loop() {
		b.StopTimer()
		n++
		name := fmt.Sprintf("cold-%d", n)
		deployIdle(b, th.Client, name, program)
		time.Sleep(20 * time.Millisecond) // the deploy's own work (status writes) is over: one cold start is measured, not both
		b.StartTimer()
		begin := time.Now()
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s.default.localhost\r\n\r\n", name)
		if _, err := br.Peek(1); err != nil {
			b.Fatal(err)
		}
		took := float64(time.Since(begin).Microseconds()) / 1000
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			b.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		timing := parseTiming(resp.Header.Get("Server-Timing"))
		if resp.StatusCode != 200 || len(timing) == 0 {
			b.Fatalf("%d, Server-Timing %q", resp.StatusCode, resp.Header.Get("Server-Timing"))
		}
		for _, p := range phases {
			each[p] = append(each[p], timing[p])
		}
		total = append(total, took)
		share = append(share, took-timing["ready"]-timing["app"])
	}
	b.ReportMetric(percentile(total, 50), "p50-total-ms")
	b.ReportMetric(percentile(share, 50), "p50-platform-ms")
	b.ReportMetric(percentile(share, 99), "p99-platform-ms")
	if n > 1 {
		var line strings.Builder
		for _, p := range phases {
			fmt.Fprintf(&line, "%s %.2f (%.2f)  ", p, percentile(each[p], 50), percentile(each[p], 99))
		}
		b.Logf("waterfall of %d cold starts, ms, median (p99): %s", n, line.String())
	}
}

// parseTiming reads a Server-Timing field.
func parseTiming(s string) map[string]float64 {
	out := map[string]float64{}
	for part := range strings.SplitSeq(s, ",") {
		name, dur, ok := strings.Cut(strings.TrimSpace(part), ";dur=")
		if v, err := strconv.ParseFloat(dur, 64); ok && err == nil {
			out[name] = v
		}
	}
	return out
}

func percentile(v []float64, p float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s) == 0 {
		return 0
	}
	return s[min(len(s)-1, int(float64(len(s))*p/100))]
}
