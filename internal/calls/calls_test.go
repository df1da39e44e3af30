package calls

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/hop"
)

// request is an exchange as the front makes it; trace "" = it brought none.
func request(rev api.RevisionID, id, trace string) *hop.Exchange {
	x := &hop.Exchange{Req: &fasthttp.Request{}, Resp: &fasthttp.Response{}, ID: id, Revision: rev, Arrived: time.Now()}
	if trace != "" {
		x.Req.Header.Set("Traceparent", trace)
	}
	return x
}

// traced is a traceparent of a trace with some span.
func traced(trace, span int) string { return fmt.Sprintf("00-%032x-%016x-01", trace, span) }

// network is a tracker whose revisions make calls while they serve.
type network struct {
	Tracker
	does map[api.RevisionID]func(x *hop.Exchange)
	step hop.Handler
}

func newNetwork() *network {
	n := &network{does: map[api.RevisionID]func(*hop.Exchange){}}
	n.step = n.Handler(hop.HandlerFunc(func(x *hop.Exchange) error {
		if f := n.does[x.Revision]; f != nil {
			f(x)
		}
		return nil
	}))
	n.On()
	return n
}

func (n *network) serve(x *hop.Exchange) { _ = n.step.Serve(x) }

func TestCallers(t *testing.T) {
	chain := func(pass func(x *hop.Exchange, to api.RevisionID) *hop.Exchange) map[Pair]int {
		n := newNetwork()
		n.does["a"] = func(x *hop.Exchange) {
			n.serve(pass(x, "b"))
			n.serve(pass(x, "d")) // b is over: this is a's call, not b's
		}
		n.does["b"] = func(x *hop.Exchange) { n.serve(pass(x, "c")) }
		n.serve(request("a", "first", traced(1, 1)))
		n.serve(request("c", "another", traced(2, 1))) // from outside
		return n.Take()
	}
	want := map[Pair]int{{"a", "b"}: 1, {"b", "c"}: 1, {"a", "d"}: 1}
	same := func(got map[Pair]int) bool { return fmt.Sprint(got) == fmt.Sprint(want) }
	serial := 0
	other := func() string { serial++; return fmt.Sprint("own-", serial) }
	if got := chain(func(_ *hop.Exchange, to api.RevisionID) *hop.Exchange { return request(to, other(), traced(1, 7)) }); !same(got) {
		t.Errorf("traceparent passed on: %v", got)
	}
	if got := chain(func(x *hop.Exchange, to api.RevisionID) *hop.Exchange { return request(to, "first", traced(99, 7)) }); !same(got) {
		t.Errorf("request id passed on: %v", got)
	}
	if got := chain(func(_ *hop.Exchange, to api.RevisionID) *hop.Exchange { return request(to, other(), "") }); len(got) != 0 {
		t.Errorf("nothing passed on: %v", got)
	}
}

func TestOff(t *testing.T) {
	var tr Tracker
	n := &network{}
	h := tr.Handler(hop.HandlerFunc(func(x *hop.Exchange) error {
		if x.Revision == "a" {
			return n.step.Serve(request("b", x.ID, ""))
		}
		return nil
	}))
	n.step = h
	_ = h.Serve(request("a", "1", ""))
	if got := tr.Take(); got != nil {
		t.Errorf("learnt %v while off", got)
	}
}

// Whatever comes, memory stays as it is, and what is on its way is forgotten when it ends.
func TestBounds(t *testing.T) {
	n := newNetwork()
	for i := range 3 * sets * ways { // all on their way at once
		n.begin(request("a", fmt.Sprint(i), ""))
	}
	for i := range 2 * maxPairs {
		n.count(Pair{"a", api.RevisionID(fmt.Sprint(i))}, 1)
	}
	if got := len(n.Take()); got != maxPairs {
		t.Errorf("%d pairs, at most %d are kept", got, maxPairs)
	}
	n.shift.Store(0) // that was many
	late := request("a", "late", "")
	late.Arrived = time.Now().Add(2 * maxAge)
	names, serial := n.begin(late) // in the place of one that nobody hears of any more
	if n.caller(names, late.Arrived) != "a" {
		t.Error("old requests keep new ones out")
	}
	n.end(names, serial)
	if n.caller(names, late.Arrived) != "" {
		t.Error("a request that has ended is still there")
	}
}

// Under load only a part is followed, and its calls stand for all.
func TestSampling(t *testing.T) {
	n := newNetwork()
	n.does["a"] = func(x *hop.Exchange) { n.serve(request("b", x.ID, "")) }
	second := func() int {
		for i := range 4 * most {
			n.serve(request("a", fmt.Sprint("r", i), ""))
		}
		return n.Take()[Pair{"a", "b"}]
	}
	if got := second(); got != 4*most {
		t.Errorf("%d calls at first, want all %d", got, 4*most)
	}
	got := 0
	for range 5 {
		got = second()
	}
	if shift := n.shift.Load(); shift == 0 || got < 3*most || got > 5*most {
		t.Errorf("one of %d is followed, and %d of %d calls are said", 1<<shift, got, 4*most)
	}
	for range 20 {
		n.Take()
	}
	if n.shift.Load() != 0 {
		t.Error("few requests, and not all are followed")
	}
}

func TestConcurrent(t *testing.T) {
	n := newNetwork()
	n.does["a"] = func(x *hop.Exchange) { n.serve(request("b", x.ID, "")) }
	var running sync.WaitGroup
	for g := range 8 {
		running.Go(func() {
			for i := range 200 {
				n.serve(request("a", fmt.Sprint(g, "-", i), ""))
			}
		})
	}
	running.Wait()
	if got := n.Take()[Pair{"a", "b"}]; got != 1600 {
		t.Errorf("%d calls, want 1600", got)
	}
}

func BenchmarkStep(b *testing.B) {
	for _, on := range []bool{false, true} {
		b.Run(fmt.Sprintf("on=%v", on), func(b *testing.B) {
			var tr Tracker
			if on {
				tr.On()
			}
			h := tr.Handler(hop.HandlerFunc(func(*hop.Exchange) error { return nil }))
			x := request("a", "some-request-id", traced(1, 2))
			b.ReportAllocs()
			for b.Loop() {
				_ = h.Serve(x)
			}
		})
	}
}
