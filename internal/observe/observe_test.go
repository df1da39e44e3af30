package observe_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/meter"
	"github.com/thawrun/thaw/internal/observe"
	"github.com/thawrun/thaw/internal/trace"
	"github.com/thawrun/thaw/internal/trace/otlplean"
	"github.com/thawrun/thaw/internal/trace/tracetest"
)

// system is a front before a function that repeats what it was sent.
type system struct {
	addr    string
	seen    atomic.Pointer[http.Header] // of the last request to the function
	observe *observe.Observer
	stop    func() // ends the front, then the observer
}

// start makes a system around an observer of its own, or around watch.
func start(t *testing.T, cfg observe.Config, watch hop.Observer) *system {
	t.Helper()
	s := &system{}
	fn := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := r.Header.Clone()
		s.seen.Store(&h)
		if r.URL.Path == "/early" {
			w.Write([]byte("no"))
			return
		}
		b, _ := io.ReadAll(r.Body)
		if r.URL.Path == "/broken" {
			w.Header().Set("Content-Length", "10")
			w.Write([]byte("half"))
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
		w.Write(b)
	}))
	t.Cleanup(fn.Close)
	cfg.Span, cfg.Service, cfg.Version = "router.route", "thaw-test", "v1"
	cfg.Exporter = func(url string, resource []trace.Attr) trace.Exporter { return otlplean.New(url, resource) }
	var err error
	if s.observe, err = observe.New(cfg); err != nil {
		t.Fatal(err)
	}
	if watch == nil {
		watch = s.observe.Front()
	}
	to := forward.New(forward.Config{Addr: fn.Listener.Addr().String()})
	steps := hop.HandlerFunc(func(x *hop.Exchange) error { // what router, activator and queue-proxy leave
		if string(x.Req.Header.RequestURI()) == "/refused" {
			return &hop.Error{Status: 503, Reason: hop.ReasonQueueFull, Message: "full"}
		}
		x.Namespace, x.Service, x.Revision, x.Instance = "default", "hello", "default/hello-00001", "i-1"
		if strings.HasPrefix(string(x.Req.Header.RequestURI()), "/cold") {
			x.QueuedAt, x.Queued, x.Cold = x.Arrived, time.Microsecond, true
			x.Start.Decided, x.Start.Exec, x.Start.Ready = x.Arrived, x.Arrived, x.Arrived.Add(time.Microsecond)
		}
		return to.Serve(x)
	})
	fr := front.New(front.Config{Observer: watch}, steps)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 2)
	go func() { ran <- fr.Serve(ln) }()
	go func() { ran <- s.observe.Run(ctx) }()
	var once atomic.Bool
	s.stop = func() {
		if once.Swap(true) {
			return
		}
		hurry, end := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer end()
		fr.Shutdown(hurry)
		to.Close()
		cancel()
		for range 2 {
			if err := <-ran; err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(s.stop)
	return s
}

// send sends a request over HTTP/1.1, each on a connection of its own, and returns the status.
func (s *system) send(t *testing.T, path, body string, lines ...string) int {
	t.Helper()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: hello.example\r\nConnection: close\r\nContent-Length: %d\r\n", path, len(body))
	for _, l := range lines {
		fmt.Fprintf(c, "%s\r\n", l)
	}
	fmt.Fprintf(c, "\r\n%s", body)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

const (
	id     = "4bf92f3577b34da6a3ce929d0e0e4736"
	parent = "00f067aa0ba902b7"
)

// What the function sees of a trace, and which spans there are, by what the request brings.
func TestPropagation(t *testing.T) {
	for _, c := range []struct {
		name   string
		ratio  float64
		lines  []string
		want   string // Traceparent at the function: "" none, "same", "new" (a trace of ours), "child" (the caller's, our span)
		state  string // Tracestate at the function
		parent string // of the root span
	}{
		{"sampled by the caller", 0, []string{"traceparent: 00-" + id + "-" + parent + "-01", "tracestate: a=1", "tracestate: b=2"}, "child", "a=1,b=2", parent},
		{"not sampled by the caller", 1, []string{"traceparent: 00-" + id + "-" + parent + "-00", "tracestate: a=1"}, "same", "a=1", ""},
		{"none, ratio 0", 0, nil, "", "", ""},
		{"none, ratio 1", 1, nil, "new", "", ""},
		{"state without parent", 1, []string{"tracestate: a=1"}, "new", "", ""},
		{"malformed, ratio 0", 0, []string{"traceparent: 00-" + id + "-" + parent + "-1", "tracestate: a=1"}, "", "", ""},
		{"malformed, ratio 1", 1, []string{"traceparent: 00-zzz", "tracestate: a=1"}, "new", "", ""},
		{"two", 0, []string{"traceparent: 00-" + id + "-" + parent + "-01", "traceparent: 00-" + id + "-" + parent + "-01"}, "", "", ""},
		{"newer version", 0, []string{"TRACEPARENT: cc-" + id + "-" + parent + "-01-more"}, "child", "", parent},
	} {
		t.Run(c.name, func(t *testing.T) {
			collector := tracetest.New(t)
			s := start(t, observe.Config{TraceEndpoint: collector.URL, TraceRatio: c.ratio}, nil)
			if code := s.send(t, "/", "", c.lines...); code != 200 {
				t.Fatal(code)
			}
			s.stop() // and what was recorded has been sent
			saw := *s.seen.Load()
			got := saw["Traceparent"]
			if state := strings.Join(saw["Tracestate"], ","); state != c.state {
				t.Errorf("tracestate %q, want %q", state, c.state)
			}
			spans := collector.Spans()
			switch c.want {
			case "":
				if len(got) > 0 || len(spans) > 0 {
					t.Errorf("traceparent %q, %d spans, want nothing", got, len(spans))
				}
				return
			case "same":
				if len(got) != 1 || got[0] != "00-"+id+"-"+parent+"-00" || len(spans) > 0 {
					t.Errorf("traceparent %q, %d spans, want it as it came and none", got, len(spans))
				}
				return
			}
			if len(spans) != 2 || len(got) != 1 {
				t.Fatalf("traceparent %q, spans %+v", got, spans)
			}
			root, out := spans[0], spans[1]
			if want := "00-" + root.Trace + "-" + out.ID + "-01"; got[0] != want {
				t.Errorf("traceparent %q, want %q", got[0], want)
			}
			if (root.Trace == id) != (c.want == "child") || root.Parent != c.parent || out.Parent != root.ID || out.Trace != root.Trace || root.State != c.state {
				t.Errorf("spans %+v", spans)
			}
		})
	}
}

// The spans of a cold request hang together, lie in each other and say what they are about, whatever bytes the client sent.
func TestSpans(t *testing.T) {
	collector := tracetest.New(t)
	s := start(t, observe.Config{TraceEndpoint: collector.URL, TraceRatio: 1}, nil)
	if code := s.send(t, "/cold?secret=1", "body", "User-Agent: a\xffb"); code != 200 {
		t.Fatal(code)
	}
	s.stop()
	spans := map[string]tracetest.Span{}
	for _, sp := range collector.Spans() {
		spans[sp.Name] = sp
	}
	root, wait, begin, out := spans["router.route"], spans["queue.wait"], spans["instance.start"], spans["forward"]
	if len(spans) != 4 || wait.Parent != root.ID || begin.Parent != wait.ID || out.Parent != root.ID || root.Parent != "" {
		t.Fatalf("%+v", spans)
	}
	for _, sp := range spans {
		if sp.Trace != root.Trace || sp.Start.Before(root.Start) || sp.End.After(root.End) || sp.Failed || sp.Resource["service.name"] != "thaw-test" {
			t.Errorf("%+v", sp)
		}
	}
	for k, want := range map[string]any{"http.request.method": "POST", "url.path": "/cold", "server.address": "hello.example", "user_agent.original": "a\ufffdb",
		"http.response.status_code": int64(200), "thaw.revision": "default/hello-00001", "thaw.instance": "i-1", "thaw.service": "hello"} {
		if root.Attrs[k] != want {
			t.Errorf("%s = %v, want %v", k, root.Attrs[k], want)
		}
	}
	if strings.Join(begin.Events, " ") != "decided exec" || out.Attrs["thaw.instance"] != "i-1" {
		t.Errorf("%+v %+v", begin, out)
	}
}

// A collector that is away costs spans, and neither a request nor the shutdown.
func TestNoCollector(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s := start(t, observe.Config{TraceEndpoint: "http://" + ln.Addr().String(), TraceRatio: 1}, nil)
	for range 20 {
		if code := s.send(t, "/", ""); code != 200 {
			t.Fatal(code)
		}
	}
	begin := time.Now()
	s.stop()
	if d := time.Since(begin); d > 8*time.Second {
		t.Errorf("the end took %v", d)
	}
	var b strings.Builder
	s.observe.WriteMetrics(&b)
	if !strings.Contains(b.String(), `thaw_trace_spans_total{outcome="export_failed"} 40`) {
		t.Error(b.String())
	}
}

type line struct {
	Method, Host, Path, Protocol, Reason, Revision, Namespace, Service, Instance string
	Status                                                                       int
	Cold, Cut                                                                    bool
	In                                                                           int64   `json:"bytes_in"`
	Out                                                                          int64   `json:"bytes_out"`
	Wait                                                                         float64 `json:"queue_wait"`
	Duration                                                                     float64
	Trace                                                                        string `json:"trace_id"`
	ID                                                                           string `json:"request_id"`
}

func lines(t *testing.T, path string) (out []line) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for text := range bytes.Lines(b) {
		var l line
		if err := json.Unmarshal(text, &l); err != nil {
			t.Fatalf("%v: %q", err, text)
		}
		out = append(out, l)
	}
	return out
}

// Each end that a request can have makes one line that says so.
func TestAccessLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	requests := &meter.Requests{}
	requests.Add("default/hello-00001", "hello")
	s := start(t, observe.Config{AccessLog: path, Requests: requests}, nil)
	s.send(t, "/a?b=c", "hello", "X-Request-Id: me", "traceparent: 00-"+id+"-"+parent+"-00")
	s.send(t, "/cold", strings.Repeat("x", 20_000))
	s.send(t, "/refused", "")
	s.send(t, "/broken", "")
	malformed(t, s.addr)
	h2(t, s.addr)
	s.stop()
	got := lines(t, path)
	if len(got) != 6 {
		t.Fatalf("%d lines: %+v", len(got), got)
	}
	byPath := map[string]line{} // a line may overtake that of another connection
	for i := range got {
		if got[i].Duration <= 0 || (got[i].ID == "") != (got[i].Method == "") {
			t.Errorf("%+v", got[i])
		}
		got[i].Duration = 0
		if got[i].ID != "me" {
			got[i].ID = ""
		}
		byPath[got[i].Path] = got[i]
	}
	all := line{Method: "POST", Host: "hello.example", Path: "/a", Protocol: "HTTP/1.1", Namespace: "default", Service: "hello", Revision: "hello-00001", Instance: "i-1", Status: 200}
	a, cold, refused, broken, h2 := all, all, all, all, all
	a.In, a.Out, a.ID = 5, 5, "me"
	cold.Path, cold.In, cold.Out, cold.Cold, cold.Wait = "/cold", 20_000, 20_000, true, 0.000001
	refused = line{Method: "POST", Host: "hello.example", Path: "/refused", Protocol: "HTTP/1.1", Status: 503, Reason: "queue_full", Out: 5}
	broken.Path, broken.Out, broken.Cut = "/broken", 4, true
	h2.Path, h2.Protocol, h2.In, h2.Out, h2.Host = "/h2", "HTTP/2", 3, 3, s.addr
	for _, want := range []line{a, cold, refused, broken, {Status: 400, Reason: "bad_request", Out: 18}, h2} {
		if got := byPath[want.Path]; got != want {
			t.Errorf("line %+v\nwant %+v", got, want)
		}
	}
	var b strings.Builder
	if err := s.observe.WriteMetrics(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`revision="hello-00001",http_response_status_class="2xx"} 4`, `revision="",http_response_status_class="5xx"} 1`, `revision="",http_response_status_class="4xx"} 1`,
		`thaw_revision_answers_cut_total{namespace="default",service="hello",revision="hello-00001"} 1`, `thaw_access_log_lines_total{outcome="written"} 6`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %s in\n%s", want, &b)
		}
	}
}

func malformed(t *testing.T, addr string) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n")
	io.ReadAll(c)
}

func h2(t *testing.T, addr string) {
	t.Helper()
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &p}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Post("http://"+addr+"/h2", "text/plain", strings.NewReader("abc"))
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
}

// An answer that comes while the request's body is still on its way: nothing counts any more when the line is written.
func TestEarlyAnswer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	s := start(t, observe.Config{AccessLog: path}, nil)
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &p}
	defer tr.CloseIdleConnections()
	body := strings.Repeat("x", 1<<20)
	for range 20 {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", len(body))
		go io.WriteString(c, body)                                               // breaks off when c is closed
		if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err == nil { // a reset may overtake the answer
			io.Copy(io.Discard, resp.Body)
		}
		c.Close()
		if resp, err := (&http.Client{Transport: tr}).Post("http://"+s.addr+"/early", "text/plain", strings.NewReader(body)); err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	}
	s.stop()
	got := lines(t, path)
	if len(got) != 40 {
		t.Errorf("%d lines, want 40", len(got))
	}
	for _, l := range got {
		if l.Path != "/early" || l.In < 0 || l.In > int64(len(body)) || l.Out > 2 {
			t.Errorf("%+v", l)
		}
	}
}

// fifo is a pipe that nobody reads and that is full.
func fifo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	rc, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Until the pipe itself refuses: a deadline may have passed before the first byte is in it.
	filled := rc.Write(func(fd uintptr) bool {
		for err == nil {
			_, err = syscall.Write(int(fd), make([]byte, 64<<10))
		}
		return true
	})
	if filled != nil || err != syscall.EAGAIN {
		t.Fatal(filled, err)
	}
	return path
}

// A log that nobody takes away does not slow a request down: more lines than the buffer holds are answered, and what was dropped is counted.
func TestStuckLog(t *testing.T) {
	s := start(t, observe.Config{AccessLog: fifo(t), AccessLogFormat: "{path} " + strings.Repeat("x", 400<<10)}, nil)
	for range 10 {
		if code := s.send(t, "/", ""); code != 200 {
			t.Fatal(code)
		}
	}
	s.stop()
	var b strings.Builder
	s.observe.WriteMetrics(&b)
	// 1 MiB holds two lines; whether the writer had taken one before it hung is chance.
	if strings.Contains(b.String(), `{outcome="buffer_full"} 0`) || !strings.Contains(b.String(), `{outcome="written"} 0`) {
		t.Error(b.String())
	}
}

// writing is the control of TestStuckLog: a log that is written on the request's way.
type writing struct{ f *os.File }

func (w *writing) Begin(*hop.Exchange) {}
func (w *writing) End(x *hop.Exchange) { fmt.Fprintf(w.f, "%s\n", x.Req.Header.RequestURI()) }

func TestStuckLogControl(t *testing.T) {
	f, err := os.OpenFile(fifo(t), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, observe.Config{}, &writing{f})
	t.Cleanup(func() { f.Close() }) // before the system ends, or that hangs too
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	br := bufio.NewReader(c)
	for i := range 2 {
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if i > 0 {
			c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		}
		resp, err := http.ReadResponse(br, nil)
		if i == 0 {
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, resp.Body)
		} else if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a synchronous log does not block: %v", err)
		}
	}
}

// SIGHUP makes the process open its file anew; it does not end it.
func TestHangup(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	s := start(t, observe.Config{AccessLog: path, AccessLogFormat: "{path}"}, nil)
	wait := func(name, want string) {
		t.Helper()
		for until := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
			if b, _ := os.ReadFile(name); string(b) == want {
				return
			}
			if time.Now().After(until) {
				b, err := os.ReadFile(name)
				t.Fatalf("%s has %q (%v), want %q", name, b, err, want)
			}
		}
	}
	s.send(t, "/1", "")
	wait(path, "/1\n")
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	wait(path, "")
	s.send(t, "/2", "")
	wait(path, "/2\n")
	wait(path+".old", "/1\n")
}

func TestBadConfig(t *testing.T) {
	for _, c := range []struct {
		cfg  observe.Config
		says string
	}{
		{observe.Config{TraceEndpoint: "collector:4317"}, "--trace-endpoint"},
		{observe.Config{TraceEndpoint: "http://a", TraceRatio: 2}, "--trace-ratio"},
		{observe.Config{AccessLog: "-", AccessLogFormat: "{stat}"}, `no field "stat"`},
		{observe.Config{AccessLog: "/no/such/folder/log"}, "access log: open"},
	} {
		c.cfg.Exporter = func(url string, r []trace.Attr) trace.Exporter { return otlplean.New(url, r) }
		if _, err := observe.New(c.cfg); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v", c.cfg, err)
		}
	}
	if o, err := observe.New(observe.Config{}); err != nil || o.Front() != nil {
		t.Errorf("nothing to observe: %v, %v", o.Front(), err)
	}
}

// exchange is one as a browser's request leaves it.
func exchange(t testing.TB, lines string) *hop.Exchange {
	t.Helper()
	x := &hop.Exchange{Req: &fasthttp.Request{}, Resp: &fasthttp.Response{}, Arrived: time.Now(), Revision: "default/hello-00001", RemoteAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5}}
	err := x.Req.Header.Read(bufio.NewReader(strings.NewReader("GET /path?q=1 HTTP/1.1\r\nHost: fn.example\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\nAccept: text/html,application/xhtml+xml\r\n" +
		"Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate\r\nCookie: a=b; c=d\r\nCache-Control: max-age=0\r\n" + lines + "\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func observer(t testing.TB, cfg observe.Config) *observe.Observer {
	t.Helper()
	cfg.Exporter = func(string, []trace.Attr) trace.Exporter { return nowhere{} }
	o, err := observe.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

type nowhere struct{}

func (nowhere) Export(context.Context, []trace.Span) error { return nil }

var cases = []struct{ name, lines string }{
	{"none", ""},
	{"unsampled", "Traceparent: 00-" + id + "-" + parent + "-00\r\nTracestate: a=1\r\n"},
}

func counting() *meter.Requests {
	r := &meter.Requests{}
	r.Add("default/hello-00001", "hello")
	return r
}

// A request that is not sampled is counted without an allocation, and looked at for a trace without one.
func TestNoAllocation(t *testing.T) {
	for _, c := range cases {
		o := observer(t, observe.Config{TraceEndpoint: "http://127.0.0.1:1", Requests: counting()})
		x := exchange(t, c.lines)
		o.Begin(x)
		o.End(x)
		if n := testing.AllocsPerRun(1000, func() { o.Begin(x); o.End(x) }); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
}

// BenchmarkTrace is what tracing adds to a request that is not sampled, and to one that is.
func BenchmarkTrace(b *testing.B) {
	for _, c := range cases {
		b.Run(c.name, func(b *testing.B) {
			o := observer(b, observe.Config{TraceEndpoint: "http://127.0.0.1:1"})
			x := exchange(b, c.lines)
			b.ReportAllocs()
			for b.Loop() {
				o.Begin(x)
			}
		})
	}
	b.Run("sampled", func(b *testing.B) {
		o := observer(b, observe.Config{TraceEndpoint: "http://127.0.0.1:1", TraceRatio: 1})
		x := exchange(b, "")
		x.Sent = x.Arrived
		b.ReportAllocs()
		for b.Loop() {
			x.Req.Header.Del("Traceparent")
			o.Begin(x)
			o.End(x)
		}
	})
}

// BenchmarkEnd is what is done when a request is over.
func BenchmarkEnd(b *testing.B) {
	for _, c := range []struct {
		name string
		cfg  observe.Config
	}{{"count", observe.Config{Requests: counting()}}, {"log", observe.Config{AccessLog: os.DevNull}}} {
		b.Run(c.name, func(b *testing.B) {
			o := observer(b, c.cfg)
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error)
			go func() { done <- o.Run(ctx) }()
			x := exchange(b, "")
			b.ReportAllocs()
			for b.Loop() {
				o.End(x)
			}
			cancel()
			<-done
		})
	}
}
