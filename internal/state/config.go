package state

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
)

// defaultProgress is how often an idle watch gets a progress mark.
const defaultProgress = 5 * time.Second

// Errors of Open.
var (
	// ErrConfig means settings that contradict each other or are missing.
	ErrConfig = errors.New("state: bad configuration")
	// ErrInUse means that another process holds the data directory.
	ErrInUse = errors.New("state: the data directory is in use")
	// ErrDataDir means that the data directory cannot be written, or that what is in it cannot be read as the server's own.
	ErrDataDir = errors.New("state: the data directory cannot be used")
)

// Config says where the state is: in Dir, served by an embedded server in this process, or at Endpoints. Exactly one of the two is
// required; everything else has a default.
type Config struct {
	// Dir is the data directory of the embedded server, made (0700) if it is missing. The server opens no socket: only this
	// process reaches it.
	Dir string
	// Socket is the path of a unix socket at which other processes of this user reach the embedded server, as endpoint
	// unix://Socket; empty = none.
	Socket string
	// HistoryRevisions is how many of the newest revisions the embedded server remembers for watches, checked every five
	// minutes; 0 = 10,000. Fewer make watchers that were away list again, more cost disk.
	HistoryRevisions int64
	// QuotaBytes bounds the embedded server's database; beyond it writes fail with ErrFull; 0 = 1 GiB.
	QuotaBytes int64
	// NoSync leaves out fsync: several times faster, and a crash of the machine (not of the process) loses what was
	// acknowledged. For tests.
	NoSync bool

	// Endpoints are the client URLs of an external etcd, http:// or https:// (or unix://).
	Endpoints []string
	// CertFile and KeyFile are the client's certificate in PEM, both or neither; they are read anew for each connection.
	CertFile, KeyFile string
	// CAFile has the certificates that the servers' are checked against; empty = the system's.
	CAFile string
	// Username and Password log in, both or neither.
	Username, Password string
	// DialTimeout bounds Open's wait for the first answer of an external etcd; 0 = 5 s.
	DialTimeout time.Duration

	// OpTimeout bounds each operation; 0 = 10 s. After it the operation fails with ErrUnavailable.
	OpTimeout time.Duration
	// Progress is how often watches get a progress mark; 0 = 5 s.
	Progress time.Duration
	// Log receives the server's and the client's messages; nil = none.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	set(&c.HistoryRevisions, 10_000)
	set(&c.QuotaBytes, 1<<30)
	set(&c.DialTimeout, 5*time.Second)
	set(&c.OpTimeout, 10*time.Second)
	set(&c.Progress, defaultProgress)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func set[T comparable](p *T, v T) {
	if *p == *new(T) {
		*p = v
	}
}

// Validate tells what is wrong with the settings; it is an ErrConfig.
func (c Config) Validate() error {
	var errs []error
	bad := func(is bool, format string, args ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	external := len(c.Endpoints) > 0
	bad(c.Dir == "" && !external, "neither a data directory nor endpoints")
	bad(c.Dir != "" && external, "a data directory and endpoints: only one of them can hold the state")
	bad((c.CertFile == "") != (c.KeyFile == ""), "a certificate needs its key and the other way round")
	bad((c.Username == "") != (c.Password == ""), "a user needs a password and the other way round")
	bad(!external && (c.CertFile != "" || c.CAFile != "" || c.Username != ""), "certificates, user and password are for endpoints")
	bad(c.HistoryRevisions < 0 || c.QuotaBytes < 0 || c.DialTimeout < 0 || c.OpTimeout < 0 || c.Progress < 0, "a negative bound")
	var secure, plain bool
	for _, e := range c.Endpoints {
		u, err := url.Parse(e)
		if err != nil {
			errs = append(errs, fmt.Errorf("endpoint %q: %w", e, err))
			continue
		}
		switch u.Scheme {
		case "https", "unixs":
			secure = true
		case "http", "unix":
			plain = true
		default:
			errs = append(errs, fmt.Errorf("endpoint %q: want http://HOST:PORT or https://HOST:PORT", e))
		}
	}
	bad(plain && secure, "some endpoints with TLS and some without")
	bad(plain && (c.CertFile != "" || c.CAFile != ""), "certificates, but the endpoints are without TLS (http)")
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrConfig, errors.Join(errs...))
}

// tls is the client's side of TLS, nil without.
func (c Config) tls() (*tls.Config, error) {
	if !strings.HasPrefix(c.Endpoints[0], "https") && !strings.HasPrefix(c.Endpoints[0], "unixs") {
		return nil, nil
	}
	if c.CertFile == "" && c.CAFile == "" {
		return &tls.Config{MinVersion: tls.VersionTLS12}, nil
	}
	t, err := transport.TLSInfo{CertFile: c.CertFile, KeyFile: c.KeyFile, TrustedCAFile: c.CAFile}.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("%w: TLS files: %w", ErrConfig, err)
	}
	return t, nil
}

// Open returns the store that cfg names. The embedded server answers when Open returns; an external one has answered once, or Open fails
// with ErrUnavailable or ErrDenied. ctx bounds the opening only.
func Open(ctx context.Context, cfg Config) (Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	if cfg.Dir != "" {
		return openEmbedded(ctx, cfg)
	}
	return openExternal(ctx, cfg)
}
