// Package bucket is a package store in a bucket of any service that speaks S3.
package bucket

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/thawrun/thaw/instance/store"
)

// Bucket is a package store: one object for each package, named PREFIX/SUM.
type Bucket struct {
	client *minio.Core
	bucket string
	prefix string
}

// Open returns the store at a URL
//
//	s3://BUCKET/PREFIX?endpoint=HOST:PORT&region=REGION&insecure=true
//
// of which only the bucket has to be there; the endpoint is s3.amazonaws.com by default, insecure means HTTP. The keys come from
// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), the shared credentials file or the machine's role. The bucket must exist.
func Open(ctx context.Context, raw string) (*Bucket, error) {
	const form = "want s3://BUCKET/PREFIX?endpoint=HOST:PORT&region=REGION&insecure=true"
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "s3" || u.Host == "" {
		return nil, fmt.Errorf("bucket %q: %s", raw, form)
	}
	q := u.Query()
	for k := range q {
		if k != "endpoint" && k != "region" && k != "insecure" {
			return nil, fmt.Errorf("bucket %q: parameter %q is not known; %s", raw, k, form)
		}
	}
	endpoint := q.Get("endpoint")
	if endpoint == "" {
		endpoint = "s3.amazonaws.com"
	}
	client, err := minio.NewCore(endpoint, &minio.Options{
		Creds:  credentials.NewChainCredentials([]credentials.Provider{&credentials.EnvAWS{}, &credentials.FileAWSCredentials{}, &credentials.IAM{}}),
		Secure: q.Get("insecure") != "true", Region: q.Get("region"), BucketLookup: minio.BucketLookupAuto,
	})
	if err != nil {
		return nil, fmt.Errorf("bucket %q: %w", raw, err)
	}
	b := &Bucket{client, u.Host, strings.Trim(u.Path, "/")}
	ok, err := client.BucketExists(ctx, b.bucket)
	if err != nil {
		return nil, fmt.Errorf("bucket %s at %s: %w", b.bucket, endpoint, err)
	}
	if !ok {
		return nil, fmt.Errorf("there is no bucket %s at %s; make it first", b.bucket, endpoint)
	}
	return b, nil
}

func (b *Bucket) key(sum string) string { return path.Join(b.prefix, sum) }

func (b *Bucket) wrap(sum string, err error) error {
	if minio.ToErrorResponse(err).StatusCode == http.StatusNotFound {
		return fmt.Errorf("%w: sha256:%s in bucket %s", store.ErrNotFound, sum, b.bucket)
	}
	return fmt.Errorf("bucket %s: %w", b.bucket, err)
}

// Open implements store.Store.
func (b *Bucket) Open(ctx context.Context, sum string, offset int64) (io.ReadCloser, int64, error) {
	if err := store.Check(sum); err != nil {
		return nil, 0, err
	}
	var opts minio.GetObjectOptions
	if offset > 0 {
		if err := opts.SetRange(offset, 0); err != nil {
			return nil, 0, b.wrap(sum, err)
		}
	}
	r, info, _, err := b.client.GetObject(ctx, b.bucket, b.key(sum), opts)
	if err != nil {
		return nil, 0, b.wrap(sum, err)
	}
	return r, offset + info.Size, nil
}

// Put implements store.Store. The bytes are hashed before they are sent, for which they have to be in a file: what is none is written to one first.
// The service checks the hash too, which is part of the request's signature.
func (b *Bucket) Put(ctx context.Context, sum string, r io.Reader) error {
	if err := store.Check(sum); err != nil {
		return err
	}
	if _, err := b.client.StatObject(ctx, b.bucket, b.key(sum), minio.StatObjectOptions{}); err == nil {
		return nil
	}
	h := sha256.New()
	f, ok := r.(*os.File)
	if !ok {
		var err error
		if f, err = os.CreateTemp("", "thaw-bucket-"); err != nil {
			return fmt.Errorf("bucket %s: %w", b.bucket, err)
		}
		defer os.Remove(f.Name())
		defer f.Close()
		r = io.TeeReader(r, f)
	}
	size, err := io.Copy(h, io.LimitReader(r, store.MaxBytes+1))
	if err != nil {
		return fmt.Errorf("bucket %s: %w", b.bucket, err)
	}
	if size > store.MaxBytes {
		return fmt.Errorf("%w: more than %d MiB", store.ErrTooLarge, store.MaxBytes>>20)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != sum {
		return fmt.Errorf("%w: the bytes for sha256:%s have the hash %s", store.ErrCorrupt, sum, got)
	}
	if _, err := f.Seek(-size, io.SeekCurrent); err != nil {
		return fmt.Errorf("bucket %s: %w", b.bucket, err)
	}
	if _, err := b.client.PutObject(ctx, b.bucket, b.key(sum), f, size, "", sum, minio.PutObjectOptions{ContentType: "application/octet-stream"}); err != nil {
		return b.wrap(sum, err)
	}
	return nil
}

// Verify implements store.Store. What is corrupt stays, for somebody to look at: a bucket is the last copy.
func (b *Bucket) Verify(ctx context.Context, sum string) error {
	r, _, err := b.Open(ctx, sum, 0)
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return b.wrap(sum, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != sum {
		return fmt.Errorf("%w: sha256:%s in bucket %s has the hash %s", store.ErrCorrupt, sum, b.bucket, got)
	}
	return nil
}

// Remove implements store.Store.
func (b *Bucket) Remove(ctx context.Context, sum string) error {
	if err := store.Check(sum); err != nil {
		return err
	}
	if err := b.client.RemoveObject(ctx, b.bucket, b.key(sum), minio.RemoveObjectOptions{}); err != nil {
		return b.wrap(sum, err)
	}
	return nil
}

// List implements store.Store.
func (b *Bucket) List(ctx context.Context) iter.Seq2[store.Entry, error] {
	return func(yield func(store.Entry, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		prefix := b.prefix
		if prefix != "" {
			prefix += "/"
		}
		for o := range b.client.Client.ListObjects(ctx, b.bucket, minio.ListObjectsOptions{Prefix: prefix}) {
			if o.Err != nil {
				yield(store.Entry{}, b.wrap("", o.Err))
				return
			}
			sum := strings.TrimPrefix(o.Key, prefix)
			if store.Check(sum) != nil {
				continue // not ours
			}
			if !yield(store.Entry{Sum: sum, Size: o.Size, Stored: o.LastModified}, nil) {
				return
			}
		}
	}
}
