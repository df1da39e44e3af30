package front_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/front"
)

// Large answers of known length go from socket to socket; what ends them early must end them in the same way as if they were copied.
func TestSplice(t *testing.T) {
	const size, pieces, pause, slow = 1 << 20, 8, 30 * time.Millisecond, 250 * time.Millisecond
	body := make([]byte, size)
	for i := range body {
		body[i] = byte(rand.Uint32())
	}
	for name, c := range map[string]struct {
		cfg   forward.Config
		pause time.Duration // before each part; 0 = pause
		parts int           // of the body that the function sends
		close bool          // and then closes; else it is silent
		tail  string        // what it sends behind the body
		whole bool
	}{
		"whole":                           {parts: pieces, whole: true},
		"pauses shorter than the limit":   {cfg: forward.Config{Idle: 100 * pause}, parts: pieces, whole: true},
		"bytes behind its end":            {parts: pieces, tail: "HTTP/1.1 200 OK\r\n", whole: true},
		"silence":                         {cfg: forward.Config{Idle: 5 * pause}, parts: 3},
		"the total limit":                 {cfg: forward.Config{Total: pieces / 2 * slow}, pause: slow, parts: pieces},
		"the total limit behind the idle": {cfg: forward.Config{Total: pieces / 2 * slow, Idle: 2 * slow}, pause: slow, parts: pieces},
		"the function closes":             {parts: 3, close: true},
		"the function closes early":       {parts: 0, close: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			up, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer up.Close()
			go func() {
				for {
					fn, err := up.Accept()
					if err != nil {
						return
					}
					go func() {
						defer fn.Close()
						for br := bufio.NewReader(fn); ; {
							if _, err := http.ReadRequest(br); err != nil {
								return
							}
							fmt.Fprintf(fn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
							for i := range c.parts {
								time.Sleep(max(c.pause, pause)) // the function's pace
								fn.Write(body[i*size/pieces : (i+1)*size/pieces])
							}
							io.WriteString(fn, c.tail)
							if c.close {
								return
							}
						}
					}()
				}
			}()
			c.cfg.Addr = up.Addr().String()
			f := forward.New(c.cfg)
			defer f.Close()
			st := &stand{}
			st.serve(t, front.Config{}, f)
			conn := st.dial(t)
			conn.SetDeadline(time.Now().Add(time.Minute)) // a busy machine may hold any part of this up
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			br := bufio.NewReader(conn)
			for range 2 { // the second one shows that the connection is still good
				resp, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(resp.Body)
				if !c.whole {
					if err == nil || strings.Contains(err.Error(), "timeout") {
						t.Errorf("%d bytes, %v", len(got), err)
					}
					return
				}
				if err != nil || !bytes.Equal(got, body) {
					t.Fatalf("%d bytes, not the %d that were sent: %v", len(got), size, err)
				}
				if c.tail != "" {
					return // whether it comes before the next request is sent is the function's to say
				}
				io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			}
		})
	}
}

// Large requests of known length go from socket to socket; what ends them early must end them in the same way as if they were copied.
func TestSpliceUpload(t *testing.T) {
	const size, pieces, pause = 1 << 20, 8, 30 * time.Millisecond
	body := make([]byte, size)
	for i := range body {
		body[i] = byte(rand.Uint32())
	}
	for name, c := range map[string]struct {
		cfg   front.Config
		parts int    // of the body that the client sends
		then  string // what it does then: "" = it waits for the answer, else it "closes" or "resets"
		tail  string // what it sends behind the body: a second request is answered
		early bool   // the function answers at the head, and reads nothing
		want  int    // status; 0 = no answer at all
		seen  int    // bytes of the body that the function gets; -1 = any number, and then an error
	}{
		"whole":                         {parts: pieces, want: 200, seen: size},
		"another request behind it":     {parts: pieces, tail: "GET / HTTP/1.1\r\nHost: a\r\n\r\n", want: 200, seen: size},
		"pauses shorter than the limit": {cfg: front.Config{BodyIdle: 100 * pause}, parts: pieces, want: 200, seen: size},
		"silence":                       {cfg: front.Config{BodyIdle: 5 * pause}, parts: 3, want: 400, seen: -1},
		"half of it":                    {parts: 3, then: "closes", want: 400, seen: -1},
		"a reset":                       {parts: 3, then: "resets", seen: -1},
		"an early answer":               {parts: pieces, early: true, want: 200, seen: 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			type result struct {
				body []byte
				err  error
			}
			seen := make(chan result, 2)
			fn := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == "GET" || c.early {
					io.WriteString(w, "ok")
					return
				}
				b, err := io.ReadAll(r.Body)
				seen <- result{b, err}
				io.WriteString(w, "ok")
			})}
			up, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			go fn.Serve(up)
			defer fn.Close()
			f := forward.New(forward.Config{Addr: up.Addr().String()})
			defer f.Close()
			st := &stand{}
			st.serve(t, c.cfg, f)
			conn := st.dial(t)
			conn.SetDeadline(time.Now().Add(time.Minute)) // a busy machine may hold any part of this up
			fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", size)
			for i := range c.parts {
				time.Sleep(pause) // the client's pace
				conn.Write(body[i*size/pieces : (i+1)*size/pieces])
			}
			io.WriteString(conn, c.tail)
			switch c.then {
			case "closes":
				conn.CloseWrite()
			case "resets":
				conn.SetLinger(0)
				conn.Close()
			}
			br := bufio.NewReader(conn)
			if c.want != 0 {
				for range 1 + min(1, len(c.tail)) {
					resp, err := http.ReadResponse(br, nil)
					for err == nil && resp.StatusCode == http.StatusProcessing { // a half-closed client is asked whether it is still there
						resp, err = http.ReadResponse(br, nil)
					}
					if err != nil {
						t.Fatal(err)
					}
					if io.Copy(io.Discard, resp.Body); resp.StatusCode != c.want {
						t.Errorf("status %d, want %d", resp.StatusCode, c.want)
					}
				}
			}
			if c.early {
				return
			}
			got := <-seen
			if c.seen < 0 && got.err == nil || c.seen >= 0 && (got.err != nil || !bytes.Equal(got.body, body)) {
				t.Errorf("the function got %d bytes, %v", len(got.body), got.err)
			}
		})
	}
}
