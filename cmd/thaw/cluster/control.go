package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler/remote"
	"github.com/thawrun/thaw/cmd/thaw/gateways"
	"github.com/thawrun/thaw/cmd/thaw/side"
	"github.com/thawrun/thaw/control/apiserver"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/feed"
	"github.com/thawrun/thaw/internal/routes"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/internal/telemetry"
)

// ControlConfig is the API server and the reconcilers. Dir is required.
type ControlConfig struct {
	Common
	Dir        string // the token, and what uploads need on their way
	Store      string // URL of the zone's package store
	ImagesFile string // YAML map of image references to local code, the same as the agents'
	Domain     string
	URLPort    int // that public URLs name: of the address that leads to the routers; 0 and 80 are left out
	MaxTimeout time.Duration
}

// written is the platform of reconcilers whose readers follow the objects themselves.
type written struct{}

// SetRoutes does nothing: routers build their tables from the routes' status.
func (written) SetRoutes(*routes.Table) {}

// SetRevision does nothing.
func (written) SetRevision(*api.Revision) {}

// RemoveRevision does nothing.
func (written) RemoveRevision(api.RevisionID) {}

// extra is the path of what is no object: packages, logs and nodes.
const extra = "/apis/thaw.run/v1alpha1"

// maxPackage bounds the body of an upload; what is in it is bounded by instance/code.
const maxPackage = 1 << 30

// Control runs until ctx ends. Several may run: all answer the API, one reconciles.
func Control(ctx context.Context, cfg ControlConfig, ready func(listen, metrics string)) error {
	if err := cfg.fill(); err != nil {
		return err
	}
	images, err := loadImages(cfg.ImagesFile)
	if err != nil {
		return err
	}
	far, err := openStore(cfg.Store)
	if err != nil {
		return err
	}
	if far == nil {
		return errors.New("--store: name the package store of the nodes (thaw store)")
	}
	packages, err := code.OpenPackages(code.PackagesConfig{Dir: filepath.Join(cfg.Dir, "packages"), Store: far, Log: cfg.Log})
	if err != nil {
		return err
	}
	token, err := apiserver.LoadOrCreateToken(filepath.Join(cfg.Dir, "token"))
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer ln.Close()
	metrics, err := telemetry.New(nil)
	if err != nil {
		return err
	}
	st, err := state.Open(ctx, cfg.Etcd)
	if err != nil {
		return err
	}
	defer st.Close()
	objs := objects.New(st, time.Now)
	var nodes agents
	limits := api.DefaultLimits
	if cfg.MaxTimeout > 0 {
		limits.MaxTimeoutSeconds = int64(cfg.MaxTimeout / time.Second)
	}
	nodesOf := &roster{store: st, feed: feed.NewClient(feed.ClientConfig{Name: cfg.Name + "/api", Log: cfg.Log, Told: func(*endpoints.Snapshot) {}})}
	scaler := remote.NewClient(remote.ClientConfig{Name: cfg.Name, Log: cfg.Log})
	c := &control{cfg: cfg, store: st, objects: objs, scaler: scaler, resolver: code.NewResolver(packages, images)}
	server, err := apiserver.New(apiserver.Config{
		Store: objs, Token: token, Limits: limits, Metrics: metrics, Version: cfg.Version, Log: cfg.Log,
		Extra: map[string]http.Handler{extra: c.extra(packages, &nodes, nodesOf)},
	})
	if err != nil {
		return err
	}
	var stopping atomic.Bool
	aside, sideAt, err := cfg.sideways(side.New(metrics, func() bool { return !stopping.Load() }))
	if err != nil {
		return err
	}
	return run(ctx, parts{
		"metrics":     aside,
		"sides":       members(st, groupSides, nodes.set),
		"agents":      members(st, groupAgents, nodesOf.set),
		"instances":   nodesOf.feed.Run,
		"streams":     scaler.Run,
		"autoscalers": members(st, autoscalers, scaler.SetMembers),
		"reconcilers": c.reconcile,
	}, func(ctx context.Context) error {
		ready(ln.Addr().String(), sideAt)
		defer context.AfterFunc(ctx, func() { stopping.Store(true) })()
		return server.Serve(ctx, ln)
	})
}

// control is what reconciles.
type control struct {
	cfg      ControlConfig
	store    state.Store
	objects  *objects.Store
	scaler   *remote.Client
	resolver *code.Resolver
}

// leaderTTL is after how long another one reconciles in the place of one that has died.
const leaderTTL = 3 * time.Second

// reconcile takes part in the election, and does the work while it leads.
func (c *control) reconcile(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := c.lead(ctx); err != nil && ctx.Err() == nil {
			c.cfg.Log.Warn("not reconciling, trying again", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(500 * time.Millisecond):
			}
		}
	}
	return nil
}

func (c *control) lead(ctx context.Context) error {
	session, err := c.store.Session(ctx, leaderTTL)
	if err != nil {
		return err
	}
	defer session.Close()
	leading, err := session.Campaign(ctx, "control", c.cfg.Name)
	if err != nil {
		return err
	}
	defer func() { _ = leading.Resign(context.WithoutCancel(ctx)) }()
	rec := reconcile.Config{Domain: c.cfg.Domain, URLPort: c.cfg.URLPort, Log: c.cfg.Log, Prepare: c.scaler.Shift, Network: gateways.NewNetwork(c.store)}
	if err := rec.Validate(); err != nil {
		return err
	}
	recs := reconcile.New(rec, c.objects, written{}, c.resolver)
	instances := feed.NewClient(feed.ClientConfig{Name: c.cfg.Name, Log: c.cfg.Log, Told: func(sn *endpoints.Snapshot) {
		recs.ObserveInstances(sn)
		recs.ObserveScale(scaleOf(sn))
	}})
	return run(ctx, parts{
		"reconcilers": recs.Run,
		"instances":   instances.Run,
		"agents":      members(c.store, groupAgents, instances.SetAgents),
	}, func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return nil
		case <-session.Done():
			return state.ErrLeaseLost
		}
	})
}

// extra answers what is no object.
func (c *control) extra(packages *code.Packages, nodes *agents, nodesOf *roster) http.Handler {
	mux := http.NewServeMux()
	nodesOf.register(mux)
	mux.HandleFunc("POST "+extra+"/packages", func(w http.ResponseWriter, r *http.Request) {
		p, err := packages.Upload(r.Context(), http.MaxBytesReader(w, r.Body, maxPackage))
		var big *http.MaxBytesError
		switch {
		case errors.As(err, &big):
			apiserver.Fail(w, http.StatusRequestEntityTooLarge, "RequestEntityTooLarge", "the package is larger than 1 GiB")
		case errors.Is(err, code.ErrBadPackage):
			apiserver.Fail(w, http.StatusUnprocessableEntity, "Invalid", err.Error())
		case err != nil:
			apiserver.Fail(w, http.StatusInternalServerError, "InternalError", err.Error())
		default:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusCreated)
			_ = json.NewEncoder(w).Encode(p)
		}
	})
	mux.HandleFunc("GET "+extra+"/namespaces/{ns}/logs", func(w http.ResponseWriter, r *http.Request) { nodes.logs(w, r, c.cfg.Log) })
	mux.HandleFunc("GET "+extra+"/namespaces/{ns}/revisions/{name}/scale", c.scale)
	return mux
}

// explainWithin bounds the wait for the word of the autoscaler that decides about a revision.
const explainWithin = 2 * time.Second

// scale passes on how the autoscaler that decides about a revision explains it.
func (c *control) scale(w http.ResponseWriter, r *http.Request) {
	id := api.MakeRevisionID(r.PathValue("ns"), r.PathValue("name"))
	ctx, cancel := context.WithTimeout(r.Context(), explainWithin)
	defer cancel()
	text, err := c.scaler.Explain(ctx, id)
	switch {
	case err != nil:
		w.Header().Set("Retry-After", "1")
		apiserver.Fail(w, http.StatusServiceUnavailable, "ServiceUnavailable", fmt.Sprintf("how revision %s scales: %v", id, err))
	case len(text) == 0:
		apiserver.Fail(w, http.StatusNotFound, "NotFound", "revision "+string(id)+" is not known to the autoscaler")
	default:
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(text)
	}
}

// agents are the nodes' addresses for those who look after them.
type agents struct {
	addrs atomic.Pointer[map[string]string]
}

func (a *agents) set(addrs map[string]string) { a.addrs.Store(&addrs) }

// logs passes on what all nodes have, as it comes.
func (a *agents) logs(w http.ResponseWriter, r *http.Request, log *slog.Logger) {
	q := r.URL.Query()
	if t := q.Get("tail"); t != "" {
		if _, err := strconv.Atoi(t); err != nil {
			apiserver.Fail(w, http.StatusBadRequest, "BadRequest", "tail="+strconv.Quote(t)+" is not a number")
			return
		}
	}
	q.Set("namespace", r.PathValue("ns"))
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	_ = rc.Flush()
	var to map[string]string
	if m := a.addrs.Load(); m != nil {
		to = maps.Clone(*m)
	}
	var mu sync.Mutex // guards w
	var all sync.WaitGroup
	for name, addr := range to {
		all.Go(func() {
			u := url.URL{Scheme: "http", Host: addr, Path: "/logs", RawQuery: q.Encode()}
			req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, u.String(), nil)
			if err != nil {
				return
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				log.Warn("a node does not give its logs", "node", name, "error", err)
				return
			}
			defer resp.Body.Close()
			dec := json.NewDecoder(io.LimitReader(resp.Body, maxLogs))
			for {
				var line json.RawMessage
				if dec.Decode(&line) != nil {
					return
				}
				mu.Lock()
				_, err := w.Write(append(line, '\n'))
				_ = rc.Flush()
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	all.Wait()
}

// maxLogs bounds what one node may answer to one question, in bytes.
const maxLogs = 1 << 30
