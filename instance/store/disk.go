package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
)

// Disk is a store in a folder: one file for each package, named after its hash, complete since the moment it has that name.
type Disk struct{ root string }

const tempPrefix = "tmp-"

// OpenDisk opens a store, makes its folder if need be, and removes what interrupted uploads have left.
func OpenDisk(dir string) (*Disk, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("package store: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
	if err != nil {
		return nil, fmt.Errorf("package store: %w", err)
	}
	for _, f := range left {
		if err := os.Remove(f); err != nil {
			return nil, fmt.Errorf("package store: %w", err)
		}
	}
	return &Disk{dir}, nil
}

func (d *Disk) file(sum string) string { return filepath.Join(d.root, sum) }

// Open implements Store.
func (d *Disk) Open(_ context.Context, sum string, offset int64) (io.ReadCloser, int64, error) {
	if err := Check(sum); err != nil {
		return nil, 0, err
	}
	f, err := os.Open(d.file(sum))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, notFound(sum)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("package store: %w", err)
	}
	fi, err := f.Stat()
	if err == nil {
		_, err = f.Seek(offset, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("package store: %w", err)
	}
	return f, fi.Size(), nil
}

// Put implements Store.
func (d *Disk) Put(ctx context.Context, sum string, r io.Reader) error {
	if err := Check(sum); err != nil {
		return err
	}
	if _, err := os.Stat(d.file(sum)); err == nil {
		return nil
	}
	temp, err := os.CreateTemp(d.root, tempPrefix)
	if err != nil {
		return fmt.Errorf("package store: %w", err)
	}
	defer os.Remove(temp.Name())
	defer temp.Close()
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(temp, h), &bounded{ctx, r, MaxBytes}); err != nil {
		return fmt.Errorf("package store: %w", err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != sum {
		return corrupt(sum, got)
	}
	if err := errors.Join(temp.Chmod(0o444), temp.Sync(), temp.Close()); err != nil {
		return fmt.Errorf("package store: %w", err)
	}
	if err := os.Rename(temp.Name(), d.file(sum)); err != nil {
		return fmt.Errorf("package store: %w", err)
	}
	return d.syncNames()
}

// syncNames makes a new name survive a crash of the machine.
func (d *Disk) syncNames() error {
	f, err := os.Open(d.root)
	if err != nil {
		return fmt.Errorf("package store: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("package store: %w", err)
	}
	return nil
}

// Verify implements Store.
func (d *Disk) Verify(ctx context.Context, sum string) error {
	f, _, err := d.Open(ctx, sum, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, &bounded{ctx, f, MaxBytes}); err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	// A file that cannot be read is as bad as one that has changed.
	if got := hex.EncodeToString(h.Sum(nil)); got != sum {
		return errors.Join(corrupt(sum, got), d.Remove(ctx, sum))
	}
	return nil
}

// Remove implements Store.
func (d *Disk) Remove(_ context.Context, sum string) error {
	if err := Check(sum); err != nil {
		return err
	}
	if err := os.Remove(d.file(sum)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("package store: %w", err)
	}
	return nil
}

// List implements Store.
func (d *Disk) List(ctx context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		entries, err := os.ReadDir(d.root)
		if err != nil {
			yield(Entry{}, fmt.Errorf("package store: %w", err))
			return
		}
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				yield(Entry{}, err)
				return
			}
			fi, err := e.Info()
			if err != nil || strings.HasPrefix(e.Name(), tempPrefix) || Check(e.Name()) != nil {
				continue // gone meanwhile, or not ours
			}
			if !yield(Entry{Sum: e.Name(), Size: fi.Size(), Stored: fi.ModTime()}, nil) {
				return
			}
		}
	}
}
