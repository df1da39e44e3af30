package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/thawrun/thaw/test/harness"
)

// startStore runs `thaw store` and returns its URL.
func startStore(t *testing.T, dir string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, "thaw"), "store", "--listen", "127.0.0.1:0", "--dir", dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("thaw store: %v", err)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	m := regexp.MustCompile(`^thaw store ready listen=(\S+)\n$`).FindStringSubmatch(line)
	if m == nil {
		t.Fatalf("%q, %v", line, err)
	}
	return "http://" + m[1]
}

// folder is a function to deploy.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	b, err := os.ReadFile(filepath.Join(bin, "checker"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "run"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func metric(t *testing.T, th *harness.Thaw, line string) string {
	t.Helper()
	body, err := th.Client.Raw(context.Background(), "GET", "/metrics", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.SplitSeq(string(body), "\n") {
		if v, ok := strings.CutPrefix(l, line+" "); ok {
			return v
		}
	}
	return ""
}

// TestStore: what one node was given another one has too, through the store that both use; a package that changes on disk
// is noticed and comes again; and starts of deployed functions find their code here.
func TestStore(t *testing.T) {
	url := startStore(t, t.TempDir())
	one, two := harness.Start(t, bin, "--store", url), harness.Start(t, bin, "--store", url)
	if code, out, errs := one.Verb("", "deploy", "hello", "--dir", folder(t)); code != 0 {
		t.Fatal(out, errs)
	}
	revs := filepath.Join(one.Dir, "packages")
	names, _ := filepath.Glob(filepath.Join(revs, "sha256-*.files"))
	if len(names) != 1 {
		t.Fatalf("packages: %v", names)
	}
	sum := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(names[0]), "sha256-"), ".files")
	two.Apply(fmt.Sprintf("apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: hello}\nspec: {template: {metadata: {annotations: {%s}}, spec: {containers: [{image: 'pkg://sha256:%s'}]}}}", strings.Replace(harness.InitialZero, ": 0", `: "0"`, 1), sum))
	for _, th := range []*harness.Thaw{one, two} {
		if a := th.Get("hello", "/"); a.Status != 200 {
			t.Fatal(a)
		}
	}
	if got := metric(t, two, `thaw_code_lookups_total{result="miss"}`); got != "1" {
		t.Errorf("misses on the second node: %q", got)
	}
	if got := metric(t, one, `thaw_code_lookups_total{result="miss"}`); got != "0" {
		t.Errorf("misses where it was deployed: %q", got)
	}

	// Without any instance, the program is spoilt; the next request still runs the one that was deployed.
	program := filepath.Join(two.Dir, "packages", "sha256-"+sum, "run")
	two.Kill()
	for _, pid := range harness.ProcessesOf(two.Dir) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, []byte("#!/bin/false\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	two.Relaunch()
	if a := two.Get("hello", "/"); a.Status != 200 {
		t.Error(a)
	}
	if got := metric(t, two, "thaw_code_corrupt_total"); got != "1" {
		t.Errorf("corrupt packages: %q", got)
	}
}

// TestUploads: every kind of archive, and what is none, over the API.
func TestUploads(t *testing.T) {
	th := harness.Start(t, bin)
	for _, tt := range []struct {
		body, says string
		code       int
	}{
		{"", "empty or neither tar nor zip", 422},
		{"nothing", "bad package", 422},
		{"PK\x03\x04nothing", "bad package", 422},
		{"\x1f\x8bnothing", "bad package", 422},
		{"\x28\xb5\x2f\xfdnothing", "bad package", 422},
	} {
		req, _ := http.NewRequest("POST", "http://"+th.API+"/apis/thaw.run/v1alpha1/packages", strings.NewReader(tt.body))
		token, err := os.ReadFile(filepath.Join(th.Dir, "token"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.code || !strings.Contains(string(b), tt.says) {
			t.Errorf("%q: %d %s", tt.body, resp.StatusCode, b)
		}
	}
	for _, dir := range []string{"packages", "store"} {
		if left, err := os.ReadDir(filepath.Join(th.Dir, dir)); err != nil || len(left) > 0 {
			t.Errorf("%s: left %v, %v", dir, left, err)
		}
	}
}

// TestStoreIsAway: what is on the node goes on; what is not gets one clear error, and works when the store is back.
func TestStoreIsAway(t *testing.T) {
	th := harness.Start(t, bin, "--store", "http://127.0.0.1:1")
	code, out, errs := th.Verb("", "deploy", "hello", "--dir", folder(t))
	if code == 0 || !strings.Contains(errs, "connection refused") {
		t.Errorf("deploy: %d %s %s", code, out, errs)
	}
	if left, _ := os.ReadDir(filepath.Join(th.Dir, "packages")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestBareFunctions: a folder with nothing but a function is deployed, woken from zero and burst.
func TestBareFunctions(t *testing.T) {
	th := harness.Start(t, bin)
	for lang, interpreter := range map[string]string{"python": "python3", "node": "node"} {
		if _, err := exec.LookPath(interpreter); err != nil {
			t.Logf("%s is not installed: its function is not tested", interpreter)
			continue
		}
		if code, out, errs := th.Verb("", "deploy", lang, "--dir", "../../examples/function-"+lang, "--env", "TARGET=there", "--concurrency", "10"); code != 0 {
			t.Fatal(out, errs)
		}
		if a := th.Get(lang, "/"); a.Status != 200 || !strings.HasPrefix(a.Body, "Hello there, request ") {
			t.Error(a)
		}
		req, _ := http.NewRequest("POST", "http://"+lang+".default.localhost/", strings.NewReader(`{"numbers": [1, 2, 3.5]}`))
		if a := th.Do(req); a.Status != 200 || strings.ReplaceAll(a.Body, " ", "") != `{"sum":6.5}` || a.Header.Get("Content-Type") != "application/json" {
			t.Error(a)
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if a := th.Get(lang, "/"); a.Status != 200 || !strings.HasPrefix(a.Body, "Hello there") {
					t.Error(a)
				}
			})
		}
		wg.Wait()
	}
}
