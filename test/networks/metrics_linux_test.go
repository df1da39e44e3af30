package networks

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/test/harness"
)

// A node tells on /metrics that it has become master.
func TestGatewayMetrics(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	here, err := link.Current()
	must(t, err)
	defer here.Close()
	far := namespace(t)
	for i, name := range []string{"under", "sync"} {
		must(t, link.Cable(link.End{In: here, Name: name}, link.End{In: far, Name: name}))
		t.Cleanup(func() {
			if c, err := link.Open(); err == nil {
				defer c.Close()
				_ = c.DeleteDevice(name)
			}
		})
		address(t, here, name, fmt.Sprintf("10.%d.0.1/24", 8+i))
		address(t, far, name, fmt.Sprintf("10.%d.0.2/24", 8+i))
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "gateway.json")
	b, err := json.Marshal(gateway.Config{Device: "under", Outer: []netip.Prefix{netip.MustParsePrefix("10.8.0.9/24")}, Priority: 200, Sync: "sync,10.9.0.1,10.9.0.2", Namespace: dir, Pairs: []gateway.Pair{}})
	must(t, err)
	must(t, os.WriteFile(file, b, 0o600))
	cmd := exec.Command(filepath.Join(bin, "thaw"), "gateway", "--config", file, "--metrics", "127.0.0.1:0")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	at, lines := "", bufio.NewScanner(out)
	for at == "" && lines.Scan() { // the lines of its role come when they want
		if ready, where, ok := strings.Cut(lines.Text(), " metrics="); ok && ready == "thaw gateway ready pairs=0" {
			at = where
		}
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	harness.Eventually(t, patient, "it is master", func() bool {
		resp, err := http.Get("http://" + at + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return err == nil && strings.Contains(string(body), "\nthaw_gateway_master 1\n")
	})
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
