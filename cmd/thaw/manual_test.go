package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

var update = flag.Bool("update", false, "write the generated parts of docs/cli.md anew")

const manual = "../../docs/cli.md"

// block matches what is generated: the synopsis and the table of options of one command.
var block = regexp.MustCompile(`(?s)<!-- generated: (thaw [a-z -]+) -->\n(.*?)<!-- end -->\n`)

// render is the generated part about a command.
func render(cmd *cobra.Command) string {
	var b strings.Builder
	use := cmd.CommandPath() + strings.TrimPrefix(cmd.Use, cmd.Name())
	fmt.Fprintf(&b, "`%s`\n\n", use)
	if len(cmd.Aliases) > 0 {
		fmt.Fprintf(&b, "Also: `%s`.\n\n", strings.Join(cmd.Aliases, "`, `"))
	}
	rows := 0
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if rows == 0 {
			b.WriteString("| option | default | meaning |\n|---|---|---|\n")
		}
		rows++
		name := "`--" + f.Name
		if kind := f.Value.Type(); kind != "bool" {
			name += " " + strings.TrimSuffix(kind, "Array")
		}
		name += "`"
		if f.Shorthand != "" {
			name = "`-" + f.Shorthand + "`, " + name
		}
		def := f.DefValue
		if def != "" && def != "[]" {
			def = "`" + def + "`"
		} else {
			def = ""
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", name, def, strings.ReplaceAll(f.Usage, "|", `\|`))
	})
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// visible are all commands that people can call, sorted by path.
func visible(root *cobra.Command) []*cobra.Command {
	var list []*cobra.Command
	for _, c := range root.Commands() {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		list = append(list, c)
		list = append(list, visible(c)...)
	}
	return list
}

// differences compares the manual with the commands.
func differences(text string, commands []*cobra.Command) []string {
	var bad []string
	found := map[string]string{}
	for _, m := range block.FindAllStringSubmatch(text, -1) {
		found[m[1]] = m[2]
	}
	for _, c := range commands {
		got, ok := found[c.CommandPath()]
		delete(found, c.CommandPath())
		switch {
		case !ok:
			bad = append(bad, c.CommandPath()+" is not in the manual")
		case got != render(c):
			bad = append(bad, c.CommandPath()+" is described otherwise than it is")
		}
	}
	for name := range found {
		bad = append(bad, name+" is in the manual, but does not exist")
	}
	slices.Sort(bad)
	return bad
}

// rewrite brings the generated parts up to date and adds a section for each command that has none.
func rewrite(text string, commands []*cobra.Command) string {
	for _, c := range commands {
		fresh := fmt.Sprintf("<!-- generated: %s -->\n%s<!-- end -->\n", c.CommandPath(), render(c))
		old := ""
		for _, m := range block.FindAllStringSubmatch(text, -1) {
			if m[1] == c.CommandPath() {
				old = m[0]
			}
		}
		if old != "" {
			text = strings.Replace(text, old, fresh, 1)
			continue
		}
		about := c.Long
		if about == "" {
			about = c.Short + "."
		}
		text += fmt.Sprintf("\n## %s\n\n%s\n\n%s", c.CommandPath(), about, fresh)
		if c.Example != "" {
			text += "\n```\n" + strings.ReplaceAll(strings.TrimPrefix(c.Example, "  "), "\n  ", "\n") + "\n```\n"
		}
	}
	return text
}

// TestManual keeps docs/cli.md true: every command with every flag, its default and its meaning stands there.
func TestManual(t *testing.T) {
	data, err := os.ReadFile(manual)
	if err != nil {
		t.Fatal(err)
	}
	commands := visible(newRootCommand(verbs.System("test")))
	if len(commands) < 11 {
		t.Fatalf("only %d commands", len(commands))
	}
	if *update {
		if err := os.WriteFile(manual, []byte(rewrite(string(data), commands)), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, bad := range differences(string(data), commands) {
		t.Errorf("%s (write it anew with: go test ./cmd/thaw -run TestManual -update)", bad)
	}
}

// TestManualNotices changes the commands and the manual and expects that the comparison sees it.
func TestManualNotices(t *testing.T) {
	one := func() *cobra.Command {
		root := &cobra.Command{Use: "thaw"}
		c := &cobra.Command{Use: "one NAME", Short: "Do one thing", Run: func(*cobra.Command, []string) {}}
		c.Flags().Int("n", 3, "how many")
		root.AddCommand(c)
		return root
	}
	root := one()
	text := rewrite("# Manual\n", visible(root))
	if bad := differences(text, visible(root)); len(bad) != 0 {
		t.Errorf("a manual just written: %q\n%s", bad, text)
	}
	if again := rewrite(text, visible(root)); again != text {
		t.Errorf("writing twice gives\n%s", again)
	}
	root.Commands()[0].Flags().Bool("extra", false, "new")
	if bad := differences(text, visible(root)); len(bad) != 1 {
		t.Errorf("a new flag: %q", bad)
	}
	root = one()
	root.AddCommand(&cobra.Command{Use: "two", Run: func(*cobra.Command, []string) {}})
	if bad := differences(text, visible(root)); len(bad) != 1 || !strings.Contains(bad[0], "thaw two is not in the manual") {
		t.Errorf("a new command: %q", bad)
	}
	if bad := differences(text+"<!-- generated: thaw gone -->\n<!-- end -->\n", visible(one())); len(bad) != 1 {
		t.Errorf("a command that is gone: %q", bad)
	}
}

// TestExitCodesAreInTheManual reads the table of exit codes.
func TestExitCodesAreInTheManual(t *testing.T) {
	data, err := os.ReadFile(manual)
	if err != nil {
		t.Fatal(err)
	}
	for code := verbs.ExitOK; code <= verbs.ExitAnswer; code++ {
		if !strings.Contains(string(data), fmt.Sprintf("\n| %d | ", code)) {
			t.Errorf("exit code %d is not in the manual", code)
		}
	}
}

// TestHelpIsComplete: each command says what it does, shows how, and takes the flags that find the server if it needs one.
func TestHelpIsComplete(t *testing.T) {
	for _, c := range visible(newRootCommand(verbs.System("test"))) {
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: short text %q", c.CommandPath(), c.Short)
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s --%s says nothing about itself", c.CommandPath(), f.Name)
			}
		})
	}
	root := newRootCommand(verbs.System("test"))
	root.SetArgs([]string{"help"})
	var out strings.Builder
	env := &verbs.Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &out, Getenv: os.Getenv}
	if code := verbs.Main(context.Background(), root, env); code != 0 || !strings.Contains(out.String(), "Available Commands") {
		t.Errorf("help: exit code %d, %s", code, out.String())
	}
}
