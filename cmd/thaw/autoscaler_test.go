package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// TestReplay runs the command over a sound recording, a changed one, half a one and an empty one.
func TestReplay(t *testing.T) {
	const sound = "../../autoscaler/replay/testdata/kpa-decisions.jsonl.gz"
	half, empty := filepath.Join(t.TempDir(), "half.gz"), filepath.Join(t.TempDir(), "empty")
	b, err := os.ReadFile(sound)
	if err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string][]byte{half: b[:len(b)/2], empty: nil} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	changed := `{"type":"case","case":0,"container_concurrency":10,"spec":{"metric":"rps"}}
{"type":"step","case":0,"t":0,"stats":[{"at":0,"c":5}],"eval":true,"stable":5,"panic":5,"valid":true,"desired":2,"ebc":-216}`
	for _, c := range []struct {
		file, stdin, want string
		code              int
	}{
		{sound, "", "80 cases, 7200 decisions compared, 0 different", verbs.ExitOK},
		{"-", changed, "1 cases, 1 decisions compared, 2 different", verbs.ExitFailed},
		{half, "", "decisions compared", verbs.ExitFailed},
		{empty, "", "0 cases, 0 decisions compared", verbs.ExitFailed},
		{"-", "", "0 cases, 0 decisions compared", verbs.ExitFailed},
		{"not-there", "", "", verbs.ExitFailed},
	} {
		var out, errs bytes.Buffer
		env := &verbs.Env{Stdin: strings.NewReader(c.stdin), Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }, Now: time.Now}
		root := newRootCommand(env)
		root.SetArgs([]string{"autoscaler", "replay", c.file})
		if code := verbs.Main(t.Context(), root, env); code != c.code || !strings.Contains(out.String(), c.want) {
			t.Errorf("%s: exit %d, want %d\n%s%s", c.file, code, c.code, out.String(), errs.String())
		}
		if strings.Contains(c.stdin, `"desired"`) && !strings.Contains(out.String(), "case 0 t=0: desired is 1, recorded 2") {
			t.Errorf("the difference is not shown:\n%s", out.String())
		}
	}
}
