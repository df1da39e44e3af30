package front_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
)

// A head whose lines end in LF alone is refused at once: no parser will find its end.
func TestBareLF(t *testing.T) {
	st := &stand{}
	st.serve(t, front.Config{HeaderTimeout: time.Minute}, hop.HandlerFunc(func(*hop.Exchange) error { return errors.New("served") }))
	for _, head := range []string{"GET / HTTP/1.1\nHost: a\n\n", "GET / HTTP/1.1\r\nHost: a\nX: y", "GET / HTTP/1.1\n"} {
		conn := st.dial(t)
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		for i := range len(head) { // however it comes
			io.WriteString(conn, head[i:i+1])
		}
		if b, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 400 ") {
			t.Errorf("%q: %q, %v", head, b, err)
		}
	}
}

// The body of an HTTP/2 request may take its time, but not between two bytes.
func TestBodyIdleH2(t *testing.T) {
	for _, size := range []int64{-1, 20, 20_000} {
		for _, stalls := range []bool{true, false} {
			t.Run(fmt.Sprintf("%d,stalls=%v", size, stalls), func(t *testing.T) {
				t.Parallel()
				// A client that is in time takes longer than the limit in all, with pauses of a third of it: a busy machine may hold it up for
				// more than a second.
				idle, pace := 2*time.Second, 600*time.Millisecond
				if stalls {
					idle, pace = 200*time.Millisecond, 0
				}
				ended := make(chan error, 1)
				st := &stand{}
				st.serve(t, front.Config{BodyIdle: idle}, hop.HandlerFunc(func(x *hop.Exchange) error {
					if b := x.Req.BodyStream(); b != nil {
						_, err := io.Copy(io.Discard, b)
						ended <- err
					}
					x.Resp.SetStatusCode(fasthttp.StatusNoContent)
					return nil
				}))
				r, w := io.Pipe()
				req, _ := http.NewRequest("POST", "http://"+st.addr, r)
				req.ContentLength = size
				go func() {
					n := 20
					if size > 0 {
						n = int(size)
					}
					for range 4 {
						w.Write(make([]byte, n/4))
						time.Sleep(pace)
					}
					if !stalls {
						w.Close()
					}
				}()
				tr := &http.Transport{Protocols: h2only()}
				defer tr.CloseIdleConnections()
				resp, err := tr.RoundTrip(req)
				if err == nil {
					resp.Body.Close()
				}
				w.Close()
				if size > 0 && size <= hop.SmallBody {
					if err != nil || (resp.StatusCode == 204) == stalls {
						t.Errorf("%v, %v", resp, err)
					}
				} else if got := <-ended; (got == nil) == stalls {
					t.Errorf("body ended with %v", got)
				}
			})
		}
	}
}
