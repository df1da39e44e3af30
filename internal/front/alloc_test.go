//go:build !race

package front_test

import (
	"bufio"
	"testing"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
)

// What a plain request costs in memory is a promise: its id, and one more that the tools may take.
func TestAllocations(t *testing.T) {
	up := fixed(t, "HTTP/1.1 200 OK\r\nContent-Length: 13\r\nContent-Type: text/plain\r\n\r\nHello, world!")
	f := forward.New(forward.Config{Addr: up.Addr().String()})
	defer f.Close()
	st := &stand{}
	st.serve(t, front.Config{}, f)
	conn := st.dial(t)
	br, send := bufio.NewReader(conn), []byte(browserHead)
	n := testing.AllocsPerRun(500, func() {
		if _, err := conn.Write(send); err != nil {
			t.Fatal(err)
		}
		if err := skipAnswer(br); err != nil {
			t.Fatal(err)
		}
	})
	if n > 2 {
		t.Errorf("%v allocations a request", n)
	}
}
