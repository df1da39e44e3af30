package apiserver

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/state"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const testToken = "0123456789abcdef0123456789abcdef"

// patience is how long a test waits for something that should be there at once.
const patience = 10 * time.Second

// rig is a server on a memory store, behind a real HTTP connection.
type rig struct {
	t      *testing.T
	state  *flakyStore
	store  *objects.Store
	server *Server
	http   *httptest.Server
}

func newRig(t *testing.T, change ...func(*Config)) *rig {
	t.Helper()
	st := &flakyStore{Store: state.Memory()}
	t.Cleanup(func() { st.Store.Close() }) // after the server's
	return (&rig{t: t, state: st, store: objects.New(st, time.Now)}).another(change...)
}

// another is one more server of the same store.
func (r *rig) another(change ...func(*Config)) *rig {
	r.t.Helper()
	r = &rig{t: r.t, state: r.state, store: r.store}
	c := Config{Store: r.store, Token: testToken, StoreTimeout: 2 * time.Second}
	for _, f := range change {
		f(&c)
	}
	var err error
	if r.server, err = New(c); err != nil {
		r.t.Fatal(err)
	}
	r.http = httptest.NewServer(r.server)
	r.t.Cleanup(func() {
		r.server.Close()
		r.http.Close()
	})
	return r
}

// flakyStore is a store that can be made to fail, or to hang until the caller gives up.
type flakyStore struct {
	state.Store
	mu   sync.Mutex
	err  error
	hang bool

	late time.Duration // how much later a write is done

	progress chan int64 // marks of progress that are put into every watch, if not nil
}

// Watch is the store's, with marks of progress put in.
func (s *flakyStore) Watch(ctx context.Context, prefix string, from int64) (<-chan state.Event, func() error) {
	in, failed := s.Store.Watch(ctx, prefix, from)
	if s.progress == nil {
		return in, failed
	}
	out := make(chan state.Event)
	go func() {
		defer close(out)
		for {
			var e state.Event
			var ok bool
			select {
			case e, ok = <-in:
				if !ok {
					return
				}
			case rev := <-s.progress:
				e = state.Event{Progress: true, KV: state.KV{Revision: rev}}
			}
			select {
			case out <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, failed
}

func (s *flakyStore) set(err error, hang bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err, s.hang = err, hang
}

func (s *flakyStore) fault(ctx context.Context) error {
	s.mu.Lock()
	err, hang := s.err, s.hang
	s.mu.Unlock()
	if hang {
		<-ctx.Done()
		return fmt.Errorf("etcd: %w", ctx.Err())
	}
	return err
}

func (s *flakyStore) Get(ctx context.Context, key string) (state.KV, error) {
	if err := s.fault(ctx); err != nil {
		return state.KV{}, err
	}
	return s.Store.Get(ctx, key)
}

func (s *flakyStore) List(ctx context.Context, prefix string) ([]state.KV, int64, error) {
	if err := s.fault(ctx); err != nil {
		return nil, 0, err
	}
	return s.Store.List(ctx, prefix)
}

func (s *flakyStore) Put(ctx context.Context, key string, value []byte, expect int64) (int64, error) {
	if err := s.fault(ctx); err != nil {
		return 0, err
	}
	time.Sleep(s.late)
	return s.Store.Put(ctx, key, value, expect)
}

// answer is what came back.
type answer struct {
	code   int
	header http.Header
	body   []byte
}

// json returns the body as a tree.
func (a answer) json(t *testing.T) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(a.body, &v); err != nil {
		t.Fatalf("answer %d is not a JSON object: %v\n%s", a.code, err, a.body)
	}
	return v
}

// status returns the body as a Status.
func (a answer) status(t *testing.T) status {
	t.Helper()
	var s status
	if err := json.Unmarshal(a.body, &s); err != nil || s.Kind != "Status" {
		t.Fatalf("answer %d is not a Status: %v\n%s", a.code, err, a.body)
	}
	return s
}

// at digs in a tree: at(v, "metadata", "name"). Missing is nil.
func at(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			l, _ := v.([]any)
			if p >= len(l) {
				return nil
			}
			v = l[p]
		}
	}
	return v
}

// request makes a request with the token; header lines are "Key: value".
func (r *rig) request(ctx context.Context, method, path, body string, header ...string) *http.Request {
	r.t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, r.http.URL+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+testToken)
	for _, h := range header {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
		if v == "" {
			req.Header.Del(k)
		}
	}
	return req
}

func (r *rig) do(method, path, body string, header ...string) answer {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := r.http.Client().Do(r.request(ctx, method, path, body, header...))
	if err != nil {
		r.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatalf("%s %s: %v", method, path, err)
	}
	return answer{resp.StatusCode, resp.Header, data}
}

// must is do with a code that has to come.
func (r *rig) must(code int, method, path, body string, header ...string) map[string]any {
	r.t.Helper()
	a := r.do(method, path, body, header...)
	if a.code != code {
		r.t.Fatalf("%s %s: got %d, want %d\n%s", method, path, a.code, code, a.body)
	}
	return a.json(r.t)
}

// refused is do that has to end in a Status with this code and reason; it returns the message.
func (r *rig) refused(code int, reason, method, path, body string, header ...string) status {
	r.t.Helper()
	a := r.do(method, path, body, header...)
	s := a.status(r.t)
	if a.code != code || s.Code != code || s.Reason != reason {
		r.t.Fatalf("%s %s: got %d %s (%s), want %d %s", method, path, a.code, s.Reason, s.Message, code, reason)
	}
	return s
}

// stream is an open watch.
type stream struct {
	t      *testing.T
	events chan map[string]any // closed at the end of the stream
	cancel context.CancelFunc
}

func (r *rig) watch(path string, header ...string) *stream {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	resp, err := r.http.Client().Do(r.request(ctx, "GET", path, "", header...))
	if err != nil {
		cancel()
		r.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		data, _ := io.ReadAll(resp.Body)
		cancel()
		r.t.Fatalf("watch %s: %d %s", path, resp.StatusCode, data)
	}
	s := &stream{t: r.t, events: make(chan map[string]any, 1000), cancel: cancel}
	go func() {
		defer resp.Body.Close()
		defer close(s.events)
		d := json.NewDecoder(resp.Body)
		for {
			var e map[string]any
			if d.Decode(&e) != nil {
				return
			}
			s.events <- e
		}
	}()
	r.t.Cleanup(func() {
		cancel()
		for range s.events {
		}
	})
	return s
}

// next returns the next event.
func (s *stream) next() map[string]any {
	s.t.Helper()
	select {
	case e, ok := <-s.events:
		if !ok {
			s.t.Fatal("the watch ended, an event was expected")
		}
		return e
	case <-time.After(patience):
		s.t.Fatal("no event came")
	}
	return nil
}

// want reads the next event and checks its type and the object's name.
func (s *stream) want(typ, name string) map[string]any {
	s.t.Helper()
	e := s.next()
	if e["type"] != typ || at(e, "object", "metadata", "name") != any(name) {
		s.t.Fatalf("event %v %v, want %s %s", e["type"], at(e, "object", "metadata", "name"), typ, name)
	}
	return e
}

// ended waits for the end of the stream.
func (s *stream) ended() {
	s.t.Helper()
	select {
	case e, ok := <-s.events:
		if ok {
			s.t.Fatalf("event %v, want the end of the watch", e)
		}
	case <-time.After(patience):
		s.t.Fatal("the watch did not end")
	}
}

const services = "/apis/serving.knative.dev/v1/namespaces/default/services"

// service is a minimal Service.
func service(name string, change ...func(map[string]any)) string {
	s := map[string]any{
		"apiVersion": "serving.knative.dev/v1", "kind": "Service",
		"metadata": map[string]any{"name": name},
		"spec": map[string]any{"template": map[string]any{"spec": map[string]any{
			"containers": []any{map[string]any{"image": "dev.local/" + name}}}}},
	}
	for _, f := range change {
		f(s)
	}
	data, _ := json.Marshal(s)
	return string(data)
}

func labels(kv ...string) func(map[string]any) {
	return func(s map[string]any) {
		m := map[string]any{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		s["metadata"].(map[string]any)["labels"] = m
	}
}

// settle does what the reconcilers do, as far as clients can see it: a configuration, a route and a revision for each service,
// and a status that says ready.
func settle(t *testing.T, store *objects.Store) {
	t.Helper()
	ctx := t.Context()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal("settle:", err)
		}
	}
	now := time.Date(2026, 11, 20, 0, 0, 0, 0, time.UTC)
	list, _, err := store.List(ctx, api.Services, "")
	check(err)
	for _, o := range list {
		svc := o.(*api.Service)
		mark := map[string]string{api.LabelService: svc.Name}
		revName := svc.Spec.Template.Name
		if revName == "" {
			revName = api.GenerateName(svc.Name, svc.Generation)
		}
		owned := []api.Object{
			&api.Configuration{ObjectMeta: api.ObjectMeta{Name: svc.Name, Namespace: svc.Namespace, Labels: mark}, Spec: svc.Spec.ConfigurationSpec},
			&api.Route{ObjectMeta: api.ObjectMeta{Name: svc.Name, Namespace: svc.Namespace, Labels: mark}, Spec: svc.Spec.RouteSpec},
			&api.Revision{ObjectMeta: api.ObjectMeta{Name: revName, Namespace: svc.Namespace, Labels: map[string]string{
				api.LabelService: svc.Name, api.LabelConfiguration: svc.Name, api.LabelConfigurationGeneration: fmt.Sprint(svc.Generation)}},
				Spec: svc.Spec.Template.Spec},
		}
		one := int32(1)
		for _, o := range owned {
			k := api.KindOf(o)
			stored, err := store.Create(ctx, k, o)
			if err != nil {
				stored, err = store.Get(ctx, k, svc.Namespace, o.Meta().Name)
				check(err)
			}
			api.StatusOf(stored).ObservedGeneration = stored.Meta().Generation
			api.StatusOf(stored).Conditions.Set(now, api.ConditionReady, api.True, "", "")
			switch v := stored.(type) {
			case *api.Route:
				v.Status.URL = "http://" + svc.Name + ".default.localhost"
			case *api.Revision:
				v.Status.ActualReplicas, v.Status.DesiredReplicas = &one, &one
			case *api.Configuration:
				v.Status.LatestCreatedRevisionName, v.Status.LatestReadyRevisionName = revName, revName
			}
			_, err = store.UpdateStatus(ctx, k, stored)
			check(err)
		}
		svc.Status.ObservedGeneration = svc.Generation
		svc.Status.URL = "http://" + svc.Name + ".default.localhost"
		svc.Status.LatestCreatedRevisionName, svc.Status.LatestReadyRevisionName = revName, revName
		svc.Status.Traffic = []api.TrafficTarget{{RevisionName: revName}}
		for _, c := range []string{api.ConditionConfigurationsReady, api.ConditionRoutesReady, api.ConditionReady} {
			svc.Status.Conditions.Set(now, c, api.True, "", "")
		}
		_, err := store.UpdateStatus(ctx, api.Services, svc)
		check(err)
	}
	mappings, _, err := store.List(ctx, api.DomainMappings, "")
	check(err)
	for _, o := range mappings {
		dm := o.(*api.DomainMapping)
		dm.Status.URL = "http://" + dm.Name
		dm.Status.ObservedGeneration = dm.Generation
		dm.Status.Conditions.Set(now, api.ConditionReady, api.True, "", "")
		_, err := store.UpdateStatus(ctx, api.DomainMappings, dm)
		check(err)
	}
}

// touch changes an object's status, as a reconciler does.
func touch(t *testing.T, store *objects.Store, k *api.Kind, name, message string) {
	t.Helper()
	o, err := store.Get(t.Context(), k, "default", name)
	if err != nil {
		t.Fatal(err)
	}
	api.StatusOf(o).Conditions.Set(time.Now(), api.ConditionReady, api.True, "", message)
	if _, err := store.UpdateStatus(t.Context(), k, o); err != nil {
		t.Fatal(err)
	}
}
