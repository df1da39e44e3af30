package store

import (
	"context"
	"errors"
	"io"
	"iter"

	"golang.org/x/sync/singleflight"
)

// Cache is a folder in front of another store. Reads that the folder cannot serve fill it first, once however many ask, and hashed
// on the way; writes go to the store behind before they are in the folder.
type Cache struct {
	near *Disk
	far  Store
	fill singleflight.Group
}

// NewCache puts a folder in front of a store.
func NewCache(near *Disk, far Store) *Cache { return &Cache{near: near, far: far} }

// Open implements Store.
func (c *Cache) Open(ctx context.Context, sum string, offset int64) (io.ReadCloser, int64, error) {
	r, size, err := c.near.Open(ctx, sum, offset)
	if !errors.Is(err, ErrNotFound) {
		return r, size, err
	}
	// The fill is everybody's: it does not end because one of those who wait has left.
	done := c.fill.DoChan(sum, func() (any, error) { return nil, c.fetch(context.WithoutCancel(ctx), sum) })
	select {
	case res := <-done:
		if res.Err != nil {
			return nil, 0, res.Err
		}
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	return c.near.Open(ctx, sum, offset)
}

func (c *Cache) fetch(ctx context.Context, sum string) error {
	r, err := Resume(ctx, c.far, sum)
	if err != nil {
		return err
	}
	defer r.Close()
	return c.near.Put(ctx, sum, r)
}

// Put implements Store.
func (c *Cache) Put(ctx context.Context, sum string, r io.Reader) error {
	if err := c.near.Put(ctx, sum, r); err != nil {
		return err
	}
	f, _, err := c.near.Open(ctx, sum, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := c.far.Put(ctx, sum, f); err != nil {
		return errors.Join(err, c.near.Remove(ctx, sum)) // what others cannot get is not stored
	}
	return nil
}

// Verify implements Store, for the folder.
func (c *Cache) Verify(ctx context.Context, sum string) error {
	err := c.near.Verify(ctx, sum)
	if errors.Is(err, ErrNotFound) {
		return nil // nothing here that could be wrong
	}
	return err
}

// Remove implements Store, in both.
func (c *Cache) Remove(ctx context.Context, sum string) error {
	return errors.Join(c.far.Remove(ctx, sum), c.near.Remove(ctx, sum))
}

// List implements Store: what the store behind has.
func (c *Cache) List(ctx context.Context) iter.Seq2[Entry, error] { return c.far.List(ctx) }
