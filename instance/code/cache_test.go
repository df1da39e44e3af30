package code

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/thawrun/thaw/instance/store"
)

func diskStore(t testing.TB, dir string) *store.Disk {
	t.Helper()
	d, err := store.OpenDisk(dir)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// forgetful stores nothing.
type forgetful struct{}

func (forgetful) Open(context.Context, string, int64) (io.ReadCloser, int64, error) {
	return nil, 0, store.ErrNotFound
}
func (forgetful) Put(context.Context, string, io.Reader) error       { return nil }
func (forgetful) Verify(context.Context, string) error               { return nil }
func (forgetful) Remove(context.Context, string) error               { return nil }
func (forgetful) List(context.Context) iter.Seq2[store.Entry, error] { return nil }

type zipEntry struct {
	name, body string
	mode       fs.FileMode
	flags      uint16
}

func zipped(t testing.TB, entries ...zipEntry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	for _, e := range entries {
		h := &zip.FileHeader{Name: e.name, Method: zip.Deflate, Flags: e.flags}
		h.SetMode(e.mode)
		f, err := w.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(f, e.body)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zstandard(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

func upload(t testing.TB, p *Packages, b []byte) Package {
	t.Helper()
	pkg, err := p.Upload(context.Background(), bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return pkg
}

func sumOf(pkg Package) string { return strings.TrimPrefix(pkg.Image, "pkg://sha256:") }

func TestFormats(t *testing.T) {
	plain := archive(t, false, entry{name: "run", body: "#!/bin/sh\n"}, entry{name: "a/b", body: "data", mode: 0o644}, entry{name: "l", link: "a/b", kind: '2'})
	for name, b := range map[string][]byte{
		"tar":     plain,
		"tar.zst": zstandard(t, plain),
		"zip": zipped(t, zipEntry{name: "run", body: "#!/bin/sh\n", mode: 0o755}, zipEntry{name: "a/", mode: fs.ModeDir | 0o755},
			zipEntry{name: "a/b", body: "data", mode: 0o644}, zipEntry{name: "l", body: "a/b", mode: fs.ModeSymlink | 0o777}),
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := resolver(t, nil)
			pkg := upload(t, r.packages, b)
			if !pkg.Runnable || pkg.Bytes != 14 {
				t.Errorf("%+v", pkg)
			}
			c, err := r.Locate(pkg.Image)
			if err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(filepath.Join(c.Dir, "l")); string(got) != "data" {
				t.Errorf("%q", got)
			}
			if fi, err := os.Stat(filepath.Join(c.Dir, "a/b")); err != nil || fi.Mode() != 0o444 {
				t.Errorf("%v, %v", fi, err)
			}
		})
	}
}

func TestBadZips(t *testing.T) {
	zeros := strings.Repeat("\x00", 1<<20)
	many := make([]zipEntry, 60)
	for i := range many {
		many[i] = zipEntry{name: fmt.Sprint("f", i), mode: 0o644}
	}
	good := zipped(t, zipEntry{name: "run", body: strings.Repeat("x", 4096), mode: 0o755})
	damaged := bytes.Clone(good)
	damaged[45] ^= 0xff
	// A list of entries that says it is far larger than it is, and a real one that is.
	lying := bytes.Clone(good)
	binary.LittleEndian.PutUint16(lying[len(lying)-12:], 0xfffe)
	for name, b := range map[string][]byte{
		"cut":              good[:len(good)-30],
		"damaged":          damaged,
		"wrong count":      lying,
		"absolute":         zipped(t, zipEntry{name: "/etc/passwd"}),
		"up":               zipped(t, zipEntry{name: "../x"}),
		"backslash":        zipped(t, zipEntry{name: `..\x`}),
		"link out":         zipped(t, zipEntry{name: "l", body: "../..", mode: fs.ModeSymlink}),
		"absolute link":    zipped(t, zipEntry{name: "l", body: "/etc", mode: fs.ModeSymlink}),
		"empty link":       zipped(t, zipEntry{name: "l", mode: fs.ModeSymlink}),
		"long link":        zipped(t, zipEntry{name: "l", body: strings.Repeat("a/", 300), mode: fs.ModeSymlink}),
		"through a link":   zipped(t, zipEntry{name: "l", body: "..", mode: fs.ModeSymlink}, zipEntry{name: "l/x", body: "x"}),
		"device":           zipped(t, zipEntry{name: "d", mode: fs.ModeDevice}),
		"pipe":             zipped(t, zipEntry{name: "d", mode: fs.ModeNamedPipe}),
		"twice":            zipped(t, zipEntry{name: "a"}, zipEntry{name: "a"}),
		"bomb":             zipped(t, zipEntry{name: "a", body: zeros}, zipEntry{name: "b", body: zeros}),
		"too many":         zipped(t, many...),
		"encrypted":        zipped(t, zipEntry{name: "a", body: "x", flags: 1}),
		"nothing in it":    zipped(t),
		"zstd, cut":        zstandard(t, archive(t, false, entry{name: "a", body: "x"}))[:20],
		"zstd, a bomb":     zstandard(t, archive(t, false, entry{name: "a", body: zeros}, entry{name: "b", body: zeros})),
		"zstd, magic only": []byte(zstdMagic),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			p, err := OpenPackages(PackagesConfig{Dir: filepath.Join(dir, "p"), Store: diskStore(t, filepath.Join(dir, "s")), Limits: PackageLimits{UnpackedBytes: 3 << 19, Files: 50, PathBytes: 300}})
			if err != nil {
				t.Fatal(err)
			}
			if got, err := p.Upload(context.Background(), bytes.NewReader(b)); !errors.Is(err, ErrBadPackage) {
				t.Errorf("%+v, %v", got, err)
			}
			for _, d := range []string{"p", "s"} {
				if left, _ := os.ReadDir(filepath.Join(dir, d)); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			}
		})
	}
}

// TestZipList: the list of entries of a zip may not fill the memory.
func TestZipList(t *testing.T) {
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	for i := range 60_000 {
		if _, err := w.CreateRaw(&zip.FileHeader{Name: fmt.Sprintf("%060d", i)}); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	r, _ := resolver(t, nil)
	if _, err := r.packages.Upload(context.Background(), &buf); !errors.Is(err, ErrBadPackage) || !strings.Contains(err.Error(), "list of entries") {
		t.Errorf("%v", err)
	}
}

// tempDir is t.TempDir for packages, whose read-only folders only their owner's own way of removing gets rid of.
func tempDir(t testing.TB) string {
	dir := t.TempDir()
	t.Cleanup(func() { removeAll(dir) })
	return dir
}

// node opens packages in a folder of their own over a store.
func node(t *testing.T, s store.Store, bytes int64) *Packages {
	t.Helper()
	p, err := OpenPackages(PackagesConfig{Dir: filepath.Join(tempDir(t), "packages"), Store: s, Bytes: bytes})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestFetch: another node has the package when it needs it, fetched once however many ask.
func TestFetch(t *testing.T) {
	s := diskStore(t, t.TempDir())
	pkg := upload(t, node(t, s, 0), archive(t, true, entry{name: "run", body: "#!/bin/sh\n"}))
	other := node(t, s, 0)
	r := NewResolver(other, nil)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if c, err := r.Locate(pkg.Image); err != nil || c.CheckProgram() != nil {
				t.Errorf("%+v, %v", c, err)
			}
		})
	}
	wg.Wait()
	if st := other.Stats(); st.Misses != 1 || st.Failed != 0 || st.Count != 1 || st.Bytes != 10 {
		t.Errorf("%+v", st)
	}
	if _, err := r.Locate("pkg://sha256:" + strings.Repeat("0", 64)); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "thaw deploy") {
		t.Errorf("a package that nobody has: %v", err)
	}
}

// TestCorrupt: whatever happens to a package on disk is noticed, and the package is fetched again.
func TestCorrupt(t *testing.T) {
	open := func(t *testing.T, file string) string {
		os.Chmod(file, 0o644)
		os.Chmod(filepath.Dir(file), 0o755)
		return file
	}
	for name, spoil := range map[string]func(t *testing.T, dir string) error{
		"another byte": func(t *testing.T, dir string) error {
			return os.WriteFile(open(t, filepath.Join(dir, "lib")), []byte("lob"), 0o644)
		},
		"cut":     func(t *testing.T, dir string) error { return os.Truncate(open(t, filepath.Join(dir, "run")), 2) },
		"missing": func(t *testing.T, dir string) error { return os.Remove(filepath.Join(dir, "lib")) },
		"more": func(t *testing.T, dir string) error {
			return os.WriteFile(filepath.Join(dir, "sitecustomize.py"), nil, 0o644)
		},
		"not executable": func(t *testing.T, dir string) error { return os.Chmod(filepath.Join(dir, "run"), 0o444) },
		"other link": func(t *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "l")), os.Symlink("/etc/passwd", filepath.Join(dir, "l")))
		},
		"no folder": func(t *testing.T, dir string) error { removeAll(dir); return nil },
		"no list":   func(t *testing.T, dir string) error { return os.Remove(dir + listSuffix) },
		"broken list": func(t *testing.T, dir string) error {
			return os.WriteFile(dir+listSuffix, []byte("{\"files\":"), 0o644)
		},
		"cut list": func(t *testing.T, dir string) error {
			b, _ := os.ReadFile(dir + listSuffix)
			return os.WriteFile(dir+listSuffix, b[:len(b)-10], 0o644)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			s := diskStore(t, filepath.Join(dir, "store"))
			cfg := PackagesConfig{Dir: filepath.Join(dir, "packages"), Store: s}
			p, err := OpenPackages(cfg)
			if err != nil {
				t.Fatal(err)
			}
			pkg := upload(t, p, archive(t, true, entry{name: "run", body: "#!/bin/sh\n"}, entry{name: "lib", body: "lib"}, entry{name: "l", link: "lib", kind: '2'}))
			if err := spoil(t, p.dir(sumOf(pkg))); err != nil {
				t.Fatal(err)
			}
			if p, err = OpenPackages(cfg); err != nil { // as after a restart
				t.Fatal(err)
			}
			c, err := NewResolver(p, nil).Locate(pkg.Image)
			if err != nil {
				t.Fatal(err)
			}
			if st := p.Stats(); st.Misses != 1 {
				t.Errorf("not noticed: %+v", st)
			}
			if err := p.check(context.Background(), sumOf(pkg), true); err != nil || c.Check() != nil || c.CheckProgram() != nil {
				t.Errorf("not repaired: %v", err)
			}
		})
	}
}

// TestPythonCache: what Python leaves in a package as root is no corruption.
func TestPythonCache(t *testing.T) {
	p := node(t, diskStore(t, t.TempDir()), 0)
	pkg := upload(t, p, archive(t, true, entry{name: "lib/a.py", body: "x = 1"}))
	at := filepath.Join(p.dir(sumOf(pkg)), "lib", "__pycache__")
	os.Chmod(filepath.Dir(at), 0o755)
	if err := errors.Join(os.Mkdir(at, 0o755), os.WriteFile(filepath.Join(at, "a.cpython-313.pyc"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := p.check(context.Background(), sumOf(pkg), true); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(at, "a.py"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := p.check(context.Background(), sumOf(pkg), true); err == nil {
		t.Error("another file there is not noticed")
	}
}

// TestSettings: thaw.json of a package.
func TestSettings(t *testing.T) {
	for text, want := range map[string]string{
		`{"socket": "fd3"}`: "", `{}`: "", `{"socket": "fd4"}`: "want fd3", `{"ready": "fd3"}`: "want fd4", `{"ready": "fd4"}`: "", `{"sockets": 1}`: "sockets", `[`: "thaw.json", "": "thaw.json",
		`{"socket": "` + strings.Repeat("x", 5000) + `"}`: "thaw.json",
	} {
		r, _ := resolver(t, nil)
		pkg := upload(t, r.packages, archive(t, false, entry{name: "run", body: "#!/bin/sh\n"}, entry{name: "thaw.json", body: text}))
		c, err := r.Locate(pkg.Image)
		if want == "" && (err != nil || c.Socket != strings.Contains(text, "fd3") || c.Says != strings.Contains(text, "fd4")) {
			t.Errorf("%s: %+v, %v", text, c, err)
		}
		if want != "" && (!errors.Is(err, ErrBadPackage) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestCorruptInUse: a program that changes while its revision is deployed is noticed before the next start.
func TestCorruptInUse(t *testing.T) {
	s := diskStore(t, t.TempDir())
	p := node(t, s, 0)
	r := NewResolver(p, nil)
	pkg := upload(t, p, archive(t, true, entry{name: "run", body: "#!/bin/sh\n"}))
	c, err := r.Locate(pkg.Image)
	if err != nil || c.Check() != nil {
		t.Fatal(err)
	}
	os.Chmod(c.Program, 0o755)
	if err := os.WriteFile(c.Program, []byte("#!/bin/no\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := c.Check(); !errors.Is(err, ErrChanged) {
		t.Errorf("%v", err)
	}
	if c, err = r.Locate(pkg.Image); err != nil || c.Check() != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(c.Program); string(b) != "#!/bin/sh\n" {
		t.Errorf("%q", b)
	}
}

// TestScrub: a large package is not read when it is first used, but the scrubber finds what has changed in it.
func TestScrub(t *testing.T) {
	s := diskStore(t, t.TempDir())
	p := node(t, s, 0)
	pkg := upload(t, p, archive(t, false, entry{name: "data", body: strings.Repeat("x", deepBytes+1)}))
	file := filepath.Join(p.dir(sumOf(pkg)), "data")
	os.Chmod(file, 0o644)
	if err := os.WriteFile(file, bytes.Repeat([]byte("y"), deepBytes+1), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { p.Scrub(ctx, 2*time.Millisecond); close(done) }()
	for end := time.Now().Add(10 * time.Second); p.Stats().Misses == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-done
	if b, _ := os.ReadFile(file); len(b) == 0 || b[0] != 'x' {
		t.Error("not repaired")
	}
}

// TestEvict: beyond the bound the longest unused package goes, but none that is pinned.
func TestEvict(t *testing.T) {
	s := diskStore(t, t.TempDir())
	p := node(t, s, 250)
	var pkgs []Package
	add := func() {
		pkgs = append(pkgs, upload(t, p, archive(t, false, entry{name: fmt.Sprint("f", len(pkgs)), body: strings.Repeat("x", 100)})))
	}
	here := func(want ...bool) {
		t.Helper()
		for i, pkg := range pkgs {
			_, err := os.Stat(p.dir(sumOf(pkg)))
			if got := err == nil && p.here(sumOf(pkg)); got != want[i] {
				t.Errorf("package %d is here: %v, want %v", i, got, want[i])
			}
		}
	}
	add()
	p.Pin(pkgs[0].Image)
	add()
	add()
	here(true, false, true)
	if _, err := p.Fetch(context.Background(), sumOf(pkgs[1])); err != nil { // comes back from the store
		t.Fatal(err)
	}
	here(true, true, false)
	p.Unpin(pkgs[0].Image)
	add()
	here(false, true, false, true)
	if st := p.Stats(); st.Bytes != 200 || st.Count != 2 || st.Evicted != 3 || st.Pinned != 0 {
		t.Errorf("%+v", st)
	}
	left, _ := os.ReadDir(p.root)
	if len(left) != 4 { // two folders, two lists
		t.Errorf("left: %v", left)
	}
}

// TestKill9: a process that is killed while it unpacks leaves nothing half-made, and what it has acknowledged is there.
func TestKill9(t *testing.T) {
	dir := tempDir(t)
	if at := os.Getenv("TEST_UNPACK"); at != "" {
		s, err := store.OpenDisk(filepath.Join(at, "store"))
		if err != nil {
			t.Fatal(err)
		}
		p, err := OpenPackages(PackagesConfig{Dir: filepath.Join(at, "packages"), Store: s})
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; ; i++ {
			var entries []entry
			for j := range 200 {
				entries = append(entries, entry{name: fmt.Sprintf("%d/%d/%d", i, j%7, j), body: strings.Repeat("x", 100)})
			}
			fmt.Println(sumOf(upload(t, p, archive(t, true, entries...))))
		}
	}
	for range 8 {
		cmd := exec.Command(os.Args[0], "-test.run", "^TestKill9$")
		cmd.Env = append(os.Environ(), "TEST_UNPACK="+dir)
		pipe, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(pipe)
		first, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(rand.IntN(150))*time.Millisecond, func() { cmd.Process.Kill() })
		rest, _ := io.ReadAll(r)
		cmd.Wait()
		s := diskStore(t, filepath.Join(dir, "store"))
		p, err := OpenPackages(PackagesConfig{Dir: filepath.Join(dir, "packages"), Store: s})
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(first+string(rest), "\n")
		for _, sum := range lines[:len(lines)-1] { // the last may be cut
			if err := p.check(context.Background(), sum, true); err != nil {
				t.Errorf("an acknowledged package is not whole: %v", err)
			}
		}
		entries, _ := os.ReadDir(p.root)
		for _, e := range entries {
			sum, ok := strings.CutPrefix(e.Name(), namePrefix)
			if !ok {
				t.Errorf("left behind: %s", e.Name())
			} else if !strings.HasSuffix(sum, listSuffix) {
				if err := p.check(context.Background(), sum, true); err != nil {
					t.Errorf("half a package: %v", err)
				}
			}
		}
	}
}

func BenchmarkFetch(b *testing.B) { // of what is here
	p, err := OpenPackages(PackagesConfig{Dir: b.TempDir(), Store: forgetful{}})
	if err != nil {
		b.Fatal(err)
	}
	sum := sumOf(upload(b, p, archive(b, false, entry{name: "run", body: "x"})))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Fetch(context.Background(), sum); err != nil {
			b.Fatal(err)
		}
	}
}
