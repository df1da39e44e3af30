package logs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Query selects lines. An empty field selects all.
type Query struct {
	Namespace string
	Service   string
	Revision  string
	Instance  string
	Tail      int       // begin with the last so many lines of each stream of each instance; 0 = all, below 0 = none
	Since     time.Time // leave out lines that are known to be older
	Follow    bool      // go on until the context ends, also with instances that start later
}

// Line is one line that a function printed.
type Line struct {
	Time      time.Time `json:"time,omitzero"` // when it had been written at the latest, as far as is known (to Config.Poll)
	Namespace string    `json:"namespace"`
	Revision  string    `json:"revision"`
	Instance  string    `json:"instance"`
	Stream    string    `json:"stream"` // Stdout or Stderr
	Text      string    `json:"text"`   // valid UTF-8, without the line's end
}

const (
	// MaxLine is where a longer line is cut into several, in bytes.
	MaxLine = 64 << 10
	// followPoll is how often followed files are looked at.
	followPoll = 100 * time.Millisecond
)

// Read returns the selected lines: instance by instance, the oldest first, and with Follow whatever is written from then on.
// The sequence ends with ctx, which is no error when following.
func (s *Store) Read(ctx context.Context, q Query) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		readers := map[string]*reader{}
		for first := true; ; first = false {
			if ctx.Err() != nil {
				if !q.Follow {
					yield(Line{}, ctx.Err())
				}
				return
			}
			found, err := s.find(q)
			if err != nil {
				yield(Line{}, err)
				return
			}
			seen := map[string]bool{}
			for _, t := range found {
				seen[t.path] = true
				r := readers[t.path]
				if r == nil {
					r = &reader{target: t, file: s.fileOf(t.path)}
					readers[t.path] = r
					// An instance that appears while following is read from its start.
					if err := r.begin(q, first); err != nil {
						continue // deleted this moment
					}
				}
				_, live := s.isLive(t.path)
				if !r.lines(q, !q.Follow || !live, yield) {
					return
				}
			}
			for p := range readers {
				if !seen[p] {
					delete(readers, p)
				}
			}
			if !q.Follow {
				return
			}
			t := time.NewTimer(followPoll)
			select {
			case <-ctx.Done():
			case <-t.C:
			}
			t.Stop()
		}
	}
}

// target is one file that a query selects.
type target struct {
	path                                  string
	namespace, revision, instance, stream string
	last                                  time.Time
}

// find lists the selected files. Names of a query are compared with what is on disk, never joined to paths.
func (s *Store) find(q Query) ([]target, error) {
	var found []target
	namespaces, err := subdirs(s.cfg.Dir, q.Namespace)
	if err != nil {
		return nil, fmt.Errorf("logs: %w", err)
	}
	for _, ns := range namespaces {
		revisions, _ := subdirs(filepath.Join(s.cfg.Dir, ns), q.Revision)
		for _, rev := range revisions {
			dir := filepath.Join(s.cfg.Dir, ns, rev)
			if q.Service != "" {
				if b, _ := os.ReadFile(filepath.Join(dir, serviceFile)); string(b) != q.Service {
					continue
				}
			}
			entries, _ := os.ReadDir(dir)
			for _, e := range entries {
				instance, current, ok := parseName(e.Name())
				if !ok || current != e.Name() || (q.Instance != "" && instance != q.Instance) {
					continue
				}
				fi, err := e.Info()
				if err != nil || fi.ModTime().Before(q.Since) {
					continue
				}
				stream := strings.TrimSuffix(strings.TrimPrefix(current, instance+"."), ".log")
				found = append(found, target{filepath.Join(dir, current), ns, rev, instance, stream, fi.ModTime()})
			}
		}
	}
	last := map[string]time.Time{} // of an instance's two files together
	for _, t := range found {
		if t.last.After(last[t.instance]) {
			last[t.instance] = t.last
		}
	}
	slices.SortStableFunc(found, func(x, y target) int {
		return cmp.Or(last[x.instance].Compare(last[y.instance]), strings.Compare(x.instance, y.instance),
			strings.Compare(y.stream, x.stream)) // stdout before stderr
	})
	return found, nil
}

func subdirs(dir, only string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && (only == "" || e.Name() == only) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (s *Store) isLive(path string) (*file, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.live[path]
	return f, ok
}

func (s *Store) fileOf(path string) *file {
	if f, ok := s.isLive(path); ok {
		return f
	}
	return openFile(path)
}

// reader is one query's place in one file.
type reader struct {
	target
	file *file
	pos  int64  // of the next byte to read, by file's count
	part []byte // of a line that is not complete
	at   int64  // position where part began
}

// begin goes to where the query starts reading.
func (r *reader) begin(q Query, first bool) error {
	r.file.mu.Lock()
	defer r.file.mu.Unlock()
	r.pos = r.file.base - r.file.before
	if q.Tail != 0 && first {
		fi, err := os.Stat(r.path)
		if err != nil {
			return err
		}
		end := r.file.base + fi.Size()
		if q.Tail < 0 {
			r.pos = end
		} else {
			r.pos = r.tailLocked(end, q.Tail)
		}
	}
	r.at = r.pos
	return nil
}

// tailLocked finds where the last n lines begin, reading backwards.
func (r *reader) tailLocked(end int64, n int) int64 {
	start := r.file.base - r.file.before
	buf := make([]byte, 32<<10)
	for pos := end; pos > start; {
		from := max(start, pos-int64(len(buf)))
		got, err := r.readLocked(buf[:pos-from], from)
		if err != nil || int64(got) < pos-from {
			return from
		}
		for i := got - 1; i >= 0; i-- {
			if buf[i] != '\n' || from+int64(i) == end-1 {
				continue
			}
			if n--; n == 0 {
				return from + int64(i) + 1
			}
		}
		pos = from
	}
	return start
}

// readLocked fills b from the position pos, which may lie in the file before. It returns less only at the end.
func (r *reader) readLocked(b []byte, pos int64) (int, error) {
	total := 0
	for total < len(b) {
		path, off, room := r.path, pos-r.file.base, int64(len(b)-total)
		if off < 0 {
			path, off, room = r.path+".1", r.file.before+off, min(room, -off)
		}
		f, err := os.Open(path)
		if err != nil {
			return total, err
		}
		n, err := f.ReadAt(b[total:total+int(room)], off)
		f.Close()
		total += n
		pos += int64(n)
		if err != nil && err != io.EOF {
			return total, err
		}
		if n == 0 {
			break
		}
	}
	return total, nil
}

// lines yields what has been written since the last call; with final also a last line without an end.
func (r *reader) lines(q Query, final bool, yield func(Line, error) bool) bool {
	buf := make([]byte, 64<<10)
	for {
		r.file.mu.Lock()
		if oldest := r.file.base - r.file.before; r.pos < oldest {
			// It was rotated away under a slow reader.
			r.pos, r.at, r.part = oldest, oldest, nil
		}
		n, err := r.readLocked(buf, r.pos)
		r.file.mu.Unlock()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return yield(Line{}, fmt.Errorf("logs: %w", err))
		}
		if n == 0 {
			break
		}
		r.pos += int64(n)
		for rest := buf[:n]; len(rest) > 0; {
			piece, after, ended := bytes.Cut(rest, []byte{'\n'})
			r.part = append(r.part, piece...)
			rest = after
			for len(r.part) > MaxLine {
				head := r.part[:MaxLine]
				if !r.emit(q, head, yield) {
					return false
				}
				r.part = append([]byte(nil), r.part[MaxLine:]...)
				r.at += MaxLine
			}
			if !ended {
				break
			}
			if !r.emit(q, r.part, yield) {
				return false
			}
			r.at += int64(len(r.part)) + 1
			r.part = r.part[:0]
		}
	}
	if final && len(r.part) > 0 {
		if !r.emit(q, r.part, yield) {
			return false
		}
		r.at += int64(len(r.part))
		r.part = r.part[:0]
	}
	return true
}

func (r *reader) emit(q Query, text []byte, yield func(Line, error) bool) bool {
	r.file.mu.Lock()
	when := r.file.whenLocked(r.at)
	r.file.mu.Unlock()
	if when.IsZero() {
		when = time.Now() // written since the last look
	}
	if when.Before(q.Since) {
		return true
	}
	return yield(Line{
		Time: when, Namespace: r.namespace, Revision: r.revision, Instance: r.instance, Stream: r.stream,
		Text: strings.ToValidUTF8(string(bytes.TrimSuffix(text, []byte{'\r'})), "\uFFFD"),
	}, nil)
}

const (
	lastWordsLines = 5
	lastWordsBytes = 1000
)

// LastWords returns the end of what an instance printed, on one line: of stderr, or of stdout where that is silent. At most
// five lines and 1,000 bytes, without control characters.
func (s *Store) LastWords(k Key) string {
	for _, stream := range []string{Stderr, Stdout} {
		if words := lastWords(s.path(k, stream)); words != "" {
			return words
		}
	}
	return ""
}

func lastWords(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return ""
	}
	buf := make([]byte, 4*lastWordsBytes)
	n, _ := f.ReadAt(buf, max(0, fi.Size()-int64(len(buf))))
	return oneLine(buf[:n])
}

// escapes are terminal sequences, colours mostly.
var escapes = regexp.MustCompile("\x1b\\[[0-9;?]*[ -/]*[@-~]")

// oneLine joins the last lines of output into one that can stand in a header or a condition.
func oneLine(out []byte) string {
	text := escapes.ReplaceAllString(strings.ToValidUTF8(string(out), "\uFFFD"), "")
	var last []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(strings.Map(func(r rune) rune {
			if unicode.IsControl(r) {
				return ' '
			}
			return r
		}, line))
		if line != "" {
			last = append(last, line)
		}
	}
	last = last[max(0, len(last)-lastWordsLines):]
	joined := strings.Join(last, " | ")
	if cut := len(joined) - lastWordsBytes; cut > 0 {
		joined = "…" + strings.ToValidUTF8(joined[cut+len("…"):], "")
	}
	return joined
}
