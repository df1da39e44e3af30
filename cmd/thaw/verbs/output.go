package verbs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/api"
)

// structured says whether the output is for programs.
func (s *session) structured() bool { return s.output == "json" || s.output == "yaml" }

// printRaw prints JSON as the server sent it, or as YAML.
func (s *session) printRaw(body []byte) error {
	if s.output == "yaml" {
		out, err := yaml.JSONToYAML(body)
		if err != nil {
			return fmt.Errorf("turn the answer into YAML: %w", err)
		}
		_, err = s.Stdout.Write(out)
		return err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, bytes.TrimSpace(body), "", "  "); err != nil {
		return fmt.Errorf("the server's answer is not JSON: %w", err)
	}
	b.WriteByte('\n')
	_, err := s.Stdout.Write(b.Bytes())
	return err
}

// print prints any value as JSON or YAML.
func (s *session) print(v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.printRaw(body)
}

// table prints rows with aligned columns. A row shorter than the head is filled up.
func table(w io.Writer, head []string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, strings.Join(head, "\t"))
	for _, r := range rows {
		cells := make([]string, len(head))
		for i := range cells {
			if i < len(r) {
				cells[i] = cell(r[i])
			}
		}
		fmt.Fprintln(t, strings.TrimRight(strings.Join(cells, "\t"), "\t"))
	}
	return t.Flush()
}

// cell keeps one value in its cell: a tab or line end of a message would tear the table, a control character the terminal.
func cell(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

// age is the time since t in the two coarsest useful digits, as kubectl prints it.
func age(t *api.Time, now time.Time) string {
	if t == nil || t.IsZero() {
		return "<unknown>"
	}
	d := max(now.Sub(t.Time), 0)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// trafficText is a split in one line: "80% hello-00001, 20% hello-00002 (#canary)".
func trafficText(targets []api.TrafficTarget) string {
	parts := make([]string, 0, len(targets))
	for _, t := range targets {
		text := percentText(t) + " " + targetName(t)
		if t.Tag != "" {
			text += " (#" + t.Tag + ")"
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, ", ")
}

func percentText(t api.TrafficTarget) string {
	if t.Percent == nil {
		return "0%"
	}
	return strconv.FormatInt(*t.Percent, 10) + "%"
}

// targetName is what a target points to, as the --to and --tag flags name it.
func targetName(t api.TrafficTarget) string {
	switch {
	case t.RevisionName != "":
		return t.RevisionName
	case t.ConfigurationName != "":
		return "latest of " + t.ConfigurationName
	}
	return latest
}

// ready is the READY and the REASON column.
func ready(conditions api.Conditions) (string, string) {
	c := conditions.Get(api.ConditionReady)
	if c == nil {
		return api.Unknown, ""
	}
	return c.Status, c.Reason
}

// revisionReady is ready for a revision. One that was ready once stays so, also when its instances fail later: then the
// reason is why there is none, which its condition Active knows.
func revisionReady(r *api.Revision) (string, string) {
	status, reason := ready(r.Status.Conditions)
	if c := trouble(r); reason == "" && c != nil {
		reason = c.Reason
	}
	return status, reason
}

// trouble is the condition Active of a ready revision whose instances fail, else nil.
func trouble(r *api.Revision) *api.Condition {
	c := r.Status.Conditions.Get(api.ConditionActive)
	if !r.Ready() || c == nil || c.Status != api.Unknown || c.Reason == "" || c.Reason == api.ReasonDeploying || c.Reason == reasonQueued {
		return nil
	}
	return c
}

// reasonQueued is the reason of Active while the first instance is on its way.
const reasonQueued = "Queued"
