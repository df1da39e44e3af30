package knative

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/test/harness"
)

// test/conformance/runtime/envvars_test.go. PORT is a free port of the machine (listed difference), so it is not 8080.
func TestMustEnvVars(t *testing.T) {
	th := shared(t)
	create(t, th, service("must-env", env("USER_DEFINED", "a value"), env("BOTH", "$(USER_DEFINED) $$(K_SERVICE)")))
	got := see(t, th, "must-env").Env
	if p, err := strconv.Atoi(got["PORT"]); err != nil || p < 1 || p > 65535 {
		t.Errorf("PORT is %q", got["PORT"])
	}
	if got["USER_DEFINED"] != "a value" || got["BOTH"] != "a value $(K_SERVICE)" {
		t.Errorf("%v", got)
	}
}

func TestShouldEnvVars(t *testing.T) {
	th := shared(t)
	create(t, th, service("should-env"))
	for k, want := range map[string]string{"K_SERVICE": "should-env", "K_CONFIGURATION": "should-env", "K_REVISION": "should-env-00001"} {
		if got := see(t, th, "should-env").Env[k]; got != want {
			t.Errorf("%s is %q, want %q", k, got, want)
		}
	}
	for _, k := range []string{"THAW_TOKEN", "THAW_DATA", "SHELL", "USER"} { // nothing of the platform's own environment
		if got, ok := see(t, th, "should-env").Env[k]; ok {
			t.Errorf("%s=%q is the platform's", k, got)
		}
	}
}

// test/conformance/runtime/header_test.go
func TestMustHaveHeadersSet(t *testing.T) {
	th := shared(t)
	create(t, th, service("headers"))
	got := see(t, th, "headers")
	if got.Host != "headers.default.localhost" {
		t.Errorf("Host is %q", got.Host)
	}
	if f := got.header("Forwarded"); !regexp.MustCompile(`^for=127\.0\.0\.1;host=headers\.default\.localhost;proto=http$`).MatchString(f) {
		t.Errorf("Forwarded is %q", f)
	}
	if got.header("X-Request-Id") == "" {
		t.Error("no X-Request-Id")
	}
}

// The client's addresses come first, the user's headers pass unchanged, and what only the platform may say is not taken from
// outside nor handed on.
func TestShouldHaveHeadersSet(t *testing.T) {
	th := shared(t)
	create(t, th, service("headers2"))
	got := see(t, th, "headers2",
		"X-Forwarded-For", "192.0.2.1", "X-Forwarded-Proto", "https", "X-Custom", "Value, \"with\" everything;", "Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		"Connection", "X-Hop", "X-Hop", "1", "Knative-Serving-Revision", "forged", "Knative-Serving-Namespace", "forged", "K-Proxy-Request", "activator", "K-Network-Probe", "queue",
		"K-Original-Host", "forged.example.com", "K-Passthrough-Lb", "true")
	for name, want := range map[string]string{
		"X-Forwarded-For": "192.0.2.1, 127.0.0.1", "X-Forwarded-Proto": "http", "X-Custom": "Value, \"with\" everything;",
		"Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		"X-Hop":       "", "Knative-Serving-Revision": "", "Knative-Serving-Namespace": "", "Knative-Serving-Default-Route": "", "K-Proxy-Request": "", "K-Network-Probe": "", "K-Original-Host": "", "K-Passthrough-Lb": "", "K-Network-Hash": "",
	} {
		if v := got.header(name); v != want {
			t.Errorf("%s is %q, want %q", name, v, want)
		}
	}
	if got.Host != "headers2.default.localhost" {
		t.Errorf("Host is %q", got.Host)
	}
	req, _ := http.NewRequest("POST", "http://headers2.default.localhost/a%2Fb/../c?q=1&q=%20", strings.NewReader("x"))
	if a := th.Do(req); !strings.Contains(a.Body, `"uri":"/a%2Fb/../c?q=1\u0026q=%20"`) || !strings.Contains(a.Body, `"method":"POST"`) {
		t.Errorf("the request line did not pass unchanged: %v", a)
	}
}

// test/conformance/runtime/cmd_args_test.go
func TestCmdArgs(t *testing.T) {
	th := shared(t)
	args := []string{"one", "two words", `"quoted" $HOME *`, "$(K_REVISION)"}
	create(t, th, service("args", container(func(c *api.Container) { c.Args = args })))
	want := append([]string{filepath.Join(bin, "function")}, "one", "two words", `"quoted" $HOME *`, "args-00001")
	if got := see(t, th, "args").Args; !slices.Equal(got, want) {
		t.Errorf("arguments %q, want %q", got, want)
	}
	// A command takes the place of the image's program.
	create(t, th, service("command", container(func(c *api.Container) {
		c.Command, c.Args = []string{"./function", "from", "command"}, []string{"arg"}
	})))
	if got := see(t, th, "command").Args; !slices.Equal(got, []string{"./function", "from", "command", "arg"}) {
		t.Errorf("arguments %q", got)
	}
}

// test/conformance/runtime/workingdir_test.go
func TestWorkingDir(t *testing.T) {
	th := shared(t)
	create(t, th, service("workdir", container(func(c *api.Container) { c.WorkingDir = "/usr" })))
	if got := see(t, th, "workdir").Dir; got != "/usr" {
		t.Errorf("working directory %q", got)
	}
}

// test/conformance/runtime/file_descriptor_test.go
func TestShouldHaveStdinEOF(t *testing.T) {
	th := shared(t)
	create(t, th, service("stdin"))
	harness.Eventually(t, patient, "stdin is at its end", func() bool { return see(t, th, "stdin").Stdin == "EOF" })
}

// What may be written to; the rest of test/conformance/runtime/filesystem_test.go is in contract_test.go.
func TestWritableFolders(t *testing.T) {
	th := shared(t)
	create(t, th, service("files"))
	got := see(t, th, "files")
	if got.Temp != "" || got.Home != "" {
		t.Errorf("/tmp: %q, home: %q", got.Temp, got.Home)
	}
	// A sandbox has a /tmp of its own.
	if dir := got.Env["TMPDIR"]; dir == "" || !strings.HasPrefix(dir, th.Dir) && (dir != "/tmp" || os.Getenv("THAW_PROVIDER") == "process") {
		t.Errorf("TMPDIR is %q", got.Env["TMPDIR"])
	}
}

// TestProbeRuntime is TestProbeRuntime and TestReadinessProbe...: a revision is ready when its probe says so, not before, whatever
// kind of probe it is, fast or with a period.
func TestProbeRuntime(t *testing.T) {
	for name, c := range map[string]struct {
		env   string
		probe api.Probe
	}{
		"http":        {"READY_MS", api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/ready", HTTPHeaders: []api.HTTPHeader{{Name: "X-Probe", Value: "yes"}}}}},
		"http-period": {"READY_MS", api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/ready"}, PeriodSeconds: 1}},
		"tcp":         {"LISTEN_MS", api.Probe{TCPSocket: &api.TCPSocketAction{}}},
		"tcp-period":  {"LISTEN_MS", api.Probe{TCPSocket: &api.TCPSocketAction{}, PeriodSeconds: 1}},
		"exec":        {"READY_MS", api.Probe{Exec: &api.ExecAction{Command: []string{"/bin/sh", "-c", `test -f "$TMPDIR/ready"`}}, PeriodSeconds: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			th := shared(t)
			svc := "probe-" + name
			create(t, th, service(svc, env(c.env, "500"), container(func(o *api.Container) { o.ReadinessProbe = &c.probe })))
			got := see(t, th, svc)
			since := time.Since(got.Started)
			if since < 500*time.Millisecond {
				t.Errorf("called %v after the start, before it was ready", since)
			}
			if http := c.probe.HTTPGet; http != nil && (got.Probes == 0 || len(http.HTTPHeaders) > 0 && got.Probe["X-Probe"] == nil) {
				t.Errorf("%d probes, headers %v", got.Probes, got.Probe)
			}
		})
	}
}

// The negative control of TestProbeRuntime: a probe that never succeeds fails the revision at its deadline, and no request gets
// through.
func TestReadinessProbeFails(t *testing.T) {
	th := shared(t)
	post(t, th, service("probe-never", env("READY_MS", "600000"), annotated("serving.knative.dev/progress-deadline", "2s"),
		container(func(o *api.Container) {
			o.ReadinessProbe = &api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/ready"}}
		})))
	c := condition[*api.Revision](t, th, "probe-never-00001", "Ready", "False")
	if !strings.Contains(c.Reason, "ProgressDeadlineExceeded") {
		t.Errorf("%+v", c)
	}
	if a := th.Get("probe-never", "/"); a.Status != 404 {
		t.Errorf("%v", a)
	}
}

// test/conformance/runtime/liveness_probe_test.go: an instance that fails its liveness probe is replaced, and nobody notices.
func TestLivenessProbe(t *testing.T) {
	th := shared(t)
	create(t, th, service("alive", scaling("min-scale", "1"), container(func(o *api.Container) {
		o.LivenessProbe = &api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/alive"}, PeriodSeconds: 1, FailureThreshold: 2}
	})))
	first := see(t, th, "alive")
	harness.Eventually(t, patient, "the probe is sent", func() bool { return see(t, th, "alive").Probes > 0 })
	if a := th.Get("alive", "/poison"); a.Status != 200 {
		t.Fatalf("%v", a)
	}
	harness.Eventually(t, patient, "another instance answers", func() bool { return see(t, th, "alive").instance() != first.instance() })
	harness.Eventually(t, patient, "the first instance is gone", func() bool { return !slices.Contains(instances(th, "alive-00001"), first.instance()) })
	if c := condition[*api.Service](t, th, "alive", "Ready", "True"); c.Reason != "" {
		t.Errorf("%+v", c)
	}
}

// TestStartupProbe: until it has succeeded there are no others, and no requests.
func TestStartupProbe(t *testing.T) {
	th := shared(t)
	create(t, th, service("startup", env("READY_MS", "1200"), container(func(o *api.Container) {
		o.StartupProbe = &api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/ready"}, PeriodSeconds: 1, FailureThreshold: 20}
		o.LivenessProbe = &api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/ready"}, PeriodSeconds: 1, FailureThreshold: 1}
	})))
	if got := see(t, th, "startup"); time.Since(got.Started) < 1200*time.Millisecond {
		t.Errorf("called %v after the start", time.Since(got.Started))
	}
}

// test/conformance/api/v1/revision_timeout_test.go with a limit of 2 s: in time 200; silent beyond it 504; a first byte at once and
// then beyond it: the status is 200. Knative ends that answer as if it were whole; here it ends as an error.
func TestRevisionTimeout(t *testing.T) {
	th := shared(t)
	create(t, th, service("timeout", image("checker"), func(s *api.Service) { s.Spec.Template.Spec.TimeoutSeconds = ptr(int64(2)) }))
	for _, c := range []struct {
		name, path string
		check      func(a harness.Answer) bool
	}{
		{"in time", "/?sleep=500", func(a harness.Answer) bool { return a.Status == 200 && a.Err == nil }},
		{"silent", "/?sleep=8000", func(a harness.Answer) bool {
			return a.Status == 504 && a.Err == nil && a.Header.Get("X-Thaw-Error") != "" && a.Took >= 2*time.Second && a.Took < 7*time.Second
		}},
		{"first byte at once", "/?stream=2&every=8000", func(a harness.Answer) bool {
			return a.Status == 200 && a.Err != nil && strings.HasPrefix(a.Body, "piece 1 of 2") && !strings.Contains(a.Body, "piece 2") && a.Took < 7*time.Second
		}},
		{"stream in time", "/?stream=5&every=100", func(a harness.Answer) bool {
			return a.Status == 200 && a.Err == nil && strings.Contains(a.Body, "piece 5")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if a := th.Get("timeout", c.path); !c.check(a) {
				t.Errorf("%v after %v, error of the body: %v", a, a.Took, a.Err)
			}
		})
	}
}

// test/e2e/timeout_test.go: the other two limits.
func TestResponseStartAndIdleTimeout(t *testing.T) {
	th := shared(t)
	create(t, th, service("starttimeout", image("checker"), func(s *api.Service) {
		s.Spec.Template.Spec.TimeoutSeconds, s.Spec.Template.Spec.ResponseStartTimeoutSeconds = ptr(int64(30)), ptr(int64(2))
	}))
	create(t, th, service("idletimeout", image("checker"), func(s *api.Service) {
		s.Spec.Template.Spec.TimeoutSeconds, s.Spec.Template.Spec.IdleTimeoutSeconds = ptr(int64(30)), ptr(int64(2))
	}))
	for _, c := range []struct {
		host, path string
		status     int
		broken     bool
	}{
		{"starttimeout", "/?sleep=8000", 504, false},
		{"starttimeout", "/?stream=2&every=3000", 200, false}, // once it has started it may take its time
		{"idletimeout", "/?stream=4&every=800", 200, false},   // longer in all, never silent for long
		{"idletimeout", "/?stream=2&every=8000", 200, true},
	} {
		t.Run(c.host+c.path, func(t *testing.T) {
			t.Parallel()
			if a := th.Get(c.host, c.path); a.Status != c.status || (a.Err != nil) != c.broken || a.Took > 7*time.Second {
				t.Errorf("%v after %v, error of the body: %v", a, a.Took, a.Err)
			}
		})
	}
}

// test/e2e/websocket_test.go: echo, from zero too, and a close that arrives.
func TestWebSocket(t *testing.T) {
	th := shared(t)
	create(t, th, service("socket", image("websocket-echo"), scaling("initial-scale", "0")))
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	for _, path := range []string{"/", "/again"} { // the first one starts the function
		c, resp, err := websocket.Dial(ctx, "ws://socket.default.localhost"+path, &websocket.DialOptions{HTTPClient: th.HTTP})
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != 101 || resp.Header.Get("X-Request-Id") == "" {
			t.Errorf("%v", resp)
		}
		for i := range 20 {
			want := fmt.Sprintf("message %d %s", i, strings.Repeat("x", i*1000))
			if err := c.Write(ctx, websocket.MessageText, []byte(want)); err != nil {
				t.Fatal(err)
			}
			typ, got, err := c.Read(ctx)
			if err != nil || typ != websocket.MessageText || string(got) != want {
				t.Fatalf("%v %q, %v", typ, got, err)
			}
		}
		if err := c.Close(websocket.StatusNormalClosure, "bye"); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

// Output goes to the log, line by line, with the instance that wrote it.
func TestLogging(t *testing.T) {
	th := shared(t)
	create(t, th, service("logging", image("checker"), env("CHECKER_LOG", "/nowhere/at/all"), scaling("initial-scale", "0")))
	if a := th.Get("logging", "/"); a.Status != 503 || a.Header.Get("X-Thaw-Error") != "cannot_start" || a.Header.Get("Retry-After") == "" || !strings.Contains(a.Body, "/nowhere/at/all") {
		t.Errorf("%v", a)
	}
	code, out, errs := th.Verb("", "logs", "logging", "-o", "json")
	if code != 0 || !strings.Contains(out, "/nowhere/at/all") || !strings.Contains(out, `"logging-00001`) {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

// A request's and an answer's body of some megabytes pass unchanged, with and without a length.
func TestBodies(t *testing.T) {
	th := shared(t)
	create(t, th, service("bodies", image("checker")))
	sent := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB
	for name, body := range map[string]io.Reader{"length": strings.NewReader(sent), "chunked": io.MultiReader(strings.NewReader(sent))} {
		req, err := http.NewRequest("POST", "http://bodies.default.localhost/?echo=1", body)
		if err != nil {
			t.Fatal(err)
		}
		if a := th.Do(req); a.Err != nil || a.Status != 200 || a.Body != sent {
			t.Errorf("%s: %d, %d bytes, %v", name, a.Status, len(a.Body), a.Err)
		}
	}
}

// A function whose answer breaks off must not look whole.
func TestCrashInTheMiddleOfAnAnswer(t *testing.T) {
	th := shared(t)
	create(t, th, service("halfway", image("crasher"), env("CRASH", "request")))
	if a := th.Get("halfway", "/"); a.Status == 200 && a.Err == nil {
		t.Errorf("%v", a)
	}
}

// raw sends bytes and returns the first answer and whether the connection was closed after it.
func raw(t *testing.T, th *harness.Thaw, request string) (status int, body string, closed bool) {
	t.Helper()
	c, err := net.Dial("tcp", th.Ingress)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patient))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatalf("%.60q: %v", request, err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%.60q: %v", request, err)
	}
	resp.Body.Close()
	c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	_, err = r.ReadByte()
	return resp.StatusCode, string(b), err != nil && !os.IsTimeout(err)
}
