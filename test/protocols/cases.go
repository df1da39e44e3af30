package protocols

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Target is where a case sends its traffic.
type Target struct {
	Addr  string      // host:port of the first hop
	Host  string      // that is asked for
	HTTP2 bool        // the client of an HTTP case speaks HTTP/2, with prior knowledge or as agreed by ALPN
	TLS   *tls.Config // nil = without TLS
}

// Case is one kind of traffic. Run returns what was wrong.
type Case struct {
	Name string
	H1   bool // for clients and functions of HTTP/1 only
	TCP  bool // not for clients of TLS, which knows no half-close
	Run  func(ctx context.Context, t Target) error
}

// Within is the time in which a function must learn that its client has left.
const Within = 2 * time.Second

var names atomic.Int64

// name is one that no other call has.
func name() string { return fmt.Sprintf("call-%d-%d", time.Now().UnixNano(), names.Add(1)) }

// dial opens a connection on which h2 or HTTP/1.1 is spoken.
func (t Target) dial(ctx context.Context, h2 bool) (net.Conn, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.Addr)
	if err != nil || t.TLS == nil {
		return nc, err
	}
	conf := t.TLS.Clone()
	conf.ServerName, conf.NextProtos = t.Host, []string{"http/1.1"}
	if h2 {
		conf.NextProtos = []string{"h2"}
	}
	c := tls.Client(nc, conf)
	if err = c.HandshakeContext(ctx); err == nil && c.ConnectionState().NegotiatedProtocol != conf.NextProtos[0] {
		err = fmt.Errorf("agreed on %q, wanted %q", c.ConnectionState().NegotiatedProtocol, conf.NextProtos[0])
	}
	if err != nil {
		nc.Close()
	}
	return c, err
}

// client returns a client of its own connections, and how to close them, whatever is under way on them.
func (t Target) client() (*http.Client, func()) {
	var mu sync.Mutex
	var conns []net.Conn
	tr := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true, ExpectContinueTimeout: time.Minute,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			nc, err := t.dial(ctx, t.HTTP2)
			if err == nil {
				mu.Lock()
				conns = append(conns, nc)
				mu.Unlock()
			}
			return nc, err
		}}
	if t.HTTP2 {
		tr.Protocols.SetUnencryptedHTTP2(true)
	} else {
		tr.Protocols.SetHTTP1(true)
	}
	return &http.Client{Transport: tr}, func() {
		tr.CloseIdleConnections()
		mu.Lock()
		defer mu.Unlock()
		for _, nc := range conns {
			nc.Close()
		}
	}
}

// do sends one request by a client of its own. Header has names and values in turn.
func (t Target) do(ctx context.Context, method, path string, body io.Reader, header ...string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+t.Host+path, body)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	return t.send(req)
}

func (t Target) send(req *http.Request) (*http.Response, error) {
	c, done := t.client()
	resp, err := c.Do(req)
	if err != nil {
		done()
		return nil, err
	}
	resp.Body = &body{resp.Body, done}
	return resp, nil
}

// body closes its client's connections when it is closed.
type body struct {
	io.ReadCloser
	done func()
}

func (b *body) Close() error { err := b.ReadCloser.Close(); b.done(); return err }

// whole reads a 200 to its end.
func whole(resp *http.Response, err error) (string, error) {
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("%s: %.200q (%s)", resp.Status, b, resp.Header.Get("X-Thaw-Error"))
	}
	return string(b), err
}

// want compares, for cases that are a single comparison.
func want(got, want string, err error) error {
	if err == nil && got != want {
		err = fmt.Errorf("got %.200q (%d bytes), want %.200q (%d bytes)", got, len(got), want, len(want))
	}
	return err
}

// noticed asks the function whether it saw that a client had left.
func (t Target) noticed(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, Within)
	defer cancel()
	resp, err := t.do(ctx, "GET", "/left?name="+name, nil)
	got, err := whole(resp, err)
	if err := want(got, "true", err); err != nil {
		return fmt.Errorf("the function does not see that its client has left: %w", err)
	}
	return nil
}

// HTTPCases are the cases for the function HTTP.
var HTTPCases = []Case{
	{Name: "echo", Run: func(ctx context.Context, t Target) error {
		for _, size := range []int{0, 1, 100, 100_000, 1 << 20} {
			sent := strings.Repeat("x", size)
			resp, err := t.do(ctx, "POST", "/echo?a=%20b", strings.NewReader(sent), "X-In", "1", "X-In", "2")
			got, err := whole(resp, err)
			if err := want(got, sent, err); err != nil {
				return err
			}
			if in := resp.Header.Get("X-In"); in != "1|2" {
				return fmt.Errorf("header %q", in)
			}
		}
		return nil
	}},
	{Name: "upload-of-unknown-length", Run: func(ctx context.Context, t Target) error {
		sent := strings.Repeat("abc", 100_000)
		resp, err := t.do(ctx, "POST", "/echo", io.MultiReader(strings.NewReader(sent[:1000]), strings.NewReader(sent[1000:])))
		got, err := whole(resp, err)
		return want(got, sent, err)
	}},
	{Name: "download-16MiB", Run: func(ctx context.Context, t Target) error {
		resp, err := t.do(ctx, "GET", fmt.Sprintf("/bytes?n=%d", 16<<20), nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		n, err := io.Copy(io.Discard, resp.Body)
		return want(fmt.Sprint(n), fmt.Sprint(16<<20), err)
	}},
	{Name: "server-sent-events", Run: func(ctx context.Context, t Target) error {
		id := name()
		ctx2, cancel := context.WithCancel(ctx)
		defer cancel()
		resp, err := t.do(ctx2, "GET", "/events?name="+id, nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		br := bufio.NewReader(resp.Body)
		for i := range 5 {
			var got string
			for range 3 {
				line, err := br.ReadString('\n')
				if err != nil {
					return fmt.Errorf("event %d: %w", i, err)
				}
				got += line
			}
			if err := want(got, fmt.Sprintf("id: %d\ndata: event %d\n\n", i, i), nil); err != nil {
				return err
			}
		}
		cancel()
		return t.noticed(ctx, id)
	}},
	{Name: "long-poll", Run: func(ctx context.Context, t Target) error {
		begin := time.Now()
		resp, err := t.do(ctx, "GET", "/poll?for=300ms", nil)
		got, err := whole(resp, err)
		if took := time.Since(begin); took < 300*time.Millisecond {
			return fmt.Errorf("answered after %v", took)
		}
		return want(got, "news", err)
	}},
	{Name: "trailers-both-ways", Run: func(ctx context.Context, t Target) error {
		req, err := http.NewRequestWithContext(ctx, "POST", "http://"+t.Host+"/trailers", io.MultiReader(strings.NewReader("body")))
		if err != nil {
			return err
		}
		req.Trailer = http.Header{"X-Up": {"42"}}
		resp, err := t.send(req)
		got, err := whole(resp, err)
		if err := want(got, "body", err); err != nil {
			return err
		}
		return want(resp.Trailer.Get("X-Sum"), "42", nil)
	}},
	{Name: "early-hints", Run: func(ctx context.Context, t Target) error {
		var hints []string
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			if code != http.StatusProcessing {
				hints = append(hints, fmt.Sprint(code, " ", h.Get("Link")))
			}
			return nil
		}})
		resp, err := t.do(ctx, "GET", "/hints", nil)
		got, err := whole(resp, err)
		if err := want(got, "done", err); err != nil {
			return err
		}
		return want(fmt.Sprint(hints), "[103 </a.css> 103 </b.css>]", nil)
	}},
	{Name: "full-duplex", Run: func(ctx context.Context, t Target) error {
		r, w := io.Pipe()
		defer w.Close()
		resp, err := t.do(ctx, "POST", "/duplex", r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		buf := make([]byte, 16)
		for i := range 20 {
			msg := fmt.Sprintf("ping %d", i)
			io.WriteString(w, msg)
			_, err := io.ReadFull(resp.Body, buf[:len(msg)])
			if err := want(string(buf[:len(msg)]), msg, err); err != nil {
				return err
			}
		}
		w.Close()
		rest, err := io.ReadAll(resp.Body)
		return want(string(rest), "", err)
	}},
	{Name: "continue-refused", H1: true, Run: func(ctx context.Context, t Target) error {
		var read atomic.Bool
		resp, err := t.do(ctx, "POST", "/refuse", io.NopCloser(readerFunc(func(p []byte) (int, error) { read.Store(true); return copy(p, "body"), io.EOF })), "Expect", "100-continue")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != 401 || read.Load() {
			return fmt.Errorf("%d, body sent: %v", resp.StatusCode, read.Load())
		}
		return nil
	}},
	{Name: "continue-wanted", H1: true, Run: func(ctx context.Context, t Target) error {
		resp, err := t.do(ctx, "POST", "/echo", io.MultiReader(strings.NewReader("body")), "Expect", "100-continue")
		got, err := whole(resp, err)
		return want(got, "body", err)
	}},
	{Name: "truncated-answer", Run: func(ctx context.Context, t Target) error {
		resp, err := t.do(ctx, "GET", "/half", nil)
		if got, err := whole(resp, err); err == nil {
			return fmt.Errorf("half an answer looks whole: %q", got)
		}
		return nil
	}},
	{Name: "client-leaves", Run: func(ctx context.Context, t Target) error {
		id := name()
		short, cancel := context.WithTimeout(ctx, 150*time.Millisecond)
		defer cancel()
		for begin := time.Now(); ; { // from zero it may leave before there is a function that could notice
			resp, err := t.do(short, "GET", "/hang?name="+id, nil)
			if err == nil {
				resp.Body.Close()
				return errors.New("answered")
			}
			if t.noticed(ctx, id) == nil {
				return nil
			}
			if time.Since(begin) > 3*Within {
				return errors.New("the function does not see that its client has left")
			}
			short, cancel = context.WithTimeout(ctx, 150*time.Millisecond)
			defer cancel()
		}
	}},
	{Name: "half-close", H1: true, TCP: true, Run: func(ctx context.Context, t Target) error {
		nc, err := net.Dial("tcp", t.Addr)
		if err != nil {
			return err
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(nc, "GET /poll?for=200ms HTTP/1.1\r\nHost: %s\r\n\r\n", t.Host)
		nc.(*net.TCPConn).CloseWrite()
		br := bufio.NewReader(nc)
		resp, err := http.ReadResponse(br, nil)
		for err == nil && resp.StatusCode < 200 {
			resp, err = http.ReadResponse(br, nil)
		}
		got, err := whole(resp, err)
		return want(got, "news", err)
	}},
	{Name: "websocket", H1: true, Run: func(ctx context.Context, t Target) error {
		c, err := t.websocket(ctx, "/ws", &websocket.DialOptions{Subprotocols: []string{"v1"}})
		if err != nil {
			return err
		}
		defer c.CloseNow()
		if err := want(c.Subprotocol(), "v1", nil); err != nil {
			return err
		}
		for i, size := range []int{0, 1, 125, 126, 65535, 65536, 1 << 20} {
			typ := websocket.MessageType(1 + i%2)
			if err := c.Write(ctx, typ, bytes.Repeat([]byte("x"), size)); err != nil {
				return err
			}
			gotTyp, b, err := c.Read(ctx)
			if err != nil || gotTyp != typ || len(b) != size {
				return fmt.Errorf("%d bytes of type %v came back as %d of %v: %w", size, typ, len(b), gotTyp, err)
			}
		}
		go c.Write(ctx, websocket.MessageText, []byte("close please"))
		_, _, err = c.Read(ctx)
		if websocket.CloseStatus(err) != 4321 || !strings.Contains(err.Error(), "as asked") {
			return fmt.Errorf("close by the function: %w", err)
		}
		return nil
	}},
	{Name: "websocket-ping-and-close", H1: true, Run: func(ctx context.Context, t Target) error {
		c, err := t.websocket(ctx, "/ws", nil)
		if err != nil {
			return err
		}
		defer c.CloseNow()
		ctx2 := c.CloseRead(ctx)
		for range 5 {
			if err := c.Ping(ctx2); err != nil {
				return err
			}
		}
		return c.Close(websocket.StatusNormalClosure, "bye")
	}},
	{Name: "websocket-compressed", H1: true, Run: func(ctx context.Context, t Target) error {
		c, err := t.websocket(ctx, "/ws", &websocket.DialOptions{CompressionMode: websocket.CompressionContextTakeover})
		if err != nil {
			return err
		}
		defer c.CloseNow()
		sent := bytes.Repeat([]byte("compress me "), 10_000)
		for range 5 {
			if err := c.Write(ctx, websocket.MessageText, sent); err != nil {
				return err
			}
			if _, b, err := c.Read(ctx); err != nil || !bytes.Equal(b, sent) {
				return fmt.Errorf("%d bytes: %w", len(b), err)
			}
		}
		return c.Close(websocket.StatusNormalClosure, "")
	}},
	{Name: "websocket-refused", H1: true, Run: func(ctx context.Context, t Target) error {
		_, err := t.websocket(ctx, "/refuse", nil)
		if err == nil || !strings.Contains(err.Error(), "401") {
			return fmt.Errorf("a handshake that the function refuses: %w", err)
		}
		return nil
	}},
	{Name: "websocket-client-vanishes", H1: true, Run: func(ctx context.Context, t Target) error {
		id := name()
		c, err := t.websocket(ctx, "/ws?name="+id, nil)
		if err != nil {
			return err
		}
		c.CloseNow()
		return t.noticed(ctx, id)
	}},
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func (t Target) websocket(ctx context.Context, path string, o *websocket.DialOptions) (*websocket.Conn, error) {
	if o == nil {
		o = &websocket.DialOptions{}
	}
	t.HTTP2 = false
	var done func()
	o.HTTPClient, done = t.client()
	c, _, err := websocket.Dial(ctx, "ws://"+t.Host+path, o)
	if err != nil {
		done() // a connection on which the handshake was refused could serve another request
		return nil, err
	}
	c.SetReadLimit(4 << 20)
	return c, nil
}

// Dial returns a gRPC connection to the target.
func (t Target) Dial(o ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+t.Addr, append(o, grpc.WithAuthority(t.Host), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return t.dial(ctx, true) }))...)
}

// Hold occupies a slot of the function GRPC until release is called; when more than one goroutine calls it, each returns when it is done.
func (t Target) Hold(ctx context.Context) (release func(), err error) {
	conn, err := t.Dial()
	if err != nil {
		return nil, err
	}
	s, err := conn.NewStream(ctx, &desc.Streams[0], methodStream)
	if err == nil {
		err = s.SendMsg(wrapperspb.String("echo in"))
	}
	if err == nil {
		err = recv(s, "in")
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return sync.OnceFunc(func() { // two that receive from one stream at once can wait for ever
		s.CloseSend()
		s.RecvMsg(&wrapperspb.StringValue{})
		s.RecvMsg(&wrapperspb.StringValue{})
		conn.Close()
	}), nil
}

func call(ctx context.Context, conn *grpc.ClientConn, in string, o ...grpc.CallOption) (string, error) {
	out := &wrapperspb.StringValue{}
	err := conn.Invoke(ctx, methodUnary, wrapperspb.String(in), out, o...)
	return out.Value, err
}

func recv(s grpc.ClientStream, expected string) error {
	out := &wrapperspb.StringValue{}
	err := s.RecvMsg(out)
	return want(out.Value, expected, err)
}

// rpcCase is a gRPC case over a connection of its own.
func rpcCase(name string, run func(ctx context.Context, c *grpc.ClientConn) error) Case {
	return Case{Name: "grpc-" + name, Run: func(ctx context.Context, t Target) error {
		conn, err := t.Dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		return run(ctx, conn)
	}}
}

func open(ctx context.Context, c *grpc.ClientConn, first ...string) (grpc.ClientStream, error) {
	s, err := c.NewStream(ctx, &desc.Streams[0], methodStream)
	for _, m := range first {
		if err == nil {
			err = s.SendMsg(wrapperspb.String(m))
		}
	}
	return s, err
}

// rpcNoticed asks the function whether it saw that a call was cancelled.
func rpcNoticed(ctx context.Context, c *grpc.ClientConn, id string) error {
	ctx, cancel := context.WithTimeout(ctx, Within)
	defer cancel()
	got, err := call(ctx, c, "left "+id)
	if err := want(got, "true", err); err != nil {
		return fmt.Errorf("the function does not see that its client has left: %w", err)
	}
	return nil
}

func wantCode(code codes.Code, err error) error {
	if status.Code(err) != code {
		return fmt.Errorf("got %w, want %v", err, code)
	}
	return nil
}

// GRPCCases are the cases for the function GRPC.
var GRPCCases = []Case{
	rpcCase("unary", func(ctx context.Context, c *grpc.ClientConn) error {
		for _, size := range []int{0, 10, 100_000, 1 << 20} {
			sent := strings.Repeat("x", size)
			var head, tail metadata.MD
			got, err := call(metadata.AppendToOutgoingContext(ctx, "x-in", "1", "x-in", "2"), c, sent, grpc.Header(&head), grpc.Trailer(&tail))
			if err := want(got, sent, err); err != nil {
				return err
			}
			if err := want(fmt.Sprint(head.Get("x-head"), tail.Get("x-tail"), tail.Get("x-raw-bin")), "[1|2] [t] [\x00\xff]", nil); err != nil {
				return err
			}
		}
		return nil
	}),
	rpcCase("error", func(ctx context.Context, c *grpc.ClientConn) error {
		var tail metadata.MD
		_, err := call(ctx, c, "fail", grpc.Trailer(&tail))
		s := status.Convert(err)
		if s.Code() != codes.FailedPrecondition || s.Message() != "as asked: é%\n" || len(s.Details()) != 1 || tail.Get("x-tail") == nil {
			return fmt.Errorf("%v, details %v, trailer %v", s, s.Details(), tail)
		}
		return nil
	}),
	rpcCase("no-such-method", func(ctx context.Context, c *grpc.ClientConn) error {
		return wantCode(codes.Unimplemented, c.Invoke(ctx, "/thaw.test.Protocols/Nothing", wrapperspb.String(""), &wrapperspb.StringValue{}))
	}),
	rpcCase("client-streaming", func(ctx context.Context, c *grpc.ClientConn) error {
		s, err := open(ctx, c)
		if err != nil {
			return err
		}
		if h, err := s.Header(); err != nil || fmt.Sprint(h.Get("x-head")) != "[early]" { // before any message
			return fmt.Errorf("header %v: %w", h, err)
		}
		for range 100 {
			if err := s.SendMsg(wrapperspb.String("12345")); err != nil {
				return err
			}
		}
		s.CloseSend()
		if err := recv(s, "500"); err != nil {
			return err
		}
		if err := s.RecvMsg(&wrapperspb.StringValue{}); err != io.EOF || s.Trailer().Get("x-tail") == nil {
			return fmt.Errorf("end: %v, trailer %v", err, s.Trailer())
		}
		return nil
	}),
	rpcCase("server-streaming", func(ctx context.Context, c *grpc.ClientConn) error {
		s, err := open(ctx, c, "many 200")
		if err != nil {
			return err
		}
		s.CloseSend()
		for i := range 200 {
			if err := recv(s, fmt.Sprint(i)); err != nil {
				return err
			}
		}
		return recv(s, "8")
	}),
	rpcCase("bidirectional", func(ctx context.Context, c *grpc.ClientConn) error {
		s, err := open(ctx, c)
		if err != nil {
			return err
		}
		for i := range 50 {
			if err := s.SendMsg(wrapperspb.String(fmt.Sprintf("echo %d", i))); err != nil {
				return err
			}
			if err := recv(s, fmt.Sprint(i)); err != nil {
				return err
			}
		}
		if err := s.SendMsg(wrapperspb.String("abort")); err != nil {
			return err
		}
		return wantCode(codes.DataLoss, s.RecvMsg(&wrapperspb.StringValue{}))
	}),
	rpcCase("stream-of-large-messages", func(ctx context.Context, c *grpc.ClientConn) error {
		s, err := open(ctx, c)
		if err != nil {
			return err
		}
		big := strings.Repeat("y", 256<<10)
		for range 16 {
			if err := s.SendMsg(wrapperspb.String("echo " + big)); err != nil {
				return err
			}
			if err := recv(s, big); err != nil {
				return err
			}
		}
		s.CloseSend()
		return recv(s, fmt.Sprint(16*(5+256<<10)))
	}),
	rpcCase("deadline", func(ctx context.Context, c *grpc.ClientConn) error {
		got, err := call(ctx, c, "deadline") // the function knows of it
		if err := want(got, "true", err); err != nil {
			return err
		}
		id := name()
		short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		defer cancel()
		if _, err := call(short, c, "hang "+id); status.Code(err) != codes.DeadlineExceeded && status.Code(err) != codes.Unavailable {
			return fmt.Errorf("deadline: %w", err) // Unavailable: the function has the same deadline, and its reset may be first
		}
		return rpcNoticed(ctx, c, id)
	}),
	rpcCase("cancel", func(ctx context.Context, c *grpc.ClientConn) error {
		id := name()
		short, cancel := context.WithCancel(ctx)
		defer cancel()
		s, err := open(short, c, "hang "+id)
		if err != nil {
			return err
		}
		if err := recv(s, "hanging"); err != nil {
			return err
		}
		cancel()
		if err := wantCode(codes.Canceled, s.RecvMsg(&wrapperspb.StringValue{})); err != nil {
			return err
		}
		return rpcNoticed(ctx, c, id)
	}),
	{Name: "grpc-connection-lost", Run: func(ctx context.Context, t Target) error {
		id := name()
		lost, err := t.Dial()
		if err != nil {
			return err
		}
		s, err := open(ctx, lost, "hang "+id)
		if err == nil {
			err = recv(s, "hanging")
		}
		lost.Close()
		if err != nil {
			return err
		}
		conn, err := t.Dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		return rpcNoticed(ctx, conn, id)
	}},
	rpcCase("large-metadata", func(ctx context.Context, c *grpc.ClientConn) error {
		const n = 12 << 10
		var head metadata.MD
		got, err := call(metadata.AppendToOutgoingContext(ctx, "x-big", strings.Repeat("a", n)), c, fmt.Sprintf("big-metadata %d", n), grpc.Header(&head))
		if err := want(got, fmt.Sprint(n), err); err != nil {
			return err
		}
		return want(fmt.Sprint(len(strings.Join(head.Get("x-big"), ""))), fmt.Sprint(n), nil)
	}),
	rpcCase("metadata-beyond-the-limit", func(ctx context.Context, c *grpc.ClientConn) error {
		if _, err := call(metadata.AppendToOutgoingContext(ctx, "x-big", strings.Repeat("a", 1<<20)), c, "x"); err == nil {
			return errors.New("1 MiB of metadata was taken")
		}
		got, err := call(ctx, c, "after it")
		return want(got, "after it", err)
	}),
	rpcCase("compression", func(ctx context.Context, c *grpc.ClientConn) error {
		sent := strings.Repeat("compress me ", 50_000)
		var head metadata.MD
		got, err := call(ctx, c, sent, compress, grpc.Header(&head))
		if err := want(got, sent, err); err != nil {
			return err
		}
		return want(fmt.Sprint(head.Get("x-compression")), "[gzip]", nil)
	}),
	rpcCase("health", func(ctx context.Context, c *grpc.ClientConn) error {
		h := grpc_health_v1.NewHealthClient(c)
		r, err := h.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "thaw.test.Protocols"})
		if err != nil || r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			return fmt.Errorf("%v: %w", r, err)
		}
		if _, err = h.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "nothing"}); status.Code(err) != codes.NotFound {
			return fmt.Errorf("unknown service: %w", err)
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		w, err := h.Watch(ctx, &grpc_health_v1.HealthCheckRequest{})
		if err != nil {
			return err
		}
		r, err = w.Recv()
		if err != nil || r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			return fmt.Errorf("watch: %v: %w", r, err)
		}
		return nil
	}),
	rpcCase("100-calls-at-once", func(ctx context.Context, c *grpc.ClientConn) error {
		errs := make(chan error, 100)
		var full atomic.Int32
		for i := range 100 {
			go func() {
				got, err := call(ctx, c, fmt.Sprint(i))
				if status.Code(err) == codes.Unavailable {
					err, got = nil, fmt.Sprint(i) // a queue of ten is full: an answer too, and one after which clients try again
					full.Add(1)
				}
				errs <- want(got, fmt.Sprint(i), err)
			}()
		}
		var all error
		for range 100 {
			all = errors.Join(all, <-errs)
		}
		if n := full.Load(); n > 90 {
			all = errors.Join(all, fmt.Errorf("%d calls were refused", n))
		}
		return all
	}),
}

// Get asks for a path of the function HTTP and reads the answer.
func (t Target) Get(ctx context.Context, path string) error {
	_, err := whole(t.do(ctx, "GET", path, nil))
	return err
}

// Occupy takes a slot of the function HTTP, which never answers it, until the client leaves.
func (t Target) Occupy(ctx context.Context) (leave func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	resp, err := t.do(ctx, "GET", "/events", nil)
	if err == nil {
		_, err = io.ReadFull(resp.Body, make([]byte, 10)) // it is inside
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return func() { cancel(); resp.Body.Close() }, nil
}
