package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func write(t *testing.T, dir, name, text string, mode os.FileMode) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // whatever the umask says
		t.Fatal(err)
	}
}

func create(t *testing.T, dir string) ([]byte, Info) {
	t.Helper()
	var b bytes.Buffer
	info, err := Create(context.Background(), dir, &b, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b.Bytes())
	if info.Digest != "sha256:"+hex.EncodeToString(sum[:]) || info.Size != int64(b.Len()) {
		t.Errorf("info %+v does not describe the %d bytes", info, b.Len())
	}
	return b.Bytes(), info
}

// entries lists an archive as "mode name -> link: text".
func entries(t *testing.T, data []byte) []string {
	t.Helper()
	zip, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for archive := tar.NewReader(zip); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(time.Unix(0, 0)) || h.Uid != 0 || h.Uname != "" {
			t.Errorf("%s carries %v %d %q", h.Name, h.ModTime, h.Uid, h.Uname)
		}
		text, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, strings.Join([]string{h.FileInfo().Mode().String(), h.Name, h.Linkname, string(text)}, "|"))
	}
}

func TestPackIsReproducible(t *testing.T) {
	var packed [][]byte
	for i := range 2 {
		dir := t.TempDir()
		names := []string{"run", "z/data.txt", "a.txt"}
		if i == 1 {
			slices.Reverse(names)
		}
		for _, n := range names {
			mode := os.FileMode(0o600)
			if i == 1 {
				mode = 0o666
			}
			if n == "run" {
				mode = 0o700 + os.FileMode(i)*0o55
			}
			write(t, dir, n, "text of "+n, mode)
			when := time.Now().Add(-time.Duration(i) * time.Hour)
			if err := os.Chtimes(filepath.Join(dir, n), when, when); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink("../a.txt", filepath.Join(dir, "z", "link")); err != nil {
			t.Fatal(err)
		}
		write(t, dir, ".git/HEAD", "not this", 0o644)
		data, info := create(t, dir)
		if info.Built || info.Files != 5 {
			t.Errorf("info %+v", info)
		}
		packed = append(packed, data)
	}
	if !bytes.Equal(packed[0], packed[1]) {
		t.Error("the same content gave different bytes")
	}
	want := []string{
		"-rw-r--r--|a.txt||text of a.txt",
		"-rwxr-xr-x|run||text of run",
		"drwxr-xr-x|z/||",
		"-rw-r--r--|z/data.txt||text of z/data.txt",
		"Lrwxrwxrwx|z/link|../a.txt|",
	}
	if got := entries(t, packed[0]); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	dir := t.TempDir()
	write(t, dir, "run", "other", 0o755)
	if data, _ := create(t, dir); bytes.Equal(data, packed[0]) {
		t.Error("other content gave the same bytes")
	}
}

const program = `package main

func main() { println("hello") }
`

func TestGoMainIsBuiltReproducibly(t *testing.T) {
	if testing.Short() {
		t.Skip("calls the Go tool")
	}
	var digests []string
	for range 2 {
		dir := t.TempDir()
		write(t, dir, "go.mod", "module example.test/x\n\ngo 1.26\n", 0o644)
		write(t, dir, "main.go", program, 0o644)
		data, info := create(t, dir)
		if !info.Built || info.Files != 1 {
			t.Errorf("info %+v", info)
		}
		if got := entries(t, data); len(got) != 1 || !strings.HasPrefix(got[0], "-rwxr-xr-x|run||") {
			t.Errorf("the package holds %d entries", len(got))
		}
		digests = append(digests, info.Digest)
	}
	if digests[0] != digests[1] {
		t.Error("the same program in two folders gave two packages")
	}
}

func TestCreateRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		make func(t *testing.T, dir string)
		want string
	}{
		"empty": {func(*testing.T, string) {}, `no executable file "run", no function.py or function.js, and is no Go main package; put an executable file`},
		"python without run": {func(t *testing.T, dir string) { write(t, dir, "main.py", "", 0o644) },
			`exec python3 "$(dirname "$0")/main.py"`},
		"not executable": {func(t *testing.T, dir string) { write(t, dir, "run", "#!/bin/sh\n", 0o644) }, "chmod +x"},
		"link out": {func(t *testing.T, dir string) {
			write(t, dir, "run", "", 0o755)
			_ = os.Symlink("../../etc/passwd", filepath.Join(dir, "l"))
		}, "outside the folder"},
		"absolute link": {func(t *testing.T, dir string) {
			write(t, dir, "run", "", 0o755)
			_ = os.Symlink("/etc/passwd", filepath.Join(dir, "l"))
		}, "outside the folder"},
		"library": {func(t *testing.T, dir string) {
			write(t, dir, "go.mod", "module example.test/x\n", 0o644)
			write(t, dir, "x.go", "package x\n", 0o644)
		}, "no Go main package"},
		"does not compile": {func(t *testing.T, dir string) {
			write(t, dir, "go.mod", "module example.test/x\n", 0o644)
			write(t, dir, "x.go", "package main\nfunc main() { undefined() }\n", 0o644)
		}, "undefined: undefined"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c.make(t, dir)
			_, err := Create(context.Background(), dir, io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want something about %q", err, c.want)
			}
		})
	}
	if _, err := Create(context.Background(), filepath.Join(t.TempDir(), "none"), io.Discard, io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
	if _, err := Create(context.Background(), t.TempDir(), io.Discard, io.Discard); !errors.Is(err, ErrNoEntry) {
		t.Errorf("an empty folder: %v", err)
	}
}

func TestPruneKeepsTheLatest(t *testing.T) {
	home := t.TempDir()
	for i := range builds + 3 {
		dir := filepath.Join(home, fmt.Sprintf("%02d", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		at := time.Unix(int64(1000+i), 0)
		if err := os.Chtimes(dir, at, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := prune(home); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(home)
	if err != nil || len(left) != builds || left[0].Name() != "03" {
		t.Errorf("left are %v (%v)", left, err)
	}
}

func TestPrograms(t *testing.T) {
	if testing.Short() {
		t.Skip("calls the Go tool")
	}
	dir, out := t.TempDir(), t.TempDir()
	write(t, dir, "go/go.mod", "module example.test/x\n\ngo 1.26\n", 0o644)
	write(t, dir, "go/main.go", program, 0o644)
	write(t, dir, "script/run", "#!/bin/sh\n", 0o755)
	write(t, dir, "file", "#!/bin/sh\n", 0o755)
	given := map[string]string{
		"a/go": "exec://" + dir + "/go", "b/go": "exec://" + dir + "/go", "a/script": "exec://" + dir + "/script",
		"a/file": "exec://" + dir + "/file", "a/gone": "exec://" + dir + "/gone", "a/pkg": "pkg://sha256:00",
	}
	got, err := Programs(context.Background(), given, out, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for ref, target := range given {
		if strings.HasSuffix(ref, "/go") {
			continue
		}
		if got[ref] != target {
			t.Errorf("%s leads to %s", ref, got[ref])
		}
	}
	path, ok := strings.CutPrefix(got["a/go"], "exec://"+out+"/go-")
	if !ok || !strings.HasSuffix(path, "/run") || got["b/go"] != got["a/go"] {
		t.Errorf("the Go program is %s and %s", got["a/go"], got["b/go"])
	}
	if said, err := exec.Command(strings.TrimPrefix(got["a/go"], "exec://")).CombinedOutput(); err != nil || string(said) != "hello\n" {
		t.Errorf("it says %q, %v", said, err)
	}
	if given["a/go"] != "exec://"+dir+"/go" {
		t.Error("the map that was given has been changed")
	}
	first := strings.TrimPrefix(got["a/go"], "exec://")
	again, err := Programs(context.Background(), given, out, io.Discard)
	if err != nil || again["a/go"] != got["a/go"] {
		t.Errorf("the same code is built to %s, then to %s (%v)", got["a/go"], again["a/go"], err)
	}
	// A change of the code leaves the program alone that a revision was made of.
	write(t, dir, "go/main.go", "package main\nfunc main() { println(2) }\n", 0o644)
	if again, err = Programs(context.Background(), given, out, io.Discard); err != nil || again["a/go"] == got["a/go"] {
		t.Errorf("other code leads to %s as well (%v)", again["a/go"], err)
	}
	if said, err := exec.Command(first).CombinedOutput(); err != nil || string(said) != "hello\n" {
		t.Errorf("the earlier build says %q, %v", said, err)
	}
	write(t, dir, "go/main.go", "package main\nfunc main() { undefined() }\n", 0o644)
	if _, err := Programs(context.Background(), given, out, io.Discard); err == nil || !strings.Contains(err.Error(), "image a/go: go build in ") {
		t.Errorf("a program that does not compile: %v", err)
	}
}
