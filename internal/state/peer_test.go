package state

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// peer is a real etcd on a loopback port, what a user of external endpoints has.
type peer struct {
	url  string // of the relay
	dir  string
	tls  *transport.TLSInfo
	etcd *embed.Etcd
	*relay
}

// relay stands before a peer, so that its connections can be cut: an etcd that is closed with clients connected takes six seconds.
type relay struct {
	from, to string

	l  net.Listener
	wg sync.WaitGroup

	mu     sync.Mutex // guards the rest
	conns  []net.Conn
	closed bool
}

// open accepts connections until cut; from the first time on at the same address.
func (r *relay) open(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", r.from)
	if err != nil {
		t.Fatal(err)
	}
	r.l, r.from, r.closed, r.conns = l, l.Addr().String(), false, nil // nobody else is there yet
	r.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", r.to)
			if err != nil {
				_ = in.Close()
				continue
			}
			r.mu.Lock()
			r.conns = append(r.conns, in, out)
			closed := r.closed
			r.mu.Unlock()
			if closed { // cut has not seen these two
				_, _ = in.Close(), out.Close()
				return
			}
			for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
				r.wg.Go(func() {
					_, _ = io.Copy(way[0], way[1])
					_, _ = in.Close(), out.Close()
				})
			}
		}
	})
}

func (r *relay) cut() {
	_ = r.l.Close()
	r.mu.Lock()
	r.closed = true
	for _, c := range r.conns {
		_ = c.Close()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

// stop ends the server, start begins it again with its data at the same address.
func (p *peer) stop() {
	if p.etcd != nil {
		p.cut()
		p.etcd.Close()
		p.etcd = nil
	}
}

func startPeer(t *testing.T, p *peer) *peer {
	t.Helper()
	p.dir = t.TempDir()
	p.relay = &relay{from: "127.0.0.1:0"}
	p.start(t)
	t.Cleanup(p.stop)
	return p
}

func (p *peer) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // etcd wants to know its port before
	if err != nil {
		t.Fatal(err)
	}
	p.to = l.Addr().String()
	_ = l.Close()
	scheme := "http"
	if p.tls != nil {
		scheme = "https"
	}
	u := &url.URL{Scheme: scheme, Host: p.to}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = "peer", p.dir
	member, _ := url.Parse(memberURL)
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, []url.URL{*u}
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = []url.URL{*member}, []url.URL{*u}
	cfg.InitialCluster = "peer=" + memberURL
	cfg.TickMs, cfg.ElectionMs = tickMs, electionMs
	cfg.UnsafeNoFsync = true
	cfg.BcryptCost = 4 // the least there is
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	if p.tls != nil {
		cfg.ClientTLSInfo = *p.tls
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(limit):
		t.Fatal("etcd is not ready")
	}
	p.etcd = e
	p.open(t)
	p.url = scheme + "://" + p.from
}

// etcd goes away and comes back: operations fail within their time, the watch goes on where it was, the session too.
func TestExternalOutage(t *testing.T) {
	t.Parallel()
	srv := startPeer(t, &peer{})
	s, err := Open(t.Context(), Config{Endpoints: []string{srv.url}, OpTimeout: time.Second, Progress: testProgress})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	events, reason := s.Watch(t.Context(), "/a/", 0)
	e, err := s.Session(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	put(t, e, "/session", "x", 0)
	r1 := put(t, s, "/a/k", "1", 0)
	if got := next(t, events); got.Revision != r1 {
		t.Errorf("got %+v", got)
	}
	srv.stop()

	began := time.Now()
	_, err = s.Get(t.Context(), "/a/k")
	want(t, "get", err, ErrUnavailable)
	_, err = s.Put(t.Context(), "/a/k", nil, Any)
	want(t, "put", err, ErrUnavailable)
	w, why := s.Watch(t.Context(), "/a/", 0)
	ended(t, w)
	want(t, "watch", why(), ErrUnavailable)
	_, err = s.Session(t.Context(), time.Minute)
	want(t, "session", err, ErrUnavailable)
	if d := time.Since(began); d > 8*time.Second {
		t.Errorf("four operations of at most a second took %s", d)
	}
	_, err = Open(t.Context(), Config{Endpoints: []string{srv.url}, DialTimeout: 500 * time.Millisecond})
	want(t, "open", err, ErrUnavailable)

	srv.start(t)
	var r2 int64
	eventually(t, "writes pass again", func() bool {
		r2, err = s.Put(t.Context(), "/a/k", []byte("2"), r1)
		return err == nil
	})
	if got := next(t, events); got.Revision != r2 || string(got.Value) != "2" {
		t.Errorf("got %+v, want revision %d; the watch: %v", got, r2, reason())
	}
	select {
	case <-e.Done():
		t.Error("the session is over")
	default:
	}
	put(t, e, "/session", "y", Any)
}

// A lease that the server has given up ends the session, though nobody closed it.
func TestSessionLost(t *testing.T) {
	t.Parallel()
	for _, open := range []func(*testing.T) Store{openTestServer, openTestClient} {
		s := open(t).(*etcd)
		e := session(t, t.Context(), s, 6*time.Second).(*etcdSession) // not over by itself before, on a busy machine
		l := lead(t, e, "lost", "")
		if _, err := s.client.Revoke(t.Context(), e.id); err != nil {
			t.Fatal(err)
		}
		_, err := s.write(t.Context(), write{key: "/k", expect: Any, lease: int64(e.id)})
		want(t, "put that does not know yet", err, ErrLeaseLost)
		select {
		case <-e.Done():
		case <-time.After(limit):
			t.Fatal("the session goes on")
		}
		_, err = e.Put(t.Context(), "/k", nil, Any)
		want(t, "put", err, ErrLeaseLost)
		_, err = l.Put(t.Context(), "/k", nil, Any)
		want(t, "put of the leader", err, ErrNotLeader)
	}
}

// A candidacy that cannot be withdrawn, because the server is away, does not outlive its session.
func TestCampaignCancelledDuringOutage(t *testing.T) {
	t.Parallel()
	srv := startPeer(t, &peer{})
	s, err := Open(t.Context(), Config{Endpoints: []string{srv.url}, OpTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	lead(t, session(t, t.Context(), s, time.Minute), "outage", "1")
	e := session(t, t.Context(), s, time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	given := make(chan error, 1)
	go func() {
		_, err := e.Campaign(ctx, "outage", "2")
		given <- err
	}()
	candidates(t, s, "outage", 2)
	srv.stop()
	cancel()
	want(t, "campaign", <-given, context.Canceled)
	select {
	case <-e.Done(): // nobody keeps its lease alive: the candidacy ends with it
	case <-time.After(limit):
		t.Error("the session goes on with a candidacy that nobody knows of")
	}
}

// The first answer has the time for it, whatever an operation has.
func TestOpenHasItsOwnTime(t *testing.T) {
	t.Parallel()
	srv := startPeer(t, &peer{})
	s, err := Open(t.Context(), Config{Endpoints: []string{srv.url}, OpTimeout: 1, DialTimeout: limit})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, err = s.Get(t.Context(), "/k")
	want(t, "get", err, ErrUnavailable)
}

// A session that cannot reach its server is over after its time to live, by the client's own clock.
func TestSessionEndsDuringOutage(t *testing.T) {
	t.Parallel()
	srv := startPeer(t, &peer{})
	s, err := Open(t.Context(), Config{Endpoints: []string{srv.url}, OpTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	e := session(t, t.Context(), s, 2*time.Second)
	srv.stop()
	select {
	case <-e.Done():
	case <-time.After(limit):
		t.Fatal("the session goes on")
	}
}

// authority makes a CA and a certificate for loopback and for clients, and returns their files.
func authority(t *testing.T) (ca, cert, key string) {
	t.Helper()
	dir := t.TempDir()
	save := func(name, typ string, der []byte) string {
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	caDER, err := x509.CreateCertificate(rand.Reader, root, root, &caKey.PublicKey, caKey)
	check(err)
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "leaf"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, root, &leafKey.PublicKey, caKey)
	check(err)
	keyDER, err := x509.MarshalECPrivateKey(leafKey)
	check(err)
	return save("ca.pem", "CERTIFICATE", caDER), save("cert.pem", "CERTIFICATE", leafDER), save("key.pem", "EC PRIVATE KEY", keyDER)
}

func TestExternalTLSAndPassword(t *testing.T) {
	t.Parallel()
	ca, cert, key := authority(t)
	otherCA, _, _ := authority(t)
	srv := startPeer(t, &peer{tls: &transport.TLSInfo{CertFile: cert, KeyFile: key, TrustedCAFile: ca, ClientCertAuth: true}})
	good := Config{Endpoints: []string{srv.url}, CAFile: ca, CertFile: cert, KeyFile: key, DialTimeout: limit, Log: slog.New(slog.DiscardHandler)}
	open := func(cfg Config) (Store, error) {
		s, err := Open(t.Context(), cfg)
		if err == nil {
			t.Cleanup(func() { _ = s.Close() })
		}
		return s, err
	}
	s, err := open(good)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, "/k", "v", 0)

	quick := func(change func(*Config)) Config {
		c := good
		c.DialTimeout = 300 * time.Millisecond
		change(&c)
		return c
	}
	_, err = open(quick(func(c *Config) { c.CertFile, c.KeyFile = "", "" }))
	want(t, "no client certificate", err, ErrUnavailable)
	_, err = open(quick(func(c *Config) { c.CAFile = otherCA }))
	want(t, "a server of another authority", err, ErrUnavailable)
	_, err = open(quick(func(c *Config) {
		c.Endpoints, c.CAFile, c.CertFile, c.KeyFile = []string{"http" + srv.url[5:]}, "", "", ""
	}))
	want(t, "without TLS", err, ErrUnavailable)

	c := s.(*etcd).client
	for _, err := range []error{
		second(c.UserAdd(t.Context(), "root", "secret")),
		second(c.UserGrantRole(t.Context(), "root", "root")),
		second(c.UserAdd(t.Context(), "reader", "secret")),
		second(c.RoleAdd(t.Context(), "read")),
		second(c.RoleGrantPermission(t.Context(), "read", "/", "0", clientv3.PermissionType(clientv3.PermRead))),
		second(c.UserGrantRole(t.Context(), "reader", "read")),
		second(c.AuthEnable(t.Context())),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err = s.Get(t.Context(), "/k")
	want(t, "without a user", err, ErrDenied)
	withUser := func(user, password string) Config {
		c := good
		c.Username, c.Password = user, password
		return c
	}
	_, err = open(withUser("root", "wrong"))
	want(t, "wrong password", err, ErrDenied)
	r, err := open(withUser("reader", "secret"))
	if err != nil {
		t.Fatal(err)
	}
	if v := string(get(t, r, "/k").Value); v != "v" {
		t.Errorf("got %q", v)
	}
	_, err = r.Put(t.Context(), "/k", nil, Any)
	want(t, "write of a reader", err, ErrDenied)
	root, err := open(withUser("root", "secret"))
	if err != nil {
		t.Fatal(err)
	}
	put(t, root, "/k", "w", Any)
}

func second[T any](_ T, err error) error { return err }
