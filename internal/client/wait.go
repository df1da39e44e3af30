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
// error at once; a watch that ends is opened again, and one that cannot say now is asked again when it wants to be.
func (c *Client) WaitReady(ctx context.Context, k *api.Kind, ns, name string, w WaitOptions) (api.Object, error) {
	if w.Settle == 0 {
		w.Settle = time.Second
	}
	outer := ctx
	if w.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, w.Timeout)
		defer cancel()
	}
	wait := waiter{client: c, kind: k, options: w}
	for {
		o, err := c.Get(ctx, k, ns, name)
		if err == nil {
			o, err = wait.follow(ctx, o)
		}
		switch {
		case err == nil && o != nil:
			return o, nil
		case errors.Is(err, errSettled):
			return o, &NotReadyError{Kind: k.Singular, Name: name, Failed: true, Reason: wait.last.Reason, Message: wait.last.Message}
		case err != nil && !errors.Is(err, ErrExpired) && later(err) == 0:
			return nil, waitError(outer, ctx, err, k, name, wait.last)
		}
		// The watch ended before anything was decided. A server that ends each at once must not be asked in a tight loop.
		select {
		case <-ctx.Done():
			return nil, waitError(outer, ctx, ctx.Err(), k, name, wait.last)
		case <-time.After(max(50*time.Millisecond, later(err))):
		}
	}
}

// later is when a server that could not do it now wants to be asked again; 0 = it is something else.
func later(err error) time.Duration {
	var s *StatusError
	if errors.Is(err, ErrUnavailable) && errors.As(err, &s) {
		return s.RetryAfter
	}
	return 0
}

// Patiently does something that may be done twice, as Apply, until the server is able to: as often as it says when to ask again. The end of ctx ends
// that, with what the server said last.
func Patiently(ctx context.Context, do func() error) error {
	for {
		err := do()
		pause := later(err)
		if pause == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// errSettled says that Ready stayed False long enough to count.
var errSettled = errors.New("the failure stayed")

// waiter is what WaitReady knows.
type waiter struct {
	client  *Client
	kind    *api.Kind
	options WaitOptions
	last    api.Condition
	failed  time.Time // since when Ready is False; zero = it is not
}

// see takes a state in and says whether it is the one that is waited for.
func (w *waiter) see(o api.Object) bool {
	now := Readiness(o)
	if now != w.last && w.options.Progress != nil {
		w.options.Progress(now)
	}
	w.last = now
	switch {
	case now.Status != api.False:
		w.failed = time.Time{}
	case w.failed.IsZero():
		w.failed = time.Now()
	}
	return now.Status == api.True
}

// follow watches o until it is ready, which it then returns, or until its failure has settled (errSettled, with the state
// that failed). It returns nil without an error when the watch ended before.
func (w *waiter) follow(ctx context.Context, o api.Object) (api.Object, error) {
	if w.see(o) {
		return o, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// The timer runs while Ready is False; it ends the watch, which else would wait for a change that never comes.
	settle := time.AfterFunc(time.Hour, func() { cancel(errSettled) })
	defer settle.Stop()
	arm := func() {
		settle.Stop()
		if !w.failed.IsZero() {
			settle.Reset(max(0, w.options.Settle-time.Since(w.failed)))
		}
	}
	arm()
	m := o.Meta()
	opts := WatchOptions{ListOptions: ListOptions{FieldSelector: "metadata.name=" + m.Name}, ResourceVersion: m.ResourceVersion}
	for ev, err := range w.client.Watch(ctx, w.kind, m.Namespace, opts) {
		if errors.Is(context.Cause(ctx), errSettled) {
			return o, errSettled
		}
		if err != nil {
			return nil, err
		}
		if ev.Type == "BOOKMARK" || ev.Object.Meta().Name != m.Name {
			continue
		}
		if ev.Type == "DELETED" {
			return nil, &StatusError{Code: 404, Reason: "NotFound", Message: fmt.Sprintf("%s %q was deleted meanwhile", w.kind.Singular, m.Name)}
		}
		if o = ev.Object; w.see(o) {
			return o, nil
		}
		arm()
	}
	if errors.Is(context.Cause(ctx), errSettled) {
		return o, errSettled
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
