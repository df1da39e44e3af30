package verbs

import (
	"context"
	"encoding/pem"
	"math"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/thawrun/thaw/api"
)

func pemOf(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// split writes and reads splits in one line: "a=80,@latest=20,b=0#tag".
func split(text string) []api.TrafficTarget {
	var out []api.TrafficTarget
	for part := range strings.SplitSeq(text, ",") {
		if part == "" {
			continue
		}
		part, tag, _ := strings.Cut(part, "#")
		e, err := parseTrafficEdit([]string{part, "rest=" + rest(part)}, nil, nil)
		if err != nil {
			panic(err)
		}
		out = append(out, target(e.to[0].revision, tag, e.to[0].percent))
	}
	return out
}

func rest(part string) string {
	_, n, _ := strings.Cut(part, "=")
	sum := 0
	for _, d := range n {
		sum = sum*10 + int(d-'0')
	}
	return string([]byte{byte('0' + (100-sum)/100), byte('0' + (100-sum)/10%10), byte('0' + (100-sum)%10)})
}

func TestEditTraffic(t *testing.T) {
	for _, c := range []struct {
		name, before   string
		to, tag, untag []string
		want           string // "" = an error
	}{
		{name: "first split", to: []string{"a=80", "@latest=20"}, want: "20% @latest, 80% a"},
		{name: "what is not named gets nothing", before: "a=50,b=50", to: []string{"b=100"}, want: "100% b"},
		{name: "what is not named but tagged stays without a share", before: "a=50#old,b=50", to: []string{"b=100"}, want: "0% a (#old), 100% b"},
		{name: "a tag changes no share", before: "a=100", tag: []string{"a=blue"}, want: "100% a (#blue)"},
		{name: "a tag for a new target", before: "@latest=100", tag: []string{"a=old"}, want: "100% @latest, 0% a (#old)"},
		{name: "a second tag for one revision", before: "a=100#one", tag: []string{"a=two"}, want: "100% a (#one), 0% a (#two)"},
		{name: "the same tag again", before: "a=100#one", tag: []string{"a=one"}, want: "100% a (#one)"},
		{name: "a tag that is taken", before: "a=100#one,b=0", tag: []string{"b=one"}},
		{name: "a tag moves", before: "a=100#one", tag: []string{"b=one"}, untag: []string{"one"}, want: "100% a, 0% b (#one)"},
		{name: "untag what has no share", before: "a=100,b=0#x", untag: []string{"x"}, want: "100% a"},
		{name: "untag joins", before: "a=60,a=40#x", untag: []string{"x"}, want: "100% a"},
		{name: "untag what is not there", before: "a=100", untag: []string{"x"}},
		{name: "share by percent sign", to: []string{"a=100%"}, want: "100% a"},
		{name: "tag latest of a service without a split", tag: []string{"@latest=next"}, want: "100% @latest (#next)"},
	} {
		e, err := parseTrafficEdit(c.to, c.tag, c.untag)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		before := split(c.before)
		kept := trafficText(before)
		after, err := editTraffic(before, e)
		if (err != nil) != (c.want == "") || err == nil && trafficText(after) != c.want {
			t.Errorf("%s: %q (%v), want %q", c.name, trafficText(after), err, c.want)
		}
		if trafficText(before) != kept {
			t.Errorf("%s: the split that was given has been changed", c.name)
		}
	}
}

func TestRollbackTarget(t *testing.T) {
	rev := func(name string, ready bool) *api.Revision {
		r := &api.Revision{ObjectMeta: api.ObjectMeta{Name: name}}
		if ready {
			r.Status.Conditions = api.Conditions{{Type: "Ready", Status: "True"}}
		}
		return r
	}
	list := []*api.Revision{rev("a", true), rev("b", true), rev("c", false), rev("d", true)}
	for serving, want := range map[string]string{"d=100": "b", "b=60,d=40": "b", "b=100,d=0": "a", "a=80,b=20": "a", "a=100": "", "": "", "z=100": ""} {
		got, err := rollbackTarget(list, split(serving))
		if got != want || (err != nil) != (want == "") {
			t.Errorf("serving %q: %q (%v), want %q", serving, got, err, want)
		}
	}
}

func TestSplitWords(t *testing.T) {
	for line, want := range map[string][]string{
		`a b  c`:                  {"a", "b", "c"},
		`  a	b` + "\n":            {"a", "b"},
		`a 'b c' "d 'e'" f\ g`:    {"a", "b c", "d 'e'", "f g"},
		`a '' ""`:                 {"a", "", ""},
		`a"b c"d`:                 {"ab cd"},
		`"a\"b\\c\d"`:             {`a"b\c\d`},
		`'a\b'`:                   {`a\b`},
		`--x=$HOME *`:             {"--x=$HOME", "*"},
		``:                        nil,
		`python3 -c "print('ö')"`: {"python3", "-c", "print('ö')"},
	} {
		got, err := splitWords(line)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q (%v), want %q", line, got, err, want)
		}
	}
	for _, line := range []string{`'a`, `"a`, `a\`} {
		if got, err := splitWords(line); err == nil {
			t.Errorf("%s: %q", line, got)
		}
	}
}

// TestRealInterpreter makes the shim of a version manager: a script that calls an interpreter. A link elsewhere stays as it is.
func TestRealInterpreter(t *testing.T) {
	dir := t.TempDir()
	shim := filepath.Join(dir, "shims", "python3")
	real := filepath.Join(dir, "python3.11")
	venv := filepath.Join(dir, "venv", "python3")
	for _, d := range []string{filepath.Dir(shim), filepath.Dir(venv)} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script := func(path, text string) {
		write(t, path, "#!/bin/sh\n"+text+"\n")
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script(real, "echo "+real)
	script(shim, "exec "+real+` "$@"`)
	if err := os.Symlink(real, venv); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if got := realInterpreter(ctx, shim); got != real {
		t.Errorf("behind the shim: %s", got)
	}
	if got := realInterpreter(ctx, venv); got != venv {
		t.Errorf("a virtual environment: %s", got)
	}
	script(shim, "exit 1")
	if got := realInterpreter(ctx, shim); got != shim {
		t.Errorf("a shim that does not tell: %s", got)
	}
}

func TestDialAddress(t *testing.T) {
	for _, c := range []struct{ url, ingress, want string }{
		{"http://hello.default.localhost:8090", "", "127.0.0.1:8090"},
		{"http://hello.default.localhost", "", "127.0.0.1:8080"},
		{"http://localhost:1", "", "127.0.0.1:1"},
		{"http://hello.default.example.com", "", "hello.default.example.com:80"},
		{"https://hello.default.example.com", "", "hello.default.example.com:443"},
		{"https://hello.default.localhost", "", "127.0.0.1:443"},
		{"http://hello.default.example.com:81", "10.0.0.1:8080", "10.0.0.1:8080"},
		{"http://notlocalhost", "", "notlocalhost:80"},
	} {
		u, err := url.Parse(c.url)
		if err != nil {
			t.Fatal(err)
		}
		if got := dialAddress(u, c.ingress); got != c.want {
			t.Errorf("%s over %q: %s, want %s", c.url, c.ingress, got, c.want)
		}
	}
}

func TestServerTiming(t *testing.T) {
	got := parseServerTiming(`queue;dur=1.5, a b;dur=1, x;dur=-1;desc="a, \"b\"; c", y;dur=NaN, ,z;DUR="2";desc=w, inf;dur=1e999`)
	want := []metric{{"queue", 1.5, ""}, {"x", 0, `a, "b"; c`}, {"y", 0, ""}, {"z", 2, "w"}, {"inf", 0, ""}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func TestWaterfall(t *testing.T) {
	var b strings.Builder
	waterfall(&b, parseServerTiming("queue;dur=10, code;dur=10, net;dur=5, create;dur=20, ready;dur=5, app;dur=5, total;dur=40"))
	want := `  queue       10.00 ms  ██████████
  code        10.00 ms            ██████████
  net          5.00 ms            █████
  create      20.00 ms            ████████████████████
  ready        5.00 ms                                █████
  app          5.00 ms                                     █████
  total       40.00 ms
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestAge(t *testing.T) {
	if got := age(nil, api.Time{}.Time); got != "<unknown>" {
		t.Errorf("no time is %s old", got)
	}
}

func FuzzServerTiming(f *testing.F) {
	f.Add(`queue;dur=1, "a;desc="b,c"`)
	f.Add(`a;dur=1e308, b;dur=1e308`)
	f.Add("\x1b[2J;dur=3;desc=\"\x1b\"")
	f.Fuzz(func(t *testing.T, header string) {
		list := parseServerTiming(header)
		for _, m := range list {
			if m.ms < 0 || math.IsNaN(m.ms) || math.IsInf(m.ms, 0) {
				t.Errorf("%+v", m)
			}
		}
		var b strings.Builder
		waterfall(&b, list)
		if strings.ContainsAny(b.String(), "\x1b\r\x00") {
			t.Errorf("control characters reach the terminal: %q", b.String())
		}
	})
}

func FuzzSplitWords(f *testing.F) {
	f.Add(`a 'b c' "d\"e" f\ g`)
	f.Fuzz(func(t *testing.T, line string) {
		words, err := splitWords(line)
		if err != nil {
			return
		}
		// Quoting what came out gives the same again.
		quoted := make([]string, len(words))
		for i, w := range words {
			quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		again, err := splitWords(strings.Join(quoted, " "))
		if err != nil || !slices.Equal(words, again) {
			t.Errorf("%q, then %q (%v)", words, again, err)
		}
	})
}

func FuzzParseDocuments(f *testing.F) {
	f.Add([]byte("---\n" + manifest("a", "b") + "---\n# c\n--- {}\n"))
	f.Add([]byte("{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[{}]}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		docs, err := parseDocuments("x", data)
		if err != nil {
			return
		}
		for _, d := range docs {
			if d.kind == nil || d.name == "" && d.generateName == "" {
				t.Errorf("%+v", d)
			}
		}
	})
}
