package h2

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// peer is the other end: frames by hand.
type peer struct {
	*http2.Framer
	t    *testing.T
	nc   net.Conn
	c    *Conn
	ran  chan error // what Run has returned
	text bytes.Buffer
	enc  *hpack.Encoder
	dec  *hpack.Decoder
}

// echo answers with the head, the body and the trailer of the request.
func echo(s *Stream) {
	if bytes.Contains(s.Head, []byte("\nhold: ")) {
		hold(s)
		return
	}
	var b bytes.Buffer
	b.Write(s.Head)
	if _, err := io.Copy(&b, s); err != nil {
		s.Reset(http2.ErrCodeCancel, err)
		return
	}
	for _, f := range s.Trailer() {
		b.Write(f.AppendLine(nil))
	}
	if s.WriteHead([]hpack.HeaderField{{Name: ":status", Value: "200"}}, false) == nil {
		s.Write(b.Bytes(), true)
	}
}

// hold holds a stream until it is taken back.
func hold(s *Stream) {
	gone := make(canceller)
	s.Watch(gone)
	<-gone
}

func testConfig(handle func(*Stream)) Config {
	return Config{MaxStreams: 4, HeaderBytes: 16 << 10, HeaderTime: time.Second, BodyIdle: 2 * time.Second, WriteIdle: 3 * time.Second,
		Ping: 30 * time.Second, Pong: 15 * time.Second, Idle: 120 * time.Second, Handle: handle}
}

// start runs a connection; its settings have come, and ours have been sent unless there are none.
func start(t *testing.T, cfg Config, settings ...http2.Setting) *peer {
	a, b := net.Pipe()
	p := &peer{t: t, nc: b, ran: make(chan error, 1)}
	p.Framer = http2.NewFramer(b, bufio.NewReader(b))
	p.AllowIllegalWrites, p.AllowIllegalReads = true, true
	p.enc, p.dec = hpack.NewEncoder(&p.text), hpack.NewDecoder(4096, nil)
	p.c = New(a, bufio.NewReaderSize(a, 16<<10), cfg)
	go func() {
		err := p.c.Run()
		a.Close()
		p.c.Wait()
		p.ran <- err
	}()
	t.Cleanup(func() {
		b.Close()
		select {
		case <-p.ran:
		case <-time.After(5 * time.Second):
			t.Error("the connection goes on")
		}
	})
	for _, want := range []http2.FrameType{http2.FrameSettings, http2.FrameWindowUpdate} {
		if f, err := p.ReadFrame(); err != nil || f.Header().Type != want {
			t.Fatalf("%v, %v, want %v", f, err, want)
		}
	}
	p.do(p.WriteSettings(settings...))
	if f, err := p.ReadFrame(); err != nil || !f.Header().Flags.Has(http2.FlagSettingsAck) {
		t.Fatalf("%v, %v, want the answer to SETTINGS", f, err)
	}
	return p
}

func (p *peer) do(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) fields(kv ...string) []byte {
	p.text.Reset()
	for i := 0; i < len(kv); i += 2 {
		p.enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return bytes.Clone(p.text.Bytes())
}

// head begins a stream with exactly these fields.
func (p *peer) head(id uint32, end bool, kv ...string) error {
	return p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndStream: end, EndHeaders: true, BlockFragment: p.fields(kv...)})
}

func (p *peer) get(id uint32, kv ...string) error {
	return p.head(id, true, append([]string{":method", "GET", ":scheme", "http", ":authority", "a", ":path", "/"}, kv...)...)
}

func (p *peer) post(id uint32, kv ...string) error {
	return p.head(id, false, append([]string{":method", "POST", ":scheme", "http", ":authority", "a", ":path", "/"}, kv...)...)
}

// next says in a word what comes next, but for what is of no interest.
func (p *peer) next() string {
	p.nc.SetReadDeadline(time.Now().Add(time.Minute))
	for {
		f, err := p.ReadFrame()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return "nothing"
		}
		if err != nil {
			return "closed"
		}
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			return fmt.Sprint("GOAWAY ", f.ErrCode)
		case *http2.RSTStreamFrame:
			return fmt.Sprint(f.StreamID, " RST ", f.ErrCode)
		case *http2.PingFrame:
			if f.IsAck() {
				return "PONG"
			}
			return "PING"
		case *http2.HeadersFrame:
			kv, err := p.dec.DecodeFull(f.HeaderBlockFragment())
			if err != nil {
				return err.Error()
			}
			return fmt.Sprint(f.StreamID, " ", kv[0].Value)
		case *http2.DataFrame:
			return fmt.Sprintf("%d %q", f.StreamID, f.Data())
		case *http2.WindowUpdateFrame:
			return fmt.Sprintf("%d WINDOW_UPDATE", f.StreamID)
		}
	}
}

// What a peer must not do ends the stream or the connection with the error that RFC 9113 wants for it, or one for the whole connection in place of one for the stream.
func TestErrors(t *testing.T) {
	h := func(f func(p *peer)) func(p *peer) { return f }
	fixed := strings.Repeat("x", 70_000)
	for _, c := range []struct {
		name string
		send func(p *peer)
		want string // the first thing said
	}{
		{"a request", h(func(p *peer) { p.get(1) }), "1 200"},
		{"unknown frames and flags are passed over", h(func(p *peer) {
			p.WriteRawFrame(0xbe, 0xff, 0, []byte("x"))
			p.WriteRawFrame(0xbe, 0xff, 7, []byte("x"))
			p.WriteRawFrame(http2.FramePing, 0xfe, 0, []byte("12345678"))
		}), "PONG"},
		{"an unknown setting", h(func(p *peer) { p.WriteSettings(http2.Setting{ID: 0xbeef, Val: 1}); p.get(1) }), "1 200"},
		{"priority of a stream to come", h(func(p *peer) { p.WritePriority(7, http2.PriorityParam{StreamDep: 3}); p.get(1) }), "1 200"},

		// 4.2, 4.3
		{"frame too large", h(func(p *peer) { p.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, maxFrame+1)) }), "GOAWAY FRAME_SIZE_ERROR"},
		{"head that is no hpack", h(func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, EndHeaders: true, BlockFragment: []byte{0xff, 0xff, 0xff}})
		}), "GOAWAY COMPRESSION_ERROR"},
		{"table larger than was allowed", h(func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, EndHeaders: true, BlockFragment: []byte{0x3f, 0xe1, 0xff, 0x3}})
		}), "GOAWAY COMPRESSION_ERROR"},
		{"another frame within a head", h(func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(":method", "GET")})
			p.WritePing(false, [8]byte{})
		}), "GOAWAY PROTOCOL_ERROR"},
		{"another stream's head within a head", h(func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(":method", "GET")})
			p.get(3)
		}), "GOAWAY PROTOCOL_ERROR"},
		{"continuation of nothing", h(func(p *peer) { p.WriteContinuation(1, true, nil) }), "GOAWAY PROTOCOL_ERROR"},
		{"continuation of another", h(func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(":method", "GET")})
			p.WriteContinuation(3, true, nil)
		}), "GOAWAY PROTOCOL_ERROR"},
		{"empty continuations without end", h(func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(":method", "GET")})
			for range blockParts {
				p.WriteContinuation(1, false, nil)
			}
		}), "GOAWAY ENHANCE_YOUR_CALM"},
		{"continuations without end", h(func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(":method", "GET")})
			for p.WriteContinuation(1, false, bytes.Repeat([]byte{0, 1, 'a', 1, 'b'}, 3000)) == nil {
			}
		}), "GOAWAY ENHANCE_YOUR_CALM"},
		{"value longer than a head", h(func(p *peer) { p.WriteRawFrame(http2.FrameHeaders, 5, 1, p.fields("a", fixed)[:maxFrame]) }), "GOAWAY COMPRESSION_ERROR"},

		// 5.1
		{"data on an idle stream", h(func(p *peer) { p.WriteData(1, true, nil) }), "GOAWAY PROTOCOL_ERROR"},
		{"reset of an idle stream", h(func(p *peer) { p.WriteRSTStream(1, http2.ErrCodeCancel) }), "GOAWAY PROTOCOL_ERROR"},
		{"window of an idle stream", h(func(p *peer) { p.WriteWindowUpdate(1, 1) }), "GOAWAY PROTOCOL_ERROR"},
		{"stream of even number", h(func(p *peer) { p.get(2) }), "GOAWAY PROTOCOL_ERROR"},
		{"data after the end", h(func(p *peer) { p.post(1, "hold", "1"); p.WriteData(1, true, nil); p.WriteData(1, true, []byte("x")) }), "1 RST STREAM_CLOSED"},
		{"head after the end", h(func(p *peer) { p.post(1, "hold", "1"); p.WriteData(1, true, nil); p.get(1) }), "GOAWAY STREAM_CLOSED"},
		{"data after a reset", h(func(p *peer) { p.post(1); p.WriteRSTStream(1, http2.ErrCodeCancel); p.WriteData(1, true, nil) }), "GOAWAY STREAM_CLOSED"},
		{"head after a reset", h(func(p *peer) { p.post(1); p.WriteRSTStream(1, http2.ErrCodeCancel); p.get(1) }), "GOAWAY STREAM_CLOSED"},
		{"smaller number", h(func(p *peer) { p.post(5); p.get(3) }), "GOAWAY STREAM_CLOSED"},
		{"one stream too many", h(func(p *peer) {
			for id := range uint32(5) {
				p.post(2*id + 1)
			}
		}), "9 RST REFUSED_STREAM"},
		{"depends on itself", h(func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: p.fields(":method", "GET"), Priority: http2.PriorityParam{StreamDep: 1, Weight: 1}})
		}), "GOAWAY PROTOCOL_ERROR"},
		{"priority on itself", h(func(p *peer) { p.WritePriority(1, http2.PriorityParam{StreamDep: 1}) }), "GOAWAY PROTOCOL_ERROR"},

		// 6
		{"data on stream 0", h(func(p *peer) { p.WriteRawFrame(http2.FrameData, 0, 0, nil) }), "GOAWAY PROTOCOL_ERROR"},
		{"head on stream 0", h(func(p *peer) { p.get(0) }), "GOAWAY PROTOCOL_ERROR"},
		{"padding beyond the frame", h(func(p *peer) {
			p.post(1)
			p.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{9, 1, 2})
		}), "GOAWAY PROTOCOL_ERROR"},
		{"padding beyond the head", h(func(p *peer) { p.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersPadded|4|1, 1, []byte{9, 1, 2}) }), "GOAWAY PROTOCOL_ERROR"},
		{"reset of stream 0", h(func(p *peer) { p.WriteRawFrame(http2.FrameRSTStream, 0, 0, make([]byte, 4)) }), "GOAWAY PROTOCOL_ERROR"},
		{"reset of odd length", h(func(p *peer) { p.post(1); p.WriteRawFrame(http2.FrameRSTStream, 0, 1, make([]byte, 3)) }), "GOAWAY FRAME_SIZE_ERROR"},
		{"settings on a stream", h(func(p *peer) { p.WriteRawFrame(http2.FrameSettings, 0, 1, nil) }), "GOAWAY PROTOCOL_ERROR"},
		{"settings of odd length", h(func(p *peer) { p.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 5)) }), "GOAWAY FRAME_SIZE_ERROR"},
		{"answer to settings with settings", h(func(p *peer) { p.WriteRawFrame(http2.FrameSettings, http2.FlagSettingsAck, 0, make([]byte, 6)) }), "GOAWAY FRAME_SIZE_ERROR"},
		{"push neither on nor off", h(func(p *peer) { p.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 2}) }), "GOAWAY PROTOCOL_ERROR"},
		{"window beyond the largest", h(func(p *peer) { p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31}) }), "GOAWAY FLOW_CONTROL_ERROR"},
		{"frames below the smallest", h(func(p *peer) { p.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 16383}) }), "GOAWAY PROTOCOL_ERROR"},
		{"frames beyond the largest", h(func(p *peer) { p.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 24}) }), "GOAWAY PROTOCOL_ERROR"},
		{"setting lifts a window beyond the largest", h(func(p *peer) {
			p.post(1)
			p.WriteWindowUpdate(1, 1<<30)
			p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
		}), "GOAWAY FLOW_CONTROL_ERROR"},
		{"ping on a stream", h(func(p *peer) { p.WriteRawFrame(http2.FramePing, 0, 1, make([]byte, 8)) }), "GOAWAY PROTOCOL_ERROR"},
		{"ping of odd length", h(func(p *peer) { p.WriteRawFrame(http2.FramePing, 0, 0, make([]byte, 7)) }), "GOAWAY FRAME_SIZE_ERROR"},
		{"goaway on a stream", h(func(p *peer) { p.WriteRawFrame(http2.FrameGoAway, 0, 1, make([]byte, 8)) }), "GOAWAY PROTOCOL_ERROR"},
		{"push promise", h(func(p *peer) {
			p.WriteRawFrame(http2.FramePushPromise, 4, 1, append([]byte{0, 0, 0, 2}, p.fields(":method", "GET")...))
		}), "GOAWAY PROTOCOL_ERROR"},
		{"window by 0", h(func(p *peer) { p.WriteWindowUpdate(0, 0) }), "GOAWAY PROTOCOL_ERROR"},
		{"a stream's window by 0", h(func(p *peer) { p.post(1); p.WriteWindowUpdate(1, 0) }), "GOAWAY PROTOCOL_ERROR"},
		{"window of odd length", h(func(p *peer) { p.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 3)) }), "GOAWAY FRAME_SIZE_ERROR"},
		{"window beyond 2^31-1", h(func(p *peer) { p.WriteWindowUpdate(0, 1<<31-1) }), "GOAWAY FLOW_CONTROL_ERROR"},
		{"a stream's window beyond 2^31-1", h(func(p *peer) { p.post(1); p.WriteWindowUpdate(1, 1<<31-1) }), "1 RST FLOW_CONTROL_ERROR"},

		// 8
		{"length and no body", h(func(p *peer) { p.get(1, "content-length", "5") }), "1 RST PROTOCOL_ERROR"},
		{"body shorter than its length", h(func(p *peer) { p.post(1, "content-length", "5"); p.WriteData(1, true, []byte("1234")) }), "1 RST PROTOCOL_ERROR"},
		{"body longer than its length", h(func(p *peer) { p.post(1, "content-length", "5"); p.WriteData(1, false, []byte("123456")) }), "1 RST PROTOCOL_ERROR"},
		{"body in pieces shorter, with a trailer", h(func(p *peer) {
			p.post(1, "content-length", "5")
			p.WriteData(1, false, []byte("1"))
			p.head(1, true, "a", "b")
		}), "1 RST PROTOCOL_ERROR"},
		{"length that is no number", h(func(p *peer) { p.post(1, "content-length", "+5") }), "1 RST PROTOCOL_ERROR"},
		{"length twice", h(func(p *peer) { p.post(1, "content-length", "5", "content-length", "5") }), "1 RST PROTOCOL_ERROR"},
		{"upper case", h(func(p *peer) { p.get(1, "A", "b") }), "1 RST PROTOCOL_ERROR"},
		{"pseudo field after others", h(func(p *peer) { p.head(1, true, ":method", "GET", ":scheme", "http", "a", "b", ":path", "/") }), "1 RST PROTOCOL_ERROR"},
		{"pseudo field twice", h(func(p *peer) { p.get(1, ":path", "/") }), "1 RST PROTOCOL_ERROR"},
		{"authority twice", h(func(p *peer) { p.get(1, ":authority", "a") }), "1 RST PROTOCOL_ERROR"},
		{"pseudo field of an answer", h(func(p *peer) { p.get(1, ":status", "200") }), "1 RST PROTOCOL_ERROR"},
		{"pseudo field unknown", h(func(p *peer) { p.get(1, ":x", "y") }), "1 RST PROTOCOL_ERROR"},
		{"no method", h(func(p *peer) { p.head(1, true, ":scheme", "http", ":path", "/") }), "1 RST PROTOCOL_ERROR"},
		{"no scheme", h(func(p *peer) { p.head(1, true, ":method", "GET", ":path", "/") }), "1 RST PROTOCOL_ERROR"},
		{"no path", h(func(p *peer) { p.head(1, true, ":method", "GET", ":scheme", "http") }), "1 RST PROTOCOL_ERROR"},
		{"path empty", h(func(p *peer) { p.head(1, true, ":method", "GET", ":scheme", "http", ":path", "") }), "1 RST PROTOCOL_ERROR"},
		{"path without slash", h(func(p *peer) { p.head(1, true, ":method", "GET", ":scheme", "http", ":path", "x") }), "1 RST PROTOCOL_ERROR"},
		{"path that is a star", h(func(p *peer) { p.head(1, true, ":method", "GET", ":scheme", "http", ":path", "*") }), "1 RST PROTOCOL_ERROR"},
		{"scheme unknown", h(func(p *peer) { p.head(1, true, ":method", "GET", ":scheme", "ftp", ":path", "/") }), "1 RST PROTOCOL_ERROR"},
		{"CONNECT without authority", h(func(p *peer) { p.head(1, true, ":method", "CONNECT") }), "1 RST PROTOCOL_ERROR"},
		{"extended CONNECT", h(func(p *peer) {
			p.head(1, true, ":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/", ":authority", "a")
		}), "1 RST PROTOCOL_ERROR"},
		{"host other than authority", h(func(p *peer) { p.get(1, "host", "b") }), "1 RST PROTOCOL_ERROR"},
		{"host twice", h(func(p *peer) { p.get(1, "host", "a", "host", "a") }), "1 RST PROTOCOL_ERROR"},
		{"connection", h(func(p *peer) { p.get(1, "connection", "close") }), "1 RST PROTOCOL_ERROR"},
		{"transfer-encoding", h(func(p *peer) { p.get(1, "transfer-encoding", "chunked") }), "1 RST PROTOCOL_ERROR"},
		{"upgrade", h(func(p *peer) { p.get(1, "upgrade", "websocket") }), "1 RST PROTOCOL_ERROR"},
		{"te", h(func(p *peer) { p.get(1, "te", "gzip") }), "1 RST PROTOCOL_ERROR"},
		{"te: trailers", h(func(p *peer) { p.get(1, "te", "trailers") }), "1 200"},
		{"line end in a value", h(func(p *peer) { p.get(1, "a", "b\r\nc: d") }), "1 RST PROTOCOL_ERROR"},
		{"line end in a name", h(func(p *peer) { p.get(1, "a\r\nc", "d") }), "1 RST PROTOCOL_ERROR"},
		{"line end in the path", h(func(p *peer) { p.head(1, true, ":method", "GET", ":scheme", "http", ":path", "/\r\na: b") }), "1 RST PROTOCOL_ERROR"},
		{"space in the method", h(func(p *peer) { p.head(1, true, ":method", "GET /x", ":scheme", "http", ":path", "/") }), "1 RST PROTOCOL_ERROR"},
		{"line end in the authority", h(func(p *peer) {
			p.head(1, true, ":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a\r\nb: c")
		}), "1 RST PROTOCOL_ERROR"},
		{"pseudo field in a trailer", h(func(p *peer) { p.post(1); p.head(1, true, ":path", "/") }), "1 RST PROTOCOL_ERROR"},
		{"trailer that is not the end", h(func(p *peer) { p.post(1); p.head(1, false, "a", "b") }), "1 RST PROTOCOL_ERROR"},
		{"trailer in upper case", h(func(p *peer) { p.post(1); p.head(1, true, "A", "b") }), "1 RST PROTOCOL_ERROR"},
		{"a malformed request does not hurt the next", h(func(p *peer) {
			p.post(1, "A", "b")
			p.WriteData(1, true, []byte("x"))
			p.WritePing(false, [8]byte{})
		}), "1 RST PROTOCOL_ERROR PONG"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, testConfig(echo))
			go c.send(p)
			got := p.next()
			for range strings.Count(c.want, " PONG") {
				got += " " + p.next()
			}
			if got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
			if strings.HasPrefix(c.want, "GOAWAY") {
				if got := p.next(); got != "closed" {
					t.Errorf("then %s", got)
				}
			}
		})
	}
}

func TestFirstFrame(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	c := New(a, bufio.NewReaderSize(a, 16<<10), testConfig(echo))
	ran := make(chan error, 1)
	go func() { ran <- c.Run(); a.Close() }()
	go io.Copy(io.Discard, b)
	http2.NewFramer(b, nil).WritePing(false, [8]byte{})
	if err := <-ran; err != http2.ConnectionError(http2.ErrCodeProtocol) {
		t.Error(err)
	}
}

// The head is one of HTTP/1.1, and body and trailer come whole.
func TestRequest(t *testing.T) {
	p := start(t, testConfig(echo))
	go func() {
		p.head(1, false, ":method", "POST", ":scheme", "https", ":path", "/a?b", "host", "h:1", "cookie", "a=1", "x", "1", "cookie", "b=2", "trailer", "s", "x", "2", "te", "trailers", "trailer", "t")
		p.WriteDataPadded(1, false, []byte("bo"), make([]byte, 7))
		p.WriteData(1, false, []byte("dy"))
		p.head(1, true, "s", "1", "content-length", "7", "t", "2")
	}()
	want := `1 "POST /a?b HTTP/1.1\r\nHost: h:1\r\nx: 1\r\nx: 2\r\nte: trailers\r\nCookie: a=1; b=2\r\nTrailer: s, t\r\n\r\nbodyS: 1\r\nT: 2\r\n"`
	if got := p.next() + "," + p.next(); got != "1 200,"+want {
		t.Errorf("%s\nwant %s", got, want)
	}
}

// A head that is too large is handed out as one, whatever is in it, and the next one is read as if nothing had been.
func TestTooBig(t *testing.T) {
	p := start(t, testConfig(func(s *Stream) {
		s.WriteHead([]hpack.HeaderField{{Name: ":status", Value: map[bool]string{true: "431", false: "200"}[s.TooBig]}}, true)
	}))
	go func() {
		p.get(1, "a", strings.Repeat("x", 7000), "b", strings.Repeat("y", 5000), "c", strings.Repeat("z", 6000))
		p.get(3, "d", "e")
	}()
	if got := p.next() + "," + p.next(); got != "1 431,3 200" && got != "3 200,1 431" {
		t.Error(got)
	}
}

// Neither side of a body goes beyond the windows, and all of it arrives.
func TestFlowControl(t *testing.T) {
	const size = 3 << 20
	p := start(t, testConfig(func(s *Stream) {
		n, err := io.Copy(io.Discard, s)
		if err != nil || n != size {
			t.Errorf("read %d bytes, %v", n, err)
		}
		s.WriteHead([]hpack.HeaderField{{Name: ":status", Value: "200"}}, false)
		for range size / 4096 {
			if err := s.Write(make([]byte, 4096), false); err != nil {
				t.Error(err)
				return
			}
		}
		s.Write(nil, true)
	}), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000})
	var mu sync.Mutex
	windows := map[uint32]int{0: connWindow, 1: streamWindow}
	more := sync.NewCond(&mu)
	p.do(p.post(1))
	up := http2.NewFramer(p.nc, nil)
	go func() {
		for left := size; left > 0; {
			mu.Lock()
			n := min(left, 10_000, windows[0], windows[1])
			if n == 0 {
				more.Wait()
				mu.Unlock()
				continue
			}
			windows[0] -= n
			windows[1] -= n
			mu.Unlock()
			left -= n
			up.WriteData(1, left == 0, make([]byte, n))
		}
	}()
	granted, connGranted, got := 1000, 65535, 0
	for {
		f, err := p.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch f := f.(type) {
		case *http2.WindowUpdateFrame:
			mu.Lock()
			windows[f.StreamID] += int(f.Increment)
			more.Broadcast()
			mu.Unlock()
		case *http2.DataFrame:
			if got += len(f.Data()); got > granted || got > connGranted {
				t.Fatalf("%d bytes, granted %d and %d", got, granted, connGranted)
			}
			if f.StreamEnded() {
				if got != size {
					t.Errorf("%d bytes", got)
				}
				return
			}
			if got == granted {
				granted += 20_000
				p.WriteWindowUpdate(1, 20_000)
			}
			if got == connGranted {
				connGranted += 50_000
				p.WriteWindowUpdate(0, 50_000)
			}
		}
	}
}

// What is sent beyond a window is an error of the stream, or of the connection.
func TestWindowOverrun(t *testing.T) {
	for _, c := range []struct {
		streams uint32
		want    string
	}{{1, "1 RST FLOW_CONTROL_ERROR"}, {4, "GOAWAY FLOW_CONTROL_ERROR"}} {
		hold := make(chan struct{})
		cfg := testConfig(func(*Stream) { <-hold })
		cfg.MaxStreams = 8
		p := start(t, cfg)
		go func() {
			if c.streams == 4 {
				p.post(9)
			}
			for id := range c.streams {
				p.post(11 + 2*id)
				for range streamWindow / maxFrame {
					p.WriteData(11+2*id, false, make([]byte, maxFrame))
				}
			}
			id := uint32(11)
			if c.streams == 4 {
				id = 9
			}
			p.WriteData(id, false, []byte("x"))
		}()
		got := p.next()
		if c.streams == 1 {
			got = strings.Replace(got, "11 ", "1 ", 1)
		}
		if got != c.want {
			t.Errorf("%d streams: %s, want %s", c.streams, got, c.want)
		}
		close(hold)
		p.nc.Close()
	}
}

// A stream that is taken back cancels what is done for it, and only that.
func TestCancel(t *testing.T) {
	type made struct {
		s *Stream
		c canceller
	}
	ch := make(chan made)
	p := start(t, testConfig(func(s *Stream) {
		m := made{s, make(canceller)}
		s.Watch(m.c)
		ch <- m
		<-m.c
		if s.Unwatch() || !s.Gone() {
			t.Error("was not told that the client has left")
		}
		if _, err := s.Read(make([]byte, 1)); err == nil {
			t.Error("reads on")
		}
		if s.Write([]byte("x"), true) == nil {
			t.Error("writes on")
		}
	}))
	p.do(p.get(1))
	one := <-ch
	p.do(p.post(3))
	three := <-ch
	p.do(p.WriteRSTStream(3, http2.ErrCodeCancel))
	<-three.c
	if one.s.Gone() {
		t.Error("the other one too")
	}
	p.nc.Close() // and the end of the connection is the end of all
	<-one.c
	if !three.s.Gone() || !one.s.Gone() {
		t.Error("not gone")
	}
	late := make(canceller)
	one.s.Watch(late)
	<-late
}

type canceller chan struct{}

func (c canceller) Cancel() { close(c) }

// Streams taken back are free at first and cost the connection in the end.
func TestRapidReset(t *testing.T) {
	for _, n := range []int{500, 20_000} {
		p := start(t, testConfig(func(s *Stream) { io.Copy(io.Discard, s) }))
		got := make(chan string, 1)
		go func() {
			for {
				if v := p.next(); !strings.HasSuffix(v, "REFUSED_STREAM") {
					got <- v
					return
				}
			}
		}()
		for i := range uint32(n) {
			if p.post(2*i+1) != nil || p.WriteRSTStream(2*i+1, http2.ErrCodeCancel) != nil {
				break
			}
		}
		p.WritePing(false, [8]byte{})
		want := map[int]string{500: "PONG", 20_000: "GOAWAY ENHANCE_YOUR_CALM"}[n]
		if v := <-got; v != want {
			t.Errorf("%d: %s, want %s", n, v, want)
		}
	}
}

// Who does not read the answers to his frames cannot have more of them kept than replyMax.
func TestUnreadReplies(t *testing.T) {
	p := start(t, testConfig(echo))
	for range 3 * replyMax {
		if p.WritePing(false, [8]byte{}) != nil {
			break
		}
	}
	p.nc.Close()
	select {
	case err := <-p.ran:
		p.ran <- err
		if err != http2.ConnectionError(http2.ErrCodeEnhanceYourCalm) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("goes on")
	}
}

// Every wait has its limit.
func TestTimes(t *testing.T) {
	for _, c := range []struct {
		name  string
		send  func(p *peer)
		after time.Duration // when the end, or the ping, comes
		want  string
	}{
		{"idle", func(*peer) {}, 30 * time.Second, "PING"},
		{"a head in pieces", func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(":method", "GET")})
			for range 10 {
				time.Sleep(300 * time.Millisecond)
				p.WriteContinuation(1, false, p.fields("a", "b"))
			}
		}, time.Second, "GOAWAY ENHANCE_YOUR_CALM"},
		{"half a head", func(p *peer) { p.nc.Write([]byte{0, 0, 9, 1, 0, 0, 0, 0, 1, 0x82}) }, time.Second, "GOAWAY ENHANCE_YOUR_CALM"},
		{"half a frame's header", func(p *peer) { p.nc.Write([]byte{0, 0, 9}) }, 2 * time.Second, "GOAWAY ENHANCE_YOUR_CALM"},
		{"a body that does not come", func(p *peer) { p.post(1) }, 2 * time.Second, "1 RST CANCEL"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := start(t, testConfig(echo))
				begin := time.Now()
				go c.send(p)
				got := p.next()
				if took := time.Since(begin); got != c.want || took != c.after {
					t.Errorf("%s after %v, want %s after %v", got, took, c.want, c.after)
				}
				p.nc.Close()
				time.Sleep(10 * time.Second)
			})
		})
	}
}

// A silent connection is closed when it does not answer, one without streams when it is not used; one that answers and has a stream stays.
func TestSilent(t *testing.T) {
	for _, c := range []struct {
		name            string
		stream, answers bool
		after           time.Duration
		want            string
	}{
		{"dead", true, false, 45 * time.Second, "h2: no answer to a PING"},
		{"unused", false, true, 120 * time.Second, "h2: connection unused"},
		{"alive", true, true, 300 * time.Second, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := start(t, testConfig(hold))
				begin := time.Now()
				if c.stream {
					p.do(p.get(1))
				}
				go func() {
					for {
						f, err := p.ReadFrame()
						if err != nil {
							return
						}
						if f, ok := f.(*http2.PingFrame); ok && c.answers {
							p.WritePing(true, f.Data)
						}
					}
				}()
				select {
				case err := <-p.ran:
					p.ran <- err
					if took := time.Since(begin); err.Error() != c.want || took < c.after || took > c.after+time.Second {
						t.Errorf("%v after %v, want %s after %v", err, took, c.want, c.after)
					}
				case <-time.After(c.after + 2*time.Second): // a pipe holds nothing: a PONG on its way can keep the GOAWAY for its second
					if c.want != "" {
						t.Errorf("open after %v", c.after)
					}
				}
				p.nc.Close()
				time.Sleep(2 * time.Second)
			})
		})
	}
}

// A client that gives no room for its answer loses the stream, and one that reads nothing at all the connection.
func TestSlowReader(t *testing.T) {
	for name, room := range map[string]uint32{"stream": 10, "connection": 1 << 30} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				failed := make(chan error, 1)
				p := start(t, testConfig(func(s *Stream) {
					s.WriteHead([]hpack.HeaderField{{Name: ":status", Value: "200"}}, false)
					err := s.Write(make([]byte, 1<<20), true)
					s.Reset(http2.ErrCodeCancel, err)
					failed <- err
				}), http2.Setting{ID: http2.SettingInitialWindowSize, Val: room})
				begin := time.Now()
				p.do(p.WriteWindowUpdate(0, 1<<30))
				p.do(p.get(1))
				if name == "stream" {
					go func() {
						for p.next() != "closed" {
						}
					}()
				}
				if err := <-failed; err == nil || time.Since(begin) > 5*time.Second {
					t.Errorf("%v after %v", err, time.Since(begin))
				}
				p.nc.Close()
				time.Sleep(10 * time.Second)
			})
		})
	}
}

// While a connection drains, the streams under way end, one on its way when it was told is served, later ones are passed over.
func TestDrain(t *testing.T) {
	for _, answers := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			release := make(chan struct{})
			p := start(t, testConfig(func(s *Stream) {
				<-release
				s.WriteHead([]hpack.HeaderField{{Name: ":status", Value: "200"}}, true)
			}))
			p.do(p.get(1))
			synctest.Wait()
			begin := time.Now()
			go p.c.Drain()
			if got := p.next() + ", " + p.next(); got != "GOAWAY NO_ERROR, PING" {
				t.Fatal(got)
			}
			p.do(p.get(3))
			if answers {
				p.do(p.WritePing(true, drainPing))
			}
			if got := p.next(); got != "GOAWAY NO_ERROR" {
				t.Fatal(got)
			}
			if took := time.Since(begin); answers != (took == 0) || took > time.Second {
				t.Errorf("after %v", took)
			}
			p.do(p.post(5))
			p.do(p.WriteData(5, true, []byte("x")))
			close(release)
			got := []string{p.next(), p.next()}
			if s := strings.Join(got, ","); s != "1 200,3 200" && s != "3 200,1 200" {
				t.Error(s)
			}
			if got := p.next(); got != "closed" {
				t.Error(got)
			}
			p.nc.Close()
			time.Sleep(10 * time.Second)
		})
	}
}

// The end goes with the last piece of a body that has not gone out yet, and by itself when it has.
func TestEndWithLastPiece(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p := start(t, testConfig(func(s *Stream) {
				s.WriteHead([]hpack.HeaderField{{Name: ":status", Value: "200"}}, false)
				s.Write([]byte("one"), false)
				s.Write([]byte("two"), false)
				if flushed {
					s.Flush()
					time.Sleep(time.Second)
				}
				s.Write(nil, true)
			}))
			p.do(p.get(1))
			if got := p.next(); got != "1 200" {
				t.Fatal(got)
			}
			var got []string
			for {
				f, err := p.ReadFrame()
				if err != nil {
					t.Fatal(err)
				}
				d := f.(*http2.DataFrame)
				got = append(got, fmt.Sprint(string(d.Data()), d.StreamEnded()))
				if d.StreamEnded() {
					break
				}
			}
			want := map[bool]string{false: "[onefalse twotrue]", true: "[onefalse twofalse true]"}[flushed]
			if fmt.Sprint(got) != want {
				t.Errorf("%v, want %s", got, want)
			}
			p.nc.Close()
			time.Sleep(10 * time.Second)
		})
	}
}

// An answer that takes longer than the other side may take nothing is not lost when the connection was only waiting for it.
func TestDrainSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, testConfig(func(s *Stream) {
			time.Sleep(20 * time.Second)
			s.WriteHead([]hpack.HeaderField{{Name: ":status", Value: "200"}}, true)
		}))
		p.do(p.get(1))
		go p.c.Drain()
		got := []string{p.next(), p.next(), p.next(), p.next(), p.next()}
		if s := strings.Join(got, ", "); s != "GOAWAY NO_ERROR, PING, GOAWAY NO_ERROR, 1 200, closed" {
			t.Error(s)
		}
		p.nc.Close()
		time.Sleep(10 * time.Second)
	})
}

// What small streams at the same time have to say goes out together.
func TestOneWrite(t *testing.T) {
	const n = 50
	var wg sync.WaitGroup
	wg.Add(n)
	a, b := net.Pipe()
	counted := &counter{Conn: a}
	cfg := testConfig(func(s *Stream) {
		wg.Done()
		wg.Wait() // all at once
		s.WriteHead([]hpack.HeaderField{{Name: ":status", Value: "204"}}, true)
	})
	cfg.MaxStreams = n
	c := New(counted, bufio.NewReaderSize(counted, 16<<10), cfg)
	go func() { c.Run(); a.Close() }()
	defer b.Close()
	p := &peer{t: t, nc: b, Framer: http2.NewFramer(b, bufio.NewReader(b)), dec: hpack.NewDecoder(4096, nil)}
	p.enc = hpack.NewEncoder(&p.text)
	go func() {
		p.WriteSettings()
		for i := range uint32(n) {
			p.get(2*i + 1)
		}
	}()
	for answers := 0; answers < n; {
		switch got := p.next(); {
		case strings.HasSuffix(got, " 204"):
			answers++
		case got == "closed":
			t.Fatal(got)
		}
	}
	if w := counted.n; w > n/2 {
		t.Errorf("%d writes for %d streams", w, n)
	}
}

type counter struct {
	net.Conn
	n int
}

func (c *counter) Write(p []byte) (int, error) { c.n++; return c.Conn.Write(p) }

// Whatever a client sends, the connection comes to an end, no handler is left, and every frame that is sent back is one.
func FuzzConn(f *testing.F) {
	seed := func(send func(p *peer)) {
		var wire bytes.Buffer
		p := &peer{Framer: http2.NewFramer(&wire, nil)}
		p.AllowIllegalWrites = true
		p.enc = hpack.NewEncoder(&p.text)
		p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100})
		send(p)
		f.Add(wire.Bytes())
	}
	seed(func(p *peer) { p.get(1, "a", "b"); p.get(3) })
	seed(func(p *peer) {
		p.post(1, "content-length", "3")
		p.WriteData(1, true, []byte("abc"))
		p.WriteWindowUpdate(1, 1000)
	})
	seed(func(p *peer) {
		p.post(1)
		p.WriteDataPadded(1, false, []byte("abc"), make([]byte, 3))
		p.head(1, true, "x", "y")
		p.WritePing(false, [8]byte{1})
	})
	seed(func(p *peer) { p.post(1); p.WriteRSTStream(1, http2.ErrCodeCancel); p.WriteData(1, true, nil) })
	seed(func(p *peer) {
		p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(":method", "GET")})
		p.WriteContinuation(1, true, p.fields(":path", "/"))
		p.WriteGoAway(0, 0, nil)
	})
	f.Fuzz(func(t *testing.T, in []byte) {
		nc := &recorded{in: bytes.NewReader(in)}
		c := New(nc, bufio.NewReaderSize(nc, 16<<10), testConfig(echo))
		c.Run()
		c.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.running != 0 || len(c.streams) != 0 || c.recvWin+c.unsaid != connWindow {
			t.Fatalf("%d handlers, %d streams, window %d and %d", c.running, len(c.streams), c.recvWin, c.unsaid)
		}
		fr := http2.NewFramer(nil, &nc.out)
		for {
			if _, err := fr.ReadFrame(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("said something that is no frame: %v", err)
			}
		}
	})
}

// recorded is a connection that has said all it will.
type recorded struct {
	net.Conn
	in  *bytes.Reader
	mu  sync.Mutex
	out bytes.Buffer
}

func (c *recorded) Read(p []byte) (int, error) { return c.in.Read(p) }
func (c *recorded) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}
func (c *recorded) SetReadDeadline(time.Time) error  { return nil }
func (c *recorded) SetWriteDeadline(time.Time) error { return nil }
func (c *recorded) SetDeadline(time.Time) error      { return nil }

// TestFailsBetweenFrames: writing finds out that the client has left while its requests are still in the buffer. Nobody serves those: their streams
// would never end.
func TestFailsBetweenFrames(t *testing.T) {
	p := start(t, testConfig(hold))
	var frames bytes.Buffer
	fr := http2.NewFramer(&frames, nil)
	for id := uint32(1); id <= 3; id += 2 {
		p.do(fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true,
			BlockFragment: p.fields(":method", "POST", ":scheme", "http", ":authority", "a", ":path", "/")}))
	}
	p.c.mu.Lock() // no frame is taken in meanwhile
	_, err := p.nc.Write(frames.Bytes())
	p.c.failLocked(io.ErrClosedPipe)
	p.c.mu.Unlock()
	p.do(err)
	p.nc.Close()
	select {
	case err := <-p.ran:
		if !errors.Is(err, io.ErrClosedPipe) {
			t.Error(err)
		}
		p.ran <- err
	case <-time.After(4 * time.Second):
		t.Error("streams that were opened after the end go on")
	}
}
