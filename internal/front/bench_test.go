package front_test

import (
	"bufio"
	"net"
	"strings"
	"testing"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
)

// fixed answers every request on every connection with the same bytes and parses only as much as it must: what is measured is the hop.
func fixed(b testing.TB, answer string) net.Listener {
	b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				br, out := bufio.NewReader(c), []byte(answer)
				for {
					for {
						line, err := br.ReadSlice('\n')
						if err != nil {
							return
						}
						if len(line) <= 2 {
							break
						}
					}
					if _, err := c.Write(out); err != nil {
						return
					}
				}
			}()
		}
	}()
	b.Cleanup(func() { ln.Close() })
	return ln
}

const browserHead = "GET /path?q=1 HTTP/1.1\r\nHost: fn.example\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\nAccept: text/html,application/xhtml+xml\r\n" +
	"Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nCookie: a=b; c=d\r\nCache-Control: max-age=0\r\n\r\n"

// BenchmarkHop is one request through front and forward over loopback: client, hop and upstream share the process, so the
// time is that of all three; the allocations are nearly all the hop's.
func BenchmarkHop(b *testing.B) {
	for _, c := range []struct{ name, send, answer string }{
		{"small", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 13\r\nContent-Type: text/plain\r\n\r\nHello, world!"},
		{"browser", browserHead, "HTTP/1.1 200 OK\r\nContent-Length: 13\r\nContent-Type: text/html\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\n\r\nHello, world!"},
		{"64KiB", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 65536\r\n\r\n" + strings.Repeat("x", 65536)},
		{"chunked", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nd\r\nHello, world!\r\n0\r\n\r\n"},
	} {
		b.Run(c.name, func(b *testing.B) {
			up := fixed(b, c.answer)
			f := forward.New(forward.Config{Addr: up.Addr().String()})
			defer f.Close()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			s := front.New(front.Config{}, f)
			go s.Serve(ln)
			defer ln.Close()
			conn, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			br := bufio.NewReaderSize(conn, 32<<10)
			b.ReportAllocs()
			send := []byte(c.send)
			for b.Loop() {
				if _, err := conn.Write(send); err != nil {
					b.Fatal(err)
				}
				if err := skipAnswer(br); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// skipAnswer reads one answer without allocating.
func skipAnswer(br *bufio.Reader) error {
	length, chunked := 0, false
	for {
		line, err := br.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) <= 2 {
			break
		}
		if n := len("Content-Length: "); len(line) > n && string(line[:n]) == "Content-Length: " {
			for _, d := range line[n : len(line)-2] {
				length = length*10 + int(d-'0')
			}
		}
		if string(line) == "Transfer-Encoding: chunked\r\n" {
			chunked = true
		}
	}
	if chunked {
		for {
			line, err := br.ReadSlice('\n')
			if err != nil {
				return err
			}
			if string(line) == "0\r\n" {
				_, err := br.Discard(2)
				return err
			}
		}
	}
	_, err := br.Discard(length)
	return err
}
