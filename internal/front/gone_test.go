package front_test

import (
	"bufio"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/forward"
)

// A client that closes while its request runs, before the answer or in a pause of it, cancels the function's work; one that has only said all that
// it has to say gets its whole answer.
func TestClientLeaves(t *testing.T) {
	for name, c := range map[string]struct{ begun, leaves bool }{
		"before the answer": {false, true}, "in the answer": {true, true},
		"half-closed before the answer": {false, false}, "half-closed in the answer": {true, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inside, cancelled := make(chan struct{}), make(chan struct{})
			st := newStand(t, forward.Config{}, func(w http.ResponseWriter, r *http.Request) {
				if c.begun {
					io.WriteString(w, "part")
					w.(http.Flusher).Flush()
				}
				close(inside)
				wait := 5 * time.Second
				if !c.leaves {
					wait = 150 * time.Millisecond // some sweeps
				}
				select {
				case <-r.Context().Done():
					close(cancelled)
				case <-time.After(wait):
					io.WriteString(w, " and rest")
				}
			})
			conn := st.dial(t)
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			<-inside
			br := bufio.NewReader(conn)
			if c.begun {
				if _, err := br.Peek(1); err != nil {
					t.Fatal(err)
				}
			}
			if c.leaves {
				conn.Close()
				select {
				case <-cancelled:
				case <-time.After(10 * time.Second): // how soon is for test/conformance to say
					t.Error("the function's request is not cancelled")
				}
				return
			}
			conn.CloseWrite()
			resp, err := http.ReadResponse(br, nil)
			for err == nil && resp.StatusCode < 200 {
				resp, err = http.ReadResponse(br, nil)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := " and rest"
			if c.begun {
				want = "part and rest"
			}
			if b, err := io.ReadAll(resp.Body); string(b) != want || err != nil {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}
