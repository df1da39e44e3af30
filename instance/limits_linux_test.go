package instance

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/provider"
)

// memoryLimit is the limit of the group of ours that a process is in; 0 = it is in none, or that has none.
func memoryLimit(pid int) int64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || !strings.Contains(f[2], "thaw-") {
			continue
		}
		for _, file := range []string{"memory/" + f[2] + "/memory.limit_in_bytes", f[2] + "/memory.max", "unified/" + f[2] + "/memory.max"} {
			if f[1] != "" && f[1] != "memory" {
				continue
			}
			b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", file))
			if n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && n > 0 {
				return n
			}
		}
	}
	return 0
}

func oomScore(t *testing.T, pid any) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%v/oom_score_adj", pid))
	if err != nil {
		t.Error(err)
	}
	return strings.TrimSpace(string(b))
}

// When the machine has no memory left, instances end before us, who share ours with each until its exec; and who sets no limit has one that
// follows from what it requests.
func TestInstancesAreBoundedAndExpendable(t *testing.T) {
	eachProvider(t, func(t *testing.T, use func(*Config)) {
		own := oomScore(t, "self")
		r := newRig(t, use)
		for _, c := range []struct {
			name, request, limit string
			want                 int64
		}{
			{"none-00001", "", "", 1 << 30},
			{"some-00001", "400Mi", "", 2 << 30}, // four times its class
			{"both-00001", "400Mi", "450Mi", 450 << 20},
			{"zero-00001", "", "0", 0},
		} {
			rev := revisionOf(t, c.name, "ok")
			res := &rev.Spec.Containers[0].Resources
			if c.request != "" {
				res.Requests = map[string]api.Quantity{"memory": api.Quantity(c.request)}
			}
			if c.limit != "" {
				res.Limits = map[string]api.Quantity{"memory": api.Quantity(c.limit)}
			}
			r.SetRevision(rev)
			r.Scale(rev.ID(), 1, time.Now())
			s := r.ready(rev.ID(), 1)
			pid := noted(t, r.dir, s)[s.Instances[0].ID]
			r.bounded(c.name, pid, c.want)
		}
		if now := oomScore(t, "self"); now != own || own == "1000" {
			t.Errorf("our own oom_score_adj was %s and is %s", own, now)
		}
	})
}

// bounded waits for a limit: where groups are of v1, a process gets into its own only after its exec.
func (r *rig) bounded(name string, pid int, want int64) {
	r.t.Helper()
	if got := oomScore(r.t.(*testing.T), pid); got != "1000" {
		r.t.Errorf("%s: oom_score_adj is %s, want 1000", name, got)
	}
	if !strings.Contains(r.Isolation(), "memory (cgroup") {
		r.t.Logf("no memory controller here: %s", r.Isolation())
		return
	}
	got := memoryLimit(pid)
	for deadline := time.Now().Add(20 * time.Second); got != want && time.Now().Before(deadline); got = memoryLimit(pid) {
		time.Sleep(5 * time.Millisecond)
	}
	if got != want {
		r.t.Errorf("%s: its memory limit is %d, want %d", name, got, want)
	}
}

// An interpreter that waited has the limit of what it becomes.
func TestBlanksAreBoundedAndExpendable(t *testing.T) {
	eachProvider(t, func(t *testing.T, use func(*Config)) {
		r := newRig(t, use)
		rev := deployed(t, r.Agent, "python", "waited-00001", func(c *api.Container) {
			c.Resources.Requests = map[string]api.Quantity{"memory": "400Mi"}
		})
		r.SetRevision(rev)
		r.blanksReady("python", blanksAhead)
		r.Scale(rev.ID(), 1, time.Now())
		s := r.ready(rev.ID(), 1)
		if r.blanks.usedNow() != 1 {
			t.Fatal("it was started, not made of one that waited")
		}
		r.bounded("python", noted(t, r.dir, s)[s.Instances[0].ID], 2<<30)
	})
}

func (b *blanks) usedNow() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// What is a precaution is never a reason to say something, nor for a plan to fail.
func TestLimitsOfPlan(t *testing.T) {
	for _, c := range []struct {
		requests, limits map[string]api.Quantity
		want             provider.Limits
	}{
		{nil, nil, provider.Limits{MemoryBytes: 1 << 30, Precaution: true}},
		{map[string]api.Quantity{"memory": "1Gi"}, nil, provider.Limits{MemoryBytes: 4 << 30, Precaution: true}},
		{map[string]api.Quantity{"cpu": "3"}, nil, provider.Limits{MemoryBytes: 16 << 30, CPURequest: 3000, Precaution: true}},
		{nil, map[string]api.Quantity{"memory": "10Mi"}, provider.Limits{MemoryBytes: 10 << 20}},
		{nil, map[string]api.Quantity{"memory": "0"}, provider.Limits{}},
		{nil, map[string]api.Quantity{"cpu": "1"}, provider.Limits{MemoryBytes: 4 << 30, CPUMillis: 1000, Precaution: true}},
	} {
		rev := revisionOf(t, "limits-00001", "ok")
		rev.Spec.Containers[0].Resources = api.Resources{Requests: c.requests, Limits: c.limits}
		r := newRig(t, nil)
		if p := r.newPlan(rev); p.err != nil || p.limits != c.want {
			t.Errorf("requests %v, limits %v: %+v, %v, want %+v", c.requests, c.limits, p.limits, p.err, c.want)
		}
		r.stop()
	}
}
