// Package conformance holds the data path to HTTP: raw sockets and real clients on one side, a function that records every byte that
// reached it on the other, the real binaries between them in every order in which they are used. Each case runs over each path, warm (a
// slot is free) and held (the only slot is taken when the request comes, so that it waits as it does for a start).
package conformance

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/test/harness"
)

// bin is the folder with the binaries under test, built once.
var bin string

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, &bin, "cmd/thaw", "cmd/queueproxy", "test/protocols/function"))
}

// limit bounds everything that a case waits for.
const limit = 10 * time.Second

// path is a chain of hops with a function behind it.
type path struct {
	name   string
	addr   string
	held   bool // one slot, which is taken when a case begins
	router bool // the first hop is a router
	fn     *function
	caught map[string]bool // not nil: cases are expected to fail, and are noted here
}

// hop starts a binary and returns the address that it says it listens on; the process ends with the test.
func hop(t *testing.T, name string, args ...string) string {
	t.Helper()
	return hopOf(t, bin, name, args...)
}

// hopOf is hop for the binaries of another folder.
func hopOf(t *testing.T, bin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, name), args...)
	var log lockedBuilder
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGKILL)
		cmd.Wait()
		if strings.Contains(log.String(), "panic") || strings.Contains(log.String(), "DATA RACE") {
			t.Errorf("%s %v:\n%s", name, args, log.String())
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, log.String())
	}
	m := regexp.MustCompile(` listen=(\S+)`).FindStringSubmatch(line)
	if m == nil {
		t.Fatalf("%s: first line %q", name, line)
	}
	pids.Store(m[1], cmd.Process.Pid)
	return m[1]
}

// pids has the process of each hop by its address.
var pids sync.Map

type lockedBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuilder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuilder) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func queueProxy(t *testing.T, upstream string, held bool, args ...string) string {
	n := "0"
	if held {
		n = "1"
	}
	return hop(t, "queueproxy", append([]string{"--listen", "127.0.0.1:0", "--upstream", upstream, "--concurrency", n, "--upstream-protocol", "h1"}, args...)...)
}

func routerTo(t *testing.T, upstream string) string {
	return hop(t, "thaw", "router", "--listen", "127.0.0.1:0", "--static", "*="+upstream)
}

func activatorTo(t *testing.T, upstream string, held bool) string {
	n := "100"
	if held {
		n = "1"
	}
	return hop(t, "thaw", "activator", "--listen", "127.0.0.1:0", "--static", "*="+upstream, "--concurrency", n)
}

// overPaths runs f for each chain of binaries. The paths run side by side, the cases of one path one after the other.
func overPaths(t *testing.T, f func(t *testing.T, p *path)) {
	for _, kind := range []string{"router", "queueproxy", "router+queueproxy", "router+activator+queueproxy"} {
		for _, held := range []bool{false, true} {
			if kind == "router" && held {
				continue // a router alone has no queue
			}
			name := kind + "/warm"
			if held {
				name = kind + "/held"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				p := &path{name: name, held: held, fn: newFunction(t), router: kind != "queueproxy"}
				addr := p.fn.addr()
				if kind != "router" {
					// With an activator in front, the queue is the activator's.
					addr = queueProxy(t, addr, held && kind != "router+activator+queueproxy")
				}
				if kind == "router+activator+queueproxy" {
					addr = activatorTo(t, addr, held)
				}
				if p.router {
					addr = routerTo(t, addr)
				}
				p.addr = addr
				f(t, p)
			})
		}
	}
}

// testCase is one row of a table.
type testCase struct {
	name string
	run  func(e *env)
	only func(p *path) bool // nil = every path
}

// env is what a case sees. Its failures are collected, so that those that are known can be told from others.
type env struct {
	t    *testing.T
	p    *path
	fn   *function
	seen int64 // requests that had reached the function before the case

	mu    sync.Mutex
	fails []string
	done  bool
	conns []net.Conn
	free  func()
}

type fatal struct{}

func (e *env) Errorf(format string, args ...any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.done {
		e.fails = append(e.fails, fmt.Sprintf(format, args...))
	}
}

// Fatalf ends the case; it may be called by its own goroutine only.
func (e *env) Fatalf(format string, args ...any) {
	e.Errorf(format, args...)
	panic(fatal{})
}

// reached is how many requests of this case have reached the function.
func (e *env) reached() int64 { return e.fn.requests.Load() - e.seen }

// holdFor is how long a request finds no slot in a held path.
const holdFor = 15 * time.Millisecond

var combinations atomic.Int64

// runCase runs c over p as a subtest.
func runCase(t *testing.T, p *path, c testCase) {
	if c.only != nil && !c.only(p) {
		return
	}
	t.Run(c.name, func(t *testing.T) {
		combinations.Add(1)
		e := &env{t: t, p: p, fn: p.fn, free: func() {}}
		p.fn.handle(nil)
		p.fn.current.Store(&c.name)
		if p.held {
			e.occupy()
			p.fn.settle(t)
		}
		e.seen = p.fn.requests.Load()
		if p.held {
			var early atomic.Bool // the case itself has given the slot back
			free := sync.OnceFunc(e.free)
			e.free = func() { early.Store(true); free() }
			timer := time.AfterFunc(holdFor, func() {
				if n := e.reached(); n > 0 && !early.Load() {
					e.Errorf("%d requests reached the function while its only slot was taken", n)
				}
				free()
			})
			defer timer.Stop()
		}
		begin := time.Now()
		func() {
			defer func() {
				if r := recover(); r != nil && r != (fatal{}) {
					panic(r)
				}
			}()
			c.run(e)
		}()
		e.free()
		e.mu.Lock()
		e.done = true
		fails, conns := e.fails, e.conns
		e.mu.Unlock()
		for _, nc := range conns {
			nc.Close()
		}
		if len(fails) > 0 {
			p.fn.cut() // what a failed case left behind must not be the next one's trouble
		}
		// A function that closes without having said so must have done it before the next case begins.
		for end := time.Now().Add(200 * time.Millisecond); p.fn.busy.Load() > 0 && time.Now().Before(end); {
			time.Sleep(100 * time.Microsecond)
		}
		if took := time.Since(begin); took > limit {
			fails = append(fails, fmt.Sprintf("took %v", took))
		}
		if p.caught != nil {
			p.caught[c.name] = len(fails) > 0
			return
		}
		if why := knownFailure(p, c.name); why != "" {
			if len(fails) == 0 {
				t.Errorf("passes now, although it is listed as known to fail (%s): take it from the list", why)
			}
			t.Logf("known: %s\n%s", why, strings.Join(fails, "\n"))
			return
		}
		for _, f := range fails {
			t.Error(f)
		}
	})
}

// occupy takes the only slot; e.free gives it back.
func (e *env) occupy() {
	gate := e.fn.gate()
	for end := time.Now().Add(limit); ; {
		c := e.dial()
		c.send("GET /occupy HTTP/1.1\r\nHost: x\r\n\r\n")
		refused := make(chan string, 1) // what an earlier case left in a queue may fill it for a moment
		go func() {
			if head, err := readHead(c.br); err == nil && strings.HasPrefix(head, "HTTP/1.1 503 ") {
				refused <- head
			}
		}()
		select {
		case <-gate.in:
		case head := <-refused:
			if time.Now().After(end) {
				e.t.Fatalf("the slot cannot be taken: %q", head)
			}
			time.Sleep(time.Millisecond)
			continue
		case <-time.After(limit):
			e.t.Fatal("the slot cannot be taken: an earlier request still has it")
		}
		break
	}
	e.free = func() { close(gate.out) }
}

// function is a server that does to the letter what a case says, and records what reached it.
type function struct {
	t        *testing.T
	ln       net.Listener
	requests atomic.Int64
	busy     atomic.Int64 // calls whose end the other side may not know yet
	handler  atomic.Pointer[func(*call)]
	gates    atomic.Pointer[gate]
	current  atomic.Pointer[string] // name of the case

	live atomic.Int64 // connections being served

	mu       sync.Mutex
	conns    map[net.Conn]struct{}
	occupier net.Conn // on which the slot is taken
}

type gate struct{ in, out chan struct{} }

func newFunction(t *testing.T) *function {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &function{t: t, ln: ln, conns: make(map[net.Conn]struct{})}
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns[nc] = struct{}{}
			f.mu.Unlock()
			f.live.Add(1)
			go func() {
				defer f.live.Add(-1)
				f.serve(nc)
			}()
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		f.mu.Lock()
		defer f.mu.Unlock()
		for nc := range f.conns {
			nc.Close()
		}
	})
	return f
}

// cut closes all connections to the function but the one that has its slot.
func (f *function) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for nc := range f.conns {
		if nc != f.occupier {
			nc.Close()
		}
	}
}

// settle returns when the function has read all that was sent to it before its slot was taken. A hop may give up a request,
// and its slot, while the bytes that it has sent still wait to be read here: they would be taken for the next case's.
func (f *function) settle(t *testing.T) {
	// Connections are accepted in order: when this one is answered, all before it have been.
	nc, err := net.Dial("tcp", f.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(limit))
	io.WriteString(nc, "GET /marker HTTP/1.1\r\n\r\n")
	if _, err := readHead(bufio.NewReader(nc)); err != nil {
		t.Fatalf("the function does not answer: %v", err)
	}
	f.cut()
	for end := time.Now().Add(limit); f.live.Load() > 1 && time.Now().Before(end); {
		time.Sleep(100 * time.Microsecond)
	}
}

func (f *function) addr() string { return f.ln.Addr().String() }

func (f *function) gate() *gate {
	g := &gate{make(chan struct{}), make(chan struct{})}
	f.gates.Store(g)
	return g
}

// handle says what happens to the requests to come; nil is a plain 200.
func (f *function) handle(h func(*call)) {
	if h == nil {
		h = func(c *call) { c.body(); c.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") }
	}
	f.handler.Store(&h)
}

func (f *function) serve(nc net.Conn) {
	busy := false
	defer func() {
		nc.Close()
		f.mu.Lock()
		delete(f.conns, nc)
		f.mu.Unlock()
		if busy {
			f.busy.Add(-1)
		}
	}()
	c := &call{Conn: nc, br: bufio.NewReaderSize(nc, 64<<10)}
	for !c.closed {
		nc.SetDeadline(time.Time{})
		if busy {
			busy = false
			f.busy.Add(-1)
		}
		if _, err := c.br.Peek(1); err != nil {
			return
		}
		nc.SetDeadline(time.Now().Add(limit))
		busy = true
		f.busy.Add(1)
		head, err := readHead(c.br)
		if err != nil {
			return
		}
		c.head = head
		if strings.HasPrefix(head, "GET /occupy ") {
			f.mu.Lock()
			f.occupier = nc
			f.mu.Unlock()
			g := f.gates.Load()
			close(g.in)
			<-g.out
			f.mu.Lock()
			f.occupier = nil
			f.mu.Unlock()
			c.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			continue
		}
		if strings.HasPrefix(head, "GET /marker ") {
			c.send("HTTP/1.1 204 No Content\r\n\r\n")
			return
		}
		if id, isBad := strings.CutPrefix(head, "POST /bad/"); isBad && !strings.HasPrefix(id, *f.current.Load()+" ") {
			// Of an earlier case, taken back before it was read here. That case has been judged, except for this.
			if _, _, err := c.body(); err == nil {
				f.t.Errorf("a bad request reached the function late and whole: %q", head)
			}
			return
		}
		f.requests.Add(1)
		(*f.handler.Load())(c)
	}
}

// call is a request inside the function, and the connection that it came on.
type call struct {
	net.Conn
	br     *bufio.Reader
	head   string
	closed bool // set: the connection ends with this call
}

func (c *call) send(s string) error { _, err := io.WriteString(c, s); return err }

// body reads the request's body; err says that it did not come to its end.
func (c *call) body() (body, trailer string, err error) {
	m := message{head: c.head}
	err = m.read(c.br, false)
	return m.body, m.trailer, err
}

func (c *call) end() { c.closed = true }

// reset ends the connection as a crash does.
func (c *call) reset() { c.Conn.(*net.TCPConn).SetLinger(0); c.Close(); c.closed = true }

func readHead(br *bufio.Reader) (string, error) {
	var b strings.Builder
	for {
		line, err := br.ReadString('\n')
		b.WriteString(line)
		if err != nil {
			if b.Len() > 0 && err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return b.String(), err
		}
		if line == "\r\n" {
			return b.String(), nil
		}
	}
}

// message is a parsed answer or request, its head as it came.
type message struct {
	head    string
	body    string
	trailer string
}

// status is the code in an answer's first line.
func (m *message) status() int {
	var n int
	fmt.Sscanf(m.head, "HTTP/1.1 %d", &n)
	return n
}

// values are those of all fields of a name, in order, as they came.
func values(head, name string) (vv []string) {
	for line := range strings.SplitSeq(head, "\r\n") {
		k, v, ok := strings.Cut(line, ":")
		if ok && strings.EqualFold(k, name) {
			vv = append(vv, strings.Trim(v, " "))
		}
	}
	return vv
}

func value(head, name string) string { return strings.Join(values(head, name), "|") }

// read reads the body that the head announces.
func (m *message) read(br *bufio.Reader, untilClose bool) error {
	switch {
	case strings.EqualFold(value(m.head, "Transfer-Encoding"), "chunked"):
		for {
			data, err := readChunk(br)
			m.body += data
			if err != nil {
				return err
			}
			if data == "" {
				break
			}
		}
		for {
			line, err := br.ReadString('\n')
			if err != nil {
				return noEOF(err)
			}
			if line == "\r\n" {
				return nil
			}
			m.trailer += line
		}
	case value(m.head, "Content-Length") != "":
		var n int
		if _, err := fmt.Sscanf(value(m.head, "Content-Length"), "%d", &n); err != nil {
			return err
		}
		b := make([]byte, n)
		k, err := io.ReadFull(br, b)
		m.body = string(b[:k])
		return noEOF(err)
	case untilClose:
		b, err := io.ReadAll(br)
		m.body = string(b)
		return err
	}
	return nil
}

// readChunk returns the data of one chunk; "" is the last one.
func readChunk(br *bufio.Reader) (string, error) {
	line, err := br.ReadString('\n')
	if err != nil {
		return "", noEOF(err)
	}
	var n int
	if _, err := fmt.Sscanf(line, "%x", &n); err != nil || n < 0 || n > 64<<20 {
		return "", fmt.Errorf("chunk size %q: %v", line, err)
	}
	if n == 0 {
		return "", nil
	}
	b := make([]byte, n+2)
	k, err := io.ReadFull(br, b)
	return string(b[:min(k, n)]), noEOF(err)
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// client is a raw connection to the path.
type client struct {
	net.Conn
	e  *env
	br *bufio.Reader
}

func (e *env) dial() *client {
	nc, err := net.Dial("tcp", e.p.addr)
	if err != nil {
		e.Fatalf("%v", err)
	}
	nc.SetDeadline(time.Now().Add(limit))
	e.mu.Lock()
	e.conns = append(e.conns, nc)
	e.mu.Unlock()
	return &client{nc, e, bufio.NewReader(nc)}
}

func (c *client) send(s string) {
	if _, err := io.WriteString(c, s); err != nil {
		c.e.Fatalf("client cannot send: %v", err)
	}
}

// headOf reads the head of the next answer, interim or not.
func (c *client) headOf() string {
	head, err := readHead(c.br)
	if err != nil {
		c.e.Fatalf("no head of an answer: %v after %q", err, head)
	}
	return head
}

// next reads an answer's head, and skips the 102 by which a hop asks whether a client is still there.
func (c *client) next() string {
	for {
		if head := c.headOf(); !strings.HasPrefix(head, "HTTP/1.1 102 ") {
			return head
		}
	}
}

// answer reads a whole answer to a request that is not HEAD.
func (c *client) answer() *message {
	m := &message{head: c.next()}
	if s := m.status(); s == 204 || s == 304 || s < 200 {
		return m
	}
	if err := m.read(c.br, true); err != nil {
		c.e.Fatalf("answer %q: body broke off: %v", m.head, err)
	}
	return m
}

// want reads an answer and compares.
func (c *client) want(status int, body string) *message {
	m := c.answer()
	if m.status() != status || m.body != body {
		c.e.Fatalf("answer %q %.200q, want %d %.200q", m.head, m.body, status, body)
	}
	return m
}

// ends checks that the connection is closed, cleanly or not, without another byte.
func (c *client) ends() {
	if b, err := c.br.ReadByte(); err == nil {
		c.e.Fatalf("connection goes on with %q", b)
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		c.e.Fatalf("connection stays open")
	}
}

func (c *client) closeWrite() { c.Conn.(*net.TCPConn).CloseWrite() }

// calls makes the function hand the heads of its calls to the case, and answer with reply.
func (e *env) calls(reply string) <-chan *message {
	ch := make(chan *message, 16)
	e.fn.handle(func(c *call) {
		body, trailer, err := c.body()
		if err != nil {
			c.end()
			return
		}
		ch <- &message{c.head, body, trailer}
		c.send(reply)
	})
	return ch
}

// get waits for what the function has to tell.
func get[T any](e *env, ch <-chan T, what string) (v T) {
	select {
	case v = <-ch:
	case <-time.After(limit):
		e.Fatalf("nothing came: %s", what)
	}
	return v
}

// exchange sends one request, lets the function give reply, and returns both messages as they arrived.
func (e *env) exchange(request, reply string) (got, answer *message) {
	ch := e.calls(reply)
	c := e.dial()
	c.send(request)
	answer = c.answer()
	return get(e, ch, "request at the function"), answer
}

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
