package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/api"
)

// health is a grpc.health.v1 server on net/http's own HTTP/2, written apart from the prober's code: answers by service name.
func health(t *testing.T, answer map[string]byte) string {
	h := func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 || r.URL.Path != "/grpc.health.v1.Health/Check" || r.Header.Get("Content-Type") != "application/grpc" {
			http.Error(w, "not the call", 400)
			return
		}
		b, _ := io.ReadAll(r.Body)
		if len(b) < 5 || int(binary.BigEndian.Uint32(b[1:5])) != len(b)-5 {
			http.Error(w, "not a message", 400)
			return
		}
		service := ""
		if len(b) > 5 {
			if b[5] != 0x0a || int(b[6]) != len(b)-7 {
				http.Error(w, "not the message", 400)
				return
			}
			service = string(b[7:])
		}
		w.Header().Set("Content-Type", "application/grpc")
		status, ok := answer[service]
		if !ok {
			w.Header().Set("Grpc-Status", "5")
			w.Header().Set("Grpc-Message", "who?")
			return
		}
		w.Header().Set("Trailer", "Grpc-Status")
		w.Write([]byte{0, 0, 0, 0, 2, 0x08, status})
		w.Header().Set("Grpc-Status", "0")
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(h))
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// silent accepts connections and never says a word; the kernel's backlog does the accepting.
func silent(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}

// closed is an address where nobody listens, and where nobody can begin to: a socket is bound to it.
func closed(t *testing.T) string {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", sa.(*syscall.SockaddrInet4).Port)
}

// mute answers every request with the same bytes and closes.
func mute(t *testing.T, answer string) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 4096))
			io.WriteString(c, answer)
			c.Close()
		}
	}()
	return ln.Addr().String()
}

func TestOnce(t *testing.T) {
	var redirected atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/elsewhere" {
			redirected.Store(true)
		}
		if r.URL.Path == "/moved" {
			w.Header().Set("Location", "/elsewhere")
		}
		code, _ := strconv.Atoi(r.URL.Query().Get("code"))
		w.WriteHeader(max(code, 200))
		io.WriteString(w, "so it is")
	})
	mux.HandleFunc("/early", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(204)
	})
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "example.org" || r.UserAgent() != UserAgent || strings.Join(r.Header["X-Two"], ",") != "a,b" {
			http.Error(w, fmt.Sprintf("%q %v", r.Host, r.Header), 400)
		}
	})
	mux.HandleFunc("/plain", func(w http.ResponseWriter, r *http.Request) {
		if r.Host != r.Context().Value(http.LocalAddrContextKey).(net.Addr).String() {
			http.Error(w, r.Host, 400)
		}
	})
	plain := httptest.NewServer(mux)
	t.Cleanup(plain.Close)
	secure := httptest.NewUnstartedServer(mux)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	t.Cleanup(secure.Close)
	http1, https1 := plain.Listener.Addr().String(), secure.Listener.Addr().String()
	grpc := health(t, map[string]byte{"": 1, "up": 1, "down": 2, "odd": 9})
	dead := closed(t)

	get := func(path string) *api.Probe { return &api.Probe{HTTPGet: &api.HTTPGetAction{Path: path}} }
	check := func(service string) *api.Probe { return &api.Probe{GRPC: &api.GRPCAction{Service: service}} }
	run := func(command ...string) *api.Probe { return &api.Probe{Exec: &api.ExecAction{Command: command}} }
	dir := t.TempDir()

	for _, c := range []struct {
		name  string
		probe *api.Probe
		addr  string
		want  string // part of the error; "" = success
	}{
		{"tcp open", &api.Probe{TCPSocket: &api.TCPSocketAction{}}, http1, ""},
		{"tcp closed", &api.Probe{TCPSocket: &api.TCPSocketAction{}}, dead, "nobody listens at " + dead},
		{"tcp by default", &api.Probe{}, http1, ""},
		{"no probe at all is tcp", nil, http1, ""},
		{"the written port is not used", &api.Probe{TCPSocket: &api.TCPSocketAction{Port: api.IntOrString{Int: 1}, Host: "192.0.2.1"}}, http1, ""},
		{"http 200", get("/"), http1, ""},
		{"http 204 after 103", get("/early"), http1, ""},
		{"http without slash", get("plain"), http1, ""},
		{"http 399", get("/?code=399"), http1, ""},
		{"http 400", get("/?code=400"), http1, `GET /?code=400 answered 400 Bad Request: "so it is"`},
		{"http 503", get("/?code=503"), http1, "503"},
		{"http redirect is not followed", get("/moved?code=302"), http1, ""},
		{"http headers", &api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/headers", Host: "example.org", HTTPHeaders: []api.HTTPHeader{{Name: "X-Two", Value: "a"}, {Name: "x-two", Value: "b"}}}}, http1, ""},
		{"http host header wins", &api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/headers", Host: "other", HTTPHeaders: []api.HTTPHeader{{Name: "host", Value: "example.org"}, {Name: "X-Two", Value: "a,b"}}}}, http1, ""},
		{"https", &api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/", Scheme: "HTTPS"}}, https1, ""},
		{"https to a plain port", &api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/", Scheme: "HTTPS"}}, http1, "tls"},
		{"http closed", get("/"), dead, "nobody listens"},
		{"http silent", get("/"), silent(t), "deadline exceeded"},
		{"http cut off", get("/"), mute(t, "HTTP/1.1 200"), "closed before a whole answer"},
		{"http nonsense", get("/"), mute(t, "220 smtp\r\n"), "malformed"},
		{"http endless head", get("/"), mute(t, "HTTP/1.1 200 OK\r\n"+strings.Repeat("a: b\r\n", 20_000)+"\r\n"), "HTTP probe:"},
		{"grpc", check(""), grpc, ""},
		{"grpc service", check("up"), grpc, ""},
		{"grpc not serving", check("down"), grpc, `service "down" is NOT_SERVING`},
		{"grpc unknown state", check("odd"), grpc, "in state 9"},
		{"grpc unknown service", check("what"), grpc, "unknown service (who?)"},
		{"grpc to http/1", check(""), http1, "gRPC probe:"},
		{"grpc closed", check(""), dead, "nobody listens"},
		{"grpc silent", check(""), silent(t), "deadline exceeded"},
		{"exec 0", run("sh", "-c", "exit 0"), "", ""},
		{"exec 3 with words", run("sh", "-c", "echo out; echo err >&2; exit 3"), "", `exit status 3: "out\nerr"`},
		{"exec dir and env", run("sh", "-c", `test "$PWD" = "$WANT" && test -z "$HOME"`), "", ""},
		{"exec not there", run("no-such-program"), "", "not in the function's PATH"},
		{"exec path not there", run("/no/such/program"), "", "no such file"},
		{"exec bounded output", run("sh", "-c", "i=0; while [ $i -lt 2000 ]; do echo line$i; i=$((i+1)); done; exit 1"), "", "line1999"},
		{"exec too slow", run("sleep", "30"), "", `"sleep" killed: context deadline exceeded`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p, err := New(c.probe, c.addr, Options{Dir: dir, Env: []string{"PATH=/usr/bin:/bin", "WANT=" + dir}, MaxOutput: 100})
			if err != nil {
				t.Fatal(err)
			}
			err = p.Once(t.Context())
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Fatalf("got %v, want …%s…", err, c.want)
			case err != nil && len(err.Error()) > 500:
				t.Fatalf("error of %d bytes", len(err.Error()))
			case strings.Contains(c.want, "nobody listens") != errors.Is(err, ErrUnreachable):
				t.Fatalf("ErrUnreachable does not fit: %v", err)
			}
		})
	}
	t.Cleanup(func() {
		if redirected.Load() {
			t.Error("a redirect was followed")
		}
	})
}

func TestNewRefuses(t *testing.T) {
	for _, c := range []struct {
		probe api.Probe
		addr  string
		want  string
	}{
		{api.Probe{HTTPGet: &api.HTTPGetAction{}, Exec: &api.ExecAction{Command: []string{"true"}}}, "127.0.0.1:1", "2 handlers"},
		{api.Probe{Exec: &api.ExecAction{}}, "", "command is empty"},
		{api.Probe{}, "127.0.0.1", "address"},
		{api.Probe{HTTPGet: &api.HTTPGetAction{Scheme: "gopher"}}, "127.0.0.1:1", "scheme"},
		{api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/%zz"}}, "127.0.0.1:1", "path"},
		{api.Probe{HTTPGet: &api.HTTPGetAction{Host: "a\r\nb: c"}}, "127.0.0.1:1", "Host"},
	} {
		if _, err := New(&c.probe, c.addr, Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v, want …%s…", c.probe, err, c.want)
		}
	}
}

// A command that does not end is killed with everything it has started.
func TestExecKillsGroup(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pid")
	p, err := New(&api.Probe{TimeoutSeconds: 60, Exec: &api.ExecAction{Command: []string{"sh", "-c", "sleep 60 & echo $! >" + file + ".new; mv " + file + ".new " + file + "; wait"}}}, "",
		Options{Env: []string{"PATH=" + os.Getenv("PATH")}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- p.Once(ctx) }()
	var b []byte
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if b, err = os.ReadFile(file); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	if pid < 2 {
		t.Fatalf("pid %q", b)
	}
	for deadline := time.Now().Add(5 * time.Second); alive(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("child %d outlived its probe", pid)
		}
	}
}

// alive says whether pid runs; a zombie that nobody has collected yet does not.
func alive(pid int) bool {
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		_, rest, _ := strings.Cut(string(b), ") ")
		return !strings.HasPrefix(rest, "Z")
	}
	return syscall.Kill(pid, 0) == nil
}

// A child that left the group and keeps the output open neither holds the probe up nor makes a success a failure.
func TestExecLeftBehind(t *testing.T) {
	p, err := New(&api.Probe{Exec: &api.ExecAction{Command: []string{"sh", "-c", "sleep 0.7 & exit 0"}}}, "", Options{})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := p.Once(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 650*time.Millisecond {
		t.Fatalf("took %v", d)
	}
}

// dialer is a port in memory: closed until it opens.
type dialer struct {
	mu    sync.Mutex
	open  bool
	tries []time.Time
}

func (d *dialer) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tries = append(d.tries, time.Now())
	if !d.open {
		return nil, syscall.ECONNREFUSED
	}
	a, b := net.Pipe()
	b.Close()
	return a, nil
}

func (d *dialer) setOpen(v bool) { d.mu.Lock(); d.open = v; d.mu.Unlock() }

// The opening of a port is seen within 1 ms, or within 2 % of the start, and the tries stay few.
func TestAggressiveFindsOpening(t *testing.T) {
	for _, start := range []time.Duration{0, 3 * time.Millisecond, 80 * time.Millisecond, time.Second, 9 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			d := &dialer{}
			p, _ := New(nil, "x:1", Options{Dial: d.dial})
			began := time.Now()
			time.AfterFunc(start, func() { d.setOpen(true) })
			if start == 0 {
				d.setOpen(true)
			}
			if err := p.WaitReady(t.Context()); err != nil {
				t.Fatal(err)
			}
			late := time.Since(began) - start
			if limit := max(time.Millisecond, min(start/50, 50*time.Millisecond)) + time.Millisecond; late > limit {
				t.Errorf("start of %v seen %v late", start, late)
			}
			if start == 9*time.Second && len(d.tries) > 450 {
				t.Errorf("%d tries in %v", len(d.tries), start)
			}
		})
	}
}

// Successes must come in a row, and a failure that the function itself answered is followed by a longer wait.
func TestAggressiveThreshold(t *testing.T) {
	var asked []time.Time
	script := []int{503, 200, 200, 503, 200, 200, 200}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(script[len(asked)])
		asked = append(asked, time.Now())
	}))
	defer s.Close()
	p, err := New(&api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/"}, SuccessThreshold: 3}, s.Listener.Addr().String(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.WaitReady(t.Context()); err != nil || len(asked) != len(script) {
		t.Fatalf("%v after %d of %d tries", err, len(asked), len(script))
	}
}

func TestWaitReadyGivesUpWithLastFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &dialer{}
		p, _ := New(nil, "x:1", Options{Dial: d.dial})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		err := p.WaitReady(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, syscall.ECONNREFUSED) || !errors.Is(err, ErrUnreachable) {
			t.Fatal(err)
		}
		if got, want := err.Error(), "not ready: nobody listens at x:1: connection refused (context deadline exceeded)"; got != want {
			t.Fatalf("got  %s\nwant %s", got, want)
		}
	})
}

// With a period, nobody listening is asked about again at once, a function that said no only after the period.
func TestPeriodic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		tries := 0
		p, err := New(&api.Probe{TCPSocket: &api.TCPSocketAction{}, PeriodSeconds: 10, InitialDelaySeconds: 2}, "x:1", Options{})
		if err != nil {
			t.Fatal(err)
		}
		p.try = func(context.Context) error {
			switch tries++; {
			case time.Since(began) < 2*time.Second:
				t.Error("a try within the initial delay")
			case time.Since(began) < 5*time.Second:
				return ErrUnreachable
			case time.Since(began) < 6*time.Second:
				return errors.New("no")
			}
			return nil
		}
		if err := p.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d < 15*time.Second || d > 15200*time.Millisecond {
			t.Fatalf("ready after %v, want 15 s and a little", d)
		}
	})
}

// A try that runs out of time gets longer, so that a slow answer is understood in the end.
func TestAggressiveSlowAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		p, _ := New(nil, "x:1", Options{})
		p.try = func(ctx context.Context) error {
			if !sleep(ctx, 350*time.Millisecond) {
				return ctx.Err()
			}
			return nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := p.WaitReady(ctx); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 1200*time.Millisecond { // 100 + 200 + 350 and waits
			t.Fatalf("took %v", d)
		}
	})
}

// Callers share one run; it ends when the last has left, not when the first has.
func TestShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs, ended atomic.Int32
		p, _ := New(&api.Probe{TimeoutSeconds: 3600}, "x:1", Options{})
		release := make(chan struct{})
		p.try = func(ctx context.Context) error {
			runs.Add(1)
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				ended.Add(1)
				return ctx.Err()
			}
		}
		var wg sync.WaitGroup
		first, leave := context.WithCancelCause(t.Context())
		why := errors.New("the first has had enough")
		wg.Go(func() {
			if err := p.Once(first); !errors.Is(err, why) {
				t.Error(err)
			}
		})
		synctest.Wait()
		for range 20 {
			wg.Go(func() {
				if err := p.Once(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		leave(why)
		synctest.Wait()
		if runs.Load() != 1 || ended.Load() != 0 {
			t.Fatalf("%d runs, %d ended", runs.Load(), ended.Load())
		}
		close(release)
		wg.Wait()

		// The last one out ends the run, and nothing of it is left.
		release = make(chan struct{})
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, why)
		defer cancel()
		if err := p.Once(ctx); !errors.Is(err, why) || ended.Load() != 1 || runs.Load() != 2 {
			t.Fatalf("%v, %d runs, %d ended", err, runs.Load(), ended.Load())
		}
	})
}

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		script := "++-+--++---" + "-+-+" + "+----"
		//         thresholds: 2 successes, 3 failures; begins not well
		p, _ := New(&api.Probe{PeriodSeconds: 5, SuccessThreshold: 2}, "x:1", Options{})
		n := 0
		ctx, cancel := context.WithCancel(t.Context())
		p.try = func(context.Context) error {
			if n == len(script) {
				cancel()
				return nil
			}
			n++
			if script[n-1] == '-' {
				return errors.New("no")
			}
			return nil
		}
		var got []string
		began := time.Now()
		p.Watch(ctx, false, func(well bool, err error) {
			got = append(got, fmt.Sprint(int(time.Since(began)/(5*time.Second)), well, err == nil))
		})
		// well at 1 (second success), not well at 10 (third failure in a row), well at 15, not well at 18
		if want := "[1 true true 10 false false 15 true true 18 false false]"; fmt.Sprint(got) != want {
			t.Fatalf("got  %v\nwant %s", got, want)
		}
	})
}

func FuzzHealthStatus(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 2, 8, 1})
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 0, 9, 0x12, 1, 'x', 0x1d, 1, 2, 3, 4, 8})
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0xff, 8, 1})
	f.Add([]byte{1, 0, 0, 0, 2, 8, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		status, err := healthStatus(b)
		if err == nil && len(b) < 5 {
			t.Fatalf("%x is status %d", b, status)
		}
		// What is valid stays valid, with the same status, when an unknown field is put in front of it.
		if err == nil {
			n := binary.BigEndian.Uint32(b[1:5])
			c := binary.BigEndian.AppendUint32([]byte{0}, n+3)
			c = append(append(c, 0x7a, 1, 'x'), b[5:5+n]...)
			if again, err := healthStatus(c); err != nil || again != status {
				t.Fatalf("%x is status %d, with another field in front it is %d, %v", b, status, again, err)
			}
		}
	})
}

func FuzzHTTPAnswer(f *testing.F) {
	f.Add("HTTP/1.1 200 OK\r\n\r\n")
	f.Add("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 503 No\r\nContent-Length: 3\r\n\r\nno\n")
	f.Add("HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
	f.Fuzz(func(t *testing.T, answer string) {
		p, err := New(&api.Probe{HTTPGet: &api.HTTPGetAction{Path: "/"}}, "x:1", Options{Dial: func(context.Context, string, string) (net.Conn, error) {
			return &canned{r: strings.NewReader(answer)}, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Once(t.Context()); err == nil && !strings.HasPrefix(answer, "HTTP/") {
			t.Fatalf("%q is a success", answer)
		}
	})
}

// canned is a connection whose other end has said everything already.
type canned struct{ r io.Reader }

func (c *canned) Read(p []byte) (int, error)       { return c.r.Read(p) }
func (c *canned) Write(p []byte) (int, error)      { return len(p), nil }
func (c *canned) Close() error                     { return nil }
func (c *canned) LocalAddr() net.Addr              { return nil }
func (c *canned) RemoteAddr() net.Addr             { return nil }
func (c *canned) SetDeadline(time.Time) error      { return nil }
func (c *canned) SetReadDeadline(time.Time) error  { return nil }
func (c *canned) SetWriteDeadline(time.Time) error { return nil }
