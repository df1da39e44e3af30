package sim

import (
	"fmt"
	"html"
	"io"
	"math"
	"strings"
)

// series is what a plot draws: sums and means over equal columns of time.
type series struct {
	width    float64 // seconds of one column
	arrivals []float64
	colds    []float64
	live     []float64 // instance seconds
	lastAt   float64
	lastN    int
}

const columns = 600

func newSeries(horizon float64) *series {
	return &series{
		width:    horizon / columns,
		arrivals: make([]float64, columns),
		colds:    make([]float64, columns),
		live:     make([]float64, columns),
	}
}

func (s *series) column(t float64) int { return min(columns-1, int(t/s.width)) }

func (s *series) arrive(t float64) { s.arrivals[s.column(t)]++ }

func (s *series) cold(t float64) { s.colds[s.column(t)]++ }

// instances notes that from t on there are n.
func (s *series) instances(t float64, n int) {
	for at := s.lastAt; at < t; {
		c := s.column(at)
		end := math.Min(t, float64(c+1)*s.width)
		if end <= at { // the edge itself, or the last column
			end = t
		}
		s.live[c] += float64(s.lastN) * (end - at)
		at = end
	}
	s.lastAt, s.lastN = t, n
}

// WriteSVG draws load, instances and cold starts over time, one panel each; the run needs Options.Plot.
func (r *Result) WriteSVG(out io.Writer) error {
	if r.Plot == nil {
		return fmt.Errorf("the run of %s on %s kept nothing to draw", r.Policy, r.Trace)
	}
	s := r.Plot
	panels := []struct {
		name, color string
		values      []float64
		scale       float64
	}{
		{"requests/s", "#1f6fb2", s.arrivals, 1 / s.width},
		{"instances", "#2f8f4e", s.live, 1 / s.width},
		{"cold starts/min", "#c0392b", s.colds, 60 / s.width},
	}
	const width, height, left = columns + 80, 150, 60
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n", width, 30+height*len(panels))
	fmt.Fprintf(&b, `<text x="%d" y="18" font-size="13">%s, %s: %.3f %% cold, %.0f instance-seconds</text>`+"\n", left,
		html.EscapeString(r.Trace), html.EscapeString(r.Policy), r.ColdRate*100, r.InstanceSeconds)
	for i, p := range panels {
		top := 0.0
		for _, v := range p.values {
			top = math.Max(top, v*p.scale)
		}
		base := float64(30 + height*(i+1) - 30)
		fmt.Fprintf(&b, `<text x="4" y="%.0f">%s</text><text x="4" y="%.0f">max %.4g</text>`+"\n", base-100, p.name, base-86, top)
		fmt.Fprintf(&b, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#999"/>`+"\n", left, base, left+columns, base)
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" points="`, p.color)
		for x, v := range p.values {
			y := base
			if top > 0 {
				y -= v * p.scale / top * (height - 40)
			}
			fmt.Fprintf(&b, "%d,%.1f ", left+x, y)
		}
		b.WriteString("\"/>\n")
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d">0</text><text x="%d" y="%d" text-anchor="end">%.1f h</text>`+"\n</svg>\n",
		left, 22+height*len(panels), left+columns, 22+height*len(panels), s.width*columns/3600)
	_, err := io.WriteString(out, b.String())
	return err
}
