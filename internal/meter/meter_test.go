package meter

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/thawrun/thaw/api"
)

const id api.RevisionID = "default/hello-00001"

func text(t *testing.T, r *Requests) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WriteMetrics(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// values returns the lines as name{labels} -> value; the namespace, which is the same everywhere, is left out.
func values(t *testing.T, r *Requests) map[string]string {
	t.Helper()
	all := text(t, r)
	p := expfmt.NewTextParser(model.UTF8Validation)
	if _, err := p.TextToMetricFamilies(strings.NewReader(all)); err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	for line := range strings.Lines(all) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "} "); ok && line[0] != '#' {
			out[strings.Replace(k, `namespace="default",`, "", 1)+"}"] = v
		}
	}
	return out
}

// Every duration is in the bucket that a dumb search finds, bounds included.
func TestBuckets(t *testing.T) {
	check := func(d time.Duration) {
		t.Helper()
		var h histogram
		h.observe(d)
		want := 0
		for want < buckets && d > 1<<(firstBit+want) {
			want++
		}
		if h.count[want].Load() != 1 {
			t.Errorf("%v is not in bucket %d", d, want)
		}
	}
	for _, d := range []time.Duration{-1, 0, 1, 1 << 62, time.Hour} {
		check(d)
	}
	for i := range buckets + 2 {
		for off := time.Duration(-1); off <= 1; off++ {
			check(1<<(firstBit+i) + off)
		}
	}
	for range 10_000 {
		check(time.Duration(rand.Int64() >> rand.IntN(63)))
	}
}

func TestCount(t *testing.T) {
	r := &Requests{}
	r.Add(id, "hello")
	r.Add("default/idle-00001", "idle")
	for range 3 {
		r.Count(&Request{Revision: id, Status: 200, Duration: time.Millisecond, In: 5, Out: 7})
	}
	r.Count(&Request{Revision: id, Status: 503, Duration: time.Second, Waited: 2 * time.Second, Cut: true})
	r.Count(&Request{Revision: "default/unknown", Status: 404, Duration: time.Microsecond})
	r.Count(&Request{Revision: id, Status: 0, Duration: 1}) // nonsense does no harm
	r.Count(&Request{Revision: id, Status: 999, Duration: 1})

	got := values(t, r)
	const hello = `service="hello",revision="hello-00001"`
	for k, want := range map[string]string{
		`http_server_request_duration_seconds_count{` + hello + `,http_response_status_class="2xx"}`:                       "3",
		`http_server_request_duration_seconds_sum{` + hello + `,http_response_status_class="2xx"}`:                         "0.003",
		`http_server_request_duration_seconds_bucket{` + hello + `,http_response_status_class="2xx",le="0.000524288"}`:     "0",
		`http_server_request_duration_seconds_bucket{` + hello + `,http_response_status_class="2xx",le="0.001048576"}`:     "3",
		`http_server_request_duration_seconds_count{` + hello + `,http_response_status_class="5xx"}`:                       "2",
		`http_server_request_duration_seconds_count{` + hello + `,http_response_status_class="1xx"}`:                       "1",
		`http_server_request_duration_seconds_count{namespace="",service="",revision="",http_response_status_class="4xx"}`: "1",
		`thaw_revision_queue_wait_seconds_sum{` + hello + `}`:                                                              "2",
		`thaw_revision_queue_wait_seconds_count{` + hello + `}`:                                                            "1",
		`thaw_revision_received_bytes_total{` + hello + `}`:                                                                "15",
		`thaw_revision_sent_bytes_total{` + hello + `}`:                                                                    "21",
		`thaw_revision_answers_cut_total{` + hello + `}`:                                                                   "1",
	} {
		if got[k] != want {
			t.Errorf("%s = %q, want %s", k, got[k], want)
		}
	}
	if strings.Contains(text(t, r), "idle") {
		t.Error("a revision without requests has lines")
	}
}

// Revisions come and go, requests name any number of others: what is written stays small.
func TestBoundedCardinality(t *testing.T) {
	r := &Requests{}
	for i := range 1000 {
		id := api.RevisionID(fmt.Sprintf("default/fn-%05d", i))
		r.Add(id, "fn")
		r.Count(&Request{Revision: id, Status: 200})
		r.Remove(id)
		r.Count(&Request{Revision: id, Status: 200}) // under way while its revision went
	}
	counts := 0
	for k, v := range values(t, r) {
		if strings.HasPrefix(k, "http_server_request_duration_seconds_count") {
			if counts++; v != "1000" {
				t.Errorf("%s %s, want the 1000 that came late", k, v)
			}
		}
	}
	if counts != 1 {
		t.Errorf("%d series", counts)
	}
}

// No count is lost, however many count at once, while the numbers are read.
func TestConcurrent(t *testing.T) {
	r := &Requests{}
	r.Add(id, "hello")
	const workers, each = 8, 2000
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range each {
				r.Count(&Request{Revision: id, Status: 200, Duration: time.Duration(i), Waited: 1, Out: 1})
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			text(t, r)
		}
	})
	wg.Wait()
	want := fmt.Sprint(workers * each)
	for k, v := range values(t, r) {
		if (strings.Contains(k, "_count{") || strings.Contains(k, "sent_bytes_total") || strings.Contains(k, `le="+Inf"`)) && v != want {
			t.Errorf("%s %s, want %s", k, v, want)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	r := &Requests{}
	r.Add(id, "hello")
	q := &Request{Revision: id, Status: 200, Duration: time.Millisecond, Waited: time.Millisecond, In: 1, Out: 1}
	r.Count(q)
	if n := testing.AllocsPerRun(1000, func() { r.Count(q) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCount(b *testing.B) {
	r := &Requests{}
	for i := range 1000 {
		r.Add(api.RevisionID(fmt.Sprintf("default/fn-%05d", i)), "fn")
	}
	r.Add(id, "hello")
	b.Run("alone", func(b *testing.B) {
		b.ReportAllocs()
		q := &Request{Revision: id, Status: 200, Duration: time.Millisecond, Out: 13}
		for b.Loop() {
			r.Count(q)
		}
	})
	b.Run("parallel", func(b *testing.B) { // every core, the same revision: the worst case
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			q := &Request{Revision: id, Status: 200, Duration: time.Millisecond, Out: 13}
			for pb.Next() {
				r.Count(q)
			}
		})
	})
}
