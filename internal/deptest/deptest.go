// Package deptest keeps the arrows between packages true. It knows how to read the import graph that `go list` reports and
// how to compare it with a short table of rules, each with its reason; the table itself is in its test. It is used by
// tests only.
package deptest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// Module is the path that all packages of the project begin with.
const Module = "github.com/thawrun/thaw"

// Package is the part of `go list -json` that the rules look at.
type Package struct {
	ImportPath   string
	Standard     bool
	Imports      []string // direct imports of the package itself
	TestImports  []string // of its tests in the same package
	XTestImports []string // of its external tests
	Deps         []string // everything it leads to, without its tests
}

// Rel returns a project package's path below the module ("" for the root), and whether it belongs to the project.
func Rel(importPath string) (string, bool) {
	if importPath == Module {
		return "", true
	}
	return strings.CutPrefix(importPath, Module+"/")
}

// List returns all packages of the module that dir is in, as built for goos.
func List(dir, goos string) ([]Package, error) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Standard,Imports,TestImports,XTestImports,Deps", "./...")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOOS="+goos)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list in %s: %w: %s", dir, err, stderr.String())
	}
	var list []Package
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p Package
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return list, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list in %s: %w", dir, err)
		}
		list = append(list, p)
	}
}

// Rule says what some packages must not lead to.
type Rule struct {
	Name string
	Why  string
	// From selects the packages that the rule is about, by path below the module.
	From func(pkg string) bool
	// Allowed says whether pkg (a path below the module) may lead to the import path dep.
	Allowed func(pkg, dep string) bool
	// Direct: only what the package imports itself counts, its tests included. Otherwise everything that is linked with
	// it counts, and its tests do not.
	Direct bool
}

// Check returns one line for each violation, sorted; none if all rules hold.
func Check(list []Package, rules []Rule) []string {
	var bad []string
	for _, r := range rules {
		for _, p := range list {
			pkg, ours := Rel(p.ImportPath)
			if !ours || !r.From(pkg) {
				continue
			}
			deps := p.Deps
			if r.Direct {
				deps = slices.Concat(p.Imports, p.TestImports, p.XTestImports)
			}
			for _, dep := range deps {
				if dep != p.ImportPath && !r.Allowed(pkg, dep) {
					bad = append(bad, fmt.Sprintf("%s leads to %s, against the rule %q: %s", pkg, dep, r.Name, r.Why))
				}
			}
		}
	}
	slices.Sort(bad)
	return slices.Compact(bad)
}

// Standard says whether an import path belongs to the standard library: its first element has no dot. The few packages of
// golang.org that are compiled into the standard library are named vendor/….
func Standard(importPath string) bool {
	first, _, _ := strings.Cut(importPath, "/")
	return !strings.Contains(first, ".")
}

// Under says whether an import path is prefix itself or below it.
func Under(importPath, prefix string) bool {
	return importPath == prefix || strings.HasPrefix(importPath, prefix+"/")
}
