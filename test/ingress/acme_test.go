package ingress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const pebbleModule = "github.com/letsencrypt/pebble/v2/cmd/"

// authority is a running Pebble: an ACME authority as Let's Encrypt's, small and forgetful.
type authority struct {
	directory string
	ca        string // file: what its own TLS is trusted by
	roots     *x509.CertPool
	stop      func()
}

// newAuthority starts one that looks for challenges at the given ports of this machine, whatever the name.
func newAuthority(t *testing.T, httpPort, tlsPort string) *authority {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", pebbleModule+"pebble", pebbleModule+"pebble-challtestsrv")
	build.Dir = "tool"
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		if strings.Contains(string(out), "dial tcp") || strings.Contains(string(out), "module lookup disabled") {
			t.Skipf("Pebble cannot be built here, its module cannot be fetched:\n%s", out)
		}
		t.Fatalf("Pebble: %v\n%s", err, out)
	}
	dns, api, management := freeAddr(t), freeAddr(t), freeAddr(t)
	id := newIdentity(t, dir, "localhost")
	config, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress": api, "managementListenAddress": management, "certificate": id.cert, "privateKey": id.key,
		"httpPort": json.Number(httpPort), "tlsPort": json.Number(tlsPort),
		"profiles": map[string]any{"default": map[string]any{"description": "default", "validityPeriod": 7776000}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "pebble.json")
	replace(t, file, config)
	run(t, filepath.Join(dir, "pebble-challtestsrv"), "-dnsserver", dns, "-management", freeAddr(t), "-defaultIPv4", "127.0.0.1", "-defaultIPv6", "", "-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", "")
	a := &authority{directory: "https://" + api + "/dir", ca: id.cert, roots: x509.NewCertPool()}
	a.stop = run(t, filepath.Join(dir, "pebble"), "-config", file, "-dnsserver", dns)
	cl := &http.Client{Transport: &http.Transport{TLSClientConfig: id.trust()}, Timeout: limit}
	eventually(t, "Pebble's root", func() bool {
		resp, err := cl.Get("https://" + management + "/roots/0")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return a.roots.AppendCertsFromPEM(b)
	})
	return a
}

// run starts a program for the time of the test.
func run(t *testing.T, name string, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1")
	out := &lockedBuilder{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	stop = func() { cmd.Process.Signal(syscall.SIGKILL); <-done }
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("%s:\n%s", filepath.Base(name), out.String())
		}
	})
	return stop
}

// shake connects for a name and returns the certificate that was shown, if it is trusted.
func shake(addr, name string, roots *x509.CertPool) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{ServerName: name, RootCAs: roots}}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// Certificates are ordered for hosts that are served, by both kinds of challenge over the one port, kept over a restart, and for nobody else.
func TestACME(t *testing.T) {
	fn := upstream(t)
	for _, challenge := range []string{"tls-alpn-01", "http-01"} {
		t.Run(challenge, func(t *testing.T) {
			t.Parallel()
			addr := freeAddr(t)
			_, port, _ := net.SplitHostPort(addr)
			tlsPort := port
			if challenge == "http-01" {
				_, tlsPort, _ = net.SplitHostPort(freeAddr(t)) // nobody answers there: the other kind has to do
			}
			a := newAuthority(t, port, tlsPort)
			args := []string{"--listen", addr, "--static", "a.example=" + fn, "--static", "*=" + fn, "--tls-dir", t.TempDir(), "--tls-redirect",
				"--acme", "--acme-directory", a.directory, "--acme-ca", a.ca, "--acme-email", "ops@a.example"}
			r := start(t, args...)
			begin := time.Now()
			first, err := shake(addr, "a.example", a.roots)
			if err != nil {
				t.Fatalf("%v\n%s", err, r.log.String())
			}
			t.Logf("ordered in %v", time.Since(begin))
			for _, name := range []string{"b.example", "x.a.example", "localhost"} {
				if _, err := shake(addr, name, a.roots); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
					t.Errorf("%s, which nobody named: %v", name, err)
				}
			}
			// Neither the answer to a challenge nor a probe is redirected; a function may have challenges of its own.
			for path, want := range map[string]int{"/": 308, "/healthz": 200, "/.well-known/acme-challenge/mine": 200} {
				if code, _ := plain(t, addr, "a.example", path); code != want {
					t.Errorf("%s: %d, want %d", path, code, want)
				}
			}
			a.stop()
			r.cmd.Process.Signal(syscall.SIGTERM)
			if code := r.ended(limit); code != 0 {
				t.Fatalf("ended with %d", code)
			}
			start(t, args...)
			again, err := shake(addr, "a.example", a.roots)
			if err != nil || !again.Equal(first) {
				t.Errorf("after a restart, without the authority: %v", err)
			}
		})
	}
}

// When the authority cannot be reached, handshakes fail, plain requests are served, and the log says so once.
func TestACMEAway(t *testing.T) {
	r := start(t, "--listen", "127.0.0.1:0", "--static", "a.example="+upstream(t), "--tls-dir", t.TempDir(), "--acme", "--acme-directory", "https://"+freeAddr(t)+"/dir")
	for range 5 {
		if _, err := shake(r.addr, "a.example", nil); err == nil || !strings.Contains(err.Error(), "internal error") {
			t.Error(err)
		}
	}
	if code, _ := plain(t, r.addr, "a.example", "/"); code != 200 {
		t.Errorf("plain: %d", code)
	}
	if n := strings.Count(r.log.String(), "no certificate could be ordered"); n != 1 {
		t.Errorf("%d lines in the log, want 1", n)
	}
}

// plain asks without TLS and does not follow.
func plain(t *testing.T, addr, host, path string) (code int, location string) {
	t.Helper()
	req, err := http.NewRequest("GET", "http://"+addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		t.Error(fmt.Errorf("%s: %w", path, err))
		return 0, ""
	}
	resp.Body.Close()
	return resp.StatusCode, resp.Header.Get("Location")
}
