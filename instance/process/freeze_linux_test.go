package process

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"log/slog"

	"github.com/thawrun/thaw/instance/provider"
)

// TestFreezeBySignal freezes a process that has no control group, with a child.
func TestFreezeBySignal(t *testing.T) {
	rt, err := New("freezetest", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	file := filepath.Join(t.TempDir(), "out")
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p, err := rt.Start(nil, &provider.Spec{
		Name: "freezetest-x", Path: "/bin/sh", Argv: []string{"sh", "-c", "(while :; do echo x; sleep 0.005; done) & wait"},
		Env: []string{"PATH=/usr/bin:/bin"}, Dir: "/", Stdout: out, Stderr: out,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Kill(); <-p.Done() }()
	size := func() int64 {
		fi, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	grows := func(from int64) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); size() <= from; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it does not run")
			}
		}
	}
	grows(0)
	if p.Frozen() {
		t.Error("frozen before anybody has said so")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := p.Freeze(ctx, true); err != nil || !p.Frozen() {
		t.Fatalf("not frozen: %v", err)
	}
	time.Sleep(20 * time.Millisecond) // the child, which is not waited for, has stopped too
	before := size()
	time.Sleep(50 * time.Millisecond)
	if after := size(); after != before {
		t.Errorf("the frozen group printed %d bytes", after-before)
	}
	if err := p.Freeze(ctx, false); err != nil {
		t.Fatal(err)
	}
	grows(before)
}
