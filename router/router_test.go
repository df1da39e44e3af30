package router

import (
	"bufio"
	"fmt"
	"math"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/routes"
)

func table() *routes.Table {
	hello := &routes.Route{Namespace: "default", Service: "hello", Targets: []routes.Target{{Revision: "default/hello-1", Percent: 100}},
		Tags: map[string]api.RevisionID{"v0": "default/hello-0"}}
	return &routes.Table{Hosts: map[string]*routes.Route{
		"hello.default.localhost":    hello,
		"v0-hello.default.localhost": {Namespace: "default", Service: "hello", Tag: "v0", Targets: []routes.Target{{Revision: "default/hello-0", Percent: 100}}},
		"my.example.com":             hello,
		"*.wild.example.com":         {Namespace: "default", Service: "wild", Targets: []routes.Target{{Revision: "default/wild-1", Percent: 100}}},
		"*.deep.wild.example.com":    {Namespace: "default", Service: "deep", Targets: []routes.Target{{Revision: "default/deep-1", Percent: 100}}},
		"private.default.svc":        {Namespace: "default", Service: "private", Local: true, Targets: []routes.Target{{Revision: "default/private-1", Percent: 100}}},
		"empty.default.localhost":    {Namespace: "default", Service: "empty"},
	}}
}

func newExchange(host string, header ...string) *hop.Exchange {
	x := &hop.Exchange{Req: &fasthttp.Request{}, Resp: &fasthttp.Response{}, RemoteAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}}
	x.Req.Header.SetHost(host)
	x.Req.SetRequestURI("/")
	for i := 0; i+1 < len(header); i += 2 {
		x.Req.Header.Add(header[i], header[i+1])
	}
	return x
}

// testdata/routes.txt: host, optional address and tag header, and where the request must go.
func TestRoutes(t *testing.T) {
	b, err := os.ReadFile("testdata/routes.txt")
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(Config{Next: hop.HandlerFunc(func(*hop.Exchange) error { return nil })})
	if err != nil {
		t.Fatal(err)
	}
	r.SetTable(table())
	for round := range 2 { // the second time some answers come from the cache
		for n, line := range strings.Split(string(b), "\n") {
			if line == "" || line[0] == '#' {
				continue
			}
			f := strings.Fields(line)
			host, want := f[0], f[len(f)-1]
			x := newExchange(host)
			for _, opt := range f[1 : len(f)-2] {
				switch k, v, _ := strings.Cut(opt, "="); k {
				case "tag":
					x.Req.Header.Set("Knative-Serving-Tag", v)
				case "from":
					x.RemoteAddr = &net.TCPAddr{IP: net.ParseIP(v)}
				default:
					t.Fatalf("line %d: %s", n+1, opt)
				}
			}
			err := r.Serve(x)
			got := string(x.Revision)
			if err != nil {
				got = fmt.Sprint(err.(*hop.Error).Status)
			}
			if got != want {
				t.Errorf("round %d, line %d: %s: got %s, want %s", round, n+1, line, got, want)
			}
		}
	}
}

func TestStamps(t *testing.T) {
	var seen fasthttp.RequestHeader
	r, _ := New(Config{Next: hop.HandlerFunc(func(x *hop.Exchange) error {
		x.Req.Header.CopyTo(&seen)
		x.Resp.Header.Set("X-Thaw-Error", "queue_full")
		return nil
	})})
	r.SetTable(table())
	x := newExchange("hello.default.localhost:8080", "X-Forwarded-For", "10.1.1.1", "Forwarded", "for=10.1.1.1", "X-Forwarded-Proto", "https",
		"K-Proxy-Request", "activator", "Knative-Serving-Revision", "evil", "k-network-probe", "queue", "X-Mine", "kept")
	x.RemoteAddr = &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 7}
	if err := r.Serve(x); err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]string{
		"Host":                      "hello.default.localhost:8080",
		"Knative-Serving-Revision":  "hello-1",
		"Knative-Serving-Namespace": "default",
		"X-Forwarded-For":           "10.1.1.1, 2001:db8::1",
		"X-Forwarded-Proto":         "http",
		"X-Forwarded-Host":          "hello.default.localhost:8080",
		"Forwarded":                 `for=10.1.1.1, for="[2001:db8::1]";host="hello.default.localhost:8080";proto=http`,
		"K-Proxy-Request":           "",
		"K-Network-Probe":           "",
		"X-Mine":                    "kept",
	} {
		if got := string(seen.Peek(k)); got != want {
			t.Errorf("%s: %q, want %q", k, got, want)
		}
	}
	if got := x.Resp.Header.Peek("X-Thaw-Error"); len(got) > 0 {
		t.Errorf("the function's X-Thaw-Error got out: %s", got)
	}
}

// Lines of one name keep their order, whatever the router removes or sets beside them.
func TestOrderOfRepeatedFields(t *testing.T) {
	r, err := New(Config{Next: hop.HandlerFunc(func(*hop.Exchange) error { return nil })})
	if err != nil {
		t.Fatal(err)
	}
	r.SetTable(table())
	for _, others := range []string{"X-Forwarded-For: 1.2.3.4\r\n", "X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: 5.6.7.8\r\n", "Forwarded: for=a\r\n", "K-Network-Hash: x\r\nk-network-hash: y\r\n"} {
		x := newExchange("")
		if err := x.Req.Header.Read(bufio.NewReader(strings.NewReader("GET / HTTP/1.1\r\nHost: hello.default.localhost\r\n" + others + "X-A: 1\r\nX-A: 2\r\nX-A: 3\r\n\r\n"))); err != nil {
			t.Fatal(err)
		}
		if err := r.Serve(x); err != nil {
			t.Fatal(err)
		}
		h := &x.Req.Header
		if got := fmt.Sprintf("%s", h.PeekAll("X-A")); got != "[1 2 3]" {
			t.Errorf("%q: %s", others, got)
		}
		if strings.Contains(others, "For") && len(h.PeekAll("X-Forwarded-For")) != 1 || len(h.PeekAll("K-Network-Hash")) > 0 {
			t.Errorf("%q: %s", others, h)
		}
	}
}

func TestWeights(t *testing.T) {
	targets := []routes.Target{{Revision: "a", Percent: 80}, {Revision: "b", Percent: 0}, {Revision: "c", Percent: 20}}
	const n = 100_000
	got := map[api.RevisionID]int{}
	for range n {
		got[pick(targets)]++
	}
	// Six standard deviations: a wrong rule fails, chance does not.
	if math.Abs(float64(got["a"])-.8*n) > 6*math.Sqrt(n*.8*.2) || got["b"] != 0 {
		t.Errorf("%v", got)
	}
}

// Unknown hosts must not make memory grow.
func TestUnknownHostsAreBounded(t *testing.T) {
	r, _ := New(Config{CacheHosts: 16, Next: hop.HandlerFunc(func(*hop.Exchange) error { return nil })})
	r.SetTable(table())
	for i := range 1000 {
		if err := r.Serve(newExchange(fmt.Sprintf("no-%d.example", i))); err == nil {
			t.Fatal("routed")
		}
	}
	if n := r.view.Load().found.Len(); n > 16 {
		t.Errorf("%d hosts kept", n)
	}
}

func FuzzLookup(f *testing.F) {
	for _, s := range []string{"hello.default.localhost", "HELLO.default.localhost:80", "[::1]:80", "a.wild.example.com", "...", "*.wild.example.com", ":", "a:b:c"} {
		f.Add(s)
	}
	r, _ := New(Config{Next: hop.HandlerFunc(func(*hop.Exchange) error { return nil })})
	r.SetTable(table())
	v := r.view.Load()
	f.Fuzz(func(t *testing.T, host string) {
		a, b := v.lookup([]byte(host)), v.lookup([]byte(host))
		if a != b {
			t.Errorf("%q: %v, then %v", host, a, b)
		}
	})
}

func BenchmarkLookup(b *testing.B) {
	r, _ := New(Config{Next: hop.HandlerFunc(func(*hop.Exchange) error { return nil })})
	r.SetTable(table())
	v := r.view.Load()
	host := []byte("hello.default.localhost")
	b.ReportAllocs()
	for b.Loop() {
		if v.lookup(host) == nil {
			b.Fatal("lost")
		}
	}
}

// BenchmarkServe is the router's own work on a request with the headers that browsers send, without any connection.
func BenchmarkServe(b *testing.B) {
	r, _ := New(Config{Next: hop.HandlerFunc(func(*hop.Exchange) error { return nil })})
	r.SetTable(table())
	x := newExchange("hello.default.localhost")
	var saved fasthttp.RequestHeader
	for _, k := range []string{"User-Agent", "Accept", "Accept-Language", "Accept-Encoding", "Cookie", "Cache-Control"} {
		x.Req.Header.Set(k, "some value of usual length")
	}
	x.Req.Header.CopyTo(&saved)
	addr := x.RemoteAddr
	b.ReportAllocs()
	for b.Loop() {
		req, resp := x.Req, x.Resp
		x.Reset()
		x.Req, x.Resp, x.RemoteAddr = req, resp, addr
		saved.CopyTo(&x.Req.Header)
		if err := r.Serve(x); err != nil {
			b.Fatal(err)
		}
	}
}
