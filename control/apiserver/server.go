package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
)

// Config is what a Server needs. Store and Token are required; the zero value of everything else has a meaning.
type Config struct {
	Store *objects.Store
	Token string // see LoadOrCreateToken

	Limits  api.Limits   // what validation allows; zero = api.DefaultLimits
	Metrics http.Handler // answers /metrics; nil = 404

	// Extra are further endpoints by path: each answers its path and everything below it, after authentication. The longest path wins.
	// They set their own time limits; their request's context ends when the server stops.
	Extra map[string]http.Handler

	// Ready says whether the process can do its work, for /readyz. nil = the store answers.
	Ready func(context.Context) error

	Version string       // of Thaw, for /version; "" = "dev"
	Log     *slog.Logger // nil = no log

	// Now tells the creation time that a dry run shows. nil = time.Now. Deadlines of connections are always real.
	Now func() time.Time

	StoreTimeout time.Duration // how long one request may wait for the store; 0 = 5 s
	MaxBody      int64         // bytes of a request's body; 0 = 3 MiB
	MaxInFlight  int           // requests at once, watches and Extra not counted, else 429; 0 = 256
	MaxWatches   int           // open watches, else 429; 0 = 1024
}

// Server is the API as an http.Handler.
type Server struct {
	// static after New
	store     *objects.Store
	auth      authenticator
	limits    api.Limits
	metrics   http.Handler
	extra     []extraHandler // longest path first
	ready     func(context.Context) error
	version   string
	log       *slog.Logger
	now       func() time.Time
	storeWait time.Duration
	maxBody   int64
	grace     time.Duration        // of Serve at its end; tests shorten it
	resources map[string]*api.Kind // by "group/version/plural"
	documents *documents
	origin    *http.CrossOriginProtection

	settling sync.Mutex // held while an object is stored that others of its kind have to get on with

	inFlight  gauge
	watches   gauge
	closing   atomic.Bool // no new watches, /readyz says no
	closed    context.Context
	closeFunc context.CancelFunc
}

type extraHandler struct {
	path    string
	handler http.Handler
}

// New makes a server. It starts nothing.
func New(c Config) (*Server, error) {
	if c.Store == nil {
		return nil, errors.New("apiserver: no store")
	}
	if c.Token == "" {
		return nil, errors.New("apiserver: no token")
	}
	s := &Server{
		store: c.Store, auth: newAuthenticator(c.Token), limits: c.Limits, metrics: c.Metrics, ready: c.Ready, version: c.Version,
		log: c.Log, now: c.Now, storeWait: c.StoreTimeout, maxBody: c.MaxBody,
		resources: map[string]*api.Kind{},
		grace:     shutdownTimeout,
		origin:    http.NewCrossOriginProtection(),
		inFlight:  gauge{limit: int64(c.MaxInFlight)}, watches: gauge{limit: int64(c.MaxWatches)},
	}
	if s.limits == (api.Limits{}) {
		s.limits = api.DefaultLimits
	}
	if s.version == "" {
		s.version = "dev"
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.storeWait == 0 {
		s.storeWait = 5 * time.Second
	}
	if s.maxBody == 0 {
		s.maxBody = 3 << 20
	}
	if s.inFlight.limit == 0 {
		s.inFlight.limit = 256
	}
	if s.watches.limit == 0 {
		s.watches.limit = 1024
	}
	if s.ready == nil {
		s.ready = func(ctx context.Context) error { _, err := s.revision(ctx); return err }
	}
	for _, k := range api.Kinds {
		s.resources[k.APIVersion+"/"+k.Plural] = k
	}
	for path, h := range c.Extra {
		path = strings.TrimSuffix(path, "/")
		if !strings.HasPrefix(path, "/") || h == nil {
			return nil, fmt.Errorf("apiserver: extra endpoint %q: a path and a handler are needed", path)
		}
		s.extra = append(s.extra, extraHandler{path, h})
	}
	slices.SortFunc(s.extra, func(a, b extraHandler) int { return len(b.path) - len(a.path) })
	var err error
	if s.documents, err = makeDocuments(s.version); err != nil {
		return nil, fmt.Errorf("apiserver: %w", err)
	}
	// The one context that is a field: it is the server's own end, not a request's.
	s.closed, s.closeFunc = context.WithCancel(context.Background())
	return s, nil
}

// gauge counts what goes on at once, up to a limit.
type gauge struct {
	n     atomic.Int64
	limit int64
}

func (g *gauge) enter() bool {
	if g.n.Add(1) > g.limit {
		g.n.Add(-1)
		return false
	}
	return true
}

func (g *gauge) leave() { g.n.Add(-1) }

func tooMany(what string) error {
	return fail(http.StatusTooManyRequests, reasonTooManyRequests, "too many %s at once, please try again later", what).after(1)
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if p == http.ErrAbortHandler {
			panic(p)
		}
		s.log.Error("API request panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
		writeError(w, r, fail(http.StatusInternalServerError, reasonInternalError, "this request hit a fault of the server; its log says more"))
	}()
	switch strings.TrimSuffix(r.URL.Path, "/") {
	case "/healthz", "/livez":
		s.health(w, r, nil)
		return
	case "/readyz":
		s.health(w, r, s.ready)
		return
	}
	if !s.auth.allows(r.Header.Get("Authorization")) {
		refuse(w, r)
		return
	}
	// A browser that once learnt the Basic password sends it along with any page's requests.
	if err := s.origin.Check(r); err != nil {
		writeError(w, r, fail(http.StatusForbidden, reasonForbidden, "a page of another origin sent this request: %v", err))
		return
	}
	for _, e := range s.extra {
		if r.URL.Path == e.path || strings.HasPrefix(r.URL.Path, e.path+"/") {
			e.handler.ServeHTTP(w, r)
			return
		}
	}
	if err := s.serve(w, r); err != nil {
		if code := statusOf(err).Code; code >= 500 && r.Context().Err() == nil {
			s.log.Warn("API request failed", "method", r.Method, "path", r.URL.Path, "code", code, "err", err)
		}
		writeError(w, r, err)
	}
}

// health answers 200 "ok" or 503 with what is missing.
func (s *Server) health(w http.ResponseWriter, r *http.Request, check func(context.Context) error) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		writeError(w, r, methodNotAllowed(w, http.MethodGet, http.MethodHead))
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if check != nil {
		ctx, cancel := context.WithTimeout(r.Context(), s.storeWait)
		defer cancel()
		err := check(ctx)
		if s.closing.Load() {
			err = errors.New("shutting down")
		}
		if err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintf(w, "not ready: %v\n", err)
			return
		}
	}
	fmt.Fprintln(w, "ok")
}

// methodNotAllowed is a 405 that says what would be.
func methodNotAllowed(w http.ResponseWriter, allow ...string) error {
	w.Header().Set("Allow", strings.Join(allow, ", "))
	return fail(http.StatusMethodNotAllowed, reasonMethodNotAllowed,
		"the server does not allow this method on the requested resource; it allows %s", strings.Join(allow, ", "))
}

// revision returns the store's revision of now. No namespace is called "-", so the list costs no reading.
func (s *Server) revision(ctx context.Context) (int64, error) {
	_, rev, err := s.store.List(ctx, api.Services, "-")
	return rev, err
}

// Bounds of the HTTP server.
const (
	headerTimeout   = 10 * time.Second
	idleTimeout     = 2 * time.Minute
	maxHeaderBytes  = 64 << 10
	writeTimeout    = 30 * time.Second // of one answer, or one event of a watch
	shutdownTimeout = 5 * time.Second
)

// Serve answers requests on ln until ctx ends; it then ends the watches, lets other requests finish for a few seconds and
// returns nil. A Server serves once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return base },
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	select {
	case err := <-failed:
		s.Close()
		return fmt.Errorf("apiserver: %w", err)
	case <-ctx.Done():
	}
	s.Close()
	// Extra endpoints (logs that are followed) learn of the end by their context, a moment before they are cut.
	stop := time.AfterFunc(s.grace/2, cancel)
	defer stop.Stop()
	grace, done := context.WithTimeout(context.WithoutCancel(ctx), s.grace)
	defer done()
	if err := srv.Shutdown(grace); err != nil {
		srv.Close()
	}
	<-failed
	return nil
}

// Close ends all watches and makes /readyz say no. Serve calls it; a Server that another http.Server mounts needs the call.
func (s *Server) Close() {
	s.closing.Store(true)
	s.closeFunc()
}
