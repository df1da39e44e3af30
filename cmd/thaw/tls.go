package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/internal/certs"
	"github.com/thawrun/thaw/internal/ingress"
)

// tlsFlags are the options of commands that have an ingress.
type tlsFlags struct {
	certs, keys []string
	acme        bool
	order       certs.ACME
	options     ingress.Options
}

// add adds the flags. local is the default of --tls-local.
func (t *tlsFlags) add(cmd *cobra.Command, local bool) {
	f := cmd.Flags()
	f.StringArrayVar(&t.certs, "tls-cert", nil, "certificate with its chain (PEM) to serve TLS with; may be repeated, each with its --tls-key; read again when it changes")
	f.StringArrayVar(&t.keys, "tls-key", nil, "key (PEM) of the --tls-cert at the same place")
	f.BoolVar(&t.options.Local, "tls-local", local, "serve TLS for localhost and the names below it with a self-made authority")
	f.StringVar(&t.options.Listen, "tls-listen", "", "one more address to listen on, for the port of TLS; every address speaks both")
	f.BoolVar(&t.options.Redirect, "tls-redirect", false, "answer requests without TLS with 308, for hosts that have a certificate")
	f.BoolVar(&t.acme, "acme", false, "order certificates for the hosts that are served (ACME, http-01 and tls-alpn-01); this accepts the authority's terms")
	f.StringVar(&t.order.Email, "acme-email", "", "whom the ACME authority may tell of problems")
	f.StringVar(&t.order.Directory, "acme-directory", "", "URL of the ACME authority's directory (default Let's Encrypt)")
	f.StringVar(&t.order.CA, "acme-ca", "", "certificates (PEM) to check the ACME authority's with")
}

// read puts together what the flags said.
func (t *tlsFlags) read() (ingress.Options, error) {
	if len(t.certs) != len(t.keys) {
		return ingress.Options{}, fmt.Errorf("%d times --tls-cert and %d times --tls-key: each certificate needs its key", len(t.certs), len(t.keys))
	}
	o := t.options
	for i := range t.certs {
		o.Files = append(o.Files, certs.File{Cert: t.certs[i], Key: t.keys[i]})
	}
	if t.acme {
		o.ACME = &t.order
	}
	return o, nil
}
