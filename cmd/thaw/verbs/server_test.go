package verbs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/apiserver"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/state"
)

const token = "0123456789abcdef0123456789abcdef"

// server is the true API server and the true reconcilers on a store in memory. Only instances are not true: each revision
// gets a ready one at once, or a failure if its image says "broken", or nothing if it says "slow". Logs, packages and scale
// are answered by small stand-ins.
type server struct {
	url     string
	ingress *httptest.Server // answers as a function would

	reconcilers *reconcile.Reconcilers

	mu      sync.Mutex
	ready   map[api.RevisionID]bool
	table   *routes.Table
	uploads [][]byte
	lines   []client.LogLine
}

func (s *server) Resolve(_ context.Context, image string) (string, error) {
	if strings.Contains(image, "missing") {
		return "", fmt.Errorf("no such image")
	}
	sum := sha256.Sum256([]byte(image))
	return image + "@sha256:" + hex.EncodeToString(sum[:]), nil
}

func (s *server) SetRoutes(t *routes.Table) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table = t
}

func (s *server) SetRevision(r *api.Revision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready[r.ID()] || strings.Contains(r.Spec.Containers[0].Image, "slow") {
		return
	}
	s.ready[r.ID()] = true
	snap := &endpoints.Snapshot{Revision: r.ID(), Sequence: 1, Desired: 1, Instances: []endpoints.Instance{{ID: "i-1", Revision: r.ID(), State: endpoints.Ready}}}
	if strings.Contains(r.Spec.Containers[0].Image, "broken") {
		snap.Instances = nil
		snap.Failure = &endpoints.Failure{Reason: "ExitCode3", Message: "exit code 3: cannot open the database", Count: 9, At: time.Now()}
	}
	go s.reconcilers.ObserveInstances(snap)
}

func (s *server) RemoveRevision(api.RevisionID) {}

func startServer(t *testing.T) *server {
	t.Helper()
	mem := state.Memory()
	store := objects.New(mem, time.Now)
	s := &server{ready: map[api.RevisionID]bool{}}
	s.ingress = httptest.NewServer(http.HandlerFunc(function))
	t.Cleanup(s.ingress.Close)
	port := s.ingress.Listener.Addr().(*net.TCPAddr).Port
	s.reconcilers = reconcile.New(reconcile.Config{URLPort: port}, store, s, s)
	srv, err := apiserver.New(apiserver.Config{Store: store, Token: token, Extra: map[string]http.Handler{"/apis/thaw.run/v1alpha1": http.HandlerFunc(s.extra)}})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.url = "http://" + ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(ctx, ln); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := s.reconcilers.Run(ctx); err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		mem.Close()
	})
	<-s.reconcilers.Synced()
	return s
}

// extra answers the endpoints that Thaw adds to Knative's.
func (s *server) extra(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := strings.TrimPrefix(r.URL.Path, "/apis/thaw.run/v1alpha1/")
	switch {
	case path == "packages" && r.Method == http.MethodPost:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		s.uploads = append(s.uploads, body)
		sum := sha256.Sum256(body)
		fmt.Fprintf(w, `{"image":"pkg://sha256:%s"}`, hex.EncodeToString(sum[:]))
	case strings.HasSuffix(path, "/logs"):
		for _, l := range s.lines {
			if want := r.URL.Query().Get("revision"); want == "" || want == l.Revision {
				_ = json.NewEncoder(w).Encode(l)
			}
		}
		if r.URL.Query().Get("follow") == "true" {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	case strings.HasSuffix(path, "/scale"):
		if strings.Contains(path, "-00001/") { // an old one that sleeps
			fmt.Fprint(w, `{"desired":0,"ready":0,"starting":0,"mode":"proxy","why":"idle"}`)
			return
		}
		fmt.Fprint(w, `{"desired":2,"ready":1,"mode":"proxy","explain":["2 instances are wanted.","Path: proxy.\u001b[2J"]}`)
	default:
		http.NotFound(w, r)
	}
}

// function is what stands behind the ingress.
func function(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	h := w.Header()
	h.Set("X-Request-Id", "req-1")
	switch r.URL.Path {
	case "/cold":
		h.Set("Server-Timing", "queue;dur=3.8, decide;dur=0.1, place;dur=0.1, code;dur=1, net;dur=0.5, create;dur=2, ready;dur=3, app;dur=1, total;dur=10")
	case "/error":
		w.WriteHeader(418)
	case "/full":
		h.Set("X-Thaw-Error", "queue_full")
		h.Set("Retry-After", "2")
		w.WriteHeader(503)
	}
	host, _, _ := net.SplitHostPort(r.Host)
	fmt.Fprintf(w, "%s %s%s x=%q %s", r.Method, host, r.URL.RequestURI(), r.Header.Get("X"), body)
}

// result is what a command line left behind.
type result struct {
	code           int
	stdout, stderr string
}

// run executes a command line against the server.
func (s *server) run(t *testing.T, line ...string) result {
	return s.runIn(t, context.Background(), "", line...)
}

func (s *server) runIn(t *testing.T, ctx context.Context, stdin string, line ...string) result {
	t.Helper()
	return execute(ctx, map[string]string{"THAW_API": s.url, "THAW_TOKEN": token}, stdin, line...)
}

func execute(ctx context.Context, vars map[string]string, stdin string, line ...string) result {
	var stdout, stderr bytes.Buffer
	env := &Env{
		Stdin: strings.NewReader(stdin), Stdout: &stdout, Stderr: &stderr,
		Getenv: func(k string) string { return vars[k] }, Version: "v1.2.3", Now: time.Now,
	}
	root := &cobra.Command{Use: "thaw"}
	root.AddCommand(Commands(env)...)
	root.SetArgs(line)
	code := Main(ctx, root, env)
	return result{code, stdout.String(), stderr.String()}
}

// want checks an exit code and texts that the output must have.
func (r result) want(t *testing.T, code int, stdout string, stderr ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	if !strings.Contains(r.stdout, stdout) {
		t.Errorf("stdout lacks %q", stdout)
	}
	for _, s := range stderr {
		if !strings.Contains(r.stderr, s) {
			t.Errorf("stderr lacks %q", s)
		}
	}
	if len(stderr) == 0 && r.stderr != "" {
		t.Errorf("stderr should be empty")
	}
	if t.Failed() {
		t.Fatalf("stdout:\n%s\nstderr:\n%s", r.stdout, r.stderr)
	}
}
