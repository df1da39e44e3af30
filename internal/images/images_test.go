package images

import (
	"path/filepath"
	"strings"
	"testing"
)

const sample = `
dev.local/hello: ./hello
dev.local/hello:v2: ./second
dev.local/: ./all/
dev.local/team/: /srv/team
localhost:5000/app: exec:///usr/bin/app
ko.local/x: pkg://sha256:00
`

func TestLookup(t *testing.T) {
	m, err := Parse([]byte(sample), "/maps")
	if err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]Target{
		"dev.local/hello":            {Folder: "/maps/hello"},
		"dev.local/hello:v1":         {Folder: "/maps/hello"},
		"dev.local/hello:v2":         {Folder: "/maps/second"},
		"dev.local/hello@sha256:aa":  {Folder: "/maps/hello"},
		"dev.local/other:latest":     {Folder: "/maps/all/other"},
		"dev.local/team/a":           {Folder: "/srv/team/a"},
		"localhost:5000/app:1":       {Image: "exec:///usr/bin/app"},
		"ko.local/x":                 {Image: "pkg://sha256:00"},
		"dev.local/":                 {},
		"dev.local/../../etc":        {},
		"dev.local//etc":             {},
		"elsewhere/hello":            {},
		"localhost:5000/application": {},
		"":                           {},
	} {
		got, ok := m.Lookup(ref)
		if got != want || ok != (want != Target{}) {
			t.Errorf("%q leads to %+v (%v), want %+v", ref, got, ok, want)
		}
	}
	if _, ok := (*Map)(nil).Lookup("dev.local/hello"); ok {
		t.Error("no map knows something")
	}
}

func TestParseRefuses(t *testing.T) {
	for data, want := range map[string]string{
		"a: exec://relative":        "absolute path",
		"a: docker://b":             "docker:// is neither",
		"a/: exec:///bin/true":      "a prefix leads to a folder",
		"a: ''":                     "says nothing",
		"/: ./x":                    "says nothing",
		"a: [1]":                    "cannot unmarshal",
		"a: ./b\na: ./c":            "already set",
		"- list":                    "cannot unmarshal",
		"a: ./b\n  c: wrong indent": "mapping values",
	} {
		if _, err := Parse([]byte(data), "/"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want something about %q", data, err, want)
		}
	}
}

// TestExamples reads the map that the examples come with.
func TestExamples(t *testing.T) {
	m, err := Load("../../examples/images.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want, _ := filepath.Abs("../../examples/hello-go")
	if got, ok := m.Lookup("dev.local/hello-go"); !ok || got.Folder != want {
		t.Errorf("hello-go is at %+v, want %s", got, want)
	}
}

func FuzzLookup(f *testing.F) {
	f.Add(sample, "dev.local/hello:v2")
	f.Add("a/: ./", "a/../b")
	f.Fuzz(func(t *testing.T, data, ref string) {
		m, err := Parse([]byte(data), "/base")
		if err != nil {
			return
		}
		got, ok := m.Lookup(ref)
		if ok && (got.Image == "") == (got.Folder == "") {
			t.Errorf("%q leads to %+v", ref, got)
		}
		for _, p := range m.prefixes { // only exact keys may lead elsewhere than a prefix's folder
			if _, exact := m.exact[ref]; ok && !exact && strings.HasPrefix(got.Folder, p.folder) {
				return
			}
		}
		if ok && got.Folder != "" {
			if _, exact := m.exact[bare(ref)]; !exact {
				if _, exact := m.exact[ref]; !exact {
					t.Errorf("%q leads out of every prefix: %+v", ref, got)
				}
			}
		}
	})
}
