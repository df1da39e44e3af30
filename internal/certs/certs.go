// Package certs answers the question of every TLS handshake: which certificate has the name that the client asks for. There are three
// sources, asked in this order:
//
//   - files, a certificate and a key each; what they say is their names. They are read again when they change;
//   - a certificate authority of this machine's own for localhost and the names below it, made when it is first needed;
//   - ACME (RFC 8555), by autocert, for names that the caller knows, and no other.
//
// A name that nobody knows is refused with the alert unrecognized_name. A client that sends no name gets the first file's certificate,
// or the one of localhost.
package certs

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

// Config says where certificates come from. At least one of Files, Local and ACME is needed.
type Config struct {
	Files []File
	Poll  time.Duration // how often Files are looked at; 0 = 2 s
	Local bool          // localhost and the names below it have certificates of a self-made authority
	ACME  *ACME         // nil = not used
	Dir   string        // folder for what Local and ACME keep; made when needed
	Log   *slog.Logger
	Meter metric.Meter
}

// File is a certificate with its chain, the leaf first, and its key, both PEM.
type File struct{ Cert, Key string }

// ACME is where certificates are ordered, and for whom.
type ACME struct {
	// Known says whether a certificate may be ordered for a host. Required: without it anybody could have names asked for until the
	// authority refuses all. It is called in handshakes and must not block.
	Known     func(host string) bool
	Email     string // who is told of problems; "" = nobody
	Directory string // URL; "" = Let's Encrypt
	CA        string // file (PEM) with the authorities to trust Directory by; "" = the system's
}

// Store chooses certificates. Make one with New; Run keeps it up to date.
type Store struct {
	cfg     Config
	files   files
	local   *local // nil = not used
	acme    *orders
	metrics metrics
}

// New reads the files. What is wrong with them is an error, except that a certificate may have expired.
func New(cfg Config) (*Store, error) {
	if len(cfg.Files) == 0 && !cfg.Local && cfg.ACME == nil {
		return nil, errors.New("certs: no source of certificates")
	}
	if (cfg.Local || cfg.ACME != nil) && cfg.Dir == "" {
		return nil, errors.New("a folder is needed for the keys that are made: name one with --tls-dir")
	}
	if cfg.Poll <= 0 {
		cfg.Poll = 2 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Meter == nil {
		cfg.Meter = noop.Meter{}
	}
	s := &Store{cfg: cfg}
	s.files.log = cfg.Log
	if err := s.files.open(cfg.Files); err != nil {
		return nil, err
	}
	if cfg.Local {
		s.local = newLocal(cfg.Dir)
	}
	if cfg.ACME != nil {
		var err error
		if s.acme, err = newOrders(*cfg.ACME, cfg.Dir, cfg.Log); err != nil {
			return nil, err
		}
	}
	return s, s.metrics.init(cfg.Meter, s)
}

// Run looks after the files until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(s.cfg.Poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			for _, err := range s.files.look() {
				s.metrics.reloaded(ctx, err)
			}
		}
	}
}

// TLS is what a server needs: TLS 1.2 or later, forward secrecy and authenticated encryption only, which is also what HTTP/2 demands
// (RFC 9113 9.2.2).
func (s *Store) TLS() *tls.Config {
	c := &tls.Config{
		GetCertificate: s.get,
		NextProtos:     []string{"h2", "http/1.1"},
		MinVersion:     tls.VersionTLS12,
		CipherSuites: []uint16{ // of TLS 1.2; those of 1.3 are all like this
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
	}
	if s.acme != nil {
		c.NextProtos = append(c.NextProtos, protocolACME)
	}
	return c
}

// get is the handshake's question. Neither certificate nor error is the alert unrecognized_name.
func (s *Store) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := strings.ToLower(hello.ServerName)
	if s.acme != nil && isChallenge(hello) {
		return s.acme.challenge(hello)
	}
	if c := s.files.find(name, hello); c != nil {
		return c, nil
	}
	if s.local != nil && (name == "" || isLocal(name)) {
		return s.local.get(name)
	}
	if s.acme != nil && s.acme.known(name) {
		return s.acme.get(name, hello)
	}
	return nil, nil
}

// Has says whether there is, or would be, a certificate for a host name (lower case, without a port).
func (s *Store) Has(host string) bool {
	return host != "" && (s.files.find(host, nil) != nil || s.local != nil && isLocal(host) || s.acme != nil && s.acme.known(host))
}

// Challenges answers the requests of an ACME authority (http-01) for paths below ChallengePath; 404 says that a token is not known.
// nil = ACME is not used.
func (s *Store) Challenges() http.Handler {
	if s.acme == nil {
		return nil
	}
	return s.acme.http
}

// ChallengePath is where an ACME authority looks for the answer to its challenge (RFC 8555 8.3).
const ChallengePath = "/.well-known/acme-challenge/"
