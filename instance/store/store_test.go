package store_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/thawrun/thaw/instance/store"
	"github.com/thawrun/thaw/instance/store/storetest"
)

var quiet = slog.New(slog.DiscardHandler)

func disk(t testing.TB) (*store.Disk, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	d, err := store.OpenDisk(dir)
	if err != nil {
		t.Fatal(err)
	}
	return d, dir
}

func remote(t testing.TB, h http.Handler) *store.Remote {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	r, err := store.NewRemote(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestContract(t *testing.T) {
	t.Run("disk", func(t *testing.T) {
		d, _ := disk(t)
		storetest.Run(t, d)
	})
	t.Run("cache", func(t *testing.T) {
		near, _ := disk(t)
		far, _ := disk(t)
		storetest.Run(t, store.NewCache(near, far))
	})
	t.Run("remote", func(t *testing.T) {
		d, dir := disk(t)
		storetest.Run(t, remote(t, store.Handler(d, quiet)))
		if left, _ := filepath.Glob(filepath.Join(dir, "tmp-*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

// TestCorrupt: a file that has changed on disk is dropped by Verify and comes again from the store behind.
func TestCorrupt(t *testing.T) {
	ctx := context.Background()
	near, dir := disk(t)
	far, _ := disk(t)
	data := bytes.Repeat([]byte("x"), 1000)
	sum := storetest.Sum(data)
	c := remote(t, store.Handler(store.NewCache(near, far), quiet))
	if err := c.Put(ctx, sum, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	os.Chmod(filepath.Join(dir, sum), 0o644)
	if err := os.WriteFile(filepath.Join(dir, sum), bytes.Repeat([]byte("y"), 1000), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, _, _ := storetest.Read(c, sum, 0); bytes.Equal(got, data) {
		t.Fatal("the file has not changed: the test is void")
	}
	if err := c.Verify(ctx, sum); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("verify: %v", err)
	}
	if got, _, err := storetest.Read(c, sum, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("after it: %.10q, %v", got, err)
	}
	if err := c.Verify(ctx, sum); err != nil {
		t.Errorf("verify again: %v", err)
	}
}

// counting counts the reads that reach a store, and lets them wait.
type counting struct {
	store.Store
	opens atomic.Int32
	gate  chan struct{}
}

func (c *counting) Open(ctx context.Context, sum string, offset int64) (io.ReadCloser, int64, error) {
	c.opens.Add(1)
	<-c.gate
	return c.Store.Open(ctx, sum, offset)
}

// TestSingleFlight: many who want what is not here yet cause one read of the store behind.
func TestSingleFlight(t *testing.T) {
	near, _ := disk(t)
	d, _ := disk(t)
	far := &counting{Store: d, gate: make(chan struct{})}
	data := []byte("package")
	sum := storetest.Sum(data)
	if err := d.Put(context.Background(), sum, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	c := store.NewCache(near, far)
	gone, leave := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, _, err := c.Open(gone, sum, 0); !errors.Is(err, context.Canceled) {
			t.Errorf("who has left got %v", err)
		}
	})
	leave()
	for range 50 {
		wg.Go(func() {
			if got, _, err := storetest.Read(c, sum, 0); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	close(far.gate)
	wg.Wait()
	// The first may have left before the others came, who then need one of their own.
	if n := far.opens.Load(); n < 1 || n > 2 {
		t.Errorf("%d reads of the store behind", n)
	}
}

// breaking cuts each answer after some bytes.
type breaking struct {
	http.Handler
	after int
	left  atomic.Int32 // answers to be cut
}

func (b *breaking) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet && b.left.Add(-1) >= 0 {
		w = &cut{w, b.after}
	}
	b.Handler.ServeHTTP(w, r)
}

type cut struct {
	http.ResponseWriter
	left int
}

func (c *cut) Write(p []byte) (int, error) {
	if len(p) > c.left {
		c.ResponseWriter.Write(p[:c.left])
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func TestResume(t *testing.T) {
	ctx := context.Background()
	d, _ := disk(t)
	data := bytes.Repeat([]byte("0123456789"), 100_000)
	sum := storetest.Sum(data)
	if err := d.Put(ctx, sum, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		cuts int32
		ok   bool
	}{{"three breaks", 3, true}, {"too many", 100, false}} {
		t.Run(tt.name, func(t *testing.T) {
			b := &breaking{Handler: store.Handler(d, quiet), after: 100_000}
			b.left.Store(tt.cuts)
			r, err := store.Resume(ctx, remote(t, b), sum)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			if ok := err == nil && bytes.Equal(got, data); ok != tt.ok {
				t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
			}
			if !tt.ok && (err == nil || !strings.Contains(err.Error(), "broke off after")) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestBadRequests(t *testing.T) {
	d, _ := disk(t)
	srv := httptest.NewServer(store.Handler(d, quiet))
	defer srv.Close()
	data := []byte("0123456789")
	sum := storetest.Sum(data)
	if err := d.Put(context.Background(), sum, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		method, path, rang string
		code               int
		body               string
	}{
		{"GET", "/packages/" + sum, "bytes=4-", 206, "456789"},
		{"GET", "/packages/" + sum, "bytes=10-", 416, "10 bytes"},
		{"GET", "/packages/" + sum, "bytes=999999999999999999999-", 416, "10 bytes"},
		{"GET", "/packages/" + sum, "bytes=2-4", 200, "0123456789"},
		{"GET", "/packages/" + sum, "bytes=-4", 200, "0123456789"},
		{"GET", "/packages/" + sum, "lines=1-", 200, "0123456789"},
		{"GET", "/packages/" + strings.Repeat("0", 64), "", 404, "not in the store"},
		{"GET", "/packages/..%2f..%2fetc%2fpasswd", "", 400, "SHA-256"},
		{"PUT", "/packages/nothing", "", 400, "SHA-256"},
		{"PUT", "/packages/" + strings.Repeat("0", 64), "", 422, "corrupt"},
		{"POST", "/packages/" + sum, "", 405, "Method"},
	} {
		req, _ := http.NewRequest(tt.method, srv.URL+tt.path, nil)
		if tt.rang != "" {
			req.Header.Set("Range", tt.rang)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.code || !strings.Contains(string(b), tt.body) {
			t.Errorf("%s %s %s: %d %q, want %d with %q", tt.method, tt.path, tt.rang, resp.StatusCode, b, tt.code, tt.body)
		}
	}
	for _, bad := range []string{"", "store:8090", "ftp://x", "http://", "http://%zz"} {
		if _, err := store.NewRemote(bad); err == nil {
			t.Errorf("URL %q is accepted", bad)
		}
	}
}

// TestForeignServer: what answers like no store is an error, not a package.
func TestForeignServer(t *testing.T) {
	r := remote(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush() // no length
		io.WriteString(w, "{\"sum\":\"../x\"}")
	}))
	if _, _, err := r.Open(context.Background(), storetest.Sum(nil), 0); err == nil {
		t.Error("an answer without a length is accepted")
	}
	for e, err := range r.List(context.Background()) {
		if err == nil {
			t.Errorf("entry %+v", e)
		}
	}
}

func TestInterruptedPut(t *testing.T) {
	_, dir := disk(t)
	left := filepath.Join(dir, "tmp-1")
	os.WriteFile(left, []byte("half"), 0o600)
	if _, err := store.OpenDisk(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); err == nil {
		t.Error("half an upload is still there")
	}
}
