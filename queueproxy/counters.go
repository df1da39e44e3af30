package queueproxy

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/hop"
)

// Bounds of the request duration histogram in milliseconds, those of Knative's queue-proxy.
var bounds = [...]int64{5, 10, 25, 50, 75, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10000}

// Why requests were refused, as the reason label of thaw_queueproxy_refused_total.
const (
	refusedFull     = iota // 503, the queue was full
	refusedBusy            // back to the activator
	refusedWaited          // 504
	refusedGone            // the client left while waiting
	refusedDraining        // told to go elsewhere
	refusedBad             // 400
	reasons
)

var reasonNames = [reasons]string{"queue_full", "busy", "waited_too_long", "client_gone", "draining", "bad_request"}

// counters grow from the start on. All are atomic; a reader may see a request in one and not yet in another.
type counters struct {
	refused     [reasons]atomic.Uint64
	failed      atomic.Uint64 // the next step returned an error: no answer of the function
	waited      atomic.Uint64 // got their slot after waiting
	waitedNanos atomic.Int64
	class       [5]histogram // by status class, 1xx (upgrades) to 5xx
}

type histogram struct {
	bucket [len(bounds) + 1]atomic.Uint64
	nanos  atomic.Int64
}

// answered counts an answer of the function, with the time since its request came.
func (c *counters) answered(x *hop.Exchange, now time.Time) {
	if x.Resp == nil || x.Arrived.IsZero() {
		return
	}
	class := x.Resp.StatusCode()/100 - 1
	if class < 0 || class >= len(c.class) {
		return
	}
	d := now.Sub(x.Arrived)
	i := 0
	for i < len(bounds) && d > time.Duration(bounds[i])*time.Millisecond {
		i++
	}
	c.class[class].bucket[i].Add(1)
	c.class[class].nanos.Add(int64(d))
}

// WriteMetrics writes the counters and gauges of proxies in the Prometheus text format, each family once, with the labels
// namespace, revision and instance. Families are listed in docs/queueproxy.md.
func WriteMetrics(w io.Writer, proxies []*Proxy) error {
	b := bufio.NewWriter(w)
	labels := make([]string, len(proxies))
	for i, p := range proxies {
		labels[i] = labelsOf(p.cfg.Revision, p.cfg.Instance)
	}
	family := func(name, kind, help string, write func(p *Proxy, labels string)) {
		fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
		for i, p := range proxies {
			write(p, labels[i])
		}
	}
	family("thaw_queueproxy_request_duration_seconds", "histogram", "From the arrival of a request to the last byte of the function's answer.",
		func(p *Proxy, l string) {
			for c := range p.count.class {
				p.count.class[c].write(b, "thaw_queueproxy_request_duration_seconds", fmt.Sprintf(`%s,status_class="%dxx"`, l, c+1))
			}
		})
	family("thaw_queueproxy_inside", "gauge", "Requests inside, by state: running in the function, waiting for a slot.",
		func(p *Proxy, l string) {
			waiting := p.Waiting()
			fmt.Fprintf(b, "thaw_queueproxy_inside{%s,state=\"running\"} %d\n", l, max(0, p.InFlight()-waiting))
			fmt.Fprintf(b, "thaw_queueproxy_inside{%s,state=\"waiting\"} %d\n", l, waiting)
		})
	family("thaw_queueproxy_limit", "gauge", "Requests that the function takes at once; 0 = no limit.",
		func(p *Proxy, l string) {
			fmt.Fprintf(b, "thaw_queueproxy_limit{%s} %d\n", l, max(0, p.cfg.Concurrency))
		})
	family("thaw_queueproxy_queue_limit", "gauge", "Requests that may wait.",
		func(p *Proxy, l string) { fmt.Fprintf(b, "thaw_queueproxy_queue_limit{%s} %d\n", l, p.cfg.queue()) })
	family("thaw_queueproxy_requests_total", "counter", "Requests accepted, by way: through an activator or straight.",
		func(p *Proxy, l string) {
			all, proxied := p.load.totals()
			fmt.Fprintf(b, "thaw_queueproxy_requests_total{%s,way=\"direct\"} %d\n", l, all-proxied)
			fmt.Fprintf(b, "thaw_queueproxy_requests_total{%s,way=\"activator\"} %d\n", l, proxied)
		})
	family("thaw_queueproxy_refused_total", "counter", "Requests that did not get to the function, by reason.",
		func(p *Proxy, l string) {
			for i, name := range reasonNames {
				fmt.Fprintf(b, "thaw_queueproxy_refused_total{%s,reason=\"%s\"} %d\n", l, name, p.count.refused[i].Load())
			}
		})
	family("thaw_queueproxy_failed_total", "counter", "Requests that had a slot and got no answer of the function.",
		func(p *Proxy, l string) {
			fmt.Fprintf(b, "thaw_queueproxy_failed_total{%s} %d\n", l, p.count.failed.Load())
		})
	family("thaw_queueproxy_wait_seconds", "summary", "Waits of those who got a slot after waiting.",
		func(p *Proxy, l string) {
			fmt.Fprintf(b, "thaw_queueproxy_wait_seconds_sum{%s} %s\n", l, secs(p.count.waitedNanos.Load()))
			fmt.Fprintf(b, "thaw_queueproxy_wait_seconds_count{%s} %d\n", l, p.count.waited.Load())
		})
	family("thaw_queueproxy_draining", "gauge", "1 while new requests are refused.",
		func(p *Proxy, l string) {
			v := 0
			if p.Draining() {
				v = 1
			}
			fmt.Fprintf(b, "thaw_queueproxy_draining{%s} %d\n", l, v)
		})
	return b.Flush()
}

func (h *histogram) write(w io.Writer, name, labels string) {
	var n [len(bounds) + 1]uint64
	var total uint64
	for i := range n {
		total += h.bucket[i].Load()
		n[i] = total
	}
	if total == 0 {
		return // a class that never came costs no lines
	}
	for i, ms := range bounds {
		fmt.Fprintf(w, "%s_bucket{%s,le=\"%s\"} %d\n", name, labels, secs(ms*int64(time.Millisecond)), n[i])
	}
	fmt.Fprintf(w, "%s_bucket{%s,le=\"+Inf\"} %d\n%s_sum{%s} %s\n%s_count{%s} %d\n", name, labels, total, name, labels, secs(h.nanos.Load()), name, labels, total)
}

// secs writes nanoseconds as seconds.
func secs(nanos int64) string { return strconv.FormatFloat(float64(nanos)/1e9, 'g', -1, 64) }

// WriteReport writes what the autoscaler reads of one report, in the Prometheus text format. The period of s must have been one second, for
// its counts to be rates.
func WriteReport(w io.Writer, s endpoints.Stat) error {
	b := bufio.NewWriter(w)
	labels := labelsOf(s.Revision, s.Source)
	for _, m := range [...]struct {
		name, help string
		value      float64
	}{
		{"thaw_queueproxy_concurrency_average", "Requests inside, averaged over the last second.", s.Concurrency},
		{"thaw_queueproxy_proxied_concurrency_average", "The part of them that came through an activator.", s.ProxiedConcurrency},
		{"thaw_queueproxy_requests_per_second", "Requests that began in the last second.", s.Requests},
		{"thaw_queueproxy_proxied_requests_per_second", "The part of them that came through an activator.", s.ProxiedRequests},
	} {
		fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s gauge\n%s{%s} %g\n", m.name, m.help, m.name, m.name, labels, m.value)
	}
	return b.Flush()
}

func labelsOf(id api.RevisionID, instance string) string {
	ns, rev := id.Split()
	return fmt.Sprintf(`namespace="%s",revision="%s",instance="%s"`, escape(ns), escape(rev), escape(instance))
}

var escaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// escape makes s the inside of a label value.
func escape(s string) string { return escaper.Replace(s) }
