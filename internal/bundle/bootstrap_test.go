package bundle

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const pythonFunction = `
import time

def handle(request):
    if request.path == "/text":
        return "hello " + request.query
    if request.path == "/bytes":
        return b"\x00\x01"
    if request.path == "/json":
        return {"got": request.json(), "agent": request.headers["USER-agent"]}
    if request.path == "/full":
        return 201, "made", {"X-Made": "yes", "Content-Type": "text/css"}
    if request.path == "/nothing":
        return None
    if request.path == "/echo":
        return request.body
    if request.path == "/stream":
        return (c for c in ["a", "b", b"c"])
    if request.path == "/breaks":
        def parts():
            yield "a"
            raise ValueError("broken")
        return parts()
    if request.path == "/slow":
        time.sleep(0.5)
        return "slow"
    if request.path == "/split":
        return 200, "x", {"X-Bad": "a\r\nSet-Cookie: b"}
    if request.path == "/odd":
        return object()
    raise ValueError("no such path")
`

const wsgiFunction = `
def app(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("202 Accepted", [("Content-Type", "text/x"), ("X-Path", environ["PATH_INFO"]), ("X-Host", environ["HTTP_HOST"])])
    return [environ["REQUEST_METHOD"].encode(), b" ", body]
`

const nodeFunction = `
exports.handle = async (request) => {
  switch (request.path) {
    case '/text': return 'hello ' + request.query;
    case '/bytes': return Buffer.from([0, 1]);
    case '/json': return { got: await request.json(), agent: request.headers['user-agent'] };
    case '/full': return { status: 201, body: 'made', headers: { 'X-Made': 'yes', 'Content-Type': 'text/css' } };
    case '/nothing': return;
    case '/echo': return request.body();
    case '/stream': return (async function* () { yield 'a'; yield 'b'; yield 'c'; })();
    case '/breaks': return (async function* () { yield 'a'; throw new Error('broken'); })();
    case '/slow': await new Promise((go) => setTimeout(go, 500)); return 'slow';
    case '/split': return { status: 200, body: 'x', headers: { 'X-Bad': 'a\r\nSet-Cookie: b' } };
    case '/odd': return 1n;
  }
  throw new Error('no such path');
};
`

const nodeServer = `module.exports = (req, res) => { res.setHeader('X-Path', req.url); req.pipe(res); };`

// unpack writes a package to a folder.
func unpack(t *testing.T, b []byte) string {
	t.Helper()
	dir := t.TempDir()
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, h.Name), body, os.FileMode(h.Mode)); err != nil {
			t.Fatal(err)
		}
	}
}

// running is a bootstrap with a function.
type running struct {
	url string
	cmd *exec.Cmd
	log *bytes.Buffer
}

// serve deploys a function as thaw deploy does and starts it, on a socket that is handed over or on PORT.
func serve(t *testing.T, interpreter, name, text string, socket bool) *running {
	t.Helper()
	if _, err := exec.LookPath(interpreter); err != nil {
		t.Skip(interpreter + " is not installed")
	}
	src := t.TempDir()
	write(t, src, name, text, 0o644)
	packed, info := create(t, src)
	if info.Files != 3 || info.Built {
		t.Fatalf("%+v", info)
	}
	dir := unpack(t, packed)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &running{url: "http://" + ln.Addr().String(), log: &bytes.Buffer{}}
	program := filepath.Join(dir, Entry)
	if socket {
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		// The shell's pid is the program's: exec keeps it.
		r.cmd = exec.Command("/bin/sh", "-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$0"`, program)
		ready, says, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer says.Close()
		t.Cleanup(func() {
			if b, err := io.ReadAll(ready); err != nil || len(b) != 1 {
				t.Errorf("said %q to be ready, %v", b, err)
			}
			ready.Close()
		})
		r.cmd.ExtraFiles = []*os.File{f, says}
		r.cmd.Env = append(os.Environ(), "PORT=1", "K_REVISION=r")
	} else {
		r.cmd = exec.Command(program)
		r.cmd.Env = append(os.Environ(), "PORT="+strings.TrimPrefix(ln.Addr().String(), "127.0.0.1:"))
	}
	ln.Close()
	r.cmd.Env = append(r.cmd.Env, "FUNCTION_MAX_BODY=100000")
	r.cmd.Stdout, r.cmd.Stderr = r.log, r.log
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.cmd.Process.Kill(); r.cmd.Wait() })
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err == nil {
			c.Close()
			return r
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func (r *running) do(t *testing.T, method, path, body string) (*http.Response, string, error) {
	t.Helper()
	var in io.Reader = strings.NewReader(body)
	if strings.HasPrefix(body, "chunked ") {
		in = io.MultiReader(strings.NewReader(body[:8]), strings.NewReader(body[8:])) // of unknown length
	}
	req, err := http.NewRequest(method, r.url+path, in)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("User-Agent", "test")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

func TestBootstraps(t *testing.T) {
	for _, lang := range []struct{ interpreter, file, text string }{
		{"python3", "function.py", pythonFunction}, {"node", "function.js", nodeFunction},
	} {
		for _, socket := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, socket %v", lang.interpreter, socket), func(t *testing.T) {
				r := serve(t, lang.interpreter, lang.file, lang.text, socket)
				big := strings.Repeat("x", 90_000)
				for _, tt := range []struct {
					method, path, body string
					code               int
					want, kind         string
				}{
					{"GET", "/text?a=b%20c", "", 200, "hello a=b%20c", "text/plain; charset=utf-8"},
					{"GET", "/bytes", "", 200, "\x00\x01", "application/octet-stream"},
					{"POST", "/full", "ignored", 201, "made", "text/css"},
					{"GET", "/nothing", "", 204, "", ""},
					{"POST", "/echo", big, 200, big, "application/octet-stream"},
					{"POST", "/echo", "chunked " + big, 200, "chunked " + big, "application/octet-stream"},
					{"POST", "/echo", big + big, 413, "the body is larger than 100000 bytes\n", "text/plain; charset=utf-8"},
					{"GET", "/stream", "", 200, "abc", "application/octet-stream"},
					{"HEAD", "/text", "", 200, "", "text/plain; charset=utf-8"},
					{"POST", "/json", "nothing", 400, "the body is no JSON", "text/plain; charset=utf-8"},
					{"GET", "/other", "", 500, "the function failed", "text/plain; charset=utf-8"},
					{"GET", "/odd", "", 500, "the function failed", "text/plain; charset=utf-8"},
				} {
					resp, body, err := r.do(t, tt.method, tt.path, tt.body)
					if err != nil {
						t.Errorf("%s %s: %v", tt.method, tt.path, err)
						continue
					}
					if resp.StatusCode != tt.code || !strings.HasPrefix(body, tt.want) || resp.Header.Get("Content-Type") != tt.kind {
						t.Errorf("%s %s: %d %.100q %s, want %d %.100q %s", tt.method, tt.path, resp.StatusCode, body, resp.Header.Get("Content-Type"), tt.code, tt.want, tt.kind)
					}
				}
				if _, body, err := r.do(t, "POST", "/json", `{"a": [1]}`); err != nil || strings.ReplaceAll(body, " ", "") != `{"got":{"a":[1]},"agent":"test"}` {
					t.Errorf("%q, %v", body, err)
				}
				if _, body, err := r.do(t, "GET", "/breaks", ""); err == nil {
					t.Errorf("half an answer passes as whole: %q", body)
				}
				if resp, _, err := r.do(t, "GET", "/split", ""); err == nil && resp.Header.Get("Set-Cookie") != "" {
					t.Error("a header was split")
				}
				if resp, _, err := r.do(t, "POST", "/full", ""); err != nil || resp.Header.Get("X-Made") != "yes" {
					t.Error(err)
				}
				r.end(t)
				for _, want := range []string{"no such path", "broken"} {
					if !strings.Contains(r.log.String(), want) {
						t.Errorf("the log does not say %q:\n%s", want, r.log)
					}
				}
			})
		}
	}
}

// end asks a function to end while it answers, and expects the answer and a clean exit.
func (r *running) end(t *testing.T) {
	t.Helper()
	var wg sync.WaitGroup
	idle, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	begun := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			c, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			fmt.Fprintf(c, "GET /slow HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx")
			br := bufio.NewReader(c)
			// The interim answer says that the request has been read.
			if line, err := br.ReadString('\n'); err != nil || !strings.Contains(line, "100") {
				t.Errorf("%q, %v", line, err)
			}
			br.ReadString('\n')
			begun <- struct{}{}
			if resp, err := http.ReadResponse(br, nil); err != nil {
				t.Errorf("an answer under way is lost: %v", err)
			} else if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "slow" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
	for range 4 {
		<-begun
	}
	r.cmd.Process.Signal(syscall.SIGTERM)
	wg.Wait()
	if err := r.cmd.Wait(); err != nil {
		t.Errorf("end: %v\n%s", err, r.log)
	}
}

func TestOtherStyles(t *testing.T) {
	r := serve(t, "python3", "function.py", wsgiFunction, true)
	if resp, body, err := r.do(t, "PUT", "/a%20b", "chunked body"); err != nil || resp.StatusCode != 202 || body != "PUT chunked body" || resp.Header.Get("X-Path") != "/a b" || resp.Header.Get("X-Host") == "" {
		t.Errorf("WSGI: %v %q %v", resp, body, err)
	}
	r = serve(t, "node", "function.js", nodeServer, true)
	if resp, body, err := r.do(t, "PUT", "/a", "text"); err != nil || body != "text" || resp.Header.Get("X-Path") != "/a" {
		t.Errorf("node:http: %v %q %v", resp, body, err)
	}
}

// TestBadFunctions: what cannot be served ends with a line that says why.
func TestBadFunctions(t *testing.T) {
	for _, tt := range []struct{ interpreter, file, text, says string }{
		{"python3", "function.py", "x = 1", "neither handle(request) nor a WSGI application"},
		{"python3", "function.py", "def handle(", "SyntaxError"},
		{"python3", "function.py", "import nothing_of_that_name", "nothing_of_that_name"},
		{"node", "function.js", "exports.x = 1", "neither a function nor handle(request)"},
		{"node", "function.js", "exports.handle = (", "SyntaxError"},
	} {
		if _, err := exec.LookPath(tt.interpreter); err != nil {
			t.Skip(tt.interpreter + " is not installed")
		}
		src := t.TempDir()
		write(t, src, tt.file, tt.text, 0o644)
		packed, _ := create(t, src)
		cmd := exec.Command(filepath.Join(unpack(t, packed), Entry))
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), tt.says) {
			t.Errorf("%q: %v, %s", tt.text, err, out)
		}
	}
	src := t.TempDir()
	write(t, src, "function.py", "", 0o644)
	write(t, src, "thaw.json", "{}", 0o644)
	if _, err := Create(context.Background(), src, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "thaw.json") {
		t.Errorf("a file in the way: %v", err)
	}
}
