package ingress

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thawrun/thaw/test/harness"
)

// One port for plain HTTP, TLS, HTTP/1.1 and HTTP/2; a second one when it is asked for.
func TestProtocols(t *testing.T) {
	id := newIdentity(t, t.TempDir(), "x")
	second := freeAddr(t)
	r := start(t, "--listen", "127.0.0.1:0", "--tls-listen", second, "--static", "*="+upstream(t), "--tls-cert", id.cert, "--tls-key", id.key)
	for _, addr := range []string{r.addr, second} {
		for name, c := range map[string]struct {
			scheme string
			tr     *http.Transport
			proto  string
		}{
			"plain": {"http", &http.Transport{}, "HTTP/1.1"}, "h2c": {"http", h2only(nil), "HTTP/2.0"},
			"TLS": {"https", &http.Transport{TLSClientConfig: id.trust()}, "HTTP/1.1"}, "h2": {"https", h2only(id.trust()), "HTTP/2.0"},
		} {
			resp, err := (&http.Client{Transport: c.tr, Timeout: limit}).Post(c.scheme+"://"+addr+"/", "text/plain", strings.NewReader("hello"))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if string(b) != "hello" || resp.Proto != c.proto {
				t.Errorf("%s: %q over %s", name, b, resp.Proto)
			}
			c.tr.CloseIdleConnections()
		}
	}
}

// Certificates change under load: new connections see the new one, open ones go on, and a bad one changes nothing.
func TestCertificateChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	id := newIdentity(t, dir, "x")
	metrics := freeAddr(t)
	r := start(t, "--listen", "127.0.0.1:0", "--static", "*="+upstream(t), "--tls-cert", id.cert, "--tls-key", id.key, "--metrics", metrics)
	open, err := tls.Dial("tcp", r.addr, id.trust())
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	br := bufio.NewReader(open)
	ask := func() {
		t.Helper()
		if again, err := exchange(open, br, "/"); err != nil || !again {
			t.Fatalf("the connection that was open: %v", err)
		}
	}
	shown := func() string {
		c, err := tls.Dial("tcp", r.addr, &tls.Config{InsecureSkipVerify: true, ServerName: "x"})
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	ask()
	next := newIdentity(t, dir, "x")
	eventually(t, "the new certificate", func() bool { ask(); return shown() == next.leaf.SerialNumber.String() })
	replace(t, id.cert, []byte("damaged"))
	count := func() string {
		resp, err := http.Get("http://" + metrics + "/metrics")
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b)
	}
	eventually(t, "the bad one in the metrics", func() bool {
		ask()
		return strings.Contains(count(), `thaw_tls_certificate_reloads_total{result="failed"} 1`)
	})
	if got := shown(); got != next.leaf.SerialNumber.String() {
		t.Errorf("after a bad certificate: %s", got)
	}
	if all := count(); !strings.Contains(all, `thaw_tls_certificate_reloads_total{result="ok"}`) || !strings.Contains(all, `thaw_tls_handshakes_total{result="ok"}`) {
		t.Error("not counted")
	}
	if n := strings.Count(r.log.String(), "not taken"); n < 1 || n > 2 { // a look may have fallen between certificate and key
		t.Errorf("%d lines in the log:\n%s", n, r.log.String())
	}
}

// The self-made authority of localhost.
func TestLocal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	r := start(t, "--listen", "127.0.0.1:0", "--static", "*="+upstream(t), "--tls-local", "--tls-dir", dir, "--tls-redirect")
	if _, err := tls.Dial("tcp", r.addr, &tls.Config{ServerName: "hello.default.localhost"}); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("without trust: %v", err)
	}
	trust, err := os.ReadFile(filepath.Join(dir, "localhost-ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"localhost", "hello.default.localhost"} {
		if _, err := shake(r.addr, name, pool(t, trust)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, port, _ := net.SplitHostPort(r.addr)
	if code, to := plain(t, r.addr, "hello.default.localhost:"+port, "/p?q"); code != 308 || to != "https://hello.default.localhost:"+port+"/p?q" {
		t.Errorf("%d to %q", code, to)
	}
}

// What is wrong with options is said in one line, before anything is served.
func TestBadOptions(t *testing.T) {
	dir := t.TempDir()
	id := newIdentity(t, dir, "x")
	file := filepath.Join(dir, "file")
	replace(t, file, []byte("x"))
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--tls-cert", id.cert}, "each certificate needs its key"},
		{[]string{"--tls-cert", id.key, "--tls-key", id.cert}, "want a certificate"},
		{[]string{"--tls-cert", dir + "/none", "--tls-key", id.key}, "no such file"},
		{[]string{"--tls-local"}, "--tls-dir"},
		{[]string{"--acme", "--tls-dir", dir, "--acme-ca", id.key}, "no certificate in PEM form"},
		{[]string{"--tls-redirect"}, "--tls-cert"},
		{[]string{"--tls-listen", "127.0.0.1:0"}, "--tls-cert"},
		{[]string{"--handover", file}, "no socket"},
		{[]string{"--handover", filepath.Join(dir, strings.Repeat("x", 120))}, "invalid argument"},
		{[]string{"--metrics", "0.0.0.0:0"}, "--allow-remote"},
	} {
		r, line := launch(t, append([]string{"--listen", "127.0.0.1:0", "--static", "*=127.0.0.1:1"}, c.args...)...)
		if code := r.ended(limit); code <= 0 || line != "" || !strings.Contains(r.log.String(), c.says) {
			t.Errorf("%v: %d, %q, %q, want %q", c.args, code, line, r.log.String(), c.says)
		}
	}
}

// thaw dev serves TLS for localhost without being asked to.
func TestDev(t *testing.T) {
	th := harness.Start(t, bin)
	_, _ = shake(th.Ingress, "localhost", nil) // makes the authority
	trust, err := os.ReadFile(filepath.Join(th.Dir, "tls", "localhost-ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	cl := &http.Client{Timeout: limit, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool(t, trust), ServerName: "none.default.localhost"}, ForceAttemptHTTP2: true}}
	req, err := http.NewRequest("GET", "https://"+th.Ingress+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "none.default.localhost"
	resp, err := cl.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 404 || resp.Header.Get("X-Thaw-Error") != "no_service" || resp.ProtoMajor != 2 {
		t.Errorf("%v", resp)
	}
}
