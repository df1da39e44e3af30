// Package code turns image references into programs of this machine. It knows three forms:
//
//	exec:///abs/path[@sha256:HEX]  a program that is there already
//	pkg://sha256:HEX               a package uploaded to the Packages store
//	anything else                  looked up in the map of images, which leads to one of the two
//
// Resolve runs at deploy time: it hashes the program, so that a revision names exactly the code it was made of. Locate runs
// before instances start and answers from memory; it notices by size, modification time and inode that a program has been
// exchanged since, and refuses: a revision never runs other code than the one it was deployed with.
package code

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"

	lru "github.com/hashicorp/golang-lru/v2"
)

// What callers branch on. The errors around them say which image and what to do.
var (
	ErrUnknownImage = errors.New("image is not known on this machine")
	ErrBadImage     = errors.New("malformed image reference")
	ErrNotFound     = errors.New("code is not there")
	ErrChanged      = errors.New("code has changed since it was deployed")
)

const (
	execScheme = "exec://"
	pkgScheme  = "pkg://"
	// Run is the program of a package when the container names no command.
	Run = "run"
)

// Code is where the code of an image lies.
type Code struct {
	Image   string // with digest: what a revision's status shows, accepted as an image again
	Dir     string // the package's root, or the folder of the program
	Program string // absolute path of the program; in a package it may be missing (CheckProgram)
	Socket  bool   // its thaw.json says that it serves on a socket that it is handed
	Says    bool   // ... and that it writes a byte to descriptor 4 when it is ready

	file     *stamped  // the program; nil = a package without one
	packages *Packages // nil = exec://
}

// Resolver finds code. Its methods may be called concurrently.
type Resolver struct {
	packages *Packages
	images   Images

	mu     sync.Mutex // one hash at a time: deploys of the same program wait for one result
	hashes *lru.Cache[string, stamped]
}

// stamped is a file's hash and what must be unchanged for it to be trusted.
type stamped struct {
	path  string
	sum   string // hex
	stamp stamp
}

type stamp struct {
	size, mtime, ctime int64
	dev, ino           uint64
}

// hashCacheSize bounds how many programs' hashes are remembered; forgetting one costs a hash at the next deploy.
const hashCacheSize = 4096

// NewResolver makes a resolver over a package store and a map of images, which may be nil.
func NewResolver(p *Packages, images Images) *Resolver {
	hashes, _ := lru.New[string, stamped](hashCacheSize) // fails only for a size below 1
	return &Resolver{packages: p, images: images, hashes: hashes}
}

var digestSuffix = regexp.MustCompile(`@sha256:([0-9a-f]{64})$`)
var pkgForm = regexp.MustCompile(`^pkg://sha256:([0-9a-f]{64})$`)

// Resolve returns the image with the digest of its code. It is called when a revision is made and may read a whole program.
func (r *Resolver) Resolve(ctx context.Context, image string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	c, err := r.locate(ctx, image)
	if err != nil {
		return "", err
	}
	return c.Image, nil
}

// Locate finds the code of an image, with or without digest. A package that is not on this node is fetched, which may take a while.
func (r *Resolver) Locate(image string) (*Code, error) { return r.locate(context.Background(), image) }

func (r *Resolver) locate(ctx context.Context, image string) (*Code, error) {
	local, err := r.images.local(image)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(local, pkgScheme) {
		m := pkgForm.FindStringSubmatch(local)
		if m == nil {
			return nil, fmt.Errorf("%w: %q, expected pkg://sha256: and 64 hex digits", ErrBadImage, local)
		}
		dir, err := r.packages.Fetch(ctx, m[1])
		if err != nil {
			return nil, err
		}
		c := &Code{Image: local, Dir: dir, Program: filepath.Join(dir, Run), packages: r.packages}
		if st, err := stampOf(c.Program); err == nil {
			c.file = &stamped{path: c.Program, sum: m[1], stamp: st}
		}
		if err := c.readSettings(); err != nil {
			return nil, err
		}
		return c, nil
	}
	return r.locateExec(local)
}

func (r *Resolver) locateExec(image string) (*Code, error) {
	file, want := strings.TrimPrefix(image, execScheme), ""
	if m := digestSuffix.FindStringSubmatch(file); m != nil {
		file, want = strings.TrimSuffix(file, m[0]), m[1]
	}
	if !path.IsAbs(file) || strings.ContainsRune(file, 0) {
		return nil, fmt.Errorf("%w: %q, expected exec:///absolute/path", ErrBadImage, image)
	}
	file = filepath.Clean(file)
	if fi, err := os.Stat(file); err == nil && fi.IsDir() {
		file = filepath.Join(file, Run)
	}
	st, err := r.hash(file)
	if err != nil {
		return nil, err
	}
	if want != "" && st.sum != want {
		return nil, changed(file)
	}
	return &Code{
		Image: execScheme + file + "@sha256:" + st.sum, Dir: filepath.Dir(file), Program: file, file: &st,
	}, nil
}

func changed(file string) error {
	return fmt.Errorf("%w: %s is not the file that the revision was made of; deploy again to use the new one", ErrChanged, file)
}

// hash returns the hash of a file, from memory when the file looks as it did.
func (r *Resolver) hash(file string) (stamped, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now, err := stampOf(file)
	if err != nil {
		return stamped{}, err
	}
	if st, ok := r.hashes.Get(file); ok && st.stamp == now {
		return st, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return stamped{}, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return stamped{}, fmt.Errorf("hash %s: %w", file, err)
	}
	if after, err := stampOf(file); err != nil || after != now {
		return stamped{}, fmt.Errorf("%w: %s is being written; try again when it is complete", ErrNotFound, file)
	}
	st := stamped{path: file, sum: hex.EncodeToString(h.Sum(nil)), stamp: now}
	r.hashes.Add(file, st)
	return st, nil
}

// stampOf looks at a program: it must be an executable file.
func stampOf(file string) (stamp, error) {
	fi, err := os.Stat(file)
	if err != nil {
		return stamp{}, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	if err := executable(file, fi); err != nil {
		return stamp{}, err
	}
	st := stamp{size: fi.Size(), mtime: fi.ModTime().UnixNano()}
	if sys, ok := fi.Sys().(*syscall.Stat_t); ok {
		st.dev, st.ino, st.ctime = uint64(sys.Dev), sys.Ino, ctime(sys)
	}
	return st, nil
}

func executable(file string, fi os.FileInfo) error {
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%w: %s is not a file", ErrNotFound, file)
	case fi.Mode()&0o111 == 0:
		return fmt.Errorf("%w: %s is not executable; try: chmod +x %s", ErrNotFound, file, file)
	}
	return nil
}

// Check says whether the code is still what Locate found. It costs one stat and is called before every start. A package that does
// not look as it did is compared with its list by the next Locate, and fetched again if need be.
func (c *Code) Check() error {
	if c.file == nil {
		_, err := os.Stat(c.Dir)
		return err
	}
	now, err := stampOf(c.file.path)
	if err == nil && now != c.file.stamp {
		err = changed(c.file.path)
	}
	if err != nil && c.packages != nil {
		c.packages.suspect(c.file.sum)
	}
	return err
}

// CheckProgram says whether the program of the code itself can run, for containers that name no command of their own.
func (c *Code) CheckProgram() error {
	fi, err := os.Stat(c.Program)
	if err != nil {
		if c.packages != nil {
			return fmt.Errorf("%w: the package has no executable %q at its root and the container names no command", ErrNotFound, Run)
		}
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return executable(c.Program, fi)
}

// Shown returns the files and folders of this machine that belong to the code: of a package, and of a program named `run`, its
// folder; of any other program the file alone, and the libraries beside it if it was installed as PREFIX/bin/NAME.
func (c *Code) Shown() []string {
	if c.file == nil || filepath.Base(c.Program) == Run {
		return []string{c.Dir}
	}
	shown := []string{c.Program}
	if lib := filepath.Join(filepath.Dir(c.Dir), "lib"); filepath.Base(c.Dir) == "bin" && isDir(lib) {
		shown = append(shown, lib)
	}
	return shown
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

// settingsFile is a file at the root of a package that tells the node what to know about it:
//
//	{"socket": "fd3", "ready": "fd4"}
//
// means what the annotations instance.thaw.run/socket and instance.thaw.run/ready mean.
const (
	settingsFile  = "thaw.json"
	settingsBytes = 4 << 10
)

func (c *Code) readSettings() error {
	f, err := os.Open(filepath.Join(c.Dir, settingsFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s of the package: %w", settingsFile, err)
	}
	defer f.Close()
	var s struct {
		Socket string `json:"socket"`
		Ready  string `json:"ready"`
	}
	dec := json.NewDecoder(io.LimitReader(f, settingsBytes))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return fmt.Errorf("%w: %s of the package: %w", ErrBadPackage, settingsFile, err)
	}
	if s.Socket != "" && s.Socket != "fd3" {
		return fmt.Errorf("%w: %s of the package: socket %q is not known; want fd3", ErrBadPackage, settingsFile, s.Socket)
	}
	if s.Ready != "" && s.Ready != "fd4" {
		return fmt.Errorf("%w: %s of the package: ready %q is not known; want fd4", ErrBadPackage, settingsFile, s.Ready)
	}
	c.Socket, c.Says = s.Socket == "fd3", s.Ready == "fd4"
	return nil
}
