// Package meter counts requests by revision: how many by class of status, how long they took, how long they waited for a slot, and their bytes.
//
// Counting takes no lock and allocates nothing: a look-up in a map that is read without one, and a handful of atomic additions. Series exist only
// for revisions that were made known (Add) and end with them (Remove), so that neither clients nor time can make them many; a
// request for anything else is counted under the empty revision. Histograms are made when the first value comes: an idle revision costs a
// hundred bytes and no line of output.
package meter

import (
	"bufio"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/api"
)

// Bounds of all histograms: powers of two from 128 µs (below it, proxying itself is the time) to 134 s, so that a bucket is found by
// counting bits and a percentile is known to a factor of two everywhere.
const (
	firstBit = 17 // 2^17 ns = 131 µs
	buckets  = 21 // the last finite one is 2^37 ns = 137 s
)

// histogram is one distribution of durations.
type histogram struct {
	count [buckets + 1]atomic.Uint64 // by upper bound 2^(firstBit+i) ns; the last one is the rest
	nanos atomic.Int64
}

func (h *histogram) observe(d time.Duration) {
	n := uint64(max(d, 0))
	// Upper bounds are inclusive, as Prometheus has it.
	i := min(max(bits.Len64(max(n, 1)-1)-firstBit, 0), buckets)
	h.count[i].Add(1)
	h.nanos.Add(int64(n))
}

// lazy is a histogram that is made when it is needed.
type lazy struct{ p atomic.Pointer[histogram] }

func (l *lazy) observe(d time.Duration) {
	h := l.p.Load()
	if h == nil {
		l.p.CompareAndSwap(nil, new(histogram))
		h = l.p.Load()
	}
	h.observe(d)
}

// series is what is counted of one revision.
type series struct {
	service  string
	class    [5]lazy // durations by class of status, 1xx to 5xx
	wait     lazy
	in, out  atomic.Uint64
	cut      atomic.Uint64
	revision api.RevisionID
}

// Requests counts the requests of a process. The zero value is ready.
type Requests struct {
	known    sync.Map // api.RevisionID -> *series
	elsewise series   // of no known revision
}

// Add makes a revision known. service is the name of its service, "" when it has none.
func (r *Requests) Add(id api.RevisionID, service string) {
	r.known.LoadOrStore(id, &series{revision: id, service: service})
}

// Remove forgets a revision and what was counted of it.
func (r *Requests) Remove(id api.RevisionID) { r.known.Delete(id) }

// Request is what is counted of one.
type Request struct {
	Revision api.RevisionID
	Status   int
	Duration time.Duration // from its arrival to the end of its answer
	Waited   time.Duration // for a slot; 0 = it did not have to
	In, Out  int64         // bytes of the bodies
	Cut      bool          // the answer broke off
}

// Count counts a request that is over.
func (r *Requests) Count(q *Request) {
	s := &r.elsewise
	if v, ok := r.known.Load(q.Revision); ok {
		s = v.(*series)
	}
	s.class[min(max(q.Status/100, 1), len(s.class))-1].observe(q.Duration)
	if q.Waited > 0 {
		s.wait.observe(q.Waited)
	}
	if q.In > 0 {
		s.in.Add(uint64(q.In))
	}
	if q.Out > 0 {
		s.out.Add(uint64(q.Out))
	}
	if q.Cut {
		s.cut.Add(1)
	}
}

// WriteMetrics writes the families of docs/metrics.md in Prometheus' text format.
func (r *Requests) WriteMetrics(w io.Writer) error {
	all := []*series{&r.elsewise}
	r.known.Range(func(_, v any) bool { all = append(all, v.(*series)); return true })
	slices.SortFunc(all, func(a, b *series) int { return strings.Compare(string(a.revision), string(b.revision)) })
	labels := make([]string, len(all))
	for i, s := range all {
		namespace, name := s.revision.Split()
		labels[i] = fmt.Sprintf("namespace=%q,service=%q,revision=%q", namespace, s.service, name)
	}
	b := bufio.NewWriter(w)
	family := func(name, kind, help string, write func(s *series, name, labels string)) {
		fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
		for i, s := range all {
			write(s, name, labels[i])
		}
	}
	counter := func(get func(*series) uint64) func(s *series, name, labels string) {
		return func(s *series, name, labels string) {
			if n := get(s); n > 0 {
				fmt.Fprintf(b, "%s{%s} %d\n", name, labels, n)
			}
		}
	}
	family("http_server_request_duration_seconds", "histogram", "From the arrival of a request to the end of its answer.", func(s *series, name, labels string) {
		for i := range s.class {
			s.class[i].write(b, name, fmt.Sprintf(`%s,http_response_status_class="%dxx"`, labels, i+1))
		}
	})
	family("thaw_revision_queue_wait_seconds", "histogram", "Waits for a free slot, of requests that had to.", func(s *series, name, labels string) { s.wait.write(b, name, labels) })
	family("thaw_revision_received_bytes_total", "counter", "Bytes of the bodies of requests.", counter(func(s *series) uint64 { return s.in.Load() }))
	family("thaw_revision_sent_bytes_total", "counter", "Bytes of the bodies of answers.", counter(func(s *series) uint64 { return s.out.Load() }))
	family("thaw_revision_answers_cut_total", "counter", "Answers that broke off after their head.", counter(func(s *series) uint64 { return s.cut.Load() }))
	return b.Flush()
}

func (l *lazy) write(w io.Writer, name, labels string) {
	h := l.p.Load()
	if h == nil {
		return
	}
	var total uint64
	for i := range buckets {
		total += h.count[i].Load()
		fmt.Fprintf(w, "%s_bucket{%s,le=\"%s\"} %d\n", name, labels, seconds(1<<(firstBit+i)), total)
	}
	total += h.count[buckets].Load()
	fmt.Fprintf(w, "%s_bucket{%s,le=\"+Inf\"} %d\n%s_sum{%s} %s\n%s_count{%s} %d\n", name, labels, total, name, labels, seconds(h.nanos.Load()), name, labels, total)
}

func seconds(nanos int64) string { return strconv.FormatFloat(float64(nanos)/1e9, 'g', -1, 64) }
