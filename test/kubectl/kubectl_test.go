// Package kubectl runs the real kubectl against a running `thaw dev`, with the kubeconfig that `thaw kubeconfig` prints.
// `make kubectl` builds one into bin/; KUBECTL names another.
package kubectl

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/harness"
)

var bin string

func TestMain(m *testing.M) { os.Exit(harness.Main(m, &bin, "cmd/thaw", "examples/checker")) }

// kubectl finds the program.
func kubectl(t *testing.T) string {
	t.Helper()
	if p := os.Getenv("KUBECTL"); p != "" {
		return p
	}
	if p, err := filepath.Abs("../../bin/kubectl"); err == nil {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	p, err := exec.LookPath("kubectl")
	if err != nil {
		t.Skip("no kubectl: `make kubectl` builds one from its module (some minutes), or KUBECTL names one")
	}
	return p
}

func TestKubectl(t *testing.T) {
	program := kubectl(t)
	th := harness.Start(t, bin)
	dir := t.TempDir()
	code, config, stderr := th.Verb("", "kubeconfig")
	if code != 0 {
		t.Fatal(stderr)
	}
	write := func(name, text string) string {
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	kc := write("kubeconfig", config)
	doc := strings.ReplaceAll(harness.CheckerService("k", 3, map[string]string{"V": "1"}), "$BIN", bin)
	one := write("one.yaml", doc)
	two := write("two.yaml", strings.Replace(doc, `value: "1"`, `value: "2"`, 1))
	bad := write("bad.yaml", strings.Replace(doc, "containerConcurrency: 3", "containerConcurrency: 3000", 1))
	typo := write("typo.yaml", strings.Replace(doc, "containerConcurrency: 3", "containerConcurency: 3", 1))

	// In order: each command, whether it must succeed, and what its output must contain.
	for _, c := range []struct {
		args string
		ok   bool
		says string
	}{
		{"get ksvc", true, "No resources found"},
		{"api-resources --api-group=serving.knative.dev", true, "ksvc"},
		{"apply -f " + one, true, "created"},
		{"wait --for=condition=Ready ksvc/k --timeout=30s", true, "condition met"},
		{"get ksvc", true, "k-00001"},
		{"get ksvc k -o jsonpath={.status.latestReadyRevisionName}", true, "k-00001"},
		{"apply -f " + two, true, "configured"},
		{"wait --for=jsonpath={.status.latestReadyRevisionName}=k-00002 ksvc/k --timeout=30s", true, "condition met"},
		{"get revisions,routes,configurations -l serving.knative.dev/service=k", true, "k-00002"},
		{"apply --server-side --field-manager=me --force-conflicts -f " + one, true, "serverside-applied"},
		{"patch ksvc k --type merge -p {\"spec\":{\"template\":{\"spec\":{\"timeoutSeconds\":20}}}}", true, "patched"},
		{"patch ksvc k --type json -p [{\"op\":\"replace\",\"path\":\"/spec/template/spec/timeoutSeconds\",\"value\":25}]", true, "patched"},
		{"annotate ksvc k a=b", true, "annotated"},
		{"label ksvc k team=x", true, "labeled"},
		{"get ksvc -l team=x -o name", true, "service.serving.knative.dev/k"},
		{"describe ksvc k", true, "Latest Ready Revision Name"},
		{"explain ksvc.spec.template.spec.containerConcurrency", true, "integer"},
		{"apply -f " + bad, false, "spec.template.spec.containerConcurrency"},
		{"apply -f " + typo, false, "containerConcurency"},
		{"get ksvc nothere", false, "not found"},
		{"get ns", true, "default"},
		{"delete ksvc k", true, "deleted"},
		{"get ksvc", true, "No resources found"},
		{"get revisions", true, "No resources found"},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		cmd := exec.CommandContext(ctx, program, append([]string{"--kubeconfig", kc, "--cache-dir", filepath.Join(dir, "cache")}, strings.Fields(c.args)...)...)
		cmd.Env = append(os.Environ(), "HOME="+dir)
		out, err := cmd.CombinedOutput()
		cancel()
		if (err == nil) != c.ok || !strings.Contains(string(out), c.says) {
			t.Errorf("kubectl %s: %v\n%s\nwant success %v and %q", c.args, err, out, c.ok, c.says)
		}
	}
}
