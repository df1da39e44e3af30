package havip

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// result is what a failure cost.
type result struct {
	lost, sent       int // echoes at one a millisecond
	kept, of         int // connections that talked all the time
	fresh, freshOf   int // connections that were opened just before
	stall            time.Duration
	backLost, backOf int // echoes while the old master came back
}

func (r result) String() string {
	return fmt.Sprintf("outage %d ms (of %d echoes), flows %d of %d, fresh %d of %d, longest stall %d ms, return: %d of %d lost",
		r.lost, r.sent, r.kept, r.of, r.fresh, r.freshOf, r.stall.Milliseconds(), r.backLost, r.backOf)
}

func (r result) check(t testing.TB, most int) {
	t.Helper()
	if r.lost > most {
		t.Errorf("outage of %d ms, want at most %d", r.lost, most)
	}
	if r.backLost > 5 {
		t.Errorf("%d echoes lost on the return of the old master", r.backLost)
	}
	if r.kept != r.of || r.fresh != r.freshOf {
		t.Errorf("kept %d of %d flows and %d of %d fresh ones", r.kept, r.of, r.fresh, r.freshOf)
	}
}

// fail lets a, which is master, fail under traffic, waits for b, and mends a and waits until it is master again. Both phases are measured.
// mend may be nil.
func (l *lab) fail(long, fresh int, breakIt, mend func()) result {
	l.t.Helper()
	p := l.probe()
	defer p.stop()
	talking := talk(l.open(long))
	time.Sleep(100 * time.Millisecond)
	conns := l.open(fresh)
	l.caughtUp()
	began := time.Now()
	breakIt()
	within(l.t, 10*time.Second, "b is master", l.b.master)
	time.Sleep(500 * time.Millisecond)
	r := result{of: long, freshOf: fresh}
	r.lost, r.sent = p.lost(began)
	if mend != nil {
		back := time.Now()
		mend()
		l.settled()
		time.Sleep(350 * time.Millisecond)
		r.backLost, r.backOf = p.lost(back)
	}
	r.fresh = kept(conns, 8*time.Second)
	r.kept, r.stall = talking.stop()
	for _, c := range append(conns, talking.conns...) {
		c.Close()
	}
	return r
}

// caughtUp waits until b has as many entries as a, except where nothing is allowed (slack): there, members have to be faster than the failure.
func (l *lab) caughtUp() {
	l.t.Helper()
	if slack() == 0 {
		return
	}
	defer l.tell()
	within(l.t, 10*time.Second, "b has what a has", func() bool {
		s, err := l.a.ask()
		return err == nil && s.Replicate.LagSeconds == 0 && l.b.entries() >= l.a.entries()
	})
}

// entries is how many the kernel counts in a router's table.
func (r *router) entries() (n int) {
	r.t.Helper()
	err := r.ns.Do(func() error {
		b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if err == nil {
			n, err = strconv.Atoi(strings.TrimSpace(string(b)))
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// failure is a way for the master to fail.
type failure struct {
	name string
	most int // ms of outage allowed
	do   func(*lab)
	mend func(*lab)
}

var failures = []failure{
	{"all links", 150, func(l *lab) { l.a.cables(false) }, func(l *lab) { l.a.cables(true) }},
	{"ENI link only", 50, func(l *lab) { l.a.eni.Cable(false) }, func(l *lab) { l.a.eni.Cable(true) }},
	{"underlay link only", 150, func(l *lab) { l.a.under.Cable(false) }, func(l *lab) { l.a.under.Cable(true) }},
	{"SIGTERM", 5, func(l *lab) { l.a.signal(syscall.SIGTERM) }, func(l *lab) { l.oneHolder(); l.a.start() }},
	{"SIGKILL", 5, func(l *lab) { l.a.signal(syscall.SIGKILL) }, func(l *lab) { l.oneHolder(); l.a.start() }},
	{"SIGSTOP", 5, func(l *lab) { l.a.signal(syscall.SIGSTOP) }, func(l *lab) { l.oneHolder(); l.a.signal(syscall.SIGCONT) }},
}
