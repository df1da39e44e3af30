package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// What callers branch on with errors.Is. A StatusError matches the one of its reason.
var (
	ErrNotFound      = errors.New("not found")
	ErrAlreadyExists = errors.New("already exists")
	ErrConflict      = errors.New("changed meanwhile")
	ErrInvalid       = errors.New("invalid")
	ErrUnauthorized  = errors.New("not authorized")
	ErrExpired       = errors.New("history is gone") // 410: list again
	ErrUnavailable   = errors.New("not available now")
)

// Cause is one field that the server complains about.
type Cause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Field   string `json:"field"`
}

// StatusError is an answer from 400 on, as Kubernetes' Status where the server sent one.
type StatusError struct {
	Code       int    // HTTP status
	Reason     string // NotFound, AlreadyExists, Conflict, Invalid, …; "" if the answer was no Status
	Message    string // for people
	Kind, Name string // what it is about, as far as the server says
	Causes     []Cause
	RetryAfter time.Duration // 0 = not said
}

func (e *StatusError) Error() string { return e.Message }

// Is matches the sentinels of this package.
func (e *StatusError) Is(target error) bool {
	switch target {
	case ErrNotFound:
		return e.Code == http.StatusNotFound
	case ErrAlreadyExists:
		return e.Reason == "AlreadyExists"
	case ErrConflict:
		return e.Code == http.StatusConflict && e.Reason != "AlreadyExists"
	case ErrInvalid:
		return e.Code == http.StatusUnprocessableEntity || e.Code == http.StatusBadRequest
	case ErrUnauthorized:
		return e.Code == http.StatusUnauthorized || e.Code == http.StatusForbidden
	case ErrExpired:
		return e.Code == http.StatusGone
	case ErrUnavailable:
		return e.Code == http.StatusServiceUnavailable || e.Code == http.StatusTooManyRequests
	}
	return false
}

// UnreachableError says that there was no answer at all.
type UnreachableError struct {
	Server string
	Err    error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("cannot reach the API at %s: %v", e.Server, e.Err)
}

func (e *UnreachableError) Unwrap() error { return e.Err }

// status is the wire form of Kubernetes' Status.
type status struct {
	Kind    string `json:"kind"`
	Message string `json:"message"`
	Reason  string `json:"reason"`
	Code    int    `json:"code"`
	Details struct {
		Name              string  `json:"name"`
		Kind              string  `json:"kind"`
		Causes            []Cause `json:"causes"`
		RetryAfterSeconds int64   `json:"retryAfterSeconds"`
	} `json:"details"`
}

func (s *status) err(code int) *StatusError {
	return &StatusError{
		Code: code, Reason: s.Reason, Message: s.Message, Kind: s.Details.Kind, Name: s.Details.Name, Causes: s.Details.Causes,
		RetryAfter: time.Duration(s.Details.RetryAfterSeconds) * time.Second,
	}
}

// statusError reads an error from an answer. A body that is no Status (a proxy's page, say) is shown in one short line.
func statusError(method, path string, resp *http.Response, body []byte) error {
	var s status
	if json.Unmarshal(body, &s) == nil && s.Kind == "Status" && s.Message != "" {
		e := s.err(resp.StatusCode)
		if e.RetryAfter == 0 {
			e.RetryAfter = retryAfter(resp.Header.Get("Retry-After"))
		}
		return e
	}
	text := strings.Join(strings.Fields(strings.ToValidUTF8(string(body), "")), " ")
	if len(text) > 200 {
		text = strings.ToValidUTF8(text[:200], "") + "…"
	}
	message := fmt.Sprintf("%s %s: %s", method, path, resp.Status)
	if text != "" {
		message += ": " + text
	}
	return &StatusError{Code: resp.StatusCode, Message: message, RetryAfter: retryAfter(resp.Header.Get("Retry-After"))}
}

// retryAfter reads the seconds form of the header; the date form is of no use to a program that runs for seconds.
func retryAfter(h string) time.Duration {
	n, err := strconv.Atoi(h)
	if err != nil || n < 0 || n > 3600 {
		return 0
	}
	return time.Duration(n) * time.Second
}
