// Package accesslog writes one line per request, as JSON or by a template, without ever making a request wait for it.
//
// A line is put together when its answer is over and appended to a bounded buffer in memory; one goroutine writes what has gathered. When the
// disk or the reader of the pipe does not keep up, whole lines are dropped and counted. What clients say is escaped so that it
// can neither begin a line of its own nor talk to a terminal.
package accesslog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Config describes a Log.
type Config struct {
	File     string // path; "-" = standard output
	Format   string // "json", or a template; "" = json
	MaxBytes int    // lines that wait for the writer; 1 MiB; more are dropped
	Log      *slog.Logger
}

const (
	gather    = 200 * time.Millisecond // how long the first of some lines waits for others, so that not each costs a system call
	enough    = 64 << 10               // bytes that are written without waiting
	lastWords = time.Second            // for the last lines on shutdown
	complain  = time.Minute            // between two complaints that lines cannot be written
)

// Log is an access log. Make one with New; lines are written while Run runs.
type Log struct {
	cfg    Config // static after New
	format []field

	some, many chan struct{} // the buffer is no longer empty; it has enough

	mu    sync.Mutex // guards buf and lines
	buf   []byte
	lines uint64

	fileMu sync.Mutex // guards file; it is not held while writing
	file   *os.File

	written, dropped, failed atomic.Uint64
}

// New opens the file and reads the format; both are checked here, so that a mistake is found at the start.
func New(cfg Config) (*Log, error) {
	format, err := parse(cfg.Format)
	if err != nil {
		return nil, err
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = 1 << 20
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l := &Log{cfg: cfg, format: format, some: make(chan struct{}, 1), many: make(chan struct{}, 1)}
	l.file, err = open(cfg.File)
	return l, err
}

func open(path string) (*os.File, error) {
	if path == "-" {
		return os.Stdout, nil
	}
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND
	if st, err := os.Stat(path); err == nil && st.Mode()&os.ModeNamedPipe != 0 {
		flags = os.O_RDWR // opening a pipe for writing alone waits for its reader
	}
	f, err := os.OpenFile(path, flags, 0o640)
	if err != nil {
		return nil, fmt.Errorf("access log: %w", err)
	}
	return f, nil
}

// Reopen opens the file anew, after logrotate has moved it away. When that fails the old one stays. Standard output stays what it is.
func (l *Log) Reopen() error {
	if l.cfg.File == "-" {
		return nil
	}
	f, err := open(l.cfg.File)
	if err != nil {
		return err
	}
	l.fileMu.Lock()
	old := l.file
	l.file = f
	l.fileMu.Unlock()
	return old.Close() // a write that hangs in a pipe ends by this, and goes on in the new file
}

func (l *Log) current() *os.File {
	l.fileMu.Lock()
	defer l.fileMu.Unlock()
	return l.file
}

var printers = sync.Pool{New: func() any { return new(printer) }}

// Write takes a line. It does not wait for anything but other callers' copying, and keeps nothing of e.
func (l *Log) Write(e *Entry) {
	p := printers.Get().(*printer)
	defer printers.Put(p)
	p.line(l.format, e)
	l.mu.Lock()
	before := len(l.buf)
	if before+len(p.b) > l.cfg.MaxBytes {
		l.mu.Unlock()
		l.dropped.Add(1)
		return
	}
	l.buf = append(l.buf, p.b...)
	l.lines++
	after := len(l.buf)
	l.mu.Unlock()
	if before == 0 {
		signal(l.some)
	}
	if before < enough && after >= enough {
		signal(l.many)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run writes until ctx ends, and then what is left, for at most a second: a reader that does not read must not keep the process.
func (l *Log) Run(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.write(ctx)
	}()
	<-ctx.Done()
	if ended(done) {
		return l.close()
	}
	l.cfg.Log.Warn("access log: its last lines are lost, nobody takes them")
	err := l.close() // ends a write that hangs in a pipe
	if l.cfg.File != "-" {
		ended(done) // what hangs on in the disk or on standard output ends with the process
	}
	return err
}

// ended waits for a last word.
func ended(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	case <-time.After(lastWords):
		return false
	}
}

// close closes a file that is ours.
func (l *Log) close() error {
	if l.cfg.File == "-" {
		return nil
	}
	return l.current().Close()
}

// write is the writer's loop.
func (l *Log) write(ctx context.Context) {
	var spare []byte
	var torn bool // the last write broke off within a line
	var complained time.Time
	timer := time.NewTimer(gather)
	defer timer.Stop()
	for {
		select {
		case <-l.some:
			timer.Reset(gather)
			select {
			case <-timer.C:
			case <-l.many:
			case <-ctx.Done():
			}
		case <-ctx.Done():
		}
		l.mu.Lock()
		batch, lines := l.buf, l.lines
		l.buf, l.lines = spare[:0], 0
		l.mu.Unlock()
		spare = batch
		if len(batch) == 0 {
			if ctx.Err() != nil {
				return
			}
			continue
		}
		lost, err := l.out(batch, &torn)
		l.written.Add(lines - lost)
		l.failed.Add(lost)
		if err != nil && time.Since(complained) > complain {
			complained = time.Now()
			l.cfg.Log.Error("access log: lines are lost", "file", l.cfg.File, "error", err)
		}
	}
}

// out writes whole lines and says how many could not be. A line that a full disk cut off is ended before the next one.
func (l *Log) out(batch []byte, torn *bool) (lost uint64, err error) {
	for {
		f := l.current()
		if *torn {
			if _, err = f.Write([]byte{'\n'}); err != nil && f == l.current() {
				return uint64(bytes.Count(batch, newline)), err
			}
			*torn = false
		}
		n, err := f.Write(batch)
		if err == nil {
			return 0, nil
		}
		*torn = n > 0 && batch[n-1] != '\n'
		if f != l.current() && errors.Is(err, os.ErrClosed) { // reopened meanwhile: a new file, which has no torn line
			*torn = false
			batch = batch[bytes.LastIndexByte(batch[:n], '\n')+1:]
			continue
		}
		return uint64(bytes.Count(batch[n:], newline)), err
	}
}

var newline = []byte{'\n'}

// Counts returns how many lines were written, dropped because the buffer was full, and lost because writing failed.
func (l *Log) Counts() (written, dropped, failed uint64) {
	return l.written.Load(), l.dropped.Load(), l.failed.Load()
}

// WriteMetrics writes the counts in Prometheus' text format.
func (l *Log) WriteMetrics(w io.Writer) error {
	written, dropped, failed := l.Counts()
	_, err := fmt.Fprintf(w, `# HELP thaw_access_log_lines_total Lines of the access log, by what became of them.
# TYPE thaw_access_log_lines_total counter
thaw_access_log_lines_total{outcome="written"} %d
thaw_access_log_lines_total{outcome="buffer_full"} %d
thaw_access_log_lines_total{outcome="write_failed"} %d
`, written, dropped, failed)
	return err
}
