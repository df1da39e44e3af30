// Package knative says of a running `thaw dev` what Knative Serving's own conformance and end-to-end tests say of a cluster. Each
// test has the name of the one that it mirrors; where it asserts something else, the difference is named. Two files go beyond
// that: footprint_test.go measures an idle system, badinput_test.go shows it what is wrong.
package knative

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

var (
	bin    string // folder with the binaries under test
	common struct {
		once sync.Once
		th   *harness.Thaw
		err  error
	}
)

func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue { // most of these tests wait most of the time
		f.Value.Set("10")
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "thaw-knative-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	data = dir
	code := harness.Main(m, &bin, "cmd/thaw", "examples/checker", "examples/crasher", "examples/websocket-echo", "test/function")
	if common.th == nil {
		return code
	}
	if err := common.th.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code != 0 {
		fmt.Fprintf(os.Stderr, "log of the shared thaw dev:\n%s\n", harness.Tail(common.th.Log(), 8000))
	}
	return code
}

var data string // folder of the shared system

// shared returns the system that the parallel tests share.
func shared(t *testing.T) *harness.Thaw {
	t.Helper()
	t.Parallel()
	common.once.Do(func() {
		cfg := filepath.Join(data, "autoscaler.yaml")
		if common.err = os.WriteFile(cfg, []byte(harness.Quick), 0o600); common.err == nil {
			// Knative knows no frozen instances: what is scaled away has to be gone.
			common.th, common.err = harness.Open(bin, filepath.Join(data, "dev"), "--autoscaler-config", cfg, "--frozen-for", "0s")
		}
	})
	if common.err != nil {
		t.Fatal(common.err)
	}
	return common.th.For(t)
}

const (
	ns      = "default"
	patient = 30 * time.Second // for what takes well below a second on a machine that has time
)

type change = func(*api.Service)

// service is a Service around the test function.
func service(name string, changes ...change) *api.Service {
	s := &api.Service{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: name}}
	s.Spec.Template.Spec.Containers = []api.Container{{Image: program("function")}}
	for _, c := range changes {
		c(s)
	}
	return s
}

func program(name string) string { return "exec://" + filepath.Join(bin, name) }

func image(name string) change {
	return func(s *api.Service) { s.Spec.Template.Spec.Containers[0].Image = program(name) }
}

func container(f func(*api.Container)) change {
	return func(s *api.Service) { f(&s.Spec.Template.Spec.Containers[0]) }
}

func env(name, value string) change {
	return container(func(c *api.Container) {
		c.Env = slices.DeleteFunc(c.Env, func(e api.EnvVar) bool { return e.Name == name })
		c.Env = append(c.Env, api.EnvVar{Name: name, Value: value})
	})
}

// annotated sets an annotation of the template.
func annotated(key, value string) change {
	return func(s *api.Service) {
		a := maps.Clone(s.Spec.Template.Annotations)
		if a == nil {
			a = map[string]string{}
		}
		a[key] = value
		s.Spec.Template.Annotations = a
	}
}

func scaling(suffix, value string) change { return annotated("autoscaling.knative.dev/"+suffix, value) }

func named(revision string) change { return func(s *api.Service) { s.Spec.Template.Name = revision } }

// target is one share: "latest" or a revision's name.
func target(revision string, percent int64, tag string) api.TrafficTarget {
	latest := revision == "latest"
	t := api.TrafficTarget{Tag: tag, Percent: &percent, LatestRevision: &latest}
	if !latest {
		t.RevisionName = revision
	}
	return t
}

func traffic(targets ...api.TrafficTarget) change {
	return func(s *api.Service) { s.Spec.Traffic = targets }
}

// create makes an object and waits until it is ready.
func create[T api.Object](t *testing.T, th *harness.Thaw, o T) T {
	t.Helper()
	return ready[T](t, th, post(t, th, o).Meta().Name)
}

// post makes an object, which goes with the test.
func post[T api.Object](t *testing.T, th *harness.Thaw, o T) T {
	t.Helper()
	got, err := th.Client.Create(t.Context(), kindOf[T](), o)
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	t.Cleanup(func() { remove(t, th, kindOf[T](), got.Meta().Name) })
	return got.(T)
}

// remove deletes an object, if it is still there, and waits until all that it had made is gone, so that the names are free again.
func remove(t *testing.T, th *harness.Thaw, k *api.Kind, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), patient) // the test's own context has ended
	defer cancel()
	if err := th.Client.Delete(ctx, k, ns, name); err != nil && !errors.Is(err, client.ErrNotFound) {
		t.Errorf("delete %s %s: %v", k.Singular, name, err)
	}
	if k != api.Services && k != api.Configurations {
		return
	}
	for ctx.Err() == nil {
		left := 0
		for _, kind := range []*api.Kind{api.Configurations, api.Routes, api.Revisions} {
			list, _, err := th.Client.List(ctx, kind, ns, client.ListOptions{LabelSelector: "serving.knative.dev/" + k.Singular + "=" + name})
			if err != nil {
				t.Errorf("list: %v", err)
				return
			}
			left += len(list)
		}
		if left == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("%s %s was deleted, but what it had made is still there", k.Singular, name)
}

func kindOf[T api.Object]() *api.Kind {
	var zero T
	for _, k := range api.Kinds {
		if _, ok := k.New().(T); ok {
			return k
		}
	}
	panic(fmt.Sprintf("no kind of %T", zero))
}

func ready[T api.Object](t *testing.T, th *harness.Thaw, name string) T {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	o, err := th.Client.WaitReady(ctx, kindOf[T](), ns, name, client.WaitOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return o.(T)
}

func get[T api.Object](t *testing.T, th *harness.Thaw, name string) T {
	t.Helper()
	o, err := th.Client.Get(t.Context(), kindOf[T](), ns, name)
	if err != nil {
		t.Fatalf("get: %v", err)
	}
	return o.(T)
}

// replace reads an object, changes it and writes it back, again if somebody else was faster.
func replace[T api.Object](t *testing.T, th *harness.Thaw, name string, change func(T)) {
	t.Helper()
	for range 20 {
		o := get[T](t, th, name)
		change(o)
		_, err := th.Client.Replace(t.Context(), kindOf[T](), o)
		if errors.Is(err, client.ErrConflict) {
			continue
		}
		if err != nil {
			t.Fatalf("replace: %v", err)
		}
		return
	}
	t.Fatalf("%s: 20 conflicts in a row", name)
}

// update changes a Service and waits until it is ready again.
func update(t *testing.T, th *harness.Thaw, name string, changes ...change) *api.Service {
	t.Helper()
	replace(t, th, name, func(s *api.Service) {
		for _, c := range changes {
			c(s)
		}
	})
	return ready[*api.Service](t, th, name)
}

func patch[T api.Object](t *testing.T, th *harness.Thaw, name string, typ client.PatchType, body string) T {
	t.Helper()
	o, err := th.Client.Patch(t.Context(), kindOf[T](), ns, name, typ, []byte(body))
	if err != nil {
		t.Fatalf("patch: %v", err)
	}
	return o.(T)
}

// condition waits until an object's condition has a status, and returns it.
func condition[T api.Object](t *testing.T, th *harness.Thaw, name, typ, status string) api.Condition {
	t.Helper()
	var c *api.Condition
	for end := time.Now().Add(patient); ; time.Sleep(20 * time.Millisecond) {
		o, err := th.Client.Get(t.Context(), kindOf[T](), ns, name)
		if err == nil {
			if c = api.StatusOf(o).Conditions.Get(typ); c != nil && c.Status == status {
				return *c
			}
		} else if !errors.Is(err, client.ErrNotFound) { // it may not have been made yet
			t.Fatal(err)
		}
		if time.Now().After(end) {
			t.Fatalf("%s %s: condition %s is %+v, want %s", kindOf[T]().Singular, name, typ, c, status)
		}
	}
}

// seen is what the test function reports.
type seen struct {
	Args    []string
	Dir     string
	Env     map[string]string
	Host    string
	Headers map[string][]string
	Method  string
	URI     string
	Stdin   string
	Temp    string
	Home    string
	Pid     int
	UID     int
	EUID    int
	FDs     []int
	Started time.Time
	Probes  int64
	Probe   map[string][]string
}

func (s seen) header(name string) string { return strings.Join(s.Headers[name], " | ") }

// instance is the name of the instance that answered. Its process id says little: in a sandbox everybody is the first process.
func (s seen) instance() string { return s.Env["THAW_INSTANCE"] }

// see calls a service of the test function.
func see(t *testing.T, th *harness.Thaw, host string, header ...string) seen {
	t.Helper()
	a := th.Get(host, "/", header...)
	var s seen
	if a.Err != nil || a.Status != 200 {
		t.Fatalf("%s: %v", host, a)
	}
	if err := json.Unmarshal([]byte(a.Body), &s); err != nil {
		t.Fatalf("%s: %v: %v", host, a, err)
	}
	return s
}

// pids are the processes of a revision.
func pids(th *harness.Thaw, revision string) (out []int) {
	each(th, revision, func(pid int, _ []string) { out = append(out, pid) })
	return out
}

// instances are the names of a revision's instances that have a process.
func instances(th *harness.Thaw, revision string) (out []string) {
	each(th, revision, func(_ int, env []string) {
		for _, kv := range env {
			if name, ok := strings.CutPrefix(kv, "THAW_INSTANCE="); ok {
				out = append(out, name)
			}
		}
	})
	return out
}

func each(th *harness.Thaw, revision string, f func(pid int, env []string)) {
	for _, pid := range harness.ProcessesOf(th.Dir) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		env := strings.Split(string(b), "\x00")
		if err == nil && slices.Contains(env, "K_REVISION="+revision) {
			f(pid, env)
		}
	}
}

func wantTraffic(t *testing.T, got []api.TrafficTarget, want ...string) {
	t.Helper()
	var have []string
	for _, x := range got {
		s := x.RevisionName
		if x.LatestRevision != nil && *x.LatestRevision {
			s = "latest:" + s
		}
		if x.Percent == nil {
			s += "=none"
		} else {
			s += fmt.Sprintf("=%d", *x.Percent)
		}
		if x.Tag != "" {
			s += "#" + x.Tag
		}
		have = append(have, s)
	}
	if !slices.Equal(have, want) {
		t.Errorf("traffic is %q, want %q", have, want)
	}
}

func ptr[T any](v T) *T { return &v }
