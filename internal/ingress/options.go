package ingress

import (
	"context"
	"errors"
	"log/slog"
	"net"

	"go.opentelemetry.io/otel/metric"

	"github.com/thawrun/thaw/internal/certs"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
)

// Options is what can be said about TLS at an ingress. The zero value is: none.
type Options struct {
	Files    []certs.File // certificates and keys
	Local    bool         // a self-made authority for localhost
	ACME     *certs.ACME  // Known is the caller's of Open to say
	Dir      string       // where Local and ACME keep what they make
	Redirect bool         // clients that come without TLS are sent to where it is, if there is a certificate for the host
	Listen   string       // one more address, for TLS's own port; Redirect sends clients there
}

// Ingress is TLS with what belongs to it. Open makes one; Run looks after the certificates.
type Ingress struct {
	hop.Handler
	store *certs.Store // nil = no TLS
}

// Open reads certificates. Known says for which hosts one may be ordered.
func Open(o Options, next hop.Handler, known func(host string) bool, log *slog.Logger, meter metric.Meter) (*Ingress, error) {
	if len(o.Files) == 0 && !o.Local && o.ACME == nil {
		if o.Redirect || o.Listen != "" {
			return nil, errors.New("no certificate: name one (--tls-cert, --tls-key), or where to have one made (--tls-local, --acme)")
		}
		return &Ingress{Handler: next}, nil
	}
	if o.ACME != nil {
		a := *o.ACME
		a.Known = known
		o.ACME = &a
	}
	store, err := certs.New(certs.Config{Files: o.Files, Local: o.Local, ACME: o.ACME, Dir: o.Dir, Log: log, Meter: meter})
	if err != nil {
		return nil, err
	}
	c := Config{Next: next, Challenges: store.Challenges()}
	if o.Redirect {
		c.Secure = store.Has
		if o.Listen != "" {
			if _, c.Port, err = net.SplitHostPort(o.Listen); err != nil {
				return nil, err
			}
		}
	}
	return &Ingress{New(c), store}, nil
}

// Front adds TLS to what a front is made of.
func (in *Ingress) Front(c front.Config) front.Config {
	if in.store != nil {
		c.TLS, c.Handshake = in.store.TLS(), in.store.Handshake
	}
	return c
}

// Run looks after the certificates until ctx ends.
func (in *Ingress) Run(ctx context.Context) error {
	if in.store != nil {
		return in.store.Run(ctx)
	}
	<-ctx.Done()
	return nil
}
