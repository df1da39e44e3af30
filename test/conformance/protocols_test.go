package conformance

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/protocols"
)

// kind is a function together with the protocol in which every hop of a chain is told to speak to the next.
type kind struct {
	name, upstream string
	serve          func(ln net.Listener) (stop func())
	cases          []protocols.Case
}

func serveHTTP(ln net.Listener) func() {
	s := protocols.Server(protocols.HTTP())
	go s.Serve(ln)
	return func() { s.Close() }
}

func serveGRPC(ln net.Listener) func() {
	s := protocols.GRPC()
	go s.Serve(ln)
	return s.Stop
}

var kinds = []kind{
	{"http1", "h1", serveHTTP, protocols.HTTPCases},
	{"http2", "h2c", serveHTTP, protocols.HTTPCases},
	{"grpc", "h2c", serveGRPC, protocols.GRPCCases},
}

// chains are the orders in which hops are used; held says whether one can keep a request waiting.
var chains = []struct {
	name string
	held bool
	hops func(t *testing.T, addr, protocol string, slots string) string
}{
	{"router", false, func(t *testing.T, addr, protocol, _ string) string {
		return hop(t, "thaw", "router", "--listen", "127.0.0.1:0", "--static", "*="+addr, "--upstream-protocol", protocol)
	}},
	{"queueproxy", true, func(t *testing.T, addr, protocol, slots string) string {
		return hop(t, "queueproxy", "--listen", "127.0.0.1:0", "--upstream", addr, "--upstream-protocol", protocol, "--concurrency", slots)
	}},
	{"router+queueproxy", true, func(t *testing.T, addr, protocol, slots string) string {
		addr = hop(t, "queueproxy", "--listen", "127.0.0.1:0", "--upstream", addr, "--upstream-protocol", protocol, "--concurrency", slots)
		return hop(t, "thaw", "router", "--listen", "127.0.0.1:0", "--static", "*="+addr, "--upstream-protocol", protocol)
	}},
	{"tls+router+queueproxy", true, func(t *testing.T, addr, protocol, slots string) string {
		addr = hop(t, "queueproxy", "--listen", "127.0.0.1:0", "--upstream", addr, "--upstream-protocol", protocol, "--concurrency", slots)
		cert, key := certificate(t)
		return hop(t, "thaw", "router", "--listen", "127.0.0.1:0", "--static", "*="+addr, "--upstream-protocol", protocol, "--tls-cert", cert, "--tls-key", key)
	}},
	{"router+activator+queueproxy", true, func(t *testing.T, addr, protocol, slots string) string {
		addr = hop(t, "queueproxy", "--listen", "127.0.0.1:0", "--upstream", addr, "--upstream-protocol", protocol, "--concurrency", "0")
		addr = hop(t, "thaw", "activator", "--listen", "127.0.0.1:0", "--static", "*="+addr, "--upstream-protocol", protocol, "--concurrency", slots)
		return hop(t, "thaw", "router", "--listen", "127.0.0.1:0", "--static", "*="+addr, "--upstream-protocol", protocol)
	}},
}

// TestProtocols sends gRPC, WebSocket, server-sent events and what else rides on HTTP by their own libraries through every chain: warm, and with the
// only slot taken when the request comes.
func TestProtocols(t *testing.T) {
	t.Parallel()
	for _, k := range kinds {
		for _, c := range chains {
			for _, held := range []bool{false, true} {
				if held && !c.held {
					continue
				}
				slots, state := "0", "warm"
				if held {
					slots, state = "1", "held"
				}
				t.Run(k.name+"/"+c.name+"/"+state, func(t *testing.T) {
					t.Parallel()
					ln, err := net.Listen("tcp", "127.0.0.1:0")
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(k.serve(ln))
					addr := c.hops(t, ln.Addr().String(), k.upstream, slots)
					for _, http2 := range []bool{false, true} {
						if k.name == "grpc" && !http2 {
							continue
						}
						target := protocols.Target{Addr: addr, Host: "conformance.example", HTTP2: http2}
						if strings.HasPrefix(c.name, "tls") {
							target.TLS = &tls.Config{InsecureSkipVerify: true} // whose certificate it is, test/ingress looks at
						}
						runProtocols(t, k, target, held)
					}
				})
			}
		}
	}
}

// certificate makes one, for the host that all cases ask for.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"conformance.example"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, b []byte) string {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", secret)
}

func runProtocols(t *testing.T, k kind, target protocols.Target, held bool) {
	client := "h1"
	if target.HTTP2 {
		client = "h2"
	}
	for _, c := range k.cases {
		if c.H1 && (target.HTTP2 || k.upstream == "h2c") || c.TCP && target.TLS != nil {
			continue
		}
		t.Run(client+"-"+c.Name, func(t *testing.T) {
			combinations.Add(1)
			ctx, cancel := context.WithTimeout(t.Context(), 3*limit)
			defer cancel()
			if held {
				release, err := occupySlot(ctx, k, target)
				if err != nil {
					t.Fatalf("the slot cannot be taken: %v", err)
				}
				defer time.AfterFunc(holdFor, release).Stop()
				defer release()
			}
			if err := c.Run(ctx, target); err != nil {
				t.Error(err)
			}
		})
	}
}

// occupySlot takes the only slot with a stream that lasts until release, which may be called twice.
func occupySlot(ctx context.Context, k kind, target protocols.Target) (release func(), err error) {
	if k.name == "grpc" {
		return target.Hold(ctx)
	}
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	r, w := io.Pipe()
	req, err := http.NewRequestWithContext(ctx, "POST", "http://"+target.Addr+"/duplex", r)
	if err != nil {
		return nil, err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != 200 {
		return nil, errors.New(resp.Status)
	}
	return sync.OnceFunc(func() {
		w.Close()
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		tr.CloseIdleConnections()
	}), nil
}
