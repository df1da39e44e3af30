package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// TestGatewayCheck: what is wrong with the file is said with its name, before anything is touched.
func TestGatewayCheck(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gateway.yaml")
	const good = "device: eth0\nouter: [10.1.0.1/24]\npriority: 200\nsync: eth2,10.9.0.1,10.9.0.2\npairs: []\n"
	run := func(content string, args ...string) (string, error) {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		cmd := newRootCommand(&verbs.Env{Stdout: &out, Stderr: &out, Getenv: func(string) string { return "" }})
		cmd.SetArgs(append([]string{"gateway"}, args...))
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		err := cmd.Execute()
		return out.String(), err
	}
	if out, err := run(good, "--check", "--config", path); err != nil || !strings.Contains(out, "0 pairs, 0 workers") {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := run(strings.Replace(good, "200", "2000", 1), "--config", path); err == nil || !strings.Contains(err.Error(), path+": priority 2000: 32 to 254") {
		t.Errorf("%v", err)
	}
	if _, err := run(good); verbs.ExitCode(err) != verbs.ExitUsage {
		t.Errorf("no file: %v", err)
	}
}
