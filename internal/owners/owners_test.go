package owners

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/internal/shards"
	"github.com/thawrun/thaw/internal/state"
)

// book notes who holds what, and complains of two at a time.
type book struct {
	t      *testing.T
	mu     sync.Mutex
	holder map[int]string
	epochs map[int]int64
	moves  int
}

func (b *book) changed(name string) func(int, int64) {
	return func(shard int, epoch int64) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.moves++
		switch holder := b.holder[shard]; {
		case epoch == 0 && holder == name:
			delete(b.holder, shard)
		case epoch == 0:
		case holder != "" && holder != name:
			b.t.Errorf("%s has shard %d while %s has it", name, shard, holder)
		case epoch <= b.epochs[shard]:
			b.t.Errorf("epoch of shard %d went from %d to %d", shard, b.epochs[shard], epoch)
		default:
			b.holder[shard], b.epochs[shard] = name, epoch
		}
	}
}

// shares is how many shards each one holds.
func (b *book) shares() map[string]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := map[string]int{}
	for _, name := range b.holder {
		n[name]++
	}
	return n
}

// wanted is what the hashes say.
func wanted(members ...string) map[string]int {
	n := map[string]int{}
	for s := range shards.Count {
		n[shards.Preferred(members, s)]++
	}
	return n
}

// Members come and go; each shard has one holder at a time, and all of them the one that the hashes name.
func TestShareOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := state.Memory()
		defer store.Close()
		b := &book{t: t, holder: map[int]string{}, epochs: map[int]int64{}}
		stops := map[string]func(){}
		join := func(name string) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() {
				done <- Run(ctx, Config{Store: store, Group: "g", Name: name, Addr: name + ":1", Changed: b.changed(name)})
			}()
			stops[name] = func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		}
		expect := func(members ...string) {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			if got, want := b.shares(), wanted(members...); !maps.Equal(got, want) {
				t.Errorf("shares %v, want %v", got, want)
			}
		}
		join("a")
		expect("a")
		join("b")
		expect("a", "b")
		before := b.moves
		time.Sleep(time.Minute)
		if b.moves != before {
			t.Errorf("%d moves although nothing happened", b.moves-before)
		}
		join("c")
		expect("a", "b", "c")
		stops["b"]()
		expect("a", "c")

		var told []map[string]string
		ctx, cancel := context.WithCancel(t.Context())
		following := make(chan error)
		go func() {
			following <- Members(ctx, store, "g", func(m map[string]string) { told = append(told, m) })
		}()
		synctest.Wait()
		join("d")
		expect("a", "c", "d")
		cancel()
		<-following
		if len(told) != 2 || told[1]["d"] != "d:1" || len(told[1]) != 3 {
			t.Errorf("told %v", told)
		}
		for _, name := range []string{"a", "c", "d"} {
			stops[name]()
		}
		if got := b.shares(); len(got) != 0 {
			t.Errorf("left %v", got)
		}
	})
}

// A key that belongs to a lease that is running out is waited for, and nobody holds the shard meanwhile.
func TestDeadOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := state.Memory()
		defer store.Close()
		dying, die := context.WithCancel(t.Context())
		s, err := store.Session(dying, 2*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for i := range shards.Count {
			if _, err := s.Put(t.Context(), fmt.Sprintf("/thaw/owners/g/shards/%02d", i), []byte(`{}`), 0); err != nil {
				t.Fatal(err)
			}
		}
		b := &book{t: t, holder: map[int]string{}, epochs: map[int]int64{}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- Run(ctx, Config{Store: store, Group: "g", Name: "a", Changed: b.changed("a")}) }()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if n := b.shares()["a"]; n != 0 {
			t.Errorf("%d shards taken from one who lives", n)
		}
		die() // without giving back
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if n := b.shares()["a"]; n != shards.Count {
			t.Errorf("%d shards taken over, want all", n)
		}
		cancel()
		<-done
	})
}

// leases is a store whose sessions can be lost, and whose way back to the server takes a moment.
type leases struct {
	state.Store
	mu   sync.Mutex
	last *lease
}

type lease struct {
	state.Session
	forget context.CancelFunc // stops what keeps it alive: its member knows at once, the server in a time to live
}

func (l *leases) Session(ctx context.Context, ttl time.Duration) (state.Session, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := l.Store.Session(ctx, ttl)
	if err != nil {
		cancel()
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = &lease{s, cancel}
	return l.last, nil
}

func (l *lease) Close() error {
	defer time.Sleep(10 * time.Millisecond)
	return l.Session.Close()
}

func (l *leases) newest() *lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Who has lost his lease and claims his shards anew is told that he had lost them, if another one may have had them; alone he goes on.
func TestClaimedAgain(t *testing.T) {
	for _, alone := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			store := &leases{Store: state.Memory()}
			defer store.Store.Close()
			told := map[int][]int64{}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() {
				done <- Run(ctx, Config{Store: store, Group: "g", Name: "a", Changed: func(shard int, epoch int64) { told[shard] = append(told[shard], epoch) }})
			}()
			time.Sleep(time.Second)
			synctest.Wait()
			if len(told) != shards.Count {
				t.Fatalf("%d shards", len(told))
			}
			lost := store.newest()
			lost.forget()
			synctest.Wait() // it has noticed, and is about to look again
			_ = lost.Session.Close()
			if !alone { // took all of them meanwhile, and has given those back that are not his
				if _, err := store.Put(t.Context(), root("g")+"members/b", []byte("{}"), state.Any); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Second)
			synctest.Wait()
			for shard, epochs := range told {
				switch {
				case !alone && shards.Preferred([]string{"a", "b"}, shard) == "b":
					if len(epochs) != 2 || epochs[1] != 0 {
						t.Errorf("shard %d, which is another one's: %v", shard, epochs)
					}
				case alone && (len(epochs) != 2 || epochs[1] <= epochs[0]):
					t.Errorf("alone, of shard %d it was told %v", shard, epochs)
				case !alone && (len(epochs) != 3 || epochs[1] != 0 || epochs[2] <= epochs[0]):
					t.Errorf("of shard %d it was told %v", shard, epochs)
				}
			}
			cancel()
			<-done
		})
	}
}

// A member that has given a lease up by its own clock is there again before that has run out: nobody takes its shards.
func TestNotAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := state.Memory()
		defer store.Close()
		weak := &leases{Store: store}
		b := &book{t: t, holder: map[int]string{}, epochs: map[int]int64{}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- Run(ctx, Config{Store: weak, Group: "g", Name: "a", Changed: b.changed("a")}) }()
		go func() { done <- Run(ctx, Config{Store: store, Group: "g", Name: "b", Changed: b.changed("b")}) }()
		time.Sleep(time.Second)
		synctest.Wait()
		gained := 0
		before := b.shares()["b"]
		for range 3 {
			weak.newest().forget()
			for range 1000 {
				time.Sleep(time.Millisecond)
				synctest.Wait()
				gained = max(gained, b.shares()["b"]-before)
			}
		}
		if gained != 0 {
			t.Errorf("%d shards were taken over from one who was there", gained)
		}
		if got, want := b.shares(), wanted("a", "b"); !maps.Equal(got, want) {
			t.Errorf("shares %v, want %v", got, want)
		}
		cancel()
		<-done
		<-done
	})
}

// breaking is a store that is not to be watched for a while.
type breaking struct {
	state.Store
	times atomic.Int32
}

func (b *breaking) Watch(ctx context.Context, prefix string, from int64) (<-chan state.Event, func() error) {
	if b.times.Add(-1) < 0 {
		return b.Store.Watch(ctx, prefix, from)
	}
	none := make(chan state.Event)
	close(none)
	return none, func() error { return state.ErrUnavailable }
}

// A member whose state does not answer for a while takes part again, in a session of its own each time.
func TestStartOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &breaking{Store: state.Memory()}
		defer store.Close()
		store.times.Store(10)
		b := &book{t: t, holder: map[int]string{}, epochs: map[int]int64{}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- Run(ctx, Config{Store: store, Group: "g", Name: "a", Changed: b.changed("a")}) }()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := b.shares()["a"]; n != shards.Count || store.times.Load() >= 0 {
			t.Errorf("%d shards, want all; %d breaks are left", n, store.times.Load()+1)
		}
		cancel()
		<-done
	})
}

func TestConfig(t *testing.T) {
	if err := Run(t.Context(), Config{Store: state.Memory(), Group: "g", Name: "a/b", Changed: func(int, int64) {}}); err == nil {
		t.Error("a name with a slash was taken")
	}
}
