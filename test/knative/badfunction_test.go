package knative

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

// program of a case, and what must come of it.
type badFunction struct {
	name    string
	make    func(t *testing.T, dir string) (image string)
	changes []change
	sandbox bool // would do harm to a machine

	deploy  []string      // words of the condition of a deploy that starts an instance; nil = it gets ready
	request []string      // words of the answer to a request that has to start one; nil = 200
	within  time.Duration // both
}

// script makes a folder with an executable `run` and the test function beside it.
func script(text string) func(*testing.T, string) string {
	return func(t *testing.T, dir string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(bin, "function"))
		if err != nil {
			t.Fatal(err)
		}
		put(t, dir, "function", b, 0o755)
		put(t, dir, "run", []byte(text), 0o755)
		return "exec://" + dir
	}
}

func put(t *testing.T, dir, name string, content []byte, mode os.FileMode) string {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, content, mode); err != nil {
		t.Fatal(err)
	}
	return "exec://" + file
}

var deadline = annotated("serving.knative.dev/progress-deadline", "3s")

var badFunctions = []badFunction{
	{name: "missing-interpreter", make: script("#!/nowhere/python3\n"),
		deploy: []string{"its interpreter", "/nowhere/python3"}, request: []string{"cannot_start", "its interpreter", "/nowhere/python3"}},
	{name: "wrong-architecture", make: func(t *testing.T, dir string) string {
		b, err := os.ReadFile(filepath.Join(bin, "function"))
		if err != nil {
			t.Fatal(err)
		}
		b[18], b[19] = 8, 0 // e_machine: MIPS
		return put(t, dir, "mips", b, 0o755)
	}, deploy: []string{"EM_MIPS", "build it for linux/"}, request: []string{"cannot_start", "EM_MIPS"}},
	{name: "no-program", make: func(t *testing.T, dir string) string { return put(t, dir, "text", []byte("hello\n"), 0o755) },
		deploy: []string{"not a program for this machine"}, request: []string{"cannot_start", "not a program for this machine"}},
	{name: "not-executable", make: func(t *testing.T, dir string) string {
		return put(t, dir, "plain", []byte("#!/bin/sh\nsleep 9\n"), 0o644)
	}, deploy: []string{"not executable", "chmod +x"}, request: []string{"404"}}, // the deploy fails, start or no start
	{name: "exits", make: script("#!/bin/sh\necho my last words >&2\nexit 7\n"),
		deploy: []string{"exit", "7"}, request: []string{"cannot_start", "ExitCode7", "my last words"}},
	{name: "never-listens", make: script("#!/bin/sh\necho still here\nexec sleep 60\n"), changes: []change{deadline},
		deploy: []string{"3s"}, request: []string{"cannot_start", "ProgressDeadlineExceeded", "connection refused", "still here"}},
	{name: "listens-elsewhere", make: script("#!/bin/sh\nPORT=17 exec ./function\n"), changes: []change{deadline}, sandbox: true,
		deploy: []string{"3s"}, request: []string{"cannot_start", "ProgressDeadlineExceeded", "connect to 127.0.0.1:8080", "connection refused"}},
	{name: "listens-late", make: script("#!/bin/sh\nexec ./function\n"), changes: []change{env("LISTEN_MS", "1500")}},
	{name: "prints-a-gigabyte", make: script("#!/bin/sh\nyes 0123456789012345678901234567890123456789012345678901234567890 | head -c 1000000000\nexec ./function\n")},
	{name: "fork-bomb", make: script("#!/bin/sh\nb() { b | b & b; }\nb\nsleep 60\n"), changes: []change{deadline}, sandbox: true,
		deploy: []string{"3s"}, request: []string{"cannot_start"}},
}

// TestBadFunctions deploys programs that cannot work and calls them: each time one answer, soon, that says why, and nothing that stays behind.
func TestBadFunctions(t *testing.T) {
	for _, c := range badFunctions {
		t.Run(c.name, func(t *testing.T) {
			th := shared(t)
			if c.sandbox && !strings.HasPrefix(isolation(th), `"sandbox`) {
				t.Skip("only in a sandbox")
			}
			if c.within == 0 {
				c.within = patient
			}
			changes := append([]change{func(s *api.Service) {
				s.Spec.Template.Spec.Containers[0].Image = c.make(t, t.TempDir())
			}}, c.changes...)
			now, later := "bad-"+c.name, "zero-"+c.name
			post(t, th, service(now, changes...))
			post(t, th, service(later, append(changes, scaling("initial-scale", "0"), scaling("max-scale", "1"))...))
			checkDeploy(t, th, now, c)
			checkRequest(t, th, later, c)
			for _, name := range []string{now, later} {
				remove(t, th, api.Services, name)
				harness.Eventually(t, patient, "nothing of it runs", func() bool { return len(instances(th, name+"-00001")) == 0 })
			}
		})
	}
}

func checkDeploy(t *testing.T, th *harness.Thaw, name string, c badFunction) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), c.within)
	defer cancel()
	_, err := th.Client.WaitReady(ctx, api.Services, ns, name, client.WaitOptions{})
	switch {
	case ctx.Err() != nil:
		t.Errorf("the deploy has no result within %v", c.within)
	case c.deploy == nil && err != nil, c.deploy != nil && err == nil:
		t.Errorf("deploy: %v", err)
	case err != nil: // which of the conditions was false first is chance
		harness.Eventually(t, c.within, fmt.Sprintf("a condition says why, with %q", c.deploy), func() bool {
			text := conditions[*api.Service](t, th, name) + conditions[*api.Revision](t, th, name+"-00001")
			return !slices.ContainsFunc(c.deploy, func(w string) bool { return !strings.Contains(text, w) })
		})
	}
}

// conditions are the messages of an object's conditions; none if it was not made.
func conditions[T api.Object](t *testing.T, th *harness.Thaw, name string) (text string) {
	t.Helper()
	o, err := th.Client.Get(t.Context(), kindOf[T](), ns, name)
	if errors.Is(err, client.ErrNotFound) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range api.StatusOf(o).Conditions {
		text += c.Reason + ": " + c.Message + "\n"
	}
	return text
}

func checkRequest(t *testing.T, th *harness.Thaw, name string, c badFunction) {
	t.Helper()
	if c.request == nil || c.request[0] != "404" {
		ready[*api.Service](t, th, name)
	}
	a := th.Get(name, "/")
	got := fmt.Sprint(a.Status, " ", a.Header.Get("X-Thaw-Error"), " ", a.Body)
	switch {
	case a.Err != nil || a.Took > c.within:
		t.Errorf("request: %v after %v", a.Err, a.Took)
	case c.request == nil:
		says(t, "request", got, []string{"200"})
	default:
		says(t, "request", got, c.request)
		if a.Status == 503 && a.Header.Get("Retry-After") == "" || len(a.Body) > 2000 {
			t.Errorf("Retry-After %q, %d bytes", a.Header.Get("Retry-After"), len(a.Body))
		}
	}
}

func says(t *testing.T, what, got string, words []string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(got, w) {
			t.Errorf("%s: %q is not in %.2000q", what, w, got)
		}
	}
}

// What a function prints is bounded on disk, however much it is.
func TestOutputIsBounded(t *testing.T) {
	th := shared(t)
	create(t, th, service("loud", func(s *api.Service) {
		s.Spec.Template.Spec.Containers[0].Image = script("#!/bin/sh\nyes 0123456789 | head -c 300000000\nexec ./function\n")(t, t.TempDir())
	}))
	const bound = 4 * 10 << 20 // files of 10 MiB, two for each stream
	harness.Eventually(t, patient, "its logs take no more than 40 MiB", func() bool {
		var size int64
		files, _ := filepath.Glob(filepath.Join(th.Dir, "logs", ns, "loud-00001", "*"))
		for _, f := range files {
			if fi, err := os.Stat(f); err == nil {
				size += fi.Size()
			}
		}
		return len(files) > 0 && size <= bound
	})
}

// A function that ignores SIGTERM is killed when its grace period, here timeoutSeconds, is over, and not before.
func TestStubbornFunction(t *testing.T) {
	th := shared(t)
	create(t, th, service("stubborn", env("STUBBORN", "1"), func(s *api.Service) { s.Spec.Template.Spec.TimeoutSeconds = ptr(int64(2)) }))
	see(t, th, "stubborn")
	began := time.Now()
	remove(t, th, api.Services, "stubborn")
	harness.Eventually(t, patient, "it has ended", func() bool { return len(instances(th, "stubborn-00001")) == 0 })
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("it was killed after %v", took)
	}
}

// TestBadPackages uploads archives that are traps; each is refused with its reason, and nothing of it is left.
func TestBadPackages(t *testing.T) {
	th := shared(t)
	before := packages(t, th)
	file := func(name string) *tar.Header { return &tar.Header{Name: name, Mode: 0o755, Typeflag: tar.TypeReg} }
	link := func(name, target string, typ byte) *tar.Header {
		return &tar.Header{Name: name, Linkname: target, Mode: 0o777, Typeflag: typ}
	}
	for name, c := range map[string]struct {
		entries func(i int) *tar.Header // nil = the end
		says    string
	}{
		"parent":        {list(file("run"), file("../../evil")), "../../evil"},
		"absolute":      {list(file("run"), file("/etc/evil")), "/etc/evil"},
		"link-out":      {list(file("run"), link("out", "../../../etc/passwd", tar.TypeSymlink)), "out"},
		"absolute-link": {list(file("run"), link("shadow", "/etc/shadow", tar.TypeSymlink)), "shadow"},
		"through-link":  {list(link("d", "..", tar.TypeSymlink), file("d/evil")), "d"},
		"hard-link":     {list(file("run"), link("passwd", "/etc/passwd", tar.TypeLink)), "passwd"},
		"device":        {list(file("run"), &tar.Header{Name: "mem", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 1}), "mem"},
		"a-million-files": {func(i int) *tar.Header {
			if i == 1_000_000 {
				return nil
			}
			return file(fmt.Sprint("f", i))
		}, "20000"},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, took := upload(t, th, c.entries)
			if status != http.StatusUnprocessableEntity || !strings.Contains(body, "bad package") || !strings.Contains(body, c.says) || len(body) > 2000 {
				t.Errorf("%d %.2000s, want 422 with %q", status, body, c.says)
			}
			if took > patient {
				t.Errorf("refused %v after its end", took)
			}
		})
	}
	if status, body, _ := upload(t, th, list(file("run"))); status != http.StatusCreated { // the control
		t.Errorf("a sound package: %d %s", status, body)
	}
	harness.Eventually(t, patient, "the sound one alone is there", func() bool { return packages(t, th) <= before+2 })
}

func list(headers ...*tar.Header) func(int) *tar.Header {
	return func(i int) *tar.Header {
		if i == len(headers) {
			return nil
		}
		return headers[i]
	}
}

// packages counts what is unpacked: a folder and a list for each.
func packages(t *testing.T, th *harness.Thaw) int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(th.Dir, "packages"))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func upload(t *testing.T, th *harness.Thaw, entries func(int) *tar.Header) (status int, body string, took time.Duration) {
	t.Helper()
	r, w := io.Pipe()
	var end atomic.Pointer[time.Time] // making a large archive takes longer than anything that is done with it
	go func() {
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
		a := tar.NewWriter(z)
		for i := 0; ; i++ {
			h := entries(i)
			if h == nil || a.WriteHeader(h) != nil {
				break
			}
		}
		a.Close()
		z.Close()
		now := time.Now()
		end.Store(&now)
		w.Close()
	}()
	defer r.Close()
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+th.API+"/apis/thaw.run/v1alpha1/packages", r)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+th.Client.Token())
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if at := end.Load(); at != nil { // else it was refused before
		took = time.Since(*at)
	}
	return resp.StatusCode, string(b), took
}
