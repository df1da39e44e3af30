package instance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/internal/endpoints"
)

func TestRuntimeContract(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "hello-00001", "ok", "GREETING=port $(PORT), $(NOBODY), $$(PORT)")
	work := t.TempDir()
	rev.Spec.Containers[0].WorkingDir = work
	rev.Spec.Containers[0].Args = []string{"--listen", ":$(PORT)"}
	r.SetRevision(rev)
	decided := time.Now()
	r.Scale(rev.ID(), 1, decided)
	in := r.ready(rev.ID(), 1).Instances[0]
	_, port, _ := net.SplitHostPort(in.Addr)

	env := strings.Split(get(t, in.Addr, "/env"), "\n")
	tmp := filepath.Join(r.dir, "instances", folderOf(in.ID), "tmp")
	for _, want := range []string{
		"PORT=" + port, "K_SERVICE=svc", "K_CONFIGURATION=cfg", "K_REVISION=hello-00001",
		"HOME=" + tmp, "TMPDIR=" + tmp, "PATH=" + os.Getenv("PATH"), "THAW_INSTANCE=" + in.ID,
		"GREETING=port " + port + ", $(NOBODY), $(PORT)",
	} {
		if !slices.Contains(env, want) {
			t.Errorf("environment lacks %s", want)
		}
	}
	self, _ := os.Executable()
	if got, want := get(t, in.Addr, "/args"), fmt.Sprintf("%q", []string{self, "--listen", ":" + port}); got != want {
		t.Errorf("args %s, want %s", got, want)
	}
	if got := get(t, in.Addr, "/cwd"); got != work {
		t.Errorf("working directory %s, want %s", got, work)
	}
	if got := get(t, in.Addr, "/stdin"); got != "0 <nil>" {
		t.Errorf("stdin gave %s, want nothing and EOF", got)
	}
	if got := get(t, in.Addr, "/tmpfile"); !strings.HasPrefix(got, tmp) {
		t.Errorf("temporary file at %s, want in %s", got, tmp)
	}
	s := in.Start
	order := []time.Time{decided, s.Decided, s.Placed, s.Code, s.Exec, s.Ready}
	if !slices.IsSortedFunc(order, time.Time.Compare) || s.Code.IsZero() {
		t.Errorf("times of the start are not in order: %+v", s)
	}
	r.Scale(rev.ID(), 0, time.Time{})
	r.ready(rev.ID(), 0)
}

// An order that comes before the agent runs is carried out when it does, and the start is that order's.
func TestOrderBeforeRun(t *testing.T) {
	a, err := New(Config{Dir: t.TempDir(), Provider: "process", Shutdown: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	c := newCollector(t)
	a.Subscribe(c.observe)
	rev := revisionOf(t, "early-00001", "ok")
	a.SetRevision(rev)
	decided := time.Now()
	a.Scale(rev.ID(), 1, decided)
	placed := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	if s := c.ready(rev.ID(), 1).Instances[0].Start; !s.Decided.Equal(decided) || s.Placed.After(placed) {
		t.Errorf("ordered at %v, started as %+v", decided, s)
	}
	a.Scale(rev.ID(), 2, time.Time{})
	for _, in := range c.ready(rev.ID(), 2).Instances[1:] {
		if !in.Start.Decided.IsZero() {
			t.Errorf("a later start is said to be of the order before: %+v", in.Start)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestScaleUpAndDown(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "many-00001", "ok")
	r.Scale(rev.ID(), 12, time.Now()) // before the revision is known
	r.SetRevision(rev)
	s := r.ready(rev.ID(), 12)
	addrs := map[string]bool{}
	for _, in := range s.Instances {
		addrs[in.Addr] = true
	}
	if len(addrs) != 12 {
		t.Errorf("%d addresses for 12 instances", len(addrs))
	}
	r.Scale(rev.ID(), 5, time.Now())
	kept := r.ready(rev.ID(), 5)
	for i, in := range kept.Instances {
		if in.ID != s.Instances[i].ID {
			t.Errorf("kept %s as number %d, want the older %s", in.ID, i, s.Instances[i].ID)
		}
	}
	r.RemoveRevision(rev.ID())
	r.ready(rev.ID(), 0)
	r.collector.mu <- struct{}{}
	for _, s := range r.all {
		if len(s.Instances) > 12 {
			t.Errorf("%d instances at once, 12 were ordered", len(s.Instances))
		}
	}
	<-r.collector.mu
}

// busy is a queue-proxy with a settable number of requests inside.
type busy struct {
	id      string
	n       atomic.Int64
	drained chan struct{} // Drain waits for it
	asked   chan struct{} // closed by Drain
	closed  atomic.Int64
}

func (b *busy) InFlight() int { return int(b.n.Load()) }
func (b *busy) Drain(ctx context.Context) error {
	close(b.asked)
	select {
	case <-b.drained:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
func (b *busy) Close() { b.closed.Add(1) }

func TestScaleInDrainsTheIdlest(t *testing.T) {
	var mu sync.Mutex
	sidecars := map[string]*busy{}
	r := newRig(t, func(c *Config) {
		c.Sidecar = func(e endpoints.Instance, _ *api.Revision, _ Dialer) Sidecar {
			b := &busy{id: e.ID, drained: make(chan struct{}), asked: make(chan struct{})}
			mu.Lock()
			sidecars[e.ID] = b
			mu.Unlock()
			return b
		}
	})
	rev := revisionOf(t, "idle-00001", "ok")
	minute := int64(60)
	rev.Spec.TimeoutSeconds = &minute
	r.SetRevision(rev)
	r.Scale(rev.ID(), 3, time.Now())
	s := r.ready(rev.ID(), 3)
	for i, n := range []int64{2, 1, 2} {
		sidecars[s.Instances[i].ID].n.Store(n)
	}
	r.Scale(rev.ID(), 2, time.Now())
	victim := sidecars[s.Instances[1].ID]
	<-victim.asked
	// Draining is shown before the queue-proxy is drained, and the process lives on meanwhile.
	if got := r.get(rev.ID()); got.Count(endpoints.Draining) != 1 || got.Instances[1].State != endpoints.Draining {
		t.Errorf("while draining: %+v", got.Instances)
	}
	if _, err := tryGet(s.Instances[1].Addr, "/pid"); err != nil {
		t.Errorf("the instance ended before its last request was out: %v", err)
	}
	if n := len(r.get(rev.ID()).Instances); n != 3 {
		t.Errorf("%d instances while one drains, want 3", n)
	}
	close(victim.drained)
	r.ready(rev.ID(), 2)
	// Equal load: the youngest goes.
	r.Scale(rev.ID(), 1, time.Now())
	<-sidecars[s.Instances[2].ID].asked
	close(sidecars[s.Instances[2].ID].drained)
	r.ready(rev.ID(), 1)
	close(sidecars[s.Instances[0].ID].drained)
	r.stop()
	for id, b := range sidecars {
		if b.closed.Load() != 1 {
			t.Errorf("queue-proxy of %s closed %d times", id, b.closed.Load())
		}
	}
}

func TestStubbornInstanceIsKilled(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Grace = 100 * time.Millisecond })
	rev := revisionOf(t, "stubborn-00001", "stubborn")
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	r.ready(rev.ID(), 1)
	began := time.Now()
	r.Scale(rev.ID(), 0, time.Now())
	r.ready(rev.ID(), 0)
	if took := time.Since(began); took < 100*time.Millisecond {
		t.Errorf("ended after %v, before its grace", took)
	}
}

func TestShutdownIsBounded(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Shutdown = 500 * time.Millisecond
		c.Sidecar = func(endpoints.Instance, *api.Revision, Dialer) Sidecar {
			return &busy{drained: make(chan struct{}), asked: make(chan struct{})} // never drains
		}
	})
	rev := revisionOf(t, "stubborn-00002", "stubborn")
	minute := int64(600)
	rev.Spec.TimeoutSeconds = &minute
	r.SetRevision(rev)
	r.Scale(rev.ID(), 2, time.Now())
	r.ready(rev.ID(), 2)
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("shutdown took %v", took)
	}
}

func TestCrashBeforeReadyBacksOff(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "crash-00001", "crash")
	r.SetRevision(rev)
	r.Scale(rev.ID(), 8, time.Now())
	s := r.until(rev.ID(), "three failures", func(s *endpoints.Snapshot) bool { return s.Failure != nil && s.Failure.Count == 3 })
	f := s.Failure
	if f.Reason != "ExitCode3" || !strings.Contains(f.Message, "no database") || strings.ContainsAny(f.Message, "\x1b\n[") || !utf8.ValidString(f.Message) {
		t.Errorf("failure %q: %q", f.Reason, f.Message)
	}
	if wait := f.Until.Sub(f.At); wait < 150*time.Millisecond || wait > 250*time.Millisecond {
		t.Errorf("back-off after the third failure is %v", wait)
	}
	// After the first wave of eight, one at a time.
	r.collector.mu <- struct{}{}
	ids := map[string]bool{}
	for _, s := range r.all {
		if s.Failure != nil && s.Failure.Count >= 2 && s.Count(endpoints.Starting) > 1 {
			t.Errorf("%d starts at once after failure %d", s.Count(endpoints.Starting), s.Failure.Count)
		}
		for _, in := range s.Instances {
			ids[in.ID] = true
		}
	}
	<-r.collector.mu
	if len(ids) > 11 {
		t.Errorf("%d instances were started for 3 failures of 8", len(ids))
	}
	r.Scale(rev.ID(), 0, time.Now())
	r.ready(rev.ID(), 0)
}

func TestCrashOfReadyInstanceIsReplacedAtOnce(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "exit-00001", "ok")
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	first := r.ready(rev.ID(), 1).Instances[0]
	tryGet(first.Addr, "/exit")
	r.until(rev.ID(), "the failure", func(s *endpoints.Snapshot) bool {
		return s.Failure != nil || len(s.Instances) == 1 && s.Instances[0].ID != first.ID
	})
	second := r.until(rev.ID(), "a replacement", func(s *endpoints.Snapshot) bool {
		return s.Count(endpoints.Ready) == 1 && s.Instances[0].ID != first.ID
	})
	if second.Failure != nil {
		t.Errorf("failure %+v though an instance is ready", second.Failure)
	}
	r.collector.mu <- struct{}{}
	defer func() { <-r.collector.mu }()
	seen := slices.ContainsFunc(r.all, func(s *endpoints.Snapshot) bool {
		return s.Failure != nil && s.Failure.Reason == "ExitCode7" && s.Failure.Count == 1 && !s.Failure.Until.After(s.Failure.At)
	})
	if !seen {
		t.Error("no snapshot said why the first instance went, without back-off")
	}
}

func TestStartFailures(t *testing.T) {
	dir := t.TempDir()
	script := func(name, text string, mode os.FileMode) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	for _, c := range []struct {
		name, image string
		command     []string
		reason      string
		message     string
	}{
		{"missing", "exec:///no/such/program", nil, "CodeNotFound", "no such file"},
		{"plain", "exec://" + script("plain", "#!/bin/sh\n", 0o644), nil, "CodeNotFound", "chmod +x"},
		{"interpreter", "exec://" + script("interp", "#!/no/such/interpreter\n", 0o755), nil, "StartFailed", "interpreter"},
		{"format", "exec://" + script("format", "\x7fELF nonsense", 0o755), nil, "StartFailed", "not a program for this machine"},
		{"unknown", "gcr.io/acme/app", nil, "CodeNotFound", "--images"},
		{"command", "exec:///bin/sh", []string{"no-such-command"}, "CodeNotFound", "not on PATH"},
		{"relative", "exec:///bin/sh", []string{"./no-such-program"}, "StartFailed", "/bin/no-such-program"},
		{"package", "pkg://sha256:" + strings.Repeat("0", 64), nil, "CodeNotFound", "thaw deploy --dir"},
		{"digest", "exec:///bin/sh@sha256:" + strings.Repeat("0", 64), nil, "CodeChanged", "deploy again"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, nil)
			rev := revisionOf(t, "bad-00001", "ok")
			rev.Spec.Containers[0].Image, rev.Spec.Containers[0].Command = c.image, c.command
			r.SetRevision(rev)
			r.Scale(rev.ID(), 1, time.Now())
			f := r.until(rev.ID(), "a failure", func(s *endpoints.Snapshot) bool { return s.Failure != nil }).Failure
			if f.Reason != c.reason || !strings.Contains(f.Message, c.message) {
				t.Errorf("%s: %s, want %s: …%s…", f.Reason, f.Message, c.reason, c.message)
			}
		})
	}
}

func TestNeverReady(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "deaf-00001", "deaf")
	rev.Annotations[api.AnnotationProgressDeadline] = "300ms"
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	f := r.until(rev.ID(), "a failure", func(s *endpoints.Snapshot) bool { return s.Failure != nil }).Failure
	if f.Reason != api.ReasonProgressDeadlineExceeded || !strings.Contains(f.Message, "300ms") || !strings.Contains(f.Message, "hello from deaf-00001") {
		t.Errorf("%s: %s", f.Reason, f.Message)
	}
}

func TestProbes(t *testing.T) {
	r := newRig(t, nil)
	http := func(path string) *api.Probe {
		return &api.Probe{HTTPGet: &api.HTTPGetAction{Path: path}, PeriodSeconds: 1, FailureThreshold: 1, TimeoutSeconds: 1}
	}
	t.Run("readiness", func(t *testing.T) {
		rev := revisionOf(t, "readiness-00001", "ok")
		rev.Spec.Containers[0].ReadinessProbe = http("/health")
		r.SetRevision(rev)
		r.Scale(rev.ID(), 1, time.Now())
		in := r.ready(rev.ID(), 1).Instances[0]
		get(t, in.Addr, "/ill")
		r.until(rev.ID(), "not ready", func(s *endpoints.Snapshot) bool { return s.Count(endpoints.Starting) == 1 })
		get(t, in.Addr, "/well")
		if got := r.ready(rev.ID(), 1).Instances[0]; got.ID != in.ID {
			t.Errorf("the instance was replaced for not being ready")
		}
		r.RemoveRevision(rev.ID())
	})
	t.Run("liveness", func(t *testing.T) {
		rev := revisionOf(t, "liveness-00001", "ok")
		rev.Spec.Containers[0].LivenessProbe = http("/health")
		r.SetRevision(rev)
		r.Scale(rev.ID(), 1, time.Now())
		in := r.ready(rev.ID(), 1).Instances[0]
		get(t, in.Addr, "/ill")
		f := r.until(rev.ID(), "the failure", func(s *endpoints.Snapshot) bool { return s.Failure != nil }).Failure
		if f.Reason != "LivenessProbeFailed" {
			t.Errorf("failure %+v", f)
		}
		r.until(rev.ID(), "a replacement", func(s *endpoints.Snapshot) bool {
			return len(s.Instances) == 1 && s.Instances[0].ID != in.ID && s.Count(endpoints.Ready) == 1
		})
		r.RemoveRevision(rev.ID())
	})
	t.Run("startup", func(t *testing.T) {
		rev := revisionOf(t, "startup-00001", "deaf")
		rev.Spec.Containers[0].StartupProbe = http("/health")
		r.SetRevision(rev)
		r.Scale(rev.ID(), 1, time.Now())
		f := r.until(rev.ID(), "the failure", func(s *endpoints.Snapshot) bool { return s.Failure != nil }).Failure
		if f.Reason != "StartupProbeFailed" {
			t.Errorf("failure %+v", f)
		}
		r.RemoveRevision(rev.ID())
	})
}

// quickest starts revisions of rev's kind, one after another, until one was ready within bound of its exec, and at most five: the machine has other
// work too. It returns the quickest and what it took.
func (r *rig) quickest(rev *api.Revision, bound time.Duration) (best endpoints.Instance, took time.Duration) {
	name := rev.Name
	for try := range 5 {
		again := *rev
		again.Name = fmt.Sprint(name, "-", try)
		r.SetRevision(&again)
		r.Scale(again.ID(), 1, time.Now())
		in := r.ready(again.ID(), 1).Instances[0]
		if d := in.Start.Ready.Sub(in.Start.Exec); try == 0 || d < took {
			best, took = in, d
		}
		if took <= bound {
			break
		}
	}
	return best, took
}

func TestSocketOnDescriptor3(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "fd3-00001", "ok", "DELAY=200ms")
	rev.Annotations[api.AnnotationSocket] = "fd3"
	rev.Status.Conditions.Set(time.Now(), api.ConditionReady, api.True, "", "") // deployed long ago
	const bound = 150 * time.Millisecond
	in, took := r.quickest(rev, bound)
	if took > bound {
		t.Errorf("a socket that listens already took %v to be ready", took)
	}
	get(t, in.Addr, "/pid") // the function itself checks LISTEN_PID and exits if it is wrong
}

// Before a revision is called ready for the first time, a function that gets its socket has to accept a connection.
func TestSocketOfANewRevision(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "fd3-00004", "crash")
	rev.Annotations[api.AnnotationSocket] = "fd3"
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	s := r.until(rev.ID(), "the failure or readiness", func(s *endpoints.Snapshot) bool { return s.Failure != nil || s.Count(endpoints.Ready) > 0 })
	if s.Failure == nil || s.Failure.Served || !strings.Contains(s.Failure.Message, "before it was ready") || !strings.Contains(s.Failure.Message, "no database") {
		t.Errorf("failure %+v, %d ready", s.Failure, s.Count(endpoints.Ready))
	}
	good := revisionOf(t, "fd3-00005", "ok", "DELAY=200ms")
	good.Annotations[api.AnnotationSocket] = "fd3"
	r.SetRevision(good)
	r.Scale(good.ID(), 1, time.Now())
	in := r.ready(good.ID(), 1).Instances[0]
	if took := in.Start.Ready.Sub(in.Start.Exec); took < 200*time.Millisecond {
		t.Errorf("it accepts after 200 ms and was ready after %v", took)
	}
}

func TestQueuedConnectionsSurviveACrash(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "fd3-00002", "ok", "DELAY=300ms", "MARK="+filepath.Join(t.TempDir(), "mark"))
	rev.Annotations[api.AnnotationSocket] = "fd3"
	rev.Status.Conditions.Set(time.Now(), api.ConditionReady, api.True, "", "") // deployed long ago
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	in := r.ready(rev.ID(), 1).Instances[0]
	// These wait in the accept queue while the first process sleeps and dies, and are served by the second.
	const n = 20
	errs := make(chan error, n)
	for range n {
		go func() {
			_, err := tryGet(in.Addr, "/pid")
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if got := r.ready(rev.ID(), 1).Instances[0]; got.ID == in.ID {
		t.Error("the instance did not crash, the test shows nothing")
	}
}

// A function that gets its socket and always dies must not keep callers in the accept queue for ever: when the back-off has
// grown their connections are reset.
func TestQueuedConnectionsOfACrashLoopEnd(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "fd3-00003", "crash")
	rev.Annotations[api.AnnotationSocket] = "fd3"
	rev.Status.Conditions.Set(time.Now(), api.ConditionReady, api.True, "", "") // deployed long ago
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	in := r.until(rev.ID(), "an address", func(s *endpoints.Snapshot) bool {
		return len(s.Instances) == 1 && s.Instances[0].Addr != ""
	}).Instances[0]
	if _, err := tryGet(in.Addr, "/"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("want the connection reset, got %v", err)
	}
}

func TestEscapedChildIsKilled(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "escape-00001", "ok")
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	in := r.ready(rev.ID(), 1).Instances[0]
	pid, _ := strconv.Atoi(strings.Fields(get(t, in.Addr, "/escape"))[0])
	if err := syscall.Kill(pid, 0); err != nil {
		t.Fatalf("the child that left the session is not there: %v", err)
	}
	r.Scale(rev.ID(), 0, time.Now())
	r.ready(rev.ID(), 0)
	r.stop() // noOrphans looks for it
}

func TestRevisionOfSameNameReplacesInstances(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "again-00001", "ok")
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	first := r.ready(rev.ID(), 1).Instances[0]
	other := revisionOf(t, "again-00001", "ok")
	other.UID = "another"
	r.SetRevision(other)
	r.until(rev.ID(), "a new instance alone", func(s *endpoints.Snapshot) bool {
		return len(s.Instances) == 1 && s.Count(endpoints.Ready) == 1 && s.Instances[0].ID != first.ID
	})
}

func TestNodeFull(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Units = 2 })
	a, b := revisionOf(t, "full-00001", "ok"), revisionOf(t, "full-00002", "ok")
	r.SetRevision(a)
	r.SetRevision(b)
	r.Scale(a.ID(), 2, time.Now())
	r.ready(a.ID(), 2)
	r.Scale(b.ID(), 1, time.Now())
	if f := r.get(b.ID()).Failure; f == nil || f.Reason != "NodeFull" {
		t.Errorf("failure %+v", f)
	}
	r.Scale(a.ID(), 1, time.Now())
	if s := r.ready(b.ID(), 1); s.Failure != nil {
		t.Errorf("failure %+v though there is room", s.Failure)
	}
}

func TestDataFolderIsLocked(t *testing.T) {
	r := newRig(t, nil)
	if _, err := New(Config{Dir: r.dir}); !errors.Is(err, ErrLocked) {
		t.Errorf("second agent in the same folder: %v", err)
	}
	r.stop()
	second := newRigIn(t, r.dir, nil)
	second.stop()
}

func TestSubscriberMayCallTheAgent(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "loop-00001", "ok")
	var once sync.Once
	r.Subscribe(func(s *endpoints.Snapshot) {
		if s.Count(endpoints.Ready) == 1 {
			once.Do(func() { r.Scale(rev.ID(), 2, time.Now()) })
		}
	})
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	r.ready(rev.ID(), 2)
}

func TestLogsOfInstances(t *testing.T) {
	r := newRig(t, nil)
	rev := revisionOf(t, "say-00001", "ok")
	r.SetRevision(rev)
	r.Scale(rev.ID(), 2, time.Now())
	s := r.ready(rev.ID(), 2)
	get(t, s.Instances[1].Addr, "/say?what=needle")
	lines := collectLogs(t, r.Agent, logs.Query{Namespace: "default", Service: "svc"})
	i := slices.IndexFunc(lines, func(l logs.Line) bool { return l.Text == "needle" })
	if i < 0 {
		t.Fatalf("the line is missing in %+v", lines)
	}
	if l := lines[i]; l.Instance != s.Instances[1].ID || l.Revision != rev.Name || l.Stream != logs.Stdout {
		t.Errorf("%+v, want it from %s", l, s.Instances[1].ID)
	}
	r.Scale(rev.ID(), 0, time.Now())
	r.ready(rev.ID(), 0)
	if again := collectLogs(t, r.Agent, logs.Query{Instance: s.Instances[1].ID}); !slices.ContainsFunc(again, func(l logs.Line) bool { return l.Text == "needle" }) {
		t.Error("the logs are gone with the instance")
	}
}

// TestSlowStarterIsSeenSoon: the function notes when it begins to listen.
func TestSlowStarterIsSeenSoon(t *testing.T) {
	const late, bound = 400 * time.Millisecond, 900 * time.Millisecond
	// The moment of the exec is noted by the parent, which may get there late.
	if _, took := newRig(t, nil).quickest(revisionOf(t, "late-00001", "late", "DELAY=400ms"), bound); took < late/2 || took > bound {
		t.Errorf("ready %v after exec, it slept %v before it listened", took, late)
	}
}

func TestFloodIsBounded(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Logs = logs.Config{FileBytes: 100 << 10, Poll: 20 * time.Millisecond} })
	rev := revisionOf(t, "flood-00001", "flood") // prints 4 MiB, then serves
	r.SetRevision(rev)
	r.Scale(rev.ID(), 1, time.Now())
	r.ready(rev.ID(), 1)
	deadline := time.Now().Add(10 * time.Second)
	for {
		var size int64
		files, _ := filepath.Glob(filepath.Join(r.dir, "logs", "default", "flood-00001", "*.log*"))
		for _, f := range files {
			if fi, err := os.Stat(f); err == nil {
				size += fi.Size()
			}
		}
		if size > 0 && size <= 2*(100<<10) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes of logs are kept, the bound is two files of 100 KiB", size)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestBackOff(t *testing.T) {
	for crashes, want := range map[int]time.Duration{
		0: 0, 1: 0, 2: 100 * time.Millisecond, 3: 200 * time.Millisecond, 10: 25600 * time.Millisecond, 11: maxBackOff, 1000: maxBackOff,
	} {
		if got := backOff(crashes); got != want {
			t.Errorf("backOff(%d) = %v, want %v", crashes, got, want)
		}
	}
}

// What is said of an instance that never listened is what the kernel said, though the end came in the middle of a try.
func TestAwaitPortSaysWhy(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errProgress)
	defer cancel()
	tries := 0
	err := awaitPort(ctx, "127.0.0.1:1", func(ctx context.Context, _, _ string) (net.Conn, error) {
		if tries++; tries < 3 {
			return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
		}
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if !errors.Is(err, errProgress) || !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "deadline exceeded; before that dial: connection refused") {
		t.Errorf("got %v", err)
	}
}
