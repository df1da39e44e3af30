// Package storetest holds what every package store has to do, for the tests of each kind.
package storetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/thawrun/thaw/instance/store"
)

// Sum is the name of a package.
func Sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// Read opens a package and reads it to its end.
func Read(s store.Store, sum string, offset int64) ([]byte, int64, error) {
	r, size, err := s.Open(context.Background(), sum, offset)
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return b, size, err
}

// Run checks an empty store.
func Run(t *testing.T, s store.Store) {
	ctx := context.Background()
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<12)
	sum := Sum(data)
	list := func() (sums []string) {
		for e, err := range s.List(ctx) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Size <= 0 || e.Stored.IsZero() {
				t.Errorf("entry %+v", e)
			}
			sums = append(sums, e.Sum)
		}
		return sums
	}
	if got := list(); len(got) != 0 {
		t.Fatalf("not empty: %v", got)
	}
	if _, _, err := s.Open(ctx, sum, 0); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("missing package: %v", err)
	}
	for range 2 {
		if err := s.Put(ctx, sum, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
	}
	for _, offset := range []int64{0, 1, 5000, int64(len(data)) - 1} {
		got, size, err := Read(s, sum, offset)
		if err != nil || size != int64(len(data)) || !bytes.Equal(got, data[offset:]) {
			t.Errorf("from %d: %d bytes of %d, %v", offset, len(got), size, err)
		}
	}
	other := Sum([]byte("other"))
	if err := s.Put(ctx, other, strings.NewReader("not it")); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("bytes that are not what the name says: %v", err)
	}
	if _, _, err := s.Open(ctx, other, 0); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a refused package is there: %v", err)
	}
	broken := io.MultiReader(strings.NewReader("oth"), failing{})
	if err := s.Put(ctx, other, broken); err == nil {
		t.Error("an upload that breaks off is accepted")
	}
	if got := list(); !slices.Equal(got, []string{sum}) {
		t.Errorf("list %v", got)
	}
	if err := s.Verify(ctx, sum); err != nil {
		t.Errorf("verify: %v", err)
	}
	for _, bad := range []string{"", "..", "../../etc/passwd", strings.Repeat("g", 64), strings.ToUpper(sum), sum + "0"} {
		if _, _, err := s.Open(ctx, bad, 0); err == nil {
			t.Errorf("open %q is accepted", bad)
		}
		if s.Put(ctx, bad, strings.NewReader("x")) == nil || s.Remove(ctx, bad) == nil {
			t.Errorf("%q is taken for a name", bad)
		}
	}
	var wg sync.WaitGroup
	for i := range 8 { // the same and others at once
		wg.Go(func() {
			d := []byte{byte(i % 4)}
			if err := s.Put(ctx, Sum(d), bytes.NewReader(d)); err != nil {
				t.Error(err)
			}
			if got, _, err := Read(s, Sum(d), 0); err != nil || !bytes.Equal(got, d) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	wg.Wait()
	for range 2 {
		if err := s.Remove(ctx, sum); err != nil {
			t.Error(err)
		}
	}
	if got := list(); len(got) != 4 || slices.Contains(got, sum) {
		t.Errorf("after the removal: %v", got)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the client has gone") }
