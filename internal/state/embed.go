package state

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"go.uber.org/zap/zapcore"
)

// Settings of the embedded server that are not the user's.
const (
	// A single member elects itself within two of these: they decide how fast the server starts. Each tick is a wake-up of a few
	// microseconds.
	tickMs     = 50
	electionMs = 250
	// etcd keeps the raft log of this many writes in memory, for followers that we do not have.
	raftEntries = 1000
	raftCatchUp = 100
	// startTimeout is when a server that is still not ready is given up; replaying its log takes a healthy one a second at most.
	startTimeout  = time.Minute
	behindTimeout = 4 * time.Second
	// closeTimeout bounds the wait for a server that has failed; a healthy one needs a few milliseconds.
	closeTimeout = 2 * time.Second
)

// memberURL names the one member in its own records. Nothing listens there and nothing is dialled.
const memberURL = "http://127.0.0.1:2380"

// server is an etcd in this process, without a socket: the client calls its functions.
type server struct {
	dir   string
	lock  *os.File
	etcd  *embed.Etcd
	quiet atomic.Bool // its messages are of the start or the end, which need no attention

	gaveUp chan struct{} // closed when failed is set

	mu     sync.Mutex
	failed error // why the server had to give up; guarded by mu
}

// openEmbedded starts the server in cfg.Dir and a store on it.
func openEmbedded(ctx context.Context, cfg Config) (Store, error) {
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDataDir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDataDir, err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	s := &server{dir: dir, lock: lock, gaveUp: make(chan struct{})}
	s.quiet.Store(true) // what matters of the start is in its error
	if err := s.start(ctx, cfg); err != nil {
		s.unlock()
		return nil, err
	}
	return newEtcd(v3client.New(s.etcd.Server), cfg, s), nil // goes past the server's authentication: we are the server
}

func (s *server) config(cfg Config) *embed.Config {
	e := embed.NewConfig()
	e.Name = "thaw"
	e.Dir = s.dir
	e.ListenPeerUrls, e.ListenClientUrls = nil, nil
	if cfg.Socket != "" {
		e.ListenClientUrls = []url.URL{{Scheme: "unix", Path: cfg.Socket}}
	}
	member, _ := url.Parse(memberURL)
	e.AdvertisePeerUrls, e.AdvertiseClientUrls = []url.URL{*member}, []url.URL{*member}
	e.InitialCluster = e.Name + "=" + memberURL
	e.TickMs, e.ElectionMs = tickMs, electionMs
	e.SnapshotCount, e.SnapshotCatchUpEntries = raftEntries, raftCatchUp
	e.AutoCompactionMode, e.AutoCompactionRetention = embed.CompactorModeRevision, strconv.FormatInt(cfg.HistoryRevisions, 10)
	e.QuotaBackendBytes = cfg.QuotaBytes
	e.UnsafeNoFsync = cfg.NoSync
	e.MaxRequestBytes = MaxValueBytes + 512<<10
	e.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapTo(cfg.Log, &s.quiet, fatalHook{s}))
	return e
}

// start returns when the server answers.
//
// etcd ends the process when it cannot read its files or cannot write any more. In a process that also carries traffic that must not
// happen: the hook of the logger ends only the goroutine in question, and what follows is an error of every operation.
func (s *server) start(ctx context.Context, cfg Config) error {
	type result struct {
		etcd *embed.Etcd
		err  error
	}
	started := make(chan result, 1)
	go func() { // ends with the start of the server; one that gave up may leave it waiting for a goroutine that is no more
		var r result
		defer func() {
			if p := recover(); p != nil {
				r.err = fmt.Errorf("%v", p)
			}
			started <- r
		}()
		r.etcd, r.err = embed.StartEtcd(s.config(cfg))
	}()
	unusable := func(err error) error { return fmt.Errorf("%w: %s: %w", ErrDataDir, s.dir, err) }
	late := func() error { return fmt.Errorf("start etcd in %s: %w", s.dir, context.Cause(ctx)) }
	select {
	case <-s.gaveUp:
		return unusable(s.failure())
	case r := <-started:
		if f := s.failure(); f != nil {
			return unusable(f)
		}
		if r.err != nil {
			return unusable(r.err)
		}
		s.etcd = r.etcd
	case <-ctx.Done():
		return late()
	}
	if err := s.ready(ctx); err != nil {
		_ = s.stop()
		if ctx.Err() != nil {
			return late()
		}
		return unusable(err)
	}
	s.quiet.Store(false)
	return nil
}

// ready waits until the server serves. If the raft log has lost entries that the database has already, etcd would take new ones for
// known and answer nothing until as many have come again: that is found out here instead.
func (s *server) ready(ctx context.Context) error {
	srv := s.etcd.Server
	inDatabase, _ := schema.ReadConsistentIndex(srv.Backend().ReadTx())
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	slow := time.After(startTimeout)
	var since time.Time // when the server led and was behind its database for the first time
	for {
		select {
		case <-srv.ReadyNotify():
			return nil
		case <-s.gaveUp:
			return s.failure()
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-slow:
			return fmt.Errorf("the server is not ready after %s", startTimeout)
		case <-poll.C:
			inLog := srv.CommittedIndex()
			behind := srv.Leader() != 0 && inLog < inDatabase
			switch { // a healthy server is behind for one write to the disk at most
			case !behind:
				since = time.Time{}
			case since.IsZero():
				since = time.Now()
			case time.Since(since) > behindTimeout:
				return fmt.Errorf("the log (member/wal) ends at entry %d, but the database (member/snap/db) is at %d: the log is damaged", inLog, inDatabase)
			}
		}
	}
}

// failure is nil while the server is well.
func (s *server) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// close stops the server and lets the directory go.
func (s *server) close() error {
	defer s.unlock()
	return s.stop()
}

func (s *server) stop() error {
	s.quiet.Store(true)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.etcd.Close()
	}()
	if s.failure() == nil {
		<-stopped
		return nil
	}
	select { // parts of a failed server may wait for each other for ever
	case <-stopped:
	case <-time.After(closeTimeout):
	}
	return s.failure()
}

func (s *server) unlock() { _ = s.lock.Close() }

// fatalHook stands where etcd would end the process.
type fatalHook struct{ server *server }

// OnWrite notes the first reason and ends the goroutine that cannot go on.
func (h fatalHook) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	s := h.server
	s.mu.Lock()
	if s.failed == nil {
		s.failed = fmt.Errorf("the embedded etcd gave up: %s%s", e.Message, why(fields))
		close(s.gaveUp)
	}
	s.mu.Unlock()
	runtime.Goexit()
}

// why is the error among the fields of a message.
func why(fields []zapcore.Field) string {
	var b strings.Builder
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok {
			fmt.Fprintf(&b, ": %v", err)
		}
	}
	return b.String()
}
