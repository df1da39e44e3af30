package instance

import (
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// TestKilledAgentsSandboxesAreAdopted kills an agent with THAW_ADOPT sandboxes (16 if that is not set) that all listen on the same
// port. The next one has all of them back within two seconds, as they were.
func TestKilledAgentsSandboxesAreAdopted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("sandboxes need root")
	}
	n := 16
	if v, err := strconv.Atoi(os.Getenv("THAW_ADOPT")); err == nil {
		n = v
	}
	dir := t.TempDir()
	t.Setenv("AGENT_PROVIDER", "sandbox")
	rev := revisionOf(t, "boxed-00001", "ok")
	first := startAgentProcess(t, dir)
	first.in.Encode(order{rev, rev.ID(), n})
	before := noted(t, dir, first.ready(rev.ID(), n))
	first.kill()

	began := time.Now()
	second := newRigIn(t, dir, func(c *Config) { c.Provider = "sandbox" })
	second.SetRevision(rev)
	s := second.ready(rev.ID(), n)
	took := time.Since(began)
	t.Logf("%d sandboxes adopted in %v", n, took)
	if took > 2*time.Second {
		t.Errorf("adopting %d sandboxes took %v", n, took)
	}
	for _, in := range s.Instances {
		if !in.Adopted || inside(t, second.Agent, in, "/pid") != "1" {
			t.Errorf("%+v is not what it was", in)
		}
	}
	after := noted(t, dir, s)
	for id, pid := range before {
		if after[id] != pid {
			t.Errorf("%s is process %d, was %d", id, after[id], pid)
		}
	}
	second.stop()
	for id, pid := range before {
		if lives(pid) {
			t.Errorf("process %d of %s is left", pid, id)
		}
	}
}

// TestSandboxesWithoutNotesAreEnded is the negative control of adoption: without a folder there is
// nothing to adopt, and nothing may be left.
func TestSandboxesWithoutNotesAreEnded(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("sandboxes need root")
	}
	dir := t.TempDir()
	t.Setenv("AGENT_PROVIDER", "sandbox")
	rev := revisionOf(t, "boxed-00001", "ok")
	first := startAgentProcess(t, dir)
	first.in.Encode(order{rev, rev.ID(), 2})
	snapshot := first.ready(rev.ID(), 2)
	before := noted(t, dir, snapshot)
	first.kill()
	for _, in := range snapshot.Instances {
		if err := os.RemoveAll(filepath.Join(dir, "instances", folderOf(in.ID))); err != nil {
			t.Fatal(err)
		}
	}
	os.MkdirAll(filepath.Join(dir, "instances", "stray"), 0o755)
	second := newRigIn(t, dir, func(c *Config) { c.Provider = "sandbox" })
	second.SetRevision(rev)
	second.Scale(rev.ID(), 1, time.Now())
	if s := second.ready(rev.ID(), 1); s.Instances[0].Adopted {
		t.Errorf("adopted %+v", s.Instances[0])
	}
	second.stop()
	for id, pid := range before {
		if lives(pid) {
			t.Errorf("process %d of %s is left", pid, id)
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// TestAnotherProvidersInstancesAreEnded: an agent that was told to use another provider than its predecessor takes over none of its
// instances. A sandbox's 127.0.0.1:8080, say, is another service's on the machine.
func TestAnotherProvidersInstancesAreEnded(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("sandboxes need root")
	}
	for first, second := range map[string]string{"sandbox": "process", "process": "sandbox"} {
		t.Run(first+" then "+second, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("AGENT_PROVIDER", first)
			rev := revisionOf(t, "moved-00001", "ok")
			one := startAgentProcess(t, dir)
			one.in.Encode(order{rev, rev.ID(), 2})
			before := noted(t, dir, one.ready(rev.ID(), 2))
			one.kill()
			two := newRigIn(t, dir, func(c *Config) { c.Provider = second })
			two.SetRevision(rev)
			two.Scale(rev.ID(), 1, time.Now())
			if s := two.ready(rev.ID(), 1); s.Instances[0].Adopted {
				t.Errorf("adopted %+v", s.Instances[0])
			}
			for id, pid := range before {
				if lives(pid) {
					t.Errorf("process %d of %s is left", pid, id)
				}
			}
		})
	}
}
