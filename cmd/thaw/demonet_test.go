package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestDemoNet runs the program, because it starts itself again as the gateways.
func TestDemoNet(t *testing.T) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		t.Skip("needs Linux and root")
	}
	bin := filepath.Join(t.TempDir(), "thaw")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd, dir := exec.CommandContext(t.Context(), bin, "demo", "net", "--eni-delay", "10ms"), t.TempDir()
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil && (strings.Contains(string(out), "not supported") || strings.Contains(string(out), "not permitted")) {
		t.Skipf("needs namespaces and programs of the kernel: %s", out)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
	for _, want := range []string{
		"ann's function: answered by ann's server, which sees 10.0.0.10", "bob's function: answered by bob's server, which sees 10.0.0.11",
		"ann's connection lives", "bob's connection lives", "a slot of the tunnel", "a NIC for each instance", "a NIC for each node",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing:\n%s", want, out)
		}
	}
}
