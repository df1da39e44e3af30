package verbs

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

// metric is one entry of a Server-Timing header.
type metric struct {
	name string
	ms   float64 // "dur", in milliseconds; 0 if absent
	desc string
}

// parseServerTiming reads a Server-Timing header (entries after commas, parameters after semicolons, values bare or quoted).
// Entries without a name and durations that are no number from 0 to longest are passed over: a function may write into the
// header what it likes.
func parseServerTiming(header string) []metric {
	var out []metric
	for _, entry := range splitQuoted(header, ',') {
		params := splitQuoted(entry, ';')
		m := metric{name: strings.TrimSpace(params[0])}
		if m.name == "" || strings.ContainsAny(m.name, " \t\"=") {
			continue
		}
		for _, p := range params[1:] {
			k, v, _ := strings.Cut(p, "=")
			v = strings.TrimSpace(v)
			if len(v) >= 2 && v[0] == '"' {
				if text, _, ok := cutQuoted(v); ok {
					v = text
				}
			}
			switch strings.ToLower(strings.TrimSpace(k)) {
			case "dur":
				if f, err := strconv.ParseFloat(v, 64); err == nil && f >= 0 && f <= longest {
					m.ms = f
				}
			case "desc":
				m.desc = v
			}
		}
		out = append(out, m)
	}
	return out
}

// longest bounds a duration in milliseconds (30 years), so that no sum of them is infinite.
const longest = 1e12

// splitQuoted splits at sep outside of double quotes.
func splitQuoted(s string, sep byte) []string {
	var parts []string
	quoted := false
	start := 0
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == sep && !quoted:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// cutQuoted reads a quoted string at the beginning of s.
func cutQuoted(s string) (text, rest string, ok bool) {
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		if s[i] == '"' {
			return b.String(), s[i+1:], true
		}
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return "", "", false
}

// barWidth is how wide the longest bar of a waterfall is, in characters.
const barWidth = 40

// overlaps says which steps of a cold start run side by side; all others follow one another.
func overlaps(name string) bool { return name == "code" || name == "net" || name == "create" }

// waterfall prints the steps of a cold start as bars, each beginning where the one before it ended. total is drawn last.
func waterfall(w io.Writer, metrics []metric) {
	var total float64
	steps := make([]metric, 0, len(metrics))
	for _, m := range metrics {
		if m.name == "total" {
			total = m.ms
			continue
		}
		steps = append(steps, m)
	}
	type placed struct {
		metric
		start float64
	}
	var at, together float64 // together: the longest of the overlapping steps so far
	list := make([]placed, 0, len(steps))
	for _, m := range steps {
		if !overlaps(m.name) && together > 0 {
			at, together = at+together, 0
		}
		list = append(list, placed{m, at})
		if overlaps(m.name) {
			together = max(together, m.ms)
		} else {
			at += m.ms
		}
	}
	if end := at + together; total < end {
		total = end
	}
	if total == 0 {
		return
	}
	for _, p := range list {
		from := min(barWidth, int(p.start/total*barWidth))
		length := min(barWidth-from, max(1, int(math.Round(p.ms/total*barWidth))))
		bar := strings.Repeat(" ", from) + strings.Repeat("█", length)
		line := fmt.Sprintf("  %-8s %8.2f ms  %s", cell(p.name), p.ms, bar)
		if p.desc != "" {
			line += "  " + cell(p.desc)
		}
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	fmt.Fprintf(w, "  %-8s %8.2f ms\n", "total", total)
}
