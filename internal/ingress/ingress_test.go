package ingress

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/certs"
	"github.com/thawrun/thaw/internal/hop"
)

// serve passes one request through and tells what became of it: "next", or a status and what belongs to it.
func serve(t *testing.T, c Config, target string, tls bool, fields ...string) string {
	t.Helper()
	x := &hop.Exchange{Req: &fasthttp.Request{}, Resp: &fasthttp.Response{}, TLS: tls}
	x.Req.Header.SetRequestURI(target)
	for _, f := range fields {
		k, v, _ := strings.Cut(f, ": ")
		switch k {
		case "Method":
			x.Req.Header.SetMethod(v)
		case "Body":
			x.BodySize = int64(len(v))
		default:
			x.Req.Header.Set(k, v)
		}
	}
	next := false
	c.Next = hop.HandlerFunc(func(*hop.Exchange) error { next = true; return nil })
	err := New(c).Serve(x)
	switch {
	case err != nil:
		return err.Error()
	case next:
		return "next"
	case x.Resp.StatusCode() == 308:
		return "308 " + string(x.Resp.Header.Peek("Location"))
	}
	return string(x.Resp.Body())
}

func TestRedirect(t *testing.T) {
	secure := func(host string) bool { return host == "a.example" || host == "hello.default.localhost" }
	for _, c := range []struct {
		host, target, port string
		tls                bool
		fields             []string
		want               string
	}{
		{host: "a.example", target: "/p?q=1&r", want: "308 https://a.example/p?q=1&r"},
		{host: "A.Example:80", target: "/", want: "308 https://a.example/"},
		{host: "a.example.", target: "/", want: "308 https://a.example/"},
		{host: "a.example:8080", target: "/", want: "308 https://a.example:8080/"},
		{host: "a.example:8080", target: "/", port: "8443", want: "308 https://a.example:8443/"},
		{host: "a.example:8080", target: "/", port: "443", want: "308 https://a.example/"},
		{host: "a.example", target: "/", port: "8443", want: "308 https://a.example:8443/"},
		{host: "a.example", target: "*", fields: []string{"Method: OPTIONS"}, want: "308 https://a.example/"},
		{host: "a.example", target: "/", fields: []string{"Method: POST"}, want: "308 https://a.example/"},
		{host: "a.example", target: "//evil.example/", want: "308 https://a.example//evil.example/"},
		{host: "hello.default.localhost:8080", target: "/", want: "308 https://hello.default.localhost:8080/"},
		{host: "a.example", target: "/", tls: true, want: "next"},
		{host: "b.example", target: "/", want: "next"},
		{host: "", target: "/", want: "next"},
		{host: "[::1]:80", target: "/", want: "next"},
		{host: "a.example", target: "/healthz", want: "next"},
		{host: "a.example", target: "/readyz?verbose", want: "next"},
		{host: "a.example", target: "/livez", want: "next"},
		{host: "a.example", target: "/healthz/more", want: "308 https://a.example/healthz/more"},
		{host: "a.example", target: certs.ChallengePath + "x", want: "next"},
		{host: "a.example", target: "/chat", fields: []string{"Connection: Upgrade", "Upgrade: websocket"}, want: "403 tls_required: this host is served over TLS only: use wss:// or https://"},
		{host: "b.example", target: "/chat", fields: []string{"Connection: Upgrade", "Upgrade: websocket"}, want: "next"},
	} {
		got := serve(t, Config{Secure: secure, Port: c.port}, c.target, c.tls, append(c.fields, "Host: "+c.host)...)
		if got != c.want {
			t.Errorf("%s%s %v: %q, want %q", c.host, c.target, c.fields, got, c.want)
		}
	}
}

func TestChallenges(t *testing.T) {
	known := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "a.example" || r.URL.Path != certs.ChallengePath+"token" {
			http.NotFound(w, r)
			return
		}
		io.WriteString(w, "answer")
	})
	for _, c := range []struct {
		host, target string
		tls          bool
		fields       []string
		want         string
	}{
		{host: "a.example", target: certs.ChallengePath + "token", want: "answer"},
		{host: "A.example:80", target: certs.ChallengePath + "token", want: "answer"},
		{host: "a.example", target: certs.ChallengePath + "other", want: "next"},
		{host: "b.example", target: certs.ChallengePath + "token", want: "next"},
		{host: "a.example", target: certs.ChallengePath + "token", fields: []string{"Method: POST"}, want: "next"},
		{host: "a.example", target: certs.ChallengePath + "token", fields: []string{"Body: x"}, want: "next"},
		{host: "a.example", target: certs.ChallengePath + "token", tls: true, want: "next"},
		{host: "a.example", target: "/", want: "next"},
	} {
		got := serve(t, Config{Challenges: known}, c.target, c.tls, append(c.fields, "Host: "+c.host)...)
		if got != c.want {
			t.Errorf("%s%s %v: %q, want %q", c.host, c.target, c.fields, got, c.want)
		}
	}
}

func TestOpen(t *testing.T) {
	next := hop.HandlerFunc(func(*hop.Exchange) error { return nil })
	for _, o := range []Options{{Redirect: true}, {Listen: "127.0.0.1:0"}} {
		if _, err := Open(o, next, nil, nil, nil); err == nil || !strings.Contains(err.Error(), "--tls-cert") {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if _, err := Open(Options{Local: true, Dir: t.TempDir(), Redirect: true, Listen: "nonsense"}, next, nil, nil, nil); err == nil {
		t.Error("a bad address was taken")
	}
}
