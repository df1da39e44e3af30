package standalone

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// serve runs a hop until the test ends and returns its address.
func serve(t *testing.T, cfg Config) string {
	t.Helper()
	cfg.Listen = "127.0.0.1:0"
	ctx, cancel := context.WithCancel(context.Background())
	addr, done := make(chan string, 1), make(chan error, 1)
	go func() { done <- Run(ctx, cfg, func(a, _ string) { addr <- a }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case a := <-addr:
		return a
	case err := <-done:
		done <- nil
		t.Fatal(err)
		return ""
	}
}

func function(t *testing.T, name string, work time.Duration) (addr string, most *atomic.Int32) {
	most = new(atomic.Int32)
	var inside atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := inside.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		time.Sleep(work) // the function's work
		inside.Add(-1)
		io.WriteString(w, name)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), most
}

func get(t *testing.T, addr, host string) (int, string) {
	t.Helper()
	req, _ := http.NewRequest("GET", "http://"+addr+"/", nil)
	req.Host = host
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

func TestRouter(t *testing.T) {
	a, _ := function(t, "a", 0)
	b, _ := function(t, "b", 0)
	addr := serve(t, Config{Static: []string{"A.example=" + a, "*=" + b}})
	for host, want := range map[string]string{"a.example": "a", "a.example:80": "a", "other": "b", "127.0.0.1": "b"} {
		if code, got := get(t, addr, host); code != 200 || got != want {
			t.Errorf("%s: %d %q", host, code, got)
		}
	}
	only := serve(t, Config{Static: []string{"a.example=" + a}})
	if code, _ := get(t, only, "other"); code != 404 {
		t.Errorf("a host that is not named: %d", code)
	}
}

// Router, activator and function in a row: the limit holds, and all are served.
func TestActivatorBehindRouter(t *testing.T) {
	fn, most := function(t, "f", 2*time.Millisecond)
	act := serve(t, Config{Activator: true, Concurrency: 3, Static: []string{"*=" + fn}})
	addr := serve(t, Config{Static: []string{"*=" + act}})
	var wg sync.WaitGroup
	for range 60 {
		wg.Go(func() {
			if code, got := get(t, addr, "x"); code != 200 || got != "f" {
				t.Errorf("%d %q", code, got)
			}
		})
	}
	wg.Wait()
	if n := most.Load(); n > 3 || n < 2 {
		t.Errorf("%d requests at once in the function, limit 3", n)
	}
}

func TestBadStatic(t *testing.T) {
	for _, c := range []struct {
		static []string
		says   string
	}{{nil, "no address"}, {[]string{"a"}, "want HOST=ADDR:PORT"}, {[]string{"=x:1"}, "want HOST"}, {[]string{"a=nope"}, "want HOST"}, {[]string{"a=x:1", "A=y:1"}, "named twice"}} {
		err := Run(t.Context(), Config{Listen: "127.0.0.1:0", Static: c.static}, func(string, string) {})
		if err == nil || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%v: %v", c.static, err)
		}
	}
}
