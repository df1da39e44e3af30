package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// maxResumes bounds how often one read of a package is taken up again.
const maxResumes = 5

// Resume opens a package for one read from its beginning to its end that survives broken connections: it goes on where the
// bytes ended, up to five times. Bytes that come are not checked.
func Resume(ctx context.Context, s Store, sum string) (io.ReadCloser, error) {
	r, size, err := s.Open(ctx, sum, 0)
	if err != nil {
		return nil, err
	}
	if size > MaxBytes {
		r.Close()
		return nil, fmt.Errorf("%w: sha256:%s has %d bytes", ErrTooLarge, sum, size)
	}
	return &resumed{ctx: ctx, s: s, sum: sum, r: r, size: size, pause: 50 * time.Millisecond}, nil
}

type resumed struct {
	ctx   context.Context
	s     Store
	sum   string
	r     io.ReadCloser
	at    int64
	size  int64
	tries int
	pause time.Duration
}

func (r *resumed) Read(p []byte) (int, error) {
	for {
		if r.at == r.size {
			return 0, io.EOF
		}
		n, err := r.r.Read(p[:min(int64(len(p)), r.size-r.at)])
		r.at += int64(n)
		if n > 0 || err == nil {
			return n, nil // an error will come again, or the read is taken up
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err := r.again(err); err != nil {
			return 0, err
		}
	}
}

// again opens the rest, after a pause that doubles.
func (r *resumed) again(why error) error {
	r.r.Close()
	r.r = io.NopCloser(errReader{why})
	for {
		if r.tries++; r.tries > maxResumes || r.ctx.Err() != nil {
			return fmt.Errorf("sha256:%s broke off after %d of %d bytes: %w", r.sum, r.at, r.size, why)
		}
		select {
		case <-time.After(r.pause):
		case <-r.ctx.Done():
			continue
		}
		r.pause *= 2
		next, size, err := r.s.Open(r.ctx, r.sum, r.at)
		switch {
		case errors.Is(err, ErrNotFound):
			return err
		case err != nil:
			why = err
		case size != r.size:
			next.Close()
			return fmt.Errorf("%w: sha256:%s had %d bytes and has %d now", ErrCorrupt, r.sum, r.size, size)
		default:
			r.r = next
			return nil
		}
	}
}

func (r *resumed) Close() error { return r.r.Close() }

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }
