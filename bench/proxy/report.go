package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// summary is what is told of a peer in a row.
type summary struct {
	Row, Peer      string
	US, Min, Max   float64 // CPU microseconds per request: median, least, most
	Ratio          float64 `json:",omitempty"` // to nginx, median over the rounds; 0 = nginx is not there
	Rate           float64 // requests per second
	P50, P99       float64 // milliseconds
	KiB            float64 `json:",omitempty"` // per connection or request held
	Resident, Note string  `json:",omitempty"`
}

func median[T ~int64 | ~float64](v []T) T {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

func column[T any](rr []result, f func(r result) T) (v []T) {
	for _, r := range rr {
		v = append(v, f(r))
	}
	return v
}

// summarize sorts by the order of the peers; base is nginx, round by round, since the machine's speed drifts.
func summarize(r row, got map[*peer][]result) (all []summary) {
	var base []result
	var peers []*peer
	for p, rr := range got {
		peers = append(peers, p)
		if p.name == "nginx" {
			base = rr
		}
	}
	slices.SortFunc(peers, func(a, b *peer) int { return a.pids[0] - b.pids[0] })
	for _, p := range peers {
		rr := got[p]
		us := column(rr, func(r result) float64 { return r.us })
		s := summary{Row: r.name, Peer: p.name, US: median(us), Min: slices.Min(us), Max: slices.Max(us),
			Rate: median(column(rr, func(r result) float64 { return r.rate })),
			P50:  ms(median(column(rr, func(r result) time.Duration { return r.p50 }))),
			P99:  ms(median(column(rr, func(r result) time.Duration { return r.p99 }))),
			KiB:  rr[0].kib, Note: rr[0].note, Resident: fmt.Sprintf("%.0f", p.memory()/1024)}
		if base != nil && !r.once {
			ratios := make([]float64, len(us))
			for i := range us {
				ratios[i] = us[i] / base[i].us
			}
			s.Ratio = median(ratios)
		}
		all = append(all, s)
	}
	return all
}

func report(r row, got map[*peer][]result) {
	all := summarize(r, got)
	if *asJSON {
		for _, s := range all {
			b, err := json.Marshal(s)
			check(err)
			fmt.Println(string(b))
		}
		return
	}
	fmt.Printf("\n%s: %s\n", r.name, r.title)
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	if r.once {
		fmt.Fprintln(w, "peer\tKiB each\tCPU us each\tMiB in all\t")
		for _, s := range all {
			fmt.Fprintf(w, "%s\t%.1f\t%.0f\t%s\t%s\n", s.Peer, s.KiB, s.US, s.Resident, s.Note)
		}
	} else {
		fmt.Fprintln(w, "peer\tCPU us/request (min-max)\tx nginx\trequests/s\tp50 ms\tp99 ms\tMiB")
		for _, s := range all {
			fmt.Fprintf(w, "%s\t%.1f (%.1f-%.1f)\t%.2f\t%.0f\t%.2f\t%.2f\t%s\n", s.Peer, s.US, s.Min, s.Max, s.Ratio, s.Rate, s.P50, s.P99, s.Resident)
		}
	}
	w.Flush()
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// checkGate writes what is dearer than it may be.
func checkGate(failed io.Writer, r row, got map[*peer][]result) {
	if *gate == "" || r.once {
		return
	}
	all := summarize(r, got)
	for part := range strings.SplitSeq(*gate, ",") {
		name, limit, ok := strings.Cut(part, "=")
		most, err := strconv.ParseFloat(limit, 64)
		if !ok || err != nil {
			fmt.Fprintf(failed, "-gate %q: want PEER=RATIO\n", part)
			continue
		}
		i := slices.IndexFunc(all, func(s summary) bool { return s.Peer == name })
		switch {
		case i < 0:
			fmt.Fprintf(failed, "-gate %q: no such peer was measured\n", part)
		case all[i].Ratio == 0:
			fmt.Fprintln(failed, "-gate: nginx is not installed, so there is nothing to compare with (Debian: apt-get install nginx-light)")
		case all[i].Ratio > most:
			fmt.Fprintf(failed, "%s costs %.2f x nginx in row %s, the gate is %.2f\n", name, all[i].Ratio, r.name, most)
		}
	}
}
