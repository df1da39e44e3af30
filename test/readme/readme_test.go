// Package readme runs the commands of the README's quickstart and compares what they print with what stands there.
package readme

import (
	"bytes"
	"context"
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write what the commands print into the README")

var quickstart = regexp.MustCompile(`(?s)(<!-- quickstart: begin -->\n)(.*?)(<!-- quickstart: end -->)`)

// blocks are the quickstart's: a command, and what it prints.
var blocks = regexp.MustCompile("(?s)```\n\\$ ([^\n]*)\n(.*?)```\n")

// What differs from run to run: numbers, ids, and the bars that are drawn from them. Two outputs are the same if nothing else differs.
var volatile = []struct {
	what *regexp.Regexp
	as   string
}{
	{regexp.MustCompile(`[0-9a-f]{32,}`), "HEX"},
	{regexp.MustCompile(`█+`), "#"},
	{regexp.MustCompile(`\d+(\.\d+)?`), "N"},
	{regexp.MustCompile(`[ \t]+`), " "},
}

func normal(s string) string {
	for _, v := range volatile {
		s = v.what.ReplaceAllString(s, v.as)
	}
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "\n")
}

func TestQuickstart(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(root, "README.md")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := quickstart.FindSubmatch(text)
	if m == nil {
		t.Fatal("README.md has no quickstart between its marks")
	}
	for _, addr := range []string{"127.0.0.1:8080", "127.0.0.1:8081"} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatalf("the quickstart uses the default ports: %v", err)
		}
		ln.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel) // after the server has been ended
	home := t.TempDir()
	env := append(os.Environ(), "HOME="+home, "THAW_DATA="+filepath.Join(home, ".thaw"), "THAW_API=", "THAW_TOKEN=", "GOCACHE="+goEnv(t, "GOCACHE"), "GOMODCACHE="+goEnv(t, "GOMODCACHE"))

	updated := blocks.ReplaceAllStringFunc(string(m[2]), func(block string) string {
		b := blocks.FindStringSubmatch(block)
		command, want := b[1], b[2]
		got := run(t, ctx, root, env, command)
		if normal(got) != normal(want) && !*update {
			t.Errorf("$ %s\nprinted:\n%s\nREADME.md says:\n%s", command, got, want)
		}
		return "```\n$ " + command + "\n" + got + "```\n"
	})
	if *update && !t.Failed() {
		text = bytes.Replace(text, m[0], []byte(string(m[1])+strings.ReplaceAll(updated, home, "~")+string(m[3])), 1)
		if err := os.WriteFile(file, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// run executes one command as a shell does. One that ends in & goes on until the test ends; its first line is its output.
func run(t *testing.T, ctx context.Context, dir string, env []string, command string) string {
	t.Helper()
	background := strings.HasSuffix(command, "&")
	cmd := exec.CommandContext(ctx, "sh", "-c", "exec "+strings.TrimSpace(strings.TrimSuffix(command, "&")))
	cmd.Dir, cmd.Env = dir, env
	if !background {
		b, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("$ %s: %v\n%s", command, err, b)
		}
		if strings.HasPrefix(command, "make ") {
			return "" // the compiler's command line is nobody's business
		}
		return string(b)
	}
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("$ %s: %v after SIGTERM", command, err)
		}
	})
	b := make([]byte, 4096)
	n, err := stdout.Read(b)
	if err != nil {
		t.Fatalf("$ %s: %v", command, err)
	}
	return string(b[:n])
}

func goEnv(t *testing.T, key string) string {
	t.Helper()
	b, err := exec.Command("go", "env", key).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
