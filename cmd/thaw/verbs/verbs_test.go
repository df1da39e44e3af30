package verbs

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/internal/endpoints"
)

func manifest(name, image string) string {
	return fmt.Sprintf(`apiVersion: serving.knative.dev/v1
kind: Service
metadata:
  name: %s
spec:
  template:
    spec:
      containers:
        - image: %s
`, name, image)
}

func TestApply(t *testing.T) {
	s := startServer(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "a.yaml")
	write(t, file, manifest("hello", "exec:///bin/a"))
	s.run(t, "apply", "-f", file).want(t, 0, "service/hello created\nservice/hello ready at http://hello.default.localhost:")
	s.run(t, "apply", "-f", file).want(t, 0, "service/hello unchanged\n")
	write(t, file, manifest("hello", "exec:///bin/b"))
	s.run(t, "apply", "-f", file).want(t, 0, "service/hello configured\n")

	// A folder, with several documents, lists and another namespace; and standard input.
	write(t, filepath.Join(dir, "b.yml"), "---\n# nothing\n---\n"+manifest("two", "exec:///bin/a")+"---\n"+
		strings.Replace(manifest("three", "exec:///bin/a"), "metadata:\n", "metadata:\n  namespace: other\n", 1))
	write(t, filepath.Join(dir, "c.json"), `{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"serving.knative.dev/v1beta1","kind":"DomainMapping","metadata":{"name":"my.example.com"},"spec":{"ref":{"kind":"Service","name":"two","apiVersion":"serving.knative.dev/v1"}}}]}`)
	write(t, filepath.Join(dir, "notes.txt"), "not for apply")
	s.run(t, "apply", "-f", dir).want(t, 0, "service/hello unchanged\nservice/two created\nservice/three created\ndomainmapping/my.example.com created\n")
	s.run(t, "list", "-n", "other").want(t, 0, "three")
	s.runIn(t, context.Background(), manifest("piped", "exec:///bin/a"), "apply", "-f", "-", "--no-wait").want(t, 0, "service/piped created\n")

	r := s.runIn(t, context.Background(), manifest("piped", "exec:///bin/a"), "apply", "-f", "-", "-o", "json")
	r.want(t, 0, "")
	var svc api.Service
	if err := json.Unmarshal([]byte(r.stdout), &svc); err != nil || svc.Name != "piped" || !svc.Status.Conditions.IsTrue("Ready") {
		t.Errorf("-o json: %v %s", err, r.stdout)
	}
}

func TestApplyGeneratesNames(t *testing.T) {
	s := startServer(t)
	doc := strings.Replace(manifest("x", "exec:///bin/a"), "name: x", "generateName: job-", 1)
	r := s.runIn(t, context.Background(), doc, "apply", "-f", "-", "--no-wait")
	if !regexp.MustCompile(`^service/job-[a-z0-9]{5} created\n$`).MatchString(r.stdout) || r.code != 0 {
		t.Errorf("%+v", r)
	}
}

func TestApplyRefuses(t *testing.T) {
	s := startServer(t)
	good := manifest("good", "exec:///bin/a")
	for name, c := range map[string]struct {
		doc  string
		code int
		want string
	}{
		"no YAML":        {good + "---\na: [", 1, "standard input, document 2 is no valid YAML"},
		"key twice":      {good + "---\na: 1\na: 2", 1, `key "a" already set`},
		"no object":      {good + "---\n- 1", 1, "standard input, document 2 is not an object"},
		"no kind":        {good + "---\na: 1", 1, "standard input, document 2 has no apiVersion or no kind"},
		"unknown kind":   {good + "---\napiVersion: v1\nkind: Pod\nmetadata: {name: x}", 1, `no kind "Pod" in "v1"; known are serving.knative.dev/v1 Service`},
		"no name":        {good + "---\napiVersion: serving.knative.dev/v1\nkind: Service", 1, "missing field(s): metadata.name"},
		"name no string": {"apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: 3}", 1, "metadata.name is a number, but should be a string"},
		"nothing":        {"# only a comment\n", 1, "no object in -"},
		"invalid":        {manifest("bad", "''"), ExitRefused, "spec.template.spec.containers[0].image"},
		"namespace":      {strings.Replace(good, "metadata:", "metadata:\n  namespace: b", 1), ExitUsage, `the object is of namespace "b", but --namespace says "a"`},
	} {
		t.Run(name, func(t *testing.T) {
			line := []string{"apply", "-f", "-"}
			if name == "namespace" {
				line = append(line, "-n", "a")
			}
			s.runIn(t, context.Background(), c.doc, line...).want(t, c.code, "", c.want)
		})
	}
	// Nothing of the files with a mistake in a later document was sent.
	s.run(t, "list").want(t, 0, "", "no services in namespace default", "next: thaw deploy")
}

func TestWarningsAreShownOnce(t *testing.T) {
	s := startServer(t)
	doc := strings.Replace(manifest("w", "exec:///bin/a"), "        - image", "        - imagePullPolicy: Always\n          bogus: 1\n          image", 1)
	r := s.runIn(t, context.Background(), doc, "apply", "-f", "-")
	if r.code != 0 || strings.Count(r.stderr, "warning: ") == 0 || !strings.Contains(r.stderr, "bogus") {
		t.Errorf("%+v", r)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(r.stderr) {
		if seen[line] {
			t.Errorf("twice: %s", line)
		}
		seen[line] = true
	}
}

func TestFailureToGetReady(t *testing.T) {
	s := startServer(t)
	r := s.runIn(t, context.Background(), manifest("sad", "exec:///bin/broken"), "apply", "-f", "-")
	r.want(t, ExitNotReady, "service/sad created\n", `service "sad" failed: `, "cannot open the database", "next: thaw logs sad; thaw describe sad\n")

	began := time.Now()
	r = s.run(t, "deploy", "slow", "--image", "exec:///bin/slow", "--wait-timeout", "200ms", "-n", "team")
	r.want(t, ExitNotReady, "service/slow created\n", `service "slow" is not ready yet`, "next: thaw describe slow -n team\n")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("waited %s", took)
	}
	s.run(t, "describe", "sad").want(t, 0, "cannot open the database")
}

func TestDeployImage(t *testing.T) {
	s := startServer(t)
	line := []string{"deploy", "web", "--image", "exec:///bin/web", "--env", "A=1", "-e", "B=x=y", "--port", "h2c:9000", "--concurrency", "10",
		"--min-scale", "1", "--max-scale", "5", "--target", "7", "-a", "instance.thaw.run/socket=fd3", "-a", "serving.knative.dev/rollout-duration=0s", "-n", "team"}
	s.run(t, line...).want(t, 0, "service/web created\nrevision web-00001 ready at http://web.team.localhost:")
	s.run(t, line...).want(t, 0, "service/web unchanged\n")
	r := s.run(t, "list", "-n", "team", "-o", "json")
	var list struct{ Items []api.Service }
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil || len(list.Items) != 1 {
		t.Fatalf("%v in %s", err, r.stdout)
	}
	svc := list.Items[0]
	tpl := svc.Spec.Template
	got, err := json.Marshal([]any{svc.Annotations["serving.knative.dev/rollout-duration"], tpl.Annotations, tpl.Spec.ContainerConcurrency, tpl.Spec.Containers[0].Env, tpl.Spec.Containers[0].Ports[0].Name, tpl.Spec.Containers[0].Ports[0].ContainerPort})
	want := `["0s",{"autoscaling.knative.dev/max-scale":"5","autoscaling.knative.dev/min-scale":"1","autoscaling.knative.dev/target":"7","instance.thaw.run/socket":"fd3"},10,[{"name":"A","value":"1"},{"name":"B","value":"x=y"}],"h2c",9000]`
	if err != nil || string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}

	// What is no longer said is gone.
	s.run(t, "deploy", "web", "--image", "exec:///bin/web", "-n", "team").want(t, 0, "service/web configured\nrevision web-00002 ready")
	s.run(t, "list", "-n", "team", "-o", "yaml").want(t, 0, "image: exec:///bin/web")
	if out := s.run(t, "list", "-n", "team", "-o", "yaml").stdout; strings.Contains(out, "max-scale") || strings.Contains(out, "name: A\n") {
		t.Errorf("settings of the first deploy are still there:\n%s", out)
	}
}

func TestDeployExec(t *testing.T) {
	s := startServer(t)
	dir := t.TempDir()
	t.Chdir(dir)
	write(t, "server.sh", "#!/bin/sh\n")
	if err := os.Chmod("server.sh", 0o755); err != nil {
		t.Fatal(err)
	}
	line := []string{"deploy", "sh", "--exec", `./server.sh 'two words' server.sh`}
	s.run(t, line...).want(t, 0, "service/sh created\nrevision sh-00001")
	s.run(t, line...).want(t, 0, "service/sh unchanged\nrevision sh-00001")
	write(t, "server.sh", "#!/bin/sh\n# changed\n")
	s.run(t, line...).want(t, 0, "service/sh configured\nrevision sh-00002")
	var list struct{ Items []api.Service }
	if err := json.Unmarshal([]byte(s.run(t, "list", "-o", "json").stdout), &list); err != nil {
		t.Fatal(err)
	}
	c := list.Items[0].Spec.Template.Spec.Containers[0]
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if c.Image != "exec://"+filepath.Join(wd, "server.sh") || strings.Join(c.Args, "|") != "two words|server.sh" || c.WorkingDir != wd {
		t.Errorf("image %s args %q in %s", c.Image, c.Args, c.WorkingDir)
	}
	s.run(t, "deploy", "x", "--exec", "no-such-program-here").want(t, 1, "", "--exec: ", "no-such-program-here", "not found")
	s.run(t, "deploy", "x", "--exec", "sh 'open").want(t, ExitUsage, "", "the quote ' is not closed")
}

func TestDeployDir(t *testing.T) {
	s := startServer(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "run"), "#!/bin/sh\n")
	if err := os.Chmod(filepath.Join(dir, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.run(t, "deploy", "d", "--dir", dir).want(t, 0, "service/d created")
	s.run(t, "deploy", "d", "--dir", dir).want(t, 0, "service/d unchanged")
	if len(s.uploads) != 2 || len(s.uploads[0]) == 0 || string(s.uploads[0]) != string(s.uploads[1]) {
		t.Errorf("%d uploads", len(s.uploads))
	}
	s.run(t, "list", "-o", "wide").want(t, 0, "pkg://sha256:")
	s.run(t, "deploy", "e", "--dir", t.TempDir()).want(t, 1, "", `no executable file "run"`)
}

func TestTrafficAndRollback(t *testing.T) {
	s := startServer(t)
	for _, v := range []string{"a", "b", "c"} {
		s.run(t, "deploy", "hello", "--image", "exec:///bin/"+v).want(t, 0, "")
	}
	s.run(t, "traffic", "hello").want(t, 0, "hello-00003   100%      yes")
	s.run(t, "traffic", "hello", "--to", "hello-00001=80", "--to", "@latest=20", "--tag", "hello-00002=mid").want(t, 0, "hello-00001   80%")
	r := s.run(t, "traffic", "hello")
	words := strings.Join(strings.Fields(r.stdout), " ")
	for _, want := range []string{"hello-00001 80%", "hello-00003 20% yes", "hello-00002 0% mid http://mid-hello.default.localhost:"} {
		if !strings.Contains(words, want) {
			t.Errorf("no %q in\n%s", want, r.stdout)
		}
	}
	s.run(t, "traffic", "hello", "--tag", "@latest=mid").want(t, 1, "", `the tag "mid" is at hello-00002 already`, "next: add --untag mid to move it")
	s.run(t, "traffic", "hello", "--untag", "mid", "--tag", "@latest=mid").want(t, 0, "mid")
	s.run(t, "traffic", "hello", "--untag", "other").want(t, 1, "", `no target has the tag "other"`)
	s.run(t, "traffic", "hello", "--to", "hello-00009=100", "--wait-timeout", "2s").want(t, ExitNotReady, "", "hello-00009")
	s.run(t, "traffic", "hello", "--to", "@latest=100").want(t, 0, "hello-00003")

	s.run(t, "rollback", "hello").want(t, 0, "service/hello rolled back to hello-00002\n", "thaw traffic hello --to @latest=100")
	s.run(t, "rollback", "hello").want(t, 0, "rolled back to hello-00001\n", "note:")
	s.run(t, "rollback", "hello").want(t, 1, "", "there is no ready revision before hello-00001", "next: thaw list revisions")
	s.run(t, "rollback", "hello", "--to", "hello-00003").want(t, 0, "rolled back to hello-00003", "note:")
	s.run(t, "rollback", "hello", "--to", "hello-00007").want(t, ExitNotFound, "", `has no revision "hello-00007"`)
	s.run(t, "deploy", "hello", "--image", "exec:///bin/d").want(t, 0, "revision hello-00004 ready", "the traffic is pinned", "next: thaw traffic hello --to @latest=100")
	r = s.run(t, "describe", "hello")
	r.want(t, 0, "hello-00004")
	for _, want := range []string{"Name:        hello\n", "Ready:       True\n", "URL:         http://hello.default.localhost:", "\nTraffic\n", "hello-00003   100%", "mid", "\nRevisions\nNAME", "1/2         proxy", "ConfigurationsReady   True"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("describe lacks %q:\n%s", want, r.stdout)
		}
	}
	var whole struct {
		Service   api.Service
		Revisions []api.Revision
		Scale     map[string]map[string]any
	}
	if err := json.Unmarshal([]byte(s.run(t, "describe", "hello", "-o", "json").stdout), &whole); err != nil || whole.Service.Name != "hello" || len(whole.Revisions) != 4 || whole.Scale["hello-00003"]["mode"] != "proxy" {
		t.Errorf("describe -o json: %v %+v", err, whole)
	}
}

func TestListAndDelete(t *testing.T) {
	s := startServer(t)
	s.run(t, "deploy", "one", "--image", "exec:///bin/a").want(t, 0, "")
	s.run(t, "deploy", "two", "--image", "exec:///bin/a", "-n", "team").want(t, 0, "")
	s.run(t, "list").want(t, 0, "one    http://one.default.localhost:")
	r := s.run(t, "list", "-A")
	r.want(t, 0, "NAMESPACE   NAME")
	if !strings.Contains(r.stdout, "team        two") || !strings.Contains(r.stdout, "100% @latest") && !strings.Contains(r.stdout, "100% one-00001") {
		t.Errorf("list -A:\n%s", r.stdout)
	}
	for _, kind := range []string{"revisions", "rev", "Route", "configurations", "cfg"} {
		s.run(t, "list", kind).want(t, 0, "one")
	}
	s.run(t, "list", "revisions", "-l", "serving.knative.dev/service=none").want(t, 0, "", "no revisions in namespace default")
	s.run(t, "list", "pods").want(t, ExitUsage, "", `unknown kind "pods"; known are services`)

	s.run(t, "delete", "none", "one").want(t, ExitNotFound, "service/one deleted\n", `no service "none" in namespace "default"`, "next: thaw list services -n default")
	s.run(t, "list").want(t, 0, "", "no services")
	s.run(t, "delete", "none", "--ignore-not-found").want(t, 0, "")
	s.run(t, "delete", "-n", "team", "revision/two-00001").want(t, 0, "revision/two-00001 deleted\n")
	file := filepath.Join(t.TempDir(), "x.yaml")
	write(t, file, strings.Replace(manifest("two", "exec:///bin/a"), "metadata:", "metadata:\n  namespace: team", 1))
	s.run(t, "delete", "-f", file).want(t, 0, "service/two deleted\n")
	s.run(t, "delete").want(t, ExitUsage, "", "either names or -f FILE")
	s.run(t, "delete", "domainmapping", "two").want(t, ExitUsage, "", `"domainmapping" is a kind: say domainmapping/two`)
}

func TestLogs(t *testing.T) {
	s := startServer(t)
	s.run(t, "deploy", "hello", "--image", "exec:///bin/a").want(t, 0, "")
	s.run(t, "logs", "hello").want(t, 0, "", "no output of hello yet")
	s.lines = []client.LogLine{
		{Time: time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC), Instance: "i-1", Revision: "hello-00001", Stream: "stdout", Text: "first"},
		{Instance: "i-2", Revision: "hello-00002", Stream: "stderr", Text: "second"},
	}
	s.run(t, "logs", "hello").want(t, 0, "hello-00001 i-1 | first\nhello-00002 i-2 | second\n")
	s.run(t, "logs", "hello", "--plain", "--revision", "hello-00002").want(t, 0, "second\n")
	s.run(t, "logs", "hello", "--timestamps", "--plain").want(t, 0, "2026-01-02T03:04:05.006Z first\n")
	s.run(t, "logs", "hello", "-o", "json").want(t, 0, `{"time":"2026-01-02T03:04:05.006Z","instance":"i-1","revision":"hello-00001","stream":"stdout","text":"first"}`)
	s.run(t, "logs", "hello", "--tail", "1").want(t, 0, "hello-00001 i-1 | first\n") // the latest by time, not by place
	s.run(t, "logs", "none").want(t, ExitNotFound, "", `no service "none" in namespace "default"`, "next: thaw list -n default")
	ctx, cancel := context.WithTimeoutCause(context.Background(), 200*time.Millisecond, context.Canceled)
	defer cancel()
	if r := s.runIn(t, ctx, "", "logs", "hello", "-f"); !strings.Contains(r.stdout, "second\n") {
		t.Errorf("following shows nothing: %+v", r)
	}
}

func TestInvoke(t *testing.T) {
	s := startServer(t)
	s.run(t, "deploy", "hello", "--image", "exec:///bin/a").want(t, 0, "")
	s.run(t, "traffic", "hello", "--tag", "hello-00001=t").want(t, 0, "")
	s.run(t, "invoke", "hello").want(t, 0, `GET hello.default.localhost/ x="" `)
	s.run(t, "invoke", "hello", "--tag", "t", "--path", "a?b=c", "-H", "X: y").want(t, 0, `GET t-hello.default.localhost/a?b=c x="y" `)
	s.run(t, "invoke", "hello", "-d", "body").want(t, 0, `POST hello.default.localhost/ x="" body`)
	file := filepath.Join(t.TempDir(), "f")
	write(t, file, "from a file")
	s.run(t, "invoke", "hello", "-X", "PUT", "-d", "@"+file).want(t, 0, `PUT hello.default.localhost/ x="" from a file`)
	s.runIn(t, context.Background(), "piped", "invoke", "hello", "-d", "@-").want(t, 0, "piped")
	s.run(t, "invoke", "hello", "-i").want(t, 0, "HTTP/1.1 200 OK\r\n")
	s.run(t, "invoke", "hello", "-H", "Host: a.example:1").want(t, 0, "GET a.example/")
	r := s.run(t, "invoke", "hello", "-v", "--path", "/cold")
	r.want(t, 0, "GET hello", "200 OK  request id req-1  first byte after", "  create       2.00 ms", "  total       10.00 ms")
	s.run(t, "invoke", "hello", "-v").want(t, 0, "GET hello", "warm: no start was needed")
	s.run(t, "invoke", "hello", "--path", "/error").want(t, ExitAnswer, "GET hello", "hello answered 418 I'm a teapot")
	s.run(t, "invoke", "hello", "--path", "/full").want(t, ExitAnswer, "", "the platform answered 503 Service Unavailable in place of hello: queue_full", "next: thaw logs hello; or try again in 2 s")
	s.run(t, "invoke", "hello", "--tag", "none").want(t, 1, "", `no target with the tag "none"`, "next: thaw describe hello")
	s.run(t, "invoke", "hello", "-H", "nonsense").want(t, ExitUsage, "", "is not of the form 'Name: value'")
	s.run(t, "invoke", "none").want(t, ExitNotFound, "", `no service "none"`)

	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	s.run(t, "invoke", "hello", "--ingress", closed.Addr().String()).want(t, ExitUnreachable, "", "connection refused", "name it with --ingress HOST:PORT")
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer silent.Close()
	s.run(t, "invoke", "hello", "--ingress", silent.Listener.Addr().String(), "--timeout", "50ms").want(t, 1, "", "no answer of hello within 50ms")
}

func TestKubeconfig(t *testing.T) {
	s := startServer(t)
	r := s.run(t, "kubeconfig", "-n", "team")
	r.want(t, 0, "server: http://thaw:"+token+"@127.0.0.1:")
	var config map[string]any
	if err := yaml.UnmarshalStrict([]byte(r.stdout), &config); err != nil || config["current-context"] != "thaw" || !strings.Contains(r.stdout, "namespace: team") {
		t.Errorf("%v in %s", err, r.stdout)
	}
	// The address works as it stands: with Basic authentication, without a bearer token.
	address := regexp.MustCompile(`server: (\S+)`).FindStringSubmatch(r.stdout)[1]
	resp, err := http.Get(address + "/apis/serving.knative.dev/v1/namespaces/team/services")
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%v %v", resp, err)
	}
	resp.Body.Close()

	ca := filepath.Join(t.TempDir(), "ca.pem")
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	defer secure.Close()
	write(t, ca, string(pemOf(secure)))
	r = execute(context.Background(), map[string]string{"THAW_TOKEN": "tok", "THAW_CA": ca}, "", "kubeconfig", "--api", secure.URL)
	r.want(t, 0, "server: "+secure.URL+"\n")
	if !strings.Contains(r.stdout, "token: tok\n") || !strings.Contains(r.stdout, "certificate-authority-data: ") {
		t.Errorf("over https:\n%s", r.stdout)
	}
}

func TestErrorsOfTheServer(t *testing.T) {
	s := startServer(t)
	r := execute(context.Background(), map[string]string{"THAW_API": s.url, "THAW_TOKEN": "wrong"}, "", "list")
	r.want(t, ExitUnreachable, "", "thaw: ", "next: set THAW_TOKEN, or name the server's data directory")

	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	r = execute(context.Background(), map[string]string{"THAW_TOKEN": "x"}, "", "list", "--api", closed.Addr().String())
	r.want(t, ExitUnreachable, "", "thaw: cannot reach the API at http://"+closed.Addr().String(), "next: start a server here with: thaw dev")

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.runIn(t, ctx, "", "list").want(t, 1, "", "thaw: interrupted")
}

func TestUsage(t *testing.T) {
	for line, want := range map[string]string{
		"nonsense":                           `unknown command "nonsense"`,
		"list --nonsense":                    "unknown flag: --nonsense",
		"list a b":                           "accepts at most 1 arg",
		"describe":                           "missing argument: NAME",
		"describe a b":                       `unexpected argument: "b"`,
		"apply":                              "missing flag: -f FILE",
		"deploy x":                           "exactly one of --exec, --dir and --image",
		"deploy x --image a --dir b":         "exactly one of --exec, --dir and --image",
		"deploy x --image a --env B":         "is not of the form NAME=VALUE",
		"deploy x --image a --annotation B":  "is not of the form KEY=VALUE",
		"deploy x --image a --port 0":        "is not of the form PORT, http1:PORT or h2c:PORT",
		"deploy x --image a --port grpc:1":   "is not of the form PORT, http1:PORT or h2c:PORT",
		"list -o table":                      `unknown output format "table"`,
		"logs x -o yaml":                     "logs are printed as text or as json",
		"traffic x --to a=1":                 "sum to 1, not to 100",
		"traffic x --to a=101":               "must be from 0 to 100",
		"traffic x --to a":                   "is not of the form REVISION=PERCENT",
		"traffic x --to a=50 --to a=50":      "names a twice",
		"traffic x --tag a":                  "is not of the form REVISION=TAG",
		"traffic x --tag a=t --tag b=t":      `gives "t" twice`,
		"delete a -f b":                      "either names or -f FILE",
		"delete revision/":                   "names no object",
		"invoke x --timeout 5":               "missing unit",
		"version -o table":                   `unknown output format "table"`,
		"kubeconfig --api ftp://example.com": "is not of the form http://HOST:PORT",
	} {
		r := execute(context.Background(), map[string]string{"THAW_TOKEN": "x"}, "", strings.Fields(line)...)
		code := ExitUsage
		if strings.HasPrefix(line, "kubeconfig") {
			code = ExitFailed
		}
		if r.code != code || !strings.Contains(r.stderr, want) || !strings.HasPrefix(r.stderr, "thaw: ") || r.stdout != "" {
			t.Errorf("%s: exit code %d, %s", line, r.code, r.stderr)
		}
	}
}

func TestVersion(t *testing.T) {
	execute(context.Background(), nil, "", "version").want(t, 0, "thaw v1.2.3 (go")
	execute(context.Background(), nil, "", "version", "-o", "json").want(t, 0, `"version": "v1.2.3"`)
}

func TestProgressIsForPeople(t *testing.T) {
	s := startServer(t)
	var seen []string
	for _, progress := range []bool{true, false} {
		var out, err strings.Builder
		env := &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &err, Progress: progress, Now: time.Now,
			Getenv: func(k string) string { return map[string]string{"THAW_API": s.url, "THAW_TOKEN": token}[k] }}
		root := applyCommand(env)
		env.Stdin = strings.NewReader(manifest(fmt.Sprintf("p%v", progress), "exec:///bin/a"))
		root.SetArgs([]string{"-f", "-"})
		if code := Main(context.Background(), root, env); code != 0 {
			t.Fatal(err.String())
		}
		seen = append(seen, err.String())
	}
	if !strings.Contains(seen[0], "service ptrue: ready\n") || seen[1] != "" {
		t.Errorf("with a terminal %q, without %q", seen[0], seen[1])
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A service that was ready stays so when its instances fail later, but nobody who looks is left in the dark.
func TestLaterFailureIsShown(t *testing.T) {
	s := startServer(t)
	s.run(t, "deploy", "hello", "--image", "exec:///bin/a").want(t, 0, "")
	id := api.MakeRevisionID("default", "hello-00001")
	s.reconcilers.ObserveInstances(&endpoints.Snapshot{Revision: id, Sequence: 2, Desired: 1,
		Failure: &endpoints.Failure{Reason: "CodeChanged", Message: "deploy again", Count: 1, At: time.Now()}})
	var r result
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if r = s.run(t, "describe", "hello"); strings.Contains(r.stdout, "deploy again") {
			break
		}
	}
	for _, want := range []string{"Ready:       True\n", "exec:///bin/a   CodeChanged\n", "hello-00001 Active"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("describe lacks %q:\n%s", want, r.stdout)
		}
	}
	s.run(t, "list", "revisions").want(t, 0, "CodeChanged")
}

func TestExplainScale(t *testing.T) {
	s := startServer(t)
	s.run(t, "deploy", "hello", "--image", "exec:///bin/a").want(t, 0, "")
	s.run(t, "deploy", "hello", "--image", "exec:///bin/b").want(t, 0, "")
	r := s.run(t, "explain-scale", "hello")
	r.want(t, 0, "hello-00002\n  2 instances are wanted.\n  Path: proxy. [2J\n")
	if strings.Contains(r.stdout, "hello-00001") {
		t.Errorf("the old revision is spoken of:\n%s", r.stdout)
	}
	s.run(t, "explain-scale", "hello", "--all").want(t, 0, "hello-00001\n  Reasons: idle\n")
	var said []explained
	if err := json.Unmarshal([]byte(s.run(t, "explain-scale", "hello", "-o", "json").stdout), &said); err != nil || len(said) != 1 || len(said[0].Explain) != 2 {
		t.Errorf("%v %+v", err, said)
	}
	s.run(t, "explain-scale", "nobody").want(t, ExitNotFound, "", `no service "nobody"`)
	s.run(t, "explain-scale").want(t, ExitUsage, "", "missing argument: SERVICE")
}
