package logs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func newStore(t *testing.T, adapt func(*Config)) *Store {
	t.Helper()
	cfg := Config{Dir: t.TempDir()}
	if adapt != nil {
		adapt(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// place begins an instance's logs and returns the files that it would write to.
func place(t *testing.T, s *Store, k Key, service string) (stdout, stderr *os.File) {
	t.Helper()
	dir := t.TempDir()
	var fs [2]*os.File
	for i, stream := range streams {
		f, err := os.OpenFile(filepath.Join(dir, stream), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		fs[i] = f
	}
	if err := s.Place(k, service, fs[0].Name(), fs[1].Name()); err != nil {
		t.Fatal(err)
	}
	return fs[0], fs[1]
}

func texts(t *testing.T, s *Store, q Query) []string {
	t.Helper()
	var out []string
	for l, err := range s.Read(context.Background(), q) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, l.Text)
	}
	return out
}

func want(t *testing.T, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("lines %q, want %q", got, want)
	}
}

func TestSelection(t *testing.T) {
	s := newStore(t, nil)
	a := Key{"default", "a-00001", "a-00001-x"}
	out, errs := place(t, s, a, "a")
	other, _ := place(t, s, Key{"other", "a-00001", "a-00001-y"}, "a")
	fmt.Fprint(out, "one\r\ntwo\nwithout end")
	fmt.Fprint(errs, "bad \xff byte\n")
	fmt.Fprint(other, "elsewhere\n")

	want(t, texts(t, s, Query{Namespace: "default", Revision: "a-00001"}), "one", "two", "without end", "bad \uFFFD byte")
	want(t, texts(t, s, Query{Namespace: "default", Service: "a", Tail: 1}), "without end", "bad \uFFFD byte")
	want(t, texts(t, s, Query{Namespace: "default", Instance: "a-00001-x", Tail: 2}), "two", "without end", "bad \uFFFD byte")
	want(t, texts(t, s, Query{Namespace: "other"}), "elsewhere")
	want(t, texts(t, s, Query{Tail: -1}))
	want(t, texts(t, s, Query{Service: "b"}))
	want(t, texts(t, s, Query{Namespace: "..", Revision: "../..", Instance: "/etc/passwd"}))
	for l := range s.Read(context.Background(), Query{Namespace: "other"}) {
		if l.Namespace != "other" || l.Revision != "a-00001" || l.Instance != "a-00001-y" || l.Stream != Stdout || l.Time.IsZero() {
			t.Errorf("%+v", l)
		}
	}
	// What an instance wrote stays readable after its end and after a restart.
	s.Ended(a)
	again, err := New(Config{Dir: s.cfg.Dir})
	if err != nil {
		t.Fatal(err)
	}
	want(t, texts(t, again, Query{Namespace: "default"}), "one", "two", "without end", "bad \uFFFD byte")
}

func TestSince(t *testing.T) {
	s := newStore(t, nil)
	out, _ := place(t, s, Key{"d", "r", "r-x"}, "r")
	fmt.Fprintln(out, "old")
	hour := time.Now().Add(-time.Hour)
	s.look(hour)
	fmt.Fprintln(out, "new")
	s.look(time.Now())
	want(t, texts(t, s, Query{Since: time.Now().Add(-time.Minute)}), "new")
	want(t, texts(t, s, Query{Since: hour.Add(-time.Minute)}), "old", "new")
	want(t, texts(t, s, Query{Since: time.Now().Add(time.Minute)}))
}

func TestRotation(t *testing.T) {
	s := newStore(t, func(c *Config) { c.FileBytes = 1000 })
	k := Key{"d", "r", "r-x"}
	out, _ := place(t, s, k, "r")
	path := s.path(k, Stdout)
	for i := range 1000 {
		fmt.Fprintf(out, "line %05d\n", i)
		if i%20 == 19 {
			s.look(time.Now())
		}
		if fi, _ := os.Stat(path); fi.Size() > 1000+20*11 {
			t.Fatalf("%d bytes after a look", fi.Size())
		}
	}
	if fi, err := os.Stat(path + ".1"); err != nil || fi.Size() != 1000 {
		t.Fatalf("the file before: %v, %v", fi, err)
	}
	lines := texts(t, s, Query{})
	if len(lines) < 90 || lines[len(lines)-1] != "line 00999" {
		t.Errorf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
	for i, l := range lines[1:] { // the first may have been cut
		if i > 0 && l <= lines[i] {
			t.Errorf("%q after %q", l, lines[i])
		}
	}
	want(t, texts(t, s, Query{Tail: 50})[:1], "line 00950")
}

// TestFollow reads everything exactly once while it is written and rotated, and finds instances that start later.
func TestFollow(t *testing.T) {
	s := newStore(t, func(c *Config) { c.FileBytes = 250_000 })
	k := Key{"d", "r", "r-x"}
	out, _ := place(t, s, k, "r")
	fmt.Fprintln(out, "before")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	got := make(chan string, 5000)
	done := make(chan error, 1)
	go func() {
		for l, err := range s.Read(ctx, Query{Follow: true, Tail: 1}) {
			if err != nil {
				done <- err
				return
			}
			got <- l.Text
		}
		done <- nil
	}()
	expect := func(want string) {
		t.Helper()
		select {
		case l := <-got:
			if l != want {
				t.Fatalf("got %q, want %q", l, want)
			}
		case <-ctx.Done():
			t.Fatalf("%q did not come", want)
		}
	}
	expect("before")
	// As long as the follower keeps up, no rotation makes it lose or repeat a line.
	for batch := range 15 {
		for i := range 200 {
			fmt.Fprintf(out, "%02d-%03d %s\n", batch, i, strings.Repeat("x", 1000))
		}
		if batch%2 == 0 {
			s.look(time.Now())
		}
		for i := range 200 {
			expect(fmt.Sprintf("%02d-%03d %s", batch, i, strings.Repeat("x", 1000)))
		}
		if batch%2 == 1 {
			s.look(time.Now())
		}
	}
	if _, err := os.Stat(s.path(k, Stdout) + ".1"); err != nil {
		t.Errorf("nothing was rotated: %v", err)
	}
	fmt.Fprint(out, "half")
	late, _ := place(t, s, Key{"d", "r", "r-later"}, "r")
	fmt.Fprintln(late, "later")
	expect("later")
	fmt.Fprintln(out, " and half")
	expect("half and half")
	fmt.Fprint(out, "last words")
	s.Ended(k)
	expect("last words")
	cancel()
	if err := <-done; err != nil {
		t.Errorf("a follower that leaves: %v", err)
	}
}

func TestBoundsForEndedInstances(t *testing.T) {
	s := newStore(t, func(c *Config) { c.KeepEnded, c.RevisionBytes, c.TotalBytes = 3, 2000, 3500 })
	old := time.Now().Add(-time.Hour)
	for rev := range 2 {
		for i := range 6 {
			k := Key{"d", fmt.Sprint("r", rev), fmt.Sprintf("r%d-%d", rev, i)}
			out, _ := place(t, s, k, "r")
			out.WriteString(strings.Repeat("x", 900))
			if i > 0 { // number 0 still runs, and is the oldest
				s.Ended(k)
			}
			for _, stream := range streams {
				os.Chtimes(s.path(k, stream), old, old.Add(time.Duration(10*rev+i)*time.Minute))
			}
		}
	}
	if err := s.clean(time.Now()); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "d", "*", "*.stdout.log"))
	var names []string
	for _, l := range left {
		names = append(names, strings.TrimSuffix(filepath.Base(l), ".stdout.log"))
	}
	// 2,000 bytes are two ended ones for each revision, 3,500 in all are three.
	want(t, names, "r0-0", "r0-5", "r1-0", "r1-4", "r1-5")

	s.cfg.KeepFor = time.Nanosecond
	if err := s.clean(time.Now()); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "d", "*", "*.log")); len(left) != 4 {
		t.Errorf("after their time: %v, want only the two that run", left)
	}
}

func TestLastWords(t *testing.T) {
	s := newStore(t, nil)
	k := Key{"d", "r", "r-x"}
	out, errs := place(t, s, k, "r")
	if got := s.LastWords(k); got != "" {
		t.Errorf("of a silent one: %q", got)
	}
	fmt.Fprintln(out, "only on stdout")
	if got := s.LastWords(k); got != "only on stdout" {
		t.Errorf("%q", got)
	}
	fmt.Fprint(errs, "one\n\ntwo\nthree\nfour\n\x1b[1;31mfive\x1b[0m\tfive\x00\r\n\xffsix\n")
	if got := s.LastWords(k); got != "two | three | four | five five | \uFFFDsix" {
		t.Errorf("%q", got)
	}
	fmt.Fprint(errs, strings.Repeat("ä", 5000))
	if got := s.LastWords(k); len(got) > lastWordsBytes || !utf8.ValidString(got) || !strings.HasPrefix(got, "…ä") {
		t.Errorf("%d bytes: %q…", len(got), got[:20])
	}
}

func TestLongLine(t *testing.T) {
	s := newStore(t, nil)
	out, _ := place(t, s, Key{"d", "r", "r-x"}, "r")
	out.WriteString(strings.Repeat("x", 2*MaxLine+10) + "\n" + "y\n")
	lines := texts(t, s, Query{})
	if len(lines) != 4 || len(lines[0]) != MaxLine || len(lines[2]) != 10 || lines[3] != "y" {
		t.Errorf("%d lines", len(lines))
	}
}

func FuzzOneLine(f *testing.F) {
	f.Add([]byte("a\n\x1b[31mb\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got := oneLine(b)
		if len(got) > lastWordsBytes || !utf8.ValidString(got) || strings.ContainsAny(got, "\n\r\x1b\x00") {
			t.Errorf("%q became %q", b, got)
		}
	})
}
