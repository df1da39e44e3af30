package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/thawrun/thaw/internal/trace/tracetest"
	"github.com/thawrun/thaw/test/harness"
)

const function = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: traced}\nspec: {template: {metadata: {annotations: {" +
	`autoscaling.knative.dev/initial-scale: "0"` + "}}, spec: {containers: [{image: 'exec://$BIN/function'}]}}}\n"

// One cold request that its caller wants traced: one trace with the router's, the queue's, the start's and the sending's span, the last of which the
// function sees as its parent; and one line in the access log that says the same.
func TestColdTrace(t *testing.T) {
	collector := tracetest.New(t)
	log := filepath.Join(t.TempDir(), "access.log")
	th := harness.Start(t, bin, "--trace-endpoint", collector.URL, "--trace-ratio", "0", "--access-log", log)
	th.Apply(function)
	const id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	a := th.Get("traced", "/x?y=z", "Traceparent", "00-"+id+"-"+parent+"-01", "Tracestate", "a=1")
	if a.Status != 200 {
		t.Fatal(a)
	}
	if warm := th.Get("traced", "/untraced"); warm.Status != 200 {
		t.Fatal(warm)
	}
	var saw struct{ Headers http.Header }
	if err := json.Unmarshal([]byte(a.Body), &saw); err != nil {
		t.Fatal(err)
	}
	spans := map[string]tracetest.Span{}
	for _, s := range collector.Wait(t, 4) {
		spans[s.Name] = s
		if s.Trace != id || s.State != "a=1" {
			t.Errorf("%+v", s)
		}
	}
	root, wait, start, out := spans["router.route"], spans["queue.wait"], spans["instance.start"], spans["forward"]
	if len(spans) != 4 || root.Parent != parent || wait.Parent != root.ID || start.Parent != wait.ID || out.Parent != root.ID {
		t.Fatalf("%+v", spans)
	}
	if got := saw.Headers.Get("Traceparent"); got != "00-"+id+"-"+out.ID+"-01" || saw.Headers.Get("Tracestate") != "a=1" {
		t.Errorf("the function sees %q, %q", got, saw.Headers.Get("Tracestate"))
	}
	if start.Start.Before(root.Start) || start.End.After(wait.End) || out.Start.Before(wait.Start) || out.End.After(root.End) {
		t.Errorf("spans are out of order: %+v", spans)
	}
	if root.Attrs["thaw.revision"] != "default/traced-00001" || root.Attrs["thaw.instance"] == nil || root.Attrs["url.path"] != "/x" || root.Resource["service.name"] != "thaw-dev" {
		t.Errorf("%+v", root)
	}

	if err := th.Stop(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	var lines []map[string]any
	for text := range bytes.Lines(b) {
		var l map[string]any
		if err := json.Unmarshal(text, &l); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		lines = append(lines, l)
	}
	if len(lines) != 2 || len(collector.Spans()) != 4 {
		t.Fatalf("%d lines, %d spans:\n%s", len(lines), len(collector.Spans()), b)
	}
	for k, want := range map[string]any{"path": "/x", "status": 200.0, "cold": true, "revision": "traced-00001", "service": "traced", "trace_id": id, "instance": root.Attrs["thaw.instance"],
		"request_id": a.Header.Get("X-Request-Id"), "bytes_out": float64(len(a.Body)), "reason": ""} {
		if lines[0][k] != want {
			t.Errorf("%s = %v, want %v", k, lines[0][k], want)
		}
	}
	if lines[0]["queue_wait"].(float64) <= 0 || lines[0]["duration"].(float64) < lines[0]["queue_wait"].(float64) || lines[1]["cold"] != false {
		t.Errorf("%s", b)
	}
}

var readyAt = regexp.MustCompile(`ready listen=(\S+)`)

// hop runs a program that stands alone until the test ends, and returns its address.
func hop(t *testing.T, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, program), args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	m := readyAt.FindStringSubmatch(line)
	if err != nil || m == nil {
		t.Fatalf("%s says %q, %v", program, line, err)
	}
	return m[1]
}

// Router, activator and queue-proxy in processes of their own: the router decides, the others follow, and the spans of all three are one tree.
func TestTraceAcrossProcesses(t *testing.T) {
	collector := tracetest.New(t)
	saw := make(chan string, 1)
	fn := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { saw <- r.Header.Get("Traceparent") }))
	defer fn.Close()
	flags := func(ratio string) []string {
		return []string{"--listen", "127.0.0.1:0", "--trace-endpoint", collector.URL, "--trace-ratio", ratio}
	}
	qp := hop(t, "queueproxy", append(flags("0"), "--upstream", fn.Listener.Addr().String(), "--concurrency", "1", "--instance", "i-1")...)
	act := hop(t, "thaw", append([]string{"activator", "--static", "*=" + qp}, flags("0")...)...)
	router := hop(t, "thaw", append([]string{"router", "--metrics", "127.0.0.1:0", "--static", "*=" + act}, flags("1")...)...)
	resp, err := http.Get("http://" + router + "/")
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	spans := collector.Wait(t, 6)
	by := map[string]tracetest.Span{}
	for _, s := range spans {
		by[s.Resource["service.name"].(string)+" "+s.Name] = s
		if s.Trace != spans[0].Trace {
			t.Errorf("another trace: %+v", s)
		}
	}
	up := ""
	for _, name := range []string{"thaw-router router.route", "thaw-router forward", "thaw-activator router.route", "thaw-activator forward", "thaw-queueproxy queueproxy.serve", "thaw-queueproxy forward"} {
		s, ok := by[name]
		if !ok || s.Parent != up {
			t.Errorf("%s: %+v, want parent %q", name, s, up)
		}
		up = s.ID
	}
	if parent := <-saw; !strings.HasSuffix(parent, up+"-01") {
		t.Errorf("the function sees %q, want parent %q", parent, up)
	}
}
