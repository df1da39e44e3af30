package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
)

// serve starts a stand-in for the API that answers by f, and returns a client of it.
func serve(t *testing.T, f http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	c, err := New(Config{Server: srv.URL, Token: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.CloseIdle)
	return c
}

func TestDiscover(t *testing.T) {
	home, data := t.TempDir(), t.TempDir()
	must(t, os.Mkdir(filepath.Join(home, ".thaw"), 0o700))
	must(t, os.WriteFile(filepath.Join(home, ".thaw", "token"), []byte("of-home\n"), 0o600))
	must(t, os.WriteFile(filepath.Join(data, "token"), []byte("of-data"), 0o600))
	for name, c := range map[string]struct {
		api, data     string
		env           map[string]string
		server, token string
	}{
		"nothing said":           {env: map[string]string{}, server: DefaultServer, token: "of-home"},
		"environment":            {env: map[string]string{"THAW_API": "http://a:1", "THAW_TOKEN": "t"}, server: "http://a:1", token: "t"},
		"flag before env":        {api: "http://b:2", env: map[string]string{"THAW_API": "http://a:1"}, server: "http://b:2", token: "of-home"},
		"data directory":         {data: data, env: map[string]string{}, server: DefaultServer, token: "of-data"},
		"data directory by env":  {env: map[string]string{"THAW_DATA": data}, server: DefaultServer, token: "of-data"},
		"no token file":          {data: filepath.Join(data, "none"), env: map[string]string{}, server: DefaultServer},
		"token before directory": {data: data, env: map[string]string{"THAW_TOKEN": "t"}, server: DefaultServer, token: "t"},
	} {
		t.Run(name, func(t *testing.T) {
			c.env["HOME"] = home
			got, err := Discover(c.api, c.data, func(k string) string { return c.env[k] })
			if err != nil || got.Server != c.server || got.Token != c.token {
				t.Errorf("got %q with token %q (%v), want %q with %q", got.Server, got.Token, err, c.server, c.token)
			}
		})
	}
	bad := t.TempDir()
	must(t, os.Mkdir(filepath.Join(bad, "token"), 0o700))
	if _, err := Discover("", bad, func(string) string { return "" }); err == nil {
		t.Error("a token file that cannot be read is passed over in silence")
	}
}

func TestNewRefusesAddresses(t *testing.T) {
	for _, server := range []string{"ftp://x", "http://", "http://[::1", "unix:///x"} {
		if _, err := New(Config{Server: server}); err == nil {
			t.Errorf("%q is accepted", server)
		}
	}
	c, err := New(Config{Server: "http://thaw:tok%2Fen@host:1/"})
	if err != nil || c.Token() != "tok/en" || c.Server() != "http://host:1" {
		t.Errorf("credentials in the address: token %q server %q (%v)", c.Token(), c.Server(), err)
	}
}

func TestRequestsAreAsTheAPIWantsThem(t *testing.T) {
	var got []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = append(got, fmt.Sprintf("%s %s %s %s", r.Method, r.URL.RequestURI(), r.Header.Get("Content-Type"), body))
		if r.Header.Get("Authorization") != "Bearer secret" {
			t.Error("no token")
		}
		if r.Method == "POST" {
			w.WriteHeader(201)
		}
		fmt.Fprint(w, `{"kind":"Service","metadata":{"name":"x"},"items":[{"metadata":{"name":"x"}}]}`)
	})
	ctx := context.Background()
	svc := &api.Service{ObjectMeta: api.ObjectMeta{Name: "x", Namespace: "ns"}}
	_, err := c.Get(ctx, api.Services, "ns", "x")
	must(t, err)
	_, err = c.Get(ctx, api.Services, "../..", "a/b?c")
	must(t, err)
	_, _, err = c.List(ctx, api.Revisions, "", ListOptions{LabelSelector: "a=b,c"})
	must(t, err)
	_, err = c.Create(ctx, api.Services, svc)
	must(t, err)
	_, err = c.Patch(ctx, api.Services, "ns", "x", MergePatch, []byte(`{}`))
	must(t, err)
	_, _, err = c.Apply(ctx, api.DomainMappings, "ns", "x.example", []byte(`{"a":1}`))
	must(t, err)
	must(t, c.Delete(ctx, api.Services, "ns", "x"))
	want := []string{
		"GET /apis/serving.knative.dev/v1/namespaces/ns/services/x  ",
		"GET /apis/serving.knative.dev/v1/namespaces/..%2F../services/a%2Fb%3Fc  ",
		"GET /apis/serving.knative.dev/v1/revisions?labelSelector=a%3Db%2Cc  ",
		`POST /apis/serving.knative.dev/v1/namespaces/ns/services?fieldManager=thaw application/json {"kind":"Service","apiVersion":"serving.knative.dev/v1","metadata":{"name":"x","namespace":"ns"}}`,
		"PATCH /apis/serving.knative.dev/v1/namespaces/ns/services/x?fieldManager=thaw application/merge-patch+json {}",
		"GET /apis/serving.knative.dev/v1beta1/namespaces/ns/domainmappings/x.example  ",
		`PATCH /apis/serving.knative.dev/v1beta1/namespaces/ns/domainmappings/x.example?fieldManager=thaw&force=true application/apply-patch+yaml {"a":1}`,
		"DELETE /apis/serving.knative.dev/v1/namespaces/ns/services/x  ",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestErrors(t *testing.T) {
	status := `{"kind":"Status","message":"it says so","reason":%q,"code":%d,"details":{"name":"x","causes":[{"field":"spec.a","message":"m"}]}}`
	for _, c := range []struct {
		code int
		body string
		is   error
		text string
	}{
		{404, fmt.Sprintf(status, "NotFound", 404), ErrNotFound, "it says so"},
		{409, fmt.Sprintf(status, "AlreadyExists", 409), ErrAlreadyExists, "it says so"},
		{409, fmt.Sprintf(status, "Conflict", 409), ErrConflict, "it says so"},
		{422, fmt.Sprintf(status, "Invalid", 422), ErrInvalid, "it says so"},
		{401, fmt.Sprintf(status, "Unauthorized", 401), ErrUnauthorized, "it says so"},
		{410, fmt.Sprintf(status, "Expired", 410), ErrExpired, "it says so"},
		{429, fmt.Sprintf(status, "TooManyRequests", 429), ErrUnavailable, "it says so"},
		{502, "<html>\n  bad gateway</html>", nil, "GET /apis/serving.knative.dev/v1/namespaces/ns/services/x: 502 Bad Gateway: <html> bad gateway</html>"},
		{500, "", nil, "GET /apis/serving.knative.dev/v1/namespaces/ns/services/x: 500 Internal Server Error"},
		{500, strings.Repeat("x", 5000), nil, "xxx…"},
	} {
		client := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(c.code)
			fmt.Fprint(w, c.body)
		})
		_, err := client.Get(context.Background(), api.Services, "ns", "x")
		var se *StatusError
		if !errors.As(err, &se) || se.Code != c.code || se.RetryAfter != 7*time.Second || !strings.HasSuffix(err.Error(), c.text) {
			t.Errorf("%d: %v", c.code, err)
		}
		for _, sentinel := range []error{ErrNotFound, ErrAlreadyExists, ErrConflict, ErrInvalid, ErrUnauthorized, ErrExpired, ErrUnavailable} {
			if errors.Is(err, sentinel) != (sentinel == c.is) {
				t.Errorf("%d %q: is %v: %v", c.code, se.Reason, sentinel, errors.Is(err, sentinel))
			}
		}
	}
}

func TestUnreachable(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	addr := ln.Addr().String()
	ln.Close()
	c, err := New(Config{Server: "http://" + addr})
	must(t, err)
	_, err = c.Get(context.Background(), api.Services, "ns", "x")
	var u *UnreachableError
	if !errors.As(err, &u) || !strings.HasPrefix(err.Error(), "cannot reach the API at http://"+addr+": dial tcp") {
		t.Errorf("got %v", err)
	}
}

func TestTimeoutAndCancelAreToldApart(t *testing.T) {
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	c.timeout = 20 * time.Millisecond
	_, err := c.Get(context.Background(), api.Services, "ns", "x")
	var u *UnreachableError
	if !errors.As(err, &u) || !strings.Contains(err.Error(), "no answer within 20ms") {
		t.Errorf("a server that does not answer: %v", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("signal"))
	if _, err := c.Get(ctx, api.Services, "ns", "x"); !errors.Is(err, context.Canceled) || errors.As(err, &u) {
		t.Errorf("a caller that gave up: %v", err)
	}
}

func TestWarnings(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Add("Warning", `299 - "spec.x has no \"effect\" yet"`)
		w.Header().Add("Warning", `299 - "two", 199 agent "three" "Wed, 21 Oct 2015 07:28:00 GMT"`)
		fmt.Fprint(w, `{}`)
	})
	var got []string
	c.warn = func(s string) { got = append(got, s) }
	_, err := c.Get(context.Background(), api.Services, "ns", "x")
	must(t, err)
	if want := []string{`spec.x has no "effect" yet`, "two", "three"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestWatch(t *testing.T) {
	var query string
	stream := ""
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		query = r.URL.RawQuery
		fmt.Fprint(w, stream)
	})
	collect := func() (events []string, last error) {
		for ev, err := range c.Watch(context.Background(), api.Services, "ns", WatchOptions{ResourceVersion: "5", Timeout: 3 * time.Second, Bookmarks: true}) {
			if err != nil {
				return events, err
			}
			events = append(events, ev.Type+" "+ev.Object.Meta().Name)
		}
		return events, nil
	}
	stream = `{"type":"ADDED","object":{"metadata":{"name":"a"}}}` + "\n" + `{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9"}}}`
	events, err := collect()
	if !slices.Equal(events, []string{"ADDED a", "BOOKMARK "}) || err != nil {
		t.Errorf("got %q, %v", events, err)
	}
	if query != "allowWatchBookmarks=true&resourceVersion=5&timeoutSeconds=3&watch=true" {
		t.Errorf("query %q", query)
	}
	stream = `{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired","message":"too old"}}`
	if _, err := collect(); !errors.Is(err, ErrExpired) {
		t.Errorf("an expired watch: %v", err)
	}
	stream = `{"type":"ADDED","object":{"meta`
	if _, err := collect(); err == nil {
		t.Error("a stream that breaks off ends like one that is complete")
	}
}

// script answers GETs of one service with states from a list, and watches with the rest of them.
type script struct {
	states []string // JSON of objects, in order
	gets   int
}

func object(generation, observed int, status, reason string) string {
	o := &api.Service{ObjectMeta: api.ObjectMeta{Name: "x", Namespace: "ns", UID: "u", ResourceVersion: "1", Generation: int64(generation)}}
	o.Status.ObservedGeneration = int64(observed)
	o.Status.Conditions = api.Conditions{{Type: "Ready", Status: status, Reason: reason}}
	b, _ := json.Marshal(o)
	return string(b)
}

func (s *script) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("watch") == "" {
		s.gets++
		fmt.Fprint(w, s.states[0])
		return
	}
	for _, state := range s.states[1:] {
		fmt.Fprintf(w, `{"type":"MODIFIED","object":%s}`+"\n", state)
	}
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

func TestWaitReady(t *testing.T) {
	for name, c := range map[string]struct {
		states []string
		err    string // "" = ready
	}{
		"ready at once":           {states: []string{object(1, 1, "True", "")}},
		"ready later":             {states: []string{object(1, 0, "", ""), object(1, 1, "Unknown", "Deploying"), object(1, 1, "True", "")}},
		"ready of an older spec":  {states: []string{object(2, 1, "True", ""), object(2, 2, "Unknown", "Deploying")}, err: `service "x" is not ready yet: Deploying`},
		"failed":                  {states: []string{object(1, 1, "Unknown", ""), object(1, 1, "False", "RevisionFailed")}, err: `service "x" failed: RevisionFailed`},
		"failed for a moment":     {states: []string{object(1, 1, "False", "RevisionMissing"), object(1, 1, "Unknown", ""), object(1, 1, "True", "")}},
		"failure of an older one": {states: []string{object(2, 1, "False", "RevisionFailed"), object(2, 2, "True", "")}},
	} {
		t.Run(name, func(t *testing.T) {
			client := serve(t, (&script{states: c.states}).ServeHTTP)
			var seen []string
			o, err := client.WaitReady(context.Background(), api.Services, "ns", "x", WaitOptions{
				Timeout: 2 * time.Second, Settle: 500 * time.Millisecond, // one waits for each of them; the others must not meet them on a busy machine
				Progress: func(c api.Condition) { seen = append(seen, c.Status) },
			})
			if c.err == "" {
				if err != nil || Readiness(o).Status != api.True {
					t.Errorf("got %v after %q", err, seen)
				}
				return
			}
			var n *NotReadyError
			if !errors.As(err, &n) || err.Error() != c.err {
				t.Errorf("got %v, want %s (seen %q)", err, c.err, seen)
			}
		})
	}
}

// A server that says when to ask again is asked again; one that only says no is not.
func TestNotNow(t *testing.T) {
	for after, tries := range map[string]int{"1": 2, "": 1} {
		asked := 0
		client := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if asked++; asked == 1 {
				w.Header().Set("Retry-After", after)
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			fmt.Fprint(w, object(1, 1, "True", ""))
		})
		for what, f := range map[string]func() error{
			"WaitReady": func() error {
				_, err := client.WaitReady(t.Context(), api.Services, "ns", "x", WaitOptions{Timeout: 10 * time.Second})
				return err
			},
			"Patiently": func() error {
				return Patiently(t.Context(), func() error { _, err := client.Get(t.Context(), api.Services, "ns", "x"); return err })
			},
		} {
			asked = 0
			if err := f(); asked != tries || (err == nil) != (tries == 2) {
				t.Errorf("%s: after %q it was asked %d times: %v", what, after, asked, err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := Patiently(ctx, func() error { return &StatusError{Code: 503, RetryAfter: time.Hour} }); !errors.Is(err, ErrUnavailable) {
			t.Errorf("got %v", err)
		}
	}
}

func TestWaitReadyGivesUpWithItsCaller(t *testing.T) {
	client := serve(t, (&script{states: []string{object(1, 1, "Unknown", "")}}).ServeHTTP)
	ctx, cancel := context.WithCancel(context.Background())
	_, err := client.WaitReady(ctx, api.Services, "ns", "x", WaitOptions{Progress: func(api.Condition) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestWaitReadyOfDeleted(t *testing.T) {
	client := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") == "" {
			fmt.Fprint(w, object(1, 1, "Unknown", ""))
			return
		}
		fmt.Fprintf(w, `{"type":"DELETED","object":%s}`, object(1, 1, "Unknown", ""))
	})
	if _, err := client.WaitReady(context.Background(), api.Services, "ns", "x", WaitOptions{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

func TestLogsAndUploadAndScale(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/apis/thaw.run/v1alpha1/namespaces/ns/logs":
			if got := r.URL.RawQuery; got != "follow=true&instance=i&service=s&tail=3" {
				t.Errorf("query %q", got)
			}
			fmt.Fprintln(w, `{"time":"2026-01-02T03:04:05.5Z","instance":"i","revision":"s-1","stream":"stderr","text":"oh"}`)
			fmt.Fprint(w, `{"text":"broken`)
		case "/apis/thaw.run/v1alpha1/packages":
			body, _ := io.ReadAll(r.Body)
			if r.ContentLength != 3 || string(body) != "abc" || r.Header.Get("Content-Type") != "application/gzip" {
				t.Errorf("upload of %d bytes: %q", r.ContentLength, body)
			}
			fmt.Fprint(w, `{"image":"pkg://sha256:00"}`)
		case "/apis/thaw.run/v1alpha1/namespaces/ns/revisions/s-1/scale":
			fmt.Fprint(w, `{"desired":2,"mode":"Serve"}`)
		}
	})
	var lines []LogLine
	var last error
	for line, err := range c.Logs(context.Background(), "ns", LogOptions{Service: "s", Instance: "i", Tail: 3, Follow: true}) {
		if err != nil {
			last = err
			break
		}
		lines = append(lines, line)
	}
	if len(lines) != 1 || lines[0].Text != "oh" || lines[0].Stream != "stderr" || last == nil {
		t.Errorf("lines %+v, then %v", lines, last)
	}
	file := filepath.Join(t.TempDir(), "p")
	must(t, os.WriteFile(file, []byte("abc"), 0o600))
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	if image, err := c.Upload(context.Background(), f); err != nil || image != "pkg://sha256:00" {
		t.Errorf("image %q, %v", image, err)
	}
	if s, err := c.Scale(context.Background(), "ns", "s-1"); err != nil || s["mode"] != "Serve" || s["desired"] != 2.0 {
		t.Errorf("scale %v, %v", s, err)
	}
}

func FuzzParseWarnings(f *testing.F) {
	f.Add(`299 - "a", 199 b "c" "d"`)
	f.Add(`299 - "a\`)
	f.Add(`, 1 2 "`)
	f.Fuzz(func(t *testing.T, header string) {
		total := 0
		for _, s := range ParseWarnings(header) {
			total += len(s)
		}
		if total > len(header) {
			t.Errorf("more text than there was")
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
