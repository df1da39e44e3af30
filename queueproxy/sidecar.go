package queueproxy

import (
	"bytes"
	"context"
	"errors"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// ProbeName is what probes ask for in K-Network-Probe and what a ready sidecar answers.
const ProbeName = "queue"

// probers are how the user agents begin whose requests may be probes.
var probers = [...][]byte{[]byte("kube-probe/"), []byte("Knative-Activator-Probe"), []byte("Knative-Autoscaling-Probe")}

// Sidecar is a Proxy at the border of a process: it answers probes, believes the headers in which an activator says who it is, and turns
// what hops tell each other by error into answers. Only the platform may be able to reach it.
type Sidecar struct {
	Proxy *Proxy
	// Ready says whether the function takes requests; its error goes to the log of whoever asks. Nil: probes are not answered, they
	// go to the function as everything else does.
	Ready func(ctx context.Context) error
	// Stopping says that the process is about to end, whether or not the Proxy already refuses requests; nil = ask the Proxy.
	Stopping func() bool
}

// Serve answers x.
func (s *Sidecar) Serve(x *hop.Exchange) error {
	if s.Ready != nil && isProbe(x.Req.Header.UserAgent()) {
		s.answerProbe(x)
		return nil
	}
	x.Proxied = string(x.Req.Header.PeekCanonical(proxyHeader)) == activator
	err := s.Proxy.Serve(x)
	switch {
	case err == nil:
		// The platform's own word: what comes from the function must not say that it never got there, for then it would be asked again elsewhere.
		if len(x.Resp.Header.PeekCanonical(headerError)) > 0 {
			x.Resp.Header.DelBytes(headerError)
		}
		if s.stopping() && x.Hijack == nil {
			x.Resp.SetConnectionClose() // the next request should find another instance
		}
	case errors.Is(err, hop.ErrBusy):
		// The reason, not the status, tells an activator that no byte got to the function.
		return errQueueFull
	case errors.Is(err, hop.ErrNotSent) && s.Proxy.Draining():
		return errDraining
	case errors.Is(err, hop.ErrNotSent):
		return errNotListening
	}
	return err
}

// In the form that the header keeps them in.
var (
	headerError = []byte("X-Thaw-Error")
	proxyHeader = []byte(headerProxy)
)

var (
	errDraining     = &hop.Error{Status: 503, Reason: hop.ReasonDraining, Message: "shutting down", RetryAfter: retryAfter}
	errNotListening = &hop.Error{Status: 502, Reason: hop.ReasonUnreachable, Message: "the function does not accept connections"}
)

func (s *Sidecar) stopping() bool {
	if s.Stopping != nil {
		return s.Stopping()
	}
	return s.Proxy.Draining()
}

func isProbe(userAgent []byte) bool {
	for _, p := range probers {
		if bytes.HasPrefix(userAgent, p) {
			return true
		}
	}
	return false
}

// answerProbe follows Knative's queue-proxy: on any path, 200 and the name when ready, 503 when not, 400 to a probe for somebody else.
func (s *Sidecar) answerProbe(x *hop.Exchange) {
	answer := func(status int, body string) {
		x.Resp.SetStatusCode(status)
		x.Resp.Header.SetContentType("text/plain; charset=utf-8")
		x.Resp.SetBodyString(body)
	}
	name := x.Req.Header.Peek(headerProbe)
	switch {
	case s.stopping():
		answer(fasthttp.StatusServiceUnavailable, "shutting down")
	case string(name) != ProbeName:
		answer(fasthttp.StatusBadRequest, `unexpected probe header value: "`+string(name)+`"`)
	default:
		// The prober's own deadline ends the wait on its side; ours is the one that Ready has.
		if err := s.Ready(context.Background()); err != nil {
			answer(fasthttp.StatusServiceUnavailable, err.Error())
			return
		}
		answer(fasthttp.StatusOK, ProbeName)
	}
}
