package api

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Types of a FieldError: the reasons of causes in a Kubernetes Status.
const (
	FieldValueRequired     = "FieldValueRequired"
	FieldValueInvalid      = "FieldValueInvalid"
	FieldValueNotSupported = "FieldValueNotSupported"
	FieldValueDuplicate    = "FieldValueDuplicate"
	FieldValueForbidden    = "FieldValueForbidden"
	FieldValueTypeInvalid  = "FieldValueTypeInvalid"
)

// FieldError is one thing that is wrong with an object.
type FieldError struct {
	Type   string // one of the constants above
	Field  string // path from the root of the object: spec.template.spec.containers[0].image
	Detail string // what is wrong, in Knative's words: "missing field(s)", "invalid value: x"
	Why    string // more, for people; may be empty
}

// Error is "detail: field (why)".
func (e FieldError) Error() string { return render(e.Detail, e.Why, e.Field) }

// Errors are all the things that are wrong with an object. The nil value means that nothing is: compare its length, or use
// Err to get an error.
type Errors []FieldError

// Error joins all of them by "; ", sorted by field. Fields with the same complaint are named together, as Knative does:
// "missing field(s): spec.a, spec.b".
func (e Errors) Error() string {
	type group struct {
		detail, why string
		fields      []string
	}
	var groups []group
	for _, f := range e {
		i := slices.IndexFunc(groups, func(g group) bool { return g.detail == f.Detail && g.why == f.Why })
		if i < 0 {
			groups = append(groups, group{f.Detail, f.Why, []string{f.Field}})
		} else if !slices.Contains(groups[i].fields, f.Field) {
			groups[i].fields = append(groups[i].fields, f.Field)
		}
	}
	for _, g := range groups {
		slices.Sort(g.fields)
	}
	slices.SortFunc(groups, func(a, b group) int {
		if (a.fields[0] == "") != (b.fields[0] == "") { // what is said of no field comes last
			return strings.Compare(b.fields[0], a.fields[0])
		}
		return cmp.Or(strings.Compare(a.fields[0], b.fields[0]), strings.Compare(a.detail, b.detail), strings.Compare(a.why, b.why))
	})
	lines := make([]string, len(groups))
	for i, g := range groups {
		lines[i] = render(g.detail, g.why, g.fields...)
	}
	return strings.Join(lines, "; ")
}

// maxErrors is how many errors of one object are told; a person fixes a few and sends it again, and a megabyte of env
// without names must not become many megabytes of answer.
const maxErrors = 100

// tidy brings errors into an order that does not depend on how maps are walked, and bounds their number.
func (e Errors) tidy() Errors {
	slices.SortStableFunc(e, func(a, b FieldError) int {
		return cmp.Or(strings.Compare(a.Field, b.Field), strings.Compare(a.Detail, b.Detail), strings.Compare(a.Why, b.Why))
	})
	if more := len(e) - maxErrors; more > 0 {
		e = append(e[:maxErrors:maxErrors], FieldError{Type: FieldValueInvalid, Detail: fmt.Sprintf("too many errors, %d more are not listed", more)})
	}
	return e
}

// Err returns e as an error, nil when it is empty.
func (e Errors) Err() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

func render(detail, why string, fields ...string) string {
	s := detail
	if f := strings.Join(fields, ", "); f != "" {
		s += ": " + f
	}
	if why != "" {
		s += " (" + why + ")"
	}
	return s
}

// report collects errors under a path while an object is walked.
type report struct {
	errs *Errors
	path string
}

// at goes one field down; an index is written by the caller as "[3]".
func (r report) at(field string) report {
	switch {
	case r.path == "" || strings.HasPrefix(field, "["):
		r.path += field
	default:
		r.path += "." + field
	}
	return r
}

func (r report) index(field string, i int) report { return r.at(fmt.Sprintf("%s[%d]", field, i)) }

func (r report) add(typ, detail, why string) {
	*r.errs = append(*r.errs, FieldError{Type: typ, Field: r.path, Detail: detail, Why: why})
}

// unsupported is for a value that Knative knows and we do not.
func (r report) unsupported(v any, why string) {
	r.add(FieldValueNotSupported, fmt.Sprintf("invalid value: %v", shorten(v)), why)
}

func (r report) missing()               { r.add(FieldValueRequired, "missing field(s)", "") }
func (r report) forbidden()             { r.add(FieldValueForbidden, "must not set the field(s)", "") }
func (r report) invalid(v any)          { r.invalidWhy(v, "") }
func (r report) generic(message string) { r.add(FieldValueInvalid, message, "") }

// wrongs is invalidWhy with what a check of syntax returned; it complains about nothing when that is empty.
func (r report) wrongs(v any, wrong []string) {
	if len(wrong) > 0 {
		r.invalidWhy(v, strings.Join(wrong, "; "))
	}
}

func (r report) invalidWhy(v any, why string) {
	r.add(FieldValueInvalid, fmt.Sprintf("invalid value: %v", shorten(v)), why)
}

// invalidKey complains about a key of the map at r.
func (r report) invalidKey(key, why string) {
	r.add(FieldValueInvalid, fmt.Sprintf("invalid key name %q", shorten(key)), why)
}

func (r report) bounds(v, low, high any) {
	r.add(FieldValueInvalid, fmt.Sprintf("expected %v <= %v <= %v", low, v, high), "")
}

func (r report) both(fields ...string) {
	for _, f := range fields {
		r.at(f).add(FieldValueInvalid, "expected exactly one, got both", "")
	}
}

func (r report) neither(fields ...string) {
	for _, f := range fields {
		r.at(f).add(FieldValueRequired, "expected exactly one, got neither", "")
	}
}

// shorten keeps a value that came from outside from filling a screen.
func shorten(v any) string {
	s := fmt.Sprint(v)
	if len(s) <= 200 {
		return s
	}
	return strings.ToValidUTF8(s[:200], "") + "..."
}
