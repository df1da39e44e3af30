package dev

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/autoscaler"
)

// A changed file is taken over, also when another one is renamed over it; one that is wrong, or gone, is said once and changes nothing.
func TestFollowScaling(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "autoscaler.yaml")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(file, "max-scale: 3\n")
	var log bytes.Buffer // written before applied is sent to, and by nobody else
	applied := make(chan autoscaler.Config, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- FollowScaling(ctx, file, slog.New(slog.NewTextHandler(&log, nil)), func(c autoscaler.Config) { applied <- c })
	}()
	want := func(what string, n int) {
		t.Helper()
		select {
		case c := <-applied:
			if c.MaxScale != n {
				t.Fatalf("%s: max-scale %d, want %d", what, c.MaxScale, n)
			}
		case <-time.After(20 * time.Second):
			t.Fatal(what)
		}
	}
	want("at first", 3)
	write(file, "max-scale: 40\n")
	want("written over", 40)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	write(filepath.Join(dir, "new"), "max-scale: -1\n")
	if err := os.Rename(filepath.Join(dir, "new"), file); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2*lookEvery + lookEvery/2) // it is seen, and said, and nothing else happens
	if len(applied) > 0 {
		t.Fatalf("applied %+v", <-applied)
	}
	write(filepath.Join(dir, "new"), "apiVersion: v1\nkind: ConfigMap\ndata: {max-scale: \"5\"}\n")
	if err := os.Rename(filepath.Join(dir, "new"), file); err != nil {
		t.Fatal(err)
	}
	want("renamed over", 5)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := strings.Count(log.String(), "what was there before stays"); n < 1 || n > 2 { // wrong, and perhaps gone for a moment
		t.Errorf("said %d times:\n%s", n, log.String())
	}
}

// A file that is found empty may be about to be written: it counts when it stays so.
func TestFollowScalingHalfWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "autoscaler.yaml")
		var applied []int64 // read only while the other goroutine waits
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- FollowScaling(ctx, file, slog.New(slog.DiscardHandler), func(c autoscaler.Config) { applied = append(applied, int64(c.MaxScale)) })
		}()
		time.Sleep(lookEvery / 2) // looks are between the steps
		for _, step := range []struct {
			text string
			want []int64 // after one look, of all so far
		}{
			{"max-scale: 3\n", []int64{3}},
			{"", []int64{3}},
			{"max-scale: 40\n", []int64{3, 40}},
			{"", []int64{3, 40}},
			{"", []int64{3, 40, 0}},
		} {
			if err := os.WriteFile(file, []byte(step.text), 0o600); err != nil {
				t.Fatal(err)
			}
			time.Sleep(lookEvery)
			synctest.Wait()
			if !slices.Equal(applied, step.want) {
				t.Errorf("%q: applied %v, want %v", step.text, applied, step.want)
			}
		}
		cancel()
		<-done
	})
}
