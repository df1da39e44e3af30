package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/thawrun/thaw/test/harness"
)

// /metrics is what Prometheus can read, each family once, and each name stands on a page of docs/.
func TestMetrics(t *testing.T) {
	th := harness.Start(t, bin)
	th.Apply(harness.CheckerService("measured", 10, nil, harness.InitialZero))
	for range 3 {
		if a := th.Get("measured", "/"); a.Status != 200 {
			t.Fatal(a)
		}
	}
	var docs strings.Builder
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatal(pages, err)
	}
	for _, p := range pages {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		docs.Write(b)
	}
	body, err := th.Client.Raw(context.Background(), "GET", "/metrics", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for line := range strings.SplitSeq(string(body), "\n") {
		if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, _, _ = strings.Cut(name, " ")
			if seen[name] {
				t.Errorf("family %s stands there twice", name)
			}
			seen[name] = true
		}
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(body)))
	if err != nil {
		t.Fatalf("%v in\n%s", err, body)
	}
	for _, want := range []string{"http_server_request_duration_seconds", "faas_coldstarts_total", "thaw_revision_instances_ready", "thaw_queueproxy_requests_total"} {
		if families[want] == nil {
			t.Errorf("%s is missing", want)
		}
	}
	for name := range families {
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
			continue // the client library's own
		}
		if !strings.Contains(docs.String(), "`"+name+"`") {
			t.Errorf("%s is on no page of docs/", name)
		}
	}
}
