package code

import (
	"archive/tar"
	"archive/zip"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
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

// item is one entry of an archive.
type item struct {
	name string
	mode fs.FileMode // its type, and whether it may be executed
	link string
	size int64 // of a file, as the archive says; -1 = it does not say so reliably
	body io.Reader
}

const (
	zipMagic  = "PK"
	gzipMagic = "\x1f\x8b"
	zstdMagic = "\x28\xb5\x2f\xfd"
	// zipDirectory bounds the list of entries at the end of a zip, which is read whole into memory.
	zipDirectory = 4 << 20
	zstdWindow   = 64 << 20
)

// items goes through an archive: tar, tar.gz, tar.zst or zip, told apart by their first bytes.
func items(f *os.File, l PackageLimits, visit func(item) error) error {
	buffered := bufio.NewReaderSize(f, 64<<10)
	magic, err := buffered.Peek(4)
	if err != nil && len(magic) == 0 {
		return fmt.Errorf("%w: the archive is empty or neither tar nor zip", ErrBadPackage)
	}
	has := func(m string) bool { return bytes.HasPrefix(magic, []byte(m)) }
	switch {
	case has(zipMagic):
		return zipItems(f, l, visit)
	case has(gzipMagic):
		z, err := gzip.NewReader(buffered)
		if err != nil {
			return bad(err)
		}
		return tarItems(z, l, visit)
	case has(zstdMagic):
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return bad(err)
		}
		defer z.Close()
		return tarItems(z, l, visit)
	}
	return tarItems(buffered, l, visit)
}

func tarItems(r io.Reader, l PackageLimits, visit func(item) error) error {
	// The bound holds for the whole inflated stream, so headers and padding cannot be the bomb either.
	archive := tar.NewReader(&limitedReader{r: r, left: l.UnpackedBytes, what: "unpacked package"})
	for {
		h, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return bad(err)
		}
		it := item{name: h.Name, mode: fs.FileMode(h.Mode) & 0o111, link: h.Linkname, size: h.Size, body: archive}
		switch h.Typeflag {
		case tar.TypeXGlobalHeader:
			continue
		case tar.TypeReg:
		case tar.TypeDir:
			it.mode |= fs.ModeDir
		case tar.TypeSymlink:
			it.mode |= fs.ModeSymlink
		default:
			return fmt.Errorf("%w: %s is neither a file, nor a folder, nor a symbolic link (type %q)", ErrBadPackage, h.Name, h.Typeflag)
		}
		if err := visit(it); err != nil {
			return err
		}
	}
}

func zipItems(f *os.File, l PackageLimits, visit func(item) error) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	// The list of entries is bounded by what may be read of the file before the first entry is.
	at := &limitedAt{f: f, left: zipDirectory}
	z, err := zip.NewReader(at, fi.Size())
	if err != nil {
		return bad(err)
	}
	if len(z.File) > l.Files {
		return tooMany(l)
	}
	at.left = 1 << 62
	left := l.UnpackedBytes
	for _, e := range z.File {
		if e.Flags&1 != 0 {
			return fmt.Errorf("%w: %s is encrypted", ErrBadPackage, e.Name)
		}
		it := item{name: e.Name, mode: e.Mode() & (fs.ModeType | 0o111), size: -1}
		if err := func() error {
			if it.mode.IsDir() {
				return visit(it)
			}
			body, err := e.Open()
			if err != nil {
				return bad(err)
			}
			defer body.Close()
			in := &limitedReader{r: body, left: left, what: "unpacked package"}
			defer func() { left = in.left }()
			switch {
			case it.mode&fs.ModeSymlink != 0:
				b, err := io.ReadAll(io.LimitReader(in, int64(l.PathBytes)+1))
				if err != nil || len(b) > l.PathBytes {
					return fmt.Errorf("%w: link %s leads to a path of more than %d bytes, or cannot be read: %v", ErrBadPackage, e.Name, l.PathBytes, err)
				}
				it.link = string(b)
			case !it.mode.IsRegular():
				return fmt.Errorf("%w: %s is neither a file, nor a folder, nor a symbolic link (%v)", ErrBadPackage, e.Name, it.mode)
			}
			it.body = in
			return visit(it)
		}(); err != nil {
			return err
		}
	}
	return nil
}

func tooMany(l PackageLimits) error {
	return fmt.Errorf("%w: more than %d files", ErrBadPackage, l.Files)
}

// unpack writes an archive below dir and lists what it has written. All access goes through an os.Root, which no link can lead out of.
// Refused are: paths that are absolute or contain "..", links that lead out of the package or nowhere, hard links, devices
// and pipes, names that come twice, and whatever breaks a limit. Set-user-id bits are dropped.
func unpack(f *os.File, dir string, l PackageLimits) (manifest, error) {
	var m manifest
	root, err := os.OpenRoot(dir)
	if err != nil {
		return m, fmt.Errorf("package store: %w", err)
	}
	defer root.Close()
	var links []string
	n := 0
	err = items(f, l, func(it item) error {
		if n++; n > l.Files {
			return tooMany(l)
		}
		name, err := cleanName(it.name, l)
		if err != nil {
			return err
		}
		e := listed{Name: name}
		switch {
		case it.mode.IsDir():
			err = root.MkdirAll(name, 0o755)
		case it.mode&fs.ModeSymlink != 0:
			if path.IsAbs(it.link) || it.link == "" {
				return fmt.Errorf("%w: %s is a link to the absolute path %q", ErrBadPackage, name, it.link)
			}
			if err = root.MkdirAll(path.Dir(name), 0o755); err == nil {
				err = root.Symlink(it.link, name)
			}
			links = append(links, name)
			e.Link = it.link
		default:
			if err = root.MkdirAll(path.Dir(name), 0o755); err == nil {
				e.Size, e.Hash, err = writeFile(root, name, it)
			}
			e.Exec = it.mode&0o111 != 0
			m.Bytes += e.Size
		}
		if err != nil {
			return bad(fmt.Errorf("%s: %w", name, err))
		}
		if e.Hash != "" || e.Link != "" {
			m.list = append(m.list, e)
		}
		return nil
	})
	if err != nil {
		return m, err
	}
	if n == 0 {
		return m, fmt.Errorf("%w: the archive is empty or neither tar nor zip", ErrBadPackage)
	}
	for _, name := range links {
		if _, err := root.Stat(name); err != nil {
			return m, fmt.Errorf("%w: link %s leads out of the package or nowhere: %w", ErrBadPackage, name, err)
		}
	}
	m.Files = n
	fi, err := root.Stat(Run)
	m.Runnable = err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
	return m, nil
}

func cleanName(name string, l PackageLimits) (string, error) {
	clean := path.Clean(name)
	switch {
	case len(name) > l.PathBytes:
		return "", fmt.Errorf("%w: a path is longer than %d bytes", ErrBadPackage, l.PathBytes)
	case strings.ContainsAny(name, "\x00\\"):
		return "", fmt.Errorf("%w: path %q has a backslash or a zero byte", ErrBadPackage, name)
	case !filepath.IsLocal(clean):
		return "", fmt.Errorf("%w: path %q leads out of the package", ErrBadPackage, name)
	}
	return clean, nil
}

func writeFile(root *os.Root, name string, it item) (size int64, sum string, err error) {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, it.mode&0o111|0o644)
	if err != nil {
		return 0, "", err
	}
	h := newHash()
	size, err = io.Copy(io.MultiWriter(f, h), it.body)
	if err == nil && it.size >= 0 && size != it.size {
		err = io.ErrUnexpectedEOF
	}
	return size, h.String(), errors.Join(err, f.Close())
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

// limitedAt is the same for reads at offsets.
type limitedAt struct {
	f    io.ReaderAt
	left int64
}

func (l *limitedAt) ReadAt(b []byte, at int64) (int, error) {
	if l.left -= int64(len(b)); l.left < 0 {
		return 0, fmt.Errorf("%w: the list of entries is larger than %d MiB", ErrBadPackage, zipDirectory>>20)
	}
	return l.f.ReadAt(b, at)
}
