package code

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// ErrBadPackage says that an upload is not a package, or breaks a bound.
var ErrBadPackage = errors.New("bad package")

// PackageLimits bound one package. Zero = default.
type PackageLimits struct {
	ArchiveBytes  int64 // as uploaded; 256 MiB
	UnpackedBytes int64 // 1 GiB
	Files         int   // files, folders and links together; 20,000
	PathBytes     int   // length of one path; 1,024
}

func (l PackageLimits) withDefaults() PackageLimits {
	if l.ArchiveBytes <= 0 {
		l.ArchiveBytes = 256 << 20
	}
	if l.UnpackedBytes <= 0 {
		l.UnpackedBytes = 1 << 30
	}
	if l.Files <= 0 {
		l.Files = 20_000
	}
	if l.PathBytes <= 0 {
		l.PathBytes = 1024
	}
	return l
}

// Packages is a store of unpacked packages, one read-only folder each, named after the SHA-256 of the archive. A package is
// unpacked once, next to its place, and then renamed: what has its name is complete.
type Packages struct {
	root   string
	limits PackageLimits
	sync   func(dir string) error // writes a folder out to disk
}

// OpenPackages opens the store in dir, makes it if need be, and removes what an interrupted upload left.
func OpenPackages(dir string, l PackageLimits) (*Packages, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("package store: %w", err)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("package store: %w", err)
	}
	p := &Packages{root: abs, limits: l.withDefaults(), sync: syncTree}
	entries, err := os.ReadDir(abs)
	if err != nil {
		return nil, fmt.Errorf("package store: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			removeAll(filepath.Join(abs, e.Name()))
		}
	}
	return p, nil
}

const (
	tempPrefix = "tmp-"
	namePrefix = "sha256-"
)

// Package is what is known of an uploaded package.
type Package struct {
	Image    string `json:"image"`    // pkg://sha256:HEX
	Files    int    `json:"files"`    // files, folders and links
	Bytes    int64  `json:"bytes"`    // unpacked
	Runnable bool   `json:"runnable"` // has an executable "run" at its root; else the container must name a command
	Existed  bool   `json:"existed"`  // was there already
}

// Upload reads a tar archive, plain or gzip, until its end, unpacks it and returns its name. The name is the hash of the
// bytes as they came. Refused are: paths that are absolute or contain "..", links that lead out of the package or nowhere,
// hard links, devices and pipes, and whatever breaks a limit. Set-user-id bits are dropped.
func (p *Packages) Upload(ctx context.Context, r io.Reader) (Package, error) {
	temp, err := os.MkdirTemp(p.root, tempPrefix)
	if err != nil {
		return Package{}, fmt.Errorf("package store: %w", err)
	}
	defer removeAll(temp)

	sum := sha256.New()
	in := &limitedReader{ctx: ctx, r: io.TeeReader(r, sum), left: p.limits.ArchiveBytes, what: "archive"}
	pkg, err := p.unpack(in, temp)
	if err != nil {
		return Package{}, err
	}
	// What follows the end of the archive belongs to the hash, too.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return Package{}, err
	}
	name := hex.EncodeToString(sum.Sum(nil))
	pkg.Image = pkgScheme + "sha256:" + name
	fi, err := os.Stat(filepath.Join(temp, Run))
	pkg.Runnable = err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
	if err := errors.Join(seal(temp), p.sync(temp)); err != nil {
		return Package{}, fmt.Errorf("package store: %w", err)
	}
	final := filepath.Join(p.root, namePrefix+name)
	if err := os.Rename(temp, final); err != nil {
		if _, statErr := os.Stat(final); statErr != nil {
			return Package{}, fmt.Errorf("package store: %w", err)
		}
		pkg.Existed = true
	}
	return pkg, nil
}

// dir returns where a package lies.
func (p *Packages) dir(hex string) (string, error) {
	dir := filepath.Join(p.root, namePrefix+hex)
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("%w: no package sha256:%s here; upload it again with thaw deploy --dir", ErrNotFound, hex)
	}
	return dir, nil
}

// List returns the images of all packages in the store.
func (p *Packages) List() ([]string, error) {
	entries, err := os.ReadDir(p.root)
	if err != nil {
		return nil, fmt.Errorf("package store: %w", err)
	}
	var images []string
	for _, e := range entries {
		if name, ok := strings.CutPrefix(e.Name(), namePrefix); ok {
			images = append(images, pkgScheme+"sha256:"+name)
		}
	}
	return images, nil
}

// Remove deletes a package. Whoever calls makes sure that no revision uses it.
func (p *Packages) Remove(image string) error {
	m := pkgForm.FindStringSubmatch(image)
	if m == nil {
		return fmt.Errorf("%w: %q", ErrBadImage, image)
	}
	dir, err := p.dir(m[1])
	if err != nil {
		return err
	}
	// First out of its name, so that an interrupted removal leaves no half package.
	temp := filepath.Join(p.root, tempPrefix+"gone-"+m[1])
	if err := os.Rename(dir, temp); err != nil {
		return fmt.Errorf("package store: %w", err)
	}
	removeAll(temp)
	return nil
}

// unpack writes the archive below dir. All access goes through an os.Root, which no link can lead out of.
func (p *Packages) unpack(in io.Reader, dir string) (Package, error) {
	var pkg Package
	root, err := os.OpenRoot(dir)
	if err != nil {
		return pkg, fmt.Errorf("package store: %w", err)
	}
	defer root.Close()
	body, err := plain(in)
	if err != nil {
		return pkg, err
	}
	// The bound holds for the whole inflated stream, so headers and padding cannot be the bomb either.
	archive := tar.NewReader(&limitedReader{r: body, left: p.limits.UnpackedBytes, what: "unpacked package"})
	var links []string
	for {
		h, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return pkg, bad(err)
		}
		if pkg.Files++; pkg.Files > p.limits.Files {
			return pkg, fmt.Errorf("%w: more than %d files", ErrBadPackage, p.limits.Files)
		}
		name, err := p.cleanName(h.Name)
		if err != nil {
			return pkg, err
		}
		switch h.Typeflag {
		case tar.TypeXGlobalHeader:
			pkg.Files--
			continue
		case tar.TypeDir:
			err = root.MkdirAll(name, 0o755)
		case tar.TypeReg:
			if err = root.MkdirAll(path.Dir(name), 0o755); err == nil {
				err = writeFile(root, name, h, archive)
			}
			pkg.Bytes += h.Size
		case tar.TypeSymlink:
			if path.IsAbs(h.Linkname) {
				return pkg, fmt.Errorf("%w: %s is a link to the absolute path %s", ErrBadPackage, name, h.Linkname)
			}
			if err = root.MkdirAll(path.Dir(name), 0o755); err == nil {
				err = root.Symlink(h.Linkname, name)
			}
			links = append(links, name)
		default:
			return pkg, fmt.Errorf("%w: %s is neither a file, nor a folder, nor a symbolic link (type %q)", ErrBadPackage, name, h.Typeflag)
		}
		if err != nil {
			return pkg, bad(fmt.Errorf("%s: %w", name, err))
		}
	}
	if pkg.Files == 0 {
		return pkg, fmt.Errorf("%w: the archive is empty or not a tar", ErrBadPackage)
	}
	for _, name := range links {
		if _, err := root.Stat(name); err != nil {
			return pkg, fmt.Errorf("%w: link %s leads out of the package or nowhere: %w", ErrBadPackage, name, err)
		}
	}
	return pkg, nil
}

// plain undoes gzip, if the first bytes say so.
func plain(in io.Reader) (io.Reader, error) {
	buffered := bufio.NewReader(in)
	magic, err := buffered.Peek(2)
	if err != nil {
		return nil, bad(err)
	}
	if !bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return buffered, nil
	}
	z, err := gzip.NewReader(buffered)
	if err != nil {
		return nil, bad(err)
	}
	return z, nil
}

func (p *Packages) cleanName(name string) (string, error) {
	clean := path.Clean(name)
	switch {
	case len(name) > p.limits.PathBytes:
		return "", fmt.Errorf("%w: a path is longer than %d bytes", ErrBadPackage, p.limits.PathBytes)
	case strings.ContainsAny(name, "\x00\\"):
		return "", fmt.Errorf("%w: path %q has a backslash or a zero byte", ErrBadPackage, name)
	case !filepath.IsLocal(clean):
		return "", fmt.Errorf("%w: path %q leads out of the package", ErrBadPackage, name)
	}
	return clean, nil
}

func writeFile(root *os.Root, name string, h *tar.Header, r io.Reader) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fs.FileMode(h.Mode)&0o111|0o644)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, r)
	if err == nil && n != h.Size {
		err = io.ErrUnexpectedEOF
	}
	return errors.Join(err, f.Close())
}

// seal makes everything below dir read-only.
func seal(dir string) error {
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name == dir:
			return nil // the folder itself can be renamed only while it may be written
		case d.IsDir():
			return os.Chmod(name, 0o555)
		case d.Type().IsRegular():
			fi, err := d.Info()
			if err != nil {
				return err
			}
			mode := fs.FileMode(0o444)
			if fi.Mode()&0o111 != 0 {
				mode = 0o555
			}
			return os.Chmod(name, mode)
		}
		return nil
	})
	return errors.Join(err, os.Chmod(dir, 0o755))
}

// removeAll also deletes folders that were made read-only.
func removeAll(dir string) {
	_ = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = os.Chmod(name, 0o755)
		}
		return nil
	})
	_ = os.RemoveAll(dir)
}

func bad(err error) error {
	if errors.Is(err, ErrBadPackage) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrBadPackage, err)
}

// limitedReader fails, rather than ends, at its bound: a cut archive must not pass as a short one.
type limitedReader struct {
	ctx  context.Context // may be nil
	r    io.Reader
	left int64
	what string
}

func (l *limitedReader) Read(b []byte) (int, error) {
	if l.ctx != nil && l.ctx.Err() != nil {
		return 0, l.ctx.Err()
	}
	n, err := l.r.Read(b)
	if l.left -= int64(n); l.left < 0 {
		return 0, fmt.Errorf("%w: %s is too large", ErrBadPackage, l.what)
	}
	return n, err
}
