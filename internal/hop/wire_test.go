package hop

import (
	"strings"
	"testing"
)

func TestFilter(t *testing.T) {
	for _, c := range []struct {
		name, in, out string
		conn          Connection
	}{
		{"nothing to remove", "A: 1\nB: 2\nA: 3", "A: 1\nB: 2\nA: 3", Connection{}},
		{"order kept", "A: 1\nTe: x\nA: 2\nKeep-Alive: 5\nB: 3\nA: 4", "A: 1\nA: 2\nB: 3\nA: 4", Connection{}},
		{"any case", "transfer-ENCODING: chunked\ncontent-length: 5\nproxy-connection: x\nHTTP2-settings: y\nx: 1", "x: 1", Connection{}},
		{"named before and after", "X-A: 1\nConnection: x-a, close\nx-a: 2\nX-B: 3", "X-B: 3", Connection{Close: true}},
		{"several lines", "Connection: X-A\nX-A: 1\nConnection: close\nX-B: 2", "X-B: 2", Connection{Close: true}},
		{"what routes cannot be named", "Host: a\nX-Forwarded-For: 1\nForwarded: f\nX-Request-Id: i\nKnative-Serving-Revision: r\nConnection: host, x-forwarded-for, forwarded, x-request-id, knative-serving-revision",
			"Host: a\nX-Forwarded-For: 1\nForwarded: f\nX-Request-Id: i\nKnative-Serving-Revision: r", Connection{}},
		{"upgrade", "Upgrade: websocket\nConnection: keep-alive, Upgrade", "", Connection{KeepAlive: true, Upgrade: "websocket"}},
		{"upgrade unasked", "Upgrade: websocket", "", Connection{}},
		{"trailers", "TE: gzip, trailers;q=1\nTe: trailers\nTrailer: A\nTrailer: B", "", Connection{Trailers: true, Announced: "A, B"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			wire := func(s string) string {
				if s == "" {
					return "GET / HTTP/1.1\r\n"
				}
				return "GET / HTTP/1.1\r\n" + strings.ReplaceAll(s, "\n", "\r\n") + "\r\n"
			}
			got, conn := Filter([]byte(wire(c.in) + "\r\n"))
			if string(got) != wire(c.out) {
				t.Errorf("left %q, want %q", got, wire(c.out))
			}
			if conn.Close != c.conn.Close || conn.KeepAlive != c.conn.KeepAlive || conn.Upgrade != c.conn.Upgrade || conn.Trailers != c.conn.Trailers || conn.Announced != c.conn.Announced {
				t.Errorf("connection %+v, want %+v", conn, c.conn)
			}
			var b strings.Builder
			for k, v := range Lines(string(got)) {
				b.WriteString(k + ": " + v + "\n")
			}
			if strings.TrimSuffix(b.String(), "\n") != c.out {
				t.Errorf("lines %q, want %q", b.String(), c.out)
			}
		})
	}
}

// No line that belongs to a connection survives, and nothing else is lost or changed.
func FuzzFilter(f *testing.F) {
	f.Add("A: 1\r\nConnection: a, close\r\nTe: trailers\r\n")
	f.Add("Connection: \r\n: x\r\n\r\n")
	f.Add("a")
	f.Fuzz(func(t *testing.T, lines string) {
		head := "GET / HTTP/1.1\r\n" + lines
		got, _ := Filter([]byte(head))
		if len(got) > len(head) {
			t.Fatal("grew")
		}
		for k := range Lines(string(got)) {
			if ConnectionOnly([]byte(k)) {
				t.Errorf("%q survived", k)
			}
		}
		again, conn := Filter([]byte(string(got)))
		if string(again) != string(got) || conn.Close || conn.Upgrade != "" {
			t.Errorf("not stable: %q, %q", got, again)
		}
	})
}
