package objects

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/state"
)

var clock = time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)

func newTestStore(t *testing.T) (*Store, state.Store) {
	t.Helper()
	s := state.Memory()
	t.Cleanup(func() { _ = s.Close() })
	return New(s, func() time.Time { return clock }), s
}

func service(namespace, name, image string) *api.Service {
	s := &api.Service{}
	s.Namespace, s.Name = namespace, name
	s.Spec.Template.Spec.Containers = []api.Container{{Image: image}}
	return s
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got error %v, want %v", what, err, want)
	}
}

func TestCreateFillsIn(t *testing.T) {
	s, raw := newTestStore(t)
	in := service("default", "hello", "img")
	in.UID, in.ResourceVersion, in.Generation = "mine", "77", 9
	in.Status.URL = "http://a.lie"
	o, err := s.Create(t.Context(), api.Services, in)
	if err != nil {
		t.Fatal(err)
	}
	got := o.(*api.Service)
	if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(got.UID) {
		t.Errorf("uid %q is no random UUID", got.UID)
	}
	if got.Generation != 1 || got.Kind != "Service" || got.APIVersion != "serving.knative.dev/v1" || got.Status.URL != "" {
		t.Errorf("got %+v", got)
	}
	if !got.CreationTimestamp.Equal(clock.Truncate(time.Second)) {
		t.Errorf("creationTimestamp %v", got.CreationTimestamp)
	}
	if in.UID != "mine" || in.ResourceVersion != "77" || in.Status.URL == "" || in.Kind != "" {
		t.Errorf("the caller's object was changed: %+v", in)
	}
	kv, err := raw.Get(t.Context(), "/thaw/objects/serving.knative.dev/services/default/hello")
	if err != nil {
		t.Fatal(err)
	}
	if got.ResourceVersion != strconv.FormatInt(kv.Revision, 10) {
		t.Errorf("resourceVersion %s, the key's revision is %d", got.ResourceVersion, kv.Revision)
	}
	if strings.Contains(string(kv.Value), "resourceVersion") {
		t.Errorf("resourceVersion was stored: %s", kv.Value)
	}
	again, err := s.Get(t.Context(), api.Services, "default", "hello")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(o, again); d != "" {
		t.Errorf("Get gives something else than Create:\n%s", d)
	}
	_, err = s.Create(t.Context(), api.Services, in)
	wantErr(t, "create again", err, state.ErrExists)
}

func TestCreateGeneratesName(t *testing.T) {
	s, _ := newTestStore(t)
	seen := map[string]bool{}
	for range 50 {
		in := service("default", "", "img")
		in.GenerateName = "hello-"
		name := must(s.Create(t.Context(), api.Services, in)).Meta().Name
		if seen[name] || !regexp.MustCompile(`^hello-[0-9a-v]{5}$`).MatchString(name) {
			t.Fatalf("generated name %q", name)
		}
		seen[name] = true
	}
	in := service("default", "given", "img")
	in.GenerateName = "hello-"
	if name := must(s.Create(t.Context(), api.Services, in)).Meta().Name; name != "given" {
		t.Errorf("name %q, the given one should win", name)
	}
	in = service("default", "", "img")
	in.GenerateName = strings.Repeat("x", 80)
	if n := len(must(s.Create(t.Context(), api.Services, in)).Meta().Name); n != 63 {
		t.Errorf("a generated name has %d bytes, want 63", n)
	}
}

func TestUpdate(t *testing.T) {
	s, raw := newTestStore(t)
	ctx := t.Context()
	first := must(s.Create(ctx, api.Services, service("default", "hello", "one"))).(*api.Service)
	st := *first
	st.Status.URL = "http://hello"
	withStatus := must(s.UpdateStatus(ctx, api.Services, &st)).(*api.Service)

	t.Run("spec", func(t *testing.T) {
		next := service("default", "hello", "two")
		next.ResourceVersion = withStatus.ResourceVersion
		next.Status.URL = "http://a.lie"
		got := must(s.Update(ctx, api.Services, next)).(*api.Service)
		if got.Generation != 2 || got.UID != first.UID || got.Status.URL != "http://hello" || !got.CreationTimestamp.Equal(first.CreationTimestamp.Time) {
			t.Errorf("got %+v", got)
		}
		if got.ResourceVersion == withStatus.ResourceVersion {
			t.Error("the resourceVersion stayed")
		}
	})
	t.Run("stale", func(t *testing.T) {
		next := service("default", "hello", "three")
		next.ResourceVersion = withStatus.ResourceVersion
		_, err := s.Update(ctx, api.Services, next)
		wantErr(t, "stale update", err, state.ErrConflict)
		_, err = s.UpdateStatus(ctx, api.Services, next)
		wantErr(t, "stale status", err, state.ErrConflict)
		next.ResourceVersion = "nonsense"
		_, err = s.Update(ctx, api.Services, next)
		wantErr(t, "update at no revision", err, state.ErrConflict)
		next.ResourceVersion, next.UID = "", "other"
		_, err = s.Update(ctx, api.Services, next)
		wantErr(t, "update of another uid", err, state.ErrConflict)
	})
	t.Run("labels only", func(t *testing.T) {
		next := service("default", "hello", "two")
		next.Labels = map[string]string{"a": "b"}
		if got := must(s.Update(ctx, api.Services, next)).Meta(); got.Generation != 2 || got.Labels["a"] != "b" {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("nothing", func(t *testing.T) {
		_, before, _ := raw.List(ctx, "/")
		next := service("default", "hello", "two")
		next.Labels = map[string]string{"a": "b"}
		got := must(s.Update(ctx, api.Services, next))
		cur := must(s.Get(ctx, api.Services, "default", "hello"))
		must(s.UpdateStatus(ctx, api.Services, cur))
		must(s.Update(ctx, api.Services, cur))
		if _, after, _ := raw.List(ctx, "/"); after != before {
			t.Errorf("the store went from revision %d to %d without a change", before, after)
		}
		if d := cmp.Diff(cur, got); d != "" {
			t.Error(d)
		}
	})
	t.Run("missing", func(t *testing.T) {
		_, err := s.Update(ctx, api.Services, service("default", "nobody", "x"))
		wantErr(t, "update", err, state.ErrNotFound)
		_, err = s.UpdateStatus(ctx, api.Services, service("default", "nobody", "x"))
		wantErr(t, "status", err, state.ErrNotFound)
	})
}

func TestUpdateStatusWritesOnlyStatus(t *testing.T) {
	s, _ := newTestStore(t)
	ctx := t.Context()
	must(s.Create(ctx, api.Services, service("default", "hello", "one")))
	next := service("default", "hello", "two")
	next.Labels = map[string]string{"a": "b"}
	next.Status.URL = "http://hello"
	got := must(s.UpdateStatus(ctx, api.Services, next)).(*api.Service)
	if got.Generation != 1 || got.Labels != nil || got.Spec.Template.Spec.Containers[0].Image != "one" || got.Status.URL != "http://hello" {
		t.Errorf("got %+v", got)
	}
	if next.Generation != 0 || next.UID != "" {
		t.Error("the caller's object was changed")
	}
}

func TestDelete(t *testing.T) {
	s, raw := newTestStore(t)
	ctx := t.Context()
	o := must(s.Create(ctx, api.Services, service("default", "hello", "one")))
	_, err := s.Delete(ctx, api.Services, "default", "hello", "other", "")
	wantErr(t, "other uid", err, state.ErrConflict)
	_, err = s.Delete(ctx, api.Services, "default", "hello", "", "1")
	wantErr(t, "other resourceVersion", err, state.ErrConflict)
	last := must(s.Delete(ctx, api.Services, "default", "hello", o.Meta().UID, o.Meta().ResourceVersion))
	if _, rev, _ := raw.List(ctx, "/"); last.Meta().UID != o.Meta().UID || last.Meta().ResourceVersion != strconv.FormatInt(rev, 10) {
		t.Errorf("got %+v", last.Meta())
	}
	_, err = s.Delete(ctx, api.Services, "default", "hello", "", "")
	wantErr(t, "delete again", err, state.ErrNotFound)
	if n := must(s.Create(ctx, api.Services, service("default", "hello", "one"))); n.Meta().UID == o.Meta().UID {
		t.Error("a new object of the same name has the old uid")
	}
}

func TestBadNames(t *testing.T) {
	s, raw := newTestStore(t)
	ctx := t.Context()
	for _, bad := range []string{"", ".", "..", "a/b", "/", "a\x00b", "a\nb", "\xff", strings.Repeat("x", 254)} {
		_, err := s.Get(ctx, api.Services, "default", bad)
		wantErr(t, fmt.Sprintf("get %q", bad), err, ErrBadName)
		_, err = s.Get(ctx, api.Services, bad, "hello")
		wantErr(t, fmt.Sprintf("get in %q", bad), err, ErrBadName)
		_, err = s.Create(ctx, api.Services, service("default", bad, "x"))
		wantErr(t, fmt.Sprintf("create %q", bad), err, ErrBadName)
		_, err = s.Update(ctx, api.Services, service(bad, "hello", "x"))
		wantErr(t, fmt.Sprintf("update in %q", bad), err, ErrBadName)
		_, err = s.Delete(ctx, api.Services, bad, "hello", "", "")
		wantErr(t, fmt.Sprintf("delete in %q", bad), err, ErrBadName)
		if bad == "" {
			continue // all namespaces
		}
		_, _, err = s.List(ctx, api.Services, bad)
		wantErr(t, fmt.Sprintf("list in %q", bad), err, ErrBadName)
		events, reason := s.Watch(ctx, api.Services, bad, 0)
		if _, ok := <-events; ok {
			t.Error("an event")
		}
		wantErr(t, fmt.Sprintf("watch in %q", bad), reason(), ErrBadName)
	}
	if kvs, _, _ := raw.List(ctx, ""); len(kvs) != 0 {
		t.Errorf("something was stored: %v", kvs)
	}
}

func TestListIsPerKindAndNamespace(t *testing.T) {
	s, raw := newTestStore(t)
	ctx := t.Context()
	for _, n := range []string{"b/x", "a/y", "a/x", "ab/x"} {
		namespace, name, _ := strings.Cut(n, "/")
		must(s.Create(ctx, api.Services, service(namespace, name, "img")))
	}
	r := &api.Route{}
	r.Namespace, r.Name = "a", "r"
	must(s.Create(ctx, api.Routes, r))
	names := func(k *api.Kind, namespace string) (all []string) {
		objects, rev, err := s.List(ctx, k, namespace)
		if err != nil {
			t.Fatal(err)
		}
		if _, want, _ := raw.List(ctx, ""); rev != want {
			t.Errorf("revision %d, want %d", rev, want)
		}
		for _, o := range objects {
			all = append(all, o.Meta().Namespace+"/"+o.Meta().Name)
		}
		return all
	}
	for _, c := range []struct {
		kind      *api.Kind
		namespace string
		want      []string
	}{
		{api.Services, "a", []string{"a/x", "a/y"}},
		{api.Services, "", []string{"a/x", "a/y", "ab/x", "b/x"}},
		{api.Routes, "", []string{"a/r"}},
		{api.Revisions, "", nil},
	} {
		if d := cmp.Diff(c.want, names(c.kind, c.namespace)); d != "" {
			t.Errorf("%s in %q:\n%s", c.kind.Plural, c.namespace, d)
		}
	}
}

func TestEveryKindKeepsItsForm(t *testing.T) {
	s, _ := newTestStore(t)
	for _, k := range api.Kinds {
		o := k.New()
		o.Meta().Namespace, o.Meta().Name = "default", "x"
		got := must(s.Create(t.Context(), k, o))
		if got.Type().Kind != k.Kind || got.Type().APIVersion != k.APIVersion {
			t.Errorf("%s: got %+v", k.Kind, got.Type())
		}
		if again := must(s.Update(t.Context(), k, got)); again.Meta().ResourceVersion != got.Meta().ResourceVersion {
			t.Errorf("%s: an unchanged object was written", k.Kind)
		}
	}
}

func TestWatch(t *testing.T) {
	s, _ := newTestStore(t)
	ctx := t.Context()
	o := must(s.Create(ctx, api.Services, service("default", "early", "one")))
	_, rev, err := s.List(ctx, api.Services, "")
	if err != nil {
		t.Fatal(err)
	}
	must(s.Create(ctx, api.Services, service("default", "hello", "one")))
	r := &api.Route{}
	r.Namespace, r.Name = "default", "hello"
	must(s.Create(ctx, api.Routes, r)) // another kind
	events, _ := s.Watch(ctx, api.Services, "default", rev)
	must(s.Create(ctx, api.Services, service("elsewhere", "hello", "one")))
	must(s.Update(ctx, api.Services, service("default", "hello", "two")))
	must(s.Delete(ctx, api.Services, "default", "hello", "", ""))
	must(s.Create(ctx, api.Services, service("default", "hello", "three")))
	must(s.Delete(ctx, api.Services, "default", "early", "", ""))
	var got []string
	for range 5 {
		e := <-events
		if e.Object.Meta().ResourceVersion != strconv.FormatInt(e.Revision, 10) || e.Revision <= rev {
			t.Errorf("%s: resourceVersion %s, revision %d after %d", e.Type, e.Object.Meta().ResourceVersion, e.Revision, rev)
		}
		rev = e.Revision
		sv := e.Object.(*api.Service)
		got = append(got, fmt.Sprintf("%s %s %s %d", e.Type, sv.Name, sv.Spec.Template.Spec.Containers[0].Image, sv.Generation))
	}
	want := []string{"ADDED hello one 1", "MODIFIED hello two 2", "DELETED hello two 2", "ADDED hello three 1", "DELETED early one 1"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	_ = o
}

func TestWatchEnds(t *testing.T) {
	s, raw := newTestStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	events, reason := s.Watch(ctx, api.Services, "", 0)
	cancel()
	for range events {
	}
	wantErr(t, "cancelled", reason(), context.Canceled)

	for i := range 5 {
		must(s.Create(t.Context(), api.Services, service("default", fmt.Sprint("s", i), "x")))
	}
	_, rev, _ := s.List(t.Context(), api.Services, "")
	if err := raw.Compact(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	events, reason = s.Watch(t.Context(), api.Services, "", 2)
	for range events {
	}
	wantErr(t, "forgotten history", reason(), state.ErrCompacted)

	events, reason = s.Watch(t.Context(), api.Services, "", 0)
	must(raw.Put(t.Context(), Prefix(api.Services, "default")+"broken", []byte("{"), state.Any))
	for range events {
	}
	wantErr(t, "broken value", reason(), ErrCorrupt)
	_, _, err := s.List(t.Context(), api.Services, "")
	wantErr(t, "list with a broken value", err, ErrCorrupt)
}

func TestTooLarge(t *testing.T) {
	s, _ := newTestStore(t)
	big := service("default", "hello", "x")
	big.Annotations = map[string]string{"a": strings.Repeat("x", state.MaxValueBytes)}
	_, err := s.Create(t.Context(), api.Services, big)
	wantErr(t, "create", err, state.ErrTooLarge)
}

// Unconditional updates from many sides must all arrive, conditional ones exactly as often as they said they did.
func TestConcurrentUpdates(t *testing.T) {
	s, _ := newTestStore(t)
	ctx := t.Context()
	must(s.Create(ctx, api.Services, service("default", "hello", "0")))
	const writers, each = 8, 25
	var wg sync.WaitGroup
	var mu sync.Mutex
	conflicts := 0
	for w := range writers {
		wg.Go(func() {
			for range each {
				for {
					o := must(s.Get(ctx, api.Services, "default", "hello")).(*api.Service)
					n, _ := strconv.Atoi(o.Spec.Template.Spec.Containers[0].Image)
					o.Spec.Template.Spec.Containers[0].Image = strconv.Itoa(n + 1)
					_, err := s.Update(ctx, api.Services, o)
					if err == nil {
						break
					}
					if !errors.Is(err, state.ErrConflict) {
						t.Error(err)
						return
					}
					mu.Lock()
					conflicts++
					mu.Unlock()
				}
				st := service("default", "hello", "")
				st.Status.URL = fmt.Sprint("http://", w)
				if _, err := s.UpdateStatus(ctx, api.Services, st); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	o := must(s.Get(ctx, api.Services, "default", "hello")).(*api.Service)
	if got := o.Spec.Template.Spec.Containers[0].Image; got != strconv.Itoa(writers*each) || o.Generation != writers*each+1 {
		t.Errorf("counter %s, generation %d, want %d and %d", got, o.Generation, writers*each, writers*each+1)
	}
	if conflicts == 0 {
		t.Log("no conflict happened: the test shows little")
	}
}
