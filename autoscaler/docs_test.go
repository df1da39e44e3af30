package autoscaler

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestDocsNameEverything keeps docs/scaling.md complete: keys, reasons and metrics.
func TestDocsNameEverything(t *testing.T) {
	text, err := os.ReadFile("../docs/scaling.md")
	if err != nil {
		t.Fatal(err)
	}
	names := append([]string{AnnotationEventDriven, AnnotationPlanner}, whyWords[:]...)
	for _, k := range keys() {
		names = append(names, k.name)
	}
	source, err := os.ReadFile("metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	metrics := regexp.MustCompile(`"(thaw\.(?:revision|autoscaler)\.[a-z.]+)"`).FindAllStringSubmatch(string(source), -1)
	if len(metrics) < 15 {
		t.Fatalf("found only %d metrics", len(metrics))
	}
	for _, m := range metrics {
		names = append(names, m[1])
	}
	for _, name := range names {
		if !strings.Contains(string(text), "`"+name+"`") && !strings.Contains(string(text), "`"+name+":") {
			t.Errorf("docs/scaling.md does not name %s", name)
		}
	}
}
