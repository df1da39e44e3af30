package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Bounds of Decode. An object has to fit into one request to etcd (1.5 MiB by default) together with its key.
const (
	MaxObjectBytes  = 1 << 20
	MaxObjectDepth  = 64     // objects and lists inside each other
	MaxObjectValues = 10_000 // members and elements in all; a large service has some hundreds
)

// DecodeError says that data is no object of the kind: a bad request, not an invalid object.
type DecodeError struct {
	Field  string // path of the field, empty when the data as a whole is meant
	Detail string
}

func (e *DecodeError) Error() string {
	if e.Field == "" {
		return e.Detail
	}
	return e.Field + ": " + e.Detail
}

// Decode reads one object of a kind from JSON. It is stricter than encoding/json: names of fields are compared with their
// case, fields may not come twice, data must be UTF-8 and within the bounds above, nothing may follow the object, and kind
// and apiVersion must be the kind's (or absent; they are filled in). null, {} and [] for a map or a list are as if the field
// were not there.
//
// It returns the paths of fields that the kind does not have, sorted, for a warning; they are dropped. Unknown fields of
// status are not reported: clients send back what they got, and a status that comes from outside is ignored anyway.
//
// The error is a *DecodeError when the data is no object of the kind, and Errors when it has fields of Kubernetes' pod
// that Knative forbids ("must not set the field(s): spec.template.spec.affinity").
func Decode(k *Kind, data []byte) (Object, []string, error) {
	root, err := parse(data)
	if err != nil {
		return nil, nil, err
	}
	if root.kind != '{' {
		return nil, nil, &DecodeError{"", fmt.Sprintf("expected an object of kind %s, got %s", k.Kind, root.what())}
	}
	if err := root.checkType(k); err != nil {
		return nil, nil, err
	}
	o := k.New()
	d := decoder{fields: map[reflect.Type]map[string]field{}}
	if err := d.set(reflect.ValueOf(o).Elem(), root, ""); err != nil {
		return nil, nil, err
	}
	if len(d.forbidden) > 0 {
		return nil, nil, d.forbidden.tidy()
	}
	*o.Type() = TypeMeta{Kind: k.Kind, APIVersion: k.APIVersion}
	slices.Sort(d.unknown)
	return o, d.unknown, nil
}

// node is one value of a JSON text.
type node struct {
	kind  byte // '{', '[', '"', '0' (a number), 't' (true or false), 'n' (null)
	text  string
	names []string // of the members, when it is an object
	items []node   // members or elements
	raw   []byte   // as it stood in the text; objects and lists only
}

func (n *node) what() string {
	switch n.kind {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return fmt.Sprintf("the string %q", shorten(n.text))
	case '0':
		return "the number " + shorten(n.text)
	case 't':
		return n.text
	}
	return "null"
}

// json returns the text of the node.
func (n *node) json() []byte {
	if n.kind == '"' {
		b, _ := json.Marshal(n.text) // a string can always be written
		return b
	}
	if n.raw != nil {
		return n.raw
	}
	return []byte(n.text)
}

func (n *node) member(name string) *node {
	if i := slices.Index(n.names, name); i >= 0 {
		return &n.items[i]
	}
	return nil
}

// checkType compares kind and apiVersion before anything else, so that a Route sent to services is not answered with
// complaints about its fields.
func (n *node) checkType(k *Kind) error {
	for _, f := range []struct{ name, what, want string }{
		{"apiVersion", "API version", k.APIVersion},
		{"kind", "kind", k.Kind},
	} {
		if v := n.member(f.name); v != nil && v.kind == '"' && v.text != "" && v.text != f.want {
			return &DecodeError{"", fmt.Sprintf("the %s in the data (%s) does not match the expected %s (%s)", f.what, shorten(v.text), f.what, f.want)}
		}
	}
	return nil
}

// parse reads one JSON value and nothing after it.
func parse(data []byte) (*node, error) {
	if len(data) > MaxObjectBytes {
		return nil, &DecodeError{"", fmt.Sprintf("the object has %d bytes, more than %d", len(data), MaxObjectBytes)}
	}
	if i := brokenUTF8(data); i >= 0 {
		return nil, &DecodeError{"", fmt.Sprintf("invalid UTF-8 at byte %d", i)}
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, &DecodeError{"", "the body is empty, expected a JSON object"}
	}
	// The whole text is checked first: what follows may then rely on its grammar.
	if !json.Valid(data) {
		return nil, syntaxError(data)
	}
	p := parser{data: data, d: json.NewDecoder(bytes.NewReader(data))}
	p.d.UseNumber()
	n, err := p.value()
	if err != nil {
		return nil, err
	}
	return &n, nil
}

func brokenUTF8(data []byte) int {
	if utf8.Valid(data) {
		return -1
	}
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && size == 1 {
			return i
		}
		i += size
	}
	return -1
}

func syntaxError(data []byte) error {
	var raw json.RawMessage
	var s *json.SyntaxError
	if err := json.Unmarshal(data, &raw); !errors.As(err, &s) {
		return &DecodeError{"", fmt.Sprintf("invalid JSON: %v", err)}
	}
	before := data[:min(max(int(s.Offset)-1, 0), len(data))]
	line := bytes.Count(before, []byte("\n")) + 1
	column := len(before) - bytes.LastIndexByte(before, '\n')
	return &DecodeError{"", fmt.Sprintf("invalid JSON at line %d, column %d: %v", line, column, s)}
}

// parser makes nodes of tokens. The path to where it stands is joined only for an error: a long path before a long list
// would cost more than the list.
type parser struct {
	data   []byte
	d      *json.Decoder
	at     []step
	values int // so far
}

// step is one way down: into a member, or into an element of a list.
type step struct {
	name  string
	index int // -1 = the member
}

func (p *parser) path() string {
	path := ""
	for _, s := range p.at {
		if s.index >= 0 {
			path += fmt.Sprintf("[%d]", s.index)
		} else {
			path = join(path, shorten(s.name))
		}
	}
	return path
}

func (p *parser) broken(err error) error {
	return &DecodeError{p.path(), fmt.Sprintf("invalid JSON: %v", err)}
}

func (p *parser) value() (node, error) {
	if len(p.at) > MaxObjectDepth {
		return node{}, &DecodeError{"", fmt.Sprintf("the data is nested more than %d deep", MaxObjectDepth)}
	}
	if p.values++; p.values > MaxObjectValues {
		return node{}, &DecodeError{"", fmt.Sprintf("the data has more than %d values", MaxObjectValues)}
	}
	t, err := p.d.Token()
	if err != nil {
		return node{}, p.broken(err)
	}
	switch v := t.(type) {
	case json.Delim:
		n := node{kind: byte(v)}
		start := p.d.InputOffset() - 1
		if v == '{' {
			err = p.members(&n)
		} else {
			err = p.elements(&n)
		}
		if err != nil {
			return node{}, err
		}
		if _, err := p.d.Token(); err != nil { // the closing delimiter
			return node{}, p.broken(err)
		}
		n.raw = p.data[start:p.d.InputOffset()]
		return n, nil
	case string:
		return node{kind: '"', text: v}, nil
	case json.Number:
		return node{kind: '0', text: v.String()}, nil
	case bool:
		return node{kind: 't', text: strconv.FormatBool(v)}, nil
	}
	return node{kind: 'n', text: "null"}, nil
}

func (p *parser) members(n *node) error {
	seen := map[string]bool{}
	for p.d.More() {
		t, err := p.d.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return p.broken(err)
		}
		p.at = append(p.at, step{name, -1})
		if seen[name] {
			return &DecodeError{"", fmt.Sprintf("duplicate field %q", p.path())}
		}
		seen[name] = true
		v, err := p.value()
		if err != nil {
			return err
		}
		p.at = p.at[:len(p.at)-1]
		n.names = append(n.names, name)
		n.items = append(n.items, v)
	}
	return nil
}

func (p *parser) elements(n *node) error {
	for p.d.More() {
		p.at = append(p.at, step{"", len(n.items)})
		v, err := p.value()
		if err != nil {
			return err
		}
		p.at = p.at[:len(p.at)-1]
		n.items = append(n.items, v)
	}
	return nil
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// decoder writes nodes into the types of this package by their json tags.
type decoder struct {
	fields    map[reflect.Type]map[string]field
	unknown   []string
	forbidden Errors
}

type field struct{ index []int }

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// set writes n into v. null leaves the zero value, as everywhere in Kubernetes.
func (d *decoder) set(v reflect.Value, n *node, path string) error {
	if n.kind == 'n' {
		return nil
	}
	if v.Addr().Type().Implements(unmarshaler) {
		return d.setOwn(v, n, path)
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return d.set(v.Elem(), n, path)
	case reflect.Struct:
		return d.setStruct(v, n, path)
	case reflect.Map:
		return d.setMap(v, n, path)
	case reflect.Slice:
		return d.setSlice(v, n, path)
	case reflect.String:
		if n.kind != '"' {
			return wrongType(path, "a string", n)
		}
		v.SetString(n.text)
	case reflect.Bool:
		if n.kind != 't' {
			return wrongType(path, "true or false", n)
		}
		v.SetBool(n.text == "true")
	case reflect.Int32, reflect.Int64:
		i, err := strconv.ParseInt(n.text, 10, v.Type().Bits())
		if n.kind != '0' || errors.Is(err, strconv.ErrSyntax) {
			return wrongType(path, "an integer", n)
		}
		if err != nil {
			return wrongType(path, fmt.Sprintf("an integer of %d bits", v.Type().Bits()), n)
		}
		v.SetInt(i)
	default:
		panic(fmt.Sprintf("api: field %s has the type %v, which Decode does not know", path, v.Type()))
	}
	return nil
}

func wrongType(path, want string, n *node) error {
	return &DecodeError{path, fmt.Sprintf("expected %s, got %s", want, n.what())}
}

// setOwn lets a type that has its own JSON form read it.
func (d *decoder) setOwn(v reflect.Value, n *node, path string) error {
	if v.Type() == reflect.TypeFor[json.RawMessage]() {
		v.SetBytes(bytes.Clone(n.json())) // the text of the request must not stay in memory for a part of it
		return nil
	}
	if err := v.Addr().Interface().(json.Unmarshaler).UnmarshalJSON(n.json()); err != nil {
		want := map[reflect.Type]string{
			reflect.TypeFor[Time]():        "a time such as 2006-01-02T15:04:05Z",
			reflect.TypeFor[Quantity]():    "a quantity such as 100m or 64Mi",
			reflect.TypeFor[IntOrString](): "a port number or name",
		}[v.Type()]
		return wrongType(path, want, n)
	}
	return nil
}

func (d *decoder) setStruct(v reflect.Value, n *node, path string) error {
	if n.kind != '{' {
		return wrongType(path, "an object", n)
	}
	fields := d.of(v.Type())
	for i, name := range n.names {
		f, ok := fields[name]
		at := join(path, shorten(name))
		if !ok {
			d.stranger(v.Type(), name, at, &n.items[i])
			continue
		}
		if err := d.set(v.FieldByIndex(f.index), &n.items[i], at); err != nil {
			return err
		}
	}
	return nil
}

// stranger notes a field that the type does not have.
func (d *decoder) stranger(t reflect.Type, name, path string, n *node) {
	switch {
	case slices.Contains(forbiddenFields[t], name):
		if !n.empty() {
			d.forbidden = append(d.forbidden, FieldError{Type: FieldValueForbidden, Field: path, Detail: "must not set the field(s)"})
		}
	case slices.Contains(ignoredFields[t], name), path == "status", strings.HasPrefix(path, "status."):
	default:
		d.unknown = append(d.unknown, path)
	}
}

// empty says that a value is what it would be if it were not there; Knative lets such fields pass.
func (n *node) empty() bool {
	switch n.kind {
	case '{', '[':
		return len(n.items) == 0
	case '"':
		return n.text == ""
	}
	return n.text == "null" || n.text == "false" || n.text == "0"
}

func (d *decoder) setMap(v reflect.Value, n *node, path string) error {
	if n.kind != '{' {
		return wrongType(path, "an object", n)
	}
	if len(n.names) == 0 {
		return nil // as if it were not there: else an object would not be the same after it was written and read
	}
	m := reflect.MakeMapWithSize(v.Type(), len(n.names))
	for i, name := range n.names {
		e := reflect.New(v.Type().Elem()).Elem()
		if err := d.set(e, &n.items[i], join(path, shorten(name))); err != nil {
			return err
		}
		m.SetMapIndex(reflect.ValueOf(name), e)
	}
	v.Set(m)
	return nil
}

func (d *decoder) setSlice(v reflect.Value, n *node, path string) error {
	if n.kind != '[' {
		return wrongType(path, "a list", n)
	}
	if len(n.items) == 0 {
		return nil // see setMap
	}
	s := reflect.MakeSlice(v.Type(), len(n.items), len(n.items))
	for i := range n.items {
		if err := d.set(s.Index(i), &n.items[i], fmt.Sprintf("%s[%d]", path, i)); err != nil {
			return err
		}
	}
	v.Set(s)
	return nil
}

// of lists the fields of a type by their names on the wire; embedded types without a name are part of it.
func (d *decoder) of(t reflect.Type) map[string]field {
	if f, ok := d.fields[t]; ok {
		return f
	}
	m := map[string]field{}
	collect(t, nil, m)
	d.fields[t] = m
	return m
}

func collect(t reflect.Type, at []int, m map[string]field) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		index := append(slices.Clone(at), i)
		switch {
		case name == "-":
		case name == "" && f.Anonymous:
			collect(f.Type, index, m)
		case name != "":
			m[name] = field{index}
		}
	}
}
