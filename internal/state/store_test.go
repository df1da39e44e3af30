package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// limit is how long a test waits for something that must happen.
const limit = 20 * time.Second

// testUnread and testProgress replace the bounds of the stores under test, so that they can be reached.
const (
	testUnread   = 500
	testProgress = 50 * time.Millisecond
)

// stores are the kinds that the suite runs on. Each test works below a folder of its own.
var stores = []struct {
	name string
	open func(t *testing.T) Store
}{
	{"memory", openMemory},
	{"embedded", openTestServer},
	{"external", openTestClient},
}

func openMemory(t *testing.T) Store {
	m := Memory().(*memory)
	m.unread, m.progress = testUnread, testProgress
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func openTestServer(t *testing.T) Store {
	s, err := Open(t.Context(), Config{Dir: t.TempDir(), NoSync: true, Progress: testProgress, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	s.(*etcd).unread = testUnread
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func openTestClient(t *testing.T) Store {
	srv := startPeer(t, &peer{})
	s, err := Open(t.Context(), Config{Endpoints: []string{srv.url}, Progress: testProgress, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	s.(*etcd).unread = testUnread
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// testLog fails the test on a message that says that something is wrong with a server that nobody has harmed.
func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(failOnWrite{t}, &slog.HandlerOptions{Level: slog.LevelError}))
}

type failOnWrite struct{ t *testing.T }

func (f failOnWrite) Write(b []byte) (int, error) {
	f.t.Errorf("logged: %s", b)
	return len(b), nil
}

// TestStores runs the suite on every kind of store, one store for all of its tests.
func TestStores(t *testing.T) {
	for _, kind := range stores {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			s := kind.open(t)
			for _, test := range []struct {
				name string
				run  func(t *testing.T, s Store, dir string)
			}{
				{"Writes", testWrites},
				{"Values", testValues},
				{"List", testList},
				{"Cancelled", testCancelled},
				{"Counter", testCounter},
				{"Model", testModel},
				{"WatchOrder", testWatchOrder},
				{"WatchFromNow", testWatchFromNow},
				{"WatchNoGaps", testWatchNoGaps},
				{"WatchProgress", testWatchProgress},
				{"WatchEnds", testWatchEnds},
				{"ManyWatchesEndAtOnce", testManyWatches},
				{"SlowWatcher", testSlowWatcher},
				{"SessionClose", testSessionClose},
				{"SessionExpires", testSessionExpires},
				{"SessionKeepsAlive", testSessionKeepsAlive},
				{"SessionDetach", testSessionDetach},
				{"Election", testElection},
				{"ElectionFence", testElectionFence},
				{"ElectionCancel", testElectionCancel},
				{"ElectionExclusive", testElectionExclusive},
				{"Compact", testCompact},
				{"Close", testClose}, // last: it is the store's end
			} {
				t.Run(test.name, func(t *testing.T) { test.run(t, s, "/"+test.name+"/") })
			}
		})
	}
}

func get(t *testing.T, s Store, key string) KV {
	t.Helper()
	kv, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return kv
}

func put(t *testing.T, s interface {
	Put(context.Context, string, []byte, int64) (int64, error)
}, key, value string, expect int64) int64 {
	t.Helper()
	rev, err := s.Put(t.Context(), key, []byte(value), expect)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func want(t *testing.T, what string, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("%s: got error %v, want %v", what, err, target)
	}
}

// eventually polls until what is asked for is so.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not so: %s", what)
		}
	}
}

// next is the next event that is no progress mark.
func next(t *testing.T, events <-chan Event) Event {
	t.Helper()
	end := time.After(limit)
	for {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatal("the watch ended")
			}
			if !e.Progress {
				return e
			}
		case <-end:
			t.Fatal("no event")
		}
	}
}

func ended(t *testing.T, events <-chan Event) {
	t.Helper()
	end := time.After(limit)
	for {
		select {
		case _, ok := <-events:
			if !ok {
				return
			}
		case <-end:
			t.Fatal("the watch goes on")
		}
	}
}

func testWrites(t *testing.T, s Store, dir string) {
	ctx, k := t.Context(), dir+"k"
	_, err := s.Get(ctx, k)
	want(t, "get missing", err, ErrNotFound)
	_, err = s.Put(ctx, k, nil, 5)
	want(t, "put over missing", err, ErrNotFound)
	_, err = s.Delete(ctx, k, Any)
	want(t, "delete missing", err, ErrNotFound)
	_, err = s.Delete(ctx, k, 5)
	want(t, "delete missing at a revision", err, ErrNotFound)
	_, err = s.Delete(ctx, k, 0)
	want(t, "delete at 0", err, ErrBadRevision)
	_, err = s.Put(ctx, k, nil, -2)
	want(t, "put at -2", err, ErrBadRevision)

	r1 := put(t, s, k, "1", 0)
	_, err = s.Put(ctx, k, nil, 0)
	want(t, "create again", err, ErrExists)
	r2 := put(t, s, k, "2", r1)
	_, err = s.Put(ctx, k, nil, r1)
	want(t, "stale put", err, ErrConflict)
	_, err = s.Delete(ctx, k, r1)
	want(t, "stale delete", err, ErrConflict)
	r3 := put(t, s, k, "3", Any)
	if d := cmp.Diff(KV{k, []byte("3"), r3, r1}, get(t, s, k)); d != "" {
		t.Error(d)
	}
	r4, err := s.Delete(ctx, k, r3)
	if err != nil {
		t.Fatal(err)
	}
	if r2 != r1+1 || r3 != r1+2 || r4 != r1+3 {
		t.Errorf("revisions %d %d %d %d: a refused write must not count and a made one must", r1, r2, r3, r4)
	}
	r5 := put(t, s, k, "5", Any)
	if kv := get(t, s, k); kv.Created != r5 || kv.Revision != r5 {
		t.Errorf("a key made anew has %+v, want created at %d", kv, r5)
	}
	if _, err := s.Delete(ctx, k, Any); err != nil {
		t.Error(err)
	}
}

func testValues(t *testing.T, s Store, dir string) {
	k := dir + "k"
	mine := []byte("before")
	if _, err := s.Put(t.Context(), k, mine, Any); err != nil {
		t.Fatal(err)
	}
	copy(mine, "after!")
	if v := get(t, s, k).Value; string(v) != "before" {
		t.Errorf("the store kept the caller's slice: %s", v)
	}
	put(t, s, k, "", Any)
	if v := get(t, s, k).Value; len(v) != 0 {
		t.Errorf("got %q", v)
	}
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	put(t, s, k, string(all), Any)
	if v := get(t, s, k).Value; !bytes.Equal(v, all) {
		t.Errorf("got %q", v)
	}
	put(t, s, k, strings.Repeat("x", MaxValueBytes), Any)
	_, err := s.Put(t.Context(), k, make([]byte, MaxValueBytes+1), Any)
	want(t, "too large", err, ErrTooLarge)
	if n := len(get(t, s, k).Value); n != MaxValueBytes {
		t.Errorf("got %d bytes", n)
	}
}

func testList(t *testing.T, s Store, dir string) {
	for _, k := range []string{"a/2", "a/1", "ab", "b/1", "a/\xff\xff", "a"} {
		put(t, s, dir+k, k, 0)
	}
	for prefix, keys := range map[string][]string{
		"a/":      {"a/1", "a/2", "a/\xff\xff"},
		"a":       {"a", "a/1", "a/2", "a/\xff\xff", "ab"},
		"":        {"a", "a/1", "a/2", "a/\xff\xff", "ab", "b/1"},
		"c":       nil,
		"a/\xff":  {"a/\xff\xff"},
		"a/1":     {"a/1"},
		"a/1/2/3": nil,
	} {
		kvs, rev, err := s.List(t.Context(), dir+prefix)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, kv := range kvs {
			got = append(got, strings.TrimPrefix(kv.Key, dir))
			if kv.Revision > rev {
				t.Errorf("%q has revision %d in a picture of %d", kv.Key, kv.Revision, rev)
			}
		}
		if d := cmp.Diff(keys, got); d != "" {
			t.Errorf("%q:\n%s", prefix, d)
		}
	}
	all, _, err := s.List(t.Context(), "")
	if err != nil || len(all) < 6 {
		t.Errorf("list of everything: %d keys, error %v", len(all), err)
	}
}

func testCancelled(t *testing.T, s Store, dir string) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Get(ctx, dir)
	want(t, "get", err, context.Canceled)
	_, _, err = s.List(ctx, dir)
	want(t, "list", err, context.Canceled)
	_, err = s.Put(ctx, dir, nil, Any)
	want(t, "put", err, context.Canceled)
	_, err = s.Session(ctx, time.Minute)
	want(t, "session", err, context.Canceled)
	events, reason := s.Watch(ctx, dir, 0)
	ended(t, events)
	want(t, "watch", reason(), context.Canceled)
}

// N goroutines add one with compare-and-put; what they believe to have added must be there.
func testCounter(t *testing.T, s Store, dir string) {
	k := dir + "n"
	put(t, s, k, "0", 0)
	const writers, each = 6, 20
	var conflicts atomic.Int64
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for done := 0; done < each; {
				kv, err := s.Get(t.Context(), k)
				if err != nil {
					t.Error(err)
					return
				}
				n, _ := strconv.Atoi(string(kv.Value))
				runtime.Gosched()
				_, err = s.Put(t.Context(), k, []byte(strconv.Itoa(n+1)), kv.Revision)
				switch {
				case err == nil:
					done++
				case errors.Is(err, ErrConflict):
					conflicts.Add(1)
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if v := string(get(t, s, k).Value); v != strconv.Itoa(writers*each) {
		t.Errorf("counted %s, want %d", v, writers*each)
	}
	t.Logf("%d conflicts", conflicts.Load())
}

// Random single writes against the simplest store there is: a map and a counter. A watch from the beginning must tell the same
// story.
func testModel(t *testing.T, s Store, dir string) {
	run := 0
	_, quick := s.(*memory)
	rapid.Check(t, func(rt *rapid.T) {
		if run++; run > 30 && !quick {
			return // each run takes a server 20 ms
		}
		dir := fmt.Sprintf("%s%d/", dir, run)
		model := map[string]KV{}
		_, rev, err := s.List(t.Context(), dir)
		if err != nil {
			rt.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		events, _ := s.Watch(ctx, dir, rev)
		var history []Event
		key := rapid.SampledFrom([]string{dir + "a", dir + "b", dir + "c"})
		for range rapid.IntRange(1, 20).Draw(rt, "steps") {
			k := key.Draw(rt, "key")
			old, exists := model[k]
			expect := rapid.SampledFrom([]int64{Any, 0, old.Revision, max(1, old.Revision-1)}).Draw(rt, "expect")
			if rapid.Bool().Draw(rt, "delete") {
				got, err := s.Delete(t.Context(), k, expect)
				wantErr := error(nil)
				switch {
				case expect == 0:
					wantErr = ErrBadRevision
				case !exists:
					wantErr = ErrNotFound
				case expect > 0 && expect != old.Revision:
					wantErr = ErrConflict
				}
				if !errors.Is(err, wantErr) {
					rt.Fatalf("delete %s at %d of %+v: error %v, want %v", k, expect, old, err, wantErr)
				}
				if err == nil {
					rev++
					delete(model, k)
					old.Revision = rev
					history = append(history, Event{Deleted: true, KV: old})
				}
				if err == nil && got != rev {
					rt.Fatalf("revision %d, want %d", got, rev)
				}
				continue
			}
			v := rapid.SliceOfN(rapid.Byte(), 1, 8).Draw(rt, "value")
			got, err := s.Put(t.Context(), k, v, expect)
			wantErr := error(nil)
			switch {
			case expect == 0 && exists:
				wantErr = ErrExists
			case expect > 0 && !exists:
				wantErr = ErrNotFound
			case expect > 0 && expect != old.Revision:
				wantErr = ErrConflict
			}
			if !errors.Is(err, wantErr) {
				rt.Fatalf("put %s at %d over %+v: error %v, want %v", k, expect, old, err, wantErr)
			}
			if err == nil {
				rev++
				kv := KV{k, v, rev, rev}
				if exists {
					kv.Created = old.Created
				}
				model[k] = kv
				history = append(history, Event{KV: kv})
			}
			if err == nil && got != rev {
				rt.Fatalf("revision %d, want %d", got, rev)
			}
		}
		kvs, at, err := s.List(t.Context(), dir)
		if err != nil || at != rev || len(kvs) != len(model) {
			rt.Fatalf("list: %d keys at %d, error %v; want %d at %d", len(kvs), at, err, len(model), rev)
		}
		for _, kv := range kvs {
			if d := cmp.Diff(model[kv.Key], kv); d != "" {
				rt.Fatal(d)
			}
		}
		for _, h := range history {
			if d := cmp.Diff(h, next(t, events)); d != "" {
				rt.Fatal(d)
			}
		}
	})
}

func testWatchOrder(t *testing.T, s Store, dir string) {
	r1 := put(t, s, dir+"a", "1", 0)
	events, _ := s.Watch(t.Context(), dir, r1)
	r2 := put(t, s, dir+"a", "2", Any)
	put(t, s, dir[:len(dir)-1]+"x", "outside", Any)
	r4, err := s.Delete(t.Context(), dir+"a", Any)
	if err != nil {
		t.Fatal(err)
	}
	r5 := put(t, s, dir+"a", "5", Any)
	for _, w := range []Event{
		{KV: KV{dir + "a", []byte("2"), r2, r1}},
		{KV: KV{dir + "a", []byte("2"), r4, r1}, Deleted: true},
		{KV: KV{dir + "a", []byte("5"), r5, r5}},
	} {
		if d := cmp.Diff(w, next(t, events)); d != "" {
			t.Error(d)
		}
	}
	// The same again, all of it in the past now, and from the middle.
	events, _ = s.Watch(t.Context(), dir, r2)
	if e := next(t, events); !e.Deleted || e.Revision != r4 || string(e.Value) != "2" {
		t.Errorf("got %+v", e)
	}
	if e := next(t, events); e.Revision != r5 {
		t.Errorf("got %+v", e)
	}
}

// What is written after Watch has returned must come, however fast one is.
func testWatchFromNow(t *testing.T, s Store, dir string) {
	for i := range 30 {
		ctx, cancel := context.WithCancel(t.Context())
		events, _ := s.Watch(ctx, dir, 0)
		rev := put(t, s, dir+"k", strconv.Itoa(i), Any)
		if e := next(t, events); e.Revision != rev {
			t.Errorf("got %+v, want revision %d", e, rev)
		}
		cancel()
	}
}

// Lists at random moments, each with the watch from there, all arrive at the same end; no event comes twice, out of order, or
// after a mark that said it had come.
func testWatchNoGaps(t *testing.T, s Store, dir string) {
	const writers, each, watchers = 3, 100, 5
	var wg sync.WaitGroup
	var written atomic.Int64
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				k := fmt.Sprintf("%s%d", dir, (i*7+w)%5)
				if i%4 == 3 {
					if _, err := s.Delete(t.Context(), k, Any); err != nil && !errors.Is(err, ErrNotFound) {
						t.Error(err)
					}
				} else if _, err := s.Put(t.Context(), k, fmt.Appendf(nil, "%d-%d", w, i), Any); err != nil {
					t.Error(err)
				}
				written.Add(1)
			}
			put(t, s, fmt.Sprintf("%send%d", dir, w), "", Any)
		})
	}
	pictures := make([]map[string]string, watchers)
	for i := range watchers {
		wg.Go(func() {
			for written.Load() < int64(i*writers*each/watchers) {
				runtime.Gosched()
			}
			kvs, rev, err := s.List(t.Context(), dir)
			if err != nil {
				t.Error(err)
				return
			}
			picture := map[string]string{}
			ends := 0
			for _, kv := range kvs {
				picture[kv.Key] = string(kv.Value)
				if strings.Contains(kv.Key, "end") {
					ends++
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			events, reason := s.Watch(ctx, dir, rev)
			for ends < writers {
				e, ok := <-events
				if !ok {
					t.Errorf("the watch ended: %v", reason())
					return
				}
				if e.Revision < rev || !e.Progress && e.Revision == rev {
					t.Errorf("revision %d after %d", e.Revision, rev)
				}
				rev = e.Revision
				switch {
				case e.Progress:
				case e.Deleted:
					delete(picture, e.Key)
				default:
					picture[e.Key] = string(e.Value)
					if strings.Contains(e.Key, "end") {
						ends++
					}
				}
			}
			pictures[i] = picture
		})
	}
	wg.Wait()
	kvs, _, err := s.List(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	truth := map[string]string{}
	for _, kv := range kvs {
		truth[kv.Key] = string(kv.Value)
	}
	for i, p := range pictures {
		if d := cmp.Diff(truth, p); d != "" {
			t.Errorf("watcher %d:\n%s", i, d)
		}
	}
}

// An idle watch says how far it is, also when what was written is not its own.
func testWatchProgress(t *testing.T, s Store, dir string) {
	events, _ := s.Watch(t.Context(), dir, 0)
	rev := put(t, s, "/elsewhere", "x", Any)
	end := time.After(limit)
	for {
		select {
		case e := <-events:
			if !e.Progress {
				t.Fatalf("got %+v", e)
			}
			if e.Revision == rev {
				return
			}
		case <-end:
			t.Fatalf("no mark of revision %d", rev)
		}
	}
}

func testWatchEnds(t *testing.T, s Store, dir string) {
	ctx, cancel := context.WithCancel(t.Context())
	events, reason := s.Watch(ctx, dir, 0)
	if err := reason(); err != nil {
		t.Errorf("a watch that goes on has the error %v", err)
	}
	cancel()
	ended(t, events)
	want(t, "cancelled", reason(), context.Canceled)

	_, rev, err := s.List(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	events, reason = s.Watch(t.Context(), dir, rev+1000)
	ended(t, events)
	want(t, "a revision of another life", reason(), ErrCompacted)
	events, reason = s.Watch(t.Context(), dir, -1)
	ended(t, events)
	want(t, "from -1", reason(), ErrBadRevision)
}

// Over streams that the watches share, this hung.
func testManyWatches(t *testing.T, s Store, dir string) {
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		var all []<-chan Event
		for range 60 {
			events, _ := s.Watch(ctx, dir, 0)
			all = append(all, events)
		}
		put(t, s, dir+"k", "x", Any)
		for _, events := range all[:30] {
			next(t, events)
		}
		cancel()
		for _, events := range all {
			ended(t, events)
		}
	}
}

// A watcher that reads nothing neither holds up a writer nor another watcher, and is told to start over.
func testSlowWatcher(t *testing.T, s Store, dir string) {
	slow, reason := s.Watch(t.Context(), dir, 0)
	quick, _ := s.Watch(t.Context(), dir, 0)
	for i := range testUnread + 10 {
		put(t, s, dir+"k", strconv.Itoa(i), Any)
		next(t, quick)
	}
	eventually(t, "the slow watcher has lost its place", func() bool { return reason() != nil })
	want(t, "slow watcher", reason(), ErrCompacted)
	ended(t, slow)
}

func session(t *testing.T, ctx context.Context, s Store, ttl time.Duration) Session {
	t.Helper()
	e, err := s.Session(ctx, ttl)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

func gone(s Store, key string) bool {
	_, err := s.Get(context.Background(), key)
	return errors.Is(err, ErrNotFound)
}

func testSessionClose(t *testing.T, s Store, dir string) {
	events, _ := s.Watch(t.Context(), dir, 0)
	e := session(t, t.Context(), s, time.Minute)
	r1 := put(t, e, dir+"a", "1", 0)
	put(t, e, dir+"b", "1", 0)
	_, err := e.Put(t.Context(), dir+"a", nil, 0)
	want(t, "create again", err, ErrExists)
	put(t, e, dir+"a", "2", r1)
	for range 3 {
		next(t, events)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	<-e.Done()
	if !gone(s, dir+"a") || !gone(s, dir+"b") {
		t.Error("the keys outlived the session")
	}
	a, b := next(t, events), next(t, events)
	if a.Key != dir+"a" || b.Key != dir+"b" || !a.Deleted || !b.Deleted || a.Revision != b.Revision || string(a.Value) != "2" {
		t.Errorf("got %+v and %+v, want both deletions at one revision", a, b)
	}
	_, err = e.Put(t.Context(), dir+"a", nil, Any)
	want(t, "put after close", err, ErrLeaseLost)
	_, err = e.Campaign(t.Context(), "x", "")
	want(t, "campaign after close", err, ErrLeaseLost)
	if err := e.Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
}

// A session whose process goes away without a word: the keys stay for the time to live and no longer.
func testSessionExpires(t *testing.T, s Store, dir string) {
	ctx, cancel := context.WithCancel(t.Context())
	e := session(t, ctx, s, 900*time.Millisecond) // counts as 1 s
	put(t, e, dir+"a", "1", 0)
	cancel()
	<-e.Done()
	since := time.Now()
	if gone(s, dir+"a") {
		t.Error("the key went with the process")
	}
	eventually(t, "the lease has run out", func() bool { return gone(s, dir+"a") })
	// The server renewed the lease at most a third of its time before.
	if d := time.Since(since); d < 300*time.Millisecond || d > 5*time.Second {
		t.Errorf("the key was gone after %s", d)
	}
}

func testSessionKeepsAlive(t *testing.T, s Store, dir string) {
	e := session(t, t.Context(), s, time.Second)
	put(t, e, dir+"a", "1", 0)
	select {
	case <-e.Done():
		t.Error("the session is over")
	case <-time.After(2500 * time.Millisecond): // more than two times to live
	}
	if gone(s, dir+"a") {
		t.Error("the key is gone")
	}
}

// A key belongs to whoever wrote it last.
func testSessionDetach(t *testing.T, s Store, dir string) {
	e, f := session(t, t.Context(), s, time.Minute), session(t, t.Context(), s, time.Minute)
	put(t, e, dir+"plain", "1", 0)
	put(t, s, dir+"plain", "2", Any)
	put(t, e, dir+"moved", "1", 0)
	put(t, f, dir+"moved", "2", Any)
	put(t, s, dir+"taken", "1", 0)
	put(t, e, dir+"taken", "2", Any)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if gone(s, dir+"plain") || gone(s, dir+"moved") || !gone(s, dir+"taken") {
		t.Error("plain and moved should be there, taken should not")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if !gone(s, dir+"moved") {
		t.Error("moved should be gone")
	}
}

func lead(t *testing.T, e Session, name, value string) Leadership {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	l, err := e.Campaign(ctx, name, value)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// candidates waits until n stand for the election.
func candidates(t *testing.T, s Store, name string, n int) {
	t.Helper()
	eventually(t, fmt.Sprint(n, " candidates"), func() bool {
		kvs, _, _ := s.List(t.Context(), electionRoot+name+"/")
		return len(kvs) == n
	})
}

// Candidates lead in the order in which they came, after a resignation as after a lost session.
func testElection(t *testing.T, s Store, dir string) {
	name := "order"
	_, err := Leader(t.Context(), s, name)
	want(t, "leader of nothing", err, ErrNotFound)
	sessions := []Session{}
	won := make(chan int, 3)
	leaders := make([]Leadership, 3)
	for i := range 3 {
		sessions = append(sessions, session(t, t.Context(), s, time.Minute))
		go func() {
			l, err := sessions[i].Campaign(t.Context(), name, strconv.Itoa(i))
			if err != nil {
				t.Error(err)
			}
			leaders[i] = l
			won <- i
		}()
		candidates(t, s, name, i+1)
	}
	for i := range 3 {
		if got := <-won; got != i {
			t.Fatalf("%d leads, want %d", got, i)
		}
		if kv, err := Leader(t.Context(), s, name); err != nil || string(kv.Value) != strconv.Itoa(i) {
			t.Errorf("the leader is %q, error %v, want %d", kv.Value, err, i)
		}
		select {
		case j := <-won:
			t.Fatalf("%d leads beside %d", j, i)
		case <-time.After(50 * time.Millisecond): // nothing to wait for: nothing may come
		}
		if i == 0 {
			err = leaders[i].Resign(t.Context())
		} else {
			err = sessions[i].Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := leaders[0].Resign(t.Context()); err != nil {
		t.Errorf("resign again: %v", err)
	}
}

// Once another may lead, no write of the old leader arrives.
func testElectionFence(t *testing.T, s Store, dir string) {
	name := "fence"
	e1, e2 := session(t, t.Context(), s, time.Minute), session(t, t.Context(), s, time.Minute)
	old := lead(t, e1, name, "1")
	put(t, old, dir+"k", "old", 0)
	_, err := old.Put(t.Context(), dir+"k", nil, 0)
	want(t, "comparison under the fence", err, ErrExists)
	if errors.Is(err, ErrNotLeader) {
		t.Error("a leader was told it is none")
	}
	rev := put(t, old, dir+"k", "older", Any)

	if err := e1.Close(); err != nil { // the lease ends; old does not know
		t.Fatal(err)
	}
	now := lead(t, e2, name, "2")
	_, err = old.Put(t.Context(), dir+"k", []byte("late"), rev)
	want(t, "late put", err, ErrNotLeader)
	want(t, "late put", err, ErrConflict)
	_, err = old.Delete(t.Context(), dir+"k", Any)
	want(t, "late delete", err, ErrNotLeader)
	if v := string(get(t, s, dir+"k").Value); v != "older" {
		t.Errorf("the late write arrived: %q", v)
	}
	// The comparison of revisions alone would have let it through: it is the fence that held.
	rev = put(t, s, dir+"k", "unfenced", rev)
	put(t, now, dir+"k", "new", rev)
	if _, err := now.Delete(t.Context(), dir+"k", Any); err != nil {
		t.Error(err)
	}

	// The same session leading again is another leadership.
	if err := now.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := lead(t, e2, name, "2")
	_, err = now.Put(t.Context(), dir+"k", nil, Any)
	want(t, "put of the resigned", err, ErrNotLeader)
	if err := now.Resign(t.Context()); err != nil { // must not end the new one
		t.Error(err)
	}
	put(t, again, dir+"k", "again", Any)
}

// A campaign that is given up leaves no candidate who would win and not know it.
func testElectionCancel(t *testing.T, s Store, dir string) {
	name := "cancel"
	e1, e2, e3 := session(t, t.Context(), s, time.Minute), session(t, t.Context(), s, time.Minute), session(t, t.Context(), s, time.Minute)
	first := lead(t, e1, name, "1")
	ctx, cancel := context.WithCancel(t.Context())
	given := make(chan error, 2)
	go func() {
		_, err := e2.Campaign(ctx, name, "2")
		given <- err
	}()
	candidates(t, s, name, 2)
	cancel()
	want(t, "cancelled campaign", <-given, context.Canceled)
	candidates(t, s, name, 1)

	go func() {
		_, err := e3.Campaign(t.Context(), name, "3")
		given <- err
	}()
	candidates(t, s, name, 2)
	if err := e3.Close(); err != nil {
		t.Fatal(err)
	}
	want(t, "campaign of a closed session", <-given, ErrLeaseLost)

	if err := first.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := lead(t, e2, name, "2").Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

// Many candidates, many changes: never two at a time, and what leaders count under their fence is what arrives.
func testElectionExclusive(t *testing.T, s Store, dir string) {
	const sessions, terms = 4, 4
	var leading atomic.Int32
	var wg sync.WaitGroup
	for range sessions {
		e := session(t, t.Context(), s, time.Minute)
		wg.Go(func() {
			for range terms {
				l := lead(t, e, "exclusive", "")
				if leading.Add(1) != 1 {
					t.Error("two lead")
				}
				n := 0
				if kv, err := s.Get(t.Context(), dir+"n"); err == nil {
					n, _ = strconv.Atoi(string(kv.Value))
				}
				put(t, l, dir+"n", strconv.Itoa(n+1), Any) // without comparison: only the election protects it
				leading.Add(-1)
				if err := l.Resign(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if v := string(get(t, s, dir+"n").Value); v != strconv.Itoa(sessions*terms) {
		t.Errorf("counted %s, want %d", v, sessions*terms)
	}
}

func testCompact(t *testing.T, s Store, dir string) {
	var revs []int64
	for i := range 6 {
		revs = append(revs, put(t, s, dir+"k", strconv.Itoa(i), Any))
	}
	if err := s.Compact(t.Context(), revs[3]); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		from int64
		ok   bool
	}{{revs[0], false}, {revs[1], false}, {revs[3], true}, {revs[4], true}} {
		events, reason := s.Watch(t.Context(), dir, c.from)
		if c.ok {
			if e := next(t, events); e.Revision != c.from+1 {
				t.Errorf("from %d: got %+v", c.from, e)
			}
			continue
		}
		ended(t, events)
		want(t, fmt.Sprint("watch from ", c.from), reason(), ErrCompacted)
	}
	if v := string(get(t, s, dir+"k").Value); v != "5" {
		t.Errorf("got %q", v)
	}
	if err := s.Compact(t.Context(), revs[2]); err != nil {
		t.Errorf("what is gone already: %v", err)
	}
	want(t, "the future", s.Compact(t.Context(), revs[5]+100), ErrBadRevision)
}

func testClose(t *testing.T, s Store, dir string) {
	events, reason := s.Watch(t.Context(), dir, 0)
	e := session(t, t.Context(), s, time.Minute)
	put(t, e, dir+"a", "1", Any)
	l := lead(t, e, "close", "")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	ended(t, events)
	want(t, "watch", reason(), ErrClosed)
	<-e.Done()
	_, err := s.Get(t.Context(), dir)
	want(t, "get", err, ErrClosed)
	_, _, err = s.List(t.Context(), dir)
	want(t, "list", err, ErrClosed)
	_, err = s.Put(t.Context(), dir, nil, Any)
	want(t, "put", err, ErrClosed)
	_, err = l.Put(t.Context(), dir, nil, Any)
	want(t, "fenced put", err, ErrClosed)
	_, err = s.Session(t.Context(), time.Minute)
	want(t, "session", err, ErrClosed)
	want(t, "compact", s.Compact(t.Context(), 1), ErrClosed)
	events, reason = s.Watch(t.Context(), dir, 0)
	ended(t, events)
	want(t, "watch", reason(), ErrClosed)
	if err := s.Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
}

// The bounds of what may lie unread, by number and by size, and what happens beyond.
func TestMailboxBounds(t *testing.T) {
	ev := func(n int) Event { return Event{KV: KV{Value: make([]byte, n)}} }
	m := newMailbox(3, 1000)
	if !m.push(ev(1), ev(1), ev(1)) || m.push(ev(1)) || m.reason() != ErrCompacted {
		t.Errorf("three may wait, not four: %v", m.reason())
	}
	m = newMailbox(1000, 1000)
	if !m.push(ev(900)) || m.push(ev(100)) || len(m.queue) != 0 {
		t.Error("1000 bytes may wait, not more, and then nothing is kept")
	}
	m = newMailbox(3, 1000)
	for i := range 100 {
		m.push(Event{Progress: true, KV: KV{Revision: int64(i)}})
	}
	if len(m.queue) != 1 || m.queue[0].Revision != 99 {
		t.Errorf("marks pile up: %v", m.queue)
	}
}

func TestMemoryHistoryIsBounded(t *testing.T) {
	m := openMemory(t).(*memory)
	for range 2 * memoryHistory {
		put(t, m, "k", "x", Any)
	}
	if n := len(m.log); n > memoryHistory*5/4 {
		t.Errorf("%d changes are remembered", n)
	}
	events, reason := m.Watch(t.Context(), "", 2)
	ended(t, events)
	want(t, "watch from the beginning", reason(), ErrCompacted)
}

func TestConfigValidate(t *testing.T) {
	for _, c := range []struct {
		cfg  Config
		part string // of the error; empty: none
	}{
		{Config{Dir: "x"}, ""},
		{Config{Endpoints: []string{"http://a:1", "http://b:1"}}, ""},
		{Config{Endpoints: []string{"https://a:1"}, CAFile: "ca", CertFile: "c", KeyFile: "k", Username: "u", Password: "p"}, ""},
		{Config{}, "neither"},
		{Config{Dir: "x", Endpoints: []string{"http://a:1"}}, "only one"},
		{Config{Dir: "x", Username: "u", Password: "p"}, "for endpoints"},
		{Config{Endpoints: []string{"https://a:1"}, CertFile: "c"}, "needs its key"},
		{Config{Endpoints: []string{"https://a:1"}, Username: "u"}, "needs a password"},
		{Config{Endpoints: []string{"http://a:1"}, CAFile: "ca"}, "without TLS"},
		{Config{Endpoints: []string{"http://a:1", "https://a:1"}}, "some endpoints"},
		{Config{Endpoints: []string{"a:1"}}, `endpoint "a:1"`},
		{Config{Endpoints: []string{"ftp://a:1"}}, "want http"},
		{Config{Dir: "x", OpTimeout: -1}, "negative"},
	} {
		err := c.cfg.Validate()
		if c.part == "" && err != nil || c.part != "" && (!errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), c.part)) {
			t.Errorf("%+v: got error %v, want %q", c.cfg, err, c.part)
		}
	}
	_, err := Open(t.Context(), Config{})
	want(t, "open", err, ErrConfig)
	_, err = Open(t.Context(), Config{Endpoints: []string{"https://127.0.0.1:1"}, CAFile: "/nowhere"})
	want(t, "open with a missing file", err, ErrConfig)
	want(t, "open with a missing file", err, os.ErrNotExist)
}
