package reconcile

import (
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
)

// The time limits of a service's annotations are those of all its hosts and of nothing else; a domain mapping can only make them shorter.
func TestRouteLimits(t *testing.T) {
	inHouse(t, func(h *house) {
		want := func(host string, want api.Timeouts) {
			t.Helper()
			h.p.mu.Lock()
			defer h.p.mu.Unlock()
			if rt := h.p.table.Hosts[host]; rt == nil || rt.Limits != want {
				t.Errorf("%s: %+v, want limits %+v", host, rt, want)
			}
		}
		h.create(service("hello", "one", func(s *api.Service) {
			s.Annotations = map[string]string{api.AnnotationTimeout: "20s", api.AnnotationIdleTimeout: "2s"}
		}))
		h.update("hello", traffic("latest=100#new"))
		route := api.Timeouts{Total: 20 * time.Second, Idle: 2 * time.Second}
		want("hello.default.localhost", route)
		want("new-hello.default.localhost", route)
		for _, a := range []string{api.AnnotationTimeout, api.AnnotationIdleTimeout} {
			if h.config("hello").Annotations[a] != "" || h.revision("hello-00001").Annotations[a] != "" {
				t.Errorf("%s went to where it has no meaning", a)
			}
		}
		m := &api.DomainMapping{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: "www.example.com",
			Annotations: map[string]string{api.AnnotationTimeout: "5s", api.AnnotationIdleTimeout: "9s", api.AnnotationResponseStartTimeout: "1s"}}}
		m.Spec.Ref = api.Reference{APIVersion: api.ServingV1, Kind: "Service", Name: "hello"}
		h.create(m)
		want("www.example.com", api.Timeouts{Total: 5 * time.Second, ResponseStart: time.Second, Idle: 2 * time.Second})
		want("hello.default.localhost", route)
		h.update("hello", func(s *api.Service) { s.Annotations = map[string]string{api.AnnotationTimeout: "1s"} })
		want("hello.default.localhost", api.Timeouts{Total: time.Second})
		want("www.example.com", api.Timeouts{Total: time.Second, ResponseStart: time.Second, Idle: 9 * time.Second})
	})
}
