package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

// A machine with little room takes two instances of 128 MiB or many small ones. What has no room is refused with the reason, and starts when there is
// some; an idle instance that is kept frozen is no reason.
func TestFewLargeOrManySmall(t *testing.T) {
	th := harness.Start(t, bin, "--capacity", "20")
	service := func(name string, annotations ...string) string {
		return harness.CheckerService(name, 1, nil, append(annotations, harness.MaxScale+"20")...)
	}
	const small = "        resources: {limits: {memory: 128Mi}}\n"
	th.Apply(service("two", harness.MinScale+"2") + small)
	th.Apply(service("third", harness.InitialZero) + small)
	a := th.Get("third", "/")
	if a.Status != 503 || a.Header.Get("X-Thaw-Error") != "cannot_start" {
		t.Fatalf("without room for it: %v", a)
	}
	for _, w := range []string{"NodeFull", "20 units", "16 are taken", "takes 8", "class small"} {
		if !strings.Contains(a.Body, w) {
			t.Errorf("%q does not say %q", a.Body, w)
		}
	}
	th.Apply(service("tiny", harness.MinScale+"4"))
	if err := th.Client.Delete(t.Context(), api.Services, "default", "two"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, "there is room for the third", func() bool { return th.Get("third", "/").Status == 200 })

	if err := th.Client.Delete(t.Context(), api.Services, "default", "third"); err != nil {
		t.Fatal(err)
	}
	th.Apply(service("many", harness.InitialZero, harness.MinScale+"16"))
	if _, err := th.Client.WaitReady(t.Context(), api.Services, "default", "many", client.WaitOptions{}); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, "sixteen beside the four", func() bool { ready, _, _, _ := th.Scale("many-00001"); return ready == 16 })
	th.Apply(service("more", harness.InitialZero))
	if a := th.Get("more", "/"); a.Status != 503 || !strings.Contains(a.Body, "20 are taken") {
		t.Errorf("one more than there is room for: %v", a)
	}
}
