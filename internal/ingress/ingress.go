// Package ingress is what stands before the router at a public address: it answers the challenges of an ACME authority, and sends
// clients that came without TLS to where there is TLS.
package ingress

import (
	"bytes"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/certs"
	"github.com/thawrun/thaw/internal/hop"
)

// Config says what is done. The zero value of a field leaves it out.
type Config struct {
	// Next serves everything else. Required.
	Next hop.Handler
	// Challenges answers requests below certs.ChallengePath. What it does not know (404) goes on to Next: a function may have
	// challenges of its own.
	Challenges http.Handler
	// Secure says that a host (lower case, without a port) has a certificate and is to be asked for over TLS only.
	Secure func(host string) bool
	// Port is where TLS is served, if that is not the port on which the request came; 443 is left out of URLs.
	Port string
}

// New returns the handler.
func New(c Config) hop.Handler {
	if c.Challenges == nil && c.Secure == nil {
		return c.Next
	}
	return &handler{c}
}

type handler struct{ Config }

// Serve implements hop.Handler.
func (g *handler) Serve(x *hop.Exchange) error {
	if x.TLS {
		return g.Next.Serve(x)
	}
	path := x.Req.Header.RequestURI()
	if bytes.HasPrefix(path, []byte(certs.ChallengePath)) {
		if g.Challenges != nil && g.challenge(x, string(path)) {
			return nil
		}
		return g.Next.Serve(x) // an authority does not come by TLS here, whatever it asks for
	}
	if g.Secure == nil || health(path) {
		return g.Next.Serve(x)
	}
	host, port := splitHost(string(x.Req.Header.Host()))
	if !g.Secure(host) {
		return g.Next.Serve(x)
	}
	return g.redirect(x, host, port, string(path))
}

// health says whether a path is one that probes use: what they ask is whether the plain port works.
func health(path []byte) bool {
	path, _, _ = bytes.Cut(path, []byte("?"))
	switch string(path) {
	case "/healthz", "/livez", "/readyz":
		return true
	}
	return false
}

// splitHost takes a Host field apart: a lower-case name and the port, "" if there is none.
func splitHost(s string) (host, port string) {
	if h, p, err := net.SplitHostPort(s); err == nil {
		s, port = h, p
	}
	return strings.ToLower(strings.TrimSuffix(s, ".")), port
}

// redirect answers 308, which keeps method and body. Clients of WebSocket do not follow it: they are told in words.
func (g *handler) redirect(x *hop.Exchange, host, port, target string) error {
	if len(x.Req.Header.Peek("Upgrade")) > 0 {
		return &hop.Error{Status: fasthttp.StatusForbidden, Reason: hop.ReasonTLSRequired, Message: "this host is served over TLS only: use wss:// or https://"}
	}
	if g.Port != "" {
		port = g.Port
	}
	to := host
	if port != "" && port != "443" && port != "80" {
		to = net.JoinHostPort(host, port)
	}
	if len(target) == 0 || target[0] != '/' { // OPTIONS *
		target = "/"
	}
	x.Resp.SetStatusCode(fasthttp.StatusPermanentRedirect)
	x.Resp.Header.Set("Location", "https://"+to+target)
	x.Resp.SetBodyString("this host is served over TLS\n")
	return nil
}

// challenge asks the handler of challenges; it returns false if that does not know.
func (g *handler) challenge(x *hop.Exchange, path string) bool {
	if x.BodySize != 0 || !x.Req.Header.IsGet() && !x.Req.Header.IsHead() {
		return false
	}
	host, _ := splitHost(string(x.Req.Header.Host()))
	path, query, _ := strings.Cut(path, "?")
	a := &answer{header: make(http.Header)}
	g.Challenges.ServeHTTP(a, &http.Request{Method: string(x.Req.Header.Method()), Host: host, URL: &url.URL{Path: path, RawQuery: query}})
	if a.status != http.StatusOK {
		return false
	}
	x.Resp.Header.Set("Content-Type", "text/plain; charset=utf-8")
	x.Resp.SetBodyRaw(a.body)
	return true
}

// answer collects what a net/http handler answers.
type answer struct {
	header http.Header
	status int
	body   []byte
}

func (a *answer) Header() http.Header { return a.header }

func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

func (a *answer) Write(p []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	a.body = append(a.body, p...)
	return len(p), nil
}
