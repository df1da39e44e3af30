package certs

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pair makes a self-signed certificate and its key in PEM; alter may change the certificate.
func pair(t testing.TB, alter func(*x509.Certificate), names ...string) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: names}
	if alter != nil {
		alter(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

// write puts a pair into files below dir.
func write(t testing.TB, dir, name string, cert, key []byte) File {
	t.Helper()
	f := File{Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
	for file, b := range map[string][]byte{f.Cert: cert, f.Key: key} {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// handshake shakes hands in memory and returns the leaf that the client saw.
func handshake(s *Store, client *tls.Config) (*x509.Certificate, error) {
	client = client.Clone()
	if client.RootCAs == nil {
		client.InsecureSkipVerify = true
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	server := make(chan error, 1)
	go func() { server <- tls.Server(a, s.TLS()).HandshakeContext(ctx) }()
	c := tls.Client(b, client)
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return c.ConnectionState().PeerCertificates[0], <-server
}

func TestChoice(t *testing.T) {
	dir := t.TempDir()
	var list []File
	for name, hosts := range map[string][]string{"a": {"a.example", "Upper.Example"}, "wild": {"*.w.example"}, "b": {"b.example", "b.w.example"}} {
		cert, key := pair(t, nil, hosts...)
		if name == "a" {
			list = append([]File{write(t, dir, name, cert, key)}, list...)
			continue
		}
		list = append(list, write(t, dir, name, cert, key))
	}
	s, err := New(Config{Files: list, Local: true, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for asked, want := range map[string]string{
		"a.example": "a.example", "A.EXAMPLE": "a.example", "upper.example": "a.example", "b.example": "b.example", "b.w.example": "b.example",
		"x.w.example": "*.w.example", "x.y.w.example": "", "w.example": "", "other.example": "", "": "a.example",
		"localhost": "localhost", "hello.default.localhost": "hello.default.localhost", "notlocalhost": "",
	} {
		leaf, err := handshake(s, &tls.Config{ServerName: asked})
		switch {
		case want == "":
			if err == nil || !strings.Contains(err.Error(), "unrecognized name") {
				t.Errorf("%q: %v, %v", asked, leaf, err)
			}
		case err != nil || leaf.DNSNames[0] != want:
			t.Errorf("%q: %v, want %q", asked, err, want)
		}
		if has := s.Has(strings.ToLower(asked)); has != (want != "" && asked != "") {
			t.Errorf("Has(%q) = %v", asked, has)
		}
	}
}

// A name with certificates of two kinds gets the one that the client understands.
func TestTwoKinds(t *testing.T) {
	dir := t.TempDir()
	cert, key := pair(t, nil, "a.example")
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"a.example"}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Files: []File{write(t, dir, "ec", cert, key), write(t, dir, "rsa", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)}))}})
	if err != nil {
		t.Fatal(err)
	}
	for suite, want := range map[uint16]x509.PublicKeyAlgorithm{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256: x509.RSA, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256: x509.ECDSA} {
		leaf, err := handshake(s, &tls.Config{ServerName: "a.example", MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{suite}})
		if err != nil || leaf.PublicKeyAlgorithm != want {
			t.Errorf("%s: %v", tls.CipherSuiteName(suite), err)
		}
	}
}

// Old versions, and ciphers without forward secrecy or authenticated encryption, are refused.
func TestOldClients(t *testing.T) {
	cert, key := pair(t, nil, "a.example")
	s, err := New(Config{Files: []File{write(t, t.TempDir(), "a", cert, key)}})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		config *tls.Config
		ok     bool
	}{
		"1.0":     {&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}, false},
		"1.1":     {&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
		"1.2":     {&tls.Config{MaxVersion: tls.VersionTLS12}, true},
		"1.2 CBC": {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}, false},
		"1.3":     {&tls.Config{MinVersion: tls.VersionTLS13}, true},
	} {
		c.config.ServerName = "a.example"
		if _, err := handshake(s, c.config); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What can be wrong with files, and what is said about it.
func TestBadFiles(t *testing.T) {
	cert, key := pair(t, nil, "a.example")
	_, other := pair(t, nil, "a.example")
	nameless, namelessKey := pair(t, nil)
	early, earlyKey := pair(t, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(48*time.Hour), time.Now().Add(72*time.Hour)
	}, "a.example")
	block, _ := pem.Decode(cert)
	broken := bytes.Clone(block.Bytes)
	broken[len(broken)/2] ^= 0xff
	for name, c := range map[string]struct {
		cert, key []byte
		says      string
	}{
		"key of another":    {cert, other, "does not match"},
		"exchanged":         {key, cert, "only PRIVATE KEY, want a certificate"},
		"two certificates":  {cert, cert, "only CERTIFICATE, want a key"},
		"empty":             {nil, key, "nothing in PEM form"},
		"garbage":           {[]byte("hello"), key, "nothing in PEM form"},
		"DER":               {block.Bytes, key, "nothing in PEM form"},
		"truncated":         {cert[:len(cert)/2], key, "nothing in PEM form"},
		"bad certificate":   {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: broken[:20]}), key, "x509"},
		"huge":              {bytes.Repeat([]byte("x"), maxFile+1), key, "larger than 1 MiB"},
		"no name":           {nameless, namelessKey, "subjectAltName"},
		"not yet":           {early, earlyKey, "not valid before"},
		"encrypted key":     {cert, pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")}), "decrypt it"},
		"encrypted key old": {cert, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED"}, Bytes: []byte("x")}), "decrypt it"},
	} {
		_, err := New(Config{Files: []File{write(t, t.TempDir(), "a", c.cert, c.key)}})
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "a.crt") {
			t.Errorf("%s: %v, want %q and the file", name, err, c.says)
		}
	}
	if _, err := New(Config{Files: []File{{"/nowhere/a.crt", "/nowhere/a.key"}}}); err == nil || !strings.Contains(err.Error(), "/nowhere/a.crt") {
		t.Error(err)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("no source is no error")
	}
	if _, err := New(Config{Local: true}); err == nil || !strings.Contains(err.Error(), "--tls-dir") {
		t.Error(err)
	}
}

// An expired certificate is served, for want of a better one, and reported.
func TestExpired(t *testing.T) {
	var log bytes.Buffer
	cert, key := pair(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, "a.example")
	s, err := New(Config{Files: []File{write(t, t.TempDir(), "a", cert, key)}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := handshake(s, &tls.Config{ServerName: "a.example"}); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "expired") {
		t.Errorf("log: %s", log.String())
	}
}

// lockedBuffer is for a log that is written by one goroutine and read by another.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Reset()
}

// Files that change are taken within the time of a poll, bad ones are not, and each change is reported once.
func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		cert, key := pair(t, nil, "one.example")
		f := write(t, dir, "a", cert, key)
		two, twoKey := pair(t, nil, "two.example")
		three, threeKey := pair(t, nil, "three.example")
		expired, expiredKey := pair(t, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}, "expired.example")
		log := &lockedBuffer{}
		s, err := New(Config{Files: []File{f}, Log: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.Run(ctx)
		for _, step := range []struct {
			name      string
			cert, key []byte
			has       string
			lines     int
		}{
			{"nothing", cert, key, "one.example", 0},
			{"a new one", two, twoKey, "two.example", 1},
			{"the certificate before the key", three, twoKey, "two.example", 1},
			{"then the key", three, threeKey, "three.example", 1},
			{"garbage", []byte("x"), threeKey, "three.example", 1},
			{"expired", expired, expiredKey, "three.example", 1},
			{"the same as is served", three, threeKey, "three.example", 1},
			{"a first one again", cert, key, "one.example", 1},
		} {
			log.Reset()
			write(t, dir, "a", step.cert, step.key)
			time.Sleep(7 * time.Second) // three looks, in the bubble's time
			synctest.Wait()
			for _, name := range []string{"one.example", "two.example", "three.example", "expired.example"} {
				if s.Has(name) != (name == step.has) {
					t.Errorf("%s: Has(%q) = %v", step.name, name, s.Has(name))
				}
			}
			if n := strings.Count(log.String(), "\n"); n != step.lines {
				t.Errorf("%s: %d lines, want %d:\n%s", step.name, n, step.lines, log.String())
			}
		}
		log.Reset()
		os.Remove(f.Key)
		time.Sleep(7 * time.Second)
		synctest.Wait()
		if !s.Has("one.example") || !strings.Contains(log.String(), "no such file") {
			t.Errorf("after the key was removed: %s", log.String())
		}
	})
}

// The authority for localhost is trusted with nothing else, survives a restart, and is shared by processes that start at once.
func TestLocal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "here")
	stores := make([]*Store, 4)
	errs := make(chan error, len(stores))
	for i := range stores {
		s, err := New(Config{Local: true, Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		stores[i] = s
		go func() {
			_, err := s.local.get("first.localhost")
			errs <- err
		}()
	}
	for range stores {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	trust := x509.NewCertPool()
	b, err := os.ReadFile(filepath.Join(dir, LocalCA))
	if err != nil || !trust.AppendCertsFromPEM(b) {
		t.Fatal(err)
	}
	for _, s := range stores {
		for _, name := range []string{"localhost", "hello.default.localhost", "127.0.0.1"} {
			if _, err := handshake(s, &tls.Config{ServerName: name, RootCAs: trust}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("%v", entries)
	}
	if info, _ := os.Stat(filepath.Join(dir, authorityFile)); info.Mode().Perm() != 0o600 {
		t.Errorf("the key is %v", info.Mode())
	}
	// The same authority, made to sign for another name, is not believed.
	l := stores[0].local
	l.mu.Lock()
	defer l.mu.Unlock()
	stolen, err := l.issueLocked("bank.example", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err = stolen.Leaf.Verify(x509.VerifyOptions{Roots: trust, DNSName: "bank.example"}); err == nil || !strings.Contains(err.Error(), "not permitted") {
		t.Errorf("a certificate for bank.example: %v", err)
	}
}

// A name gets a new certificate before the old one ends, and memory for names is bounded.
func TestLocalAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocal(t.TempDir())
		get := func(name string) *tls.Certificate {
			c, err := l.get(name)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		first := get("a.localhost")
		time.Sleep(19 * 24 * time.Hour)
		if get("a.localhost") != first {
			t.Error("another one long before the end")
		}
		time.Sleep(2 * 24 * time.Hour)
		if get("a.localhost") == first {
			t.Error("the same one near its end")
		}
		time.Sleep(11 * 365 * 24 * time.Hour)
		if _, err := l.get("a.localhost"); err == nil || !strings.Contains(err.Error(), "remove the file") {
			t.Errorf("after the authority's end: %v", err)
		}
	})
	l := newLocal(t.TempDir())
	for i := range localNames + 100 {
		if _, err := l.get(fmt.Sprint(i, ".localhost")); err != nil {
			t.Fatal(err)
		}
	}
	if n := l.leaves.Len(); n != localNames {
		t.Errorf("%d names kept", n)
	}
}

func TestBadAuthority(t *testing.T) {
	dir := t.TempDir()
	cert, key := pair(t, nil, "a.example")
	for _, b := range [][]byte{nil, []byte("x"), append(cert, key...)} {
		os.WriteFile(filepath.Join(dir, authorityFile), b, 0o600)
		if _, err := newLocal(dir).get("localhost"); err == nil || !strings.Contains(err.Error(), "remove the file") {
			t.Errorf("%.20q: %v", b, err)
		}
	}
}

// What parse accepts can be served; it never panics.
func FuzzParse(f *testing.F) {
	cert, key := pair(f, nil, "a.example")
	f.Add(cert, key)
	f.Add(key, cert)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), key)
	f.Fuzz(func(t *testing.T, cert, key []byte) {
		c, err := parse(cert, key)
		if err == nil && (c.Leaf == nil || c.PrivateKey == nil || len(namesOf(c.Leaf)) == 0) {
			t.Error("accepted, but of no use")
		}
	})
}

// A handshake gives up in its time when an authority does not answer; the others for the same name wait for the same order.
func TestOrderHangs(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0") // connects, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Dir: t.TempDir(), ACME: &ACME{Directory: "https://" + ln.Addr().String(), Known: func(host string) bool { return host != "other.example" }}})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 20)
	for range cap(ended) {
		go func() {
			a, b := net.Pipe()
			defer a.Close()
			defer b.Close()
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			go tls.Client(b, &tls.Config{ServerName: "a.example", InsecureSkipVerify: true}).Handshake()
			ended <- tls.Server(a, s.TLS()).HandshakeContext(ctx)
		}()
	}
	for range cap(ended) {
		select {
		case err := <-ended:
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("a handshake waits for an order without end")
		}
	}
	s.acme.mu.Lock()
	flight := s.acme.flights["a.example"]
	if len(s.acme.flights) != 1 {
		t.Errorf("%d orders, want 1", len(s.acme.flights))
	}
	s.acme.mu.Unlock()
	for _, name := range []string{"other.example", "localhost", "a.localhost"} { // never ordered
		if _, err := handshake(s, &tls.Config{ServerName: name}); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
			t.Errorf("%s: %v", name, err)
		}
	}
	ln.Close() // the order ends, with an error
	<-flight.done
	if _, err := handshake(s, &tls.Config{ServerName: "a.example"}); err == nil || !strings.Contains(err.Error(), "internal error") {
		t.Errorf("after the order failed: %v", err)
	}
}
