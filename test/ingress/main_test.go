// Package ingress holds the real `thaw router` to what it promises at a public address: TLS and plain on one port, certificates that change,
// an end without losses, and a restart that no client notices.
package ingress

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/harness"
)

var bin string

func TestMain(m *testing.M) { os.Exit(harness.Main(m, &bin, "cmd/thaw")) }

// limit bounds everything that a test waits for.
const limit = 20 * time.Second

// router is a running `thaw router`.
type router struct {
	addr string
	cmd  *exec.Cmd
	log  *lockedBuilder
	done chan struct{} // closed when it has ended
}

type lockedBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuilder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuilder) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// launch starts a router, which may fail; it is gone when the test ends.
func launch(t *testing.T, args ...string) (*router, string) {
	t.Helper()
	r := &router{cmd: exec.Command(filepath.Join(bin, "thaw"), append([]string{"router"}, args...)...), log: &lockedBuilder{}, done: make(chan struct{})}
	r.cmd.Stderr = r.log
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	go func() { r.cmd.Wait(); close(r.done) }()
	t.Cleanup(func() {
		r.cmd.Process.Signal(syscall.SIGKILL)
		<-r.done
		if t.Failed() && r.log.String() != "" {
			t.Logf("router %d:\n%s", r.cmd.Process.Pid, r.log.String())
		}
	})
	return r, line
}

var listens = regexp.MustCompile(` listen=(\S+)`)

// start starts a router that must come up.
func start(t *testing.T, args ...string) *router {
	t.Helper()
	r, line := launch(t, args...)
	m := listens.FindStringSubmatch(line)
	if m == nil {
		t.Fatalf("router %v: first line %q\n%s", args, line, r.log.String())
	}
	r.addr = m[1]
	return r
}

// ended waits for the end and returns the exit code; -1 = it did not end.
func (r *router) ended(within time.Duration) int {
	select {
	case <-r.done:
		return r.cmd.ProcessState.ExitCode()
	case <-time.After(within):
		return -1
	}
}

// eventually waits until cond is true.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// identity is a self-signed certificate in files.
type identity struct {
	cert, key string
	leaf      *x509.Certificate
}

func newIdentity(t *testing.T, dir string, names ...string) *identity {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: names, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	id := &identity{cert: filepath.Join(dir, "tls.crt"), key: filepath.Join(dir, "tls.key")}
	if id.leaf, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	replace(t, id.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	replace(t, id.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))
	return id
}

// replace writes a file the way tools for certificates do: aside, then by a rename.
func replace(t *testing.T, file string, b []byte) {
	t.Helper()
	if err := os.WriteFile(file+".new", b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

// trust is a client's configuration that trusts id.
func (id *identity) trust(protocols ...string) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(id.leaf)
	return &tls.Config{RootCAs: roots, ServerName: id.leaf.DNSNames[0], NextProtos: protocols}
}

// h2only is a transport for HTTP/2, over TLS or with prior knowledge.
func h2only(c *tls.Config) *http.Transport {
	var p http.Protocols
	p.SetHTTP2(true)
	p.SetUnencryptedHTTP2(true)
	return &http.Transport{TLSClientConfig: c, Protocols: &p}
}

func pool(t *testing.T, pem []byte) *x509.CertPool {
	t.Helper()
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(pem) {
		t.Fatalf("no certificate in %q", pem)
	}
	return p
}
