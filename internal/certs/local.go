package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

const (
	localDomain   = "localhost"
	localAge      = 10 * 365 * 24 * time.Hour // of the authority
	localLeafAge  = 30 * 24 * time.Hour
	localNames    = 1024 // whose certificates are kept in memory
	authorityFile = "localhost-ca.pem"
)

// LocalCA is the file below Config.Dir with the certificate of the self-made authority, for clients to trust.
const LocalCA = "localhost-ca.crt"

func isLocal(name string) bool {
	return name == localDomain || strings.HasSuffix(name, "."+localDomain)
}

// local issues certificates for localhost and the names below it. Its authority is bound to these names, so that whoever trusts it trusts
// it with nothing else.
type local struct {
	dir string

	mu     sync.Mutex // guards what follows
	ca     *tls.Certificate
	key    *ecdsa.PrivateKey // of all leaves
	leaves *lru.Cache[string, *tls.Certificate]
}

func newLocal(dir string) *local {
	leaves, err := lru.New[string, *tls.Certificate](localNames)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &local{dir: dir, leaves: leaves}
}

// get returns a certificate for a name for which isLocal is true; "" is localhost itself.
func (l *local) get(name string) (*tls.Certificate, error) {
	if name == "" {
		name = localDomain
	}
	if len(name) > 253 {
		return nil, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if c, ok := l.leaves.Get(name); ok && now.Before(c.Leaf.NotAfter.Add(-localLeafAge/3)) {
		return c, nil
	}
	if err := l.loadLocked(now); err != nil {
		return nil, fmt.Errorf("certificate for %s: %w", name, err)
	}
	c, err := l.issueLocked(name, now)
	if err != nil {
		return nil, err
	}
	l.leaves.Add(name, c)
	return c, nil
}

// loadLocked reads the authority, or makes it.
func (l *local) loadLocked(now time.Time) (err error) {
	if l.key == nil {
		if l.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return err
		}
	}
	if l.ca != nil && now.Before(l.ca.Leaf.NotAfter) {
		return nil
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(l.dir, authorityFile)
	b, err := readBounded(path)
	if errors.Is(err, fs.ErrNotExist) {
		if b, err = makeAuthority(now); err == nil {
			b, err = publish(path, b)
		}
	}
	if err != nil {
		return err
	}
	c, err := tls.X509KeyPair(b, b)
	if err == nil && c.Leaf == nil {
		c.Leaf, err = x509.ParseCertificate(c.Certificate[0])
	}
	if err == nil && (!c.Leaf.IsCA || now.After(c.Leaf.NotAfter)) {
		err = errors.New("it is no authority, or has expired")
	}
	if err != nil {
		return fmt.Errorf("%s: %w; remove the file to have a new authority made", path, err)
	}
	// For people; written each time, since it may have been removed.
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
	if err := os.WriteFile(filepath.Join(l.dir, LocalCA), public, 0o644); err != nil {
		return err
	}
	l.ca = &c
	l.leaves.Purge()
	return nil
}

// publish puts a new file at path in one step, or returns what another process put there first.
func publish(path string, b []byte) ([]byte, error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*") // readable by its owner only
	if err != nil {
		return nil, err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return nil, err
	}
	if err = os.Link(tmp.Name(), path); errors.Is(err, fs.ErrExist) {
		return readBounded(path)
	}
	return b, err
}

// makeAuthority makes a certificate and a key, in PEM.
func makeAuthority(now time.Time) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	host, _ := os.Hostname()
	t := template(now, localAge)
	t.Subject = pkix.Name{Organization: []string{"Thaw"}, CommonName: "Thaw on " + host + ", for localhost"}
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign
	t.PermittedDNSDomainsCritical, t.PermittedDNSDomains = true, []string{localDomain}
	t.PermittedIPRanges = []*net.IPNet{{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}, {IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)}}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})...), nil
}

func (l *local) issueLocked(name string, now time.Time) (*tls.Certificate, error) {
	t := template(now, localLeafAge)
	t.DNSNames = []string{name}
	if name == localDomain {
		t.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	}
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, t, l.ca.Leaf, &l.key.PublicKey, l.ca.PrivateKey)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	return &tls.Certificate{Certificate: [][]byte{der, l.ca.Certificate[0]}, PrivateKey: l.key, Leaf: leaf}, err
}

func template(now time.Time, age time.Duration) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	return &x509.Certificate{SerialNumber: serial, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(age)} // an hour for clocks that differ
}
