package ingress

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// upstream is a function: it answers with the body that it was sent, "/slow" after a while, "/stream" bit by bit.
func upstream(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		switch r.URL.Path {
		case "/slow":
			time.Sleep(300 * time.Millisecond) // the function's work
		case "/stream":
			for range 30 {
				io.WriteString(w, "bit\n")
				w.(http.Flusher).Flush()
				time.Sleep(10 * time.Millisecond) // the function's work
			}
			return
		}
		w.Write(b)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// load is closed-loop clients of many kinds. None of them sends anything twice: a failure is a failure. The HTTP/2 clients are net/http's, which
// send again what GOAWAY says was not looked at, and nothing else.
type load struct {
	addr  string
	trust *identity
	stop  chan struct{}
	wg    sync.WaitGroup

	mu       sync.Mutex
	done     map[string]int
	failures []string
}

func newLoad(addr string, id *identity) *load {
	l := &load{addr: addr, trust: id, stop: make(chan struct{}), done: map[string]int{}}
	dial := func() (net.Conn, error) { return net.DialTimeout("tcp", addr, limit) }
	dialTLS := func() (net.Conn, error) {
		c, err := dial()
		if err != nil {
			return nil, err
		}
		t := tls.Client(c, id.trust("http/1.1"))
		c.SetDeadline(time.Now().Add(limit))
		if err := t.Handshake(); err != nil {
			c.Close()
			return nil, fmt.Errorf("handshake: %w", err)
		}
		return t, nil
	}
	for range 4 {
		l.run("keep-alive", l.keepAlive(dial, "/", 0))
		l.run("keep-alive TLS", l.keepAlive(dialTLS, "/", 0))
		l.run("now and then", l.keepAlive(dial, "/", 20*time.Millisecond))
		l.run("slow", l.keepAlive(dial, "/slow", 0))
		l.run("stream", l.keepAlive(dialTLS, "/stream", 0))
		l.run("new connection", l.fresh(dial))
		l.run("h2c", l.client("http", h2only(nil), 0))
		l.run("h2", l.client("https", h2only(id.trust()), 0))
		l.run("h2 now and then", l.client("https", h2only(id.trust()), 20*time.Millisecond))
	}
	for range 2 {
		l.run("new connection TLS", l.fresh(dialTLS))
	}
	return l
}

// run calls one again and again. It returns whether the load goes on.
func (l *load) run(kind string, one func() error) {
	l.wg.Go(func() {
		for {
			select {
			case <-l.stop:
				return
			default:
			}
			err := one()
			l.mu.Lock()
			if l.done[kind]++; err != nil {
				l.failures = append(l.failures, kind+": "+err.Error())
			}
			l.mu.Unlock()
		}
	})
}

// end stops the load and returns what it has seen.
func (l *load) end() (requests map[string]int, failures []string) {
	close(l.stop)
	l.wg.Wait()
	return l.done, l.failures
}

// exchange is one request on a connection, and whether there may be another.
func exchange(c net.Conn, br *bufio.Reader, path string) (again bool, err error) {
	c.SetDeadline(time.Now().Add(limit))
	if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", path); err != nil {
		return false, err
	}
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		return false, err
	}
	b, err := io.ReadAll(resp.Body)
	want := "hello"
	if path == "/stream" {
		want = strings.Repeat("bit\n", 30)
	}
	if err == nil && (resp.StatusCode != 200 || string(b) != want) {
		err = fmt.Errorf("status %d, %q", resp.StatusCode, b)
	}
	return !resp.Close, err
}

// keepAlive uses a connection until it is told that there is no next request.
func (l *load) keepAlive(dial func() (net.Conn, error), path string, pause time.Duration) func() error {
	var c net.Conn
	var br *bufio.Reader
	return func() (err error) {
		if c == nil {
			if c, err = dial(); err != nil {
				c = nil
				return err
			}
			br = bufio.NewReader(c)
		}
		time.Sleep(pause) // the client's own time
		again, err := exchange(c, br, path)
		if !again || err != nil {
			c.Close()
			c = nil
		}
		return err
	}
}

func (l *load) fresh(dial func() (net.Conn, error)) func() error {
	return func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = exchange(c, bufio.NewReader(c), "/")
		return err
	}
}

func (l *load) client(scheme string, tr *http.Transport, pause time.Duration) func() error {
	cl := &http.Client{Transport: tr, Timeout: limit}
	return func() error {
		time.Sleep(pause) // the client's own time
		resp, err := cl.Post(scheme+"://"+l.addr+"/", "text/plain", strings.NewReader("hello"))
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != 200 || string(b) != "hello") {
			err = fmt.Errorf("status %d, %q", resp.StatusCode, b)
		}
		return err
	}
}

const restarts = 20

// A router is restarted again and again under load, and not one request fails.
func TestRestartsUnderLoad(t *testing.T) {
	dir := t.TempDir()
	id := newIdentity(t, dir, "x")
	args := []string{"--listen", "127.0.0.1:0", "--handover", filepath.Join(dir, "sock"), "--static", "*=" + upstream(t), "--tls-cert", id.cert, "--tls-key", id.key, "--metrics", "127.0.0.1:0"}
	old := start(t, args...)
	l := newLoad(old.addr, id)
	var all []*router
	for i := range restarts {
		next := start(t, args...)
		if next.addr != old.addr {
			t.Fatalf("restart %d: listens on %s, before on %s", i, next.addr, old.addr)
		}
		all = append(all, old)
		old = next
		time.Sleep(50 * time.Millisecond) // of load on the new process alone
	}
	requests, failures := l.end()
	for i, r := range all {
		if code := r.ended(limit); code != 0 {
			t.Errorf("process %d ended with %d", i, code)
		}
	}
	t.Logf("%d restarts, requests %v", restarts, requests)
	if len(failures) > 0 {
		t.Errorf("%d failures, the first: %q", len(failures), failures[:min(len(failures), 10)])
	}
	for kind, n := range requests {
		if n < restarts/2 {
			t.Errorf("only %d requests of kind %q: that is no load", n, kind)
		}
	}
}

// The same without a hand-over, one process after the other: clients notice. This is the control of the test above.
func TestRestartsWithoutHandover(t *testing.T) {
	dir := t.TempDir()
	id := newIdentity(t, dir, "x")
	args := []string{"--static", "*=" + upstream(t), "--tls-cert", id.cert, "--tls-key", id.key, "--listen"}
	old := start(t, append(args, "127.0.0.1:0")...)
	addr := old.addr
	l := newLoad(addr, id)
	for range 3 {
		old.cmd.Process.Signal(syscall.SIGTERM)
		if code := old.ended(limit); code != 0 {
			t.Fatalf("ended with %d\n%s", code, old.log.String())
		}
		old = start(t, append(args, addr)...)
	}
	requests, failures := l.end()
	t.Logf("3 restarts, requests %v, failures %d", requests, len(failures))
	if len(failures) == 0 {
		t.Error("no failure: the load does not notice a restart")
	}
}

// A successor that does not come up changes nothing; one that is killed before it is ready neither.
func TestSuccessorFails(t *testing.T) {
	dir := t.TempDir()
	id := newIdentity(t, dir, "x")
	fn := upstream(t)
	args := []string{"--listen", "127.0.0.1:0", "--handover", filepath.Join(dir, "sock"), "--static", "*=" + fn}
	r := start(t, args...)
	l := newLoad(r.addr, id) // the TLS kinds fail: not counted here
	for _, bad := range [][]string{
		{"--tls-cert", id.cert, "--tls-key", id.cert},
		{"--metrics", "192.0.2.1:1", "--allow-remote"},
		{"--static", "nonsense"},
	} {
		next, line := launch(t, append(args, bad...)...)
		if code := next.ended(limit); code <= 0 || line != "" {
			t.Errorf("%v: ended with %d, said %q", bad, code, line)
		}
	}
	if code := r.ended(0); code != -1 {
		t.Errorf("the first process ended with %d", code)
	}
	_, failures := l.end()
	for _, f := range failures {
		if !strings.Contains(f, "TLS") && !strings.HasPrefix(f, "h2") && !strings.HasPrefix(f, "stream") {
			t.Error(f)
		}
	}
}

// The order of an end: not ready, nothing new is accepted, what is inside is answered with "Connection: close", then the process ends.
func TestDrain(t *testing.T) {
	var inside atomic.Int32
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inside.Add(1)
		<-release
		io.WriteString(w, "done")
	}))
	t.Cleanup(s.Close)
	admin := freeAddr(t)
	r := start(t, "--listen", "127.0.0.1:0", "--metrics", admin, "--static", "*="+s.Listener.Addr().String())
	status := func() int {
		resp, err := http.Get("http://" + admin + "/readyz")
		if err != nil {
			return 0
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if got := status(); got != 200 {
		t.Errorf("ready: %d", got)
	}
	busy, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	io.WriteString(busy, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	stream := make(chan error, 1)
	go func() {
		resp, err := (&http.Client{Transport: h2only(nil)}).Get("http://" + r.addr + "/")
		if err == nil {
			var b []byte
			if b, err = io.ReadAll(resp.Body); string(b) != "done" {
				err = errors.Join(err, fmt.Errorf("%q", b))
			}
		}
		stream <- err
	}()
	eventually(t, "both requests inside", func() bool { return inside.Load() == 2 })
	r.cmd.Process.Signal(syscall.SIGTERM)
	eventually(t, "not ready", func() bool { return status() == 503 })
	eventually(t, "not accepting", func() bool {
		c, err := net.Dial("tcp", r.addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	if code := r.ended(0); code != -1 {
		t.Fatalf("ended with %d while requests were inside", code)
	}
	close(release)
	busy.SetDeadline(time.Now().Add(limit))
	resp, err := http.ReadResponse(bufio.NewReader(busy), nil)
	if err != nil || !resp.Close {
		t.Fatalf("%v, %v", resp, err)
	}
	if err := <-stream; err != nil {
		t.Errorf("stream: %v", err)
	}
	if code := r.ended(limit); code != 0 {
		t.Errorf("ended with %d", code)
	}
}

// What is not done when the time for the drain is over is cut, and the process says so.
func TestDrainDeadline(t *testing.T) {
	inside, release := make(chan struct{}), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { close(inside); <-release }))
	t.Cleanup(s.Close)
	defer close(release)
	r := start(t, "--listen", "127.0.0.1:0", "--drain", "200ms", "--static", "*="+s.Listener.Addr().String())
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	<-inside
	begin := time.Now()
	r.cmd.Process.Signal(syscall.SIGTERM)
	c.SetDeadline(time.Now().Add(limit))
	if b, err := io.ReadAll(c); err == nil {
		t.Errorf("a request that was cut ended properly: %q", b)
	}
	if code := r.ended(limit); code != 1 || time.Since(begin) > 5*time.Second {
		t.Errorf("ended with %d after %v", code, time.Since(begin))
	}
}

func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}
