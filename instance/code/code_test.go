package code

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func resolver(t *testing.T, images Images) (*Resolver, string) {
	t.Helper()
	dir := tempDir(t)
	p, err := OpenPackages(PackagesConfig{Dir: filepath.Join(dir, "packages"), Store: diskStore(t, filepath.Join(dir, "store"))})
	if err != nil {
		t.Fatal(err)
	}
	return NewResolver(p, images), dir
}

func program(t *testing.T, dir, name, text string) string {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestExecDigest(t *testing.T) {
	r, dir := resolver(t, nil)
	file := program(t, dir, "f", "one")
	// sha256 of "one"
	want := "exec://" + file + "@sha256:7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
	got, err := r.Resolve(context.Background(), "exec://"+file)
	if err != nil || got != want {
		t.Fatalf("Resolve: %s, %v; want %s", got, err, want)
	}
	c, err := r.Locate(got) // the digest form is an image, too
	if err != nil || c.Image != want || c.Program != file || c.Dir != dir {
		t.Fatalf("Locate: %+v, %v", c, err)
	}
	if err := c.Check(); err != nil {
		t.Errorf("Check of an unchanged file: %v", err)
	}
	// Touched, not changed: the cheap check fails, the thorough one does not.
	later := time.Now().Add(time.Minute)
	os.Chtimes(file, later, later)
	if err := c.Check(); !errors.Is(err, ErrChanged) {
		t.Errorf("Check of a touched file: %v", err)
	}
	if c, err = r.Locate(want); err != nil || c.Check() != nil {
		t.Errorf("Locate of a touched file: %v", err)
	}
	// Other bytes of the same length, with the old modification time.
	os.WriteFile(file, []byte("two"), 0o755)
	os.Chtimes(file, later, later)
	if err := c.Check(); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "deploy again") {
		t.Errorf("Check of a changed file: %v", err)
	}
	if _, err := r.Locate(want); !errors.Is(err, ErrChanged) {
		t.Errorf("Locate of a changed file: %v", err)
	}
}

func TestBadImages(t *testing.T) {
	r, dir := resolver(t, nil)
	plain := filepath.Join(dir, "plain")
	os.WriteFile(plain, nil, 0o644)
	for image, want := range map[string]error{
		"":                       ErrUnknownImage,
		"gcr.io/acme/app:v1":     ErrUnknownImage,
		"exec://relative/path":   ErrBadImage,
		"exec://":                ErrBadImage,
		"exec:///a\x00b":         ErrBadImage,
		"exec:///no/such/file":   ErrNotFound,
		"exec://" + plain:        ErrNotFound,
		"exec://" + dir:          ErrNotFound, // a folder without "run"
		"exec:///dev/null":       ErrNotFound,
		"pkg://sha256:abc":       ErrBadImage,
		"pkg://sha256:../../etc": ErrBadImage,
		"pkg://sha256:" + fmt.Sprintf("%064d", 0): ErrNotFound,
	} {
		if _, err := r.Locate(image); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", image, err, want)
		}
	}
}

func TestImages(t *testing.T) {
	dir := t.TempDir()
	m, err := parseImages([]byte(`
gcr.io/acme/hello: ./bin/hello
gcr.io/acme/hello:v2: /opt/hello2
gcr.io/acme/*: exec:///opt/acme
gcr.io/acme/deep/*: pkg://sha256:00
`), dir)
	if err != nil {
		t.Fatal(err)
	}
	digest := "@sha256:" + strings.Repeat("a", 64)
	for image, want := range map[string]string{
		"gcr.io/acme/hello":             "exec://" + dir + "/bin/hello",
		"gcr.io/acme/hello:v1":          "exec://" + dir + "/bin/hello",
		"gcr.io/acme/hello:v1" + digest: "exec://" + dir + "/bin/hello",
		"gcr.io/acme/hello:v2":          "exec:///opt/hello2",
		"gcr.io/acme/other":             "exec:///opt/acme",
		"gcr.io/acme/deep/other:v1":     "pkg://sha256:00",
		"exec:///as/it/is":              "exec:///as/it/is",
	} {
		if got, err := m.local(image); err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", image, got, err, want)
		}
	}
	if _, err := m.local("docker.io/hello"); !errors.Is(err, ErrUnknownImage) || !strings.Contains(err.Error(), "--images") {
		t.Errorf("unknown image: %v", err)
	}
	for _, bad := range []string{"[]", "a: [b]", "a: ''", "'a*b': /x", "a: http://x", "a: /x\na: /y", "'': /x"} {
		if _, err := parseImages([]byte(bad), dir); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

type entry struct {
	name string
	body string
	link string
	kind byte
	mode int64
}

func archive(t testing.TB, compress bool, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	var w io.WriteCloser = struct {
		io.Writer
		io.Closer
	}{&buf, io.NopCloser(nil)}
	if compress {
		w = gzip.NewWriter(&buf)
	}
	tw := tar.NewWriter(w)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Size: int64(len(e.body)), Linkname: e.link, Typeflag: e.kind, Mode: e.mode}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(tw, e.body)
	}
	tw.Close()
	w.Close()
	return buf.Bytes()
}

func TestUpload(t *testing.T) {
	r, dir := resolver(t, nil)
	for _, compress := range []bool{false, true} {
		a := archive(t, compress,
			entry{name: "./" + "bin/", kind: tar.TypeDir}, entry{name: "run", body: "#!/bin/sh\n", mode: 0o4755},
			entry{name: "bin/data", body: "data", mode: 0o600}, entry{name: "link", link: "bin/data", kind: tar.TypeSymlink})
		p, err := r.packages.Upload(context.Background(), bytes.NewReader(a))
		if err != nil {
			t.Fatal(err)
		}
		if !p.Runnable || p.Files != 4 || p.Existed {
			t.Errorf("package %+v", p)
		}
		c, err := r.Locate(p.Image)
		if err != nil || c.CheckProgram() != nil || c.Check() != nil || c.Image != p.Image {
			t.Fatalf("Locate: %+v, %v", c, err)
		}
		if b, _ := os.ReadFile(filepath.Join(c.Dir, "link")); string(b) != "data" {
			t.Errorf("link leads to %q", b)
		}
		for name, mode := range map[string]os.FileMode{"run": 0o555, "bin/data": 0o444, "bin": os.ModeDir | 0o555} {
			if fi, err := os.Stat(filepath.Join(c.Dir, name)); err != nil || fi.Mode() != mode {
				t.Errorf("%s: %v, %v; want %v", name, fi.Mode(), err, mode)
			}
		}
		if again, err := r.packages.Upload(context.Background(), bytes.NewReader(a)); err != nil || !again.Existed || again.Image != p.Image {
			t.Errorf("second upload: %+v, %v", again, err)
		}
		if n, err := r.packages.Sweep(context.Background(), time.Now().Add(time.Hour), func(string) bool { return false }); n != 1 || err != nil {
			t.Error(n, err)
		}
		if _, err := r.Locate(p.Image); !errors.Is(err, ErrNotFound) {
			t.Errorf("after Sweep: %v", err)
		}
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "packages")); len(left) > 0 {
		t.Errorf("left in the store: %v", left)
	}
}

func TestPackageWithoutRun(t *testing.T) {
	r, _ := resolver(t, nil)
	p, err := r.packages.Upload(context.Background(), bytes.NewReader(archive(t, false, entry{name: "main.py", body: "x"})))
	if err != nil || p.Runnable {
		t.Fatalf("%+v, %v", p, err)
	}
	c, err := r.Locate(p.Image)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CheckProgram(); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "names no command") {
		t.Errorf("CheckProgram: %v", err)
	}
}

func TestBadPackages(t *testing.T) {
	zeros := strings.Repeat("\x00", 1<<20)
	many := make([]entry, 60)
	for i := range many {
		many[i] = entry{name: fmt.Sprint("f", i)}
	}
	good := archive(t, true, entry{name: "run", body: strings.Repeat("x", 4096)})
	for name, a := range map[string][]byte{
		"empty":                      {},
		"text":                       []byte(strings.Repeat("not a tar ", 100)),
		"no entries":                 archive(t, false),
		"cut gzip":                   good[:len(good)-20],
		"absolute":                   archive(t, false, entry{name: "/etc/passwd"}),
		"up":                         archive(t, false, entry{name: "../x"}),
		"up inside":                  archive(t, false, entry{name: "a/../../x"}),
		"backslash":                  archive(t, false, entry{name: `..\x`}),
		"root itself as a file":      archive(t, false, entry{name: "."}),
		"link to an absolute path":   archive(t, false, entry{name: "l", link: "/etc", kind: tar.TypeSymlink}),
		"link out":                   archive(t, false, entry{name: "l", link: "../..", kind: tar.TypeSymlink}),
		"link to nowhere":            archive(t, false, entry{name: "l", link: "nothing", kind: tar.TypeSymlink}),
		"link out through a link":    archive(t, false, entry{name: "e/f", body: "x"}, entry{name: "d/l", link: "../e", kind: tar.TypeSymlink}, entry{name: "x", link: "d/l/../../y", kind: tar.TypeSymlink}),
		"file through a link out":    archive(t, false, entry{name: "l", link: "..", kind: tar.TypeSymlink}, entry{name: "l/evil", body: "x"}),
		"link to itself":             archive(t, false, entry{name: "l", link: "l", kind: tar.TypeSymlink}),
		"hard link":                  archive(t, false, entry{name: "a", body: "x"}, entry{name: "b", link: "a", kind: tar.TypeLink}),
		"device":                     archive(t, false, entry{name: "d", kind: tar.TypeChar}),
		"pipe":                       archive(t, false, entry{name: "p", kind: tar.TypeFifo}),
		"same name twice":            archive(t, false, entry{name: "a", body: "x"}, entry{name: "a", body: "y"}),
		"folder where a file is":     archive(t, false, entry{name: "a", body: "x"}, entry{name: "a/b", body: "y"}),
		"bomb":                       archive(t, true, entry{name: "a", body: zeros}, entry{name: "b", body: zeros}),
		"bomb of padding":            append(archive(t, true, entry{name: "a"}), archive(t, true, entry{name: "b", body: zeros + zeros})...),
		"too many files":             archive(t, false, many...),
		"long path":                  archive(t, false, entry{name: strings.Repeat("a/", 200) + "x"}),
		"archive larger than it may": archive(t, false, entry{name: "a", body: strings.Repeat("x", 1<<20)}),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			p, err := OpenPackages(PackagesConfig{Dir: filepath.Join(dir, "packages"), Store: diskStore(t, filepath.Join(dir, "store")), Limits: PackageLimits{ArchiveBytes: 900 << 10, UnpackedBytes: 3 << 19, Files: 50, PathBytes: 300}})
			if err != nil {
				t.Fatal(err)
			}
			if got, err := p.Upload(context.Background(), bytes.NewReader(a)); !errors.Is(err, ErrBadPackage) {
				if name == "bomb of padding" && err == nil {
					return // what follows the archive's end is never inflated
				}
				t.Errorf("%+v, %v", got, err)
			}
			if left, _ := os.ReadDir(p.root); len(left) > 0 {
				t.Errorf("left in the store: %v", left)
			}
			if kept, _ := os.ReadDir(filepath.Join(dir, "store")); len(kept) > 0 {
				t.Errorf("a refused package was stored: %v", kept)
			}
			if above, _ := os.ReadDir(dir); len(above) != 2 {
				t.Errorf("written outside of the store: %v", above)
			}
		})
	}
}

// TestInterruptedUpload leaves what a killed process would and opens the store again.
func TestInterruptedUpload(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "tmp-123", "locked"), 0o755); err != nil {
		t.Fatal(err)
	}
	os.Chmod(filepath.Join(dir, "tmp-123", "locked"), 0o500)
	if _, err := OpenPackages(PackagesConfig{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestUploadEndsWithItsContext(t *testing.T) {
	r, _ := resolver(t, nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := r.packages.Upload(ctx, bytes.NewReader(archive(t, false, entry{name: "run"}))); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// FuzzUpload: whatever the bytes are, nothing is written outside of the package and nothing stays after an error.
func FuzzUpload(f *testing.F) {
	f.Add(archive(f, false, entry{name: "run", body: "x"}, entry{name: "l", link: "run", kind: tar.TypeSymlink}))
	f.Add(archive(f, true, entry{name: "a/../../b", body: "x"}))
	f.Add([]byte("\x1f\x8b"))
	f.Add(zipped(f, zipEntry{name: "run", body: "x", mode: 0o755}, zipEntry{name: "l", body: "run", mode: 0o777 | fs.ModeSymlink}))
	f.Add(zstandard(f, archive(f, false, entry{name: "run", body: "x"})))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		p, err := OpenPackages(PackagesConfig{Dir: filepath.Join(dir, "packages"), Store: forgetful{}, Limits: PackageLimits{ArchiveBytes: 1 << 20, UnpackedBytes: 1 << 20, Files: 20}})
		if err != nil {
			t.Fatal(err)
		}
		p.sync = func(string) error { return nil } // too slow for thousands
		_, err = p.Upload(context.Background(), bytes.NewReader(b))
		left, _ := os.ReadDir(p.root)
		if (err == nil) != (len(left) == 2) { // the folder and its list
			t.Errorf("error %v, and %d folders in the store", err, len(left))
		}
		if above, _ := os.ReadDir(dir); len(above) != 1 {
			t.Errorf("written outside of the store: %v", above)
		}
		for _, e := range left {
			removeAll(filepath.Join(p.root, e.Name()))
		}
	})
}

func FuzzImages(f *testing.F) {
	f.Add([]byte("a/*: /x"), "a/b")
	f.Add([]byte("a: {}"), "a@sha256:0")
	f.Fuzz(func(t *testing.T, b []byte, image string) {
		m, err := parseImages(b, "/dir")
		if err != nil {
			return
		}
		if local, err := m.local(image); err == nil && !isLocal(local) {
			t.Errorf("%q became %q", image, local)
		}
	})
}
