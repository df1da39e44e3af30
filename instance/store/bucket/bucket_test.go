package bucket

import (
	"context"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/thawrun/thaw/instance/store/storetest"
)

// TestBucket runs against an S3 server in memory that others have written.
func TestBucket(t *testing.T) {
	backend := s3mem.New()
	srv := httptest.NewServer(gofakes3.New(backend).Server())
	defer srv.Close()
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	endpoint := strings.TrimPrefix(srv.URL, "http://")
	if err := backend.CreateBucket("code"); err != nil {
		t.Fatal(err)
	}
	for _, prefix := range []string{"", "/zone/a"} {
		t.Run("prefix "+prefix, func(t *testing.T) {
			b, err := Open(context.Background(), "s3://code"+prefix+"?insecure=true&region=x&endpoint="+endpoint)
			if err != nil {
				t.Fatal(err)
			}
			storetest.Run(t, b)
		})
	}
	for raw, says := range map[string]string{
		"s3://none?insecure=true&region=x&endpoint=" + endpoint: "make it first",
		"http://code":         "want s3://",
		"s3://":               "want s3://",
		"s3://code?regio=x":   "regio",
		"s3://code?endpoint=": "",
	} {
		ctx, cancel := context.WithCancel(context.Background())
		if says == "" {
			cancel() // the real endpoint: not to be asked
		}
		if _, err := Open(ctx, raw); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", raw, err)
		}
		cancel()
	}
}
