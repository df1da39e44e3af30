// Package store keeps packages as they were uploaded, by the SHA-256 of their bytes: the second level of the code cache, one for each
// zone. The first level is instance/code, which holds packages unpacked on the node that runs them and fills itself from here.
//
//	Disk    a folder
//	Cache   a folder in front of another store, usually a bucket (store/bucket)
//	Handler any of them over HTTP
//	Remote  the client of a Handler
//
// Whatever a store gives out has to be hashed by whoever takes it: names are hashes, so nobody needs to be trusted.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"regexp"
	"time"
)

// What callers branch on.
var (
	// ErrNotFound says that the store does not have the package.
	ErrNotFound = errors.New("package is not in the store")
	// ErrCorrupt says that bytes are not what their name says.
	ErrCorrupt = errors.New("package is corrupt")
	// ErrTooLarge says that a package is beyond what the store takes.
	ErrTooLarge = errors.New("package is too large")
)

// MaxBytes is the size of the largest package that stores take: 1 GiB. What an upload may have is bounded more tightly by instance/code.
const MaxBytes = 1 << 30

// Entry is what List tells of a package.
type Entry struct {
	Sum    string // 64 hex digits
	Size   int64
	Stored time.Time
}

// Store holds packages. Methods may be called concurrently; sum is always 64 lower-case hex digits, see Check.
type Store interface {
	// Open returns the bytes from offset on, and how long the whole is. ErrNotFound.
	Open(ctx context.Context, sum string, offset int64) (io.ReadCloser, int64, error)
	// Put stores what r holds until its end. What is there already is not written again. ErrCorrupt if the bytes are
	// others than sum says, ErrTooLarge; then nothing is stored.
	Put(ctx context.Context, sum string, r io.Reader) error
	// Verify reads a package whole. If it is not what its name says, it is dropped (from a cache; a store behind it is left
	// alone) and the error is ErrCorrupt: the next Open gets a good one, or ErrNotFound.
	Verify(ctx context.Context, sum string) error
	// Remove deletes a package; one that is not there is no error.
	Remove(ctx context.Context, sum string) error
	// List goes through all packages in no particular order, until the first error.
	List(ctx context.Context) iter.Seq2[Entry, error]
}

var sumForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Check says whether sum is a name that stores take.
func Check(sum string) error {
	if !sumForm.MatchString(sum) {
		return fmt.Errorf("%q is not a SHA-256 in 64 lower-case hex digits", sum)
	}
	return nil
}

func corrupt(sum, got string) error {
	return fmt.Errorf("%w: the bytes of sha256:%s have the hash %s", ErrCorrupt, sum, got)
}

func notFound(sum string) error { return fmt.Errorf("%w: sha256:%s", ErrNotFound, sum) }

// bounded fails at its bound instead of ending there, and when its context ends.
type bounded struct {
	ctx  context.Context
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("%w: more than %d MiB", ErrTooLarge, MaxBytes>>20)
	}
	return n, err
}
