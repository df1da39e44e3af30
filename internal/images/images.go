// Package images maps image references to code on this machine, so that YAML which was written for a cluster runs unchanged
// on a laptop. A map is a YAML file:
//
//	dev.local/hello: ./hello        # a folder, relative to the file
//	registry.example/team/: ./apps/ # a prefix: registry.example/team/x is ./apps/x
//	tools/echo: exec:///usr/bin/echo-server
//
// Keys that end in "/" are prefixes, all others are whole references. A whole reference goes before a prefix, a longer
// prefix before a shorter one. Tag and digest of a reference do not count, unless the key has them too.
package images

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// Target is where the code of an image is. Exactly one of its fields is set.
type Target struct {
	Image  string // another image that needs no map: exec:///… or pkg://sha256:…
	Folder string // absolute; to be packed as `thaw deploy --dir` does
}

// Map is an immutable map of references.
type Map struct {
	exact    map[string]Target
	prefixes []prefix // longest first
}

type prefix struct {
	key    string // ends in "/"
	folder string
}

// Load reads a map from a file; relative folders are relative to the file's.
func Load(path string) (*Map, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the map of images: %w", err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("read the map of images: %w", err)
	}
	m, err := Parse(data, dir)
	if err != nil {
		return nil, fmt.Errorf("map of images %s: %w", path, err)
	}
	return m, nil
}

// Parse reads a map; relative folders are relative to dir.
func Parse(data []byte, dir string) (*Map, error) {
	var raw map[string]string
	if err := yaml.UnmarshalStrict(data, &raw); err != nil {
		return nil, err
	}
	m := &Map{exact: map[string]Target{}}
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		value := raw[key]
		if strings.Trim(key, "/") == "" || value == "" {
			return nil, fmt.Errorf("%q: %q says nothing", key, value)
		}
		t, err := parseTarget(value, dir)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		if !strings.HasSuffix(key, "/") {
			m.exact[key] = t
			continue
		}
		if t.Folder == "" {
			return nil, fmt.Errorf("%s: a prefix leads to a folder with one folder per image, not to %s", key, value)
		}
		m.prefixes = append(m.prefixes, prefix{key, t.Folder})
	}
	slices.SortFunc(m.prefixes, func(a, b prefix) int { return len(b.key) - len(a.key) })
	return m, nil
}

func parseTarget(value, dir string) (Target, error) {
	scheme, rest, ok := strings.Cut(value, "://")
	switch {
	case ok && scheme == "exec":
		if !filepath.IsAbs(rest) {
			return Target{}, errors.New("exec:// is followed by an absolute path")
		}
		return Target{Image: value}, nil
	case ok && scheme == "pkg":
		return Target{Image: value}, nil
	case ok:
		return Target{}, fmt.Errorf("%s:// is neither a folder nor exec:// nor pkg://", scheme)
	}
	if !filepath.IsAbs(value) {
		value = filepath.Join(dir, value)
	}
	return Target{Folder: filepath.Clean(value)}, nil
}

// Lookup finds the code of a reference. A reference under a prefix never leads outside the prefix's folder.
func (m *Map) Lookup(ref string) (Target, bool) {
	if m == nil {
		return Target{}, false
	}
	name := bare(ref)
	for _, key := range []string{ref, name} {
		if t, ok := m.exact[key]; ok {
			return t, true
		}
	}
	for _, p := range m.prefixes {
		rest, ok := strings.CutPrefix(name, p.key)
		if !ok || rest == "" {
			continue
		}
		rel := filepath.FromSlash(rest)
		if !filepath.IsLocal(rel) {
			continue
		}
		return Target{Folder: filepath.Join(p.folder, rel)}, true
	}
	return Target{}, false
}

// bare is a reference without digest and tag. A colon before the last slash belongs to a registry's port.
func bare(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		ref = ref[:i]
	}
	return ref
}
