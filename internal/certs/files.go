package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// maxFile bounds a certificate or key file, in bytes.
const maxFile = 1 << 20

// files are certificates that are read from files.
type files struct {
	log  *slog.Logger
	list []*file // static after open
	view atomic.Pointer[view]
}

// file is one certificate. Apart from File, all is owned by look.
type file struct {
	File
	cert, key []byte // as read last, good or not
	good      *tls.Certificate
}

// view is an immutable picture for handshakes.
type view struct {
	names map[string][]*tls.Certificate // by name, or wildcard as it stands
	first *tls.Certificate
	ends  map[string]time.Time // by file
}

// open reads all files for the first time.
func (f *files) open(list []File) error {
	var errs []error
	for _, l := range list {
		one := &file{File: l}
		if _, err := one.read(); err != nil {
			errs = append(errs, err)
		} else if time.Now().After(one.good.Leaf.NotAfter) {
			// Refusing to start would take down what is served without TLS, or under other names.
			f.log.Warn("certificate has expired: clients will refuse it", "file", one.Cert, "expired", one.good.Leaf.NotAfter)
		}
		f.list = append(f.list, one)
	}
	f.publish()
	return errors.Join(errs...)
}

// look reads again what has changed. It returns one result for each file that has: nil, or why the old certificate is kept.
func (f *files) look() (results []error) {
	for _, one := range f.list {
		old := one.good
		changed, err := one.read()
		if !changed {
			continue
		}
		if now := time.Now(); err == nil && now.After(one.good.Leaf.NotAfter) && now.Before(old.Leaf.NotAfter) {
			err = fmt.Errorf("certificate %s: it has expired on %v, and the one before has not", one.Cert, one.good.Leaf.NotAfter)
			one.good = old
		}
		results = append(results, err)
		if err != nil {
			f.log.Warn("changed certificate is not taken, the one before is kept", "file", one.Cert, "error", err)
			continue
		}
		f.log.Info("certificate taken from changed files", "file", one.Cert, "names", namesOf(one.good.Leaf), "expires", one.good.Leaf.NotAfter)
		f.publish()
	}
	return results
}

// publish makes the next view. Connections that are there keep what they have.
func (f *files) publish() {
	v := &view{names: make(map[string][]*tls.Certificate), ends: make(map[string]time.Time)}
	for _, one := range f.list {
		if one.good == nil {
			continue
		}
		if v.first == nil {
			v.first = one.good
		}
		v.ends[one.Cert] = one.good.Leaf.NotAfter
		for _, name := range namesOf(one.good.Leaf) {
			v.names[name] = append(v.names[name], one.good)
		}
	}
	f.view.Store(v)
}

// find returns the certificate for a name; without a name, the first one. Of several the first that the client understands is taken; hello may be nil.
func (f *files) find(name string, hello *tls.ClientHelloInfo) *tls.Certificate {
	v := f.view.Load()
	if name == "" {
		return v.first
	}
	list := v.names[name]
	if len(list) == 0 {
		if _, rest, ok := strings.Cut(name, "."); ok {
			list = v.names["*."+rest]
		}
	}
	if len(list) == 0 {
		return nil
	}
	if hello != nil && len(list) > 1 {
		for _, c := range list {
			if hello.SupportsCertificate(c) == nil {
				return c
			}
		}
	}
	return list[0]
}

// expiries are when the certificates end, by file.
func (f *files) expiries() map[string]time.Time { return f.view.Load().ends }

func namesOf(c *x509.Certificate) []string {
	var names []string
	for _, n := range c.DNSNames {
		names = append(names, strings.ToLower(n))
	}
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return names
}

// read looks at the files' bytes, which unlike times and sizes cannot deceive. Without a change, or after an error, good stays.
func (f *file) read() (changed bool, err error) {
	cert, errCert := readBounded(f.Cert)
	key, errKey := readBounded(f.Key)
	if f.good != nil && bytes.Equal(cert, f.cert) && bytes.Equal(key, f.key) {
		return false, nil
	}
	f.cert, f.key = cert, key // so that the same fault is reported once
	switch {
	case errCert != nil:
		return true, fmt.Errorf("certificate: %w", errCert)
	case errKey != nil:
		return true, fmt.Errorf("key: %w", errKey)
	}
	c, err := parse(cert, key)
	if err != nil {
		return true, fmt.Errorf("certificate %s with key %s: %w", f.Cert, f.Key, err)
	}
	f.good = c
	return true, nil
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		return nil, fmt.Errorf("%s is larger than 1 MiB: it is not a PEM file of certificates or of a key", name)
	}
	return b, err
}

// parse puts a certificate and its key together, and says in words what is wrong with them.
func parse(cert, key []byte) (*tls.Certificate, error) {
	if err := wants(cert, "CERTIFICATE", "the first file", "a certificate"); err != nil {
		return nil, err
	}
	if err := wants(key, "PRIVATE KEY", "the second file", "a key"); err != nil {
		return nil, err
	}
	c, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	if c.Leaf == nil {
		if c.Leaf, err = x509.ParseCertificate(c.Certificate[0]); err != nil {
			return nil, err
		}
	}
	if len(namesOf(c.Leaf)) == 0 {
		return nil, errors.New("the certificate names no host: clients look at subjectAltName only, have one made with it")
	}
	if c.Leaf.NotBefore.After(time.Now().Add(24 * time.Hour)) {
		return nil, fmt.Errorf("the certificate is not valid before %v", c.Leaf.NotBefore)
	}
	return &c, nil
}

// wants says whether there is a PEM block whose type ends in kind.
func wants(b []byte, kind, which, what string) error {
	found := "nothing in PEM form"
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return fmt.Errorf("%s has %s, want %s", which, found, what)
		}
		switch {
		case strings.HasPrefix(block.Type, "ENCRYPTED"), strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED"):
			return errors.New("the key is encrypted, and nobody is there to ask for its password: decrypt it (openssl pkey -in KEY -out PLAIN)")
		case strings.HasSuffix(block.Type, kind):
			return nil
		}
		found = "only " + block.Type
	}
}
