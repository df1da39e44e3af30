// Package logs keeps what functions print. An instance writes straight into its two files (opened for appending and handed
// over as stdout and stderr), so nothing is lost when the agent dies; this package looks at the files' sizes, rotates them,
// deletes old ones, and reads them for people.
//
// Files of one instance: DIR/NAMESPACE/REVISION/INSTANCE.stdout.log, the one before as .1, the same for stderr. A file is
// rotated by copying its end and truncating it, the only way that a writer who knows nothing of it goes along with; a
// line written between the two is lost.
package logs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"
)

// Config bounds the store. Zero = default.
type Config struct {
	Dir           string        // required
	FileBytes     int64         // a file is rotated when it is larger; 10 MiB. An instance has up to four such files
	RevisionBytes int64         // all logs of a revision's ended instances; 64 MiB
	TotalBytes    int64         // all logs of ended instances; 1 GiB
	KeepEnded     int           // ended instances per revision; 20
	KeepFor       time.Duration // logs of ended instances; 7 days
	Poll          time.Duration // between looks at the sizes; 1 s, and a twentieth of it while a file grows fast
	Log           *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.FileBytes <= 0 {
		c.FileBytes = 10 << 20
	}
	if c.RevisionBytes <= 0 {
		c.RevisionBytes = 64 << 20
	}
	if c.TotalBytes <= 0 {
		c.TotalBytes = 1 << 30
	}
	if c.KeepEnded <= 0 {
		c.KeepEnded = 20
	}
	if c.KeepFor <= 0 {
		c.KeepFor = 7 * 24 * time.Hour
	}
	if c.Poll <= 0 {
		c.Poll = time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Key names an instance's logs.
type Key struct{ Namespace, Revision, Instance string }

// Streams of an instance.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

var streams = [...]string{Stdout, Stderr}

// Store keeps the logs of one data folder.
type Store struct {
	cfg Config

	mu    sync.Mutex
	live  map[string]*file // by path: files of instances that have not ended
	dirty bool             // something ended since the last clean-up
}

// file is what is known of one live file. Positions count from where the file began when it was opened, through all
// rotations: base is the position of the file's first byte now, and the one before it holds before bytes up to base.
type file struct {
	mu     sync.Mutex // held while rotating and while reading
	path   string
	base   int64
	before int64
	size   int64  // at the last look
	marks  []mark // when it had grown
}

// mark says that everything before the position at had been written at the given time.
type mark struct {
	at   int64
	when time.Time
}

// maxMarks bounds the memory for the times of one file; when it is full every second one is forgotten.
const maxMarks = 1024

// New opens the store.
func New(cfg Config) (*Store, error) {
	cfg = cfg.withDefaults()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("logs: %w", err)
	}
	return &Store{cfg: cfg, live: map[string]*file{}, dirty: true}, nil
}

func (s *Store) path(k Key, stream string) string {
	return filepath.Join(s.cfg.Dir, k.Namespace, k.Revision, k.Instance+"."+stream+".log")
}

// serviceFile, in a revision's folder, holds the name of the service that a revision belongs to.
const serviceFile = "service"

// SetRevision makes the folder of a revision's logs ahead of its first instance and notes its service.
func (s *Store) SetRevision(namespace, revision, service string) error {
	dir := filepath.Join(s.cfg.Dir, namespace, revision)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("logs: %w", err)
	}
	if old, err := os.ReadFile(filepath.Join(dir, serviceFile)); err == nil && string(old) == service {
		return nil
	}
	if err := os.WriteFile(filepath.Join(dir, serviceFile), []byte(service), 0o600); err != nil {
		return fmt.Errorf("logs: %w", err)
	}
	return nil
}

// Place moves the two files that a new instance writes to, which must be on the same file system, to the logs and begins to
// look after them.
func (s *Store) Place(k Key, service, stdout, stderr string) error {
	for i, from := range []string{stdout, stderr} {
		err := os.Rename(from, s.path(k, streams[i]))
		if errors.Is(err, os.ErrNotExist) { // the folder was cleaned up meanwhile
			if err = s.SetRevision(k.Namespace, k.Revision, service); err == nil {
				err = os.Rename(from, s.path(k, streams[i]))
			}
		}
		if err != nil {
			return fmt.Errorf("logs: %w", err)
		}
	}
	s.Track(k)
	return nil
}

// Track begins to look after the files of a running instance; Place does it, and whoever adopts an instance must.
func (s *Store) Track(k Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, stream := range streams {
		p := s.path(k, stream)
		if s.live[p] == nil {
			s.live[p] = openFile(p)
		}
	}
}

func openFile(path string) *file {
	f := &file{path: path}
	if fi, err := os.Stat(path); err == nil && fi.Size() > 0 {
		f.size = fi.Size()
		f.marks = append(f.marks, mark{f.size, fi.ModTime()})
	}
	if fi, err := os.Stat(path + ".1"); err == nil {
		f.before = fi.Size()
	}
	return f
}

// Ended says that the instance is gone: its logs are kept within the bounds for ended ones.
func (s *Store) Ended(k Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, stream := range streams {
		p := s.path(k, stream)
		if f := s.live[p]; f != nil {
			f.look(s.cfg.FileBytes, time.Now())
			delete(s.live, p)
		}
	}
	s.dirty = true
}

// Run looks after the files until ctx ends. Followers and LastWords work without it; the bounds do not.
func (s *Store) Run(ctx context.Context) error {
	wait := s.cfg.Poll
	for {
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		wait = s.cfg.Poll
		if s.look(time.Now()) {
			wait = s.cfg.Poll / 20
		}
		s.mu.Lock()
		dirty := s.dirty
		s.dirty = false
		s.mu.Unlock()
		if dirty {
			if err := s.clean(time.Now()); err != nil {
				s.cfg.Log.Warn("cannot clean up logs", "err", err)
			}
		}
	}
}

// look checks all live files and says whether one grows so fast that the next look should be soon.
func (s *Store) look(now time.Time) (fast bool) {
	s.mu.Lock()
	files := make([]*file, 0, len(s.live))
	for _, f := range s.live {
		files = append(files, f)
	}
	s.mu.Unlock()
	for _, f := range files {
		grown, err := f.look(s.cfg.FileBytes, now)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			s.cfg.Log.Warn("cannot rotate a log", "file", f.path, "err", err)
		}
		fast = fast || grown > s.cfg.FileBytes/10
	}
	return fast
}

// look notes how far the file has grown and rotates it when it is too large.
func (f *file) look(limit int64, now time.Time) (grown int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fi, err := os.Stat(f.path)
	if err != nil {
		return 0, err
	}
	grown = fi.Size() - f.size
	f.size = fi.Size()
	if grown != 0 {
		f.markLocked(f.base+f.size, now)
	}
	if f.size <= limit {
		return grown, nil
	}
	kept, err := keepEnd(f.path, f.size, limit)
	if err != nil {
		return grown, err
	}
	if err := os.Truncate(f.path, 0); err != nil {
		return grown, err
	}
	f.base += f.size
	f.before, f.size = kept, 0
	return grown, nil
}

func (f *file) markLocked(at int64, when time.Time) {
	if len(f.marks) >= maxMarks {
		for i := range maxMarks / 2 {
			f.marks[i] = f.marks[2*i+1]
		}
		f.marks = f.marks[:maxMarks/2]
	}
	f.marks = append(f.marks, mark{at, when})
}

// whenLocked returns when the byte at the position had been written at the latest; zero = not known.
func (f *file) whenLocked(at int64) time.Time {
	i := sort.Search(len(f.marks), func(i int) bool { return f.marks[i].at > at })
	if i == len(f.marks) {
		return time.Time{}
	}
	return f.marks[i].when
}

// keepEnd copies the last limit bytes of a file to its .1.
func keepEnd(path string, size, limit int64) (int64, error) {
	in, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	if _, err := in.Seek(max(0, size-limit), io.SeekStart); err != nil {
		return 0, err
	}
	out, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(out, io.LimitReader(in, min(size, limit)))
	if err = errors.Join(err, out.Close()); err != nil {
		os.Remove(path + ".tmp")
		return 0, err
	}
	return n, os.Rename(path+".tmp", path+".1")
}

// ended is the logs of one ended instance on disk.
type ended struct {
	dir, instance string
	bytes         int64
	last          time.Time
}

// clean deletes logs of ended instances that are beyond a bound, the oldest first.
func (s *Store) clean(now time.Time) error {
	s.mu.Lock()
	live := make(map[string]bool, len(s.live))
	for p := range s.live {
		live[p] = true
	}
	s.mu.Unlock()

	byInstance := map[string]*ended{}
	err := filepath.WalkDir(s.cfg.Dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == serviceFile {
			return nil // what vanishes meanwhile needs no cleaning
		}
		instance, current, ok := parseName(d.Name())
		dir := filepath.Dir(p)
		if !ok || live[filepath.Join(dir, current)] {
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return nil
		}
		key := filepath.Join(dir, instance)
		e := byInstance[key]
		if e == nil {
			e = &ended{dir: dir, instance: instance}
			byInstance[key] = e
		}
		e.bytes += fi.Size()
		if fi.ModTime().After(e.last) {
			e.last = fi.ModTime()
		}
		return nil
	})
	if err != nil {
		return err
	}
	all := make([]*ended, 0, len(byInstance))
	for _, e := range byInstance {
		all = append(all, e)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].last.After(all[j].last) })
	s.removeEmpty(now)
	var total int64
	count, bytes := map[string]int{}, map[string]int64{}
	for _, e := range all {
		count[e.dir]++
		bytes[e.dir] += e.bytes
		total += e.bytes
		if count[e.dir] > s.cfg.KeepEnded || bytes[e.dir] > s.cfg.RevisionBytes || total > s.cfg.TotalBytes || now.Sub(e.last) > s.cfg.KeepFor {
			bytes[e.dir] -= e.bytes
			total -= e.bytes
			for _, stream := range streams {
				p := filepath.Join(e.dir, e.instance+"."+stream+".log")
				_, _, _ = os.Remove(p), os.Remove(p+".1"), os.Remove(p+".tmp")
			}
		}
	}
	return nil
}

// removeEmpty deletes folders of revisions that have had no logs for as long as logs are kept. A revision that is still in use
// gets its folder back with its next instance.
func (s *Store) removeEmpty(now time.Time) {
	dirs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "*", "*"))
	for _, dir := range dirs {
		fi, err := os.Stat(dir)
		if err != nil || now.Sub(fi.ModTime()) < s.cfg.KeepFor {
			continue
		}
		if entries, err := os.ReadDir(dir); err == nil && (len(entries) == 0 || len(entries) == 1 && entries[0].Name() == serviceFile) {
			_ = os.Remove(filepath.Join(dir, serviceFile))
			_ = os.Remove(dir) // fails when something has been put there since
		}
	}
}

// parseName takes INSTANCE.STREAM.log or one of its companions apart; current is the name of the file being written.
func parseName(name string) (instance, current string, ok bool) {
	current = strings.TrimSuffix(strings.TrimSuffix(name, ".1"), ".tmp")
	for _, stream := range streams {
		if instance, ok = strings.CutSuffix(current, "."+stream+".log"); ok {
			return instance, current, true
		}
	}
	return "", "", false
}
