package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"
)

const (
	protocolACME = acme.ALPNProto
	acmeFolder   = "acme"
	acmeAgain    = time.Minute // after a failed order, until the next one for the same host
)

// orders gets certificates by ACME. autocert does the work; what it lacks is that a handshake that waits for an order can give up, and that the
// others for the same name wait for the same order and hold nothing of their own.
type orders struct {
	known   func(host string) bool
	manager *autocert.Manager
	http    http.Handler
	log     *slog.Logger

	mu      sync.Mutex
	flights map[string]*flight // guarded by mu; there are at most two for each known host
}

// flight is one attempt to get a certificate.
type flight struct {
	done chan struct{} // closed when what follows is set
	cert *tls.Certificate
	err  error
	end  time.Time
}

var errNotKnown = errors.New("no certificate is ordered for a host that is not served here")

func newOrders(cfg ACME, dir string, log *slog.Logger) (*orders, error) {
	if cfg.Known == nil {
		return nil, errors.New("certs: ACME.Known is required")
	}
	client := &acme.Client{DirectoryURL: cfg.Directory, UserAgent: "thaw"}
	if cfg.CA != "" {
		b, err := readBounded(cfg.CA)
		if err != nil {
			return nil, fmt.Errorf("authorities of the ACME server: %w", err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("authorities of the ACME server: %s has no certificate in PEM form", cfg.CA)
		}
		tr := http.DefaultTransport.(*http.Transport).Clone()
		tr.TLSClientConfig = &tls.Config{RootCAs: roots}
		client.HTTPClient = &http.Client{Transport: tr}
	}
	known := func(host string) bool { return !isLocal(host) && cfg.Known(host) } // nobody else can answer for localhost
	o := &orders{known: known, log: log, flights: make(map[string]*flight)}
	o.manager = &autocert.Manager{
		Prompt: autocert.AcceptTOS,
		Cache:  autocert.DirCache(filepath.Join(dir, acmeFolder)),
		Client: client,
		Email:  cfg.Email,
		HostPolicy: func(_ context.Context, host string) error {
			if !o.known(host) {
				return errNotKnown
			}
			return nil
		},
	}
	o.http = o.manager.HTTPHandler(http.NotFoundHandler())
	return o, nil
}

// isChallenge says that an authority asks, for tls-alpn-01.
func isChallenge(hello *tls.ClientHelloInfo) bool {
	return len(hello.SupportedProtos) == 1 && hello.SupportedProtos[0] == protocolACME
}

// challenge answers an authority: the manager has something only for a name that it is just ordering for.
func (o *orders) challenge(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if !o.known(strings.ToLower(hello.ServerName)) {
		return nil, nil
	}
	return o.manager.GetCertificate(hello)
}

// get returns the certificate of a known host. A handshake that gives up leaves the order to those who come after it.
func (o *orders) get(name string, hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	f := o.join(name, hello)
	select {
	case <-f.done:
		return f.cert, f.err
	case <-hello.Context().Done():
		return nil, context.Cause(hello.Context())
	}
}

// join returns the flight under way for what the client understands, or starts one.
func (o *orders) join(name string, hello *tls.ClientHelloInfo) *flight {
	ask := &tls.ClientHelloInfo{ServerName: name, CipherSuites: hello.CipherSuites, SupportedCurves: hello.SupportedCurves, SignatureSchemes: hello.SignatureSchemes, SupportedVersions: hello.SupportedVersions}
	key := name
	if !understandsECDSA(hello) {
		key += " RSA"
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if f := o.flights[key]; f != nil && (f.end.IsZero() || time.Since(f.end) < acmeAgain) {
		return f
	}
	f := &flight{done: make(chan struct{})}
	o.flights[key] = f
	go o.fly(key, ask, f)
	return f
}

func (o *orders) fly(key string, ask *tls.ClientHelloInfo, f *flight) {
	begin := time.Now()
	f.cert, f.err = o.manager.GetCertificate(ask)
	o.mu.Lock()
	defer o.mu.Unlock()
	close(f.done)
	if f.err == nil {
		delete(o.flights, key) // the manager remembers it, and renews it in time
		if took := time.Since(begin); took > time.Second {
			o.log.Info("certificate ordered", "host", ask.ServerName, "took", took, "expires", f.cert.Leaf.NotAfter)
		}
		return
	}
	f.end = time.Now()
	o.log.Warn("no certificate could be ordered", "host", ask.ServerName, "again_after", acmeAgain, "error", f.err)
}

// understandsECDSA says whether a client understands the kind of certificate that is ordered by preference.
func understandsECDSA(hello *tls.ClientHelloInfo) bool {
	if len(hello.SignatureSchemes) == 0 {
		return true
	}
	for _, s := range hello.SignatureSchemes {
		switch s {
		case tls.ECDSAWithP256AndSHA256, tls.ECDSAWithP384AndSHA384, tls.ECDSAWithP521AndSHA512:
			return true
		}
	}
	return false
}
