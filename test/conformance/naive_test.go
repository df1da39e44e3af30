package conformance

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"testing"
)

// pipe is a proxy that does not look at what it carries.
func pipe(t *testing.T, to string) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				out, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer out.Close()
				go func() { io.Copy(out, in); out.(*net.TCPConn).CloseWrite() }()
				io.Copy(in, out)
			}()
		}
	}()
	return ln.Addr().String()
}

// buffering is the proxy that is written in an afternoon: it takes each message whole, or what there is of it, before it passes it on.
func buffering(t *testing.T, to string) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	// A connection for each request: the function closes those of a case that was caught, and a refusal for want of one would look like caution.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		req, err := http.NewRequest(r.Method, "http://"+to+r.URL.String(), bytes.NewReader(body))
		if err != nil {
			w.WriteHeader(500)
			return
		}
		req.Header, req.Host = r.Header, r.Host
		resp, err := client.Do(req)
		if err != nil {
			w.WriteHeader(502)
			return
		}
		defer resp.Body.Close()
		body, _ = io.ReadAll(resp.Body)
		for k, vv := range resp.Header {
			w.Header()[k] = vv
		}
		w.Header().Del("Content-Length")
		w.WriteHeader(resp.StatusCode)
		w.Write(body)
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// TestNaiveProxies is the suite's own control: proxies that make the usual mistakes are caught by the cases that are there for them.
func TestNaiveProxies(t *testing.T) {
	t.Parallel()
	for _, n := range []struct {
		name  string
		start func(t *testing.T, to string) string
		cases []string
	}{
		{"pipe", pipe, []string{
			"cl-and-te", "cl-two-values", "te-and-cl", "space-in-name", "nul-in-value", "two-hosts", "no-host", "http-1.2",
			"hop-by-hop-request", "hop-by-hop-answer", "connection-named-request", "internal-dropped", "internal-dropped-any-case", "request-id-made", "absolute-form",
			"upgrade-h2c-stripped", "trailer-request-forbidden", "trailer-answer-forbidden", "stale-keep-alive-post",
		}},
		{"buffering", buffering, []string{
			"answer-cut-length-http11", "answer-cut-at-chunk-boundary-http11", "answer-cut-before-last-crlf-http11", "upload-cut-large-length-reset", "upload-cut-large-chunked-fin", "chunk-cut-at-boundary",
			"early-hints", "continue-refused", "trailer-request", "trailer-answer", "hop-by-hop-answer", "internal-dropped",
		}},
	} {
		t.Run(n.name, func(t *testing.T) {
			t.Parallel()
			p := &path{name: n.name, fn: newFunction(t), router: true, caught: map[string]bool{}}
			p.addr = n.start(t, p.fn.addr())
			all := map[string]testCase{}
			for _, c := range append(http1Cases(), badCases()...) {
				all[c.name] = c
			}
			for _, name := range n.cases {
				c, ok := all[name]
				if !ok {
					t.Errorf("no case %s", name)
					continue
				}
				runCase(t, p, c)
				if !p.caught[name] {
					t.Errorf("%s does not catch the proxy", name)
				}
			}
		})
	}
}
