package deptest

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// parts are the folders that must not know each other. A folder of a part may have packages below it.
var parts = []string{"activator", "autoscaler", "control", "instance", "invoke", "netproxy", "queueproxy", "router", "web"}

func partOf(pkg string) string {
	for _, part := range parts {
		if Under(pkg, part) {
			return part
		}
	}
	return ""
}

const (
	etcd       = "go.etcd.io/etcd"
	grpc       = "google.golang.org/grpc"
	otelSDK    = "go.opentelemetry.io/otel/sdk"
	prometheus = "github.com/prometheus"
	cobra      = "github.com/spf13/cobra"
	s3         = "github.com/minio/minio-go"
	netlink    = "github.com/vishvananda"
)

func anyOf(paths ...string) func(string) bool {
	return func(p string) bool { return slices.ContainsFunc(paths, func(q string) bool { return Under(p, q) }) }
}

var rules = []Rule{
	{
		Name:    "api stands alone",
		Why:     "clients and every part share the vocabulary; it must cost nothing to import",
		From:    func(p string) bool { return Under(p, "api") },
		Allowed: func(_, dep string) bool { return Standard(dep) },
	},
	{
		Name: "parts do not know each other",
		Why:  "a part declares the methods it needs and cmd connects them, so that each can run in a process of its own",
		From: func(p string) bool { return partOf(p) != "" },
		Allowed: func(pkg, dep string) bool {
			rel, ours := Rel(dep)
			return !ours || partOf(rel) == "" || partOf(rel) == partOf(pkg)
		},
	},
	{
		Name: "leaves are leaves",
		Why:  "what several parts use cannot lead back to a part, a command or a test",
		From: func(p string) bool { return Under(p, "internal") },
		Allowed: func(_, dep string) bool {
			rel, ours := Rel(dep)
			return !ours || Under(rel, "api") || Under(rel, "internal")
		},
	},
	{
		Name:    "one importer of etcd",
		Why:     "everybody else sees a store with revisions, so that tests run in memory and the fast path cannot grow an etcd write",
		From:    func(p string) bool { return !Under(p, "internal/state") },
		Allowed: func(_, dep string) bool { return !Under(dep, etcd) },
		Direct:  true,
	},
	{
		Name:    "no etcd behind the data path",
		Why:     "no etcd write lies between the arrival of a request and the start of its instance",
		From:    anyOf("activator", "autoscaler", "instance", "queueproxy", "router"),
		Allowed: func(_, dep string) bool { return !Under(dep, etcd) },
	},
	{
		Name:    "a lean queue-proxy",
		Why:     "it starts with every instance: with these libraries it is four times the size and takes twice as long to start",
		From:    anyOf("cmd/queueproxy", "queueproxy"),
		Allowed: func(_, dep string) bool { return !anyOf(etcd, grpc, otelSDK, prometheus, cobra)(dep) },
	},
	{
		Name:    "one importer of S3",
		Why:     "nodes talk to a store over HTTP; only the store needs a bucket's client, which is larger than all of ours",
		From:    func(p string) bool { return Under(p, "instance") && !Under(p, "instance/store/bucket") },
		Allowed: func(_, dep string) bool { return !Under(dep, s3) },
	},
	{
		Name:    "one importer of netlink",
		Why:     "what the project asks of the kernel about devices is a short list, in one place, and its types are ours",
		From:    func(p string) bool { return !Under(p, "internal/link") },
		Allowed: func(_, dep string) bool { return !Under(dep, netlink) },
		Direct:  true,
	},
	{
		Name:    "examples are for copying",
		Why:     "a function needs nothing of this project: the standard library and the helper beside the examples",
		From:    func(p string) bool { return Under(p, "examples") },
		Allowed: func(_, dep string) bool { return Standard(dep) || Under(dep, Module+"/examples") },
	},
}

const root = "../.."

func TestDependencyDirections(t *testing.T) {
	for _, goos := range []string{"linux", "darwin"} {
		list, err := List(root, goos)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) < 5 {
			t.Fatalf("go list found only %d packages: this test does not look at the project", len(list))
		}
		for _, bad := range Check(list, rules) {
			t.Errorf("%s: %s", goos, bad)
		}
	}
}

// TestRulesNotice is the negative control: each rule, given a graph that breaks it and nothing else, must say so, and a
// graph that comes close to breaking it must pass.
func TestRulesNotice(t *testing.T) {
	const m = Module + "/"
	cases := []struct {
		rule string
		pkg  Package
		ok   bool
	}{
		{rule: "api stands alone", pkg: Package{ImportPath: m + "api", Deps: []string{"fmt", "sigs.k8s.io/yaml"}}},
		{rule: "api stands alone", pkg: Package{ImportPath: m + "api", Deps: []string{m + "internal/state"}}},
		{rule: "api stands alone", pkg: Package{ImportPath: m + "api", Deps: []string{"fmt", "vendor/golang.org/x/net/idna"}}, ok: true},
		{rule: "parts do not know each other", pkg: Package{ImportPath: m + "router", Deps: []string{m + "activator"}}},
		{rule: "parts do not know each other", pkg: Package{ImportPath: m + "control/apiserver", Deps: []string{m + "instance/process"}}},
		{rule: "parts do not know each other", pkg: Package{ImportPath: m + "control/apiserver", Deps: []string{m + "control/objects", m + "internal/state"}}, ok: true},
		{rule: "parts do not know each other", pkg: Package{ImportPath: m + "cmd/thaw", Deps: []string{m + "router", m + "activator"}}, ok: true},
		{rule: "leaves are leaves", pkg: Package{ImportPath: m + "internal/forward", Deps: []string{m + "queueproxy"}}},
		{rule: "leaves are leaves", pkg: Package{ImportPath: m + "internal/forward", Deps: []string{m + "internal/hop", m + "api"}}, ok: true},
		{rule: "one importer of etcd", pkg: Package{ImportPath: m + "cmd/thaw", Imports: []string{etcd + "/client/v3"}}},
		{rule: "one importer of etcd", pkg: Package{ImportPath: m + "control/objects", XTestImports: []string{etcd + "/server/v3/embed"}}},
		{rule: "one importer of etcd", pkg: Package{ImportPath: m + "internal/state", Imports: []string{etcd + "/client/v3"}}, ok: true},
		{rule: "no etcd behind the data path", pkg: Package{ImportPath: m + "activator", Deps: []string{etcd + "/api/v3/mvccpb"}}},
		{rule: "a lean queue-proxy", pkg: Package{ImportPath: m + "cmd/queueproxy", Deps: []string{grpc + "/codes"}}},
		{rule: "a lean queue-proxy", pkg: Package{ImportPath: m + "cmd/queueproxy", Deps: []string{cobra}}},
		{rule: "a lean queue-proxy", pkg: Package{ImportPath: m + "cmd/queueproxy", Deps: []string{otelSDK + "/metric"}}},
		{rule: "a lean queue-proxy", pkg: Package{ImportPath: m + "cmd/queueproxy", Deps: []string{"github.com/prometheus/client_golang/prometheus"}}},
		{rule: "a lean queue-proxy", pkg: Package{ImportPath: m + "cmd/queueproxy", Deps: []string{"github.com/valyala/fasthttp"}}, ok: true},
		{rule: "one importer of S3", pkg: Package{ImportPath: m + "instance", Deps: []string{s3 + "/v7"}}},
		{rule: "one importer of S3", pkg: Package{ImportPath: m + "instance/store/bucket", Deps: []string{s3 + "/v7"}}, ok: true},
		{rule: "one importer of netlink", pkg: Package{ImportPath: m + "netproxy/havip", Imports: []string{netlink + "/netlink"}}},
		{rule: "one importer of netlink", pkg: Package{ImportPath: m + "netproxy/havip", TestImports: []string{netlink + "/netns"}}},
		{rule: "one importer of netlink", pkg: Package{ImportPath: m + "internal/link", Imports: []string{netlink + "/netlink"}}, ok: true},
		{rule: "examples are for copying", pkg: Package{ImportPath: m + "examples/hello-go", Deps: []string{m + "api"}}},
	}
	seen := map[string]bool{}
	for _, c := range cases {
		bad := Check([]Package{c.pkg}, rules)
		if c.ok {
			if len(bad) != 0 {
				t.Errorf("%s: allowed, but refused: %q", c.rule, bad)
			}
			continue
		}
		seen[c.rule] = true
		if !slices.ContainsFunc(bad, func(s string) bool { return strings.Contains(s, `"`+c.rule+`"`) }) {
			t.Errorf("%s: %s is not noticed: %q", c.rule, c.pkg.ImportPath, bad)
		}
	}
	for _, r := range rules {
		if !seen[r.Name] {
			t.Errorf("rule %q has no negative control", r.Name)
		}
	}
}

// TestRealGraphWithOneBadArrow takes the true graph, adds a single forbidden import, and expects exactly that to be found.
func TestRealGraphWithOneBadArrow(t *testing.T) {
	list, err := List(root, "linux")
	if err != nil {
		t.Fatal(err)
	}
	if bad := Check(list, rules); len(bad) != 0 {
		t.Skipf("the graph is broken already: %q", bad)
	}
	i := slices.IndexFunc(list, func(p Package) bool { return p.ImportPath == Module+"/api" })
	if i < 0 {
		t.Fatal("package api is not in the graph")
	}
	list[i].Deps = append(slices.Clone(list[i].Deps), Module+"/internal/hop")
	if bad := Check(list, rules); len(bad) != 1 || !strings.Contains(bad[0], "internal/hop") {
		t.Errorf("found %q, want exactly the arrow from api to internal/hop", bad)
	}
}

var docLine = regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.*) \\|$")

// documented returns the modules that the page has a line for, with the text of the line.
func documented(page string) map[string]string {
	lines := map[string]string{}
	for _, m := range docLine.FindAllStringSubmatch(page, -1) {
		lines[m[1]] = m[2]
	}
	return lines
}

// undocumented compares the direct requirements with the page and returns what is missing or too much.
func undocumented(direct []string, page string) []string {
	lines := documented(page)
	var bad []string
	for _, module := range direct {
		if len(lines[module]) < 10 {
			bad = append(bad, module+" has no reason on the page")
		}
		delete(lines, module)
	}
	for _, module := range slices.Sorted(maps.Keys(lines)) {
		bad = append(bad, module+" is on the page, but go.mod does not require it directly")
	}
	return bad
}

func TestEveryDependencyHasItsReason(t *testing.T) {
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	var direct []string
	for _, r := range mod.Require {
		if !r.Indirect {
			direct = append(direct, r.Path)
		}
	}
	if len(direct) == 0 {
		t.Skip("go.mod marks no requirement as direct: it has not been tidied yet")
	}
	page, err := os.ReadFile(filepath.Join(root, "docs", "dependencies.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range undocumented(direct, string(page)) {
		t.Error(bad)
	}
}

func TestUndocumentedNotices(t *testing.T) {
	const page = "| `a.example/one` | a reason that says something |\n| `a.example/gone` | a reason that says something |\n| `a.example/mute` | - |\n"
	got := undocumented([]string{"a.example/one", "a.example/two", "a.example/mute"}, page)
	want := []string{
		"a.example/two has no reason on the page",
		"a.example/mute has no reason on the page",
		"a.example/gone is on the page, but go.mod does not require it directly",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}
