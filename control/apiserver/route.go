package apiserver

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
)

// target is the resource that a path names.
type target struct {
	kind      *api.Kind
	namespace string // "" = all
	name      string // "" = the collection
	sub       string // subresource
}

// segments splits a path into its decoded parts. What would not stay one part of a store's key is refused: a slash
// inside a part, dots, control characters.
func segments(u *url.URL) ([]string, error) {
	path := strings.Trim(u.EscapedPath(), "/")
	if path == "" {
		return nil, nil
	}
	parts := strings.Split(path, "/")
	if len(parts) > 12 {
		return nil, noSuchPath()
	}
	for i, p := range parts {
		d, err := url.PathUnescape(p)
		if err != nil || d == "" || d == "." || d == ".." || strings.ContainsFunc(d, func(r rune) bool { return r < ' ' || r == '/' || r == 0x7f || r == 0xfffd }) {
			return nil, badRequest("the path %q has a part that cannot be a name", clip(printable(u.Path), 300))
		}
		parts[i] = d
	}
	return parts, nil
}

// parseTarget reads what follows /apis/GROUP/VERSION/: [namespaces/NS/]RESOURCE[/NAME[/SUB]].
func (s *Server) parseTarget(groupVersion string, parts []string) (target, error) {
	var t target
	if len(parts) >= 3 && parts[0] == "namespaces" {
		t.namespace, parts = parts[1], parts[2:]
	} else if len(parts) > 1 {
		return t, noSuchPath() // one object of a namespaced kind needs its namespace
	}
	k, ok := s.resources[groupVersion+"/"+parts[0]]
	if !ok || len(parts) > 3 {
		return t, noSuchPath()
	}
	t.kind = k
	if len(parts) > 1 {
		t.name = parts[1]
	}
	if len(parts) > 2 {
		t.sub = parts[2]
	}
	return t, nil
}

// serve finds what a path names and does it. It returns what went wrong before anything was written.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) error {
	parts, err := segments(r.URL)
	if err != nil {
		return err
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return badRequest("the query cannot be read: %v", err)
	}
	if isWatch(r, query) {
		if !s.watches.enter() {
			return tooMany("open watches")
		}
		defer s.watches.leave()
	} else {
		if !s.inFlight.enter() {
			return tooMany("requests")
		}
		defer s.inFlight.leave()
		rc := http.NewResponseController(w)
		if rc.SetWriteDeadline(time.Now().Add(bodyTimeout+s.storeWait+writeTimeout)) == nil {
			defer rc.SetWriteDeadline(time.Time{})
		}
	}
	first := ""
	if len(parts) > 0 {
		first = parts[0]
	}
	switch {
	case first == "metrics" && len(parts) == 1 && s.metrics != nil:
		s.metrics.ServeHTTP(w, r)
		return nil
	case first == "apis" && len(parts) > 3:
		t, err := s.parseTarget(parts[1]+"/"+parts[2], parts[3:])
		if err != nil {
			return err
		}
		return s.resource(w, r, t, query)
	case first == "api" && len(parts) > 2 && parts[1] == "v1":
		return s.core(w, r, parts[2:], query)
	}
	return s.document(w, r, parts)
}

// isWatch says that the answer is a stream.
func isWatch(r *http.Request, query url.Values) bool {
	return r.Method == http.MethodGet && isTrue(query.Get("watch"))
}

// resource does one operation on objects.
func (s *Server) resource(w http.ResponseWriter, r *http.Request, t target, query url.Values) error {
	if t.sub != "" {
		return s.subresource(w, r, t)
	}
	if isWatch(r, query) && t.name == "" {
		return s.watch(w, r, t, query)
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.patience(query))
	defer cancel()
	if t.name != "" {
		switch r.Method {
		case http.MethodGet:
			return s.get(ctx, w, r, t)
		case http.MethodPut:
			return s.replace(ctx, w, r, t, query)
		case http.MethodPatch:
			return s.patch(ctx, w, r, t, query)
		case http.MethodDelete:
			return s.delete(ctx, w, r, t, query)
		}
		return methodNotAllowed(w, "GET", "PUT", "PATCH", "DELETE")
	}
	switch {
	case r.Method == http.MethodGet:
		return s.list(ctx, w, r, t, query)
	case r.Method == http.MethodPost && t.namespace != "":
		return s.create(ctx, w, r, t, query)
	case r.Method == http.MethodDelete && t.namespace != "":
		return s.deleteCollection(ctx, w, r, t, query)
	case t.namespace == "":
		return methodNotAllowed(w, "GET")
	}
	return methodNotAllowed(w, "GET", "POST", "DELETE")
}

// patience is how long a request may wait for the store: the query's timeout may shorten it.
func (s *Server) patience(query url.Values) time.Duration {
	if d, err := time.ParseDuration(query.Get("timeout")); err == nil && d > 0 && d < s.storeWait {
		return d
	}
	return s.storeWait
}

// subresource answers /status, which clients may read. It is written by the reconcilers alone; there is no other one.
func (s *Server) subresource(w http.ResponseWriter, r *http.Request, t target) error {
	if t.sub != "status" {
		return noSuchPath()
	}
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", "GET")
		return fail(http.StatusMethodNotAllowed, reasonMethodNotAllowed, "the status of %s %q is written by the server only", resourceName(t.kind), t.name).about(t.kind, t.name)
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.storeWait)
	defer cancel()
	return s.get(ctx, w, r, t)
}
