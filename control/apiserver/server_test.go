package apiserver

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/state"
)

func TestAuthentication(t *testing.T) {
	r := newRig(t)
	basic := func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }
	for header, want := range map[string]int{
		"Bearer " + testToken:      200,
		"bearer  " + testToken:     200,
		basic("thaw:" + testToken): 200,
		strings.ToLower(basic("")[:6]) + basic("thaw:" + testToken)[6:]: 200,
		"":                                     401,
		"Bearer":                               401,
		"Bearer ":                              401,
		"Bearer " + testToken + "x":            401,
		"Bearer " + testToken[1:]:              401,
		"Bearer " + strings.ToUpper(testToken): 401,
		testToken:                              401,
		basic("root:" + testToken):             401,
		basic("thaw:"):                         401,
		basic("thaw"):                          401,
		basic("thaw:" + testToken + ":"):       401,
		"Basic !!!":                            401,
		"Digest " + testToken:                  401,
	} {
		for _, path := range []string{services, "/apis", "/openapi/v3", "/version", "/metrics", "/nothing", "/"} {
			a := r.do("GET", path, "", "Authorization: "+header)
			if want == 401 {
				s := a.status(t)
				if a.code != 401 || s.Reason != reasonUnauthorized || s.Code != 401 {
					t.Errorf("%q %s: %d %s", header, path, a.code, a.body)
				}
				if w := strings.Join(a.header.Values("WWW-Authenticate"), ", "); !strings.Contains(w, "Basic realm=") || !strings.Contains(w, "Bearer realm=") {
					t.Errorf("WWW-Authenticate %q", w)
				}
			} else if a.code == 401 {
				t.Errorf("%q %s: 401", header, path)
			}
		}
	}
	for _, path := range []string{"/healthz", "/livez", "/readyz", "/readyz/"} {
		if a := r.do("GET", path, "", "Authorization: "); a.code != 200 || string(a.body) != "ok\n" {
			t.Errorf("%s: %d %s", path, a.code, a.body)
		}
	}
	r.refused(405, reasonMethodNotAllowed, "POST", "/healthz", "")
	// A page of another origin may not use the password that the browser remembers.
	r.refused(403, reasonForbidden, "POST", services, service("x"), "Sec-Fetch-Site: cross-site")
	r.refused(403, reasonForbidden, "POST", services, service("x"), "Origin: http://evil.example")
	r.must(201, "POST", services, service("x"), "Sec-Fetch-Site: same-origin")
}

func TestToken(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "token")
	var wg sync.WaitGroup
	tokens := make([]string, 8)
	for i := range tokens {
		wg.Go(func() {
			var err error
			if tokens[i], err = LoadOrCreateToken(path); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, tok := range tokens {
		if tok != tokens[0] || len(tok) != 64 {
			t.Fatalf("tokens %q", tokens)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 1 {
		t.Errorf("left behind: %v", files)
	}
	if other, err := LoadOrCreateToken(filepath.Join(t.TempDir(), "token")); err != nil || other == tokens[0] {
		t.Errorf("another token: %q, %v", other, err)
	}
	for content, want := range map[string]string{
		"":                                 "0 characters",
		"short\n":                          "5 characters",
		"0123456789abcdef 0123456789":      "cannot stand in a header",
		"0123456789abcdef0123456789\u00fc": "cannot stand in a header",
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadOrCreateToken(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", content, err)
		}
	}
	os.WriteFile(path, []byte(tokens[0]), 0o600)
	os.Chmod(path, 0o644)
	if _, err := LoadOrCreateToken(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a file that others can read: %v", err)
	}
	if _, err := LoadOrCreateToken(filepath.Join(dir, "none", "token")); err == nil || !strings.HasPrefix(err.Error(), "create API token: ") {
		t.Errorf("no folder: %v", err)
	}
}

func TestCheckListen(t *testing.T) {
	for addr, ok := range map[string]bool{
		"127.0.0.1:8081": true, "127.9.9.9:1": true, "[::1]:8081": true, "localhost:8081": true, "127.0.0.1:0": true,
		":8081": false, "0.0.0.0:8081": false, "[::]:8081": false, "192.168.1.5:8081": false, "example.com:80": false,
	} {
		err := CheckListen(addr, false)
		if (err == nil) != ok || err != nil && !(strings.Contains(err.Error(), "can be reached from other machines") && strings.Contains(err.Error(), "--allow-remote")) {
			t.Errorf("%s: %v", addr, err)
		}
		if err := CheckListen(addr, true); err != nil {
			t.Errorf("%s with the override: %v", addr, err)
		}
	}
	for _, addr := range []string{"", "127.0.0.1", "127.0.0.1:http!", "127.0.0.1:99999", "::1:80"} {
		if err := CheckListen(addr, true); err == nil {
			t.Errorf("%q is taken", addr)
		}
	}
}

// TestStoreDown: while etcd is away everything is refused with a clear error within the bound, and all is well afterwards.
func TestStoreDown(t *testing.T) {
	r := newRig(t)
	// So little is too little for a store that is well, on a busy machine.
	hasty := r.another(func(c *Config) { c.StoreTimeout = 60 * time.Millisecond })
	r.must(201, "POST", services, service("hello"))
	requests := func(r *rig) {
		t.Helper()
		for _, q := range []struct{ method, path, body string }{
			{"GET", services, ""}, {"GET", services + "/hello", ""}, {"POST", services, service("b")}, {"PUT", services + "/hello", service("hello")},
			{"DELETE", services, ""}, {"GET", services + "?watch=true", ""}, {"GET", "/api/v1/namespaces", ""}, {"GET", "/api/v1/events", ""},
			{"POST", services + "?dryRun=All", service("b")},
		} {
			start := time.Now()
			s := r.refused(503, reasonUnavailable, q.method, q.path, q.body)
			if d := time.Since(start); d > 2*time.Second {
				t.Errorf("%s %s took %v", q.method, q.path, d)
			}
			if !strings.Contains(s.Message, "the state store does not answer") || s.Details.RetryAfterSeconds != 1 {
				t.Errorf("%s %s: %+v", q.method, q.path, s)
			}
		}
		if a := r.do("GET", "/readyz", "", "Authorization: "); a.code != 503 || !strings.HasPrefix(string(a.body), "not ready: ") {
			t.Errorf("readyz %d %s", a.code, a.body)
		}
		if a := r.do("GET", "/livez", "", "Authorization: "); a.code != 200 {
			t.Errorf("livez %d: this process is alive, and a restart would not help", a.code)
		}
		r.must(200, "GET", "/apis", "")
	}
	r.state.set(nil, true)
	requests(hasty)
	r.state.set(errors.New("etcdserver: no leader"), false)
	requests(hasty)
	requests(r)
	r.state.set(nil, false)
	r.must(200, "GET", services+"/hello", "")
	r.must(201, "POST", services, service("b"))
	for end := time.Now().Add(patience); hasty.do("GET", services+"/hello", "").code != 200; {
		if time.Now().After(end) {
			t.Fatal("the server that has waited for the store in vain does not answer again")
		}
	}
	// The client may ask for less patience, not for more.
	for query, want := range map[string]time.Duration{"": 60 * time.Millisecond, "timeout=20ms": 20 * time.Millisecond, "timeout=32s": 60 * time.Millisecond, "timeout=x": 60 * time.Millisecond, "timeout=-1s": 60 * time.Millisecond} {
		q, _ := url.ParseQuery(query)
		if got := hasty.server.patience(q); got != want {
			t.Errorf("%q: patience of %v, want %v", query, got, want)
		}
	}
}

// TestCorruptObject: what is in the store under an object's key and is none is a fault of the server, said as such.
func TestCorruptObject(t *testing.T) {
	r := newRig(t)
	if _, err := r.state.Put(t.Context(), "/thaw/objects/serving.knative.dev/services/default/bad", []byte("{"), state.Any); err != nil {
		t.Fatal(err)
	}
	r.refused(500, reasonInternalError, "GET", services+"/bad", "")
}

func TestLimits(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxInFlight = 1; c.StoreTimeout = patience })
	r.state.set(nil, true)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp, err := r.http.Client().Do(r.request(ctx, "GET", services, "")); err == nil {
			resp.Body.Close()
		}
	}()
	deadline := time.Now().Add(patience)
	for r.server.inFlight.n.Load() != 1 {
		if time.Now().After(deadline) {
			t.Fatal("the request did not arrive")
		}
		time.Sleep(time.Millisecond)
	}
	a := r.do("GET", services, "")
	if s := a.status(t); a.code != 429 || s.Reason != reasonTooManyRequests || a.header.Get("Retry-After") != "1" {
		t.Errorf("%d %s", a.code, a.body)
	}
	if a := r.do("GET", "/healthz", ""); a.code != 200 {
		t.Errorf("healthz %d", a.code)
	}
	cancel()
	<-done
	r.state.set(nil, false)
	for r.server.inFlight.n.Load() != 0 {
		if time.Now().After(deadline) {
			t.Fatal("the place of a client that left is not free")
		}
		time.Sleep(time.Millisecond)
	}
	r.must(200, "GET", services, "")
}

func TestExtraAndMetrics(t *testing.T) {
	say := func(s string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, s+" "+r.URL.Path) })
	}
	r := newRig(t, func(c *Config) {
		c.Metrics = say("metrics")
		c.Extra = map[string]http.Handler{"/apis/thaw.run/v1alpha1/": say("thaw"), "/apis/thaw.run/v1alpha1/packages": say("packages"),
			"/panic": http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("oh") })}
	})
	for path, want := range map[string]string{
		"/metrics":                            "metrics /metrics",
		"/apis/thaw.run/v1alpha1":             "thaw /apis/thaw.run/v1alpha1",
		"/apis/thaw.run/v1alpha1/logs/a":      "thaw /apis/thaw.run/v1alpha1/logs/a",
		"/apis/thaw.run/v1alpha1/packages/aa": "packages /apis/thaw.run/v1alpha1/packages/aa",
	} {
		if a := r.do("GET", path, ""); a.code != 200 || string(a.body) != want {
			t.Errorf("%s: %d %s", path, a.code, a.body)
		}
		if a := r.do("GET", path, "", "Authorization: "); a.code != 401 {
			t.Errorf("%s without the token: %d", path, a.code)
		}
	}
	r.refused(404, reasonNotFound, "GET", "/apis/thaw.run/v1alpha1x", "")
	r.refused(500, reasonInternalError, "GET", "/panic", "")
	for _, extra := range []map[string]http.Handler{{"x": say("")}, {"/x": nil}, {"/": say("")}} {
		if _, err := New(Config{Store: r.store, Token: testToken, Extra: extra}); err == nil {
			t.Errorf("extra %v is taken", extra)
		}
	}
	if _, err := New(Config{Token: testToken}); err == nil {
		t.Error("no store is taken")
	}
	if _, err := New(Config{Store: r.store}); err == nil {
		t.Error("no token is taken")
	}
}

func TestServe(t *testing.T) {
	st := state.Memory()
	defer st.Close()
	following := make(chan struct{})
	s, err := New(Config{Store: objects.New(st, time.Now), Token: testToken, Extra: map[string]http.Handler{
		"/follow": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(200)
			http.NewResponseController(w).Flush()
			close(following)
			<-r.Context().Done()
		})}})
	if err != nil {
		t.Fatal(err)
	}
	s.grace = 400 * time.Millisecond
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	get := func(path string) (*http.Response, error) {
		req, _ := http.NewRequest("GET", "http://"+ln.Addr().String()+path, nil)
		req.Header.Set("Authorization", "Bearer "+testToken)
		return http.DefaultTransport.RoundTrip(req)
	}
	watch, err := get(services + "?watch=true")
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Body.Close()
	follow, err := get("/follow")
	if err != nil {
		t.Fatal(err)
	}
	defer follow.Body.Close()
	<-following
	cancel()
	if rest, err := io.ReadAll(watch.Body); err != nil || len(rest) != 0 {
		t.Errorf("the watch ended with %q, %v: want a clean end", rest, err)
	}
	select {
	case err := <-served:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("Serve did not return")
	}
	if _, err := get("/healthz"); err == nil {
		t.Error("still serving")
	}
	// A listener that is broken is an error, not silence.
	ln, _ = net.Listen("tcp", "127.0.0.1:0")
	ln.Close()
	if err := s.Serve(t.Context(), ln); err == nil {
		t.Error("a closed listener is served")
	}
}

// TestSlowAndHugeHeaders: the bounds of the HTTP server itself.
func TestHugeHeaders(t *testing.T) {
	st := state.Memory()
	defer st.Close()
	s, err := New(Config{Store: objects.New(st, time.Now), Token: testToken})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	defer func() { cancel(); <-served }()
	for size, want := range map[int]int{1000: 200, maxHeaderBytes + 8192: 431} {
		req, _ := http.NewRequest("GET", "http://"+ln.Addr().String()+"/healthz", nil)
		req.Header.Set("X-Long", strings.Repeat("x", size))
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%d bytes of header: %d, want %d", size, resp.StatusCode, want)
		}
	}
}

func TestStatusOfAnyError(t *testing.T) {
	if s := statusOf(errors.New("x")); s.Code != 500 || s.Reason != reasonInternalError || s.Message != "x" {
		t.Errorf("%+v", s)
	}
	if s := statusOf(fmt.Errorf("wrapped: %w", badRequest("y"))); s.Code != 400 || s.Message != "y" {
		t.Errorf("%+v", s)
	}
}
