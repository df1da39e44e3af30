// Package protocols has the kinds of traffic that a platform must carry, once as a function that serves them and once as clients that
// check them: gRPC by its own library, and what rides on HTTP (WebSocket, server-sent events, long polling, trailers, early hints, full duplex).
// Tests run the cases against chains of single hops and against whole systems.
package protocols

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// left keeps which calls were cancelled, by the name that the client gave, for clients that ask whether their leaving was noticed.
type left struct {
	mu    sync.Mutex
	gone  map[string]bool
	moved chan struct{}
}

func newLeft() *left { return &left{gone: map[string]bool{}, moved: make(chan struct{})} }

func (l *left) add(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone[name] = true
	close(l.moved)
	l.moved = make(chan struct{})
}

// wait says whether the call was cancelled, within the time that ctx leaves.
func (l *left) wait(ctx context.Context, name string) bool {
	for {
		l.mu.Lock()
		gone, moved := l.gone[name], l.moved
		l.mu.Unlock()
		if gone {
			return true
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return false
		}
	}
}

// patience is how long a function waits for what a client should do.
const patience = 10 * time.Second

// HTTP returns the function of the HTTP cases.
func HTTP() http.Handler {
	l := newLeft()
	mux := http.NewServeMux()
	// until waits for the client to leave, and notes it.
	until := func(r *http.Request) {
		select {
		case <-r.Context().Done():
			l.add(r.URL.Query().Get("name"))
		case <-time.After(patience):
		}
	}
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("X-Proto", r.Proto)
		w.Header().Set("X-In", strings.Join(r.Header.Values("X-In"), "|"))
		w.Write(b)
	})
	mux.HandleFunc("/left", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, l.wait(r.Context(), r.URL.Query().Get("name")))
	})
	mux.HandleFunc("/hang", func(w http.ResponseWriter, r *http.Request) { until(r) })
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 5 {
			fmt.Fprintf(w, "id: %d\ndata: event %d\n\n", i, i)
			w.(http.Flusher).Flush()
			time.Sleep(time.Millisecond) // so that they are not one write
		}
		until(r) // the stream goes on: whoever waits for its end before passing it on is found out
	})
	mux.HandleFunc("/poll", func(w http.ResponseWriter, r *http.Request) {
		d, _ := time.ParseDuration(r.URL.Query().Get("for"))
		time.Sleep(d)
		fmt.Fprint(w, "news")
	})
	mux.HandleFunc("/trailers", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		io.Copy(w, r.Body)
		w.(http.Flusher).Flush()
		w.Header().Set("X-Sum", r.Trailer.Get("X-Up"))
	})
	mux.HandleFunc("/hints", func(w http.ResponseWriter, r *http.Request) {
		for _, link := range []string{"</a.css>", "</b.css>"} {
			w.Header().Set("Link", link)
			w.WriteHeader(http.StatusEarlyHints)
		}
		w.Header().Del("Link")
		fmt.Fprint(w, "done")
	})
	mux.HandleFunc("/duplex", func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex() // HTTP/2 is so anyway
		rc.Flush()
		buf := make([]byte, 1024)
		for {
			n, err := r.Body.Read(buf)
			w.Write(buf[:n])
			rc.Flush()
			if err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/refuse", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusUnauthorized) })
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.URL.Query().Get("n"))
		chunk := make([]byte, 32<<10)
		for ; n > 0; n -= len(chunk) {
			if _, err := w.Write(chunk[:min(n, len(chunk))]); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/half", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		fmt.Fprint(w, "half")
		panic(http.ErrAbortHandler)
	})
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"v2", "v1"}, InsecureSkipVerify: true, CompressionMode: websocket.CompressionContextTakeover})
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(4 << 20)
		for {
			typ, b, err := c.Read(context.Background())
			if err != nil {
				l.add(r.URL.Query().Get("name"))
				return
			}
			if string(b) == "close please" {
				c.Close(4321, "as asked")
				return
			}
			if c.Write(context.Background(), typ, b) != nil {
				return
			}
		}
	})
	return mux
}

// desc describes the gRPC service of the cases. It uses messages that come with the library, so that nothing has to be generated.
var desc = grpc.ServiceDesc{
	ServiceName: "thaw.test.Protocols",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(srv any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := &wrapperspb.StringValue{}
		if err := dec(in); err != nil {
			return nil, err
		}
		return srv.(*rpc).unary(ctx, in)
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Stream", ClientStreams: true, ServerStreams: true, Handler: func(srv any, s grpc.ServerStream) error {
		return srv.(*rpc).stream(s)
	}}},
}

const (
	methodUnary  = "/thaw.test.Protocols/Unary"
	methodStream = "/thaw.test.Protocols/Stream"
)

type rpc struct{ *left }

// GRPC returns the function of the gRPC cases, with the standard health service.
func GRPC() *grpc.Server {
	s := grpc.NewServer(grpc.StatsHandler(compressionSeen{}), grpc.MaxRecvMsgSize(16<<20))
	s.RegisterService(&desc, &rpc{newLeft()})
	h := health.NewServer()
	h.SetServingStatus("thaw.test.Protocols", grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(s, h)
	return s
}

func (r *rpc) unary(ctx context.Context, in *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	grpc.SetHeader(ctx, metadata.Pairs("x-head", strings.Join(md.Get("x-in"), "|"), "x-compression", *ctx.Value(compressionKey{}).(*string)))
	grpc.SetTrailer(ctx, metadata.Pairs("x-tail", "t", "x-raw-bin", "\x00\xff"))
	what, arg, _ := strings.Cut(in.Value, " ")
	switch what {
	case "fail":
		s, _ := status.New(codes.FailedPrecondition, "as asked: é%\n").WithDetails(wrapperspb.String("detail"))
		return nil, s.Err()
	case "hang":
		<-ctx.Done()
		r.add(arg)
		return nil, ctx.Err()
	case "left":
		return wrapperspb.String(fmt.Sprint(r.wait(ctx, arg))), nil
	case "deadline":
		d, ok := ctx.Deadline()
		return wrapperspb.String(fmt.Sprint(ok && time.Until(d) > 0 && time.Until(d) < time.Hour)), nil
	case "big-metadata":
		n, _ := strconv.Atoi(arg)
		grpc.SetHeader(ctx, metadata.Pairs("x-big", strings.Repeat("b", n)))
		return wrapperspb.String(fmt.Sprint(len(strings.Join(md.Get("x-big"), "")))), nil
	}
	return in, nil
}

func (r *rpc) stream(s grpc.ServerStream) error {
	s.SendHeader(metadata.Pairs("x-head", "early"))
	s.SetTrailer(metadata.Pairs("x-tail", "t"))
	total := 0
	for {
		in := &wrapperspb.StringValue{}
		err := s.RecvMsg(in)
		if err == io.EOF { // what was sent by the client's stream is summed up
			return s.SendMsg(wrapperspb.String(fmt.Sprint(total)))
		}
		if err != nil {
			return err
		}
		what, arg, _ := strings.Cut(in.Value, " ")
		total += len(in.Value)
		switch what {
		case "many":
			n, _ := strconv.Atoi(arg)
			for i := range n {
				if err := s.SendMsg(wrapperspb.String(fmt.Sprint(i))); err != nil {
					return err
				}
			}
		case "abort":
			return status.Error(codes.DataLoss, "in mid-stream")
		case "hang":
			if err := s.SendMsg(wrapperspb.String("hanging")); err != nil {
				return err
			}
			<-s.Context().Done()
			r.add(arg)
			return s.Context().Err()
		case "echo":
			if err := s.SendMsg(wrapperspb.String(arg)); err != nil {
				return err
			}
		}
	}
}

// compressionSeen tells the handler by which encoding its request came.
type compressionSeen struct{}

type compressionKey struct{}

func (compressionSeen) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, compressionKey{}, new(string))
}

func (compressionSeen) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if in, ok := s.(*stats.InHeader); ok {
		*ctx.Value(compressionKey{}).(*string) = in.Compression
	}
}

func (compressionSeen) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (compressionSeen) HandleConn(context.Context, stats.ConnStats)                       {}

var compress = grpc.UseCompressor(gzip.Name)

// Server returns a server of h that speaks HTTP/1 and HTTP/2 with prior knowledge on each port.
func Server(h http.Handler) *http.Server {
	s := &http.Server{Handler: h, Protocols: new(http.Protocols), ErrorLog: log.New(io.Discard, "", 0)}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	return s
}
