package front

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

// Every connection has a seat of its own as long as it is there, and a peak's are forgotten.
func TestSeats(t *testing.T) {
	var s seats
	conns := make([]clientConn, 5*seatsPerBlock/2)
	for range 2 {
		for i := range conns {
			s.take(&conns[i])
		}
		for i := 0; i < len(conns); i += 2 {
			s.leave(&conns[i])
			s.leave(&conns[i]) // nothing
		}
		there := make(map[*clientConn]bool)
		for seat := range s.all {
			if seat.c.seat != seat {
				t.Fatal("a seat that its connection does not know")
			}
			there[seat.c] = true
		}
		for i := range conns {
			if there[&conns[i]] != (i%2 == 1) {
				t.Fatal("wrong connection", i)
			}
		}
		if len(there) != s.taken || len(s.blocks) != 3 {
			t.Errorf("%d of %d taken seats, %d blocks", len(there), s.taken, len(s.blocks))
		}
		for i := 1; i < len(conns); i += 2 {
			s.leave(&conns[i])
		}
		if s.taken != 0 || s.blocks != nil {
			t.Errorf("%d seats are taken, %d blocks left", s.taken, len(s.blocks))
		}
	}
}

// While a request runs there are sweeps, while none does there are none, and the next one begins them again.
func TestSweepsOnlyWhileBusy(t *testing.T) {
	block := make(chan struct{})
	s := New(Config{}, hop.HandlerFunc(func(x *hop.Exchange) error {
		<-block
		x.Resp.SetBodyString("ok")
		return nil
	}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	defer func() {
		s.Shutdown(t.Context())
		<-done
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	become := func(want bool) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); s.sweeping.Load() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("sweeping is not %v", want)
			}
		}
	}
	br := bufio.NewReader(c)
	for range 3 {
		become(false)
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		become(true)
		time.Sleep(3 * sweepEvery)
		if !s.sweeping.Load() {
			t.Error("no sweeps while a request runs")
		}
		block <- struct{}{}
		resp, err := http.ReadResponse(br, nil)
		for err == nil && resp.StatusCode < 200 {
			resp, err = http.ReadResponse(br, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
	}
	become(false)
}
