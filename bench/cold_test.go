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
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/bundle"
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

// deployIdle creates a service of a function that has no instance until it is called. It takes its socket on descriptor 3, as the bootstraps do.
func deployIdle(b *testing.B, c *client.Client, name, image string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	doc := fmt.Sprintf(`{"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":%q},"spec":{"template":{"metadata":{"annotations":{"autoscaling.knative.dev/initial-scale":"0","instance.thaw.run/socket":"fd3"}},"spec":{"containers":[{"image":%q}]}}}}`, name, image)
	if _, _, err := c.Apply(ctx, api.Services, "default", name, []byte(doc)); err != nil {
		b.Fatal(err)
	}
	if _, err := c.WaitReady(ctx, api.Services, "default", name, client.WaitOptions{}); err != nil {
		b.Fatal(err)
	}
}

var phases = []string{"decide", "place", "code", "net", "create", "ready", "queue", "app"}

// image returns what the bench deploys in a language: a program for Go, else a function that thaw deploy gives its server to.
func image(b *testing.B, c *client.Client, language string) string {
	b.Helper()
	file, text := "function.py", "def handle(request):\n    return 'hello\\n'\n"
	switch language {
	case "go":
		return "exec://" + filepath.Join(built.dir, "hello-go")
	case "node":
		file, text = "function.js", "exports.handle = () => 'hello\\n';\n"
	}
	if _, err := exec.LookPath(bundle.Interpreter(language)); err != nil {
		b.Skip(err)
	}
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	archive, err := os.Create(filepath.Join(b.TempDir(), "package"))
	if err != nil {
		b.Fatal(err)
	}
	defer archive.Close()
	if _, err := bundle.Create(b.Context(), dir, archive, io.Discard); err != nil {
		b.Fatal(err)
	}
	image, err := c.Upload(b.Context(), archive)
	if err != nil {
		b.Fatal(err)
	}
	return image
}

// BenchmarkColdStart calls services that have no running instance, one after the other, each once, over a connection that is open: from
// the pool (a place waits; for Python and Node an interpreter), and frozen. It prints the median waterfall and reports the platform's share:
// from the request's arrival at the socket to the answer's first byte, as the client sees it, less the function's own time (ready: exec to
// listening; app: request sent to first byte). THAW_PROVIDER chooses processes or sandboxes.
func BenchmarkColdStart(b *testing.B) {
	for _, language := range []string{"go", "python", "node"} {
		b.Run(language+"/pooled", func(b *testing.B) { coldStarts(b, language, false) })
		b.Run(language+"/frozen", func(b *testing.B) { coldStarts(b, language, true) })
	}
}

func coldStarts(b *testing.B, language string, frozen bool) {
	scaling := filepath.Join(b.TempDir(), "autoscaler.yaml")
	if err := os.WriteFile(scaling, []byte("stable-window: 6s\nscale-to-zero-grace-period: 6s\n"), 0o644); err != nil {
		b.Fatal(err)
	}
	th := harness.Start(b, binaries(b), "--log-level", "warn", "--autoscaler-config", scaling)
	image := image(b, th.Client, language)
	conn, err := net.Dial("tcp", th.Ingress)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	cold := &caller{b: b, conn: conn, br: bufio.NewReader(conn)}
	for i := range b.N {
		deployIdle(b, th.Client, cold.name(i), image)
	}
	if frozen {
		for i := range b.N {
			cold.call(i)
		}
		for i := range b.N {
			harness.Eventually(b, time.Minute, "it is frozen", func() bool {
				s, err := th.Client.Scale(b.Context(), "default", cold.name(i)+"-00001")
				return err == nil && s["frozen"] == 1.0
			})
		}
		cold.total, cold.share, cold.each = nil, nil, nil
	}
	cold.call(-1)
	b.ResetTimer()
	for i := range b.N {
		b.StopTimer()
		time.Sleep(60 * time.Millisecond) // what the last one took from the pools is there again: one start is measured, not its refill
		b.StartTimer()
		cold.call(i)
	}
	cold.report()
}

// caller calls services and keeps what their answers took.
type caller struct {
	b            *testing.B
	conn         net.Conn
	br           *bufio.Reader
	total, share []float64
	each         map[string][]float64
}

func (c *caller) name(i int) string { return fmt.Sprintf("cold-%d", i) }

// call asks service i, which must answer as one that was cold; -1 is a service that is not there, to have the way warm.
func (c *caller) call(i int) {
	begin := time.Now()
	fmt.Fprintf(c.conn, "GET / HTTP/1.1\r\nHost: %s.default.localhost\r\n\r\n", c.name(i))
	if _, err := c.br.Peek(1); err != nil {
		c.b.Fatal(err)
	}
	took := float64(time.Since(begin).Microseconds()) / 1000
	resp, err := http.ReadResponse(c.br, nil)
	if err != nil {
		c.b.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	if i < 0 {
		return
	}
	timing := parseTiming(resp.Header.Get("Server-Timing"))
	if resp.StatusCode != 200 || len(timing) == 0 {
		c.b.Fatalf("%d, Server-Timing %q", resp.StatusCode, resp.Header.Get("Server-Timing"))
	}
	if c.each == nil {
		c.each = map[string][]float64{}
	}
	for _, p := range phases {
		c.each[p] = append(c.each[p], timing[p])
	}
	c.total = append(c.total, took)
	c.share = append(c.share, took-timing["ready"]-timing["app"])
}

func (c *caller) report() {
	c.b.ReportMetric(percentile(c.total, 50), "p50-total-ms")
	c.b.ReportMetric(percentile(c.share, 50), "p50-platform-ms")
	c.b.ReportMetric(percentile(c.share, 99), "p99-platform-ms")
	if len(c.total) < 2 {
		return
	}
	var line strings.Builder
	for _, p := range phases {
		fmt.Fprintf(&line, "%s %.2f (%.2f)  ", p, percentile(c.each[p], 50), percentile(c.each[p], 99))
	}
	c.b.Logf("waterfall of %d starts, ms, median (p99): %s", len(c.total), line.String())
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
