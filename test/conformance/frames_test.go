package conformance

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// framer is a raw HTTP/2 client.
type framer struct {
	*http2.Framer
	c    *client
	text bytes.Buffer
	enc  *hpack.Encoder
}

// http2Conn opens a connection with preface and settings.
func (e *env) http2Conn() *framer {
	c := e.dial()
	c.send(http2.ClientPreface)
	f := &framer{Framer: http2.NewFramer(c, c.br), c: c}
	f.AllowIllegalWrites = true
	f.enc = hpack.NewEncoder(&f.text)
	f.WriteSettings()
	return f
}

// fields encodes names and values in turn.
func (f *framer) fields(kv ...string) []byte {
	f.text.Reset()
	for i := 0; i+1 < len(kv); i += 2 {
		f.enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return bytes.Clone(f.text.Bytes())
}

// request sends a stream's head: GET, or POST if it does not end there, with more fields.
func (f *framer) request(id uint32, end bool, kv ...string) {
	method := "GET"
	if !end {
		method = "POST"
	}
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, EndStream: end,
		BlockFragment: f.fields(append([]string{":method", method, ":scheme", "http", ":authority", "x", ":path", "/frames"}, kv...)...)})
}

// raw sends a stream's head with exactly these fields.
func (f *framer) raw(id uint32, end bool, kv ...string) {
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, EndStream: end, BlockFragment: f.fields(kv...)})
}

// verdict reads until it is clear what became of a stream: "closed" (the connection), "goaway", "reset" or the status of an answer.
func (f *framer) verdict(id uint32) string {
	dec := hpack.NewDecoder(4096, nil)
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				return "nothing"
			}
			return "closed"
		}
		switch fr := fr.(type) {
		case *http2.GoAwayFrame:
			if fr.ErrCode != http2.ErrCodeNo {
				return "goaway"
			}
		case *http2.RSTStreamFrame:
			if fr.StreamID == id {
				return "reset"
			}
		case *http2.SettingsFrame:
			if !fr.IsAck() {
				f.WriteSettingsAck()
			}
		case *http2.HeadersFrame:
			kv, err := dec.DecodeFull(fr.HeaderBlockFragment())
			if err != nil {
				return "garbage"
			}
			if fr.StreamID == id && len(kv) > 0 && kv[0].Name == ":status" && kv[0].Value >= "200" {
				return kv[0].Value
			}
		}
	}
}

// badFrames are what an HTTP/2 client must not do. Each is refused: by an answer from 400 on, by a reset, by GOAWAY or by closing; no whole
// request reaches the function, and the next connection is served.
var badFrames = []struct {
	name string
	send func(f *framer)
}{
	{"first-frame-not-settings", nil},
	{"frame-too-large", func(f *framer) { f.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20)) }},
	{"stream-of-even-number", func(f *framer) { f.request(2, true) }},
	{"data-on-idle-stream", func(f *framer) { f.WriteData(1, true, []byte("hello")) }},
	{"data-on-stream-0", func(f *framer) { f.WriteRawFrame(http2.FrameData, http2.FlagDataEndStream, 0, []byte("x")) }},
	{"headers-on-stream-0", func(f *framer) { f.request(0, true) }},
	{"push-promise", func(f *framer) {
		f.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, BlockFragment: f.fields(":method", "GET"), EndHeaders: true})
	}},
	{"hpack-garbage", func(f *framer) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, EndStream: true, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff}})
	}},
	{"hpack-table-too-large", func(f *framer) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, EndStream: true, BlockFragment: []byte{0x3f, 0xe1, 0xff, 0xff, 0x7f, 0x82}})
	}},
	{"headers-without-end-then-other-frame", func(f *framer) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: f.fields(":method", "GET")})
		f.WritePing(false, [8]byte{})
	}},
	{"continuation-alone", func(f *framer) { f.WriteContinuation(1, true, f.fields(":method", "GET")) }},
	{"continuation-flood", func(f *framer) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: f.fields(":method", "GET", ":scheme", "http", ":authority", "x", ":path", "/")})
		junk := bytes.Repeat([]byte{0x00, 0x01, 'a', 0x01, 'b'}, 3000)
		for range 2000 {
			if f.WriteContinuation(1, false, junk) != nil {
				return
			}
		}
	}},
	{"continuation-flood-of-empty-frames", func(f *framer) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: f.fields(":method", "GET")})
		for range 100_000 {
			if f.WriteContinuation(1, false, nil) != nil {
				return
			}
		}
		f.WriteContinuation(1, true, nil)
	}},
	{"fields-beyond-the-limit", func(f *framer) { f.request(1, true, "x-big", strings.Repeat("a", 200<<10)) }},
	{"fields-that-unpack-to-megabytes", func(f *framer) {
		f.text.Reset()
		f.enc.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("a", 3000)})
		block := append(f.fields(":method", "GET", ":scheme", "http", ":authority", "x", ":path", "/", "x", strings.Repeat("a", 3000)), bytes.Repeat([]byte{0x80 | 62}, 8000)...)
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, EndStream: true, BlockFragment: block})
	}},
	{"window-update-of-zero", func(f *framer) { f.request(1, false); f.WriteWindowUpdate(1, 0) }},
	{"window-overflow", func(f *framer) { f.WriteWindowUpdate(0, 1<<31-1); f.WriteWindowUpdate(0, 1<<31-1) }},
	{"settings-window-too-large", func(f *framer) { f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31}) }},
	{"settings-of-odd-length", func(f *framer) { f.WriteRawFrame(http2.FrameSettings, 0, 0, []byte{1, 2, 3}) }},
	{"ping-of-odd-length", func(f *framer) { f.WriteRawFrame(http2.FramePing, 0, 0, []byte{1, 2, 3}) }},
	{"rst-of-idle-stream", func(f *framer) { f.WriteRSTStream(1, http2.ErrCodeCancel) }},
	{"headers-after-end", func(f *framer) {
		f.request(1, false, "content-length", "5")
		f.WriteData(1, true, []byte("hel"))
		f.request(1, true)
	}},
	{"body-longer-than-length", func(f *framer) { f.request(1, false, "content-length", "3"); f.WriteData(1, true, []byte("hello")) }},
	{"body-shorter-than-length", func(f *framer) { f.request(1, false, "content-length", "5"); f.WriteData(1, true, []byte("hel")) }},
	{"length-without-body", func(f *framer) { f.request(1, true, "content-length", "5") }},
	{"two-lengths", func(f *framer) {
		f.request(1, false, "content-length", "5", "content-length", "6")
		f.WriteData(1, true, []byte("hello"))
	}},
	{"length-not-decimal", func(f *framer) { f.request(1, false, "content-length", "0x5"); f.WriteData(1, true, []byte("hello")) }},
	{"body-cut-by-reset", func(f *framer) {
		f.request(1, false, "content-length", "50000")
		f.WriteData(1, false, make([]byte, 10000))
		f.WriteRSTStream(1, http2.ErrCodeCancel)
		f.c.closeWrite()
	}},
	{"body-cut-by-close", func(f *framer) { f.request(1, false); f.WriteData(1, false, make([]byte, 10000)); f.c.closeWrite() }},
	{"name-in-upper-case", func(f *framer) { f.request(1, true, "X-Upper", "a") }},
	{"name-empty", func(f *framer) { f.request(1, true, "", "a") }},
	{"name-with-space", func(f *framer) { f.request(1, true, "x a", "a") }},
	{"name-with-colon", func(f *framer) { f.request(1, true, "x:a", "a") }},
	{"name-with-line-end", func(f *framer) { f.request(1, true, "x\r\nx-b", "a") }},
	{"value-with-line-end", func(f *framer) { f.request(1, true, "x-a", "a\r\nx-b: c") }},
	{"value-with-request", func(f *framer) { f.request(1, true, "x-a", "a\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n") }},
	{"value-with-nul", func(f *framer) { f.request(1, true, "x-a", "a\x00b") }},
	{"connection-field", func(f *framer) { f.request(1, true, "connection", "x-a") }},
	{"transfer-encoding", func(f *framer) {
		f.request(1, false, "transfer-encoding", "chunked")
		f.WriteData(1, true, []byte("0\r\n\r\n"))
	}},
	{"te-other-than-trailers", func(f *framer) { f.request(1, true, "te", "gzip") }},
	{"pseudo-field-after-others", func(f *framer) {
		f.raw(1, true, ":method", "GET", ":scheme", "http", "x-a", "b", ":authority", "x", ":path", "/")
	}},
	{"pseudo-field-twice", func(f *framer) {
		f.raw(1, true, ":method", "GET", ":scheme", "http", ":authority", "x", ":path", "/a", ":path", "/b")
	}},
	{"pseudo-field-unknown", func(f *framer) { f.request(1, true, ":x", "y") }},
	{"pseudo-field-of-an-answer", func(f *framer) { f.request(1, true, ":status", "200") }},
	{"no-method", func(f *framer) { f.raw(1, true, ":scheme", "http", ":authority", "x", ":path", "/") }},
	{"no-path", func(f *framer) { f.raw(1, true, ":method", "GET", ":scheme", "http", ":authority", "x") }},
	{"no-scheme", func(f *framer) { f.raw(1, true, ":method", "GET", ":authority", "x", ":path", "/") }},
	{"path-empty", func(f *framer) { f.raw(1, true, ":method", "GET", ":scheme", "http", ":authority", "x", ":path", "") }},
	{"path-with-space", func(f *framer) {
		f.raw(1, true, ":method", "GET", ":scheme", "http", ":authority", "x", ":path", "/ HTTP/1.1\r\nX: y")
	}},
	{"path-without-slash", func(f *framer) { f.raw(1, true, ":method", "GET", ":scheme", "http", ":authority", "x", ":path", "a") }},
	{"method-with-space", func(f *framer) {
		f.raw(1, true, ":method", "GET /smuggled HTTP/1.1\r\nX:", ":scheme", "http", ":authority", "x", ":path", "/")
	}},
	{"host-with-slash", func(f *framer) {
		f.raw(1, true, ":method", "GET", ":scheme", "http", ":authority", "x/y", ":path", "/")
	}},
	{"host-with-line-end", func(f *framer) {
		f.raw(1, true, ":method", "GET", ":scheme", "http", ":authority", "x\r\nX-A: b", ":path", "/")
	}},
	{"extended-connect", func(f *framer) {
		f.raw(1, false, ":method", "CONNECT", ":scheme", "http", ":authority", "x", ":path", "/", ":protocol", "websocket")
	}},
	{"trailer-with-pseudo-field", func(f *framer) {
		f.request(1, false)
		f.WriteData(1, false, []byte("hello"))
		f.raw(1, true, ":path", "/other")
	}},
}

// floods are legal frame by frame. They end in an answer or a refusal, within the time limit of a case, and the next connection is served.
var floods = []struct {
	name string
	send func(f *framer)
}{
	{"ping", func(f *framer) { f.many(20_000, func(i int) error { return f.WritePing(false, [8]byte{byte(i)}) }) }},
	{"settings", func(f *framer) { f.many(20_000, func(int) error { return f.WriteSettings() }) }},
	{"empty-data", func(f *framer) {
		f.request(1, false)
		f.many(20_000, func(int) error { return f.WriteData(1, false, nil) })
	}},
	{"window-update", func(f *framer) { f.many(20_000, func(int) error { return f.WriteWindowUpdate(0, 1) }) }},
	{"priority", func(f *framer) {
		f.many(20_000, func(i int) error { return f.WritePriority(uint32(2*i+1), http2.PriorityParam{StreamDep: 0, Weight: 1}) })
	}},
	{"unknown-frames", func(f *framer) { f.many(20_000, func(int) error { return f.WriteRawFrame(0xbe, 0, 0, []byte("x")) }) }},
	{"rapid-reset", func(f *framer) {
		f.many(5_000, func(i int) error {
			f.request(uint32(2*i+1), true)
			return f.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel)
		})
	}},
	{"too-many-streams", func(f *framer) { f.many(2_000, func(i int) error { f.request(uint32(2*i+1), false); return nil }) }},
}

// many writes n times, or until the other side has had enough. What comes back is thrown away meanwhile.
func (f *framer) many(n int, write func(i int) error) {
	go io.Copy(io.Discard, f.c.br)
	for i := range n {
		if write(i) != nil {
			return
		}
	}
}

// TestFrames sends HTTP/2 frames by hand.
func TestFrames(t *testing.T) {
	t.Parallel()
	overPaths(t, func(t *testing.T, p *path) {
		// good checks that the next connection is served. Those who left may have filled a queue, or keep a small function busy with connections: that has to
		// be over in a moment.
		good := func(e *env) {
			var v string
			for end := time.Now().Add(limit / 4); ; time.Sleep(time.Millisecond) {
				f := e.http2Conn()
				f.request(1, true)
				if v = f.verdict(1); v != "503" && v != "502" || time.Now().After(end) {
					break
				}
			}
			if v != "200" {
				e.Errorf("the next connection: %s", v)
			}
		}
		for _, b := range badFrames {
			runCase(t, p, testCase{name: "frames-" + b.name, run: func(e *env) {
				whole := make(chan string, 16)
				e.fn.handle(func(c *call) {
					if body, _, err := c.body(); err == nil {
						whole <- c.head + body
						c.send(ok)
						return
					}
					c.end()
				})
				if b.send == nil {
					c := e.dial()
					c.send(http2.ClientPreface)
					f := &framer{Framer: http2.NewFramer(c, c.br), c: c}
					f.WritePing(false, [8]byte{})
					if v := f.verdict(1); v != "closed" && v != "goaway" {
						e.Errorf("%s", v)
					}
					return
				}
				f := e.http2Conn()
				b.send(f)
				switch v := f.verdict(1); {
				case v == "closed", v == "goaway", v == "reset", v >= "400" && v <= "599":
				default:
					e.Errorf("%s", v)
				}
				select {
				case w := <-whole:
					e.Errorf("reached the function as a whole request: %.300q", w)
				case <-time.After(5 * time.Millisecond):
				}
				f.c.Close()
				e.free()
				e.fn.handle(nil)
				good(e)
			}})
		}
		for _, b := range floods {
			runCase(t, p, testCase{name: "flood-" + b.name, run: func(e *env) {
				e.fn.handle(nil)
				f := e.http2Conn()
				b.send(f)
				f.c.Close()
				e.free()
				good(e)
			}})
		}
	})
}
