// Package examples holds the test of the examples: each one is built and run for real, as the platform would.
package examples

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/code"
)

// all are the examples; the test below compares the list with the folders.
var all = []string{"checker", "cpu-burner", "crasher", "hello-go", "hello-node", "hello-python", "slow-start", "websocket-echo"}

var built struct {
	once sync.Once
	dir  string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// program builds the Go examples once and returns one of them.
func program(t *testing.T, name string) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "thaw-examples-"); built.err != nil {
			return
		}
		out, err := exec.Command("go", "build", "-buildvcs=false", "-o", built.dir, "./...").CombinedOutput()
		if err != nil {
			built.err = fmt.Errorf("go build: %w: %s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, name)
}

// function is a running example.
type function struct {
	cmd    *exec.Cmd
	base   string
	output *lockedBuffer
	done   chan struct{} // closed when it has ended
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// freePort finds a port; another process may take it before it is used, which no test here survives and none has met.
func freePort(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}

// start runs a program as the platform does and waits until it listens.
func start(t *testing.T, path string, env ...string) *function {
	t.Helper()
	f := launch(t, path, env...)
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := net.Dial("tcp", strings.TrimPrefix(f.base, "http://"))
		if err == nil {
			conn.Close()
			return f
		}
		select {
		case <-f.done:
			t.Fatalf("%s ended before it listened: %s", path, f.output)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen: %s", path, f.output)
		}
	}
}

// launch is start without waiting.
func launch(t *testing.T, path string, env ...string) *function {
	t.Helper()
	port := freePort(t)
	f := &function{cmd: exec.Command(path), base: fmt.Sprintf("http://127.0.0.1:%d", port), output: &lockedBuffer{}, done: make(chan struct{})}
	f.cmd.Env = append(os.Environ(), fmt.Sprintf("PORT=%d", port), "K_REVISION=example-00001")
	f.cmd.Env = append(f.cmd.Env, env...)
	f.run(t)
	return f
}

func (f *function) run(t *testing.T) {
	t.Helper()
	f.cmd.Stdout, f.cmd.Stderr = f.output, f.output
	f.cmd.WaitDelay = time.Second
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { defer close(f.done); _ = f.cmd.Wait() }()
	t.Cleanup(func() {
		_ = f.cmd.Process.Kill()
		<-f.done
	})
}

// code waits for the end and returns the exit code.
func (f *function) code(t *testing.T) int {
	t.Helper()
	select {
	case <-f.done:
		return f.cmd.ProcessState.ExitCode()
	case <-time.After(15 * time.Second):
		t.Fatalf("it does not end: %s", f.output)
		return -1
	}
}

func (f *function) get(t *testing.T, path string) (int, string) {
	t.Helper()
	resp, err := http.Get(f.base + path)
	if err != nil {
		t.Fatalf("%v: %s", err, f.output)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// term asks the function to end and expects that it does so in peace.
func (f *function) term(t *testing.T) {
	t.Helper()
	if err := f.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := f.code(t); code != 0 {
		t.Errorf("exit code %d after SIGTERM: %s", code, f.output)
	}
}

func TestHello(t *testing.T) {
	for name, interpreter := range map[string]string{"hello-go": "", "hello-python": "python3", "hello-node": "node"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := name + "/run"
			if interpreter == "" {
				path = program(t, name)
			} else if _, err := exec.LookPath(interpreter); err != nil {
				t.Skipf("%s is not installed here", interpreter)
			}
			f := start(t, path, "TARGET=Test")
			for range 3 { // on one connection
				if code, body := f.get(t, "/"); code != 200 || !strings.HasPrefix(body, "Hello Test from ") || !strings.Contains(body, "example-00001") {
					t.Errorf("%d %q", code, body)
				}
			}
			resp, err := http.Post(f.base, "text/plain", strings.NewReader("a body that it does not care for"))
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("POST: %v %v", resp, err)
			} else {
				resp.Body.Close()
			}
			f.term(t) // with an idle connection open
		})
	}
}

// TestTermLetsRequestsFinish asks a function to end in the middle of an answer.
func TestTermLetsRequestsFinish(t *testing.T) {
	f := start(t, program(t, "checker"))
	resp, err := http.Get(f.base + "/?stream=5&every=60")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Scan()
	if err := f.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	n := 1
	for lines.Scan() {
		n++
	}
	if n != 5 || lines.Err() != nil {
		t.Errorf("got %d of 5 pieces, %v", n, lines.Err())
	}
	if code := f.code(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestListenerOnDescriptor3 hands a listening socket over, as the annotation instance.thaw.run/socket: fd3 asks for.
func TestListenerOnDescriptor3(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	file, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	// A shell knows the pid that the program is going to have, which the protocol wants in LISTEN_PID.
	f := &function{base: "http://" + ln.Addr().String(), output: &lockedBuffer{}, done: make(chan struct{})}
	f.cmd = exec.Command("sh", "-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$0"`, program(t, "checker"))
	f.cmd.Env = append(os.Environ(), "PORT=1") // no one may listen there: it would fail if it tried
	f.cmd.ExtraFiles = []*os.File{file}
	f.run(t)
	if code, body := f.get(t, "/"); code != 200 || !strings.Contains(body, "inFlight") {
		t.Errorf("%d %q", code, body)
	}
	f.term(t)
}

func TestSlowStart(t *testing.T) {
	began := time.Now()
	f := start(t, program(t, "slow-start"), "START_MS=300")
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("it listens after %s", took)
	}
	if code, body := f.get(t, "/"); code != 200 || !strings.HasPrefix(body, "ready after ") {
		t.Errorf("%d %q", code, body)
	}
	f.term(t)
}

func TestCrasher(t *testing.T) {
	f := launch(t, program(t, "crasher"))
	if code := f.code(t); code != 3 || !strings.Contains(f.output.String(), "cannot open the database") {
		t.Errorf("exit code %d, %q", code, f.output)
	}
	f = start(t, program(t, "crasher"), "CRASH=request")
	resp, err := http.Get(f.base)
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	if err == nil {
		t.Error("an answer that broke off looks complete")
	}
	if code := f.code(t); code != 4 {
		t.Errorf("exit code %d", code)
	}
	f = start(t, program(t, "crasher"), "CRASH=never")
	if code, _ := f.get(t, "/"); code != 200 {
		t.Errorf("status %d", code)
	}
	f.term(t)
}

func TestCPUBurner(t *testing.T) {
	f := start(t, program(t, "cpu-burner"))
	code, body := f.get(t, "/?ms=200")
	var primes int
	var took string
	if _, err := fmt.Sscanf(body, "%d primes in %s", &primes, &took); err != nil || code != 200 || primes < 100 {
		t.Errorf("%d %q: %v", code, body, err)
	}
	if code, _ := f.get(t, "/?ms=-1"); code != 400 {
		t.Errorf("ms=-1 gives %d", code)
	}
	f.term(t)
	// How much of a processor it got is the machine's affair; that it used what it got is checked.
	if used := f.cmd.ProcessState.UserTime(); used < 10*time.Millisecond {
		t.Errorf("it burned only %s", used)
	}
}

func TestWebSocketEcho(t *testing.T) {
	f := start(t, program(t, "websocket-echo"))
	if code, body := f.get(t, "/"); code != 200 || !strings.Contains(body, "<script>") {
		t.Errorf("page: %d %q", code, body)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(f.base, "http"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	ws.SetReadLimit(2 << 20)
	for _, size := range []int{0, 1, 125, 126, 65535, 65536, 1 << 20} {
		sent := strings.Repeat("ö", size/2) + strings.Repeat("x", size%2)
		if err := ws.Write(ctx, websocket.MessageText, []byte(sent)); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		typ, got, err := ws.Read(ctx)
		if err != nil || typ != websocket.MessageText || string(got) != sent {
			t.Fatalf("%d bytes: %v %d bytes back, %v", size, typ, len(got), err)
		}
	}
	// In pieces, with a ping in between: Ping needs somebody who reads.
	w, err := ws.Writer(ctx, websocket.MessageBinary)
	if err != nil {
		t.Fatal(err)
	}
	for _, piece := range []string{"one ", "two ", "three"} {
		if _, err := io.WriteString(w, piece); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if typ, got, err := ws.Read(ctx); err != nil || typ != websocket.MessageBinary || string(got) != "one two three" {
		t.Errorf("in pieces: %v %q %v", typ, got, err)
	}
	closed := ws.CloseRead(ctx)
	if err := ws.Ping(ctx); err != nil {
		t.Errorf("ping: %v", err)
	}
	if err := ws.Close(websocket.StatusNormalClosure, "bye"); err != nil {
		t.Errorf("close: %v", err)
	}
	<-closed.Done()
}

// TestWebSocketEchoRefuses sends what RFC 6455 forbids and expects the close code for it.
func TestWebSocketEchoRefuses(t *testing.T) {
	f := start(t, program(t, "websocket-echo"))
	handshake := "GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
	for name, c := range map[string]struct {
		frame []byte
		code  int
	}{
		"not masked":          {[]byte{0x81, 1, 'x'}, 1002},
		"reserved bit":        {[]byte{0xc1, 0x80, 0, 0, 0, 0}, 1002},
		"unknown type":        {[]byte{0x83, 0x80, 0, 0, 0, 0}, 1002},
		"lone continuation":   {[]byte{0x80, 0x80, 0, 0, 0, 0}, 1002},
		"fragmented ping":     {[]byte{0x09, 0x80, 0, 0, 0, 0}, 1002},
		"text inside of text": {[]byte{0x01, 0x80, 0, 0, 0, 0, 0x81, 0x80, 0, 0, 0, 0}, 1002},
		"not UTF-8":           {[]byte{0x81, 0x81, 0, 0, 0, 0, 0xff}, 1007},
		"too long":            {[]byte{0x82, 0xff, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0}, 1009},
		"longer than int64":   {[]byte{0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, 1009},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", strings.TrimPrefix(f.base, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write(append([]byte(handshake), c.frame...)); err != nil {
				t.Fatal(err)
			}
			r := bufio.NewReader(conn)
			resp, err := http.ReadResponse(r, nil)
			if err != nil || resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Accept") != "ICX+Yqv66kxgM0FcWaLWlFLwTAI=" {
				t.Fatalf("handshake: %v %v", resp, err)
			}
			head := make([]byte, 4)
			if _, err := io.ReadFull(r, head); err != nil || head[0] != 0x88 || int(head[2])<<8|int(head[3]) != c.code {
				t.Errorf("got % x (%v), want close code %d", head, err, c.code)
			}
		})
	}
	req, _ := http.NewRequest("GET", f.base, nil)
	for k, v := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "8", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="} {
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != 400 {
		t.Errorf("an old version: %v %v", resp, err)
	}
}

func TestChecker(t *testing.T) {
	logs := t.TempDir()
	f := start(t, program(t, "checker"), "CHECKER_LOG="+logs, "THAW_INSTANCE=instance-1")
	send := func(id, query string) (*http.Response, string, error) {
		req, err := http.NewRequest("GET", f.base+query, strings.NewReader("the body"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Request-Id", id)
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			return nil, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp, string(body), err
	}

	// Five at once: they leave when all are seen inside.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	for i := range 5 {
		req, err := http.NewRequestWithContext(ctx, "GET", f.base+"/?hang=1", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Request-Id", fmt.Sprint("id-", i))
		wg.Go(func() {
			if _, err := http.DefaultTransport.RoundTrip(req); err == nil {
				t.Error("hang=1 gives an answer")
			}
		})
	}
	inside := func(n int) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
			_, report := f.get(t, "/report")
			if strings.Contains(report, fmt.Sprintf(`"inFlight":%d,`, n)) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("never %d requests inside: %s", n, report)
			}
		}
	}
	inside(5)
	cancel()
	wg.Wait()
	inside(0)
	resp, body, err := send("id-0", "/")
	if err != nil {
		t.Fatal(err)
	}
	h := resp.Header
	if h.Get("X-Checker-In-Flight") != "1" || h.Get("X-Checker-Max-In-Flight") != "5" || h.Get("X-Checker-Seen") != "2" || h.Get("X-Checker-Instance") != "instance-1" {
		t.Errorf("headers %v", h)
	}
	var now struct {
		ID          string
		MaxInFlight int
		Duplicates  int
		Seen        map[string]int
	}
	if err := json.Unmarshal([]byte(body), &now); err != nil || now.ID != "id-0" || now.MaxInFlight != 5 || now.Duplicates != 1 || now.Seen != nil {
		t.Errorf("report %s: %v", body, err)
	}

	for query, want := range map[string]struct {
		status int
		body   string
	}{
		"/?status=503&body=3":     {503, "012"},
		"/?body=5000":             {200, ""},
		"/?stream=2&every=1":      {200, "piece 1 of 2\npiece 2 of 2\n"},
		"/?echo=1":                {200, "the body"},
		"/?cpu=5&body=0":          {200, ""},
		"/?nonsense=1":            {400, "unknown order \"nonsense\"\n"},
		"/?status=99":             {400, "status=99 is none that can be sent\n"},
		"/?sleep=-1":              {400, "sleep=\"-1\" is no number\n"},
		"/?hang=0&reset=0&body=1": {200, "0"},
	} {
		resp, body, err := send("other", query)
		if err != nil || resp.StatusCode != want.status || (query == "/?body=5000") != (len(body) == 5000) || len(body) < 5000 && body != want.body {
			t.Errorf("%s: %v %q %v", query, resp, body, err)
		}
	}
	if _, _, err := send("", "/?reset=1"); err == nil {
		t.Error("reset=1 gives an answer")
	}

	_, report := f.get(t, "/report")
	now.Seen = nil
	if err := json.Unmarshal([]byte(report), &now); err != nil || now.Seen["id-0"] != 2 || now.Seen["id-4"] != 1 {
		t.Errorf("report %s: %v", report, err)
	}
	if _, _, err := send("last", "/?crash=7"); err == nil {
		t.Error("crash=7 gives an answer")
	}
	if code := f.code(t); code != 7 {
		t.Errorf("exit code %d", code)
	}
	written, err := os.ReadFile(filepath.Join(logs, "instance-1.log"))
	if err != nil || strings.Count(string(written), "id-0\n") != 2 || !strings.HasSuffix(string(written), "last\n") {
		t.Errorf("log %q: %v", written, err)
	}
}

// TestServicesAreValid reads each example's YAML as the server does, and finds its code by the map.
func TestServicesAreValid(t *testing.T) {
	found, err := filepath.Glob("*/service.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for i := range found {
		found[i] = filepath.Dir(found[i])
	}
	if !slices.Equal(found, all) {
		t.Errorf("examples with a service.yaml: %q, tested: %q", found, all)
	}
	codes, err := code.LoadImages("images.yaml")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		data, err := os.ReadFile(name + "/service.yaml")
		if err != nil {
			t.Fatal(err)
		}
		j, err := yaml.YAMLToJSONStrict(data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		o, unknown, err := api.Decode(api.Services, j)
		if err != nil || len(unknown) > 0 {
			t.Errorf("%s: %v, unknown %q", name, err, unknown)
			continue
		}
		o.Meta().Namespace = "default"
		api.SetDefaults(o)
		if errs := api.Validate(o, nil, api.DefaultLimits); len(errs) > 0 {
			t.Errorf("%s: %v", name, errs)
		}
		svc := o.(*api.Service)
		image := svc.Spec.Template.Spec.Containers[0].Image
		folder, ok := strings.CutPrefix(codes[image], "exec://")
		if !ok || filepath.Base(folder) != name || svc.Name != name {
			t.Errorf("%s: service %s, image %s leads to %q", name, svc.Name, image, codes[image])
		}
		_, runErr := os.Stat(filepath.Join(folder, "run"))
		_, goErr := os.Stat(filepath.Join(folder, "main.go"))
		if runErr != nil && goErr != nil {
			t.Errorf("%s is neither a Go program nor has it a file run", name)
		}
		if !strings.Contains(string(readme), "| `"+name+"` |") {
			t.Errorf("README.md does not name %s", name)
		}
	}
	for _, name := range []string{"hello-python", "hello-node"} {
		if st, err := os.Stat(name + "/run"); err != nil || st.Mode()&0o111 == 0 {
			t.Errorf("%s/run cannot be executed", name)
		}
	}
}
