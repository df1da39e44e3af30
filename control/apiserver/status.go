package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/state"
)

// Reasons of a Status, Kubernetes' words; clients branch on them.
const (
	reasonBadRequest       = "BadRequest"
	reasonUnauthorized     = "Unauthorized"
	reasonForbidden        = "Forbidden"
	reasonNotFound         = "NotFound"
	reasonMethodNotAllowed = "MethodNotAllowed"
	reasonNotAcceptable    = "NotAcceptable"
	reasonAlreadyExists    = "AlreadyExists"
	reasonConflict         = "Conflict"
	reasonExpired          = "Expired"
	reasonTooLarge         = "RequestEntityTooLarge"
	reasonUnsupportedMedia = "UnsupportedMediaType"
	reasonInvalid          = "Invalid"
	reasonTooManyRequests  = "TooManyRequests"
	reasonInternalError    = "InternalError"
	reasonUnavailable      = "ServiceUnavailable"
	reasonTimeout          = "Timeout"
)

// status is Kubernetes' v1 Status: the body of every error, and the answer to a deletion.
type status struct {
	Kind       string         `json:"kind"`
	APIVersion string         `json:"apiVersion"`
	Metadata   struct{}       `json:"metadata"`
	Status     string         `json:"status"` // "Success" or "Failure"
	Message    string         `json:"message,omitempty"`
	Reason     string         `json:"reason,omitempty"`
	Details    *statusDetails `json:"details,omitempty"`
	Code       int            `json:"code,omitempty"`
}

// statusDetails says which object, and what is wrong with it.
type statusDetails struct {
	Name              string        `json:"name,omitempty"`
	Group             string        `json:"group,omitempty"`
	Kind              string        `json:"kind,omitempty"` // the plural where an object is named by its path, the kind where its content is wrong
	UID               string        `json:"uid,omitempty"`
	Causes            []statusCause `json:"causes,omitempty"`
	RetryAfterSeconds int           `json:"retryAfterSeconds,omitempty"`
}

// statusCause is one thing that is wrong.
type statusCause struct {
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	Field   string `json:"field,omitempty"`
}

// statusError is an error that knows its HTTP form.
type statusError struct{ s status }

func (e *statusError) Error() string { return e.s.Message }

// fail makes an error with a code, a reason and a message.
func fail(code int, reason, format string, args ...any) *statusError {
	return &statusError{status{
		Kind: "Status", APIVersion: "v1", Status: "Failure",
		Code: code, Reason: reason, Message: fmt.Sprintf(format, args...),
	}}
}

// about adds which object the error is about, named as its path names it.
func (e *statusError) about(k *api.Kind, name string) *statusError {
	e.s.Details = &statusDetails{Name: name, Group: group(k), Kind: k.Plural}
	return e
}

// after adds when trying again makes sense.
func (e *statusError) after(seconds int) *statusError {
	if e.s.Details == nil {
		e.s.Details = &statusDetails{}
	}
	e.s.Details.RetryAfterSeconds = seconds
	return e
}

func badRequest(format string, args ...any) *statusError {
	return fail(http.StatusBadRequest, reasonBadRequest, format, args...)
}

func notFound(k *api.Kind, name string) *statusError {
	return fail(http.StatusNotFound, reasonNotFound, "%s %q not found", resourceName(k), name).about(k, name)
}

// noSuchPath is the answer to a path that names no resource.
func noSuchPath() *statusError {
	e := fail(http.StatusNotFound, reasonNotFound, "the server could not find the requested resource")
	e.s.Details = &statusDetails{}
	return e
}

func conflict(k *api.Kind, name, why string) *statusError {
	return fail(http.StatusConflict, reasonConflict, "Operation cannot be fulfilled on %s %q: %s", resourceName(k), name, why).about(k, name)
}

func modified(k *api.Kind, name string) *statusError {
	return conflict(k, name, "the object has been modified; please apply your changes to the latest version and try again")
}

func expired(format string, args ...any) *statusError {
	return fail(http.StatusGone, reasonExpired, format, args...)
}

// invalid is the answer to an object whose content is wrong: all errors in the message, one cause each.
func invalid(k *api.Kind, name string, errs api.Errors) *statusError {
	return invalidNamed(k.Kind, group(k), name, errs)
}

// invalidOptions is invalid for the options of a request, such as CreateOptions.
func invalidOptions(kind, field, value string, supported ...string) *statusError {
	return invalidNamed(kind, "meta.k8s.io", "", api.Errors{{
		Type: api.FieldValueNotSupported, Field: field,
		Detail: fmt.Sprintf("Unsupported value: %q: supported values: %q", clip(value, 100), supported),
	}})
}

func invalidNamed(kind, group, name string, errs api.Errors) *statusError {
	full := kind
	if group != "" {
		full += "." + group
	}
	e := fail(http.StatusUnprocessableEntity, reasonInvalid, "%s %q is invalid: %s", full, name, errs.Error())
	e.s.Details = &statusDetails{Name: name, Group: group, Kind: kind}
	for _, f := range errs {
		message := f.Detail
		if f.Why != "" {
			message += " (" + f.Why + ")"
		}
		e.s.Details.Causes = append(e.s.Details.Causes, statusCause{Reason: f.Type, Message: message, Field: f.Field})
	}
	return e
}

// fromStore gives an error of the store its HTTP form. What is none of the store's sentinels means that it did not answer.
func fromStore(err error, k *api.Kind, name string) error {
	var s *statusError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &s):
		return s
	case errors.Is(err, state.ErrNotFound), errors.Is(err, objects.ErrBadName): // nothing can have such a name
		return notFound(k, name)
	case errors.Is(err, state.ErrExists):
		return fail(http.StatusConflict, reasonAlreadyExists, "%s %q already exists", resourceName(k), name).about(k, name)
	case errors.Is(err, state.ErrConflict):
		return modified(k, name)
	case errors.Is(err, state.ErrCompacted):
		return expired("the history that was asked for is gone; list again: %v", err)
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, objects.ErrCorrupt):
		return fail(http.StatusInternalServerError, reasonInternalError, "a stored object cannot be read: %v", err)
	}
	return fail(http.StatusServiceUnavailable, reasonUnavailable,
		"the state store does not answer, so nothing can be read or changed now; running services are not affected: %v", err).after(1)
}

// statusOf gives any error its HTTP form.
func statusOf(err error) *status {
	var e *statusError
	if errors.As(err, &e) {
		return &e.s
	}
	return &fail(http.StatusInternalServerError, reasonInternalError, "%v", err).s
}

// writeError answers with a Status.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, context.Canceled) && r.Context().Err() != nil {
		return // the client left, or the server ends: nobody reads an answer
	}
	s := statusOf(err)
	if s.Details != nil && s.Details.RetryAfterSeconds > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(s.Details.RetryAfterSeconds))
	}
	if s.Code == http.StatusRequestEntityTooLarge {
		w.Header().Set("Connection", "close") // the rest of the body is not read
	}
	writeJSON(w, r, s.Code, s)
}

// The bounds of Warning headers. Kubernetes' clients read at most this much; above the total, each text is cut.
const (
	maxWarningBytes      = 256
	maxTotalWarningBytes = 4096
)

// warn adds one Warning header (RFC 7234, code 299) for each text, once each and within bounds.
func warn(h http.Header, texts []string) {
	total := 0
	for _, t := range texts {
		total += len(t)
	}
	seen := map[string]bool{}
	budget := maxTotalWarningBytes
	for _, t := range texts {
		t = printable(t)
		if total > maxTotalWarningBytes {
			t = clip(t, maxWarningBytes)
		}
		if t == "" || seen[t] {
			continue
		}
		seen[t] = true
		value := `299 - "` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(t) + `"`
		if budget -= len(value); budget < 0 {
			return
		}
		h.Add("Warning", value)
	}
}

// printable drops what must not stand in a header.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) && r != ' ' {
			return -1
		}
		return r
	}, s)
}

// clip cuts s to at most n bytes at a rune's border, with a mark that it was cut.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const mark = "…"
	n -= len(mark)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + mark
}

// group is the API group of a kind; that of "v1" is "".
func group(k *api.Kind) string {
	g, _, ok := strings.Cut(k.APIVersion, "/")
	if !ok {
		return ""
	}
	return g
}

// version is the version of a kind inside its group.
func version(k *api.Kind) string {
	return k.APIVersion[strings.LastIndexByte(k.APIVersion, '/')+1:]
}

// resourceName is how Kubernetes names a resource in messages: services.serving.knative.dev.
func resourceName(k *api.Kind) string {
	if g := group(k); g != "" {
		return k.Plural + "." + g
	}
	return k.Plural
}
