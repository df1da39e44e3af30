package harness

import (
	"net"
	"testing"
	"time"
)

// Relay listens on an address and passes connections on to another one, each byte delay later than it came, in both directions: a network
// with twice that as its round trip. It ends with the test.
func Relay(t *testing.T, listen, to string, delay time.Duration) {
	t.Helper()
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() { // ends with the listener; what it has begun ends with one of the two sides
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				out, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer out.Close()
				done := make(chan struct{})
				go func() { defer close(done); delayed(out, in, delay) }()
				delayed(in, out, delay)
				<-done
			}()
		}
	}()
}

// delayed copies until the end of what it reads, which it passes on too.
func delayed(to, from net.Conn, delay time.Duration) {
	type piece struct {
		data []byte
		due  time.Time
	}
	way := make(chan piece, 1024)
	go func() {
		defer close(way)
		for {
			b := make([]byte, 32<<10)
			n, err := from.Read(b)
			if n > 0 {
				way <- piece{b[:n], time.Now().Add(delay)}
			}
			if err != nil {
				return
			}
		}
	}()
	broken := false
	for p := range way {
		time.Sleep(time.Until(p.due))
		if !broken {
			_, err := to.Write(p.data)
			broken = err != nil
		}
	}
	_ = to.(*net.TCPConn).CloseWrite()
}
