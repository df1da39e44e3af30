// Package bundle turns a folder with a function into a package: a reproducible tar.gz with an executable "run" at its top.
// The same content always gives the same bytes, so that a package's digest says whether anything changed. It is used where
// people deploy folders; reading packages, which come from outside, is another matter and not done here.
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
	gobuild "go/build"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Entry is the file that a package is started by.
const Entry = "run"

// ErrNoEntry says that a folder is neither of the two things that can be deployed.
var ErrNoEntry = errors.New("the folder has no executable file \"run\", no function.py or function.js, and is no Go main package")

// Info tells what was packed.
type Info struct {
	Digest string // sha256:<hex> of the bytes written
	Size   int64  // of the bytes written
	Files  int
	Built  bool // the folder was a Go main package and has been compiled
}

// Create writes the package of dir to w. A folder with an executable file "run" is packed whole (without .git); one with
// function.py or function.js too, with the program that serves it; else a Go
// main package is compiled for this machine (or for GOOS and GOARCH), statically, and the program alone is packed. Output of
// the Go tool goes to log. Other folders give ErrNoEntry with an explanation.
func Create(ctx context.Context, dir string, w io.Writer, log io.Writer) (Info, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return Info{}, err
	}
	if !st.IsDir() {
		return Info{}, fmt.Errorf("%s is not a folder", dir)
	}
	entry := filepath.Join(dir, Entry)
	st, err = os.Stat(entry)
	switch {
	case err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0:
		return pack(dir, w)
	case err == nil && st.Mode().IsRegular():
		return Info{}, fmt.Errorf("%s is not executable; make it so with: chmod +x %s", entry, entry)
	}
	if extra, ok := bootstrap(dir); ok {
		return pack(dir, w, extra...)
	}
	ok, err := goMain(ctx, dir)
	if err != nil {
		return Info{}, err
	}
	if !ok {
		return Info{}, fmt.Errorf("%s: %w%s", dir, ErrNoEntry, advice(dir))
	}
	tmp, err := os.MkdirTemp("", "thaw-build-")
	if err != nil {
		return Info{}, err
	}
	defer os.RemoveAll(tmp)
	if err := build(ctx, dir, filepath.Join(tmp, Entry), "-s -w -buildid=", log); err != nil {
		return Info{}, err
	}
	info, err := pack(tmp, w)
	info.Built = true
	return info, err
}

// Programs goes through a map of image references to local code (as instance/code reads it from a file) and compiles each
// folder that is a Go main package without an executable "run": each build of its program gets a folder of its own below out,
// named after its content, and the reference leads to the present one. All other entries stay as they are. The map that is given is not changed.
//
// It is meant for the start of a server on a developer's machine: the Go tool's cache makes all but the first start quick.
func Programs(ctx context.Context, images map[string]string, out string, log io.Writer) (map[string]string, error) {
	done := make(map[string]string, len(images))
	byDir := map[string][]string{} // references by folder: several may lead to one
	for _, ref := range slices.Sorted(maps.Keys(images)) {
		target := images[ref]
		done[ref] = target
		dir, ok := strings.CutPrefix(target, "exec://")
		if st, err := os.Stat(dir); !ok || err != nil || !st.IsDir() {
			continue
		}
		if st, err := os.Stat(filepath.Join(dir, Entry)); err == nil && st.Mode()&0o111 != 0 {
			continue
		}
		byDir[dir] = append(byDir[dir], ref)
	}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for dir, refs := range byDir {
		g.Go(func() error {
			if ok, err := goMain(ctx, dir); err != nil {
				return fmt.Errorf("image %s: %w", refs[0], err)
			} else if !ok {
				return nil
			}
			sum := sha256.Sum256([]byte(dir))
			home := filepath.Join(out, filepath.Base(dir)+"-"+hex.EncodeToString(sum[:4]))
			// With the build id that the Go tool leaves in its output it sees that nothing has changed, and does not link again.
			latest := filepath.Join(home, "latest")
			if err := build(ctx, dir, latest, "-s -w", &lockedWriter{mu: &mu, w: log}); err != nil {
				return fmt.Errorf("image %s: %w", refs[0], err)
			}
			program, err := keep(home, latest)
			if err != nil {
				return fmt.Errorf("image %s: %w", refs[0], err)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, ref := range refs {
				done[ref] = "exec://" + program
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return done, nil
}

// builds is how many builds of a program are kept, the last one included.
const builds = 20

// keep copies a new build of a program to where its content says, and returns that place: a revision that was made of an
// earlier build still finds it. The oldest builds beyond a number go.
func keep(home, latest string) (string, error) {
	content, err := os.ReadFile(latest)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(content)
	dir := filepath.Join(home, hex.EncodeToString(sum[:8]))
	program := filepath.Join(dir, Entry)
	now := time.Now()
	if old, err := os.ReadFile(program); err == nil && bytes.Equal(old, content) {
		return program, os.Chtimes(dir, now, now) // in use, so not among the oldest
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp := program + ".new"
	if err := os.WriteFile(tmp, content, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, program); err != nil {
		return "", err
	}
	return program, prune(home)
}

func prune(home string) error {
	entries, err := os.ReadDir(home)
	if err != nil {
		return err
	}
	age := map[string]time.Time{}
	var names []string
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && e.IsDir() {
			names = append(names, e.Name())
			age[e.Name()] = fi.ModTime()
		}
	}
	slices.SortFunc(names, func(a, b string) int { return age[b].Compare(age[a]) }) // newest first
	for _, name := range names[min(builds, len(names)):] {
		if err := os.RemoveAll(filepath.Join(home, name)); err != nil {
			return err
		}
	}
	return nil
}

// lockedWriter is a writer that several builds share.
type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// goMain says whether dir holds a Go main package. A folder with Go files that the Go tool cannot read is an error, so that
// its complaint is seen and not "no Go package".
func goMain(ctx context.Context, dir string) (bool, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(files) == 0 {
		return false, err
	}
	if _, err := exec.LookPath("go"); err != nil {
		return false, fmt.Errorf("%s holds Go code, but there is no go command here to build it with", dir)
	}
	if p, err := gobuild.ImportDir(dir, 0); err == nil {
		return p.Name == "main", nil // a healthy package needs no go command to be read, which would be slower than all else here
	}
	cmd := exec.CommandContext(ctx, "go", "list", "-f", "{{.Name}}", ".")
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return false, fmt.Errorf("go list in %s: %w: %s", dir, err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)) == "main", nil
}

// build compiles without paths and VCS stamp; without a build id in ldflags too, the same code gives the same program wherever it lies.
func build(ctx context.Context, dir, out, ldflags string, log io.Writer) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-o", out, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var both bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(log, &both), io.MultiWriter(log, &both)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go build in %s: %w: %s", dir, err, strings.TrimSpace(both.String()))
	}
	return nil
}

// advice guesses what the folder was meant to be.
func advice(dir string) string {
	for _, g := range []struct{ file, line string }{
		{"handler.py", `exec python3 "$(dirname "$0")/handler.py"`},
		{"main.py", `exec python3 "$(dirname "$0")/main.py"`},
		{"app.py", `exec python3 "$(dirname "$0")/app.py"`},
		{"main.js", `exec node "$(dirname "$0")/main.js"`},
		{"index.js", `exec node "$(dirname "$0")/index.js"`},
		{"server.js", `exec node "$(dirname "$0")/server.js"`},
	} {
		if _, err := os.Stat(filepath.Join(dir, g.file)); err == nil {
			return fmt.Sprintf("; write an executable file %q with the lines \"#!/bin/sh\" and %s", Entry, g.line)
		}
	}
	return fmt.Sprintf("; put an executable file %q there that starts an HTTP server on port $PORT", Entry)
}

// file is one entry to be.
type file struct {
	path string // on disk
	name string // in the archive, with slashes
	info fs.FileInfo
	text []byte // of a file that is not on disk
	exec bool   // it can be executed
}

// collect walks dir and returns its files. Links must be relative and stay inside; sockets, pipes and
// devices are refused, as is a name that no package may hold.
func collect(dir string) ([]file, error) {
	var files []file
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil || rel == "." {
			return err
		}
		if d.IsDir() && d.Name() == ".git" {
			return filepath.SkipDir
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch mode := info.Mode(); {
		case mode.IsRegular(), mode.IsDir():
		case mode&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if filepath.IsAbs(target) || !filepath.IsLocal(filepath.Join(filepath.Dir(rel), target)) {
				return fmt.Errorf("%s links to %s, outside the folder; a package can only hold links that stay inside", path, target)
			}
		default:
			return fmt.Errorf("%s is neither file, folder nor link; a package cannot hold it", path)
		}
		files = append(files, file{path: path, name: filepath.ToSlash(rel), info: info})
		return nil
	})
	return files, err
}

// pack writes dir as it is. Nothing of an entry but its name, kind, executable bit and bytes gets into the archive.
func pack(dir string, w io.Writer, extra ...file) (Info, error) {
	files, err := collect(dir)
	if err != nil {
		return Info{}, err
	}
	for _, e := range extra {
		if slices.ContainsFunc(files, func(f file) bool { return f.name == e.name }) {
			return Info{}, fmt.Errorf("%s has a file %q, which is the name of one that thaw deploy would add", dir, e.name)
		}
	}
	files = append(files, extra...)
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	sum := sha256.New()
	count := &counter{w: io.MultiWriter(w, sum)}
	zip, err := gzip.NewWriterLevel(count, gzip.BestSpeed) // programs hardly get smaller at higher levels, only slower
	if err != nil {
		return Info{}, err
	}
	archive := tar.NewWriter(zip)
	for _, f := range files {
		if err := add(archive, f); err != nil {
			return Info{}, fmt.Errorf("pack %s: %w", f.path, err)
		}
	}
	if err := errors.Join(archive.Close(), zip.Close()); err != nil {
		return Info{}, fmt.Errorf("pack %s: %w", dir, err)
	}
	return Info{Digest: "sha256:" + hex.EncodeToString(sum.Sum(nil)), Size: count.n, Files: len(files)}, nil
}

func add(archive *tar.Writer, f file) error {
	h := &tar.Header{Name: f.name, Mode: 0o644, ModTime: time.Unix(0, 0).UTC(), Format: tar.FormatPAX}
	if f.text != nil {
		if f.exec {
			h.Mode = 0o755
		}
		h.Typeflag, h.Size = tar.TypeReg, int64(len(f.text))
		if err := archive.WriteHeader(h); err != nil {
			return err
		}
		_, err := archive.Write(f.text)
		return err
	}
	mode := f.info.Mode()
	switch {
	case mode.IsDir():
		h.Typeflag, h.Mode, h.Name = tar.TypeDir, 0o755, f.name+"/"
		return archive.WriteHeader(h)
	case mode&fs.ModeSymlink != 0:
		target, err := os.Readlink(f.path)
		if err != nil {
			return err
		}
		h.Typeflag, h.Mode, h.Linkname = tar.TypeSymlink, 0o777, filepath.ToSlash(target)
		return archive.WriteHeader(h)
	}
	if mode&0o111 != 0 {
		h.Mode = 0o755
	}
	h.Typeflag, h.Size = tar.TypeReg, f.info.Size()
	if err := archive.WriteHeader(h); err != nil {
		return err
	}
	in, err := os.Open(f.path)
	if err != nil {
		return err
	}
	defer in.Close()
	// Exactly the size that the header says; a file that shrank meanwhile is an error, one that grew is cut.
	if _, err := io.CopyN(archive, in, h.Size); err != nil {
		return fmt.Errorf("the file changed while it was read: %w", err)
	}
	return nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
