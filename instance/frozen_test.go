package instance

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/internal/endpoints"
)

// frozenCount waits until so many instances of a revision are frozen, and no other is there.
func (r *rig) frozenCount(id api.RevisionID, n int) *endpoints.Snapshot {
	r.t.Helper()
	return r.until(id, strconv.Itoa(n)+" frozen", func(s *endpoints.Snapshot) bool {
		return s.Count(endpoints.Frozen) == n && len(s.Instances) == n
	})
}

// eachProvider runs a test with every provider that this machine and user can have.
func eachProvider(t *testing.T, f func(t *testing.T, use func(*Config))) {
	for _, name := range []string{"process", "sandbox"} {
		t.Run(name, func(t *testing.T) {
			if name == "sandbox" && os.Geteuid() != 0 {
				t.Skip("sandboxes need root")
			}
			f(t, func(c *Config) { c.Provider, c.FrozenFor = name, time.Minute })
		})
	}
}

func (r *rig) ask(in endpoints.Instance, path string) string {
	r.t.Helper()
	if strings.HasSuffix(in.Addr, ":8080") { // in a network of its own
		return inside(r.t.(*testing.T), r.Agent, in, path)
	}
	return get(r.t, in.Addr, path)
}

func TestIdleInstanceIsFrozenAndThawed(t *testing.T) {
	eachProvider(t, func(t *testing.T, use func(*Config)) {
		for _, socket := range []string{"", api.SocketFD3} {
			r := newRig(t, use)
			if !r.caps.Freezes {
				t.Skip("nothing can be frozen here")
			}
			rev := revisionOf(t, "ice-00001", "ok")
			if socket != "" {
				rev.Annotations[api.AnnotationSocket] = socket
			}
			r.SetRevision(rev)
			r.Scale(rev.ID(), 2, time.Now())
			before := noted(t, r.dir, r.ready(rev.ID(), 2))
			r.Scale(rev.ID(), 0, time.Now())
			s := r.frozenCount(rev.ID(), 2)
			if st, err := r.provider.Stats(t.Context(), folderOf(s.Instances[0].ID)); err != nil || !st.Frozen {
				t.Errorf("a frozen instance's stats: %+v, %v", st, err)
			}
			if f := r.Frozen(); f.Now != 2 || f.Bytes < 1<<16 {
				t.Errorf("%+v of two frozen instances", f)
			}
			decided := time.Now()
			r.Scale(rev.ID(), 1, decided)
			s = r.until(rev.ID(), "one thawed", func(s *endpoints.Snapshot) bool { return s.Count(endpoints.Ready) == 1 })
			if len(s.Instances) != 2 || s.Count(endpoints.Frozen) != 1 {
				t.Errorf("one of two is thawed: %+v", s.Instances)
			}
			for id, pid := range noted(t, r.dir, s) {
				if before[id] != pid {
					t.Errorf("%s is process %d, was %d", id, pid, before[id])
				}
			}
			for _, in := range s.Instances {
				if in.State != endpoints.Ready {
					continue
				}
				if got := r.ask(in, "/pid"); got == "" {
					t.Error("no answer")
				}
				st := in.Start
				if !st.Decided.Equal(decided) || st.Exec.Before(decided) || st.Ready.Before(st.Exec) || st.Code.After(st.Exec) {
					t.Errorf("times of a thaw: %+v", st)
				}
			}
			if n := r.Frozen().Woken; n != 1 {
				t.Errorf("%d thaws are counted, want 1", n)
			}
			r.stop() // ends both, and looks whether anything is left
		}
	})
}

// TestWithoutFreezingThereIsANewProcess is the negative control: what the test above sees is due to the ladder.
func TestWithoutFreezingThereIsANewProcess(t *testing.T) {
	r := newRig(t, func(c *Config) { c.FrozenFor = time.Minute })
	rev := revisionOf(t, "warm-00001", "ok")
	rev.Annotations[api.AnnotationFrozenFor] = "0s"
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	before := get(t, r.ready(rev.ID(), 1).Instances[0].Addr, "/pid")
	r.Scale(rev.ID(), 0, time.Now())
	r.ready(rev.ID(), 0)
	r.Scale(rev.ID(), 1, time.Now())
	if after := get(t, r.ready(rev.ID(), 1).Instances[0].Addr, "/pid"); after == before {
		t.Errorf("process %s is still there", after)
	}
	if n := r.Frozen().Woken; n != 0 {
		t.Errorf("%d thaws", n)
	}
}

func TestFrozenInstanceEndsWhenNobodyNeedsIt(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "short-00001", "ok")
	rev.Annotations[api.AnnotationFrozenFor] = "50ms"
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	pid, _ := strconv.Atoi(get(t, r.ready(rev.ID(), 1).Instances[0].Addr, "/pid"))
	r.Scale(rev.ID(), 0, time.Now())
	r.until(rev.ID(), "a frozen one", func(s *endpoints.Snapshot) bool { return s.Count(endpoints.Frozen) == 1 || len(s.Instances) == 0 })
	if s := r.ready(rev.ID(), 0); s.Failure != nil {
		t.Errorf("its end is a failure: %+v", s.Failure)
	}
	if lives(pid) {
		t.Errorf("process %d is left", pid)
	}
}

func TestFrozenInstanceServesItsRevisionOnly(t *testing.T) {
	r := newRig(t, func(c *Config) { c.FrozenFor = time.Minute })
	one, two := revisionOf(t, "mine-00001", "ok"), revisionOf(t, "mine-00002", "ok")
	for _, rev := range []*api.Revision{one, two} {
		r.SetRevision(rev)
	}
	r.Scale(one.ID(), 1, time.Now())
	r.ready(one.ID(), 1)
	r.Scale(one.ID(), 0, time.Now())
	r.frozenCount(one.ID(), 1)
	r.Scale(two.ID(), 1, time.Now())
	in := r.ready(two.ID(), 1).Instances[0]
	if env := get(t, in.Addr, "/env"); !strings.Contains(env, "K_REVISION=mine-00002\n") {
		t.Errorf("another revision's instance: %s", env)
	}
	r.frozenCount(one.ID(), 1)
	// The same name with another uid is another revision; one that is removed has nothing.
	again := revisionOf(t, "mine-00001", "ok")
	again.UID = "another"
	r.SetRevision(again)
	r.ready(one.ID(), 0)
	r.Scale(two.ID(), 0, time.Now())
	r.frozenCount(two.ID(), 1)
	r.RemoveRevision(two.ID())
	r.ready(two.ID(), 0)
}

func TestFrozenInstancesAreBounded(t *testing.T) {
	var low atomic.Bool
	r := newRig(t, func(c *Config) { c.FrozenFor, c.FrozenMax, c.Units, c.lowMemory = time.Minute, 3, 5, low.Load })
	rev := revisionOf(t, "many-00001", "ok")
	few := revisionOf(t, "few-00001", "ok")
	few.Annotations[api.AnnotationFrozenMax] = "1"
	r.SetRevision(rev)
	r.SetRevision(few)
	r.Scale(rev.ID(), 5, time.Now())
	r.ready(rev.ID(), 5)
	r.Scale(rev.ID(), 0, time.Now())
	r.frozenCount(rev.ID(), 3) // the node's bound

	// The node takes five: three frozen ones leave room for two, and make more.
	r.Scale(few.ID(), 4, time.Now())
	r.ready(few.ID(), 4)
	r.frozenCount(rev.ID(), 1)
	if n := r.Frozen().Ended; n != 2 {
		t.Errorf("%d were ended for others, want 2", n)
	}
	r.Scale(few.ID(), 0, time.Now())
	r.frozenCount(few.ID(), 1) // its own bound

	low.Store(true) // the oldest goes first, and then the other
	r.ready(rev.ID(), 0)
	r.ready(few.ID(), 0)
}

func TestFrozenInstanceThatIsKilledIsNotMissed(t *testing.T) {
	r := newRig(t, func(c *Config) { c.FrozenFor = time.Minute })
	rev := revisionOf(t, "dead-00001", "ok")
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	pid, _ := strconv.Atoi(get(t, r.ready(rev.ID(), 1).Instances[0].Addr, "/pid"))
	r.Scale(rev.ID(), 0, time.Now())
	r.frozenCount(rev.ID(), 1)
	syscall.Kill(pid, syscall.SIGKILL)
	if s := r.ready(rev.ID(), 0); s.Failure != nil {
		t.Errorf("a failure: %+v", s.Failure)
	}
	r.Scale(rev.ID(), 1, time.Now())
	r.ready(rev.ID(), 1)
}

// TestManyChangesOfMind orders up and down faster than instances freeze; whatever is the last word must come true.
func TestManyChangesOfMind(t *testing.T) {
	r := newRig(t, func(c *Config) { c.FrozenFor = time.Minute })
	rev := revisionOf(t, "moody-00001", "ok")
	r.SetRevision(rev)
	for i := range 60 {
		r.Scale(rev.ID(), []int{3, 0, 1, 5, 2}[i%5], time.Now())
		time.Sleep(time.Duration(i%7) * time.Millisecond)
	}
	r.Scale(rev.ID(), 4, time.Now())
	s := r.until(rev.ID(), "4 ready", func(s *endpoints.Snapshot) bool {
		return s.Count(endpoints.Ready) == 4 && s.Count(endpoints.Starting)+s.Count(endpoints.Draining) == 0
	})
	for _, in := range s.Instances {
		if in.State == endpoints.Ready {
			get(t, in.Addr, "/pid")
		}
	}
	r.Scale(rev.ID(), 0, time.Now())
	r.until(rev.ID(), "all frozen", func(s *endpoints.Snapshot) bool { return s.Count(endpoints.Frozen) == len(s.Instances) })
}

// TestFrozenInstancesAreAdopted kills an agent whose instances are frozen. The next one has them as they were, and thaws them.
func TestFrozenInstancesAreAdopted(t *testing.T) {
	eachProvider(t, func(t *testing.T, use func(*Config)) {
		var c Config
		use(&c)
		t.Setenv("AGENT_PROVIDER", c.Provider)
		t.Setenv("AGENT_FROZEN_FOR", "1m")
		dir := t.TempDir()
		rev := revisionOf(t, "kept-00001", "ok")
		first := startAgentProcess(t, dir)
		first.in.Encode(order{rev, rev.ID(), 3})
		before := noted(t, dir, first.ready(rev.ID(), 3))
		first.in.Encode(order{nil, rev.ID(), 1})
		first.until(rev.ID(), "two frozen", func(s *endpoints.Snapshot) bool {
			return s.Count(endpoints.Frozen) == 2 && s.Count(endpoints.Ready) == 1
		})
		first.kill()

		second := newRigIn(t, dir, use)
		second.SetRevision(rev)
		second.until(rev.ID(), "one ready, two frozen", func(s *endpoints.Snapshot) bool {
			return s.Count(endpoints.Frozen) == 2 && s.Count(endpoints.Ready) == 1
		})
		if f := second.Frozen(); f.Now != 2 || f.Bytes == 0 {
			t.Errorf("%+v after adoption", f)
		}
		second.Scale(rev.ID(), 3, time.Now())
		s := second.ready(rev.ID(), 3)
		for id, pid := range noted(t, dir, s) {
			if before[id] != pid {
				t.Errorf("%s is process %d, was %d", id, pid, before[id])
			}
		}
		for _, in := range s.Instances {
			second.ask(in, "/pid")
		}
		second.stop()
	})
}

// TestFrozenInstancesAreNotKeptWithoutFreezing adopts with freezing off: what is frozen ends.
func TestFrozenInstancesAreNotKeptWithoutFreezing(t *testing.T) {
	t.Setenv("AGENT_FROZEN_FOR", "1m")
	dir := t.TempDir()
	rev := revisionOf(t, "dropped-00001", "ok")
	first := startAgentProcess(t, dir)
	first.in.Encode(order{rev, rev.ID(), 1})
	first.ready(rev.ID(), 1)
	first.in.Encode(order{nil, rev.ID(), 0})
	first.until(rev.ID(), "a frozen one", func(s *endpoints.Snapshot) bool { return s.Count(endpoints.Frozen) == 1 })
	first.kill()
	second := newRigIn(t, dir, nil)
	second.SetRevision(rev)
	for deadline := time.Now().Add(10 * time.Second); len(alive(t, dir)) > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is still there")
		}
	}
}

// inside asks an instance through its own network.
func inside(t *testing.T, a *Agent, in endpoints.Instance, path string) string {
	t.Helper()
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return a.provider.Dial(ctx, folderOf(in.ID), defaultPort)
		},
	}}
	resp, err := c.Get("http://" + in.Addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return string(b)
}

// noted returns the process of each instance of a snapshot, as the provider notes it, which nobody waits for but this.
func noted(t *testing.T, dir string, s *endpoints.Snapshot) map[string]int {
	t.Helper()
	pids := map[string]int{}
	deadline := time.Now().Add(20 * time.Second)
	for _, in := range s.Instances {
		for pids[in.ID] == 0 {
			var id process.Identity
			b, err := os.ReadFile(filepath.Join(dir, "instances", folderOf(in.ID), local.NoteFile))
			if err == nil {
				err = json.Unmarshal(b, &id)
			}
			if err != nil && time.Now().After(deadline) {
				t.Fatal(err)
			}
			if pids[in.ID] = id.PID; err != nil {
				time.Sleep(time.Millisecond)
			}
		}
	}
	return pids
}

// lives says whether a process runs; one that has ended and waits for init to notice does not, where that can be seen.
func lives(pid int) bool {
	if _, err := os.Stat("/proc/self"); err != nil {
		return syscall.Kill(pid, 0) == nil
	}
	env, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	return len(env) > 0
}
