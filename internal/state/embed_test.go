package state

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// childEnv makes the test binary do one of the jobs below instead of its tests.
const childEnv = "THAW_STATE_TEST_CHILD"

func TestMain(m *testing.M) {
	job, dir, _ := strings.Cut(os.Getenv(childEnv), ":")
	switch job {
	case "":
		_ = flag.Set("test.parallel", "8") // most of them wait for time to pass
		os.Exit(m.Run())
	case "write":
		writeForEver(dir)
	case "idle":
		reportFootprint(dir)
	case "full":
		writeUntilFull(dir)
	}
}

// child starts the test binary with a job and gives its standard output.
func child(t *testing.T, job, dir string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+job+":"+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, bufio.NewScanner(out)
}

// writeForEver says each write on standard output after it was acknowledged: key number and revision.
func writeForEver(dir string) {
	s, err := Open(context.Background(), Config{Dir: dir})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for w := range 3 {
		go func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("/k/%d/%d/%d", os.Getpid(), w, i)
				rev, err := s.Put(context.Background(), key, []byte(strconv.Itoa(i)), 0)
				if err != nil {
					fmt.Println(err)
					os.Exit(1)
				}
				fmt.Printf("%s %d\n", key, rev)
			}
		}()
	}
	select {}
}

// kill -9 in the middle of writes, several times over the same directory: everything that was acknowledged is there, at the revision that was
// acknowledged.
func TestKillKeepsWhatWasAcknowledged(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "etcd")
	acknowledged := map[string]int64{}
	note := func(line string) bool {
		key, rev, _ := strings.Cut(line, " ")
		n, err := strconv.ParseInt(rev, 10, 64)
		if err == nil {
			acknowledged[key] = n
		}
		return err == nil
	}
	for round := range 3 {
		cmd, lines := child(t, "write", dir)
		for n := 0; n < 150+70*round && lines.Scan(); n++ {
			if !note(lines.Text()) {
				t.Fatalf("the child says %q", lines.Text())
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() && note(lines.Text()) { // what it had still said; each line is one write to the pipe, so none is torn
		}
		_ = cmd.Wait()
		began := time.Now()
		s, err := Open(t.Context(), Config{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d writes acknowledged, open again after kill -9 in %s", len(acknowledged), time.Since(began))
		for key, rev := range acknowledged {
			kv, err := s.Get(t.Context(), key)
			if err != nil || kv.Revision != rev {
				t.Errorf("%s: revision %d, error %v, acknowledged was %d", key, kv.Revision, err, rev)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestRestartKeepsData(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "deep", "etcd")
	cfg := Config{Dir: dir, NoSync: true, Log: testLog(t)}
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if i, err := os.Stat(dir); err != nil || i.Mode().Perm() != 0o700 {
		t.Errorf("the directory has mode %v, error %v", i.Mode(), err)
	}
	r1 := put(t, s, "/k", "1", 0)
	for i := range 2 * raftEntries { // beyond a snapshot
		put(t, s, "/many", strconv.Itoa(i), Any)
	}
	r2 := put(t, s, "/k", "2", Any)
	e, err := s.Session(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	put(t, e, "/session", "x", 0)
	began := time.Now()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("close took %s", d)
	}
	s, err = Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if kv := get(t, s, "/k"); kv.Revision != r2 || kv.Created != r1 || string(kv.Value) != "2" {
		t.Errorf("got %+v, want revision %d and created %d", kv, r2, r1)
	}
	if !gone(s, "/session") {
		t.Error("the session's key outlived the close")
	}
	events, reason := s.Watch(t.Context(), "/k", r1) // history is there too
	if e := next(t, events); e.Revision != r2 {
		t.Errorf("got %+v, %v", e, reason())
	}
	if r3 := put(t, s, "/k", "3", r2); r3 <= r2 {
		t.Errorf("revision %d after %d", r3, r2)
	}
}

func TestDirInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := Open(t.Context(), Config{Dir: dir, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	_, err = Open(t.Context(), Config{Dir: dir, NoSync: true})
	want(t, "open again", err, ErrInUse)
	if text := fmt.Sprintf("data directory %s is in use by pid %d", dir, os.Getpid()); !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("the error %q does not say %q", err, text)
	}
	if d := time.Since(began); d > time.Second {
		t.Errorf("it took %s", d)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(t.Context(), Config{Dir: dir, NoSync: true}); err != nil {
		t.Fatalf("open after close: %v", err)
	}
	_ = s.Close()
}

// What cannot be read is an error of Open: not a panic, not the end of the process, not a fresh start.
func TestDirBroken(t *testing.T) {
	t.Parallel()
	sound := t.TempDir()
	s, err := Open(t.Context(), Config{Dir: sound, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		put(t, s, "/k", strings.Repeat(strconv.Itoa(i), 100), Any)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	file := func(t *testing.T, dir, pattern string) string {
		m, _ := filepath.Glob(filepath.Join(dir, "member", pattern))
		if len(m) == 0 {
			t.Fatalf("no %s", pattern)
		}
		return m[0]
	}
	overwrite := func(pattern string, at int64, n int) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			f, err := os.OpenFile(file(t, dir, pattern), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, n), at); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, harm := range map[string]func(t *testing.T, dir string){
		"garbage in the log":      overwrite("wal/0*.wal", 2000, 64),
		"garbage in the database": overwrite("snap/db", 0, 16384),
		"the log is gone":         func(t *testing.T, dir string) { _ = os.Remove(file(t, dir, "wal/0*.wal")) },
		"the database is no file": func(t *testing.T, dir string) { f := file(t, dir, "snap/db"); _ = os.Remove(f); _ = os.Mkdir(f, 0o700) },
		"the directory is no directory": func(t *testing.T, dir string) {
			_ = os.RemoveAll(dir)
			_ = os.WriteFile(dir, nil, 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "etcd")
			if err := os.CopyFS(dir, os.DirFS(sound)); err != nil {
				t.Fatal(err)
			}
			harm(t, dir)
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			s, err := Open(ctx, Config{Dir: dir, NoSync: true})
			if err == nil {
				_ = s.Close()
			}
			want(t, name, err, ErrDataDir)
			if !strings.Contains(fmt.Sprint(err), dir) {
				t.Errorf("the error does not name the directory: %v", err)
			}
			t.Log(err)
		})
	}
	t.Run("no harm", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "etcd")
		if err := os.CopyFS(dir, os.DirFS(sound)); err != nil {
			t.Fatal(err)
		}
		s, err := Open(t.Context(), Config{Dir: dir, NoSync: true})
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
	})
}

// writeUntilFull writes with a limit on the size of files, which to etcd is a disk that takes no more, and says what came of it.
func writeUntilFull(dir string) {
	s, err := Open(context.Background(), Config{Dir: dir, OpTimeout: 3 * time.Second, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Println("open:", err)
		return
	}
	const max = 8 << 20
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: max, Max: max}); err != nil {
		fmt.Println("limit:", err)
		return
	}
	for i := range 1000 {
		_, err := s.Put(context.Background(), fmt.Sprint("/k/", i), bytes.Repeat([]byte("x"), 100<<10), 0)
		if err != nil {
			fmt.Printf("after %d: unavailable %t: %v\n", i, errors.Is(err, ErrUnavailable), err)
			break
		}
	}
	began := time.Now()
	_, err = s.Get(context.Background(), "/k/0")
	fmt.Printf("get: unavailable %t, fast %t\n", errors.Is(err, ErrUnavailable), time.Since(began) < time.Second)
	fmt.Println("close:", s.Close() != nil)
}

// A disk that takes no more ends the server but not the process that it is in: traffic goes on, changes are refused at once and with the reason.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, lines := child(t, "full", dir)
	var got []string
	for lines.Scan() {
		got = append(got, lines.Text())
	}
	t.Log(strings.Join(got, "\n"))
	if len(got) != 3 || !strings.Contains(got[0], "unavailable true") || got[1] != "get: unavailable true, fast true" || got[2] != "close: true" {
		t.Error("want: the writes stop, reads fail at once, close tells")
	}
	s, err := Open(t.Context(), Config{Dir: dir}) // there is space again
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	kvs, _, err := s.List(t.Context(), "/k/")
	var after int
	_, _ = fmt.Sscanf(got[0], "after %d", &after)
	if err != nil || len(kvs) < after {
		t.Errorf("%d of %d acknowledged keys are there, error %v", len(kvs), after, err)
	}
}

// reportFootprint opens a store and says how long that took and what the process occupies then.
func reportFootprint(dir string) {
	began := time.Now()
	s, err := Open(context.Background(), Config{Dir: dir})
	took := time.Since(began)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer s.Close()
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if kb, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			fmt.Println(took.Milliseconds(), strings.Fields(kb)[0])
		}
	}
}

// The embedded server has to fit into a laptop's `thaw dev`: 0.5 s and 35 MiB. The time is that of a busy machine here, so it has a
// margin; the memory has none.
func TestFootprint(t *testing.T) {
	if raceEnabled || runtime.GOOS != "linux" {
		t.Skip("measures a program without the race detector on Linux")
	}
	_, lines := child(t, "idle", t.TempDir())
	var ms, kb int
	lines.Scan()
	if _, err := fmt.Sscan(lines.Text(), &ms, &kb); err != nil {
		t.Fatalf("the child says %q", lines.Text())
	}
	t.Logf("open in %d ms, %d KiB resident", ms, kb)
	if ms > 2000 || kb > 35<<10 {
		t.Errorf("open took %d ms, %d KiB resident", ms, kb)
	}
}

// The quota stops writes with its own error and leaves reads alone.
func TestQuota(t *testing.T) {
	t.Parallel()
	s, err := Open(t.Context(), Config{Dir: t.TempDir(), NoSync: true, QuotaBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := 0; err == nil && i < 200; i++ {
		_, err = s.Put(t.Context(), fmt.Sprint("/k/", i), make([]byte, 256<<10), 0)
	}
	want(t, "put", err, ErrFull)
	get(t, s, "/k/0")
}

// A normal start and end have nothing to say above debug.
func TestQuietLog(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	dir := t.TempDir()
	for range 2 {
		s, err := Open(t.Context(), Config{Dir: dir, NoSync: true, Log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo}))})
		if err != nil {
			t.Fatal(err)
		}
		put(t, s, "/k", "x", Any)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for line := range strings.Lines(out.String()) {
		if !strings.Contains(line, "took too long") { // etcd's word of a machine that had other things to do
			t.Errorf("logged: %s", line)
		}
	}
}
