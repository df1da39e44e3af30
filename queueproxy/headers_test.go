package queueproxy

import (
	"bufio"
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/valyala/fasthttp"
	"pgregory.net/rapid"
)

// header parses header lines ("Name: value") as the front does.
func header(t testing.TB, lines ...string) *fasthttp.RequestHeader {
	h := &fasthttp.RequestHeader{}
	text := "GET / HTTP/1.1\r\n" + strings.Join(append(lines, "", ""), "\r\n")
	if err := h.Read(bufio.NewReaderSize(strings.NewReader(text), 1<<20)); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return h
}

// dump returns the lines that go to the function, lines of one name in order, names sorted.
func dump(h *fasthttp.RequestHeader) []string {
	lines := strings.Split(strings.TrimSuffix(string(h.AppendBytes(nil)), "\r\n\r\n"), "\r\n")[1:]
	sortLines(lines)
	return lines
}

func sortLines(lines []string) {
	slices.SortStableFunc(lines, func(a, b string) int {
		a, _, _ = strings.Cut(a, ":")
		b, _, _ = strings.Cut(b, ":")
		return strings.Compare(strings.ToLower(a), strings.ToLower(b))
	})
}

func TestClean(t *testing.T) {
	for _, c := range []struct {
		name     string
		in, want []string
	}{
		{"nothing to do", []string{"Host: a", "Accept: */*"}, []string{"Accept: */*", "Host: a"}},
		{"internal headers", []string{"Host: a", "Accept: */*", "Knative-Serving-Revision: r", "Knative-Serving-Namespace: n", "K-Proxy-Request: activator",
			"K-Network-Probe: x", "K-Network-Hash: override", "K-Passthrough-Lb: true"}, []string{"Accept: */*", "Host: a"}},
		{"in any case", []string{"host: a", "knative-serving-REVISION: r", "k-network-hash: 1", "k-PROXY-request: activator"}, []string{"Host: a"}},
		{"original host", []string{"Host: r.ns.svc", "K-Original-Host: www.example.org"}, []string{"Host: www.example.org"}},
		{"first original host", []string{"Host: x", "k-original-host: a", "K-Original-Host: b"}, []string{"Host: a"}},
		{"empty original host", []string{"Host: x", "K-Original-Host:"}, []string{"Host: x"}},
		{"names that only look alike", []string{"Host: a", "K-Networks: 1", "K-Network: 2", "Knative-Serving-Tag: t", "K-Foo: b", "X-K-Network-Hash: 1"},
			[]string{"Host: a", "K-Foo: b", "K-Network: 2", "K-Networks: 1", "Knative-Serving-Tag: t", "X-K-Network-Hash: 1"}},
		{"order of repeated lines", []string{"Host: a", "K-Network-Hash: 1", "B: 0", "A: 1", "A: 2", "Knative-Serving-Revision: r", "A: 3", "C: 1", "A: 4"},
			[]string{"A: 1", "A: 2", "A: 3", "A: 4", "B: 0", "C: 1", "Host: a"}},
		{"forwarded", []string{"Host: a", "X-Forwarded-For: 1.2.3.4, ::1", "X-Forwarded-Proto: https"},
			[]string{`Forwarded: for=1.2.3.4;proto=https, for="[::1]"`, "Host: a", "X-Forwarded-For: 1.2.3.4, ::1", "X-Forwarded-Proto: https"}},
		{"forwarded by an activator", []string{"Host: a", "K-Proxy-Request: activator", "X-Forwarded-For: 1.2.3.4"},
			[]string{"Forwarded: for=1.2.3.4", "Host: a", "X-Forwarded-For: 1.2.3.4"}},
		{"cookies as they came", []string{"Host: a", "K-Network-Hash: 1", `Cookie: a="x"; b = c;;d`}, []string{`Cookie: a="x"; b = c;;d`, "Host: a"}},
		{"forwarded from two lines", []string{"Host: a", "X-Forwarded-For: 1.1.1.1", "X-Forwarded-Host: h", "X-Forwarded-For: 2.2.2.2"},
			[]string{"Forwarded: for=1.1.1.1;host=h, for=2.2.2.2", "Host: a", "X-Forwarded-For: 1.1.1.1", "X-Forwarded-For: 2.2.2.2", "X-Forwarded-Host: h"}},
		{"forwarded is kept", []string{"Host: a", "forwarded: for=9.9.9.9", "X-Forwarded-For: 1.2.3.4"}, []string{"Forwarded: for=9.9.9.9", "Host: a", "X-Forwarded-For: 1.2.3.4"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := header(t, c.in...)
			if !clean(h) {
				t.Fatal("refused")
			}
			if got := dump(h); !slices.Equal(got, c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

// What hops of the same process have added goes too, and a header that was never parsed is cleaned as well.
func TestCleanAdded(t *testing.T) {
	made := &fasthttp.RequestHeader{}
	for _, kv := range []string{"Host: a", "K-Network-Hash: x", "A: 1", "A: 2"} {
		k, v, _ := strings.Cut(kv, ": ")
		made.Add(k, v)
	}
	for name, h := range map[string]*fasthttp.RequestHeader{"parsed": header(t, "Host: a", "A: 1", "A: 2"), "made": made} {
		h.Set("Knative-Serving-Revision", "r")
		h.Set("Knative-Serving-Namespace", "n")
		if !clean(h) {
			t.Fatal("refused")
		}
		if got, want := dump(h), []string{"A: 1", "A: 2", "Host: a"}; !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestCleanRefusesFlood(t *testing.T) {
	lines := []string{"Host: a"}
	for i := range maxInternal {
		lines = append(lines, fmt.Sprintf("K-Network-%d: x", i))
	}
	if h := header(t, lines...); !clean(h) || len(dump(h)) != 1 {
		t.Error("as many as are allowed were not removed")
	}
	if clean(header(t, append(lines, "K-Network-Again: x")...)) {
		t.Error("one more was accepted")
	}
}

// Any mixture of lines comes out as the lines that are not internal, those of one name in their order.
func TestCleanAgainstFilter(t *testing.T) {
	names := []string{"A", "a", "Accept", "B-B", "X-Forwarded", "K-Network-Hash", "k-network-x", "Knative-Serving-Revision", "K-Proxy-Request", "Forwarded", "User-Agent"}
	rapid.Check(t, func(rt *rapid.T) {
		lines, want := []string{"Host: h"}, []string{"Host: h"}
		agent := ""
		for i, n := range rapid.SliceOfN(rapid.SampledFrom(names), 0, maxInternal).Draw(rt, "names") {
			lines = append(lines, fmt.Sprintf("%s: %d", n, i))
			switch {
			case n == "User-Agent":
				agent = fmt.Sprintf("User-Agent: %d", i) // fasthttp keeps one
			case n == "a":
				want = append(want, fmt.Sprintf("A: %d", i))
			case !internal([]byte(n)):
				want = append(want, lines[len(lines)-1])
			}
		}
		if agent != "" {
			want = append(want, agent)
		}
		sortLines(want)
		h := header(t, lines...)
		if !clean(h) {
			rt.Fatal("refused")
		}
		if got := dump(h); !slices.Equal(got, want) {
			rt.Fatalf("from %q\ngot  %q\nwant %q", lines, got, want)
		}
	})
}

func TestForwarded(t *testing.T) {
	for _, c := range []struct{ xff, host, proto, want string }{
		{"1.2.3.4", "", "", "for=1.2.3.4"},
		{"1.2.3.4, ::1", "", "https", `for=1.2.3.4;proto=https, for="[::1]"`},
		{"1.2.3.4,5.6.7.8", "example.org", "http", "for=1.2.3.4;host=example.org;proto=http, for=5.6.7.8"},
		{"", "example.org", "http", "host=example.org;proto=http"},
		{"", "example.org:8080", "", `host="example.org:8080"`},
		{"", "", "https", "proto=https"},
		{"[2001:db8::1]:4711", "", "", `for="[2001:db8::1]:4711"`},
		{"2001:db8::1", "", "", `for="[2001:db8::1]"`},
		{"1.2.3.4:80", "", "", `for="1.2.3.4:80"`},
		{"unknown, _hidden", "", "", "for=unknown, for=_hidden"},
		{" , ,1.2.3.4,", "", "", "for=1.2.3.4"},
		{`1.2.3.4";x="y`, "", "", ""},
		{`a\b`, `"`, "a b", ""},
		{"bad one, 1.2.3.4", "", "https", "for=1.2.3.4;proto=https"},
		{"1.2.3.4;host=evil", "a;b", "", `for="1.2.3.4;host=evil";host="a;b"`},
	} {
		f := forwarded{host: []byte(c.host), proto: []byte(c.proto)}
		if c.xff != "" {
			f.nodes = [][]byte{[]byte(c.xff)}
		}
		if got := string(f.append(nil)); got != c.want {
			t.Errorf("%q %q %q: got %s, want %s", c.xff, c.host, c.proto, got, c.want)
		}
	}
}

// parseForwarded reads a Forwarded value strictly by RFC 7239: elements of name=value pairs, values tokens or quoted strings.
func parseForwarded(s string) ([]map[string]string, error) {
	var all []map[string]string
	for {
		e := map[string]string{}
		for {
			eq := strings.IndexByte(s, '=')
			if eq <= 0 {
				return nil, fmt.Errorf("no pair at %q", s)
			}
			name := s[:eq]
			s = s[eq+1:]
			var value string
			if strings.HasPrefix(s, `"`) {
				end := strings.IndexByte(s[1:], '"')
				if end < 0 {
					return nil, fmt.Errorf("open quote at %q", s)
				}
				value, s = s[1:1+end], s[end+2:]
			} else {
				end := strings.IndexFunc(s, func(r rune) bool { return r > 0x7f || !token(byte(r)) })
				if end < 0 {
					end = len(s)
				}
				value, s = s[:end], s[end:]
			}
			if _, twice := e[name]; twice || value == "" {
				return nil, fmt.Errorf("%s twice or empty", name)
			}
			e[name] = value
			if !strings.HasPrefix(s, ";") {
				break
			}
			s = s[1:]
		}
		all = append(all, e)
		if s == "" {
			return all, nil
		}
		if !strings.HasPrefix(s, ", ") {
			return nil, fmt.Errorf("rubbish at %q", s)
		}
		s = s[2:]
	}
}

// Whatever X-Forwarded-* say, the header made of them is valid, and nobody can smuggle an element or a pair into it.
func FuzzForwarded(f *testing.F) {
	f.Add("1.2.3.4, ::1", "example.org:80", "https")
	f.Add(`";host=x, for="`, "a,b;c=d", `\"`)
	f.Add("\x00\x80, [::1]", "ä", "")
	f.Fuzz(func(t *testing.T, xff, host, proto string) {
		fw := forwarded{host: []byte(host), proto: []byte(proto), nodes: [][]byte{[]byte(xff)}}
		got := string(fw.append(nil))
		if got == "" {
			return
		}
		all, err := parseForwarded(got)
		if err != nil {
			t.Fatalf("%q %q %q: %q: %v", xff, host, proto, got, err)
		}
		if len(all) > 1+strings.Count(xff, ",") {
			t.Fatalf("%q became %d elements: %q", xff, len(all), got)
		}
		for i, e := range all {
			for name, v := range e {
				switch {
				case name == "for" && strings.Contains(xff, strings.Trim(v, "[]")):
				case i == 0 && name == "host" && v == strings.TrimSpace(host):
				case i == 0 && name == "proto" && v == strings.TrimSpace(proto):
				default:
					t.Fatalf("%q %q %q: %q has %s=%q", xff, host, proto, got, name, v)
				}
			}
		}
	})
}

// Cleaning any parsable request leaves no internal header, and a second time changes nothing.
func FuzzClean(f *testing.F) {
	f.Add([]byte("Host: a\r\nK-Network-Hash: 1\r\nA: 1\r\nA: 2\r\nk-original-host: b\r\n"))
	f.Add([]byte("host: a\r\nKNATIVE-SERVING-REVISION: \r\nConnection: close\r\nX-Forwarded-For: 1, 2\r\nTrailer: x\r\nCookie: a=b\r\n"))
	f.Fuzz(func(t *testing.T, lines []byte) {
		h := &fasthttp.RequestHeader{}
		text := append([]byte("GET / HTTP/1.1\r\n"), lines...)
		if err := h.Read(bufio.NewReader(bytes.NewReader(append(text, "\r\n"...)))); err != nil || !clean(h) {
			return
		}
		before := dump(h)
		for _, line := range before {
			if name, _, _ := strings.Cut(line, ":"); internal([]byte(name)) {
				t.Fatalf("%q left in %q", name, lines)
			}
		}
		if !clean(h) || !slices.Equal(before, dump(h)) {
			t.Fatalf("%q changed to %q the second time", before, dump(h))
		}
	})
}
