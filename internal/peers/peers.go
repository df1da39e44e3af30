// Package peers keeps one stream to each of a changing set of processes of the platform: it dials, begins anew after a break with a pause
// that is not the same for all, and gives up those that have left. What is said on a stream is the caller's business.
package peers

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/thawrun/thaw/internal/wire"
)

// Silence is after how long without a word a peer is asked whether it lives, and how long it may take to say so.
const Silence = 10 * time.Second

// Set is the peers. Make one with New; nothing happens before Run.
type Set struct {
	what        string
	credentials credentials.TransportCredentials
	log         *slog.Logger

	mu      sync.Mutex
	members map[string]string // addresses by name; guarded by mu
	changed chan struct{}     // closed when members change; guarded by mu
}

// New makes an empty set. what says in logs whom it is about; nil credentials mean none, nil log no log.
func New(what string, c credentials.TransportCredentials, log *slog.Logger) *Set {
	if c == nil {
		c = insecure.NewCredentials()
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Set{what: what, credentials: c, log: log, changed: make(chan struct{})}
}

// SetMembers names all peers and their addresses (host:port). The map is kept.
func (s *Set) SetMembers(addrs map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.members = addrs
	close(s.changed)
	s.changed = make(chan struct{})
}

// Stream is one conversation with a peer; it returns when that has ended, at the latest after ctx has.
type Stream func(ctx context.Context, conn *grpc.ClientConn, name, addr string) error

// Run holds one stream after another to every peer until ctx ends. left, if not nil, is called after the last stream to a peer that is none any
// more, or has another address.
func (s *Set) Run(ctx context.Context, stream Stream, left func(name, addr string)) error {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	peers := map[[2]string]context.CancelFunc{} // by name and address
	for {
		s.mu.Lock()
		members, changed := s.members, s.changed
		s.mu.Unlock()
		wanted := map[[2]string]bool{}
		for name, addr := range members {
			key := [2]string{name, addr}
			wanted[key] = true
			if peers[key] != nil {
				continue
			}
			own, end := context.WithCancel(ctx)
			peers[key] = end
			running.Go(func() {
				s.keep(own, name, addr, stream)
				if left != nil && ctx.Err() == nil {
					left(name, addr)
				}
			})
		}
		for key, end := range peers {
			if !wanted[key] {
				end()
				delete(peers, key)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// keep holds one stream after another to a peer.
func (s *Set) keep(ctx context.Context, name, addr string, stream Stream) {
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(s.credentials),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(wire.Codec{}), grpc.MaxCallRecvMsgSize(wire.MaxFrame)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: Silence, Timeout: Silence}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}))
	if err != nil {
		s.log.Error(s.what+" cannot be reached", "name", name, "address", addr, "error", err)
		return
	}
	defer conn.Close()
	for ctx.Err() == nil {
		err := stream(ctx, conn, name, addr)
		if ctx.Err() != nil {
			return
		}
		s.log.Info(s.what+": the stream has ended", "name", name, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(100+rand.IntN(200)) * time.Millisecond): // all come back, not at once
		}
	}
}

// ServerOptions are what the other side of such streams is made with.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodec(wire.Codec{}),
		grpc.MaxRecvMsgSize(wire.MaxFrame),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: Silence, Timeout: Silence}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: Silence / 2, PermitWithoutStream: true}),
	}
}

// Serve runs a gRPC server with one method, a stream both ways, until ctx ends.
func Serve(ctx context.Context, service, method string, handle grpc.StreamHandler, serve func(*grpc.Server) error, options ...grpc.ServerOption) error {
	g := grpc.NewServer(append(options, ServerOptions()...)...)
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: service,
		HandlerType: (*any)(nil),
		Streams:     []grpc.StreamDesc{{StreamName: method, ServerStreams: true, ClientStreams: true, Handler: handle}},
	}, nil)
	stopped := context.AfterFunc(ctx, g.Stop) // streams never end by themselves
	defer stopped()
	err := serve(g)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Open begins a stream as its client.
func Open(ctx context.Context, conn *grpc.ClientConn, service, method string) (grpc.ClientStream, error) {
	return conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/"+service+"/"+method, grpc.WaitForReady(true))
}
