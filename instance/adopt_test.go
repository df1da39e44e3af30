package instance

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/internal/endpoints"
)

// agentMain is an agent in a process of its own. It reads revisions and scales as lines of JSON from stdin and prints each
// snapshot as a line.
func agentMain() {
	frozenFor, _ := time.ParseDuration(os.Getenv("AGENT_FROZEN_FOR"))
	a, err := New(Config{Dir: os.Getenv("AGENT_DIR"), Provider: cmp.Or(os.Getenv("AGENT_PROVIDER"), "process"), FrozenFor: frozenFor, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	a.Subscribe(func(s *endpoints.Snapshot) {
		b, _ := json.Marshal(s)
		fmt.Println(string(b))
	})
	go a.Run(context.Background())
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var o order
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			panic(err)
		}
		if o.Revision != nil {
			a.SetRevision(o.Revision)
		}
		a.Scale(o.ID, o.N, time.Now())
	}
	select {}
}

type order struct {
	Revision *api.Revision
	ID       api.RevisionID
	N        int
}

// agentProcess is an agent that can be killed.
type agentProcess struct {
	*collector
	cmd *exec.Cmd
	in  *json.Encoder
}

func startAgentProcess(t *testing.T, dir string) *agentProcess {
	self, _ := os.Executable()
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "THAW_TEST_FUNCTION=agent", "AGENT_DIR="+dir)
	if testing.Verbose() {
		cmd.Stderr = os.Stderr
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &agentProcess{collector: newCollector(t), cmd: cmd, in: json.NewEncoder(stdin)}
	go func() {
		sc := bufio.NewScanner(stdout)
		sc.Buffer(nil, 8<<20)
		for sc.Scan() {
			var s endpoints.Snapshot
			if json.Unmarshal(sc.Bytes(), &s) == nil {
				p.observe(&s)
			}
		}
	}()
	t.Cleanup(p.kill)
	return p
}

func (p *agentProcess) kill() {
	p.cmd.Process.Signal(syscall.SIGKILL)
	p.cmd.Wait()
}

// pids returns the pid that answers at each instance's address.
func pids(t *testing.T, s *endpoints.Snapshot) map[string]string {
	m := map[string]string{}
	for _, in := range s.Instances {
		m[in.ID] = get(t, in.Addr, "/pid")
	}
	return m
}

func TestKilledAgentsInstancesAreAdopted(t *testing.T) {
	for _, socket := range []bool{false, true} {
		t.Run(fmt.Sprintf("socket=%v", socket), func(t *testing.T) {
			dir := t.TempDir()
			keep, drop := revisionOf(t, "keep-00001", "ok"), revisionOf(t, "drop-00001", "ok")
			if socket {
				keep.Annotations[api.AnnotationSocket] = "fd3"
			}
			first := startAgentProcess(t, dir)
			first.in.Encode(order{keep, keep.ID(), 4})
			first.in.Encode(order{drop, drop.ID(), 1})
			before := first.ready(keep.ID(), 4)
			first.ready(drop.ID(), 1)
			want := pids(t, before)

			// Load while the agent is killed: the instances must not notice.
			stop, failed := make(chan struct{}), make(chan error, 4)
			for _, in := range before.Instances {
				go func() {
					for {
						select {
						case <-stop:
							failed <- nil
							return
						default:
							if _, err := tryGet(in.Addr, "/pid"); err != nil {
								failed <- err
								return
							}
						}
					}
				}()
			}
			first.kill()
			// An intent without a process, a torn record, and a process whose pid was never written down.
			os.Mkdir(filepath.Join(dir, "instances", "never"), 0o755)
			os.Mkdir(filepath.Join(dir, "instances", "torn"), 0o755)
			os.WriteFile(filepath.Join(dir, "instances", "torn", recordFile), []byte("{"), 0o644)
			if err := os.Remove(filepath.Join(dir, "instances", folderOf(before.Instances[2].ID), local.NoteFile)); err != nil {
				t.Fatal(err)
			}

			second := newRigIn(t, dir, func(c *Config) { c.AdoptWithin = 500 * time.Millisecond })
			second.SetRevision(keep)
			after := second.ready(keep.ID(), 4)
			close(stop)
			for range 4 {
				if err := <-failed; err != nil {
					t.Errorf("a request failed while the agent was away: %v", err)
				}
			}
			for _, in := range after.Instances {
				if !in.Adopted || want[in.ID] == "" || in.Addr == "" {
					t.Errorf("%+v was not adopted", in)
				}
			}
			if got := pids(t, after); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("processes are %v, were %v", got, want)
			}
			// The other revision never came: its instance is ended.
			deadline := time.Now().Add(10 * time.Second)
			for len(alive(t, dir)) != 4 {
				if time.Now().After(deadline) {
					t.Fatalf("%d processes are alive, want the 4 adopted", len(alive(t, dir)))
				}
				time.Sleep(10 * time.Millisecond)
			}
			// Scaling works on adopted ones, and their deaths are noticed.
			second.Scale(keep.ID(), 2, time.Now())
			left := second.ready(keep.ID(), 2)
			pid, _ := strconv.Atoi(want[left.Instances[0].ID])
			syscall.Kill(pid, syscall.SIGKILL)
			second.until(keep.ID(), "a replacement for the killed one", func(s *endpoints.Snapshot) bool {
				return s.Count(endpoints.Ready) == 2 && len(s.Instances) == 2 && s.Instances[1].ID != left.Instances[1].ID
			})
			second.stop()
		})
	}
}

// TestKillDuringStarts kills the agent in the middle of a burst of starts, at different moments: whatever was started is found.
func TestKillDuringStarts(t *testing.T) {
	for i := range 6 {
		dir := t.TempDir()
		rev := revisionOf(t, "burst-00001", "ok")
		first := startAgentProcess(t, dir)
		first.in.Encode(order{rev, rev.ID(), 12})
		first.until(rev.ID(), "the burst", func(s *endpoints.Snapshot) bool { return len(s.Instances) == 12 })
		time.Sleep(time.Duration(i) * 3 * time.Millisecond) // any moment will do, nothing is expected of it
		first.kill()
		second := newRigIn(t, dir, nil)
		second.SetRevision(rev)
		second.Scale(rev.ID(), 12, time.Now())
		s := second.ready(rev.ID(), 12)
		got := map[string]bool{}
		for id, pid := range pids(t, s) {
			if got[pid] {
				t.Errorf("instance %s shares its process", id)
			}
			got[pid] = true
		}
		if n := len(alive(t, dir)); n != 12 {
			t.Errorf("%d processes for 12 instances", n)
		}
		second.stop()
	}
}

func TestForeignProcessIsNotAdopted(t *testing.T) {
	dir := t.TempDir()
	stranger := exec.Command("/bin/sleep", "300")
	if err := stranger.Start(); err != nil {
		t.Skip("needs /bin/sleep")
	}
	defer stranger.Wait()
	defer stranger.Process.Kill()
	inst := filepath.Join(dir, "instances", "aaaaaaaaaa")
	os.MkdirAll(inst, 0o755)
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	os.WriteFile(filepath.Join(inst, recordFile), []byte(`{"id":"x-00001-aaaaaaaaaa","namespace":"default","revision":"x-00001","uid":"uid-x-00001","addr":"127.0.0.1:1"}`), 0o644)
	// The right pid with another start time: the pid was used again.
	os.WriteFile(filepath.Join(inst, local.NoteFile), fmt.Appendf(nil, `{"pid":%d,"ticks":1,"boot":%q}`, stranger.Process.Pid, strings.TrimSpace(string(boot))), 0o644)
	r := newRigIn(t, dir, nil)
	rev := revisionOf(t, "x-00001", "ok")
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	if s := r.ready(rev.ID(), 1); s.Instances[0].Adopted {
		t.Errorf("adopted %+v", s.Instances[0])
	}
	r.stop()
	if err := stranger.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the stranger was killed: %v", err)
	}
}

func folderOf(id string) string { return id[strings.LastIndexByte(id, '-')+1:] }
