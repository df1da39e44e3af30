package knative

import (
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

// What follows holds in sandboxes only: plain processes see the machine as it is (docs/instances.md).

// isolation is what the system says about itself, by which a test knows what may be asked of it.
func isolation(th *harness.Thaw) string {
	_, says, _ := strings.Cut(th.Log(), "isolation=")
	says, _, _ = strings.Cut(says, "\n")
	return says
}

func sandboxed(t *testing.T) *harness.Thaw {
	t.Helper()
	th := shared(t)
	if !strings.HasPrefix(isolation(th), `"sandbox`) {
		t.Skipf("functions are plain processes here: %s", isolation(th))
	}
	return th
}

// file asks the test function to do something to a file: stat, read or write.
func file(th *harness.Thaw, service, what, path string) harness.Answer {
	return th.Get(service, "/"+what+"?path="+url.QueryEscape(path))
}

// test/conformance/runtime/envvars_test.go, container_test.go: PORT is the port of the container, and two containers may have the same.
func TestPort(t *testing.T) {
	th := sandboxed(t)
	for name, want := range map[string]string{"port-default": "8080", "port-named": "9999", "port-again": "9999"} {
		create(t, th, service(name, container(func(c *api.Container) {
			if want != "8080" {
				c.Ports = []api.ContainerPort{{ContainerPort: 9999}}
			}
		})))
		if got := see(t, th, name).Env["PORT"]; got != want {
			t.Errorf("%s: PORT is %q, want %s", name, got, want)
		}
	}
}

// test/conformance/runtime/user_test.go. There an image may name a user of its own, here a program has none: it is user 0 of its sandbox, which
// has no more rights than another (listed difference).
func TestMustRunAsUser(t *testing.T) {
	th := sandboxed(t)
	create(t, th, service("user", container(func(c *api.Container) {
		c.SecurityContext, c.WorkingDir = json.RawMessage(`{"runAsUser": 2020}`), "/"
	})))
	if got := see(t, th, "user"); got.UID != 2020 || got.EUID != 2020 || got.Dir != "/" || got.Temp != "" {
		t.Errorf("user %d, effective %d, in %s, /tmp: %q", got.UID, got.EUID, got.Dir, got.Temp)
	}
	create(t, th, service("user-default"))
	if got := see(t, th, "user-default"); got.UID != 0 || got.EUID != 0 {
		t.Errorf("user %d, effective %d", got.UID, got.EUID)
	}
	if a := file(th, "user-default", "read", "/proc/self/uid_map"); a.Status != 200 || strings.Fields(a.Body)[1] == "0" {
		t.Errorf("user 0 is the machine's: %v", a)
	}
}

// test/conformance/runtime/workingdir_test.go: a working directory that does not exist is made.
func TestWorkingDirService(t *testing.T) {
	th := sandboxed(t)
	const dir = "/foo/bar/baz"
	create(t, th, service("workdir-new", container(func(c *api.Container) { c.WorkingDir = dir })))
	if got := see(t, th, "workdir-new").Dir; got != dir {
		t.Errorf("working directory %q, want %s", got, dir)
	}
	if _, err := os.Stat("/foo"); err == nil {
		t.Error("/foo was made on the machine")
	}
}

// test/conformance/runtime/filesystem_test.go: the files that a container must have, and should (not) have.
func TestMustHaveFiles(t *testing.T) {
	th := sandboxed(t)
	create(t, th, service("must-files"))
	for path, want := range map[string]string{ // is a folder, permissions ("" = any), target of a link
		"/dev/fd": "true  /proc/self/fd", "/dev/full": "false  ", "/dev/null": "false  ", "/dev/ptmx": "false  pts/ptmx", "/dev/random": "false  ",
		"/dev/stdin": "false  /proc/self/fd/0", "/dev/stdout": "false  /proc/self/fd/1", "/dev/stderr": "false  /proc/self/fd/2",
		"/dev/tty": "false  ", "/dev/urandom": "false  ", "/dev/zero": "false  ", "/proc/self/fd": "true  ", "/proc/self/fd/0": "false  *",
		"/proc/self/fd/1": "false  *", "/proc/self/fd/2": "false  *", "/tmp": "true rwxrwxrwx ", "/var/log": "true rwxrwxrwx *", "/etc/resolv.conf": "false rw*r**r** ",
	} {
		a := file(th, "must-files", "stat", path)
		if path == "/etc/resolv.conf" && a.Status == 404 {
			if _, err := os.Stat(path); err != nil {
				continue // the machine has none
			}
		}
		have, wanted := strings.SplitN(a.Body, " ", 3), strings.SplitN(want, " ", 3)
		if a.Status != 200 || have[0] != wanted[0] || wanted[2] != "*" && have[2] != wanted[2] || !likePermissions(have[1], wanted[1]) {
			t.Errorf("%s: %v, want %q", path, a, want)
		}
	}
	if a := file(th, "must-files", "stat", "/dev/console"); a.Status != 404 || strings.TrimSpace(a.Body) != "stat /dev/console: no such file or directory" {
		t.Errorf("/dev/console: %v", a)
	}
	got := see(t, th, "must-files")
	if a := file(th, "must-files", "write", got.Args[0]); a.Status != 403 {
		t.Errorf("its own program can be written: %v", a)
	}
}

func likePermissions(have, want string) bool {
	if want == "" {
		return true
	}
	for i := range want {
		if len(have) != len(want) || want[i] != '*' && want[i] != have[i] {
			return false
		}
	}
	return true
}

// test/conformance/runtime/cgroup_test.go: limits and requests are applied, and can be read.
func TestMustHaveCgroupConfigured(t *testing.T) {
	th := sandboxed(t)
	has := isolation(th)
	if !strings.Contains(has, "memory (") || !strings.Contains(has, "cpu (") {
		t.Skip("no controllers may be used here: " + has)
	}
	create(t, th, service("cgroup", container(func(c *api.Container) {
		c.Resources.Limits = map[string]api.Quantity{"cpu": "1", "memory": "128Mi"}
		c.Resources.Requests = map[string]api.Quantity{"cpu": "125m"}
	})))
	files := map[string]string{"memory/memory.limit_in_bytes": "134217728", "cpu/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.shares": "128"}
	if strings.Contains(has, "(cgroup v2)") {
		files = map[string]string{"memory.max": "134217728", "cpu.max": "100000 100000", "cpu.weight": strconv.Itoa(1 + (128-2)*9999/262142)}
	}
	for name, want := range files {
		if a := file(th, "cgroup", "read", "/sys/fs/cgroup/"+name); a.Status != 200 || strings.TrimSpace(a.Body) != want {
			t.Errorf("%s: %v, want %s", name, a, want)
		}
	}
}

// ... and nobody inside can change them, whether there are limits or not.
func TestShouldHaveCgroupReadOnly(t *testing.T) {
	th := sandboxed(t)
	if !strings.Contains(isolation(th), "(cgroup v1)") {
		t.Skip("no v1 controllers here: " + isolation(th))
	}
	create(t, th, service("cgroup-none"))
	for _, name := range []string{"memory/memory.limit_in_bytes", "cpu/cpu.cfs_period_us", "cpu/cpu.cfs_quota_us", "cpu/cpu.shares"} {
		if a := file(th, "cgroup-none", "read", "/sys/fs/cgroup/"+name); a.Status != 200 {
			t.Errorf("%s: %v", name, a)
		} else if _, err := strconv.Atoi(strings.TrimSpace(a.Body)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if a := file(th, "cgroup-none", "write", "/sys/fs/cgroup/"+name); a.Status != 403 {
			t.Errorf("%s could be written: %v", name, a)
		}
	}
}

// test/conformance/runtime/sysctl_test.go
func TestShouldHaveSysctlReadOnly(t *testing.T) {
	th := sandboxed(t)
	create(t, th, service("sysctl"))
	found := false
	for line := range strings.Lines(file(th, "sysctl", "read", "/proc/mounts").Body) {
		f := strings.Fields(line) // device, path, type, options
		if len(f) < 4 || f[1] != "/proc/sys" {
			continue
		}
		found = true
		if f[0] != "proc" || f[2] != "proc" || !slices.Contains(strings.Split(f[3], ","), "ro") {
			t.Errorf("/proc/sys is mounted as %q", line)
		}
	}
	if !found {
		t.Error("/proc/sys is no mount of its own")
	}
	if a := file(th, "sysctl", "write", "/proc/sys/net/ipv4/ip_forward"); a.Status != 403 {
		t.Errorf("a setting can be changed: %v", a)
	}
}

// What both providers promise follows.

// test/conformance/runtime/file_descriptor_test.go, and beyond: a program gets three descriptors and no others.
func TestDescriptors(t *testing.T) {
	th := shared(t)
	create(t, th, service("descriptors"))
	if got := see(t, th, "descriptors").FDs; !slices.Equal(got, []int{0, 1, 2}) {
		t.Errorf("descriptors %v", got)
	}
}

// test/e2e/destroypod_test.go: an instance that shall end gets SIGTERM when its last answer is out.
func TestSignals(t *testing.T) {
	th := shared(t)
	create(t, th, service("signals", image("checker"), scaling("min-scale", "1")))
	create(t, th, service("signalled"))
	signalled := see(t, th, "signalled").instance()
	answer := make(chan harness.Answer, 1)
	go func() { answer <- th.Get("signals", "/?sleep=1500") }()
	harness.Eventually(t, patient, "the request is inside", func() bool {
		a := th.Get("signals", "/report")
		return strings.Contains(a.Body, `"inFlight":1`)
	})
	for _, name := range []string{"signals", "signalled"} {
		if err := th.Client.Delete(t.Context(), api.Services, ns, name); err != nil {
			t.Fatal(err)
		}
	}
	if a := <-answer; a.Status != 200 || a.Err != nil || a.Took < 1500*time.Millisecond {
		t.Errorf("the request inside: %v after %v", a, a.Took)
	}
	harness.Eventually(t, patient, "the functions have ended", func() bool {
		return len(instances(th, "signals-00001"))+len(instances(th, "signalled-00001")) == 0
	})
	harness.Eventually(t, patient, "its last line says why", func() bool {
		b, err := os.ReadFile(filepath.Join(th.Dir, "logs", ns, "signalled-00001", signalled+".stdout.log"))
		return err == nil && strings.Contains(string(b), "signal: terminated")
	})
}

// Output goes where `thaw logs` finds it, from both streams.
func TestOutputIsKept(t *testing.T) {
	th := shared(t)
	create(t, th, service("says", image("checker"), env("CHECKER_LOG", "-")))
	if a := th.Get("says", "/", "X-Request-Id", "said"); a.Status != 200 {
		t.Fatal(a)
	}
	harness.Eventually(t, patient, "the line is there", func() bool {
		for line, err := range th.Client.Logs(t.Context(), ns, client.LogOptions{Service: "says", Tail: -1}) {
			if err == nil && line.Text == "request said" && line.Stream == "stdout" {
				return true
			}
		}
		return false
	})
}
