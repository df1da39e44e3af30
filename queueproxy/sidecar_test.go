package queueproxy

import (
	"bytes"
	"context"
	"errors"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

func TestSidecarProbes(t *testing.T) {
	notYet := errors.New("not ready: nobody listens")
	for _, c := range []struct {
		name     string
		agent    string
		probe    string // K-Network-Probe; "-" = no such header
		ready    error
		draining bool
		status   int
		body     string // "function" = it got there
	}{
		{"kubelet", "kube-probe/1.32", "queue", nil, false, 200, "queue"},
		{"activator", "Knative-Activator-Probe", "queue", nil, false, 200, "queue"},
		{"autoscaler", "Knative-Autoscaling-Probe", "queue", nil, false, 200, "queue"},
		{"not ready", "kube-probe/1.32", "queue", notYet, false, 503, notYet.Error()},
		{"draining", "kube-probe/1.32", "queue", nil, true, 503, "shutting down"},
		{"for somebody else", "kube-probe/1.32", "activator", nil, false, 400, `unexpected probe header value: "activator"`},
		{"for nobody", "kube-probe/1.32", "-", nil, false, 400, `unexpected probe header value: ""`},
		{"somebody else", "curl/8", "queue", nil, false, 200, "function"},
		{"ordinary", "curl/8", "-", nil, false, 200, "function"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := New(Config{Concurrency: 1}, hop.HandlerFunc(func(x *hop.Exchange) error {
				x.Resp.SetBodyString("function")
				return nil
			}))
			s := &Sidecar{Proxy: p, Ready: func(context.Context) error { return c.ready }}
			if c.draining {
				p.load.drain()
			}
			x := exchange()
			x.Req.Header.SetUserAgent(c.agent)
			if c.probe != "-" {
				x.Req.Header.Set("k-network-probe", c.probe)
			}
			if err := s.Serve(x); err != nil {
				t.Fatal(err)
			}
			if x.Resp.StatusCode() != c.status || string(x.Resp.Body()) != c.body {
				t.Errorf("%d %q", x.Resp.StatusCode(), x.Resp.Body())
			}
			if n, _ := p.load.totals(); (n == 1) != (c.body == "function") {
				t.Errorf("%d requests counted", n)
			}
		})
	}
}

// What hops tell each other by error becomes an answer at the border.
func TestSidecarErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down error
		var proxied bool
		p := New(Config{Concurrency: 1, Queue: -1}, hop.HandlerFunc(func(x *hop.Exchange) error { proxied = x.Proxied; return down }))
		s := &Sidecar{Proxy: p}
		serve := func(activator bool) (*hop.Exchange, error) {
			x := exchange()
			if activator {
				x.Req.Header.Set("K-Proxy-Request", "activator")
			}
			return x, s.Serve(x)
		}
		want := func(err error, status int, reason string) {
			t.Helper()
			var e *hop.Error
			if !errors.As(err, &e) || e.Status != status || e.Reason != reason {
				t.Errorf("got %v, want %d %s", err, status, reason)
			}
		}
		inside, err := serve(true)
		if err != nil || !proxied || inside.Resp.ConnectionClose() {
			t.Fatal(err, proxied, inside.Resp.ConnectionClose())
		}
		_, err = serve(true)
		want(err, 503, hop.ReasonQueueFull)
		_, err = serve(false)
		want(err, 503, hop.ReasonQueueFull)
		inside.Finish()

		down = hop.ErrNotSent
		_, err = serve(false)
		want(err, 502, hop.ReasonUnreachable)
		down = nil

		s.Stopping = func() bool { return true }
		if x, err := serve(false); err != nil || !x.Resp.ConnectionClose() {
			t.Errorf("%v, Connection: close %v", err, x.Resp.ConnectionClose())
		}
		p.load.drain()
		_, err = serve(false)
		want(err, 503, hop.ReasonDraining)
	})
}

// Each line is a comment or a sample of the text format, each family is declared once, and histograms add up.
func TestWriteMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ps []*Proxy
		for _, id := range []string{"a", `q"u\o` + "\n" + "te"} {
			p := New(Config{Revision: "ns/rev", Instance: id, Concurrency: 2}, hop.HandlerFunc(func(*hop.Exchange) error { return nil }))
			for i := range 3 {
				x := exchange()
				x.Proxied = i == 0
				if i < 2 {
					time.Sleep(30 * time.Millisecond)
				}
				if err := p.Serve(x); err != nil {
					t.Fatal(err)
				}
				if i > 0 {
					x.Resp.SetStatusCode(200 + 300*(i-1))
					x.Finish()
				}
			}
			ps = append(ps, p)
		}
		var b bytes.Buffer
		if err := WriteMetrics(&b, ps); err != nil {
			t.Fatal(err)
		}
		if err := WriteReport(&b, ps[0].Report(time.Now())); err != nil {
			t.Fatal(err)
		}
		sample := regexp.MustCompile(`^([a-z_]+)\{([a-z_]+="([^"\\\n]|\\["\\n])*",?)+\} [0-9.e+-]+$`)
		declared := map[string]bool{}
		current := ""
		for line := range strings.Lines(b.String()) {
			line = strings.TrimSuffix(line, "\n")
			if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
				current, _, _ = strings.Cut(rest, " ")
				if declared[current] {
					t.Errorf("%s twice", current)
				}
				declared[current] = true
			} else if !strings.HasPrefix(line, "# HELP ") {
				m := sample.FindStringSubmatch(line)
				if m == nil || !strings.HasPrefix(m[1], current) {
					t.Errorf("not a sample of %s: %s", current, line)
				}
			}
		}
		for _, want := range []string{
			`thaw_queueproxy_inside{namespace="ns",revision="rev",instance="a",state="running"} 1`,
			`thaw_queueproxy_requests_total{namespace="ns",revision="rev",instance="a",way="activator"} 1`,
			`thaw_queueproxy_requests_total{namespace="ns",revision="rev",instance="a",way="direct"} 2`,
			`thaw_queueproxy_request_duration_seconds_bucket{namespace="ns",revision="rev",instance="a",status_class="2xx",le="0.025"} 0`,
			`thaw_queueproxy_request_duration_seconds_bucket{namespace="ns",revision="rev",instance="a",status_class="2xx",le="0.05"} 1`,
			`thaw_queueproxy_request_duration_seconds_sum{namespace="ns",revision="rev",instance="a",status_class="2xx"} 0.03`,
			`thaw_queueproxy_request_duration_seconds_bucket{namespace="ns",revision="rev",instance="a",status_class="5xx",le="0.005"} 1`,
			`thaw_queueproxy_requests_per_second{namespace="ns",revision="rev",instance="a"} 3`,
			`thaw_queueproxy_limit{namespace="ns",revision="rev",instance="q\"u\\o\nte"} 2`,
		} {
			if !strings.Contains(b.String(), want+"\n") {
				t.Errorf("missing: %s", want)
			}
		}
		if t.Failed() {
			t.Log(b.String())
		}
	})
}
