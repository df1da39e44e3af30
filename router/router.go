// Package router is the ingress: it finds the revision that a request is for and passes the request on.
//
// A host leads to a route by one look-up in an immutable table behind an atomic pointer; hosts that are not in it as they stand
// (wildcards, unknown ones) are looked up the long way once and then remembered in a small LRU that lives as long as the table.
// The route's tag, the tag header or the weights choose the revision. The router stamps who it chose and where the request
// came from, and removes what only the platform may say. It knows no instances: the next step does.
package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/valyala/fasthttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/routes"
)

// Config says what comes after the router.
type Config struct {
	// Next serves what has been routed. Required.
	Next hop.Handler
	// Inside says whether an address may call cluster-local services; nil = loopback addresses may.
	Inside func(net.Addr) bool
	// CacheHosts bounds the memory for hosts that need a search; 0 = 4,096.
	CacheHosts int
	Log        *slog.Logger
	Meter      metric.Meter
}

// Router is a hop.Handler. Make one with New; it answers 404 until SetTable.
type Router struct {
	cfg      Config
	view     atomic.Pointer[view]
	duration metric.Float64Histogram
	attrs    sync.Map // attrKey -> metric.MeasurementOption
}

// view is a table with what has been found in it the long way.
type view struct {
	table *routes.Table
	found *lru.Cache[string, *routes.Route] // nil value = known to lead nowhere
}

// New returns a router with an empty table.
func New(cfg Config) (*Router, error) {
	if cfg.Next == nil {
		return nil, errors.New("router: Config.Next is required")
	}
	if cfg.Inside == nil {
		cfg.Inside = loopback
	}
	if cfg.CacheHosts <= 0 {
		cfg.CacheHosts = 4096
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Meter == nil {
		cfg.Meter = noop.Meter{}
	}
	r := &Router{cfg: cfg}
	var err error
	r.duration, err = cfg.Meter.Float64Histogram("http.server.request.duration", metric.WithUnit("s"),
		metric.WithDescription("Time from the arrival of a request to the end of its answer."),
		metric.WithExplicitBucketBoundaries(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60))
	if err != nil {
		return nil, err
	}
	r.SetTable(&routes.Table{})
	return r, nil
}

// SetTable makes t the table; requests under way keep what they have. t must not be changed afterwards.
func (r *Router) SetTable(t *routes.Table) {
	c, err := lru.New[string, *routes.Route](r.cfg.CacheHosts)
	if err != nil {
		panic(err) // only for a size below 1
	}
	r.view.Store(&view{t, c})
}

// maxHost is the longest host name there is (RFC 1035).
const maxHost = 253

// lookup finds the route of a Host field's value; nil = none.
func (v *view) lookup(host []byte) *routes.Route {
	if rt, ok := v.table.Hosts[string(host)]; ok { // the common case: lower case, no port; no allocation
		return rt
	}
	if i := bytes.LastIndexByte(host, ':'); i >= 0 && bytes.IndexByte(host[i:], ']') < 0 {
		host = host[:i]
		if rt, ok := v.table.Hosts[string(host)]; ok {
			return rt
		}
	}
	if len(host) > maxHost {
		return nil
	}
	name := strings.TrimSuffix(strings.ToLower(string(host)), ".")
	if rt, ok := v.found.Get(name); ok {
		return rt
	}
	rt := v.search(name)
	v.found.Add(name, rt)
	return rt
}

// search tries the name itself, then the wildcards over it, the longest first, and at last the one for every host.
func (v *view) search(name string) *routes.Route {
	if rt, ok := v.table.Hosts[name]; ok {
		return rt
	}
	for rest := name; ; {
		i := strings.IndexByte(rest, '.')
		if i < 0 {
			return v.table.Hosts["*"]
		}
		rest = rest[i+1:]
		if rt, ok := v.table.Hosts["*."+rest]; ok {
			return rt
		}
	}
}

// pick chooses a revision by weight.
func pick(targets []routes.Target) api.RevisionID {
	if len(targets) == 1 {
		return targets[0].Revision
	}
	n := rand.IntN(100)
	for i := range targets {
		if n -= targets[i].Percent; n < 0 {
			return targets[i].Revision
		}
	}
	return targets[len(targets)-1].Revision
}

// What only the platform says. From outside these are dropped.
var internalHeaders = []string{
	"Knative-Serving-Revision", "Knative-Serving-Namespace", "Knative-Serving-Default-Route",
	"K-Proxy-Request", "K-Original-Host", "K-Passthrough-Lb", "K-Network-Probe", "K-Network-Hash", "K-Kubelet-Probe",
}

// Serve routes x.
func (r *Router) Serve(x *hop.Exchange) error {
	h := &x.Req.Header
	rt := r.view.Load().lookup(h.Host())
	if rt == nil || (rt.Local && !r.cfg.Inside(x.RemoteAddr)) || len(rt.Targets) == 0 && rt.Tag == "" {
		return &hop.Error{Status: 404, Reason: hop.ReasonNoService, Message: fmt.Sprintf("no service for host %q", printable(h.Host()))}
	}
	x.Namespace, x.Service, x.Tag = rt.Namespace, rt.Service, rt.Tag
	if tag := h.Peek("Knative-Serving-Tag"); rt.Tag == "" && len(tag) > 0 {
		if id, ok := rt.Tags[string(tag)]; ok {
			x.Revision, x.Tag = id, string(tag)
		}
	}
	if x.Revision == "" {
		x.Revision = pick(rt.Targets)
	}
	r.stamp(x)
	err := r.cfg.Next.Serve(x)
	if err == nil {
		x.Resp.Header.Del("X-Thaw-Error") // the platform's own word: an answer of the function must not use it
		x.OnFinish(r)
		return nil
	}
	r.record(x, statusOf(err))
	return err
}

func statusOf(err error) int {
	var e *hop.Error
	if errors.As(err, &e) {
		return e.Status
	}
	return fasthttp.StatusServiceUnavailable
}

// stamp tells the next steps and the function where the request came from and where it goes.
func (r *Router) stamp(x *hop.Exchange) {
	h := &x.Req.Header
	for _, k := range internalHeaders {
		h.Del(k)
	}
	ns, name := x.Revision.Split()
	h.Set("Knative-Serving-Revision", name)
	h.Set("Knative-Serving-Namespace", ns)
	if x.Tag != "" {
		h.Set("Knative-Serving-Tag", x.Tag)
	}
	proto := "http"
	if x.TLS {
		proto = "https"
	}
	host := string(h.Host())
	if ip := clientIP(x.RemoteAddr); ip != "" {
		node := ip
		if strings.IndexByte(ip, ':') >= 0 {
			node = `"[` + ip + `]"` // RFC 7239 6
		}
		appendList(h, "X-Forwarded-For", ip)
		appendList(h, "Forwarded", "for="+node+";host="+quoted(host)+";proto="+proto)
	}
	h.Set("X-Forwarded-Proto", proto)
	h.Set("X-Forwarded-Host", host)
}

// appendList adds an element to a field that is a comma-separated list; several lines become one.
func appendList(h *fasthttp.RequestHeader, key, v string) {
	if old := h.PeekAll(key); len(old) > 0 {
		v = string(bytes.Join(old, []byte(", "))) + ", " + v
		h.Del(key)
	}
	h.Set(key, v)
}

// quoted returns s as it may stand in Forwarded: a token, or else a quoted string (a port's colon needs it).
func quoted(s string) string {
	if strings.IndexFunc(s, func(c rune) bool {
		return !(c == '-' || c == '.' || c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z')
	}) < 0 {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

func clientIP(a net.Addr) string {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.IP.String()
	}
	if a == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return ""
	}
	return host
}

func loopback(a net.Addr) bool {
	ip := net.ParseIP(clientIP(a))
	return ip != nil && ip.IsLoopback()
}

// printable cuts what a client sent down to what an error line may show.
func printable(b []byte) string {
	if len(b) > 100 {
		b = b[:100]
	}
	return string(b)
}

type attrKey struct {
	namespace, service string
	status             int
}

// Finish records a request whose answer is complete.
func (r *Router) Finish(x *hop.Exchange) { r.record(x, x.Resp.StatusCode()) }

func (r *Router) record(x *hop.Exchange, status int) {
	k := attrKey{x.Namespace, x.Service, status}
	v, ok := r.attrs.Load(k)
	if !ok {
		v, _ = r.attrs.LoadOrStore(k, metric.WithAttributeSet(attribute.NewSet(
			attribute.String("namespace", k.namespace), attribute.String("service", k.service), attribute.Int("http.response.status_code", k.status))))
	}
	r.duration.Record(context.Background(), time.Since(x.Arrived).Seconds(), v.(metric.MeasurementOption))
}
