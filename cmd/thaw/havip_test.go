package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/netproxy/havip"
)

func TestHAVIPFlags(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	good := func() havipFlags {
		return havipFlags{
			cfg:  havip.Config{Router: 51, Priority: 100, Advert: 10 * time.Millisecond, Replicate: true},
			vips: []string{"10.0.0.10/24@eth0"}, sync: "eth2,10.9.0.1,10.9.0.2", port: 3781,
		}
	}
	f := good()
	if cfg, err := f.config(); err != nil || cfg.Sync.Port != 3781 || len(cfg.VIPs) != 1 {
		t.Fatalf("%+v, %v", cfg, err)
	}
	for want, change := range map[string]func(*havipFlags){
		`--vip: "10.0.0.10" is not ADDR/LEN@DEV`: func(f *havipFlags) { f.vips = []string{"10.0.0.10"} },
		`--sync: "eth2" is not DEV,LOCAL,PEER`:   func(f *havipFlags) { f.sync = "eth2" },
		"give --sync, or --replicate=false":      func(f *havipFlags) { f.sync = "" },
		"give at least one --vip":                func(f *havipFlags) { f.vips = nil },
		"priority 0: 1 to 254":                   func(f *havipFlags) { f.cfg.Priority = 0 },
		"--key-file: open /nowhere":              func(f *havipFlags) { f.key = "/nowhere" },
		"is empty":                               func(f *havipFlags) { f.key = empty },
	} {
		f := good()
		change(&f)
		if _, err := f.config(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// TestHAVIPUsage: what is wrong with the command line is a matter of usage, before anything is touched.
func TestHAVIPUsage(t *testing.T) {
	var out, errs strings.Builder
	env := &verbs.Env{Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }}
	cmd := newHAVIPCommand(env)
	cmd.SetArgs([]string{"--priority", "300"})
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	if code := verbs.ExitCode(cmd.Execute()); code != verbs.ExitUsage {
		t.Errorf("exit code %d", code)
	}
}
