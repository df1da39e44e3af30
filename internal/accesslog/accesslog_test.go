package accesslog

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

var sample = Entry{
	Time: time.Date(2026, 11, 21, 9, 8, 7, 654321000, time.FixedZone("x", 3600)), RequestID: "abc", Method: []byte("GET"), Host: []byte("hello.default.localhost"),
	Path: []byte("/a/b"), Query: []byte("secret=1"), Protocol: "HTTP/1.1", Client: netip.MustParseAddrPort("[::1]:4711"), UserAgent: []byte(`Mozilla/5.0 "x"`),
	Status: 503, Reason: []byte("queue_full"), In: 5, Out: 1 << 40, Duration: 1234567 * time.Microsecond, Waited: 7 * time.Microsecond, Cold: true,
	Namespace: "default", Service: "hello", Revision: "hello-00001", Instance: "i1", Trace: "4bf9",
}

func line(t testing.TB, format string, e *Entry) string {
	t.Helper()
	f, err := parse(format)
	if err != nil {
		t.Fatal(err)
	}
	p := &printer{}
	p.line(f, e)
	return string(p.b)
}

func TestFormats(t *testing.T) {
	for _, c := range []struct {
		name, format string
		e            *Entry
		want         string
	}{
		{"json", "json", &sample, `{"time":"2026-11-21T08:08:07.654321Z","request_id":"abc","client":"[::1]:4711","method":"GET","host":"hello.default.localhost","path":"/a/b",` +
			`"protocol":"HTTP/1.1","tls":false,"user_agent":"Mozilla/5.0 \"x\"","status":503,"reason":"queue_full","cut":false,"bytes_in":5,"bytes_out":1099511627776,` +
			`"duration":1.234567,"queue_wait":0.000007,"cold":true,"namespace":"default","service":"hello","revision":"hello-00001","instance":"i1","trace_id":"4bf9"}`},
		{"empty json", "", &Entry{}, `{"time":"0001-01-01T00:00:00.000000Z","request_id":"","client":"","method":"","host":"","path":"","protocol":"","tls":false,"user_agent":"","status":0,` +
			`"reason":"","cut":false,"bytes_in":0,"bytes_out":0,"duration":0.000000,"queue_wait":0.000000,"cold":false,"namespace":"","service":"","revision":"","instance":"","trace_id":""}`},
		{"template", `{client} - [{time}] "{method} {path}?{query} {protocol}" {status} {bytes_out} "{user_agent}" {duration}`, &sample,
			`[::1]:4711 - [2026-11-21T08:08:07.654321Z] "GET /a/b?secret=1 HTTP/1.1" 503 1099511627776 "Mozilla/5.0 \"x\"" 1.234567`},
		{"nothing is a dash", "{client} {method} {trace_id} {status}", &Entry{}, "- - - 0"},
		{"braces", "{{{status}}}", &sample, "{503}"},
	} {
		if got := line(t, c.format, c.e); got != c.want+"\n" {
			t.Errorf("%s:\n%swant\n%s", c.name, got, c.want)
		}
	}
}

// All fields that JSON has stand in it in the order of the documentation, and a template knows each.
func TestEveryField(t *testing.T) {
	for _, f := range fields {
		if got := line(t, "{"+f.name+"}", &sample); strings.TrimSpace(got) == "" || strings.TrimSpace(got) == "-" && f.name != "referer" {
			t.Errorf("%s writes %q", f.name, got)
		}
	}
	doc, err := os.ReadFile("../../docs/observability.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fields {
		if !strings.Contains(string(doc), "| `"+f.name+"` |") {
			t.Errorf("docs/observability.md has no line for the field %s", f.name)
		}
	}
}

func TestBadFormats(t *testing.T) {
	for format, says := range map[string]string{
		"{nope}":           `no field "nope" at byte 0; there are time request_id`,
		"{status} {status": "brace at byte 9 has no partner",
		"{status}}":        "brace at byte 8 has no partner",
		"JSON":             "names no field",
		"{status}\n":       "line break at byte 8",
		"{}":               `no field "" at byte 0`,
	} {
		if _, err := parse(format); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", format, err)
		}
	}
	if _, err := New(Config{File: filepath.Join(t.TempDir(), "no", "such")}); err == nil || !strings.Contains(err.Error(), "access log") {
		t.Errorf("no folder: %v", err)
	}
}

func TestEscaping(t *testing.T) {
	for in, want := range map[string][2]string{ // JSON, template
		"a\nb\r\x00":    {`a\u000ab\u000d\u0000`, `a\x0ab\x0d\x00`},
		"\x1b[31mred":   {`\u001b[31mred`, `\x1b[31mred`},
		"\u009b31m":     {`\u009b31m`, `\xc2\x9b31m`}, // the same for terminals that know C1
		`"\`:            {`\"\\`, `\"\\`},
		"bad \xff\xc3":  {`bad \ufffd\ufffd`, `bad \xff\xc3`},
		"ü€😀":           {"ü€😀", "ü€😀"},
		"\u202egpj.exe": {`\u202egpj.exe`, `\xe2\x80\xaegpj.exe`}, // right to left
		"\u2028":        {`\u2028`, `\xe2\x80\xa8`},
		"\U000e0041":    {`\udb40\udc41`, `\xf3\xa0\x81\x81`},
		"\ufffd":        {"\ufffd", "\ufffd"},
	} {
		e := &Entry{Path: []byte(in)}
		if got := line(t, "{path}", e); got != want[1]+"\n" {
			t.Errorf("template of %q: %q, want %q", in, got, want[1])
		}
		if got := line(t, "json", e); !strings.Contains(got, `"path":"`+want[0]+`",`) {
			t.Errorf("JSON of %q: %q, want %q", in, got, want[0])
		}
	}
	long := line(t, "{path}", &Entry{Path: []byte(strings.Repeat("x", 20_000))})
	if len(long) != maxText+4 || !strings.HasSuffix(long, "...\n") {
		t.Errorf("a long path takes %d bytes", len(long))
	}
}

// Whatever a client says: one line, nothing that a terminal obeys, and JSON that says what was said.
func FuzzEscaping(f *testing.F) {
	f.Add([]byte("a\nb"), []byte("\x1b]0;x\x07"), "id")
	f.Add([]byte("\xff\xc2\x9b"), []byte(`"\u0000`), "")
	f.Add([]byte("\u202e\U000e0041"), []byte("{path}"), "")
	f.Fuzz(func(t *testing.T, path, agent []byte, id string) {
		e := &Entry{Path: path, UserAgent: agent, RequestID: id, Reason: agent}
		for _, format := range []string{"json", `{path} "{user_agent}" {request_id}`} {
			got := line(t, format, e)
			if !strings.HasSuffix(got, "\n") || !utf8.ValidString(got) {
				t.Fatalf("%q", got)
			}
			for _, r := range got[:len(got)-1] {
				if unicode.IsControl(r) || !unicode.IsPrint(r) {
					t.Fatalf("%U in %q", r, got)
				}
			}
			if format != "json" {
				continue
			}
			var back struct {
				Path  string `json:"path"`
				Agent string `json:"user_agent"`
				ID    string `json:"request_id"`
			}
			if err := json.Unmarshal([]byte(got), &back); err != nil {
				t.Fatalf("%v: %q", err, got)
			}
			for _, p := range []struct{ got, want string }{{back.Path, string(path)}, {back.Agent, string(agent)}, {back.ID, id}} {
				// The same way for both to write what is not UTF-8: one U+FFFD for each bad byte.
				if want := string([]rune(p.want)); p.got != want && len(p.want) <= maxText {
					t.Fatalf("%q came out as %q", want, p.got)
				}
			}
		}
	})
}

func FuzzTemplate(f *testing.F) {
	f.Add(`{time} "{method}" {{}} {status}`)
	f.Add("{")
	f.Fuzz(func(t *testing.T, format string) {
		parsed, err := parse(format)
		if err != nil {
			if parsed != nil {
				t.Fatal("both a format and an error")
			}
			return
		}
		p := &printer{}
		p.line(parsed, &sample)
		if strings.Count(string(p.b), "\n") != 1 {
			t.Fatalf("%q writes %q", format, p.b)
		}
	})
}

// start runs a log until stop is called.
func start(t *testing.T, l *Log) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

func newLog(t *testing.T, cfg Config) *Log {
	t.Helper()
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Everything that was taken is in the file when Run has returned, in whole lines, whoever wrote how many at once.
func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	l := newLog(t, Config{File: path, Format: "{path}", MaxBytes: 10 << 20})
	stop := start(t, l)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5000 {
				l.Write(&sample)
			}
		})
	}
	wg.Wait()
	stop()
	if got := read(t, path); got != strings.Repeat("/a/b\n", 20_000) {
		t.Errorf("%d bytes", len(got))
	}
	if w, d, f := l.Counts(); w != 20_000 || d+f != 0 {
		t.Errorf("written %d, dropped %d, failed %d", w, d, f)
	}
}

// Without the flag every line would be a system call; with it the first one is still written soon.
func TestWrittenSoon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	l := newLog(t, Config{File: path, Format: "{path}"})
	start(t, l)
	l.Write(&sample)
	for until := time.Now().Add(10 * time.Second); read(t, path) == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("nothing written in 10 s")
		}
	}
}

// logrotate: the file is moved away, SIGHUP makes us open it anew; no line is lost.
func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	l := newLog(t, Config{File: path, Format: "{path}"})
	stop := start(t, l)
	l.Write(&sample)
	for read(t, path) == "" {
		time.Sleep(time.Millisecond)
	}
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	l.Write(&sample)
	stop()
	if a, b := read(t, path+".1"), read(t, path); a != "/a/b\n" || b != "/a/b\n" {
		t.Errorf("old %q, new %q", a, b)
	}
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	if l.Reopen() == nil {
		t.Error("reopened in a folder that is gone")
	}
}

// fifo makes a pipe that nobody reads and that is full.
func fifo(t *testing.T) (path string, fill int) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	rc, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Until the pipe itself refuses: a deadline may have passed before the first byte is in it.
	filled := rc.Write(func(fd uintptr) bool {
		for err == nil {
			var n int
			n, err = syscall.Write(int(fd), make([]byte, 64<<10))
			fill += max(n, 0)
		}
		return true
	})
	if filled != nil || err != syscall.EAGAIN {
		t.Fatalf("the pipe takes %d bytes: %v, %v", fill, filled, err)
	}
	return path, fill
}

// A reader that hangs costs lines and nothing else: no writer waits, what does not fit is counted, and the end does not hang either. When the
// pipe is drained, what was kept comes.
func TestStuckPipe(t *testing.T) {
	path, fill := fifo(t)
	const room = 16 << 10
	l := newLog(t, Config{File: path, Format: "{path}", MaxBytes: room})
	stop := start(t, l)
	begin := time.Now()
	const n = 100_000
	for range n {
		l.Write(&sample)
	}
	took := time.Since(begin)
	if took > 5*time.Second {
		t.Errorf("%d lines took %v", n, took)
	}
	_, dropped, _ := l.Counts()
	if kept := n - int(dropped); kept < room/5 || kept > 3*room/5 {
		t.Errorf("%d lines kept, the buffer has room for %d", kept, room/5)
	}
	r, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.CopyN(io.Discard, r, int64(fill)); err != nil {
		t.Fatal(err)
	}
	if s, err := bufio.NewReader(r).ReadString('\n'); err != nil || s != "/a/b\n" {
		t.Errorf("%q, %v", s, err)
	}
	stop()
}

// The process can end although nobody reads.
func TestStuckPipeAtTheEnd(t *testing.T) {
	path, _ := fifo(t)
	l := newLog(t, Config{File: path})
	stop := start(t, l)
	l.Write(&sample)
	begin := time.Now()
	stop()
	if d := time.Since(begin); d < lastWords || d > lastWords+5*time.Second {
		t.Errorf("the end took %v", d)
	}
	if w, _, f := l.Counts(); w != 0 || f != 1 {
		t.Errorf("%d written, %d failed", w, f)
	}
}

// A disk that is full loses lines, counted, and the log goes on.
func TestFullDisk(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("there is no /dev/full here")
	}
	l := newLog(t, Config{File: "/dev/full"})
	stop := start(t, l)
	for range 10 {
		l.Write(&sample)
	}
	stop()
	if w, d, f := l.Counts(); w != 0 || d != 0 || f != 10 {
		t.Errorf("written %d, dropped %d, failed %d", w, d, f)
	}
}

func TestMetrics(t *testing.T) {
	l := newLog(t, Config{File: "-"})
	l.dropped.Add(3)
	var b strings.Builder
	if err := l.WriteMetrics(&b); err != nil || !strings.Contains(b.String(), `{outcome="buffer_full"} 3`) {
		t.Errorf("%v\n%s", err, &b)
	}
}

func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools forget")
	}
	for _, format := range []string{"json", "{time} {client} {path} {user_agent} {duration}"} {
		l := newLog(t, Config{File: os.DevNull, Format: format})
		l.buf = make([]byte, 0, l.cfg.MaxBytes)
		l.Write(&sample)
		if n := testing.AllocsPerRun(1000, func() { l.Write(&sample) }); n >= 1 {
			t.Errorf("%s: %v allocations", format, n)
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	for _, format := range []string{"json", `{client} [{time}] "{method} {path} {protocol}" {status} {bytes_out} {duration}`} {
		name, _, _ := strings.Cut(format, " ")
		b.Run(name, func(b *testing.B) {
			l, err := New(Config{File: os.DevNull, Format: format})
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error)
			go func() { done <- l.Run(ctx) }()
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				e := sample
				for pb.Next() {
					l.Write(&e)
				}
			})
			cancel()
			<-done
			_, dropped, _ := l.Counts()
			b.ReportMetric(float64(dropped)/float64(b.N), "dropped/op")
		})
	}
}
