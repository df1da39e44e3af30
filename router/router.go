// Package router is the ingress: it finds the revision that a request is for and passes the request on.
//
// A host leads to a route by one look-up in an immutable table behind an atomic pointer; hosts that are not in it as they stand
// (wildcards, unknown ones) are looked up the long way once and then remembered in a small LRU that lives as long as the table.
// The route's tag, the tag header or the weights choose the revision. The router stamps who it chose and where the request
// came from, and removes what only the platform may say. It knows no instances: the next step does.
package router

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/valyala/fasthttp"

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
}

// Router is a hop.Handler. Make one with New; it answers 404 until SetTable.
type Router struct {
	cfg  Config
	view atomic.Pointer[view]
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
	r := &Router{cfg: cfg}
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

// Public says whether a host (lower case, without a port) stands in the table by its own name and may be called from outside.
func (r *Router) Public(host string) bool {
	rt := r.view.Load().table.Hosts[host]
	return rt != nil && !rt.Local && !strings.HasPrefix(host, "*")
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

// foreign says whether lines of a header hold anything that has to be removed. Hardly a request from outside does, and looking once at the first byte
// of each line is a tenth of looking for nine names. Revision and namespace, one line each, are what a router before this one has
// written: they are written over. A header without lines was not parsed from HTTP/1 and may hold anything.
func foreign(raw []byte) bool {
	if len(raw) == 0 {
		return true
	}
	revisions, namespaces := 0, 0
	for len(raw) > 2 {
		if raw[0]|0x20 == 'k' && (raw[1] == '-' || raw[1]|0x20 == 'n') {
			switch name, _, _ := bytes.Cut(raw[:min(len(raw), len(headerNamespace)+1)], colon); string(name) {
			case string(headerRevision):
				revisions++
			case string(headerNamespace):
				namespaces++
			default:
				return true
			}
		}
		i := bytes.IndexByte(raw, '\n')
		if i < 0 {
			break
		}
		raw = raw[i+1:]
	}
	return revisions > 1 || namespaces > 1
}

var colon = []byte{':'}

// Serve routes x.
func (r *Router) Serve(x *hop.Exchange) error {
	h := &x.Req.Header
	rt := r.view.Load().lookup(h.Host())
	if rt == nil || (rt.Local && !r.cfg.Inside(x.RemoteAddr)) || len(rt.Targets) == 0 && rt.Tag == "" {
		return &hop.Error{Status: 404, Reason: hop.ReasonNoService, Message: fmt.Sprintf("no service for host %q", printable(h.Host()))}
	}
	x.Namespace, x.Service, x.Tag, x.Limits = rt.Namespace, rt.Service, rt.Tag, rt.Limits
	if tag := h.PeekCanonical(headerTag); rt.Tag == "" && len(tag) > 0 {
		if id, ok := rt.Tags[string(tag)]; ok {
			x.Revision, x.Tag = id, string(tag)
		}
	}
	if x.Revision == "" {
		x.Revision = pick(rt.Targets)
	}
	r.stamp(x)
	err := r.cfg.Next.Serve(x)
	if err == nil && len(x.Resp.Header.PeekCanonical(headerError)) > 0 {
		x.Resp.Header.DelBytes(headerError) // the platform's own word: an answer of the function must not use it
	}
	return err
}

// Field names in the form that the header keeps them in: setting them needs no normalization.
var (
	headerRevision  = []byte("Knative-Serving-Revision")
	headerNamespace = []byte("Knative-Serving-Namespace")
	headerTag       = []byte("Knative-Serving-Tag")
	headerFor       = []byte("X-Forwarded-For")
	headerProto     = []byte("X-Forwarded-Proto")
	headerHost      = []byte("X-Forwarded-Host")
	headerForwarded = []byte("Forwarded")
	headerError     = []byte("X-Thaw-Error")
)

// scratch holds the values while they are put together.
var scratch = sync.Pool{New: func() any { b := make([]byte, 0, 512); return &b }}

// stamp tells the next steps and the function where the request came from and where it goes.
func (r *Router) stamp(x *hop.Exchange) {
	h := &x.Req.Header
	if foreign(h.RawHeaders()) {
		hop.Remove(h, internalHeaders...)
	}
	bp := scratch.Get().(*[]byte)
	defer scratch.Put(bp)
	b := (*bp)[:0]
	set := func(key []byte, from int) { h.SetCanonical(key, b[from:]) }

	proto := "http"
	if x.TLS {
		proto = "https"
	}
	host := h.Host()
	if ip, ok := clientIP(x.RemoteAddr); ok {
		b = appendOld(b[:0], h, headerFor)
		b = ip.AppendTo(b)
		set(headerFor, 0)
		b = appendOld(b[:0], h, headerForwarded)
		b = append(b, "for="...)
		if ip.Is4() {
			b = ip.AppendTo(b)
		} else {
			b = append(ip.AppendTo(append(b, `"[`...)), `]"`...) // RFC 7239 6
		}
		b = appendQuoted(append(b, ";host="...), host)
		b = append(append(b, ";proto="...), proto...)
		set(headerForwarded, 0)
	}
	b = append(b[:0], proto...)
	set(headerProto, 0)
	b = append(b[:0], host...) // not host itself: it lies in the header that is written to
	set(headerHost, 0)
	if x.Tag != "" {
		b = append(b[:0], x.Tag...)
		set(headerTag, 0)
	}
	// Last, since that is where the queue-proxy can take them away without a thought for the order of what follows.
	b = append(b[:0], x.Revision...)
	slash := bytes.IndexByte(b, '/')
	set(headerRevision, slash+1)
	h.SetCanonical(headerNamespace, b[:max(slash, 0)])
	*bp = b
}

// appendOld appends what a field that is a comma-separated list has so far, as one line. It leaves at most one line of it in the header, to be set anew.
func appendOld(b []byte, h *fasthttp.RequestHeader, key []byte) []byte {
	if len(h.PeekCanonical(key)) == 0 {
		return b
	}
	all := h.PeekAll(string(key))
	for _, v := range all {
		b = append(append(b, v...), ", "...)
	}
	if len(all) > 1 {
		hop.Remove(h, string(key))
	}
	return b
}

// appendQuoted appends s as it may stand in Forwarded: a token, or else a quoted string (a port's colon needs it).
func appendQuoted(b, s []byte) []byte {
	token := len(s) > 0
	for _, c := range s {
		if !(c == '-' || c == '.' || c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z') {
			token = false
			break
		}
	}
	if token {
		return append(b, s...)
	}
	b = append(b, '"')
	for _, c := range s {
		if c == '"' || c == '\\' {
			b = append(b, '\\')
		}
		b = append(b, c)
	}
	return append(b, '"')
}

// clientIP is the address that a connection comes from.
func clientIP(a net.Addr) (netip.Addr, bool) {
	if t, ok := a.(*net.TCPAddr); ok {
		ip, ok := netip.AddrFromSlice(t.IP)
		return ip.Unmap(), ok
	}
	if a == nil {
		return netip.Addr{}, false
	}
	ap, err := netip.ParseAddrPort(a.String())
	return ap.Addr().Unmap(), err == nil
}

func loopback(a net.Addr) bool {
	ip, ok := clientIP(a)
	return ok && ip.IsLoopback()
}

// printable cuts what a client sent down to what an error line may show.
func printable(b []byte) string {
	if len(b) > 100 {
		b = b[:100]
	}
	return string(b)
}
