package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/thawrun/thaw/api"
)

// NotReadyError says that an object failed, or did not get ready in time.
type NotReadyError struct {
	Kind, Name      string
	Failed          bool // Ready is False; otherwise the time was up
	Reason, Message string
}

func (e *NotReadyError) Error() string {
	what := "is not ready yet"
	if e.Failed {
		what = "failed"
	}
	text := fmt.Sprintf("%s %q %s", e.Kind, e.Name, what)
	if e.Reason != "" {
		text += ": " + e.Reason
	}
	if e.Message != "" {
		text += ": " + e.Message
	}
	return text
}

// Readiness is the Ready condition of an object, seen for its present generation: a condition that speaks of an older spec
// counts as Unknown.
func Readiness(o api.Object) api.Condition {
	s := api.StatusOf(o)
	if s == nil {
		return api.Condition{Type: api.ConditionReady, Status: api.Unknown}
	}
	if c := s.Conditions.Get(api.ConditionReady); c != nil && s.ObservedGeneration >= o.Meta().Generation {
		return *c
	}
	return api.Condition{Type: api.ConditionReady, Status: api.Unknown, Message: "waiting for the server to look at it"}
}

// WaitOptions say how to wait.
type WaitOptions struct {
	Timeout time.Duration // 0 = as long as ctx lasts
	// Settle is how long Ready must stay False before it counts: while a spec is being taken up, a route may for a moment
	// complain about a revision that is just being made. 0 = 1 s.
	Settle time.Duration
	// Progress is called with each new state. nil = not called.
	Progress func(c api.Condition)
}

// WaitReady waits until an object is ready and returns it, or a *NotReadyError. A server that goes away meanwhile is an
// error at once; a watch that ends is opened again.
func (c *Client) WaitReady(ctx context.Context, k *api.Kind, ns, name string, w WaitOptions) (api.Object, error) {
	var last api.Condition
	outer := ctx
	if w.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, w.Timeout)
		defer cancel()
	}
	if w.Settle == 0 {
		w.Settle = time.Second
	}
	failedSince := time.Time{}
	for {
		o, err := c.Get(ctx, k, ns, name)
		if err != nil {
			return nil, waitError(outer, ctx, err, k, name, last)
		}
		for {
			now := Readiness(o)
			if now != last && w.Progress != nil {
				w.Progress(now)
			}
			last = now
			if now.Status == api.True {
				return o, nil
			}
			if now.Status != api.False {
				failedSince = time.Time{}
			} else if failedSince.IsZero() {
				failedSince = time.Now()
			}
			next, err := c.nextChange(ctx, k, o, failedSince, w.Settle)
			switch {
			case errors.Is(err, errSettled):
				return o, &NotReadyError{Kind: k.Singular, Name: name, Failed: true, Reason: now.Reason, Message: now.Message}
			case errors.Is(err, ErrExpired), err == nil && next == nil:
				// The watch ended; look again.
			case err != nil:
				return nil, waitError(outer, ctx, err, k, name, last)
			default:
				o = next
				continue
			}
			break
		}
		// A server that ends each watch at once must not be asked in a tight loop.
		select {
		case <-ctx.Done():
			return nil, waitError(outer, ctx, ctx.Err(), k, name, last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

var errSettled = errors.New("the failure stayed")

// nextChange waits for the next version of o; nil without an error if the watch ended. With failedSince set it waits no
// longer than until the failure counts.
func (c *Client) nextChange(ctx context.Context, k *api.Kind, o api.Object, failedSince time.Time, settle time.Duration) (api.Object, error) {
	if !failedSince.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, failedSince.Add(settle), errSettled)
		defer cancel()
	}
	m := o.Meta()
	opts := WatchOptions{ListOptions: ListOptions{FieldSelector: "metadata.name=" + m.Name}, ResourceVersion: m.ResourceVersion}
	for ev, err := range c.Watch(ctx, k, m.Namespace, opts) {
		switch {
		case context.Cause(ctx) == errSettled:
			return nil, errSettled
		case err != nil:
			return nil, err
		case ev.Type == "DELETED" && ev.Object.Meta().Name == m.Name:
			return nil, &StatusError{Code: 404, Reason: "NotFound", Message: fmt.Sprintf("%s %q was deleted meanwhile", k.Singular, m.Name)}
		case ev.Type != "BOOKMARK" && ev.Object.Meta().Name == m.Name:
			return ev.Object, nil
		}
	}
	if context.Cause(ctx) == errSettled {
		return nil, errSettled
	}
	return nil, ctx.Err()
}

// waitError tells "the time was up" from "the caller gave up" and from real errors.
func waitError(outer, inner context.Context, err error, k *api.Kind, name string, last api.Condition) error {
	if inner.Err() != nil && outer.Err() == nil {
		return &NotReadyError{Kind: k.Singular, Name: name, Reason: last.Reason, Message: last.Message}
	}
	return err
}

// WaitGone waits until an object is no longer there, or until another one has taken its name.
func (c *Client) WaitGone(ctx context.Context, k *api.Kind, ns, name, uid string) error {
	for {
		o, err := c.Get(ctx, k, ns, name)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if uid != "" && o.Meta().UID != uid {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s %q to be gone: %w", k.Singular, name, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
