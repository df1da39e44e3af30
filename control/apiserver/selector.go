package apiserver

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/thawrun/thaw/api"
)

// selector is what a list or a watch is narrowed to. The zero value matches everything.
type selector struct {
	labels []requirement
	fields []fieldTerm
}

// requirement is one term of a label selector; all must hold.
type requirement struct {
	key    string
	op     string // "in", "notin", "exists", "!", ">", "<"
	values []string
}

// fieldTerm compares metadata.name or metadata.namespace.
type fieldTerm struct {
	field string
	not   bool
	value string
}

// maxSelectorBytes bounds a selector: matching costs its length for every object.
const maxSelectorBytes = 8 << 10

func parseSelector(labels, fields string) (selector, error) {
	if len(labels)+len(fields) > maxSelectorBytes {
		return selector{}, badRequest("the selectors are longer than %d bytes", maxSelectorBytes)
	}
	l, err := parseLabels(labels)
	if err != nil {
		return selector{}, badRequest("unable to parse labelSelector %q: %v", clip(labels, 200), err)
	}
	f, err := parseFields(fields)
	if err != nil {
		return selector{}, badRequest("unable to parse fieldSelector %q: %v", clip(fields, 200), err)
	}
	for _, t := range f {
		if t.field != "metadata.name" && t.field != "metadata.namespace" {
			return selector{}, badRequest("field label not supported: %s", clip(t.field, 100))
		}
	}
	return selector{labels: l, fields: f}, nil
}

// empty says that everything matches.
func (s selector) empty() bool { return len(s.labels) == 0 && len(s.fields) == 0 }

func (s selector) matches(m *api.ObjectMeta) bool {
	for _, f := range s.fields {
		v := m.Name
		if f.field == "metadata.namespace" {
			v = m.Namespace
		}
		if (v == f.value) == f.not {
			return false
		}
	}
	for _, r := range s.labels {
		if !r.matches(m.Labels) {
			return false
		}
	}
	return true
}

// matches follows Kubernetes: an absent label satisfies !=, notin and !.
func (r requirement) matches(labels map[string]string) bool {
	v, ok := labels[r.key]
	switch r.op {
	case "exists":
		return ok
	case "!":
		return !ok
	case "in":
		return ok && slices.Contains(r.values, v)
	case "notin":
		return !ok || !slices.Contains(r.values, v)
	}
	have, err := strconv.ParseInt(v, 10, 64)
	if !ok || err != nil {
		return false
	}
	want, err := strconv.ParseInt(r.values[0], 10, 64)
	if err != nil {
		return false
	}
	if r.op == ">" {
		return have > want
	}
	return have < want
}

// parseLabels reads "a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1".
func parseLabels(s string) ([]requirement, error) {
	p := &labelParser{rest: s}
	var out []requirement
	for p.space(); p.rest != ""; p.space() {
		if len(out) > 0 {
			if !p.take(",") {
				return nil, fmt.Errorf("found %q, expected ',' or the end", clip(p.rest, 50))
			}
			p.space()
		}
		r, err := p.requirement()
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

type labelParser struct{ rest string }

func (p *labelParser) space() { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }

func (p *labelParser) take(s string) bool {
	if !strings.HasPrefix(p.rest, s) {
		return false
	}
	p.rest = p.rest[len(s):]
	return true
}

// word takes everything up to a character with a meaning.
func (p *labelParser) word() string {
	i := strings.IndexAny(p.rest, " \t\r\n,()=!<>")
	if i < 0 {
		i = len(p.rest)
	}
	w := p.rest[:i]
	p.rest = p.rest[i:]
	return w
}

func (p *labelParser) requirement() (requirement, error) {
	not := p.take("!")
	p.space()
	r := requirement{key: p.word()}
	if err := checkLabelKey(r.key); err != nil {
		return r, err
	}
	p.space()
	if not {
		r.op = "!"
		return r, nil
	}
	switch {
	case p.rest == "" || p.rest[0] == ',':
		r.op = "exists"
		return r, nil
	case p.take("=="), p.take("="):
		r.op = "in"
	case p.take("!="):
		r.op = "notin"
	case p.take(">"):
		r.op = ">"
	case p.take("<"):
		r.op = "<"
	default:
		switch r.op = p.word(); r.op {
		case "in", "notin":
			return p.set(r)
		case "":
			return r, fmt.Errorf("found %q after %q, expected an operator", clip(p.rest, 50), r.key)
		default:
			return r, fmt.Errorf("found %q after %q, expected one of: in, notin, =, ==, !=, >, <", clip(r.op, 50), r.key)
		}
	}
	p.space()
	v := p.word()
	r.values = []string{v}
	if r.op == ">" || r.op == "<" {
		if _, err := strconv.ParseInt(v, 10, 64); err != nil {
			return r, fmt.Errorf("%q after %q is not a whole number", clip(v, 50), r.op)
		}
	}
	return r, checkLabelValue(v)
}

// set reads "(a, b)"; an empty value is one: "in ()" matches the empty string, as in Kubernetes.
func (p *labelParser) set(r requirement) (requirement, error) {
	p.space()
	if !p.take("(") {
		return r, fmt.Errorf("found %q after %q, expected '('", clip(p.rest, 50), r.op)
	}
	for {
		p.space()
		v := p.word()
		if err := checkLabelValue(v); err != nil {
			return r, err
		}
		r.values = append(r.values, v)
		p.space()
		if p.take(")") {
			return r, nil
		}
		if !p.take(",") {
			return r, fmt.Errorf("found %q in a list of values, expected ',' or ')'", clip(p.rest, 50))
		}
	}
}

// checkLabelKey wants an optional DNS prefix and a name of at most 63 characters.
func checkLabelKey(key string) error {
	prefix, name, ok := strings.Cut(key, "/")
	if !ok {
		prefix, name = "", key
	}
	if ok && !isSubdomain(prefix) {
		return fmt.Errorf("the prefix of label key %q is not a DNS name", clip(key, 100))
	}
	if name == "" || !isLabelText(name) {
		return fmt.Errorf("label key %q: the name must have 1 to 63 letters, digits, '-', '_' or '.', and begin and end with a letter or digit", clip(key, 100))
	}
	return nil
}

func checkLabelValue(v string) error {
	if v != "" && !isLabelText(v) {
		return fmt.Errorf("label value %q must have at most 63 letters, digits, '-', '_' or '.', and begin and end with a letter or digit", clip(v, 100))
	}
	return nil
}

func isLabelText(s string) bool {
	if len(s) == 0 || len(s) > 63 || !isAlnum(s[0]) || !isAlnum(s[len(s)-1]) {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !isAlnum(c) && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return true
}

func isAlnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// isSubdomain says whether s is a DNS-1123 subdomain.
func isSubdomain(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if !isDNSLabel(part) {
			return false
		}
	}
	return true
}

// isDNSLabel says whether s is a DNS-1123 label: lower case letters, digits and dashes, no dash at an end, at most 63.
func isDNSLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// parseFields reads "metadata.name=a,metadata.namespace!=b" with backslash before ',', '=' and '\' in values.
func parseFields(s string) ([]fieldTerm, error) {
	if strings.TrimSpace(s) == "" {
		return nil, nil
	}
	var out []fieldTerm
	for _, term := range splitEscaped(s) {
		if term == "" {
			continue
		}
		i := strings.IndexAny(term, "=!")
		if i < 0 {
			return nil, fmt.Errorf("%q has no operator: use =, == or !=", clip(term, 50))
		}
		t := fieldTerm{field: strings.TrimSpace(term[:i])}
		rest := term[i:]
		switch {
		case strings.HasPrefix(rest, "!="):
			t.not, rest = true, rest[2:]
		case strings.HasPrefix(rest, "=="):
			rest = rest[2:]
		case rest[0] == '=':
			rest = rest[1:]
		default:
			return nil, fmt.Errorf("%q has no operator: use =, == or !=", clip(term, 50))
		}
		v, err := unescape(rest)
		if err != nil {
			return nil, err
		}
		t.value = v
		out = append(out, t)
	}
	return out, nil
}

// splitEscaped splits at commas that no backslash stands before.
func splitEscaped(s string) []string {
	var out []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case ',':
			out = append(out, s[start:i])
			start = i + 1
		}
	}
	return append(out, s[start:])
}

func unescape(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
			if i == len(s) || !strings.ContainsRune(`\,=`, rune(s[i])) {
				return "", fmt.Errorf("%q has a backslash before something other than ',', '=' or '\\'", clip(s, 50))
			}
		case '=':
			return "", fmt.Errorf("%q has an '=' that no backslash stands before", clip(s, 50))
		}
		b.WriteByte(s[i])
	}
	return b.String(), nil
}
